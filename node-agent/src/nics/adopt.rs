//! At start: the namespace of the VMs that live, found by one of them, and what is in it put right.

use super::{NicOptions, TAPS_AHEAD, told};
use crate::names::VmId;
use far_net::{GuestNetns, MAX_SLOTS, Network, NetworkError, Options, Place, Policy, Proven, Slot, uplink};
use far_vmm::control::Client;
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    time::{Duration, Instant},
};

/// A far-vmm that was spawned just before far-node was killed has no VMM yet.
const PATIENCE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(50);

/// A VM with a NIC that had not ended when the ledger was written.
#[derive(Debug, Clone)]
pub struct Live {
    /// Its name.
    pub vm: VmId,
    /// Its slot.
    pub slot: u16,
    /// What its spec lets it reach.
    pub policy: Policy,
}

/// The guests' network: that of the VMs that live, else a new one.
pub(super) fn open(
    options: NicOptions,
    vms: &Path,
    live: &[Live],
) -> Result<(Network, BTreeMap<VmId, Slot>), NetworkError> {
    let way = uplink::way_out(&GuestNetns::current()?)?;
    let capacity = u16::try_from(options.max_vms).unwrap_or(MAX_SLOTS).clamp(64, MAX_SLOTS);
    let with = Options {
        // A slot rests before it is handed out again, and one that is hard to clean does not cost a VM.
        capacity: capacity.saturating_mul(2).min(MAX_SLOTS),
        has_ipv6: options.has_ipv6,
        mtu: way.map_or(0, |way| way.mtu),
        ..Options::default()
    };
    let found = find(vms, live);
    let is_found = found.is_some();
    let netns = found.map_or_else(GuestNetns::create, Ok)?;
    let network = Network::open(netns, with)?;
    let mut owners = BTreeMap::new();
    if is_found {
        let slots = (0..with.capacity).filter_map(Slot::new);
        let mut proven = Proven {
            live: Vec::new(),
            ours: slots.map(Slot::tap).collect(),
        };
        for one in live {
            let Some(slot) = Slot::new(one.slot) else { continue };
            proven
                .live
                .push((Place::routed(slot, options.has_ipv6), one.policy.clone()));
            owners.insert(one.vm.clone(), slot);
        }
        let done = network.reclaim(&proven)?;
        let adopted: BTreeSet<Slot> = network.list().into_iter().map(|(place, _)| place.slot).collect();
        owners.retain(|_, slot| adopted.contains(slot));
        tracing::info!(
            adopted = done.adopted,
            removed = done.removed,
            "the guests' network is taken over"
        );
    }
    network.prepare(TAPS_AHEAD)?;
    Ok((network, owners))
}

/// The namespace that the first VMM to be found is in.
fn find(vms: &Path, live: &[Live]) -> Option<GuestNetns> {
    let own = GuestNetns::current().ok()?;
    let give_up = Instant::now() + PATIENCE;
    let mut waiting: Vec<&Live> = live.iter().collect();
    while !waiting.is_empty() {
        let mut later = Vec::new();
        for one in waiting {
            let status = match Client::new(vms.join(one.vm.as_str()).join("vmm.sock")).status() {
                Ok(status) => status,
                Err(error) => {
                    // Not yet, or no more: the time tells.
                    tracing::debug!(vm.id = %one.vm, error = %told(&error), "a far-vmm does not answer");
                    later.push(one);
                    continue;
                }
            };
            if status.exit.is_some() {
                continue;
            }
            let Some(pid) = status.vmm_pid.and_then(|pid| u32::try_from(pid).ok()) else {
                later.push(one);
                continue;
            };
            match GuestNetns::of_process(pid) {
                Ok(found) if !found.is_same(&own).unwrap_or(true) => return Some(found),
                Ok(_) => tracing::warn!(vm.id = %one.vm, "a VMM with a NIC is in the blade's own network namespace"),
                Err(error) => {
                    tracing::warn!(vm.id = %one.vm, error = %told(&error), "a VMM's namespace cannot be entered")
                }
            }
        }
        if Instant::now() > give_up {
            return None;
        }
        waiting = later;
        if !waiting.is_empty() {
            // Runs on a thread of its own, and far-vmm tells nobody that it listens.
            #[allow(clippy::disallowed_methods)]
            std::thread::sleep(PAUSE);
        }
    }
    None
}
