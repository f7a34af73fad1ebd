//! The whole session without a VM: far-init as PID 1 of its own namespaces, with a folder as image and a Unix socket as
//! control stream. Fast enough for every odd payload; what only a kernel of its own can show is in `boot.rs`.

// A panic is a test's report.
#![allow(clippy::unwrap_used)]

mod common;

use common::{
    Event,
    sandbox::{Sandbox, sandbox},
};
use far_proto::guest::{EnvVar, ExitAck, Shutdown, Signal, Stage, Welcome, exit::How, host_message::Kind as ToGuest};
use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::PathBuf,
};

#[test]
fn output_of_both_streams_and_the_exit_code_arrive() {
    let Some(mut guest) = sandbox(
        "output_of_both_streams_and_the_exit_code_arrive",
        &["out=hello", "err=oops", "exit=3"],
    ) else {
        return;
    };
    let exit = guest.run();
    assert_eq!((exit.how, exit.start_error.as_str()), (Some(How::Code(3)), ""));
    assert_eq!(
        (guest.blade.text(0), guest.blade.text(1)),
        ("hello\n".into(), "oops\n".into())
    );
    let ready = guest.blade.ready.as_ref().unwrap();
    assert!(ready.pid > 1);
    assert!(
        ready.stages.windows(2).all(|pair| pair[0].boot_ns <= pair[1].boot_ns),
        "{:?}",
        ready.stages
    );
    assert_eq!(guest.blade.hellos[0].stage(), Stage::WaitingForConfig);
    assert!(exit.max_rss_kib > 0 && exit.finished_unix_ns > 0);
}

#[test]
fn a_signal_is_reported_as_a_signal() {
    let Some(mut guest) = sandbox("a_signal_is_reported_as_a_signal", &["out=before", "signal=15"]) else {
        return;
    };
    assert_eq!(guest.run().how, Some(How::Signal(15)));
    assert_eq!(guest.blade.text(0), "before\n");
}

#[test]
fn files_environment_and_user_are_as_asked_for() {
    let args = [
        "env=GREETING",
        "env=HOME",
        "env=PATH",
        "cat=/run/secrets/key",
        "stat=/run/secrets/key",
        "stat=/task/empty",
    ];
    let Some(mut guest) = sandbox("files_environment_and_user_are_as_asked_for", &args) else {
        return;
    };
    guest.blade.config.user = "agent".into();
    guest.blade.config.env = vec![EnvVar {
        name: "GREETING".into(),
        value: "moin".into(),
    }];
    let key = b"secret\n".repeat(30_000);
    guest.blade.files = vec![
        ("/run/secrets/key".into(), 0o400, key.clone()),
        ("/task/empty".into(), 0o444, vec![]),
    ];
    let exit = guest.run();
    assert_eq!(exit.how, Some(How::Code(0)), "{}", guest.blade.text(1));
    let text = guest.blade.text(0);
    assert!(
        text.starts_with("GREETING=moin\nHOME=/home/agent\nPATH=/usr/local/sbin:"),
        "{}",
        &text[..200]
    );
    assert!(text.contains(std::str::from_utf8(&key).unwrap()));
    assert!(text.ends_with(&format!(
        "/run/secrets/key mode=400 uid=1000 size={}\n/task/empty mode=444 uid=1000 size=0\n",
        key.len()
    )));
    assert!(
        !guest.image().join("task").exists(),
        "the image itself is never written"
    );
}

#[test]
fn a_lost_connection_is_dialled_again_without_gap_or_repeat() {
    let Some(mut guest) = sandbox(
        "a_lost_connection_is_dialled_again_without_gap_or_repeat",
        &["count-to=60", "exit=0"],
    ) else {
        return;
    };
    guest.start();
    for stage in [Stage::WaitingForConfig, Stage::Running, Stage::Running] {
        let mut connection = guest.blade.accept().unwrap();
        assert_eq!(guest.blade.hellos.last().unwrap().stage(), stage);
        let before = guest.blade.stored[0].1;
        while guest.blade.stored[0].1 < before + 5 {
            guest.blade.step(&mut connection).unwrap().unwrap();
        }
        // Dropped here: what is on its way is lost.
    }
    let exit = guest.blade.serve().unwrap();
    guest.ends_well();
    assert_eq!(exit.how, Some(How::Code(0)));
    let expected: String = (1..=60).map(|n| format!("line {n}\n")).collect();
    assert_eq!(guest.blade.text(0), expected);
}

#[test]
fn an_exit_that_was_not_acknowledged_is_told_again() {
    let Some(mut guest) = sandbox("an_exit_that_was_not_acknowledged_is_told_again", &["out=x", "exit=7"]) else {
        return;
    };
    guest.start();
    let mut first = guest.blade.accept().unwrap();
    let told = guest.blade.until_exit(&mut first).unwrap();
    drop(first);
    let again = guest.blade.serve().unwrap();
    guest.ends_well();
    assert_eq!(told, again);
    assert_eq!(guest.blade.hellos.last().unwrap().stage(), Stage::Exited);
}

#[test]
fn a_flood_waits_for_the_host_and_arrives_whole() {
    let Some(mut guest) = sandbox(
        "a_flood_waits_for_the_host_and_arrives_whole",
        &["flood=8388608", "exit=0"],
    ) else {
        return;
    };
    guest.blade.window = 4096;
    assert_eq!(guest.run().how, Some(How::Code(0)));
    let text = guest.blade.text(0);
    assert_eq!(text.len(), 8 << 20);
    assert!(text.lines().enumerate().all(|(n, line)| line.parse() == Ok(n)));
}

#[test]
fn an_orphan_that_holds_the_output_does_not_hold_the_exit() {
    let Some(mut guest) = sandbox(
        "an_orphan_that_holds_the_output_does_not_hold_the_exit",
        &["orphan=3600000", "exit=5"],
    ) else {
        return;
    };
    assert_eq!(guest.run().how, Some(How::Code(5)));
}

#[test]
fn what_cannot_be_started_is_told_with_its_field() {
    const NAME: &str = "what_cannot_be_started_is_told_with_its_field";
    type Change = fn(&mut Sandbox);
    let cases: [(&str, u32, &str, Change); 11] = [
        (
            "missing entrypoint",
            127,
            "spec.entrypoint: /bin/none does not exist",
            |g| g.blade.config.entrypoint = "/bin/none".into(),
        ),
        (
            "not executable",
            126,
            "spec.entrypoint: /etc/passwd is not executable",
            |g| g.blade.config.entrypoint = "/etc/passwd".into(),
        ),
        (
            "a folder",
            126,
            "spec.entrypoint: /etc is not executable (it is a directory)",
            |g| g.blade.config.entrypoint = "/etc".into(),
        ),
        (
            "no interpreter",
            127,
            "spec.entrypoint: the interpreter of /bin/script",
            |g| {
                let path = g.image().join("bin/script");
                fs::write(&path, "#!/bin/nothing\n").unwrap();
                fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
                g.blade.config.entrypoint = "/bin/script".into();
            },
        ),
        (
            "no program at all",
            126,
            "spec.entrypoint: /bin/text is not executable (not a program",
            |g| {
                let path = g.image().join("bin/text");
                fs::write(&path, "\0\0\0\0").unwrap();
                fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
                g.blade.config.entrypoint = "/bin/text".into();
            },
        ),
        (
            "entrypoint leads outside",
            127,
            "spec.entrypoint: /bin/host does not exist",
            |g| {
                symlink("../../../../../../usr/bin/env", g.image().join("bin/host")).unwrap();
                g.blade.config.entrypoint = "/bin/host".into();
            },
        ),
        (
            "unknown user",
            126,
            "spec.user: the image's /etc/passwd has no user \"ghost\"",
            |g| g.blade.config.user = "ghost".into(),
        ),
        ("working directory", 126, "spec.workingDir: /nowhere", |g| {
            g.blade.config.working_dir = "/nowhere".into()
        }),
        ("a name with =", 126, "spec.env[0].name", |g| {
            g.blade.config.env = vec![EnvVar {
                name: "A=B".into(),
                value: String::new(),
            }];
        }),
        ("a path that climbs", 126, "spec.files[0].path", |g| {
            g.blade.files = vec![("/task/../etc/passwd".into(), 0o400, b"x".to_vec())]
        }),
        (
            "a path through a symlink",
            126,
            "spec.files[0].path: placing \"/alias/x\"",
            |g| {
                symlink("etc", g.image().join("alias")).unwrap();
                g.blade.files = vec![("/alias/x".into(), 0o400, b"x".to_vec())];
            },
        ),
    ];
    for (why, code, text, change) in cases {
        let Some(mut guest) = sandbox(NAME, &["out=never"]) else {
            return;
        };
        change(&mut guest);
        let exit = guest.run();
        assert_eq!(exit.how, Some(How::Code(code)), "{why}: {}", exit.start_error);
        assert!(exit.start_error.starts_with(text), "{why}: {}", exit.start_error);
        assert!(guest.blade.ready.is_none() && guest.blade.text(0).is_empty(), "{why}");
    }
}

#[test]
fn content_with_another_digest_is_never_started() {
    let Some(mut guest) = sandbox("content_with_another_digest_is_never_started", &["out=never"]) else {
        return;
    };
    guest.blade.config.files = vec![far_proto::guest::FileEntry {
        path: "/x".into(),
        mode: 0o400,
        size: 0,
        sha256: vec![7; 32],
        ..Default::default()
    }];
    let exit = guest.run();
    assert_eq!(exit.how, Some(How::Code(126)));
    assert!(
        exit.start_error.contains("does not have its SHA-256"),
        "{}",
        exit.start_error
    );
}

#[test]
fn an_image_whose_folders_are_symlinks_cannot_move_mounts_out() {
    let Some(mut guest) = sandbox(
        "an_image_whose_folders_are_symlinks_cannot_move_mounts_out",
        &["cat=/proc/self/comm"],
    ) else {
        return;
    };
    symlink("/../../../../../../tmp/far-outside", guest.image().join("proc")).unwrap();
    symlink("/etc", guest.image().join("tmp")).unwrap();
    let exit = guest.run();
    assert_eq!(
        exit.how,
        Some(How::Code(0)),
        "its own /proc is where it belongs: {}",
        guest.blade.text(1)
    );
    assert_eq!(guest.blade.text(0), "payload\n");
    assert!(!std::path::Path::new("/tmp/far-outside").exists());
}

#[test]
fn shutdown_is_term_then_kill_and_a_second_one_does_not_extend_it() {
    let Some(mut guest) = sandbox(
        "shutdown_is_term_then_kill_and_a_second_one_does_not_extend_it",
        &["ignore-term", "out=deaf", "sleep=3600000"],
    ) else {
        return;
    };
    guest.start();
    let mut connection = guest.blade.accept().unwrap();
    while guest.blade.text(0) != "deaf\n" {
        guest.blade.step(&mut connection).unwrap().unwrap();
    }
    connection.send(ToGuest::Shutdown(Shutdown { grace_s: 1 })).unwrap();
    connection
        .send(ToGuest::Shutdown(Shutdown { grace_s: 86_400 }))
        .unwrap();
    assert_eq!(
        guest.blade.until_exit(&mut connection).unwrap().how,
        Some(How::Signal(9))
    );
    connection.send(ToGuest::ExitAck(ExitAck {})).unwrap();
    guest.ends_well();
}

#[test]
fn signals_reach_the_payload_and_nonsense_numbers_do_nothing() {
    let Some(mut guest) = sandbox(
        "signals_reach_the_payload_and_nonsense_numbers_do_nothing",
        &["out=up", "sleep=3600000"],
    ) else {
        return;
    };
    guest.start();
    let mut connection = guest.blade.accept().unwrap();
    while guest.blade.text(0) != "up\n" {
        guest.blade.step(&mut connection).unwrap().unwrap();
    }
    for number in [0, 65, u32::MAX, 10] {
        connection.send(ToGuest::Signal(Signal { number })).unwrap();
    }
    assert_eq!(
        guest.blade.until_exit(&mut connection).unwrap().how,
        Some(How::Signal(10))
    );
    connection.send(ToGuest::ExitAck(ExitAck {})).unwrap();
    guest.ends_well();
}

#[test]
fn a_stop_before_the_start_ends_without_a_payload() {
    let Some(mut guest) = sandbox("a_stop_before_the_start_ends_without_a_payload", &["out=never"]) else {
        return;
    };
    guest.start();
    let mut connection = guest.blade.accept_silently().unwrap();
    let welcome = Welcome {
        generation: 1,
        log_window_bytes: 4096,
        ..Welcome::default()
    };
    connection.send(ToGuest::Welcome(welcome)).unwrap();
    connection.send(ToGuest::Shutdown(Shutdown { grace_s: 3 })).unwrap();
    let exit = guest.blade.until_exit(&mut connection).unwrap();
    assert!(exit.start_error.contains("before the payload was started"));
    connection.send(ToGuest::ExitAck(ExitAck {})).unwrap();
    guest.ends_well();
}

#[test]
fn a_host_that_talks_nonsense_loses_its_connection_and_the_guest_lives() {
    let Some(mut guest) = sandbox(
        "a_host_that_talks_nonsense_loses_its_connection_and_the_guest_lives",
        &["exit=4"],
    ) else {
        return;
    };
    guest.start();
    let good = Welcome {
        generation: 1,
        log_window_bytes: 4096,
        ..Welcome::default()
    };
    for nonsense in [
        vec![ToGuest::Start(far_proto::guest::Start {})],
        vec![ToGuest::Welcome(Welcome { generation: 2, ..good })],
        vec![ToGuest::Welcome(Welcome {
            stored_stdout_seq: 9,
            ..good
        })],
        vec![ToGuest::Welcome(good), ToGuest::Welcome(good)],
        vec![ToGuest::Welcome(good), ToGuest::Start(far_proto::guest::Start {})],
    ] {
        let mut connection = guest.blade.accept_silently().unwrap();
        for message in nonsense {
            connection.send(message).unwrap();
        }
        connection.is_closed_by_guest().unwrap();
    }
    for bytes in [&[0xff; 8][..], &[0, 0, 0, 0], &[0, 0, 0, 3, 0xff, 0xff, 0xff]] {
        let mut connection = guest.blade.accept_silently().unwrap();
        connection.send_raw(bytes).unwrap();
        connection.is_closed_by_guest().unwrap();
    }
    assert_eq!(guest.blade.serve().unwrap().how, Some(How::Code(4)));
    guest.ends_well();
}

#[test]
fn heartbeats_come_while_the_payload_runs() {
    let Some(mut guest) = sandbox("heartbeats_come_while_the_payload_runs", &["sleep=3600000"]) else {
        return;
    };
    guest.blade.heartbeat_ms = 100;
    guest.start();
    let mut connection = guest.blade.accept().unwrap();
    while guest.blade.heartbeats < 3 {
        assert!(!matches!(
            guest.blade.step(&mut connection).unwrap(),
            None | Some(Event::Exit(_))
        ));
    }
    connection.send(ToGuest::Shutdown(Shutdown { grace_s: 0 })).unwrap();
    assert_eq!(
        guest.blade.until_exit(&mut connection).unwrap().how,
        Some(How::Signal(9))
    );
    connection.send(ToGuest::ExitAck(ExitAck {})).unwrap();
    guest.ends_well();
}

#[test]
fn a_host_that_promised_answers_and_gives_none_is_left_and_dialled_again() {
    let test = "a_host_that_promised_answers_and_gives_none_is_left_and_dialled_again";
    let Some(mut guest) = sandbox(test, &["exit=6"]) else {
        return;
    };
    guest.start();
    let mut connection = guest.blade.accept_silently().unwrap();
    let welcome = Welcome {
        generation: 1,
        log_window_bytes: 4096,
        heartbeat_interval_ms: 100,
        answers_heartbeats: true,
        ..Welcome::default()
    };
    connection.send(ToGuest::Welcome(welcome)).unwrap();
    connection.is_closed_by_guest().unwrap();
    assert_eq!(guest.blade.serve().unwrap().how, Some(How::Code(6)));
    guest.ends_well();
}

/// Its output fills what may wait to be sent, so that not even a heartbeat gets out.
#[test]
fn a_host_that_stops_reading_is_left_also_where_output_waits() {
    let test = "a_host_that_stops_reading_is_left_also_where_output_waits";
    let Some(mut guest) = sandbox(test, &["flood=4000000", "exit=6"]) else {
        return;
    };
    guest.blade.window = 1 << 20;
    guest.blade.heartbeat_ms = 3_000;
    guest.blade.answers_heartbeats = true;
    guest.start();
    let deaf = guest.blade.accept().unwrap();
    let mut connection = guest.blade.accept().unwrap();
    drop(deaf);
    let exit = guest.blade.until_exit(&mut connection).unwrap();
    assert_eq!(exit.how, Some(How::Code(6)));
    connection.send(ToGuest::ExitAck(ExitAck {})).unwrap();
    guest.ends_well();
}

#[test]
fn names_limits_and_privileges_are_as_the_configuration_says() {
    let args = [
        "cat=/etc/hosts",
        "cat=/etc/hostname",
        "limit=7",
        "status=NoNewPrivs",
        "status=Groups",
    ];
    let Some(mut guest) = sandbox("names_limits_and_privileges_are_as_the_configuration_says", &args) else {
        return;
    };
    fs::write(
        guest.image().join("etc/group"),
        "agent:x:1000:\naudio:x:29:agent\nvideo:x:44:x,agent\n",
    )
    .unwrap();
    guest.blade.config.user = "agent".into();
    guest.blade.config.hostname = "worker-1".into();
    guest.blade.config.host_aliases = vec![far_proto::guest::HostAlias {
        address: "10.1.2.3".into(),
        names: vec!["db".into(), "db.example".into()],
    }];
    guest.blade.config.rlimits = vec![far_proto::guest::Rlimit {
        kind: "nofile".into(),
        soft: 100,
        hard: 200,
    }];
    let exit = guest.run();
    assert_eq!(exit.how, Some(How::Code(0)), "{}", guest.blade.text(1));
    assert_eq!(
        guest.blade.text(0),
        "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n127.0.1.1 worker-1\n10.1.2.3 db db.example \n\
         worker-1\n100 200\nNoNewPrivs:\t1\nGroups:\t29 44 \n"
    );
}

#[test]
fn new_privileges_are_possible_only_where_they_are_asked_for() {
    let Some(mut guest) = sandbox(
        "new_privileges_are_possible_only_where_they_are_asked_for",
        &["status=NoNewPrivs"],
    ) else {
        return;
    };
    guest.blade.config.allow_new_privileges = true;
    guest.run();
    assert_eq!(guest.blade.text(0), "NoNewPrivs:\t0\n");
}

#[test]
fn sealed_files_cannot_be_changed_even_by_a_payload_that_is_root() {
    const NAME: &str = "sealed_files_cannot_be_changed_even_by_a_payload_that_is_root";
    let args = [
        "cat=/task/plan",
        "cannot-write=/task/plan:evil",
        "cannot-remove=/task/plan",
        "write=/task/free:changed",
        "cat=/task/plan",
    ];
    let Some(mut guest) = sandbox(NAME, &args) else { return };
    guest.blade.files = vec![
        ("/task/plan".into(), 0o644, b"the plan\n".to_vec()),
        ("/task/free".into(), 0o644, b"free\n".to_vec()),
    ];
    guest.blade.sealed = vec!["/task/plan".into()];
    let exit = guest.run();
    assert_eq!(exit.how, Some(How::Code(0)), "{}", guest.blade.text(1));
    assert_eq!(guest.blade.text(0), "the plan\nthe plan\n");
}

#[test]
fn secrets_are_overwritten_and_gone_when_the_payload_ended() {
    const NAME: &str = "secrets_are_overwritten_and_gone_when_the_payload_ended";
    let Some(mut guest) = sandbox(NAME, &["stat=/task/key", "exit=0"]) else {
        return;
    };
    let secret = b"hunter2-hunter2-hunter2".to_vec();
    guest.blade.files = vec![
        ("/task/key".into(), 0o400, secret.clone()),
        ("/task/sealed".into(), 0o400, secret),
    ];
    guest.blade.sealed = vec!["/task/sealed".into()];
    guest.start();
    let mut connection = guest.blade.accept().unwrap();
    let exit = guest.blade.until_exit(&mut connection).unwrap();
    assert_eq!(exit.how, Some(How::Code(0)), "{}", guest.blade.text(1));
    // Not acknowledged yet: far-init is still there, and its root with it.
    let pid = guest.init_pid();
    let task = PathBuf::from(format!("/proc/{pid}/root"))
        .join(guest.folder.path().strip_prefix("/").unwrap())
        .join("far/root/task");
    assert_eq!(fs::read_dir(&task).unwrap().count(), 0, "{}", task.display());
    connection.send(ToGuest::ExitAck(ExitAck {})).unwrap();
    guest.ends_well();
}
