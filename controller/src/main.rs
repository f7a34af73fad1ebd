//! Kubernetes controller for FarAgents: placement, lifecycle, node registry, CA, status.

fn main() {}
