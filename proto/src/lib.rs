//! Generated messages and services, one module per package, and the frame of the control stream.
//!
//! Wire types stop at the edge: a crate converts them to its own types where they arrive.
#![forbid(unsafe_code)]
// The generated modules nest as the packages do, and are re-exported under short names.
#![allow(unreachable_pub)]
// Generated code: its comments come from the .proto files and its shape from prost.
#![allow(clippy::doc_lazy_continuation, clippy::large_enum_variant, clippy::doc_markdown)]

/// The packages as protobuf nests them: generated code refers to its neighbours by this path.
mod far {
    pub mod guest {
        pub mod v1 {
            include!(concat!(env!("OUT_DIR"), "/far.guest.v1.rs"));
        }
    }
    #[cfg(feature = "grpc")]
    pub mod node {
        pub mod v1 {
            include!(concat!(env!("OUT_DIR"), "/far.node.v1.rs"));
        }
    }
    #[cfg(feature = "grpc")]
    pub mod gateway {
        pub mod v1 {
            include!(concat!(env!("OUT_DIR"), "/far.gateway.v1.rs"));
        }
    }
    #[cfg(feature = "grpc")]
    pub mod controller {
        pub mod v1 {
            include!(concat!(env!("OUT_DIR"), "/far.controller.v1.rs"));
        }
    }
}

/// Blade API served by far-controller (`far/controller/v1/blades.proto`).
#[cfg(feature = "grpc")]
pub use far::controller::v1 as controller;
/// User gateway of far-controller (`far/gateway/v1/gateway.proto`).
#[cfg(feature = "grpc")]
pub use far::gateway::v1 as gateway;
/// Control stream between far-init and far-node (`far/guest/v1/control.proto`).
pub use far::guest::v1 as guest;
/// Node API served by far-node (`far/node/v1/node.proto`).
#[cfg(feature = "grpc")]
pub use far::node::v1 as node;

pub mod frame;
