//! Splits a text into chunks of at most [`MAX_CHARS`] characters, at paragraph borders where it can. Pure.
//!
//! A chunk is a slice of the text: nothing but white space between chunks is ever left out. Paragraphs are packed
//! together while they fit; a paragraph that alone is too long is cut after a sentence, else at a word, else where it must.

/// Longest chunk, characters (not bytes).
pub(crate) const MAX_CHARS: usize = 1000;

/// The chunks of `text`, in order. None is empty or begins or ends with white space.
pub(crate) fn split(text: &str) -> Vec<&str> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut chunks: Vec<&str> = Vec::new();
    // Byte range of the chunk that still may grow.
    let mut open: Option<(usize, usize)> = None;
    for (start, end) in paragraphs(text) {
        open = match open {
            Some((first, _)) if fits(&text[first..end]) => Some((first, end)),
            closed => {
                chunks.extend(closed.map(|(first, last)| &text[first..last]));
                let rest = cut_long(text, start, end, &mut chunks);
                Some((rest, end))
            }
        };
    }
    chunks.extend(open.map(|(first, last)| &text[first..last]));
    chunks
}

/// Byte ranges of the paragraphs: runs of lines that are not blank, without white space around them.
fn paragraphs(text: &str) -> Vec<(usize, usize)> {
    let mut found = Vec::new();
    let mut current: Option<(usize, usize)> = None;
    let mut offset = 0;
    for line in text.split_inclusive('\n') {
        let trimmed = line.trim();
        if trimmed.is_empty() {
            found.extend(current.take());
        } else {
            let start = offset + (line.len() - line.trim_start().len());
            let end = start + trimmed.len();
            current = Some((current.map_or(start, |(first, _)| first), end));
        }
        offset += line.len();
    }
    found.extend(current);
    found
}

fn fits(text: &str) -> bool {
    // Bytes are at least characters: counting is only needed in between.
    text.len() <= MAX_CHARS || text.chars().nth(MAX_CHARS).is_none()
}

/// Cuts pieces off a paragraph until the rest fits; gives the rest's start.
fn cut_long<'a>(text: &'a str, start: usize, end: usize, chunks: &mut Vec<&'a str>) -> usize {
    let mut start = start;
    while !fits(&text[start..end]) {
        let rest = &text[start..end];
        let limit = rest.char_indices().nth(MAX_CHARS).map_or(rest.len(), |(at, _)| at);
        // One character more than fits, to see whether a word ends exactly there.
        let after = rest[limit..].chars().next().map_or(0, char::len_utf8);
        let cut = best_cut(&rest[..limit + after], limit);
        chunks.push(rest[..cut].trim_end());
        start += cut + (rest[cut..].len() - rest[cut..].trim_start().len());
    }
    start
}

/// Where to cut `window`: at most at `limit` (bytes), after a sentence in its second half, else before the last white
/// space, else at the limit.
fn best_cut(window: &str, limit: usize) -> usize {
    let (mut sentence, mut word) = (None, None);
    let mut before = None;
    for (at, this) in window.char_indices() {
        if this.is_whitespace() && at > 0 && at <= limit {
            word = Some(at);
            if matches!(before, Some('.' | '!' | '?' | '…' | '。')) || this == '\n' {
                sentence = Some(at);
            }
        }
        before = Some(this);
    }
    sentence.filter(|&at| at >= limit / 2).or(word).unwrap_or(limit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn visible(text: &str) -> String {
        text.chars().filter(|c| !c.is_whitespace()).collect()
    }

    #[test]
    fn paragraphs_are_packed_while_they_fit() {
        assert_eq!(split(""), [""; 0]);
        assert_eq!(split(" \n\t\n"), [""; 0]);
        assert_eq!(split("one\ntwo\n\nthree\r\n"), ["one\ntwo\n\nthree"]);
        let (a, b, c) = ("a".repeat(600), "b".repeat(300), "c".repeat(300));
        assert_eq!(split(&format!("{a}\n\n{b}\n \n{c}")), [format!("{a}\n\n{b}"), c]);
        assert_eq!(split("\u{feff}x"), ["x"]);
    }

    #[test]
    fn exactly_a_thousand_characters_are_one_chunk_and_one_more_are_two() {
        assert_eq!(split(&"ü".repeat(1000)).len(), 1);
        let chunks: Vec<usize> = split(&"ü".repeat(1001))
            .iter()
            .map(|chunk| chunk.chars().count())
            .collect();
        assert_eq!(chunks, [1000, 1]);
        let fitting = format!("{} {}", "a".repeat(1000), "b".repeat(5));
        assert_eq!(split(&fitting), ["a".repeat(1000), "b".repeat(5)]);
    }

    #[test]
    fn a_long_paragraph_is_cut_after_a_sentence_else_at_a_word() {
        let sentence = format!("{}. ", "word ".repeat(20).trim_end());
        let chunks = split(sentence.repeat(30).leak());
        assert!(
            chunks.len() > 1 && chunks.iter().all(|chunk| chunk.ends_with('.')),
            "{chunks:?}"
        );
        let chunks = split("word ".repeat(500).leak());
        assert!(
            chunks
                .iter()
                .all(|chunk| chunk.starts_with("word") && chunk.ends_with("word"))
        );
    }

    proptest! {
        #[test]
        fn nothing_is_lost_and_no_chunk_is_too_long(text in "([a-zäß. \n]|\\PC|\n\n|[a-z]{900}|(word\\. ){90}){0,40}") {
            let chunks = split(&text);
            for chunk in &chunks {
                prop_assert!(chunk.chars().count() <= MAX_CHARS);
                prop_assert!(!chunk.is_empty() && chunk.trim() == *chunk);
            }
            let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
            prop_assert_eq!(visible(&chunks.concat()), visible(text));
        }
    }
}
