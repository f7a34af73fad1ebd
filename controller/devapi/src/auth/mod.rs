//! Who asks, and whether that user may: tokens to users, and RBAC as the stored roles and bindings say it.
//!
//! The administrator (the kubeconfig's token) may do everything. Others are service accounts with a token of
//! `TokenRequest`; what they may do is only what bindings give them, besides discovery and questions about themselves.

mod rbac;
mod tokens;

pub(crate) use rbac::{Attributes, allows, common_rules, rules_of};
pub(crate) use tokens::{AUDIENCE, Asked, Tokens};

/// The administrator's name.
pub(crate) const ADMIN: &str = "far-admin";
/// Who is in it may do everything.
pub(crate) const MASTERS: &str = "system:masters";
const AUTHENTICATED: &str = "system:authenticated";

/// An authenticated user, as `authentication.k8s.io/v1` UserInfo.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct User {
    pub name: String,
    pub uid: String,
    pub groups: Vec<String>,
}

impl User {
    pub(crate) fn admin() -> Self {
        Self {
            name: ADMIN.to_owned(),
            uid: String::new(),
            groups: vec![MASTERS.to_owned(), AUTHENTICATED.to_owned()],
        }
    }

    /// The name and groups that a real server gives service accounts.
    pub(crate) fn service_account(namespace: &str, name: &str, uid: &str) -> Self {
        Self {
            name: format!("system:serviceaccount:{namespace}:{name}"),
            uid: uid.to_owned(),
            groups: vec![
                "system:serviceaccounts".to_owned(),
                format!("system:serviceaccounts:{namespace}"),
                AUTHENTICATED.to_owned(),
            ],
        }
    }

    pub(crate) fn is_master(&self) -> bool {
        self.groups.iter().any(|group| group == MASTERS)
    }
}
