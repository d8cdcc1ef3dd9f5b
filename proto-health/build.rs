//! Generates messages, client and server of `node.health.v1`, and of the standard `grpc.health.v1`.

use proto_common::codegen::Sources;

/// Thousands of watches are open at once: none of them keeps a buffer of 8 KiB.
const CODEC: &str = "crate::codec::LeanCodec";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    Sources { codec: CODEC, ..Sources::default() }.compile()?;
    // In a directory of its own, so that it stays out of what `proto::node` exports and describes.
    let standard = Sources { directory: "standard", descriptors: "standard.bin", codec: CODEC };
    standard.compile()
}
