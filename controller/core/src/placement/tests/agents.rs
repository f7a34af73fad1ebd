//! Affinity, anti-affinity and spread, by tables and against a naive count.

use super::*;

fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect()
}

/// A blade in a zone.
fn in_zone(name: &str, zone: &str) -> Blade {
    Blade {
        labels: labels(&[("zone", zone), ("blade", name)]),
        ..blade(64_000, 65_536)
    }
}

fn zones() -> Placer {
    with(&[
        ("a1", in_zone("a1", "a")),
        ("a2", in_zone("a2", "a")),
        ("b1", in_zone("b1", "b")),
        ("none", blade(64_000, 65_536)),
    ])
}

fn term(app: &str, topology_key: &str) -> AgentTerm {
    AgentTerm {
        namespaces: ["default".to_owned()].into(),
        selector: Selector {
            requirements: vec![Requirement {
                key: "app".into(),
                operator: Operator::In(vec![app.into()]),
            }],
        },
        topology_key: topology_key.into(),
    }
}

fn app(name: &str) -> Request {
    Request {
        namespace: "default".into(),
        labels: labels(&[("app", name)]),
        ..request(1, 1)
    }
}

#[test]
fn agents_that_want_to_be_together_are() {
    let mut placer = zones();
    placer.reserve("0", "b1", &app("db"));
    let web = Request {
        agents: AgentAffinity {
            required: vec![term("db", "zone")],
            ..AgentAffinity::default()
        },
        ..app("web")
    };
    assert_eq!(placer.place("1", &web, NOW).unwrap(), "b1");
    let other = Request {
        namespace: "other".into(),
        ..app("db")
    };
    placer.release("0");
    placer.reserve("0", "a1", &other);
    let error = placer.place("2", &web, NOW).unwrap_err().to_string();
    assert_eq!(
        error, "0/4 blades are available: 4 didn't match the agent affinity.",
        "another namespace's"
    );
    // The first of its own kind may go anywhere that is in a domain.
    let group = Request {
        agents: AgentAffinity {
            required: vec![term("group", "zone")],
            ..AgentAffinity::default()
        },
        ..app("group")
    };
    let first = placer.place("3", &group, NOW).unwrap();
    assert_ne!(first, "none");
    let second = placer.place("4", &group, NOW).unwrap();
    assert_eq!(first.chars().next(), second.chars().next());
}

#[test]
fn agents_that_refuse_each_other_are_apart_whoever_came_first() {
    let mut placer = zones();
    let hermit = Request {
        agents: AgentAffinity {
            forbidden: vec![term("web", "zone")],
            ..AgentAffinity::default()
        },
        ..app("hermit")
    };
    placer.reserve("0", "a1", &hermit);
    for uid in ["1", "2", "3", "4"] {
        let on = placer.place(uid, &app("web"), NOW).unwrap();
        assert!(on == "b1" || on == "none", "{on}");
    }
    // Both zones are taken now; the blade without a zone is in no domain.
    placer.reserve("5", "b1", &app("web"));
    placer.release("0");
    placer.reserve("6", "a2", &app("web"));
    assert_eq!(placer.place("7", &hermit, NOW).unwrap(), "none");
    let named = Request {
        node_name: Some("a1".into()),
        ..hermit
    };
    let error = placer.place("8", &named, NOW).unwrap_err().to_string();
    assert!(error.contains("1 didn't match the agent anti-affinity"), "{error}");
}

#[test]
fn wanted_and_unwanted_agents_move_the_score_only() {
    let mut placer = zones();
    placer.reserve("0", "b1", &app("db"));
    let with_weight = |weight: i32| Request {
        agents: AgentAffinity {
            preferred: vec![(weight, term("db", "zone"))],
            ..AgentAffinity::default()
        },
        ..app("web")
    };
    assert_eq!(placer.place("1", &with_weight(50), NOW).unwrap(), "b1");
    assert_ne!(placer.place("2", &with_weight(-50), NOW).unwrap(), "b1");
    let named = Request {
        node_name: Some("b1".into()),
        ..with_weight(-100)
    };
    assert_eq!(placer.place("3", &named, NOW).unwrap(), "b1");
}

#[test]
fn spread_keeps_domains_level_and_skips_those_that_will_not_do() {
    let mut placer = zones();
    let even = Request {
        spread: vec![Spread {
            term: term("web", "zone"),
            max_skew: 1,
            is_required: true,
        }],
        ..app("web")
    };
    let mut counts = HashMap::new();
    for uid in 0..8 {
        let on = placer.place(&uid.to_string(), &even, NOW).unwrap();
        *counts.entry(on.chars().next().unwrap()).or_insert(0) += 1;
    }
    assert_eq!((counts[&'a'], counts[&'b'], counts.len()), (4, 4, 2));
    // Zone b cannot take more: zone a may not run ahead of it by more than one.
    placer.upsert_blade(
        "b1",
        Blade {
            max_vms: 4,
            ..in_zone("b1", "b")
        },
    );
    placer.place("8", &even, NOW).unwrap();
    let error = placer.place("9", &even, NOW).unwrap_err().to_string();
    assert_eq!(
        error,
        "0/4 blades are available: 3 didn't match the topology spread constraints, 1 too many microVMs."
    );
    // A zone whose blades are all cordoned is no domain.
    placer.upsert_blade(
        "b1",
        Blade {
            cordoned: true,
            ..in_zone("b1", "b")
        },
    );
    assert!(placer.place("9", &even, NOW).is_ok());
    let soft = Request {
        spread: vec![Spread {
            term: term("soft", "zone"),
            max_skew: 1,
            is_required: false,
        }],
        ..app("soft")
    };
    placer.upsert_blade("b1", in_zone("b1", "b"));
    for uid in 10..14 {
        placer.place(&uid.to_string(), &soft, NOW).unwrap();
    }
    let on = |placer: &Placer, zone: char| {
        (10..14)
            .filter(|uid| placer.reserved_on(&uid.to_string()).unwrap().starts_with(zone))
            .count()
    };
    assert_eq!((on(&placer, 'a'), on(&placer, 'b')), (2, 2));
}

#[test]
fn counts_follow_a_blade_whose_label_changes_and_one_that_comes_late() {
    let mut placer = zones();
    placer.reserve("0", "a1", &app("db"));
    placer.reserve("1", "late", &app("db"));
    let away = Request {
        agents: AgentAffinity {
            forbidden: vec![term("db", "zone")],
            ..AgentAffinity::default()
        },
        ..app("web")
    };
    let names = |placer: &mut Placer| -> BTreeSet<String> {
        let explained = placer.explain("x", &away);
        let open = explained.rows.into_iter().filter(|row| row.causes.is_empty());
        open.map(|row| row.blade).collect()
    };
    let set = |names: &[&str]| -> BTreeSet<String> { names.iter().map(ToString::to_string).collect() };
    assert_eq!(names(&mut placer), set(&["b1", "none"]));
    placer.upsert_blade("a1", in_zone("a1", "c"));
    assert_eq!(names(&mut placer), set(&["a2", "b1", "none"]));
    placer.upsert_blade("late", in_zone("late", "b"));
    assert_eq!(names(&mut placer), set(&["a2", "none"]));
    placer.remove_blade("a1");
    placer.release("1");
    assert_eq!(names(&mut placer), set(&["a2", "b1", "late", "none"]));
}

#[derive(Debug, Clone)]
enum Step {
    Place(u8, u8, u8),
    Release(u8),
    Move(u8, u8),
}

fn step() -> impl proptest::strategy::Strategy<Value = Step> {
    prop_oneof![
        6 => (0_u8..40, 0_u8..3, 0_u8..4).prop_map(|(uid, app, kind)| Step::Place(uid, app, kind)),
        2 => (0_u8..40).prop_map(Step::Release),
        1 => (0_u8..9, 0_u8..3).prop_map(|(blade, zone)| Step::Move(blade, zone)),
    ]
}

/// What an agent of the model asks: nothing, to be alone on its blade, apart from the next app by zone, or even by zone.
fn asked(number: u8, kind: u8) -> Request {
    let me = format!("app{number}");
    let next = format!("app{}", (number + 1) % 3);
    let mut request = app(&me);
    match kind {
        1 => request.agents.forbidden = vec![term(&me, "blade")],
        2 => request.agents.forbidden = vec![term(&next, "zone")],
        3 => {
            request.spread = vec![Spread {
                term: term(&me, "zone"),
                max_skew: 1,
                is_required: true,
            }];
        }
        _ => {}
    }
    request
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn no_order_of_requests_puts_agents_where_they_are_refused(steps in proptest::collection::vec(step(), 0..80)) {
        let mut placer = Placer::new(5);
        let mut zone_of: HashMap<String, String> = HashMap::new();
        let zone = |number: u8| format!("z{number}");
        for number in 0..9_u8 {
            let name = format!("b{number}");
            placer.upsert_blade(&name, in_zone(&name, &zone(number % 3)));
            zone_of.insert(name, zone(number % 3));
        }
        let mut held: HashMap<String, (String, Request)> = HashMap::new();
        for step in steps {
            match step {
                Step::Release(uid) => {
                    let uid = uid.to_string();
                    prop_assert_eq!(placer.release(&uid), held.remove(&uid).is_some());
                }
                Step::Move(blade, to) => {
                    let name = format!("b{blade}");
                    placer.upsert_blade(&name, in_zone(&name, &zone(to)));
                    zone_of.insert(name, zone(to));
                }
                Step::Place(uid, app, kind) => {
                    let uid = uid.to_string();
                    if held.contains_key(&uid) {
                        continue;
                    }
                    let asks = asked(app, kind);
                    let domain = |blade: &str, key: &str| if key == "zone" { zone_of[blade].clone() } else { blade.to_owned() };
                    let count = |term: &AgentTerm, in_domain: &str| {
                        held.values().filter(|(on, other)| {
                            term.matches(&other.namespace, &other.labels) && domain(on, &term.topology_key) == in_domain
                        }).count()
                    };
                    // Naively: which blades would do?
                    let will_do = |blade: &str| {
                        let meets = asks.agents.forbidden.iter().any(|term| count(term, &domain(blade, &term.topology_key)) > 0);
                        let repelled = held.values().any(|(on, other)| other.agents.forbidden.iter().any(|term| {
                            term.matches(&asks.namespace, &asks.labels)
                                && domain(on, &term.topology_key) == domain(blade, &term.topology_key)
                        }));
                        let skewed = asks.spread.iter().any(|one| {
                            let zones: BTreeSet<&String> = zone_of.values().collect();
                            let fewest = zones.iter().map(|zone| count(&one.term, zone)).min().unwrap_or(0);
                            count(&one.term, &domain(blade, "zone")) + 1 - fewest > 1
                        });
                        !meets && !repelled && !skewed
                    };
                    let open: BTreeSet<String> = zone_of.keys().filter(|blade| will_do(blade)).cloned().collect();
                    match placer.place(&uid, &asks, NOW) {
                        Ok(on) => {
                            prop_assert!(open.contains(&on), "{on} is not among {open:?}");
                            held.insert(uid, (on, asks));
                        }
                        Err(error) => prop_assert!(open.is_empty(), "{error}, but {open:?} would do"),
                    }
                }
            }
        }
    }
}
