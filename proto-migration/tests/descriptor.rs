//! The descriptors that server reflection hands out, and what the contract says about tags.
#![allow(clippy::expect_used, reason = "a test fails by panicking")]

#[path = "../../proto-common/tests/support/descriptor.rs"]
mod descriptor;

use prost_types::DescriptorProto;

const FILE: &str = "node/migration/v1/migration.proto";

#[test]
fn holds_the_service_and_its_imports() {
    let set = descriptor::decode(proto_migration::FILE_DESCRIPTOR_SET);
    let file = descriptor::file(&set, FILE);
    assert_eq!(file.package(), "node.migration.v1");
    assert_eq!(
        descriptor::methods(file),
        [
            "MigrationService.StartMigration(StartMigrationRequest) returns (StartMigrationResponse)",
            "MigrationService.TransferMigrationData(stream TransferMigrationDataRequest) returns (stream TransferMigrationDataResponse)",
            "MigrationService.CompleteMigration(CompleteMigrationRequest) returns (CompleteMigrationResponse)",
            "MigrationService.CancelMigration(CancelMigrationRequest) returns (CancelMigrationResponse)",
            "MigrationService.GetMigrationProgress(GetMigrationProgressRequest) returns (GetMigrationProgressResponse)",
            "MigrationService.WatchMigrationProgress(WatchMigrationProgressRequest) returns (stream WatchMigrationProgressResponse)",
            "MigrationService.ListMigrations(ListMigrationsRequest) returns (ListMigrationsResponse)",
            "MigrationService.ResolveMigration(ResolveMigrationRequest) returns (ResolveMigrationResponse)",
        ]
    );
    assert_eq!(descriptor::file(&set, "node/common/v1/common.proto").package(), "node.common.v1");
}

#[test]
fn payloads_have_the_last_tag() {
    let set = descriptor::decode(proto_migration::FILE_DESCRIPTOR_SET);
    let file = descriptor::file(&set, FILE);
    let request = find(&file.message_type, "TransferMigrationDataRequest");
    for (message, payload) in [("Bulk", "payload"), ("Delta", "payload"), ("Entry", "value")] {
        let fields = &find(&request.nested_type, message).field;
        let last = fields.iter().max_by_key(|field| field.number()).expect("fields");
        assert_eq!((last.name(), last.number()), (payload, 2047), "{message}");
    }
}

fn find<'a>(messages: &'a [DescriptorProto], name: &str) -> &'a DescriptorProto {
    messages.iter().find(|message| message.name() == name).unwrap_or_else(|| panic!("no {name}"))
}
