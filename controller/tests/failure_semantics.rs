//! docs/failure-semantics.md names a test on each of its lines; here is whether they exist.
#![allow(clippy::unwrap_used)] // A panic here is the test's report.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Names of all functions that are tests in the source tree.
fn tests(folder: &Path, found: &mut HashSet<String>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() && name != "target" && !name.starts_with('.') {
            tests(&path, found);
        } else if name.ends_with(".rs") {
            let text = std::fs::read_to_string(&path).unwrap();
            let mut is_test = false;
            for line in text.lines().map(str::trim) {
                if line.starts_with("#[test]") || line.starts_with("#[tokio::test") {
                    is_test = true;
                } else if let Some((_, rest)) = line.split_once("fn ").filter(|_| is_test) {
                    found.extend(rest.split_once('(').map(|(name, _)| name.to_owned()));
                    is_test = false;
                }
            }
        }
    }
}

/// The last cell of each line of a table, without the heads.
fn named(text: &str) -> Vec<(&str, &str)> {
    let rows = text
        .lines()
        .filter(|line| line.starts_with("| ") && !line.starts_with("| what "));
    rows.map(|row| {
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        (row, cells.last().copied().unwrap_or_default())
    })
    .collect()
}

#[test]
fn each_line_of_the_failure_semantics_has_a_test_of_its_name() {
    let text = std::fs::read_to_string(root().join("docs/failure-semantics.md")).unwrap();
    let mut found = HashSet::new();
    for folder in ["controller", "node-agent", "guest", "tests"] {
        tests(&root().join(folder), &mut found);
    }
    let rows = named(&text);
    assert!(rows.len() > 20, "the tables were not understood: {} lines", rows.len());
    let mut missing = Vec::new();
    let mut seen = HashSet::new();
    for (row, cell) in rows {
        let name = cell
            .strip_prefix('`')
            .and_then(|rest| rest.strip_suffix('`'))
            .unwrap_or_default();
        if !found.contains(name) {
            missing.push(row);
        }
        assert!(seen.insert(name), "two lines with one test: {name}");
    }
    assert!(
        missing.is_empty(),
        "lines whose test does not exist:\n{}",
        missing.join("\n")
    );
}

#[test]
fn a_line_without_a_test_is_seen() {
    let text = "| what fails | test |\n|---|---|\n| the moon | `no_such_test` |\n| the sun | none |\n";
    let cells: Vec<&str> = named(text).into_iter().map(|(_, cell)| cell).collect();
    assert_eq!(cells, ["`no_such_test`", "none"]);
}
