//! Who waits, who is next, and what wakes whom.

use super::*;

fn scheduler(blades: &[(&str, Blade)]) -> Scheduler {
    let mut scheduler = Scheduler::new(7, Packing::Spread);
    for (name, blade) in blades {
        scheduler.upsert_blade(name, blade.clone(), NOW);
    }
    scheduler
}

fn of(namespace: &str, cpu_millis: u64, priority: i32) -> Request {
    Request {
        namespace: namespace.into(),
        priority,
        ..request(cpu_millis, 1)
    }
}

/// A blade with room for one agent of 1000 millis.
fn small() -> Blade {
    blade(1000, 64)
}

/// Gives the one blade's room back as often as somebody waits; answers who got it, in order.
fn served(scheduler: &mut Scheduler, first: &str) -> Vec<String> {
    let mut order = Vec::new();
    let mut holder = first.to_owned();
    loop {
        scheduler.release(&holder, NOW);
        let Some(next) = scheduler.take_woken().pop() else {
            return order;
        };
        holder.clone_from(&next);
        order.push(next);
    }
}

#[test]
fn more_priority_is_served_first_then_who_came_first() {
    let mut scheduler = scheduler(&[("a", small())]);
    scheduler.place("holder", &of("x", 1000, 0), NOW).unwrap();
    for (uid, priority) in [("low", -1), ("first", 0), ("second", 0), ("high", 5)] {
        assert!(scheduler.place(uid, &of("x", 1000, priority), NOW).is_err());
    }
    // Asking again does not lose the place in the line.
    assert!(scheduler.place("first", &of("x", 1000, 0), NOW).is_err());
    assert_eq!(served(&mut scheduler, "holder"), ["high", "first", "second", "low"]);
}

#[test]
fn namespaces_take_turns_however_many_agents_one_of_them_has() {
    let mut scheduler = scheduler(&[("a", small())]);
    scheduler.place("holder", &of("x", 1000, 0), NOW).unwrap();
    for number in 0..40 {
        assert!(
            scheduler
                .place(&format!("big-{number:02}"), &of("big", 1000, 0), NOW)
                .is_err()
        );
    }
    for number in 0..4 {
        assert!(
            scheduler
                .place(&format!("small-{number}"), &of("small", 1000, 0), NOW)
                .is_err()
        );
    }
    let order = served(&mut scheduler, "holder");
    assert_eq!(order.len(), 44);
    let last_small = order.iter().rposition(|uid| uid.starts_with("small")).unwrap();
    assert!(last_small <= 8, "{order:?}");
    let bigs: Vec<_> = order.iter().filter(|uid| uid.starts_with("big")).collect();
    assert!(bigs.is_sorted(), "within a namespace who came first");
}

#[test]
fn a_turn_is_worth_room_not_agents() {
    let mut scheduler = scheduler(&[("a", blade(4000, 64))]);
    scheduler.place("holder", &of("x", 4000, 0), NOW).unwrap();
    for number in 0..8 {
        assert!(
            scheduler
                .place(&format!("large-{number}"), &of("large", 4000, 0), NOW)
                .is_err()
        );
        assert!(
            scheduler
                .place(&format!("tiny-{number}"), &of("tiny", 400, 0), NOW)
                .is_err()
        );
    }
    let mut order = Vec::new();
    scheduler.release("holder", NOW);
    loop {
        let got = scheduler.take_woken();
        if got.is_empty() {
            break;
        }
        for uid in &got {
            scheduler.release(uid, NOW);
        }
        order.extend(got);
    }
    let second_large = order.iter().position(|uid| uid == "large-1").unwrap();
    let tinies = order[..second_large]
        .iter()
        .filter(|uid| uid.starts_with("tiny"))
        .count();
    assert!(tinies >= 4, "{order:?}");
}

#[test]
fn only_what_helps_wakes_and_only_whom_it_helps() {
    let labelled = Request {
        node_selector: [("disk".to_owned(), "nvme".to_owned())].into(),
        ..request(100, 1)
    };
    let nvme = Blade {
        labels: [("disk".to_owned(), "nvme".to_owned())].into(),
        ..small()
    };
    let large = request(5000, 1);
    let tainted = Blade {
        taints: vec![taint("t", "", Effect::NoSchedule)],
        ..blade(8000, 64)
    };
    type Event = fn(&mut Scheduler);
    let set = |blade: Blade| {
        move |scheduler: &mut Scheduler| {
            scheduler.upsert_blade("a", blade.clone(), NOW);
        }
    };
    let release: Event = |scheduler| {
        scheduler.release("holder", NOW);
    };
    for (why, asking, event, expected) in [
        (
            "room of another size",
            &large,
            Box::new(release) as Box<dyn Fn(&mut Scheduler)>,
            false,
        ),
        ("room that does", &request(900, 1), Box::new(release), true),
        ("room where the label is missing", &labelled, Box::new(release), false),
        (
            "the label",
            &labelled,
            Box::new(set(Blade {
                cpu_millis: 2000,
                ..nvme.clone()
            })),
            true,
        ),
        ("the label without room", &labelled, Box::new(set(nvme)), false),
        ("a larger blade", &large, Box::new(set(blade(8000, 64))), true),
        ("a larger blade that is tainted", &large, Box::new(set(tainted)), false),
        (
            "the blade goes",
            &large,
            Box::new(|scheduler: &mut Scheduler| scheduler.remove_blade("a", NOW)),
            false,
        ),
    ] {
        let mut scheduler = scheduler(&[("a", small())]);
        scheduler.place("holder", &request(1000, 1), NOW).unwrap();
        assert!(scheduler.place("waits", asking, NOW).is_err(), "{why}");
        event(&mut scheduler);
        let woken = scheduler.take_woken();
        assert_eq!(woken == ["waits"], expected, "{why}: {woken:?}");
        assert_eq!(
            scheduler.placer().reserved_on("waits").is_some(),
            expected,
            "{why}: it has its room at once"
        );
    }
}

fn app(name: &str) -> Request {
    Request {
        namespace: "default".into(),
        labels: [("app".to_owned(), name.to_owned())].into(),
        ..request(1, 1)
    }
}

#[test]
fn agents_that_others_keep_away_are_tried_again_when_those_go_and_their_backoff_is_over() {
    let at = Duration::from_secs;
    let in_zone = |cpu_millis: u64| Blade {
        labels: [("zone".to_owned(), "z".to_owned())].into(),
        ..blade(cpu_millis, 64)
    };
    let apart = Request {
        agents: AgentAffinity {
            forbidden: vec![AgentTerm {
                namespaces: ["default".to_owned()].into(),
                selector: Selector {
                    requirements: vec![Requirement {
                        key: "app".into(),
                        operator: Operator::In(vec!["db".into()]),
                    }],
                },
                topology_key: "zone".into(),
            }],
            ..AgentAffinity::default()
        },
        cpu_millis: 100,
        ..app("web")
    };
    let mut scheduler = scheduler(&[("tiny", in_zone(10)), ("large", in_zone(1000))]);
    for name in ["db", "other"] {
        let on_tiny = Request {
            node_name: Some("tiny".into()),
            ..app(name)
        };
        scheduler.place(name, &on_tiny, NOW).unwrap();
    }
    assert!(scheduler.place("web", &apart, NOW).is_err());
    scheduler.release("other", NOW);
    assert_eq!(scheduler.next_due(), None, "that one was not in the way");
    scheduler.release("db", NOW);
    assert_eq!(scheduler.next_due(), Some(at(1)));
    scheduler.tick(at(0));
    assert_eq!(scheduler.take_woken(), Vec::<String>::new());
    scheduler.tick(at(1));
    assert_eq!(scheduler.placer().reserved_on("web"), Some("large"));
    assert!(scheduler.take_woken().contains(&"web".to_owned()));
}

#[test]
fn the_backoff_grows_from_one_to_ten_seconds() {
    let at = Duration::from_secs;
    let mut scheduler = scheduler(&[("a", blade(64_000, 64))]);
    let pool = |name: &str| Request {
        pool: Some(Pool {
            name: name.into(),
            max: Some(1),
        }),
        ..app("x")
    };
    let mut now = NOW;
    scheduler.place("holder", &pool("p"), now).unwrap();
    assert!(scheduler.place("waits", &pool("p"), now).is_err());
    for expected in [1, 2, 4, 8, 10, 10] {
        // Somebody of the namespace comes and goes: it may help, and does not.
        scheduler.place("noise", &app("noise"), now).unwrap();
        scheduler.release("noise", now);
        let due = scheduler.next_due().unwrap();
        assert_eq!(due - now, at(expected));
        now = due;
        scheduler.tick(now);
        assert_eq!(scheduler.placer().reserved_on("waits"), None);
    }
    scheduler.release("holder", now);
    scheduler.tick(now + at(10));
    assert_eq!(scheduler.placer().reserved_on("waits"), Some("a"));
}

#[test]
fn a_blade_that_refused_is_passed_over_for_ten_seconds() {
    let at = Duration::from_secs;
    let mut two = scheduler(&[("a", blade(2000, 64)), ("b", blade(1000, 64))]);
    assert_eq!(two.place("1", &request(500, 1), NOW).unwrap(), "a");
    two.refused("1", "a", NOW);
    assert_eq!(
        two.place("1", &request(500, 1), NOW).unwrap(),
        "b",
        "the next candidate"
    );
    let mut one = scheduler(&[("a", small())]);
    one.place("1", &request(1, 1), NOW).unwrap();
    one.refused("1", "a", NOW);
    let error = one.place("1", &request(1, 1), at(9)).unwrap_err().to_string();
    assert_eq!(error, "0/1 blades are available: 1 refused lately.");
    one.take_woken();
    one.tick(at(19));
    assert_eq!(one.placer().reserved_on("1"), Some("a"));
    assert!(one.take_woken().contains(&"1".to_owned()));
}

#[test]
fn room_that_was_not_written_is_kept_quiet_unless_its_agent_goes() {
    let mut scheduler = scheduler(&[("a", small())]);
    scheduler.place("1", &request(1000, 1), NOW).unwrap();
    assert!(scheduler.place("2", &request(1000, 1), NOW).is_err());
    scheduler.unwritten("1");
    assert_eq!(scheduler.take_woken(), Vec::<String>::new());
    assert_eq!(scheduler.place("1", &request(1000, 1), NOW).unwrap(), "a");
    scheduler.unwritten("1");
    scheduler.forget("1", NOW);
    assert_eq!(scheduler.take_woken(), ["2"]);
}

#[test]
fn a_choice_that_nobody_asks_for_again_is_given_back() {
    let at = Duration::from_secs;
    let mut scheduler = scheduler(&[("a", small())]);
    scheduler.place("gone", &request(1000, 1), NOW).unwrap();
    assert!(scheduler.place("2", &request(1000, 1), NOW).is_err());
    scheduler.tick(at(59));
    assert_eq!(scheduler.placer().reserved_on("2"), None);
    scheduler.tick(at(120));
    assert_eq!(scheduler.placer().reserved_on("2"), Some("a"));
}

#[derive(Debug, Clone)]
enum Step {
    Place(u8, u64),
    Release(u8),
    Unwritten(u8),
    Refused(u8),
    Ready(u8, bool),
    Wait(u64),
}

fn step() -> impl proptest::strategy::Strategy<Value = Step> {
    prop_oneof![
        5 => (0_u8..20, 100_u64..2500).prop_map(|(uid, cpu)| Step::Place(uid, cpu)),
        3 => (0_u8..20).prop_map(Step::Release),
        1 => (0_u8..20).prop_map(Step::Unwritten),
        1 => (0_u8..20).prop_map(Step::Refused),
        2 => (0_u8..3, any::<bool>()).prop_map(|(blade, ready)| Step::Ready(blade, ready)),
        1 => (0_u64..30).prop_map(Step::Wait),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Whoever waits although a blade would take it was either refused there or is still to be tried.
    #[test]
    fn nobody_waits_beside_room_and_nothing_leaks(steps in proptest::collection::vec(step(), 0..100)) {
        let mut scheduler = Scheduler::new(3, Packing::Spread);
        let ready = |ready: bool| Blade { ready, ..blade(4000, 4096) };
        for number in 0..3 {
            scheduler.upsert_blade(&number.to_string(), ready(true), NOW);
        }
        let mut asked: HashMap<String, u64> = HashMap::new();
        let mut disturbed: BTreeSet<String> = BTreeSet::new();
        let mut now = NOW;
        for step in steps {
            match step {
                Step::Place(uid, cpu) => {
                    let uid = uid.to_string();
                    let cpu = *asked.entry(uid.clone()).or_insert(cpu);
                    let _ = scheduler.place(&uid, &request(cpu, 1), now);
                    disturbed.remove(&uid);
                }
                Step::Release(uid) => {
                    let uid = uid.to_string();
                    scheduler.forget(&uid, now);
                    asked.remove(&uid);
                    disturbed.remove(&uid);
                }
                // Whoever was told so asks again by itself.
                Step::Unwritten(uid) => {
                    let uid = uid.to_string();
                    if scheduler.placer().reserved_on(&uid).is_some() {
                        scheduler.unwritten(&uid);
                        asked.remove(&uid);
                        // It would ask again; here it goes away instead, now or later.
                        scheduler.forget(&uid, now);
                    }
                }
                Step::Refused(uid) => {
                    let uid = uid.to_string();
                    if let Some(blade) = scheduler.placer().reserved_on(&uid).map(str::to_owned) {
                        scheduler.refused(&uid, &blade, now);
                        disturbed.insert(uid);
                    }
                }
                Step::Ready(number, is_ready) => {
                    scheduler.upsert_blade(&number.to_string(), ready(is_ready), now);
                }
                Step::Wait(seconds) => {
                    now += Duration::from_secs(seconds);
                    scheduler.tick(now);
                    // An assumed choice that is old was given back, and its agent would have to ask again.
                    for uid in asked.keys() {
                        if scheduler.placer().reserved_on(uid).is_none() {
                            disturbed.insert(uid.clone());
                        }
                    }
                }
            }
            for (uid, cpu) in &asked {
                let is_waiting = scheduler.placer().reserved_on(uid).is_none() && !disturbed.contains(uid);
                if is_waiting && !scheduler.has_refusals(uid) {
                    for number in 0..3 {
                        let would = scheduler.would_take(&number.to_string(), &request(*cpu, 1));
                        prop_assert!(!would, "{uid} waits beside room on {number}");
                    }
                }
            }
        }
        for uid in asked.keys() {
            scheduler.forget(uid, now);
        }
        prop_assert!(scheduler.is_idle());
    }
}
