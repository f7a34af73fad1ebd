//! Embedded Kubernetes API for one machine, for far up and for tests; never for production.

fn main() {}
