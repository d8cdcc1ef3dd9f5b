//! Generates messages, client and server of `node.health.v1`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    proto_common::codegen::compile()
}
