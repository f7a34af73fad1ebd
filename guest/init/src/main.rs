//! The program's entry; everything else is in the library, where the fuzzer reaches it.
#![cfg_attr(not(test), no_main)]
// Only for the name of the entry.
#![allow(unsafe_code)]

/// Called by the C library's start code, instead of the Rust runtime's start (see the library's header).
// A test harness, which `--all-targets` builds around it, has its own.
#[cfg(not(test))]
#[unsafe(export_name = "main")]
extern "C" fn entry(_count: libc::c_int, _arguments: *const *const libc::c_char) -> libc::c_int {
    libc::c_int::from(far_init::start())
}
