//! Where an agent may run: affinity, tolerations and spread. Names and meanings are those of core/v1 Pod, with a blade in
//! the place of a node and an agent in the place of a Pod.

use std::collections::BTreeMap;

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What draws an agent to blades and to other agents, or keeps it away from them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Affinity {
    /// Which blades will do, by their labels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_affinity: Option<NodeAffinity>,
    /// Which agents it wants to be near to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent_affinity: Option<AgentAffinity>,
    /// Which agents it wants to be away from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent_anti_affinity: Option<AgentAffinity>,
}

/// Which blades will do, by their labels.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeAffinity {
    /// A blade must match one of these terms.
    #[serde(
        rename = "requiredDuringSchedulingIgnoredDuringExecution",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    pub required: Option<NodeSelector>,
    /// Blades that match are preferred by their weight.
    #[serde(
        rename = "preferredDuringSchedulingIgnoredDuringExecution",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    #[schemars(length(max = 16))]
    pub preferred: Option<Vec<PreferredNodeTerm>>,
}

/// Terms of which one has to match.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeSelector {
    /// One of them has to match.
    #[schemars(length(min = 1, max = 16))]
    pub node_selector_terms: Vec<NodeTerm>,
}

/// Expressions that all have to match.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeTerm {
    /// All of them have to match; none: matches no blade.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub match_expressions: Vec<NodeExpression>,
}

/// What a label of a blade has to be.
#[derive(KubeSchema, Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.operator in ['Exists', 'DoesNotExist'] ? !has(self.values) || size(self.values) == 0 : has(self.values) && size(self.values) > 0")
        .message("spec.affinity: In, NotIn, Gt and Lt need values, Exists and DoesNotExist take none"),
    validation = Rule::new("!(self.operator in ['Gt', 'Lt']) || (has(self.values) && size(self.values) == 1)")
        .message("spec.affinity: Gt and Lt take one value, a whole number")
)]
pub struct NodeExpression {
    /// Label of the blade.
    #[schemars(length(min = 1, max = 317))]
    pub key: String,
    /// In, NotIn, Exists, DoesNotExist, Gt or Lt.
    pub operator: NodeOperator,
    /// Values to compare with.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(max = 63)))]
    pub values: Vec<String>,
}

/// How a label of a blade is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum NodeOperator {
    /// The label is one of the values.
    In,
    /// The label is none of the values, or absent.
    NotIn,
    /// The label is there.
    Exists,
    /// The label is absent.
    DoesNotExist,
    /// The label is a greater whole number.
    Gt,
    /// The label is a smaller whole number.
    Lt,
}

/// Blades that are preferred.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PreferredNodeTerm {
    /// 1 to 100.
    #[schemars(range(min = 1, max = 100))]
    pub weight: i32,
    /// What a blade has to match.
    pub preference: NodeTerm,
}

/// Agents to be near to, or away from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AgentAffinity {
    /// All of them have to hold when the agent is placed.
    #[serde(
        rename = "requiredDuringSchedulingIgnoredDuringExecution",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    #[schemars(length(max = 8))]
    pub required: Option<Vec<AgentTerm>>,
    /// Blades where they hold are preferred by their weight.
    #[serde(
        rename = "preferredDuringSchedulingIgnoredDuringExecution",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    #[schemars(length(max = 8))]
    pub preferred: Option<Vec<PreferredAgentTerm>>,
}

/// Agents of the same namespace by their labels, and how near is near.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AgentTerm {
    /// Which agents are meant.
    pub label_selector: LabelSelector,
    /// Label of blades: blades with one value of it are one place. tiffany.dev/blade is each blade by itself.
    #[schemars(length(min = 1, max = 317))]
    pub topology_key: String,
}

/// Agents that are preferred as neighbours, or not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PreferredAgentTerm {
    /// 1 to 100.
    #[schemars(range(min = 1, max = 100))]
    pub weight: i32,
    /// Which agents, and how near.
    pub agent_affinity_term: AgentTerm,
}

/// Chooses agents by their labels: everything has to match. Empty: every agent.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LabelSelector {
    /// Labels with these values.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32))]
    pub match_labels: BTreeMap<String, String>,
    /// Expressions over labels.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub match_expressions: Vec<LabelExpression>,
}

/// What a label of an agent has to be.
#[derive(KubeSchema, Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.operator in ['Exists', 'DoesNotExist'] ? !has(self.values) || size(self.values) == 0 : has(self.values) && size(self.values) > 0")
        .message("labelSelector.matchExpressions[]: In and NotIn need values, Exists and DoesNotExist take none")
)]
pub struct LabelExpression {
    /// Label of the agent.
    #[schemars(length(min = 1, max = 317))]
    pub key: String,
    /// In, NotIn, Exists or DoesNotExist.
    pub operator: LabelOperator,
    /// Values to compare with.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(max = 63)))]
    pub values: Vec<String>,
}

/// How a label of an agent is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum LabelOperator {
    /// The label is one of the values.
    In,
    /// The label is none of the values, or absent.
    NotIn,
    /// The label is there.
    Exists,
    /// The label is absent.
    DoesNotExist,
}

/// A taint that does not keep the agent away.
#[derive(KubeSchema, Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.operator) || self.operator != 'Exists' || !has(self.value)").message("spec.tolerations[]: operator Exists takes no value"),
    validation = Rule::new("has(self.key) || (has(self.operator) && self.operator == 'Exists')").message("spec.tolerations[]: without key the operator must be Exists"),
    validation = Rule::new("!has(self.tolerationSeconds) || (has(self.effect) && self.effect == 'NoExecute')").message("spec.tolerations[]: tolerationSeconds needs effect NoExecute")
)]
pub struct Toleration {
    /// Key of the taint. Absent, with operator Exists: every key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 317))]
    pub key: Option<String>,
    /// Equal (the default) compares the value, Exists does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operator: Option<TolerationOperator>,
    /// Value of the taint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub value: Option<String>,
    /// Effect of the taint. Absent: every effect.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub effect: Option<TaintEffect>,
    /// Seconds a NoExecute taint is borne before the agent is ended; absent: for ever.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 31_536_000))]
    pub toleration_seconds: Option<u32>,
}

/// How a taint's value is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum TolerationOperator {
    /// The values are the same.
    Equal,
    /// Any value.
    Exists,
}

/// What a taint does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
pub enum TaintEffect {
    /// No new agents; those that run stay.
    NoSchedule,
    /// New agents go elsewhere where they can.
    PreferNoSchedule,
    /// No new agents, and those that run are ended with reason Evicted.
    NoExecute,
}

/// How evenly agents are spread over places.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TopologySpreadConstraint {
    /// Most that any place may have more than the place with the fewest.
    #[schemars(range(min = 1, max = 10_000))]
    pub max_skew: i32,
    /// Label of blades: blades with one value of it are one place.
    #[schemars(length(min = 1, max = 317))]
    pub topology_key: String,
    /// DoNotSchedule: the agent waits; ScheduleAnyway: the emptier place is only preferred.
    pub when_unsatisfiable: WhenUnsatisfiable,
    /// Which agents of the same namespace are counted.
    pub label_selector: LabelSelector,
}

/// What happens when agents cannot be spread as asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum WhenUnsatisfiable {
    /// The agent waits.
    DoNotSchedule,
    /// The emptier place is only preferred.
    ScheduleAnyway,
}
