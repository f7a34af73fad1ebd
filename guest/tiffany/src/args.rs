//! The command line, parsed into what was asked for. Pure. By hand: three options need no library in the guest image.

use std::{ffi::OsString, path::PathBuf};

/// Where documents lie when nothing else is said.
const DEFAULT_FOLDER: &str = "/task";

/// Every task kind and what it does.
const TASKS: [(&str, &str); 1] = [(
    "embedder",
    "embeds every text and Markdown document under the task folder",
)];

pub(crate) const HELP: &str = "\
tiffany: the agent runtime of a Tinkerbell FAR guest

Usage: tiffany --task KIND [--task-dir DIR] [--require-documents]

Options:
  --task KIND      what to do; known kinds:
                     embedder   embeds every text and Markdown document under the task folder
  --task-dir DIR   folder with the task's documents [env TIFFANY_TASK_DIR] [default /task]
  --require-documents
                   without documents end with exit code 3 instead of embedding the self-test corpus
  --help           this text
  --version        the version

embedder writes one JSON line {\"document\",\"chunk\",\"vector\"} per chunk to stdout (384 numbers of length 1) and says on
stderr what it skipped and how much it embedded. Without documents it embeds a built-in self-test corpus.

Exit codes: 0 done; 1 failed, or part of the input could not be read; 2 wrong command line; 3 no documents, but required.
";

/// What the command line asks for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    Run(Task),
    Help,
    Version,
}

/// A task and its input.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Task {
    /// `folder_was_given`: somebody named the folder, so it must exist.
    /// `require_documents`: nothing to embed is an error.
    Embedder {
        folder: PathBuf,
        folder_was_given: bool,
        require_documents: bool,
    },
}

/// What is wrong with the command line.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum ArgsError {
    #[error("--task is missing; known tasks: {}", known())]
    NoTask,
    #[error("unknown task {task:?}; known tasks: {}", known())]
    UnknownTask { task: String },
    #[error("{option} needs a value")]
    NoValue { option: &'static str },
    #[error("{option} is given twice")]
    Twice { option: &'static str },
    #[error("unknown argument {argument:?}; see --help")]
    Unknown { argument: String },
}

fn known() -> String {
    TASKS.map(|(name, _)| name).join(", ")
}

/// Parses `--option value` and `--option=value`; `folder_from_env` counts when the command line names no folder.
pub(crate) fn parse(
    mut arguments: impl Iterator<Item = OsString>,
    folder_from_env: Option<OsString>,
) -> Result<Asked, ArgsError> {
    let (mut task, mut folder, mut require_documents) = (None, None, false);
    while let Some(argument) = arguments.next() {
        let text = argument.to_string_lossy().into_owned();
        let (name, value) = match text.split_once('=') {
            Some((name, value)) => (name, Some(OsString::from(value))),
            None => (text.as_str(), None),
        };
        let (option, slot) = match name {
            "--help" | "-h" => return Ok(Asked::Help),
            "--version" | "-V" => return Ok(Asked::Version),
            "--require-documents" if value.is_none() => {
                require_documents = true;
                continue;
            }
            "--task" => ("--task", &mut task),
            "--task-dir" => ("--task-dir", &mut folder),
            _ => return Err(ArgsError::Unknown { argument: text }),
        };
        let value = value.or_else(|| arguments.next()).filter(|value| !value.is_empty());
        if slot.replace(value.ok_or(ArgsError::NoValue { option })?).is_some() {
            return Err(ArgsError::Twice { option });
        }
    }
    let task = task.ok_or(ArgsError::NoTask)?;
    let given = folder.or(folder_from_env.filter(|folder| !folder.is_empty()));
    match task.to_str() {
        Some("embedder") => Ok(Asked::Run(Task::Embedder {
            folder_was_given: given.is_some(),
            folder: given.map_or_else(|| DEFAULT_FOLDER.into(), PathBuf::from),
            require_documents,
        })),
        _ => Err(ArgsError::UnknownTask {
            task: task.to_string_lossy().into_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(arguments: &[&str], env: Option<&str>) -> Result<Asked, ArgsError> {
        parse(arguments.iter().map(OsString::from), env.map(OsString::from))
    }

    fn embedder(folder: &str, folder_was_given: bool) -> Result<Asked, ArgsError> {
        Ok(Asked::Run(Task::Embedder {
            folder: folder.into(),
            folder_was_given,
            require_documents: false,
        }))
    }

    #[test]
    fn documents_can_be_required() {
        let Ok(Asked::Run(Task::Embedder { require_documents, .. })) =
            parsed(&["--task=embedder", "--require-documents"], None)
        else {
            panic!("a good command line");
        };
        assert!(require_documents);
        assert!(parsed(&["--task=embedder", "--require-documents=maybe"], None).is_err());
    }

    #[test]
    fn the_folder_comes_from_the_option_then_the_environment_then_the_default() {
        assert_eq!(parsed(&["--task", "embedder"], None), embedder("/task", false));
        assert_eq!(parsed(&["--task", "embedder"], Some("/e")), embedder("/e", true));
        assert_eq!(
            parsed(&["--task-dir=/o", "--task=embedder"], Some("/e")),
            embedder("/o", true)
        );
        assert_eq!(parsed(&["--task", "embedder"], Some("")), embedder("/task", false));
    }

    #[test]
    fn wrong_command_lines_are_named() {
        for (arguments, text) in [
            (
                &["--task", "dance"][..],
                "unknown task \"dance\"; known tasks: embedder",
            ),
            (&[], "--task is missing; known tasks: embedder"),
            (&["--task"], "--task needs a value"),
            (&["--task-dir=", "--task=embedder"], "--task-dir needs a value"),
            (&["--task=embedder", "--task=embedder"], "--task is given twice"),
            (&["embedder"], "unknown argument \"embedder\"; see --help"),
        ] {
            assert_eq!(parsed(arguments, None).unwrap_err().to_string(), text);
        }
    }

    #[test]
    fn help_names_every_task() {
        assert_eq!(parsed(&["--help"], None), Ok(Asked::Help));
        assert_eq!(parsed(&["-V"], None), Ok(Asked::Version));
        for (name, what) in TASKS {
            assert!(HELP.contains(name) && HELP.contains(what));
        }
    }
}
