//! Manifests: files, folders or standard input with YAML or JSON documents, each one Kubernetes object.

use std::{
    fs, io,
    io::Read,
    path::{Path, PathBuf},
};

use serde_json::Value;

/// Largest manifest that is read: an API takes objects of at most 3 MiB, and a file holds a handful.
const MAX_BYTES: u64 = 32 << 20;

#[derive(Debug, thiserror::Error)]
pub(crate) enum DocumentError {
    #[error("reading {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("{path} is larger than {MAX_BYTES} bytes")]
    TooLarge { path: PathBuf },
    #[error("{folder} has no .yaml, .yml or .json file")]
    EmptyFolder { folder: PathBuf },
    #[error("{path} has no object in it")]
    Empty { path: PathBuf },
    #[error("{path} is not YAML")]
    Yaml {
        path: PathBuf,
        source: Box<serde_saphyr::Error>,
    },
    #[error("{path}, document {number}: {field} {problem}")]
    Field {
        path: PathBuf,
        number: usize,
        field: &'static str,
        problem: &'static str,
    },
}

/// One object of a manifest, known to have what every object has.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Document {
    pub(crate) api_version: String,
    pub(crate) kind: String,
    pub(crate) namespace: Option<String>,
    /// Empty only where `generateName` is given.
    pub(crate) name: String,
    pub(crate) object: Value,
}

/// All documents of these files, in order.
pub(crate) fn read_all(paths: &[PathBuf]) -> Result<Vec<Document>, DocumentError> {
    let mut documents = Vec::new();
    for path in paths {
        if path.as_os_str() != "-" && path.is_dir() {
            for file in files_in(path)? {
                documents.extend(parse(&file, &read(&file)?)?);
            }
        } else {
            documents.extend(parse(path, &read(path)?)?);
        }
    }
    Ok(documents)
}

fn files_in(folder: &Path) -> Result<Vec<PathBuf>, DocumentError> {
    let entries = fs::read_dir(folder).map_err(|source| DocumentError::Read {
        path: folder.to_path_buf(),
        source,
    })?;
    let mut files: Vec<_> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            path.is_file()
                && path
                    .extension()
                    .is_some_and(|end| ["yaml", "yml", "json"].iter().any(|known| end == *known))
        })
        .collect();
    files.sort();
    if files.is_empty() {
        return Err(DocumentError::EmptyFolder {
            folder: folder.to_path_buf(),
        });
    }
    Ok(files)
}

fn read(path: &Path) -> Result<String, DocumentError> {
    let read_error = |source| DocumentError::Read {
        path: path.to_path_buf(),
        source,
    };
    let mut text = String::new();
    if path.as_os_str() == "-" {
        io::stdin().take(MAX_BYTES + 1).read_to_string(&mut text)
    } else {
        fs::File::open(path)
            .map_err(read_error)?
            .take(MAX_BYTES + 1)
            .read_to_string(&mut text)
    }
    .map_err(read_error)?;
    if text.len() as u64 > MAX_BYTES {
        return Err(DocumentError::TooLarge {
            path: path.to_path_buf(),
        });
    }
    Ok(text)
}

/// The objects of one manifest. `kind: List` is taken apart; empty documents are skipped, as kubectl does.
pub(crate) fn parse(path: &Path, text: &str) -> Result<Vec<Document>, DocumentError> {
    // kubectl reads YAML 1.1, where `mode: 0644` is octal.
    let options = serde_saphyr::options! { legacy_octal_numbers: true };
    let values: Vec<Value> =
        serde_saphyr::from_multiple_with_options(text, options).map_err(|source| DocumentError::Yaml {
            path: path.to_path_buf(),
            source: Box::new(source),
        })?;
    let mut documents = Vec::new();
    for (index, value) in values.into_iter().enumerate() {
        if value.is_null() {
            continue;
        }
        let items = match value {
            Value::Object(mut map) if map.get("kind").and_then(Value::as_str) == Some("List") => {
                match map.remove("items") {
                    Some(Value::Array(items)) => items,
                    _ => Vec::new(),
                }
            }
            other => vec![other],
        };
        for item in items {
            documents.push(check(path, index + 1, item)?);
        }
    }
    if documents.is_empty() {
        return Err(DocumentError::Empty {
            path: path.to_path_buf(),
        });
    }
    Ok(documents)
}

fn check(path: &Path, number: usize, object: Value) -> Result<Document, DocumentError> {
    let wrong = |field, problem| DocumentError::Field {
        path: path.to_path_buf(),
        number,
        field,
        problem,
    };
    if !object.is_object() {
        return Err(wrong("the document", "is not an object: it has no apiVersion and kind"));
    }
    let text = |value: &Value, field| match value {
        Value::Null => Ok(None),
        Value::String(text) if !text.is_empty() => Ok(Some(text.clone())),
        Value::String(_) => Err(wrong(field, "is empty")),
        _ => Err(wrong(field, "is not a string; write it in quotes")),
    };
    let api_version = text(&object["apiVersion"], "apiVersion")?.ok_or_else(|| wrong("apiVersion", "is missing"))?;
    let kind = text(&object["kind"], "kind")?.ok_or_else(|| wrong("kind", "is missing"))?;
    let metadata = &object["metadata"];
    let name = match text(&metadata["name"], "metadata.name")? {
        Some(name) => name,
        None if metadata["generateName"].is_string() => String::new(),
        None => return Err(wrong("metadata.name", "is missing")),
    };
    let namespace = text(&metadata["namespace"], "metadata.namespace")?;
    Ok(Document {
        api_version,
        kind,
        namespace,
        name,
        object,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<Vec<Document>, String> {
        parse(Path::new("agent.yaml"), text).map_err(|error| crate::exit::chain(&error.into()))
    }

    #[test]
    fn documents_are_split_and_lists_taken_apart() {
        let text = "# first\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\n---\n---\n\
            apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Secret, metadata: {name: b, namespace: team}}\n\
            - {apiVersion: v1, kind: Secret, metadata: {name: c}}\n";
        let found: Vec<_> = parsed(text)
            .unwrap()
            .into_iter()
            .map(|document| (document.kind, document.name, document.namespace))
            .collect();
        assert_eq!(
            found,
            [
                ("ConfigMap".into(), "a".into(), None),
                ("Secret".into(), "b".into(), Some("team".into())),
                ("Secret".into(), "c".into(), None),
            ]
        );
    }

    #[test]
    fn json_is_yaml_and_modes_are_octal_as_in_kubectl() {
        let document = parsed(r#"{"apiVersion": "v1", "kind": "X", "metadata": {"name": "a"}}"#).unwrap();
        assert_eq!(document.len(), 1);
        let document =
            &parsed("apiVersion: v1\nkind: X\nmetadata: {name: a}\nmode: 0644\ncpu: 1\nzero: 0\n").unwrap()[0];
        assert_eq!(document.object["mode"], 0o644);
        assert_eq!(document.object["cpu"], 1);
        assert_eq!(document.object["zero"], 0);
    }

    #[test]
    fn what_is_missing_is_named_with_its_document() {
        for (why, text, expected) in [
            (
                "no apiVersion",
                "kind: X\nmetadata: {name: a}",
                "document 1: apiVersion is missing",
            ),
            (
                "no kind",
                "apiVersion: v1\nmetadata: {name: a}",
                "document 1: kind is missing",
            ),
            (
                "no name, second document",
                "apiVersion: v1\nkind: X\nmetadata: {name: a}\n---\napiVersion: v1\nkind: X\n",
                "document 2: metadata.name is missing",
            ),
            (
                "name is a number",
                "apiVersion: v1\nkind: X\nmetadata: {name: 7}",
                "metadata.name is not a string",
            ),
            (
                "n is false in YAML 1.1, as in kubectl",
                "apiVersion: v1\nkind: X\nmetadata: {name: a, namespace: n}",
                "metadata.namespace is not a string",
            ),
            ("a scalar", "hello", "is not an object"),
            ("nothing", "# only a comment\n", "no object"),
            ("not YAML", "a: [1\nb: 2", "agent.yaml is not YAML"),
        ] {
            let error = parsed(text).unwrap_err();
            assert!(error.contains(expected), "{why}: {error}");
        }
    }

    #[test]
    fn a_folder_gives_its_manifests_in_order_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let object = |name: &str| format!("apiVersion: v1\nkind: X\nmetadata: {{name: {name}}}\n");
        for (file, name) in [("b.yml", "b"), ("a.yaml", "a"), ("notes.md", "no")] {
            fs::write(folder.path().join(file), object(name)).unwrap();
        }
        let names: Vec<_> = read_all(&[folder.path().to_path_buf()])
            .unwrap()
            .into_iter()
            .map(|document| document.name)
            .collect();
        assert_eq!(names, ["a", "b"]);
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = read_all(&[PathBuf::from("/no/such.yaml")]).unwrap_err().to_string();
        assert!(error.contains("/no/such.yaml"), "{error}");
    }
}
