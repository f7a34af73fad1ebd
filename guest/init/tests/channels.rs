//! Exec, put, get and forward, with far-init in its own namespaces: what users do, and what hostile hosts and payloads do.

// A panic is a test's report.
#![allow(clippy::unwrap_used)]

mod common;

use common::{
    Connection, Event,
    host::{Host, exec},
    sandbox::{Sandbox, sandbox},
};
use far_proto::{
    frame::{CHANNEL_WINDOW, MAX_CHANNELS},
    guest::{
        ChannelStream, Credit, Data, EnvVar, ErrorKind, Exec, ExitAck, Freeze, SetTime, Shutdown, TerminalSize,
        TransferKind, channel_end::How, exit, host_message::Kind as ToGuest,
    },
};
use std::{
    fs,
    io::{Read, Write},
    net::TcpListener,
    os::unix::fs::symlink,
    thread,
};

const FOR_EVER: [&str; 2] = ["out=up", "sleep=3600000"];

/// A guest whose payload runs, and its connection.
fn running(test: &str, args: &[&str], prepare: impl FnOnce(&mut Sandbox)) -> Option<(Sandbox, Connection)> {
    let mut guest = sandbox(test, args)?;
    prepare(&mut guest);
    guest.start();
    let mut connection = guest.blade.accept().unwrap();
    while guest.blade.text(0) != "up\n" {
        assert!(guest.blade.step(&mut connection).unwrap().is_some());
    }
    Some((guest, connection))
}

/// Ends the payload and the guest.
fn finish(mut guest: Sandbox, mut connection: Connection) {
    connection.send(ToGuest::Shutdown(Shutdown { grace_s: 0 })).unwrap();
    let exit = guest.blade.until_exit(&mut connection).unwrap();
    assert_eq!(exit.how, Some(exit::How::Signal(9)));
    connection.send(ToGuest::ExitAck(ExitAck {})).unwrap();
    guest.ends_well();
}

#[test]
fn exec_gives_both_streams_and_the_code_and_sees_what_the_payload_sees() {
    const NAME: &str = "exec_gives_both_streams_and_the_code_and_sees_what_the_payload_sees";
    let Some((mut guest, mut connection)) = running(NAME, &FOR_EVER, |guest| {
        guest.blade.config.user = "agent".into();
        guest.blade.config.env = vec![EnvVar {
            name: "GREETING".into(),
            value: "moin".into(),
        }];
    }) else {
        return;
    };
    let mut host = Host::new(&mut guest.blade, &mut connection);
    // Found by PATH, which Exec changes.
    let request = Exec {
        env: vec![EnvVar {
            name: "PATH".into(),
            value: "/nowhere:/bin".into(),
        }],
        ..exec(
            7,
            &[
                "payload",
                "env=GREETING",
                "env=HOME",
                "stat=/proc/self/fd/1",
                "err=oops",
                "exit=42",
            ],
        )
    };
    host.open(7, ToGuest::Exec(request));
    let heard = host.end(7);
    let end = heard.end.as_ref().unwrap();
    assert_eq!((&end.how, end.error.as_str()), (&Some(How::Code(42)), ""));
    let out = String::from_utf8_lossy(&heard.stdout);
    assert!(
        out.starts_with("GREETING=moin\nHOME=/home/agent\n/proc/self/fd/1 mode="),
        "{out}"
    );
    assert!(out.contains("uid=1000"), "{out}");
    assert_eq!(heard.stderr, b"oops\n");
    assert!(heard.opened.unwrap().pid > 1);
    let mut over = heard.over.clone();
    over.sort_unstable();
    assert_eq!(
        over,
        [ChannelStream::Stdout, ChannelStream::Stderr],
        "in whatever order"
    );

    host.open(
        8,
        ToGuest::Exec(Exec {
            user: "root".into(),
            ..exec(8, &["/bin/payload", "env=HOME", "stat=/proc/self/fd/1", "signal=10"])
        }),
    );
    let heard = host.end(8);
    assert_eq!(heard.end.as_ref().unwrap().how, Some(How::Signal(10)));
    let out = String::from_utf8_lossy(&heard.stdout);
    assert!(out.starts_with("HOME=/root\n") && out.contains("uid=0"), "{out}");
    finish(guest, connection);
}

#[test]
fn what_exec_cannot_start_is_told_with_a_code_as_a_shell_gives_it() {
    const NAME: &str = "what_exec_cannot_start_is_told_with_a_code_as_a_shell_gives_it";
    let Some((mut guest, mut connection)) = running(NAME, &FOR_EVER, |_| {}) else {
        return;
    };
    let mut host = Host::new(&mut guest.blade, &mut connection);
    for (id, request, how, kind, text) in [
        (
            1,
            exec(1, &["none"]),
            Some(How::Code(127)),
            ErrorKind::NotFound,
            "none: not found",
        ),
        (
            2,
            exec(2, &["/etc/passwd"]),
            Some(How::Code(126)),
            ErrorKind::Failed,
            "/etc/passwd: Permission denied",
        ),
        (3, exec(3, &[]), None, ErrorKind::Invalid, "argv is empty"),
        (
            4,
            Exec {
                user: "ghost".into(),
                ..exec(4, &["payload"])
            },
            None,
            ErrorKind::NotFound,
            "spec.user",
        ),
        (
            5,
            Exec {
                working_dir: "/no".into(),
                ..exec(5, &["payload"])
            },
            Some(How::Code(126)),
            ErrorKind::Failed,
            "entering the working directory",
        ),
        (
            6,
            Exec {
                working_dir: "no".into(),
                ..exec(6, &["payload"])
            },
            None,
            ErrorKind::Invalid,
            "working_dir",
        ),
        (
            7,
            exec(7, &["pay\0load"]),
            None,
            ErrorKind::Invalid,
            "argv, env or a path contains a NUL byte",
        ),
        (
            8,
            exec(8, &["payload", &"x".repeat(600_000)]),
            None,
            ErrorKind::Invalid,
            "argv and env are more",
        ),
    ] {
        host.open(id, ToGuest::Exec(request));
        let heard = host.end(id);
        let end = heard.end.as_ref().unwrap();
        assert_eq!((&end.how, end.kind()), (&how, kind), "{end:?}");
        assert!(end.error.starts_with(text), "{end:?}");
        assert!(heard.opened.is_none());
    }
    finish(guest, connection);
}

#[test]
fn stdin_reaches_exec_whole_and_its_end_too() {
    const NAME: &str = "stdin_reaches_exec_whole_and_its_end_too";
    let Some((mut guest, mut connection)) = running(NAME, &FOR_EVER, |_| {}) else {
        return;
    };
    let mut host = Host::new(&mut guest.blade, &mut connection);
    host.open(
        1,
        ToGuest::Exec(Exec {
            stdin: true,
            ..exec(1, &["payload", "copy-stdin", "exit=5"])
        }),
    );
    let sent: Vec<u8> = (0..1_000_000_u32).map(|n| (n % 251) as u8).collect();
    host.write(1, ChannelStream::Stdin, &sent, true);
    let heard = host.end(1);
    assert_eq!(heard.end.as_ref().unwrap().how, Some(How::Code(5)));
    assert!(heard.stdout == sent, "{} bytes", heard.stdout.len());
    finish(guest, connection);
}

#[test]
fn a_terminal_has_a_size_echoes_and_turns_ctrl_c_into_a_signal() {
    const NAME: &str = "a_terminal_has_a_size_echoes_and_turns_ctrl_c_into_a_signal";
    let Some((mut guest, mut connection)) = running(NAME, &FOR_EVER, |_| {}) else {
        return;
    };
    let mut host = Host::new(&mut guest.blade, &mut connection);
    let terminal = |rows, columns| Some(TerminalSize { rows, columns });
    let request = Exec {
        terminal: terminal(31, 99),
        stdin: true,
        ..exec(
            1,
            &[
                "payload",
                "tty-size",
                "await-resize=50x132",
                "tty-size",
                "read-line",
                "sleep=3600000",
            ],
        )
    };
    host.open(1, ToGuest::Exec(request));
    let text = |host: &Host, id: u32| String::from_utf8_lossy(&host.channels[&id].stdout).into_owned();
    host.until("the first size", |host| text(host, 1).contains("31x99\r\n"));
    host.until("ready for the next", |host| text(host, 1).contains("waiting\r\n"));
    host.resize(1, 50, 132);
    host.until("the second size", |host| text(host, 1).contains("50x132\r\n"));
    host.type_in(1, "hello\n");
    host.until("the line and its echo", |host| {
        text(host, 1).ends_with("hello\r\nread hello\r\n")
    });
    host.type_in(1, "\x03");
    assert_eq!(host.end(1).end.as_ref().unwrap().how, Some(How::Signal(2)));

    // The end of stdin is typed.
    let request = Exec {
        terminal: terminal(0, 0),
        stdin: true,
        ..exec(2, &["payload", "tty-size", "copy-stdin", "exit=6"])
    };
    host.open(2, ToGuest::Exec(request));
    host.until("the size", |host| text(host, 2).contains("1x1\r\n"));
    host.write(2, ChannelStream::Stdin, b"no newline", true);
    assert_eq!(host.end(2).end.as_ref().unwrap().how, Some(How::Code(6)));
    assert!(text(&host, 2).ends_with("no newlineno newline"), "{}", text(&host, 2));

    // A signal goes to the foreground group.
    let request = Exec {
        terminal: terminal(24, 80),
        ..exec(3, &["payload", "out=there", "sleep=3600000"])
    };
    host.open(3, ToGuest::Exec(request));
    host.until("the program", |host| text(host, 3) == "there\r\n");
    for number in [0, 65, u32::MAX, 15] {
        host.signal(3, number);
    }
    assert_eq!(host.end(3).end.as_ref().unwrap().how, Some(How::Signal(15)));
    finish(guest, connection);
}

#[test]
fn a_closed_exec_is_asked_to_leave_then_killed() {
    const NAME: &str = "a_closed_exec_is_asked_to_leave_then_killed";
    let Some((mut guest, mut connection)) = running(NAME, &FOR_EVER, |_| {}) else {
        return;
    };
    let mut host = Host::new(&mut guest.blade, &mut connection);
    host.exec(1, &["payload", "out=polite", "sleep=3600000"]);
    host.exec(
        2,
        &["payload", "ignore-hup", "ignore-term", "out=deaf", "sleep=3600000"],
    );
    host.until("both", |host| {
        host.channels[&1].stdout == b"polite\n" && host.channels[&2].stdout == b"deaf\n"
    });
    host.close(2);
    host.close(1);
    assert_eq!(host.end(1).end.as_ref().unwrap().how, Some(How::Signal(1)));
    assert!(host.channels[&2].end.is_none());
    assert_eq!(host.end(2).end.as_ref().unwrap().how, Some(How::Signal(9)));
    finish(guest, connection);
}

#[test]
fn folders_go_in_and_come_out_as_they_were() {
    const NAME: &str = "folders_go_in_and_come_out_as_they_were";
    let Some((mut guest, mut connection)) = running(NAME, &FOR_EVER, |guest| guest.blade.config.user = "agent".into())
    else {
        return;
    };
    let mut host = Host::new(&mut guest.blade, &mut connection);
    let large: Vec<u8> = (0..300_000_u32).map(|n| (n % 253) as u8).collect();
    let tree: [(TransferKind, &str, u32, &[u8]); 7] = [
        (TransferKind::Folder, "", 0o755, b""),
        (TransferKind::File, "empty", 0o600, b""),
        (TransferKind::File, "large", 0o640, &large),
        (TransferKind::Symlink, "link", 0, b"../../etc/passwd"),
        (TransferKind::Folder, "sub", 0o700, b""),
        (TransferKind::File, "sub/tool", 0o755, b"#!/bin/sh\n"),
        (TransferKind::File, "sub/\u{fc}n\u{ef}code name", 0o444, b"x"),
    ];
    host.put(1, "/home/agent/desk", "");
    for (kind, path, mode, content) in tree {
        host.entry(1, kind, path, mode, content);
    }
    host.entry(1, TransferKind::End, "", 0, b"");
    let end = host.end(1).end.clone().unwrap();
    assert_eq!(
        (end.error.as_str(), end.files, end.bytes),
        ("", 5, large.len() as u64 + 11)
    );

    let mut came: Vec<_> = host.get(2, "/home/agent/desk").entries.clone();
    came.sort_by(|a, b| a.0.path.cmp(&b.0.path));
    let mut expected: Vec<_> = tree.into();
    expected.sort_by(|a, b| a.1.cmp(b.1));
    assert_eq!(came.len(), expected.len());
    for ((entry, content), (kind, path, mode, bytes)) in came.iter().zip(expected) {
        assert_eq!((entry.kind(), entry.path.as_str(), entry.mode), (kind, path, mode));
        match kind {
            TransferKind::Symlink => assert_eq!(entry.target.as_bytes(), bytes),
            _ => assert!(content == bytes, "{path}"),
        }
        if kind == TransferKind::File {
            assert_eq!((entry.modified_unix_s, entry.size), (1_700_000_000, bytes.len() as u64));
        }
    }
    // As cp does: into an existing folder under its own name; and a single file replaces a single file.
    host.put(3, "/home/agent/desk", "more");
    host.entry(3, TransferKind::File, "", 0o644, b"one");
    host.entry(3, TransferKind::End, "", 0, b"");
    assert_eq!(host.end(3).end.as_ref().unwrap().error, "");
    host.put(4, "/home/agent/desk/more", "ignored");
    host.entry(4, TransferKind::File, "", 0o644, b"two");
    host.entry(4, TransferKind::End, "", 0, b"");
    assert_eq!(host.end(4).end.as_ref().unwrap().error, "");
    assert_eq!(host.get(5, "/home/agent/desk/more").entries[0].1, b"two");
    host.exec(
        6,
        &[
            "/bin/payload",
            "stat=/home/agent/desk/large",
            "stat=/home/agent/desk/sub",
        ],
    );
    assert_eq!(
        String::from_utf8_lossy(&host.end(6).stdout),
        format!(
            "/home/agent/desk/large mode=640 uid=1000 size={}\n/home/agent/desk/sub mode=700 uid=1000 size=80\n",
            large.len()
        )
    );
    finish(guest, connection);
}

#[test]
fn transfers_never_leave_the_root_and_never_follow_what_was_planted() {
    const NAME: &str = "transfers_never_leave_the_root_and_never_follow_what_was_planted";
    let Some((mut guest, mut connection)) = running(NAME, &FOR_EVER, |guest| {
        symlink("/etc", guest.image().join("alias")).unwrap();
        symlink("../../../../../../../etc/passwd", guest.image().join("upwards")).unwrap();
        fs::create_dir(guest.image().join("odd")).unwrap();
        nix::unistd::mkfifo(&guest.image().join("odd/fifo"), nix::sys::stat::Mode::S_IRUSR).unwrap();
    }) else {
        return;
    };
    let mut host = Host::new(&mut guest.blade, &mut connection);
    let mut id = 0;
    for path in [
        "",
        "x",
        "/a/../etc/passwd",
        "/proc/sysrq-trigger",
        "/sys/x",
        "/dev/sda",
        "/a//b",
        "/a\0b",
    ] {
        id += 1;
        host.put(id, path, "");
        assert_eq!(
            host.end(id).end.as_ref().unwrap().kind(),
            ErrorKind::Refused,
            "{path:?}"
        );
        id += 1;
        assert_eq!(
            host.get(id, path).end.as_ref().unwrap().kind(),
            ErrorKind::Refused,
            "{path:?}"
        );
    }
    for name in ["..", "a/b", "/", "a\0"] {
        id += 1;
        host.put(id, "/tmp", name);
        assert_eq!(
            host.end(id).end.as_ref().unwrap().kind(),
            ErrorKind::Invalid,
            "{name:?}"
        );
    }
    // Through a planted symlink, and a later entry that climbs.
    for (path, entries) in [
        ("/alias/new", vec![""]),
        ("/tmp/t", vec!["", "../x"]),
        ("/tmp/t", vec!["", "/etc/x"]),
        ("/tmp/t", vec!["", "a/./b"]),
        ("/tmp/t", vec!["", ""]),
        ("/tmp/t", vec!["first"]),
    ] {
        id += 1;
        host.put(id, path, "");
        for (n, entry) in entries.iter().enumerate() {
            let kind = if n == 0 && entries.len() > 1 {
                TransferKind::Folder
            } else {
                TransferKind::File
            };
            host.entry(id, kind, entry, 0o755, b"");
        }
        let end = host.end(id).end.as_ref().unwrap();
        assert!(
            matches!(end.kind(), ErrorKind::Refused | ErrorKind::Invalid),
            "{path} {entries:?}: {end:?}"
        );
    }
    // A symlink that the transfer itself planted is not followed by its next entry.
    id += 1;
    host.put(id, "/tmp/u", "");
    host.entry(id, TransferKind::Folder, "", 0o755, b"");
    host.entry(id, TransferKind::Symlink, "trap", 0, b"/etc");
    host.entry(id, TransferKind::File, "trap/planted", 0o644, b"x");
    assert_eq!(host.end(id).end.as_ref().unwrap().kind(), ErrorKind::Refused);
    // Wrong order, wrong mode, too much at once.
    id += 1;
    host.put(id, "/tmp/v", "");
    host.write(id, ChannelStream::Unspecified, b"data without an entry", true);
    assert_eq!(host.end(id).end.as_ref().unwrap().kind(), ErrorKind::Invalid);
    id += 1;
    host.put(id, "/tmp/v", "");
    host.entry(id, TransferKind::File, "", 0o4755, b"x");
    assert_eq!(host.end(id).end.as_ref().unwrap().kind(), ErrorKind::Invalid);
    id += 1;
    host.put(id, "/tmp/v", "");
    host.entry(id, TransferKind::File, "", 0o644, b"");
    let data = vec![0; CHANNEL_WINDOW + 1];
    host.send(ToGuest::Data(Data {
        channel: id,
        stream: 0,
        data,
        last: false,
    }));
    let end = host.end(id).end.clone().unwrap();
    assert!(end.error.contains("credit"), "{end:?}");
    // Reading: symlinks stay inside the root, and a FIFO neither blocks nor appears.
    id += 1;
    assert_eq!(
        host.get(id, "/upwards").entries[0].1,
        fs::read(guest.folder.path().join("image/etc/passwd")).unwrap()
    );
    id += 1;
    let heard = host.get(id, "/odd");
    assert_eq!((heard.entries.len(), heard.end.as_ref().unwrap().skipped), (1, 1));
    id += 1;
    assert_eq!(
        host.get(id, "/odd/fifo").end.as_ref().unwrap().kind(),
        ErrorKind::Refused
    );
    id += 1;
    assert_eq!(host.get(id, "/none").end.as_ref().unwrap().kind(), ErrorKind::NotFound);
    id += 1;
    // /proc is mounted in the root: it is left out, and the rest comes.
    let heard = host.get(id, "/");
    assert!(heard.end.as_ref().unwrap().skipped >= 2, "{:?}", heard.end);
    assert!(heard.entries.iter().any(|(entry, _)| entry.path == "etc/passwd"));
    assert!(
        !heard
            .entries
            .iter()
            .any(|(entry, _)| entry.path.starts_with("proc/") || entry.path.contains(".far-put"))
    );
    assert!(!guest.folder.path().join("image/etc/planted").exists());
    finish(guest, connection);
}

#[test]
fn a_put_that_is_given_up_leaves_no_half_file() {
    const NAME: &str = "a_put_that_is_given_up_leaves_no_half_file";
    let Some((mut guest, mut connection)) = running(NAME, &FOR_EVER, |_| {}) else {
        return;
    };
    let mut host = Host::new(&mut guest.blade, &mut connection);
    host.put(1, "/data/file", "");
    host.entry(1, TransferKind::File, "", 0o644, b"old");
    host.entry(1, TransferKind::End, "", 0, b"");
    host.end(1);
    host.put(2, "/data/file", "");
    host.write(2, ChannelStream::Unspecified, b"", false);
    host.end(2);
    host.open(
        3,
        ToGuest::Put(far_proto::guest::Put {
            channel: 3,
            path: "/data/file".into(),
            name_in_folder: String::new(),
        }),
    );
    host.send(ToGuest::TransferEntry(far_proto::guest::TransferEntry {
        channel: 3,
        kind: TransferKind::File.into(),
        mode: 0o644,
        ..Default::default()
    }));
    host.write(3, ChannelStream::Unspecified, b"half of the n", false);
    host.close(3);
    assert_eq!(host.end(3).end.as_ref().unwrap().files, 0);
    let names: Vec<_> = host
        .get(4, "/data")
        .entries
        .iter()
        .map(|(entry, content)| (entry.path.clone(), content.clone()))
        .collect();
    assert_eq!(names, [(String::new(), vec![]), ("file".into(), b"old".to_vec())]);
    finish(guest, connection);
}

#[test]
fn a_port_is_forwarded_both_ways_and_each_side_may_end_first() {
    const NAME: &str = "a_port_is_forwarded_both_ways_and_each_side_may_end_first";
    let Some((mut guest, mut connection)) = running(NAME, &FOR_EVER, |_| {}) else {
        return;
    };
    // The sandbox shares the machine's network: the server may as well be here.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = thread::spawn(move || {
        let (mut echo, _) = listener.accept().unwrap();
        let mut all = Vec::new();
        echo.read_to_end(&mut all).unwrap();
        echo.write_all(&all).unwrap();
        drop(echo);
        let (mut first, _) = listener.accept().unwrap();
        first.write_all(b"goodbye").unwrap();
    });
    let mut host = Host::new(&mut guest.blade, &mut connection);
    host.forward(1, port);
    host.until("the connection", |host| host.channels[&1].opened.is_some());
    let sent: Vec<u8> = (0..500_000_u32).map(|n| (n % 241) as u8).collect();
    host.write(1, ChannelStream::Unspecified, &sent, true);
    let heard = host.end(1);
    assert!(heard.plain == sent && heard.end.as_ref().unwrap().error.is_empty());
    host.forward(2, port);
    host.until("the server's end", |host| !host.channels[&2].over.is_empty());
    assert_eq!(host.channels[&2].plain, b"goodbye");
    assert!(host.channels[&2].end.is_none());
    host.write(2, ChannelStream::Unspecified, b"", true);
    assert_eq!(host.end(2).end.as_ref().unwrap().error, "");
    server.join().unwrap();
    // Nobody listens any more.
    host.forward(3, port);
    assert_eq!(host.end(3).end.as_ref().unwrap().kind(), ErrorKind::NotFound);
    host.open(
        4,
        ToGuest::Forward(far_proto::guest::Forward {
            channel: 4,
            port: 65_536,
        }),
    );
    assert_eq!(host.end(4).end.as_ref().unwrap().kind(), ErrorKind::Invalid);
    finish(guest, connection);
}

#[test]
fn greedy_channels_that_nobody_reads_delay_neither_logs_nor_the_exit() {
    const NAME: &str = "greedy_channels_that_nobody_reads_delay_neither_logs_nor_the_exit";
    let args = ["out=up", "read-file=/tmp/go", "flood=1048576", "exit=3"];
    let Some((mut guest, mut connection)) = running(NAME, &args, |_| {}) else {
        return;
    };
    let mut host = Host::new(&mut guest.blade, &mut connection);
    host.pays = false;
    let greedy = u32::try_from(MAX_CHANNELS).unwrap() - 1;
    for id in 1..=greedy {
        host.exec(id, &["payload", "flood=1000000000000"]);
    }
    host.until("all windows full", |host| {
        (1..=greedy).all(|id| host.channels[&id].stdout.len() == CHANNEL_WINDOW)
    });
    // One has all the credit there is, and is read: the others, logs and the exit still get through.
    host.send(ToGuest::Credit(Credit {
        channel: 1,
        stream: ChannelStream::Stdout.into(),
        bytes: u32::MAX,
    }));
    host.channels.get_mut(&1).unwrap().unpaid = 0;
    host.pays = true;
    host.put(1000, "/tmp/go", "");
    host.entry(1000, TransferKind::File, "", 0o644, b"go");
    // One more than the limit, while all others are surely open.
    host.exec(1001, &["payload"]);
    host.entry(1000, TransferKind::End, "", 0, b"");
    let exit = loop {
        match host.step().unwrap().unwrap() {
            Event::Exit(exit) => break exit,
            Event::Ready | Event::Log | Event::Heartbeat | Event::Other(_) => {}
        }
    };
    assert_eq!(exit.how, Some(exit::How::Code(3)));
    assert!(host.channels[&1001].end.as_ref().unwrap().kind() == ErrorKind::Busy);
    // Every channel was told its end before.
    for (id, heard) in &host.channels {
        let end = heard.end.as_ref().unwrap_or_else(|| panic!("channel {id} has no end"));
        assert!(
            matches!(
                end.kind(),
                ErrorKind::NotRunning | ErrorKind::Busy | ErrorKind::Unspecified
            ),
            "{end:?}"
        );
    }
    assert_eq!(guest.blade.text(0).len(), 3 + (1 << 20));
    connection.send(ToGuest::ExitAck(ExitAck {})).unwrap();
    guest.ends_well();
}

#[test]
fn a_lost_connection_ends_its_channels_and_the_next_one_starts_clean() {
    const NAME: &str = "a_lost_connection_ends_its_channels_and_the_next_one_starts_clean";
    let Some((mut guest, mut connection)) = running(NAME, &FOR_EVER, |_| {}) else {
        return;
    };
    let mut host = Host::new(&mut guest.blade, &mut connection);
    host.exec(1, &["payload", "out=there", "sleep=3600000"]);
    host.put(2, "/data/file", "");
    host.send(ToGuest::TransferEntry(far_proto::guest::TransferEntry {
        channel: 2,
        kind: TransferKind::File.into(),
        mode: 0o644,
        ..Default::default()
    }));
    host.until("the program", |host| host.channels[&1].stdout == b"there\n");
    let pid = host.channels[&1].opened.unwrap().pid;
    drop(connection);
    let mut connection = guest.blade.accept().unwrap();
    let mut host = Host::new(&mut guest.blade, &mut connection);
    // What belongs to the old connection is dropped without harm.
    host.send(ToGuest::Data(Data {
        channel: 1,
        stream: ChannelStream::Stdin.into(),
        data: vec![1],
        last: true,
    }));
    host.close(2);
    // The same numbers are free, the half file is gone, and the process leaves.
    host.exec(2, &["payload", &format!("await-end={pid}"), "exit=0"]);
    let end = host.end(2).end.clone().unwrap();
    assert_eq!(
        end.how,
        Some(How::Code(0)),
        "{}",
        String::from_utf8_lossy(&host.channels[&2].stderr)
    );
    assert_eq!(host.get(1, "/data").entries.len(), 1);
    finish(guest, connection);
}

#[test]
fn hosts_that_break_the_rules_of_channels_lose_their_connection_or_only_the_channel() {
    const NAME: &str = "hosts_that_break_the_rules_of_channels_lose_their_connection_or_only_the_channel";
    let Some((mut guest, mut connection)) = running(NAME, &FOR_EVER, |_| {}) else {
        return;
    };
    let mut host = Host::new(&mut guest.blade, &mut connection);
    // Unknown numbers are dropped.
    for message in [
        ToGuest::Data(Data {
            channel: 9,
            stream: 0,
            data: vec![0; 100_000],
            last: false,
        }),
        ToGuest::Credit(Credit {
            channel: 9,
            stream: 1,
            bytes: u32::MAX,
        }),
        ToGuest::Close(far_proto::guest::Close { channel: 9 }),
        ToGuest::ExecResize(far_proto::guest::ExecResize { channel: 9, size: None }),
        ToGuest::TransferEntry(far_proto::guest::TransferEntry {
            channel: 9,
            ..Default::default()
        }),
    ] {
        host.send(message);
    }
    // More than the credit ends the channel and its process.
    host.open(
        1,
        ToGuest::Exec(Exec {
            stdin: true,
            ..exec(1, &["payload", "sleep=3600000"])
        }),
    );
    let data = vec![0; CHANNEL_WINDOW + 1];
    host.send(ToGuest::Data(Data {
        channel: 1,
        stream: ChannelStream::Stdin.into(),
        data,
        last: false,
    }));
    assert_eq!(host.end(1).end.as_ref().unwrap().kind(), ErrorKind::Invalid);
    // Data before Opened, entries for an exec.
    host.exec(2, &["payload", "sleep=3600000"]);
    host.entry(2, TransferKind::File, "x", 0o644, b"");
    assert_eq!(host.end(2).end.as_ref().unwrap().kind(), ErrorKind::Invalid);
    // The machine's clock is not touched by a test, and nonsense is refused before.
    for (id, unix_ns) in [(1, 0), (2, u64::MAX), (3, 1)] {
        host.send(ToGuest::SetTime(SetTime { id, unix_ns }));
        assert_ne!(host.answer(id), "");
    }
    host.send(ToGuest::Freeze(Freeze { id: 4 }));
    assert_eq!(host.answer(4), "this guest has no cgroups");
    // The same number twice, and number 0.
    for ids in [vec![5, 5], vec![0]] {
        for id in ids {
            let request = ToGuest::Exec(exec(id, &["payload", "sleep=3600000"]));
            connection.send(request).unwrap();
        }
        connection.is_closed_by_guest().unwrap();
        connection = guest.blade.accept().unwrap();
    }
    // Opening without ever listening.
    for id in 1.. {
        if connection.send(ToGuest::Exec(exec(id, &[]))).is_err() {
            break;
        }
    }
    connection = guest.blade.accept().unwrap();
    finish(guest, connection);
}

#[test]
fn ten_thousand_short_processes_are_reaped_without_loss() {
    const NAME: &str = "ten_thousand_short_processes_are_reaped_without_loss";
    let Some((mut guest, mut connection)) = running(NAME, &FOR_EVER, |_| {}) else {
        return;
    };
    let mut host = Host::new(&mut guest.blade, &mut connection);
    // Orphans: each has PID 1 as its parent at its end. The step counts what is left of them in /proc.
    host.exec(1, &["payload", "orphans=10000", "await-no-zombies", "exit=0"]);
    let heard = host.end(1);
    assert_eq!(
        heard.end.as_ref().unwrap().how,
        Some(How::Code(0)),
        "{}",
        String::from_utf8_lossy(&heard.stderr)
    );
    // And while they are reaped, exits of channels are not mistaken for each other.
    for round in 0..20 {
        for id in 1..=10 {
            host.channels.remove(&id);
            host.exec(id, &["payload", &format!("exit={}", id + round)]);
        }
        for id in 1..=10 {
            assert_eq!(host.end(id).end.as_ref().unwrap().how, Some(How::Code(id + round)));
        }
    }
    finish(guest, connection);
}
