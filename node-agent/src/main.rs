//! Node agent of a blade: ledger, microVM supervisor, control streams, logs, node API.

fn main() {}
