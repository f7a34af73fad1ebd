//! The four kinds of patch, and who owns which field.

pub(crate) mod apply;
pub(crate) mod fieldset;
pub(crate) mod managed;
pub(crate) mod merge;
pub(crate) mod strategic;
pub(crate) mod walk;
