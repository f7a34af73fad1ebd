//! `kubectl far`: the commands of `far` that kubectl itself has not.
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    far_cli::kubectl_far()
}
