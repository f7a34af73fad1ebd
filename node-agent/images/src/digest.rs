//! Content digests: `sha256:` and 64 lower-case hex digits, nothing else (OCI image spec, descriptor.md).

use std::{fmt, io};

use sha2::{Digest as _, Sha256};

use crate::ImageError;

/// A checked digest.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Digest(String);

impl Digest {
    /// Reads `sha256:<hex>`.
    pub(crate) fn parse(text: &str) -> Result<Self, ImageError> {
        let hex_part = text.strip_prefix("sha256:").unwrap_or_default();
        let good = hex_part.len() == 64
            && hex_part
                .bytes()
                .all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
        if good {
            Ok(Self(text.to_owned()))
        } else {
            Err(ImageError::Archive {
                what: format!("{text:?} is no digest of the form sha256:<64 hex digits>"),
            })
        }
    }

    #[cfg(test)]
    pub(crate) fn of(bytes: &[u8]) -> Self {
        Self(format!("sha256:{}", hex::encode(Sha256::digest(bytes))))
    }

    /// The part after `sha256:`; safe as a file name, because it is hex only.
    pub(crate) fn hex(&self) -> &str {
        &self.0["sha256:".len()..]
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Hashes what passes through to `inner`.
pub(crate) struct HashingWriter<W> {
    inner: W,
    hasher: Sha256,
}

impl<W: io::Write> HashingWriter<W> {
    pub(crate) fn new(inner: W) -> Self {
        Self {
            inner,
            hasher: Sha256::new(),
        }
    }

    pub(crate) fn finish(self) -> (W, Digest) {
        (
            self.inner,
            Digest(format!("sha256:{}", hex::encode(self.hasher.finalize()))),
        )
    }
}

impl<W: io::Write> io::Write for HashingWriter<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_lower_case_sha256_is_a_digest() {
        let good = Digest::of(b"x");
        assert_eq!(Digest::parse(&good.to_string()).unwrap(), good);
        for bad in [
            "",
            "sha256:",
            "sha256:../../etc/passwd",
            "sha512:00",
            &good.to_string().to_uppercase(),
            &good.to_string()[..70],
        ] {
            assert!(Digest::parse(bad).is_err(), "{bad}");
        }
    }
}
