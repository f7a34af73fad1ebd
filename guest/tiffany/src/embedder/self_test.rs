//! The built-in corpus: embedded when a task has no documents, so that a first run shows real work, and checked against
//! its known result, so that it proves something.

use super::{EmbedderError, write_chunks};
use std::io::Write;

/// Documents of the corpus.
const CORPUS: [(&str, &str); 3] = [
    (
        "self-test/blade.md",
        "# Blade\n\nA blade is a physical node. It boots agents in microVMs and reports how they ended.\n\n\
         Every agent has a root file system of its own, a control stream to its blade, and nothing else unless a rule says so.\n",
    ),
    (
        "self-test/agent.txt",
        "An agent is the work and the resource that describes it.\n\nIt starts at most once per attempt, writes to its two \
         output streams, and leaves with an exit code that nobody makes up.\n",
    ),
    (
        "self-test/languages.txt",
        "Größe, façade, naïveté: text is more than ASCII.\n\n日本語の文もベクトルになる。\n",
    ),
];

/// FNV-1a of the corpus' JSON lines. Changes only when vectors change: then what was stored with the old ones is of no use.
const EXPECTED: u64 = 0xa9d9_6e60_ffde_9740;

/// Embeds the corpus; gives the number of documents and chunks.
pub(crate) fn run(out: &mut impl Write) -> Result<(usize, usize), EmbedderError> {
    let mut lines = Vec::new();
    let mut chunks = 0;
    for (name, text) in CORPUS {
        chunks += write_chunks(name, text, &mut lines)?;
    }
    out.write_all(&lines)?;
    if digest(&lines) != EXPECTED {
        out.flush()?;
        return Err(EmbedderError::SelfTest);
    }
    Ok((CORPUS.len(), chunks))
}

fn digest(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_corpus_gives_its_known_vectors() {
        let mut lines = Vec::new();
        let result = run(&mut lines);
        assert_eq!(
            digest(&lines),
            EXPECTED,
            "if vectors were meant to change, this is the new value: {:#x}",
            digest(&lines)
        );
        assert_eq!(result.unwrap(), (3, 3));
    }
}
