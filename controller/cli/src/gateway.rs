//! The way to agents on other machines: the controller's user gateway, with the user's own Kubernetes token.
//!
//! Where it is and whom to trust is published by the controller in ConfigMap `far-gateway`, so that only who can write
//! there could mislead anybody. `--gateway` and `--gateway-ca` say it instead.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use far_proto::{gateway::output_client::OutputClient, node::inside_client::InsideClient};
use http::HeaderValue;
use serde_json::Value;
use tonic::{
    Request, Status,
    metadata::{Ascii, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint},
};

use crate::{
    cluster::{Api, ClusterError},
    node::MAX_ANSWER_BYTES,
};

/// Where the controller says it.
const CONFIG_MAP: &str = "/api/v1/namespaces/far-system/configmaps/far-gateway";
/// The gateway's name in its certificate, whatever its address.
const NAME: &str = "controller.far.internal";
const CONNECT_WITHIN: Duration = Duration::from_secs(10);
/// A silent gateway is asked whether it lives after this long, and has this long to answer.
const PING: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(20));
/// What the gateway may send ahead in one call, and in all calls of a connection, bytes: one that is not read holds up none.
const CALL_WINDOW: u32 = 128 * 1024;
const CONNECTION_WINDOW: u32 = 64 * CALL_WINDOW;
/// A token is asked for anew after this long: those of plugins end.
const TOKEN_FOR: Duration = Duration::from_secs(60);

#[derive(Debug, thiserror::Error)]
pub(crate) enum GatewayError {
    #[error(
        "reading where the gateway is (ConfigMap far-gateway in namespace far-system; --gateway and --gateway-ca say it instead)"
    )]
    Unknown { source: ClusterError },
    #[error("ConfigMap far-gateway has no {field}: the controller writes it")]
    Incomplete { field: &'static str },
    #[error("--gateway {endpoint}: its CA is not known; give its PEM file with --gateway-ca")]
    NoCa { endpoint: String },
    #[error("reading --gateway-ca {path}")]
    Ca { path: PathBuf, source: std::io::Error },
    #[error("asking the kubeconfig's user for a token")]
    Token { source: ClusterError },
    #[error(
        "the kubeconfig's user has no token, and a client certificate cannot be shown to the gateway: give a token, for example \
         --token \"$(kubectl create token SERVICEACCOUNT)\" (also `far token`), or FAR_TOKEN"
    )]
    NoToken,
    #[error("the gateway's address {endpoint} cannot be used")]
    Endpoint {
        endpoint: String,
        source: tonic::transport::Error,
    },
    #[error("the gateway at {endpoint} does not answer")]
    Connect {
        endpoint: String,
        source: tonic::transport::Error,
    },
}

impl GatewayError {
    /// It may be there in a moment.
    pub(crate) fn is_passing(&self) -> bool {
        match self {
            Self::Connect { .. } => true,
            Self::Unknown { source } => source.is_passing(),
            Self::Incomplete { .. }
            | Self::NoCa { .. }
            | Self::Ca { .. }
            | Self::Token { .. }
            | Self::NoToken
            | Self::Endpoint { .. } => false,
        }
    }
}

/// Which gateway, as the user may say it.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Cluster")]
pub(crate) struct GatewayArgs {
    /// The controller's gateway to agents on other machines [default: as ConfigMap far-gateway says]
    #[arg(
        long,
        env = "FAR_GATEWAY",
        value_name = "HOST:PORT",
        global = true,
        hide_env_values = true
    )]
    pub(crate) gateway: Option<String>,
    /// The CA of the gateway, PEM [default: as ConfigMap far-gateway says]
    #[arg(
        long,
        env = "FAR_GATEWAY_CA",
        value_name = "FILE",
        global = true,
        hide_env_values = true
    )]
    pub(crate) gateway_ca: Option<PathBuf>,
}

/// Puts the caller's token on each call; on a blade's own socket there is none.
#[derive(Debug, Clone, Default)]
pub(crate) struct Caller(Option<MetadataValue<Ascii>>);

impl Interceptor for Caller {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(token) = &self.0 {
            request.metadata_mut().insert("authorization", token.clone());
        }
        Ok(request)
    }
}

/// A connection on which each call says who calls, where that is asked for.
pub(crate) type Line = InterceptedService<Channel, Caller>;

/// A token, and when it was asked for.
type Kept = (MetadataValue<Ascii>, Instant);

/// A connection to the gateway.
#[derive(Clone)]
pub(crate) struct Gateway {
    api: Api,
    channel: Channel,
    token: Arc<tokio::sync::Mutex<Option<Kept>>>,
}

impl Gateway {
    /// Connects to the cluster's gateway; `None`: the cluster has none.
    pub(crate) async fn find(api: &Api) -> Result<Option<Self>, GatewayError> {
        let Some((endpoint, ca_pem)) = locate(api).await? else {
            return Ok(None);
        };
        let gateway = Self {
            channel: connect(&endpoint, &ca_pem).await?,
            api: api.clone(),
            token: Arc::default(),
        };
        // Asked for now, so that a lack is said before anything else.
        gateway.caller().await?;
        Ok(Some(gateway))
    }

    pub(crate) async fn inside(&self) -> Result<InsideClient<Line>, GatewayError> {
        let client = InsideClient::with_interceptor(self.channel.clone(), self.caller().await?);
        Ok(client.max_decoding_message_size(MAX_ANSWER_BYTES))
    }

    pub(crate) async fn output(&self) -> Result<OutputClient<Line>, GatewayError> {
        Ok(OutputClient::with_interceptor(
            self.channel.clone(),
            self.caller().await?,
        ))
    }

    async fn caller(&self) -> Result<Caller, GatewayError> {
        let mut kept = self.token.lock().await;
        if let Some((token, at)) = kept.as_ref()
            && at.elapsed() < TOKEN_FOR
        {
            return Ok(Caller(Some(token.clone())));
        }
        let header = self.api.authorization().await;
        let header = header.map_err(|source| GatewayError::Token { source })?;
        let token = header.as_ref().and_then(bearer).ok_or(GatewayError::NoToken)?;
        *kept = Some((token.clone(), Instant::now()));
        Ok(Caller(Some(token)))
    }
}

/// Basic and other schemes are no tokens.
fn bearer(header: &HeaderValue) -> Option<MetadataValue<Ascii>> {
    let text = header.to_str().ok().filter(|text| text.starts_with("Bearer "))?;
    let mut token: MetadataValue<Ascii> = text.parse().ok()?;
    token.set_sensitive(true);
    Some(token)
}

/// Endpoint and CA.
async fn locate(api: &Api) -> Result<Option<(String, String)>, GatewayError> {
    let args = &api.gateway;
    let ca_pem = match &args.gateway_ca {
        None => None,
        Some(path) => Some(std::fs::read_to_string(path).map_err(|source| GatewayError::Ca {
            path: path.clone(),
            source,
        })?),
    };
    if let (Some(endpoint), Some(ca_pem)) = (&args.gateway, &ca_pem) {
        return Ok(Some((endpoint.clone(), ca_pem.clone())));
    }
    let published: Value = match api.get(CONFIG_MAP).await {
        Ok(published) => published,
        Err(error) if error.is_not_found() => {
            return match &args.gateway {
                None => Ok(None),
                Some(endpoint) => Err(GatewayError::NoCa {
                    endpoint: endpoint.clone(),
                }),
            };
        }
        Err(source) => return Err(GatewayError::Unknown { source }),
    };
    let field = |field: &'static str| {
        let text = published["data"][field].as_str().filter(|text| !text.is_empty());
        text.map(str::to_owned).ok_or(GatewayError::Incomplete { field })
    };
    // Installed, and no controller with a gateway led yet.
    if args.gateway.is_none() && published["data"]["endpoint"].is_null() {
        return Ok(None);
    }
    let endpoint = args.gateway.clone().map_or_else(|| field("endpoint"), Ok)?;
    Ok(Some((endpoint, ca_pem.map_or_else(|| field("ca.crt"), Ok)?)))
}

async fn connect(endpoint: &str, ca_pem: &str) -> Result<Channel, GatewayError> {
    let unusable = |source| GatewayError::Endpoint {
        endpoint: endpoint.to_owned(),
        source,
    };
    let tls = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(ca_pem))
        .domain_name(NAME);
    Endpoint::from_shared(format!("https://{endpoint}"))
        .map_err(unusable)?
        .connect_timeout(CONNECT_WITHIN)
        .http2_keep_alive_interval(PING.0)
        .keep_alive_timeout(PING.1)
        .initial_stream_window_size(CALL_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .tls_config(tls)
        .map_err(unusable)?
        .connect()
        .await
        .map_err(|source| GatewayError::Connect {
            endpoint: endpoint.to_owned(),
            source,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_bearer_token_is_shown_to_the_gateway() {
        for (header, expected) in [("Bearer abc", true), ("Basic YTpi", false), ("Bearerabc", false)] {
            assert_eq!(
                bearer(&HeaderValue::from_static(header)).is_some(),
                expected,
                "{header}"
            );
        }
    }
}
