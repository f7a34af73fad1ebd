//! Writing results: complete or not at all, and not at all when nothing changed (a file's time says when it changed).

use std::{fs, io, io::Write, os::unix::fs::PermissionsExt, path::Path};

use sha2::{Digest, Sha256};

use crate::BuildError;

/// Puts `bytes` at `path` (mode 0644) by rename, unless they are there already. Says whether it wrote.
///
/// # Errors
/// [`BuildError::Io`].
pub(crate) fn if_changed(path: &Path, bytes: &[u8]) -> Result<bool, BuildError> {
    if fs::read(path).is_ok_and(|old| old == bytes) {
        return Ok(false);
    }
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    fs::create_dir_all(folder).map_err(BuildError::io("creating", folder))?;
    let mut file = tempfile::NamedTempFile::new_in(folder).map_err(BuildError::io("creating a file in", folder))?;
    file.write_all(bytes).map_err(BuildError::io("writing", path))?;
    file.as_file()
        .set_permissions(fs::Permissions::from_mode(0o644))
        .map_err(BuildError::io("setting the mode of", path))?;
    file.persist(path).map_err(|error| BuildError::Io {
        doing: "renaming to",
        path: path.to_path_buf(),
        source: error.error,
    })?;
    Ok(true)
}

/// SHA-256 as lower-case hex.
#[must_use]
pub(crate) fn sha256(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

/// SHA-256 of a whole stream, as lower-case hex.
pub(crate) fn sha256_of(from: &mut impl io::Read) -> io::Result<String> {
    let mut hash = Sha256::new();
    io::copy(from, &mut hash)?;
    Ok(hex::encode(hash.finalize()))
}

pub(crate) fn read(path: &Path) -> Result<Vec<u8>, BuildError> {
    fs::read(path).map_err(BuildError::io("reading", path))
}
