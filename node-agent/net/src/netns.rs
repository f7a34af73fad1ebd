//! The network namespace that the guests' taps are in.
//!
//! It is kept alive by an open file, and by each VMM that runs in it. So nothing of it is left when the last of them
//! goes, however it goes; VMs that outlive a far-node keep the namespace they were started in.

use crate::{
    capability::{NoNic, capability},
    slot::{Slot, TapName},
    sys,
};
use nix::sched::{CloneFlags, setns, unshare};
use std::{
    fs::{self, File},
    io,
    os::{fd::AsRawFd, unix::fs::MetadataExt},
    path::PathBuf,
    thread,
};

/// The calling thread's namespace, which is the process's unless the thread has left it (proc_pid_ns(5)).
const OWN_NETNS: &str = "/proc/thread-self/ns/net";
/// Whether IPv4 packets pass from one interface to another. Looked up in the namespace of the thread that opens it.
const IP_FORWARD: &str = "/proc/sys/net/ipv4/ip_forward";

/// Why a namespace or tap could not be made or removed.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// This blade's guests have no NIC at all.
    #[error(transparent)]
    NoNic(#[from] NoNic),
    /// The namespace could not be made or entered.
    #[error("{operation} the guests' network namespace")]
    Namespace {
        /// `making` or `entering`.
        operation: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A tap could not be made.
    #[error("creating tap {tap}: {step}")]
    Create {
        /// The tap.
        tap: TapName,
        /// What was done.
        step: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A tap could not be removed.
    #[error("deleting tap {tap}: is its VM still running?")]
    Delete {
        /// The tap.
        tap: TapName,
        /// Why.
        source: io::Error,
    },
}

/// A network namespace without uplink.
#[derive(Debug)]
pub struct GuestNetns {
    file: File,
}

impl GuestNetns {
    /// Makes a namespace. Only loopback is in it, and that is down.
    ///
    /// # Errors
    /// [`NetError::NoNic`] where this process may not; it never tries a user namespace instead.
    pub fn create() -> Result<Self, NetError> {
        capability()?;
        let made = in_helper_thread(|| {
            let machines = fs::metadata(OWN_NETNS)?;
            unshare(CloneFlags::CLONE_NEWNET)?;
            let file = File::open(OWN_NETNS)?;
            let ours = file.metadata()?;
            if (ours.dev(), ours.ino()) == (machines.dev(), machines.ino()) {
                return Err(io::Error::other("the thread is still in the machine's namespace"));
            }
            // A new namespace inherits this from the machine, where a container engine may have set it; with it, guests
            // would reach each other.
            fs::write(IP_FORWARD, "0")?;
            Ok(file)
        });
        let file = made.map_err(|source| NetError::Namespace {
            operation: "making",
            source,
        })?;
        Ok(Self { file })
    }

    /// A path by which another process of the same user enters the namespace, valid while this value lives: what
    /// `netns` of a VM's `far.json` is set to.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd()).into()
    }

    /// Makes the slot's tap with its address, up. A tap that is there already is taken over.
    ///
    /// # Errors
    /// Names the tap and the step; a tap that was made halfway is gone again.
    pub fn create_tap(&self, slot: Slot) -> Result<TapName, NetError> {
        let tap = slot.tap();
        let at = |step| {
            let tap = tap.clone();
            move |source: io::Error| NetError::Create { tap, step, source }
        };
        self.inside(|| {
            // Kept only as the last step: until then the tap goes with its file, also on an error.
            let file = sys::attach_tap(&tap).map_err(at("making it"))?;
            sys::set_address(&tap, slot.host_address(), slot.netmask()).map_err(at("setting its address"))?;
            sys::set_up(&tap).map_err(at("bringing it up"))?;
            sys::keep_tap(&file, true).map_err(at("keeping it"))
        })?;
        Ok(tap)
    }

    /// Removes a tap; one that is gone already is success.
    ///
    /// # Errors
    /// A VMM still holds it.
    pub fn delete_tap(&self, tap: &TapName) -> Result<(), NetError> {
        self.inside(|| {
            let gone = sys::attach_tap(tap).and_then(|file| sys::keep_tap(&file, false));
            gone.map_err(|source| NetError::Delete {
                tap: tap.clone(),
                source,
            })
        })
    }

    fn inside<T: Send>(&self, act: impl FnOnce() -> Result<T, NetError> + Send) -> Result<T, NetError> {
        in_helper_thread(|| {
            setns(&self.file, CloneFlags::CLONE_NEWNET).map_err(|error| NetError::Namespace {
                operation: "entering",
                source: error.into(),
            })?;
            act()
        })
    }
}

/// Runs `act` in a thread of its own, which ends afterwards: a thread that has changed its namespace serves nobody else.
fn in_helper_thread<T: Send, E: Send>(act: impl FnOnce() -> Result<T, E> + Send) -> Result<T, E> {
    thread::scope(|scope| match scope.spawn(act).join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}
