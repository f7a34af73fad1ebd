//! Where things are on this machine: state, sockets, cache, boot kit (ARCHITECTURE.md, "Environment and files").

use std::{
    ffi::OsString,
    fs, io,
    os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

use clap::Args;

/// Longest path of a Unix socket: `sun_path` has 108 bytes with its NUL (unix(7)).
const SOCKET_PATH_MAX: usize = 107;
/// What is added below the run folder at most: `/vm/` + a VmId (26 bytes) + `/v.sock_5000`.
const SOCKET_BELOW_RUN: usize = 4 + 26 + 12;

#[derive(Debug, thiserror::Error)]
pub(crate) enum FoldersError {
    #[error("no folder for the state: set FAR_STATE or HOME, or give --state-dir")]
    NoHome,
    #[error("making {folder} absolute")]
    Relative { folder: PathBuf, source: io::Error },
    #[error("creating folder {folder}")]
    Create { folder: PathBuf, source: io::Error },
    #[error("folder {folder} belongs to user {owner}, not to user {me}: choose another with {variable}")]
    Foreign {
        folder: PathBuf,
        owner: u32,
        me: u32,
        variable: &'static str,
    },
    #[error("{folder} is not a folder: choose another with {variable}")]
    NotAFolder { folder: PathBuf, variable: &'static str },
    #[error(
        "folder {folder} is too long for sockets: its path has {length} bytes, at most {max} are possible; choose another with FAR_RUN"
    )]
    TooLong { folder: PathBuf, length: usize, max: usize },
}

/// Folders as the user may set them.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "This machine")]
pub(crate) struct FolderArgs {
    /// What `far up` keeps [default: $XDG_STATE_HOME/far, else ~/.local/state/far]
    #[arg(long, env = "FAR_STATE", value_name = "DIR", global = true, hide_env_values = true)]
    pub(crate) state_dir: Option<PathBuf>,
    /// Sockets of `far up` [default: $XDG_RUNTIME_DIR/far, else /tmp/far-<uid>]
    #[arg(long, env = "FAR_RUN", value_name = "DIR", global = true, hide_env_values = true)]
    pub(crate) run_dir: Option<PathBuf>,
    /// Socket of this machine's blade; when given, it is used for every agent [default: node.sock in the run folder]
    #[arg(long, env = "FAR_SOCKET", value_name = "FILE", global = true, hide_env_values = true)]
    pub(crate) socket: Option<PathBuf>,
}

/// The folders of one FAR on this machine, all absolute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Folders {
    pub(crate) state: PathBuf,
    pub(crate) run: PathBuf,
    /// Where set-up put what it built.
    pub(crate) cache: PathBuf,
    pub(crate) home: Option<PathBuf>,
    /// The blade's socket, where the user named one.
    pub(crate) socket: Option<PathBuf>,
}

impl Folders {
    pub(crate) fn from_environment(args: &FolderArgs) -> Result<Self, FoldersError> {
        Self::resolve(args, |name| std::env::var_os(name), nix::unistd::getuid().as_raw())
    }

    fn resolve(args: &FolderArgs, variable: impl Fn(&str) -> Option<OsString>, uid: u32) -> Result<Self, FoldersError> {
        // An empty variable means an unset one (XDG Base Directory Specification).
        let folder = |name: &str| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let home = folder("HOME");
        let state = args
            .state_dir
            .clone()
            .or_else(|| folder("XDG_STATE_HOME").map(|base| base.join("far")))
            .or_else(|| home.as_ref().map(|base| base.join(".local/state/far")))
            .or_else(|| (uid == 0).then(|| PathBuf::from("/var/lib/far")))
            .ok_or(FoldersError::NoHome)?;
        let run = args
            .run_dir
            .clone()
            .or_else(|| folder("XDG_RUNTIME_DIR").map(|base| base.join("far")))
            .unwrap_or_else(|| PathBuf::from(format!("/tmp/far-{uid}")));
        let cache = folder("FAR_CACHE")
            .or_else(|| home.as_ref().map(|base| base.join(".cache/far")))
            .unwrap_or_else(|| PathBuf::from("/var/cache/far"));
        Ok(Self {
            state: absolute(state)?,
            run: absolute(run)?,
            cache: absolute(cache)?,
            home,
            socket: args.socket.clone(),
        })
    }

    /// The kubeconfig of the API that `far up` starts.
    pub(crate) fn kubeconfig(&self) -> PathBuf {
        self.state.join("kubeconfig")
    }

    /// Pid, ready and address files.
    pub(crate) fn pids(&self) -> PathBuf {
        self.state.join("run")
    }

    pub(crate) fn logs(&self) -> PathBuf {
        self.state.join("logs")
    }

    /// The node agent's socket.
    pub(crate) fn node_socket(&self) -> PathBuf {
        self.socket.clone().unwrap_or_else(|| self.run.join("node.sock"))
    }

    /// Folders of the running microVMs.
    pub(crate) fn vms(&self) -> PathBuf {
        self.run.join("vm")
    }

    /// Makes the folders, private to this user.
    pub(crate) fn prepare(&self) -> Result<(), FoldersError> {
        let length = self.run.as_os_str().len();
        let max = SOCKET_PATH_MAX - SOCKET_BELOW_RUN;
        if length > max {
            return Err(FoldersError::TooLong {
                folder: self.run.clone(),
                length,
                max,
            });
        }
        make_private(&self.state, "FAR_STATE")?;
        make_private(&self.run, "FAR_RUN")?;
        for folder in [self.pids(), self.logs()] {
            make_private(&folder, "FAR_STATE")?;
        }
        Ok(())
    }
}

fn absolute(folder: PathBuf) -> Result<PathBuf, FoldersError> {
    std::path::absolute(&folder).map_err(|source| FoldersError::Relative { folder, source })
}

/// Creates a folder of mode 0700, or takes one that is this user's already. One that is somebody else's, or a symbolic
/// link (both possible in /tmp), is refused: who owns it could swap the sockets.
fn make_private(folder: &Path, variable: &'static str) -> Result<(), FoldersError> {
    let create_error = |source| FoldersError::Create {
        folder: folder.to_path_buf(),
        source,
    };
    if let Some(parent) = folder.parent() {
        fs::create_dir_all(parent).map_err(create_error)?;
    }
    match fs::DirBuilder::new().mode(0o700).create(folder) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(create_error(error)),
    }
    let seen = fs::symlink_metadata(folder).map_err(create_error)?;
    if !seen.is_dir() {
        return Err(FoldersError::NotAFolder {
            folder: folder.to_path_buf(),
            variable,
        });
    }
    let me = nix::unistd::getuid().as_raw();
    if seen.uid() != me {
        return Err(FoldersError::Foreign {
            folder: folder.to_path_buf(),
            owner: seen.uid(),
            me,
            variable,
        });
    }
    if seen.mode() & 0o077 != 0 {
        fs::set_permissions(folder, fs::Permissions::from_mode(0o700)).map_err(create_error)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    type Variables = &'static [(&'static str, &'static str)];

    fn resolve(variables: Variables, uid: u32, args: &FolderArgs) -> Result<Folders, FoldersError> {
        Folders::resolve(
            args,
            |name| {
                variables
                    .iter()
                    .find(|(key, _)| *key == name)
                    .map(|(_, value)| OsString::from(value))
            },
            uid,
        )
    }

    #[test]
    fn state_and_run_follow_the_documented_order() {
        let table: [(&str, Variables, u32, &str, &str); 5] = [
            ("home", &[("HOME", "/h")], 7, "/h/.local/state/far", "/tmp/far-7"),
            (
                "xdg",
                &[("HOME", "/h"), ("XDG_STATE_HOME", "/s"), ("XDG_RUNTIME_DIR", "/r")],
                7,
                "/s/far",
                "/r/far",
            ),
            (
                "empty is unset",
                &[("HOME", "/h"), ("XDG_STATE_HOME", ""), ("XDG_RUNTIME_DIR", "")],
                7,
                "/h/.local/state/far",
                "/tmp/far-7",
            ),
            ("root without home", &[], 0, "/var/lib/far", "/tmp/far-0"),
            (
                "root with home",
                &[("HOME", "/h")],
                0,
                "/h/.local/state/far",
                "/tmp/far-0",
            ),
        ];
        for (why, variables, uid, state, run) in table {
            let folders = resolve(variables, uid, &FolderArgs::default()).unwrap();
            assert_eq!((folders.state, folders.run), (state.into(), run.into()), "{why}");
        }
    }

    #[test]
    fn options_come_before_variables() {
        let args = FolderArgs {
            state_dir: Some("/mine".into()),
            run_dir: Some("/sockets".into()),
            socket: None,
        };
        let folders = resolve(&[("HOME", "/h"), ("XDG_STATE_HOME", "/s")], 7, &args).unwrap();
        assert_eq!((folders.state, folders.run), ("/mine".into(), "/sockets".into()));
    }

    #[test]
    fn a_user_without_a_home_is_told_which_variable_to_set() {
        let error = resolve(&[], 7, &FolderArgs::default()).unwrap_err().to_string();
        assert!(error.contains("FAR_STATE"), "{error}");
    }

    fn in_folder(base: &Path, run: PathBuf) -> Folders {
        Folders {
            state: base.join("state"),
            run,
            cache: base.join("cache"),
            home: None,
            socket: None,
        }
    }

    #[test]
    fn prepared_folders_are_private_and_an_open_one_is_closed() {
        let base = tempfile::tempdir().unwrap();
        let folders = in_folder(base.path(), base.path().join("run"));
        fs::create_dir(&folders.state).unwrap();
        fs::set_permissions(&folders.state, fs::Permissions::from_mode(0o755)).unwrap();
        folders.prepare().unwrap();
        for folder in [&folders.state, &folders.run, &folders.logs(), &folders.pids()] {
            let mode = fs::metadata(folder).unwrap().mode() & 0o777;
            assert_eq!(mode, 0o700, "{}", folder.display());
        }
    }

    #[test]
    fn a_run_folder_too_long_for_sockets_is_refused_before_anything_starts() {
        let base = tempfile::tempdir().unwrap();
        let folders = in_folder(base.path(), base.path().join("x".repeat(90)));
        let error = folders.prepare().unwrap_err().to_string();
        assert!(error.contains("FAR_RUN") && error.contains("too long"), "{error}");
        assert!(!folders.state.exists());
    }

    #[test]
    fn a_symbolic_link_is_no_run_folder() {
        let base = tempfile::tempdir().unwrap();
        let elsewhere = base.path().join("elsewhere");
        fs::create_dir(&elsewhere).unwrap();
        let link = base.path().join("run");
        std::os::unix::fs::symlink(&elsewhere, &link).unwrap();
        let error = in_folder(base.path(), link).prepare().unwrap_err().to_string();
        assert!(error.contains("not a folder"), "{error}");
    }
}
