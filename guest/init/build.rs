//! Lays the static program out: what a guest never runs apart from the rest (see `cold.ld`).

fn main() {
    println!("cargo::rerun-if-changed=cold.ld");
    let features = std::env::var("CARGO_CFG_TARGET_FEATURE").unwrap_or_default();
    // Only the guest's program; the one that unit tests build is dynamic and never boots.
    if features.split(',').any(|feature| feature == "crt-static") {
        let folder = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
        println!("cargo::rustc-link-arg-bins=-Wl,-T,{folder}/cold.ld");
        // One call less before the payload; PID 1 shares its address space with nobody.
        println!("cargo::rustc-link-arg-bins=-Wl,-z,norelro");
    }
}
