//! Many slots, and what a killed process leaves, in namespaces of the test.

#![allow(
    clippy::unwrap_used,
    reason = "in a test a panic is the report; clippy sees only #[test] functions as tests"
)]

mod common;

use common::{json, lacks, nft_set};
use far_net::{
    Destination, GuestNetns, Mode, Network, Options, Place, Policy, Protocol, Proven, Reclaimed, Rule, Slot, Step,
};
use std::{
    collections::BTreeSet,
    os::unix::process::ExitStatusExt,
    path::Path,
    process::{Command, Stdio},
    sync::atomic::{AtomicUsize, Ordering},
};

fn policy() -> Policy {
    let networks = ["203.0.113.0/24", "198.51.100.0/25", "10.1.0.0/16", "2a00::/16"];
    let rule = |network: &str| Rule {
        to: Destination::Cidr(network.parse().unwrap()),
        protocol: Protocol::Tcp,
        ports: 443..=443,
    };
    Policy {
        mode: Mode::Restricted,
        egress: networks.map(rule).to_vec(),
        ..Policy::default()
    }
}

/// Names of the taps that are up, as `ip -j` tells.
fn up(netns: &Path) -> BTreeSet<String> {
    let links = json(netns, "ip -j link");
    let all = links.as_array().unwrap().iter();
    let up = all.filter(|link| link["flags"].as_array().unwrap().contains(&"UP".into()));
    up.map(|link| link["ifname"].as_str().unwrap().to_owned())
        .filter(|name| name.starts_with("fa"))
        .collect()
}

/// All elements of per-VM sets, as `nft` lists them.
fn listed(netns: &Path) -> String {
    let sets = [
        "source4",
        "source6",
        "neighbor6",
        "open",
        "live",
        "services",
        "packets_over",
        "connects_over",
        "connections_over",
        "sent",
        "received",
        "spoofed",
        "limited",
        "denied",
    ];
    let maps = ["vm", "inward4", "inward6", "outward4", "outward6"];
    // Of the shards, those that these tests' slots are in.
    let shards = (0..8).flat_map(|shard| {
        [("set", "ports"), ("map", "egress4"), ("map", "egress6")].map(|(kind, name)| (kind, format!("{name}_{shard}")))
    });
    let plain = sets
        .map(|name| ("set", name))
        .into_iter()
        .chain(maps.map(|name| ("map", name)));
    let mut elements = String::new();
    for (kind, name) in plain.map(|(kind, name)| (kind, name.to_owned())).chain(shards) {
        let of = json(netns, &format!("nft -j list {kind} inet far {name}"));
        elements += &of["nftables"][1][kind]["elem"].to_string();
    }
    elements.replace("null", "")
}

#[test]
fn a_thousand_slots_are_let_and_leave_nothing() {
    if lacks("a_thousand_slots_are_let_and_leave_nothing", &["ip", "nft"]) {
        return;
    }
    let network = Network::open(GuestNetns::create().unwrap(), Options::default()).unwrap();
    let netns = network.netns().unwrap().path();
    network.prepare(1000).unwrap();
    assert_eq!(
        (json(&netns, "ip -j link").as_array().unwrap().len(), up(&netns).len()),
        (1001, 0)
    );
    let places: Vec<Place> = (0..1000).map(|_| network.attach(policy()).unwrap()).collect();
    let slots: BTreeSet<Slot> = places.iter().map(|place| place.slot).collect();
    assert_eq!((slots.len(), up(&netns).len()), (1000, 1000));
    assert_eq!(nft_set(&netns, "inet", "source4").matches("169.254.77.2").count(), 1000);
    for place in &places {
        network.detach(place.slot).unwrap();
    }
    assert_eq!(
        (up(&netns).len(), listed(&netns).as_str(), network.use_of_slots()),
        (0, "", (0, 1024))
    );
}

/// Steps until the process kills itself, in the process that does.
static STEPS_LEFT: AtomicUsize = AtomicUsize::new(usize::MAX);

fn die_when_due(_: Step) {
    if STEPS_LEFT.fetch_sub(1, Ordering::SeqCst) == 1 {
        nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL).unwrap();
    }
}

/// A process that keeps a namespace; ended with the test, however that ends.
struct Holder(std::process::Child);

impl Holder {
    fn end(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        self.end();
    }
}

/// Not a test of its own: what [`kill_9_between_every_two_steps_leaves_nothing_after_a_reclaim`] kills.
#[test]
fn the_process_that_is_killed() {
    let (Ok(pid), Ok(steps)) = (std::env::var("FAR_NET_TEST_OWNER"), std::env::var("FAR_NET_TEST_STEPS")) else {
        return;
    };
    STEPS_LEFT.store(steps.parse().unwrap(), Ordering::SeqCst);
    let netns = GuestNetns::of_process(pid.parse().unwrap()).unwrap();
    let network = Network::open(
        netns,
        Options {
            on_step: die_when_due,
            ..Options::default()
        },
    )
    .unwrap();
    let first = network.attach(policy()).unwrap();
    let second = network.attach(policy()).unwrap();
    network.detach(first.slot).unwrap();
    network.detach(second.slot).unwrap();
    std::process::exit(42);
}

#[test]
fn kill_9_between_every_two_steps_leaves_nothing_after_a_reclaim() {
    let name = "kill_9_between_every_two_steps_leaves_nothing_after_a_reclaim";
    if lacks(name, &["ip", "nft", "sleep", "nsenter"]) {
        return;
    }
    let mut killed = 0;
    for steps in 1.. {
        let netns = GuestNetns::create().unwrap();
        // Its namespace is found by this process, as a VMM's is.
        let inside = format!("--net={}", netns.path().display());
        let mut command = Command::new("nsenter");
        command
            .args([&inside, "sleep", "600"])
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut holder = Holder(command.spawn().unwrap());
        common::wait_for("the holder in the namespace", || {
            let seen = std::fs::read_link(format!("/proc/{}/ns/net", holder.0.id())).ok()?;
            (seen != std::fs::read_link("/proc/self/ns/net").unwrap()).then_some(())
        });
        let ended = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "the_process_that_is_killed"])
            .env("FAR_NET_TEST_OWNER", holder.0.id().to_string())
            .env("FAR_NET_TEST_STEPS", steps.to_string())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .unwrap();
        // A ledger that knows of no VM, then one that knows that slot 1 lives.
        let path = netns.path();
        let ours: BTreeSet<_> = (0..4).map(|number| Slot::new(number).unwrap().tap()).collect();
        let is_second_up = up(&path).contains("fa1");
        let network = Network::open(netns, Options::default()).unwrap();
        if is_second_up {
            let live = vec![(Place::routed(Slot::new(1).unwrap(), true), policy())];
            let done = network
                .reclaim(&Proven {
                    live,
                    ours: ours.clone(),
                })
                .unwrap();
            assert_eq!(done.adopted, 1, "after {steps} steps");
            assert_eq!(up(&path), BTreeSet::from(["fa1".to_owned()]), "after {steps} steps");
            assert!(
                !listed(&path).contains("\"fa0\""),
                "after {steps} steps: {}",
                listed(&path)
            );
            assert_eq!(network.use_of_slots().0, 1);
            network.detach(Slot::new(1).unwrap()).unwrap();
        } else {
            network
                .reclaim(&Proven {
                    live: Vec::new(),
                    ours: ours.clone(),
                })
                .unwrap();
        }
        assert_eq!(
            (up(&path).len(), listed(&path).as_str()),
            (0, ""),
            "after {steps} steps"
        );
        assert_eq!(
            network.reclaim(&Proven { live: Vec::new(), ours }).unwrap(),
            Reclaimed::default()
        );
        network.attach(policy()).unwrap();
        holder.end();
        if ended.code() == Some(42) {
            break;
        }
        assert_eq!(ended.signal(), Some(9), "after {steps} steps");
        killed += 1;
    }
    // Two VMs with three steps up and three down.
    assert_eq!(killed, 12);
}

#[test]
fn names_that_no_ledger_proves_are_left_alone() {
    if lacks("names_that_no_ledger_proves_are_left_alone", &["ip", "nft"]) {
        return;
    }
    let network = Network::open(GuestNetns::create().unwrap(), Options::default()).unwrap();
    let path = network.netns().unwrap().path();
    common::ip(&path, "tuntap add dev fa7 mode tap");
    common::ip(&path, "link set fa7 up");
    let ours = BTreeSet::from([Slot::new(3).unwrap().tap()]);
    let done = network.reclaim(&Proven { live: Vec::new(), ours }).unwrap();
    assert_eq!(
        (done, up(&path)),
        (Reclaimed::default(), BTreeSet::from(["fa7".to_owned()]))
    );
}
