//! What this machine can do for microVMs, found by trying, with the reason and the cure for each lack.

mod kvm;
mod tools;
mod tsc;

pub(crate) use tsc::measure_khz;

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Binaries that a caller names; `None`: the usual search.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Tools {
    /// QEMU. Else `FAR_QEMU`, else `qemu-system-<arch>` on PATH.
    pub qemu: Option<PathBuf>,
    /// The vsock daemon. Else `FAR_VHOST_DEVICE_VSOCK`, else PATH, else `$FAR_CACHE/vhost/bin`.
    pub vhost_device_vsock: Option<PathBuf>,
    /// Firecracker. Else `FIRECRACKER_BIN`, else `firecracker` on PATH.
    pub firecracker: Option<PathBuf>,
}

/// How to probe.
#[derive(Debug, Clone, Default)]
pub struct ProbeOptions {
    /// Binaries to look at.
    pub tools: Tools,
}

/// What this machine can do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    /// KVM really runs a guest.
    pub kvm: Finding,
    /// QEMU is there; `version` and `path` are set then.
    pub qemu: Finding,
    /// The vsock daemon for QEMU is there.
    pub vhost_device_vsock: Finding,
    /// Firecracker is there.
    pub firecracker: Finding,
    /// Taps can be made: guests get a NIC.
    pub tap: Finding,
    /// Rate of the time stamp counter in kHz, measured; `None` where it does not count evenly or is not x86-64.
    pub tsc_khz: Option<u32>,
}

/// One thing a machine has or lacks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// It works.
    pub ok: bool,
    /// What was seen, one sentence: why it does not work, or how it was proven.
    pub reason: String,
    /// The command, or the act, that cures the lack; absent where it works or nothing can.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
    /// The binary, where it is about one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Its version, where it is about a binary.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
}

impl Finding {
    fn has(reason: impl Into<String>) -> Self {
        Self {
            ok: true,
            reason: reason.into(),
            fix: None,
            path: None,
            version: None,
        }
    }

    fn lack(reason: impl Into<String>, fix: impl Into<String>) -> Self {
        Self {
            ok: false,
            reason: reason.into(),
            fix: Some(fix.into()),
            path: None,
            version: None,
        }
    }
}

/// Looks at this machine: 0.1 s without KVM, up to 10 s more where KVM opens but does not run a guest. Blocks, and must
/// be called by a thread that lives until it returns (its child processes die with that thread).
#[must_use]
pub fn run(options: &ProbeOptions) -> Capabilities {
    let tools = &options.tools;
    let (qemu, firecracker) = (tools::qemu(tools), tools::firecracker(tools));
    Capabilities {
        kvm: kvm::probe(&qemu, &firecracker),
        vhost_device_vsock: tools::vhost_device_vsock(tools),
        tap: tap(),
        tsc_khz: measure_khz(),
        qemu,
        firecracker,
    }
}

/// Only whether KVM runs guests.
pub(crate) fn run_kvm(tools: &Tools) -> Finding {
    kvm::probe(&tools::qemu(tools), &tools::firecracker(tools))
}

fn tap() -> Finding {
    match far_net::capability() {
        Ok(()) => Finding::has("taps can be made"),
        Err(lack) => Finding::lack(lack.to_string(), lack.fix()),
    }
}

impl Capabilities {
    /// True where a VM can be run at all: QEMU with its vsock daemon, or Firecracker on KVM.
    #[must_use]
    pub fn can_run_vms(&self) -> bool {
        (self.qemu.ok && self.vhost_device_vsock.ok) || (self.firecracker.ok && self.kvm.ok)
    }

    /// The `accel` to write into `far.json`, so that a VM's start need not probe again.
    #[must_use]
    pub fn accel(&self) -> crate::additions::Accel {
        if self.kvm.ok {
            crate::additions::Accel::Kvm
        } else {
            crate::additions::Accel::Tcg
        }
    }
}
