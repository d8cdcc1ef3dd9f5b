//! The one description of how this workspace turns `.proto` files into Rust.
//!
//! Build scripts of the service crates call [`compile`]; this crate's own build script includes
//! the file as a module. protox reads the files, so nobody installs protoc.

use std::error::Error;
use std::path::{Path, PathBuf};

use prost::Message as _;
use prost_types::FileDescriptorSet;

/// The environment variable in which Cargo hands the include directory of `node.common.v1` to the
/// build scripts of dependents (`links = "node_common_proto"`).
pub const COMMON_INCLUDE: &str = "DEP_NODE_COMMON_PROTO_INCLUDE";

/// Compiles every `.proto` file below `<crate>/proto` into `OUT_DIR`, one Rust file for each package,
/// and writes the encoded `FileDescriptorSet` to `OUT_DIR/descriptor.bin`.
///
/// - `bytes` fields become [`bytes::Bytes`], so that payloads are slices of the receive buffer.
/// - Generated clients and servers stand behind the features `client` and `server`; the client is
///   generic over its transport.
/// - Messages of `node.common.v1` map to `::proto_common::v1`, except in the crate that defines them.
/// - Every `.proto` that was read, imported ones too, triggers a rebuild when it changes, and so does
///   a file that is new in `<crate>/proto`.
///
/// # Errors
///
/// When there is no file, or one cannot be read or does not compile; the message names file, line
/// and column.
pub fn compile() -> Result<(), Box<dyn Error>> {
    Sources::default().compile()
}

/// What differs from one set of `.proto` files to the next; everything else is as [`compile`] says.
#[derive(Debug, Clone)]
pub struct Sources {
    /// Below the crate's directory. Default `proto`.
    pub directory: &'static str,
    /// File in `OUT_DIR` for the descriptors. Default `descriptor.bin`.
    pub descriptors: &'static str,
    /// Path of the tonic codec that clients and servers use. Default `tonic_prost::ProstCodec`.
    pub codec: &'static str,
}

impl Default for Sources {
    fn default() -> Self {
        Self { directory: "proto", descriptors: "descriptor.bin", codec: "tonic_prost::ProstCodec" }
    }
}

impl Sources {
    /// See [`compile`].
    ///
    /// # Errors
    ///
    /// As there.
    pub fn compile(&self) -> Result<(), Box<dyn Error>> {
        let manifest_dir = PathBuf::from(std::env::var("CARGO_MANIFEST_DIR")?);
        let out_dir = PathBuf::from(std::env::var("OUT_DIR")?);
        let own = manifest_dir.join(self.directory);
        let mut includes = vec![own.clone()];
        println!("cargo::rerun-if-changed={}", own.display());
        println!("cargo::rerun-if-env-changed={COMMON_INCLUDE}");
        if let Ok(common) = std::env::var(COMMON_INCLUDE) {
            includes.push(PathBuf::from(common));
        }

        let mut compiler = protox::Compiler::new(&includes)?;
        compiler.include_imports(true).include_source_info(true);
        compiler.open_files(proto_files(&own)?)?;
        for read in compiler.files() {
            if let Some(path) = read.path() {
                println!("cargo::rerun-if-changed={}", path.display());
            }
        }
        let descriptors = compiler.file_descriptor_set();
        std::fs::write(out_dir.join(self.descriptors), without_comments(&descriptors).encode_to_vec())?;

        let mut builder = tonic_prost_build::configure()
            .build_transport(false)
            .bytes(".")
            .codec_path(self.codec)
            .client_mod_attribute(".", "#[cfg(feature = \"client\")]")
            .server_mod_attribute(".", "#[cfg(feature = \"server\")]");
        if !own.join("node/common").is_dir() {
            builder = builder.extern_path(".node.common.v1", "::proto_common::v1");
        }
        builder.compile_fds(descriptors)?;
        Ok(())
    }
}

/// The `.proto` files below `directory`, sorted, so that the generated code does not depend on the
/// order in which the file system lists them.
fn proto_files(directory: &Path) -> Result<Vec<PathBuf>, Box<dyn Error>> {
    let mut found = Vec::new();
    let mut pending = vec![directory.to_owned()];
    while let Some(directory) = pending.pop() {
        let entries =
            std::fs::read_dir(&directory).map_err(|error| format!("{}: {error}", directory.display()))?;
        for entry in entries {
            let path = entry?.path();
            if path.is_dir() {
                pending.push(path);
            } else if path.extension().is_some_and(|extension| extension == "proto") {
                found.push(path);
            }
        }
    }
    if found.is_empty() {
        return Err(format!("{}: no .proto file", directory.display()).into());
    }
    found.sort();
    Ok(found)
}

/// Server reflection needs the descriptors, not the comments, which are most of their size.
fn without_comments(descriptors: &FileDescriptorSet) -> FileDescriptorSet {
    let mut descriptors = descriptors.clone();
    for file in &mut descriptors.file {
        file.source_code_info = None;
    }
    descriptors
}
