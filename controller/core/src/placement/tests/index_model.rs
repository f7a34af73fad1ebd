//! The index against the full scan: it finds a blade whenever one would do, and a good one.

use super::*;

#[derive(Debug, Clone)]
enum Step {
    Place(u16, usize),
    Release(u16),
    Blade(u8, usize),
    Remove(u8),
}

fn step() -> impl proptest::strategy::Strategy<Value = Step> {
    prop_oneof![
        8 => (0_u16..600, 0_usize..6).prop_map(|(uid, kind)| Step::Place(uid, kind)),
        3 => (0_u16..600).prop_map(Step::Release),
        2 => (any::<u8>(), 0_usize..6).prop_map(|(blade, kind)| Step::Blade(blade, kind)),
        1 => any::<u8>().prop_map(Step::Remove),
    ]
}

fn kind_of_blade(kind: usize) -> Blade {
    let base = blade(4000, 4096);
    match kind {
        1 => Blade { ready: false, ..base },
        2 => Blade { max_vms: 2, ..base },
        3 => Blade {
            labels: [("disk".to_owned(), "nvme".to_owned())].into(),
            ..base
        },
        4 => Blade {
            images: [("image".to_owned(), 0)].into(),
            ..blade(8000, 2048)
        },
        5 => Blade {
            taints: vec![taint("gpu", "", Effect::NoSchedule)],
            extended: [("gpu".to_owned(), 1)].into(),
            ..base
        },
        _ => base,
    }
}

fn kind_of_request(kind: usize) -> Request {
    match kind {
        1 => Request {
            node_selector: [("disk".to_owned(), "nvme".to_owned())].into(),
            ..request(900, 900)
        },
        2 => Request {
            tolerations: vec![Toleration::default()],
            extended: [("gpu".to_owned(), 1)].into(),
            ..request(100, 100)
        },
        3 => request(7000, 1500),
        4 => Request {
            packing: Some(Packing::Binpack),
            ..request(1500, 1500)
        },
        5 => Request {
            image: "new".into(),
            ..request(50, 3000)
        },
        _ => request(1000, 700),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn the_index_is_never_worse_than_the_full_scan(steps in proptest::collection::vec(step(), 0..300), blades in 1_u8..=255) {
        let mut placer = Placer::new(9);
        for number in 0..blades {
            placer.upsert_blade(&number.to_string(), kind_of_blade(usize::from(number) % 6));
        }
        for step in steps {
            match step {
                Step::Place(uid, kind) => {
                    let (uid, asks) = (uid.to_string(), kind_of_request(kind));
                    if placer.reserved_on(&uid).is_some() {
                        continue;
                    }
                    let explained = placer.explain(&uid, &asks);
                    let open: Vec<_> = explained.rows.iter().filter(|row| row.causes.is_empty()).collect();
                    let best = open.iter().map(|row| row.scores.total()).max();
                    match placer.place(&uid, &asks, NOW) {
                        Ok(on) => {
                            prop_assert_eq!(explained.outcome, Ok(on.clone()), "explained and decided");
                            let chosen = open.iter().find(|row| row.blade == on);
                            let chosen = chosen.expect("the scan takes it too").scores.total();
                            // The keys leave out the balance, and the agent's own share of a blade.
                            prop_assert!(chosen + 600 >= best.unwrap(), "{chosen} against {best:?}");
                        }
                        Err(error) => {
                            prop_assert!(open.is_empty(), "{error}, but {open:?} would do");
                        }
                    }
                }
                Step::Release(uid) => {
                    placer.release(&uid.to_string());
                }
                Step::Blade(number, kind) => {
                    placer.upsert_blade(&number.to_string(), kind_of_blade(kind));
                }
                Step::Remove(number) => placer.remove_blade(&number.to_string()),
            }
        }
    }
}

#[test]
fn more_shapes_than_are_kept_are_still_right() {
    let mut placer = Placer::new(1);
    for number in 0..200 {
        let labels = [("n".to_owned(), (number % 100).to_string())].into();
        placer.upsert_blade(
            &number.to_string(),
            Blade {
                labels,
                ..blade(1000, 1000)
            },
        );
    }
    for turn in 0..3 {
        for number in 0..100 {
            let asks = Request {
                node_selector: [("n".to_owned(), number.to_string())].into(),
                ..request(500, 500)
            };
            let uid = format!("{turn}-{number}");
            let on: u32 = placer.place(&uid, &asks, NOW).unwrap().parse().unwrap();
            assert_eq!(on % 100, number);
        }
    }
}

#[test]
fn among_many_equal_blades_the_choice_is_spread_over_all_of_them() {
    let mut placer = Placer::new(1);
    for number in 0..1000 {
        placer.upsert_blade(&number.to_string(), blade(64_000, 65_536));
    }
    let chosen = (0..400).map(|uid| {
        let uid = uid.to_string();
        let on: usize = placer.place(&uid, &request(1, 1), NOW).unwrap().parse().unwrap();
        placer.release(&uid);
        on / 100
    });
    let tenths: BTreeSet<usize> = chosen.collect();
    assert_eq!(tenths.len(), 10);
}
