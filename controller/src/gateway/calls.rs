//! How many calls are open: per gateway, per user and per blade. No user takes all places, and the calls of one blade fit
//! into its connection's window, so that one whose caller does not read never holds up another.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use tonic::{Code, Status};

use super::access::{Action, Scope, User};
use crate::{links::MAX_CALLS_PER_BLADE, metrics::Metrics};

const MAX_CALLS: usize = 2048;
pub(super) const MAX_CALLS_PER_USER: usize = 256;

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Holder {
    User(String),
    Blade(String),
}

#[derive(Debug, Default)]
struct Open {
    all: usize,
    by: HashMap<Holder, usize>,
}

/// Places for calls; clones share them.
#[derive(Debug, Clone)]
pub(super) struct Calls {
    open: Arc<Mutex<Open>>,
    metrics: Metrics,
}

/// One open call. Dropped unfinished: its caller went away.
#[derive(Debug)]
pub(super) struct Call {
    calls: Calls,
    holders: [Holder; 2],
    action: Action,
    scope: Scope,
    began: Instant,
    outcome: &'static str,
}

impl Calls {
    pub(super) fn new(metrics: Metrics) -> Self {
        Self {
            open: Arc::default(),
            metrics,
        }
    }

    /// Takes a place, and writes the audit log's line.
    pub(super) fn open(&self, user: &User, action: Action, scope: &Scope, blade: &str) -> Result<Call, Status> {
        let holders = [Holder::User(user.name.clone()), Holder::Blade(blade.to_owned())];
        {
            let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
            let full = |what: &str| {
                Err(Status::resource_exhausted(format!(
                    "too many calls are open on {what}: end one, or try again later"
                )))
            };
            let count = |holder: &Holder| open.by.get(holder).copied().unwrap_or(0);
            if open.all >= MAX_CALLS {
                return full("this gateway");
            }
            if count(&holders[0]) >= MAX_CALLS_PER_USER {
                return full("your name");
            }
            if count(&holders[1]) >= MAX_CALLS_PER_BLADE {
                return full(&format!("blade {blade}"));
            }
            open.all += 1;
            for holder in &holders {
                *open.by.entry(holder.clone()).or_default() += 1;
            }
        }
        self.metrics.call_opened(action);
        tracing::info!(
            target: "far_controller::audit",
            user = user.name.as_str(),
            action = action.label(),
            agent.namespace = scope.namespace.as_str(),
            agent.name = scope.name.as_str(),
            blade,
            "a user's call is allowed"
        );
        Ok(Call {
            calls: self.clone(),
            holders,
            action,
            scope: scope.clone(),
            began: Instant::now(),
            outcome: "gone",
        })
    }
}

impl Call {
    /// It ended by itself.
    pub(super) fn ended(&mut self, code: Code) {
        self.outcome = match code {
            Code::Ok => "ok",
            Code::Unavailable | Code::Internal | Code::Unknown | Code::DeadlineExceeded | Code::DataLoss => "failed",
            _ => "refused",
        };
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let mut open = self.calls.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.all -= 1;
        for holder in &self.holders {
            let left = open.by.get_mut(holder).map(|count| {
                *count -= 1;
                *count
            });
            if left == Some(0) {
                open.by.remove(holder);
            }
        }
        drop(open);
        self.calls.metrics.call_ended(self.action, self.outcome);
        let [Holder::User(user) | Holder::Blade(user), _] = &self.holders;
        tracing::info!(
            target: "far_controller::audit",
            user = user.as_str(),
            action = self.action.label(),
            agent.namespace = self.scope.namespace.as_str(),
            agent.name = self.scope.name.as_str(),
            outcome = self.outcome,
            seconds = self.began.elapsed().as_secs(),
            "a user's call ended"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_bounded_by_user_and_blade_and_given_back() {
        let calls = Calls::new(Metrics::default());
        let user = |name: &str| User::named(name);
        let scope = Scope {
            namespace: "n".into(),
            name: "a".into(),
        };
        let open = |name: &str, blade: &str| calls.open(&user(name), Action::Exec, &scope, blade);
        let on_one: Vec<_> = (0..MAX_CALLS_PER_BLADE).map(|_| open("x", "b1").unwrap()).collect();
        assert_eq!(open("y", "b1").unwrap_err().code(), Code::ResourceExhausted);
        let more: Vec<_> = (MAX_CALLS_PER_BLADE..MAX_CALLS_PER_USER)
            .map(|_| open("x", "b2").unwrap())
            .collect();
        assert!(open("x", "b2").unwrap_err().message().contains("your name"));
        let other = open("y", "b2").unwrap();
        drop((on_one, more, other));
        let open = calls.open.lock().unwrap();
        assert_eq!((open.all, open.by.len()), (0, 0));
    }
}
