//! Runs one VMM and owns its life: QEMU microvm or Firecracker behind one Firecracker JSON description.

fn main() {}
