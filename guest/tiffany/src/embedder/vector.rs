//! A text as a vector of [`DIMENSIONS`] numbers with length 1. Pure and exact: the same text gives the same bits
//! everywhere.
//!
//! Feature hashing (Weinberger et al., 2009): every word and every trigram of a word's characters is hashed to a dimension
//! and a sign; its weight is the square root of how often it occurs. Only +, *, / and sqrt are used, which IEEE 754
//! defines to the bit.

use std::collections::BTreeMap;

/// Numbers per vector.
pub(crate) const DIMENSIONS: usize = 384;
/// A word says more than each of its trigrams.
const WORD_WEIGHT: f64 = 1.0;
const TRIGRAM_WEIGHT: f64 = 0.5;

/// The vector of a text that is not blank. Its length is 1.
pub(crate) fn embed(text: &str) -> [f64; DIMENSIONS] {
    let mut vector = [0.0; DIMENSIONS];
    // Sorted, so that sums are always taken in the same order.
    for ((kind, feature), count) in features(text) {
        let hash = fnv1a(kind, &feature);
        let sign = if hash >> 63 == 0 { 1.0 } else { -1.0 };
        let weight = if kind == b'w' { WORD_WEIGHT } else { TRIGRAM_WEIGHT };
        vector[dimension(hash)] += sign * weight * f64::from(count).sqrt();
    }
    if vector.iter().all(|&value| value == 0.0) {
        // No word at all, or features that cancel each other: the text as a whole is its only feature.
        vector[dimension(fnv1a(b'x', text))] = 1.0;
    }
    let length = vector.iter().map(|value| value * value).sum::<f64>().sqrt();
    vector.map(|value| value / length)
}

/// Six decimals: enough to tell vectors apart, and short, because the output travels over the log stream.
pub(crate) fn rounded(value: f64) -> f64 {
    let rounded = (value * 1e6).round() / 1e6;
    // No "-0" in the output.
    if rounded == 0.0 { 0.0 } else { rounded }
}

/// How often each word (`w`) and each trigram (`t`) occurs. Words are runs of letters and digits, in lower case; trigrams
/// see a word's borders as `^` and `$`.
fn features(text: &str) -> BTreeMap<(u8, String), u32> {
    let mut counts = BTreeMap::new();
    let mut add = |kind, feature| *counts.entry((kind, feature)).or_insert(0_u32) += 1;
    for word in text
        .split(|c: char| !c.is_alphanumeric())
        .filter(|word| !word.is_empty())
    {
        let word = word.to_lowercase();
        let letters: Vec<char> = std::iter::once('^')
            .chain(word.chars())
            .chain(std::iter::once('$'))
            .collect();
        letters
            .windows(3)
            .for_each(|trigram| add(b't', trigram.iter().collect()));
        add(b'w', word);
    }
    counts
}

/// FNV-1a, 64 bit (draft-eastlake-fnv), over the kind and the feature's UTF-8 bytes.
fn fnv1a(kind: u8, feature: &str) -> u64 {
    std::iter::once(kind)
        .chain(feature.bytes())
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        })
}

/// The upper half folded in, because FNV's lower bits mix less.
fn dimension(hash: u64) -> usize {
    let folded = (hash ^ (hash >> 32)) & 0xffff_ffff;
    usize::try_from(folded).unwrap_or(0) % DIMENSIONS
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn cosine(a: &str, b: &str) -> f64 {
        embed(a).iter().zip(embed(b)).map(|(x, y)| x * y).sum()
    }

    #[test]
    fn the_hash_is_fnv_1a() {
        // Test vector of the specification: "foobar".
        assert_eq!(fnv1a(b'f', "oobar"), 0x85944171f73967e8);
    }

    #[test]
    fn case_and_punctuation_do_not_count_and_related_texts_are_nearer() {
        assert_eq!(embed("Hello, World!"), embed("hello world"));
        let near = cosine("the blade boots a microVM", "a microVM boots on the blade");
        let far = cosine("the blade boots a microVM", "sourdough bread needs patience");
        assert!(near > 0.8 && far < 0.3, "{near} {far}");
    }

    #[test]
    fn numbers_are_short_and_never_minus_zero() {
        for (value, text) in [
            (0.123_456_789, "0.123457"),
            (-0.000_000_1, "0"),
            (0.5, "0.5"),
            (-1.0, "-1"),
        ] {
            assert_eq!(rounded(value).to_string(), text);
        }
    }

    proptest! {
        #[test]
        fn every_vector_has_length_one(text in "\\PC{1,200}") {
            let vector = embed(&text);
            let length = vector.iter().map(|value| value * value).sum::<f64>().sqrt();
            prop_assert!((length - 1.0).abs() < 1e-12);
            let shown = vector.iter().map(|&value| rounded(value).powi(2)).sum::<f64>().sqrt();
            prop_assert!((shown - 1.0).abs() < 1e-4);
        }
    }
}
