//! Every instruction set against a reference in i64 and f32 that follows the formulas one element at a time.

use proptest::prelude::*;
use rstest::rstest;

use super::*;
use crate::format::{QuantizedMatrix, Scheme, round_to_nearest};

const INT8: Scheme = Scheme::Int8;
const INT4_32: Scheme = Scheme::Grouped { bits: 4, group: 32 };
const INT4_64: Scheme = Scheme::Grouped { bits: 4, group: 64 };
const INT4_128: Scheme = Scheme::Grouped { bits: 4, group: 128 };
const INT3_32: Scheme = Scheme::Grouped { bits: 3, group: 32 };
const INT3_128: Scheme = Scheme::Grouped { bits: 3, group: 128 };
const INT2_64: Scheme = Scheme::Grouped { bits: 2, group: 64 };

/// Numbers between −1 and 1 that are the same in every run.
fn noise(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

fn weights(rows: usize, cols: usize, scheme: Scheme) -> QuantizedMatrix {
    round_to_nearest(&noise(rows * cols, 1), rows, cols, scheme)
}

fn activations(tokens: usize, cols: usize) -> QuantizedRows {
    QuantizedRows::per_token(&noise(tokens * cols, 2), tokens, cols)
}

/// The product `[tokens, rows]`, one element at a time.
fn reference(w: &QuantizedMatrix, x: &QuantizedRows) -> Vec<f32> {
    let group = w.group();
    let mut out = Vec::new();
    for t in 0..x.tokens {
        for r in 0..w.rows {
            let row = &w.codes[r * w.cols..(r + 1) * w.cols];
            let dot = |row: &[i8], x: &[i8]| {
                let exact: i64 = row.iter().zip(x).map(|(w, x)| i64::from(*w) * i64::from(*x)).sum();
                i32::try_from(exact).unwrap() as f32
            };
            out.push(if w.scheme == INT8 {
                dot(row, x.row(t)) * (x.scales[t] * w.scales[r])
            } else {
                let mut sum = 0.0_f32;
                for (g, (row, codes)) in row.chunks(group).zip(x.row(t).chunks(group)).enumerate() {
                    let product = dot(row, codes) * w.scales[r * (w.cols / group) + g];
                    sum += product;
                }
                sum * x.scales[t]
            });
        }
    }
    out
}

/// Checks every instruction set, writing into the middle of a wider output.
fn check(w: &QuantizedMatrix, x: &QuantizedRows) {
    let packed = PackedMatrix::new(w);
    let expected = reference(w, x);
    let (stride, offset) = (w.rows + 5, 3);
    for isa in Isa::available() {
        let mut out = vec![f32::INFINITY; x.tokens * stride];
        matmul_with(isa, &packed, x, &mut out, stride, offset);
        for (t, (row, expected)) in out.chunks(stride).zip(expected.chunks(w.rows)).enumerate() {
            let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
            let shape = (w.rows, w.cols, x.tokens);
            assert_eq!(bits(&row[offset..offset + w.rows]), bits(expected), "{isa:?} {:?} {shape:?} token {t}", w.scheme);
            let untouched = row[..offset].iter().chain(&row[offset + w.rows..]).all(|value| *value == f32::INFINITY);
            assert!(untouched, "{isa:?} wrote outside its columns");
        }
    }
}

#[rstest]
#[case(INT8, &[1, 3, 24, 48, 80, 96, 160, 192, 256])]
#[case(INT4_32, &[32, 96, 160, 192, 256])]
#[case(INT4_64, &[64, 192, 256])]
#[case(INT4_128, &[128, 256])]
#[case(INT3_32, &[96, 160])]
#[case(INT3_128, &[128, 256])]
#[case(INT2_64, &[64, 192])]
fn every_instruction_set_matches_the_reference(#[case] scheme: Scheme, #[case] widths: &[usize]) {
    for &cols in widths {
        for rows in [1, 15, 16, 33, 50, 64, 100] {
            let w = weights(rows, cols, scheme);
            for tokens in [1, 2, 3, 4, 5, 6, 7, 8, 17] {
                check(&w, &activations(tokens, cols));
            }
        }
    }
}

#[test]
fn more_tokens_than_a_task_takes() {
    for scheme in [INT8, INT4_32] {
        check(&weights(40, 64, scheme), &activations(TASK_TOKENS + 9, 64));
    }
}

/// Codes as large as they get, so that sums in fewer bits than needed, or products that saturate, would show.
#[rstest]
#[case(INT8, 127)]
#[case(INT8, -127)]
#[case(INT4_32, -8)]
#[case(INT4_128, -8)]
#[case(INT4_128, 7)]
#[case(INT3_128, -4)]
#[case(INT3_32, 3)]
#[case(INT2_64, -2)]
fn extremes_do_not_overflow(#[case] scheme: Scheme, #[case] code: i8) {
    for cols in [256, 4096, 21504] {
        let rows = 17;
        let scales = vec![2f32.powi(-7); rows * cols / scheme.group(cols)];
        let w = QuantizedMatrix { scheme, rows, cols, codes: vec![code; rows * cols], scales };
        for sign in [1.0, -1.0] {
            for tokens in [1, 3] {
                let x = QuantizedRows::per_token(&vec![sign; tokens * cols], tokens, cols);
                assert!(x.row(0).iter().all(|code| f32::from(*code) == 127.0 * sign));
                check(&w, &x);
            }
        }
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    for scheme in [INT8, INT4_64] {
        for tokens in [1, 300] {
            let (w, x) = (PackedMatrix::new(&weights(1000, 1024, scheme)), activations(tokens, 1024));
            let product = |threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let mut out = vec![0.0; tokens * 1000];
                pool.install(|| matmul(&w, &x, &mut out, 1000, 0));
                out
            };
            assert_eq!(product(1), product(2));
            assert_eq!(product(1), product(3));
        }
    }
}

#[rstest]
#[case(INT8, 27)]
#[case(INT8, 256)]
#[case(INT4_32, 96)]
#[case(INT4_128, 256)]
#[case(INT3_128, 256)]
#[case(INT2_64, 192)]
fn dequantized_rows_are_those_of_the_matrix(#[case] scheme: Scheme, #[case] cols: usize) {
    let w = weights(70, cols, scheme);
    let (packed, expected) = (PackedMatrix::new(&w), w.dequantize());
    for (first, count) in [(0, 70), (5, 30), (69, 1), (3, 0)] {
        let mut out = vec![f32::NAN; count * cols];
        packed.dequantize_into(first, &mut out);
        assert_eq!(out, expected[first * cols..(first + count) * cols]);
    }
}

#[test]
fn bytes_count_codes_and_scales() {
    assert_eq!(PackedMatrix::new(&weights(32, 256, INT8)).bytes(), 32 * 256 + 32 * 4);
    assert_eq!(PackedMatrix::new(&weights(32, 256, INT4_64)).bytes(), 32 * 128 + 32 * 4 * 2);
    assert_eq!(PackedMatrix::new(&weights(17, 256, INT8)).bytes(), 32 * 256 + 32 * 4, "panels are whole");
}

#[test]
fn empty_products_leave_the_output_alone() {
    let none = QuantizedMatrix { scheme: INT8, rows: 0, cols: 8, codes: vec![], scales: vec![] };
    let mut out = [1.0; 4];
    matmul(&PackedMatrix::new(&none), &activations(2, 8), &mut out, 2, 0);
    matmul(&PackedMatrix::new(&weights(2, 8, INT8)), &activations(0, 8), &mut out, 2, 0);
    assert_eq!(out, [1.0; 4]);
}

#[test]
fn selected_rows_keep_codes_scales_and_sums() {
    let x = noise(5 * 80, 2);
    let picked = [4, 0, 4];
    let gathered: Vec<f32> = picked.iter().flat_map(|t| &x[t * 80..(t + 1) * 80]).copied().collect();
    assert_eq!(QuantizedRows::per_token(&x, 5, 80).select(&picked), QuantizedRows::per_token(&gathered, 3, 80));
}

#[test]
fn rows_of_zeros_have_scale_zero_and_a_nan_shows() {
    let zeros = QuantizedRows::per_token(&[0.0; 6], 2, 3);
    assert_eq!((zeros.scales.as_slice(), zeros.row(1)), ([0.0; 2].as_slice(), [0; 3].as_slice()));
    assert!(QuantizedRows::per_token(&[1.0, f32::NAN, -2.0], 1, 3).scales[0].is_nan());
}

#[test]
fn halves_round_to_even() {
    assert_eq!(QuantizedRows::per_token(&[-127.0, 0.5, 1.5, -2.5], 1, 4).row(0), [-127, 0, 2, -2]);
}

proptest! {
    #[test]
    fn activations_are_within_half_a_step(x in prop::collection::vec(-1e3_f32..1e3, 2..400)) {
        let cols = x.len() / 2;
        let x = &x[..2 * cols];
        let rows = QuantizedRows::per_token(x, 2, cols);
        for t in 0..2 {
            let step = rows.scales[t];
            for (x, code) in x[t * cols..].iter().zip(rows.row(t)) {
                // Dividing and multiplying round once each: a few parts in 2^24 of the value.
                prop_assert!((x - f32::from(*code) * step).abs() <= 0.5 * step + x.abs() * 2f32.powi(-22));
            }
        }
    }
}
