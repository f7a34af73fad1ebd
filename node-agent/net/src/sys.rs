//! The ioctls of taps and interfaces (netdevice(7), Documentation/networking/tuntap.rst): the only module with `unsafe`.
//!
//! Each function acts on the network namespace of the calling thread.

#![allow(
    unsafe_code,
    reason = "each block proves its call; the rest of the crate denies unsafe code"
)]

use crate::slot::TapName;
use std::{
    fs::{File, OpenOptions},
    io, mem,
    os::fd::{AsRawFd, RawFd},
};

/// `_IOW('T', 202, int)`.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
/// `_IOW('T', 203, int)`.
const TUNSETPERSIST: libc::c_ulong = 0x4004_54cb;

/// Attaches to a tap, and makes it if there is none. It goes with the file unless it is kept.
pub(crate) fn attach_tap(tap: &TapName) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    let mut request = request_for(tap);
    // IFF_VNET_HDR: both QEMU and Firecracker pass whole virtio headers through.
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    interface_ioctl(file.as_raw_fd(), TUNSETIFF, &mut request)?;
    Ok(file)
}

/// Keeps a tap without an open file, or no longer.
pub(crate) fn keep_tap(tap: &File, keep: bool) -> io::Result<()> {
    // SAFETY: the descriptor is open for the call's length; TUNSETPERSIST takes an integer by value and no pointer.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETPERSIST, libc::c_ulong::from(keep)) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn interface_ioctl(fd: RawFd, operation: libc::c_ulong, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: the operation passed in here (TUNSETIFF) reads and writes one `struct ifreq` and nothing
    // behind it; the reference is to a whole, initialised one that nobody else uses during the call.
    let result = unsafe { libc::ioctl(fd, operation as _, std::ptr::from_mut(request)) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn request_for(tap: &TapName) -> libc::ifreq {
    // SAFETY: `ifreq` is a name of bytes and a union of plain C data, for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    // A TapName has at most 15 bytes, so at least one of the 16 stays NUL.
    for (to, from) in request.ifr_name.iter_mut().zip(tap.as_str().bytes()) {
        *to = from as libc::c_char;
    }
    request
}
