//! Generates the messages of `node.common.v1` and tells dependents where the `.proto` files lie.

#[path = "src/codegen.rs"]
#[allow(unreachable_pub, dead_code, reason = "public in the library, private here")]
mod codegen;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=src/codegen.rs");
    println!("cargo::metadata=INCLUDE={}/proto", std::env::var("CARGO_MANIFEST_DIR")?);
    codegen::compile()
}
