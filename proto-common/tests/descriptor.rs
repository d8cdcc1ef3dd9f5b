//! The descriptors that server reflection would hand out.

#[path = "support/descriptor.rs"]
mod descriptor;

#[test]
fn holds_the_shared_messages() {
    let set = descriptor::decode(proto_common::FILE_DESCRIPTOR_SET);
    let file = descriptor::file(&set, "node/common/v1/common.proto");
    assert_eq!(file.package(), "node.common.v1");
    assert_eq!(
        descriptor::types(file),
        ["SlotRange", "Fence", "NodeIdentity", "TaskError", "Progress", "Direction", "Priority"]
    );
    assert!(file.service.is_empty());
    assert!(file.source_code_info.is_none(), "comments would be most of the binary's copy");
}
