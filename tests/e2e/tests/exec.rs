//! Inside a running agent: exec, cp, port-forward, top and logs, as a user types them.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{Shutdown, TcpStream},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Stdio,
};

use far_e2e::{
    far_or_skip, payload_agent,
    terminal::{Terminal, interrupt},
};
use far_testkit::{Far, find, wait_for};
use serde_json::Value;

/// A FAR with one running agent, which echoes on its port 7777.
fn running(test: &str, name: &str) -> Option<Far> {
    let far = far_or_skip(test)?;
    far.apply(&payload_agent(name, &["err=to stderr", "out=begin", "listen=7777"]));
    let _ = far.wait_phase(name, "Running");
    Some(far)
}

#[test]
fn exec_passes_streams_input_and_exit_codes_on() {
    let Some(far) = running("exec_passes_streams_input_and_exit_codes_on", "a") else {
        return;
    };
    for (steps, expected) in [
        (vec!["out=hello", "err=oops", "exit=42"], (42, "hello\n", "oops\n")),
        (vec!["exit=0"], (0, "", "")),
        (vec!["signal=9"], (137, "", "")),
    ] {
        let mut args = vec!["exec", "a", "--", "/payload"];
        args.extend(steps);
        let run = far.far(&args);
        assert_eq!(
            (run.code, run.stdout.as_str(), run.stderr.as_str()),
            expected,
            "{args:?}"
        );
    }
    // More than every window on the way, both ways.
    let text: String = (0..40_000).map(|n| format!("line {n}\n")).collect();
    let run = far.far_with(&["exec", "-i", "a", "--", "/payload", "copy-stdin"], &text);
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert!(
        run.stdout == text,
        "{} of {} bytes came back",
        run.stdout.len(),
        text.len()
    );
    let run = far.far(&["exec", "-e", "NAME=value", "a", "--", "/payload", "env=NAME"]);
    assert_eq!((run.code, run.stdout.as_str()), (0, "NAME=value\n"), "{}", run.stderr);
    let run = far.far(&["exec", "a", "--", "/not/there"]);
    assert_eq!(run.code, 127, "{}", run.stderr);
    assert!(run.stderr.contains("/not/there"), "{}", run.stderr);
    let run = far.far(&["exec", "nobody", "--", "/payload"]);
    assert_eq!(run.code, 125, "{}", run.stderr);
    assert!(run.stderr.contains("nobody"), "{}", run.stderr);
    // The same as a kubectl plugin.
    let plugin = far
        .command(&find::binary("kubectl-far"))
        .args(["exec", "a", "--", "/payload", "out=plugin", "exit=3"])
        .output()
        .expect("the plugin runs");
    assert_eq!(
        (plugin.status.code(), plugin.stdout.as_slice()),
        (Some(3), b"plugin\n".as_slice())
    );
    far.stop();
}

/// Every file below a folder: path, mode, and content or target.
fn tree(folder: &Path) -> Vec<(PathBuf, u32, Vec<u8>)> {
    let (mut found, mut folders) = (Vec::new(), vec![folder.to_path_buf()]);
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(&next)
            .expect("a folder")
            .map(|entry| entry.expect("an entry").path())
        {
            let metadata = fs::symlink_metadata(&entry).expect("it is there");
            let content = if metadata.is_symlink() {
                fs::read_link(&entry)
                    .expect("a symlink")
                    .into_os_string()
                    .into_encoded_bytes()
            } else if metadata.is_dir() {
                folders.push(entry.clone());
                Vec::new()
            } else {
                fs::read(&entry).expect("a file")
            };
            let below = entry.strip_prefix(folder).expect("below").to_path_buf();
            found.push((below, metadata.permissions().mode() & 0o777, content));
        }
    }
    found.sort();
    found
}

#[test]
fn a_folder_copied_in_and_out_again_is_the_same() {
    let Some(far) = running("a_folder_copied_in_and_out_again_is_the_same", "a") else {
        return;
    };
    let from = far.dir().join("from");
    fs::create_dir_all(from.join("deep/er")).expect("a folder");
    let big: Vec<u8> = (0..700_000_u32).flat_map(u32::to_le_bytes).collect();
    fs::write(from.join("big"), &big).expect("a file");
    fs::write(from.join("deep/er/small"), "small").expect("a file");
    fs::write(from.join("deep/empty"), "").expect("a file");
    fs::set_permissions(from.join("big"), fs::Permissions::from_mode(0o741)).expect("a mode");
    std::os::unix::fs::symlink("big", from.join("link")).expect("a symlink");
    let _ = far.far(&["cp", "from", "a:/tmp"]).ok();
    let _ = far.far(&["cp", "a:/tmp/from", "back"]).ok();
    let (sent, got) = (tree(&from), tree(&far.dir().join("back")));
    let names = |tree: &[(PathBuf, u32, Vec<u8>)]| tree.iter().map(|one| (one.0.clone(), one.1)).collect::<Vec<_>>();
    assert_eq!(names(&sent), names(&got));
    assert!(sent == got, "the contents differ");
    // One file, under another name, seen by the agent.
    let _ = far.far(&["cp", "from/deep/er/small", "a:/tmp/other"]).ok();
    assert_eq!(
        far.far(&["exec", "a", "--", "/payload", "cat=/tmp/other"]).ok(),
        "small"
    );
    for (from, to, names) in [
        ("nowhere", "a:/tmp/x", "nowhere"),
        ("a:/nowhere", "x", "/nowhere"),
        ("from", "a:/proc/x", "/proc"),
    ] {
        let text = far.far(&["cp", from, to]).err();
        assert!(text.contains(names), "{from} to {to}: {text}");
    }
    far.stop();
}

#[test]
fn a_port_of_the_agent_is_reached_and_its_use_and_output_are_shown() {
    let Some(far) = running("a_port_of_the_agent_is_reached_and_its_use_and_output_are_shown", "a") else {
        return;
    };
    wait_for("the agent to listen", || {
        let output = far.far(&["logs", "a"]).stdout;
        if output.contains("listening") {
            Ok(())
        } else {
            Err(output)
        }
    });
    let mut forwarding = far
        .command(&find::binary("far"))
        .args(["port-forward", "a", ":7777", ":7778"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("far runs");
    let mut lines = BufReader::new(forwarding.stdout.take().expect("piped")).lines();
    let mut next = || {
        let line = lines.next().expect("it says what it forwards").expect("text");
        line.split(' ').nth(1).expect("an address").to_owned()
    };
    let (echo, nobody) = (next(), next());
    // One after the other, each to its end: a half-close goes through.
    for length in [10, 100_000] {
        let mut stream = TcpStream::connect(&echo).expect("far listens");
        let sent = vec![b'x'; length];
        let mut writer = stream.try_clone().expect("a second handle");
        let writing = std::thread::spawn(move || {
            writer.write_all(&sent).expect("the echo takes it");
            writer.shutdown(Shutdown::Write).expect("it stands");
        });
        let mut got = Vec::new();
        stream.read_to_end(&mut got).expect("the echo answers");
        writing.join().expect("the writer ends");
        assert_eq!(got.len(), length);
    }
    let mut refused = Vec::new();
    let mut stream = TcpStream::connect(&nobody).expect("far listens");
    // Closed or reset: nothing comes.
    let _ = stream.read_to_end(&mut refused);
    assert!(refused.is_empty());
    interrupt(&forwarding);
    assert_eq!(
        forwarding.wait().expect("it ends").code(),
        Some(0),
        "Ctrl-C ends it cleanly"
    );
    assert!(TcpStream::connect(&echo).is_err(), "nothing listens any more");

    let one = wait_for("a heartbeat", || {
        let all: Value = serde_json::from_str(&far.far(&["top", "a", "-o", "json"]).ok()).expect("JSON");
        if all[0]["heartbeatAgeMs"].is_u64() {
            Ok(all[0].clone())
        } else {
            Err(all.to_string())
        }
    });
    let number = |name: &str| one[name].as_u64().unwrap_or_else(|| panic!("{name}: {one}"));
    let (total, available) = (number("memoryTotalKib"), number("memoryAvailableKib"));
    assert!((32 << 10..=128 << 10).contains(&total) && available < total, "{one}");
    assert!(number("processes") >= 1 && number("payloadMemoryKib") > 0, "{one}");
    let table = far.far(&["top"]).ok();
    assert!(table.starts_with("NAMESPACE") && table.contains("MiB"), "{table}");

    assert_eq!(far.far(&["logs", "a", "--stderr"]).ok(), "to stderr\n");
    let stamped = far.far(&["logs", "a", "--timestamps"]).ok();
    assert!(
        stamped
            .lines()
            .all(|line| line.starts_with("20") && line.contains("Z ")),
        "{stamped}"
    );
    assert_eq!(far.far(&["logs", "a", "--since", "2100-01-01T00:00:00Z"]).ok(), "");
    assert!(far.far(&["logs", "a", "--since", "1h"]).ok().contains("begin\n"));
    // Followed to the agent's end.
    let follower = far
        .command(&find::binary("far"))
        .args(["logs", "-f", "a", "--since", "1h", "--timestamps"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("far runs");
    let _ = far.far(&["exec", "a", "--", "/payload", "out=still here"]).ok();
    let _ = far.far(&["delete", "faragent", "a"]).ok();
    let followed = follower.wait_with_output().expect("it ends with the agent");
    let followed = String::from_utf8_lossy(&followed.stdout).into_owned();
    assert!(
        followed.contains("Z begin\n") && followed.contains("Z to stderr\n"),
        "{followed}"
    );
    far.stop();
}

/// `far` with these arguments on a terminal of its own.
fn start(far: &Far, args: &[&str]) -> Terminal {
    Terminal::start(far.command(Path::new("setsid")), &find::binary("far"), args)
}

#[test]
fn a_terminal_follows_size_keys_and_ctrl_c_and_is_given_back() {
    let Some(far) = running("a_terminal_follows_size_keys_and_ctrl_c_and_is_given_back", "a") else {
        return;
    };
    let steps = ["tty-size", "await-resize=50x120", "tty-size", "read-line", "exit=7"];
    let args: Vec<&str> = ["exec", "-it", "a", "--", "/payload"]
        .into_iter()
        .chain(steps)
        .collect();
    let mut terminal = start(&far, &args);
    let before = terminal.settings();
    terminal.until("40x100\r\n");
    terminal.until("waiting");
    assert_ne!(terminal.settings(), before, "raw while the program has it");
    terminal.resize(50, 120);
    terminal.until("50x120\r\n");
    terminal.press(b"hello\r");
    terminal.until("read hello\r\n");
    let slave = terminal.slave();
    let (code, seen) = terminal.code();
    assert_eq!(code, 7, "{seen:?}");
    assert_eq!(
        nix::sys::termios::tcgetattr(&slave).expect("a terminal"),
        before,
        "as it was"
    );

    let mut terminal = start(
        &far,
        &["exec", "-it", "a", "--", "/payload", "out=sleeps", "sleep=600000"],
    );
    terminal.until("sleeps");
    terminal.press(b"\x03");
    let (code, seen) = terminal.code();
    assert_eq!(code, 130, "Ctrl-C ended the remote program, not far: {seen:?}");

    // Without a terminal Ctrl-C is passed on as a signal.
    let mut plain = far
        .command(&find::binary("far"))
        .args(["exec", "a", "--", "/payload", "out=sleeps", "sleep=600000"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("far runs");
    let mut first = [0; 7];
    plain
        .stdout
        .as_mut()
        .expect("piped")
        .read_exact(&mut first)
        .expect("it says so");
    interrupt(&plain);
    assert_eq!(plain.wait().expect("it ends").code(), Some(130));
    // Nothing of all this is left in the agent.
    wait_for("only the payload to run", || {
        let all: Value = serde_json::from_str(&far.far(&["top", "a", "-o", "json"]).ok()).expect("JSON");
        if all[0]["channels"] == 0 && all[0]["processes"] == 1 {
            Ok(())
        } else {
            Err(all.to_string())
        }
    });
    far.stop();
}
