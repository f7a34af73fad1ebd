//! What an attempt is to run, checked: the wire's `AgentSpec` becomes [`Spec`] here or names the field at fault.
//!
//! Invariant: no secret is written outside memory. Values that came from a Secret sit in `Option`s that
//! [`Spec::without_secrets`] empties, and only its result can be serialised.

mod network;

use crate::names::AttemptKey;
use far_proto::node as wire;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeSet, fmt};

/// Args and env together, bytes: what the guest's kernel takes in one execve(2) with room to spare (control.proto).
const MAX_ARGS_AND_ENV: usize = 512 << 10;
/// All files of one agent together, bytes (control.proto).
const MAX_FILES_BYTES: usize = 8 << 20;
/// With the longest paths the file list still fits into one frame beside args and env.
const MAX_FILES: usize = 1000;
/// All file paths together, bytes: same reason.
const MAX_PATH_BYTES: usize = 256 << 10;
/// Most empty folders (control.proto).
const MAX_FOLDERS: usize = 16;
/// Longest path, bytes: PATH_MAX less its NUL.
const MAX_PATH: usize = 4095;
/// Longest grace period and such, seconds: one day.
const MAX_GRACE_S: u32 = 86_400;

/// What to run in one attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spec {
    /// Image reference as the user wrote it.
    pub image: String,
    /// Thousandths of a core, 1 to 64000.
    pub cpu_millis: u32,
    /// MiB, 64 to 1048576.
    pub memory_mib: u32,
    /// Absolute path inside the image; `None`: the image's own.
    pub entrypoint: Option<String>,
    /// Arguments after the program's name.
    pub args: Vec<String>,
    /// Environment on top of the image's own.
    pub env: Vec<Env>,
    /// Files to place before the start.
    pub files: Vec<FileSpec>,
    /// Seconds between TERM and KILL.
    pub grace_s: u32,
    /// Seconds from the boot on; 0: none.
    pub deadline_s: u32,
    /// Absolute path; `None`: the image's own, else "/".
    pub working_dir: Option<String>,
    /// Boot, then wait until another attempt claims the VM.
    pub start_on_claim: bool,
    /// What it may reach.
    pub network: far_net::Policy,
    /// Size limit of the writable layer, MiB; 0: half of the guest's memory.
    pub scratch_mib: u32,
    /// Empty folders of their own.
    pub folders: Vec<Folder>,
}

/// An empty folder in the guest's memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Folder {
    /// Absolute and normalised.
    pub path: String,
    /// MiB; 0: half of the guest's memory.
    pub size_mib: u32,
}

/// One environment variable.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Env {
    /// No `=`, no NUL, 1 to 255 bytes.
    pub name: String,
    /// The value came from a Secret.
    pub secret: bool,
    /// `None`: a secret that this process was not told (yet).
    pub value: Option<String>,
}

/// One file.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileSpec {
    /// Absolute and normalised.
    pub path: String,
    /// At most 0777.
    pub mode: u32,
    /// The content came from a Secret.
    pub secret: bool,
    /// `None`: a secret that this process was not told (yet).
    #[serde(with = "base64_bytes")]
    pub data: Option<Vec<u8>>,
}

impl fmt::Debug for Env {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = if self.secret {
            Some("(secret)")
        } else {
            self.value.as_deref()
        };
        f.debug_struct("Env")
            .field("name", &self.name)
            .field("value", &value)
            .finish()
    }
}

impl fmt::Debug for FileSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileSpec")
            .field("path", &self.path)
            .field("mode", &format_args!("{:04o}", self.mode))
            .field("secret", &self.secret)
            .field("bytes", &self.data.as_ref().map(Vec::len))
            .finish()
    }
}

/// A spec whose secrets were taken out: the only form that is written to disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpecWithoutSecrets {
    image: String,
    cpu_millis: u32,
    memory_mib: u32,
    entrypoint: Option<String>,
    args: Vec<String>,
    env: Vec<Env>,
    files: Vec<FileSpec>,
    grace_s: u32,
    deadline_s: u32,
    working_dir: Option<String>,
    #[serde(default)]
    start_on_claim: bool,
    /// Absent in a ledger of a far-node that knew none: nothing.
    #[serde(default)]
    network: far_net::Policy,
    #[serde(default)]
    scratch_mib: u32,
    #[serde(default)]
    folders: Vec<Folder>,
}

impl Spec {
    /// The part that may be written down.
    #[must_use]
    pub fn without_secrets(&self) -> SpecWithoutSecrets {
        let mut spec = self.clone();
        spec.env
            .iter_mut()
            .filter(|env| env.secret)
            .for_each(|env| env.value = None);
        spec.files
            .iter_mut()
            .filter(|file| file.secret)
            .for_each(|file| file.data = None);
        SpecWithoutSecrets {
            image: spec.image,
            cpu_millis: spec.cpu_millis,
            memory_mib: spec.memory_mib,
            entrypoint: spec.entrypoint,
            args: spec.args,
            env: spec.env,
            files: spec.files,
            grace_s: spec.grace_s,
            deadline_s: spec.deadline_s,
            working_dir: spec.working_dir,
            start_on_claim: spec.start_on_claim,
            network: spec.network,
            scratch_mib: spec.scratch_mib,
            folders: spec.folders,
        }
    }

    /// Whether a VM that was booted for `warm` is what this spec asks for: everything that the boot settled is the same.
    ///
    /// # Errors
    /// The first field that differs.
    pub fn check_fit(&self, warm: &Self) -> Result<(), InvalidField> {
        // Each field is named here, so that a new one has to say which of the two it is.
        let Self {
            image,
            cpu_millis,
            memory_mib,
            start_on_claim,
            network,
            // These reach the guest at the claim.
            entrypoint: _,
            args: _,
            env: _,
            files: _,
            grace_s: _,
            deadline_s: _,
            working_dir: _,
            scratch_mib: _,
            folders: _,
        } = self;
        let differs = |field: &str| invalid(field, "differs from that of the warm agent");
        if *start_on_claim {
            return invalid("spec.startPolicy", "an agent that waits itself cannot claim another");
        }
        if *image != warm.image {
            return differs("spec.image");
        }
        if *cpu_millis != warm.cpu_millis {
            return differs("spec.cpu");
        }
        if *memory_mib != warm.memory_mib {
            return differs("spec.memory");
        }
        if *network != warm.network {
            return differs("spec.network");
        }
        Ok(())
    }

    /// True where every value is known, so that the guest can be given its config.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.env.iter().all(|env| env.value.is_some()) && self.files.iter().all(|file| file.data.is_some())
    }

    /// Number of vCPUs: whole cores that hold the CPU limit.
    #[must_use]
    pub fn vcpus(&self) -> u32 {
        self.cpu_millis.div_ceil(1000)
    }
}

impl From<SpecWithoutSecrets> for Spec {
    fn from(spec: SpecWithoutSecrets) -> Self {
        Self {
            image: spec.image,
            cpu_millis: spec.cpu_millis,
            memory_mib: spec.memory_mib,
            entrypoint: spec.entrypoint,
            args: spec.args,
            env: spec.env,
            files: spec.files,
            grace_s: spec.grace_s,
            deadline_s: spec.deadline_s,
            working_dir: spec.working_dir,
            start_on_claim: spec.start_on_claim,
            network: spec.network,
            scratch_mib: spec.scratch_mib,
            folders: spec.folders,
        }
    }
}

/// Who an attempt belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The identity of the boot.
    pub key: AttemptKey,
    /// For people and look-ups only.
    pub namespace: String,
    /// For people and look-ups only.
    pub name: String,
}

/// A field of a request has a value that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct InvalidField {
    /// Path of the field as the FarAgent's author knows it where there is one, for example `spec.env[2].name`.
    pub field: String,
    /// What is wrong, and what would be right.
    pub problem: String,
}

fn invalid<T>(field: impl Into<String>, problem: impl Into<String>) -> Result<T, InvalidField> {
    Err(InvalidField {
        field: field.into(),
        problem: problem.into(),
    })
}

/// Checks an identity of the wire.
///
/// # Errors
/// The field at fault.
pub fn check_identity(identity: Option<wire::Identity>) -> Result<Identity, InvalidField> {
    let Some(identity) = identity else {
        return invalid("identity", "is missing");
    };
    let is_uid = (1..=64).contains(&identity.uid.len())
        && identity
            .uid
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    if !is_uid {
        return invalid("identity.uid", "must be 1 to 64 bytes of [A-Za-z0-9-]");
    }
    if identity.attempt == 0 {
        return invalid("identity.attempt", "must be 1 or more");
    }
    for (field, text) in [
        ("identity.namespace", &identity.namespace),
        ("identity.name", &identity.name),
    ] {
        let is_name = text.len() <= 253
            && text
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.');
        if !is_name {
            return invalid(field, "must be at most 253 bytes of [a-z0-9.-]");
        }
    }
    Ok(Identity {
        key: AttemptKey {
            uid: identity.uid,
            attempt: identity.attempt,
        },
        namespace: identity.namespace,
        name: identity.name,
    })
}

/// Checks a spec of the wire.
///
/// # Errors
/// The first field at fault.
pub fn check_spec(spec: Option<wire::AgentSpec>) -> Result<Spec, InvalidField> {
    let Some(spec) = spec else {
        return invalid("spec", "is missing");
    };
    check_image(&spec.image)?;
    if !(1..=64_000).contains(&spec.cpu_millis) {
        return invalid(
            "spec.cpu",
            format!("{} thousandths of a core are outside 1 to 64000", spec.cpu_millis),
        );
    }
    if !(64..=1_048_576).contains(&spec.memory_mib) {
        return invalid(
            "spec.memory",
            format!("{} MiB are outside 64 to 1048576", spec.memory_mib),
        );
    }
    if let Some(entrypoint) = &spec.entrypoint {
        check_path("spec.entrypoint", entrypoint)?;
    }
    if let Some(working_dir) = &spec.working_dir
        && (!working_dir.starts_with('/') || working_dir.len() > MAX_PATH || working_dir.contains('\0'))
    {
        return invalid(
            "spec.workingDir",
            "must be an absolute path of at most 4095 bytes without NUL",
        );
    }
    if spec.termination_grace_s > MAX_GRACE_S {
        return invalid(
            "spec.terminationGracePeriodSeconds",
            format!("must be at most {MAX_GRACE_S}"),
        );
    }
    check_args_and_env(&spec)?;
    check_files(&spec.files)?;
    check_folders(&spec)?;
    let network = network::check(spec.network)?;
    Ok(Spec {
        image: spec.image,
        cpu_millis: spec.cpu_millis,
        memory_mib: spec.memory_mib,
        entrypoint: spec.entrypoint,
        args: spec.args,
        env: spec
            .env
            .into_iter()
            .map(|env| Env {
                name: env.name,
                secret: env.secret,
                value: Some(env.value),
            })
            .collect(),
        files: spec
            .files
            .into_iter()
            .map(|file| FileSpec {
                path: file.path,
                mode: file.mode,
                secret: file.secret,
                data: Some(file.data),
            })
            .collect(),
        grace_s: spec.termination_grace_s,
        deadline_s: spec.active_deadline_s,
        working_dir: spec.working_dir,
        start_on_claim: spec.start_on_claim,
        network,
        scratch_mib: spec.scratch_mib,
        folders: spec
            .folders
            .into_iter()
            .map(|folder| Folder {
                path: folder.path,
                size_mib: folder.size_mib,
            })
            .collect(),
    })
}

/// A limit above the guest's memory would be none.
fn check_folders(spec: &wire::AgentSpec) -> Result<(), InvalidField> {
    let sizes = std::iter::once(("spec.scratch.sizeLimit".to_owned(), spec.scratch_mib)).chain(
        (0..)
            .zip(&spec.folders)
            .map(|(n, folder)| (format!("spec.volumes[{n}].emptyDir.sizeLimit"), folder.size_mib)),
    );
    for (field, mib) in sizes {
        if mib > spec.memory_mib {
            return invalid(
                field,
                format!("{mib} MiB are more than spec.memory, {} MiB", spec.memory_mib),
            );
        }
    }
    if spec.folders.len() > MAX_FOLDERS {
        return invalid("spec.volumes", format!("{}, at most {MAX_FOLDERS}", spec.folders.len()));
    }
    let mut seen = BTreeSet::new();
    for (n, folder) in spec.folders.iter().enumerate() {
        let field = format!("spec.volumes[{n}].mountPath");
        check_path(&field, &folder.path)?;
        if folder.path[1..].split('/').any(|part| matches!(part, "" | "." | "..")) {
            return invalid(field, "must be normalised: no empty, '.' or '..' parts");
        }
        if ["proc", "sys", "dev"].contains(&folder.path[1..].split('/').next().unwrap_or("")) {
            return invalid(field, "must not lie in /proc, /sys or /dev");
        }
        if !seen.insert(folder.path.as_str()) {
            return invalid(field, "is in the list twice");
        }
    }
    Ok(())
}

fn check_image(image: &str) -> Result<(), InvalidField> {
    if !(1..=512).contains(&image.len()) || image.bytes().any(|byte| !byte.is_ascii_graphic()) {
        return invalid("spec.image", "must be a reference of 1 to 512 bytes of visible ASCII");
    }
    Ok(())
}

fn check_args_and_env(spec: &wire::AgentSpec) -> Result<(), InvalidField> {
    for (n, arg) in spec.args.iter().enumerate() {
        if arg.contains('\0') {
            return invalid(format!("spec.args[{n}]"), "must not contain NUL");
        }
    }
    for (n, env) in spec.env.iter().enumerate() {
        if !(1..=255).contains(&env.name.len()) || env.name.contains(['=', '\0']) {
            return invalid(
                format!("spec.env[{n}].name"),
                "must be 1 to 255 bytes without '=' and NUL",
            );
        }
        if env.value.contains('\0') {
            return invalid(format!("spec.env[{n}].value"), "must not contain NUL");
        }
    }
    // Each string costs a pointer in the guest's execve(2) as well.
    let total = spec.args.iter().map(|arg| arg.len() + 9).sum::<usize>()
        + spec
            .env
            .iter()
            .map(|env| env.name.len() + env.value.len() + 10)
            .sum::<usize>();
    if total > MAX_ARGS_AND_ENV {
        return invalid(
            "spec.args",
            format!("args and env together take {total} bytes, at most {MAX_ARGS_AND_ENV} fit"),
        );
    }
    Ok(())
}

fn check_path(field: &str, path: &str) -> Result<(), InvalidField> {
    if !(2..=MAX_PATH).contains(&path.len()) || !path.starts_with('/') || path.contains('\0') {
        return invalid(field, "must be an absolute path of 2 to 4095 bytes without NUL");
    }
    Ok(())
}

fn check_files(files: &[wire::File]) -> Result<(), InvalidField> {
    if files.len() > MAX_FILES {
        return invalid("spec.files", format!("{} files, at most {MAX_FILES}", files.len()));
    }
    let mut seen = BTreeSet::new();
    for (n, file) in files.iter().enumerate() {
        let field = format!("spec.files[{n}].path");
        check_path(&field, &file.path)?;
        if file.path[1..].split('/').any(|part| matches!(part, "" | "." | "..")) {
            return invalid(field, "must be normalised: no empty, '.' or '..' parts");
        }
        if !seen.insert(file.path.as_str()) {
            return invalid(field, "is in the list twice");
        }
        if file.mode > 0o777 {
            return invalid(format!("spec.files[{n}].mode"), "must be at most 0777");
        }
    }
    if let Some(path) = seen
        .iter()
        .find(|path| path.rmatch_indices('/').any(|(at, _)| seen.contains(&path[..at])))
    {
        return invalid("spec.files", format!("{path} lies below another file of the list"));
    }
    let bytes: usize = files.iter().map(|file| file.data.len()).sum();
    if bytes > MAX_FILES_BYTES {
        return invalid(
            "spec.files",
            format!("{bytes} bytes together, at most {MAX_FILES_BYTES}"),
        );
    }
    if files.iter().map(|file| file.path.len()).sum::<usize>() > MAX_PATH_BYTES {
        return invalid(
            "spec.files",
            format!("the paths together take more than {MAX_PATH_BYTES} bytes"),
        );
    }
    Ok(())
}

mod base64_bytes {
    use base64::{Engine, engine::general_purpose::STANDARD};
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    // serde's `with` hands the field by reference.
    #[allow(clippy::ref_option)]
    pub(super) fn serialize<S: Serializer>(bytes: &Option<Vec<u8>>, serializer: S) -> Result<S::Ok, S::Error> {
        match bytes {
            Some(bytes) => serializer.serialize_some(&STANDARD.encode(bytes)),
            None => serializer.serialize_none(),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<u8>>, D::Error> {
        let text = Option::<String>::deserialize(deserializer)?;
        text.map(|text| STANDARD.decode(text).map_err(D::Error::custom))
            .transpose()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn wire_identity(uid: &str, attempt: u32) -> wire::Identity {
        wire::Identity {
            uid: uid.into(),
            attempt,
            namespace: "default".into(),
            name: "a".into(),
        }
    }

    pub(crate) fn wire_spec() -> wire::AgentSpec {
        wire::AgentSpec {
            image: "example.test/tiffany:v1".into(),
            cpu_millis: 1000,
            memory_mib: 256,
            entrypoint: Some("/usr/local/bin/tiffany".into()),
            args: vec!["--task".into(), "embedder".into()],
            env: vec![
                wire::EnvVar {
                    name: "PLAIN".into(),
                    value: "visible".into(),
                    secret: false,
                },
                wire::EnvVar {
                    name: "TOKEN".into(),
                    value: "s3cret-env".into(),
                    secret: true,
                },
            ],
            files: vec![
                wire::File {
                    path: "/task/a.md".into(),
                    mode: 0o444,
                    data: b"# a".to_vec(),
                    secret: false,
                },
                wire::File {
                    path: "/task/key".into(),
                    mode: 0o400,
                    data: b"s3cret-file".to_vec(),
                    secret: true,
                },
            ],
            termination_grace_s: 5,
            active_deadline_s: 0,
            working_dir: None,
            ..wire::AgentSpec::default()
        }
    }

    #[test]
    fn bad_values_name_their_field() {
        type Edit = fn(&mut wire::AgentSpec);
        let cases: &[(&str, Edit)] = &[
            ("spec.image", |s| s.image = String::new()),
            ("spec.image", |s| s.image = "a b".into()),
            ("spec.cpu", |s| s.cpu_millis = 0),
            ("spec.cpu", |s| s.cpu_millis = 64_001),
            ("spec.memory", |s| s.memory_mib = 63),
            ("spec.memory", |s| s.memory_mib = 1_048_577),
            ("spec.entrypoint", |s| s.entrypoint = Some("tiffany".into())),
            ("spec.entrypoint", |s| s.entrypoint = Some(String::new())),
            ("spec.workingDir", |s| s.working_dir = Some("tmp".into())),
            ("spec.terminationGracePeriodSeconds", |s| s.termination_grace_s = 86_401),
            ("spec.args[0]", |s| s.args[0] = "a\0b".into()),
            ("spec.args", |s| s.args[0] = "x".repeat(600_000)),
            ("spec.env[1].name", |s| s.env[1].name = "A=B".into()),
            ("spec.env[0].name", |s| s.env[0].name = String::new()),
            ("spec.env[0].value", |s| s.env[0].value = "\0".into()),
            ("spec.files[0].path", |s| s.files[0].path = "/task/../etc/shadow".into()),
            ("spec.files[0].path", |s| s.files[0].path = "/task/./a".into()),
            ("spec.files[0].path", |s| s.files[0].path = "/task//a".into()),
            ("spec.files[0].path", |s| s.files[0].path = "/task/a/".into()),
            ("spec.files[0].path", |s| s.files[0].path = "task".into()),
            ("spec.files[1].path", |s| s.files[1].path = "/task/a.md".into()),
            ("spec.files", |s| s.files[1].path = "/task/a.md/b".into()),
            ("spec.files[1].mode", |s| s.files[1].mode = 0o4777),
            ("spec.files", |s| s.files[1].data = vec![0; (8 << 20) + 1]),
        ];
        for (field, edit) in cases {
            let mut spec = wire_spec();
            edit(&mut spec);
            assert_eq!(check_spec(Some(spec)).unwrap_err().field, *field);
        }
        assert!(check_spec(Some(wire_spec())).is_ok());
        assert_eq!(check_spec(None).unwrap_err().field, "spec");
    }

    #[test]
    fn a_claim_must_agree_in_what_the_boot_settled() {
        let warm = Spec {
            start_on_claim: true,
            ..check_spec(Some(wire_spec())).unwrap()
        };
        type Edit = fn(&mut wire::AgentSpec);
        let cases: [(&str, Edit, Option<&str>); 7] = [
            ("the same", |_| {}, None),
            (
                "what comes at the claim",
                |s| (s.args, s.env, s.files) = Default::default(),
                None,
            ),
            ("image", |s| s.image = "other:1".into(), Some("spec.image")),
            ("cpu", |s| s.cpu_millis += 1, Some("spec.cpu")),
            ("memory", |s| s.memory_mib += 1, Some("spec.memory")),
            (
                "network",
                |s| {
                    s.network = Some(wire::NetworkSpec {
                        mode: wire::NetworkMode::None.into(),
                        egress: vec![],
                    });
                },
                Some("spec.network"),
            ),
            ("waits itself", |s| s.start_on_claim = true, Some("spec.startPolicy")),
        ];
        for (why, edit, field) in cases {
            let mut spec = wire_spec();
            edit(&mut spec);
            let fit = check_spec(Some(spec)).unwrap().check_fit(&warm);
            assert_eq!(fit.err().map(|error| error.field).as_deref(), field, "{why}");
        }
    }

    #[test]
    fn bad_identities_name_their_field() {
        let cases = [
            ("identity.uid", wire_identity("", 1)),
            ("identity.uid", wire_identity("../x", 1)),
            ("identity.uid", wire_identity(&"a".repeat(65), 1)),
            ("identity.attempt", wire_identity("u", 0)),
            (
                "identity.name",
                wire::Identity {
                    name: "a\nb".into(),
                    ..wire_identity("u", 1)
                },
            ),
            (
                "identity.namespace",
                wire::Identity {
                    namespace: "a/b".into(),
                    ..wire_identity("u", 1)
                },
            ),
        ];
        for (field, identity) in cases {
            assert_eq!(check_identity(Some(identity)).unwrap_err().field, field);
        }
        assert!(check_identity(Some(wire_identity("3f1c-Ab", 1))).is_ok());
    }

    #[test]
    fn secrets_show_neither_in_debug_nor_in_what_is_written() {
        let spec = check_spec(Some(wire_spec())).unwrap();
        let written = serde_json::to_string(&spec.without_secrets()).unwrap();
        let shown = format!("{spec:?}");
        for text in [&written, &shown] {
            assert!(!text.contains("s3cret"), "{text}");
        }
        assert!(written.contains("visible"));
        let read: Spec = serde_json::from_str::<SpecWithoutSecrets>(&written).unwrap().into();
        assert!(spec.is_complete() && !read.is_complete());
        assert_eq!(read.files[0].data.as_deref(), Some(&b"# a"[..]));
    }
}
