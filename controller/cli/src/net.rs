//! `far net`: what agents may reach, why a packet passes or not, and what becomes of each as it is sent.

use std::{net::IpAddr, time::Duration};

use far_proto::node::{
    AgentNetwork, BladeNetwork, ExplainRequest, Explanation, Identity, ListNetworksRequest, NetworkCounters,
    NetworkMode, PacketCount, TraceRequest, TracedPacket, network_client::NetworkClient,
};
use serde_json::{Value, json};
use tonic::transport::Channel;

use crate::{
    args::Machine,
    cluster::Cluster,
    exit::Outcome,
    folders::Folders,
    inside::Inside,
    node::{self, NodeError},
    output,
    table::{aligned, printable},
};

const LS_EXAMPLES: &str = "\
Examples:
  far net ls
  far net ls -o json | jq '.agents[] | {name, denied: .counters.denied.packets}'";

const EXPLAIN_EXAMPLES: &str = "\
Examples:
  far net explain crawler 203.0.113.7:443
  far net explain crawler api.example.com:443
  far net explain crawler 1.1.1.1:53 --protocol udp
  far net explain crawler [2001:db8::7]:443
  far net explain crawler 203.0.113.7 --protocol icmp

Exit code: 0 where the packet would pass, 1 where it would be dropped.";

const TRACE_EXAMPLES: &str = "\
Examples:
  far net trace crawler
  far net trace crawler -o json | jq 'select(.passed | not)'

Prints what the agent sends, at most 50 packets a second, with the rule that decided, until Ctrl-C or the agent's end. One
trace at a time runs on a blade; without one no packet is slowed.";

#[derive(Debug, clap::Subcommand)]
pub(crate) enum NetCommand {
    /// List this blade's agents with what they may reach and what was dropped
    #[command(after_help = LS_EXAMPLES)]
    Ls(LsArgs),
    /// Say which rule lets a packet through, or why none does
    #[command(after_help = EXPLAIN_EXAMPLES)]
    Explain(ExplainArgs),
    /// Follow what becomes of the packets that an agent sends
    #[command(after_help = TRACE_EXAMPLES)]
    Trace(TraceArgs),
}

#[derive(Debug, clap::Args)]
pub(crate) struct LsArgs {
    /// As JSON, for programs
    #[arg(short, long, value_enum, value_name = "FORMAT")]
    output: Option<Machine>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct ExplainArgs {
    /// Name of the FarAgent
    #[arg(value_parser = crate::args::agent_name)]
    agent: String,
    /// Address or name, with :PORT for TCP and UDP
    #[arg(value_parser = parse_destination)]
    destination: (String, u16),
    /// Protocol of the packet
    #[arg(long, value_enum, default_value = "tcp")]
    protocol: Protocol,
    /// Source address of the packet [default: the agent's own]
    #[arg(long, value_name = "ADDRESS")]
    source: Option<IpAddr>,
    /// As JSON, for programs
    #[arg(short, long, value_enum, value_name = "FORMAT")]
    output: Option<Machine>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct TraceArgs {
    /// Name of the FarAgent
    #[arg(value_parser = crate::args::agent_name)]
    agent: String,
    /// As JSON, one object a line, for programs
    #[arg(short, long, value_enum, value_name = "FORMAT")]
    output: Option<Machine>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Protocol {
    Tcp,
    Udp,
    Icmp,
}

impl Protocol {
    /// IP protocol number.
    fn number(self, is_ipv6: bool) -> u32 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Icmp if is_ipv6 => 58,
            Self::Icmp => 1,
        }
    }
}

/// `203.0.113.7`, `203.0.113.7:443`, `[2001:db8::7]:443`, `2001:db8::7`, `api.example.com:443`.
fn parse_destination(text: &str) -> Result<(String, u16), String> {
    if text.parse::<IpAddr>().is_ok() {
        return Ok((text.to_owned(), 0));
    }
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) => {
            let port = port
                .parse::<u16>()
                .map_err(|_| format!("{port:?} is no port: 0 to 65535"))?;
            (host, port)
        }
        None => (text, 0),
    };
    let bare = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'))
        .unwrap_or(host);
    if bare.is_empty() || (bare.contains(':') && bare.parse::<IpAddr>().is_err()) {
        return Err(format!(
            "{text:?} is no address or name with a port, such as 203.0.113.7:443"
        ));
    }
    Ok((bare.to_owned(), port))
}

pub(crate) async fn net(cluster: &Cluster, folders: &Folders, command: &NetCommand) -> anyhow::Result<Outcome> {
    match command {
        NetCommand::Ls(args) => ls(folders, args).await,
        NetCommand::Explain(args) => explain(cluster, folders, args).await,
        NetCommand::Trace(args) => trace(cluster, folders, args).await,
    }
}

async fn ls(folders: &Folders, args: &LsArgs) -> anyhow::Result<Outcome> {
    let mut client = node::connect_network(&folders.node_socket()).await?;
    let told = client.list_networks(ListNetworksRequest::default()).await;
    let mut told = told.map_err(NodeError::of("net ls"))?.into_inner();
    told.networks.sort_by_key(|one| who(one.identity.as_ref()));
    let blade = told.blade.unwrap_or_default();
    match args.output {
        Some(Machine::Json) => {
            let agents: Vec<_> = told.networks.iter().map(as_json).collect();
            let all = json!({ "blade": blade_json(&blade), "agents": agents });
            output::line(&serde_json::to_string_pretty(&all)?);
        }
        None => {
            if !told.networks.is_empty() {
                aligned(&rows(&told.networks))
                    .iter()
                    .for_each(|line| output::line(line));
            }
            blade_notes(&blade).iter().for_each(|note| output::note(note));
        }
    }
    Ok(Outcome::Success)
}

async fn explain(cluster: &Cluster, folders: &Folders, args: &ExplainArgs) -> anyhow::Result<Outcome> {
    let (inside, mut client) = find(cluster, folders, &args.agent).await?;
    let (destination, port) = &args.destination;
    let is_ipv6 = destination.parse::<IpAddr>().is_ok_and(|address| address.is_ipv6());
    let request = ExplainRequest {
        identity: Some(inside.identity.clone()),
        destination: destination.clone(),
        protocol: args.protocol.number(is_ipv6),
        port: (*port).into(),
        source: args.source.map(|source| source.to_string()).unwrap_or_default(),
    };
    let told = match client.explain(request).await {
        Ok(told) => told.into_inner(),
        Err(status) => return Err(inside.refused("net explain", status)),
    };
    match args.output {
        Some(Machine::Json) => output::line(&serde_json::to_string_pretty(&explanation_json(&told))?),
        None => explanation(&told).iter().for_each(|line| output::line(line)),
    }
    if told.passes {
        Ok(Outcome::Success)
    } else {
        Ok(Outcome::Negative)
    }
}

async fn trace(cluster: &Cluster, folders: &Folders, args: &TraceArgs) -> anyhow::Result<Outcome> {
    let (inside, mut client) = find(cluster, folders, &args.agent).await?;
    let request = TraceRequest {
        identity: Some(inside.identity.clone()),
    };
    let mut packets = match client.trace(request).await {
        Ok(packets) => packets.into_inner(),
        Err(status) => return Err(inside.refused("net trace", status)),
    };
    if args.output.is_none() {
        output::note(&format!("Following what {} sends; Ctrl-C ends it.", args.agent));
    }
    loop {
        let packet = tokio::select! {
            packet = packets.message() => packet,
            _ = tokio::signal::ctrl_c() => return Ok(Outcome::Success),
        };
        match packet {
            Ok(Some(packet)) => match args.output {
                Some(Machine::Json) => output::line(&packet_json(&packet).to_string()),
                None => output::line(&packet_line(&packet)),
            },
            Ok(None) => return Ok(Outcome::Success),
            Err(status) => return Err(inside.refused("net trace", status)),
        }
    }
}

async fn find(cluster: &Cluster, folders: &Folders, agent: &str) -> anyhow::Result<(Inside, NetworkClient<Channel>)> {
    let inside = Inside::find(cluster, folders, agent).await?;
    let client = node::connect_network(&folders.node_socket()).await?;
    Ok((inside, client))
}

/// The network of an agent of this machine's blade, for `far describe`; `None` where it cannot be asked.
pub(crate) async fn of_agent(folders: &Folders, identity: Identity) -> Option<Vec<String>> {
    let asked = async {
        let mut client = node::connect_network(&folders.node_socket()).await.ok()?;
        let request = ListNetworksRequest {
            identity: Some(identity),
        };
        client.list_networks(request).await.ok()
    };
    // Describing does not wait for a blade that hangs.
    let told = tokio::time::timeout(Duration::from_secs(5), asked).await.ok()??;
    let network = told.into_inner().networks.into_iter().next()?;
    Some(describe_lines(&network))
}

fn describe_lines(one: &AgentNetwork) -> Vec<String> {
    let counters = one.counters.unwrap_or_default();
    let mut lines = vec![
        "Network:".to_owned(),
        format!("  Mode:      {}", mode(one)),
        format!(
            "  Slot:      {} ({}, {})",
            one.slot,
            printable(&one.tap),
            one.slot_addresses.join(", ")
        ),
    ];
    for (name, count) in counts(&counters) {
        lines.push(format!(
            "  {:<10} {} packets, {} bytes",
            format!("{}:", title(name)),
            count.packets,
            count.bytes
        ));
    }
    for pin in &one.pinned {
        lines.push(format!(
            "  Pinned:    {} for {}",
            printable(&pin.address),
            printable(&pin.name)
        ));
    }
    lines
}

fn title(word: &str) -> String {
    let (first, rest) = word.split_at(1);
    format!("{}{rest}", first.to_uppercase())
}

fn counts(counters: &NetworkCounters) -> [(&'static str, PacketCount); 5] {
    [
        ("sent", counters.sent.unwrap_or_default()),
        ("received", counters.received.unwrap_or_default()),
        ("spoofed", counters.spoofed.unwrap_or_default()),
        ("limited", counters.limited.unwrap_or_default()),
        ("denied", counters.denied.unwrap_or_default()),
    ]
}

fn who(identity: Option<&Identity>) -> (String, String) {
    identity.map_or_else(Default::default, |who| (who.namespace.clone(), who.name.clone()))
}

fn mode(one: &AgentNetwork) -> &'static str {
    match one.mode() {
        NetworkMode::None => "None",
        NetworkMode::Open => "Open",
        NetworkMode::Restricted | NetworkMode::Unspecified => "Restricted",
    }
}

fn rows(agents: &[AgentNetwork]) -> Vec<Vec<String>> {
    let headings = [
        "NAMESPACE",
        "NAME",
        "SLOT",
        "MODE",
        "RULES",
        "PINNED",
        "SENT",
        "RECEIVED",
        "SPOOFED",
        "LIMITED",
        "DENIED",
    ];
    let mut rows = vec![headings.map(str::to_owned).to_vec()];
    for one in agents {
        let (namespace, name) = who(one.identity.as_ref());
        let mut row = vec![
            printable(&namespace),
            printable(&name),
            one.slot.to_string(),
            mode(one).to_owned(),
            one.egress.len().to_string(),
            one.pinned.len().to_string(),
        ];
        let counters = one.counters.unwrap_or_default();
        row.extend(counts(&counters).map(|(_, count)| count.packets.to_string()));
        rows.push(row);
    }
    rows
}

fn blade_notes(blade: &BladeNetwork) -> Vec<String> {
    if !blade.lack.is_empty() {
        return vec![format!(
            "No agent of this blade has a network card: {}.",
            printable(&blade.lack)
        )];
    }
    let way = match (blade.uplink, blade.uplink_link.as_str()) {
        (false, _) => "no agent needed the way out yet".to_owned(),
        (true, "") => "the blade has no default route".to_owned(),
        (true, link) => format!("out by {}", printable(link)),
    };
    let mut notes = vec![format!(
        "{} of {} slots are taken; {way}.",
        blade.slots_taken, blade.slots
    )];
    if !blade.uplink_lack.is_empty() {
        notes.push(printable(&blade.uplink_lack));
    }
    notes
}

fn blade_json(blade: &BladeNetwork) -> Value {
    json!({
        "lack": blade.lack,
        "slotsTaken": blade.slots_taken,
        "slots": blade.slots,
        "uplink": blade.uplink,
        "uplinkLink": blade.uplink_link,
        "uplinkLack": blade.uplink_lack,
        "ipv6": blade.ipv6,
        "mtu": blade.mtu,
    })
}

fn as_json(one: &AgentNetwork) -> Value {
    let (namespace, name) = who(one.identity.as_ref());
    let egress = one.egress.iter().map(|line| {
        json!({
            "field": line.field,
            "to": line.to,
            "protocol": line.protocol,
            "firstPort": line.first_port,
            "lastPort": line.last_port,
        })
    });
    let pinned = one
        .pinned
        .iter()
        .map(|pin| json!({ "address": pin.address, "name": pin.name }));
    let counters = one.counters.unwrap_or_default();
    let counters = counts(&counters).map(|(name, count)| {
        let count = json!({ "packets": count.packets, "bytes": count.bytes });
        (name.to_owned(), count)
    });
    json!({
        "namespace": namespace,
        "name": name,
        "uid": one.identity.as_ref().map(|who| who.uid.clone()),
        "slot": one.slot,
        "tap": one.tap,
        "mac": one.mac,
        "guestAddresses": one.guest_addresses,
        "slotAddresses": one.slot_addresses,
        "mode": mode(one),
        "egress": egress.collect::<Vec<_>>(),
        "pinned": pinned.collect::<Vec<_>>(),
        "counters": Value::Object(counters.into_iter().collect()),
    })
}

fn explanation(told: &Explanation) -> Vec<String> {
    let mut lines: Vec<String> = told
        .passed_over
        .iter()
        .map(|line| format!("  - {}", printable(line)))
        .collect();
    let verdict = if told.passes { "PASSES" } else { "DROPPED" };
    lines.push(format!("{verdict}: {}", printable(&told.rule)));
    lines
}

fn explanation_json(told: &Explanation) -> Value {
    json!({
        "passes": told.passes,
        "rule": told.rule,
        "passedOver": told.passed_over,
        "address": told.address,
    })
}

fn protocol_name(number: u32) -> String {
    match number {
        6 => "tcp".to_owned(),
        17 => "udp".to_owned(),
        1 => "icmp".to_owned(),
        58 => "icmpv6".to_owned(),
        other => format!("protocol {other}"),
    }
}

fn packet_line(packet: &TracedPacket) -> String {
    let seconds = packet.time_unix_us / 1_000_000;
    let time = format!(
        "{:02}:{:02}:{:02}.{:03}",
        seconds / 3600 % 24,
        seconds / 60 % 60,
        seconds % 60,
        packet.time_unix_us / 1000 % 1000
    );
    let port = if packet.port == 0 {
        String::new()
    } else {
        format!(" port {}", packet.port)
    };
    format!(
        "{time} {:<7} {} to {}{port}, {} bytes: {} [{}]",
        if packet.passed { "PASSED" } else { "DROPPED" },
        protocol_name(packet.protocol),
        printable(&packet.destination),
        packet.length,
        printable(&packet.rule),
        printable(&packet.chains.join(" > ")),
    )
}

fn packet_json(packet: &TracedPacket) -> Value {
    json!({
        "timeUnixUs": packet.time_unix_us,
        "source": packet.source,
        "destination": packet.destination,
        "protocol": protocol_name(packet.protocol),
        "port": packet.port,
        "length": packet.length,
        "passed": packet.passed,
        "chains": packet.chains,
        "rule": packet.rule,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations_are_addresses_or_names_with_a_port() {
        for (text, expected) in [
            ("203.0.113.7:443", Some(("203.0.113.7", 443))),
            ("203.0.113.7", Some(("203.0.113.7", 0))),
            ("[2001:db8::7]:443", Some(("2001:db8::7", 443))),
            ("2001:db8::7", Some(("2001:db8::7", 0))),
            ("api.example.com:443", Some(("api.example.com", 443))),
            ("api.example.com", Some(("api.example.com", 0))),
            ("api.example.com:https", None),
            ("203.0.113.7:65536", None),
            (":443", None),
            ("a:b:443", None),
        ] {
            let expected = expected.map(|(host, port): (&str, u16)| (host.to_owned(), port));
            assert_eq!(parse_destination(text).ok(), expected, "{text}");
        }
    }

    #[test]
    fn a_blade_without_cards_says_why_and_one_with_them_what_is_in_the_way() {
        let lacks = BladeNetwork {
            lack: "far-node lacks CAP_NET_ADMIN".into(),
            ..BladeNetwork::default()
        };
        assert!(blade_notes(&lacks)[0].contains("CAP_NET_ADMIN"));
        let stuck = BladeNetwork {
            slots: 64,
            slots_taken: 2,
            uplink: true,
            uplink_link: "bond0".into(),
            uplink_lack: "the blade forwards no packets".into(),
            ..BladeNetwork::default()
        };
        assert_eq!(
            blade_notes(&stuck),
            [
                "2 of 64 slots are taken; out by bond0.",
                "the blade forwards no packets"
            ]
        );
    }

    #[test]
    fn a_dropped_packet_is_one_line_with_its_reason() {
        let packet = TracedPacket {
            time_unix_us: 1_000,
            destination: "10.0.0.1".into(),
            protocol: 6,
            port: 443,
            length: 60,
            chains: vec!["guest".into(), "egress".into(), "denied".into()],
            rule: "no rule lets it: default deny".into(),
            ..TracedPacket::default()
        };
        assert_eq!(
            packet_line(&packet),
            "00:00:00.001 DROPPED tcp to 10.0.0.1 port 443, 60 bytes: no rule lets it: default deny [guest > egress > denied]"
        );
    }
}
