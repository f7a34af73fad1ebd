//! `far.json`: what far-vmm needs to know beyond Firecracker's description, beside that description.
//!
//! Every field may be absent, and so may the file: then all of far-vmm's files lie in the description's folder, which
//! is how it runs when Flintlock starts it as its `--firecracker-bin`.

use crate::config::{ConfigError, check_socket_path, parse_json, read_bounded};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Name of the file beside the description.
pub const FILE_NAME: &str = "far.json";
/// Bytes of console kept on disk when `console_max_bytes` is absent.
pub const DEFAULT_CONSOLE_MAX_BYTES: u64 = 1 << 20;
/// Smallest bound that still holds a useful console.
pub const MIN_CONSOLE_MAX_BYTES: u64 = 4096;

/// Content of `far.json`. Relative paths are relative to its folder.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Additions {
    /// Which VMM runs the guest.
    pub backend: Backend,
    /// How the QEMU backend runs guest code.
    pub accel: Accel,
    /// far-vmm's control socket; absent: `vmm.sock`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub control_socket: Option<PathBuf>,
    /// Where the exit record goes; absent: `exit.json`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exit_file: Option<PathBuf>,
    /// The guest's serial console; absent: `console.log`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub console_file: Option<PathBuf>,
    /// Bytes the console file may have: the newest are kept. 4096 and up; absent: 1 MiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub console_max_bytes: Option<u64>,
    /// Path of the network namespace the VMM runs in; absent: far-vmm's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub netns: Option<PathBuf>,
    /// The VM ends when the lease in this file is over (see [`crate::lease`]); absent: it has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lease_file: Option<PathBuf>,
    /// Stay after the VMM ended, answering the control socket, until released or the folder is gone; absent: true.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tombstone: Option<bool>,
    /// Socket between QEMU and the vsock daemon; absent: `vhost.sock`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vhost_socket: Option<PathBuf>,
    /// QEMU's binary; absent: `FAR_QEMU`, else `qemu-system-<arch>` on PATH.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub qemu: Option<PathBuf>,
    /// The vsock daemon; absent: `FAR_VHOST_DEVICE_VSOCK`, PATH, `$FAR_CACHE/vhost/bin`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vhost_device_vsock: Option<PathBuf>,
    /// Firecracker's binary; absent: `FIRECRACKER_BIN`, else `firecracker` on PATH.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub firecracker: Option<PathBuf>,
    /// Rate of the time stamp counter in kHz, from a probe that the caller kept; absent: measured at each start.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tsc_khz: Option<u32>,
    /// QEMU's seccomp filter; absent: true.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub qemu_sandbox: Option<bool>,
}

/// Which VMM runs the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// Firecracker where its binary is found and KVM is usable, else QEMU.
    #[default]
    Auto,
    /// QEMU's microvm machine.
    Qemu,
    /// Firecracker.
    Firecracker,
}

/// How the QEMU backend runs guest code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// KVM when a probe at this start ran a guest, else TCG.
    #[default]
    Auto,
    /// KVM, without a probe: the caller keeps the result of one.
    Kvm,
    /// QEMU's translator; needs nothing of the machine.
    Tcg,
}

/// Additions with every path absolute and every default filled in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The VM's folder, absolute.
    pub folder: PathBuf,
    /// Which VMM runs the guest.
    pub backend: Backend,
    /// How QEMU runs guest code.
    pub accel: Accel,
    /// far-vmm's control socket.
    pub control_socket: PathBuf,
    /// Where the exit record goes.
    pub exit_file: PathBuf,
    /// The guest's serial console.
    pub console_file: PathBuf,
    /// Bytes the console file may have.
    pub console_max_bytes: u64,
    /// Network namespace the VMM runs in.
    pub netns: Option<PathBuf>,
    /// The VM's lease.
    pub lease_file: Option<PathBuf>,
    /// Stay after the end.
    pub tombstone: bool,
    /// Socket between QEMU and the vsock daemon.
    pub vhost_socket: PathBuf,
    /// Binaries that were named.
    pub tools: crate::probe::Tools,
    /// Rate of the time stamp counter.
    pub tsc_khz: Option<u32>,
    /// QEMU's seccomp filter.
    pub qemu_sandbox: bool,
}

impl Additions {
    /// The additions beside the description `config_file`; defaults where there is no such file.
    ///
    /// # Errors
    /// Names the file or the field.
    pub fn load_beside(config_file: &Path) -> Result<Self, ConfigError> {
        match read_bounded(&config_file.with_file_name(FILE_NAME)) {
            Ok(text) => Self::parse(&text),
            Err(ConfigError::Read { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                Ok(Self::default())
            }
            Err(error) => Err(error),
        }
    }

    /// Reads the additions' text.
    ///
    /// # Errors
    /// Names the field.
    pub fn parse(text: &[u8]) -> Result<Self, ConfigError> {
        parse_json(text)
    }

    /// The additions as text for `far.json`.
    #[must_use]
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("plain data with text keys has a JSON form")
    }

    /// Fills in defaults. `folder` is the description's, absolute.
    ///
    /// # Errors
    /// Names a field that cannot be used.
    pub fn resolve(&self, folder: &Path) -> Result<Settings, ConfigError> {
        let at = |given: &Option<PathBuf>, default: &str| folder.join(given.as_deref().unwrap_or(Path::new(default)));
        let settings = Settings {
            folder: folder.to_owned(),
            backend: self.backend,
            accel: self.accel,
            control_socket: at(&self.control_socket, "vmm.sock"),
            exit_file: at(&self.exit_file, "exit.json"),
            console_file: at(&self.console_file, "console.log"),
            console_max_bytes: self.console_max_bytes.unwrap_or(DEFAULT_CONSOLE_MAX_BYTES),
            netns: self.netns.as_deref().map(|path| folder.join(path)),
            lease_file: self.lease_file.as_deref().map(|path| folder.join(path)),
            tombstone: self.tombstone.unwrap_or(true),
            vhost_socket: at(&self.vhost_socket, "vhost.sock"),
            tools: crate::probe::Tools {
                qemu: self.qemu.clone(),
                vhost_device_vsock: self.vhost_device_vsock.clone(),
                firecracker: self.firecracker.clone(),
            },
            tsc_khz: self.tsc_khz,
            qemu_sandbox: self.qemu_sandbox.unwrap_or(true),
        };
        check_socket_path("control_socket", &settings.control_socket, 0)?;
        check_socket_path("vhost_socket", &settings.vhost_socket, 0)?;
        if settings.console_max_bytes < MIN_CONSOLE_MAX_BYTES {
            let message = format!("{}: {MIN_CONSOLE_MAX_BYTES} bytes and up", settings.console_max_bytes);
            return Err(ConfigError::Field {
                field: "console_max_bytes".into(),
                message,
            });
        }
        Ok(settings)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_file_everything_lies_in_the_descriptions_folder() {
        let folder = tempfile::tempdir().unwrap();
        let additions = Additions::load_beside(&folder.path().join("vm.json")).unwrap();
        assert_eq!(additions, Additions::default());
        let settings = additions.resolve(Path::new("/r/vm")).unwrap();
        assert_eq!(settings.control_socket, Path::new("/r/vm/vmm.sock"));
        assert_eq!(settings.exit_file, Path::new("/r/vm/exit.json"));
        assert_eq!(settings.console_file, Path::new("/r/vm/console.log"));
        assert_eq!(settings.vhost_socket, Path::new("/r/vm/vhost.sock"));
        assert!(settings.tombstone && settings.qemu_sandbox);
    }

    #[test]
    fn additions_read_back_as_written() {
        let additions = Additions {
            backend: Backend::Qemu,
            accel: Accel::Tcg,
            netns: Some("/run/far/netns".into()),
            tombstone: Some(false),
            console_max_bytes: Some(65_536),
            ..Additions::default()
        };
        assert_eq!(Additions::parse(additions.to_json().as_bytes()).unwrap(), additions);
    }

    #[test]
    fn wrong_additions_are_named_by_their_field() {
        let cases = [
            (r#"{"backend": "xen"}"#, "backend"),
            (r#"{"consol_file": "/c"}"#, "consol_file"),
            (r#"{"console_max_bytes": 10}"#, "console_max_bytes"),
            (r#"{"tombstone": "yes"}"#, "tombstone"),
        ];
        for (text, field) in cases {
            let settings = Additions::parse(text.as_bytes()).and_then(|additions| additions.resolve(Path::new("/r")));
            let error = settings.unwrap_err().to_string();
            assert!(error.contains(field), "{text}: {error}");
        }
        let long = PathBuf::from(format!("/{}", "x".repeat(107)));
        let error = Additions::default().resolve(&long).unwrap_err().to_string();
        assert!(error.contains("control_socket"), "{error}");
    }
}
