//! What to run: a `Config` from the blade, checked once, in this program's own types. Pure.
//!
//! Errors name the field of the FarAgent that the user wrote, because they end up in its status.

use crate::{
    files::{self, FileSpec},
    room::{Room, RoomError},
};
use far_proto::guest::{Config, EnvVar, HostAlias, Nic, Rlimit};
use nix::sys::resource::Resource;
use std::{ffi::CString, net::IpAddr};

/// Arguments and environment together, bytes.
const MAX_ARGS_AND_ENV: usize = 512 * 1024;
/// Longest path, bytes without the ending NUL (PATH_MAX of the kernel less one).
pub(crate) const MAX_PATH: usize = 4095;
/// Most addresses, gateways or name servers of the NIC.
const MAX_NIC_LIST: usize = 16;
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A checked configuration. No `Debug`: it holds secrets.
#[derive(PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) entrypoint: CString,
    /// Program name first.
    pub(crate) argv: Vec<CString>,
    env: Vec<(String, String)>,
    pub(crate) working_dir: CString,
    pub(crate) user: String,
    pub(crate) files: Vec<FileSpec>,
    pub(crate) hostname: String,
    /// 0: leave the clock.
    pub(crate) wall_time_unix_ns: u64,
    pub(crate) entropy: Vec<u8>,
    pub(crate) link: Option<Link>,
    pub(crate) limits: Vec<Limit>,
    pub(crate) allow_new_privileges: bool,
    /// Lines of /etc/hosts beside the usual ones, ready to be written.
    pub(crate) more_hosts: String,
    pub(crate) room: Room,
}

/// One resource limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limit {
    pub(crate) resource: Resource,
    pub(crate) soft: u64,
    pub(crate) hard: u64,
}

/// The kinds of limits by their names in the contract.
const LIMITS: [(&str, Resource); 11] = [
    ("core", Resource::RLIMIT_CORE),
    ("cpu", Resource::RLIMIT_CPU),
    ("data", Resource::RLIMIT_DATA),
    ("fsize", Resource::RLIMIT_FSIZE),
    ("memlock", Resource::RLIMIT_MEMLOCK),
    ("msgqueue", Resource::RLIMIT_MSGQUEUE),
    ("nofile", Resource::RLIMIT_NOFILE),
    ("nproc", Resource::RLIMIT_NPROC),
    ("sigpending", Resource::RLIMIT_SIGPENDING),
    ("stack", Resource::RLIMIT_STACK),
    ("as", Resource::RLIMIT_AS),
];
/// Most host aliases, most names of one, and the longest of them in bytes.
const MAX_ALIASES: (usize, usize, usize) = (64, 16, 253);

/// The guest's NIC.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) mac: [u8; 6],
    pub(crate) addresses: Vec<(IpAddr, u8)>,
    pub(crate) gateways: Vec<IpAddr>,
    pub(crate) name_servers: Vec<IpAddr>,
    /// 0: leave the link's own.
    pub(crate) mtu: u32,
}

/// What is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PlanError {
    #[error("{field}: must be an absolute path of 1 to {MAX_PATH} bytes without NUL")]
    Path { field: &'static str },
    #[error("{field}: contains a NUL byte")]
    Nul { field: String },
    #[error("spec.env[{index}].name: must be 1 to 255 bytes without \"=\" and NUL")]
    EnvName { index: usize },
    #[error("spec.args and spec.env: {bytes} bytes together, at most {MAX_ARGS_AND_ENV}")]
    TooLong { bytes: usize },
    #[error("host name: must be 1 to 64 bytes of a-z, 0-9 and \"-\"")]
    Hostname,
    #[error("entropy: {bytes} bytes, must be none or 32 to 512")]
    Entropy { bytes: usize },
    #[error("termination grace: {seconds} s, at most 86400")]
    Grace { seconds: u32 },
    #[error("limit {index}: unknown kind, listed twice, or soft above hard")]
    Limit { index: usize },
    #[error("host alias {index}: not an address with 1 to 16 names")]
    Alias { index: usize },
    #[error("NIC: {field} is not valid")]
    Nic { field: &'static str },
    #[error(transparent)]
    Files(#[from] files::FilesError),
    #[error(transparent)]
    Room(#[from] RoomError),
}

impl Plan {
    /// Checks every field against the limits of the control stream's contract.
    ///
    /// # Errors
    /// [`PlanError`] of the first field that is wrong.
    pub(crate) fn from_config(config: Config) -> Result<Self, PlanError> {
        let entrypoint = absolute("spec.entrypoint", config.entrypoint)?;
        let working_dir = match config.working_dir.as_str() {
            "" => c"/".to_owned(),
            _ => absolute("spec.workingDir", config.working_dir)?,
        };
        let bytes = config.args.iter().map(|arg| arg.len() + 1).sum::<usize>()
            + config
                .env
                .iter()
                .map(|var| var.name.len() + var.value.len() + 2)
                .sum::<usize>();
        if bytes > MAX_ARGS_AND_ENV {
            return Err(PlanError::TooLong { bytes });
        }
        let mut argv = vec![entrypoint.clone()];
        for (index, arg) in config.args.into_iter().enumerate() {
            argv.push(CString::new(arg).map_err(|_| PlanError::Nul {
                field: format!("spec.args[{index}]"),
            })?);
        }
        let hostname = if config.hostname.is_empty() {
            "far".to_owned()
        } else {
            config.hostname
        };
        if hostname.len() > 64
            || !hostname
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        {
            return Err(PlanError::Hostname);
        }
        if !matches!(config.entropy.len(), 0 | 32..=512) {
            return Err(PlanError::Entropy {
                bytes: config.entropy.len(),
            });
        }
        // Only checked: every Shutdown brings its own.
        if config.termination_grace_s > 86_400 {
            return Err(PlanError::Grace {
                seconds: config.termination_grace_s,
            });
        }
        Ok(Self {
            entrypoint,
            argv,
            env: environment(config.env)?,
            working_dir,
            user: config.user,
            files: files::check(config.files)?,
            hostname,
            wall_time_unix_ns: config.wall_time_unix_ns,
            entropy: config.entropy,
            link: config.nic.map(link).transpose()?,
            limits: limits(&config.rlimits)?,
            allow_new_privileges: config.allow_new_privileges,
            more_hosts: aliases(&config.host_aliases)?,
            room: Room::check(config.scratch_mib, config.folders)?,
        })
    }

    /// Names and values, with `PATH`, `HOME` and `HOSTNAME` where they were not given.
    pub(crate) fn env_pairs(&self, home: &str) -> Vec<(String, String)> {
        let home = if home.is_empty() { "/" } else { home };
        let missing = [
            ("PATH", DEFAULT_PATH),
            ("HOME", home),
            ("HOSTNAME", self.hostname.as_str()),
        ]
        .into_iter()
        .filter(|(name, _)| !self.env.iter().any(|(given, _)| given == name))
        .map(|(name, value)| (name.to_owned(), value.to_owned()));
        missing.chain(self.env.iter().cloned()).collect()
    }

    /// [`Self::env_pairs`] as `NAME=value` strings for exec.
    pub(crate) fn env(&self, home: &str) -> Vec<CString> {
        self.env_pairs(home)
            .into_iter()
            .filter_map(|(name, value)| CString::new(format!("{name}={value}")).ok())
            .collect()
    }
}

fn absolute(field: &'static str, path: String) -> Result<CString, PlanError> {
    if !path.starts_with('/') || path.len() > MAX_PATH {
        return Err(PlanError::Path { field });
    }
    CString::new(path).map_err(|_| PlanError::Path { field })
}

/// A name given twice has its last value, at the place of the first.
pub(crate) fn environment(vars: Vec<EnvVar>) -> Result<Vec<(String, String)>, PlanError> {
    let mut env: Vec<(String, String)> = Vec::new();
    let mut places = std::collections::BTreeMap::new();
    for (index, EnvVar { name, value }) in vars.into_iter().enumerate() {
        if name.is_empty() || name.len() > 255 || name.contains(['=', '\0']) {
            return Err(PlanError::EnvName { index });
        }
        if value.contains('\0') {
            return Err(PlanError::Nul {
                field: format!("spec.env[{index}].value"),
            });
        }
        match places.get(&name) {
            Some(&place) => {
                let (_, old): &mut (String, String) = &mut env[place];
                *old = value;
            }
            None => {
                places.insert(name.clone(), env.len());
                env.push((name, value));
            }
        }
    }
    Ok(env)
}

fn limits(wanted: &[Rlimit]) -> Result<Vec<Limit>, PlanError> {
    let mut limits: Vec<Limit> = Vec::new();
    for (index, limit) in wanted.iter().enumerate() {
        let resource = LIMITS
            .iter()
            .find(|(name, _)| *name == limit.kind)
            .map(|&(_, resource)| resource);
        let Some(resource) =
            resource.filter(|&r| limit.soft <= limit.hard && !limits.iter().any(|seen| seen.resource == r))
        else {
            return Err(PlanError::Limit { index });
        };
        limits.push(Limit {
            resource,
            soft: limit.soft,
            hard: limit.hard,
        });
    }
    Ok(limits)
}

fn aliases(wanted: &[HostAlias]) -> Result<String, PlanError> {
    let mut text = String::new();
    for (index, alias) in wanted.iter().enumerate() {
        let name_is_good = |name: &String| {
            (1..=MAX_ALIASES.2).contains(&name.len())
                && name
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
        };
        let is_good = index < MAX_ALIASES.0
            && alias.address.parse::<IpAddr>().is_ok()
            && (1..=MAX_ALIASES.1).contains(&alias.names.len())
            && alias.names.iter().all(name_is_good);
        if !is_good {
            return Err(PlanError::Alias { index });
        }
        for word in std::iter::once(&alias.address).chain(&alias.names) {
            text.push_str(word);
            text.push(' ');
        }
        text.push('\n');
    }
    Ok(text)
}

fn link(nic: Nic) -> Result<Link, PlanError> {
    let bad = |field| PlanError::Nic { field };
    if [&nic.addresses, &nic.gateways, &nic.name_servers]
        .iter()
        .any(|list| list.len() > MAX_NIC_LIST)
    {
        return Err(bad("number of addresses"));
    }
    let ips = |list: &[String], field| -> Result<Vec<IpAddr>, PlanError> {
        list.iter().map(|text| text.parse().map_err(|_| bad(field))).collect()
    };
    Ok(Link {
        mac: nic.mac.as_slice().try_into().map_err(|_| bad("mac"))?,
        addresses: nic
            .addresses
            .iter()
            .map(|text| cidr(text).ok_or(bad("addresses")))
            .collect::<Result<_, _>>()?,
        gateways: ips(&nic.gateways, "gateways")?,
        name_servers: ips(&nic.name_servers, "name_servers")?,
        mtu: if nic.mtu == 0 || (576..=9216).contains(&nic.mtu) {
            nic.mtu
        } else {
            return Err(bad("mtu"));
        },
    })
}

fn cidr(text: &str) -> Option<(IpAddr, u8)> {
    let (address, prefix) = text.split_once('/')?;
    let (address, prefix): (IpAddr, u8) = (address.parse().ok()?, prefix.parse().ok()?);
    (prefix <= if address.is_ipv4() { 32 } else { 128 }).then_some((address, prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        Config {
            entrypoint: "/bin/agent".into(),
            ..Config::default()
        }
    }

    fn var(name: &str, value: &str) -> EnvVar {
        EnvVar {
            name: name.into(),
            value: value.into(),
        }
    }

    fn strings(list: &[CString]) -> Vec<&str> {
        list.iter().map(|item| item.to_str().unwrap()).collect()
    }

    #[test]
    fn defaults_fill_what_was_not_given() {
        let Ok(plan) = Plan::from_config(Config {
            args: vec!["--task".into()],
            env: vec![var("A", "1"), var("HOME", "/h"), var("A", "2")],
            ..config()
        }) else {
            panic!("a good configuration")
        };
        assert_eq!(strings(&plan.argv), ["/bin/agent", "--task"]);
        assert_eq!(plan.working_dir.as_c_str(), c"/");
        assert_eq!(plan.hostname, "far");
        let env = plan.env("/root");
        assert_eq!(strings(&env)[1..], ["HOSTNAME=far", "A=2", "HOME=/h"]);
        assert!(strings(&env)[0].starts_with("PATH=/usr/local/sbin:"));
    }

    #[test]
    fn wrong_fields_are_named() {
        let cases: Vec<(&str, Config)> = vec![
            (
                "spec.entrypoint",
                Config {
                    entrypoint: "agent".into(),
                    ..config()
                },
            ),
            (
                "spec.entrypoint",
                Config {
                    entrypoint: String::new(),
                    ..config()
                },
            ),
            (
                "spec.entrypoint",
                Config {
                    entrypoint: "/a\0b".into(),
                    ..config()
                },
            ),
            (
                "spec.entrypoint",
                Config {
                    entrypoint: format!("/{}", "a".repeat(4095)),
                    ..config()
                },
            ),
            (
                "spec.workingDir",
                Config {
                    working_dir: "here".into(),
                    ..config()
                },
            ),
            (
                "spec.args[1]",
                Config {
                    args: vec!["a".into(), "b\0".into()],
                    ..config()
                },
            ),
            (
                "spec.env[0].name",
                Config {
                    env: vec![var("A=B", "")],
                    ..config()
                },
            ),
            (
                "spec.env[0].name",
                Config {
                    env: vec![var("", "")],
                    ..config()
                },
            ),
            (
                "spec.env[1].value",
                Config {
                    env: vec![var("A", ""), var("B", "\0")],
                    ..config()
                },
            ),
            (
                "spec.args and spec.env",
                Config {
                    args: vec!["x".repeat(600_000)],
                    ..config()
                },
            ),
            (
                "host name",
                Config {
                    hostname: "A b".into(),
                    ..config()
                },
            ),
            (
                "entropy",
                Config {
                    entropy: vec![0; 31],
                    ..config()
                },
            ),
            (
                "termination grace",
                Config {
                    termination_grace_s: 86_401,
                    ..config()
                },
            ),
            (
                "NIC",
                Config {
                    nic: Some(Nic {
                        mac: vec![1, 2],
                        ..Nic::default()
                    }),
                    ..config()
                },
            ),
        ];
        for (field, config) in cases {
            let Err(error) = Plan::from_config(config) else {
                panic!("{field} was accepted")
            };
            assert!(error.to_string().starts_with(field), "{error} should name {field}");
        }
    }

    #[test]
    fn a_nic_is_read() {
        let nic = Nic {
            mac: vec![6, 0, 0, 0, 0, 2],
            addresses: vec!["10.0.0.2/30".into(), "fd00::2/64".into()],
            gateways: vec!["10.0.0.1".into()],
            name_servers: vec![],
            mtu: 1500,
        };
        let link = link(nic.clone()).unwrap();
        assert_eq!(
            link.addresses,
            [("10.0.0.2".parse().unwrap(), 30), ("fd00::2".parse().unwrap(), 64)]
        );
        for bad in ["10.0.0.2", "10.0.0.2/33", "fd00::/129", "x/1"] {
            assert!(
                super::link(Nic {
                    addresses: vec![bad.into()],
                    ..nic.clone()
                })
                .is_err(),
                "{bad}"
            );
        }
        assert!(super::link(Nic { mtu: 100, ..nic }).is_err());
    }
}
