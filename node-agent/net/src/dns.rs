//! The blade's DNS proxy: a guest may ask for the names of its policy, and may then reach what was answered.
//!
//! A guest is known by the address that its question comes from, which the tables do not let it forge. A name that no rule
//! covers is refused without asking anybody, so that questions carry nothing out. Of an answer only what follows from the question is believed:
//! its alias chain and the addresses at the end of that. Addresses that a name may not stand for (rebinding) are taken out.
//! The guest gets its answer after the kernel has acknowledged the pins.

use crate::{
    network::Network,
    policy::{DnsName, is_never, is_private},
};
use hickory_proto::{
    op::{Message, MessageType, OpCode, ResponseCode},
    rr::{DNSClass, Name, RData, Record, RecordType},
};
use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};
use tokio::{net::UdpSocket, sync::Semaphore, time::timeout};

/// Bytes of a question or answer over UDP (the usual EDNS size; what is longer comes truncated).
const MAX_BYTES: usize = 4096;
/// Questions that wait for the resolver at once; more are dropped, and asked again by the guest.
const MAX_WAITING: usize = 512;
/// And of one VM.
const MAX_WAITING_OF_ONE: usize = 16;
/// Until the resolver has answered.
const RESOLVER_LIMIT: Duration = Duration::from_secs(5);
/// A pin is good for at least this long after an answer: programs keep addresses longer than they may.
const SHORTEST_PIN: Duration = Duration::from_secs(300);
/// And counts as good for at most this long.
const LONGEST_PIN: Duration = Duration::from_secs(12 * 3600);
/// Aliases that are followed.
const MAX_ALIASES: usize = 16;
/// Addresses of one answer.
const MAX_ADDRESSES: usize = 64;

/// What is to be done with a guest's question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Asked {
    /// Ask the resolver for this name.
    Forward(DnsName),
    /// Answer this at once.
    Answer(Vec<u8>),
    /// It is no question: say nothing.
    Ignore,
}

/// Judges a question. `covers` says whether the guest's policy has a rule for a name.
#[must_use]
pub fn judge(question: &[u8], covers: impl FnOnce(&DnsName) -> bool) -> Asked {
    let Ok(message) = Message::from_vec(question) else {
        return Asked::Ignore;
    };
    let ([query], MessageType::Query, OpCode::Query) = (
        message.queries.as_slice(),
        message.metadata.message_type,
        message.metadata.op_code,
    ) else {
        return Asked::Ignore;
    };
    let refuse = |code| {
        let mut answer = Message::error_msg(message.metadata.id, OpCode::Query, code);
        answer.add_query(query.clone());
        answer.to_vec().map_or(Asked::Ignore, Asked::Answer)
    };
    let is_address = matches!(query.query_type(), RecordType::A | RecordType::AAAA);
    match query.name().to_ascii().parse::<DnsName>() {
        Ok(name) if query.query_class() == DNSClass::IN && covers(&name) => {
            if is_address {
                return Asked::Forward(name);
            }
            // There may be such records, but none that is of use: no error, no answer.
            refuse(ResponseCode::NoError)
        }
        Ok(_) | Err(_) => refuse(ResponseCode::Refused),
    }
}

/// What a resolver's answer says: the answer for the guest, and the addresses to pin with their lifetimes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    /// For the guest.
    pub answer: Vec<u8>,
    /// To be pinned before it is sent.
    pub pins: Vec<(IpAddr, Duration)>,
    /// Addresses that were taken out.
    pub refused: usize,
}

/// Reads the answer to a question that was forwarded; `None` if it is not the answer to that.
#[must_use]
pub fn resolve(question: &[u8], answer: &[u8]) -> Option<Resolved> {
    let asked = Message::from_vec(question).ok()?;
    let mut told = Message::from_vec(answer).ok()?;
    let query = asked.queries.first()?.clone();
    if told.metadata.id != asked.metadata.id
        || told.metadata.message_type != MessageType::Response
        || told.queries != asked.queries
    {
        return None;
    }
    let records = std::mem::take(&mut told.answers);
    let mut name: Name = query.name().clone();
    let mut kept: Vec<Record> = Vec::new();
    for _ in 0..MAX_ALIASES {
        let alias = records
            .iter()
            .find(|record| record.name == name && record.record_type() == RecordType::CNAME);
        let Some(record) = alias else { break };
        let RData::CNAME(target) = &record.data else { break };
        name = target.0.clone();
        kept.push(record.clone());
    }
    let (mut pins, mut refused) = (Vec::new(), 0);
    for record in records
        .iter()
        .filter(|record| record.name == name && record.record_type() == query.query_type())
    {
        let address: IpAddr = match &record.data {
            RData::A(address) => address.0.into(),
            RData::AAAA(address) => address.0.into(),
            _ => continue,
        };
        if is_never(address) || is_private(address) || pins.len() == MAX_ADDRESSES {
            refused += 1;
            continue;
        }
        let lifetime = Duration::from_secs(record.ttl.into()).clamp(SHORTEST_PIN, LONGEST_PIN);
        pins.push((address, lifetime));
        kept.push(record.clone());
    }
    let mut clean = Message::response(asked.metadata.id, OpCode::Query);
    clean.metadata.response_code = told.metadata.response_code;
    clean.metadata.recursion_desired = asked.metadata.recursion_desired;
    clean.metadata.recursion_available = true;
    clean.metadata.truncation = told.metadata.truncation;
    clean.add_query(query);
    clean.add_answers(kept);
    Some(Resolved {
        answer: clean.to_vec().ok()?,
        pins,
        refused,
    })
}

/// Serves guests on `socket`, which is bound to port 53 in their namespace, by asking `resolver` from this one. Ends with an
/// error of the socket only; drop the future to end it before.
///
/// # Errors
/// The socket's.
pub async fn serve(network: Arc<Network>, socket: Arc<UdpSocket>, resolver: SocketAddr) -> std::io::Result<()> {
    let places = Arc::new(Semaphore::new(MAX_WAITING));
    // No more than the blade has slots: guests cannot forge their addresses.
    let mut shares: HashMap<IpAddr, Arc<Semaphore>> = HashMap::new();
    // The kernel makes one change at a time: who waits for it shall not hold a thread.
    let pinning = Arc::new(Semaphore::new(1));
    let mut waiting = tokio::task::JoinSet::new();
    let mut buffer = vec![0; MAX_BYTES];
    loop {
        let (length, from) = socket.recv_from(&mut buffer).await?;
        while waiting.try_join_next().is_some() {}
        let share = shares
            .entry(from.ip())
            .or_insert_with(|| Arc::new(Semaphore::new(MAX_WAITING_OF_ONE)));
        let Ok(of_its_own) = share.clone().try_acquire_owned() else {
            continue;
        };
        let Ok(place) = places.clone().try_acquire_owned() else {
            continue;
        };
        let pinning = pinning.clone();
        let (network, socket, question) = (network.clone(), socket.clone(), buffer[..length].to_vec());
        waiting.spawn(async move {
            let _places = (of_its_own, place);
            if let Some(answer) = answer(network, &question, from.ip(), resolver, &pinning).await {
                // One that is lost is asked for again.
                let _ = socket.send_to(&answer, from).await;
            }
        });
    }
}

async fn answer(
    network: Arc<Network>,
    question: &[u8],
    from: IpAddr,
    resolver: SocketAddr,
    pinning: &Semaphore,
) -> Option<Vec<u8>> {
    let (place, policy) = network.of_address(from)?;
    let name = match judge(question, |name| policy.resolves(name)) {
        Asked::Forward(name) => name,
        Asked::Answer(answer) => return Some(answer),
        Asked::Ignore => return None,
    };
    let told = timeout(RESOLVER_LIMIT, ask(question, resolver)).await.ok()?.ok()?;
    let resolved = resolve(question, &told)?;
    let pins = resolved.pins;
    if pins.is_empty() {
        return Some(resolved.answer);
    }
    let _turn = pinning.acquire().await.ok()?;
    let pinned = tokio::task::spawn_blocking(move || network.pin_all(place.slot, &name, &pins));
    pinned.await.ok()?.ok()?;
    Some(resolved.answer)
}

/// From a port of its own each time, so that answers are hard to forge.
async fn ask(question: &[u8], resolver: SocketAddr) -> std::io::Result<Vec<u8>> {
    let any: IpAddr = if resolver.is_ipv4() {
        [0, 0, 0, 0].into()
    } else {
        [0_u16; 8].into()
    };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(resolver).await?;
    socket.send(question).await?;
    let mut buffer = vec![0; MAX_BYTES];
    let length = socket.recv(&mut buffer).await?;
    buffer.truncate(length);
    Ok(buffer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use hickory_proto::{
        op::Query,
        rr::rdata::{A, CNAME},
    };
    use proptest::prelude::*;

    fn question(name: &str, kind: RecordType) -> Vec<u8> {
        let mut message = Message::query();
        message.metadata.id = 7;
        message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
        message.to_vec().unwrap()
    }

    fn told(question: &[u8], records: &[(&str, RData)]) -> Vec<u8> {
        let asked = Message::from_vec(question).unwrap();
        let mut message = Message::response(asked.metadata.id, OpCode::Query);
        message.add_query(asked.queries[0].clone());
        for (name, data) in records {
            message.add_answer(Record::from_rdata(Name::from_ascii(name).unwrap(), 60, data.clone()));
        }
        message.to_vec().unwrap()
    }

    #[test]
    fn names_without_a_rule_are_refused_and_others_are_forwarded() {
        let asked = judge(&question("api.example.com.", RecordType::A), |name| {
            name.as_str() == "api.example.com"
        });
        assert_eq!(asked, Asked::Forward("api.example.com".parse().unwrap()));
        let Asked::Answer(answer) = judge(&question("evil.org.", RecordType::A), |_| false) else {
            panic!("not refused")
        };
        assert_eq!(
            Message::from_vec(&answer).unwrap().metadata.response_code,
            ResponseCode::Refused
        );
        let Asked::Answer(answer) = judge(&question("api.example.com.", RecordType::TXT), |_| true) else {
            panic!("not answered")
        };
        assert!(Message::from_vec(&answer).unwrap().answers.is_empty());
        assert_eq!(judge(b"no dns", |_| true), Asked::Ignore);
    }

    #[test]
    fn only_what_follows_from_the_question_is_pinned_and_rebinding_is_taken_out() {
        let question = question("api.example.com.", RecordType::A);
        let a = |a, b, c, d| RData::A(A::new(a, b, c, d));
        let alias = RData::CNAME(CNAME(Name::from_ascii("cdn.example.net.").unwrap()));
        let answer = told(
            &question,
            &[
                ("api.example.com.", alias),
                ("cdn.example.net.", a(198, 51, 100, 1)),
                ("cdn.example.net.", a(169, 254, 169, 254)),
                ("cdn.example.net.", a(10, 0, 0, 1)),
                ("cdn.example.net.", a(127, 0, 0, 1)),
                ("other.example.com.", a(198, 51, 100, 9)),
            ],
        );
        let resolved = resolve(&question, &answer).unwrap();
        assert_eq!(resolved.pins, [(IpAddr::from([198, 51, 100, 1]), SHORTEST_PIN)]);
        assert_eq!(resolved.refused, 3);
        assert_eq!(Message::from_vec(&resolved.answer).unwrap().answers.len(), 2);
        let mut alien = answer;
        alien[0] ^= 1;
        assert_eq!(resolve(&question, &alien), None, "another question's number");
    }

    proptest! {
        #[test]
        fn no_bytes_of_guests_or_resolvers_break_the_proxy(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = judge(&bytes, |_| true);
            let question = question("api.example.com.", RecordType::A);
            let _ = resolve(&question, &bytes);
            let _ = resolve(&bytes, &question);
        }
    }
}
