//! Network of a blade's microVMs.
