//! Headers and manifests: whatever is accepted stays below the directory that it is written to.

use std::collections::HashSet;
use std::path::{Component, Path};

use prost::Message as _;
use proto_snapshot::spec::{Manifest, ManifestFile, TransferSpec};
use proto_snapshot::v1::transfer_split_snapshot_request as wire;

use crate::harness::polite;

/// Takes `data` as a header, as a page of a manifest, and as lines of names.
pub fn run(data: &[u8]) {
    if let Ok(header) = wire::Header::decode(data) {
        match TransferSpec::from_header(&header) {
            Ok(spec) => below(&[spec.target_shard.as_str(), spec.transfer_id.as_str()].join("/")),
            Err(error) => drop(polite(&error).to_owned()),
        }
    }
    if let Ok(page) = wire::Manifest::decode(data) {
        check(page.files);
    }
    let names = String::from_utf8_lossy(data);
    let named = |name: &str| wire::File { name: name.to_owned(), size: Some(1), blake3: None };
    check(names.split('\n').map(named).collect());
}

fn check(files: Vec<wire::File>) {
    let files: Result<Vec<_>, _> = files.into_iter().map(ManifestFile::try_from).collect();
    let manifest = match files.and_then(Manifest::new) {
        Ok(manifest) => manifest,
        Err(error) => return drop(polite(&error).to_owned()),
    };
    let names: HashSet<&str> = manifest.files().iter().map(|file| file.name.as_str()).collect();
    assert_eq!(names.len() as u64, manifest.file_count(), "a name occurs twice");
    for name in &names {
        below(name);
        let parents = name.match_indices('/').map(|(at, _)| &name[..at]);
        for parent in parents {
            assert!(!names.contains(parent), "{parent:?} is a file and a directory");
        }
    }
    let sum = manifest.files().iter().try_fold(0_u64, |sum, file| sum.checked_add(file.size?));
    assert_eq!(manifest.total_bytes(), sum);
    assert!(sum.unwrap_or(0) <= i64::MAX.unsigned_abs());
}

fn below(name: &str) {
    let path = Path::new(name);
    assert!(path.components().all(|part| matches!(part, Component::Normal(_))), "{name:?}");
    assert!(!name.contains('\0') && !name.is_empty());
}
