//! Exit codes, and how an error is said: one line, each cause once.

use std::process::ExitCode;

/// `far run` when the agent ended without an exit code (never booted, microVM lost, deadline): as `docker run` has it.
pub(crate) const NO_EXIT_CODE: u8 = 125;
/// Ended by Ctrl-C.
pub(crate) const INTERRUPTED: u8 = 130;

/// How a command that ran to its end exits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    Success,
    /// The command worked and its answer is "no": an agent failed, something needed is missing.
    Negative,
    /// `far run`: the agent's own exit code, or one of the constants above.
    Code(u8),
}

impl Outcome {
    pub(crate) fn code(self) -> ExitCode {
        match self {
            Self::Success => ExitCode::SUCCESS,
            Self::Negative => ExitCode::FAILURE,
            Self::Code(code) => ExitCode::from(code),
        }
    }
}

/// `far run` itself failed: not to be taken for the agent's exit code 1.
#[derive(Debug, thiserror::Error)]
#[error("running the agent")]
pub(crate) struct RunFailed;

/// `far exec` itself failed: not to be taken for the command's exit code 1.
#[derive(Debug, thiserror::Error)]
#[error("running the command")]
pub(crate) struct ExecFailed;

/// The exit code of a command that failed.
pub(crate) fn code_of(error: &anyhow::Error) -> ExitCode {
    if error.downcast_ref::<RunFailed>().is_some() || error.downcast_ref::<ExecFailed>().is_some() {
        ExitCode::from(NO_EXIT_CODE)
    } else {
        ExitCode::FAILURE
    }
}

/// The error and its causes, joined by colons. A cause whose text its parent already ends with is left out: several
/// libraries repeat their source.
pub(crate) fn chain(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let next = cause.to_string();
        if next.is_empty() || text.contains(&next) {
            continue;
        }
        if !text.is_empty() {
            text.push_str(": ");
        }
        text.push_str(&next);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_cause_is_said_once() {
        let error = anyhow::anyhow!("connection refused")
            .context("asking the API: connection refused")
            .context("listing faragents");
        assert_eq!(chain(&error), "listing faragents: asking the API: connection refused");
    }
}
