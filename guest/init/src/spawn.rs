//! From PID 1 to another program: the fixed list of steps that a child walks before it execs, for the payload and for exec.
//! Everything is prepared in PID 1; which step failed comes back through a close-on-exec pipe.

use crate::{plan::Limit, rootfs::Root, sys, users::User};
use nix::{
    errno::Errno,
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns},
    sys::{
        prctl,
        resource::{Resource, setrlimit},
    },
    unistd::{self, Gid, Pid, Uid},
};
use std::{
    ffi::{CStr, CString},
    fs::File,
    io::{self, Read},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

/// Open files, soft and hard, unless the configuration says otherwise: what systemd gives its services. The kernel's own
/// hard limit is 4096.
const OPEN_FILES: (u64, u64) = (1024, 524_288);

/// What the child does, in this order; the number travels through the pipe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Step {
    Session,
    Streams,
    MountNamespace,
    EnterRoot,
    Limits,
    Groups,
    Group,
    User,
    Privileges,
    WorkingDir,
    Signals,
    Exec,
}

impl Step {
    const ALL: [(Self, &'static str); 12] = [
        (Self::Session, "starting a session"),
        (Self::Streams, "connecting the standard streams"),
        (Self::MountNamespace, "entering the mount namespace"),
        (Self::EnterRoot, "entering the root file system"),
        (Self::Limits, "setting resource limits"),
        (Self::Groups, "setting supplementary groups"),
        (Self::Group, "setting the group"),
        (Self::User, "setting the user"),
        (Self::Privileges, "giving up new privileges"),
        (Self::WorkingDir, "entering the working directory"),
        (Self::Signals, "resetting signals"),
        (Self::Exec, "exec"),
    ];

    /// What the step does, for an error's text.
    pub(crate) fn name(self) -> &'static str {
        Self::ALL
            .iter()
            .find(|(step, _)| *step == self)
            .map_or("", |(_, name)| name)
    }
}

/// The file system that the child sees.
#[derive(Debug, Clone, Copy)]
pub(crate) enum World<'a> {
    /// A new mount namespace with the image as its root: the payload.
    New(&'a Root),
    /// The payload's mount namespace: exec.
    OfPayload(&'a OwnedFd),
}

/// What the child needs, opened before the fork.
pub(crate) struct Child<'a> {
    pub(crate) world: World<'a>,
    pub(crate) user: &'a User,
    pub(crate) limits: &'a [Limit],
    pub(crate) allow_new_privileges: bool,
    /// The group it is born in.
    pub(crate) cgroup: Option<BorrowedFd<'a>>,
    pub(crate) stdin: OwnedFd,
    pub(crate) stdout: OwnedFd,
    pub(crate) stderr: OwnedFd,
    /// `stdin` is a terminal that becomes the controlling one.
    pub(crate) terminal: bool,
    pub(crate) working_dir: &'a CStr,
    /// Paths to try, in order.
    pub(crate) programs: &'a [CString],
    pub(crate) argv: &'a [CString],
    pub(crate) env: &'a [CString],
}

impl Child<'_> {
    /// Forks. The pipe gives nothing when the program runs, or [`read_report`]'s five bytes.
    ///
    /// # Errors
    /// When no pipe or process could be made.
    pub(crate) fn spawn(self) -> io::Result<(Pid, OwnedFd)> {
        let (report, report_child) = unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
        let birth = sys::Birth {
            own_mounts: matches!(self.world, World::New(_)),
            cgroup: self.cgroup,
        };
        let pid = sys::fork_into(birth, || self.run(report_child.as_fd()))?;
        Ok((pid, report))
    }

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
        if self.terminal {
            sys::take_terminal(&self.stdin).map_err(io_at(Step::Streams))?;
        }
        unistd::dup2_stdin(&self.stdin).map_err(at(Step::Streams))?;
        unistd::dup2_stdout(&self.stdout).map_err(at(Step::Streams))?;
        unistd::dup2_stderr(&self.stderr).map_err(at(Step::Streams))?;
        match self.world {
            // Its own mount namespace with the image moved over its root: no way back by chroot tricks, and whatever the
            // payload mounts is not PID 1's.
            World::New(root) => {
                unistd::chdir(root.path()).map_err(at(Step::EnterRoot))?;
                mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>).map_err(at(Step::EnterRoot))?;
                // The working directory is the new root already.
                unistd::chroot(".").map_err(at(Step::EnterRoot))?;
            }
            // setns(2) enters the topmost mount at its root, which is the image.
            World::OfPayload(namespace) => {
                setns(namespace, CloneFlags::CLONE_NEWNS).map_err(at(Step::MountNamespace))?;
            }
        }
        // The kernel's default works too, only for fewer files.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES.0, OPEN_FILES.1);
        for limit in self.limits {
            setrlimit(limit.resource, limit.soft, limit.hard).map_err(at(Step::Limits))?;
        }
        // PID 1 is root without supplementary groups: nothing to change for such a user.
        if !self.user.is_plain_root() {
            let groups: Vec<Gid> = self.user.groups.iter().copied().map(Gid::from_raw).collect();
            unistd::setgroups(&groups).map_err(at(Step::Groups))?;
            let (uid, gid) = (Uid::from_raw(self.user.uid), Gid::from_raw(self.user.gid));
            unistd::setresgid(gid, gid, gid).map_err(at(Step::Group))?;
            unistd::setresuid(uid, uid, uid).map_err(at(Step::User))?;
        }
        if !self.allow_new_privileges {
            prctl::set_no_new_privs().map_err(at(Step::Privileges))?;
        }
        // Both worlds begin at their root.
        if self.working_dir != c"/" {
            unistd::chdir(self.working_dir).map_err(at(Step::WorkingDir))?;
        }
        sys::reset_signals().map_err(io_at(Step::Signals))?;
        let mut last = Errno::ENOENT;
        for program in self.programs {
            let Err(errno) = unistd::execve(program, self.argv, self.env);
            match errno {
                // As execvp(3): the next folder of PATH may have it.
                Errno::ENOENT | Errno::ENOTDIR => {}
                Errno::EACCES => last = errno,
                errno => return Err((Step::Exec, errno)),
            }
        }
        Err((Step::Exec, last))
    }
}

/// Reads one byte of step and four of errno, or nothing when exec closed the pipe.
pub(crate) fn read_report(pipe: OwnedFd) -> Option<(Step, Errno)> {
    let mut bytes = [0; 5];
    File::from(pipe).read_exact(&mut bytes).ok()?;
    let [step, errno @ ..] = bytes;
    let (step, _) = Step::ALL.into_iter().find(|(s, _)| *s as u8 == step)?;
    Some((step, Errno::from_raw(i32::from_ne_bytes(errno))))
}

/// The error number of a call of std.
pub(crate) fn errno_of(error: &io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
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
            let (read, write) = unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
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
