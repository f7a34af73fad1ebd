//! What an agent may reach: the wire's `NetworkSpec` becomes a policy here, or names the field at fault.

use super::{InvalidField, invalid};
use far_net::{Cidr, Destination, DnsName, MAX_DESTINATIONS, Mode, Policy, Protocol, Rule, Service};
use far_proto::node::{self as wire, egress_rule::To};
use std::ops::RangeInclusive;

/// Ports of one rule.
const MAX_PORTS: usize = 16;

/// Checks the network of a spec; an absent one lets nothing.
///
/// # Errors
/// The first field at fault.
pub(super) fn check(network: Option<wire::NetworkSpec>) -> Result<Policy, InvalidField> {
    let network = network.unwrap_or_default();
    let mode = match network.mode() {
        wire::NetworkMode::None => Mode::None,
        wire::NetworkMode::Unspecified | wire::NetworkMode::Restricted => Mode::Restricted,
        wire::NetworkMode::Open => Mode::Open,
    };
    if wire::NetworkMode::try_from(network.mode).is_err() {
        return invalid("spec.network.mode", "must be None, Restricted or Open");
    }
    if mode != Mode::Restricted && !network.egress.is_empty() {
        return invalid("spec.network.egress", "only mode Restricted takes rules");
    }
    if network.egress.len() > MAX_DESTINATIONS {
        let problem = format!("{} rules are more than {MAX_DESTINATIONS}", network.egress.len());
        return invalid("spec.network.egress", problem);
    }
    let mut policy = Policy {
        mode,
        ..Policy::default()
    };
    for (number, rule) in network.egress.iter().enumerate() {
        let field = format!("spec.network.egress[{number}]");
        let to = destination(&field, rule.to.as_ref())?;
        for (name, protocol, ports) in ports(&field, &rule.ports)? {
            policy.egress.push(Rule {
                to: to.clone(),
                protocol,
                ports,
            });
            policy.names.push(name);
        }
    }
    let has_names = policy.egress.iter().any(|rule| matches!(rule.to, Destination::Name(_)));
    if has_names || mode == Mode::Open {
        policy.services.push(Service::DNS);
    }
    policy.check().or_else(|error| invalid("spec", error.to_string()))?;
    Ok(policy)
}

fn destination(field: &str, to: Option<&To>) -> Result<Destination, InvalidField> {
    match to {
        Some(To::Cidr(text)) => match text.parse::<Cidr>() {
            Ok(cidr) => Ok(Destination::Cidr(cidr)),
            Err(error) => invalid(format!("{field}.cidr"), error.to_string()),
        },
        Some(To::DnsName(text)) => match text.parse::<DnsName>() {
            Ok(name) => Ok(Destination::Name(name)),
            Err(error) => invalid(format!("{field}.dnsName"), error.to_string()),
        },
        None => invalid(field, "needs exactly one of cidr and dnsName"),
    }
}

type Ports = (String, Protocol, RangeInclusive<u16>);

fn ports(field: &str, ports: &[wire::EgressPort]) -> Result<Vec<Ports>, InvalidField> {
    if ports.len() > MAX_PORTS {
        return invalid(
            format!("{field}.ports"),
            format!("{} are more than {MAX_PORTS}", ports.len()),
        );
    }
    if ports.is_empty() {
        let of = [Protocol::Tcp, Protocol::Udp].map(|protocol| (field.to_owned(), protocol, 0..=u16::MAX));
        return Ok(of.into());
    }
    let one = |(number, port): (usize, &wire::EgressPort)| {
        let field = format!("{field}.ports[{number}]");
        let protocol = match wire::Protocol::try_from(port.protocol) {
            Ok(wire::Protocol::Unspecified | wire::Protocol::Tcp) => Protocol::Tcp,
            Ok(wire::Protocol::Udp) => Protocol::Udp,
            Err(_) => return invalid(format!("{field}.protocol"), "must be TCP or UDP"),
        };
        let number = |name: &str, value: u32| match u16::try_from(value) {
            Ok(value) if value > 0 => Ok(value),
            _ => invalid(format!("{field}.{name}"), "must be 1 to 65535"),
        };
        let first = number("port", port.port)?;
        let last = match port.end_port {
            0 => first,
            end => number("endPort", end)?,
        };
        if last < first {
            return invalid(format!("{field}.endPort"), "must not be smaller than port");
        }
        Ok((field, protocol, first..=last))
    };
    ports.iter().enumerate().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(to: To, ports: &[(i32, u32, u32)]) -> wire::EgressRule {
        let port = |&(protocol, port, end_port): &(i32, u32, u32)| wire::EgressPort {
            protocol,
            port,
            end_port,
        };
        wire::EgressRule {
            to: Some(to),
            ports: ports.iter().map(port).collect(),
        }
    }

    fn spec(mode: wire::NetworkMode, egress: Vec<wire::EgressRule>) -> wire::NetworkSpec {
        wire::NetworkSpec {
            mode: mode.into(),
            egress,
        }
    }

    #[test]
    fn absent_is_restricted_to_nothing_and_asks_nobody() {
        let policy = check(None).unwrap();
        assert_eq!(
            (policy.mode, policy.egress.len(), policy.services.len()),
            (Mode::Restricted, 0, 0)
        );
        assert_eq!(check(Some(wire::NetworkSpec::default())).unwrap(), policy);
    }

    #[test]
    fn rules_keep_the_names_that_their_author_gave_them() {
        let network = spec(
            wire::NetworkMode::Restricted,
            vec![
                rule(To::Cidr("203.0.113.0/24".into()), &[(0, 443, 0), (2, 1000, 2000)]),
                rule(To::DnsName("api.example.com".into()), &[]),
            ],
        );
        let policy = check(Some(network)).unwrap();
        let told: Vec<_> = policy
            .egress
            .iter()
            .zip(&policy.names)
            .map(|(rule, name)| (name.as_str(), rule.protocol, rule.ports.clone()))
            .collect();
        assert_eq!(
            told,
            [
                ("spec.network.egress[0].ports[0]", Protocol::Tcp, 443..=443),
                ("spec.network.egress[0].ports[1]", Protocol::Udp, 1000..=2000),
                ("spec.network.egress[1]", Protocol::Tcp, 0..=65535),
                ("spec.network.egress[1]", Protocol::Udp, 0..=65535),
            ]
        );
        assert_eq!(policy.services, [Service::DNS], "a rule with a name needs the proxy");
        let open = check(Some(spec(wire::NetworkMode::Open, vec![]))).unwrap();
        assert_eq!((open.mode, open.services.as_slice()), (Mode::Open, &[Service::DNS][..]));
        assert_eq!(
            check(Some(spec(wire::NetworkMode::None, vec![]))).unwrap(),
            Policy::default()
        );
    }

    #[test]
    fn a_field_at_fault_is_named() {
        use wire::NetworkMode::{None as Nothing, Open, Restricted};
        let cidr = |text: &str| To::Cidr(text.into());
        let name = |text: &str| To::DnsName(text.into());
        let one = |to: To, ports: &[(i32, u32, u32)]| spec(Restricted, vec![rule(to, ports)]);
        let unknown = wire::NetworkSpec {
            mode: 7,
            egress: vec![],
        };
        let cases = [
            ("spec.network.mode", unknown),
            ("spec.network.egress", spec(Open, vec![rule(cidr("10.0.0.0/8"), &[])])),
            (
                "spec.network.egress",
                spec(Nothing, vec![rule(cidr("10.0.0.0/8"), &[])]),
            ),
            (
                "spec.network.egress",
                spec(Restricted, vec![rule(cidr("10.0.0.0/8"), &[]); 65]),
            ),
            (
                "spec.network.egress[0]",
                spec(Restricted, vec![wire::EgressRule::default()]),
            ),
            ("spec.network.egress[0].cidr", one(cidr("10.0.0.1/8"), &[])),
            ("spec.network.egress[0].cidr", one(cidr("example.com"), &[])),
            ("spec.network.egress[0].cidr", one(cidr("10.0.0.0/33"), &[])),
            ("spec.network.egress[0].dnsName", one(name("a b.com"), &[])),
            ("spec.network.egress[0].dnsName", one(name("localhost"), &[])),
            (
                "spec.network.egress[0].ports",
                one(cidr("10.0.0.0/8"), &[(1, 1, 0); 17]),
            ),
            (
                "spec.network.egress[0].ports[0].port",
                one(cidr("10.0.0.0/8"), &[(1, 0, 0)]),
            ),
            (
                "spec.network.egress[0].ports[0].port",
                one(cidr("10.0.0.0/8"), &[(1, 65_536, 0)]),
            ),
            (
                "spec.network.egress[0].ports[1].endPort",
                one(cidr("10.0.0.0/8"), &[(1, 5, 0), (1, 5, 4)]),
            ),
            (
                "spec.network.egress[0].ports[0].endPort",
                one(cidr("10.0.0.0/8"), &[(1, 5, 70_000)]),
            ),
            (
                "spec.network.egress[0].ports[0].protocol",
                one(cidr("10.0.0.0/8"), &[(9, 5, 0)]),
            ),
        ];
        for (field, network) in cases {
            assert_eq!(check(Some(network)).unwrap_err().field, field);
        }
    }
}
