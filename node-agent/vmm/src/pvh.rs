//! A guest of a few hundred bytes: prints a text on the serial port and ends, waits or repeats.
//!
//! It is the KVM probe, and the guest of most tests. One ELF file for QEMU (microvm, q35) and Firecracker, made here
//! byte by byte, so that no assembler is needed. Entry by PVH (Xen's `docs/misc/pvh.pandoc`: 32-bit protected mode, flat
//! segments, no paging), announced by the note XEN_ELFNOTE_PHYS32_ENTRY.

/// What the guest does after its text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Then {
    /// Resets the machine: i8042 reset (ends Firecracker), then a triple fault (ends QEMU with `-no-reboot`).
    End,
    /// Halts for ever with interrupts off.
    Halt,
    /// Prints the text again, for ever.
    Repeat,
}

/// Physical address of the one loaded segment: 1 MiB, above what firmware uses.
const LOAD_ADDRESS: u32 = 0x10_0000;
const ELF_HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
/// The segment starts here in the file.
const SEGMENT_OFFSET: usize = ELF_HEADER + 2 * PROGRAM_HEADER;
/// name size, descriptor size, type, "Xen\0", descriptor (8 bytes, as a 64-bit Linux kernel has it).
const NOTE: usize = 12 + 4 + 8;
/// Type of the note that holds the 32-bit entry (Xen, public/elfnote.h).
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
/// First serial port.
const COM1: u16 = 0x3f8;

/// The ELF file of a guest that prints `text` and then does `then`.
#[must_use]
pub fn tiny_guest(text: &[u8], then: Then) -> Vec<u8> {
    let entry = LOAD_ADDRESS + NOTE as u32;
    let code_length = code(0, text.len(), 0, then).len();
    let descriptor_table = entry + code_length as u32;
    let text_address = descriptor_table + 8;
    let mut segment = note(entry);
    segment.extend(code(text_address, text.len(), descriptor_table, then));
    segment.extend([0; 8]);
    segment.extend(text);
    let mut file = elf_header(entry);
    file.extend(program_header(1, 7, segment.len() as u64));
    file.extend(program_header(4, 4, NOTE as u64));
    file.extend(segment);
    file
}

fn note(entry: u32) -> Vec<u8> {
    let mut note = Vec::with_capacity(NOTE);
    for word in [4_u32, 8, XEN_ELFNOTE_PHYS32_ENTRY] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend(u64::from(entry).to_le_bytes());
    note
}

fn code(text_address: u32, text_length: usize, descriptor_table: u32, then: Then) -> Vec<u8> {
    let mut code = vec![0xfa, 0xfc]; // cli; cld
    code.push(0xbe); // mov $text, %esi
    code.extend(text_address.to_le_bytes());
    code.push(0xba); // mov $COM1, %edx
    code.extend(u32::from(COM1).to_le_bytes());
    code.push(0xb9); // mov $length, %ecx
    code.extend((text_length as u32).to_le_bytes());
    code.extend([0xac, 0xee, 0xe2, 0xfc]); // 1: lodsb; outb %al, (%dx); loop 1b
    match then {
        Then::Repeat => {
            let back = -(code.len() as i8); // to the first mov, at 2; counted from the end of this jump of 2 bytes
            code.extend([0xeb, back.to_le_bytes()[0]]);
        }
        Then::End => {
            code.extend([0xb0, 0xfe, 0xe6, 0x64]); // mov $0xfe, %al; outb %al, $0x64
            code.extend([0x0f, 0x01, 0x1d]); // lidt: an empty table
            code.extend(descriptor_table.to_le_bytes());
            code.push(0xcc); // int3
        }
        Then::Halt => {}
    }
    code.extend([0xf4, 0xeb, 0xfd]); // 1: hlt; jmp 1b
    code
}

fn elf_header(entry: u32) -> Vec<u8> {
    let mut header = Vec::with_capacity(ELF_HEADER);
    header.extend([0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]); // 64 bit, little endian
    header.extend(2_u16.to_le_bytes()); // executable
    header.extend(62_u16.to_le_bytes()); // x86-64
    header.extend(1_u32.to_le_bytes());
    header.extend(u64::from(entry).to_le_bytes());
    header.extend((ELF_HEADER as u64).to_le_bytes()); // program headers
    header.extend(0_u64.to_le_bytes()); // no sections
    header.extend(0_u32.to_le_bytes());
    for half in [ELF_HEADER, PROGRAM_HEADER, 2, 64, 0, 0] {
        header.extend((half as u16).to_le_bytes());
    }
    header
}

fn program_header(kind: u32, flags: u32, size: u64) -> Vec<u8> {
    let mut header = Vec::with_capacity(PROGRAM_HEADER);
    header.extend(kind.to_le_bytes());
    header.extend(flags.to_le_bytes());
    header.extend((SEGMENT_OFFSET as u64).to_le_bytes());
    header.extend(u64::from(LOAD_ADDRESS).to_le_bytes());
    header.extend(u64::from(LOAD_ADDRESS).to_le_bytes());
    header.extend(size.to_le_bytes());
    header.extend(size.to_le_bytes());
    header.extend(4_u64.to_le_bytes());
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_headers_have_their_sizes_and_the_note_points_at_the_code() {
        let file = tiny_guest(b"hello", Then::End);
        assert_eq!(elf_header(0).len(), ELF_HEADER);
        assert_eq!(program_header(1, 7, 0).len(), PROGRAM_HEADER);
        let entry = u64::from_le_bytes(file[24..32].try_into().unwrap());
        let offset = SEGMENT_OFFSET + (entry - u64::from(LOAD_ADDRESS)) as usize;
        assert_eq!(&file[offset..offset + 2], [0xfa, 0xfc]);
        assert_eq!(file[SEGMENT_OFFSET + 16..SEGMENT_OFFSET + 24], entry.to_le_bytes());
        assert!(file.ends_with(b"hello"));
    }
}
