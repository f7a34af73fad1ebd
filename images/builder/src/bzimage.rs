//! From a distribution's bzImage to the ELF that QEMU's microvm machine and Firecracker boot at once.
//!
//! Layout: the kernel's Documentation/arch/x86/boot.rst. `setup_sects` at 0x1f1 (0 means 4) gives where the
//! protected-mode part starts; `payload_offset` at 0x248 and `payload_length` at 0x24c (protocol 2.08) say where in it the packed ELF lies.

use crate::unpack::unpack;

const ELF: &[u8] = b"\x7fELF";

/// The ELF inside `image`, or `image` itself when it is one.
///
/// # Errors
/// A sentence naming what is not as boot.rst says.
pub(crate) fn elf(image: &[u8]) -> Result<Vec<u8>, String> {
    if image.starts_with(ELF) {
        return Ok(image.to_vec());
    }
    if image.get(0x202..0x206) != Some(b"HdrS".as_slice()) {
        return Err("it is neither an ELF nor a Linux bzImage".into());
    }
    let word = |at: usize| {
        image
            .get(at..at + 4)
            .and_then(|bytes| bytes.try_into().ok())
            .map(|bytes| u32::from_le_bytes(bytes) as usize)
    };
    let sectors = match image[0x1f1] {
        0 => 4,
        n => usize::from(n),
    };
    let (offset, length) = word(0x248).zip(word(0x24c)).ok_or("it ends inside its header")?;
    let start = (sectors + 1) * 512 + offset;
    let payload = image
        .get(start..start.saturating_add(length))
        .ok_or("its payload lies outside the file")?;
    let kernel = unpack(payload)?;
    if kernel.starts_with(ELF) {
        Ok(kernel)
    } else {
        Err("its payload is not a packing that is known here (gzip, xz, zstd, LZ4)".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bzimage(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 1024];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248..0x24c].copy_from_slice(&16_u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&u32::try_from(payload.len()).unwrap().to_le_bytes());
        image.extend_from_slice(&[0; 16]);
        image.extend_from_slice(payload);
        image
    }

    #[test]
    fn the_payload_is_found_by_the_header() {
        assert_eq!(elf(&bzimage(b"\x7fELF and more")).unwrap(), b"\x7fELF and more");
        assert_eq!(elf(b"\x7fELF plain").unwrap(), b"\x7fELF plain");
    }

    #[test]
    fn what_is_no_kernel_is_told_apart() {
        assert!(elf(b"").unwrap_err().contains("neither"));
        assert!(elf(&[0; 4096]).unwrap_err().contains("neither"));
        assert!(elf(&bzimage(b"something")).unwrap_err().contains("packing"));
        let mut outside = bzimage(b"\x7fELF");
        outside[0x24c..0x250].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(elf(&outside).unwrap_err().contains("outside"));
    }
}
