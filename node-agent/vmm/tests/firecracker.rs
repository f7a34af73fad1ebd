//! The real Firecracker on real KVM, where both exist.

mod common;

use common::Vm;
use far_vmm::{
    additions::Backend,
    exit::ExitCause,
    probe::{self, ProbeOptions, Tools},
    pvh::Then,
};

#[test]
fn firecracker_runs_the_same_description() {
    let found = probe::run(&ProbeOptions::default());
    for finding in [&found.firecracker, &found.kvm] {
        if !finding.ok {
            eprintln!("SKIPPED firecracker_runs_the_same_description: {}", finding.reason);
            return;
        }
    }
    let tools = Tools {
        firecracker: found.firecracker.path.clone(),
        ..Tools::default()
    };
    let vm = Vm::boot_with(
        &tools,
        b"hello\n",
        Then::End,
        |_| {},
        |additions| {
            additions.backend = Backend::Firecracker;
            additions.firecracker = tools.firecracker.clone();
        },
    );
    let record = vm.wait_ended();
    assert_eq!((record.cause, record.code), (ExitCause::Exited, Some(0)), "{record:?}");
    assert!(record.console_tail.contains("hello"), "{record:?}");
}
