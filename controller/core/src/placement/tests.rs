use std::collections::{BTreeSet, HashMap};

use proptest::prelude::*;

use super::*;

mod agents;
mod index_model;
mod parts;
mod waiting;

const NOW: Duration = Duration::ZERO;

fn blade(cpu_millis: u64, memory_mib: u64) -> Blade {
    Blade {
        ready: true,
        cpu_millis,
        memory_mib,
        ..Blade::default()
    }
}

fn request(cpu_millis: u64, memory_mib: u64) -> Request {
    Request {
        cpu_millis,
        memory_mib,
        image: "image".into(),
        ..Request::default()
    }
}

fn taint(key: &str, value: &str, effect: Effect) -> Taint {
    Taint {
        key: key.into(),
        value: value.into(),
        effect,
    }
}

fn with(blades: &[(&str, Blade)]) -> Placer {
    let mut placer = Placer::new(7);
    for (name, blade) in blades {
        placer.upsert_blade(name, blade.clone());
    }
    placer
}

#[test]
fn the_emptiest_blade_wins_and_a_local_image_decides_between_equals() {
    let mut placer = with(&[("a", blade(4000, 4096)), ("b", blade(4000, 4096))]);
    let first = placer.place("1", &request(1000, 1024), NOW).unwrap();
    let second = placer.place("2", &request(1000, 1024), NOW).unwrap();
    assert_ne!(first, second);
    let local = Blade {
        images: [("image".to_owned(), 0)].into(),
        ..blade(4000, 4096)
    };
    let mut placer = with(&[("a", blade(4000, 4096)), ("b", local), ("c", blade(4000, 4096))]);
    assert_eq!(placer.place("1", &request(1000, 1024), NOW).unwrap(), "b");
}

#[test]
fn the_message_counts_blades_by_cause_most_first() {
    let mut placer = with(&[
        ("a", blade(8000, 64)),
        ("b", blade(8000, 64)),
        (
            "c",
            Blade {
                ready: false,
                ..blade(8000, 8192)
            },
        ),
    ]);
    let error = placer.place("1", &request(1000, 512), NOW).unwrap_err();
    assert_eq!(
        error.to_string(),
        "0/3 blades are available: 2 insufficient memory, 1 not ready."
    );
    assert_eq!(
        with(&[]).place("1", &request(1, 1), NOW).unwrap_err().to_string(),
        "0/0 blades are available."
    );
}

#[test]
fn a_request_that_no_blade_could_ever_hold_says_so_and_names_the_field() {
    let mut placer = with(&[("a", blade(4000, 4096))]);
    let error = placer
        .place("1", &request(5_000_000, 943_718_400), NOW)
        .unwrap_err()
        .to_string();
    assert!(
        error.starts_with("0/1 blades are available: 1 insufficient cpu, 1 insufficient memory."),
        "{error}"
    );
    assert!(
        error.contains("spec.cpu (5000000m) is more than any blade has (4000m)."),
        "{error}"
    );
    assert!(
        error.contains("spec.memory (943718400 MiB) is more than any blade has (4096 MiB)."),
        "{error}"
    );
}

#[test]
fn every_filter_keeps_its_blade_out_and_is_named() {
    let base = blade(4000, 4096);
    let labelled = Request {
        node_selector: [("zone".to_owned(), "a".to_owned())].into(),
        ..request(1, 1)
    };
    let named = Request {
        node_name: Some("other".into()),
        ..request(1, 1)
    };
    let avoiding = Request {
        avoid: ["a".to_owned()].into(),
        ..request(1, 1)
    };
    for (why, blade, request, text) in [
        (
            "cordoned",
            Blade {
                cordoned: true,
                ..base.clone()
            },
            request(1, 1),
            "1 unschedulable",
        ),
        (
            "tainted",
            Blade {
                taints: vec![taint("gpu", "", Effect::NoSchedule)],
                ..base.clone()
            },
            request(1, 1),
            "1 had untolerated taint {gpu}",
        ),
        ("selector", base.clone(), labelled, "1 didn't match spec.nodeSelector"),
        ("named", base.clone(), named, "there is no blade \"other\""),
        ("refused", base.clone(), avoiding, "1 refused lately"),
        ("cpu", base.clone(), request(4001, 1), "1 insufficient cpu"),
    ] {
        let error = with(&[("a", blade)]).place("1", &request, NOW).unwrap_err().to_string();
        assert!(error.contains(text), "{why}: {error}");
    }
    let mut full = with(&[("a", Blade { max_vms: 1, ..base })]);
    full.place("1", &request(1, 1), NOW).unwrap();
    assert!(
        full.place("2", &request(1, 1), NOW)
            .unwrap_err()
            .to_string()
            .contains("1 too many microVMs")
    );
}

#[test]
fn asking_twice_is_asking_once_and_released_room_is_free_again() {
    let mut placer = with(&[("a", blade(1000, 512))]);
    assert_eq!(placer.place("1", &request(1000, 512), NOW).unwrap(), "a");
    assert_eq!(placer.place("1", &request(1000, 512), NOW).unwrap(), "a");
    assert!(placer.place("2", &request(1000, 512), NOW).is_err());
    assert!(placer.release("1"));
    assert!(!placer.release("1"));
    assert_eq!(placer.place("2", &request(1000, 512), NOW).unwrap(), "a");
}

#[test]
fn the_same_seed_places_the_same_way_and_ties_are_not_decided_by_name() {
    let blades: Vec<(String, Blade)> = (0..16).map(|n| (format!("blade-{n}"), blade(64_000, 65_536))).collect();
    let run = |seed: u64| -> Vec<String> {
        let mut placer = Placer::new(seed);
        for (name, blade) in &blades {
            placer.upsert_blade(name, blade.clone());
        }
        (0..4)
            .map(|uid| placer.place(&uid.to_string(), &request(100, 64), NOW).unwrap())
            .collect()
    };
    assert_eq!(run(1), run(1));
    let firsts: BTreeSet<String> = (0..64).map(|seed| run(seed)[0].clone()).collect();
    assert!(firsts.len() > 4, "{firsts:?}");
}

#[derive(Debug, Clone)]
enum Step {
    Place(u8, u64, u64),
    Release(u8),
    Ready(u8, bool),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0_u8..24, 1_u64..3000, 1_u64..3000).prop_map(|(uid, cpu, memory)| Step::Place(uid, cpu, memory)),
        2 => (0_u8..24).prop_map(Step::Release),
        1 => (0_u8..4, any::<bool>()).prop_map(|(blade, ready)| Step::Ready(blade, ready)),
    ]
}

proptest! {
    #[test]
    fn no_order_of_requests_exceeds_a_blade(steps in proptest::collection::vec(step(), 0..120)) {
        let mut placer = Placer::new(3);
        for number in 0..4 {
            placer.upsert_blade(&number.to_string(), Blade { max_vms: 5, ..blade(4000, 4096) });
        }
        let mut held: HashMap<String, (String, u64, u64)> = HashMap::new();
        for step in steps {
            match step {
                Step::Place(uid, cpu, memory) => {
                    let uid = uid.to_string();
                    match placer.place(&uid, &request(cpu, memory), NOW) {
                        Ok(name) if held.get(&uid).is_some_and(|known| known.0 == name) => {}
                        Ok(name) => {
                            held.insert(uid, (name, cpu, memory));
                        }
                        // It had a blade that is not ready any more, and there is no other.
                        Err(_) => {
                            held.remove(&uid);
                        }
                    }
                }
                Step::Release(uid) => {
                    prop_assert_eq!(placer.release(&uid.to_string()), held.remove(&uid.to_string()).is_some());
                }
                Step::Ready(number, ready) => {
                    placer.upsert_blade(&number.to_string(), Blade { ready, max_vms: 5, ..blade(4000, 4096) });
                }
            }
            for number in 0..4 {
                let on = held.values().filter(|(name, _, _)| *name == number.to_string());
                let (vms, cpu, memory) = on.fold((0, 0, 0), |sum, one| (sum.0 + 1, sum.1 + one.1, sum.2 + one.2));
                prop_assert!(vms <= 5 && cpu <= 4000 && memory <= 4096);
            }
        }
        for uid in held.keys() {
            placer.release(uid);
        }
        prop_assert!(placer.reservations.is_empty());
        prop_assert!(placer.fleet.blades().all(|(_, slot, _)| slot.used == Default::default()));
    }
}
