//! `far`: everything on one machine, and agents wherever they run.
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    far_cli::far()
}
