//! Names of one boot. The identity is (uid, attempt); the VM's id is derived from it and never reused.

use sha2::{Digest, Sha256};

/// `fa-` + first 12 hex digits of SHA-256(uid) + `-` + attempt; at most 26 bytes (ARCHITECTURE.md, "Names").
#[must_use]
pub fn vm_id(uid: &str, attempt: u32) -> String {
    let digest = hex::encode(Sha256::digest(uid.as_bytes()));
    format!("fa-{}-{attempt}", &digest[..12])
}

/// Whether `name` can be a blade's name: a DNS-1123 label of 1 to 63 bytes (RFC 1123 section 2.1).
#[must_use]
pub fn is_blade_name(name: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    (1..=63).contains(&name.len())
        && name.bytes().all(|byte| inner(byte) || byte == b'-')
        && name.bytes().next().is_some_and(inner)
        && name.bytes().last().is_some_and(inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_vm_id_depends_on_uid_and_attempt_and_stays_short() {
        let id = vm_id("0b0cbb0c-6d0f-4d3b-8f57-3f6c55d3a3f1", 1);
        assert!(id.starts_with("fa-") && id.ends_with("-1"), "{id}");
        assert_ne!(id, vm_id("0b0cbb0c-6d0f-4d3b-8f57-3f6c55d3a3f1", 2));
        assert_ne!(id, vm_id("0b0cbb0c-6d0f-4d3b-8f57-3f6c55d3a3f2", 1));
        assert!(vm_id("x", u32::MAX).len() <= 26);
    }

    #[test]
    fn blade_names_are_dns_labels() {
        for good in ["a", "blade-7", "7", &"x".repeat(63)] {
            assert!(is_blade_name(good), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a.b", "a_b", "a/b", "ä", &"x".repeat(64)] {
            assert!(!is_blade_name(bad), "{bad}");
        }
    }
}
