//! Reads an encoded `FileDescriptorSet` for the tests of the crates that carry one.

use prost::Message as _;
use prost_types::{FileDescriptorProto, FileDescriptorSet};

/// Decodes `encoded` and checks that it is complete: each import of a file stands before it.
#[allow(clippy::expect_used, reason = "a test fails by panicking")]
pub(crate) fn decode(encoded: &[u8]) -> FileDescriptorSet {
    let set = FileDescriptorSet::decode(encoded).expect("a FileDescriptorSet");
    for (position, file) in set.file.iter().enumerate() {
        for import in &file.dependency {
            let found = set.file[..position].iter().any(|earlier| earlier.name() == import);
            assert!(found, "{} imports {import}, which does not stand before it", file.name());
        }
    }
    set
}

/// The file `name`.
pub(crate) fn file<'a>(set: &'a FileDescriptorSet, name: &str) -> &'a FileDescriptorProto {
    set.file.iter().find(|file| file.name() == name).unwrap_or_else(|| panic!("no {name}"))
}

/// All methods as `Service.Method(in|stream in) returns (out|stream out)`, in the order of the file.
#[allow(dead_code, reason = "node.common.v1 has no service")]
pub(crate) fn methods(file: &FileDescriptorProto) -> Vec<String> {
    let shape = |streaming: bool, name: &str| {
        let short = name.rsplit('.').next().unwrap_or(name);
        format!("{}{short}", if streaming { "stream " } else { "" })
    };
    file.service
        .iter()
        .flat_map(|service| {
            service.method.iter().map(move |method| {
                let input = shape(method.client_streaming(), method.input_type());
                let output = shape(method.server_streaming(), method.output_type());
                format!("{}.{}({input}) returns ({output})", service.name(), method.name())
            })
        })
        .collect()
}

/// Names of the top-level messages and enums.
#[allow(dead_code, reason = "not every crate's test looks at them")]
pub(crate) fn types(file: &FileDescriptorProto) -> Vec<&str> {
    file.message_type
        .iter()
        .map(prost_types::DescriptorProto::name)
        .chain(file.enum_type.iter().map(prost_types::EnumDescriptorProto::name))
        .collect()
}
