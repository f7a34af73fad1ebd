//! Identity of a boot and the names made from it.
//!
//! `(uid, attempt)` is the identity everywhere; the VmId is short because socket paths hold 107 bytes.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fmt;

/// The n-th boot of one FarAgent.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct AttemptKey {
    /// metadata.uid of the FarAgent, 1 to 64 bytes of `[A-Za-z0-9-]`.
    pub uid: String,
    /// 1 and up.
    pub attempt: u32,
}

impl fmt::Display for AttemptKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.uid, self.attempt)
    }
}

/// Name of one microVM on one blade: `fa-` + 12 hex digits of SHA-256(uid) + `-` + attempt; at most 26 bytes.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct VmId(String);

impl VmId {
    /// The name of this attempt's VM.
    #[must_use]
    pub fn of(key: &AttemptKey) -> Self {
        let digest = hex::encode(Sha256::digest(key.uid.as_bytes()));
        Self(format!("fa-{}-{}", &digest[..12], key.attempt))
    }

    /// The name, if `text` has the form of a VmId: what a scan of folders may treat as ours.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (digest, attempt) = text.strip_prefix("fa-")?.split_once('-')?;
        let is_digest = digest.len() == 12 && digest.bytes().all(|b| b.is_ascii_hexdigit() && !b.is_ascii_uppercase());
        let is_attempt =
            attempt.parse::<u32>().is_ok_and(|n| n > 0) && attempt.len() <= 10 && !attempt.starts_with(['0', '+']);
        (is_digest && is_attempt).then(|| Self(text.to_owned()))
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// True for a DNS-1123 label: 1 to 63 bytes of `[a-z0-9-]`, not starting or ending with `-`.
#[must_use]
pub fn is_dns_label(text: &str) -> bool {
    (1..=63).contains(&text.len())
        && text
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !text.starts_with('-')
        && !text.ends_with('-')
}

/// Makes a DNS-1123 label of any text, for guest and blade names; `fallback` where nothing usable is left.
#[must_use]
pub fn to_dns_label(text: &str, fallback: &str) -> String {
    let cleaned: String = text
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() {
                c.to_ascii_lowercase()
            } else {
                '-'
            }
        })
        .collect();
    let label = cleaned.trim_matches('-');
    let label = label[..label.len().min(63)].trim_end_matches('-');
    if label.is_empty() {
        fallback.to_owned()
    } else {
        label.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key(uid: &str, attempt: u32) -> AttemptKey {
        AttemptKey {
            uid: uid.to_owned(),
            attempt,
        }
    }

    #[test]
    fn the_longest_vm_id_is_26_bytes_and_reads_back() {
        let id = VmId::of(&key(&"a".repeat(64), u32::MAX));
        assert_eq!(id.as_str().len(), 26);
        assert_eq!(VmId::parse(id.as_str()), Some(id));
    }

    #[test]
    fn names_that_are_not_ours_are_not_parsed() {
        for text in [
            "",
            "fa-",
            "fa-3f1c0a9b77de",
            "fa-3f1c0a9b77de-0",
            "fa-3f1c0a9b77de-01",
            "fa-3f1c0a9b77de-+1",
            "fa-3F1C0A9B77DE-1",
            "fa-3f1c0a9b77d-1",
            "../fa-3f1c0a9b77de-1",
            "fa-3f1c0a9b77de-1/..",
        ] {
            assert_eq!(VmId::parse(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_becomes_a_dns_label(text in any::<String>()) {
            let label = to_dns_label(&text, "far");
            prop_assert!(is_dns_label(&label), "{}", label);
        }
    }
}
