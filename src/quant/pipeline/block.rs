//! One block: calibrated, rounded, written as a shard, and passed by both streams.

use std::borrow::Cow;
use std::collections::BTreeMap;

use super::laps::Laps;
use super::{Pipeline, Streams};
use crate::backend::{Backend, SsmInternals, SsmScales};
use crate::checkpoint::{BlockRecord, BlockSpec, Dtype, LinearSpec};
use crate::error::Result;
use crate::format::{BlockKind, ScaleKind, Scheme, SsmActivations};
use crate::model::Block;
use crate::quant::asymmetric;
use crate::quant::calibrate;
use crate::quant::donors::{PartlyQuantized, Place};
use crate::quant::hessian::Hessian;
use crate::quant::method::{QuantizedLinear, quantize_linear};
use crate::quant::observe::{self, StaticScales, Wanted};
use crate::quant::publish::{self, TensorOut};
use crate::quant::recipe::Method;
use crate::quant::weights::{BlockWeights, FloatBlock};

impl<B: Backend> Pipeline<'_, B> {
    pub(super) fn quantize_block(&self, index: usize, streams: &mut Streams<B>) -> Result<BlockRecord> {
        let (spec, checkpoint, plan) = (&self.blocks[index], self.request.checkpoint, &self.request.plan);
        let mut laps = Laps::start();
        let stored = streams.next.take().map_or_else(|| Block::load(self.backend, checkpoint, index), Ok)?;
        let Streams { reference, behind, sequences, .. } = streams;
        let keep = |batch, h| behind.put(self.backend, batch, h);
        // What donors were smoothed by is what they are put together with.
        let watched = if self.request.donors.is_some() { &[] } else { self.request.steps.transforms.as_slice() };
        let seen = calibrate::float_pass(self.backend, checkpoint, (spec, &stored), watched, (reference, sequences), keep)?;
        drop(stored);
        let maxima = self.request.donors.map_or(Ok(seen), |donors| donors.maxima(spec))?;
        laps.end("float pass");
        let weights = self.transforms.block(self.backend, checkpoint, spec, &maxima)?;
        let source = FloatBlock { checkpoint, weights: &weights, transforms: &self.request.steps.transforms };
        let transformed = Block::assemble(self.backend, &checkpoint.config, spec, &source)?;
        laps.end("transforms");
        let mut linears = match self.request.donors {
            Some(donors) => {
                let format = |linear: &LinearSpec, slice: &str| plan.slice(index, &linear.stem, slice);
                donors.assemble(Place::Block(index), &spec.linears, format, |name| weights.linear(name))?
            }
            None => self.round_block(spec, &weights, &transformed, streams, &mut laps)?,
        };
        let scales = self.static_scales(spec, &transformed, &source, streams)?;
        laps.end("static scales");
        for quantized in linears.iter_mut().filter(|(_, quantized)| quantized.int8_activations) {
            quantized.1.input_scale = scales.linears.get(*quantized.0).copied();
        }
        let mut tensors: Vec<TensorOut> = Vec::new();
        for other in &spec.others {
            match weights.tensors.get(&other.name) {
                Some(values) => {
                    let bytes = values.iter().flat_map(|value| (*value as f32).to_le_bytes()).collect();
                    tensors.push((self.stored(&other.name), Dtype::F32, other.shape.clone(), Cow::Owned(bytes)));
                }
                None => tensors.push(self.copy(&other.name)?),
            }
        }
        for linear in &spec.linears {
            self.push_linear(linear, &linears[linear.name.as_str()], &mut tensors)?;
        }
        let kept = scales.internals.as_ref().map(|scales| internal_tensors(spec, scales)).unwrap_or_default();
        tensors.extend(kept.iter().map(|(name, values)| publish::float_vector(self.stored(name), values)));
        publish::write_tensors(&self.files.join(self.shard_name(index)), &tensors)?;
        drop(tensors);
        laps.end("shard");

        let activations = self.request.steps.activations.ssm;
        let internals = match scales.internals {
            Some(scales) => SsmInternals::Int8Static(scales),
            None if activations == SsmActivations::Int8PerToken && plan.blocks[index].quantizes_activations() => SsmInternals::Int8PerToken,
            None => SsmInternals::Float,
        };
        let quantized_block =
            Block::assemble(self.backend, &checkpoint.config, spec, &PartlyQuantized { float: source, linears: &linears, internals })?;
        let mut sums = (0.0, 0.0);
        let (sequences, boundary) = (&streams.sequences, &mut streams.quantized);
        let mut pass = || {
            for (batch, sequences) in sequences.iter().enumerate() {
                self.monitor.check()?;
                let h = boundary.take(self.backend, batch)?;
                let exact = transformed.mix(self.backend, &h, sequences, None, None)?;
                let rounded = quantized_block.mix(self.backend, &h, sequences, None, None)?;
                self.backend.add_difference(&exact, &rounded, &mut sums)?;
                boundary.put(self.backend, batch, self.backend.add(h, &rounded)?)?;
            }
            Ok(())
        };
        if self.room.ahead && index + 1 < self.blocks.len() {
            streams.next = Some(self.backend.beside(|backend| Block::load(backend, checkpoint, index + 1), pass)?);
        } else {
            pass()?;
        }
        std::mem::swap(&mut streams.reference, &mut streams.behind);
        laps.end("quantized pass");
        self.monitor.log(laps.line(&format!("block {index}")));
        Ok(BlockRecord {
            index,
            kind: spec.kind,
            format: plan.blocks[index],
            error: if sums.1 > 0.0 { (sums.0 / sums.1).sqrt() } else { 0.0 },
            bytes: spec.planned_bytes(plan, checkpoint.layout.float_bytes),
            notes: gather_notes(&linears),
        })
    }

    /// The static scales that the plan needs of a block, from what its transformed form reads on the quantized stream.
    fn static_scales(
        &self,
        spec: &BlockSpec,
        transformed: &Block<B>,
        source: &FloatBlock<'_>,
        streams: &Streams<B>,
    ) -> Result<StaticScales> {
        let (steps, plan, config) = (&self.request.steps, &self.request.plan, &self.request.checkpoint.config);
        let int8 = |linear: &LinearSpec| plan.linear(spec.index, &linear.stem).quantizes_activations();
        let internals = spec.kind == BlockKind::Ssm
            && steps.activations.ssm == SsmActivations::Int8Static
            && plan.blocks[spec.index].quantizes_activations();
        let wanted = Wanted {
            linears: steps.activations.linears == ScaleKind::Static && spec.linears.iter().any(int8),
            internals: internals && self.request.donors.is_none(),
        };
        let sample = (&streams.quantized, streams.sequences.as_slice());
        let mut scales = observe::static_scales(self.backend, config, spec, (transformed, source), sample, &steps.observers, wanted)?;
        // What plans were measured with is what is stored.
        if let Some(donors) = self.request.donors.filter(|_| internals)
            && let SsmInternals::Int8Static(kept) = donors.internals(spec)?
        {
            scales.internals = Some(kept);
        }
        Ok(scales)
    }

    /// Rounds the linears of a block, with the Hessians of what the quantized blocks before it hand on.
    fn round_block<'s>(
        &self,
        spec: &'s BlockSpec,
        weights: &BlockWeights,
        transformed: &Block<B>,
        streams: &Streams<B>,
        laps: &mut Laps,
    ) -> Result<BTreeMap<&'s str, QuantizedLinear>> {
        let (plan, index) = (&self.request.plan, spec.index);
        let quantized = |linear: &LinearSpec| linear.planned_schemes(plan, index).iter().any(|scheme| *scheme != Scheme::Float);
        let (method, any) = (self.request.steps.method, spec.linears.iter().any(quantized));
        let hessians = if method.uses_hessians() && any {
            calibrate::hessians(self.backend, spec, transformed, &streams.quantized, &streams.sequences, self.monitor)?
        } else {
            BTreeMap::new()
        };
        let shifts = if method == Method::Gptaq && any {
            let both = (&streams.reference, &streams.quantized);
            asymmetric::shifts(self.backend, spec, transformed, both, self.transforms.rotation(), &streams.sequences, self.monitor)?
        } else {
            BTreeMap::new()
        };
        laps.end("Hessians");
        let mut linears = BTreeMap::new();
        for linear in &spec.linears {
            self.monitor.check()?;
            let hessian = hessians.get(&linear.name).map(|hessian| hessian as &dyn Hessian);
            let rounding = self.rounding(plan.linear(index, &linear.stem), linear.planned_schemes(plan, index));
            let float = weights.linear(&linear.name)?;
            let corrected = shifts.get(&linear.name).filter(|_| quantized(linear)).zip(hessian);
            let corrected = corrected.map(|(shift, hessian)| shift.corrected(float, hessian)).transpose()?.flatten();
            linears.insert(linear.name.as_str(), quantize_linear(corrected.as_ref().unwrap_or(float), linear, &rounding, hessian)?);
        }
        laps.end("rounding");
        Ok(linears)
    }
}

/// What the linears of a block have to say, those of one linear after another under the first one's name.
fn gather_notes(linears: &BTreeMap<&str, QuantizedLinear>) -> Vec<String> {
    let mut gathered: Vec<(&str, &str, usize)> = Vec::new();
    for note in linears.values().flat_map(|quantized| &quantized.notes) {
        let (name, what) = note.split_once(": ").unwrap_or(("", note));
        match gathered.iter_mut().find(|(_, known, _)| *known == what) {
            Some((_, _, count)) => *count += 1,
            None => gathered.push((name, what, 0)),
        }
    }
    let line = |(name, what, more)| if more == 0 { format!("{name}: {what}") } else { format!("{name} and {more} more: {what}") };
    gathered.into_iter().map(line).collect()
}

/// The tensors that keep the scales of a mixer's internals: canonical name, values.
fn internal_tensors(spec: &BlockSpec, scales: &SsmScales) -> Vec<(String, Vec<f32>)> {
    let values = [&scales.z, &scales.conv_in, &scales.conv_out, &scales.dt];
    spec.internal_scales().into_iter().zip(values).map(|(tensor, values)| (tensor.name, values.clone())).collect()
}
