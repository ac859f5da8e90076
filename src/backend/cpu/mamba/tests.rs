//! The scan with int8 internals against float64 references of the same quantized function; caches; rotation.

use super::projection::{Slice, Slices};
use super::*;
use crate::format::CacheFormat;

/// Largest difference from float64, relative to the largest output: f32 sums of some hundred terms.
const F64_TOLERANCE: f64 = 2e-6;
/// Largest difference between a text in one call and token by token, relative to the largest output.
const STEP_TOLERANCE: f32 = 2e-6;

fn random(count: usize, seed: u64) -> Vec<f32> {
    let mut seed = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(7);
    let mut next = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (seed >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..count).map(|_| next() + next() + next()).collect()
}

/// A head of 40 channels leaves lanes of a tile empty; 100 tokens are more than one chunk.
fn shape() -> MambaShape {
    MambaShape { heads: 4, head_dim: 40, groups: 2, state: 16, kernel: 4, dt_min: 0.0, dt_max: f32::INFINITY }
}

fn absmax(values: &[f32]) -> f32 {
    values.iter().fold(0.0_f32, |max, value| max.max(value.abs()))
}

fn static_scales(shape: &MambaShape) -> SsmInternals {
    let mut conv_out: Vec<f32> = (0..shape.conv_channels()).map(|c| 0.006 + 0.001 * (c % 5) as f32).collect();
    for (group, scales) in conv_out[shape.inner()..].chunks_exact_mut(shape.state).enumerate() {
        scales.fill(0.004 + 0.001 * group as f32);
    }
    SsmInternals::Int8Static(SsmScales {
        z: vec![0.01; shape.inner()],
        conv_in: (0..shape.conv_channels()).map(|c| 0.008 + 0.001 * (c % 7) as f32).collect(),
        conv_out,
        dt: (0..shape.heads).map(|head| 0.01 + 0.001 * head as f32).collect(),
    })
}

fn parameters(shape: &MambaShape, internals: SsmInternals, rotation: Option<StateRotation>) -> MambaParameters {
    MambaParameters {
        conv_weight: random(shape.conv_channels() * shape.kernel, 1),
        conv_bias: random(shape.conv_channels(), 2),
        a: random(shape.heads, 3).iter().map(|a| -(a.abs() + 0.2)).collect(),
        d: random(shape.heads, 4),
        dt_bias: random(shape.heads, 5),
        internals,
        rotation,
    }
}

fn all_internals(shape: &MambaShape) -> [SsmInternals; 3] {
    [SsmInternals::Float, SsmInternals::Int8PerToken, static_scales(shape)]
}

/// Runs the scan over `projected`.
fn run(projected: &[f32], parameters: &Parameters, shape: &MambaShape, lengths: &[usize], cache: Option<&mut SsmCache>) -> Vec<f32> {
    let sequences = Sequences::new(lengths.to_vec());
    if parameters.int8_internals() {
        scan(&Borrowed::Int8(&Slices::round(projected, parameters, shape)), parameters, shape, &sequences, cache)
    } else {
        scan(&Borrowed::Float(projected), parameters, shape, &sequences, cache)
    }
}

/// The float of every code of a slice: token, channel.
fn value(slice: &Slice, token: usize, channel: usize, spans: &Spans, scales: Option<&[f32]>) -> f64 {
    let rows = slice.all();
    let span = spans
        .0
        .iter()
        .scan(0, |end, span| {
            *end += span;
            Some(*end)
        })
        .position(|end| channel < end)
        .unwrap();
    let scale = scales.map_or_else(|| rows.span_scale(token, span), |scales| scales[channel]);
    f64::from(rows.row(token)[channel]) * f64::from(scale)
}

#[test]
fn int8_convolution_agrees_with_float64_at_extremes_too() {
    let shape = shape();
    let (channels, tokens) = (shape.conv_channels(), 9);
    for (internals, extreme) in all_internals(&shape).into_iter().skip(1).flat_map(|i| [(i.clone(), false), (i, true)]) {
        let mut given = parameters(&shape, internals, None);
        let mut inputs = random(tokens * channels, 11);
        if extreme {
            inputs = inputs.iter().map(|x| 1e3 * x.signum()).collect();
            given.conv_weight.fill(-1.0);
        }
        let weights = given.conv_codes();
        let parameters = Parameters::new(given.clone());
        let spans = Spans::conv(&shape);
        let fixed = parameters.scales(|s| &s.conv_in);
        let slice = Slice::round(&inputs, channels, &spans, fixed);
        let before = SequenceState::empty(&parameters, &shape, CacheFormats::default());
        let (found, _) = parameters.convolution.int8(&slice.all(), &shape, before.codes());
        for t in 0..tokens {
            for c in 0..channels {
                let tap = |k: usize| {
                    let Some(at) = (t + k + 1).checked_sub(shape.kernel) else { return 0.0 };
                    f64::from(weights.codes[c * shape.kernel + k]) * f64::from(weights.scales[c]) * value(&slice, at, c, &spans, fixed)
                };
                let sum = (0..shape.kernel).map(tap).sum::<f64>() + f64::from(given.conv_bias[c]);
                let expected = sum / (1.0 + (-sum).exp());
                let difference = (f64::from(found[t * channels + c]) - expected).abs();
                assert!(difference <= 2e-6 * (1.0 + expected.abs()), "token {t} channel {c}: {difference}");
            }
        }
    }
}

#[test]
fn int8_scan_agrees_with_a_float64_recurrence_over_the_same_codes() {
    let shape = shape();
    let (tokens, inner, channels, n) = (100, shape.inner(), shape.conv_channels(), shape.state);
    let projected = random(tokens * shape.projected(), 21);
    for internals in all_internals(&shape).into_iter().skip(1) {
        let given = parameters(&shape, internals, None);
        let parameters = Parameters::new(given.clone());
        let found = run(&projected, &parameters, &shape, &[tokens], None);

        let rows: Vec<f32> = projected.chunks_exact(shape.projected()).flat_map(|row| &row[inner..inner + channels]).copied().collect();
        let raw: Vec<f32> = projected.chunks_exact(shape.projected()).flat_map(|row| &row[inner + channels..]).copied().collect();
        let spans = Spans::conv(&shape);
        let before = Slice::round(&rows, channels, &spans, parameters.scales(|s| &s.conv_in));
        let empty = SequenceState::empty(&parameters, &shape, CacheFormats::default());
        let behind = parameters.convolution.int8(&before.all(), &shape, empty.codes()).0;
        let fixed = parameters.scales(|s| &s.conv_out);
        let codes = Slice::round(&behind, channels, &spans, fixed);
        let heads = Spans(vec![shape.heads]);
        let dt = Slice::round(&raw, shape.heads, &heads, parameters.scales(|s| &s.dt));
        let gates: Vec<f32> = projected.chunks_exact(shape.projected()).flat_map(|row| &row[..inner]).copied().collect();
        let own = Spans::heads(&shape);
        let z = Slice::round(&gates, inner, &own, parameters.scales(|s| &s.z));
        let mut state = vec![0.0_f64; inner * n];
        let (mut largest, mut difference) = (0.0_f64, 0.0_f64);
        for t in 0..tokens {
            for head in 0..shape.heads {
                let raw = value(&dt, t, head, &heads, parameters.scales(|s| &s.dt)) + f64::from(given.dt_bias[head]);
                let step = raw.exp().ln_1p();
                let decay = (step * f64::from(given.a[head])).exp();
                let group = head / (shape.heads / shape.groups);
                let at = |channel| value(&codes, t, channel, &spans, fixed);
                for p in head * shape.head_dim..(head + 1) * shape.head_dim {
                    let mut y = f64::from(given.d[head]) * at(p);
                    for i in 0..n {
                        let s = &mut state[p * n + i];
                        *s = decay * *s + step * at(p) * at(inner + group * n + i);
                        y += *s * at(inner + (shape.groups + group) * n + i);
                    }
                    let z = value(&z, t, p, &own, parameters.scales(|s| &s.z));
                    y *= z / (1.0 + (-z).exp());
                    largest = largest.max(y.abs());
                    difference = difference.max((y - f64::from(found[t * inner + p])).abs());
                }
            }
        }
        assert!(difference <= F64_TOLERANCE * largest, "{difference} of {largest}");
    }
}

#[test]
fn token_by_token_agrees_with_one_call_and_threads_do_not_matter() {
    let shape = shape();
    let tokens = 100;
    let projected = random(tokens * shape.projected(), 31);
    for internals in all_internals(&shape) {
        let parameters = Parameters::new(parameters(&shape, internals, Some(StateRotation::of(&shape))));
        let whole = run(&projected, &parameters, &shape, &[tokens], None);
        let mut cache = SsmCache::new(&parameters, &shape, 1, CacheFormats::default());
        let step = |row: &[f32]| run(row, &parameters, &shape, &[1], Some(&mut cache));
        let steps: Vec<f32> = projected.chunks_exact(shape.projected()).flat_map(step).collect();
        let difference = whole.iter().zip(&steps).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(difference <= STEP_TOLERANCE * absmax(&whole), "{difference}");
        let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        for threads in [1, 3] {
            assert_eq!(pool(threads).install(|| run(&projected, &parameters, &shape, &[30, 70], None)), {
                let mut parts = run(&projected[..30 * shape.projected()], &parameters, &shape, &[30], None);
                parts.extend(run(&projected[30 * shape.projected()..], &parameters, &shape, &[70], None));
                parts
            });
        }
    }
}

/// A sequence that nothing goes on from reads its parent's state in place when it is one chunk; a longer one has its own.
#[test]
fn branches_of_a_tree_agree_with_whole_sequences() {
    let shape = shape();
    // A trunk of 70 tokens; on it a branch of 20 with a twig of 10, a short leaf and a leaf longer than a chunk.
    let (lengths, parents) = (vec![70, 20, 10, 9, 80], vec![None, Some(0), Some(1), Some(0), Some(0)]);
    let sequences = Sequences::tree(lengths.clone(), parents.clone());
    let projected = random(sequences.tokens() * shape.projected(), 61);
    let ranges: Vec<_> = sequences.ranges().collect();
    for internals in all_internals(&shape) {
        let parameters = Parameters::new(parameters(&shape, internals, None));
        let slices;
        let borrowed = if parameters.int8_internals() {
            slices = Slices::round(&projected, &parameters, &shape);
            Borrowed::Int8(&slices)
        } else {
            Borrowed::Float(&projected)
        };
        let found = scan(&borrowed, &parameters, &shape, &sequences, None);
        for leaf in [2, 3, 4] {
            let mut path = vec![leaf];
            while let Some(parent) = parents[path[0]] {
                path.insert(0, parent);
            }
            let rows: Vec<f32> = path
                .iter()
                .flat_map(|at| &projected[ranges[*at].start * shape.projected()..ranges[*at].end * shape.projected()])
                .copied()
                .collect();
            let whole = run(&rows, &parameters, &shape, &[rows.len() / shape.projected()], None);
            let own = &whole[whole.len() - lengths[leaf] * shape.inner()..];
            let difference = found[ranges[leaf].start * shape.inner()..].iter().zip(own).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(difference <= STEP_TOLERANCE * absmax(&whole), "leaf {leaf}: {difference}");
        }
    }
}

#[test]
fn a_rotated_state_gives_the_same_output() {
    let shape = shape();
    let projected = random(50 * shape.projected(), 41);
    let plain = run(&projected, &Parameters::new(parameters(&shape, SsmInternals::Float, None)), &shape, &[50], None);
    let rotated = parameters(&shape, SsmInternals::Float, Some(StateRotation::of(&shape)));
    let rotated = run(&projected, &Parameters::new(rotated), &shape, &[50], None);
    let difference = plain.iter().zip(&rotated).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(difference <= 5e-6 * absmax(&plain), "{difference}");
}

#[test]
fn rounded_caches_take_fewer_bytes_and_lose_what_their_format_loses() {
    let shape = shape();
    let projected = random(60 * shape.projected(), 51);
    let parameters = Parameters::new(parameters(&shape, SsmInternals::Float, None));
    let decode = |formats| {
        let mut cache = SsmCache::new(&parameters, &shape, 1, formats);
        let rows = projected.chunks_exact(shape.projected());
        let y: Vec<f32> = rows.flat_map(|row| run(row, &parameters, &shape, &[1], Some(&mut cache))).collect();
        (y, cache.bytes())
    };
    let (exact, full) = decode(CacheFormats::default());
    let error = |y: &[f32]| {
        let squares = |values: &mut dyn Iterator<Item = f32>| values.map(|value| f64::from(value).powi(2)).sum::<f64>();
        (squares(&mut y.iter().zip(&exact).map(|(a, b)| a - b)) / squares(&mut exact.iter().copied())).sqrt()
    };
    for (format, largest_error, share) in [(CacheFormat::F16, 1e-3, 0.51), (CacheFormat::Int8, 2e-2, 0.36)] {
        let (state, bytes) = decode(CacheFormats { state: format, conv: format, ..CacheFormats::default() });
        assert!((1e-7..largest_error).contains(&error(&state)), "{format:?}: {}", error(&state));
        assert!((bytes as f64) < share * full as f64, "{format:?}: {bytes} of {full}");
    }
}
