//! `far up`: API, controller and node agent on this machine, each in a session of its own. What runs is left alone.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, bail};
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    args::{DownArgs, UpArgs},
    daemons::{self, Daemon},
    doctor, down,
    exit::Outcome,
    folders::Folders,
    node, output,
};

/// Time for a daemon that has to be restarted to go by itself.
const RESTART_GRACE: Duration = Duration::from_secs(20);
/// Pause between two looks at the daemons in the foreground.
const FOREGROUND_LOOK: Duration = Duration::from_secs(1);

pub(crate) async fn up(folders: &Folders, args: &UpArgs) -> anyhow::Result<Outcome> {
    folders.prepare()?;
    let boot_kit = args.boot_kit.clone().unwrap_or_else(|| folders.cache.join("guest"));
    let boot_kit = std::path::absolute(&boot_kit).with_context(|| format!("making {} absolute", boot_kit.display()))?;
    if let Some(missing) = doctor::missing_in_boot_kit(&boot_kit) {
        bail!("the boot kit has no {missing}: `make guest` builds it, or name another with --boot-kit or FAR_BOOT_KIT");
    }
    {
        let _only = lock(folders)?;
        start_all(folders, &boot_kit).await?;
    }
    let kubeconfig = folders.kubeconfig();
    output::line(&format!(
        "\nReady. For kubectl:\n    export KUBECONFIG={}",
        quoted(&kubeconfig)
    ));
    if args.foreground {
        return foreground(folders).await;
    }
    Ok(Outcome::Success)
}

/// One `far up` or `far down` at a time.
pub(crate) fn lock(folders: &Folders) -> anyhow::Result<File> {
    let path = folders.pids().join("lock");
    let file = File::create(&path).with_context(|| format!("creating {}", path.display()))?;
    if file.try_lock().is_err() {
        output::note("Waiting for another `far up` or `far down` …");
        file.lock().with_context(|| format!("locking {}", path.display()))?;
    }
    Ok(file)
}

async fn start_all(folders: &Folders, boot_kit: &Path) -> anyhow::Result<()> {
    let path = |path: PathBuf| path.display().to_string();
    let controller_state = folders.state.join("controller");
    let (ca, token) = (controller_state.join("ca.pem"), controller_state.join("join-token"));

    let devapi = ensure(folders, Daemon::Devapi, false, |listen, ready| {
        vec![
            "--data-dir".into(),
            path(folders.state.join("devapi")),
            "--listen".into(),
            listen,
            "--kubeconfig".into(),
            path(folders.kubeconfig()),
            "--ready-file".into(),
            ready,
        ]
    })
    .await?;
    let name = blade_name(folders)?;
    // Its kubeconfig was read at its start: another address or certificate of the API needs another start.
    let controller = ensure(folders, Daemon::Controller, devapi.has_moved, |listen, ready| {
        vec![
            "run".into(),
            "--kubeconfig".into(),
            path(folders.kubeconfig()),
            "--state-dir".into(),
            path(controller_state.clone()),
            "--listen".into(),
            listen,
            "--install-crds".into(),
            "--gateway-listen".into(),
            "127.0.0.1:0".into(),
            "--issue-join-token-file".into(),
            path(token.clone()),
            // Bound to this blade: only such a token lets it join again when it lost its identity.
            "--join-token-blade".into(),
            name.clone(),
            "--ca-out".into(),
            path(ca.clone()),
            "--ready-file".into(),
            ready,
        ]
    })
    .await?;
    ensure(folders, Daemon::Node, controller.has_moved, |listen, ready| {
        vec![
            "--state-dir".into(),
            path(folders.state.join("node")),
            "--run-dir".into(),
            path(folders.run.clone()),
            "--boot-kit".into(),
            path(boot_kit.to_path_buf()),
            "--name".into(),
            name.clone(),
            "--listen".into(),
            listen,
            "--controller".into(),
            format!("https://{}", controller.address),
            "--controller-ca".into(),
            path(ca.clone()),
            "--join-token-file".into(),
            path(token.clone()),
            "--ready-file".into(),
            ready,
        ]
    })
    .await?;
    Ok(())
}

struct Running {
    address: String,
    /// It serves on another address than before: who was told the old one must be told again.
    has_moved: bool,
}

/// Makes sure that a daemon runs.
async fn ensure(
    folders: &Folders,
    daemon: Daemon,
    must_restart: bool,
    arguments: impl Fn(String, String) -> Vec<String>,
) -> anyhow::Result<Running> {
    let program = daemon.program();
    daemons::bound_log(&daemon.log(folders))?;
    let was_started = daemon.was_started(folders);
    if let Some(process) = daemon.process(folders) {
        // A logout takes /run/user/<uid> away where the user does not linger, and leaves the processes.
        let is_reachable = daemon != Daemon::Node || node::is_served(&folders.node_socket()).await;
        match daemon.address(folders) {
            Some(address) if !must_restart && is_reachable && !process.is_of_replaced_program() => {
                output::line(&format!("{program} runs already (pid {}, {address})", process.pid));
                return Ok(Running {
                    address,
                    has_moved: false,
                });
            }
            // It never came to serve, lost its socket, has to hear something new, or was built again since.
            _ => {
                daemon.stop(folders, RESTART_GRACE).await?;
            }
        }
    }
    let listen = daemon.listen(folders);
    let ready = daemon.ready_file(folders).display().to_string();
    output::note(&format!("starting {program} ({}) …", daemon.role()));
    let address = daemon.start(folders, arguments(listen.clone(), ready)).await?;
    let what = if was_started { "restarted" } else { "started" };
    output::line(&format!("{program} {what} ({address})"));
    Ok(Running {
        has_moved: address != listen,
        address,
    })
}

/// The blade's name, chosen once: its identity is bound to it, also when the machine is renamed.
fn blade_name(folders: &Folders) -> anyhow::Result<String> {
    let file = folders.state.join("blade-name");
    if let Ok(name) = fs::read_to_string(&file)
        && !name.trim().is_empty()
    {
        return Ok(name.trim().to_owned());
    }
    let host = nix::unistd::gethostname().unwrap_or_default();
    let name = clean_name(&host.to_string_lossy());
    fs::write(&file, format!("{name}\n")).with_context(|| format!("writing {}", file.display()))?;
    Ok(name)
}

/// A DNS-1123 label made of a host name.
fn clean_name(host: &str) -> String {
    let label: String = host
        .split('.')
        .next()
        .unwrap_or_default()
        .to_ascii_lowercase()
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .take(63)
        .collect();
    let label = label.trim_matches('-');
    if label.is_empty() {
        "blade".to_owned()
    } else {
        label.to_owned()
    }
}

/// A path as a shell takes it.
pub(crate) fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    if text.chars().all(|c| c.is_ascii_alphanumeric() || "/._-+".contains(c)) {
        text
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

/// Stays until Ctrl-C, TERM, or the death of a daemon; then stops everything.
async fn foreground(folders: &Folders) -> anyhow::Result<Outcome> {
    output::note("Running in the foreground; Ctrl-C stops everything.");
    let mut interrupt = signal(SignalKind::interrupt()).context("waiting for Ctrl-C")?;
    let mut terminate = signal(SignalKind::terminate()).context("waiting for TERM")?;
    let mut look = tokio::time::interval(FOREGROUND_LOOK);
    let dead = loop {
        tokio::select! {
            _ = interrupt.recv() => break None,
            _ = terminate.recv() => break None,
            _ = look.tick() => {
                if let Some(dead) = Daemon::ALL.into_iter().find(|daemon| daemon.process(folders).is_none()) {
                    break Some(dead);
                }
            }
        }
    };
    down::down(folders, &DownArgs { purge: false }).await?;
    match dead {
        Some(dead) => bail!(
            "{} ended by itself; its log is {}",
            dead.program(),
            dead.log(folders).display()
        ),
        None => Ok(Outcome::Success),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blade_names_are_labels() {
        for (host, expected) in [
            ("rack1-blade7", "rack1-blade7"),
            ("Blade_7.example.com", "blade-7"),
            ("-x-", "x"),
            ("", "blade"),
            ("...", "blade"),
            ("ü", "blade"),
        ] {
            assert_eq!(clean_name(host), expected, "{host:?}");
        }
        assert_eq!(clean_name(&"a".repeat(100)).len(), 63);
    }

    #[test]
    fn paths_are_quoted_for_the_shell_only_when_needed() {
        assert_eq!(quoted(Path::new("/a/b-c.d")), "/a/b-c.d");
        assert_eq!(quoted(Path::new("/it's here")), r"'/it'\''s here'");
    }
}
