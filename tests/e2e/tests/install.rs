//! `docs/install.md`, command by command: a real kube-apiserver, the controller with its service account's token, a real blade
//! and a real microVM. In place of a kubelet the test starts the controller's process, and answers `kubectl exec`.

use std::{
    fs,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use far_testkit::{
    find,
    servers::{self, ControlPlane},
    skip, wait_for,
};

/// What stands indented in the guide, in its order.
fn commands() -> String {
    let guide = fs::read_to_string(find::repository().join("docs/install.md")).expect("the guide is there");
    let lines: Vec<_> = guide.lines().filter_map(|line| line.strip_prefix("    ")).collect();
    lines.join("\n")
}

/// One run of the guide; at its end nothing of it is left.
struct Guide {
    dir: tempfile::TempDir,
    plane: ControlPlane,
    controller: Option<Child>,
    /// Process groups of the shells that ran the guide: the blade is in one.
    shells: Vec<u32>,
}

impl Drop for Guide {
    fn drop(&mut self) {
        if let Some(controller) = &mut self.controller {
            let _ = controller.kill();
            let _ = controller.wait();
        }
        for shell in &self.shells {
            // One whose programs all ended is gone already.
            let _ = Command::new("kill").args(["--", &format!("-{shell}")]).status();
        }
    }
}

impl Guide {
    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn kubectl(&self, arguments: &[&str]) -> String {
        let output = Command::new(&self.plane.kubectl)
            .env("KUBECONFIG", &self.plane.kubeconfig)
            .env("HOME", self.dir.path())
            .args(arguments)
            .output()
            .expect("kubectl runs");
        assert!(
            output.status.success(),
            "kubectl {arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// What the Deployment's Pod would be: the same arguments, with the account's token.
    fn start_controller(&mut self) {
        let token = self.kubectl(&["create", "token", "far-controller", "-n", "far-system"]);
        let administrator = fs::read_to_string(&self.plane.kubeconfig).expect("the kubeconfig is there");
        let own: Vec<_> = administrator
            .lines()
            .map(|line| match line.split_once("token: ") {
                Some((indent, _)) => format!("{indent}token: {}", token.trim()),
                None => line.to_owned(),
            })
            .collect();
        fs::write(self.at("pod.kubeconfig"), own.join("\n")).expect("the folder is ours");
        let arguments = self.kubectl(&[
            "-n",
            "far-system",
            "get",
            "deployment",
            "far-controller",
            "-o",
            "jsonpath={.spec.template.spec.containers[0].args[*]}",
        ]);
        let state = self.at("controller");
        let arguments = arguments
            .replace("/var/lib/far-controller", &state.to_string_lossy())
            .replace("0.0.0.0:", "127.0.0.1:")
            .split_whitespace()
            // Ports of its own.
            .map(|argument| match argument.rsplit_once(":") {
                Some((rest, port)) if argument.contains("listen=") && port.parse::<u16>().is_ok() => {
                    format!("{rest}:0")
                }
                _ => argument.to_owned(),
            })
            .collect::<Vec<_>>();
        let log = fs::File::create(self.at("far-controller.log")).expect("the folder is ours");
        let started = Command::new(find::binary("far-controller"))
            .args(arguments)
            .arg("--kubeconfig")
            .arg(self.at("pod.kubeconfig"))
            .arg("--ready-file")
            .arg(self.at("ready"))
            .stdin(Stdio::null())
            .stderr(log)
            .spawn();
        self.controller = Some(started.expect("far-controller starts"));
        let address = wait_for("the controller to lead", || {
            fs::read_to_string(self.at("ready")).map_err(|_| self.log("far-controller.log"))
        });
        // What a kubelet and a load balancer would write.
        let port = address.trim().rsplit_once(':').expect("HOST:PORT").1;
        let patch = |arguments: &[&str], patch: &str| {
            let all = [
                &["-n", "far-system", "patch"],
                arguments,
                &["--type=merge", "-p", patch],
            ]
            .concat();
            self.kubectl(&all);
        };
        let service = ["service", "far-controller"];
        patch(
            &service,
            &format!(r#"{{"spec":{{"ports":[{{"name":"blades","port":{port}}}]}}}}"#),
        );
        patch(
            &[&service[..], &["--subresource=status"]].concat(),
            r#"{"status":{"loadBalancer":{"ingress":[{"ip":"127.0.0.1"}]}}}"#,
        );
        patch(
            &["deployment", "far-controller", "--subresource=status"],
            r#"{"status":{"replicas":2,"readyReplicas":1}}"#,
        );
    }

    /// Runs commands of the guide as its reader; answers what they print.
    fn run(&mut self, kit: &Path, commands: &str) -> String {
        let vhost = std::env::var_os("FAR_VHOST_DEVICE_VSOCK")
            .map_or_else(|| find::cache().join("vhost/bin/vhost-device-vsock"), PathBuf::from);
        let path = format!(
            "{}:{}:{}",
            self.at("bin").display(),
            find::binaries().display(),
            std::env::var("PATH").unwrap_or_default()
        );
        let repository = find::repository().display();
        let shell = Command::new("bash")
            .args(["-euxo", "pipefail", "-c"])
            // The reader's folder is the repository; what is written goes into the test's.
            .arg(format!(
                "ln -sfn {repository}/deploy {repository}/examples .\n{commands}"
            ))
            .current_dir(self.dir.path())
            .env("PATH", path)
            .env("HOME", self.dir.path())
            .env("KUBECONFIG", &self.plane.kubeconfig)
            .env("FAR_RUN", self.at("run"))
            .env("FAR_NODE_STATE_DIR", self.at("node"))
            .env("FAR_BOOT_KIT", kit)
            .env("FAR_VHOST_DEVICE_VSOCK", vhost)
            .env("blade_address", "127.0.0.1:0")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .expect("bash runs");
        self.shells.push(shell.id());
        let output = shell.wait_with_output().expect("its pipes are ours");
        assert!(
            output.status.success(),
            "{}\n{}\ncontroller: {}\nblade: {}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
            self.log("far-controller.log"),
            self.log("far-node.log"),
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn log(&self, name: &str) -> String {
        fs::read_to_string(self.at(name)).unwrap_or_default()
    }

    /// kubectl, except that `exec` runs here what it would run in the Pod.
    fn stand_in_for_exec(&self) {
        let script = format!(
            "#!/bin/sh\ncase \" $* \" in\n*' exec '*) while [ \"$1\" != -- ]; do shift; done; shift\n  \
             exec {} $(shift; echo \"$*\" | sed 's#/var/lib/far-controller#{}#') ;;\nesac\nexec {} \"$@\"\n",
            find::binary("far-controller").display(),
            self.at("controller").display(),
            self.plane.kubectl.display(),
        );
        let path = self.at("bin/kubectl");
        fs::create_dir_all(self.at("bin")).expect("the folder is ours");
        write_program(&path, &script);
    }
}

fn write_program(path: &Path, text: &str) {
    use std::os::unix::fs::PermissionsExt;
    fs::write(path, text).expect("the folder is ours");
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("the file is ours");
}

#[test]
fn the_guide_leads_from_an_existing_cluster_to_a_completed_agent() {
    const TEST: &str = "the_guide_leads_from_an_existing_cluster_to_a_completed_agent";
    let kit = match servers::programs().and_then(|_| find::boot_kit()) {
        Ok(kit) => kit,
        Err(missing) => return skip(TEST, &missing),
    };
    // Short, because socket paths end at 107 bytes.
    let dir = tempfile::Builder::new()
        .prefix("fi")
        .tempdir_in("/tmp")
        .expect("/tmp is writable");
    let plane = ControlPlane::start(&dir.path().join("kube"), &[]).expect("the control plane starts");
    let mut guide = Guide {
        dir,
        plane,
        controller: None,
        shells: Vec::new(),
    };
    guide.stand_in_for_exec();
    let commands = commands();
    let (first, rest) = commands
        .split_once("\nkubectl -n far-system wait")
        .expect("the guide waits for the Deployment");
    guide.run(&kit, first);
    guide.start_controller();
    let shown = guide.run(&kit, &format!("kubectl -n far-system wait{rest}"));
    assert!(shown.contains("blade-1") && shown.contains("Completed"), "{shown}");
}
