//! The controller's own certificate authority: a P-256 key that never leaves the state folder.
//!
//! Names: the controller is `controller.far.internal` as server and as client; a blade is `<blade>.blade.far.internal`,
//! and exactly that one name makes it this blade. Only the public key is taken from a request, nothing else.

use std::{
    collections::BTreeSet,
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType, SerialNumber,
};
use time::OffsetDateTime;
use x509_parser::prelude::{ASN1Time, FromDer, GeneralName, X509Certificate};

use crate::files;

/// Name in the controller's certificate.
pub(crate) const CONTROLLER_NAME: &str = "controller.far.internal";
/// Ending of blades' names.
const BLADE_ZONE: &str = ".blade.far.internal";
/// Life of the CA: as long as an installation; a new CA means that every blade joins again.
const CA_LIFE: Duration = Duration::from_secs(10 * 365 * 86_400);
/// Life of the controller's own certificate; made anew at every start.
const CONTROLLER_LIFE: Duration = Duration::from_secs(365 * 86_400);
/// Certificates begin this much in the past at most: clocks differ.
const BACKDATE: Duration = Duration::from_secs(60);
/// Longest certificate request that is looked at, bytes; a P-256 one has about 500.
const MAX_CSR: usize = 16 * 1024;

/// What went wrong with keys and certificates.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CaError {
    /// A file of the CA.
    #[error("{operation} {path}")]
    File {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// rcgen refused.
    #[error("{operation}")]
    Make {
        /// What was tried.
        operation: &'static str,
        /// Why not.
        source: rcgen::Error,
    },
    /// The request is not one for this blade.
    #[error("the certificate request is refused: {0}")]
    Request(String),
}

/// The authority.
pub(crate) struct Ca {
    issuer: Issuer<'static, KeyPair>,
    certificate_pem: String,
}

impl std::fmt::Debug for Ca {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ca").finish_non_exhaustive()
    }
}

/// A certificate with what the caller wants to know of it.
#[derive(Debug, Clone)]
pub(crate) struct Issued {
    pub(crate) certificate_pem: String,
    pub(crate) not_after: OffsetDateTime,
    /// Hex.
    pub(crate) serial: String,
}

/// Certificate and key of the controller itself.
pub(crate) struct OwnIdentity {
    pub(crate) certificate_pem: String,
    pub(crate) key_pem: String,
}

impl Ca {
    /// The CA kept in `folder`, made there when there is none.
    pub(crate) fn load_or_make(folder: &Path) -> Result<Self, CaError> {
        let file = |operation, path: &Path| {
            let path = path.to_owned();
            move |source| CaError::File {
                operation,
                path,
                source,
            }
        };
        files::private_folder(folder).map_err(file("making the folder", folder))?;
        let (key_path, certificate_path) = (folder.join("ca-key.pem"), folder.join("ca-certificate.pem"));
        match (fs::read_to_string(&key_path), fs::read_to_string(&certificate_path)) {
            (Ok(key), Ok(certificate)) => return Self::read(&key, certificate),
            (Err(error), _) if error.kind() != io::ErrorKind::NotFound => {
                return Err(file("reading", &key_path)(error));
            }
            (_, Err(error)) if error.kind() != io::ErrorKind::NotFound => {
                return Err(file("reading", &certificate_path)(error));
            }
            // Key first, certificate last: a crash in between leaves a key that nobody knows yet.
            (Ok(_) | Err(_), Ok(_) | Err(_)) => {}
        }
        let (key, certificate) = Self::make()?;
        files::write_private(&key_path, key.as_bytes()).map_err(file("writing", &key_path))?;
        files::write_private(&certificate_path, certificate.as_bytes()).map_err(file("writing", &certificate_path))?;
        Self::read(&key, certificate)
    }

    fn make() -> Result<(String, String), CaError> {
        let operation = "making the CA";
        let make = |source| CaError::Make { operation, source };
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(make)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = name("FAR controller CA");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let _ = live(&mut params, CA_LIFE);
        let certificate = params.self_signed(&key).map_err(make)?;
        Ok((key.serialize_pem(), certificate.pem()))
    }

    fn read(key: &str, certificate_pem: String) -> Result<Self, CaError> {
        let read = |source| CaError::Make {
            operation: "reading the CA",
            source,
        };
        let key = KeyPair::from_pem(key).map_err(read)?;
        let issuer = Issuer::from_ca_cert_pem(&certificate_pem, key).map_err(read)?;
        Ok(Self {
            issuer,
            certificate_pem,
        })
    }

    /// Whom to trust.
    pub(crate) fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// A new key and certificate for the controller, as server and as client.
    pub(crate) fn own_identity(&self, further_names: &[String]) -> Result<OwnIdentity, CaError> {
        let make = |source| CaError::Make {
            operation: "making the controller's certificate",
            source,
        };
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(make)?;
        let mut names: BTreeSet<String> = further_names.iter().cloned().collect();
        names.extend([CONTROLLER_NAME, "localhost", "127.0.0.1", "::1"].map(str::to_owned));
        let mut params = CertificateParams::new(names.into_iter().collect::<Vec<_>>()).map_err(make)?;
        params.distinguished_name = name(CONTROLLER_NAME);
        leaf(&mut params);
        let _ = live(&mut params, CONTROLLER_LIFE);
        let certificate = params.signed_by(&key, &self.issuer).map_err(make)?;
        Ok(OwnIdentity {
            certificate_pem: certificate.pem(),
            key_pem: key.serialize_pem(),
        })
    }

    /// Signs the key of a request as `blade`. Nothing of the request but the key is taken over.
    pub(crate) fn sign_blade(&self, blade: &str, csr_pem: &str, life: Duration) -> Result<Issued, CaError> {
        let mut request = check_request(blade, csr_pem)?;
        let alternative_names = std::mem::take(&mut request.params.subject_alt_names);
        let mut params = CertificateParams::default();
        params.subject_alt_names = alternative_names;
        params.distinguished_name = name(blade);
        leaf(&mut params);
        let not_after = live(&mut params, life);
        let serial: [u8; 16] = rand::random();
        // RFC 5280 section 4.1.2.2: positive, at most 20 bytes.
        let serial = [&[0x40 | (serial[0] & 0x3f)], &serial[1..]].concat();
        params.serial_number = Some(SerialNumber::from_slice(&serial));
        request.params = params;
        let certificate = request.signed_by(&self.issuer).map_err(|source| CaError::Make {
            operation: "signing a blade's certificate",
            source,
        })?;
        Ok(Issued {
            certificate_pem: certificate.pem(),
            not_after,
            serial: hex::encode(serial),
        })
    }
}

/// Reads a request for `blade`: its signature and names are checked.
pub(crate) fn check_request(blade: &str, csr_pem: &str) -> Result<CertificateSigningRequestParams, CaError> {
    if csr_pem.len() > MAX_CSR {
        return Err(CaError::Request(format!("it is longer than {MAX_CSR} bytes")));
    }
    let request = CertificateSigningRequestParams::from_pem(csr_pem)
        .map_err(|error| CaError::Request(format!("it cannot be read ({error})")))?;
    let full = format!("{blade}{BLADE_ZONE}");
    let named: Vec<String> = request.params.subject_alt_names.iter().map(san_text).collect();
    if named != [full.clone()] {
        return Err(CaError::Request(format!("it must name exactly {full}, not {named:?}")));
    }
    if let Some(common) = request.params.distinguished_name.get(&DnType::CommonName) {
        let common = dn_text(common);
        if common != blade && common != full {
            return Err(CaError::Request(format!(
                "its common name must be {blade}, not {common:?}"
            )));
        }
    }
    Ok(request)
}

/// The server's name of a blade.
pub(crate) fn blade_server_name(blade: &str) -> String {
    format!("{blade}{BLADE_ZONE}")
}

/// Who a peer is, from its verified certificate: (blade, serial in hex). `None`: not a blade's, or it ended: TLS looks at
/// the age once, and a connection outlives the mark of a revoked certificate.
pub(crate) fn blade_of(der: &[u8]) -> Option<(String, String)> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    if certificate.validity().not_after <= ASN1Time::now() {
        return None;
    }
    let names = certificate.subject_alternative_name().ok()??;
    let [GeneralName::DNSName(name)] = names.value.general_names.as_slice() else {
        return None;
    };
    let blade = name.strip_suffix(BLADE_ZONE)?;
    far_core::identity::is_blade_name(blade).then(|| (blade.to_owned(), hex::encode(certificate.raw_serial())))
}

fn name(common: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common);
    name
}

fn leaf(params: &mut CertificateParams) {
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
}

fn live(params: &mut CertificateParams, life: Duration) -> OffsetDateTime {
    let now = OffsetDateTime::now_utc();
    params.not_before = now - BACKDATE.min(life / 10);
    params.not_after = now + life;
    params.not_after
}

fn san_text(name: &SanType) -> String {
    match name {
        SanType::DnsName(name) | SanType::URI(name) | SanType::Rfc822Name(name) => name.to_string(),
        SanType::IpAddress(IpAddr::V4(address)) => address.to_string(),
        SanType::IpAddress(IpAddr::V6(address)) => address.to_string(),
        _ => "another kind of name".to_owned(),
    }
}

fn dn_text(value: &rcgen::DnValue) -> String {
    match value {
        rcgen::DnValue::PrintableString(text) => text.to_string(),
        rcgen::DnValue::Utf8String(text) => text.clone(),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(names: Vec<String>, common: &str) -> String {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name = name(common);
        params.serialize_request(&key).unwrap().pem().unwrap()
    }

    #[test]
    fn a_ca_is_read_back_and_its_key_is_private() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let first = Ca::load_or_make(&folder.path().join("ca")).unwrap();
        let second = Ca::load_or_make(&folder.path().join("ca")).unwrap();
        assert_eq!(first.certificate_pem(), second.certificate_pem());
        let mode = fs::metadata(folder.path().join("ca/ca-key.pem"))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn a_blade_gets_a_certificate_for_its_own_name_only() {
        let folder = tempfile::tempdir().unwrap();
        let ca = Ca::load_or_make(folder.path()).unwrap();
        let life = Duration::from_secs(3600);
        let good = ca
            .sign_blade("b1", &request(vec!["b1.blade.far.internal".into()], "b1"), life)
            .unwrap();
        let der = x509_parser::pem::parse_x509_pem(good.certificate_pem.as_bytes())
            .unwrap()
            .1
            .contents;
        assert_eq!(blade_of(&der), Some(("b1".to_owned(), good.serial)));
        for (why, names, common) in [
            ("another blade", vec!["b2.blade.far.internal".to_owned()], "b1"),
            ("another common name", vec!["b1.blade.far.internal".to_owned()], "b2"),
            (
                "the controller too",
                vec!["b1.blade.far.internal".to_owned(), CONTROLLER_NAME.to_owned()],
                "b1",
            ),
            ("no name", vec![], "b1"),
            ("an address", vec!["127.0.0.1".to_owned()], "b1"),
        ] {
            assert!(
                matches!(
                    ca.sign_blade("b1", &request(names, common), life),
                    Err(CaError::Request(_))
                ),
                "{why}"
            );
        }
        assert!(matches!(
            ca.sign_blade("b1", "nonsense", life),
            Err(CaError::Request(_))
        ));
    }

    #[test]
    fn who_has_a_certificate_that_ended_is_nobody_any_more() {
        let folder = tempfile::tempdir().unwrap();
        let ca = Ca::load_or_make(folder.path()).unwrap();
        let request = request(vec!["b1.blade.far.internal".into()], "b1");
        let ended = ca.sign_blade("b1", &request, Duration::ZERO).unwrap();
        let der = x509_parser::pem::parse_x509_pem(ended.certificate_pem.as_bytes());
        assert_eq!(blade_of(&der.unwrap().1.contents), None);
    }

    #[test]
    fn the_controller_is_no_blade() {
        let folder = tempfile::tempdir().unwrap();
        let ca = Ca::load_or_make(folder.path()).unwrap();
        let own = ca.own_identity(&[]).unwrap();
        let der = x509_parser::pem::parse_x509_pem(own.certificate_pem.as_bytes())
            .unwrap()
            .1
            .contents;
        assert_eq!(blade_of(&der), None);
    }
}
