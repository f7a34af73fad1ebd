//! Lays the static program out: what a guest never runs apart from the rest (see `cold.ld`).

use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=cold.ld");
    let features = std::env::var("CARGO_CFG_TARGET_FEATURE").unwrap_or_default();
    // Only the guest's program; the one that unit tests build is dynamic and never boots.
    if features.split(',').any(|feature| feature == "crt-static") {
        // A copy beside what is built: another tree with the same target folder takes this output over with the paths in it.
        let copy = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?).join("cold.ld");
        std::fs::copy("cold.ld", &copy)?;
        println!("cargo::rustc-link-arg-bins=-Wl,-T,{}", copy.display());
        // One call less before the payload; PID 1 shares its address space with nobody.
        println!("cargo::rustc-link-arg-bins=-Wl,-z,norelro");
    }
    Ok(())
}
