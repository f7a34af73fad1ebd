//! `FarAgent.spec.network` becomes the node API's `NetworkSpec`. Its values are checked by the blade; here only what the wire
//! cannot say is refused.

use far_api::{EgressPort, EgressRule, Network, NetworkMode, Protocol};
use far_proto::node::{self as wire, egress_rule::To};

use super::SpecError;

/// Absent stays absent: the blade's default is that nothing is reachable.
pub(super) fn convert(network: Option<&Network>) -> Result<Option<wire::NetworkSpec>, SpecError> {
    let Some(network) = network else { return Ok(None) };
    let mode = match network.mode {
        NetworkMode::None => wire::NetworkMode::None,
        NetworkMode::Restricted => wire::NetworkMode::Restricted,
        NetworkMode::Open => wire::NetworkMode::Open,
    };
    let rules = network.egress.iter().flatten().enumerate();
    let egress = rules
        .map(|(number, rule)| egress(number, rule))
        .collect::<Result<_, _>>()?;
    Ok(Some(wire::NetworkSpec {
        mode: mode.into(),
        egress,
    }))
}

fn egress(number: usize, rule: &EgressRule) -> Result<wire::EgressRule, SpecError> {
    let to = match (&rule.cidr, &rule.dns_name) {
        (Some(cidr), None) => To::Cidr(cidr.clone()),
        (None, Some(name)) => To::DnsName(name.clone()),
        (Some(_), Some(_)) | (None, None) => {
            return Err(SpecError::Invalid(format!(
                "spec.network.egress[{number}]: needs exactly one of cidr and dnsName"
            )));
        }
    };
    Ok(wire::EgressRule {
        to: Some(to),
        ports: rule.ports.iter().flatten().map(port).collect(),
    })
}

fn port(port: &EgressPort) -> wire::EgressPort {
    let protocol = match port.protocol {
        Protocol::Tcp => wire::Protocol::Tcp,
        Protocol::Udp => wire::Protocol::Udp,
    };
    wire::EgressPort {
        protocol: protocol.into(),
        port: port.port.into(),
        end_port: port.end_port.unwrap_or(0).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(json: &str) -> Network {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn every_field_arrives() {
        assert_eq!(convert(None).unwrap(), None);
        let spec = network(
            r#"{"egress": [
                {"cidr": "203.0.113.0/24", "ports": [{"port": 443}, {"port": 1000, "endPort": 2000, "protocol": "UDP"}]},
                {"dnsName": "api.example.com"}
            ]}"#,
        );
        let wire = convert(Some(&spec)).unwrap().unwrap();
        assert_eq!(wire.mode(), wire::NetworkMode::Restricted);
        assert_eq!(wire.egress[0].to, Some(To::Cidr("203.0.113.0/24".into())));
        let ports: Vec<_> = wire.egress[0]
            .ports
            .iter()
            .map(|port| (port.protocol(), port.port, port.end_port))
            .collect();
        assert_eq!(
            ports,
            [(wire::Protocol::Tcp, 443, 0), (wire::Protocol::Udp, 1000, 2000)]
        );
        assert_eq!(wire.egress[1].to, Some(To::DnsName("api.example.com".into())));
        assert!(wire.egress[1].ports.is_empty());
        for (mode, expected) in [
            ("None", wire::NetworkMode::None),
            ("Open", wire::NetworkMode::Open),
            ("Restricted", wire::NetworkMode::Restricted),
        ] {
            let spec = network(&format!(r#"{{"mode": "{mode}"}}"#));
            assert_eq!(convert(Some(&spec)).unwrap().unwrap().mode(), expected);
        }
    }

    #[test]
    fn a_rule_to_nowhere_or_to_two_places_is_named() {
        for rule in ["{}", r#"{"cidr": "10.0.0.0/8", "dnsName": "a.example.com"}"#] {
            let spec = network(&format!(r#"{{"egress": [{{"cidr": "10.0.0.0/8"}}, {rule}]}}"#));
            let error = convert(Some(&spec)).unwrap_err().to_string();
            assert!(error.starts_with("spec.network.egress[1]: "), "{error}");
        }
    }
}
