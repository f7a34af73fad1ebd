//! The VMM's end of a tap, for benches that send as a guest would.

#![allow(
    unsafe_code,
    reason = "one ioctl that no crate of the tree offers; its block proves the call"
)]

use std::{
    fs::{File, OpenOptions},
    io::Write,
    os::fd::AsRawFd,
};

use anyhow::Result;
use far_net::{GuestNetns, Place};

nix::ioctl_write_ptr_bad!(set_interface, 0x4004_54ca, [u8; 40]);

/// IFF_TAP | IFF_NO_PI | IFF_VNET_HDR (linux/if_tun.h).
const FLAGS: u16 = 0x0002 | 0x1000 | 0x4000;

pub(crate) struct Tap {
    file: File,
    mac: [u8; 6],
}

impl Tap {
    pub(crate) fn attach(netns: &GuestNetns, name: &str) -> Result<Self> {
        netns.run_inside(|| {
            let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
            // `struct ifreq`: 16 bytes of name, then a union that begins with the flags.
            let mut request = [0_u8; 40];
            request[..name.len()].copy_from_slice(name.as_bytes());
            request[16..18].copy_from_slice(&FLAGS.to_ne_bytes());
            // SAFETY: TUNSETIFF reads and writes one `struct ifreq`, which has 40 bytes; the array lives through the call.
            unsafe { set_interface(file.as_raw_fd(), &raw const request) }?;
            // A new mount of sysfs would be needed to read it by name; the tap takes broadcasts too, but they are not forwarded.
            let output = std::process::Command::new("ip")
                .args(["-o", "link", "show", "dev", name])
                .output()?;
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            let word = text
                .split_whitespace()
                .skip_while(|word| *word != "link/ether")
                .nth(1)
                .unwrap_or("");
            let mut mac = [0; 6];
            for (to, from) in mac.iter_mut().zip(word.split(':')) {
                *to = u8::from_str_radix(from, 16)?;
            }
            Ok(Self { file, mac })
        })?
    }

    /// A frame as the guest at this place sends it, without a UDP checksum.
    pub(crate) fn udp_frame(&self, place: &Place, to: [u8; 4], port: u16) -> Vec<u8> {
        let mut header = vec![0x45, 0, 0, 60, 0, 1, 0, 0, 64, 17, 0, 0];
        header.extend(place.guest.address.octets());
        header.extend(to);
        let mut sum: u32 = header
            .chunks(2)
            .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
            .sum();
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        header[10..12].copy_from_slice(&(!(sum as u16)).to_be_bytes());
        let mut frame = vec![0; 10];
        frame.extend(self.mac);
        frame.extend(place.guest.mac);
        frame.extend([8, 0]);
        frame.extend(header);
        frame.extend(4000_u16.to_be_bytes());
        frame.extend(port.to_be_bytes());
        frame.extend([0, 40, 0, 0]);
        frame.extend([0; 32]);
        frame
    }

    pub(crate) fn send(&self, frame: &[u8]) -> Result<()> {
        (&self.file).write_all(frame)?;
        Ok(())
    }
}
