//! Stories of attempts over an in-memory VMM and a fake guest that speaks the real protocol over a real Unix socket.

mod claim;
pub(crate) mod doubles;
mod hostile;
mod inside;
mod life;
mod pulse;
mod restart;
