//! NICs of the microVMs: one slot (tap, addresses, policy) per VM, in a network namespace of the guests' own.
//!
//! ```text
//! opening ──namespace found or made, reclaimed──► open      (behind the serving; who attaches meanwhile waits)
//!    └──────────────the kernel refuses──────────► lack      (vsock only, and every agent's status says why)
//! ```
//! VMs that an earlier far-node started hold their namespace: it is found by one of them, and they are adopted with their
//! connections. The way from there to the blade's own network is made with the first agent whose spec lets it anywhere, so
//! that a blade that needs none has nothing of it.

mod adopt;
mod resolver;

pub use adopt::Live;

use crate::{
    names::VmId,
    outcome::{MAX_MESSAGE, clean_text},
};
use far_net::{GATEWAY, GATEWAY6, GUEST_PREFIX, GuestNetns, Mode, Network, Place, Policy, Service, Slot, uplink};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    fs::File,
    io,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
};

/// Where far-vmm finds the namespace: its standard input. A path into this process would be gone if far-node is killed
/// before far-vmm opens it.
const INHERITED: &str = "/proc/self/fd/0";
/// Taps made before anybody asks for them; the others are made when they are needed.
const TAPS_AHEAD: u16 = 16;

/// A guest's NIC, as the ledger keeps it and the guest is told.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Nic {
    /// Number of its slot; absent in a ledger of a far-node that had none.
    pub slot: Option<u16>,
    /// By which the guest finds the link.
    pub mac: [u8; 6],
    /// CIDRs of the guest.
    pub addresses: Vec<String>,
    /// Of each family.
    pub gateways: Vec<String>,
    /// The blade's proxy, where the policy lets the guest ask it.
    pub name_servers: Vec<String>,
    /// Bytes; 0: the link's own.
    pub mtu: u32,
}

/// What a VM's description needs of its NIC.
#[derive(Debug, Clone)]
pub(crate) struct Attachment {
    pub(crate) tap: String,
    pub(crate) mac: String,
    pub(crate) netns: PathBuf,
    pub(crate) nic: Nic,
    /// What the spec asks for and this blade cannot give now; empty: nothing.
    pub(crate) notice: String,
}

/// Why a VM has no NIC.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum NoNic {
    /// The blade has none to give, or the spec wants none: the agent runs without.
    Without(String),
    /// The blade has, and this one could not be made: the agent must not run under another policy than its own.
    Failed(String),
}

/// What the blade's owner chose.
#[derive(Debug, Clone, Copy)]
pub struct NicOptions {
    /// VMs at a time.
    pub max_vms: u32,
    /// Whether guests have IPv6.
    pub has_ipv6: bool,
    /// Whom the DNS proxy asks; `None`: whom the blade asks itself.
    pub resolver: Option<SocketAddr>,
}

/// The way out, as it was found when an agent needed it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Uplink {
    /// The pair of links is there.
    pub is_connected: bool,
    /// The blade's link that packets leave by; empty: none.
    pub link: String,
    /// Why packets may not leave, and the cure; empty: nothing is known to be in the way.
    pub lack: String,
}

#[derive(Debug)]
pub(crate) struct Open {
    pub(crate) network: Arc<Network>,
    owners: Mutex<BTreeMap<VmId, Slot>>,
    /// Never held while the kernel is asked.
    uplink: Mutex<Uplink>,
    /// One at a time makes the way out.
    connecting: Mutex<()>,
}

#[derive(Debug, Clone)]
enum State {
    Lack(String),
    Opening,
    Open(Arc<Open>),
}

/// The blade's NICs, or why there are none.
#[derive(Debug)]
pub struct Nics {
    state: Mutex<State>,
    opened: Condvar,
    options: NicOptions,
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn told(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

impl Nics {
    /// NICs where this machine allows them. [`Self::start`] makes them.
    #[must_use]
    pub fn new(options: NicOptions) -> Self {
        let state = match far_net::capability() {
            Ok(()) => State::Opening,
            Err(lack) => State::Lack(clean_text(
                &format!("{lack} (cure: {}): vsock only", lack.fix()),
                MAX_MESSAGE,
            )),
        };
        Self {
            state: Mutex::new(state),
            opened: Condvar::new(),
            options,
        }
    }

    /// No NICs, by the owner's wish.
    #[must_use]
    pub fn none(reason: &str) -> Self {
        Self {
            state: Mutex::new(State::Lack(reason.to_owned())),
            opened: Condvar::new(),
            options: NicOptions {
                max_vms: 0,
                has_ipv6: false,
                resolver: None,
            },
        }
    }

    /// Why VMs have no NIC; `None` where they have one, or may have one soon.
    #[must_use]
    pub fn lack(&self) -> Option<String> {
        match &*held(&self.state) {
            State::Lack(lack) => Some(lack.clone()),
            State::Opening | State::Open(_) => None,
        }
    }

    /// Finds or makes the namespace, adopts the VMs that live, removes what is leaked. Once; blocking.
    pub(crate) fn start(&self, vms: &std::path::Path, live: &[Live]) {
        if !matches!(*held(&self.state), State::Opening) {
            return;
        }
        let state = match adopt::open(self.options, vms, live) {
            Ok((network, owners)) => {
                let open = Open {
                    network: Arc::new(network),
                    owners: Mutex::new(owners),
                    uplink: Mutex::default(),
                    connecting: Mutex::default(),
                };
                State::Open(Arc::new(open))
            }
            Err(error) => {
                let text = clean_text(&format!("no NIC for guests: {}: vsock only", told(&error)), MAX_MESSAGE);
                tracing::error!(error = %text, "the guests' network cannot be opened");
                State::Lack(text)
            }
        };
        *held(&self.state) = state;
        self.opened.notify_all();
    }

    /// Serves the guests' DNS questions until dropped; ends at once where there are no NICs, or no resolver.
    pub(crate) async fn serve_names(self: Arc<Self>) {
        let (nics, resolver) = (self.clone(), self.options.resolver);
        let bound = tokio::task::spawn_blocking(move || {
            let open = nics.wait().ok()?;
            let Some(resolver) = resolver.or_else(resolver::of_the_blade) else {
                tracing::warn!("no resolver is known (/etc/resolv.conf names none): guests resolve no names");
                return None;
            };
            match resolver::bind(&open.network) {
                Ok(socket) => Some((open.network.clone(), socket, resolver)),
                Err(error) => {
                    tracing::error!(%error, "the guests' DNS proxy cannot be bound: guests resolve no names");
                    None
                }
            }
        });
        let Ok(Some((network, socket, resolver))) = bound.await else {
            return;
        };
        match tokio::net::UdpSocket::from_std(socket) {
            Ok(socket) => {
                if let Err(error) = far_net::dns::serve(network, Arc::new(socket), resolver).await {
                    tracing::error!(%error, "the guests' DNS proxy ended: guests resolve no names");
                }
            }
            Err(error) => tracing::error!(%error, "the guests' DNS proxy cannot be served: guests resolve no names"),
        }
    }

    /// What is open now, without waiting.
    pub(crate) fn now(&self) -> Option<Arc<Open>> {
        match &*held(&self.state) {
            State::Open(open) => Some(open.clone()),
            State::Lack(_) | State::Opening => None,
        }
    }

    /// What is open, or why nothing is. Blocking while the network is being opened.
    fn wait(&self) -> Result<Arc<Open>, String> {
        let mut state = held(&self.state);
        loop {
            match &*state {
                State::Open(open) => return Ok(open.clone()),
                State::Lack(lack) => return Err(lack.clone()),
                State::Opening => state = self.opened.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// Connects the VM under its policy; its tap is up when the kernel has acknowledged that. Blocking.
    pub(crate) fn attach(&self, vm: &VmId, policy: &Policy) -> Result<Attachment, NoNic> {
        if policy.mode == Mode::None {
            return Err(NoNic::Without(
                "spec.network.mode is None: the microVM has no network card".to_owned(),
            ));
        }
        let open = self.wait().map_err(NoNic::Without)?;
        let failed = |error: &dyn std::error::Error| {
            let text = format!("spec.network: this blade cannot connect the microVM: {}", told(error));
            NoNic::Failed(clean_text(&text, MAX_MESSAGE))
        };
        // Of an earlier try to prepare the same VM.
        self.detach(vm).map_err(|error| failed(&error))?;
        let notice = if needs_uplink(policy) {
            open.connect_uplink()
        } else {
            String::new()
        };
        let place = open.network.attach(policy.clone()).map_err(|error| failed(&error))?;
        held(&open.owners).insert(vm.clone(), place.slot);
        Ok(Attachment {
            tap: place.tap.as_str().to_owned(),
            mac: place.guest.mac.map(|byte| format!("{byte:02x}")).join(":"),
            netns: INHERITED.into(),
            nic: nic(&place, policy, open.network.options().mtu),
            notice,
        })
    }

    /// The namespace for a VM that was attached, as far-vmm's standard input.
    ///
    /// # Errors
    /// It cannot be opened.
    pub(crate) fn netns_of(&self, vm: &VmId) -> io::Result<Option<File>> {
        let Some(open) = self.now() else { return Ok(None) };
        match (open.slot_of(vm), open.network.netns()) {
            (Some(_), Some(netns)) => File::open(netns.path()).map(Some),
            _ => Ok(None),
        }
    }

    /// Disconnects the VM, if it is connected. Blocking.
    ///
    /// # Errors
    /// The kernel's; its slot stays taken.
    pub(crate) fn detach(&self, vm: &VmId) -> Result<(), far_net::NetworkError> {
        // One that is being adopted is known only then.
        let Ok(open) = self.wait() else { return Ok(()) };
        let Some(slot) = open.slot_of(vm) else { return Ok(()) };
        open.network.detach(slot)?;
        held(&open.owners).remove(vm);
        Ok(())
    }
}

impl Open {
    pub(crate) fn slot_of(&self, vm: &VmId) -> Option<Slot> {
        held(&self.owners).get(vm).copied()
    }

    /// Who has a slot.
    pub(crate) fn owners(&self) -> BTreeMap<VmId, Slot> {
        held(&self.owners).clone()
    }

    pub(crate) fn uplink(&self) -> Uplink {
        held(&self.uplink).clone()
    }

    /// Makes the way out if it is not there; says what is in its way.
    fn connect_uplink(&self) -> String {
        let _one_at_a_time = held(&self.connecting);
        let before = self.uplink();
        let connect = || -> Result<Uplink, far_net::NetworkError> {
            let blade = GuestNetns::current()?;
            if !before.is_connected {
                self.network.connect_uplink(&blade)?;
            }
            let (is_forwarding, is_forwarding6) = blade.forwards()?;
            let way = uplink::way_out(&blade)?;
            let lack = if !is_forwarding {
                "spec.network.egress: the blade forwards no packets (net.ipv4.ip_forward is 0): sudo sysctl -w net.ipv4.ip_forward=1"
            } else if self.network.options().has_ipv6 && !is_forwarding6 {
                "spec.network.egress: the blade forwards no IPv6 packets: sudo sysctl -w net.ipv6.conf.all.forwarding=1"
            } else if way.is_none() {
                "spec.network.egress: the blade has no default route"
            } else {
                ""
            };
            Ok(Uplink {
                is_connected: true,
                link: way.map(|way| way.link).unwrap_or_default(),
                lack: lack.to_owned(),
            })
        };
        let now = match connect() {
            Ok(found) => found,
            Err(error) => {
                tracing::error!(error = %told(&error), "the guests' way out cannot be made");
                let text = format!(
                    "spec.network.egress: the blade's uplink cannot be made: {}",
                    told(&error)
                );
                Uplink {
                    lack: clean_text(&text, MAX_MESSAGE),
                    ..before
                }
            }
        };
        held(&self.uplink).clone_from(&now);
        now.lack
    }
}

fn needs_uplink(policy: &Policy) -> bool {
    policy.mode == Mode::Open || !policy.egress.is_empty()
}

/// What a guest is told: the same on every slot.
fn nic(place: &Place, policy: &Policy, mtu: u32) -> Nic {
    let guest = &place.guest;
    let mut addresses = vec![format!("{}/{GUEST_PREFIX}", guest.address)];
    let mut gateways = vec![GATEWAY.to_string()];
    if let Some(address6) = guest.address6 {
        addresses.push(format!("{address6}/128"));
        gateways.push(GATEWAY6.to_string());
    }
    let may_ask = policy.services.contains(&Service::DNS);
    Nic {
        slot: Some(place.slot.number()),
        mac: guest.mac,
        addresses,
        gateways,
        name_servers: may_ask.then(|| GATEWAY.to_string()).into_iter().collect(),
        mtu,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::AttemptKey;

    fn vm() -> VmId {
        VmId::of(&AttemptKey {
            uid: "u".into(),
            attempt: 1,
        })
    }

    fn restricted() -> Policy {
        Policy {
            mode: Mode::Restricted,
            ..Policy::default()
        }
    }

    #[test]
    fn without_nics_the_reason_is_told() {
        let nics = Nics::none("switched off");
        assert_eq!(nics.lack().as_deref(), Some("switched off"));
        let refused = nics.attach(&vm(), &restricted()).unwrap_err();
        assert_eq!(refused, NoNic::Without("switched off".into()));
        assert!(nics.detach(&vm()).is_ok());
    }

    #[test]
    fn an_agent_that_wants_no_network_has_no_card() {
        let refused = Nics::none("switched off")
            .attach(&vm(), &Policy::default())
            .unwrap_err();
        assert!(matches!(refused, NoNic::Without(why) if why.contains("spec.network.mode")));
    }

    #[test]
    fn a_guest_is_told_the_same_on_every_slot_and_a_name_server_only_if_it_may_ask() {
        let of = |number, policy: &Policy| {
            let place = Place::routed(Slot::new(number).unwrap(), true);
            Nic {
                slot: None,
                ..nic(&place, policy, 1400)
            }
        };
        let asks = Policy {
            services: vec![Service::DNS],
            ..restricted()
        };
        assert_eq!(of(0, &asks), of(700, &asks));
        assert_eq!(of(0, &asks).addresses, ["169.254.77.2/30", "fd00:fa:77::2/128"]);
        assert_eq!(of(0, &asks).name_servers, ["169.254.77.1"]);
        assert!(of(0, &restricted()).name_servers.is_empty());
    }

    #[test]
    fn a_ledger_of_an_earlier_far_node_is_read() {
        let old = r#"{"mac":[2,250,0,0,0,7],"address":"100.64.0.30/30"}"#;
        let nic: Nic = serde_json::from_str(old).unwrap();
        assert_eq!((nic.slot, nic.mac[5]), (None, 7));
    }
}
