//! The guest's end of the control stream: the connection that comes and goes, and what must survive its loss.

pub(crate) mod connection;
pub(crate) mod outbox;
pub(crate) mod queue;
