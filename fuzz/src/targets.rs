//! What is fuzzed: each target takes any bytes, and may not panic, hang or take memory without bound.

use far_proto::{
    frame::{self, Decoder},
    guest::{Config, GuestMessage, HostMessage},
};
use far_vmm::{
    VmConfig,
    additions::Additions,
    backend::qemu::{Accelerator, boot_args},
    vsock,
};
use prost::Message;

/// A target's name and its function.
pub(crate) type Target = (&'static str, fn(&[u8]));

pub(crate) const TARGETS: [Target; 6] = [
    ("frame", frames),
    ("run-config", run_config),
    ("vm-config", vm_config),
    ("users", users),
    ("flintlock", far_init::hostile::flintlock),
    ("vsock-answer", vsock_answer),
];

/// The control stream, in pieces whose size the first byte says, as both sides read it.
fn frames(bytes: &[u8]) {
    let Some((&step, wire)) = bytes.split_first() else {
        return;
    };
    split::<GuestMessage>(wire, usize::from(step).max(1));
    split::<HostMessage>(wire, usize::from(step).max(1));
}

fn split<M: Message + Default + PartialEq>(wire: &[u8], step: usize) {
    let mut decoder = Decoder::new();
    for part in wire.chunks(step) {
        decoder.push(part);
        loop {
            match decoder.next::<M>() {
                Ok(None) => break,
                Err(_) => return,
                Ok(Some(message)) => {
                    // What was understood can be said again, unless it says nothing (encode refuses empty bodies).
                    if (1..=frame::MAX_BODY).contains(&frame::length_of(&message)) {
                        let mut again = Vec::new();
                        frame::encode(&message, &mut again);
                        let mut second = Decoder::new();
                        second.push(&again);
                        assert!(second.next::<M>().ok().flatten().is_some_and(|same| same == message));
                    }
                }
            }
        }
        assert!(decoder.pending() <= frame::HEADER + frame::MAX_BODY);
    }
}

/// What the guest is told to run.
fn run_config(bytes: &[u8]) {
    if let Ok(config) = Config::decode(bytes) {
        far_init::hostile::config(config);
    }
}

/// The description of a VM with its kernel command line, and our additions to it. The guest's init itself reads no command
/// line; far-vmm completes the kernel's, and its words must stay words.
fn vm_config(bytes: &[u8]) {
    let _ = Additions::parse(bytes);
    let Ok(config) = VmConfig::parse(bytes) else { return };
    for accelerator in [
        Accelerator::Tcg {
            tsc_khz: Some(2_000_000),
        },
        Accelerator::Kvm,
    ] {
        let line = boot_args(&config, accelerator);
        assert!(!line.contains(['\n', '\0']), "a command line of more than one line");
    }
}

/// What a vsock device answers to CONNECT. Whatever is taken is one exact line, every beginning of it was waited for, and what
/// is waited for still fits into the longest line.
fn vsock_answer(bytes: &[u8]) {
    match vsock::parse_answer(bytes) {
        Ok(Some((number, length))) => {
            assert_eq!(&bytes[..length], format!("OK {number}\n").as_bytes());
            for end in 0..length {
                assert_eq!(vsock::parse_answer(&bytes[..end]), Ok(None));
            }
        }
        Ok(None) => assert!(bytes.len() < vsock::MAX_ANSWER),
        Err(vsock::NotOk) => {}
    }
}

/// spec.user, /etc/passwd and /etc/group of an image, separated by 0xff.
fn users(bytes: &[u8]) {
    let mut parts = bytes.splitn(3, |&byte| byte == 0xff);
    let mut next = || parts.next().unwrap_or_default();
    let (text, passwd, group) = (next(), next(), next());
    far_init::hostile::users(&String::from_utf8_lossy(text), passwd, group);
}
