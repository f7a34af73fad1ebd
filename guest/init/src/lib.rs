//! PID 1 of the guest: brings the machine up, asks the blade what to run, runs it, and reports how it ended.
//!
//! ```text
//! claim the place -> mounts -> modules -> root file system -> session (connect, config, payload, exit, ack) -> reboot
//! ```
//!
//! `main` is C's, not Rust's: the runtime's start asks for the stack's bounds, which links scanf, locales and dlopen of
//! the static libc (200 KB) and costs a dozen system calls, all for a message about stack overflow that PID 1 cannot use.
//!
//! Single-threaded: one `poll` serves the control stream, the payload's pipes and the death of children. Nothing outside
//! may panic it, because the kernel panics when PID 1 ends; see [`power`] for the last word.

// `sys` alone may use it.
#![deny(unsafe_code)]

mod boot;
mod cgroup;
mod channels;
mod control;
mod files;
mod flintlock;
mod logs;
mod machine;
mod modules;
mod mounts;
mod network;
mod payload;
mod place;
mod plan;
mod power;
mod reap;
mod room;
mod rootfs;
mod session;
mod spawn;
mod sys;
mod users;

use boot::BootReport;
use place::Place;

/// The whole life of the guest. Gives the exit code; in a guest the VM ends before.
#[must_use]
pub fn start() -> u8 {
    let has_console = sys::stand_on_own_feet();
    sys::keep_memory();
    let place = match Place::claim(std::env::args_os().skip(1)) {
        Ok(place) => place,
        Err(refusal) => {
            eprintln!("far-init: {refusal}");
            return 2;
        }
    };
    power::install_last_word(place.is_guest());
    let end = run(&place, has_console);
    power::leave(&place, end)
}

fn run(place: &Place, has_console: bool) -> Result<(), power::Fatal> {
    let mut boot = BootReport::new();
    boot.done("init");
    mounts::mount_base(place, &mut boot)?;
    if !has_console {
        power::open_console(place);
    }
    boot.done("mounts");
    modules::load_listed(place, &mut boot);
    boot.done("modules");
    let root = rootfs::assemble(place, &mut boot);
    let cgroup = cgroup::Cgroup::create(place, &mut boot);
    network::raise_loopback(place, &mut boot);
    boot.done("rootfs");
    session::Session::new(place, boot, root, cgroup)?.run()
}

/// What reads bytes of others, for the fuzzer: none of it may panic, hang or take memory without bound.
#[doc(hidden)]
pub mod hostile {
    use far_proto::guest::Config;

    /// The run configuration of the blade, and its files.
    pub fn config(config: Config) {
        if let Ok(plan) = crate::plan::Plan::from_config(config) {
            let _ = plan.env("/");
        }
    }

    /// The image's user tables.
    pub fn users(text: &str, passwd: &[u8], group: &[u8]) {
        let _ = crate::users::resolve(text, passwd, group);
    }

    /// A request of Flintlock's tools.
    pub fn flintlock(request: &[u8]) {
        crate::flintlock::try_request(request);
    }
}
