//! The file under the store: one redb table of objects and the last resource version, changed together and fsynced.

use std::io;
use std::path::{Path, PathBuf};

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};

use super::{Key, Object};

/// Key: `resource \0 namespace \0 name`. Value: the object's JSON.
const OBJECTS: TableDefinition<&str, &[u8]> = TableDefinition::new("objects");
const META: TableDefinition<&str, u64> = TableDefinition::new("meta");
const REVISION: &str = "revision";
/// redb's page cache; every object is in memory anyway.
const CACHE_BYTES: usize = 8 << 20;

#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    #[error("opening the store {path}: is another far-devapi using it?")]
    Open { path: PathBuf, source: redb::DatabaseError },
    #[error("making the store {path} readable for this user only")]
    File { path: PathBuf, source: io::Error },
    #[error("reading or writing the store")]
    Database(#[source] Box<redb::Error>),
    #[error("the store holds an object with a broken key or body: {0}; move the store away to start anew")]
    Corrupt(String),
    #[error("starting the store's writer")]
    Thread(#[source] io::Error),
}

fn database(error: impl Into<redb::Error>) -> StoreError {
    StoreError::Database(Box::new(error.into()))
}

pub(super) struct Loaded {
    pub revision: u64,
    pub objects: Vec<Object>,
}

pub(super) enum DiskChange<'a> {
    Put(&'a Object),
    Remove(&'a Object),
}

pub(super) struct Disk {
    database: Database,
}

impl Disk {
    pub(super) fn open(path: &Path) -> Result<Self, StoreError> {
        private(path).map_err(|source| StoreError::File {
            path: path.to_owned(),
            source,
        })?;
        let database = Database::builder()
            .set_cache_size(CACHE_BYTES)
            .create(path)
            .map_err(|source| StoreError::Open {
                path: path.to_owned(),
                source,
            })?;
        Ok(Self { database })
    }

    pub(super) fn load(&self) -> Result<Loaded, StoreError> {
        let write = self.database.begin_write().map_err(database)?;
        write.open_table(OBJECTS).map_err(database)?;
        write.open_table(META).map_err(database)?;
        write.commit().map_err(database)?;
        let read = self.database.begin_read().map_err(database)?;
        let meta = read.open_table(META).map_err(database)?;
        let revision = meta.get(REVISION).map_err(database)?.map_or(0, |value| value.value());
        let table = read.open_table(OBJECTS).map_err(database)?;
        let mut objects = Vec::new();
        for entry in table.iter().map_err(database)? {
            let (key, json) = entry.map_err(database)?;
            objects.push(decode(key.value(), json.value())?);
        }
        Ok(Loaded { revision, objects })
    }

    /// All changes or none, on disk when this returns (redb's default durability is an fsync at commit).
    pub(super) fn commit<'a>(&self, changes: impl Iterator<Item = DiskChange<'a>>) -> Result<(), StoreError> {
        let write = self.database.begin_write().map_err(database)?;
        {
            let mut objects = write.open_table(OBJECTS).map_err(database)?;
            let mut revision = 0;
            for change in changes {
                match change {
                    DiskChange::Put(object) => {
                        revision = revision.max(object.revision);
                        objects
                            .insert(encode(&object.key).as_str(), object.json.as_ref())
                            .map_err(database)?;
                    }
                    DiskChange::Remove(object) => {
                        revision = revision.max(object.revision);
                        objects.remove(encode(&object.key).as_str()).map_err(database)?;
                    }
                }
            }
            let mut meta = write.open_table(META).map_err(database)?;
            meta.insert(REVISION, revision).map_err(database)?;
        }
        write.commit().map_err(database)
    }
}

/// The store holds Secrets: nobody else reads it, whatever the umask.
fn private(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
    let file = std::fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(path)?;
    file.set_permissions(std::fs::Permissions::from_mode(0o600))
}

fn encode(key: &Key) -> String {
    format!("{}\0{}\0{}", key.resource, key.namespace, key.name)
}

fn decode(key: &str, json: &[u8]) -> Result<Object, StoreError> {
    let corrupt = || StoreError::Corrupt(key.replace('\0', "/"));
    let mut parts = key.split('\0');
    let (Some(resource), Some(namespace), Some(name)) = (parts.next(), parts.next(), parts.next()) else {
        return Err(corrupt());
    };
    let value: serde_json::Value = serde_json::from_slice(json).map_err(|_| corrupt())?;
    let revision = value["metadata"]["resourceVersion"]
        .as_str()
        .and_then(|text| text.parse().ok());
    Ok(Object {
        key: Key {
            resource: resource.into(),
            namespace: namespace.into(),
            name: name.into(),
        },
        revision: revision.ok_or_else(corrupt)?,
        json: bytes::Bytes::copy_from_slice(json),
    })
}
