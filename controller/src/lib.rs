//! Kubernetes controller for FarAgents: watches, decides with `far-core`, calls blades, writes status.
//!
//! ```text
//!  Kubernetes API ──watch──► world (index, reservations, reports) ◄──events── links (one per blade)
//!        ▲                      │ dirty agents                                    ▲
//!        │ status, finalizer    ▼                                                 │ far.node.v1, mTLS
//!        └──────────────── reconcile ── decide (far-core) ── EnsureAgent, StopAgent, ForgetAgent
//!  registry (FarNode, Lease) ◄── blades API (join, renew, heartbeat; mTLS with the controller's own CA)
//!  gateway (users' exec, cp, logs …; their Kubernetes token, checked by the API) ──► blades
//! ```
//! Nothing here is truth: the intent is in `status` (written before a blade is called), the boots are in the blades'
//! ledgers. A killed controller starts from both and goes on.
//!
//! Invariant: the controller never writes a user's spec.
#![forbid(unsafe_code)]

mod agent_spec;
mod agents;
mod backoff;
mod blades;
mod ca;
mod calls;
pub mod config;
mod convert;
mod dirty;
mod door;
mod events;
mod files;
mod gateway;
mod install;
mod leader;
mod links;
mod metrics;
mod nodes;
mod pace;
mod pages;
mod pools;
mod queue;
mod reconcile;
mod registry;
mod rules;
mod run;
mod shared;
mod status_writer;
mod stock;
mod tasks;
pub mod tokens;
mod tries;
mod turns;
mod watched;
mod watching;
mod work;
mod world;

pub use config::Config;
pub use run::{Running, start};
