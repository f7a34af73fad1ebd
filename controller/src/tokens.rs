//! Join tokens and revocations, as small files in the state folder: any process with that folder may make a token, and
//! each token works once, also across restarts.
//!
//! A token's file is named by the token's SHA-256, so that neither the folder nor the time of a comparison tells one.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::files;

/// Longest life of a token.
pub const MAX_LIFE: Duration = Duration::from_secs(3600);
/// Most tokens that are open at a time; older ones that expired are removed first.
const MAX_OPEN: usize = 1024;
const PREFIX: &str = "far-join-";

/// Why a token was not made or not taken.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The folder.
    #[error("{operation} {path}")]
    File {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Unknown, used or expired: the caller is not told which.
    #[error("the join token is unknown, used or expired: make a new one with `far-controller token create`")]
    Refused,
    /// For another blade.
    #[error("the join token is for another blade")]
    OtherBlade,
    /// For any blade, where this one has joined before.
    #[error(
        "blade {0} has joined before: only a token of its own replaces it (`far-controller token create --blade {0}`)"
    )]
    NotBound(String),
    /// Too many are open.
    #[error("{MAX_OPEN} join tokens are open: wait until they expire")]
    TooMany,
}

#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    /// Seconds since the Unix epoch.
    expires: u64,
    blade: Option<String>,
}

/// The folder of tokens.
#[derive(Debug, Clone)]
pub struct Tokens {
    folder: PathBuf,
}

impl Tokens {
    /// Tokens of the controller with this state folder.
    #[must_use]
    pub fn new(state_dir: &Path) -> Self {
        Self {
            folder: state_dir.join("tokens"),
        }
    }

    fn error(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> TokenError {
        let path = path.to_owned();
        move |source| TokenError::File {
            operation,
            path,
            source,
        }
    }

    /// Makes a token that works once, for `blade` only where one is given.
    ///
    /// # Errors
    /// When the folder cannot be written, or too many are open.
    pub fn create(&self, blade: Option<&str>, life: Duration) -> Result<String, TokenError> {
        files::private_folder(&self.folder).map_err(Self::error("making the folder", &self.folder))?;
        if self.sweep()? >= MAX_OPEN {
            return Err(TokenError::TooMany);
        }
        let secret: [u8; 32] = rand::random();
        let token = format!("{PREFIX}{}", hex::encode(secret));
        let kept = Kept {
            expires: now() + life.min(MAX_LIFE).as_secs().max(1),
            blade: blade.map(str::to_owned),
        };
        let path = self.path(&token);
        let text = serde_json::to_vec(&kept).expect("a token is plain data");
        files::write_private(&path, &text).map_err(Self::error("writing", &path))?;
        Ok(token)
    }

    /// Whether a token would do for `blade`, which must be its own where `must_be_bound`. Nothing is used up, but what
    /// expired is removed.
    ///
    /// # Errors
    /// When it is not one for this blade, or was used, or expired.
    pub fn check(&self, token: &str, blade: &str, must_be_bound: bool) -> Result<(), TokenError> {
        if !token.starts_with(PREFIX) || token.len() != PREFIX.len() + 64 {
            return Err(TokenError::Refused);
        }
        let path = self.path(token);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(TokenError::Refused),
            Err(error) => return Err(Self::error("reading", &path)(error)),
        };
        let kept: Kept = serde_json::from_slice(&text).map_err(|_| TokenError::Refused)?;
        if kept.expires <= now() {
            // Gone already: as good.
            let _ = fs::remove_file(&path);
            return Err(TokenError::Refused);
        }
        match kept.blade {
            Some(bound) if bound != blade => Err(TokenError::OtherBlade),
            None if must_be_bound => Err(TokenError::NotBound(blade.to_owned())),
            Some(_) | None => Ok(()),
        }
    }

    /// Uses a token up for `blade`. Removing its file is what makes it used: of two callers one wins.
    ///
    /// # Errors
    /// As [`Tokens::check`].
    pub fn take(&self, token: &str, blade: &str, must_be_bound: bool) -> Result<(), TokenError> {
        self.check(token, blade, must_be_bound)?;
        let path = self.path(token);
        match fs::remove_file(&path) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(TokenError::Refused),
            Err(error) => Err(Self::error("removing", &path)(error)),
        }
    }

    /// How long a token can still be used, by the same clock that decides about it; `None`: not at all.
    pub(crate) fn left(&self, token: &str) -> Option<Duration> {
        let kept: Kept = serde_json::from_slice(&fs::read(self.path(token)).ok()?).ok()?;
        kept.expires.checked_sub(now()).map(Duration::from_secs)
    }

    /// Withdraws a token that was not used.
    pub(crate) fn withdraw(&self, token: &str) {
        // Already used or swept: then it is gone, which is what was wanted.
        let _ = fs::remove_file(self.path(token));
    }

    /// Removes what expired; answers how many are open.
    fn sweep(&self) -> Result<usize, TokenError> {
        let mut open = 0;
        for entry in fs::read_dir(&self.folder).map_err(Self::error("reading", &self.folder))? {
            let path = entry.map_err(Self::error("reading", &self.folder))?.path();
            let kept = fs::read(&path)
                .ok()
                .and_then(|text| serde_json::from_slice::<Kept>(&text).ok());
            if kept.is_some_and(|kept| kept.expires > now()) {
                open += 1;
            } else {
                let _ = fs::remove_file(&path);
            }
        }
        Ok(open)
    }

    fn path(&self, token: &str) -> PathBuf {
        self.folder.join(hex::encode(Sha256::digest(token.as_bytes())))
    }
}

/// Serials in hex, and when each certificate ends (Unix time).
type Noted = Vec<(String, u64)>;

/// Serial numbers of certificates that must not be accepted any more.
#[derive(Debug, Clone)]
pub struct Revocations {
    folder: PathBuf,
}

impl Revocations {
    /// Revocations of the controller with this state folder.
    #[must_use]
    pub fn new(state_dir: &Path) -> Self {
        Self {
            folder: state_dir.join("certificates"),
        }
    }

    /// Notes a serial of a blade and when it ends (Unix time); those before it stay noted until they end, or a certificate
    /// could outlive its blade's revocation. One caller at a time.
    pub(crate) fn note(&self, blade: &str, serial: &str, ends: u64) -> io::Result<()> {
        files::private_folder(&self.folder)?;
        let (mut serials, ended) = self.serials(blade);
        for (serial, _) in ended {
            // Refused for its age from now on: the mark has done its work.
            let _ = fs::remove_file(self.folder.join(format!("{serial}.revoked")));
        }
        serials.push((serial.to_owned(), ends));
        let lines: String = serials
            .iter()
            .map(|(serial, ends)| format!("{serial} {ends}\n"))
            .collect();
        files::write_private(&self.folder.join(format!("{blade}.serials")), lines.as_bytes())
    }

    /// The blade's certificates that have not ended. A line without an end never does.
    pub(crate) fn valid(&self, blade: &str) -> Noted {
        self.serials(blade).0
    }

    /// Those that are valid, and those that ended since the last note.
    fn serials(&self, blade: &str) -> (Noted, Noted) {
        let text = fs::read_to_string(self.folder.join(format!("{blade}.serials"))).unwrap_or_default();
        let lines = text.lines().map(|line| match line.split_once(' ') {
            Some((serial, ends)) => (serial.to_owned(), ends.parse().unwrap_or(u64::MAX)),
            None => (line.to_owned(), u64::MAX),
        });
        lines.partition(|(_, ends)| *ends > now())
    }

    /// Named unlike a serial's mark, as a blade may be called what a serial looks like.
    fn marker(&self, blade: &str) -> PathBuf {
        self.folder.join(format!("{blade}.blade-revoked"))
    }

    /// The blade was revoked and has not joined since: it is not to be called either.
    pub(crate) fn is_blade_revoked(&self, blade: &str) -> bool {
        self.marker(blade).exists()
    }

    /// The blade joined: it is trusted again.
    pub(crate) fn welcome(&self, blade: &str) -> io::Result<()> {
        match fs::remove_file(self.marker(blade)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// Whether a blade of this name ever joined.
    pub(crate) fn knows(&self, blade: &str) -> bool {
        self.folder.join(format!("{blade}.serials")).exists()
    }

    /// Refuses every certificate that `blade` has from now on, and calls it no more until it joins again; answers how many
    /// certificates those are.
    ///
    /// # Errors
    /// When the folder cannot be read or written.
    pub fn revoke(&self, blade: &str) -> io::Result<usize> {
        if !self.knows(blade) {
            return Ok(0);
        }
        // First: from now on it gets no new one.
        files::write_private(&self.marker(blade), b"")?;
        let serials = self.valid(blade);
        for (serial, _) in &serials {
            files::write_private(&self.folder.join(format!("{serial}.revoked")), b"")?;
        }
        Ok(serials.len())
    }

    /// Whether a certificate was revoked.
    pub(crate) fn is_revoked(&self, serial: &str) -> bool {
        self.folder.join(format!("{serial}.revoked")).exists()
    }
}

fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_works_once_and_only_for_its_blade() {
        let folder = tempfile::tempdir().unwrap();
        let tokens = Tokens::new(folder.path());
        let token = tokens.create(Some("b1"), MAX_LIFE).unwrap();
        assert!(matches!(tokens.take(&token, "b2", false), Err(TokenError::OtherBlade)));
        tokens.take(&token, "b1", true).unwrap();
        assert!(matches!(tokens.take(&token, "b1", true), Err(TokenError::Refused)));
        let open = tokens.create(None, MAX_LIFE).unwrap();
        assert!(matches!(tokens.take(&open, "b1", true), Err(TokenError::NotBound(_))));
        tokens.take(&open, "any", false).unwrap();
    }

    #[test]
    fn unknown_and_expired_tokens_are_refused_alike() {
        let folder = tempfile::tempdir().unwrap();
        let tokens = Tokens::new(folder.path());
        let token = tokens.create(None, MAX_LIFE).unwrap();
        let path = tokens.path(&token);
        fs::write(
            &path,
            serde_json::to_vec(&Kept {
                expires: now() - 1,
                blade: None,
            })
            .unwrap(),
        )
        .unwrap();
        for bad in [
            token.as_str(),
            "",
            "far-join-",
            "../../x",
            &format!("{PREFIX}{}", "0".repeat(64)),
        ] {
            assert!(
                matches!(tokens.take(bad, "b", false), Err(TokenError::Refused)),
                "{bad}"
            );
        }
        assert!(!path.exists(), "an expired token is removed when it is shown");
    }

    #[test]
    fn what_is_left_of_a_token_ends_with_its_use_and_its_time() {
        let folder = tempfile::tempdir().unwrap();
        let tokens = Tokens::new(folder.path());
        let token = tokens.create(None, MAX_LIFE).unwrap();
        assert!(tokens.left(&token).unwrap() > MAX_LIFE / 2);
        tokens.take(&token, "b1", false).unwrap();
        assert_eq!(tokens.left(&token), None, "used");
        let slept = serde_json::to_vec(&Kept {
            expires: now() - 1,
            blade: None,
        });
        fs::write(tokens.path(&token), slept.unwrap()).unwrap();
        assert_eq!(tokens.left(&token), None, "over, whatever the machine did meanwhile");
    }

    #[test]
    fn a_life_is_an_hour_at_most_and_what_expired_is_swept() {
        let folder = tempfile::tempdir().unwrap();
        let tokens = Tokens::new(folder.path());
        let token = tokens.create(None, Duration::from_secs(1_000_000)).unwrap();
        let kept: Kept = serde_json::from_slice(&fs::read(tokens.path(&token)).unwrap()).unwrap();
        assert!(kept.expires <= now() + MAX_LIFE.as_secs());
        fs::write(
            tokens.path("old"),
            serde_json::to_vec(&Kept {
                expires: 1,
                blade: None,
            })
            .unwrap(),
        )
        .unwrap();
        assert_eq!(tokens.sweep().unwrap(), 1);
    }

    #[test]
    fn revoking_refuses_the_certificates_a_blade_has_and_not_later_ones() {
        let folder = tempfile::tempdir().unwrap();
        let revocations = Revocations::new(folder.path());
        revocations.note("b", "00", now() - 1).unwrap();
        revocations.note("b", "01", now() + 1000).unwrap();
        revocations.note("b", "02", now() + 1000).unwrap();
        assert_eq!(revocations.revoke("b").unwrap(), 2);
        revocations.note("b", "03", now() + 1000).unwrap();
        assert!(revocations.is_revoked("01") && revocations.is_revoked("02") && !revocations.is_revoked("03"));
        assert!(revocations.is_blade_revoked("b"), "also as a server");
        revocations.welcome("b").unwrap();
        revocations.welcome("b").unwrap();
        assert!(!revocations.is_blade_revoked("b"));
        assert_eq!(revocations.revoke("nobody").unwrap(), 0);
        assert!(!revocations.is_blade_revoked("nobody"));
    }
}
