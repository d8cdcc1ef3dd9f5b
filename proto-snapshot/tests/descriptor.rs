//! The descriptors that server reflection hands out.

#[path = "../../proto-common/tests/support/descriptor.rs"]
mod descriptor;

#[test]
fn holds_the_service_and_its_imports() {
    let set = descriptor::decode(proto_snapshot::FILE_DESCRIPTOR_SET);
    let file = descriptor::file(&set, "node/snapshot/v1/snapshot.proto");
    assert_eq!(file.package(), "node.snapshot.v1");
    assert_eq!(
        descriptor::methods(file),
        [
            "SplitSnapshotService.TransferSplitSnapshot(stream TransferSplitSnapshotRequest) returns (stream TransferSplitSnapshotResponse)",
            "SplitSnapshotService.GetTransferProgress(GetTransferProgressRequest) returns (GetTransferProgressResponse)",
            "SplitSnapshotService.WatchTransferProgress(WatchTransferProgressRequest) returns (stream WatchTransferProgressResponse)",
            "SplitSnapshotService.ListTransfers(ListTransfersRequest) returns (ListTransfersResponse)",
            "SplitSnapshotService.CancelTransfer(CancelTransferRequest) returns (CancelTransferResponse)",
        ]
    );
    assert_eq!(descriptor::file(&set, "node/common/v1/common.proto").package(), "node.common.v1");
}
