//! Image store of a blade: OCI images by digest, turned into read-only root file systems.
