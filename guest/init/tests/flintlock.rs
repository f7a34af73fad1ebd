//! Flintlock's guest-agent protocol v1 as its own tools speak it: golden frames in, golden frames out.

// A panic is a test's report.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Connection, sandbox::Sandbox, sandbox::sandbox};
use far_proto::guest::{ExitAck, Shutdown, exit, host_message::Kind as ToGuest};
use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    time::Duration,
};

fn running(test: &str) -> Option<(Sandbox, Connection)> {
    let mut guest = sandbox(test, &["out=up", "sleep=3600000"])?;
    guest.start();
    let mut connection = guest.blade.accept().unwrap();
    while guest.blade.text(0) != "up\n" {
        assert!(guest.blade.step(&mut connection).unwrap().is_some());
    }
    Some((guest, connection))
}

fn finish(mut guest: Sandbox, mut connection: Connection) {
    connection.send(ToGuest::Shutdown(Shutdown { grace_s: 0 })).unwrap();
    let exit = guest.blade.until_exit(&mut connection).unwrap();
    assert_eq!(exit.how, Some(exit::How::Signal(9)));
    connection.send(ToGuest::ExitAck(ExitAck {})).unwrap();
    guest.ends_well();
}

fn dial(guest: &Sandbox) -> UnixStream {
    let stream = UnixStream::connect(guest.folder.path().join("guest-agent.sock")).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    stream
}

fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![kind];
    bytes.extend((payload.len() as u32).to_be_bytes());
    bytes.extend(payload);
    bytes
}

fn ask(guest: &Sandbox, request: &str) -> UnixStream {
    let mut stream = dial(guest);
    stream.write_all(&frame(1, request.as_bytes())).unwrap();
    stream
}

/// Everything until the guest hangs up.
fn answer(mut stream: UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    bytes
}

/// The frames of an answer, stdout and stderr put together.
fn frames(mut bytes: &[u8]) -> (Vec<u8>, Vec<u8>, Vec<(u8, String)>) {
    let (mut out, mut err, mut others) = (vec![], vec![], vec![]);
    while !bytes.is_empty() {
        let length = u32::from_be_bytes(bytes[1..5].try_into().unwrap()) as usize;
        let (kind, payload) = (bytes[0], &bytes[5..5 + length]);
        match kind {
            4 => out.extend(payload),
            5 => err.extend(payload),
            _ => others.push((kind, String::from_utf8(payload.into()).unwrap())),
        }
        bytes = &bytes[5 + length..];
    }
    (out, err, others)
}

#[test]
fn ping_info_and_refusals_are_golden() {
    let Some((guest, connection)) = running("ping_info_and_refusals_are_golden") else {
        return;
    };
    assert_eq!(
        answer(ask(&guest, r#"{"version":1,"op":"ping"}"#)),
        b"\x06\0\0\0\x0a{\"code\":0}"
    );
    assert_eq!(
        answer(ask(&guest, r#"{"version":2,"op":"ping"}"#)),
        b"\x07\0\0\0\x2e{\"msg\":\"unsupported protocol version, want 1\"}\x06\0\0\0\x0a{\"code\":1}"
    );
    let (out, _, others) = frames(&answer(ask(&guest, r#"{"version":1,"op":"info"}"#)));
    let out = String::from_utf8(out).unwrap();
    assert!(
        out.starts_with(r#"{"version":"far-init "#) && out.contains(r#""uname":"Linux "#),
        "{out}"
    );
    assert_eq!(others, [(6, "{\"code\":0}".into())]);
    finish(guest, connection);
}

#[test]
fn exec_streams_both_ways_and_ends_with_the_code() {
    let Some((guest, connection)) = running("exec_streams_both_ways_and_ends_with_the_code") else {
        return;
    };
    let request = r#"{"version":1,"op":"exec","exec":{"cmd":"payload","args":["env=A","err=oops","copy-stdin","exit=9"],"env":{"A":"b","PATH":"/bin"},"has_stdin":true}}"#;
    let mut stream = ask(&guest, request);
    let sent: Vec<u8> = (0..300_000_u32).map(|n| (n % 251) as u8).collect();
    let mut writer = stream.try_clone().unwrap();
    let to_send = sent.clone();
    let sender = std::thread::spawn(move || {
        for part in to_send.chunks(70_000) {
            writer.write_all(&frame(2, part)).unwrap();
        }
        writer.write_all(&frame(3, b"")).unwrap();
    });
    let mut bytes = vec![];
    stream.read_to_end(&mut bytes).unwrap();
    sender.join().unwrap();
    let (out, err, others) = frames(&bytes);
    assert!(out.starts_with(b"A=b\n") && out[4..] == sent, "{} bytes", out.len());
    assert_eq!((err, others), (b"oops\n".to_vec(), vec![(6, "{\"code\":9}".into())]));

    // A header that comes in two parts: an answered ping is the proof that the first was read alone.
    let request = r#"{"version":1,"op":"exec","exec":{"cmd":"/bin/payload","args":["copy-stdin"],"has_stdin":true}}"#;
    let mut stream = ask(&guest, request);
    let whole = [frame(2, b"parted"), frame(3, b"")].concat();
    let mut begun = 0;
    for end in [2, 13, whole.len()] {
        stream.write_all(&whole[begun..end]).unwrap();
        begun = end;
        answer(ask(&guest, r#"{"version":1,"op":"ping"}"#));
    }
    let (out, _, others) = frames(&answer(stream));
    assert_eq!((out, others), (b"parted".to_vec(), vec![(6, "{\"code\":0}".into())]));

    for (request, expected) in [
        (
            r#"{"cmd":"/bin/payload","args":["signal=10"]}"#,
            vec![(6, "{\"code\":138}")],
        ),
        (
            r#"{"cmd":"/none"}"#,
            vec![
                (7, "{\"msg\":\"/none: not found in the agent's file system\"}"),
                (6, "{\"code\":127}"),
            ],
        ),
        (
            r#"{"cmd":"/bin/payload","user":"ghost"}"#,
            vec![
                (
                    7,
                    "{\"msg\":\"spec.user: the image's /etc/passwd has no user \\\"ghost\\\"\"}",
                ),
                (6, "{\"code\":126}"),
            ],
        ),
    ] {
        let request = format!(r#"{{"version":1,"op":"exec","exec":{request}}}"#);
        let (_, _, others) = frames(&answer(ask(&guest, &request)));
        let others: Vec<_> = others.iter().map(|(kind, text)| (*kind, text.as_str())).collect();
        assert_eq!(others, expected);
    }
    // A time-out asks the program to leave.
    let request = r#"{"version":1,"op":"exec","exec":{"cmd":"/bin/payload","args":["sleep=3600000"],"timeout_sec":1}}"#;
    let (_, _, others) = frames(&answer(ask(&guest, request)));
    assert_eq!(others, [(6, "{\"code\":129}".into())]);
    finish(guest, connection);
}

#[test]
fn hostile_tools_bother_nobody_but_themselves() {
    let Some((guest, connection)) = running("hostile_tools_bother_nobody_but_themselves") else {
        return;
    };
    for bytes in [
        &b"\x01\xff\xff\xff\xff"[..],
        b"\x02\0\0\0\x01x",
        b"\x01\0\0\0\x02{}",
        b"\x01\0\0\0\0",
        &frame(1, &vec![b'['; 100_000]),
    ] {
        let mut stream = dial(&guest);
        stream.write_all(bytes).unwrap();
        let (_, _, others) = frames(&answer(stream));
        assert_eq!(others.last().unwrap(), &(6, "{\"code\":1}".into()), "{:?}", &bytes[..5]);
    }
    // Half a request, and connections beyond the limit that say nothing.
    let mut half = dial(&guest);
    half.write_all(b"\x01\0\0").unwrap();
    let idle: Vec<_> = (0..20).map(|_| dial(&guest)).collect();
    // The last one is beyond the limit, whatever the order of the others.
    assert_eq!((&mut &idle[19]).read(&mut [0]).unwrap(), 0);
    drop(half);
    drop(idle);
    // A program whose output nobody reads, and one that is left alone.
    let greedy = ask(
        &guest,
        r#"{"version":1,"op":"exec","exec":{"cmd":"/bin/payload","args":["flood=1000000000000"]}}"#,
    );
    let left = ask(
        &guest,
        r#"{"version":1,"op":"exec","exec":{"cmd":"/bin/payload","args":["ignore-hup","sleep=3600000"]}}"#,
    );
    drop(left);
    assert_eq!(
        answer(ask(&guest, r#"{"version":1,"op":"ping"}"#)),
        b"\x06\0\0\0\x0a{\"code\":0}"
    );
    drop(greedy);
    assert!(guest.blade.ready.is_some());
    finish(guest, connection);
}
