//! Finds the documents of a task: regular files below a folder, in sorted order, symlinks not followed.

use std::{
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

/// Longest document, bytes: more than the files of one agent may be together, and it fits the smallest guest.
const MAX_DOCUMENT: u64 = 16 << 20;
/// Most files and folders that are looked at.
const MAX_ENTRIES: usize = 100_000;
/// Deepest folder below the task folder.
const MAX_DEPTH: usize = 64;

/// Why the task folder cannot be walked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ScanError {
    #[error("the task folder {folder} does not exist; name another with --task-dir")]
    Missing { folder: PathBuf },
    #[error("reading the folder {folder}")]
    Folder { folder: PathBuf, source: io::Error },
    #[error("more than {MAX_ENTRIES} files and folders under {folder}")]
    TooMany { folder: PathBuf },
    #[error("folders under {folder} are nested more than {MAX_DEPTH} deep")]
    TooDeep { folder: PathBuf },
}

/// A file below the task folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Candidate {
    path: PathBuf,
    /// Path relative to the task folder, as it is shown; bytes that are not UTF-8 are replaced.
    pub(crate) name: String,
    is_regular: bool,
}

/// What a file turned out to be.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Found {
    Document(String),
    /// Not a document, and why.
    Skipped(&'static str),
}

/// Every file below `folder`, sorted by path. A default folder that is missing is an empty one.
pub(crate) fn scan(folder: &Path, must_exist: bool) -> Result<Vec<Candidate>, ScanError> {
    if let Err(error) = fs::metadata(folder)
        && error.kind() == io::ErrorKind::NotFound
    {
        return if must_exist {
            Err(ScanError::Missing { folder: folder.into() })
        } else {
            Ok(Vec::new())
        };
    }
    let mut found = Vec::new();
    let mut folders = vec![(folder.to_owned(), 0)];
    let mut seen = 0;
    while let Some((inside, depth)) = folders.pop() {
        let failed = |source| ScanError::Folder {
            folder: inside.clone(),
            source,
        };
        for entry in fs::read_dir(&inside).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            seen += 1;
            if seen > MAX_ENTRIES {
                return Err(ScanError::TooMany { folder: folder.into() });
            }
            let kind = entry.file_type().map_err(failed)?;
            if kind.is_dir() {
                if depth == MAX_DEPTH {
                    return Err(ScanError::TooDeep { folder: folder.into() });
                }
                folders.push((entry.path(), depth + 1));
            } else {
                let path = entry.path();
                let name = path
                    .strip_prefix(folder)
                    .unwrap_or(&path)
                    .to_string_lossy()
                    .into_owned();
                found.push(Candidate {
                    path,
                    name,
                    is_regular: kind.is_file(),
                });
            }
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(found)
}

/// Reads a file if it is a document: `.txt`, `.md` or no extension, UTF-8, without NUL, not too long.
///
/// # Errors
/// When it looks like a document and cannot be read.
pub(crate) fn read(file: &Candidate) -> io::Result<Found> {
    if !file.is_regular {
        return Ok(Found::Skipped("not a regular file (symlinks are not followed)"));
    }
    let extension = file
        .path
        .extension()
        .map(|extension| extension.to_string_lossy().to_ascii_lowercase());
    if !matches!(extension.as_deref(), None | Some("txt" | "md")) {
        return Ok(Found::Skipped("not a .txt or .md file"));
    }
    let mut bytes = Vec::new();
    File::open(&file.path)?.take(MAX_DOCUMENT + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_DOCUMENT {
        return Ok(Found::Skipped("longer than 16 MiB"));
    }
    if bytes.contains(&0) {
        return Ok(Found::Skipped("contains NUL bytes, so it is not text"));
    }
    Ok(String::from_utf8(bytes).map_or(Found::Skipped("not valid UTF-8"), Found::Document))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn names(files: &[Candidate]) -> Vec<&str> {
        files.iter().map(|file| file.name.as_str()).collect()
    }

    #[test]
    fn files_come_sorted_with_those_of_sub_folders() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("b/c")).unwrap();
        for name in ["z.txt", "a.md", "b/c/deep", "b/a.txt"] {
            fs::write(folder.path().join(name), "x").unwrap();
        }
        assert_eq!(
            names(&scan(folder.path(), true).unwrap()),
            ["a.md", "b/a.txt", "b/c/deep", "z.txt"]
        );
    }

    #[test]
    fn what_is_not_a_document_is_skipped_with_its_reason() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::write(at("ok.MD"), "fine").unwrap();
        fs::write(at("image.png"), "x").unwrap();
        fs::write(at("latin.txt"), b"caf\xe9").unwrap();
        fs::write(at("nul"), b"a\0b").unwrap();
        File::create(at("long.txt")).unwrap().set_len(MAX_DOCUMENT + 1).unwrap();
        symlink("/etc/passwd", at("link.txt")).unwrap();
        symlink("/etc", at("linked")).unwrap();
        let got: Vec<_> = scan(folder.path(), true)
            .unwrap()
            .iter()
            .map(|file| (file.name.clone(), read(file).unwrap()))
            .collect();
        let reason = |name: &str| got.iter().find(|(n, _)| n == name).map(|(_, found)| found).unwrap();
        assert_eq!(reason("ok.MD"), &Found::Document("fine".into()));
        for (name, why) in [
            ("image.png", "not a .txt"),
            ("latin.txt", "not valid UTF-8"),
            ("nul", "contains NUL"),
            ("long.txt", "longer than"),
            ("link.txt", "not a regular file"),
            ("linked", "not a regular file"),
        ] {
            assert!(
                matches!(reason(name), Found::Skipped(text) if text.starts_with(why)),
                "{name}: {:?}",
                reason(name)
            );
        }
    }

    #[test]
    fn a_missing_folder_is_an_error_only_when_somebody_named_it() {
        let folder = tempfile::tempdir().unwrap().path().join("none");
        assert_eq!(scan(&folder, false).unwrap(), []);
        assert!(matches!(scan(&folder, true), Err(ScanError::Missing { .. })));
    }
}
