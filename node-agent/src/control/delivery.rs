//! What a guest is given to run: the image's own settings under the spec's, and the messages that carry them.

use crate::{host::ImageSettings, names::to_dns_label, nics::Nic, record::UnixMs, spec::Spec};
use far_proto::{
    frame::MAX_BODY,
    guest::{self, Config, FileChunk, FileEntry, HostMessage, Start, host_message::Kind},
};
use prost::Message;
use rand::RngCore;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::HashMap;

/// Longest piece of a file, bytes (control.proto).
const MAX_CHUNK: usize = 512 << 10;
/// All strings of an image's config, bytes: with the bounds of args, env and file paths a Config always fits into one
/// frame.
const MAX_IMAGE_SETTINGS: usize = 128 << 10;
/// Folders of the image's PATH that are looked through for a program without one.
const MAX_PATH_FOLDERS: usize = 1024;
/// Longest path that exec takes, bytes.
const MAX_PROGRAM: usize = 4095;
/// What one string takes in a message besides its own bytes, at most.
const PER_STRING: usize = 10;
/// Bytes for the guest's random pool (control.proto: 32 to 512).
const ENTROPY: usize = 64;

/// Program and surroundings after image and spec were put together; no secrets, so that the ledger can keep it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Launch {
    /// Absolute path.
    pub program: String,
    /// Arguments after the program's name.
    pub args: Vec<String>,
    /// `NAME=value` of the image.
    pub image_env: Vec<String>,
    /// Absolute.
    pub working_dir: String,
    /// As in an OCI config; empty: root.
    pub user: String,
    /// The guest's NIC; absent: none.
    pub nic: Option<Nic>,
}

impl Launch {
    /// Of a guest that is to start nothing before it is claimed: only its NIC is settled.
    pub(crate) fn idle(image: &ImageSettings) -> Self {
        Self {
            program: String::new(),
            args: Vec::new(),
            image_env: Vec::new(),
            working_dir: String::new(),
            user: image.user.clone(),
            nic: None,
        }
    }
}

/// Why image and spec together do not name a program.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum LaunchError {
    #[error("spec.entrypoint: not given, and image {image} has no entrypoint of its own")]
    NoProgram { image: String },
    #[error("spec.entrypoint: {path} does not exist in image {image}")]
    Missing { path: String, image: String },
    #[error(
        "spec.image: the config of image {image} (entrypoint, cmd, env, working directory, user) takes {bytes} bytes, at most {MAX_IMAGE_SETTINGS} fit"
    )]
    Settings { image: String, bytes: usize },
}

/// Puts image and spec together, with Kubernetes' rules for command and args; `has_files` looks into the image, once
/// (`None`: not known before the boot).
pub(crate) fn launch(
    spec: &Spec,
    image: &ImageSettings,
    has_files: impl FnOnce(&[String]) -> Option<Vec<bool>>,
) -> Result<Launch, LaunchError> {
    let lists = [&image.entrypoint, &image.cmd, &image.env];
    let strings = lists.into_iter().flatten().chain([&image.working_dir, &image.user]);
    let bytes = strings.map(|text| text.len() + PER_STRING).sum();
    if bytes > MAX_IMAGE_SETTINGS {
        return Err(LaunchError::Settings {
            image: spec.image.clone(),
            bytes,
        });
    }
    let mut command = match &spec.entrypoint {
        Some(entrypoint) => vec![entrypoint.clone()],
        None => image.entrypoint.clone(),
    };
    if spec.entrypoint.is_some() || !spec.args.is_empty() {
        command.extend(spec.args.iter().cloned());
    } else {
        command.extend(image.cmd.iter().cloned());
    }
    let mut command = command.into_iter();
    let Some(name) = command.next().filter(|name| !name.is_empty()) else {
        return Err(LaunchError::NoProgram {
            image: spec.image.clone(),
        });
    };
    let missing = || LaunchError::Missing {
        path: name.clone(),
        image: spec.image.clone(),
    };
    let program = if name.starts_with('/') {
        if has_files(std::slice::from_ref(&name)).is_some_and(|there| !there.contains(&true)) {
            return Err(missing());
        }
        name.clone()
    } else {
        let path = image.env.iter().find_map(|env| env.strip_prefix("PATH="));
        // PATH is the image's, so it may be anything.
        let paths: Vec<String> = path
            .unwrap_or("/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            .split(':')
            .take(MAX_PATH_FOLDERS)
            .filter(|folder| folder.starts_with('/') && folder.len() + name.len() < MAX_PROGRAM)
            .map(|folder| format!("{folder}/{name}"))
            .collect();
        let there = has_files(&paths).unwrap_or_default();
        let found = paths.into_iter().zip(there).find(|(_, is_there)| *is_there);
        found.map(|(path, _)| path).ok_or_else(missing)?
    };
    let working_dir = spec.working_dir.clone().unwrap_or_else(|| image.working_dir.clone());
    Ok(Launch {
        program,
        args: command.collect(),
        image_env: image.env.clone(),
        working_dir: if working_dir.is_empty() {
            "/".to_owned()
        } else {
            working_dir
        },
        user: image.user.clone(),
        nic: None,
    })
}

/// Config, FileChunk* and Start for a guest that waits for them. `None` while a secret is not known.
pub(crate) fn messages(launch: &Launch, spec: &Spec, name: &str, now: UnixMs) -> Option<Vec<HostMessage>> {
    let env = environment(launch, spec)?;
    let (mut files, mut chunks) = (Vec::new(), Vec::new());
    for (index, file) in (0_u32..).zip(&spec.files) {
        let data = file.data.as_ref()?;
        files.push(FileEntry {
            path: file.path.clone(),
            mode: file.mode,
            size: data.len() as u64,
            sha256: Sha256::digest(data).to_vec(),
            ..FileEntry::default()
        });
        for (n, part) in (0_u64..).zip(data.chunks(MAX_CHUNK)) {
            let chunk = FileChunk {
                file: index,
                offset: n * MAX_CHUNK as u64,
                data: part.to_vec(),
            };
            chunks.push(HostMessage {
                kind: Some(Kind::FileChunk(chunk)),
            });
        }
    }
    let mut entropy = vec![0; ENTROPY];
    rand::rng().fill_bytes(&mut entropy);
    let config = Config {
        entrypoint: launch.program.clone(),
        args: launch.args.clone(),
        env,
        working_dir: launch.working_dir.clone(),
        user: launch.user.clone(),
        files,
        hostname: to_dns_label(name, "far"),
        wall_time_unix_ns: now.saturating_mul(1_000_000),
        entropy,
        termination_grace_s: spec.grace_s,
        scratch_mib: spec.scratch_mib,
        folders: spec
            .folders
            .iter()
            .map(|folder| guest::EmptyFolder {
                path: folder.path.clone(),
                size_mib: folder.size_mib,
            })
            .collect(),
        nic: launch.nic.as_ref().map(|nic| guest::Nic {
            mac: nic.mac.to_vec(),
            addresses: nic.addresses.clone(),
            gateways: nic.gateways.clone(),
            name_servers: nic.name_servers.clone(),
            mtu: nic.mtu,
        }),
        ..Config::default()
    };
    let mut messages = vec![HostMessage {
        kind: Some(Kind::Config(config)),
    }];
    debug_assert!(
        messages[0].encoded_len() <= MAX_BODY,
        "the bounds of spec and image keep a Config in one frame"
    );
    messages.extend(chunks);
    messages.push(HostMessage {
        kind: Some(Kind::Start(Start {})),
    });
    Some(messages)
}

/// The image's variables, then the spec's; of a name the last one counts. There may be tens of thousands.
fn environment(launch: &Launch, spec: &Spec) -> Option<Vec<guest::EnvVar>> {
    let of_image = launch
        .image_env
        .iter()
        .filter_map(|entry| entry.split_once('='))
        .filter(|(name, _)| !name.is_empty() && name.len() <= 255);
    let mut all: Vec<(&str, &str)> = of_image.collect();
    for own in &spec.env {
        all.push((&own.name, own.value.as_deref()?));
    }
    let last: HashMap<&str, usize> = all.iter().enumerate().map(|(at, (name, _))| (*name, at)).collect();
    let kept = all.iter().enumerate().filter(|(at, (name, _))| last[name] == *at);
    let owned = kept.map(|(_, (name, value))| guest::EnvVar {
        name: (*name).to_owned(),
        value: (*value).to_owned(),
    });
    Some(owned.collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{check_spec, tests::wire_spec};

    fn image() -> ImageSettings {
        ImageSettings {
            entrypoint: vec!["/entry".into(), "--first".into()],
            cmd: vec!["cmd".into()],
            env: vec!["PATH=/bin:/opt/bin".into(), "PLAIN=image".into()],
            working_dir: String::new(),
            user: "tiffany".into(),
        }
    }

    #[test]
    fn command_and_args_follow_kubernetes() {
        let spec = |entrypoint: Option<&str>, args: &[&str]| {
            let mut spec = check_spec(Some(wire_spec())).unwrap();
            spec.entrypoint = entrypoint.map(str::to_owned);
            spec.args = args.iter().map(|arg| (*arg).to_owned()).collect();
            spec
        };
        let cases = [
            ("both own", spec(None, &[]), "/entry --first cmd"),
            ("args replace cmd", spec(None, &["a"]), "/entry --first a"),
            ("entrypoint drops cmd", spec(Some("/x"), &[]), "/x"),
            ("entrypoint and args", spec(Some("/x"), &["a"]), "/x a"),
        ];
        for (why, spec, expected) in cases {
            let launch = launch(&spec, &image(), |paths| Some(vec![true; paths.len()])).unwrap();
            let told = std::iter::once(launch.program)
                .chain(launch.args)
                .collect::<Vec<_>>()
                .join(" ");
            assert_eq!(told, expected, "{why}");
            assert_eq!(launch.working_dir, "/");
        }
    }

    #[test]
    fn a_program_that_the_image_lacks_names_the_field() {
        let mut spec = check_spec(Some(wire_spec())).unwrap();
        let error = launch(&spec, &image(), |paths| Some(vec![false; paths.len()]))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("spec.entrypoint") && error.contains("/usr/local/bin/tiffany"),
            "{error}"
        );
        spec.entrypoint = None;
        spec.args.clear();
        let bare = ImageSettings {
            entrypoint: vec![],
            cmd: vec![],
            ..image()
        };
        assert!(matches!(
            launch(&spec, &bare, |_| None),
            Err(LaunchError::NoProgram { .. })
        ));
        let relative = ImageSettings {
            entrypoint: vec!["tool".into()],
            ..image()
        };
        let has_tool = |paths: &[String]| Some(paths.iter().map(|path| path == "/opt/bin/tool").collect());
        let found = launch(&spec, &relative, has_tool).unwrap();
        assert_eq!(found.program, "/opt/bin/tool");
    }

    #[test]
    fn a_path_of_very_many_folders_is_looked_through_once_and_in_part() {
        let mut spec = check_spec(Some(wire_spec())).unwrap();
        spec.entrypoint = None;
        let hostile = ImageSettings {
            entrypoint: vec!["tool".into()],
            env: vec![format!("PATH={}", "/:".repeat(50_000))],
            ..image()
        };
        let asked = std::cell::Cell::new(0);
        let error = launch(&spec, &hostile, |paths| {
            asked.set(paths.len());
            Some(vec![false; paths.len()])
        });
        assert!(matches!(error, Err(LaunchError::Missing { .. })));
        assert_eq!(asked.get(), MAX_PATH_FOLDERS);
        let long = ImageSettings {
            entrypoint: vec!["t".repeat(100_000)],
            ..image()
        };
        let error = launch(&spec, &long, |paths| {
            assert_eq!(paths, [""; 0]);
            None
        });
        assert!(matches!(error, Err(LaunchError::Missing { .. })));
    }

    #[test]
    fn a_config_of_an_image_that_fits_into_no_frame_is_refused() {
        let mut spec = check_spec(Some(wire_spec())).unwrap();
        spec.entrypoint = None;
        spec.args.clear();
        let long = || "/".repeat(MAX_IMAGE_SETTINGS);
        let hostile = [
            ImageSettings {
                entrypoint: vec![long()],
                ..image()
            },
            ImageSettings {
                cmd: vec![String::new(); 100_000],
                ..image()
            },
            ImageSettings {
                env: vec![long()],
                ..image()
            },
            ImageSettings {
                working_dir: long(),
                ..image()
            },
            ImageSettings {
                user: long(),
                ..image()
            },
        ];
        for image in hostile {
            let launched = launch(&spec, &image, |paths| Some(vec![true; paths.len()]));
            assert!(matches!(launched, Err(LaunchError::Settings { .. })));
        }
    }

    #[test]
    fn files_go_in_chunks_and_the_spec_overrides_the_image() {
        let mut wire = wire_spec();
        wire.files[0].data = vec![1; MAX_CHUNK + 1];
        let spec = check_spec(Some(wire)).unwrap();
        let launch = launch(&spec, &image(), |_| None).unwrap();
        let messages = messages(&launch, &spec, "Embedder_1", 5).unwrap();
        let Some(Kind::Config(config)) = &messages[0].kind else {
            panic!("{messages:?}")
        };
        let plain: Vec<_> = config.env.iter().filter(|env| env.name == "PLAIN").collect();
        assert_eq!((plain.len(), plain[0].value.as_str()), (1, "visible"));
        assert_eq!(config.hostname, "embedder-1");
        assert_eq!(messages.len(), 1 + 3 + 1);
        assert!(messages.iter().all(|message| message.encoded_len() <= MAX_BODY));
        assert!(super::messages(&launch, &spec.without_secrets().into(), "a", 5).is_none());
    }

    #[test]
    fn of_each_variable_the_last_one_counts_however_many_there_are() {
        let launch = Launch {
            image_env: ["A=image", "B=image", "A=again", "=x"].map(String::from).to_vec(),
            ..Launch::idle(&image())
        };
        let own = |name: String, value: &str| crate::spec::Env {
            name,
            secret: false,
            value: Some(value.into()),
        };
        let many = 40_000;
        let mut spec = check_spec(Some(wire_spec())).unwrap();
        spec.env = (0..many)
            .map(|n| own(format!("N{n}"), "first"))
            .chain([own("B".into(), "own"), own("N0".into(), "last")])
            .collect();
        let told: Vec<(String, String)> = environment(&launch, &spec)
            .unwrap()
            .into_iter()
            .map(|one| (one.name, one.value))
            .collect();
        assert_eq!(told.len(), many + 2);
        let at = |place: usize| (told[place].0.as_str(), told[place].1.as_str());
        assert_eq!([at(0), at(1)], [("A", "again"), ("N1", "first")]);
        assert_eq!([at(many), at(many + 1)], [("B", "own"), ("N0", "last")]);
        spec.env.push(crate::spec::Env {
            value: None,
            ..own("SECRET".into(), "")
        });
        assert_eq!(environment(&launch, &spec), None);
    }
}
