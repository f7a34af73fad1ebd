//! End-to-end tests over the real binaries: what a user types, and what must come of it. The cases are in `tests/`, one
//! file per story; this crate holds only what they share.
#![forbid(unsafe_code)]

pub mod terminal;

use far_testkit::{Far, Options, skip};

/// A FAR with default options, or `None` after saying by name what this machine lacks.
#[must_use]
pub fn far_or_skip(test: &str) -> Option<Far> {
    far_with_or_skip(test, Options::default())
}

/// As [`far_or_skip`], with options.
#[must_use]
pub fn far_with_or_skip(test: &str, options: Options) -> Option<Far> {
    Far::start(options).map_err(|missing| skip(test, &missing)).ok()
}

/// A FarAgent that runs the payload program with these steps.
#[must_use]
pub fn payload_agent(name: &str, steps: &[&str]) -> String {
    payload_agent_with(name, steps, "")
}

/// As [`payload_agent`], with more lines of `spec` (two spaces deep).
#[must_use]
pub fn payload_agent_with(name: &str, steps: &[&str], more: &str) -> String {
    format!(
        "apiVersion: tiffany.dev/v1\nkind: FarAgent\nmetadata:\n  name: {name}\nspec:\n  image: {image}\n  memory: 128Mi\n  cpu: 1\n  args: {args}\n{more}\n",
        image = far_testkit::images::PAYLOAD,
        args = serde_json::to_string(steps).expect("strings are JSON"),
    )
}
