//! int4 codes in 32-bit words, as compressed-tensors' `pack-quantized` stores them: eight codes a word,
//! the first in the lowest bits, each with 8 added; a row is padded with zero nibbles to a whole word.

/// Packs `codes` `[rows, cols]` (−8…7) into words `[rows, ⌈cols/8⌉]`.
pub fn pack_int4(codes: &[i8], cols: usize) -> Vec<u32> {
    codes
        .chunks_exact(cols)
        .flat_map(|row| row.chunks(8))
        .map(|eight| eight.iter().enumerate().fold(0, |word, (i, code)| word | (((code + 8) as u32 & 0xf) << (4 * i))))
        .collect()
}

/// The codes `[rows, cols]` of words made by [`pack_int4`].
pub fn unpack_int4(words: &[u32], cols: usize) -> Vec<i8> {
    words.chunks_exact(cols.div_ceil(8)).flat_map(|row| (0..cols).map(move |c| ((row[c / 8] >> (4 * (c % 8))) & 0xf) as i8 - 8)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn packing_round_trips(rows in 1_usize..5, cols in 1_usize..40, seed in prop::collection::vec(-8_i8..8, 200)) {
            let codes = &seed[..rows * cols];
            prop_assert_eq!(unpack_int4(&pack_int4(codes, cols), cols), codes);
        }
    }

    #[test]
    fn first_code_is_in_the_lowest_bits_with_eight_added() {
        assert_eq!(pack_int4(&[-8, 7, 0], 3), [0x8f0]);
    }
}
