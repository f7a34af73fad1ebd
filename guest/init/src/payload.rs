//! The payload's process: what is checked and prepared before the fork, and how a failure reads.

use crate::{
    cgroup::Cgroup,
    logs::Pipes,
    plan::Plan,
    rootfs::{Root, RootError, Symlinks, kind_of},
    spawn::{Child, Step, World, errno_of, read_report},
    users::{self, User, UserError},
};
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::stat::{Mode, SFlag},
    unistd::{self, Gid, Pid, Uid},
};
use std::{ffi::OsStr, fs::File, os::unix::ffi::OsStrExt, path::Path};

/// Codes of a shell for what could not be started.
pub(crate) const NOT_FOUND: u32 = 127;
pub(crate) const NOT_EXECUTABLE: u32 = 126;

/// Why the payload did not start; the text is the agent's `start_error`.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    #[error("spec.entrypoint: {path} does not exist in the image")]
    NoEntrypoint { path: String },
    #[error(
        "spec.entrypoint: the interpreter of {path} (its #! line or its dynamic loader) does not exist in the image"
    )]
    NoInterpreter { path: String },
    #[error("spec.entrypoint: {path} is not executable ({why})")]
    NotExecutable { path: String, why: String },
    #[error(transparent)]
    User(#[from] UserError),
    #[error("spec.user: {0}")]
    Tables(#[from] RootError),
    #[error("spec.workingDir: {path}: {errno}")]
    WorkingDir { path: String, errno: Errno },
    #[error("starting the payload: {step}: {errno}")]
    Step { step: &'static str, errno: Errno },
}

impl StartError {
    /// The exit code that goes with it.
    pub(crate) fn code(&self) -> u32 {
        match self {
            Self::NoEntrypoint { .. } | Self::NoInterpreter { .. } => NOT_FOUND,
            Self::NotExecutable { .. }
            | Self::User(_)
            | Self::Tables(_)
            | Self::WorkingDir { .. }
            | Self::Step { .. } => NOT_EXECUTABLE,
        }
    }
}

/// A running payload.
#[derive(Debug)]
pub(crate) struct Started {
    pub(crate) pid: Pid,
    pub(crate) pipes: Pipes,
}

/// Looks the payload's user up in the image.
pub(crate) fn identity(root: &Root, user: &str) -> Result<User, StartError> {
    let table = |path| {
        root.read(Path::new(path), users::MAX_TABLE)
            .map(Option::unwrap_or_default)
    };
    Ok(users::resolve(user, &table("/etc/passwd")?, &table("/etc/group")?)?)
}

/// Starts the payload.
///
/// # Errors
/// [`StartError`]; then no process is left.
pub(crate) fn start(plan: &Plan, root: &Root, cgroup: Option<&Cgroup>, user: &User) -> Result<Started, StartError> {
    let prepared = |step: &'static str| move |errno: Errno| StartError::Step { step, errno };
    let (stdout, stdout_child) = unistd::pipe2(OFlag::O_CLOEXEC).map_err(prepared("making a pipe"))?;
    let (stderr, stderr_child) = unistd::pipe2(OFlag::O_CLOEXEC).map_err(prepared("making a pipe"))?;
    for pipe in [&stdout, &stderr] {
        fcntl(pipe, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(prepared("setting up a pipe"))?;
    }
    for pipe in [&stdout_child, &stderr_child]
        .into_iter()
        .filter(|_| user.uid != 0 || user.gid != 0)
    {
        // So that /dev/stdout can be opened by the payload's user.
        unistd::fchown(pipe, Some(Uid::from_raw(user.uid)), Some(Gid::from_raw(user.gid)))
            .map_err(prepared("setting up a pipe"))?;
    }
    let null = File::open("/dev/null").map_err(|error| StartError::Step {
        step: "opening /dev/null",
        errno: errno_of(&error),
    })?;
    let child = Child {
        world: World::New(root),
        user,
        limits: &plan.limits,
        allow_new_privileges: plan.allow_new_privileges,
        cgroup: cgroup.map(Cgroup::folder),
        stdin: null.into(),
        stdout: stdout_child,
        stderr: stderr_child,
        terminal: false,
        working_dir: &plan.working_dir,
        programs: std::slice::from_ref(&plan.entrypoint),
        argv: &plan.argv,
        env: &plan.env(&user.home),
    };
    let (pid, report) = child.spawn().map_err(|error| StartError::Step {
        step: "fork",
        errno: errno_of(&error),
    })?;
    match read_report(report) {
        None => Ok(Started {
            pid,
            pipes: Pipes::new(stdout, stderr),
        }),
        // The child has ended or is about to; the session reaps it like any other.
        Some((Step::Exec, errno)) => Err(check_entrypoint(plan, root)
            .err()
            .unwrap_or_else(|| explain(plan, Step::Exec, errno))),
        Some((step, errno)) => Err(explain(plan, step, errno)),
    }
}

/// What exec says less clearly.
fn check_entrypoint(plan: &Plan, root: &Root) -> Result<(), StartError> {
    let path = text(plan.entrypoint.as_bytes());
    let file = Path::new(OsStr::from_bytes(plan.entrypoint.as_bytes()));
    match root.open(file, OFlag::O_PATH, Mode::empty(), Symlinks::InsideRoot) {
        Ok(fd) => match kind_of(&fd) {
            Ok(SFlag::S_IFREG) => Ok(()),
            Ok(SFlag::S_IFDIR) => Err(StartError::NotExecutable {
                path,
                why: "it is a directory".into(),
            }),
            Ok(_) => Err(StartError::NotExecutable {
                path,
                why: "it is not a regular file".into(),
            }),
            Err(errno) => Err(StartError::NotExecutable {
                path,
                why: errno.desc().into(),
            }),
        },
        Err(Errno::ENOENT | Errno::ENOTDIR) => Err(StartError::NoEntrypoint { path }),
        Err(errno) => Err(StartError::NotExecutable {
            path,
            why: errno.desc().into(),
        }),
    }
}

fn explain(plan: &Plan, step: Step, errno: Errno) -> StartError {
    let path = text(plan.entrypoint.as_bytes());
    match (step, errno) {
        // The file is there.
        (Step::Exec, Errno::ENOENT) => StartError::NoInterpreter { path },
        (Step::Exec, Errno::EACCES) => StartError::NotExecutable {
            path,
            why: "no permission: mode, owner or folder".into(),
        },
        (Step::Exec, Errno::ENOEXEC) => StartError::NotExecutable {
            path,
            why: "not a program of this machine, and no #! line".into(),
        },
        (Step::Exec, errno) => StartError::NotExecutable {
            path,
            why: errno.desc().into(),
        },
        (Step::WorkingDir, errno) => StartError::WorkingDir {
            path: text(plan.working_dir.as_bytes()),
            errno,
        },
        (step, errno) => StartError::Step {
            step: step.name(),
            errno,
        },
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
