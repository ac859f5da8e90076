//! Codes of 4, 3 or 2 bits in 32-bit words: each row is a stream of bits, the first code in the lowest bits of the first
//! word, each with half its range added; the row is padded with zero bits to a whole word. This is `pack-quantized` of
//! compressed-tensors (whose older versions left two bits of a word of 3-bit codes unused).

use rayon::prelude::*;

/// Rows that one task packs or unpacks.
const ROWS: usize = 64;

/// Words that hold a row of `cols` codes.
pub fn words_in_row(cols: usize, bits: u8) -> usize {
    (cols * usize::from(bits)).div_ceil(32)
}

/// Packs `codes` `[rows, cols]` of `bits` into words `[rows, words_in_row]`.
pub fn pack(codes: &[i8], cols: usize, bits: u8) -> Vec<u32> {
    let (half, width) = (1_i8 << (bits - 1), words_in_row(cols, bits));
    let mut words = vec![0; codes.len() / cols * width];
    words.par_chunks_mut(ROWS * width).zip(codes.par_chunks(ROWS * cols)).for_each(|(words, codes)| {
        for (words, row) in words.chunks_exact_mut(width).zip(codes.chunks_exact(cols)) {
            let (mut pending, mut filled, mut words) = (0_u64, 0, words.iter_mut());
            for code in row {
                pending |= u64::from((code + half).cast_unsigned()) << filled;
                filled += bits;
                if filled >= 32 {
                    put(words.next(), pending);
                    pending >>= 32;
                    filled -= 32;
                }
            }
            put(words.next(), pending);
        }
    });
    words
}

/// The low half of what is pending becomes the word, where the row has one left.
fn put(word: Option<&mut u32>, pending: u64) {
    if let Some(word) = word {
        *word = pending as u32;
    }
}

/// The codes `[rows, cols]` of words made by [`pack`].
pub fn unpack(words: &[u32], cols: usize, bits: u8) -> Vec<i8> {
    let (half, mask) = (1_i8 << (bits - 1), (1_u64 << bits) - 1);
    let width = words_in_row(cols, bits);
    let mut codes = vec![0; words.len() / width * cols];
    codes.par_chunks_mut(ROWS * cols).zip(words.par_chunks(ROWS * width)).for_each(|(codes, words)| {
        for (codes, row) in codes.chunks_exact_mut(cols).zip(words.chunks_exact(width)) {
            let (mut pending, mut filled, mut rest) = (0_u64, 0, row.iter());
            for code in codes {
                if filled < bits {
                    pending |= rest.next().map_or(0, |word| u64::from(*word) << filled);
                    filled += 32;
                }
                *code = (pending & mask) as i8 - half;
                pending >>= bits;
                filled -= bits;
            }
        }
    });
    codes
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn packing_round_trips(bits in 2_u8..=4, rows in prop::sample::select(vec![1_usize, 4, 64, 130]), cols in 1_usize..80, seed in prop::collection::vec(any::<i8>(), 130 * 80)) {
            let codes: Vec<i8> = seed[..rows * cols].iter().map(|code| code >> (8 - bits)).collect();
            let words = pack(&codes, cols, bits);
            prop_assert_eq!(words.len(), rows * words_in_row(cols, bits));
            prop_assert_eq!(unpack(&words, cols, bits), codes);
        }
    }

    #[test]
    fn first_code_is_in_the_lowest_bits_with_half_the_range_added() {
        assert_eq!(pack(&[-8, 7, 0], 3, 4), [0x8f0]);
        assert_eq!(pack(&[-2, 1, 0], 3, 2), [0b10_11_00]);
        // Eleven codes of 3 bits: the last one has two bits in the first word and one in the second.
        let mut codes = [-4; 11];
        codes[10] = 3;
        assert_eq!(pack(&codes, 11, 3), [0xc000_0000, 1]);
    }
}
