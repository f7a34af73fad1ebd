//! CRD types of the group tiffany.dev, without a client.
