//! `far up` and `far down` over stand-ins for the daemons: shell scripts that write their ready file and stay. What the
//! real ones do together is told by the end-to-end tests; here is what happens when they die, hang or do not start.

// A panic in a helper is the test's report.
#![allow(clippy::unwrap_used)]

mod common;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use common::{Machine, PATIENCE, Ran, blade::Blade, until};
use serde_json::Value;

/// Writes its arguments and its ready file, then stays. Files beside the script change what it does. Its ports are below
/// the range from which the kernel gives out ports (32768 and up): nobody takes one by chance while it is restarted.
const STAND_IN: &str = r#"#!/bin/sh
name=${0##*/}
echo "$name $*" >> "$0.calls"
while [ $# -gt 0 ]; do
  case $1 in --ready-file) ready=$2 ;; --listen) listen=$2 ;; esac
  shift
done
if [ -f "$0.fails" ]; then echo "the disk is full"; exit 7; fi
[ -f "$0.ignores-term" ] && trap '' TERM
case $listen in *:0) listen=127.0.0.1:$(( 10000 + $$ % 20000 )) ;; esac
echo "$listen" > "$ready.new" && mv "$ready.new" "$ready"
if [ -f "$0.ignores-term" ]; then while :; do sleep 1; done; fi
exec sleep 1000
"#;

struct Stage {
    machine: Machine,
    bin: PathBuf,
    /// Serves the node agent's socket: a shell script cannot.
    blade: Blade,
}

impl Stage {
    fn new() -> Self {
        let machine = Machine::bare();
        let bin = machine.dir.path().join("bin");
        fs::create_dir(&bin).unwrap();
        install(Path::new(env!("CARGO_BIN_EXE_far")), &bin.join("far"));
        let stand_in = machine.dir.path().join("stand-in");
        fs::write(&stand_in, STAND_IN).unwrap();
        for name in ["far-devapi", "far-controller", "far-node"] {
            install(&stand_in, &bin.join(name));
        }
        let kit = machine.dir.path().join("kit");
        fs::create_dir(&kit).unwrap();
        for file in ["vmlinux", "initramfs.cpio", "tiffany-vm.oci.tar"] {
            fs::write(kit.join(file), "x").unwrap();
        }
        let blade = Blade::serve(&machine.dir.path().join("run"));
        Self { machine, bin, blade }
    }

    async fn far(&self, args: &[&str]) -> Ran {
        let mut command = Command::new(self.bin.join("far"));
        command
            .args(args)
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("HOME", self.machine.dir.path().join("home"))
            .env("FAR_STATE", self.machine.dir.path().join("state"))
            .env("FAR_RUN", self.machine.dir.path().join("run"))
            .env("FAR_BOOT_KIT", self.machine.dir.path().join("kit"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        common::finish(command.spawn().unwrap()).await
    }

    async fn parts(&self) -> Vec<(String, Option<i32>, String)> {
        let (_, out, err) = self.far(&["status", "-o", "json"]).await;
        let status: Value = serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}{err}"));
        status["parts"]
            .as_array()
            .unwrap()
            .iter()
            .map(|part| {
                (
                    part["state"].as_str().unwrap().to_owned(),
                    part["pid"].as_i64().map(|pid| i32::try_from(pid).unwrap()),
                    part["address"].as_str().unwrap_or_default().to_owned(),
                )
            })
            .collect()
    }

    fn calls(&self, name: &str) -> Vec<String> {
        fs::read_to_string(self.bin.join(format!("{name}.calls")))
            .unwrap_or_default()
            .lines()
            .map(str::to_owned)
            .collect()
    }

    fn change(&self, name: &str, change: &str) {
        fs::write(self.bin.join(format!("{name}.{change}")), "").unwrap();
    }
}

/// By a program of its own: a file that this process has open for writing cannot be executed as long as a child that
/// another test is just starting holds a copy of the descriptor (execve(2), ETXTBSY).
fn install(from: &Path, to: &Path) {
    let done = Command::new("install").args(["-m", "755"]).args([from, to]).status();
    assert!(done.unwrap().success());
}

impl Drop for Stage {
    fn drop(&mut self) {
        // It cannot answer while this thread waits for far.
        let _ = fs::remove_file(self.machine.dir.path().join("run/node.sock"));
        // Also when a test failed half-way: nothing of it stays.
        let _ = Command::new(self.bin.join("far"))
            .arg("down")
            .env("FAR_STATE", self.machine.dir.path().join("state"))
            .env("FAR_RUN", self.machine.dir.path().join("run"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
    }
}

fn signal(pid: i32, signal: nix::sys::signal::Signal) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal).unwrap();
}

fn is_there(pid: i32) -> bool {
    // A zombie counts as gone.
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

#[tokio::test]
async fn up_starts_the_parts_in_order_and_a_second_up_changes_nothing() {
    let stage = Stage::new();
    let (code, out, err) = stage.far(&["up"]).await;
    assert_eq!(code, 0, "{out}{err}");
    assert!(out.contains("export KUBECONFIG="), "{out}");
    let first = stage.parts().await;
    assert!(first.iter().all(|part| part.0 == "running"), "{first:?}");
    let node = &stage.calls("far-node")[0];
    assert!(node.contains(&format!("--controller https://{}", first[1].2)), "{node}");
    assert!(stage.calls("far-controller")[0].starts_with("far-controller run "));

    let (code, out, _) = stage.far(&["up"]).await;
    assert_eq!(code, 0);
    assert_eq!(out.matches("runs already").count(), 3, "{out}");
    assert_eq!(stage.parts().await, first);
}

#[tokio::test]
async fn each_part_is_the_leader_of_a_session_of_its_own() {
    let stage = Stage::new();
    assert_eq!(stage.far(&["up"]).await.0, 0);
    for (_, pid, _) in stage.parts().await {
        let pid = nix::unistd::Pid::from_raw(pid.unwrap());
        assert_eq!(nix::unistd::getsid(Some(pid)), Ok(pid));
    }
}

#[tokio::test]
async fn a_part_that_was_killed_is_dead_until_up_starts_it_at_its_old_address() {
    let stage = Stage::new();
    assert_eq!(stage.far(&["up"]).await.0, 0);
    let before = stage.parts().await;
    signal(before[1].1.unwrap(), nix::sys::signal::Signal::SIGKILL);
    until("it is gone", || !is_there(before[1].1.unwrap())).await;
    let (code, out, _) = stage.far(&["status"]).await;
    assert_eq!(code, 1);
    assert!(out.contains("dead") && out.contains("far up"), "{out}");

    let (code, out, _) = stage.far(&["up"]).await;
    assert_eq!(code, 0);
    assert!(out.contains("far-controller restarted"), "{out}");
    let after = stage.parts().await;
    assert_ne!(after[1].1, before[1].1);
    assert_eq!(after[1].2, before[1].2, "the others find it where it was");
    assert_eq!((&after[0], &after[2]), (&before[0], &before[2]), "they were left alone");
}

#[tokio::test]
async fn a_node_agent_whose_socket_went_with_the_users_logout_is_started_again() {
    let stage = Stage::new();
    assert_eq!(stage.far(&["up"]).await.0, 0);
    let before = stage.parts().await;
    // As systemd does with /run/user/<uid> where the user does not linger; the processes stay.
    fs::remove_dir_all(stage.machine.dir.path().join("run")).unwrap();
    let (code, out, err) = stage.far(&["up"]).await;
    assert_eq!(code, 0, "{out}{err}");
    assert!(out.contains("far-node restarted"), "{out}");
    let after = stage.parts().await;
    assert_ne!(after[2].1, before[2].1);
    assert_eq!((&after[0], &after[1]), (&before[0], &before[1]), "they were left alone");
}

#[tokio::test]
async fn a_part_that_does_not_start_is_named_with_its_own_words() {
    let stage = Stage::new();
    stage.change("far-controller", "fails");
    let (code, _, err) = stage.far(&["up"]).await;
    assert_eq!(code, 1);
    for expected in [
        "far-controller",
        "exit status: 7",
        "the disk is full",
        "far-controller.log",
    ] {
        assert!(err.contains(expected), "{expected}: {err}");
    }
    let parts = stage.parts().await;
    assert_eq!((parts[0].0.as_str(), parts[1].0.as_str()), ("running", "stopped"));
    fs::remove_file(stage.bin.join("far-controller.fails")).unwrap();
    let (code, _, err) = stage.far(&["up"]).await;
    assert_eq!(code, 0, "{err}");
}

#[tokio::test]
async fn down_ends_everything_also_what_ignores_term_and_what_is_stopped_twice() {
    let stage = Stage::new();
    stage.change("far-node", "ignores-term");
    assert_eq!(stage.far(&["up"]).await.0, 0);
    let pids: Vec<_> = stage.parts().await.into_iter().map(|part| part.1.unwrap()).collect();
    let (code, out, err) = stage.far(&["down"]).await;
    assert_eq!(code, 0, "{out}{err}");
    assert!(
        out.contains("far-node killed") && out.contains("far-devapi stopped"),
        "{out}"
    );
    assert!(pids.iter().all(|pid| !is_there(*pid)), "{pids:?}");
    let (code, out, _) = stage.far(&["down"]).await;
    assert_eq!((code, out.as_str()), (0, "Nothing runs.\n"));
    let (_, out, _) = stage.far(&["down", "--purge"]).await;
    assert!(out.contains("removed"), "{out}");
    assert!(!stage.machine.dir.path().join("state").exists());
    assert!(!stage.machine.dir.path().join("run").exists());
}

#[tokio::test]
async fn down_does_not_wait_for_a_node_agent_that_never_answers() {
    let stage = Stage::new();
    assert_eq!(stage.far(&["up"]).await.0, 0);
    stage.blade.has_an_agent_that_cannot_be_stopped();
    let (code, out, err) = tokio::time::timeout(PATIENCE, stage.far(&["down"]))
        .await
        .expect("far down ends");
    assert_eq!(code, 0, "{out}{err}");
    assert!(err.contains("ended without it"), "{err}");
    assert!(out.contains("far-node stopped"), "{out}");
}

#[tokio::test]
async fn down_never_ends_a_process_that_only_has_the_recorded_pid() {
    let stage = Stage::new();
    assert_eq!(stage.far(&["up"]).await.0, 0);
    let mut stranger = Command::new("sleep").arg("600").spawn().unwrap();
    let file = stage.machine.dir.path().join("state/run/far-node.pid");
    let recorded = fs::read_to_string(&file).unwrap();
    let mut words: Vec<_> = recorded.split_whitespace().collect();
    let node = words[0].to_owned();
    let stranger_pid = stranger.id().to_string();
    words[0] = &stranger_pid;
    fs::write(&file, words.join(" ")).unwrap();
    assert_eq!(stage.far(&["down"]).await.0, 0);
    assert!(stranger.try_wait().unwrap().is_none(), "the stranger lives");
    stranger.kill().unwrap();
    stranger.wait().unwrap();
    signal(node.parse().unwrap(), nix::sys::signal::Signal::SIGKILL);
}

#[tokio::test]
async fn two_ups_at_once_start_each_part_once() {
    let stage = Stage::new();
    let (one, two) = tokio::join!(stage.far(&["up"]), stage.far(&["up"]));
    assert_eq!((one.0, two.0), (0, 0), "{one:?} {two:?}");
    for name in ["far-devapi", "far-controller", "far-node"] {
        assert_eq!(stage.calls(name).len(), 1, "{name}");
    }
}
