//! New inputs from old ones: the usual small damages, and pieces of one input in another.

/// Numbers that parsers like to get wrong, as bytes in both orders.
const ODD: [u32; 10] = [
    0,
    1,
    0x7f,
    0x80,
    0xff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x0010_0000,
    0x0010_0001,
];

/// A random number generator (xorshift64*) and what is made of it.
pub(crate) struct Mutator(u64);

impl Mutator {
    /// `seed` must not be 0.
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn number(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// 0 to `limit` - 1; 0 when `limit` is 0.
    fn below(&mut self, limit: usize) -> usize {
        (self.number() >> 11) as usize % limit.max(1)
    }

    /// A mutation of a member of `pool`, at most `limit` bytes.
    pub(crate) fn next(&mut self, pool: &[Vec<u8>], limit: usize) -> Vec<u8> {
        let mut input = pool.get(self.below(pool.len())).cloned().unwrap_or_default();
        for _ in 0..=self.below(5) {
            self.damage(&mut input, pool);
        }
        input.truncate(limit);
        input
    }

    fn damage(&mut self, input: &mut Vec<u8>, pool: &[Vec<u8>]) {
        let at = self.below(input.len() + 1);
        let there = at < input.len();
        match self.below(9) {
            0 if there => input[at] ^= 1 << self.below(8),
            1 if there => input[at] = self.number() as u8,
            2 => input.insert(at, self.number() as u8),
            3 if there => {
                let end = (at + 1 + self.below(16)).min(input.len());
                input.drain(at..end);
            }
            4 => input.truncate(at),
            5 => {
                let number = ODD[self.below(ODD.len())];
                let bytes = if self.below(2) == 0 {
                    number.to_be_bytes()
                } else {
                    number.to_le_bytes()
                };
                for (place, byte) in input.iter_mut().skip(at).zip(bytes) {
                    *place = byte;
                }
            }
            6 => {
                let end = (at + self.below(64)).min(input.len());
                let copy = input[at..end].to_vec();
                let place = self.below(input.len() + 1);
                input.splice(place..place, copy);
            }
            7 if there => input[at] = input[at].wrapping_add(1),
            _ => {
                let other = &pool[self.below(pool.len())];
                let from = self.below(other.len() + 1);
                let to = (from + self.below(256)).min(other.len());
                input.splice(at..at, other[from..to].iter().copied());
            }
        }
    }
}
