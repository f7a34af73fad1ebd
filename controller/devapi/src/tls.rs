//! The server's identity, kept in the data folder: CA, serving certificate for loopback, and the bearer token.
//!
//! The CA and the token stay the same over restarts, so that kubeconfigs stay good; the serving certificate is made
//! anew at each start.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use rand::RngCore as _;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};

/// Entropy of the token in bytes.
const TOKEN_BYTES: usize = 32;

#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("making the API's certificates")]
    Certificate(#[from] rcgen::Error),
    #[error("setting up TLS for the API")]
    Config(#[from] rustls::Error),
    #[error("reading or writing {path}")]
    File { path: PathBuf, source: std::io::Error },
}

pub(crate) struct Identity {
    pub ca_pem: String,
    pub token: String,
    pub server: Arc<rustls::ServerConfig>,
}

impl Identity {
    pub(crate) fn load_or_make(folder: &Path) -> Result<Self, TlsError> {
        let (certificate, key) = (folder.join("ca.crt"), folder.join("ca.key"));
        let (ca_pem, ca_key) = match (read(&certificate)?, read(&key)?) {
            (Some(pem), Some(key)) => (pem, KeyPair::from_pem(&key)?),
            _ => {
                let made = KeyPair::generate()?;
                let pem = ca_params()?.self_signed(&made)?.pem();
                write_private(&key, &made.serialize_pem())?;
                write_private(&certificate, &pem)?;
                (pem, made)
            }
        };
        let token_file = folder.join("token");
        let token = match read(&token_file)? {
            Some(token) if !token.trim().is_empty() => token.trim().to_owned(),
            _ => {
                let mut bytes = [0; TOKEN_BYTES];
                rand::rng().fill_bytes(&mut bytes);
                let token = URL_SAFE_NO_PAD.encode(bytes);
                write_private(&token_file, &token)?;
                token
            }
        };
        let issuer = Issuer::from_ca_cert_pem(&ca_pem, ca_key)?;
        Ok(Self {
            server: serving_config(&issuer)?,
            ca_pem,
            token,
        })
    }

    /// A kubeconfig with one context `far`.
    pub(crate) fn kubeconfig(&self, url: &str) -> String {
        let ca = STANDARD.encode(&self.ca_pem);
        let token = &self.token;
        format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: far\n\
             clusters:\n- name: far\n  cluster:\n    server: {url}\n    certificate-authority-data: {ca}\n\
             users:\n- name: far\n  user:\n    token: {token}\n\
             contexts:\n- name: far\n  context:\n    cluster: far\n    user: far\n    namespace: default\n"
        )
    }
}

fn ca_params() -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::new(Vec::<String>::new())?;
    params.distinguished_name.push(DnType::CommonName, "far-devapi CA");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![
        KeyUsagePurpose::KeyCertSign,
        KeyUsagePurpose::CrlSign,
        KeyUsagePurpose::DigitalSignature,
    ];
    Ok(params)
}

fn serving_config(issuer: &Issuer<'_, KeyPair>) -> Result<Arc<rustls::ServerConfig>, TlsError> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::new(vec!["localhost".into(), "127.0.0.1".into(), "::1".into()])?;
    params.distinguished_name.push(DnType::CommonName, "far-devapi");
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.use_authority_key_identifier_extension = true;
    let certificate = params.signed_by(&key, issuer)?;
    let private = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], private)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

fn read(path: &Path) -> Result<Option<String>, TlsError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(TlsError::File {
            path: path.to_owned(),
            source,
        }),
    }
}

/// Written beside its place and renamed, mode 0600: never half there, never readable by others.
pub(crate) fn write_private(path: &Path, text: &str) -> Result<(), TlsError> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(format!(".{}.tmp", std::process::id()));
    let beside = PathBuf::from(beside);
    let write = || -> std::io::Result<()> {
        let _ = fs::remove_file(&beside); // A left-over of a crash may have another mode.
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&beside)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&beside, path)
    };
    write().map_err(|source| TlsError::File {
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_and_ca_survive_a_restart_and_are_private() {
        use std::os::unix::fs::PermissionsExt as _;
        let folder = tempfile::tempdir().unwrap();
        let first = Identity::load_or_make(folder.path()).unwrap();
        let second = Identity::load_or_make(folder.path()).unwrap();
        assert_eq!((first.ca_pem, first.token), (second.ca_pem, second.token));
        for file in ["ca.key", "token"] {
            assert_eq!(
                fs::metadata(folder.path().join(file)).unwrap().permissions().mode() & 0o777,
                0o600
            );
        }
    }
}
