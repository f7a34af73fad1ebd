//! What blades say of themselves becomes FarNode statuses and Leases. A blade speaks for itself only: its name comes from
//! its certificate. Status is written when it changed, the Lease every few heartbeats.

use std::{
    collections::BTreeMap,
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use far_api::{
    FIELD_MANAGER, FarNode, FarNodeSpec, FarNodeStatus, NODE_LEASE_NAMESPACE, NodeImage, NodeInfo, NodeResources,
    Quantity, node::MAX_IMAGES,
};
use far_proto::{controller::HeartbeatRequest, node::NodeCapacity};
use k8s_openapi::{
    api::coordination::v1::Lease,
    apimachinery::pkg::apis::meta::v1::{Condition, MicroTime, Time},
    jiff::Timestamp,
};
use kube::{
    Api, Client, ResourceExt,
    api::{Patch, PatchParams, PostParams},
};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::{
    convert::cut,
    status_writer::{difference, write_to},
};

/// Condition of a blade that is emptied; since when it is tells when a drain's deadline is over.
pub(crate) const DRAINING: &str = "Draining";
/// Leases are renewed this often at most (design of node leases in Kubernetes: 10 s of 40 s).
const LEASE_EVERY: Duration = Duration::from_secs(10);
const LEASE_SECONDS: i32 = 40;
/// Labels a blade may have, and the longest key and value (Kubernetes' own bounds).
const MAX_LABELS: usize = 64;
/// Most further resources of a blade.
const MAX_EXTENDED: usize = 32;
const MAX_KEY: usize = 317;
const MAX_VALUE: usize = 63;
/// Blades that are remembered; beyond that heartbeats of new ones are refused.
const MAX_BLADES: usize = 20_000;
/// Changes of a blade's status that are written at once; one more each second.
const CHANGES: f64 = 20.0;

/// Why a heartbeat was not taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HeartbeatError {
    #[error("{0}")]
    Invalid(String),
    #[error(
        "what blade {blade} says of itself changes too often: at most {CHANGES} changes at once, and one a second after that"
    )]
    TooOften { blade: String },
    #[error("writing FarNode {blade}")]
    Write { blade: String, source: Box<kube::Error> },
}

#[derive(Debug)]
struct Known {
    heard: Instant,
    leased: Option<Instant>,
    /// What was written last; `None`: write in any case.
    written: Option<FarNodeStatus>,
    /// Written as not ready.
    lost: bool,
    /// How often the API said something else than `written`.
    doubts: u64,
    /// Changes that may still be written, as of then: a blade must not make the API write without an end.
    changes: (f64, Instant),
}

impl Known {
    fn new() -> Self {
        Self {
            heard: Instant::now(),
            leased: None,
            written: None,
            lost: false,
            doubts: 0,
            changes: (CHANGES, Instant::now()),
        }
    }

    /// Takes one of the changes that may be written.
    fn may_change(&mut self, now: Instant) -> bool {
        let (left, since) = self.changes;
        let left = (left + now.duration_since(since).as_secs_f64()).min(CHANGES);
        let may = left >= 1.0;
        self.changes = (if may { left - 1.0 } else { left }, now);
        may
    }
}

pub(crate) struct Registry {
    client: Client,
    blades: Mutex<HashMap<String, Known>>,
    lost_after: Duration,
}

impl Registry {
    pub(crate) fn new(client: Client, lost_after: Duration) -> Self {
        Self {
            client,
            blades: Mutex::default(),
            lost_after,
        }
    }

    fn with<T>(&self, work: impl FnOnce(&mut HashMap<String, Known>) -> T) -> T {
        work(&mut self.blades.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The API tells of this blade: from now on it must be heard of. Where the API says something else than was written here
    /// last (a controller that was deposed, a reply that got lost, a person), the next heartbeat writes it again.
    pub(crate) fn expect(&self, node: &FarNode) {
        let told = node.status.clone().unwrap_or_default();
        let is_ready = told
            .conditions
            .iter()
            .any(|one| one.type_ == "Ready" && one.status == "True");
        let told = FarNodeStatus {
            conditions: Vec::new(),
            ..told
        };
        self.with(|blades| {
            let known = blades.entry(node.name_any()).or_insert_with(Known::new);
            // Where it is silent all the same it is declared lost again.
            known.lost &= !is_ready;
            if !is_ready || known.written.as_ref() != Some(&told) {
                known.written = None;
                known.doubts += 1;
            }
        });
    }

    /// The API no longer has it; its next heartbeat makes it anew.
    pub(crate) fn forget(&self, blade: &str) {
        self.with(|blades| drop(blades.remove(blade)));
    }

    /// A heartbeat of `blade`.
    pub(crate) async fn heartbeat(&self, blade: &str, request: HeartbeatRequest) -> Result<(), HeartbeatError> {
        let wanted = status_of(request).map_err(HeartbeatError::Invalid)?;
        let (must_write, must_lease, doubts) = self.with(|blades| {
            if blades.len() >= MAX_BLADES && !blades.contains_key(blade) {
                return Err(HeartbeatError::Invalid(format!(
                    "{MAX_BLADES} blades are known already"
                )));
            }
            let known = blades.entry(blade.to_owned()).or_insert_with(Known::new);
            known.heard = Instant::now();
            let must_lease = known.leased.is_none_or(|at| at.elapsed() >= LEASE_EVERY);
            let must_write = known.lost || known.written.as_ref() != Some(&wanted);
            if must_write && !known.may_change(Instant::now()) {
                return Err(HeartbeatError::TooOften {
                    blade: blade.to_owned(),
                });
            }
            Ok((must_write, must_lease, known.doubts))
        })?;
        let failed = |source| HeartbeatError::Write {
            blade: blade.to_owned(),
            source: Box::new(source),
        };
        if must_write {
            self.write(blade, &wanted).await.map_err(failed)?;
            self.with(|blades| {
                if let Some(known) = blades.get_mut(blade) {
                    // What the API said meanwhile may have come after this write.
                    known.written = Some(wanted).filter(|_| known.doubts == doubts);
                    known.lost = false;
                }
            });
        }
        if must_lease {
            self.lease(blade).await.map_err(failed)?;
            self.with(|blades| {
                if let Some(known) = blades.get_mut(blade) {
                    known.leased = Some(Instant::now());
                }
            });
        }
        Ok(())
    }

    async fn write(&self, blade: &str, wanted: &FarNodeStatus) -> Result<(), kube::Error> {
        let api: Api<FarNode> = Api::all(self.client.clone());
        let node = match api.get_opt(blade).await? {
            Some(node) => node,
            None => match api
                .create(&PostParams::default(), &FarNode::new(blade, FarNodeSpec::default()))
                .await
            {
                Ok(node) => node,
                Err(kube::Error::Api(error)) if error.code == 409 => api.get(blade).await?,
                Err(error) => return Err(error),
            },
        };
        let old = node.status.unwrap_or_default();
        let ready = ready_condition(&old, "True", "Heard", "the blade sends heartbeats");
        let new = FarNodeStatus {
            conditions: with_condition(&old, ready),
            ..wanted.clone()
        };
        patch(&api, blade, &old, &new).await
    }

    async fn lease(&self, blade: &str) -> Result<(), kube::Error> {
        let api: Api<Lease> = Api::namespaced(self.client.clone(), NODE_LEASE_NAMESPACE);
        let spec = json!({
            "holderIdentity": blade, "leaseDurationSeconds": LEASE_SECONDS, "renewTime": MicroTime(Timestamp::now()),
        });
        match api
            .patch(blade, &manager(), &Patch::Merge(json!({ "spec": spec })))
            .await
        {
            Err(kube::Error::Api(error)) if error.code == 404 => {
                let lease = serde_json::from_value(json!({"metadata": {"name": blade}, "spec": spec}));
                api.create(&PostParams::default(), &lease.map_err(kube::Error::SerdeError)?)
                    .await
                    .map(drop)
            }
            other => other.map(drop),
        }
    }

    /// Tells of blades that are not heard of any more, until `shutdown`.
    pub(crate) async fn watch_over(&self, shutdown: CancellationToken) {
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(self.lost_after / 8) => {}
            }
            let lost: Vec<String> = self.with(|blades| {
                let silent = blades
                    .iter()
                    .filter(|(_, known)| !known.lost && known.heard.elapsed() >= self.lost_after);
                silent.map(|(name, _)| name.clone()).collect()
            });
            for blade in lost {
                match self.declare_lost(&blade).await {
                    Ok(()) => {
                        tracing::warn!(blade, "the blade is not heard of any more");
                        self.with(|blades| blades.get_mut(&blade).map(|known| known.lost = true));
                    }
                    Err(error) => tracing::warn!(blade, %error, "a lost blade could not be written down"),
                }
            }
        }
    }

    async fn declare_lost(&self, blade: &str) -> Result<(), kube::Error> {
        let api: Api<FarNode> = Api::all(self.client.clone());
        let Some(node) = api.get_opt(blade).await? else {
            return Ok(());
        };
        let old = node.status.unwrap_or_default();
        let text = format!("no heartbeat for {} s", self.lost_after.as_secs_f64());
        let new = FarNodeStatus {
            conditions: with_condition(&old, ready_condition(&old, "Unknown", "NodeLost", &text)),
            ..old.clone()
        };
        patch(&api, blade, &old, &new).await
    }
}

/// What the status has to say of a drain and does not say yet.
pub(crate) fn untold_drain(node: &FarNode) -> Option<Condition> {
    let conditions = node.status.iter().flat_map(|status| &status.conditions);
    let is_told = conditions
        .filter(|one| one.type_ == DRAINING)
        .any(|one| one.status == "True");
    let (status, reason) = match (node.spec.drain.is_some(), is_told) {
        (true, false) => ("True", "Asked"),
        (false, true) => ("False", "NotAsked"),
        (true, true) | (false, false) => return None,
    };
    Some(Condition {
        type_: DRAINING.to_owned(),
        status: status.to_owned(),
        reason: reason.to_owned(),
        message: String::new(),
        observed_generation: None,
        last_transition_time: Time(Timestamp::now()),
    })
}

/// Writes what the blade's status has to say of a drain and does not say yet. 409: somebody wrote in between.
pub(crate) async fn tell_drain(client: &Client, blade: &str) -> Result<(), kube::Error> {
    let api: Api<FarNode> = Api::all(client.clone());
    let Some(node) = api.get_opt(blade).await? else {
        return Ok(());
    };
    let Some(condition) = untold_drain(&node) else {
        return Ok(());
    };
    let old = node.status.clone().unwrap_or_default();
    let new = FarNodeStatus {
        conditions: with_condition(&old, condition),
        ..old
    };
    write_to(&api, &node, &node.status, &new).await.map(drop)
}

/// The conditions with this one in the place of the one of its type.
fn with_condition(old: &FarNodeStatus, condition: Condition) -> Vec<Condition> {
    let mut all = old.conditions.clone();
    match all.iter_mut().find(|one| one.type_ == condition.type_) {
        Some(one) => *one = condition,
        None => all.push(condition),
    }
    all
}

fn manager() -> PatchParams {
    PatchParams {
        field_manager: Some(FIELD_MANAGER.to_owned()),
        ..PatchParams::default()
    }
}

async fn patch(api: &Api<FarNode>, blade: &str, old: &FarNodeStatus, new: &FarNodeStatus) -> Result<(), kube::Error> {
    let value = |status: &FarNodeStatus| serde_json::to_value(status).map_err(kube::Error::SerdeError);
    let difference = difference(&value(old)?, &value(new)?);
    if difference == json!({}) {
        return Ok(());
    }
    let body = json!({ "status": difference });
    api.patch_status(blade, &manager(), &Patch::Merge(body)).await.map(drop)
}

fn ready_condition(old: &FarNodeStatus, status: &str, reason: &str, message: &str) -> Condition {
    let kept = old
        .conditions
        .iter()
        .find(|one| one.type_ == "Ready" && one.status == status);
    Condition {
        type_: "Ready".to_owned(),
        status: status.to_owned(),
        reason: reason.to_owned(),
        message: message.to_owned(),
        observed_generation: None,
        last_transition_time: kept.map_or_else(|| Time(Timestamp::now()), |kept| kept.last_transition_time.clone()),
    }
}

/// What a blade says, checked and bounded.
fn status_of(request: HeartbeatRequest) -> Result<FarNodeStatus, String> {
    let capacity = request.capacity.ok_or("capacity is missing")?;
    if request.endpoint.is_empty()
        || request.endpoint.len() > 300
        || format!("https://{}", request.endpoint)
            .parse::<tonic::transport::Uri>()
            .is_err()
    {
        return Err("endpoint must be host:port".to_owned());
    }
    if request.labels.len() > MAX_LABELS {
        return Err(format!("labels: more than {MAX_LABELS}"));
    }
    for (key, value) in &request.labels {
        if key.starts_with("tiffany.dev/") || key.is_empty() || key.len() > MAX_KEY || value.len() > MAX_VALUE {
            return Err(format!("labels: {key:?} is too long, empty, or the controller's own"));
        }
    }
    if capacity.extended.len() > MAX_EXTENDED {
        return Err(format!("capacity.extended: more than {MAX_EXTENDED}"));
    }
    if let Some(name) = capacity
        .extended
        .keys()
        .find(|name| name.is_empty() || name.len() > MAX_KEY)
    {
        return Err(format!("capacity.extended: {name:?} is empty or too long"));
    }
    let extended: BTreeMap<String, u32> = capacity
        .extended
        .iter()
        .map(|(name, count)| (name.clone(), *count))
        .collect();
    Ok(FarNodeStatus {
        endpoint: Some(request.endpoint),
        capacity: Some(NodeResources {
            extended: extended.clone(),
            ..amounts(capacity.cpu_millis, capacity.memory_mib, capacity.max_vms)
        }),
        allocatable: Some(NodeResources {
            extended,
            ..amounts(
                capacity.allocatable_cpu_millis.min(capacity.cpu_millis),
                capacity.allocatable_memory_mib.min(capacity.memory_mib),
                capacity.max_vms,
            )
        }),
        labels: Some(request.labels.into_iter().collect()).filter(|labels: &BTreeMap<_, _>| !labels.is_empty()),
        conditions: Vec::new(),
        images: Some(images(&capacity)).filter(|images| !images.is_empty()),
        node_info: Some(NodeInfo {
            arch: cut(capacity.arch, 32),
            kernel_version: cut(capacity.kernel_version, 128),
            node_version: cut(capacity.node_version, 128),
            boot_id: cut(capacity.boot_id, 64),
            vmm: cut(capacity.vmm, 64),
            accelerator: cut(capacity.accelerator, 64),
            kvm_reason: cut(capacity.kvm_reason, 512),
        }),
    })
}

fn amounts(cpu_millis: u64, memory_mib: u64, vms: u32) -> NodeResources {
    let cpu = match cpu_millis % 1000 {
        0 => (cpu_millis / 1000).to_string(),
        _ => format!("{cpu_millis}m"),
    };
    NodeResources {
        cpu: Quantity::Text(cpu),
        memory: Quantity::Text(format!("{memory_mib}Mi")),
        vms: Some(vms),
        extended: BTreeMap::new(),
    }
}

fn images(capacity: &NodeCapacity) -> Vec<NodeImage> {
    let mut images: Vec<NodeImage> = capacity
        .images
        .iter()
        .take(MAX_IMAGES)
        .map(|image| NodeImage {
            digest: cut(image.digest.clone(), 128),
            names: image
                .references
                .iter()
                .take(16)
                .map(|name| cut(name.clone(), 512))
                .collect(),
            size_bytes: i64::try_from(image.size_bytes).ok(),
        })
        .collect();
    // The blade's order says nothing: another order is no change.
    images.sort_by(|one, other| one.digest.cmp(&other.digest));
    images
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heartbeat() -> HeartbeatRequest {
        let capacity = NodeCapacity {
            cpu_millis: 2500,
            memory_mib: 4096,
            allocatable_cpu_millis: 2000,
            allocatable_memory_mib: 999_999,
            ..NodeCapacity::default()
        };
        HeartbeatRequest {
            endpoint: "127.0.0.1:1".into(),
            capacity: Some(capacity),
            labels: Default::default(),
        }
    }

    #[test]
    fn amounts_are_written_as_quantities_and_allocatable_is_never_more_than_there_is() {
        let status = status_of(heartbeat()).unwrap();
        assert_eq!(status.capacity.unwrap().cpu.to_string(), "2500m");
        let room = status.allocatable.unwrap();
        assert_eq!(
            (room.cpu.to_string(), room.memory.to_string()),
            ("2".to_owned(), "4096Mi".to_owned())
        );
    }

    #[test]
    fn a_blade_that_changes_all_the_time_is_written_once_a_second() {
        let mut known = Known::new();
        let begin = known.changes.1;
        let written = (0..1000).filter(|_| known.may_change(begin)).count();
        assert_eq!(written, 20);
        let later = (0..100)
            .filter(|n| known.may_change(begin + Duration::from_millis(n * 100)))
            .count();
        assert_eq!(later, 9, "one a second, the first after a second");
    }

    #[tokio::test]
    async fn a_blade_that_the_api_calls_ready_again_is_watched_over_again() {
        let nowhere = kube::Config::new("http://127.0.0.1:1".parse().unwrap());
        let registry = Registry::new(Client::try_from(nowhere).unwrap(), Duration::from_secs(1));
        let node = |ready: &str| {
            let mut node = FarNode::new("b1", FarNodeSpec::default());
            node.status = Some(FarNodeStatus {
                conditions: vec![ready_condition(&FarNodeStatus::default(), ready, "r", "")],
                ..FarNodeStatus::default()
            });
            node
        };
        let is_lost = || registry.with(|blades| blades["b1"].lost);
        registry.expect(&node("True"));
        registry.with(|blades| blades.get_mut("b1").unwrap().lost = true);
        registry.expect(&node("Unknown"));
        assert!(is_lost(), "as it was written");
        registry.expect(&node("True"));
        assert!(!is_lost(), "somebody else wrote that");
    }

    #[test]
    fn what_a_blade_may_not_say_is_refused() {
        for (why, change) in [
            ("no capacity", (|one| one.capacity = None) as fn(&mut HeartbeatRequest)),
            ("no endpoint", |one| one.endpoint.clear()),
            ("long endpoint", |one| one.endpoint = "x".repeat(301)),
            ("endpoint with spaces", |one| one.endpoint = "a b:1".into()),
            ("the controller's label", |one| {
                drop(one.labels.insert("tiffany.dev/blade".into(), "other".into()))
            }),
            ("long value", |one| drop(one.labels.insert("a".into(), "x".repeat(64)))),
            ("many labels", |one| {
                one.labels = (0..65).map(|n| (n.to_string(), String::new())).collect()
            }),
        ] {
            let mut request = heartbeat();
            change(&mut request);
            assert!(status_of(request).is_err(), "{why}");
        }
    }

    #[test]
    fn images_are_bounded_and_their_order_is_no_change() {
        let mut one = heartbeat();
        let image = |n: usize| far_proto::node::Image {
            digest: format!("{n:04}"),
            references: vec!["r".repeat(600); 20],
            size_bytes: 1,
        };
        one.capacity.as_mut().unwrap().images = (0..50).map(image).collect();
        let mut other = one.clone();
        other.capacity.as_mut().unwrap().images.reverse();
        assert_eq!(status_of(one.clone()).unwrap(), status_of(other).unwrap());
        one.capacity.as_mut().unwrap().images = (0..500).map(image).collect();
        let images = status_of(one).unwrap().images.unwrap();
        assert_eq!(
            (images.len(), images[0].names.len(), images[0].names[0].len()),
            (100, 16, 512)
        );
    }
}
