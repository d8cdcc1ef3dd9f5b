//! The feature table in the documentation is the one of `Cargo.toml`, and the facade forwards each
//! feature to each service without dragging one in.
#![allow(clippy::expect_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::path::Path;

type Features = BTreeMap<String, Vec<String>>;

const SERVICES: [&str; 3] = ["snapshot", "migration", "health"];

/// The features of a crate of this workspace, without the private ones.
fn features(directory: &str) -> Features {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(directory).join("Cargo.toml");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let manifest: toml::Table = text.parse().expect("a manifest");
    let mut features = Features::new();
    for (name, enables) in manifest["features"].as_table().expect("a table of features") {
        let enables = enables.as_array().expect("a list").iter();
        let enables = enables.map(|one| one.as_str().expect("a string").to_owned()).collect();
        if !name.starts_with('_') {
            features.insert(name.clone(), enables);
        }
    }
    features
}

/// The documented features: name and what stands under "default".
fn documented() -> BTreeMap<String, String> {
    let docs = include_str!("../src/lib.rs");
    let rows = docs.lines().skip_while(|line| *line != "//! | feature | default | adds |").skip(2);
    rows.map_while(|line| line.strip_prefix("//! | `"))
        .map(|row| {
            let (name, rest) = row.split_once("` | ").expect("a name");
            let (default, _) = rest.split_once(" | ").expect("a default");
            (name.to_owned(), default.to_owned())
        })
        .collect()
}

#[test]
fn the_documented_table_is_the_one_of_the_manifest() {
    let mut features = features("proto");
    let default = features.remove("default").expect("default features");
    let expected: BTreeMap<String, String> = features
        .keys()
        .map(|name| {
            let by = default.iter().find(|on| features[*on].contains(name));
            let column = match by {
                _ if default.contains(name) => "yes".to_owned(),
                Some(by) => format!("by `{by}`"),
                None => "no".to_owned(),
            };
            (name.clone(), column)
        })
        .collect();
    assert_eq!(documented(), expected);
}

#[test]
fn services_are_forwarded_to_and_stay_optional() {
    let facade = features("proto");
    for service in SERVICES {
        assert_eq!(facade[service], [format!("dep:proto-{service}")]);
        let mut own = features(&format!("proto-{service}"));
        assert_eq!(own.remove("default"), Some(Vec::new()), "proto-{service} has no default features");
        for name in own.keys() {
            let enables = &facade[name];
            let forwarded = enables.contains(&format!("proto-{service}?/{name}"));
            let composed = !enables.is_empty() && enables.iter().all(|part| own.contains_key(part));
            assert!(forwarded || composed, "`{name}` does not reach proto-{service}: {enables:?}");
        }
    }
    for (name, enables) in &facade {
        let dragged = enables.iter().filter(|one| {
            let (package, feature) = one.split_once('/').unwrap_or((one, ""));
            !feature.is_empty() && package != "proto-common" && !package.ends_with('?')
        });
        assert_eq!(dragged.count(), 0, "`{name}` drags a service in: {enables:?}");
    }
}
