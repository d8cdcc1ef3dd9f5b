//! Tests of the store as a user of the trait sees it; what can be lost worst, first.

mod basic;
mod support;
