//! Taps in namespaces made by the test, looked at by `ip -j` inside them.

#![allow(
    clippy::unwrap_used,
    reason = "in a test a panic is the report; clippy sees only #[test] functions as tests"
)]

use far_net::{GuestNetns, Slot, capability};
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

#[test]
fn a_tap_has_its_slots_name_and_address_and_is_up() {
    let Some(netns) = netns_or_skip("a_tap_has_its_slots_name_and_address_and_is_up") else {
        return;
    };
    let tap = netns.create_tap(Slot::new(7).unwrap()).unwrap();
    let seen = ip(&netns.path(), &["addr", "show", "dev", tap.as_str()]);
    let address = &seen[0]["addr_info"][0];
    assert_eq!(
        (address["local"].as_str(), address["prefixlen"].as_u64()),
        (Some("100.64.0.29"), Some(30)),
        "{seen}"
    );
    assert!(seen[0]["flags"].as_array().unwrap().contains(&"UP".into()), "{seen}");
}

#[test]
fn the_namespace_has_no_uplink_and_forwards_nothing_and_the_machine_is_unchanged() {
    let name = "the_namespace_has_no_uplink_and_forwards_nothing_and_the_machine_is_unchanged";
    let before = machine();
    let Some(netns) = netns_or_skip(name) else { return };
    for number in [1, 2] {
        netns.create_tap(Slot::new(number).unwrap()).unwrap();
    }
    assert_eq!(names(&ip(&netns.path(), &["link"])), ["lo", "fa1", "fa2"]);
    let routes = ip(&netns.path(), &["route"]);
    assert!(
        routes.as_array().unwrap().iter().all(|route| route["dst"] != "default"),
        "{routes}"
    );
    let inside = format!("--net={}", netns.path().display());
    let forward = Command::new("nsenter")
        .args([&inside, "cat", "/proc/sys/net/ipv4/ip_forward"])
        .output()
        .unwrap();
    assert_eq!(forward.stdout, b"0\n");
    assert_eq!(machine(), before);
}

#[test]
fn creating_twice_and_deleting_twice_change_nothing_more() {
    let Some(netns) = netns_or_skip("creating_twice_and_deleting_twice_change_nothing_more") else {
        return;
    };
    let slot = Slot::new(3).unwrap();
    assert_eq!(netns.create_tap(slot).unwrap(), netns.create_tap(slot).unwrap());
    assert_eq!(names(&ip(&netns.path(), &["link"])), ["lo", "fa3"]);
    for _ in 0..2 {
        netns.delete_tap(&slot.tap()).unwrap();
        assert_eq!(names(&ip(&netns.path(), &["link"])), ["lo"]);
    }
}

#[test]
fn two_namespaces_hold_the_same_slot_apart() {
    let name = "two_namespaces_hold_the_same_slot_apart";
    let (Some(one), Some(other)) = (netns_or_skip(name), netns_or_skip(name)) else {
        return;
    };
    let slot = Slot::new(0).unwrap();
    one.create_tap(slot).unwrap();
    assert_eq!(names(&ip(&other.path(), &["link"])), ["lo"]);
    other.create_tap(slot).unwrap();
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
