//! The steps: a table of verbs. `unsafe` lives here and in `net` only, for the calls that std does not offer.

mod net;

use crate::vsock;
use std::{fs, io, io::Write, process, thread, time::Duration};

/// Does one step.
///
/// # Errors
/// A sentence: what could not be done, or that the verb is unknown.
pub(crate) fn run(verb: &str, value: &str) -> Result<(), String> {
    if matches!(
        verb,
        "power-off" | "sysrq" | "eat-memory" | "kill-init" | "fork-bomb" | "stop-trace"
    ) {
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
        "ignore-term" => ignore(libc::SIGTERM),
        "ignore-hup" => ignore(libc::SIGHUP),
        "copy-stdin" => io::copy(&mut io::stdin().lock(), &mut io::stdout().lock())
            .map(drop)
            .map_err(text),
        "read-line" => read_line(),
        "tty-size" => tty_size().and_then(|(rows, columns)| writeln!(io::stdout(), "{rows}x{columns}").map_err(text)),
        "await-resize" => await_resize(value),
        "read-file" => until(|| fs::metadata(value).is_ok()),
        "await-end" => until(|| fs::metadata(format!("/proc/{value}")).is_err()),
        "listen" => listen(value),
        "orphans" => orphans(number(value)?),
        "await-no-zombies" => until(|| zombies() == 0),
        "fork-bomb" => fork_bomb(),
        "write" => write_file(value),
        "cannot-write" => match write_file(value) {
            Ok(()) => Err("it could be written".into()),
            Err(_) => Ok(()),
        },
        "cannot-remove" => match fs::remove_file(value) {
            Ok(()) => Err("it could be removed".into()),
            Err(_) => Ok(()),
        },
        "limit" => limit(number(value)?),
        "status" => status(value),
        "orphan" => orphan(number(value)?),
        "udp" => net::udp(value),
        "tcp" => net::tcp(value),
        "keep-asking" => net::keep_asking(value),
        "resolve" => net::resolve(value),
        "answer-udp" => net::answer_udp(value),
        "attack" => net::attack(),
        "power-off" => power_off(),
        "sysrq" => fs::write("/proc/sysrq-trigger", value).map_err(text),
        "eat-memory" => eat_memory(),
        "kill-init" => kill_init(),
        "vsock-flood" => vsock::flood(number(value)?),
        "vsock-scan" => vsock::scan(number(value)?),
        "vsock-nonsense" => vsock::nonsense(),
        "fill" => fill(value),
        "stop-trace" => stop_trace(),
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

fn ignore(signal: i32) -> Result<(), String> {
    // SAFETY: SIG_IGN installs no handler, so no code of ours runs in signal context.
    let before = unsafe { libc::signal(signal, libc::SIG_IGN) };
    if before == libc::SIG_ERR {
        Err(io::Error::last_os_error().to_string())
    } else {
        Ok(())
    }
}

/// Looks every few milliseconds until it is so; the test that asked has the time limit.
fn until(mut is_so: impl FnMut() -> bool) -> Result<(), String> {
    while !is_so() {
        run("sleep", "5")?;
    }
    Ok(())
}

fn read_line() -> Result<(), String> {
    let mut line = String::new();
    io::stdin().read_line(&mut line).map_err(text)?;
    writeln!(io::stdout(), "read {}", line.trim_end()).map_err(text)
}

fn tty_size() -> Result<(u16, u16), String> {
    // SAFETY: winsize is plain old data for which all-zero is a value.
    let mut size: libc::winsize = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes one winsize to the pointer.
    if unsafe { libc::ioctl(0, libc::TIOCGWINSZ, &mut size) } == 0 {
        Ok((size.ws_row, size.ws_col))
    } else {
        Err(io::Error::last_os_error().to_string())
    }
}

/// Until the terminal has this size, ROWSxCOLUMNS. Others on the way there are passed over: stty(1) changes first one number,
/// then the other.
fn await_resize(wanted: &str) -> Result<(), String> {
    writeln!(io::stdout(), "waiting").map_err(text)?;
    until(|| tty_size().is_ok_and(|(rows, columns)| format!("{rows}x{columns}") == wanted))
}

/// An echo server on 127.0.0.1 that serves one connection after the other.
fn listen(port: &str) -> Result<(), String> {
    let listener = std::net::TcpListener::bind(("127.0.0.1", port.parse().map_err(text)?)).map_err(text)?;
    writeln!(io::stdout(), "listening").map_err(text)?;
    for stream in listener.incoming() {
        let stream = stream.map_err(text)?;
        // A client may leave in the middle.
        let _ = io::copy(&mut &stream, &mut &stream);
    }
    Ok(())
}

/// `path:text`: a file with this text.
fn write_file(value: &str) -> Result<(), String> {
    let (path, content) = value.split_once(':').ok_or("not path:text")?;
    fs::write(path, content).map_err(text)
}

/// Soft and hard resource limit by its number.
fn limit(resource: u64) -> Result<(), String> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    let resource = libc::__rlimit_resource_t::try_from(resource).map_err(text)?;
    // SAFETY: the kernel writes one rlimit to the pointer.
    if unsafe { libc::getrlimit(resource, &mut limit) } != 0 {
        return Err(io::Error::last_os_error().to_string());
    }
    writeln!(io::stdout(), "{} {}", limit.rlim_cur, limit.rlim_max).map_err(text)
}

/// A line of /proc/self/status.
fn status(field: &str) -> Result<(), String> {
    let table = fs::read_to_string("/proc/self/status").map_err(text)?;
    let line = table
        .lines()
        .find(|line| line.starts_with(field))
        .ok_or("no such line")?;
    writeln!(io::stdout(), "{line}").map_err(text)
}

/// `count` processes whose parent is gone when they end, so that PID 1 has to reap them.
fn orphans(count: u64) -> Result<(), String> {
    for _ in 0..count {
        // SAFETY: this program has one thread; the child forks once and ends, touching nothing else.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: as above; both processes end at once without running destructors.
            unsafe {
                libc::fork();
                libc::_exit(0)
            }
        }
        if child < 0 {
            return Err(io::Error::last_os_error().to_string());
        }
        // SAFETY: the status may be null; the child is ours and was not waited for.
        unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
    }
    Ok(())
}

/// Processes that ended and were not reaped.
fn zombies() -> usize {
    let Ok(processes) = fs::read_dir("/proc") else {
        return usize::MAX;
    };
    processes
        .flatten()
        .filter_map(|entry| fs::read_to_string(entry.path().join("stat")).ok())
        .filter(|stat| stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('Z')))
        .count()
}

/// Processes that make processes, until nobody can: what pids.max is for.
fn fork_bomb() -> Result<(), String> {
    loop {
        // SAFETY: this program has one thread; both sides go on in this loop.
        unsafe { libc::fork() };
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

/// Stops the trace that the kernel's command line began, so that reading it adds nothing to it.
fn stop_trace() -> Result<(), String> {
    let (kind, target) = (c"tracefs", c"/sys/kernel/tracing");
    // SAFETY: four NUL-terminated constants, and no data.
    if unsafe { libc::mount(kind.as_ptr(), target.as_ptr(), kind.as_ptr(), 0, std::ptr::null()) } != 0 {
        return Err(io::Error::last_os_error().to_string());
    }
    fs::write("/sys/kernel/tracing/tracing_on", "0").map_err(text)
}

/// Writes until nothing more fits, and says how much did.
fn fill(path: &str) -> Result<(), String> {
    let mut file = fs::File::create(path).map_err(text)?;
    let mut kib = 0;
    while kib < 1 << 20 && file.write_all(&[7; 4096]).is_ok() {
        kib += 4;
    }
    writeln!(io::stdout(), "{path} took {kib} KiB").map_err(text)
}
