//! `FarAgent.spec` becomes the node API's `AgentSpec`, with Secrets and ConfigMaps resolved. What is missing is named by
//! field and object. Values of Secrets are marked; neither they nor the result is ever formatted.

mod network;

use std::collections::{BTreeMap, HashMap};

use far_api::{Env, EnvFrom, FarAgent, FileSource, KeyRef, Quantity, StartPolicy};
use far_core::{quantity, retry::Rules};
use far_proto::node as wire;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::{Api, Client};

use crate::convert;

/// All files of one agent together, bytes (node.proto and control.proto: 8 MiB).
const MAX_FILES_BYTES: usize = 8 * 1024 * 1024;
/// Their number, as far-node has it. A ConfigMap may have 65,000 keys.
const MAX_FILES: usize = 1000;
/// All arguments and variables together, bytes, each with what it costs in the guest's execve(2): as far-node has it.
const MAX_ARGS_AND_ENV: usize = 512 * 1024;
/// Variables of one agent; each takes more than 10 bytes of [`MAX_ARGS_AND_ENV`] at its end, and time on the way there.
const MAX_VARIABLES: usize = 4096;

/// Why a spec cannot be sent to a blade.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SpecError {
    /// May be there later.
    #[error("{field}: {what}")]
    Missing { field: String, what: String },
    /// Never will do.
    #[error("{0}")]
    Invalid(String),
    /// The API did not answer.
    #[error("{field}: reading {object}")]
    Read {
        field: String,
        object: String,
        source: Box<kube::Error>,
    },
}

/// Variables by name, in the order in which each was set last.
#[derive(Default)]
struct Variables {
    /// `None`: set again later.
    all: Vec<Option<wire::EnvVar>>,
    /// Name → place in `all`.
    places: HashMap<String, usize>,
    /// As in [`MAX_ARGS_AND_ENV`].
    bytes: usize,
}

impl Variables {
    /// One variable, one value: the last.
    fn set(&mut self, variable: wire::EnvVar) -> Result<(), SpecError> {
        let cost = |one: &wire::EnvVar| one.name.len() + one.value.len() + 10;
        self.bytes += cost(&variable);
        if let Some(before) = self.places.insert(variable.name.clone(), self.all.len()) {
            let before = self.all.get_mut(before).and_then(Option::take);
            self.bytes -= before.as_ref().map_or(0, cost);
        }
        self.all.push(Some(variable));
        if self.places.len() > MAX_VARIABLES || self.bytes > MAX_ARGS_AND_ENV {
            return Err(SpecError::Invalid(format!(
                "spec.env and spec.envFrom: more than {MAX_VARIABLES} variables, or with spec.args more than {MAX_ARGS_AND_ENV} bytes"
            )));
        }
        Ok(())
    }
}

/// The objects that were read for one spec, each once.
struct Sources<'a> {
    client: &'a Client,
    namespace: &'a str,
    config_maps: HashMap<String, Option<BTreeMap<String, Vec<u8>>>>,
    secrets: HashMap<String, Option<BTreeMap<String, Vec<u8>>>>,
}

/// Reads what the spec refers to and builds the request's spec.
pub(crate) async fn resolve(
    client: &Client,
    namespace: &str,
    agent: &FarAgent,
    rules: &Rules,
) -> Result<wire::AgentSpec, SpecError> {
    let spec = &agent.spec;
    let request = convert::request(agent).map_err(SpecError::Invalid)?;
    let small = |field: &str, amount: u64| {
        u32::try_from(amount).map_err(|_| SpecError::Invalid(format!("spec.{field}: more than any microVM can have")))
    };
    let mut sources = Sources {
        client,
        namespace,
        config_maps: HashMap::new(),
        secrets: HashMap::new(),
    };
    // What a warm agent runs comes with its claim: secrets that it would never use are not even read.
    let is_warm = spec.start_policy == StartPolicy::OnClaim;
    let args = spec.args.clone().unwrap_or_default();
    let mut env = Variables {
        bytes: args.iter().map(|arg| arg.len() + 9).sum(),
        ..Variables::default()
    };
    for (index, one) in spec.env_from.iter().flatten().filter(|_| !is_warm).enumerate() {
        sources.env_from(index, one, &mut env).await?;
    }
    for (index, one) in spec.env.iter().flatten().filter(|_| !is_warm).enumerate() {
        // env wins over envFrom.
        env.set(sources.env(index, one).await?)?;
    }
    let mut files = Vec::new();
    for (index, one) in spec.files.iter().flatten().filter(|_| !is_warm).enumerate() {
        sources.file(index, one, &mut files).await?;
        let bytes: usize = files.iter().map(|file| file.data.len()).sum();
        if bytes > MAX_FILES_BYTES || files.len() > MAX_FILES {
            return Err(SpecError::Invalid(format!(
                "spec.files: more than {MAX_FILES_BYTES} bytes, or more than {MAX_FILES} files"
            )));
        }
    }
    let mib = |field: String, limit: Option<&Quantity>| -> Result<u32, SpecError> {
        let Some(limit) = limit else { return Ok(0) };
        let mib = quantity::memory_mib(&limit.to_string())
            .map_err(|error| SpecError::Invalid(format!("spec.{field}: {error}")))?;
        small(&field, mib)
    };
    let scratch_mib = mib(
        "scratch.sizeLimit".into(),
        spec.scratch.as_ref().map(|scratch| &scratch.size_limit),
    )?;
    let mut folders = Vec::new();
    for (index, volume) in spec.volumes.iter().flatten().enumerate() {
        let field = format!("volumes[{index}].emptyDir.sizeLimit");
        folders.push(wire::EmptyFolder {
            path: volume.mount_path.clone(),
            size_mib: mib(field, volume.empty_dir.size_limit.as_ref())?,
        });
    }
    Ok(wire::AgentSpec {
        image: spec.image.clone(),
        cpu_millis: small("cpu", request.cpu_millis)?,
        memory_mib: small("memory", request.memory_mib)?,
        entrypoint: spec.entrypoint.clone(),
        args,
        env: env.all.into_iter().flatten().collect(),
        files,
        termination_grace_s: spec.termination_grace_period_seconds,
        active_deadline_s: deadline(agent, rules),
        working_dir: spec.working_dir.clone(),
        scratch_mib,
        folders,
        network: network::convert(spec.network.as_ref())?,
        start_on_claim: is_warm,
        ..Default::default()
    })
}

/// What is left of the deadline over all attempts; 0: there is none.
fn deadline(agent: &FarAgent, rules: &Rules) -> u32 {
    let since = convert::status_from_api(agent.status.as_ref()).active_since;
    let left = rules.deadline_left(since).map(|left| left.max(1));
    left.map_or(0, |left| u32::try_from(left).unwrap_or(u32::MAX))
}

impl Sources<'_> {
    /// Keys that are no names of variables are passed over, as for Pods.
    async fn env_from(&mut self, index: usize, from: &EnvFrom, env: &mut Variables) -> Result<(), SpecError> {
        let field = format!("spec.envFrom[{index}]");
        let prefix = from.prefix.clone().unwrap_or_default();
        let (data, secret) = match (&from.secret_ref, &from.config_map_ref) {
            (Some(whole), _) => (self.secret(&field, &whole.name).await?.clone(), true),
            (None, Some(whole)) => (self.config_map(&field, &whole.name).await?.clone(), false),
            (None, None) => return Err(SpecError::Invalid(format!("{field}: no source is named"))),
        };
        for (key, bytes) in data {
            let name = format!("{prefix}{key}");
            let is_name = !name.is_empty() && name.len() <= 255 && !name.contains(['=', '\0']);
            let Some(value) = String::from_utf8(bytes).ok().filter(|value| !value.contains('\0')) else {
                return Err(SpecError::Invalid(format!(
                    "{field}: the value of key {key:?} is not UTF-8 text without NUL"
                )));
            };
            if is_name {
                env.set(wire::EnvVar { name, value, secret })?;
            }
        }
        Ok(())
    }

    async fn env(&mut self, index: usize, env: &Env) -> Result<wire::EnvVar, SpecError> {
        let field = format!("spec.env[{index}] ({})", env.name);
        let (value, secret) = match &env.value_from {
            None => (env.value.clone().unwrap_or_default(), false),
            Some(from) => {
                let (bytes, secret) = match (&from.secret_key_ref, &from.config_map_key_ref) {
                    (Some(key), _) => (self.secret_key(&field, key).await?, true),
                    (None, Some(key)) => (self.config_map_key(&field, key).await?, false),
                    (None, None) => return Err(SpecError::Invalid(format!("{field}: valueFrom names no source"))),
                };
                let text = String::from_utf8(bytes)
                    .map_err(|_| SpecError::Invalid(format!("{field}: the value is not UTF-8 text")))?;
                (text, secret)
            }
        };
        if value.contains('\0') {
            return Err(SpecError::Invalid(format!("{field}: the value contains a NUL byte")));
        }
        Ok(wire::EnvVar {
            name: env.name.clone(),
            value,
            secret,
        })
    }

    async fn file(&mut self, index: usize, file: &FileSource, files: &mut Vec<wire::File>) -> Result<(), SpecError> {
        let field = format!("spec.files[{index}] ({})", file.path);
        let mut push = |path: String, data: Vec<u8>, secret: bool| {
            let mode = file.mode.unwrap_or(if secret { 0o400 } else { 0o444 });
            files.push(wire::File {
                path,
                mode,
                data,
                secret,
            });
        };
        if let Some(text) = &file.inline {
            push(file.path.clone(), text.clone().into_bytes(), false);
        } else if let Some(key) = &file.config_map_key_ref {
            push(file.path.clone(), self.config_map_key(&field, key).await?, false);
        } else if let Some(key) = &file.secret_key_ref {
            push(file.path.clone(), self.secret_key(&field, key).await?, true);
        } else if let Some(whole) = &file.config_map_ref {
            let data = self.config_map(&field, &whole.name).await?.clone();
            // Keys are [-._a-zA-Z0-9]+ and neither "." nor ".." by the API's own rule; checked, since they become paths.
            for (key, bytes) in data {
                if key == "." || key == ".." || key.contains('/') {
                    return Err(SpecError::Invalid(format!(
                        "{field}: key {key:?} of ConfigMap {:?} is no file name",
                        whole.name
                    )));
                }
                push(format!("{}/{key}", file.path), bytes, false);
            }
        } else {
            return Err(SpecError::Invalid(format!("{field}: no source is named")));
        }
        Ok(())
    }

    async fn secret_key(&mut self, field: &str, key: &KeyRef) -> Result<Vec<u8>, SpecError> {
        // The error of a missing object is the same as of a missing key.
        match self.secret(field, &key.name).await {
            Ok(_) | Err(SpecError::Missing { .. }) => pick(field, "Secret", key, self.secrets.get(&key.name)),
            Err(error) => Err(error),
        }
    }

    async fn secret(&mut self, field: &str, name: &str) -> Result<&BTreeMap<String, Vec<u8>>, SpecError> {
        if !self.secrets.contains_key(name) {
            let api: Api<Secret> = Api::namespaced(self.client.clone(), self.namespace);
            let found = api
                .get_opt(name)
                .await
                .map_err(|source| read(field, "Secret", name, source))?;
            let data = found.map(|secret| {
                let data = secret.data.unwrap_or_default().into_iter();
                data.map(|(key, bytes)| (key, bytes.0)).collect()
            });
            self.secrets.insert(name.to_owned(), data);
        }
        self.secrets
            .get(name)
            .and_then(Option::as_ref)
            .ok_or_else(|| missing(field, "Secret", name))
    }

    async fn config_map_key(&mut self, field: &str, key: &KeyRef) -> Result<Vec<u8>, SpecError> {
        // The error of a missing object is the same as of a missing key.
        match self.config_map(field, &key.name).await {
            Ok(_) | Err(SpecError::Missing { .. }) => pick(field, "ConfigMap", key, self.config_maps.get(&key.name)),
            Err(error) => Err(error),
        }
    }

    async fn config_map(&mut self, field: &str, name: &str) -> Result<&BTreeMap<String, Vec<u8>>, SpecError> {
        if !self.config_maps.contains_key(name) {
            let api: Api<ConfigMap> = Api::namespaced(self.client.clone(), self.namespace);
            let found = api
                .get_opt(name)
                .await
                .map_err(|source| read(field, "ConfigMap", name, source))?;
            let data = found.map(|map| {
                let text = map
                    .data
                    .unwrap_or_default()
                    .into_iter()
                    .map(|(key, text)| (key, text.into_bytes()));
                text.chain(
                    map.binary_data
                        .unwrap_or_default()
                        .into_iter()
                        .map(|(key, bytes)| (key, bytes.0)),
                )
                .collect()
            });
            self.config_maps.insert(name.to_owned(), data);
        }
        self.config_maps
            .get(name)
            .and_then(Option::as_ref)
            .ok_or_else(|| missing(field, "ConfigMap", name))
    }
}

fn pick(
    field: &str,
    kind: &str,
    key: &KeyRef,
    found: Option<&Option<BTreeMap<String, Vec<u8>>>>,
) -> Result<Vec<u8>, SpecError> {
    let data = found
        .and_then(Option::as_ref)
        .ok_or_else(|| missing(field, kind, &key.name))?;
    data.get(&key.key).cloned().ok_or_else(|| SpecError::Missing {
        field: field.to_owned(),
        what: format!("{kind} {:?} has no key {:?}", key.name, key.key),
    })
}

fn missing(field: &str, kind: &str, name: &str) -> SpecError {
    SpecError::Missing {
        field: field.to_owned(),
        what: format!("{kind} {name:?} does not exist"),
    }
}

fn read(field: &str, kind: &str, name: &str, source: kube::Error) -> SpecError {
    SpecError::Read {
        field: field.to_owned(),
        object: format!("{kind} {name:?}"),
        source: Box::new(source),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn variable(name: &str, value: &str) -> wire::EnvVar {
        wire::EnvVar {
            name: name.to_owned(),
            value: value.to_owned(),
            secret: false,
        }
    }

    #[test]
    fn a_variable_has_the_value_that_was_set_last() {
        let mut env = Variables::default();
        for (name, value) in [("a", "1"), ("b", "2"), ("a", "33")] {
            env.set(variable(name, value)).unwrap();
        }
        assert_eq!(env.bytes, 12 + 13);
        let all: Vec<_> = env.all.into_iter().flatten().collect();
        assert_eq!(all, [variable("b", "2"), variable("a", "33")]);
    }

    #[test]
    fn variables_are_bounded_in_number_and_bytes() {
        let mut env = Variables::default();
        let taken = (0..100_000)
            .take_while(|number| env.set(variable(&number.to_string(), "")).is_ok())
            .count();
        assert_eq!(taken, MAX_VARIABLES);
        let mut env = Variables::default();
        let long = "x".repeat(1000);
        let set = |env: &mut Variables, number: u32| env.set(variable(&format!("{number:04}"), &long)).is_ok();
        assert_eq!((0..4000).take_while(|number| set(&mut env, *number)).count(), 517);
        // The same again takes no more room.
        let mut env = Variables::default();
        assert!((0..4000).all(|_| set(&mut env, 7)));
    }
}
