//! From the agent that a caller names to the blade and the attempt, by what the API and the controller know: nothing that
//! the caller says about either is believed.

use far_api::FarAgent;
use far_core::status::Status as AgentStatus;
use far_proto::node::Identity;
use kube::{Api, Client, ResourceExt};
use tonic::Status;

use super::access::{Action, Scope};
use crate::convert;

/// Which boot on which blade.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Seat {
    pub(super) identity: Identity,
    pub(super) blade: String,
}

/// The scope that an identity names; both parts become parts of a path.
pub(super) fn scope(identity: Option<&Identity>) -> Result<Scope, Status> {
    let none = Identity::default();
    let identity = identity.unwrap_or(&none);
    for (field, text) in [("namespace", &identity.namespace), ("name", &identity.name)] {
        // RFC 1123 subdomains, as the API has them.
        let is_name = text.len() <= 253
            && text
                .bytes()
                .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-' || byte == b'.')
            && !text.starts_with('.')
            && !text.contains("..");
        if !is_name {
            return Err(Status::invalid_argument(format!(
                "identity.{field}: {text:?} is no name"
            )));
        }
    }
    Ok(Scope {
        namespace: identity.namespace.clone(),
        name: identity.name.clone(),
    })
}

pub(super) async fn seat(client: &Client, action: Action, scope: &Scope, asked: &Identity) -> Result<Seat, Status> {
    let api: Api<FarAgent> = Api::namespaced(client.clone(), &scope.namespace);
    let agent = api.get_opt(&scope.name).await.map_err(|error| {
        tracing::warn!(%error, "an agent could not be read for a caller of the gateway");
        Status::unavailable("the Kubernetes API does not tell of the agent now: try again")
    })?;
    let Some(agent) = agent else {
        return Err(Status::not_found(format!(
            "there is no FarAgent {} in namespace {}",
            scope.name, scope.namespace
        )));
    };
    let status = convert::status_from_api(agent.status.as_ref());
    choose(action, &agent, &status, asked)
}

fn choose(action: Action, agent: &FarAgent, status: &AgentStatus, asked: &Identity) -> Result<Seat, Status> {
    let name = agent.name_any();
    let uid = agent.uid().unwrap_or_default();
    if !asked.uid.is_empty() && asked.uid != uid {
        return Err(Status::not_found(format!(
            "agent {name} is another one than you mean: it was made anew"
        )));
    }
    let phase = status.phase();
    let Some(blade) = status.node.clone().filter(|_| status.attempt > 0) else {
        return Err(Status::failed_precondition(format!(
            "agent {name} is on no blade: its phase is {phase:?}"
        )));
    };
    let is_logs = action == Action::Logs;
    if status.is_final() && !is_logs {
        return Err(Status::failed_precondition(format!(
            "agent {name} is not running: its phase is {phase:?}"
        )));
    }
    let attempt = match asked.attempt {
        0 => status.attempt,
        earlier if is_logs && earlier <= status.attempt => earlier,
        same if same == status.attempt => same,
        other => {
            return Err(Status::not_found(format!(
                "agent {name} is at attempt {}, not {other}",
                status.attempt
            )));
        }
    };
    Ok(Seat {
        identity: Identity {
            uid,
            attempt,
            namespace: agent.namespace().unwrap_or_default(),
            name,
        },
        blade,
    })
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    fn agent(status: serde_json::Value) -> FarAgent {
        serde_json::from_value(serde_json::json!({
            "apiVersion": "tiffany.dev/v1", "kind": "FarAgent",
            "metadata": {"name": "a", "namespace": "n", "uid": "u"},
            "spec": {"image": "i"}, "status": status,
        }))
        .unwrap()
    }

    fn found(action: Action, agent: &FarAgent, uid: &str, attempt: u32) -> Result<(u32, String), Code> {
        let asked = Identity {
            uid: uid.into(),
            attempt,
            ..Identity::default()
        };
        let status = convert::status_from_api(agent.status.as_ref());
        choose(action, agent, &status, &asked)
            .map(|seat| (seat.identity.attempt, seat.blade))
            .map_err(|status| status.code())
    }

    #[test]
    fn the_blade_and_the_attempt_are_the_apis_and_never_the_callers() {
        let running = agent(serde_json::json!({"phase": "Running", "nodeName": "b1", "attempt": 2,
            "conditions": [{"type": "Ready", "status": "True", "reason": "x", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"}]}));
        let waiting = agent(serde_json::json!({"phase": "Pending"}));
        let here = |attempt| Ok((attempt, "b1".to_owned()));
        for (why, action, agent, uid, attempt, expected) in [
            ("the newest", Action::Exec, &running, "", 0, here(2)),
            ("named exactly", Action::Exec, &running, "u", 2, here(2)),
            ("another uid", Action::Exec, &running, "v", 0, Err(Code::NotFound)),
            (
                "an attempt that is over",
                Action::Exec,
                &running,
                "u",
                1,
                Err(Code::NotFound),
            ),
            ("its output", Action::Logs, &running, "u", 1, here(1)),
            (
                "one that never was",
                Action::Logs,
                &running,
                "u",
                3,
                Err(Code::NotFound),
            ),
            (
                "on no blade",
                Action::Logs,
                &waiting,
                "",
                0,
                Err(Code::FailedPrecondition),
            ),
        ] {
            assert_eq!(found(action, agent, uid, attempt), expected, "{why}");
        }
    }

    #[test]
    fn a_name_cannot_leave_its_part_of_a_path() {
        let named = |namespace: &str, name: &str| {
            scope(Some(&Identity {
                namespace: namespace.into(),
                name: name.into(),
                ..Identity::default()
            }))
        };
        assert!(named("default", "a-1.b").is_ok());
        for bad in ["../x", "a/b", "A", "a?b", "..", "a..b", &"x".repeat(254)] {
            assert!(named("default", bad).is_err() && named(bad, "a").is_err(), "{bad:?}");
        }
    }
}
