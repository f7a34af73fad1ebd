//! Pure placement and lifecycle decisions: no kube, no tokio, no clock.
