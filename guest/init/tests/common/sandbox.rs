//! far-init as PID 1 of its own namespaces, with a folder as image and a Unix socket as control stream.

use super::{Blade, Child};
use far_proto::guest::Exit;
use std::{
    fs,
    path::PathBuf,
    process::{Command, Stdio},
};

/// A guest in namespaces.
pub struct Sandbox {
    pub folder: tempfile::TempDir,
    pub blade: Blade,
    pub init: Option<Child>,
}

/// `None`, with a line that says why, where namespaces cannot be made.
pub fn sandbox(test: &str, args: &[&str]) -> Option<Sandbox> {
    if !nix::unistd::geteuid().is_root() {
        super::skip(test, "root, for unshare");
        return None;
    }
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    fs::create_dir_all(image.join("bin")).unwrap();
    fs::create_dir_all(image.join("etc")).unwrap();
    fs::copy(
        super::guest_programs().unwrap().join("far-payload"),
        image.join("bin/payload"),
    )
    .unwrap();
    fs::write(
        image.join("etc/passwd"),
        "root:x:0:0::/root:/bin/sh\nagent:x:1000:1000::/home/agent:/bin/sh\n",
    )
    .unwrap();
    fs::write(image.join("etc/group"), "agent:x:1000:\n").unwrap();
    let blade = Blade::listen(&folder.path().join("control.sock"), "/bin/payload", args).unwrap();
    Some(Sandbox {
        folder,
        blade,
        init: None,
    })
}

impl Sandbox {
    pub fn image(&self) -> PathBuf {
        self.folder.path().join("image")
    }

    pub fn start(&mut self) {
        let child = Command::new("unshare")
            .args(["-mpfu", "--propagation", "private", "--kill-child"])
            .arg(env!("CARGO_BIN_EXE_far-init"))
            .arg("--test-root")
            .arg(self.folder.path())
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        self.init = Some(Child(child));
    }

    /// far-init's process id as this machine counts: the only child of `unshare`.
    pub fn init_pid(&self) -> u32 {
        let unshare = self.init.as_ref().unwrap().0.id();
        let children = fs::read_to_string(format!("/proc/{unshare}/task/{unshare}/children")).unwrap();
        children.trim().parse().unwrap()
    }

    /// Runs to the acknowledged exit and checks that far-init ended well.
    pub fn run(&mut self) -> Exit {
        self.start();
        let exit = self.blade.serve().unwrap();
        self.ends_well();
        exit
    }

    pub fn ends_well(&mut self) {
        assert!(self.init.as_mut().unwrap().wait().unwrap().success());
    }
}
