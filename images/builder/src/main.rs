//! Reproducible guest images: kernel, initramfs, OCI layouts.

fn main() {}
