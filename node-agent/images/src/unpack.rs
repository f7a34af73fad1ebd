//! The tar stream of a layer: decompressed as it is read, bounded, and hashed on the way.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read},
};

use flate2::bufread::MultiGzDecoder;
use ruzstd::decoding::{
    BlockDecodingStrategy, FrameDecoder,
    errors::{FrameDecoderError, ReadFrameHeaderError},
};

use crate::digest::{Digest, HashingWriter};

/// First bytes of gzip (RFC 1952, 2.3.1).
const GZIP: [u8; 2] = [0x1f, 0x8b];
/// First bytes of a zstd frame (RFC 8878, 3.1.1), and of a skippable one without its lowest four bits (3.1.2).
const ZSTD: [u8; 4] = 0xFD2F_B528_u32.to_le_bytes();
const ZSTD_SKIPPABLE: u32 = 0x184D_2A50;

/// How a layer is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Packing {
    Plain,
    Gzip,
    Zstd,
}

impl Packing {
    /// By the first bytes: registries and tools have disagreed about media types.
    pub(crate) fn of(head: &[u8]) -> Self {
        let word = head.first_chunk().map(|head| u32::from_le_bytes(*head));
        if head.starts_with(&GZIP) {
            Self::Gzip
        } else if head.starts_with(&ZSTD) || word.is_some_and(|word| word & !0xf == ZSTD_SKIPPABLE) {
            Self::Zstd
        } else {
            Self::Plain
        }
    }
}

/// A layer's tar stream.
pub(crate) struct Unpacked {
    inner: Box<dyn Read>,
    hash: HashingWriter<io::Sink>,
    read: u64,
    limit: u64,
}

impl Unpacked {
    /// At most `limit` bytes can be read; one more is an error and makes [`Unpacked::is_over`] true.
    pub(crate) fn new(packed: BufReader<File>, packing: Packing, limit: u64) -> Self {
        let inner: Box<dyn Read> = match packing {
            Packing::Plain => Box::new(packed),
            Packing::Gzip => Box::new(MultiGzDecoder::new(packed)),
            Packing::Zstd => Box::new(Zstd::new(packed)),
        };
        Self {
            inner,
            hash: HashingWriter::new(io::sink()),
            read: 0,
            limit,
        }
    }

    /// Whether the stream is longer than its limit.
    pub(crate) fn is_over(&self) -> bool {
        self.read > self.limit
    }

    /// How many bytes were read, and their digest.
    pub(crate) fn finish(self) -> (u64, Digest) {
        (self.read, self.hash.finish().1)
    }
}

impl Read for Unpacked {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.is_over() {
            return Err(io::Error::other("it is over its limit"));
        }
        // One byte more than the limit, so that "just full" and "over" differ.
        let most = usize::try_from((self.limit - self.read).saturating_add(1)).unwrap_or(usize::MAX);
        let end = most.min(buffer.len());
        let got = self.inner.read(&mut buffer[..end])?;
        io::Write::write_all(&mut self.hash, &buffer[..got])?;
        self.read += got as u64;
        Ok(got)
    }
}

/// zstd of any number of frames: builders write several, and put their indexes into skippable ones.
struct Zstd<R> {
    source: R,
    decoder: FrameDecoder,
    /// Whether `decoder` is in a frame whose header was read.
    is_inside: bool,
}

impl<R: BufRead> Zstd<R> {
    fn new(source: R) -> Self {
        Self {
            source,
            decoder: FrameDecoder::new(),
            is_inside: false,
        }
    }

    /// Goes into the next frame, past skippable ones. False at the end of the stream.
    fn enter_frame(&mut self) -> io::Result<bool> {
        loop {
            if self.source.fill_buf()?.is_empty() {
                return Ok(false);
            }
            match self.decoder.reset(&mut self.source) {
                Ok(()) => return Ok(true),
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame { length, .. })) => {
                    let skipped = io::copy(&mut (&mut self.source).take(length.into()), &mut io::sink())?;
                    if skipped < u64::from(length) {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
                Err(error) => return Err(io::Error::other(error)),
            }
        }
    }
}

impl<R: BufRead> Read for Zstd<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            if !self.is_inside {
                self.is_inside = self.enter_frame()?;
                if !self.is_inside {
                    return Ok(0);
                }
            }
            while self.decoder.can_collect() == 0 && !self.decoder.is_finished() {
                self.decoder
                    .decode_blocks(&mut self.source, BlockDecodingStrategy::UptoBlocks(1))
                    .map_err(io::Error::other)?;
            }
            match self.decoder.read(buffer)? {
                0 => self.is_inside = false,
                got => return Ok(got),
            }
        }
    }
}
