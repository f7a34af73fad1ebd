//! Whether guests of this blade can have a NIC, and if not, why: a sentence for the blade's status.

use std::{fs, io};

/// Bit of CAP_SYS_ADMIN in the kernel's capability sets (capabilities(7)): making and entering namespaces.
const CAP_SYS_ADMIN: u32 = 21;
/// Bit of CAP_NET_ADMIN: making taps.
const CAP_NET_ADMIN: u32 = 12;

/// Why a guest gets no NIC. It still has its vsock device.
#[derive(Debug, thiserror::Error)]
pub enum NoNic {
    /// The process may not change networks.
    #[error("no NIC for guests: far-node lacks {missing}")]
    Capability {
        /// `CAP_NET_ADMIN` or `CAP_SYS_ADMIN`.
        missing: &'static str,
    },
    /// The kernel has no taps.
    #[error("no NIC for guests: /dev/net/tun cannot be opened ({source})")]
    Tun {
        /// Why.
        source: io::Error,
    },
}

impl NoNic {
    /// The command, or the act, that cures the lack.
    #[must_use]
    pub fn fix(&self) -> &'static str {
        match self {
            Self::Capability { .. } => {
                "run far-node as root, or: sudo setcap cap_net_admin,cap_sys_admin+ep \"$(command -v far-node)\""
            }
            Self::Tun { .. } => "sudo modprobe tun",
        }
    }
}

/// Ok where taps can be made in an own network namespace.
///
/// # Errors
/// Says what is missing and the command that cures it.
pub fn capability() -> Result<(), NoNic> {
    let effective = fs::read_to_string("/proc/self/status")
        .ok()
        .and_then(|status| effective_set(&status))
        .unwrap_or(0);
    for (bit, missing) in [(CAP_NET_ADMIN, "CAP_NET_ADMIN"), (CAP_SYS_ADMIN, "CAP_SYS_ADMIN")] {
        if effective & (1 << bit) == 0 {
            return Err(NoNic::Capability { missing });
        }
    }
    let tun = fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun");
    tun.map(drop).map_err(|source| NoNic::Tun { source })
}

/// The effective capabilities in the text of `/proc/<pid>/status`.
fn effective_set(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_effective_set_is_read_from_a_status_file() {
        assert_eq!(
            effective_set("Name:\tx\nCapEff:\t0000000000001000\n"),
            Some(1 << CAP_NET_ADMIN)
        );
        assert_eq!(effective_set("Name:\tx\n"), None);
    }
}
