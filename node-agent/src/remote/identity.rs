//! The blade's key, certificate and whom it trusts: one file, mode 0600, replaced as a whole.

use crate::files::{read_if_there, write_atomic};
use anyhow::{Context, Result, bail};
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, PKCS_ECDSA_P256_SHA256, PublicKeyData};
use serde::{Deserialize, Serialize};
use std::{
    fmt,
    path::PathBuf,
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use x509_parser::pem::Pem;

/// A certificate with its key.
#[derive(Clone)]
pub(super) struct Identity {
    pub(super) key_pem: String,
    pub(super) certificate_pem: String,
    pub(super) ca_pem: String,
    pub(super) not_after: SystemTime,
    /// Half of its life is over then.
    pub(super) renew_at: SystemTime,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

/// As it is on disk.
#[derive(Serialize, Deserialize)]
struct Kept {
    key_pem: String,
    certificate_pem: String,
    ca_pem: String,
}

/// A key without certificate yet.
pub(super) struct Request {
    key: KeyPair,
    pub(super) csr_pem: String,
}

impl Request {
    /// A new P-256 key and its request for `<blade>.blade.far.internal`.
    pub(super) fn new(blade: &str) -> Result<Self> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).context("making a key")?;
        let mut params = CertificateParams::new(vec![format!("{blade}.blade.far.internal")])
            .context("making a certificate request")?;
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, blade);
        let csr_pem = params
            .serialize_request(&key)
            .and_then(|csr| csr.pem())
            .context("making a certificate request")?;
        Ok(Self { key, csr_pem })
    }

    /// Checks the answer: the certificate must be for this key.
    pub(super) fn answered(self, certificate_pem: String, ca_pem: String) -> Result<Identity> {
        let identity = Identity::read(Kept {
            key_pem: self.key.serialize_pem(),
            certificate_pem,
            ca_pem,
        })?;
        Ok(identity)
    }
}

impl Identity {
    fn read(kept: Kept) -> Result<Self> {
        let leaf = first_pem(&kept.certificate_pem).context("reading the blade's certificate")?;
        let certificate = leaf.parse_x509().context("reading the blade's certificate")?;
        let key = KeyPair::from_pem(&kept.key_pem).context("reading the blade's key")?;
        if certificate.public_key().raw != key.subject_public_key_info() {
            bail!("the blade's certificate is for another key");
        }
        first_pem(&kept.ca_pem).context("reading the controller's CA")?;
        let at = |seconds: i64| UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
        let validity = certificate.validity();
        let (not_before, not_after) = (at(validity.not_before.timestamp()), at(validity.not_after.timestamp()));
        let life = not_after.duration_since(not_before).unwrap_or_default();
        Ok(Self {
            key_pem: kept.key_pem,
            certificate_pem: kept.certificate_pem,
            ca_pem: kept.ca_pem,
            not_after,
            renew_at: not_before + life / 2,
        })
    }
}

fn first_pem(text: &str) -> Result<Pem> {
    Pem::iter_from_buffer(text.as_bytes())
        .next()
        .context("no PEM block")?
        .context("a broken PEM block")
}

/// Where the identity is kept.
#[derive(Debug)]
pub(super) struct IdentityFile(PathBuf);

impl IdentityFile {
    pub(super) fn new(path: PathBuf) -> Self {
        Self(path)
    }

    /// The identity that is kept; `None` where there is none. One that cannot be read is an error: a new join would
    /// need a new token anyway.
    pub(super) fn load(&self) -> Result<Option<Identity>> {
        let Some(bytes) = read_if_there(&self.0).with_context(|| format!("reading {}", self.0.display()))? else {
            return Ok(None);
        };
        let kept: Kept = serde_json::from_slice(&bytes).with_context(|| format!("reading {}", self.0.display()))?;
        Identity::read(kept).map(Some)
    }

    /// Keeps an identity, in place of the one before.
    pub(super) fn keep(&self, identity: &Identity) -> Result<()> {
        let kept = Kept {
            key_pem: identity.key_pem.clone(),
            certificate_pem: identity.certificate_pem.clone(),
            ca_pem: identity.ca_pem.clone(),
        };
        let bytes = serde_json::to_vec(&kept).context("an identity is plain data")?;
        write_atomic(&self.0, &bytes).with_context(|| format!("writing {}", self.0.display()))
    }
}
