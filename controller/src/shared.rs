//! What one replica's successor needs, in Secret `far-controller-state`: the CA, open join tokens, certificates' serials and
//! revocations. The leader alone reads and writes it; in its state folder stands the truth of this moment, and the Secret
//! follows within [`EVERY`].
//!
//! Invariant: only who leads writes: each write names the version that was read before, and a version that is not this
//! controller's own is taken for one only while the Lease still names it.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use far_api::SYSTEM_NAMESPACE;
use k8s_openapi::{ByteString, api::core::v1::Secret};
use kube::{
    Api, Client,
    api::{ObjectMeta, PostParams},
};
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;

use crate::{files, leader::Doubts};

const NAME: &str = "far-controller-state";
/// Folders of the state folder that are shared.
const FOLDERS: [&str; 3] = ["ca", "tokens", "certificates"];
/// How long a change may be on the leader alone. A crash within it may let a join token work a second time, for the blade
/// that it is for.
const EVERY: Duration = Duration::from_secs(1);

type Files = BTreeMap<String, ByteString>;

#[derive(Debug)]
pub(crate) struct Shared {
    api: Api<Secret>,
    state_dir: PathBuf,
    /// As it was last read or written.
    kept: Secret,
}

impl Shared {
    /// Takes what the leader before kept into the state folder, in place of what is there.
    pub(crate) async fn take_over(client: Client, state_dir: &Path) -> Result<Self> {
        let api: Api<Secret> = Api::namespaced(client, SYSTEM_NAMESPACE);
        let doing = || format!("reading Secret {SYSTEM_NAMESPACE}/{NAME}");
        let kept = match api.get_opt(NAME).await.with_context(doing)? {
            Some(kept) => {
                replace(state_dir, &kept.data.clone().unwrap_or_default())
                    .with_context(|| format!("writing {}", state_dir.display()))?;
                kept
            }
            None => unwritten(),
        };
        Ok(Self {
            api,
            state_dir: state_dir.to_owned(),
            kept,
        })
    }

    /// Writes the folder into the Secret where they differ.
    pub(crate) async fn keep(&mut self, doubts: &Doubts) -> Result<()> {
        let found = read(&self.state_dir).with_context(|| format!("reading {}", self.state_dir.display()))?;
        let doing = || format!("writing Secret {SYSTEM_NAMESPACE}/{NAME}");
        match self.write(&found).await {
            Err(kube::Error::Api(error)) if error.code == 409 || error.code == 404 => {}
            other => return other.with_context(doing),
        }
        // The answer to a write got lost, or the leader before wrote once more. Read first, then asked who leads: whoever
        // leads next reads what is written here.
        self.kept = self
            .api
            .get_opt(NAME)
            .await
            .with_context(doing)?
            .unwrap_or_else(unwritten);
        if doubts.is_deposed().await {
            bail!("Secret {SYSTEM_NAMESPACE}/{NAME} is another controller's");
        }
        self.write(&found).await.with_context(doing)
    }

    async fn write(&mut self, found: &Files) -> Result<(), kube::Error> {
        if self.kept.data.as_ref() == Some(found) {
            return Ok(());
        }
        let wanted = Secret {
            data: Some(found.clone()),
            ..self.kept.clone()
        };
        self.kept = match &wanted.metadata.resource_version {
            Some(_) => self.api.replace(NAME, &PostParams::default(), &wanted).await?,
            None => self.api.create(&PostParams::default(), &wanted).await?,
        };
        Ok(())
    }
}

/// Follows the folder until `stop`.
pub(crate) async fn follow(shared: Arc<Mutex<Shared>>, doubts: Arc<Doubts>, stop: CancellationToken) {
    while stop.run_until_cancelled(tokio::time::sleep(EVERY)).await.is_some() {
        if let Err(error) = shared.lock().await.keep(&doubts).await {
            tracing::warn!(error = %format!("{error:#}"), "the state that replicas share was not written");
        }
    }
}

fn unwritten() -> Secret {
    Secret {
        metadata: ObjectMeta {
            name: Some(NAME.to_owned()),
            ..ObjectMeta::default()
        },
        ..Secret::default()
    }
}

/// Every shared file, by `folder.name`: names of files hold no path, and a Secret's keys no slash.
fn read(state_dir: &Path) -> io::Result<Files> {
    let mut found = Files::new();
    for folder in FOLDERS {
        let entries = match fs::read_dir(state_dir.join(folder)) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        for entry in entries {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            // Half-written ones begin with a dot.
            if name.starts_with('.') {
                continue;
            }
            match fs::read(entry.path()) {
                Ok(bytes) => found.insert(format!("{folder}.{name}"), ByteString(bytes)),
                // Used or expired in between.
                Err(error) if error.kind() == io::ErrorKind::NotFound => None,
                Err(error) => return Err(error),
            };
        }
    }
    Ok(found)
}

fn replace(state_dir: &Path, wanted: &Files) -> io::Result<()> {
    for key in read(state_dir)?.keys().filter(|key| !wanted.contains_key(*key)) {
        if let Some((folder, name)) = key.split_once('.') {
            fs::remove_file(state_dir.join(folder).join(name))?;
        }
    }
    for (key, bytes) in wanted {
        let Some((folder, name)) = key.split_once('.').filter(|(folder, _)| FOLDERS.contains(folder)) else {
            continue;
        };
        files::private_folder(&state_dir.join(folder))?;
        files::write_private(&state_dir.join(folder).join(name), &bytes.0)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_folder_becomes_the_same_and_keeps_nothing_of_its_own() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let write = |at: &Path, name: &str, text: &str| {
            fs::create_dir_all(at.join(name).parent().unwrap()).unwrap();
            fs::write(at.join(name), text).unwrap();
        };
        write(one.path(), "ca/ca-key.pem", "key");
        write(one.path(), "certificates/b1.serials", "01\n");
        write(one.path(), "tokens/.half.1", "half");
        write(one.path(), "epoch", "7");
        write(two.path(), "tokens/used", "{}");
        write(two.path(), "ca/ca-key.pem", "another");
        let files = read(one.path()).unwrap();
        assert_eq!(
            files.keys().collect::<Vec<_>>(),
            ["ca.ca-key.pem", "certificates.b1.serials"]
        );
        replace(two.path(), &files).unwrap();
        assert_eq!(read(two.path()).unwrap(), files);
        assert!(!two.path().join("tokens/used").exists(), "a used token stays used");
        let foreign = Files::from([("epoch.x".to_owned(), ByteString(Vec::new()))]);
        replace(two.path(), &foreign).unwrap();
        assert!(!two.path().join("epoch").exists(), "nothing outside the shared folders");
    }
}
