//! Test program that guests run. Each argument is one step `verb` or `verb=value`, done in order, so that a test says in
//! one line what its agent does: `payload out=hello flood=1048576 exit=3`.
//!
//! It is a hostile guest as well as a well-behaved one: some steps try to hurt the VM they run in. It is never installed
//! outside test images.

mod steps;
mod vsock;

use std::process::ExitCode;

fn main() -> ExitCode {
    if std::process::id() == 1 {
        // The init that never speaks: what a boot time-out is for.
        loop {
            std::thread::park();
        }
    }
    for argument in std::env::args().skip(1) {
        let (verb, value) = argument.split_once('=').unwrap_or((&argument, ""));
        if let Err(problem) = steps::run(verb, value) {
            eprintln!("payload: {argument}: {problem}");
            return ExitCode::from(99);
        }
    }
    ExitCode::SUCCESS
}
