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
    net::Ipv4Addr,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
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

/// Gives an interface its address and network.
pub(crate) fn set_address(tap: &TapName, address: Ipv4Addr, netmask: Ipv4Addr) -> io::Result<()> {
    let socket = control_socket()?;
    for (operation, value) in [(libc::SIOCSIFADDR, address), (libc::SIOCSIFNETMASK, netmask)] {
        let mut request = request_for(tap);
        request.ifr_ifru.ifru_addr = socket_address(value);
        interface_ioctl(socket.as_raw_fd(), operation, &mut request)?;
    }
    Ok(())
}

/// Brings an interface up.
pub(crate) fn set_up(tap: &TapName) -> io::Result<()> {
    let socket = control_socket()?;
    let mut request = request_for(tap);
    interface_ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &mut request)?;
    // SAFETY: SIOCGIFFLAGS has filled in the flags' member of the union; every bit pattern of it is a number.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    request.ifr_ifru.ifru_flags = flags | libc::IFF_UP as libc::c_short;
    interface_ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &mut request)
}

fn control_socket() -> io::Result<OwnedFd> {
    // SAFETY: socket(2) takes three integers.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call above has just returned this descriptor, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn interface_ioctl(fd: RawFd, operation: libc::c_ulong, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: every operation passed in here (TUNSETIFF, SIOC[GS]IF*) reads and writes one `struct ifreq` and nothing
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

/// A `sockaddr_in` in the bytes of a `sockaddr`: family in host order, port 0, address in network order.
fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    let mut data = [0; 14];
    for (to, from) in data[2..6].iter_mut().zip(address.octets()) {
        *to = from as libc::c_char;
    }
    libc::sockaddr {
        sa_family: libc::AF_INET as libc::sa_family_t,
        sa_data: data,
    }
}
