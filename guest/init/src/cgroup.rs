//! The payload's own cgroup (v2): memory as one unit for the OOM killer, a bound on processes, and its use for heartbeats.
//!
//! PID 1 stays outside: a payload that takes everything is killed as a whole, and PID 1 lives to report it.

use crate::{boot::BootReport, place::Place};
use far_proto::guest::Pressure;
use std::{fs, io, path::PathBuf};

/// Where `mounts` put the hierarchy, and the payload's group in it.
const TOP: &str = "/sys/fs/cgroup";
const GROUP: &str = "/sys/fs/cgroup/payload";
/// Most processes and threads of the payload: a fork bomb meets EAGAIN, PID 1 does not.
const PIDS_MAX: u32 = 16_384;
/// Memory kept back for PID 1 (about 3 MiB with full log windows) and the kernel, KiB.
const RESERVE_KIB: u64 = 16 * 1024;

/// The payload's group.
#[derive(Debug)]
pub(crate) struct Cgroup {
    folder: PathBuf,
}

impl Cgroup {
    /// Makes the group and sets its limits. Without cgroups (or in a test) the payload runs unbounded, with a warning.
    pub(crate) fn create(place: &Place, boot: &mut BootReport) -> Option<Self> {
        if !place.is_guest() {
            return None;
        }
        let write = |boot: &mut BootReport, path: String, value: String| {
            if let Err(error) = fs::write(&path, value) {
                boot.warn(format!("{path}: {error}"));
            }
        };
        write(boot, "/proc/self/oom_score_adj".into(), "-1000".into());
        // One by one: a kernel without one of them still has the others.
        for controller in ["memory", "pids", "cpu"] {
            write(boot, format!("{TOP}/cgroup.subtree_control"), format!("+{controller}"));
        }
        if let Err(error) = fs::create_dir(GROUP)
            && error.kind() != io::ErrorKind::AlreadyExists
        {
            boot.warn(format!("the payload's cgroup {GROUP}: {error}"));
            return None;
        }
        write(boot, format!("{GROUP}/memory.oom.group"), "1".into());
        write(boot, format!("{GROUP}/pids.max"), PIDS_MAX.to_string());
        let (total, _) = memory_kib();
        // A guest too small for the reserve is left to the kernel's own OOM killer.
        if let Some(limit) = total.checked_sub(RESERVE_KIB).filter(|&limit| limit >= RESERVE_KIB) {
            write(boot, format!("{GROUP}/memory.max"), (limit * 1024).to_string());
        }
        Some(Self { folder: GROUP.into() })
    }

    /// The file that takes the first process into the group: the child writes `0` to it.
    pub(crate) fn door(&self) -> io::Result<fs::File> {
        fs::OpenOptions::new()
            .write(true)
            .open(self.folder.join("cgroup.procs"))
    }

    /// Whether the kernel killed a process of the group for want of memory.
    pub(crate) fn was_oom_killed(&self) -> bool {
        value_of(&self.read("memory.events"), "oom_kill") > 0
    }

    /// CPU time in microseconds and number of processes.
    pub(crate) fn usage(&self) -> (u64, u32) {
        let processes = self.read("pids.current").trim().parse().unwrap_or(0);
        (value_of(&self.read("cpu.stat"), "usage_usec"), processes)
    }

    /// Stops or releases every process of the group.
    pub(crate) fn set_frozen(&self, frozen: bool) -> io::Result<()> {
        fs::write(self.folder.join("cgroup.freeze"), if frozen { "1" } else { "0" })
    }

    /// Whether all of them stand still.
    pub(crate) fn is_frozen(&self) -> bool {
        value_of(&self.read("cgroup.events"), "frozen") == 1
    }

    /// The file that becomes readable by POLLPRI when [`Self::is_frozen`] changes.
    pub(crate) fn events(&self) -> io::Result<fs::File> {
        fs::File::open(self.folder.join("cgroup.events"))
    }

    /// Memory in use, KiB; 0 when unknown.
    pub(crate) fn memory_kib(&self) -> u64 {
        self.read("memory.current").trim().parse().unwrap_or(0) / 1024
    }

    /// How long tasks waited for `resource` (cpu, memory or io); `None`: the kernel does not say.
    pub(crate) fn pressure(&self, resource: &str) -> Option<Pressure> {
        pressure_of(&self.read(&[resource, ".pressure"].concat()))
    }

    fn read(&self, file: &str) -> String {
        fs::read_to_string(self.folder.join(file)).unwrap_or_default()
    }
}

/// Total and available memory of the machine, KiB; 0 when unknown.
pub(crate) fn memory_kib() -> (u64, u64) {
    let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    (value_of(&info, "MemTotal:"), value_of(&info, "MemAvailable:"))
}

/// The number after `key` in a table of `key value` lines; 0 when it is not there.
fn value_of(table: &str, key: &str) -> u64 {
    table
        .lines()
        .filter_map(|line| line.split_once(char::is_whitespace))
        .find(|(name, _)| *name == key)
        .and_then(|(_, rest)| rest.split_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}

/// The two lines of a pressure file (Documentation/accounting/psi.rst).
fn pressure_of(table: &str) -> Option<Pressure> {
    let line = |name: &str| {
        let rest = table.lines().find_map(|line| line.strip_prefix(name))?;
        let field = |key: &str| {
            rest.split(' ')
                .find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
        };
        // "1.25" is 125 hundredths: the kernel always writes two digits.
        let avg10 = field("avg10")?.replace('.', "").parse::<u32>().ok()?;
        Some((avg10.min(10_000), field("total")?.parse::<u64>().ok()?))
    };
    let (some_avg10, some_total_us) = line("some")?;
    let (full_avg10, full_total_us) = line("full").unwrap_or_default();
    Some(Pressure {
        some_avg10,
        full_avg10,
        some_total_us,
        full_total_us,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_read_from_kernel_tables() {
        let events = "low 0\noom 2\noom_kill 1\noom_group_kill 1\n";
        assert_eq!(value_of(events, "oom_kill"), 1);
        assert_eq!(
            value_of("MemTotal:         101224 kB\nMemFree: 1 kB", "MemTotal:"),
            101_224
        );
        assert_eq!(value_of("", "oom_kill"), 0);
        assert_eq!(value_of("oom_kill many", "oom_kill"), 0);
        assert!(memory_kib().0 > 0);
        let psi = "some avg10=1.25 avg60=0.00 avg300=0.00 total=77\nfull avg10=100.00 avg60=0.00 avg300=0.00 total=5\n";
        let expected = Pressure {
            some_avg10: 125,
            full_avg10: 10_000,
            some_total_us: 77,
            full_total_us: 5,
        };
        assert_eq!(pressure_of(psi), Some(expected));
        assert_eq!(pressure_of(""), None);
        assert_eq!(pressure_of("some avg10=many total=1"), None);
    }
}
