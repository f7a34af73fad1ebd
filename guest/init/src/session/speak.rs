//! What the guest says: Hello on every connection, then everything that this connection was not told yet.

use super::{Beat, Said, Session, State};
use crate::{
    boot,
    cgroup::{self, Cgroup},
    control::outbox::Channel,
    sys,
};
use far_proto::{
    frame::GENERATION,
    guest::{GuestMessage, Heartbeat, Hello, Stage, guest_message::Kind as Say},
};
use std::time::Instant;

impl Session<'_> {
    pub(super) fn greet(&mut self) {
        self.boot.done("connect");
        self.said = Said::default();
        let stage = match &self.state {
            State::Waiting { .. } => Stage::WaitingForConfig,
            State::Running(_) => Stage::Running,
            State::Exited(_) => Stage::Exited,
        };
        self.link.queue(&message(Say::Hello(Hello {
            lowest_generation: GENERATION,
            highest_generation: GENERATION,
            boot_nonce: self.nonce.clone(),
            init_version: env!("CARGO_PKG_VERSION").into(),
            stage: stage.into(),
            boot_ns: boot::boot_ns(),
        })));
    }

    /// Queues what this connection was not told yet, as far as there is room, and tells whether that was anything.
    pub(super) fn speak(&mut self, now: Instant) -> bool {
        if !self.said.welcomed {
            return false;
        }
        let mut spoke = false;
        if let Some(ready) = self.ready.as_ref().filter(|_| !self.said.ready) {
            self.link.queue(&message(Say::Ready(ready.clone())));
            self.said.ready = true;
            spoke = true;
        }
        if let Some(beat) = self
            .said
            .heartbeat
            .filter(|beat| beat.next <= now && self.link.has_room())
        {
            let heartbeat = self.heartbeat();
            // What a burst of output took is not held for ever.
            sys::trim_memory();
            self.link.queue(&message(Say::Heartbeat(heartbeat)));
            self.link.asked(now);
            self.said.heartbeat = Some(Beat {
                next: now + beat.every,
                ..beat
            });
        }
        let mut silent = 0;
        for channel in Channel::BOTH.into_iter().cycle() {
            if silent == Channel::BOTH.len() || !self.link.has_room() {
                break;
            }
            if let Some(log) = self.outbox.next(channel) {
                self.link.queue_log(&log);
                silent = 0;
                spoke = true;
            } else {
                silent += 1;
            }
        }
        if let State::Exited(exit) = &self.state
            && !self.said.exit
            && self.outbox.all_sent()
            && self.link.has_room()
        {
            self.link.queue(&message(Say::Exit((**exit).clone())));
            self.said.exit = true;
            spoke = true;
        }
        spoke
    }

    fn heartbeat(&mut self) -> Heartbeat {
        self.heartbeats += 1;
        let (mem_total_kib, mem_available_kib) = cgroup::memory_kib();
        let cgroup = self.cgroup.as_ref();
        let (cpu_usage_us, processes) = cgroup.map(Cgroup::usage).unwrap_or_default();
        let pressure = |resource| cgroup.and_then(|cgroup| cgroup.pressure(resource));
        Heartbeat {
            seq: self.heartbeats,
            boot_ns: boot::boot_ns(),
            mem_total_kib,
            mem_available_kib,
            cpu_usage_us,
            processes,
            cpu_pressure: pressure("cpu"),
            memory_pressure: pressure("memory"),
            io_pressure: pressure("io"),
            payload_memory_kib: cgroup.map(Cgroup::memory_kib).unwrap_or_default(),
            wall_unix_ns: boot::wall_ns(),
            channels: self.channels.count(),
        }
    }
}

fn message(kind: Say) -> GuestMessage {
    GuestMessage { kind: Some(kind) }
}
