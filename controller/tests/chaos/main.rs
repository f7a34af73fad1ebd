//! Two controllers as real processes, killed every few seconds; an API that answers conflicts, 429s, 500s and 410s and drops
//! answers; blades that are killed, cut off, and lose and repeat calls. In the end: no attempt booted twice, no two live
//! attempts of one agent, no agent lost, no room leaked, every status true.
//!
//! `FAR_CHAOS_AGENTS` is the number of agents (400 where it is absent).
#![allow(unreachable_pub, clippy::unwrap_used)] // A panic here is the test's report.

mod blade;
#[path = "../support/mod.rs"]
mod support;
mod truth;

use std::{
    collections::{BTreeMap, HashSet},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use blade::{ChaosBlade, Setup};
use far_api::FarAgent;
use far_devapi::{
    DevApi,
    faults::{Action, Fault, Match},
};
use futures::StreamExt;
use kube::{
    Api, Client, ResourceExt,
    api::{DeleteParams, ListParams, Patch, PostParams},
    config::{KubeConfigOptions, Kubeconfig},
};
use rand::Rng;
use serde_json::{Value, json};
use support::until;
use tokio_util::sync::CancellationToken;
use truth::Truth;

const BLADES: usize = 8;
/// Agents created in a second while chaos reigns.
const PACE: u64 = 40;
/// Without any agent coming to its end for this long, something is stuck.
const STUCK: Duration = Duration::from_secs(150);

/// One controller's folder and address; killed and started again.
struct Replica {
    folder: PathBuf,
    listen: String,
    kubeconfig: PathBuf,
    child: Option<Child>,
}

impl Replica {
    fn new(dir: &Path, name: &str) -> Self {
        let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let folder = dir.join(name);
        std::fs::create_dir_all(&folder).unwrap();
        Self {
            listen: socket.local_addr().unwrap().to_string(),
            kubeconfig: dir.join("kubeconfig"),
            folder,
            child: None,
        }
    }

    fn ready_file(&self) -> PathBuf {
        self.folder.join("ready")
    }

    fn start(&mut self) {
        let log = std::fs::File::options()
            .append(true)
            .create(true)
            .open(self.folder.join("log"))
            .unwrap();
        let _ = std::fs::remove_file(self.ready_file());
        let mut command = Command::new(env!("CARGO_BIN_EXE_far-controller"));
        command.arg("run").arg("--install-crds");
        command.arg("--kubeconfig").arg(&self.kubeconfig);
        command.arg("--state-dir").arg(self.folder.join("state"));
        command.arg("--ready-file").arg(self.ready_file());
        command.arg("--ca-out").arg(self.folder.join("ca.pem"));
        for (option, value) in [
            ("--listen", self.listen.as_str()),
            ("--heartbeat-ms", "200"),
            ("--node-lost-after", "1.5"),
            ("--fence-after", "4"),
            ("--fence-margin", "2"),
            ("--sweep-every", "2"),
            ("--lease-duration", "3"),
            ("--retry-after", "0.3"),
        ] {
            command.arg(option).arg(value);
        }
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        self.child = Some(command.spawn().unwrap());
    }

    fn signal(&self, signal: nix::sys::signal::Signal) {
        if let Some(child) = &self.child {
            let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
            nix::sys::signal::kill(pid, signal).unwrap();
        }
    }

    fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        let _ = std::fs::remove_file(self.ready_file());
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Kills, stops and starts the controllers until it is calm; then both run.
async fn torment(mut replicas: Vec<Replica>, calm: Arc<AtomicBool>, truth: Arc<Truth>) -> Vec<Replica> {
    use nix::sys::signal::Signal::{SIGCONT, SIGSTOP};
    while !calm.load(Ordering::SeqCst) {
        let (pause, which, how) = {
            let mut rng = rand::rng();
            (
                rng.random_range(2_000..6_000),
                rng.random_range(0..replicas.len()),
                rng.random_range(0..6),
            )
        };
        tokio::time::sleep(Duration::from_millis(pause)).await;
        let replica = &mut replicas[which];
        if how == 0 {
            // It sleeps for longer than its lease, and wakes up deposed without knowing.
            truth.count("controllers stopped and continued");
            replica.signal(SIGSTOP);
            tokio::time::sleep(Duration::from_millis(5_500)).await;
            replica.signal(SIGCONT);
        } else {
            truth.count("controllers killed");
            replica.kill();
            if how > 3 {
                // The other one takes over.
                tokio::time::sleep(Duration::from_millis(4_000)).await;
            }
            replica.start();
        }
    }
    replicas
}

/// Lets requests of the controllers fail in every way, until it is calm.
async fn poison(api: &DevApi, calm: &AtomicBool, truth: &Truth) {
    while !calm.load(Ordering::SeqCst) {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let fault = {
            let mut rng = rand::rng();
            let on = |verb: &str, resource: &str, subresource: &str| Match {
                verb: Some(verb.to_owned()),
                resource: Some(resource.to_owned()),
                subresource: Some(subresource.to_owned()),
                name: None,
            };
            let answer = |code, retry_after| Action::Answer { code, retry_after };
            let (on, action) = match rng.random_range(0..13) {
                0 => (on("update", "faragents", "status"), answer(409, None)),
                1 => (on("update", "faragents", "status"), answer(500, None)),
                2 => (on("update", "faragents", "status"), answer(429, Some(1))),
                3 => (on("update", "faragents", "status"), Action::DropAfter),
                4 => (on("update", "faragents", "status"), Action::DropBefore),
                5 => (on("patch", "faragents", ""), answer(409, None)),
                6 => (on("patch", "faragents", ""), Action::DropAfter),
                7 => (on("patch", "farnodes", "status"), answer(500, None)),
                8 => (on("update", "leases", ""), answer(500, None)),
                9 => (on("create", "events", ""), answer(500, None)),
                10 => (on("update", "faragents", "status"), Action::Delay { millis: 700 }),
                11 if rng.random_bool(0.5) => (on("watch", "faragents", ""), Action::ExpireWatch),
                12 if rng.random_bool(0.5) => (on("watch", "farnodes", ""), Action::ExpireWatch),
                _ => continue,
            };
            Fault { on, action, times: 1 }
        };
        truth.count("faults of the API");
        api.faults.add(fault);
    }
    api.faults.clear();
}

struct User {
    api: Api<FarAgent>,
    /// Agents that must come to an end: uid and name.
    expected: Mutex<BTreeMap<String, String>>,
}

impl User {
    async fn create(&self, name: &str, spec: Value) -> String {
        let mut spec = spec;
        spec["image"] = json!("chaos");
        spec["cpu"] = spec.get("cpu").cloned().unwrap_or(json!("100m"));
        spec["memory"] = spec.get("memory").cloned().unwrap_or(json!("64Mi"));
        let agent =
            json!({"apiVersion": "tiffany.dev/v1", "kind": "FarAgent", "metadata": {"name": name}, "spec": spec});
        let agent: FarAgent = serde_json::from_value(agent).unwrap();
        let uid = self
            .api
            .create(&PostParams::default(), &agent)
            .await
            .unwrap()
            .uid()
            .unwrap();
        self.expected.lock().unwrap().insert(uid.clone(), name.to_owned());
        uid
    }

    async fn suspend(&self, name: &str, suspend: bool) {
        let patch = Patch::Merge(json!({"spec": {"suspend": suspend}}));
        while self.api.patch(name, &Default::default(), &patch).await.is_err() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// One agent of the kind that its number says, with all that its user does to it.
    async fn live(&self, number: u64) {
        let name = format!("a{number}");
        let ms = rand::rng().random_range(50..1_500);
        let args = |more: &str| json!([format!("ms={ms}"), more]);
        let again = |more: &str| json!({"args": args(more), "restartPolicy": "OnFailure"});
        match number % 20 {
            0..=1 => drop(self.create(&name, json!({"args": args("exit=3")})).await),
            2..=3 => drop(self.create(&name, again("fails=2")).await),
            4 => drop(self.create(&name, again("breaks=2")).await),
            5 => drop(self.create(&name, again("fails=99")).await),
            6..=8 => {
                let spec = json!({"args": args(""), "restartPolicy": "OnFailure", "lostPolicy": "Reschedule"});
                self.create(&name, spec).await;
            }
            9 => {
                self.create(&name, json!({"args": args(""), "suspend": true})).await;
                tokio::time::sleep(Duration::from_millis(ms)).await;
                self.suspend(&name, false).await;
            }
            10 => {
                self.create(&name, again("")).await;
                tokio::time::sleep(Duration::from_millis(ms / 2)).await;
                self.suspend(&name, true).await;
                tokio::time::sleep(Duration::from_millis(ms)).await;
                self.suspend(&name, false).await;
            }
            11..=12 => self.replace(&name, args("")).await,
            _ => drop(self.create(&name, json!({"args": args("")})).await),
        }
    }

    /// Deleted while it is under way, and made again under the same name.
    async fn replace(&self, name: &str, args: Value) {
        let uid = self.create(name, json!({"args": args})).await;
        let pause = rand::rng().random_range(0..800);
        tokio::time::sleep(Duration::from_millis(pause)).await;
        self.expected.lock().unwrap().remove(&uid);
        while self.api.delete(name, &DeleteParams::default()).await.is_err() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let begun = Instant::now();
        while self
            .api
            .get_opt(name)
            .await
            .ok()
            .flatten()
            .is_some_and(|one| one.uid().as_ref() == Some(&uid))
        {
            assert!(begun.elapsed() < STUCK, "{name} was never gone");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        self.create(name, json!({"args": args})).await;
    }

    async fn list(&self) -> Vec<FarAgent> {
        loop {
            match self.api.list(&ListParams::default()).await {
                Ok(list) => return list.items,
                Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
            }
        }
    }
}

fn is_final(agent: &FarAgent) -> bool {
    agent
        .status
        .as_ref()
        .and_then(|status| status.phase)
        .is_some_and(|phase| phase.is_final())
}

async fn until_all_ended(user: &User) -> Vec<FarAgent> {
    let (mut most, mut since) = (0, Instant::now());
    loop {
        let agents = user.list().await;
        let ended = agents.iter().filter(|agent| is_final(agent)).count();
        if ended == agents.len() {
            return agents;
        }
        if ended > most {
            (most, since) = (ended, Instant::now());
        }
        if since.elapsed() > STUCK {
            let stuck: Vec<_> = agents.iter().filter(|agent| !is_final(agent)).take(5).collect();
            panic!(
                "{} agents never ended, for example: {}",
                agents.len() - ended,
                json!(stuck)
            );
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

/// What of these statuses is not true.
fn lies(agents: &[FarAgent], truth: &Truth) -> Vec<String> {
    let facts = truth.facts();
    let mut lies = Vec::new();
    for agent in agents {
        let status = serde_json::to_value(&agent.status).unwrap();
        let key = (
            agent.uid().unwrap(),
            u32::try_from(status["attempt"].as_u64().unwrap_or(0)).unwrap(),
        );
        let mut lie = |what: &str| lies.push(format!("{what}: {status}, but {:?}", facts.ended.get(&key)));
        if facts.live.contains_key(&key.0) {
            lie("it ended, but an attempt of it lives");
        }
        let booted = facts.boots.keys().filter(|(uid, _)| *uid == key.0).count();
        if status["restarts"].as_u64().unwrap_or(0) > u64::try_from(booted).unwrap() {
            lie("more restarts than boots");
        }
        let reason = status["reason"].as_str().unwrap_or_default();
        let told = status["exitCode"].as_i64();
        match facts.ended.get(&key) {
            // The blade was away for the whole fence time: how the attempt ended there is not known here.
            _ if reason == "NodeLost" && told.is_none() => {}
            Some(ended) => {
                let same_word = format!("{:?}", ended.reason).eq_ignore_ascii_case(reason);
                let same_code = ended.exit_code.map(i64::from) == told;
                if !same_word || !same_code || status["nodeName"] != json!(ended.blade) {
                    lie("another end");
                }
            }
            None => lie("an end of what never was"),
        }
        let is_good = status["phase"] == "Completed";
        if is_good != (reason == "Completed" && told == Some(0)) {
            lie("phase and exit code differ");
        }
    }
    lies
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn chaos_boots_nothing_twice_loses_nothing_leaks_nothing_and_tells_no_lie() {
    let count: u64 = std::env::var("FAR_CHAOS_AGENTS").map_or(400, |text| text.parse().unwrap());
    let begun = Instant::now();
    let dir = tempfile::tempdir().unwrap();
    let dir = if std::env::var_os("FAR_CHAOS_KEEP").is_some() {
        dir.keep()
    } else {
        dir.path().to_owned()
    };
    let api = Arc::new(
        DevApi::start(far_devapi::Config::new(dir.join("devapi")))
            .await
            .unwrap(),
    );
    std::fs::write(dir.join("kubeconfig"), &api.kubeconfig).unwrap();
    let kubeconfig = Kubeconfig::from_yaml(&api.kubeconfig).unwrap();
    let config = kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
        .await
        .unwrap();
    let client = Client::try_from(config).unwrap();

    let mut replicas = vec![Replica::new(&dir, "one"), Replica::new(&dir, "two")];
    replicas[0].start();
    let address = until("the first controller", async || {
        std::fs::read_to_string(replicas[0].ready_file()).ok()
    })
    .await;
    // Replicas share their CA.
    let ca_folder = |replica: &Replica| replica.folder.join("state/ca");
    std::fs::create_dir_all(ca_folder(&replicas[1])).unwrap();
    for file in std::fs::read_dir(ca_folder(&replicas[0])).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), ca_folder(&replicas[1]).join(file.file_name())).unwrap();
    }
    replicas[1].start();

    let (truth, calm, stop) = (
        Arc::new(Truth::default()),
        Arc::new(AtomicBool::new(true)),
        CancellationToken::new(),
    );
    let ca = std::fs::read_to_string(replicas[0].folder.join("ca.pem")).unwrap();
    let tokens = far_controller::tokens::Tokens::new(&replicas[0].folder.join("state"));
    let mut blades = Vec::new();
    for number in 0..BLADES {
        let name = format!("b{number}");
        let setup = Setup {
            name: &name,
            address: address.trim(),
            ca: &ca,
            token: tokens.create(Some(&name), Duration::from_secs(600)).unwrap(),
            ready_files: replicas.iter().map(Replica::ready_file).collect(),
            truth: truth.clone(),
            calm: calm.clone(),
            stop: stop.clone(),
        };
        let blade = ChaosBlade::join(setup).await;
        tokio::spawn(blade.clone().run());
        blades.push(blade);
    }
    let user = Arc::new(User {
        api: Api::namespaced(client, "default"),
        expected: Mutex::default(),
    });

    calm.store(false, Ordering::SeqCst);
    let tormented = tokio::spawn(torment(replicas, calm.clone(), truth.clone()));
    let poisoned = tokio::spawn({
        let (api, calm, truth) = (api.clone(), calm.clone(), truth.clone());
        async move { poison(&api, &calm, &truth).await }
    });
    let mut pace = tokio::time::interval(Duration::from_millis(1000 / PACE));
    let mut lives = tokio::task::JoinSet::new();
    for number in 0..count {
        pace.tick().await;
        let user = user.clone();
        lives.spawn(async move { user.live(number).await });
        while let Some(ended) = lives.try_join_next() {
            ended.unwrap();
        }
    }
    while let Some(ended) = lives.join_next().await {
        ended.unwrap();
    }
    calm.store(true, Ordering::SeqCst);
    poisoned.await.unwrap();
    let replicas = tormented.await.unwrap();
    let agents = until_all_ended(&user).await;

    let there: HashSet<String> = agents.iter().filter_map(ResourceExt::uid).collect();
    let expected = user.expected.lock().unwrap().clone();
    let lost: Vec<_> = expected.iter().filter(|(uid, _)| !there.contains(*uid)).collect();
    assert!(lost.is_empty(), "lost agents: {lost:?}");
    assert_eq!(there.len(), expected.len(), "agents nobody made");
    let lies = lies(&agents, &truth);
    assert!(
        lies.is_empty(),
        "{} statuses are not true:\n{}",
        lies.len(),
        lies.join("\n")
    );

    // Where no room leaked, an agent that needs a whole blade finds it.
    for number in 0..BLADES {
        let spec = json!({"cpu": "4", "memory": "4Gi", "nodeName": format!("b{number}")});
        user.create(&format!("whole{number}"), spec).await;
    }
    let agents = until_all_ended(&user).await;
    let whole = agents.iter().filter(|agent| agent.name_any().starts_with("whole"));
    assert!(
        whole
            .clone()
            .all(|agent| agent.status.as_ref().unwrap().exit_code == Some(0))
    );
    assert_eq!(whole.count(), BLADES);

    // And what is deleted leaves nothing on any blade.
    let of_user = &user.api;
    futures::stream::iter(agents.iter().map(ResourceExt::name_any))
        .for_each_concurrent(32, |name| async move {
            of_user.delete(&name, &DeleteParams::default()).await.unwrap();
        })
        .await;
    let since = Instant::now();
    while !user.list().await.is_empty() || blades.iter().any(|blade| blade.kept() > 0) {
        let kept: usize = blades.iter().map(|blade| blade.kept()).sum();
        assert!(
            since.elapsed() < STUCK,
            "{} agents and {kept} attempts stay",
            user.list().await.len()
        );
        tokio::time::sleep(Duration::from_millis(200)).await;
    }

    let facts = truth.facts();
    assert!(facts.violations.is_empty(), "{}", facts.violations.join("\n"));
    assert!(facts.live.is_empty());
    println!(
        "{count} agents, {} boots in {} s: 0 booted twice, 0 lost, 0 leaked, 0 lies; {:?}",
        facts.boots.len(),
        begun.elapsed().as_secs(),
        facts.counted
    );
    drop(replicas);
    stop.cancel();
}
