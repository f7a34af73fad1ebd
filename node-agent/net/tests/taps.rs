//! Taps in namespaces made by the test, looked at by `ip -j` inside them.

#![allow(
    clippy::unwrap_used,
    reason = "in a test a panic is the report; clippy sees only #[test] functions as tests"
)]

use far_net::{GuestNetns, Network, Options, Policy, capability};
use serde_json::Value;
use std::{fs, path::Path, process::Command};

fn netns_or_skip(test: &str) -> Option<GuestNetns> {
    match capability() {
        Ok(()) => Some(GuestNetns::create().unwrap()),
        Err(lack) => {
            eprintln!("SKIPPED {test}: {lack}");
            None
        }
    }
}

/// What `ip -j` says inside the namespace at `netns`.
fn ip(netns: &Path, args: &[&str]) -> Value {
    let mut command = Command::new("nsenter");
    command
        .arg(format!("--net={}", netns.display()))
        .args(["ip", "-j"])
        .args(args);
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "ip {args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    // Nothing to show is no text at all.
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| serde_json::json!([]))
}

fn names(links: &Value) -> Vec<&str> {
    links
        .as_array()
        .unwrap()
        .iter()
        .map(|link| link["ifname"].as_str().unwrap())
        .collect()
}

/// What this crate could change in the machine's own namespace if it did something wrong.
fn machine() -> (String, Vec<String>) {
    let links = fs::read_dir("/sys/class/net")
        .unwrap()
        .map(|link| link.unwrap().file_name().into_string().unwrap());
    let ours = links.filter(|link| {
        link.strip_prefix("fa")
            .is_some_and(|number| number.parse::<u16>().is_ok())
    });
    (
        fs::read_to_string("/proc/sys/net/ipv4/ip_forward").unwrap(),
        ours.collect(),
    )
}

fn network(netns: GuestNetns) -> Network {
    let options = Options {
        has_ipv6: false,
        mtu: 1400,
        ..Options::default()
    };
    Network::open(netns, options).unwrap()
}

#[test]
fn a_tap_is_down_until_its_vm_is_let_and_the_way_to_it_is_written_down() {
    let name = "a_tap_is_down_until_its_vm_is_let_and_the_way_to_it_is_written_down";
    let Some(netns) = netns_or_skip(name) else { return };
    let network = network(netns);
    let path = network.netns().unwrap().path();
    network.prepare(1).unwrap();
    let is_up = || {
        ip(&path, &["link", "show", "dev", "fa0"])[0]["flags"]
            .to_string()
            .contains("\"UP\"")
    };
    assert!(!is_up());
    let place = network.attach(Policy::default()).unwrap();
    assert!(is_up());
    let seen = ip(&path, &["addr", "show", "dev", place.tap.as_str()]);
    assert_eq!(seen[0]["mtu"], 1400, "{seen}");
    assert_eq!(
        seen[0]["addr_info"],
        serde_json::json!([]),
        "without IPv6 not even a link-local one"
    );
    let routes = ip(&path, &["route", "show", "dev", "fa0"]);
    assert_eq!(routes[0]["dst"], "100.64.0.2", "{routes}");
    let neighbours = ip(&path, &["neigh", "show", "dev", "fa0"]);
    assert_eq!(
        (neighbours[0]["dst"].as_str(), neighbours[0]["lladdr"].as_str()),
        (Some("169.254.77.2"), Some("02:fa:00:00:00:01")),
        "{neighbours}"
    );
    network.detach(place.slot).unwrap();
    assert!(!is_up());
}

#[test]
fn the_namespace_has_no_uplink_and_forwards_nothing_and_the_machine_is_unchanged() {
    let name = "the_namespace_has_no_uplink_and_forwards_nothing_and_the_machine_is_unchanged";
    let before = machine();
    let Some(netns) = netns_or_skip(name) else { return };
    let network = network(netns);
    let path = network.netns().unwrap().path();
    for _ in 0..2 {
        network.attach(Policy::default()).unwrap();
    }
    assert_eq!(names(&ip(&path, &["link"])), ["lo", "fa0", "fa1"]);
    let routes = ip(&path, &["route"]);
    assert!(
        routes.as_array().unwrap().iter().all(|route| route["dst"] != "default"),
        "{routes}"
    );
    let inside = format!("--net={}", path.display());
    let forward = Command::new("nsenter")
        .args([&inside, "cat", "/proc/sys/net/ipv4/ip_forward"])
        .output()
        .unwrap();
    assert_eq!(forward.stdout, b"0\n");
    assert_eq!(machine(), before);
}

#[test]
fn two_namespaces_hold_the_same_slot_apart() {
    let name = "two_namespaces_hold_the_same_slot_apart";
    let (Some(one), Some(other)) = (netns_or_skip(name), netns_or_skip(name)) else {
        return;
    };
    let (one, other) = (network(one), network(other));
    let first = one.attach(Policy::default()).unwrap();
    assert_eq!(names(&ip(&other.netns().unwrap().path(), &["link"])), ["lo"]);
    assert_eq!(other.attach(Policy::default()).unwrap(), first);
}

#[test]
fn without_capabilities_the_lack_and_its_cure_are_told() {
    let name = "without_capabilities_the_lack_and_its_cure_are_told";
    if capability().is_ok() {
        // Only a process without capabilities can show it: this very test is run once more as `nobody`.
        let folder = tempfile::tempdir().unwrap();
        let copy = folder.path().join("taps");
        fs::copy(std::env::current_exe().unwrap(), &copy).unwrap();
        for path in [folder.path(), &copy] {
            fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        }
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all"]);
        let Ok(output) = command.arg(&copy).args(["--exact", name, "--nocapture"]).output() else {
            eprintln!("SKIPPED {name}: setpriv");
            return;
        };
        let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success() && text.contains("checked without capabilities"),
            "{text}"
        );
        return;
    }
    let lack = capability().unwrap_err();
    assert!(
        lack.to_string().contains("CAP_NET_ADMIN") && lack.fix().contains("setcap"),
        "{lack}"
    );
    assert!(GuestNetns::create().is_err());
    eprintln!("checked without capabilities");
}
