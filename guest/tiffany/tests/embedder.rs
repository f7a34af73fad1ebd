//! The program as it is run: command line, streams and exit codes.
#![allow(clippy::unwrap_used)]

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

fn tiffany(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tiffany"))
        .args(arguments)
        .env_remove("TIFFANY_TASK_DIR")
        .output()
        .unwrap()
}

fn embed(folder: &Path) -> Output {
    tiffany(&["--task", "embedder", "--task-dir", folder.to_str().unwrap()])
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn documents_become_json_lines_with_384_numbers_each() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("b \"quoted\".md"), "# Title\n\nText.\n").unwrap();
    fs::write(folder.path().join("a.txt"), "long words here. ".repeat(100)).unwrap();
    fs::write(folder.path().join("picture.png"), [0x89]).unwrap();
    let output = embed(folder.path());
    assert!(output.status.success());
    assert_eq!(
        text(&output.stderr),
        "skipped picture.png: not a .txt or .md file\nembedded 3 chunks of 2 documents, skipped 1 file\n"
    );
    let lines: Vec<serde_json::Value> = text(&output.stdout)
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let places: Vec<_> = lines
        .iter()
        .map(|line| (line["document"].as_str().unwrap(), line["chunk"].as_u64().unwrap()))
        .collect();
    assert_eq!(places, [("a.txt", 0), ("a.txt", 1), ("b \"quoted\".md", 0)]);
    for line in &lines {
        let vector: Vec<f64> = line["vector"]
            .as_array()
            .unwrap()
            .iter()
            .map(|number| number.as_f64().unwrap())
            .collect();
        assert_eq!(vector.len(), 384);
        assert!((vector.iter().map(|value| value * value).sum::<f64>() - 1.0).abs() < 1e-4);
    }
}

#[test]
fn the_same_input_gives_the_same_bytes_and_the_known_vector() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("golden.txt"), "Embeddings must not drift.").unwrap();
    let output = embed(folder.path());
    assert_eq!(output.stdout, embed(folder.path()).stdout);
    assert_eq!(
        text(&output.stdout),
        include_str!("golden.jsonl"),
        "vectors changed: what was stored with the old ones is of no use"
    );
}

#[test]
fn without_documents_the_self_test_corpus_is_embedded() {
    let folder = tempfile::tempdir().unwrap();
    let output = embed(folder.path());
    assert!(output.status.success(), "{}", text(&output.stderr));
    let notes = text(&output.stderr);
    assert!(
        notes.starts_with("no documents under ") && notes.contains("built-in self-test corpus"),
        "{notes}"
    );
    assert!(notes.ends_with("embedded 3 chunks of 3 documents\n"), "{notes}");
    assert_eq!(text(&output.stdout).lines().count(), 3);
}

#[test]
fn required_documents_that_are_missing_exit_3_and_embed_nothing() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("picture.png"), [0x89]).unwrap();
    let output = tiffany(&[
        "--task",
        "embedder",
        "--require-documents",
        "--task-dir",
        folder.path().to_str().unwrap(),
    ]);
    assert_eq!(output.status.code(), Some(3));
    assert_eq!(text(&output.stdout), "");
    assert!(
        text(&output.stderr).contains("no document under"),
        "{}",
        text(&output.stderr)
    );
}

#[test]
fn wrong_use_exits_2_and_names_what_is_known() {
    for (arguments, message) in [
        (
            &["--task", "dance"][..],
            "unknown task \"dance\"; known tasks: embedder",
        ),
        (&[], "--task is missing; known tasks: embedder"),
        (&["--frobnicate"], "unknown argument"),
    ] {
        let output = tiffany(arguments);
        assert_eq!(output.status.code(), Some(2));
        assert!(text(&output.stderr).contains(message) && output.stdout.is_empty());
    }
}

#[test]
fn a_folder_that_was_named_and_is_missing_exits_1() {
    let output = tiffany(&["--task", "embedder", "--task-dir", "/does/not/exist"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("the task folder /does/not/exist does not exist"));
}

#[test]
fn a_file_instead_of_a_folder_exits_1() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let output = embed(file.path());
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("reading the folder"));
}

#[test]
fn help_and_version_exit_0() {
    assert!(text(&tiffany(&["--help"]).stdout).contains("embedder"));
    assert_eq!(
        text(&tiffany(&["--version"]).stdout),
        format!("tiffany {}\n", env!("CARGO_PKG_VERSION"))
    );
}
