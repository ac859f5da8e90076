//! Models with random weights.

use half::bf16;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use rayon::prelude::*;

use super::Shape;
use crate::backend::{Backend, SsmInternals};
use crate::checkpoint::{BlockSpec, LinearSpec};
use crate::error::{Error, Result};
use crate::format::{CacheFormats, Format, LinearWeights, QuantizedMatrix, Scheme, Transform, WeightPart};
use crate::model::{Block, BlockSource, Ends, Hybrid, internals};
use crate::quant::Recipe;

/// Random values that weights are made of, again and again: a prime number, so that no two rows are alike.
const POOL: usize = 1_048_573;

/// The format of the head beside blocks of `format`: 8 bits for all that are quantized.
pub fn plan_format(format: Format) -> Format {
    if format == Format::W16A16 { format } else { Format::W8A8 }
}

/// A model of `shape` in `format` with random weights, its head in [`plan_format`], its SSM states kept as `caches` says. With a `recipe`
/// it has the online transforms and the internals of Mamba-2 of one that the recipe quantized, though not its formats.
pub fn assemble<B: Backend>(
    backend: B,
    shape: &Shape,
    format: Format,
    recipe: Option<&Recipe>,
    caches: CacheFormats,
    each: &mut dyn FnMut(usize) -> Result<()>,
) -> Result<Hybrid<B>> {
    let source = RandomWeights::new(format);
    let (config, layout) = (&shape.config, &shape.layout);
    let head = source.weights(&layout.head, &layout.head.schemes(plan_format(format)), plan_format(format));
    let mut table = source.weights(&layout.embedding, &layout.embedding.schemes(plan_format(format)), Format::W16A16);
    table.int8_activations = false;
    let ends = Ends::new(&backend, table, vec![1.0; config.hidden_size], config.norm_eps, head)?;
    let mut blocks = Vec::with_capacity(layout.blocks.len());
    for spec in &layout.blocks {
        blocks.push(Block::assemble(&backend, config, spec, &OfBlock { random: &source, spec, recipe })?);
        each(spec.index)?;
    }
    Ok(Hybrid::new(backend, ends, blocks, config.vocab_size, caches))
}

pub(super) struct RandomWeights {
    format: Format,
    /// bf16 values of a standard deviation of about 1.
    floats: Vec<f32>,
    codes: Vec<i8>,
}

impl RandomWeights {
    pub fn new(format: Format) -> Self {
        let mut rng = SmallRng::seed_from_u64(8);
        let mut normal = || -> f32 { (0..4).map(|_| rng.random_range(-0.866_f32..0.866)).sum() };
        let floats: Vec<f32> = (0..POOL).map(|_| bf16::from_f32(normal()).to_f32()).collect();
        let codes = floats.iter().map(|value| (value * 36.0).round_ties_even() as i8).collect();
        Self { format, floats, codes }
    }

    /// `count` values of `pool`, beginning where a position of `offset` would.
    fn fill<T: Copy + Default + Send + Sync>(pool: &[T], count: usize, offset: usize, value: impl Fn(T) -> T + Sync) -> Vec<T> {
        let mut out = vec![T::default(); count];
        out.par_chunks_mut(pool.len()).enumerate().for_each(|(i, out)| {
            let [first, second] = Self::round(pool, offset, i);
            out.iter_mut().zip(first.iter().chain(second)).for_each(|(out, from)| *out = value(*from));
        });
        out
    }

    /// The values of `pool` as the `i`th round through it takes them.
    fn round<T>(pool: &[T], offset: usize, i: usize) -> [&[T]; 2] {
        let (before, behind) = pool.split_at((offset + 7919 * i) % pool.len());
        [behind, before]
    }

    /// Where in the pool the `rows` rows of a slice of `linear` begin.
    fn offset(linear: &LinearSpec, rows: usize) -> usize {
        linear.stem.len() * 31 + rows
    }

    /// Power of two that makes outputs about as large as inputs.
    fn power(linear: &LinearSpec) -> f32 {
        2.0_f32.powi(bf16::from_f32(1.0 / (linear.cols as f32).sqrt()).to_f32().log2().round() as i32)
    }

    /// The float weights of `linear` as a checkpoint in bf16 stores them. By the thread that asks, for it is others that make other
    /// files.
    pub fn stored(&self, linear: &LinearSpec) -> Vec<u8> {
        let power = Self::power(linear);
        let pool: Vec<u16> = self.floats.iter().map(|value| bf16::from_f32(value * power).to_bits()).collect();
        let mut bytes = Vec::with_capacity(2 * linear.rows * linear.cols);
        for slice in &linear.slices {
            let mut left = slice.rows * linear.cols;
            for i in 0..left.div_ceil(pool.len()) {
                for part in Self::round(&pool, Self::offset(linear, slice.rows), i) {
                    let part = &part[..left.min(part.len())];
                    bytes.extend_from_slice(bytemuck::cast_slice(part));
                    left -= part.len();
                }
            }
        }
        bytes
    }

    pub fn weights(&self, linear: &LinearSpec, schemes: &[Scheme], format: Format) -> LinearWeights {
        // Outputs as large as inputs.
        let spread = 1.0 / (linear.cols as f32).sqrt();
        let mut weights = LinearWeights::float(Vec::new(), linear.cols);
        weights.parts.clear();
        weights.int8_activations = format.quantizes_activations();
        for (slice, scheme) in linear.slices.iter().zip(schemes) {
            let (rows, cols) = (slice.rows, linear.cols);
            let offset = Self::offset(linear, rows);
            let scale = bf16::from_f32(spread / 36.0).to_f32();
            weights.push(match *scheme {
                Scheme::Float => {
                    let power = Self::power(linear);
                    WeightPart::Float(Self::fill(&self.floats, rows * cols, offset, |value| value * power))
                }
                Scheme::Int8 => {
                    let codes = Self::fill(&self.codes, rows * cols, offset, |code| code);
                    WeightPart::Quantized(QuantizedMatrix { scheme: *scheme, rows, cols, codes, scales: vec![scale; rows] })
                }
                Scheme::Grouped { group, .. } => {
                    let shift = 8 - u32::from(scheme.bits());
                    let codes = Self::fill(&self.codes, rows * cols, offset, |code| code >> shift);
                    let scale = bf16::from_f32(spread / 36.0 * (1 << shift) as f32).to_f32();
                    WeightPart::Quantized(QuantizedMatrix { scheme: *scheme, rows, cols, codes, scales: vec![scale; rows * cols / group] })
                }
            });
        }
        weights
    }
}

/// The random weights of one block.
pub(super) struct OfBlock<'a> {
    pub random: &'a RandomWeights,
    pub spec: &'a BlockSpec,
    /// What transforms it, and how its internals are rounded.
    pub recipe: Option<&'a Recipe>,
}

impl OfBlock<'_> {
    fn transforms(&self) -> &[Transform] {
        self.recipe.map_or(&[], |recipe| &recipe.transforms)
    }
}

/// Static scale of a mixer's internals, whose values are of about 1.
const INTERNAL_SCALE: f32 = 4.0 / 127.0;

impl BlockSource for OfBlock<'_> {
    fn tensor(&self, name: &str) -> Result<Vec<f32>> {
        let spec = self.spec.others.iter().find(|spec| spec.name == name);
        let count = spec.ok_or_else(|| Error::run(format!("block {} has no tensor `{name}`", self.spec.index)))?.elements() as usize;
        let ramp = |low: f32, high: f32| (0..count).map(|i| low + (high - low) * i as f32 / count as f32).collect();
        Ok(match name.rsplit("mixer.").next().unwrap_or(name) {
            // Heads that forget within some tokens to some hundreds, as trained ones do.
            "A_log" => ramp(0.0, 2.7),
            "dt_bias" => ramp(-6.0, -2.0),
            name if name.ends_with("norm.weight") || name == "D" => vec![1.0; count],
            name if name.ends_with("bias") => vec![0.0; count],
            _ => RandomWeights::fill(&self.random.floats, count, name.len(), |value| 0.125 * value),
        })
    }

    fn linear(&self, linear: &LinearSpec) -> Result<LinearWeights> {
        let mut weights = self.random.weights(linear, &linear.schemes(self.random.format), self.random.format);
        weights.bias = linear.bias.then(|| vec![0.0; linear.rows]);
        weights.hadamard = linear.hadamard(self.transforms());
        Ok(weights)
    }

    fn internals(&self, block: &BlockSpec) -> Result<SsmInternals> {
        let Some(recipe) = self.recipe else { return Ok(SsmInternals::Float) };
        internals(recipe.activations.ssm, self.random.format, block, |name| {
            let spec = block.internal_scales().into_iter().find(|spec| spec.name == name);
            let count = spec.ok_or_else(|| Error::run(format!("block {} has no scales `{name}`", block.index)))?.elements();
            Ok(vec![INTERNAL_SCALE; count as usize])
        })
    }

    fn rotates_state(&self) -> bool {
        self.transforms().contains(&Transform::RotateState)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::SliceSpec;

    /// A checkpoint of a shape has the weights that the model of the shape is given, more than once through the pool.
    #[test]
    fn what_is_stored_are_the_weights() {
        let slices = [700, 1, 1500].map(|rows| SliceSpec { name: "", rows, min_bits: 2 }).to_vec();
        let linear = LinearSpec { rows: 2201, cols: 1024, slices, ..Shape::find("nemotron-h-8b").unwrap().layout.head };
        let random = RandomWeights::new(Format::W16A16);
        let weights = random.weights(&linear, &linear.schemes(Format::W16A16), Format::W16A16);
        let [WeightPart::Float(values)] = &*weights.parts else { panic!("float weights are one part") };
        let bytes: Vec<u8> = values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect();
        assert!(bytes == random.stored(&linear));
    }
}
