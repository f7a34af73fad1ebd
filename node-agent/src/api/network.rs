//! What each agent may reach, what was let and what was not, and why.

use super::{NodeApi, blocking};
use crate::{
    names::{AttemptKey, VmId},
    nics::Open,
    record::Record,
};
use far_net::{
    Count, Counters, Destination, DnsName, GATEWAY, GATEWAY6, Mode, Packet, Pinned, Place, Policy, Protocol, Slot,
    Traced,
};
use far_proto::node::{self as proto, network_server::Network};
use futures::stream::BoxStream;
use std::{
    net::IpAddr,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

/// Traced packets that wait for their reader; a slow one misses some.
const TRACE_QUEUE: usize = 256;
/// Between two looks whether the reader is gone.
const TRACE_PATIENCE: Duration = Duration::from_millis(200);
/// errno(3): a table that another socket owns.
const EPERM: i32 = 1;
/// Pinned addresses told per agent.
const MAX_PINNED: usize = 256;

fn failed(error: &far_net::NetworkError) -> Status {
    Status::internal(format!("asking the kernel for the network: {error}"))
}

/// One connected agent.
struct Connected {
    open: Arc<Open>,
    slot: Slot,
    place: Place,
    policy: Policy,
}

impl NodeApi {
    fn record(&self, key: &AttemptKey) -> Result<Arc<Record>, Status> {
        let entry = self.board().entry(key);
        entry
            .map(|entry| entry.record)
            .ok_or_else(|| Status::not_found("the agent was forgotten meanwhile"))
    }

    fn connected(&self, identity: Option<&proto::Identity>) -> Result<Connected, Status> {
        let key = self.find(identity.unwrap_or(&proto::Identity::default()))?;
        let record = self.record(&key)?;
        let nics = &self.supervisor.blade().nics;
        let without = || {
            let told = record
                .resources
                .as_ref()
                .map(|resources| resources.no_nic_reason.clone());
            let why = told.filter(|why| !why.is_empty()).or_else(|| nics.lack());
            let why = why.unwrap_or_else(|| "its microVM does not run".to_owned());
            Status::failed_precondition(format!("the agent has no network card: {why}"))
        };
        let open = nics.now().ok_or_else(without)?;
        let slot = open.slot_of(&record.vm_id).ok_or_else(without)?;
        let (place, policy) = open.network.of_slot(slot).ok_or_else(without)?;
        Ok(Connected {
            open,
            slot,
            place,
            policy,
        })
    }

    fn record_of_vm(&self, vm: &VmId) -> Option<Arc<Record>> {
        let (entries, _) = self.board().entries();
        // One that was claimed has two, and its first has ended.
        let mut records = entries.into_iter().map(|entry| entry.record);
        records.find(|record| record.vm_id == *vm && !record.is_ended())
    }
}

#[tonic::async_trait]
impl Network for NodeApi {
    async fn list_networks(
        &self,
        request: Request<proto::ListNetworksRequest>,
    ) -> Result<Response<proto::ListNetworksResponse>, Status> {
        let wanted = match request.into_inner().identity {
            None => None,
            Some(identity) => {
                self.connected(Some(&identity))?;
                Some(self.record(&self.find(&identity)?)?.vm_id.clone())
            }
        };
        let nics = &self.supervisor.blade().nics;
        let Some(open) = nics.now() else {
            let lack = nics
                .lack()
                .unwrap_or_else(|| "the guests' network is being opened".to_owned());
            return Ok(Response::new(proto::ListNetworksResponse {
                networks: Vec::new(),
                blade: Some(proto::BladeNetwork {
                    lack,
                    ..proto::BladeNetwork::default()
                }),
            }));
        };
        let owners = open.owners();
        let asked = open.clone();
        let (counters, pins, (taken, slots)) = blocking(move || {
            let counters = asked.network.all_counters()?;
            let pins = owners
                .iter()
                .filter(|(vm, _)| wanted.as_ref().is_none_or(|wanted| wanted == *vm))
                .map(|(vm, slot)| Ok((vm.clone(), *slot, asked.network.pins(*slot)?)))
                .collect::<Result<Vec<_>, far_net::NetworkError>>();
            Ok::<_, far_net::NetworkError>((counters, pins?, asked.network.use_of_slots()))
        })
        .await?
        .map_err(|error| failed(&error))?;
        let networks = pins.into_iter().filter_map(|(vm, slot, pinned)| {
            let record = self.record_of_vm(&vm)?;
            let (place, policy) = open.network.of_slot(slot)?;
            let counters = counters.get(&slot).copied().unwrap_or_default();
            Some(agent_network(&record, &place, &policy, &pinned, &counters))
        });
        let (options, uplink) = (open.network.options(), open.uplink());
        Ok(Response::new(proto::ListNetworksResponse {
            networks: networks.collect(),
            blade: Some(proto::BladeNetwork {
                lack: String::new(),
                slots_taken: whole(taken),
                slots: whole(slots),
                uplink: uplink.is_connected,
                uplink_link: uplink.link,
                uplink_lack: uplink.lack,
                ipv6: options.has_ipv6,
                mtu: options.mtu,
            }),
        }))
    }

    async fn explain(&self, request: Request<proto::ExplainRequest>) -> Result<Response<proto::Explanation>, Status> {
        let request = request.into_inner();
        let connected = self.connected(request.identity.as_ref())?;
        let protocol = match u8::try_from(request.protocol) {
            Ok(0) => 6,
            Ok(protocol) => protocol,
            Err(_) => return Err(Status::invalid_argument("protocol: must be 0 to 255")),
        };
        let port = u16::try_from(request.port).map_err(|_| Status::invalid_argument("port: must be 0 to 65535"))?;
        let source = match request.source.as_str() {
            "" => None,
            text => Some(
                text.parse::<IpAddr>()
                    .map_err(|_| Status::invalid_argument(format!("source: {text:?} is no address")))?,
            ),
        };
        let (network, slot) = (connected.open.network.clone(), connected.slot);
        let pinned = blocking(move || network.pins(slot))
            .await?
            .map_err(|error| failed(&error))?;
        let destination = match request.destination.parse::<IpAddr>() {
            Ok(address) => address,
            Err(_) => match by_name(&request.destination, &connected.policy, &pinned)? {
                Ok(address) => address,
                Err(rule) => {
                    return Ok(Response::new(proto::Explanation {
                        rule,
                        ..proto::Explanation::default()
                    }));
                }
            },
        };
        let own = own_address(&connected.place, destination);
        let packet = Packet {
            mac: connected.place.guest.mac,
            source: source.unwrap_or(own),
            destination,
            protocol,
            port,
        };
        let told = far_net::explain(
            &connected.place,
            &connected.policy,
            &pinned,
            &blade_addresses(),
            &packet,
        );
        Ok(Response::new(proto::Explanation {
            passes: told.passes,
            rule: told.rule,
            passed_over: told.passed_over,
            address: destination.to_string(),
        }))
    }

    type TraceStream = BoxStream<'static, Result<proto::TracedPacket, Status>>;

    async fn trace(&self, request: Request<proto::TraceRequest>) -> Result<Response<Self::TraceStream>, Status> {
        let connected = self.connected(request.into_inner().identity.as_ref())?;
        let network = connected.open.network.clone();
        let tap = connected.place.tap.clone();
        let trace = blocking(move || network.trace(&tap))
            .await?
            .map_err(|error| match error {
                far_net::NetworkError::Kernel(refused) if refused.code() == EPERM => {
                    Status::resource_exhausted("another trace runs on this blade")
                }
                error => failed(&error),
            })?;
        let (send, receive) = mpsc::channel(TRACE_QUEUE);
        let shutdown = self.supervisor.blade().shutdown.clone();
        tokio::task::spawn_blocking(move || follow(trace, &connected, &send, || shutdown.is_cancelled()));
        Ok(Response::new(Box::pin(ReceiverStream::new(receive))))
    }
}

/// Until the reader is gone, or the agent's card is.
fn follow(
    mut trace: far_net::Trace,
    connected: &Connected,
    send: &mpsc::Sender<Result<proto::TracedPacket, Status>>,
    is_over: impl Fn() -> bool,
) {
    let network = &connected.open.network;
    while !send.is_closed() && !is_over() {
        let seen = match trace.next(TRACE_PATIENCE) {
            Ok(seen) => seen,
            Err(error) => {
                let _ = send.blocking_send(Err(failed(&error)));
                return;
            }
        };
        if !network
            .of_slot(connected.slot)
            .is_some_and(|(_, policy)| policy == connected.policy)
        {
            return;
        }
        if seen.is_empty() {
            continue;
        }
        let pinned = network.pins(connected.slot).unwrap_or_default();
        for one in seen {
            // A full queue is a reader that is too slow: it misses this one.
            let _ = send.try_send(Ok(traced(&one, connected, &pinned)));
        }
    }
}

fn traced(one: &Traced, connected: &Connected, pinned: &Pinned) -> proto::TracedPacket {
    let packet = Packet {
        mac: one.mac,
        source: one.source,
        destination: one.destination,
        protocol: one.protocol,
        port: one.port,
    };
    let told = far_net::explain(&connected.place, &connected.policy, pinned, &blade_addresses(), &packet);
    let rule = match (one.passed, told.passes) {
        // The rules are read without what came before: a limit, or a connection that the kernel knows.
        (false, true) if one.chains.last().is_some_and(|chain| chain == "limited") => {
            "above a limit of packets or connections".to_owned()
        }
        (true, false) => "an open connection".to_owned(),
        _ => told.rule,
    };
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    proto::TracedPacket {
        time_unix_us: u64::try_from(since.as_micros()).unwrap_or(u64::MAX),
        source: one.source.to_string(),
        destination: one.destination.to_string(),
        protocol: one.protocol.into(),
        port: one.port.into(),
        length: one.length,
        passed: one.passed,
        chains: one.chains.clone(),
        rule,
    }
}

/// The address that a name is pinned to now; else what becomes of it.
fn by_name(text: &str, policy: &Policy, pinned: &Pinned) -> Result<Result<IpAddr, String>, Status> {
    let name: DnsName = text
        .parse()
        .map_err(|error| Status::invalid_argument(format!("destination: no address, and {error}")))?;
    if policy.mode == Mode::None || !policy.resolves(&name) {
        return Ok(Err(format!(
            "no rule has {name}: the blade's DNS proxy refuses the question"
        )));
    }
    let address = pinned.iter().find(|(_, of)| **of == name).map(|(address, _)| *address);
    Ok(address.ok_or_else(|| {
        if policy.mode == Mode::Open {
            format!("the blade's DNS proxy answers for {name}: explain one of its addresses")
        } else {
            format!("nothing is pinned for {name} yet: the agent must ask the blade's DNS proxy first")
        }
    }))
}

fn blade_addresses() -> [IpAddr; 2] {
    [GATEWAY.into(), GATEWAY6.into()]
}

fn own_address(place: &Place, destination: IpAddr) -> IpAddr {
    match (destination, place.guest.address6) {
        (IpAddr::V6(_), Some(own)) => own.into(),
        (IpAddr::V6(_), None) => place.guest.link_local().into(),
        (IpAddr::V4(_), _) => place.guest.address.into(),
    }
}

fn agent_network(
    record: &Record,
    place: &Place,
    policy: &Policy,
    pinned: &Pinned,
    counters: &Counters,
) -> proto::AgentNetwork {
    let six = |address: Option<std::net::Ipv6Addr>| address.map(|address| address.to_string());
    let egress = policy
        .egress
        .iter()
        .enumerate()
        .map(|(number, rule)| proto::EgressLine {
            field: policy.name_of_rule(number),
            to: match &rule.to {
                Destination::Cidr(cidr) => cidr.to_string(),
                Destination::Name(name) => name.to_string(),
            },
            protocol: match rule.protocol {
                Protocol::Any => "any",
                Protocol::Tcp => "TCP",
                Protocol::Udp => "UDP",
                Protocol::Icmp => "ICMP",
            }
            .to_owned(),
            first_port: (*rule.ports.start()).into(),
            last_port: (*rule.ports.end()).into(),
        });
    proto::AgentNetwork {
        identity: Some(crate::wire::identity(&record.identity)),
        slot: place.slot.number().into(),
        tap: place.tap.to_string(),
        mac: place.guest.mac.map(|byte| format!("{byte:02x}")).join(":"),
        guest_addresses: std::iter::once(place.guest.address.to_string())
            .chain(six(place.guest.address6))
            .collect(),
        slot_addresses: std::iter::once(place.address.to_string())
            .chain(six(place.address6))
            .collect(),
        mode: match policy.mode {
            Mode::None => proto::NetworkMode::None,
            Mode::Restricted => proto::NetworkMode::Restricted,
            Mode::Open => proto::NetworkMode::Open,
        }
        .into(),
        egress: egress.collect(),
        pinned: pinned
            .iter()
            .take(MAX_PINNED)
            .map(|(address, name)| proto::PinnedAddress {
                address: address.to_string(),
                name: name.to_string(),
            })
            .collect(),
        counters: Some(proto::NetworkCounters {
            sent: Some(count(counters.sent)),
            received: Some(count(counters.received)),
            spoofed: Some(count(counters.spoofed)),
            limited: Some(count(counters.limited)),
            denied: Some(count(counters.denied)),
        }),
    }
}

fn count(count: Count) -> proto::PacketCount {
    proto::PacketCount {
        packets: count.packets,
        bytes: count.bytes,
    }
}

fn whole(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(mode: Mode) -> Policy {
        Policy {
            mode,
            egress: vec![far_net::Rule {
                to: Destination::Name("api.example.com".parse().unwrap()),
                protocol: Protocol::Tcp,
                ports: 443..=443,
            }],
            ..Policy::default()
        }
    }

    #[test]
    fn a_name_is_explained_by_what_is_pinned_for_it() {
        let pinned = Pinned::from([([203, 0, 113, 7].into(), "api.example.com".parse().unwrap())]);
        let told = |text: &str, policy: &Policy, pinned: &Pinned| by_name(text, policy, pinned).unwrap();
        let restricted = policy(Mode::Restricted);
        assert_eq!(
            told("api.example.com", &restricted, &pinned),
            Ok(IpAddr::from([203, 0, 113, 7]))
        );
        assert!(
            told("api.example.com", &restricted, &Pinned::new())
                .unwrap_err()
                .contains("must ask")
        );
        assert!(
            told("evil.example.org", &restricted, &pinned)
                .unwrap_err()
                .contains("refuses")
        );
        assert!(
            told("evil.example.org", &policy(Mode::Open), &pinned)
                .unwrap_err()
                .contains("answers")
        );
        assert!(by_name("no name", &restricted, &pinned).is_err());
    }
}
