//! Top-level names are unique over all our packages, so that the flat `proto::node` never hides one.
#![cfg(all(feature = "snapshot", feature = "migration", feature = "health"))]
#![allow(clippy::expect_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};

use prost::Message as _;
use prost_types::{FileDescriptorProto, FileDescriptorSet};

/// All our files, each once, though several sets hold the common one.
fn files() -> Vec<FileDescriptorProto> {
    let sets = [
        proto::common::FILE_DESCRIPTOR_SET,
        proto::snapshot::FILE_DESCRIPTOR_SET,
        proto::migration::FILE_DESCRIPTOR_SET,
        proto::health::FILE_DESCRIPTOR_SET,
    ];
    let mut by_name = BTreeMap::new();
    for set in sets {
        for file in FileDescriptorSet::decode(set).expect("a FileDescriptorSet").file {
            by_name.insert(file.name().to_owned(), file);
        }
    }
    by_name.into_values().collect()
}

/// Top-level names, with the file of each, where two are the same but for case and underscores: types
/// and modules that are made of them would meet.
fn collisions(files: &[FileDescriptorProto]) -> Vec<String> {
    let mut seen: BTreeMap<String, String> = BTreeMap::new();
    let mut found = Vec::new();
    for file in files {
        let messages = file.message_type.iter().map(|message| message.name().to_owned());
        let enums = file.enum_type.iter().map(|one| one.name().to_owned());
        // A service becomes two modules.
        let services = file
            .service
            .iter()
            .flat_map(|service| [format!("{}Client", service.name()), format!("{}Server", service.name())]);
        for name in messages.chain(enums).chain(services) {
            let what = format!("{}.{name}", file.package());
            let key = name.replace('_', "").to_ascii_lowercase();
            if let Some(other) = seen.insert(key, what.clone()) {
                found.push(format!("{other} and {what}"));
            }
        }
    }
    found
}

#[test]
fn no_two_services_use_a_name() {
    let files = files();
    let packages: BTreeSet<&str> = files.iter().map(FileDescriptorProto::package).collect();
    assert_eq!(
        packages.into_iter().collect::<Vec<_>>(),
        ["node.common.v1", "node.health.v1", "node.migration.v1", "node.snapshot.v1"]
    );
    assert_eq!(collisions(&files), Vec::<String>::new());
}

#[test]
fn a_collision_is_found() {
    let mut files = files();
    let mut twin = files[0].message_type[0].clone();
    twin.name = twin.name.map(|name| name.to_ascii_uppercase());
    files[1].message_type.push(twin);
    let found = collisions(&files);
    assert_eq!(found.len(), 1, "{found:?}");
}

#[test]
fn every_type_is_reachable_under_the_flat_path() {
    // A glob that two crates fill with one name would not resolve.
    use proto::node::*;
    let _ = (
        SlotRange::default(),
        NodeIdentity::default(),
        TransferProgress::default(),
        MigrationProgress::default(),
        NodeStatus::default(),
        HealthReport::default(),
        transfer_split_snapshot_request::Header::default(),
        transfer_migration_data_request::Header::default(),
    );
}
