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
const IPV6_FORWARD: &str = "/proc/sys/net/ipv6/conf/all/forwarding";

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
            // Inherited as well. ARP requests carry the address that guests use themselves, to which there is no route: the
            // kernel's check of return paths would drop them. Guests' sources are checked by the tables.
            for interfaces in ["all", "default"] {
                fs::write(format!("/proc/sys/net/ipv4/conf/{interfaces}/rp_filter"), "0")?;
            }
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

    /// Makes the slots' taps without addresses, down and kept. Those that are there stay as they are.
    pub(crate) fn create_taps_down(&self, slots: &[Slot]) -> Result<(), NetError> {
        self.inside(|| {
            slots.iter().try_for_each(|slot| {
                let tap = slot.tap();
                let at = |step| {
                    let tap = tap.clone();
                    move |source: io::Error| NetError::Create { tap, step, source }
                };
                let made = match sys::attach_tap(&tap) {
                    // A VMM holds it, so it is there.
                    Err(error) if error.raw_os_error() == Some(libc::EBUSY) => return Ok(()),
                    made => made.map_err(at("making it"))?,
                };
                sys::keep_tap(&made, true).map_err(at("keeping it"))
            })
        })
    }

    /// The namespace of the calling thread: the blade's own, for an uplink.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn current() -> Result<Self, NetError> {
        let file = File::open(OWN_NETNS).map_err(|source| NetError::Namespace {
            operation: "finding",
            source,
        })?;
        Ok(Self { file })
    }

    /// Whether both are the same namespace.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn is_same(&self, other: &Self) -> io::Result<bool> {
        let (one, other) = (self.file.metadata()?, other.file.metadata()?);
        Ok((one.dev(), one.ino()) == (other.dev(), other.ino()))
    }

    /// Whether IPv4 and IPv6 packets pass from one interface of the namespace to another.
    ///
    /// # Errors
    /// The namespace cannot be entered.
    pub fn forwards(&self) -> Result<(bool, bool), NetError> {
        let is_on = |path: &str| fs::read_to_string(path).is_ok_and(|text| text.trim() != "0");
        self.run_inside(|| (is_on(IP_FORWARD), is_on(IPV6_FORWARD)))
    }

    /// The namespace that a process is in: a VMM's that outlived the far-node that started it.
    ///
    /// # Errors
    /// The process is gone, or is not ours to look at.
    pub fn of_process(pid: u32) -> Result<Self, NetError> {
        capability()?;
        let file = File::open(format!("/proc/{pid}/ns/net")).map_err(|source| NetError::Namespace {
            operation: "finding",
            source,
        })?;
        Ok(Self { file })
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Runs `act` in the namespace.
    ///
    /// # Errors
    /// The namespace cannot be entered.
    pub fn run_inside<T: Send>(&self, act: impl FnOnce() -> T + Send) -> Result<T, NetError> {
        self.inside(|| Ok(act()))
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

/// Whether interfaces of the calling thread's namespace have IPv6 at all. Without it a tap that comes up has nothing to say,
/// and one that goes down leaves no routes behind that the kernel looks for among those of all others.
pub(crate) fn set_ipv6(is_on: bool) -> Result<(), NetError> {
    for interfaces in ["all", "default"] {
        let path = format!("/proc/sys/net/ipv6/conf/{interfaces}/disable_ipv6");
        match fs::write(path, if is_on { "0" } else { "1" }) {
            // The blade's kernel has none.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => other.map_err(|source| NetError::Namespace {
                operation: "setting IPv6 in",
                source,
            })?,
        }
    }
    Ok(())
}

/// Lets packets pass between interfaces of the calling thread's namespace. Return paths are not checked by the kernel:
/// guests' sources are checked by address, MAC and tap before, and have no route of their own.
pub(crate) fn enable_forwarding(has_ipv6: bool) -> Result<(), NetError> {
    let ipv6 = has_ipv6.then_some(IPV6_FORWARD);
    for path in [IP_FORWARD].into_iter().chain(ipv6) {
        fs::write(path, "1").map_err(|source| NetError::Namespace {
            operation: "letting packets pass in",
            source,
        })?;
    }
    Ok(())
}

/// Runs `act` in a thread of its own, which ends afterwards: a thread that has changed its namespace serves nobody else.
fn in_helper_thread<T: Send, E: Send>(act: impl FnOnce() -> Result<T, E> + Send) -> Result<T, E> {
    thread::scope(|scope| match scope.spawn(act).join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}
