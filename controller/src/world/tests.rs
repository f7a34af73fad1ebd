use std::time::Duration;

use far_api::{FarAgent, FarNode};
use far_core::status::EndReason;
use futures::{FutureExt, StreamExt};
use serde_json::{Value, json};

use super::*;

const LONG: Duration = Duration::from_secs(3600);

fn agent(uid: &str, status: Value) -> FarAgent {
    serde_json::from_value(json!({
        "apiVersion": "tiffany.dev/v1", "kind": "FarAgent",
        "metadata": {"name": uid, "namespace": "default", "uid": uid, "resourceVersion": "1"},
        "spec": {"image": "a", "memory": "1Gi", "cpu": "1"}, "status": status,
    }))
    .unwrap()
}

/// A blade with room for one [`agent`].
fn node(name: &str) -> FarNode {
    let room = json!({"cpu": "1", "memory": "1Gi", "vms": 10});
    let ready = json!({
        "type": "Ready", "status": "True", "reason": "Heard", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z",
    });
    serde_json::from_value(json!({
        "apiVersion": "tiffany.dev/v1", "kind": "FarNode", "metadata": {"name": name}, "spec": {},
        "status": {"endpoint": "h:1", "capacity": room, "allocatable": room, "conditions": [ready]},
    }))
    .unwrap()
}

fn place(world: &World, agent: &FarAgent) -> Result<String, Unschedulable> {
    world.place(&agent.uid().unwrap(), &convert::request(agent).unwrap())
}

/// Names of the agents that are to be looked at again.
fn marked(world: &World) -> Vec<String> {
    let mut stream = Box::pin(world.dirty.clone().stream());
    let mut names = Vec::new();
    while let Some(Some(reference)) = stream.next().now_or_never() {
        names.push(reference.name);
    }
    names
}

#[test]
fn a_placement_that_could_not_be_written_wakes_nobody_least_of_all_its_own_agent() {
    let world = World::new(1, Packing::Spread, LONG, LONG);
    let (one, other) = (agent("one", Value::Null), agent("other", Value::Null));
    world.observe(&one, Teller::Watch);
    world.observe(&other, Teller::Watch);
    for agent in [&one, &other] {
        assert!(place(&world, agent).is_err(), "there is no blade yet");
    }
    world.observe_node(&node("b1"));
    world.synced("b1", &HashSet::new());
    assert_eq!(place(&world, &one).unwrap(), "b1");
    marked(&world);
    for _ in 0..3 {
        world.unplace("one", None);
        assert_eq!(marked(&world), Vec::<String>::new());
        assert_eq!(place(&world, &one).unwrap(), "b1");
    }
    // Room that comes free for good is told to those who wait.
    world.forget("one");
    assert_eq!(marked(&world), ["other"]);
}

#[test]
fn an_agent_that_goes_before_a_blade_heard_of_it_holds_no_room_for_as_long_as_others_keep_it() {
    let world = World::new(1, Packing::Spread, LONG, LONG);
    world.observe_node(&node("b1"));
    world.synced("b1", &HashSet::new());
    let mut one = agent("one", json!({"phase": "Scheduled", "nodeName": "b1", "attempt": 1}));
    let other = agent("other", Value::Null);
    world.observe(&one, Teller::Watch);
    world.observe(&other, Teller::Watch);
    assert!(place(&world, &other).is_err());
    one.metadata.finalizers = Some(vec!["others/keep-it".into()]);
    one.metadata.deletion_timestamp = serde_json::from_value(json!("2026-01-01T00:00:00Z")).unwrap();
    world.observe(&one, Teller::Watch);
    assert_eq!(place(&world, &other).unwrap(), "b1");
}

#[test]
fn room_that_comes_free_goes_to_the_most_important_of_those_who_wait_and_wakes_only_it() {
    let world = World::new(1, Packing::Spread, LONG, LONG);
    world.observe_node(&node("b1"));
    world.synced("b1", &HashSet::new());
    let holder = agent("holder", Value::Null);
    world.observe(&holder, Teller::Watch);
    assert_eq!(place(&world, &holder).unwrap(), "b1");
    for (name, priority) in [("first", 0), ("high", 5), ("last", 0)] {
        let mut waiting = agent(name, Value::Null);
        waiting.spec.priority = Some(priority);
        world.observe(&waiting, Teller::Watch);
        assert!(place(&world, &waiting).is_err());
    }
    marked(&world);
    // Its end is written: the room is the next one's before anybody asks.
    world.observe(
        &agent(
            "holder",
            json!({"nodeName": "b1", "phase": "Failed", "conditions": [failed()]}),
        ),
        Teller::Watch,
    );
    assert_eq!(marked(&world), ["high"]);
    let late = agent("late", Value::Null);
    world.observe(&late, Teller::Watch);
    assert!(place(&world, &late).is_err(), "who comes now stands behind");
    world.forget("high");
    assert_eq!(marked(&world), ["first"]);
}

#[test]
fn who_is_suspended_or_deleted_leaves_the_line_and_its_room() {
    for change in [json!({"suspend": true}), json!({"deleted": true})] {
        let world = World::new(1, Packing::Spread, LONG, LONG);
        world.observe_node(&node("b1"));
        world.synced("b1", &HashSet::new());
        let (one, other) = (agent("one", Value::Null), agent("other", Value::Null));
        for agent in [&one, &other] {
            world.observe(agent, Teller::Watch);
        }
        assert_eq!(place(&world, &one).unwrap(), "b1");
        assert!(place(&world, &other).is_err());
        let mut changed = one.clone();
        if change["suspend"] == json!(true) {
            changed.spec.suspend = Some(true);
        } else {
            changed.metadata.deletion_timestamp = serde_json::from_value(json!("2026-01-01T00:00:00Z")).unwrap();
        }
        marked(&world);
        world.observe(&changed, Teller::Watch);
        assert_eq!(marked(&world), ["other"], "{change}");
    }
}

/// An agent as it is at a version.
fn at(version: u32, status: Value) -> FarAgent {
    let mut one = agent("one", status);
    one.metadata.resource_version = Some(version.to_string());
    one
}

#[test]
fn an_answer_to_a_write_that_the_watch_told_of_already_says_nothing() {
    let world = World::new(1, Packing::Spread, LONG, LONG);
    world.observe(&at(2, json!({"nodeName": "b1", "attempt": 1})), Teller::Watch);
    world.observe(&at(3, json!({"nodeName": "b1", "attempt": 2})), Teller::Watch);
    world.observe(&at(3, json!({"nodeName": "b1", "attempt": 2})), Teller::Write);
    assert!(world.lock().agents["one"].written.is_none(), "nothing would clear it");
    assert!(world.since_written("one").is_some());
    // Of what was made before it was placed.
    world.observe(&at(1, Value::Null), Teller::Creation);
    let known = &world.lock().agents["one"];
    assert_eq!((known.node.as_deref(), known.attempt), (Some("b1"), 2));
}

#[test]
fn an_answer_to_a_write_is_known_until_the_watch_catches_up() {
    let world = World::new(1, Packing::Spread, LONG, LONG);
    world.observe(&at(1, Value::Null), Teller::Creation);
    world.observe(&at(3, json!({"nodeName": "b1", "attempt": 1})), Teller::Write);
    world.observe(&at(2, Value::Null), Teller::Watch);
    assert_eq!(world.census().placed, 1);
    let newest = world.newest(Arc::new(at(2, Value::Null)));
    assert_eq!(newest.resource_version().as_deref(), Some("3"));
    world.observe(&at(3, json!({"nodeName": "b1", "attempt": 1})), Teller::Watch);
    assert!(world.lock().agents["one"].written.is_none());
}

#[test]
fn no_late_answer_brings_back_an_agent_that_is_gone() {
    for late in [Teller::Write, Teller::Creation] {
        let world = World::new(1, Packing::Spread, LONG, LONG);
        world.observe(&at(5, Value::Null), Teller::Watch);
        world.forget("one");
        world.observe(&at(5, Value::Null), late);
        assert_eq!(world.census().agents, 0, "{late:?}");
    }
    let world = World::new(1, Packing::Spread, LONG, LONG);
    world.observe(&at(5, Value::Null), Teller::Watch);
    let mut new = at(6, Value::Null);
    new.metadata.uid = Some("new".to_owned());
    world.observe(&new, Teller::Creation);
    assert_eq!(world.census().agents, 2, "the watch did not tell of it yet");
}

#[test]
fn who_is_gone_gets_no_room_and_stands_in_no_line() {
    let world = World::new(1, Packing::Spread, LONG, LONG);
    world.observe_node(&node("b1"));
    world.synced("b1", &HashSet::new());
    let (mut gone, other) = (agent("gone", Value::Null), agent("other", Value::Null));
    gone.spec.pool_ref = serde_json::from_value(json!({"name": "p"})).unwrap();
    world.observe(&gone, Teller::Watch);
    world.forget("gone");
    assert!(place(&world, &gone).is_err());
    assert!(world.take_warm(&gone).is_none());
    assert_eq!(world.pool_asked(&("default".into(), "p".into())).last_minute, 0);
    world.observe(&other, Teller::Watch);
    assert_eq!(place(&world, &other).unwrap(), "b1");
}

fn failed() -> Value {
    json!({
        "type": "Failed", "status": "True", "reason": "Error", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z",
    })
}

#[test]
fn a_blade_that_speaks_but_is_not_reached_is_unreachable_then_lost_then_fenced() {
    let on_b1 = Status {
        node: Some("b1".into()),
        ..Status::default()
    };
    for (lost_after, fence_after, expected) in [
        (LONG, LONG, BladeView::Unreachable),
        (Duration::ZERO, LONG, BladeView::Lost),
        (Duration::ZERO, Duration::ZERO, BladeView::Fenced),
    ] {
        let world = World::new(1, Packing::Spread, lost_after, fence_after);
        world.observe_node(&node("b1"));
        assert_eq!(world.view("one", &on_b1, &[]).blade, expected, "never reached");
        world.synced("b1", &HashSet::new());
        assert_eq!(world.view("one", &on_b1, &[]).blade, BladeView::Connected);
        world.unsynced("b1");
        world.observe_node(&node("b1"));
        assert_eq!(world.view("one", &on_b1, &[]).blade, expected, "reached no more");
    }
}

#[test]
fn a_blade_gets_agents_only_while_it_is_reached_and_those_who_wait_hear_of_it() {
    let world = World::new(1, Packing::Spread, LONG, LONG);
    let one = agent("one", Value::Null);
    world.observe(&one, Teller::Watch);
    world.observe_node(&node("b1"));
    let refused = place(&world, &one).unwrap_err().to_string();
    assert_eq!(refused, "0/1 blades are available: 1 not reachable.");
    marked(&world);
    world.synced("b1", &HashSet::new());
    assert_eq!(marked(&world), ["one"]);
    world.unsynced("b1");
    assert!(place(&world, &one).is_err());
    world.synced("b1", &HashSet::new());
    assert_eq!(place(&world, &one).unwrap(), "b1");
}

fn ended(attempt: u32, reason: EndReason) -> Report {
    let end = End {
        reason,
        exit_code: None,
        signal: None,
        message: String::new(),
        tail: String::new(),
    };
    Report {
        attempt,
        stage: Stage::Ended,
        image_digest: String::new(),
        resources: None,
        booted: false,
        started_at: None,
        finished_at: None,
        end: Some(end),
        message: String::new(),
    }
}

#[test]
fn an_attempt_is_an_orphan_without_its_agent_elsewhere_or_when_a_newer_one_is_there() {
    let world = World::new(1, Packing::Spread, LONG, LONG);
    let on = |node: Value, attempt: u32| agent("one", json!({"nodeName": node, "attempt": attempt}));
    let runs = |attempt| Report {
        stage: Stage::Running,
        end: None,
        ..ended(attempt, EndReason::Error)
    };
    assert!(world.is_orphan("b1", "one", &runs(1)), "no such agent");
    world.observe(&on(json!("b1"), 1), Teller::Watch);
    assert!(!world.is_orphan("b1", "one", &runs(1)));
    assert!(world.is_orphan("b2", "one", &runs(1)), "it is on another blade");
    world.observe(&on(Value::Null, 1), Teller::Watch);
    assert!(
        world.is_orphan("b1", "one", &ended(1, EndReason::Evicted)),
        "the blade refused it"
    );
    assert!(
        !world.is_orphan("b1", "one", &ended(1, EndReason::Error)),
        "the output of the attempt before"
    );
    world.observe(&on(json!("b1"), 2), Teller::Watch);
    assert!(world.is_orphan("b1", "one", &runs(1)), "another attempt is there");
    assert!(
        !world.is_orphan("b1", "one", &ended(1, EndReason::Error)),
        "it is told of until a third one is there"
    );
    assert!(!world.is_orphan("b1", "one", &runs(2)) && !world.is_orphan("b1", "one", &runs(3)));
    world.observe(&on(json!("b2"), 3), Teller::Watch);
    assert!(world.is_orphan("b1", "one", &ended(1, EndReason::Error)));
    assert!(!world.is_orphan("b1", "one", &ended(2, EndReason::Error)));
}

#[test]
fn of_agents_that_are_not_there_a_blade_tells_a_bounded_number_and_no_texts() {
    let world = World::new(1, Packing::Spread, LONG, LONG);
    world.observe_node(&node("b1"));
    let here = agent("here", json!({"nodeName": "b1", "attempt": 1}));
    world.observe(&here, Teller::Watch);
    let mut long = ended(1, EndReason::Error);
    long.message = "m".repeat(4096);
    long.end.as_mut().unwrap().tail = "t".repeat(4096);
    for number in 0..3 * MAX_STRAY_REPORTS {
        world.told("b1", &format!("stray-{number}"), long.clone());
    }
    world.told("b1", "here", long.clone());
    let reports = |world: &World| world.lock().reports["b1"].clone();
    let kept = reports(&world);
    assert_eq!(kept.len(), MAX_STRAY_REPORTS + 2);
    assert_eq!(kept["here"], long);
    assert_eq!(kept["stray-7"], ended(1, EndReason::Error));
    // What it does not keep any more was only passing by.
    world.keep_reports("b1", &HashSet::from(["stray-7".to_owned()]));
    let mut left: Vec<_> = reports(&world).into_keys().collect();
    left.sort();
    assert_eq!(left, ["here", "stray-7"]);
}

#[test]
fn the_room_of_an_attempt_that_is_over_is_free_before_the_next_is_placed() {
    let world = World::new(1, Packing::Spread, LONG, LONG);
    let one = |node: Value, version: &str| {
        let mut one = agent("one", json!({"nodeName": node, "attempt": 1}));
        one.metadata.resource_version = Some(version.to_owned());
        one
    };
    world.observe_node(&node("b1"));
    world.synced("b1", &HashSet::new());
    world.observe(&one(json!("b1"), "1"), Teller::Watch);
    let other = agent("other", Value::Null);
    world.observe(&other, Teller::Watch);
    assert!(place(&world, &other).is_err(), "it is full");
    marked(&world);
    world.observe(&one(Value::Null, "2"), Teller::Write);
    assert_eq!(marked(&world), ["other"]);
    assert_eq!(place(&world, &other).unwrap(), "b1");
}

#[test]
fn agents_leave_a_blade_that_is_emptied_or_that_they_cannot_bear() {
    let world = World::new(1, Packing::Spread, LONG, LONG);
    let on_b1 = Status {
        node: Some("b1".into()),
        ..Status::default()
    };
    let mut blade = node("b1");
    let leaves = |patience: &[Patience]| {
        world
            .view("one", &on_b1, patience)
            .leaves_at
            .map(|at| at <= Instant::now())
    };
    let spec = |spec: Value| serde_json::from_value(spec).unwrap();
    for (why, given, expected) in [
        ("nothing asks for it", json!({}), None),
        ("cordoned", json!({"unschedulable": true}), None),
        (
            "a taint for others",
            json!({"taints": [{"key": "a", "effect": "NoSchedule"}]}),
            None,
        ),
        (
            "a taint for all",
            json!({"taints": [{"key": "a", "effect": "NoExecute"}]}),
            Some(true),
        ),
        ("emptied by waiting", json!({"drain": {"policy": "Wait"}}), None),
        (
            "emptied by a deadline",
            json!({"drain": {"policy": "Wait", "deadlineSeconds": 60}}),
            Some(false),
        ),
        ("emptied at once", json!({"drain": {"policy": "Evict"}}), Some(true)),
    ] {
        blade.spec = spec(given);
        world.observe_node(&blade);
        assert_eq!(leaves(&[]), expected, "{why}");
    }
    blade.spec = spec(json!({"taints": [{"key": "a", "effect": "NoExecute"}]}));
    world.observe_node(&blade);
    let bears = |seconds| Patience {
        toleration: far_core::placement::Toleration::default(),
        seconds,
    };
    assert_eq!(
        (leaves(&[bears(None)]), leaves(&[bears(Some(60))])),
        (None, Some(false))
    );
}
