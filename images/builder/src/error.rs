//! Why something could not be built, with the object and the fix.

use std::{io, path::PathBuf};

/// Errors of the builder.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// A file operation failed.
    #[error("{doing} {}", path.display())]
    Io {
        /// What was being done.
        doing: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// An input is not what it should be.
    #[error("{}: {what}", path.display())]
    Input {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A program of the system failed or is missing.
    #[error("{program}: {what}")]
    Program {
        /// Its name.
        program: &'static str,
        /// Its last words, and what to do.
        what: String,
    },
    /// A value on the command line cannot be used.
    #[error("{option}: {what}")]
    Option {
        /// Name of the option.
        option: &'static str,
        /// What is wrong and what is expected.
        what: String,
    },
}

impl BuildError {
    /// For `map_err` on file operations.
    pub(crate) fn io(doing: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { doing, path, source }
    }

    pub(crate) fn input(path: impl Into<PathBuf>, what: impl Into<String>) -> Self {
        Self::Input {
            path: path.into(),
            what: what.into(),
        }
    }
}
