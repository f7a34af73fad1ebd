//! Task kind `embedder`: documents -> chunks -> vectors -> JSON lines.
//!
//! The same input gives the same bytes on every machine: documents in sorted order, one stable hash, and no floating
//! point operation beyond those that IEEE 754 defines exactly.

mod chunks;
mod documents;
mod self_test;
mod vector;

use documents::{Found, ScanError};
use std::{
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

/// Why the task is not done.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EmbedderError {
    #[error(transparent)]
    Scan(#[from] ScanError),
    #[error("writing the output")]
    Write(#[from] io::Error),
    #[error("{count} of the files could not be read; they are named above")]
    Unread { count: usize },
    #[error("no document under {}, and --require-documents was given", folder.display())]
    NoDocuments { folder: PathBuf },
    #[error("the self-test corpus gave other vectors than expected: this build computes wrongly")]
    SelfTest,
}

impl EmbedderError {
    /// Nothing was wrong but that there was nothing to do.
    pub(crate) fn is_lack_of_documents(&self) -> bool {
        matches!(self, Self::NoDocuments { .. })
    }
}

/// Embeds every document under `folder`, or the self-test corpus when there is none and none is required.
///
/// # Errors
/// [`EmbedderError`]; what could be embedded was written before it.
pub(crate) fn run(
    folder: &Path,
    must_exist: bool,
    require_documents: bool,
    out: &mut impl Write,
    notes: &mut impl Write,
) -> Result<(), EmbedderError> {
    let mut out = BufWriter::new(out);
    let files = documents::scan(folder, must_exist)?;
    let (mut documents, mut total, mut skipped, mut unread) = (0, 0, 0, 0);
    for file in &files {
        match documents::read(file) {
            Ok(Found::Document(text)) => {
                total += write_chunks(&file.name, &text, &mut out)?;
                documents += 1;
            }
            Ok(Found::Skipped(why)) => {
                writeln!(notes, "skipped {}: {why}", file.name)?;
                skipped += 1;
            }
            Err(error) => {
                writeln!(notes, "could not read {}: {error}", file.name)?;
                unread += 1;
            }
        }
    }
    if documents == 0 && unread == 0 && require_documents {
        return Err(EmbedderError::NoDocuments {
            folder: folder.to_path_buf(),
        });
    }
    if documents == 0 && unread == 0 {
        writeln!(
            notes,
            "no documents under {}: embedding the built-in self-test corpus",
            folder.display()
        )?;
        (documents, total) = self_test::run(&mut out)?;
    }
    out.flush()?;
    let more = if skipped > 0 {
        format!(", skipped {}", counted(skipped, "file"))
    } else {
        String::new()
    };
    writeln!(
        notes,
        "embedded {} of {}{more}",
        counted(total, "chunk"),
        counted(documents, "document")
    )?;
    if unread > 0 {
        Err(EmbedderError::Unread { count: unread })
    } else {
        Ok(())
    }
}

fn counted(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

/// Writes one JSON line per chunk and says how many.
fn write_chunks(document: &str, text: &str, out: &mut impl Write) -> io::Result<usize> {
    let name = serde_json::to_string(document)?;
    let mut count = 0;
    for (index, chunk) in chunks::split(text).into_iter().enumerate() {
        write!(out, "{{\"document\":{name},\"chunk\":{index},\"vector\":[")?;
        for (dimension, value) in vector::embed(chunk).into_iter().enumerate() {
            let comma = if dimension == 0 { "" } else { "," };
            write!(out, "{comma}{}", vector::rounded(value))?;
        }
        writeln!(out, "]}}")?;
        count += 1;
    }
    Ok(count)
}
