//! Writing to the terminal: a closed pipe ends the program quietly, colours appear on terminals only.

use std::io::{self, IsTerminal, Write};

/// What a shell shows for a program that SIGPIPE ended.
const BROKEN_PIPE: i32 = 141;

/// Writes bytes to standard output at once. Ends the program when nobody reads any more, as `far get | head` wants.
pub(crate) fn bytes(data: &[u8]) {
    write(&mut io::stdout().lock(), data);
}

/// Writes bytes to standard error.
pub(crate) fn error_bytes(data: &[u8]) {
    write(&mut io::stderr().lock(), data);
}

fn write(stream: &mut impl Write, data: &[u8]) {
    if stream.write_all(data).and_then(|()| stream.flush()).is_err() {
        std::process::exit(BROKEN_PIPE);
    }
}

/// One line of the command's answer.
pub(crate) fn line(text: &str) {
    bytes(format!("{text}\n").as_bytes());
}

/// One line for people beside the answer: progress, hints.
pub(crate) fn note(text: &str) {
    error_bytes(format!("{text}\n").as_bytes());
}

/// Why the command failed.
pub(crate) fn error(text: &str) {
    let (on, off) = if is_coloured(&io::stderr()) {
        ("\x1b[31m", "\x1b[0m")
    } else {
        ("", "")
    };
    error_bytes(format!("{on}far: {text}{off}\n").as_bytes());
}

/// Whether colours are wanted on this stream (<https://no-color.org>).
pub(crate) fn is_coloured(stream: &impl IsTerminal) -> bool {
    stream.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// `text` in green, yellow or red on a terminal.
pub(crate) fn coloured(text: &str, colour: Colour) -> String {
    if is_coloured(&io::stdout()) {
        format!("\x1b[{}m{text}\x1b[0m", colour as u8)
    } else {
        text.to_owned()
    }
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum Colour {
    Red = 31,
    Green = 32,
    Yellow = 33,
}
