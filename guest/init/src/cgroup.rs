//! The payload's own cgroup (v2): memory as one unit for the OOM killer, a bound on processes, and its use for heartbeats.
//!
//! PID 1 stays outside: a payload that takes everything is killed as a whole, and PID 1 lives to report it. The kernel's
//! OOM killer itself never takes the machine's init (mm/oom_kill.c, `oom_unkillable_task`).

use crate::{boot::BootReport, place::Place, sys};
use far_proto::guest::Pressure;
use nix::{
    errno::Errno,
    fcntl::{OFlag, open, openat},
    sys::stat::Mode,
    unistd::mkdir,
};
use std::{
    fs,
    io::{self, Read, Write},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

/// Where `mounts` put the hierarchy, and the payload's group in it.
const TOP: &str = "/sys/fs/cgroup";
const GROUP: &str = "/sys/fs/cgroup/payload";
/// Most processes and threads of the payload: a fork bomb meets EAGAIN, PID 1 does not.
const PIDS_MAX: u32 = 16_384;
/// Memory kept back for PID 1 (about 3 MiB with full log windows) and for what the kernel wants from now on, bytes: a quarter,
/// within these. Where the kernel finds none it can stand still, or its vsock device can: nobody hears of the guest then.
const RESERVE_BYTES: std::ops::RangeInclusive<u64> = 8 << 20..=16 << 20;

/// The payload's group.
#[derive(Debug)]
pub(crate) struct Cgroup {
    /// Opened once: where children are born, and the way to its files.
    folder: OwnedFd,
}

/// What the payload may have of the memory that is free before it starts: what the kernel has taken by then is its own. A
/// guest too small for any reserve is left to the kernel's own OOM killer.
fn memory_limit(free: u64) -> Option<u64> {
    let reserve = (free / 4).clamp(*RESERVE_BYTES.start(), *RESERVE_BYTES.end());
    free.checked_sub(reserve).filter(|limit| limit >= RESERVE_BYTES.start())
}

impl Cgroup {
    /// Makes the group and sets its limits. Without cgroups (or in a test) the payload runs unbounded, with a warning.
    pub(crate) fn create(place: &Place, boot: &mut BootReport) -> Option<Self> {
        if !place.is_guest() {
            return None;
        }
        let control = [TOP, "/cgroup.subtree_control"].concat();
        if write(&control, "+memory +pids +cpu").is_err() {
            // One by one: a kernel without one of them still has the others.
            for controller in ["+memory", "+pids", "+cpu"] {
                if let Err(error) = write(&control, controller) {
                    boot.warn(format!("{control}: {controller}: {error}"));
                }
            }
        }
        let cgroup = match Self::make() {
            Ok(cgroup) => cgroup,
            Err(error) => {
                boot.warn(format!("the payload's cgroup {GROUP}: {error}"));
                return None;
            }
        };
        let mut set = |file: &str, value: &str| {
            if let Err(error) = cgroup.write(file, value) {
                boot.warn(format!("{GROUP}/{file}: {error}"));
            }
        };
        set("memory.oom.group", "1");
        set("pids.max", &PIDS_MAX.to_string());
        if let Some(limit) = memory_limit(sys::free_memory_bytes()) {
            set("memory.max", &limit.to_string());
        }
        Some(cgroup)
    }

    fn make() -> nix::Result<Self> {
        match mkdir(GROUP, Mode::from_bits_truncate(0o755)) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(error) => return Err(error),
        }
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        Ok(Self {
            folder: open(GROUP, flags, Mode::empty())?,
        })
    }

    /// Where its processes are born, see [`sys::Birth`].
    pub(crate) fn folder(&self) -> BorrowedFd<'_> {
        self.folder.as_fd()
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
        self.write("cgroup.freeze", if frozen { "1" } else { "0" })
    }

    /// Whether all of them stand still.
    pub(crate) fn is_frozen(&self) -> bool {
        value_of(&self.read("cgroup.events"), "frozen") == 1
    }

    /// The file that becomes readable by POLLPRI when [`Self::is_frozen`] changes.
    pub(crate) fn events(&self) -> io::Result<fs::File> {
        self.open("cgroup.events", OFlag::O_RDONLY)
    }

    /// Memory in use, KiB; 0 when unknown.
    pub(crate) fn memory_kib(&self) -> u64 {
        self.read("memory.current").trim().parse().unwrap_or(0) / 1024
    }

    /// How long tasks waited for `resource` (cpu, memory or io); `None`: the kernel does not say.
    pub(crate) fn pressure(&self, resource: &str) -> Option<Pressure> {
        pressure_of(&self.read(&[resource, ".pressure"].concat()))
    }

    fn open(&self, file: &str, flags: OFlag) -> io::Result<fs::File> {
        Ok(openat(&self.folder, file, flags | OFlag::O_CLOEXEC, Mode::empty())?.into())
    }

    fn write(&self, file: &str, value: &str) -> io::Result<()> {
        self.open(file, OFlag::O_WRONLY)?.write_all(value.as_bytes())
    }

    fn read(&self, file: &str) -> String {
        let mut text = String::new();
        if let Ok(mut file) = self.open(file, OFlag::O_RDONLY) {
            let _ = file.read_to_string(&mut text);
        }
        text
    }
}

fn write(path: &str, value: &str) -> io::Result<()> {
    fs::OpenOptions::new()
        .write(true)
        .open(path)?
        .write_all(value.as_bytes())
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
    fn the_payload_gets_what_is_free_without_a_reserve() {
        let limit = |mib: u64| memory_limit(mib << 20).map(|bytes| bytes >> 20);
        let expected = [
            (0, None),
            (8, None),
            (15, None),
            (16, Some(8)),
            (40, Some(30)),
            (64, Some(48)),
            (500, Some(484)),
        ];
        for (free, expected) in expected {
            assert_eq!(limit(free), expected, "{free} MiB");
        }
    }

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
