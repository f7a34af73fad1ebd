//! What every listener of this project needs: a bound on who is connected, and a small server of plain pages (metrics,
//! health).
#![forbid(unsafe_code)]

mod connections;
mod pages;

pub use connections::{Connection, Connections};
pub use pages::{Page, pages};
