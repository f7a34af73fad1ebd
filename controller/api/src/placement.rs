//! What placement (`far-core`) needs of agents and blades, read from their objects: the same for the controller and for
//! `far explain`.

use std::collections::{BTreeMap, BTreeSet};

use far_core::{
    placement::{self, Blade, Effect, Operator, Request, Requirement, Selector},
    quantity::{self, QuantityError},
};

use crate::{
    FarAgent, FarNode, POOL_LABEL, Taint, TaintEffect,
    scheduling::{
        AgentAffinity, AgentTerm, LabelOperator, LabelSelector, NodeExpression, NodeOperator, NodeTerm, Toleration,
        TolerationOperator, WhenUnsatisfiable,
    },
};

/// Annotation of a FarNode: how much of its CPU may be promised, as a factor; absent: 1.
pub const CPU_OVERCOMMIT: &str = "tiffany.dev/cpu-overcommit";
/// Annotation of a FarNode: how much of its memory may be promised, as a factor; absent: 1.
pub const MEMORY_OVERCOMMIT: &str = "tiffany.dev/memory-overcommit";
/// Annotation of a FarNode: MiB that each microVM costs beside its guest's memory; absent: 0.
pub const VM_OVERHEAD_MIB: &str = "tiffany.dev/vm-overhead-mib";
/// Annotation of a FarNode: most microVMs that are on their way up at a time; absent or 0: no limit.
pub const MAX_STARTS: &str = "tiffany.dev/max-starts";

/// Least and greatest overcommit factor, in hundredths.
const OVERCOMMIT_PERCENT: (f64, f64) = (10.0, 10_000.0);

/// What placement needs of an agent.
///
/// # Errors
/// A sentence that names the field of the spec which cannot be read.
pub fn request(agent: &FarAgent) -> Result<Request, String> {
    let spec = &agent.spec;
    let field = |name: &'static str| move |error: QuantityError| format!("spec.{name}: {error}");
    let namespace = agent.metadata.namespace.clone().unwrap_or_default();
    let labels = agent.metadata.labels.clone().unwrap_or_default();
    let own_pool = labels.get(POOL_LABEL).map(String::as_str);
    let pool = spec.pool_ref.as_ref().map(|pool| pool.name.as_str()).or(own_pool);
    let spread = spec
        .topology_spread_constraints
        .iter()
        .flatten()
        .map(|one| placement::Spread {
            term: placement::AgentTerm {
                namespaces: [namespace.clone()].into(),
                selector: selector(&one.label_selector),
                topology_key: one.topology_key.clone(),
            },
            max_skew: one.max_skew.max(1).unsigned_abs(),
            is_required: one.when_unsatisfiable == WhenUnsatisfiable::DoNotSchedule,
        });
    let wanted = spec.resources.iter().flatten();
    Ok(Request {
        cpu_millis: quantity::cpu_millis(&spec.cpu.to_string()).map_err(field("cpu"))?,
        memory_mib: quantity::memory_mib(&spec.memory.to_string()).map_err(field("memory"))?,
        extended: wanted
            .map(|(name, amount)| (name.clone(), u64::from(*amount)))
            .collect(),
        image: spec.image.clone(),
        snapshot: None,
        pool: pool.map(|name| placement::Pool {
            name: format!("{namespace}/{name}"),
            max: None,
        }),
        node_selector: spec.node_selector.clone().unwrap_or_default(),
        node_affinity: node_affinity(agent)?,
        tolerations: spec.tolerations.iter().flatten().map(toleration).collect(),
        agents: agents(agent, &namespace),
        spread: spread.collect(),
        priority: spec.priority.unwrap_or(0),
        packing: None,
        node_name: spec.node_name.clone(),
        avoid: BTreeSet::new(),
        namespace,
        labels,
    })
}

fn node_affinity(agent: &FarAgent) -> Result<placement::NodeAffinity, String> {
    let affinity = agent.spec.affinity.as_ref();
    let Some(affinity) = affinity.and_then(|affinity| affinity.node_affinity.as_ref()) else {
        return Ok(placement::NodeAffinity::default());
    };
    let required = affinity
        .required
        .iter()
        .flat_map(|required| &required.node_selector_terms);
    let preferred = affinity.preferred.iter().flatten();
    Ok(placement::NodeAffinity {
        required: required.map(node_term).collect::<Result<_, _>>()?,
        preferred: preferred
            .map(|one| Ok((one.weight, node_term(&one.preference)?)))
            .collect::<Result<_, String>>()?,
    })
}

fn node_term(term: &NodeTerm) -> Result<Selector, String> {
    let requirements = term.match_expressions.iter().map(node_requirement);
    Ok(Selector {
        requirements: requirements.collect::<Result<_, _>>()?,
    })
}

fn node_requirement(expression: &NodeExpression) -> Result<Requirement, String> {
    let bound = || {
        let value = expression.values.first().map_or("", String::as_str);
        value.parse::<i64>().map_err(|_| {
            let (key, operator) = (&expression.key, expression.operator);
            format!("spec.affinity.nodeAffinity: {key} {operator:?} {value:?}: the value must be a whole number")
        })
    };
    let values = || expression.values.clone();
    Ok(Requirement {
        key: expression.key.clone(),
        operator: match expression.operator {
            NodeOperator::In => Operator::In(values()),
            NodeOperator::NotIn => Operator::NotIn(values()),
            NodeOperator::Exists => Operator::Exists,
            NodeOperator::DoesNotExist => Operator::DoesNotExist,
            NodeOperator::Gt => Operator::Gt(bound()?),
            NodeOperator::Lt => Operator::Lt(bound()?),
        },
    })
}

fn agents(agent: &FarAgent, namespace: &str) -> placement::AgentAffinity {
    let affinity = agent.spec.affinity.as_ref();
    let near = affinity.and_then(|affinity| affinity.agent_affinity.as_ref());
    let away = affinity.and_then(|affinity| affinity.agent_anti_affinity.as_ref());
    let term = |term: &AgentTerm| placement::AgentTerm {
        namespaces: [namespace.to_owned()].into(),
        selector: selector(&term.label_selector),
        topology_key: term.topology_key.clone(),
    };
    let required = |side: Option<&AgentAffinity>| {
        let terms = side.and_then(|side| side.required.as_ref());
        terms.into_iter().flatten().map(term).collect()
    };
    let preferred = |side: Option<&AgentAffinity>, sign: i32| {
        let terms = side.and_then(|side| side.preferred.as_ref());
        let weighted = terms.into_iter().flatten();
        let weighted = weighted.map(|one| (sign * one.weight, term(&one.agent_affinity_term)));
        weighted.collect::<Vec<_>>()
    };
    placement::AgentAffinity {
        required: required(near),
        forbidden: required(away),
        preferred: [preferred(near, 1), preferred(away, -1)].concat(),
    }
}

fn selector(selector: &LabelSelector) -> Selector {
    let labels = selector.match_labels.iter().map(|(key, value)| Requirement {
        key: key.clone(),
        operator: Operator::In(vec![value.clone()]),
    });
    let expressions = selector.match_expressions.iter().map(|one| Requirement {
        key: one.key.clone(),
        operator: match one.operator {
            LabelOperator::In => Operator::In(one.values.clone()),
            LabelOperator::NotIn => Operator::NotIn(one.values.clone()),
            LabelOperator::Exists => Operator::Exists,
            LabelOperator::DoesNotExist => Operator::DoesNotExist,
        },
    });
    Selector {
        requirements: labels.chain(expressions).collect(),
    }
}

/// What a toleration bears.
#[must_use]
pub fn toleration(toleration: &Toleration) -> placement::Toleration {
    let is_any_value = toleration.operator == Some(TolerationOperator::Exists);
    placement::Toleration {
        key: toleration.key.clone(),
        value: (!is_any_value).then(|| toleration.value.clone().unwrap_or_default()),
        effect: toleration.effect.map(effect),
    }
}

fn effect(effect: TaintEffect) -> Effect {
    match effect {
        TaintEffect::NoSchedule => Effect::NoSchedule,
        TaintEffect::PreferNoSchedule => Effect::PreferNoSchedule,
        TaintEffect::NoExecute => Effect::NoExecute,
    }
}

/// A taint as placement looks at it.
#[must_use]
pub fn taint(taint: &Taint) -> placement::Taint {
    placement::Taint {
        key: taint.key.clone(),
        value: taint.value.clone().unwrap_or_default(),
        effect: effect(taint.effect),
    }
}

/// Whether the blade was heard of lately.
#[must_use]
pub fn is_ready(node: &FarNode) -> bool {
    let conditions = node.status.iter().flat_map(|status| &status.conditions);
    conditions
        .into_iter()
        .any(|one| one.type_ == "Ready" && one.status == "True")
}

/// What placement needs of a blade, and complaints about annotations that cannot be read and count as absent. Whether
/// calls reach it is not known here.
#[must_use]
pub fn blade(node: &FarNode) -> (Blade, Vec<String>) {
    let status = node.status.clone().unwrap_or_default();
    let room = status.allocatable.as_ref();
    let amount = |text: Option<String>, read: fn(&str) -> Result<u64, QuantityError>| {
        text.and_then(|text| read(&text).ok()).unwrap_or(0)
    };
    let mut notes = Annotations {
        of: node.metadata.annotations.as_ref(),
        complaints: Vec::new(),
    };
    let images = status.images.unwrap_or_default().into_iter();
    let extended = room.iter().flat_map(|room| &room.extended);
    let blade = Blade {
        ready: is_ready(node),
        unreachable: false,
        cordoned: node.spec.unschedulable.unwrap_or(false) || node.spec.drain.is_some(),
        taints: node.spec.taints.iter().flatten().map(taint).collect(),
        labels: labels(node),
        cpu_millis: amount(room.map(|room| room.cpu.to_string()), quantity::cpu_millis),
        memory_mib: amount(room.map(|room| room.memory.to_string()), quantity::memory_mib),
        overcommit: placement::Overcommit {
            cpu_percent: notes.percent(CPU_OVERCOMMIT),
            memory_percent: notes.percent(MEMORY_OVERCOMMIT),
        },
        overhead_mib: u64::from(notes.number(VM_OVERHEAD_MIB)),
        max_vms: room.and_then(|room| room.vms).unwrap_or(0),
        max_starts: notes.number(MAX_STARTS),
        extended: extended
            .map(|(name, amount)| (name.clone(), u64::from(*amount)))
            .collect(),
        images: images
            .flat_map(|image| {
                let bytes = image.size_bytes.and_then(|bytes| u64::try_from(bytes).ok());
                let names = image.names.into_iter().chain([image.digest]);
                names.map(move |name| (name, bytes.unwrap_or(0)))
            })
            .collect(),
        snapshots: BTreeSet::new(),
        warm: BTreeMap::new(),
    };
    (blade, notes.complaints)
}

/// Labels that selectors see: those the blade was started with, those of the object over them, and what it is.
fn labels(node: &FarNode) -> BTreeMap<String, String> {
    let status = node.status.as_ref();
    let mut labels = status.and_then(|status| status.labels.clone()).unwrap_or_default();
    labels.extend(node.metadata.labels.clone().unwrap_or_default());
    // The names that people know from Nodes too, unless somebody means something else by them.
    let mut know = |own: &str, usual: &str, value: &String| {
        labels.insert(own.to_owned(), value.clone());
        labels.entry(usual.to_owned()).or_insert_with(|| value.clone());
    };
    if let Some(name) = &node.metadata.name {
        know("tiffany.dev/blade", "kubernetes.io/hostname", name);
    }
    if let Some(info) = status.and_then(|status| status.node_info.as_ref()) {
        know("tiffany.dev/arch", "kubernetes.io/arch", &info.arch);
    }
    labels
}

/// Annotations with what is wrong in them.
struct Annotations<'a> {
    of: Option<&'a BTreeMap<String, String>>,
    complaints: Vec<String>,
}

impl Annotations<'_> {
    fn read<T>(&mut self, key: &str, absent: T, wanted: &str, read: impl Fn(&str) -> Option<T>) -> T {
        let Some(text) = self.of.and_then(|annotations| annotations.get(key)) else {
            return absent;
        };
        read(text.trim()).unwrap_or_else(|| {
            self.complaints
                .push(format!("annotation {key}: {text:?} is not {wanted}"));
            absent
        })
    }

    fn percent(&mut self, key: &str) -> u32 {
        let (least, most) = OVERCOMMIT_PERCENT;
        self.read(key, 100, "a factor from 0.1 to 100", |text| {
            let percent = (text.parse::<f64>().ok()? * 100.0).round();
            (percent >= least && percent <= most).then_some(percent as u32)
        })
    }

    fn number(&mut self, key: &str) -> u32 {
        self.read(key, 0, "a whole number, 0 or more", |text| text.parse().ok())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn agent(spec: Value) -> FarAgent {
        let mut whole = json!({"image": "x"});
        for (key, value) in spec.as_object().unwrap() {
            whole[key] = value.clone();
        }
        serde_json::from_value(json!({
            "apiVersion": "tiffany.dev/v1", "kind": "FarAgent",
            "metadata": {"name": "a", "namespace": "team", "labels": {"app": "web"}}, "spec": whole,
        }))
        .unwrap()
    }

    fn requirement(key: &str, operator: Operator) -> Selector {
        Selector {
            requirements: vec![Requirement {
                key: key.into(),
                operator,
            }],
        }
    }

    #[test]
    fn everything_that_a_spec_asks_of_placement_is_read() {
        let term = json!({"labelSelector": {"matchLabels": {"app": "db"}}, "topologyKey": "zone"});
        let read = request(&agent(json!({
            "cpu": "500m", "memory": "1Gi", "priority": 7, "nodeName": "b1", "nodeSelector": {"disk": "nvme"},
            "resources": {"nvidia.com/gpu": 2}, "poolRef": {"name": "warm"},
            "tolerations": [
                {"key": "gpu", "operator": "Exists", "effect": "NoExecute"}, {"key": "team", "value": "a"}, {"operator": "Exists"}
            ],
            "affinity": {
                "nodeAffinity": {
                    "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
                        {"matchExpressions": [{"key": "cores", "operator": "Gt", "values": ["8"]}]}, {}
                    ]},
                    "preferredDuringSchedulingIgnoredDuringExecution": [
                        {"weight": 3, "preference": {"matchExpressions": [{"key": "ssd", "operator": "Exists"}]}}
                    ]
                },
                "agentAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]},
                "agentAntiAffinity": {
                    "requiredDuringSchedulingIgnoredDuringExecution": [
                        {"labelSelector": {"matchExpressions": [{"key": "app", "operator": "NotIn", "values": ["a"]}]},
                         "topologyKey": "tiffany.dev/blade"}
                    ],
                    "preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 9, "agentAffinityTerm": term}]
                }
            },
            "topologySpreadConstraints": [
                {"maxSkew": 2, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule", "labelSelector": {}}
            ],
        })))
        .unwrap();
        let near = placement::AgentTerm {
            namespaces: ["team".to_owned()].into(),
            selector: requirement("app", Operator::In(vec!["db".into()])),
            topology_key: "zone".into(),
        };
        let text = |text: &str| Some(text.to_owned());
        let expected = Request {
            namespace: "team".into(),
            labels: [("app".to_owned(), "web".to_owned())].into(),
            cpu_millis: 500,
            memory_mib: 1024,
            extended: [("nvidia.com/gpu".to_owned(), 2)].into(),
            image: "x".into(),
            pool: Some(placement::Pool {
                name: "team/warm".into(),
                max: None,
            }),
            node_selector: [("disk".to_owned(), "nvme".to_owned())].into(),
            node_affinity: placement::NodeAffinity {
                required: vec![requirement("cores", Operator::Gt(8)), Selector::default()],
                preferred: vec![(3, requirement("ssd", Operator::Exists))],
            },
            tolerations: vec![
                placement::Toleration {
                    key: text("gpu"),
                    value: None,
                    effect: Some(Effect::NoExecute),
                },
                placement::Toleration {
                    key: text("team"),
                    value: text("a"),
                    effect: None,
                },
                placement::Toleration::default(),
            ],
            agents: placement::AgentAffinity {
                required: vec![near.clone()],
                forbidden: vec![placement::AgentTerm {
                    selector: requirement("app", Operator::NotIn(vec!["a".into()])),
                    topology_key: "tiffany.dev/blade".into(),
                    ..near.clone()
                }],
                preferred: vec![(-9, near.clone())],
            },
            spread: vec![placement::Spread {
                term: placement::AgentTerm {
                    selector: Selector::default(),
                    ..near
                },
                max_skew: 2,
                is_required: true,
            }],
            priority: 7,
            node_name: text("b1"),
            ..Request::default()
        };
        assert_eq!(read, expected);
    }

    #[test]
    fn what_cannot_be_read_of_a_spec_names_its_field() {
        let bound = json!({"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
            {"matchExpressions": [{"key": "cores", "operator": "Lt", "values": ["many"]}]}
        ]}}});
        for (spec, expected) in [
            (json!({"cpu": "much"}), "spec.cpu: "),
            (json!({"memory": "-1"}), "spec.memory: "),
            (
                json!({"affinity": bound}),
                "spec.affinity.nodeAffinity: cores Lt \"many\": ",
            ),
        ] {
            let error = request(&agent(spec)).unwrap_err();
            assert!(error.starts_with(expected), "{error}");
        }
    }

    #[test]
    fn a_blade_is_read_with_its_annotations_and_bad_ones_are_named() {
        let node = |annotations: Value, spec: Value| -> FarNode {
            serde_json::from_value(json!({
                "apiVersion": "tiffany.dev/v1alpha1", "kind": "FarNode",
                "metadata": {"name": "b1", "annotations": annotations, "labels": {"zone": "object"}}, "spec": spec,
                "status": {
                    "allocatable": {"cpu": 4, "memory": "4Gi", "vms": 3, "extended": {"gpu": 2}},
                    "labels": {"zone": "blade", "rack": "7"},
                    "images": [{"digest": "sha256:1", "names": ["x"], "sizeBytes": 5}],
                    "nodeInfo": {"arch": "arm64"},
                    "conditions": [{"type": "Ready", "status": "True", "reason": "", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"}],
                },
            }))
            .unwrap()
        };
        let (plain, complaints) = blade(&node(json!({}), json!({})));
        assert!(plain.ready && !plain.cordoned && complaints.is_empty());
        assert_eq!((plain.cpu_millis, plain.memory_mib, plain.max_vms), (4000, 4096, 3));
        assert_eq!(
            (plain.extended["gpu"], plain.images["x"], plain.images["sha256:1"]),
            (2, 5, 5)
        );
        assert_eq!(plain.overcommit, placement::Overcommit::default());
        for (key, value) in [
            ("zone", "object"),
            ("rack", "7"),
            ("tiffany.dev/blade", "b1"),
            ("kubernetes.io/arch", "arm64"),
        ] {
            assert_eq!(plain.labels.get(key).map(String::as_str), Some(value), "{key}");
        }
        let drained = json!({"drain": {}, "taints": [{"key": "t", "effect": "PreferNoSchedule"}]});
        let set = json!({
            CPU_OVERCOMMIT: "4", MEMORY_OVERCOMMIT: "1.25", VM_OVERHEAD_MIB: "48", MAX_STARTS: "6",
        });
        let (tuned, complaints) = blade(&node(set, drained));
        assert!(tuned.cordoned && complaints.is_empty(), "{complaints:?}");
        assert_eq!(tuned.taints[0].effect, Effect::PreferNoSchedule);
        assert_eq!((tuned.cpu_room(), tuned.memory_room()), (16_000, 5120));
        assert_eq!((tuned.overhead_mib, tuned.max_starts), (48, 6));
        for (key, value) in [
            (CPU_OVERCOMMIT, "0"),
            (CPU_OVERCOMMIT, "four"),
            (MEMORY_OVERCOMMIT, "NaN"),
            (MEMORY_OVERCOMMIT, "101"),
            (VM_OVERHEAD_MIB, "-1"),
            (MAX_STARTS, "1.5"),
        ] {
            let (same, complaints) = blade(&node(json!({key: value}), json!({})));
            assert_eq!(same, plain, "{key} {value}");
            assert!(complaints.len() == 1 && complaints[0].contains(key), "{complaints:?}");
        }
    }
}
