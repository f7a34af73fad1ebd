//! Taps that others make on a bridge (Flintlock): isolated, and under their VM's policy, the moment they appear.
//!
//! Until a tap is told to be a VM's, the bridge's table drops all that it sends: a late policy closes, never opens. Names
//! that do not begin as Flintlock's are never touched.

use crate::{
    links::{Event, Link, LinkEvents},
    network::{Network, NetworkError},
    slot::TapName,
    table::BRIDGED_PREFIX,
};
use std::{collections::BTreeSet, time::Duration};

/// Something that happened to a tap on the bridge.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum TapEvent {
    /// It is a port of the bridge, and isolated: [`Network::attach_bridged`] lets its VM do what its policy says.
    Appeared(TapName),
    /// It is gone: [`Network::detach`] its slot.
    Gone(TapName),
}

/// Watches the taps of one bridge.
#[derive(Debug)]
pub struct BridgeWatch<'a> {
    network: &'a Network,
    bridge: TapName,
    events: LinkEvents,
    known: BTreeSet<TapName>,
}

impl<'a> BridgeWatch<'a> {
    /// From now on, in the calling thread's namespace, which is to be the network's. The bridge is guarded first.
    ///
    /// # Errors
    /// The kernel's.
    pub fn open(network: &'a Network, bridge: TapName) -> Result<Self, NetworkError> {
        network.guard_bridge(&bridge)?;
        // Before the first listing: what appears in between is seen twice, not never.
        let events = LinkEvents::open()?;
        Ok(Self {
            network,
            bridge,
            events,
            known: BTreeSet::new(),
        })
    }

    /// What happened within `patience`. Call it in a loop, on a thread of its own; each call first looks at all links, so
    /// that an event that was lost costs one round.
    ///
    /// # Errors
    /// The kernel's.
    pub fn next(&mut self, patience: Duration) -> Result<Vec<TapEvent>, NetworkError> {
        let found = self.look()?;
        if !found.is_empty() {
            return Ok(found);
        }
        match self.events.next(patience) {
            // The events themselves may be old by now: the links are looked at.
            Ok(events) if events.iter().any(|event| is_candidate(event.link())) => self.look(),
            Ok(_) => Ok(Vec::new()),
            Err(refused) if refused.code() == libc::ENOBUFS => self.look(),
            Err(refused) => Err(refused.into()),
        }
    }

    fn look(&mut self) -> Result<Vec<TapEvent>, NetworkError> {
        let links = self.network.links()?;
        let bridge = links
            .iter()
            .find(|link| link.name == self.bridge.as_str())
            .map(|link| link.index);
        let ports = links
            .iter()
            .filter(|link| is_candidate(link) && link.master.is_some() && link.master == bridge);
        let mut events = Vec::new();
        let mut seen = BTreeSet::new();
        for link in ports {
            let Ok(name) = link.name.parse::<TapName>() else {
                continue;
            };
            if !self.known.contains(&name) {
                match self.network.isolate(link) {
                    // Gone again between the look and the act.
                    Err(NetworkError::Kernel(refused)) if refused.code() == libc::ENODEV => continue,
                    other => other?,
                }
                events.push(TapEvent::Appeared(name.clone()));
            }
            seen.insert(name);
        }
        events.extend(self.known.difference(&seen).cloned().map(TapEvent::Gone));
        self.known = seen;
        Ok(events)
    }
}

impl Event {
    fn link(&self) -> &Link {
        match self {
            Self::There(link) | Self::Gone(link) => link,
        }
    }
}

fn is_candidate(link: &Link) -> bool {
    link.name.starts_with(BRIDGED_PREFIX)
}
