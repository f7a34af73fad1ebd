//! Benches: ours and the peers interleaved in one run.

fn main() {}
