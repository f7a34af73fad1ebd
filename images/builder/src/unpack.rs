//! Decompression by the first bytes: distributions pack kernels and modules in different ways and change their minds.

use std::io::Read;

/// Bytes a kernel or module may have unpacked: no kernel comes near it, and a wrong file must not fill the memory.
const LIMIT: u64 = 512 << 20;

/// The content of `packed`: gzip, xz, zstd and LZ4's legacy frames are unpacked, anything else is returned as it is.
///
/// # Errors
/// A sentence when the stream is broken or over the limit.
pub(crate) fn unpack(packed: &[u8]) -> Result<Vec<u8>, String> {
    match packed {
        [0x1f, 0x8b, ..] => bounded(flate2::read::GzDecoder::new(packed)),
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => bounded(lzma_rust2::XzReader::new(packed, false)),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            bounded(ruzstd::decoding::StreamingDecoder::new(packed).map_err(|error| error.to_string())?)
        }
        [0x02, 0x21, 0x4c, 0x18, ..] => lz4_legacy(packed),
        _ => Ok(packed.to_vec()),
    }
}

fn bounded(reader: impl Read) -> Result<Vec<u8>, String> {
    let mut out = Vec::new();
    reader
        .take(LIMIT + 1)
        .read_to_end(&mut out)
        .map_err(|error| error.to_string())?;
    if out.len() as u64 > LIMIT {
        Err(format!("it is over {LIMIT} bytes unpacked"))
    } else {
        Ok(out)
    }
}

/// LZ4's legacy frame, as `lz4 -l` makes it for kernels: a magic number, then blocks of u32 length and data, each at
/// most 8 MiB unpacked (lz4 frame format, "Legacy frame"). The kernel's build appends the unpacked size, which is not a block.
fn lz4_legacy(packed: &[u8]) -> Result<Vec<u8>, String> {
    const BLOCK: usize = 8 << 20;
    let mut out = Vec::new();
    let mut rest = &packed[4..];
    while let Some((head, after)) = rest.split_first_chunk::<4>() {
        let length = u32::from_le_bytes(*head) as usize;
        let Some(block) = after.get(..length).filter(|_| length > 0) else {
            break;
        };
        let plain = lz4_flex::block::decompress(block, BLOCK).map_err(|error| format!("LZ4 block: {error}"))?;
        out.extend_from_slice(&plain);
        if out.len() as u64 > LIMIT {
            return Err(format!("it is over {LIMIT} bytes unpacked"));
        }
        rest = &after[length..];
        if plain.len() < BLOCK {
            break;
        }
    }
    if out.is_empty() {
        Err("its LZ4 stream has no block".into())
    } else {
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn every_packing_gives_the_same_bytes() {
        let plain: Vec<u8> = (0..100_000_u32).flat_map(|n| (n % 251).to_le_bytes()).collect();
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&plain).unwrap();
        let mut lz4 = vec![0x02, 0x21, 0x4c, 0x18];
        let block = lz4_flex::block::compress(&plain);
        lz4.extend_from_slice(&u32::try_from(block.len()).unwrap().to_le_bytes());
        lz4.extend_from_slice(&block);
        lz4.extend_from_slice(&u32::try_from(plain.len()).unwrap().to_le_bytes());
        for packed in [gzip.finish().unwrap(), lz4, plain.clone()] {
            assert_eq!(unpack(&packed).unwrap(), plain);
        }
    }

    #[test]
    fn a_cut_stream_is_an_error_or_shorter_and_never_a_panic() {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&[7; 5000]).unwrap();
        let packed = gzip.finish().unwrap();
        for cut in 0..packed.len() {
            let _ = unpack(&packed[..cut]);
        }
        assert!(unpack(&packed[..packed.len() / 2]).is_err());
        assert!(unpack(&[0x02, 0x21, 0x4c, 0x18]).is_err());
    }
}
