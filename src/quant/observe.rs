//! Static activation scales from what a transformed block reads on the sample: the inputs of its linears, and the inside
//! of state-space mixers. Start with [`static_scales`].

use std::cell::RefCell;
use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::cluster;
use super::weights::FloatBlock;
use crate::backend::cpu::hadamard;
use crate::backend::{Backend, MambaParameters, MambaShape, Sequences, SsmInternals, SsmScales, StateRotation};
use crate::checkpoint::{BlockSpec, Config};
use crate::error::{Error, Result};
use crate::format::{CacheFormats, Transform};
use crate::model::{Block, BlockSource, Boundary, mamba_shape};

/// Bins of magnitudes: 8 an octave, from 2⁻²⁴ up to 2²⁴.
const BINS_IN_OCTAVE: u32 = 8;
const FIRST_BIN: u32 = (127 - 24) * BINS_IN_OCTAVE;
const BINS: usize = (48 * BINS_IN_OCTAVE) as usize;

/// No static scale is below this share of its slice's median: a channel that is almost silent on the sample may speak
/// up elsewhere, and would be cut off.
const FLOOR: f32 = 0.25;

/// How static scales are found.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Observers {
    /// Percentile of the magnitudes of a linear's inputs that its static scale covers; 100 is the largest.
    pub linears: f64,
    /// The same of each channel inside a state-space mixer.
    pub ssm: f64,
    /// Clusters that the heads of x, sorted by magnitude, are divided into behind the convolution (Quamba2).
    pub head_groups: usize,
    /// Clusters of the channels of the heads in each of them.
    pub channel_groups: usize,
}

impl Default for Observers {
    fn default() -> Self {
        Self { linears: 100.0, ssm: 100.0, head_groups: 8, channel_groups: 8 }
    }
}

impl Observers {
    /// Refuses settings that mean nothing.
    pub fn check(&self) -> Result<()> {
        if [self.linears, self.ssm].iter().any(|percentile| !(50.0..=100.0).contains(percentile)) {
            return Err(Error::input("a percentile of activations must lie between 50 and 100").hint("100 takes the largest magnitude"));
        }
        if self.head_groups == 0 || self.channel_groups == 0 {
            return Err(Error::input("head_groups and channel_groups must be at least 1").hint("1 gives all channels of x one scale"));
        }
        Ok(())
    }
}

/// Magnitudes seen in each of some channels.
struct Magnitudes {
    largest: Vec<f32>,
    /// `[channels, bins]`; empty when only the largest is asked for.
    counts: Vec<u64>,
}

impl Magnitudes {
    fn new(channels: usize, percentile: f64) -> Self {
        Self { largest: vec![0.0; channels], counts: if percentile < 100.0 { vec![0; channels * BINS] } else { Vec::new() } }
    }

    /// Adds `values` `[tokens, channels]`.
    fn add(&mut self, values: &[f32]) {
        let channels = self.largest.len();
        for row in values.chunks_exact(channels) {
            for (largest, value) in self.largest.iter_mut().zip(row) {
                *largest = largest.max(value.abs());
            }
        }
        if self.counts.is_empty() {
            return;
        }
        for row in values.chunks_exact(channels) {
            for (counts, value) in self.counts.chunks_exact_mut(BINS).zip(row) {
                counts[bin(value.abs())] += 1;
            }
        }
    }

    /// Adds the largest magnitudes of some values.
    fn raise(&mut self, largest: &[f32]) {
        for (own, new) in self.largest.iter_mut().zip(largest) {
            *own = own.max(*new);
        }
    }

    /// Adds the input of a linear, which counts as one channel.
    fn see<B: Backend>(&mut self, backend: &B, x: &B::Activation, observers: &Observers) -> Result<()> {
        if observers.linears < 100.0 {
            self.add(&backend.floats(x)?);
        } else {
            self.raise(&[backend.largest_magnitudes(x)?.into_iter().fold(0.0, f32::max)]);
        }
        Ok(())
    }

    /// For each channel the magnitude that `percentile` percent do not exceed, to the width of a bin.
    fn bounds(&self, percentile: f64) -> Vec<f32> {
        if self.counts.is_empty() {
            return self.largest.clone();
        }
        let bound = |(counts, largest): (&[u64], &f32)| {
            let total: u64 = counts.iter().sum();
            let beyond = (total as f64 * (1.0 - percentile / 100.0)) as u64;
            let mut left = 0;
            let kept = counts.iter().rposition(|count| {
                left += count;
                left > beyond
            });
            kept.map_or(*largest, |bin| upper_edge(bin).min(*largest))
        };
        self.counts.chunks_exact(BINS).zip(&self.largest).map(bound).collect()
    }
}

/// The bin of a magnitude.
fn bin(magnitude: f32) -> usize {
    let bin = (magnitude.to_bits() >> (23 - BINS_IN_OCTAVE.trailing_zeros())).saturating_sub(FIRST_BIN);
    (bin as usize).min(BINS - 1)
}

fn upper_edge(bin: usize) -> f32 {
    f32::from_bits((bin as u32 + 1 + FIRST_BIN) << (23 - BINS_IN_OCTAVE.trailing_zeros()))
}

/// Static scales of one block.
#[derive(Default)]
pub struct StaticScales {
    /// Of the inputs of linears, by the linear's name.
    pub linears: BTreeMap<String, f32>,
    pub internals: Option<SsmScales>,
}

/// What static scales are needed of a block.
#[derive(Debug, Clone, Copy)]
pub struct Wanted {
    pub linears: bool,
    pub internals: bool,
}

/// Runs the transformed float block `block` over the batches, a sequence each, and derives its static scales. `source` is
/// what it was assembled from.
pub fn static_scales<B: Backend>(
    backend: &B,
    config: &Config,
    spec: &BlockSpec,
    (block, source): (&Block<B>, &FloatBlock<'_>),
    (inputs, sequences): (&Boundary<B>, &[Sequences]),
    observers: &Observers,
    wanted: Wanted,
) -> Result<StaticScales> {
    if !wanted.linears && !wanted.internals {
        return Ok(StaticScales::default());
    }
    let linears: RefCell<BTreeMap<String, Magnitudes>> = RefCell::new(BTreeMap::new());
    let inside = if wanted.internals { Some(RefCell::new(Inside::new(backend, config, spec, source, observers)?)) } else { None };
    let tap = |name: &str, x: &B::Activation| {
        if wanted.linears {
            let mut linears = linears.borrow_mut();
            let seen = linears.entry(input_of(spec, name)).or_insert_with(|| Magnitudes::new(1, observers.linears));
            seen.see(backend, x, observers)?;
        }
        if let (Some(inside), "in_proj") = (&inside, name) {
            inside.borrow_mut().see(backend, x, observers)?;
        }
        Ok(())
    };
    for (h, sequences) in inputs.iter(backend).zip(sequences) {
        if let Some(inside) = &inside {
            inside.borrow_mut().begin(backend);
        }
        if wanted.linears {
            block.mix(backend, &h?, sequences, None, Some(&tap))?;
        } else {
            block.enter(backend, &h?, sequences, &tap)?;
        }
    }
    let linears = linears.into_inner();
    let scale = |name: &str| linears.get(&input_of(spec, name)).map(|seen| seen.bounds(observers.linears)[0] / 127.0);
    Ok(StaticScales {
        linears: spec.linears.iter().filter_map(|linear| Some((linear.name.clone(), scale(&linear.name)?))).collect(),
        internals: inside.map(|inside| inside.into_inner().scales(observers)),
    })
}

/// Scale of the input of the head, from what it reads on the sample.
pub fn head_scale<B: Backend>(backend: &B, inputs: impl Iterator<Item = Result<B::Activation>>, observers: &Observers) -> Result<f32> {
    let mut seen = Magnitudes::new(1, observers.linears);
    for x in inputs {
        seen.see(backend, &x?, observers)?;
    }
    Ok(seen.bounds(observers.linears)[0] / 127.0)
}

/// A name for what a linear reads: linears that read the same input share its scale.
fn input_of(spec: &BlockSpec, name: &str) -> String {
    let latent = spec.linear("fc1_latent_proj").is_some();
    match name {
        "q_proj" | "k_proj" | "v_proj" | "fc1_latent_proj" | "shared_experts.up_proj" => "block".into(),
        name if name.starts_with("experts.") && name.ends_with("up_proj") => if latent { "latent" } else { "block" }.into(),
        name => name.to_owned(),
    }
}

/// Magnitudes inside a state-space mixer.
struct Inside<B: Backend> {
    shape: MambaShape,
    in_proj: B::Linear,
    /// `[conv_channels, kernel]`, `[conv_channels]`.
    conv_weight: Vec<f32>,
    conv_bias: Vec<f32>,
    rotation: Option<StateRotation>,
    /// Inputs of the convolution that the next piece of a sequence still needs, `[kernel − 1, conv_channels]`.
    window: Vec<f32>,
    /// The same for a device that sees to the largest magnitudes itself.
    parameters: B::Mamba,
    cache: B::SsmCache,
    z: Magnitudes,
    conv_in: Magnitudes,
    conv_out: Magnitudes,
    dt: Magnitudes,
}

impl<B: Backend> Inside<B> {
    fn new(backend: &B, config: &Config, spec: &BlockSpec, source: &FloatBlock<'_>, observers: &Observers) -> Result<Self> {
        let shape = mamba_shape(&config.mamba);
        let tensor = |name: &str| source.tensor(&format!("{}mixer.{name}", spec.prefix));
        let in_proj = spec.linear("in_proj").ok_or_else(|| Error::run(format!("block {} has no in_proj", spec.index)))?;
        let seen = |channels| Magnitudes::new(channels, observers.ssm);
        let channels = shape.conv_channels();
        let rotation = source.transforms.contains(&Transform::RotateState).then(|| StateRotation::of(&shape));
        let conv_weight = tensor("conv1d.weight")?;
        let conv_bias = if config.mamba.conv_bias { tensor("conv1d.bias")? } else { vec![0.0; channels] };
        let heads = || vec![0.0; shape.heads];
        let parameters = backend.prepare_mamba(MambaParameters {
            conv_weight: conv_weight.clone(),
            conv_bias: conv_bias.clone(),
            a: heads(),
            d: heads(),
            dt_bias: heads(),
            internals: SsmInternals::Float,
            rotation,
        })?;
        Ok(Self {
            in_proj: backend.prepare(source.linear(in_proj)?)?,
            conv_weight,
            conv_bias,
            rotation,
            cache: backend.ssm_cache(&parameters, &shape, 1, CacheFormats::default()),
            parameters,
            window: vec![0.0; (shape.kernel - 1) * channels],
            z: seen(shape.inner()),
            conv_in: seen(channels),
            conv_out: seen(channels),
            dt: seen(shape.heads),
            shape,
        })
    }

    /// A sequence begins.
    fn begin(&mut self, backend: &B) {
        self.window.fill(0.0);
        self.cache = backend.ssm_cache(&self.parameters, &self.shape, 1, CacheFormats::default());
    }

    /// Adds what `in_proj` makes of `x`: on the device where only the largest magnitudes count and it can, otherwise here.
    fn see(&mut self, backend: &B, x: &B::Activation, observers: &Observers) -> Result<()> {
        if observers.ssm >= 100.0
            && let Some([projected, behind]) = backend.mixer_magnitudes(&self.in_proj, x, &self.parameters, &self.shape, &mut self.cache)?
        {
            let (z, rest) = projected.split_at(self.shape.inner());
            let (conv_in, dt) = rest.split_at(self.shape.conv_channels());
            self.z.raise(z);
            self.conv_in.raise(conv_in);
            self.dt.raise(dt);
            self.conv_out.raise(&behind);
            return Ok(());
        }
        self.add(&backend.download(&backend.linear(&self.in_proj, x)?)?);
        Ok(())
    }

    /// Adds `projected` `[tokens, z|x|B|C|dt]`, which goes on where the last call ended.
    fn add(&mut self, projected: &[f32]) {
        let (inner, channels, width) = (self.shape.inner(), self.shape.conv_channels(), self.shape.projected());
        let slice =
            |from: usize, to: usize| -> Vec<f32> { projected.chunks_exact(width).flat_map(|row| &row[from..to]).copied().collect() };
        self.z.add(&slice(0, inner));
        self.dt.add(&slice(inner + channels, width));
        let inputs = slice(inner, inner + channels);
        self.conv_in.add(&inputs);
        let mut out = self.convolve(&inputs);
        if let Some(rotation) = self.rotation {
            for row in out.chunks_exact_mut(channels) {
                let (x, bc) = row.split_at_mut(inner);
                hadamard::transform_blocks(x, rotation.head);
                hadamard::transform_blocks(bc, rotation.state);
            }
        }
        self.conv_out.add(&out);
    }

    /// silu of the causal convolution of `[tokens, conv_channels]`; the window is moved on.
    fn convolve(&mut self, inputs: &[f32]) -> Vec<f32> {
        let (channels, kernel) = (self.conv_bias.len(), self.shape.kernel);
        let seen = [&self.window, inputs].concat();
        let mut out = Vec::with_capacity(inputs.len());
        for t in 0..inputs.len() / channels {
            for c in 0..channels {
                let taps = (0..kernel).map(|k| self.conv_weight[c * kernel + k] * seen[(t + k) * channels + c]);
                let sum = self.conv_bias[c] + taps.sum::<f32>();
                out.push(sum / (1.0 + (-sum).exp()));
            }
        }
        self.window = seen[inputs.len()..].to_vec();
        out
    }

    fn scales(self, observers: &Observers) -> SsmScales {
        let MambaShape { heads, head_dim, groups, state, .. } = self.shape;
        let inner = self.shape.inner();
        let scales = |seen: &Magnitudes| to_scales(&seen.bounds(observers.ssm));
        let behind = self.conv_out.bounds(observers.ssm);
        let (x, bc) = behind.split_at(inner);
        let mut conv_out = to_scales(&cluster::heads_and_channels(x, head_dim, observers.head_groups.min(heads), observers.channel_groups));
        for slice in bc.chunks_exact(groups * state) {
            let largest = |group: &[f32]| group.iter().copied().fold(0.0, f32::max);
            let bounds: Vec<f32> = slice.chunks_exact(state).flat_map(|group| vec![largest(group); state]).collect();
            conv_out.extend(to_scales(&bounds));
        }
        SsmScales { z: scales(&self.z), conv_in: scales(&self.conv_in), conv_out, dt: scales(&self.dt) }
    }
}

/// Scales that bring `bounds` to ±127, none below a share of their median.
fn to_scales(bounds: &[f32]) -> Vec<f32> {
    let mut sorted = bounds.to_vec();
    sorted.sort_by(f32::total_cmp);
    let floor = FLOOR * sorted.get(sorted.len() / 2).copied().unwrap_or(0.0);
    bounds.iter().map(|bound| bound.max(floor) / 127.0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_covers_that_share_to_the_width_of_a_bin() {
        let mut seen = Magnitudes::new(2, 99.0);
        let values: Vec<f32> = (1..=1000).flat_map(|i| [i as f32 / 1000.0, if i % 2 == 0 { -3.0 } else { 0.0 }]).collect();
        seen.add(&values);
        let bounds = seen.bounds(99.0);
        assert!((0.99..0.99 * 1.15).contains(&bounds[0]), "{}", bounds[0]);
        assert_eq!(bounds[1], 3.0, "the largest, though its bin goes further");
        assert_eq!(Magnitudes::new(1, 100.0).bounds(100.0), [0.0]);
        for magnitude in [1e-9, 3e-5, 0.7, 1.0, 123.0] {
            assert!(upper_edge(bin(magnitude)) > magnitude);
        }
    }

    #[test]
    fn silent_channels_keep_a_floor() {
        assert_eq!(to_scales(&[127.0, 254.0, 0.0]), [1.0, 2.0, 0.25]);
    }

    #[test]
    fn settings_that_mean_nothing_are_refused() {
        assert!(Observers { ssm: 101.0, ..Observers::default() }.check().is_err());
        assert!(Observers { head_groups: 0, ..Observers::default() }.check().is_err());
        assert!(Observers::default().check().is_ok());
    }
}
