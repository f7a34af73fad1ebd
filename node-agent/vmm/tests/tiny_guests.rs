//! A real far-vmm, a real QEMU and vsock daemon, and guests of a few hundred bytes.

mod common;

use common::{Vm, qemu_or_skip};
use far_vmm::{
    control::{AsyncClient, State},
    exit::{Asked, ExitCause},
    lease,
    pvh::Then,
};
use std::{
    fs,
    os::unix::{fs::FileTypeExt, net::UnixStream},
};

#[test]
fn a_guest_that_prints_and_ends_leaves_a_record_and_its_console() {
    let Some(tools) = qemu_or_skip("a_guest_that_prints_and_ends_leaves_a_record_and_its_console") else {
        return;
    };
    let vm = Vm::boot(&tools, b"hello from the guest\n", Then::End);
    let record = vm.wait_ended();
    assert_eq!(
        (record.cause, record.code, record.asked),
        (ExitCause::Exited, Some(0), None),
        "{record:?}"
    );
    assert!(record.is_clean() && !record.kernel_panic);
    assert!(record.vmm_cpu_us > 0);
    assert_eq!(record.console_tail, "hello from the guest\n");
    assert_eq!(
        fs::read_to_string(vm.path("console.log")).unwrap(),
        "hello from the guest\n"
    );
    assert_eq!(vm.exit_record(), Some(record));
}

#[test]
fn a_running_vm_tells_its_processes_and_a_kill_ends_them() {
    let Some(tools) = qemu_or_skip("a_running_vm_tells_its_processes_and_a_kill_ends_them") else {
        return;
    };
    let vm = Vm::boot(&tools, b"up\n", Then::Halt);
    let status = vm.wait_console("up");
    assert_eq!((status.state, status.backend.as_str()), (State::Running, "qemu"));
    let pids = vm.children();
    assert_eq!(pids.len(), 2, "QEMU and its vsock daemon");
    assert!(fs::metadata(vm.path("v.sock")).unwrap().file_type().is_socket());
    vm.client().kill().unwrap();
    let record = vm.wait_ended();
    assert_eq!(
        (record.cause, record.signal, record.asked),
        (ExitCause::Signaled, Some(9), Some(Asked::Kill))
    );
    common::wait_gone(&pids);
}

#[test]
fn a_stop_lets_the_vmm_end_in_order() {
    let Some(tools) = qemu_or_skip("a_stop_lets_the_vmm_end_in_order") else {
        return;
    };
    let vm = Vm::boot(&tools, b"up\n", Then::Halt);
    vm.wait_console("up");
    vm.client().stop().unwrap();
    let record = vm.wait_ended();
    assert_eq!(
        (record.cause, record.code, record.asked),
        (ExitCause::Exited, Some(0), Some(Asked::Stop))
    );
}

#[test]
fn a_guest_that_writes_without_end_neither_fills_the_disk_nor_keeps_requests_waiting() {
    let Some(tools) = qemu_or_skip("a_guest_that_writes_without_end_neither_fills_the_disk_nor_keeps_requests_waiting")
    else {
        return;
    };
    let vm = Vm::boot(&tools, &[b'x'; 1000], Then::Repeat);
    common::wait_for("three times the console's bound to be written", || {
        let status = vm.client().status().map_err(|error| error.to_string())?;
        (status.console_bytes > 3 * common::CONSOLE_MAX)
            .then_some(())
            .ok_or(format!("{}", status.console_bytes))
    });
    assert!(fs::metadata(vm.path("console.log")).unwrap().len() <= common::CONSOLE_MAX);
    vm.client().kill().unwrap();
    assert_eq!(vm.wait_ended().console_tail.len(), far_vmm::exit::CONSOLE_TAIL_BYTES);
}

#[test]
fn far_vmm_killed_takes_qemu_and_the_vsock_daemon_along_and_the_vm_is_not_booted_again() {
    let Some(tools) =
        qemu_or_skip("far_vmm_killed_takes_qemu_and_the_vsock_daemon_along_and_the_vm_is_not_booted_again")
    else {
        return;
    };
    let mut vm = Vm::boot(&tools, b"up\n", Then::Halt);
    vm.wait_console("up");
    let pids = vm.children();
    vm.kill_far_vmm();
    common::wait_gone(&pids);
    assert_eq!(vm.exit_record(), None, "nobody was left to write one");
    let (code, stderr) = vm.run_again();
    assert!(code == Some(3) && stderr.contains("booted before"), "{code:?} {stderr}");
}

#[test]
fn a_finished_vm_is_never_booted_again() {
    let Some(tools) = qemu_or_skip("a_finished_vm_is_never_booted_again") else {
        return;
    };
    let mut vm = Vm::boot(&tools, b"once\n", Then::End);
    let record = vm.wait_ended();
    vm.client().release().unwrap();
    assert_eq!(vm.wait_far_vmm(), Some(0));
    fs::remove_file(vm.path("booted")).unwrap();
    let (code, stderr) = vm.run_again();
    assert!(code == Some(3) && stderr.contains("has ended"), "{code:?} {stderr}");
    assert_eq!(vm.exit_record(), Some(record), "the record is as it was");
}

#[test]
fn the_tombstone_answers_until_it_is_released_and_removes_its_sockets() {
    let Some(tools) = qemu_or_skip("the_tombstone_answers_until_it_is_released_and_removes_its_sockets") else {
        return;
    };
    let mut vm = Vm::boot(&tools, b"bye\n", Then::End);
    vm.wait_ended();
    let status = vm.client().status().unwrap();
    assert_eq!(
        (status.state, status.vmm_pid, status.vsock_pid),
        (State::Ended, None, None)
    );
    assert!(status.exit.is_some());
    assert_eq!(
        vm.client().wait(common::LIMIT).unwrap().exit,
        status.exit,
        "a wait after the end is answered at once"
    );
    vm.client().release().unwrap();
    assert_eq!(vm.wait_far_vmm(), Some(0));
    for socket in ["vmm.sock", "v.sock", "vhost.sock"] {
        assert!(!vm.path(socket).exists(), "{socket} is left");
    }
    assert!(vm.client().status().unwrap_err().is_gone());
}

#[test]
fn a_release_while_the_vm_runs_ends_it_with_a_record() {
    let Some(tools) = qemu_or_skip("a_release_while_the_vm_runs_ends_it_with_a_record") else {
        return;
    };
    let mut vm = Vm::boot(&tools, b"up\n", Then::Halt);
    vm.wait_console("up");
    let pids = vm.children();
    vm.client().release().unwrap();
    assert_eq!(vm.wait_far_vmm(), Some(128 + 9));
    common::wait_gone(&pids);
    assert_eq!(vm.exit_record().unwrap().asked, Some(Asked::Release));
}

#[test]
fn without_its_folder_far_vmm_ends_its_vm_and_goes() {
    let Some(tools) = qemu_or_skip("without_its_folder_far_vmm_ends_its_vm_and_goes") else {
        return;
    };
    for then in [Then::Halt, Then::End] {
        let mut vm = Vm::boot(&tools, b"up\n", then);
        if then == Then::End {
            vm.wait_ended();
        } else {
            vm.wait_console("up");
        }
        let pids = vm.children();
        fs::remove_dir_all(vm.path("")).unwrap();
        vm.wait_far_vmm();
        common::wait_gone(&pids);
        assert!(!vm.path("").exists(), "nothing was written where the folder was");
    }
}

#[test]
fn a_signal_to_far_vmm_ends_everything_and_is_recorded() {
    let Some(tools) = qemu_or_skip("a_signal_to_far_vmm_ends_everything_and_is_recorded") else {
        return;
    };
    for signal in ["TERM", "HUP", "INT"] {
        let mut vm = Vm::boot(&tools, b"up\n", Then::Halt);
        vm.wait_console("up");
        let pids = vm.children();
        vm.signal_far_vmm(signal);
        assert_eq!(vm.wait_far_vmm(), Some(128 + 9), "{signal}");
        common::wait_gone(&pids);
        assert_eq!(vm.exit_record().unwrap().asked, Some(Asked::Signal), "{signal}");
    }
}

#[test]
fn a_vm_whose_lease_is_not_renewed_is_ended_by_far_vmm_alone() {
    let Some(tools) = qemu_or_skip("a_vm_whose_lease_is_not_renewed_is_ended_by_far_vmm_alone") else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let lease = folder.path().join("lease");
    let renew = |until: u64| fs::write(&lease, until.to_string()).unwrap();
    renew(lease::now_ms() + 3_600_000);
    let vm = Vm::boot_with(
        &tools,
        b"up\n",
        Then::Halt,
        |_| {},
        |additions| {
            additions.lease_file = Some(lease.clone());
        },
    );
    vm.wait_console("up");
    let pids = vm.children();
    assert_eq!(vm.exit_record(), None, "it runs while the lease lasts");
    renew(lease::now_ms());
    let record = vm.wait_ended();
    assert_eq!(
        (record.signal, record.asked),
        (Some(9), Some(Asked::LeaseOver)),
        "{record:?}"
    );
    assert!(!record.is_clean());
    common::wait_gone(&pids);
}

#[test]
fn a_vsock_daemon_that_dies_is_told_as_the_vmms_crash() {
    let Some(tools) = qemu_or_skip("a_vsock_daemon_that_dies_is_told_as_the_vmms_crash") else {
        return;
    };
    let vm = Vm::boot(&tools, b"up\n", Then::Halt);
    let daemon = vm.wait_console("up").vsock_pid.unwrap();
    common::kill(daemon);
    let record = vm.wait_ended();
    assert!(!record.is_clean(), "{record:?}");
    assert_eq!(record.asked, Some(Asked::VsockLost), "{record:?}");
    assert!(
        record.message.contains("vsock daemon ended (signal 9)"),
        "{}",
        record.message
    );
}

#[test]
fn a_qemu_that_is_killed_is_told_as_a_crash() {
    let Some(tools) = qemu_or_skip("a_qemu_that_is_killed_is_told_as_a_crash") else {
        return;
    };
    let vm = Vm::boot(&tools, b"up\n", Then::Halt);
    let qemu = vm.wait_console("up").vmm_pid.unwrap();
    common::kill(qemu);
    let record = vm.wait_ended();
    assert_eq!(
        (record.cause, record.signal, record.asked),
        (ExitCause::Signaled, Some(9), None)
    );
    assert!(!record.is_clean());
}

#[test]
fn a_start_that_fails_says_which_field_and_stays_to_tell_it() {
    let Some(tools) = qemu_or_skip("a_start_that_fails_says_which_field_and_stays_to_tell_it") else {
        return;
    };
    let missing = |field: &str, value: &str| (field.to_owned(), serde_json::json!(value));
    let cases = [
        (
            missing("/boot-source/kernel_image_path", "/nonexistent/vmlinux"),
            "boot-source.kernel_image_path",
        ),
        (
            ("/machine-config/mem_size_mib".to_owned(), serde_json::json!(0)),
            "machine-config.mem_size_mib",
        ),
    ];
    for ((pointer, value), field) in cases {
        let vm = Vm::boot_changed(&tools, b"never\n", Then::End, |config| {
            *config.pointer_mut(&pointer).unwrap() = value;
        });
        let record = vm.wait_ended();
        assert_eq!(record.cause, ExitCause::StartFailed);
        assert!(record.message.contains(field), "{}", record.message);
        assert_eq!(vm.exit_record(), Some(record));
    }
}

#[test]
fn a_vms_nic_is_the_tap_in_the_guests_namespace() {
    let name = "a_vms_nic_is_the_tap_in_the_guests_namespace";
    let Some(tools) = qemu_or_skip(name) else { return };
    if let Err(lack) = far_net::capability() {
        eprintln!("SKIPPED {name}: {lack}");
        return;
    }
    let netns = far_net::GuestNetns::create().unwrap();
    // By another tool: what it says of the tap is not our own belief.
    let ip = |args: &[&str]| {
        let run = || std::process::Command::new("ip").args(args).output().unwrap();
        let out = netns.run_inside(run).unwrap();
        assert!(
            out.status.success(),
            "{args:?}: {}",
            String::from_utf8_lossy(&out.stderr)
        );
        String::from_utf8(out.stdout).unwrap()
    };
    ip(&["tuntap", "add", "dev", "fa9", "mode", "tap"]);
    ip(&["link", "set", "fa9", "up"]);
    let is_held = || ip(&["link", "show", "dev", "fa9"]).contains("LOWER_UP");
    assert!(!is_held());
    let nic = serde_json::json!([
        {"iface_id": "eth0", "host_dev_name": "fa9", "guest_mac": "06:00:00:00:00:09"}
    ]);
    let path = netns.path();
    let vm = Vm::boot_with(
        &tools,
        b"up\n",
        Then::Halt,
        |config| config["network-interfaces"] = nic,
        |additions| additions.netns = Some(path.clone()),
    );
    let status = vm.wait_console("up");
    let of = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
    assert_eq!(of(status.vmm_pid.unwrap()), fs::read_link(&path).unwrap());
    assert_eq!(
        of(status.vsock_pid.unwrap()),
        fs::read_link("/proc/self/ns/net").unwrap(),
        "it needs no network"
    );
    assert!(is_held(), "by QEMU");
    vm.client().kill().unwrap();
    vm.wait_ended();
    assert!(!is_held());
}

#[test]
fn requests_that_are_none_are_answered_and_silent_connections_do_not_keep_others_out() {
    let name = "requests_that_are_none_are_answered_and_silent_connections_do_not_keep_others_out";
    let Some(tools) = qemu_or_skip(name) else { return };
    let vm = Vm::boot(&tools, b"up\n", Then::Halt);
    vm.wait_console("up");
    let long = "x".repeat(100_000);
    for request in [
        "\n",
        "{}\n",
        "{\"op\":\"pause\"}\n",
        "{\"op\":\"kill\",\"now\":1}\n",
        &long,
    ] {
        let answer = common::ask(&vm.path("vmm.sock"), request);
        assert!(
            answer.is_empty() || answer.contains("\"error\""),
            "{request:?}: {answer}"
        );
    }
    let silent: Vec<_> = (0..100)
        .map(|_| UnixStream::connect(vm.path("vmm.sock")).unwrap())
        .collect();
    assert_eq!(vm.client().status().unwrap().state, State::Running);
    drop(silent);
    vm.client().kill().unwrap();
    vm.wait_ended();
}

#[test]
fn the_asynchronous_client_hears_of_the_end_and_of_a_far_vmm_that_is_gone() {
    let name = "the_asynchronous_client_hears_of_the_end_and_of_a_far_vmm_that_is_gone";
    let Some(tools) = qemu_or_skip(name) else { return };
    let mut vm = Vm::boot(&tools, b"up\n", Then::Halt);
    vm.wait_console("up");
    let client = AsyncClient::new(vm.path("vmm.sock"));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let (waited, killed) = tokio::join!(client.wait(), client.kill());
        killed.unwrap();
        assert_eq!(waited.unwrap().exit.unwrap().asked, Some(Asked::Kill));
    });
    vm.kill_far_vmm();
    let gone = runtime.block_on(client.wait()).unwrap_err();
    assert!(gone.is_gone(), "{gone}");
}

#[test]
fn without_a_tombstone_far_vmm_ends_with_the_vmms_code() {
    let Some(tools) = qemu_or_skip("without_a_tombstone_far_vmm_ends_with_the_vmms_code") else {
        return;
    };
    let only = |additions: &mut far_vmm::Additions| additions.tombstone = Some(false);
    let mut vm = Vm::boot_with(&tools, b"bye\n", Then::End, |_| {}, only);
    assert_eq!(vm.wait_far_vmm(), Some(0));
    let no_memory =
        |config: &mut serde_json::Value| config["machine-config"]["mem_size_mib"] = 4_000_000_000_u32.into();
    let mut vm = Vm::boot_with(&tools, b"never\n", Then::End, no_memory, only);
    assert_eq!(vm.wait_far_vmm(), Some(1), "QEMU's own code");
    let record = vm.exit_record().unwrap();
    assert!(!record.is_clean() && record.message.contains("mem"), "{record:?}");
}

#[test]
fn a_second_far_vmm_on_the_same_folder_is_refused_and_harms_nothing() {
    let Some(tools) = qemu_or_skip("a_second_far_vmm_on_the_same_folder_is_refused_and_harms_nothing") else {
        return;
    };
    let mut vm = Vm::boot(&tools, b"up\n", Then::Halt);
    vm.wait_console("up");
    let (code, stderr) = vm.second_far_vmm();
    assert!(
        code == Some(3) && stderr.contains("another far-vmm"),
        "{code:?} {stderr}"
    );
    assert_eq!(vm.client().status().unwrap().state, State::Running);
    vm.client().release().unwrap();
    vm.wait_far_vmm();
}
