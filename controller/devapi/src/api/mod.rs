//! What the server serves: built-in kinds, kinds from CRDs, and how both are described to clients.

pub(crate) mod builtin;
pub(crate) mod crd;
pub(crate) mod discovery;
pub(crate) mod events;
pub(crate) mod meta_schema;
pub(crate) mod openapi;
pub(crate) mod registry;
pub(crate) mod resource;
