//! The agent runtime that the guest execs.

fn main() {}
