use proptest::prelude::*;

use super::*;

const FIRST: u64 = 10;

fn queue(parallelism: u32) -> Queue {
    Queue {
        parallelism,
        max_attempts: 3,
        suspended: false,
    }
}

fn task(name: &str) -> Task {
    Task {
        name: name.to_owned(),
        ..Task::default()
    }
}

fn running(name: &str, attempts: u32, agent: Agent) -> Task {
    Task {
        phase: Phase::Running,
        attempts,
        agent,
        ..task(name)
    }
}

fn failed() -> Agent {
    Agent::Failed(Failure {
        exit_code: Some(3),
        reason: "Error".into(),
        message: "m".into(),
    })
}

#[test]
fn greater_priority_goes_first_then_who_came_first() {
    let tasks = [
        Task {
            created: 1,
            ..task("late")
        },
        Task {
            created: 0,
            ..task("early")
        },
        Task {
            created: 9,
            priority: 5,
            ..task("urgent")
        },
        Task {
            created: 0,
            priority: -1,
            ..task("lazy")
        },
    ];
    let order = |parallelism| -> Vec<&str> {
        let plan = plan(Some(queue(parallelism)), &tasks, 100, FIRST);
        let begun = plan.steps.iter().filter(|(_, step)| matches!(step, Step::Begin { .. }));
        begun.map(|(index, _)| tasks[*index].name.as_str()).collect()
    };
    assert_eq!(order(10), ["urgent", "early", "late", "lazy"]);
    assert_eq!(order(2), ["urgent", "early"]);
}

#[test]
fn each_try_has_its_outcome() {
    let lost = |step: &Step| matches!(step, Step::Retry { failure, .. } if failure.reason == "AgentDeleted");
    type Is = fn(&Step) -> bool;
    let cases: [(&str, Task, Option<Is>); 8] = [
        ("lives", running("a", 1, Agent::Lives), None),
        (
            "completed",
            running("a", 1, Agent::Completed),
            Some(|step| *step == Step::Succeed),
        ),
        (
            "failed: again after the wait",
            running("a", 1, failed()),
            Some(|step| matches!(step, Step::Retry { at: 110, failure } if failure.exit_code == Some(3))),
        ),
        (
            "failed twice: twice the wait",
            running("a", 2, failed()),
            Some(|step| matches!(step, Step::Retry { at: 120, .. })),
        ),
        (
            "failed for the last time",
            running("a", 3, failed()),
            Some(|step| matches!(step, Step::Die { failure } if failure.reason == "Error")),
        ),
        ("agent removed", running("a", 1, Agent::Absent), Some(lost)),
        (
            "agent removed in the last try",
            running("a", 3, Agent::Absent),
            Some(|step| matches!(step, Step::Die { failure } if failure.exit_code.is_none())),
        ),
        (
            "told to go",
            Task {
                deleting: true,
                ..running("a", 1, failed())
            },
            None,
        ),
    ];
    for (why, task, is) in cases {
        let plan = plan(Some(queue(1)), std::slice::from_ref(&task), 100, FIRST);
        let step = plan.steps.first().map(|(_, step)| step);
        match is {
            Some(is) => assert!(step.is_some_and(is), "{why}: {step:?}"),
            None => assert_eq!(step, None, "{why}"),
        }
    }
}

#[test]
fn what_keeps_a_task_waiting() {
    let retry = Task {
        retry_at: Some(120),
        attempts: 1,
        ..task("a")
    };
    let waits = plan(Some(queue(1)), std::slice::from_ref(&retry), 100, FIRST);
    assert_eq!((waits.steps.len(), waits.look_at), (0, Some(120)));
    let begins = plan(Some(queue(1)), std::slice::from_ref(&retry), 120, FIRST);
    assert_eq!(begins.steps, [(0, Step::Begin { attempt: 2 })]);

    let missing = plan(None, &[task("a")], 100, FIRST);
    assert!(matches!(
        &missing.steps[..],
        [(
            0,
            Step::Wait {
                reason: "QueueMissing",
                ..
            }
        )]
    ));

    let queued = Task {
        reason: "Queued".into(),
        ..task("b")
    };
    let full = plan(Some(queue(1)), &[task("a"), queued, task("c")], 100, FIRST);
    let waits = Step::Wait {
        reason: "Queued",
        message: "waits for its turn",
    };
    assert_eq!(full.steps, [(0, Step::Begin { attempt: 1 }), (2, waits)]);

    let suspended = Queue {
        suspended: true,
        ..queue(1)
    };
    let tasks = [task("a"), running("b", 1, Agent::Completed)];
    let plan = plan(Some(suspended), &tasks, 100, FIRST);
    assert!(matches!(
        &plan.steps[..],
        [
            (1, Step::Succeed),
            (
                0,
                Step::Wait {
                    reason: "Suspended",
                    ..
                }
            )
        ]
    ));
}

#[test]
fn an_agent_that_was_made_before_a_crash_is_taken_up_and_holds_its_place() {
    let made = Task {
        next_agent: Agent::Lives,
        created: 9,
        ..task("made")
    };
    let tasks = [task("first"), made];
    let plan = plan(
        Some(Queue {
            suspended: true,
            ..queue(1)
        }),
        &tasks,
        100,
        FIRST,
    );
    assert_eq!(plan.steps[0], (1, Step::Begin { attempt: 1 }));
    let running_again = super::plan(Some(queue(1)), &tasks, 100, FIRST);
    assert_eq!(running_again.steps[0], (1, Step::Begin { attempt: 1 }));
    assert!(matches!(
        running_again.steps[1],
        (0, Step::Wait { reason: "Queued", .. })
    ));
}

#[test]
fn finished_tasks_are_kept_for_their_time() {
    let done = |ttl_s, finished_at| Task {
        phase: Phase::Succeeded,
        ttl_s,
        finished_at,
        ..task("a")
    };
    let cases = [
        ("no limit", done(None, Some(1)), false, None),
        ("not yet", done(Some(100), Some(50)), false, Some(150)),
        ("now", done(Some(50), Some(50)), true, None),
        ("not known when", done(Some(0), None), false, None),
    ];
    for (why, task, removed, look_at) in cases {
        let plan = plan(Some(queue(1)), &[task], 100, FIRST);
        assert_eq!(
            (plan.steps == [(0, Step::Remove)], plan.look_at),
            (removed, look_at),
            "{why}"
        );
        assert_eq!(plan.succeeded, 1);
    }
}

#[test]
fn waits_grow_to_a_bound() {
    assert_eq!(
        [1, 2, 3, 6, 7, 99].map(|attempts| backoff_s(attempts, 10)),
        [10, 20, 40, 320, 360, 360]
    );
    assert_eq!(backoff_s(5, 0), 0);
}

proptest! {
    /// A queue that is driven to its end: whatever agents do, tasks end, in bounds.
    #[test]
    fn every_task_ends_and_no_more_agents_than_allowed_exist(
        parallelism in 1..5_u32, max_attempts in 1..4_u32, priorities in prop::collection::vec(-3..3_i32, 1..12),
        outcomes in prop::collection::vec(any::<bool>(), 64)
    ) {
        let bounds = Queue { parallelism, max_attempts, suspended: false };
        let mut tasks: Vec<Task> = priorities.iter().enumerate()
            .map(|(n, priority)| Task { priority: *priority, ..task(&format!("t{n}")) }).collect();
        let mut outcomes = outcomes.into_iter().cycle();
        let mut now = 0;
        for _ in 0..1000 {
            if tasks.iter().all(|task| matches!(task.phase, Phase::Succeeded | Phase::Dead)) {
                break;
            }
            let plan = plan(Some(bounds), &tasks, now, FIRST);
            for (index, step) in plan.steps {
                let task = &mut tasks[index];
                match step {
                    Step::Begin { attempt } => {
                        prop_assert_eq!(attempt, task.attempts + 1);
                        prop_assert!(attempt <= max_attempts);
                        (task.phase, task.attempts, task.agent) = (Phase::Running, attempt, Agent::Lives);
                    }
                    Step::Succeed => task.phase = Phase::Succeeded,
                    Step::Retry { at, .. } => (task.phase, task.retry_at) = (Phase::Pending, Some(at)),
                    Step::Die { .. } => task.phase = Phase::Dead,
                    Step::Wait { reason, .. } => task.reason = reason.to_owned(),
                    Step::Remove => prop_assert!(false, "nothing goes here"),
                }
            }
            let live = tasks.iter().filter(|task| task.phase == Phase::Running).count();
            prop_assert!(live <= parallelism as usize);
            for task in tasks.iter_mut().filter(|task| task.agent == Agent::Lives) {
                task.agent = if outcomes.next().unwrap() { Agent::Completed } else { failed() };
            }
            now = plan.look_at.unwrap_or(now).max(now);
        }
        for task in &tasks {
            prop_assert!(matches!(task.phase, Phase::Succeeded | Phase::Dead), "{:?}", task);
            prop_assert!(task.phase == Phase::Succeeded || task.attempts == max_attempts);
        }
    }
}
