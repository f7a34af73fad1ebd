//! The steps: a table of verbs. `unsafe` lives here only, for the calls that std does not offer.

use std::{fs, io, io::Write, process, thread, time::Duration};

/// Does one step.
///
/// # Errors
/// A sentence: what could not be done, or that the verb is unknown.
pub(crate) fn run(verb: &str, value: &str) -> Result<(), String> {
    if matches!(verb, "power-off" | "sysrq" | "eat-memory" | "kill-init") {
        only_in_a_guest()?;
    }
    match verb {
        "out" => writeln!(io::stdout(), "{value}").map_err(text),
        "err" => writeln!(io::stderr(), "{value}").map_err(text),
        "flood" => flood(number(value)?),
        "env" => writeln!(io::stdout(), "{value}={}", std::env::var(value).unwrap_or_default()).map_err(text),
        "cat" => fs::read(value)
            .and_then(|bytes| io::stdout().write_all(&bytes))
            .map_err(text),
        "stat" => stat(value),
        "count-to" => count(number(value)?),
        "sleep" => {
            // The step is a pause: nothing to wait for.
            #[allow(clippy::disallowed_methods)]
            thread::sleep(Duration::from_millis(number(value)?));
            Ok(())
        }
        "exit" => process::exit(i32::try_from(number(value)?).map_err(text)?),
        "signal" => kill_self(number(value)?),
        "ignore-term" => ignore_term(),
        "orphan" => orphan(number(value)?),
        "power-off" => power_off(),
        "sysrq" => fs::write("/proc/sysrq-trigger", value).map_err(text),
        "eat-memory" => eat_memory(),
        "kill-init" => kill_init(),
        _ => Err("unknown step".into()),
    }
}

/// Steps that would hurt a real machine look first where they are: only our guests boot with `rdinit=/init`.
fn only_in_a_guest() -> Result<(), String> {
    let cmdline = fs::read_to_string("/proc/cmdline").map_err(text)?;
    if cmdline.split_whitespace().any(|word| word == "rdinit=/init") {
        return Ok(());
    }
    Err("refused: this is not a FAR guest (no rdinit=/init on the kernel command line)".into())
}

fn text(error: impl ToString) -> String {
    error.to_string()
}

fn number(value: &str) -> Result<u64, String> {
    value.parse().map_err(|_| format!("{value:?} is not a number"))
}

/// `bytes` bytes of numbered lines on stdout, as fast as the pipe takes them.
fn flood(bytes: u64) -> Result<(), String> {
    let mut out = io::BufWriter::with_capacity(1 << 16, io::stdout().lock());
    let (mut written, mut line) = (0_u64, 0_u64);
    while written < bytes {
        let text_line = format!("{line:015}\n");
        out.write_all(text_line.as_bytes()).map_err(text)?;
        written += text_line.len() as u64;
        line += 1;
    }
    out.flush().map_err(text)
}

/// One line every 50 ms, so that a test can break a connection in the middle and look for gaps.
fn count(last: u64) -> Result<(), String> {
    for n in 1..=last {
        writeln!(io::stdout(), "line {n}").map_err(text)?;
        run("sleep", "50")?;
    }
    Ok(())
}

fn stat(path: &str) -> Result<(), String> {
    use std::os::unix::fs::MetadataExt;
    let meta = fs::metadata(path).map_err(text)?;
    writeln!(
        io::stdout(),
        "{path} mode={:o} uid={} size={}",
        meta.mode() & 0o7777,
        meta.uid(),
        meta.len()
    )
    .map_err(text)
}

/// A grandchild that keeps stdout open and outlives its parent.
fn orphan(millis: u64) -> Result<(), String> {
    let program = std::env::current_exe().map_err(text)?;
    process::Command::new(&program)
        .arg(format!("sleep={millis}"))
        .spawn()
        .map(drop)
        .map_err(text)
}

fn eat_memory() -> Result<(), String> {
    let mut held: Vec<Vec<u8>> = Vec::new();
    loop {
        // Written, not only reserved: untouched pages cost nothing.
        held.push(vec![0xa5; 4 << 20]);
        if held.len() > 1 << 20 {
            return Err("memory never ended".into());
        }
    }
}

fn kill_self(signal: u64) -> Result<(), String> {
    let signal = i32::try_from(signal).map_err(text)?;
    // SAFETY: raise takes a number and touches no memory of ours.
    if unsafe { libc::raise(signal) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error().to_string())
    }
}

fn ignore_term() -> Result<(), String> {
    // SAFETY: SIG_IGN installs no handler, so no code of ours runs in signal context.
    let before = unsafe { libc::signal(libc::SIGTERM, libc::SIG_IGN) };
    if before == libc::SIG_ERR {
        Err(io::Error::last_os_error().to_string())
    } else {
        Ok(())
    }
}

/// Ends the whole VM without a word, as a guest may: no exit report can follow.
fn power_off() -> Result<(), String> {
    // SAFETY: reboot takes a command word; it returns only on failure.
    unsafe { libc::reboot(libc::RB_AUTOBOOT) };
    Err(io::Error::last_os_error().to_string())
}

fn kill_init() -> Result<(), String> {
    // SAFETY: kill takes two numbers and touches no memory of ours.
    if unsafe { libc::kill(1, libc::SIGKILL) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error().to_string())
    }
}
