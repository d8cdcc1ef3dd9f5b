//! What to do about an error, for a person at a terminal.

use proto::common::error::{Code, CommonReason, Error};
use proto::snapshot::Reason;

use crate::trust;

/// Advice about `error` of the node at `address`; none where its own sentence says all.
pub(crate) fn about(error: &Error, address: &str) -> Option<String> {
    let fact = |name: &str| error.get(name).unwrap_or("?");
    if let Some(reason) = Reason::parse(error.reason()) {
        return snapshot(reason, &fact, address);
    }
    general(error, address)
}

/// Advice about an error that is of no service in particular.
pub(crate) fn general(error: &Error, address: &str) -> Option<String> {
    if error.is(CommonReason::Unavailable) || error.code() == Code::Unavailable {
        let advice = format!("see that the node runs and that {address} is its gRPC address");
        // A listener that wants TLS closes a plaintext connection without a word.
        let plaintext = cfg!(feature = "tls") && !trust::dialer().is_encrypted();
        let tls = "; if it wants TLS, give --tls-ca, --tls-cert and --tls-key";
        return Some(if plaintext { advice + tls } else { advice });
    }
    if error.reason() == "SOURCE_CHANGED" {
        let advice =
            "nothing may write to PATH while it is sent: send a copy or a file system's snapshot of it";
        return Some(advice.to_owned());
    }
    match error.code() {
        Code::Unimplemented => Some(format!(
            "what answers at {address} does not have this service; see that it is a node's gRPC address"
        )),
        Code::DeadlineExceeded => {
            Some("see that the node is alive, or give it longer with --timeout".to_owned())
        }
        Code::Unauthenticated => Some(
            "see --tls-ca, --tls-cert and --tls-key, and that the address is that of the node you mean"
                .to_owned(),
        ),
        Code::PermissionDenied => Some("ask whoever runs the node to permit it".to_owned()),
        _ => None,
    }
}

fn snapshot<'a>(reason: Reason, fact: &impl Fn(&str) -> &'a str, address: &str) -> Option<String> {
    let advice = match reason {
        Reason::StaleFence => format!(
            "somebody with a higher epoch or term has taken the shard over: see who leads it. The node has epoch {} and term {}; \
             leave out --epoch to send without a fence",
            fact("current_epoch"),
            fact("current_term")
        ),
        Reason::StaleSnapshot => format!(
            "the shard has a newer snapshot already (term {}, index {}): take a new one, and give its --term and --index",
            fact("installed_term"),
            fact("installed_index")
        ),
        Reason::SpecificationMismatch => format!(
            "that transfer ID stands for something else, which differs in {}: \
             repeat the options that it was started with, or choose another --transfer-id",
            option_of(fact("field"))
        ),
        Reason::Superseded => {
            "another sender goes on with this transfer; to take it over again, run this command once more"
                .to_owned()
        }
        Reason::TransferCancelled => {
            "its ID is spent: to send it after all, choose a new --transfer-id".to_owned()
        }
        Reason::RangeBusy | Reason::TooManyTransfers => {
            format!("see what moves there with: nodectl transfers --at {address} --active")
        }
        Reason::InsufficientDisk => {
            // Bytes, or files and directories where the file system has no more of these.
            let (needed, left) = match fact("needed_files") {
                "?" => (format!("{} bytes", fact("needed_bytes")), fact("available_bytes")),
                files => (format!("{files} files and directories"), fact("available_files")),
            };
            match fact("peer") {
                "?" => format!("it needs {needed} and has {left}: make room on the node"),
                peer => format!(
                    "it needs {needed}, and snapshots from {peer} have {left} left of their share: see what else comes from it with \
                     nodectl transfers --at {address} --active, make room on the node, or raise its --disk-percent-per-peer"
                ),
            }
        }
        Reason::TooManyShards => format!(
            "the node keeps {} such shards for {} and no more: choose one of these with --target-shard or, where it is fences that it remembers, leave out --epoch to send without one",
            fact("limit"),
            fact("peer")
        ),
        Reason::WrongNode => {
            "see that the address leads to the node that you mean, or leave out --target-node".to_owned()
        }
        Reason::TransferNotFound => format!("see what the node knows with: nodectl transfers --at {address}"),
        Reason::TooLateToCancel => {
            "a snapshot that is being installed, or was, can no longer be cancelled; nothing was changed"
                .to_owned()
        }
        Reason::InstallRefused if fact("shard") != "?" => {
            "its log names the record: repair or remove that while the node is stopped, or choose another --target-shard".to_owned()
        }
        Reason::InstallRefused => {
            "the node's store does not take this snapshot; its log says more".to_owned()
        }
        Reason::TotalsMismatch | Reason::FileChecksumMismatch => {
            "what was read differs from what was stored: see that nothing writes to PATH, then send it again"
                .to_owned()
        }
        Reason::StorageFailed => "see the disk and the log of the node".to_owned(),
        Reason::ShuttingDown => "wait until the node is back".to_owned(),
        Reason::Internal => "this is a bug; the log of the node may say more".to_owned(),
        _ => return None,
    };
    Some(advice)
}

/// What a person gave that became the field of the header.
fn option_of(field: &str) -> &str {
    match field.rsplit('.').next().unwrap_or(field) {
        "source_shard_id" => "--source-shard",
        "target_shard_id" => "--target-shard",
        "source_node_id" => "--source-node",
        "slots" => "--slots",
        "snapshot_index" => "--index",
        "snapshot_term" => "--term",
        "content_version" | "manifest" | "files" => "what PATH holds",
        _ => field,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_what_to_do() {
        let stale =
            Reason::StaleFence.error("lower").metadata("current_epoch", "7").metadata("current_term", "2");
        assert!(about(&stale, "n1:1").unwrap().contains("epoch 7 and term 2"));
        let full = Reason::InsufficientDisk.error("full");
        let files = full.clone().metadata("needed_files", "7").metadata("available_files", "3");
        assert!(
            about(&files, "n1:1").unwrap().contains("needs 7 files and directories and has 3: make room")
        );
        let bytes =
            full.metadata("needed_bytes", "7").metadata("available_bytes", "3").metadata("peer", "n2");
        assert!(about(&bytes, "n1:1").unwrap().contains("needs 7 bytes, and snapshots from n2 have 3 left"));
        let refused = Error::new(CommonReason::Unavailable, "connection refused");
        assert!(about(&refused, "n1:1").unwrap().contains("n1:1"));
        let other = Error::with_code(Code::Unimplemented, "UNIMPLEMENTED", "");
        assert!(about(&other, "n1:1").unwrap().contains("does not have this service"));
        assert_eq!(about(&Error::with_code(Code::Unknown, "ODD", "odd"), "n1:1"), None);
    }
}
