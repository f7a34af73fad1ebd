//! One table per filter and score.

use super::*;

fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect()
}

fn requirement(key: &str, operator: Operator) -> Selector {
    Selector {
        requirements: vec![Requirement {
            key: key.into(),
            operator,
        }],
    }
}

fn values(values: &[&str]) -> Vec<String> {
    values.iter().map(ToString::to_string).collect()
}

#[test]
fn operators_read_labels_as_kubernetes_does() {
    let there = labels(&[("zone", "a"), ("cores", "64")]);
    for (key, operator, expected) in [
        ("zone", Operator::In(values(&["b", "a"])), true),
        ("zone", Operator::In(values(&["b"])), false),
        ("other", Operator::In(values(&["a"])), false),
        ("zone", Operator::NotIn(values(&["a"])), false),
        ("zone", Operator::NotIn(values(&["b"])), true),
        ("other", Operator::NotIn(values(&["a"])), true),
        ("zone", Operator::Exists, true),
        ("other", Operator::Exists, false),
        ("zone", Operator::DoesNotExist, false),
        ("other", Operator::DoesNotExist, true),
        ("cores", Operator::Gt(63), true),
        ("cores", Operator::Gt(64), false),
        ("cores", Operator::Lt(65), true),
        ("zone", Operator::Gt(0), false),
        ("other", Operator::Lt(9), false),
    ] {
        let text = format!("{key} {operator:?}");
        assert_eq!(requirement(key, operator).matches(&there), expected, "{text}");
    }
    assert!(Selector::default().matches(&there));
}

#[test]
fn required_terms_are_alternatives_and_an_empty_one_matches_nothing() {
    let of = |required: Vec<Selector>| NodeAffinity {
        required,
        preferred: Vec::new(),
    };
    let (a, b) = (
        requirement("zone", Operator::In(values(&["a"]))),
        requirement("zone", Operator::In(values(&["b"]))),
    );
    let there = labels(&[("zone", "b")]);
    for (why, required, expected) in [
        ("none asked", vec![], true),
        ("the second", vec![a.clone(), b], true),
        ("neither", vec![a], false),
        ("empty term", vec![Selector::default()], false),
    ] {
        assert_eq!(of(required).allows(&there), expected, "{why}");
    }
}

#[test]
fn tolerations_bear_taints_by_key_value_and_effect() {
    let key = |key: &str| Some(key.to_owned());
    let all = Toleration::default();
    for (why, toleration, taint, expected) in [
        ("everything", all.clone(), taint("gpu", "a", Effect::NoExecute), true),
        (
            "key",
            Toleration {
                key: key("gpu"),
                ..all.clone()
            },
            taint("gpu", "a", Effect::NoSchedule),
            true,
        ),
        (
            "other key",
            Toleration {
                key: key("fpga"),
                ..all.clone()
            },
            taint("gpu", "a", Effect::NoSchedule),
            false,
        ),
        (
            "value",
            Toleration {
                key: key("gpu"),
                value: key("a"),
                effect: None,
            },
            taint("gpu", "a", Effect::NoSchedule),
            true,
        ),
        (
            "other value",
            Toleration {
                key: key("gpu"),
                value: key("b"),
                effect: None,
            },
            taint("gpu", "a", Effect::NoSchedule),
            false,
        ),
        (
            "other effect",
            Toleration {
                effect: Some(Effect::NoSchedule),
                ..all.clone()
            },
            taint("gpu", "a", Effect::NoExecute),
            false,
        ),
    ] {
        assert_eq!(toleration.tolerates(&taint), expected, "{why}");
        let tainted = Blade {
            taints: vec![taint],
            ..blade(1000, 1000)
        };
        let asking = Request {
            tolerations: vec![toleration],
            ..request(1, 1)
        };
        assert_eq!(
            with(&[("a", tainted)]).place("1", &asking, NOW).is_ok(),
            expected,
            "{why}"
        );
    }
    let polite = Blade {
        taints: vec![taint("old", "", Effect::PreferNoSchedule)],
        ..blade(64_000, 65_536)
    };
    let mut placer = with(&[("polite", polite), ("small", blade(2000, 2000))]);
    assert_eq!(placer.place("1", &request(100, 100), NOW).unwrap(), "small");
    assert_eq!(placer.place("2", &request(4000, 4000), NOW).unwrap(), "polite");
}

#[test]
fn overcommit_stretches_cpu_and_memory_and_every_microvm_costs_its_overhead() {
    let stretched = Blade {
        overcommit: Overcommit {
            cpu_percent: 400,
            memory_percent: 150,
        },
        overhead_mib: 50,
        ..blade(1000, 1000)
    };
    let mut placer = with(&[("a", stretched)]);
    let mut placed = 0;
    while placer.place(&placed.to_string(), &request(100, 250), NOW).is_ok() {
        placed += 1;
    }
    assert_eq!(placed, 5, "1500 MiB hold five of 250 + 50");
    let error = placer.place("x", &request(3501, 1), NOW).unwrap_err().to_string();
    assert!(
        error.contains("insufficient cpu") && !error.contains("more than any"),
        "{error}"
    );
    let error = placer.place("x", &request(4001, 1451), NOW).unwrap_err().to_string();
    assert!(
        error.contains("spec.cpu (4001m) is more than any blade has (4000m)"),
        "{error}"
    );
    assert!(
        error.contains("spec.memory (1451 MiB) is more than any blade has (1450 MiB)"),
        "{error}"
    );
}

#[test]
fn devices_are_counted_by_name_and_given_back() {
    let gpus = Blade {
        extended: [("nvidia.com/gpu".to_owned(), 2)].into(),
        ..blade(64_000, 65_536)
    };
    let mut placer = with(&[("gpus", gpus), ("none", blade(64_000, 65_536))]);
    let asking = Request {
        extended: [("nvidia.com/gpu".to_owned(), 1)].into(),
        ..request(1, 1)
    };
    assert_eq!(placer.place("1", &asking, NOW).unwrap(), "gpus");
    assert_eq!(placer.place("2", &asking, NOW).unwrap(), "gpus");
    let error = placer.place("3", &asking, NOW).unwrap_err().to_string();
    assert_eq!(error, "0/2 blades are available: 2 insufficient nvidia.com/gpu.");
    placer.release("1");
    assert_eq!(placer.place("3", &asking, NOW).unwrap(), "gpus");
}

#[test]
fn starts_at_a_time_are_limited_until_they_are_confirmed() {
    let slow = Blade {
        max_starts: 1,
        ..blade(64_000, 65_536)
    };
    let mut placer = with(&[("a", slow)]);
    placer.place("1", &request(1, 1), NOW).unwrap();
    let error = placer.place("2", &request(1, 1), NOW).unwrap_err().to_string();
    assert_eq!(error, "0/1 blades are available: 1 too many microVMs starting.");
    assert_eq!(placer.confirm("1"), Some("a"));
    assert_eq!(placer.confirm("1"), None, "once");
    assert_eq!(placer.place("2", &request(1, 1), NOW).unwrap(), "a");
    // The API says again what is known: it stays confirmed.
    placer.reserve("1", "a", &request(1, 1));
    placer.confirm("2");
    assert!(placer.place("3", &request(1, 1), NOW).is_ok());
}

#[test]
fn a_pool_has_no_more_agents_than_its_limit() {
    let mut placer = with(&[("a", blade(64_000, 65_536))]);
    let of_pool = Request {
        pool: Some(Pool {
            name: "default/warm".into(),
            max: Some(2),
        }),
        ..request(1, 1)
    };
    placer.place("1", &of_pool, NOW).unwrap();
    placer.place("2", &of_pool, NOW).unwrap();
    let error = placer.place("3", &of_pool, NOW).unwrap_err().to_string();
    assert_eq!(
        error,
        "0/1 blades are available: 1 not for more agents of pool default/warm."
    );
    assert!(placer.place("4", &request(1, 1), NOW).is_ok(), "others are not limited");
    placer.release("1");
    assert!(placer.place("3", &of_pool, NOW).is_ok());
}

#[test]
fn each_thing_that_is_wanted_outweighs_an_equal_blade_without_it() {
    let base = blade(64_000, 65_536);
    let pool = Pool {
        name: "p".into(),
        max: None,
    };
    let plain = request(100, 100);
    let near = requirement("disk", Operator::In(values(&["nvme"])));
    let prefers = NodeAffinity {
        required: Vec::new(),
        preferred: vec![(10, near)],
    };
    for (why, better, asking) in [
        (
            "a large image",
            Blade {
                images: [("image".to_owned(), 2 << 30)].into(),
                ..base.clone()
            },
            plain.clone(),
        ),
        (
            "a small image",
            Blade {
                images: [("image".to_owned(), 1 << 20)].into(),
                ..base.clone()
            },
            plain.clone(),
        ),
        (
            "a snapshot",
            Blade {
                snapshots: ["s".to_owned()].into(),
                ..base.clone()
            },
            Request {
                snapshot: Some("s".into()),
                ..plain.clone()
            },
        ),
        (
            "a warm agent",
            Blade {
                warm: [("p".to_owned(), 1)].into(),
                ..base.clone()
            },
            Request {
                pool: Some(pool.clone()),
                ..plain.clone()
            },
        ),
        (
            "a preferred label",
            Blade {
                labels: labels(&[("disk", "nvme")]),
                ..base.clone()
            },
            Request {
                node_affinity: prefers.clone(),
                ..plain.clone()
            },
        ),
    ] {
        for (first, second, expected) in [("a", "b", "b"), ("c", "b", "b")] {
            let mut placer = with(&[(first, base.clone()), (second, better.clone())]);
            assert_eq!(placer.place("1", &asking, NOW).unwrap(), expected, "{why}");
        }
    }
    // A warm agent is worth more than the emptiest blade.
    let full = Blade {
        warm: [("p".to_owned(), 1)].into(),
        ..base.clone()
    };
    let mut placer = with(&[("empty", base), ("full", full)]);
    placer.reserve("0", "full", &request(63_000, 64_000));
    let claim = Request {
        pool: Some(pool),
        ..plain
    };
    assert_eq!(placer.place("1", &claim, NOW).unwrap(), "full");
}

#[test]
fn binpack_takes_the_fullest_blade_that_fits_and_a_request_may_choose() {
    let mut placer = Placer::with_packing(1, Packing::Binpack);
    for name in ["a", "b", "c"] {
        placer.upsert_blade(name, blade(4000, 4000));
    }
    placer.reserve("0", "b", &request(3000, 3000));
    placer.reserve("1", "c", &request(3800, 3800));
    assert_eq!(placer.place("2", &request(500, 500), NOW).unwrap(), "b");
    let spread = Request {
        packing: Some(Packing::Spread),
        ..request(500, 500)
    };
    assert_eq!(placer.place("3", &spread, NOW).unwrap(), "a");
}

#[test]
fn a_blade_that_failed_lately_is_avoided_for_some_minutes() {
    let mut placer = with(&[("a", blade(4000, 4000)), ("b", blade(4000, 4000))]);
    let at = Duration::from_secs;
    placer.reserve("0", "b", &request(100, 100));
    assert_eq!(placer.place("1", &request(1, 1), at(0)).unwrap(), "a");
    placer.note_failure("a", at(0));
    assert_eq!(placer.place("2", &request(1, 1), at(299)).unwrap(), "b");
    assert_eq!(placer.place("3", &request(1, 1), at(300)).unwrap(), "a");
}

#[test]
fn an_assumed_choice_moves_when_its_blade_will_not_do_any_more_and_a_written_one_stays() {
    let mut placer = with(&[("a", blade(4000, 4000)), ("b", blade(1000, 1000))]);
    assert_eq!(placer.place("1", &request(100, 100), NOW).unwrap(), "a");
    let gone = Blade {
        ready: false,
        ..blade(4000, 4000)
    };
    placer.upsert_blade("a", gone.clone());
    assert_eq!(placer.place("1", &request(100, 100), NOW).unwrap(), "b");
    placer.reserve("1", "b", &request(100, 100));
    placer.upsert_blade("b", gone);
    assert_eq!(placer.place("1", &request(100, 100), NOW).unwrap(), "b");
}

#[test]
fn a_choice_that_nobody_wrote_is_found_by_its_age() {
    let mut placer = with(&[("a", blade(4000, 4000))]);
    let at = Duration::from_secs;
    for (uid, second) in [("b", 1), ("a", 2), ("c", 9)] {
        placer.place(uid, &request(1, 1), at(second)).unwrap();
    }
    placer.reserve("b", "a", &request(1, 1));
    assert_eq!(placer.assumed_before(at(9)), ["a"]);
}

#[test]
fn an_explanation_shows_every_blade_with_all_that_is_against_it() {
    let mut placer = with(&[
        ("good", blade(4000, 4096)),
        (
            "bad",
            Blade {
                ready: false,
                cordoned: true,
                ..blade(100, 64)
            },
        ),
    ]);
    let asking = Request {
        avoid: ["bad".to_owned()].into(),
        ..request(1000, 1024)
    };
    let explanation = placer.explain("1", &asking);
    assert_eq!(explanation.outcome, Ok("good".to_owned()));
    let names: Vec<_> = explanation.rows.iter().map(|row| row.blade.as_str()).collect();
    assert_eq!(names, ["bad", "good"]);
    let (bad, good) = (&explanation.rows[0], &explanation.rows[1]);
    let failed: Vec<_> = Filter::ALL.into_iter().filter(|filter| !bad.passes(*filter)).collect();
    assert_eq!(failed, [Filter::Ready, Filter::Cpu, Filter::Memory, Filter::Refusals]);
    assert!(good.causes.is_empty());
    assert_eq!((good.scores.room, good.scores.balance), (750, 50));
    assert_eq!(placer.reserved_on("1"), None, "explaining takes nothing");
    placer.remove_blade("good");
    let error = placer.explain("1", &asking).outcome.unwrap_err();
    assert_eq!(
        error.to_string().split(" spec").next(),
        Some("0/1 blades are available: 1 not ready.")
    );
}
