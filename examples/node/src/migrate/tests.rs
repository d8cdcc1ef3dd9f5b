//! Source and target on real databases, driven as the runtime does.

mod gate;
mod log;
mod moves;
mod staging;
mod support;
