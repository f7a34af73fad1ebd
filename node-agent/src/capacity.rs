//! What this blade is and has.

use crate::{
    host::{HostFacts, Images},
    supervisor::Room,
    wire,
};
use far_proto::node::NodeCapacity;
use std::{collections::BTreeMap, io};

/// Facts that stay while far-node runs.
#[derive(Debug, Clone)]
pub struct Machine {
    /// Thousandths of a core of the whole machine.
    pub cpu_millis: u64,
    /// MiB of the whole machine.
    pub memory_mib: u64,
    /// What agents may use.
    pub room: Room,
    /// Of the kernel.
    pub kernel_version: String,
    /// Of this start of the kernel.
    pub boot_id: String,
    /// VMM and accelerator.
    pub host: HostFacts,
    /// Further resources by name, as the blade's operator declares them.
    pub extended: BTreeMap<String, u32>,
}

/// Of this start of the machine's kernel.
pub(crate) fn boot_id() -> io::Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?
        .trim()
        .to_owned())
}

impl Machine {
    /// Reads the machine. Blocking.
    ///
    /// # Errors
    /// /proc is not as Linux makes it.
    pub fn read(host: HostFacts, reserved_cpu_millis: u64, reserved_memory_mib: u64, max_vms: u32) -> io::Result<Self> {
        let cores = std::thread::available_parallelism()?.get() as u64;
        let cpu_millis = cores * 1000;
        let memory_mib = memory_mib(&std::fs::read_to_string("/proc/meminfo")?)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "/proc/meminfo has no MemTotal"))?;
        let text = |path| std::fs::read_to_string(path).map(|text| text.trim().to_owned());
        Ok(Self {
            cpu_millis,
            memory_mib,
            room: Room {
                cpu_millis: cpu_millis.saturating_sub(reserved_cpu_millis),
                memory_mib: memory_mib.saturating_sub(reserved_memory_mib),
                max_vms,
            },
            kernel_version: text("/proc/sys/kernel/osrelease")?,
            boot_id: boot_id()?,
            host,
            extended: BTreeMap::new(),
        })
    }

    /// As it is told, with the images that are here now. Blocking.
    #[must_use]
    pub fn capacity(&self, images: &dyn Images) -> NodeCapacity {
        let images = images.list().unwrap_or_else(|error| {
            tracing::warn!(%error, "the images of the blade cannot be listed");
            Vec::new()
        });
        NodeCapacity {
            cpu_millis: self.cpu_millis,
            memory_mib: self.memory_mib,
            allocatable_cpu_millis: self.room.cpu_millis,
            allocatable_memory_mib: self.room.memory_mib,
            max_vms: self.room.max_vms,
            arch: match std::env::consts::ARCH {
                "x86_64" => "amd64",
                "aarch64" => "arm64",
                other => other,
            }
            .to_owned(),
            kernel_version: self.kernel_version.clone(),
            node_version: env!("CARGO_PKG_VERSION").to_owned(),
            boot_id: self.boot_id.clone(),
            vmm: self.host.vmm.clone(),
            accelerator: self.host.accelerator.clone(),
            kvm_reason: self.host.kvm_reason.clone(),
            images: images.into_iter().map(wire::image).collect(),
            extended: self.extended.clone().into_iter().collect(),
        }
    }
}

fn memory_mib(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib / 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_from_meminfo() {
        assert_eq!(memory_mib("MemTotal:       24684032 kB\nMemFree: 1 kB\n"), Some(24105));
        assert_eq!(memory_mib("MemFree: 1 kB\n"), None);
    }
}
