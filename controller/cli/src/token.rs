//! `far token`: a token of a service account, for users whose kubeconfig has only a client certificate, and for programs.

use std::time::Duration;

use anyhow::Context;
use serde_json::{Value, json};

use crate::{
    cluster::{Cluster, escaped},
    exit::Outcome,
    output,
};

pub(crate) const EXAMPLES: &str = "\
Examples:
  far token reader
  far exec --token \"$(far token operator)\" embedder-worker-01 -- ls

The service account must exist, and its rights are what its bindings give it. As `kubectl create token`.";

#[derive(Debug, clap::Args)]
pub(crate) struct TokenArgs {
    /// Name of the service account
    account: String,
    /// Whom the token is for; may be given more than once [default: the Kubernetes API]
    #[arg(long, value_name = "AUDIENCE")]
    audience: Vec<String>,
    /// How long it lives, at least 10m
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = crate::args::duration)]
    duration: Duration,
}

pub(crate) async fn token(cluster: &Cluster, args: &TokenArgs) -> anyhow::Result<Outcome> {
    let api = cluster.connect().await?;
    let path = format!(
        "/api/v1/namespaces/{}/serviceaccounts/{}/token",
        escaped(&api.namespace),
        escaped(&args.account)
    );
    let mut request = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
        "spec": {"expirationSeconds": args.duration.as_secs()}});
    if !args.audience.is_empty() {
        request["spec"]["audiences"] = json!(args.audience);
    }
    let answer: Value = api.create(&path, &request).await.context("asking for a token")?;
    let token = answer["status"]["token"]
        .as_str()
        .context("the API answered without a token")?;
    output::line(token);
    Ok(Outcome::Success)
}
