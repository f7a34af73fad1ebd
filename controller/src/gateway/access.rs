//! Who calls and whether they may: the Kubernetes API is asked for both, and its answers are kept for moments.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use k8s_openapi::api::{
    authentication::v1::{TokenReview, TokenReviewSpec},
    authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec},
};
use kube::{Api, Client, api::PostParams};
use sha2::{Digest, Sha256};
use tokio::sync::Semaphore;
use tonic::{Status, metadata::MetadataMap};

use super::recent::Recent;
use crate::metrics::Metrics;

/// How long the API's word on a token counts. Also how long a withdrawn token is still good here.
const KNOWN_FOR: Duration = Duration::from_secs(10);
/// How long a no counts: somebody who goes on to ask with a bad token costs the API little.
const UNKNOWN_FOR: Duration = Duration::from_secs(5);
/// How long a yes to an action counts; a no is asked again.
const ALLOWED_FOR: Duration = Duration::from_secs(5);
/// Answers of each kind that are kept.
const KEPT: usize = 4096;
/// Questions to the API at a time, and callers that may wait for their turn.
const QUESTIONS: usize = 16;
const WAITING: usize = 256;
/// A question that takes longer has failed.
const LIMIT: Duration = Duration::from_secs(10);
/// Longest token that is looked at, bytes; those of service accounts have about 1,000.
const MAX_TOKEN: usize = 16 * 1024;

/// A user as TokenReview tells of it. All of it counts: two tokens of one name may differ in groups and scopes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct User {
    pub(crate) name: String,
    uid: Option<String>,
    groups: Option<Vec<String>>,
    extra: Option<BTreeMap<String, Vec<String>>>,
}

#[cfg(test)]
impl User {
    pub(super) fn named(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            uid: None,
            groups: None,
            extra: None,
        }
    }
}

/// What a user wants to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Action {
    Logs,
    Exec,
    Copy,
    PortForward,
    Stats,
}

impl Action {
    pub(crate) const ALL: [Self; 5] = [Self::Logs, Self::Exec, Self::Copy, Self::PortForward, Self::Stats];

    /// The verb of RBAC, and the subresource of faragents.
    const fn permission(self) -> (&'static str, &'static str) {
        match self {
            Self::Logs => ("get", "log"),
            Self::Exec => ("create", "exec"),
            Self::Copy => ("create", "cp"),
            Self::PortForward => ("create", "portforward"),
            Self::Stats => ("get", "stats"),
        }
    }

    /// For metrics and the audit log.
    pub(crate) const fn label(self) -> &'static str {
        self.permission().1
    }
}

/// Which agents: empty texts are all of them.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Scope {
    pub(crate) namespace: String,
    pub(crate) name: String,
}

pub(crate) struct Access {
    client: Client,
    audiences: Vec<String>,
    known: Mutex<Recent<[u8; 32], Arc<User>>>,
    unknown: Mutex<Recent<[u8; 32], ()>>,
    allowed: Mutex<Recent<(User, Action, Scope), ()>>,
    questions: Semaphore,
    waiting: AtomicUsize,
    metrics: Metrics,
}

impl Access {
    /// With `audiences`, only tokens for one of them are taken; without, those for the API itself.
    pub(crate) fn new(client: Client, audiences: Vec<String>, metrics: Metrics) -> Self {
        Self {
            client,
            audiences,
            known: Mutex::new(Recent::new(KNOWN_FOR, KEPT)),
            unknown: Mutex::new(Recent::new(UNKNOWN_FOR, KEPT)),
            allowed: Mutex::new(Recent::new(ALLOWED_FOR, KEPT)),
            questions: Semaphore::new(QUESTIONS),
            waiting: AtomicUsize::new(0),
            metrics,
        }
    }

    /// Who calls.
    ///
    /// # Errors
    /// UNAUTHENTICATED: no token, or none that the API knows; UNAVAILABLE: the API does not say.
    pub(crate) async fn user(&self, metadata: &MetadataMap) -> Result<Arc<User>, Status> {
        let token = bearer(metadata)?;
        let hash: [u8; 32] = Sha256::digest(token.as_bytes()).into();
        let now = Instant::now();
        if let Some(user) = lock(&self.known).get(&hash, now) {
            return Ok(user);
        }
        if lock(&self.unknown).get(&hash, now).is_some() {
            return Err(unknown());
        }
        let review = TokenReview {
            spec: TokenReviewSpec {
                token: token.to_owned(),
                audiences: (!self.audiences.is_empty()).then(|| self.audiences.clone()),
            },
            ..TokenReview::default()
        };
        let api: Api<TokenReview> = Api::all(self.client.clone());
        let parameters = PostParams::default();
        let asked = self.ask("TokenReview", api.create(&parameters, &review)).await;
        self.metrics.review("token", asked.is_ok());
        let status = asked?.status.unwrap_or_default();
        let is_for_us = self.audiences.is_empty()
            || status
                .audiences
                .iter()
                .flatten()
                .any(|audience| self.audiences.contains(audience));
        match status.user.and_then(|user| Some((user.username.clone()?, user))) {
            Some((name, user)) if status.authenticated == Some(true) && is_for_us && !name.is_empty() => {
                let user = Arc::new(User {
                    name,
                    uid: user.uid,
                    groups: user.groups,
                    extra: user.extra,
                });
                lock(&self.known).put(hash, user.clone(), Instant::now());
                Ok(user)
            }
            Some(_) | None => {
                lock(&self.unknown).put(hash, (), Instant::now());
                Err(unknown())
            }
        }
    }

    /// Whether the user may.
    ///
    /// # Errors
    /// PERMISSION_DENIED: no; UNAVAILABLE: the API does not say.
    pub(crate) async fn check(&self, user: &User, action: Action, scope: &Scope) -> Result<(), Status> {
        let key = (user.clone(), action, scope.clone());
        if lock(&self.allowed).get(&key, Instant::now()).is_some() {
            return Ok(());
        }
        let (verb, subresource) = action.permission();
        let text = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        let review = SubjectAccessReview {
            spec: SubjectAccessReviewSpec {
                user: Some(user.name.clone()),
                uid: user.uid.clone(),
                groups: user.groups.clone(),
                extra: user.extra.clone(),
                resource_attributes: Some(ResourceAttributes {
                    group: Some("tiffany.dev".to_owned()),
                    version: Some("v1".to_owned()),
                    resource: Some("faragents".to_owned()),
                    subresource: Some(subresource.to_owned()),
                    verb: Some(verb.to_owned()),
                    namespace: text(&scope.namespace),
                    name: text(&scope.name),
                    ..ResourceAttributes::default()
                }),
                non_resource_attributes: None,
            },
            ..SubjectAccessReview::default()
        };
        let api: Api<SubjectAccessReview> = Api::all(self.client.clone());
        let parameters = PostParams::default();
        let asked = self.ask("SubjectAccessReview", api.create(&parameters, &review)).await;
        self.metrics.review("access", asked.is_ok());
        let status = asked?.status.unwrap_or_default();
        if status.allowed && status.denied != Some(true) {
            lock(&self.allowed).put(key, (), Instant::now());
            return Ok(());
        }
        Err(Status::permission_denied(refusal(user, verb, subresource, scope)))
    }

    async fn ask<T>(&self, what: &str, question: impl Future<Output = kube::Result<T>>) -> Result<T, Status> {
        let _waiting = Waiting::begin(&self.waiting)?;
        let asking = async {
            let _turn = self.questions.acquire().await;
            question.await
        };
        match tokio::time::timeout(LIMIT, asking).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => {
                tracing::warn!(what, %error, "the Kubernetes API does not answer for a caller of the gateway");
                Err(Status::unavailable(format!(
                    "the gateway cannot check who you are and what you may do: the Kubernetes API failed at {what} ({})",
                    crate::convert::cut(error.to_string(), 300)
                )))
            }
            Err(_) => Err(Status::unavailable(format!(
                "the gateway cannot check who you are and what you may do: the Kubernetes API did not answer {what} within {} s",
                LIMIT.as_secs()
            ))),
        }
    }
}

/// A place among those who wait for the API.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn begin(count: &'a AtomicUsize) -> Result<Self, Status> {
        let place = Self(count);
        if count.fetch_add(1, Ordering::Relaxed) >= WAITING {
            return Err(Status::resource_exhausted(
                "too many callers wait to be checked: try again in a moment",
            ));
        }
        Ok(place)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn unknown() -> Status {
    Status::unauthenticated(
        "the Kubernetes API does not know this token: it is wrong, ended, withdrawn or for another audience",
    )
}

fn bearer(metadata: &MetadataMap) -> Result<&str, Status> {
    let header = metadata.get("authorization").ok_or_else(|| {
        Status::unauthenticated("no token: send `authorization: Bearer TOKEN` with a token of the Kubernetes API")
    })?;
    let token = header
        .to_str()
        .ok()
        .and_then(|text| text.split_once(' '))
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
        .map(|(_, token)| token.trim());
    match token {
        Some(token) if (1..=MAX_TOKEN).contains(&token.len()) => Ok(token),
        Some(_) | None => Err(Status::unauthenticated(
            "the authorization metadata is not `Bearer TOKEN`",
        )),
    }
}

/// In the words of the Kubernetes API.
fn refusal(user: &User, verb: &str, subresource: &str, scope: &Scope) -> String {
    let named = if scope.name.is_empty() {
        String::new()
    } else {
        format!(" {:?}", scope.name)
    };
    let place = if scope.namespace.is_empty() {
        "at the cluster scope".to_owned()
    } else {
        format!("in the namespace {:?}", scope.namespace)
    };
    format!(
        "faragents.tiffany.dev{named} is forbidden: User {:?} cannot {verb} resource \"faragents/{subresource}\" in API group \"tiffany.dev\" {place}",
        user.name
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_bearer_token_of_a_sane_length_is_shown_to_the_api() {
        let read = |value: &str| {
            let mut metadata = MetadataMap::new();
            metadata.insert("authorization", value.parse().unwrap());
            bearer(&metadata).map(str::to_owned).ok()
        };
        assert_eq!(read("Bearer abc"), Some("abc".to_owned()));
        assert_eq!(read("bearer abc"), Some("abc".to_owned()));
        let long = format!("Bearer {}", "x".repeat(MAX_TOKEN + 1));
        for bad in ["", "Bearer", "Bearer ", "Basic abc", "abc", &long] {
            assert_eq!(read(bad), None, "{:.40}", bad);
        }
        assert!(bearer(&MetadataMap::new()).is_err());
    }

    #[test]
    fn a_refusal_reads_like_the_apis_own() {
        let user = User::named("jane");
        let scope = Scope {
            namespace: "n".into(),
            name: "a".into(),
        };
        assert_eq!(
            refusal(&user, "create", "exec", &scope),
            "faragents.tiffany.dev \"a\" is forbidden: User \"jane\" cannot create resource \"faragents/exec\" in API group \"tiffany.dev\" in the namespace \"n\""
        );
    }
}
