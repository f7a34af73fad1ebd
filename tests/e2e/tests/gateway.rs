//! Inside a running agent from anywhere: the same commands with the blade's own socket out of sight, so that each goes
//! through the controller, with a user's own token.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    path::Path,
    process::{Command, Stdio},
};

use far_e2e::{
    far_or_skip, payload_agent,
    terminal::{Terminal, interrupt},
};
use far_testkit::{Far, Run, find, wait_for};
use serde_json::Value;

/// A FAR with one running agent `a`, and users `jane` (everything inside agents) and `reader` (reads agents and output).
const USERS: &str = r#"
apiVersion: v1
kind: ServiceAccount
metadata: {name: jane}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: reader}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: reads}
rules:
- {apiGroups: [tiffany.dev], resources: [faragents], verbs: [get, list, watch]}
- {apiGroups: [tiffany.dev], resources: [faragents/log], verbs: [get]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: enters}
rules:
- {apiGroups: [tiffany.dev], resources: [faragents/exec, faragents/cp, faragents/portforward], verbs: [create]}
- {apiGroups: [tiffany.dev], resources: [faragents/stats], verbs: [get]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: reads}
subjects: [{kind: ServiceAccount, name: jane, namespace: default}, {kind: ServiceAccount, name: reader, namespace: default}]
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: reads}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: enters}
subjects: [{kind: ServiceAccount, name: jane, namespace: default}]
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: enters}
---
# What the installation has, so that users find the gateway.
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: far-gateway-discovery, namespace: far-system}
rules:
- {apiGroups: [""], resources: [configmaps], resourceNames: [far-gateway], verbs: [get]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: far-gateway-discovery, namespace: far-system}
subjects: [{kind: Group, name: "system:authenticated", apiGroup: rbac.authorization.k8s.io}]
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: far-gateway-discovery}
"#;

struct Elsewhere {
    far: Far,
}

impl Elsewhere {
    fn start(test: &str) -> Option<Self> {
        let far = far_or_skip(test)?;
        far.apply(USERS);
        far.apply(&payload_agent("a", &["err=to stderr", "out=begin", "listen=7777"]));
        let _ = far.wait_phase("a", "Running");
        Some(Self { far })
    }

    /// The administrator of the cluster, on a machine without a blade.
    fn command(&self, program: &str) -> Command {
        let mut command = self.far.command(&find::binary(program));
        command.env("FAR_RUN", self.far.dir().join("no-blade-here"));
        command
    }

    fn run(&self, token: Option<&str>, args: &[&str]) -> Run {
        let mut command = self.command("far");
        if let Some(token) = token {
            command.env("FAR_TOKEN", token);
        }
        Run::of(&command.args(args).output().expect("far runs"))
    }

    fn token(&self, account: &str) -> String {
        self.far.far(&["token", account]).ok().trim().to_owned()
    }
}

#[test]
fn everything_inside_an_agent_works_from_elsewhere_with_the_users_own_rights() {
    let test = "everything_inside_an_agent_works_from_elsewhere_with_the_users_own_rights";
    let Some(elsewhere) = Elsewhere::start(test) else {
        return;
    };
    let (jane, reader) = (elsewhere.token("jane"), elsewhere.token("reader"));
    // The administrator, and a user with the rights; as far and as a kubectl plugin.
    for token in [None, Some(jane.as_str())] {
        let run = elsewhere.run(
            token,
            &["exec", "a", "--", "/payload", "out=hello", "err=oops", "exit=42"],
        );
        assert_eq!(
            (run.code, run.stdout.as_str(), run.stderr.as_str()),
            (42, "hello\n", "oops\n")
        );
    }
    let plugin = elsewhere
        .command("kubectl-far")
        .args(["exec", "a", "--", "/payload", "out=plugin", "signal=9"])
        .output()
        .expect("the plugin runs");
    assert_eq!(
        (plugin.status.code(), plugin.stdout.as_slice()),
        (Some(137), b"plugin\n".as_slice())
    );

    // A user who may read agents and their output, and no more.
    assert!(
        elsewhere
            .run(Some(&reader), &["get", "fa", "a"])
            .ok()
            .contains("Running")
    );
    assert_eq!(
        elsewhere.run(Some(&reader), &["logs", "a", "--stderr"]).ok(),
        "to stderr\n"
    );
    for (args, code) in [
        (&["exec", "a", "--", "/payload"][..], 125),
        (&["cp", "a:/payload", "x"], 1),
        (&["top", "a"], 1),
        (&["top"], 1),
    ] {
        let run = elsewhere.run(Some(&reader), args);
        assert_eq!(run.code, code, "{args:?}: {}", run.stderr);
        assert!(
            run.stderr.contains("is forbidden") && run.stderr.contains("reader"),
            "{}",
            run.stderr
        );
    }
    let garbage = elsewhere.run(Some("garbage"), &["exec", "a", "--", "/payload"]);
    assert_eq!(garbage.code, 125, "{}", garbage.stderr);

    copies_a_folder_both_ways(&elsewhere, &jane);
    reaches_a_port(&elsewhere, &jane);
    let all: Value = serde_json::from_str(&elsewhere.run(Some(&jane), &["top", "-o", "json"]).ok()).expect("JSON");
    assert_eq!(
        (&all[0]["name"], all.as_array().map(Vec::len)),
        (&Value::from("a"), Some(1)),
        "{all}"
    );
    has_a_terminal(&elsewhere);
    says_what_is_missing(&elsewhere);
    elsewhere.far.stop();
}

fn copies_a_folder_both_ways(elsewhere: &Elsewhere, token: &str) {
    let from = elsewhere.far.dir().join("from");
    fs::create_dir_all(from.join("deep")).expect("a folder");
    let big: Vec<u8> = (0..500_000_u32).flat_map(u32::to_le_bytes).collect();
    fs::write(from.join("big"), &big).expect("a file");
    fs::write(from.join("deep/small"), "small").expect("a file");
    let _ = elsewhere.run(Some(token), &["cp", "from", "a:/tmp"]).ok();
    let _ = elsewhere.run(Some(token), &["cp", "a:/tmp/from", "back"]).ok();
    let back = elsewhere.far.dir().join("back");
    assert!(fs::read(back.join("big")).expect("it came back") == big);
    assert_eq!(fs::read(back.join("deep/small")).expect("it came back"), b"small");
}

fn reaches_a_port(elsewhere: &Elsewhere, token: &str) {
    wait_for("the agent to listen", || {
        let output = elsewhere.run(None, &["logs", "a"]).stdout;
        if output.contains("listening") {
            Ok(())
        } else {
            Err(output)
        }
    });
    let mut forwarding = elsewhere
        .command("far")
        .env("FAR_TOKEN", token)
        .args(["port-forward", "a", ":7777"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("far runs");
    let mut line = String::new();
    let mut output = BufReader::new(forwarding.stdout.take().expect("piped"));
    output.read_line(&mut line).expect("it says what it forwards");
    let address = line.split(' ').nth(1).expect("an address");
    for _ in 0..2 {
        let mut stream = TcpStream::connect(address).expect("far listens");
        stream.write_all(&[b'x'; 10_000]).expect("the echo takes it");
        stream.shutdown(std::net::Shutdown::Write).expect("it stands");
        let mut got = Vec::new();
        stream.read_to_end(&mut got).expect("the echo answers");
        assert_eq!(got.len(), 10_000);
    }
    interrupt(&forwarding);
    assert_eq!(forwarding.wait().expect("it ends").code(), Some(0));
}

fn has_a_terminal(elsewhere: &Elsewhere) {
    let start = |args: &[&str]| {
        let mut setsid = elsewhere.far.command(Path::new("setsid"));
        setsid.env("FAR_RUN", elsewhere.far.dir().join("no-blade-here"));
        Terminal::start(setsid, &find::binary("far"), args)
    };
    let mut terminal = start(&[
        "exec",
        "-it",
        "a",
        "--",
        "/payload",
        "tty-size",
        "await-resize=50x120",
        "tty-size",
        "read-line",
        "exit=7",
    ]);
    let before = terminal.settings();
    terminal.until("40x100\r\n");
    terminal.until("waiting");
    assert_ne!(terminal.settings(), before, "raw while the program has it");
    terminal.resize(50, 120);
    terminal.until("50x120\r\n");
    terminal.press(b"hello\r");
    terminal.until("read hello\r\n");
    let (code, seen) = terminal.code();
    assert_eq!(code, 7, "{seen:?}");
    let mut terminal = start(&["exec", "-it", "a", "--", "/payload", "out=sleeps", "sleep=600000"]);
    terminal.until("sleeps");
    terminal.press(b"\x03");
    let (code, seen) = terminal.code();
    assert_eq!(code, 130, "Ctrl-C ended the remote program, not far: {seen:?}");
    // Whatever was begun from elsewhere is over in the agent.
    wait_for("only the payload to run", || {
        let all: Value = serde_json::from_str(&elsewhere.run(None, &["top", "a", "-o", "json"]).ok()).expect("JSON");
        if all[0]["channels"] == 0 && all[0]["processes"] == 1 {
            Ok(())
        } else {
            Err(all.to_string())
        }
    });
}

/// A kubeconfig without a token, a gateway that is not there, and one that is nobody's.
fn says_what_is_missing(elsewhere: &Elsewhere) {
    let run = |args: &[&str]| elsewhere.run(None, &[args, &["exec", "a", "--", "/payload"]].concat());
    let nobody = std::net::TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| listener.local_addr())
        .expect("a port")
        .to_string();
    let refused = run(&["--gateway", &nobody]);
    assert_eq!(refused.code, 125);
    assert!(
        refused.stderr.contains(&nobody) && refused.stderr.contains("does not answer"),
        "{}",
        refused.stderr
    );
    let file = elsewhere.far.dir().join("state/kubeconfig");
    let text = fs::read_to_string(&file).expect("a kubeconfig");
    let token = text
        .lines()
        .find(|line| line.trim().starts_with("token:"))
        .expect("a token")
        .to_owned();
    let secret = elsewhere.far.dir().join("token");
    fs::write(&secret, token.trim().trim_start_matches("token:").trim()).expect("writable");
    // By a file, and by a program, as kubectl's plugins are.
    let by_file = text.replace(&token, &format!("    tokenFile: {}", secret.display()));
    let plugin = elsewhere.far.dir().join("plugin");
    let answer = "{\\\"apiVersion\\\":\\\"client.authentication.k8s.io/v1\\\",\\\"kind\\\":\\\"ExecCredential\\\",\\\"status\\\":{\\\"token\\\":\\\"$(cat ";
    fs::write(
        &plugin,
        format!("#!/bin/sh\necho \"{answer}{})\\\"}}}}\"\n", secret.display()),
    )
    .expect("writable");
    fs::set_permissions(&plugin, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("a mode");
    let by_program = text.replace(
        &token,
        &format!(
            "    exec: {{apiVersion: client.authentication.k8s.io/v1, command: {}, interactiveMode: Never}}",
            plugin.display()
        ),
    );
    for (why, text) in [("a file", by_file), ("a program", by_program)] {
        let other = elsewhere.far.dir().join("other-kubeconfig");
        fs::write(&other, text).expect("writable");
        let run = run(&["--kubeconfig", &other.to_string_lossy()]);
        assert_eq!(run.code, 0, "{why}: {}", run.stderr);
    }
}

#[test]
fn followed_output_goes_on_over_a_restart_of_the_controller() {
    let test = "followed_output_goes_on_over_a_restart_of_the_controller";
    let Some(elsewhere) = Elsewhere::start(test) else {
        return;
    };
    elsewhere.far.apply(&payload_agent(
        "talks",
        &["out=one", "read-file=/tmp/go", "out=two", "exit=0"],
    ));
    let _ = elsewhere.far.wait_phase("talks", "Running");
    let mut follower = elsewhere
        .command("far")
        .args(["logs", "-f", "talks"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("far runs");
    let mut output = BufReader::new(follower.stdout.take().expect("piped"));
    let mut first = String::new();
    output.read_line(&mut first).expect("output comes");
    assert_eq!(first, "one\n");
    elsewhere.far.kill("far-controller");
    // A call that cannot be resumed says so at once.
    let lost = elsewhere.run(None, &["exec", "talks", "--", "/payload"]);
    assert_eq!(lost.code, 125);
    assert!(lost.stderr.contains("gateway"), "{}", lost.stderr);
    elsewhere.far.up_again();
    wait_for("the agent to be entered again", || {
        let run = elsewhere.run(None, &["exec", "talks", "--", "/payload", "write=/tmp/go:x"]);
        // It may have ended before the program's own exit was told; only that program can have let it go on.
        if run.code == 0 || run.stderr.contains("Completed") {
            Ok(())
        } else {
            Err(run.stderr)
        }
    });
    let mut rest = String::new();
    output.read_to_string(&mut rest).expect("it goes on");
    assert_eq!(rest, "two\n", "each line once");
    assert!(follower.wait().expect("it ends").success());
    elsewhere.far.stop();
}
