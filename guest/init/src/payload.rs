//! The payload's process: everything is prepared in PID 1, then a child walks a fixed list of steps and execs. Which step
//! failed comes back through a close-on-exec pipe.

use crate::{
    cgroup::Cgroup,
    logs::Pipes,
    place::Place,
    plan::Plan,
    rootfs::{Root, RootError, Symlinks, kind_of},
    sys,
    users::{self, User, UserError},
};
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    sys::{
        resource::{Resource, setrlimit},
        stat::{Mode, SFlag},
    },
    unistd::{self, Gid, Pid, Uid},
};
use std::{
    ffi::OsStr,
    fs::File,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

/// Open files of the payload, soft and hard: what systemd gives its services. The kernel's own hard limit is 4096.
const OPEN_FILES: (u64, u64) = (1024, 524_288);

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

/// What the child does, in this order; the number travels through the pipe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Step {
    Session,
    Cgroup,
    OomScore,
    Streams,
    MountNamespace,
    EnterRoot,
    Groups,
    Group,
    User,
    WorkingDir,
    Signals,
    Exec,
}

impl Step {
    const ALL: [(Self, &'static str); 12] = [
        (Self::Session, "starting a session"),
        (Self::Cgroup, "entering the cgroup"),
        (Self::OomScore, "resetting oom_score_adj"),
        (Self::Streams, "connecting the standard streams"),
        (Self::MountNamespace, "making a mount namespace"),
        (Self::EnterRoot, "entering the root file system"),
        (Self::Groups, "setting supplementary groups"),
        (Self::Group, "setting the group"),
        (Self::User, "setting the user"),
        (Self::WorkingDir, "entering the working directory"),
        (Self::Signals, "resetting signals"),
        (Self::Exec, "exec"),
    ];
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
pub(crate) fn start(
    place: &Place,
    plan: &Plan,
    root: &Root,
    cgroup: Option<&Cgroup>,
    user: &User,
) -> Result<Started, StartError> {
    check_entrypoint(plan, root)?;
    let prepared = |step: &'static str| move |errno: Errno| StartError::Step { step, errno };
    let (stdout, stdout_child) = unistd::pipe2(OFlag::O_CLOEXEC).map_err(prepared("making a pipe"))?;
    let (stderr, stderr_child) = unistd::pipe2(OFlag::O_CLOEXEC).map_err(prepared("making a pipe"))?;
    let (report, report_child) = unistd::pipe2(OFlag::O_CLOEXEC).map_err(prepared("making a pipe"))?;
    for pipe in [&stdout, &stderr] {
        fcntl(pipe, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(prepared("setting up a pipe"))?;
    }
    for pipe in [&stdout_child, &stderr_child] {
        // So that /dev/stdout can be opened by the payload's user.
        unistd::fchown(pipe, Some(Uid::from_raw(user.uid)), Some(Gid::from_raw(user.gid)))
            .map_err(prepared("setting up a pipe"))?;
    }
    let null = File::open("/dev/null").map_err(|error| StartError::Step {
        step: "opening /dev/null",
        errno: errno_of(&error),
    })?;
    let door = cgroup.map(Cgroup::door).transpose().map_err(|error| StartError::Step {
        step: "opening the cgroup",
        errno: errno_of(&error),
    })?;
    let child = Child {
        place,
        plan,
        root,
        user,
        door,
        null,
        stdout: stdout_child,
        stderr: stderr_child,
    };
    let pid = sys::fork_into(|| child.run(report_child.as_fd())).map_err(|error| StartError::Step {
        step: "fork",
        errno: errno_of(&error),
    })?;
    drop(report_child);
    drop(child);
    match read_report(report) {
        None => Ok(Started {
            pid,
            pipes: Pipes::new(stdout, stderr),
        }),
        // The child has ended or is about to; the session reaps it like any other.
        Some((step, errno)) => Err(explain(plan, step, errno)),
    }
}

/// What exec would say less clearly.
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
        // The file was there a moment ago.
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
        (step, errno) => {
            let step = Step::ALL.iter().find(|(s, _)| *s == step).map_or("", |(_, name)| name);
            StartError::Step { step, errno }
        }
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn errno_of(error: &io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
}

/// One byte of step and four of errno, or nothing when exec closed the pipe.
fn read_report(pipe: OwnedFd) -> Option<(Step, Errno)> {
    let mut bytes = [0; 5];
    File::from(pipe).read_exact(&mut bytes).ok()?;
    let [step, errno @ ..] = bytes;
    let (step, _) = Step::ALL.into_iter().find(|(s, _)| *s as u8 == step)?;
    Some((step, Errno::from_raw(i32::from_ne_bytes(errno))))
}

/// What the child needs, opened before the fork.
struct Child<'a> {
    place: &'a Place,
    plan: &'a Plan,
    root: &'a Root,
    user: &'a User,
    door: Option<File>,
    null: File,
    stdout: OwnedFd,
    stderr: OwnedFd,
}

impl Child<'_> {
    /// Ends in exec; the exit code is only seen when exec failed, and the report says why.
    fn run(&self, report: impl AsFd) -> i32 {
        let (step, errno) = match self.steps() {
            Err(failure) => failure,
            Ok(never) => match never {},
        };
        let mut bytes = vec![step as u8];
        bytes.extend_from_slice(&(errno as i32).to_ne_bytes());
        // Five bytes into an empty pipe never block; a parent that is gone needs no report.
        let _ = unistd::write(report, &bytes);
        127
    }

    fn steps(&self) -> Result<std::convert::Infallible, (Step, Errno)> {
        let at = |step| move |errno: Errno| (step, errno);
        let io_at = |step| move |error: io::Error| (step, errno_of(&error));
        unistd::setsid().map_err(at(Step::Session))?;
        if let Some(mut door) = self.door.as_ref() {
            door.write_all(b"0").map_err(io_at(Step::Cgroup))?;
        }
        if self.place.is_guest() {
            // PID 1's own exemption is inherited by fork.
            std::fs::write("/proc/self/oom_score_adj", "0").map_err(io_at(Step::OomScore))?;
        }
        unistd::dup2_stdin(&self.null).map_err(at(Step::Streams))?;
        unistd::dup2_stdout(&self.stdout).map_err(at(Step::Streams))?;
        unistd::dup2_stderr(&self.stderr).map_err(at(Step::Streams))?;
        // The kernel's default works too, only for fewer files.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES.0, OPEN_FILES.1);
        // An own mount namespace with the image moved over its root: no way back by chroot tricks, and whatever the
        // payload mounts is not PID 1's.
        unshare(CloneFlags::CLONE_NEWNS).map_err(at(Step::MountNamespace))?;
        unistd::chdir(self.root.path()).map_err(at(Step::EnterRoot))?;
        mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>).map_err(at(Step::EnterRoot))?;
        unistd::chroot(".").map_err(at(Step::EnterRoot))?;
        unistd::chdir("/").map_err(at(Step::EnterRoot))?;
        let groups: Vec<Gid> = self.user.groups.iter().copied().map(Gid::from_raw).collect();
        unistd::setgroups(&groups).map_err(at(Step::Groups))?;
        let (uid, gid) = (Uid::from_raw(self.user.uid), Gid::from_raw(self.user.gid));
        unistd::setresgid(gid, gid, gid).map_err(at(Step::Group))?;
        unistd::setresuid(uid, uid, uid).map_err(at(Step::User))?;
        unistd::chdir(self.plan.working_dir.as_c_str()).map_err(at(Step::WorkingDir))?;
        sys::reset_signals().map_err(io_at(Step::Signals))?;
        unistd::execve(&self.plan.entrypoint, &self.plan.argv, &self.plan.env(&self.user.home)).map_err(at(Step::Exec))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_step_has_a_name_and_its_own_number() {
        for (index, (step, name)) in Step::ALL.iter().enumerate() {
            assert_eq!(*step as usize, index);
            assert!(!name.is_empty());
        }
    }

    #[test]
    fn reports_are_read_and_an_empty_pipe_is_success() {
        let report = |bytes: &[u8]| {
            let (read, write) = unistd::pipe2(OFlag::O_CLOEXEC).unwrap();
            unistd::write(&write, bytes).unwrap();
            drop(write);
            read_report(read)
        };
        assert_eq!(report(b""), None);
        let mut bytes = vec![Step::Exec as u8];
        bytes.extend_from_slice(&libc::ENOENT.to_ne_bytes());
        assert_eq!(report(&bytes), Some((Step::Exec, Errno::ENOENT)));
    }
}
