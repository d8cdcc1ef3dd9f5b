//! Generates messages, client and server of `raft.v1`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    proto_common::codegen::compile()
}
