//! The agent runtime that the guest execs: does one task of a known kind and exits.
//!
//! Exit codes: 0 the task is done; 1 it failed or could not read all of its input; 2 it was asked for wrongly; 3 there
//! was no document, and one was required.
#![forbid(unsafe_code)]

mod args;
mod embedder;

use args::{Asked, Task};
use std::process::ExitCode;

fn main() -> ExitCode {
    let task_dir = std::env::var_os("TIFFANY_TASK_DIR");
    match args::parse(std::env::args_os().skip(1), task_dir) {
        Ok(Asked::Help) => {
            print!("{}", args::HELP);
            ExitCode::SUCCESS
        }
        Ok(Asked::Version) => {
            println!("tiffany {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        Ok(Asked::Run(Task::Embedder {
            folder,
            folder_was_given,
            require_documents,
        })) => {
            match embedder::run(
                &folder,
                folder_was_given,
                require_documents,
                &mut std::io::stdout().lock(),
                &mut std::io::stderr().lock(),
            ) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => fail(&error, if error.is_lack_of_documents() { 3 } else { 1 }),
            }
        }
        Err(error) => fail(&error, 2),
    }
}

fn fail(error: &dyn std::error::Error, code: u8) -> ExitCode {
    let mut text = format!("tiffany: {error}");
    let mut source = error.source();
    while let Some(inner) = source {
        text.push_str(&format!(": {inner}"));
        source = inner.source();
    }
    eprintln!("{text}");
    ExitCode::from(code)
}
