//! What an agent may reach. Nothing is reachable unless a rule says so.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What an agent may reach.
#[derive(KubeSchema, Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.mode == 'Restricted' || !has(self.egress) || size(self.egress) == 0")
        .message("spec.network.egress: only mode Restricted takes rules")
)]
pub struct Network {
    /// None: no network card. Restricted (the default): only what egress lists. Open: the internet, but never the
    /// blade, its metadata address, other agents and private ranges.
    #[serde(default)]
    pub mode: NetworkMode,
    /// What may be reached in mode Restricted; absent: nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub egress: Option<Vec<EgressRule>>,
}

/// How much an agent may reach.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum NetworkMode {
    /// No network card.
    None,
    /// Only what spec.network.egress lists.
    #[default]
    Restricted,
    /// The internet, but never the blade, its metadata address, other agents and private ranges.
    Open,
}

/// One thing that may be reached: exactly one of cidr and dnsName.
#[derive(KubeSchema, Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.cidr) != has(self.dnsName)").message("spec.network.egress[] needs exactly one of cidr and dnsName")
)]
pub struct EgressRule {
    /// Addresses as a prefix, for example 192.0.2.0/24 or 2001:db8::/32. Private ranges are meant when they are written here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 4, max = 49))]
    #[x_kube(validation = Rule::new("isCIDR(self)").message("spec.network.egress[].cidr must be a prefix such as 192.0.2.0/24 or 2001:db8::/32"))]
    pub cidr: Option<String>,
    /// A host name. It is resolved on the blade and its answers are pinned; answers with private addresses are refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(validation = Rule::new("self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*$')")
        .message("spec.network.egress[].dnsName must be a lower-case host name without a final dot, for example api.example.com"))]
    pub dns_name: Option<String>,
    /// Ports; absent: every port of TCP and UDP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 16))]
    pub ports: Option<Vec<EgressPort>>,
}

/// One port, or a range of ports.
#[derive(KubeSchema, Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.endPort) || self.endPort >= self.port").message("spec.network.egress[].ports[].endPort must not be smaller than port")
)]
pub struct EgressPort {
    /// 1 to 65535.
    #[schemars(range(min = 1, max = 65_535))]
    pub port: u16,
    /// Last port of the range; absent: port alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65_535))]
    pub end_port: Option<u16>,
    /// TCP (the default) or UDP.
    #[serde(default)]
    pub protocol: Protocol,
}

/// Transport protocol.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Protocol {
    /// TCP.
    #[default]
    #[serde(rename = "TCP")]
    Tcp,
    /// UDP.
    #[serde(rename = "UDP")]
    Udp,
}
