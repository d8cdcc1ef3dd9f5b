//! Either node, or both, die exactly at each persisted transition of a migration, while clients write: all ends by itself, in one owner.

#![allow(clippy::unwrap_used)]

#[allow(dead_code, unreachable_pub)]
mod support;

use support::crash::{End, Source, Target, each};

#[tokio::test(flavor = "multi_thread")]
async fn the_source_dies_around_the_commit() {
    let points = [
        "save.before:COMMITTING",
        "save.after:COMMITTING",
        "commit.before:COMMITTING",
        "commit.after:COMMITTING",
        "give_up.before:COMMITTING",
        "give_up.after:COMMITTING",
        "save.before:COMPLETED",
        "save.after:COMPLETED",
        "finish.before:COMPLETED",
        "finish.between:COMPLETED",
    ];
    each(Source, &points, End::Completed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_source_dies_before_the_commit() {
    let points = [
        "save.before:PENDING",
        "save.after:PENDING",
        "save.before:COPYING",
        "save.after:COPYING",
        "save.before:CATCHING_UP",
        "save.after:CATCHING_UP",
        "save.before:READY",
        "save.after:READY",
    ];
    each(Source, &points, End::Completed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_target_dies() {
    let points = [
        "record.before:PREPARED",
        "record.after:PREPARED",
        "take_over.before:COMMITTED",
        "take_over.after:COMMITTED",
        "finish.before:COMPLETED",
        "finish.between:COMPLETED",
        "forget.before:COMPLETED",
        "forget.after:COMPLETED",
        "begin.before:RECEIVING",
        "begin.after:RECEIVING",
        "apply.before:RECEIVING",
        "apply.after:RECEIVING",
    ];
    each(Target, &points, End::Completed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn either_dies_while_it_is_cancelled() {
    let points = [
        "save.before:CANCELLING",
        "save.after:CANCELLING",
        "save.before:CANCELLED",
        "save.after:CANCELLED",
        "finish.before:CANCELLED",
        "finish.between:CANCELLED",
    ];
    each(Source, &points, End::Cancelled).await;
    let points = [
        "discard.before:CANCELLED",
        "discard.after:CANCELLED",
        "finish.before:CANCELLED",
        "finish.between:CANCELLED",
    ];
    each(Target, &points, End::Cancelled).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn either_dies_while_it_fails() {
    let points = [
        "save.before:CANCELLING",
        "save.after:CANCELLING",
        "save.before:FAILED",
        "save.after:FAILED",
        "finish.before:FAILED",
        "finish.between:FAILED",
    ];
    each(Source, &points, End::Failed).await;
    each(Target, &["discard.before:CANCELLED", "discard.after:CANCELLED"], End::Failed).await;
}
