//! Compiles the `.proto` files with protox, so that a fresh machine needs no protoc.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=far");
    let guest = protox::compile(["far/guest/v1/control.proto"], ["."])?;
    // Output is not copied out of the buffer that it was read into.
    prost_build::Config::new()
        .bytes([".far.guest.v1.Log.data"])
        .compile_fds(guest)?;
    if std::env::var_os("CARGO_FEATURE_GRPC").is_some() {
        let files = [
            "far/node/v1/node.proto",
            "far/node/v1/network.proto",
            "far/controller/v1/blades.proto",
            "far/gateway/v1/gateway.proto",
        ];
        let services = protox::compile(files, ["."])?;
        tonic_prost_build::configure().compile_fds(services)?;
    }
    Ok(())
}
