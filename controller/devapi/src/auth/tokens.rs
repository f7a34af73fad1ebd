//! Bearer tokens: the administrator's, which stays, and those of service accounts, which live in memory and end.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rand::RngCore as _;
use sha2::{Digest as _, Sha256};

use super::User;
use crate::store::{Key, Store};

/// Whom tokens are for when nobody says otherwise: the API itself, as `--api-audiences` of a real server.
pub(crate) const AUDIENCE: &str = "https://kubernetes.default.svc";
/// Tokens that are kept; beyond that the one that ends first is forgotten.
const MAX_ISSUED: usize = 10_000;
/// Seconds that a token may live, as on a real server; the default is an hour.
const LIFE: std::ops::RangeInclusive<u64> = 600..=(1 << 32);
const ACCOUNTS: &str = "core/serviceaccounts";

struct Issued {
    namespace: String,
    account: String,
    uid: String,
    audiences: Vec<String>,
    expires: SystemTime,
}

pub(crate) struct Tokens {
    admin: String,
    /// By the token's SHA-256: looking one up tells a guesser nothing by its time.
    issued: Mutex<HashMap<[u8; 32], Issued>>,
}

/// What a token is asked for.
pub(crate) struct Asked<'a> {
    pub namespace: &'a str,
    pub account: &'a str,
    pub audiences: Vec<String>,
    pub seconds: u64,
}

impl Tokens {
    pub(crate) fn new(admin: String) -> Self {
        Self {
            admin,
            issued: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<[u8; 32], Issued>> {
        self.issued.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Who has this token, and for which of these audiences it is good.
    pub(crate) fn user(&self, store: &Store, token: &str, audiences: &[String]) -> Option<(User, Vec<String>)> {
        let good_for = |own: &[String]| -> Vec<String> {
            let both = audiences.iter().filter(|one| own.contains(one));
            both.cloned().collect()
        };
        // Compared by hash: a local guesser learns nothing from how long it takes.
        let hash = hash(token);
        if hash == self::hash(&self.admin) {
            let good = good_for(&[AUDIENCE.to_owned()]);
            return (!good.is_empty()).then(|| (User::admin(), good));
        }
        let issued = self.lock();
        let found = issued.get(&hash).filter(|one| one.expires > SystemTime::now())?;
        let good = good_for(&found.audiences);
        let key = Key {
            resource: ACCOUNTS.to_owned(),
            namespace: found.namespace.clone(),
            name: found.account.clone(),
        };
        // The account's end is its tokens' end.
        let account = store.get(&key)?.value();
        let is_same = account["metadata"]["uid"] == found.uid.as_str();
        (is_same && !good.is_empty()).then(|| {
            (
                User::service_account(&found.namespace, &found.account, &found.uid),
                good,
            )
        })
    }

    /// A new token of a service account, and when it ends.
    pub(crate) fn issue(&self, asked: &Asked<'_>, uid: &str) -> (String, SystemTime) {
        let mut bytes = [0; 32];
        rand::rng().fill_bytes(&mut bytes);
        let token = format!("far-sa-{}", URL_SAFE_NO_PAD.encode(bytes));
        let life = asked.seconds.clamp(*LIFE.start(), *LIFE.end());
        let now = SystemTime::now();
        let expires = now + Duration::from_secs(life);
        let mut issued = self.lock();
        issued.retain(|_, one| one.expires > now);
        if issued.len() >= MAX_ISSUED
            && let Some(first) = issued.iter().min_by_key(|(_, one)| one.expires).map(|(key, _)| *key)
        {
            issued.remove(&first);
        }
        let one = Issued {
            namespace: asked.namespace.to_owned(),
            account: asked.account.to_owned(),
            uid: uid.to_owned(),
            audiences: asked.audiences.clone(),
            expires,
        };
        issued.insert(hash(&token), one);
        (token, expires)
    }

    /// Ends every issued token now, as time does.
    pub(crate) fn expire(&self) {
        for one in self.lock().values_mut() {
            one.expires = SystemTime::UNIX_EPOCH;
        }
    }
}

fn hash(token: &str) -> [u8; 32] {
    Sha256::digest(token.as_bytes()).into()
}
