//! Compiles the `.proto` files with protox, so that a fresh machine needs no protoc.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=far");
    let guest = protox::compile(["far/guest/v1/control.proto"], ["."])?;
    prost_build::Config::new().compile_fds(guest)?;
    if std::env::var_os("CARGO_FEATURE_GRPC").is_some() {
        let services = protox::compile(
            [
                "far/node/v1/node.proto",
                "far/node/v1/network.proto",
                "far/controller/v1/blades.proto",
            ],
            ["."],
        )?;
        tonic_prost_build::configure().compile_fds(services)?;
    }
    Ok(())
}
