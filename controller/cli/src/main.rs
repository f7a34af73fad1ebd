//! The user's commands: far and kubectl-far.

fn main() {}
