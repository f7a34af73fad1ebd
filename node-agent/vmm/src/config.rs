//! The only description of a VM: the file Firecracker reads with `--config-file`, as far as this project uses it.
//!
//! Keys and meanings are Firecracker's (its `docs/getting-started.md` and API specification, v1.16). An unknown key is
//! an error that names it, so that nothing a caller asked for is silently left out by one of the backends.

use serde::{Deserialize, Serialize};
use std::{
    collections::HashSet,
    fmt, fs, io,
    path::{Path, PathBuf},
};

/// Bytes of a configuration file that are read at most: real ones have a few KiB.
pub(crate) const MAX_CONFIG_BYTES: u64 = 256 * 1024;
/// Bytes of a Unix socket's path, without the closing NUL (unix(7): `sun_path` has 108).
pub const MAX_SOCKET_PATH: usize = 107;
/// Bytes of `boot-source.boot_args` (Linux, x86: `COMMAND_LINE_SIZE` is 2048), less room for what a backend appends.
pub const MAX_BOOT_ARGS: usize = 1792;
/// vCPUs that Firecracker allows, 1 to this.
pub const MAX_VCPUS: u8 = 32;

/// One VM, in Firecracker's words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct VmConfig {
    /// What it boots.
    pub boot_source: BootSource,
    /// Block devices in the guest's order: the first is `/dev/vda`.
    #[serde(default)]
    pub drives: Vec<Drive>,
    /// CPUs and memory.
    pub machine_config: MachineConfig,
    /// Network devices in the guest's order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub network_interfaces: Vec<NetworkInterface>,
    /// The socket device; absent: the guest has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<Vsock>,
    /// The virtio random number device; absent: the guest has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entropy: Option<Entropy>,
    /// Firecracker's own log; QEMU's messages go to far-vmm's standard error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logger: Option<Logger>,
    /// Firecracker's metrics file; the QEMU backend has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics: Option<Metrics>,
    /// Flintlock writes it; the QEMU backend offers no metadata service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mmds_config: Option<MmdsConfig>,
}

/// What a VM boots.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootSource {
    /// vmlinux (ELF); the QEMU backend also takes a bzImage.
    pub kernel_image_path: PathBuf,
    /// Kernel command line, at most [`MAX_BOOT_ARGS`] bytes; backends append what they need.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_args: Option<String>,
    /// cpio archive.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd_path: Option<PathBuf>,
}

/// One block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drive {
    /// `[A-Za-z0-9_]`, unique in the VM.
    pub drive_id: String,
    /// A regular file or a block device.
    pub path_on_host: PathBuf,
    /// Adds `root=/dev/vda` and `ro` or `rw` to the kernel command line. Only one drive may say so.
    pub is_root_device: bool,
    /// The guest cannot write to it.
    #[serde(default)]
    pub is_read_only: bool,
    /// `Unsafe` (default: the guest's flushes are not passed on) or `Writeback`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache_type: Option<CacheType>,
    /// How Firecracker reads the file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub io_engine: Option<IoEngine>,
}

/// What a guest's flush does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum CacheType {
    /// Nothing.
    Unsafe,
    /// The file is synced.
    Writeback,
}

/// Firecracker's ways to read a drive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum IoEngine {
    /// Blocking calls.
    Sync,
    /// io_uring.
    Async,
}

/// CPUs and memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// 1 to [`MAX_VCPUS`].
    pub vcpu_count: u8,
    /// MiB, 1 and up.
    pub mem_size_mib: u32,
    /// Hyper-threading as the guest sees it; default false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub smt: Option<bool>,
    /// For differential snapshots; default false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub track_dirty_pages: Option<bool>,
}

/// One network device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkInterface {
    /// `[A-Za-z0-9_]`, unique in the VM.
    pub iface_id: String,
    /// Name of a tap that exists where the VMM runs (see `netns` of the FAR additions), 1 to 15 bytes.
    pub host_dev_name: String,
    /// `aa:bb:cc:dd:ee:ff`; absent: the backend's choice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_mac: Option<String>,
}

/// The socket device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vsock {
    /// Old name of the device; Firecracker ignores it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_id: Option<String>,
    /// 3 and up.
    pub guest_cid: u32,
    /// Unix socket for connections to the guest; `<uds_path>_<port>` is where the guest's connections to CID 2 arrive.
    pub uds_path: PathBuf,
}

/// The random number device. It has no setting that this project uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entropy {}

/// Firecracker's log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Logger {
    /// File or pipe.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_path: Option<PathBuf>,
    /// `Off`, `Error`, `Warning`, `Info`, `Debug` or `Trace`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub level: Option<String>,
    /// Print the level.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub show_level: Option<bool>,
    /// Print file and line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub show_log_origin: Option<bool>,
}

/// Firecracker's metrics.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Metrics {
    /// File or pipe.
    pub metrics_path: PathBuf,
}

/// Firecracker's metadata service, as Flintlock asks for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MmdsConfig {
    /// `V1` or `V2`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// `iface_id` of the devices that offer it.
    pub network_interfaces: Vec<String>,
    /// Default 169.254.169.254.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv4_address: Option<String>,
}

/// Why a VM's description cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("reading the VM's description {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// More than any real description holds.
    #[error("{path} has more than {MAX_CONFIG_BYTES} bytes: this is not a VM's description")]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// Not this form of JSON.
    #[error("field {field}: {message}")]
    Parse {
        /// Path of the field, for example `drives[0].is_read_only`.
        field: String,
        /// What is wrong with it.
        message: String,
    },
    /// A value that no backend can use.
    #[error("field {field}: {message}")]
    Field {
        /// Path of the field.
        field: String,
        /// What is wrong and what is allowed.
        message: String,
    },
}

impl ConfigError {
    fn field(field: impl fmt::Display, message: impl Into<String>) -> Self {
        Self::Field {
            field: field.to_string(),
            message: message.into(),
        }
    }
}

impl VmConfig {
    /// Reads and checks a description.
    ///
    /// # Errors
    /// Names the file or the field.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        Self::parse(&read_bounded(path)?)
    }

    /// Reads and checks a description's text.
    ///
    /// # Errors
    /// Names the field.
    pub fn parse(text: &[u8]) -> Result<Self, ConfigError> {
        let config: Self = parse_json(text)?;
        config.check()?;
        Ok(config)
    }

    /// The description as text for a file.
    #[must_use]
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("plain data with text keys has a JSON form")
    }

    /// What every backend relies on; called by [`VmConfig::parse`].
    ///
    /// # Errors
    /// Names the first field that cannot be used.
    pub fn check(&self) -> Result<(), ConfigError> {
        self.check_boot_source()?;
        self.check_machine()?;
        self.check_drives()?;
        self.check_interfaces()?;
        let Some(vsock) = &self.vsock else { return Ok(()) };
        if vsock.guest_cid < 3 || vsock.guest_cid == u32::MAX {
            return Err(ConfigError::field(
                "vsock.guest_cid",
                format!("{} is reserved: 3 and up", vsock.guest_cid),
            ));
        }
        check_path("vsock.uds_path", &vsock.uds_path)?;
        check_socket_path("vsock.uds_path", &vsock.uds_path, "_65535".len())
    }

    fn check_boot_source(&self) -> Result<(), ConfigError> {
        let boot = &self.boot_source;
        check_path("boot-source.kernel_image_path", &boot.kernel_image_path)?;
        if let Some(initrd) = &boot.initrd_path {
            check_path("boot-source.initrd_path", initrd)?;
        }
        let args = boot.boot_args.as_deref().unwrap_or_default();
        if args.len() > MAX_BOOT_ARGS {
            let message = format!(
                "{} bytes: at most {MAX_BOOT_ARGS} fit beside what a backend appends",
                args.len()
            );
            return Err(ConfigError::field("boot-source.boot_args", message));
        }
        if args.chars().any(char::is_control) {
            return Err(ConfigError::field("boot-source.boot_args", "holds a control character"));
        }
        Ok(())
    }

    fn check_machine(&self) -> Result<(), ConfigError> {
        let machine = &self.machine_config;
        if !(1..=MAX_VCPUS).contains(&machine.vcpu_count) {
            let message = format!("{}: 1 to {MAX_VCPUS} are allowed", machine.vcpu_count);
            return Err(ConfigError::field("machine-config.vcpu_count", message));
        }
        if machine.mem_size_mib == 0 {
            return Err(ConfigError::field(
                "machine-config.mem_size_mib",
                "0: a VM needs memory",
            ));
        }
        Ok(())
    }

    fn check_drives(&self) -> Result<(), ConfigError> {
        let mut seen = HashSet::new();
        for (index, drive) in self.drives.iter().enumerate() {
            check_id(&format!("drives[{index}].drive_id"), &drive.drive_id, &mut seen)?;
            check_path(&format!("drives[{index}].path_on_host"), &drive.path_on_host)?;
            if drive.is_root_device && index != 0 {
                let message = "only the first drive can be the root device: the kernel is told root=/dev/vda";
                return Err(ConfigError::field(format!("drives[{index}].is_root_device"), message));
            }
        }
        Ok(())
    }

    fn check_interfaces(&self) -> Result<(), ConfigError> {
        let mut seen = HashSet::new();
        for (index, interface) in self.network_interfaces.iter().enumerate() {
            let at = |name: &str| format!("network-interfaces[{index}].{name}");
            check_id(&at("iface_id"), &interface.iface_id, &mut seen)?;
            let tap = &interface.host_dev_name;
            let fits = (1..=15).contains(&tap.len());
            if !fits || !tap.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-.".contains(&b)) {
                let message = format!("{tap:?}: 1 to 15 of [A-Za-z0-9_.-] are allowed");
                return Err(ConfigError::field(at("host_dev_name"), message));
            }
            if let Some(mac) = &interface.guest_mac
                && !is_mac(mac)
            {
                return Err(ConfigError::field(
                    at("guest_mac"),
                    format!("{mac:?}: not of the form 02:00:00:00:00:01"),
                ));
            }
        }
        Ok(())
    }
}

/// Reads a small file; one that is larger than any real one is refused.
pub(crate) fn read_bounded(path: &Path) -> Result<Vec<u8>, ConfigError> {
    use io::Read;
    let at = |source| ConfigError::Read {
        path: path.to_owned(),
        source,
    };
    let mut text = Vec::new();
    fs::File::open(path)
        .map_err(at)?
        .take(MAX_CONFIG_BYTES + 1)
        .read_to_end(&mut text)
        .map_err(at)?;
    if text.len() as u64 > MAX_CONFIG_BYTES {
        return Err(ConfigError::TooLarge { path: path.to_owned() });
    }
    Ok(text)
}

/// Parses JSON; the error says which field.
pub(crate) fn parse_json<T: serde::de::DeserializeOwned>(text: &[u8]) -> Result<T, ConfigError> {
    let mut deserializer = serde_json::Deserializer::from_slice(text);
    let value = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let field = error.path().to_string();
        ConfigError::Parse {
            field,
            message: error.inner().to_string(),
        }
    })?;
    deserializer.end().map_err(|error| ConfigError::Parse {
        field: ".".into(),
        message: error.to_string(),
    })?;
    Ok(value)
}

/// An absolute or relative path that command lines of both backends can carry.
fn check_path(field: &str, path: &Path) -> Result<(), ConfigError> {
    let Some(text) = path.to_str() else {
        return Err(ConfigError::field(field, "is not UTF-8"));
    };
    if text.is_empty() {
        return Err(ConfigError::field(field, "is empty"));
    }
    if text.chars().any(char::is_control) {
        return Err(ConfigError::field(field, "holds a control character"));
    }
    Ok(())
}

/// A Unix socket's path, with room for `suffix` more bytes.
pub(crate) fn check_socket_path(field: &str, path: &Path, suffix: usize) -> Result<(), ConfigError> {
    let length = path.as_os_str().len() + suffix;
    if length <= MAX_SOCKET_PATH {
        return Ok(());
    }
    let message = format!(
        "{} has {} bytes{}: a Unix socket's path holds {MAX_SOCKET_PATH}; use a shorter folder",
        path.display(),
        path.as_os_str().len(),
        if suffix > 0 {
            format!(" and needs {suffix} more for _<port>")
        } else {
            String::new()
        },
    );
    Err(ConfigError::field(field, message))
}

fn check_id(field: &str, id: &str, seen: &mut HashSet<String>) -> Result<(), ConfigError> {
    let fits = (1..=64).contains(&id.len());
    if !fits || !id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
        return Err(ConfigError::field(
            field,
            format!("{id:?}: 1 to 64 of [A-Za-z0-9_] are allowed"),
        ));
    }
    if !seen.insert(id.to_owned()) {
        return Err(ConfigError::field(field, format!("{id:?} is used twice")));
    }
    Ok(())
}

fn is_mac(text: &str) -> bool {
    let parts: Vec<&str> = text.split(':').collect();
    parts.len() == 6
        && parts
            .iter()
            .all(|part| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn full() -> Value {
        json!({
            "boot-source": {"kernel_image_path": "/k", "boot_args": "quiet", "initrd_path": "/i"},
            "drives": [{"drive_id": "a", "path_on_host": "/a", "is_root_device": false, "is_read_only": true},
                {"drive_id": "b", "path_on_host": "/b", "is_root_device": false}],
            "machine-config": {"vcpu_count": 1, "mem_size_mib": 512},
            "network-interfaces": [{"iface_id": "eth0", "host_dev_name": "fa1", "guest_mac": "02:00:00:00:00:01"}],
            "vsock": {"guest_cid": 3, "uds_path": "/r/v.sock"},
            "entropy": {},
        })
    }

    fn error_of(config: &Value) -> String {
        VmConfig::parse(config.to_string().as_bytes()).unwrap_err().to_string()
    }

    #[test]
    fn a_description_reads_back_as_written() {
        let config = VmConfig::parse(full().to_string().as_bytes()).unwrap();
        assert_eq!(VmConfig::parse(config.to_json().as_bytes()).unwrap(), config);
    }

    #[test]
    fn what_flintlock_writes_is_accepted() {
        let config = json!({
            "boot-source": {"kernel_image_path": "/k/boot/vmlinux", "boot_args": "console=ttyS0 reboot=k panic=1 pci=off"},
            "drives": [{"drive_id": "root", "path_on_host": "/dev/mapper/x", "is_root_device": true, "is_read_only": false,
                "cache_type": "Unsafe"}],
            "machine-config": {"vcpu_count": 2, "mem_size_mib": 1024, "smt": false, "track_dirty_pages": false},
            "network-interfaces": [{"iface_id": "eth0", "host_dev_name": "fltap1234567", "guest_mac": "AA:FF:00:00:00:01"}],
            "mmds-config": {"version": "V1", "network_interfaces": ["eth0"]},
            "logger": {"log_path": "/s/firecracker.log", "level": "Debug", "show_level": true, "show_log_origin": true},
            "metrics": {"metrics_path": "/s/firecracker.metrics"},
            "vsock": {"vsock_id": "guest-agent", "guest_cid": 3, "uds_path": "/s/guest-agent.vsock"},
        });
        VmConfig::parse(config.to_string().as_bytes()).unwrap();
    }

    #[test]
    fn each_wrong_value_is_named_by_its_field() {
        let long = "x".repeat(200);
        let cases = [
            (
                "/boot-source/kernel_image_path",
                json!(""),
                "boot-source.kernel_image_path",
            ),
            (
                "/boot-source/kernel_image_path",
                json!("/k\n"),
                "boot-source.kernel_image_path",
            ),
            ("/boot-source/boot_args", json!("a\nb"), "boot-source.boot_args"),
            (
                "/boot-source/boot_args",
                json!("x".repeat(MAX_BOOT_ARGS + 1)),
                "boot-source.boot_args",
            ),
            ("/boot-source/boot_args", json!(7), "boot-source.boot_args"),
            ("/machine-config/vcpu_count", json!(0), "machine-config.vcpu_count"),
            ("/machine-config/vcpu_count", json!(33), "machine-config.vcpu_count"),
            ("/machine-config/vcpu_count", json!(-1), "machine-config.vcpu_count"),
            ("/machine-config/mem_size_mib", json!(0), "machine-config.mem_size_mib"),
            (
                "/machine-config/mem_size_mib",
                json!("512Mi"),
                "machine-config.mem_size_mib",
            ),
            ("/drives/1/drive_id", json!("a"), "drives[1].drive_id"),
            ("/drives/1/drive_id", json!("a,file=/etc/shadow"), "drives[1].drive_id"),
            ("/drives/1/is_root_device", json!(true), "drives[1].is_root_device"),
            ("/drives/0/path_on_host", json!(""), "drives[0].path_on_host"),
            (
                "/network-interfaces/0/host_dev_name",
                json!("a-name-of-16-byt"),
                "network-interfaces[0].host_dev_name",
            ),
            (
                "/network-interfaces/0/host_dev_name",
                json!("a,b"),
                "network-interfaces[0].host_dev_name",
            ),
            (
                "/network-interfaces/0/guest_mac",
                json!("02:00"),
                "network-interfaces[0].guest_mac",
            ),
            ("/vsock/guest_cid", json!(2), "vsock.guest_cid"),
            ("/vsock/uds_path", json!(format!("/{long}")), "vsock.uds_path"),
        ];
        for (pointer, value, field) in cases {
            let mut config = full();
            *config.pointer_mut(pointer).unwrap() = value.clone();
            let error = error_of(&config);
            assert!(error.starts_with(&format!("field {field}: ")), "{value}: {error}");
        }
    }

    #[test]
    fn an_unknown_key_is_named_wherever_it_stands() {
        for (pointer, key) in [
            ("", "balloon"),
            ("/boot-source", "kernel"),
            ("/drives/0", "rate"),
            ("/entropy", "x"),
        ] {
            let mut config = full();
            config.pointer_mut(pointer).unwrap()[key] = json!(1);
            let error = error_of(&config);
            assert!(error.contains(&format!("unknown field `{key}`")), "{error}");
        }
    }

    #[test]
    fn a_missing_key_is_named() {
        for key in ["boot-source", "machine-config"] {
            let mut config = full();
            config.as_object_mut().unwrap().remove(key);
            assert!(error_of(&config).contains(&format!("missing field `{key}`")));
        }
    }

    #[test]
    fn text_after_the_description_is_refused() {
        assert!(VmConfig::parse(format!("{} x", full()).as_bytes()).is_err());
    }
}
