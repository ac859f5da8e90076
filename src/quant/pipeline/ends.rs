//! Embedding, final norm and head, and what the sample's logits say.

use std::borrow::Cow;

use rayon::prelude::*;

use super::laps::Laps;
use super::{Judgement, Pipeline, Streams};
use crate::backend::{Backend, Emit};
use crate::checkpoint::Dtype;
use crate::error::Result;
use crate::format::{Format, LinearWeights, ScaleKind, Transform};
use crate::quant::asymmetric::{self, Shift};
use crate::quant::boundary::FloatHash;
use crate::quant::device_need::logit_rows;
use crate::quant::hessian::{Hessian, Summed};
use crate::quant::method::quantize_linear;
use crate::quant::observe;
use crate::quant::publish::{self, TensorOut};
use crate::quant::recipe::Method;
use crate::quant::weights::FloatLinear;

impl<B: Backend> Pipeline<'_, B> {
    /// Writes embedding, final norm, head and whatever the layout does not know (MTP layers) into the last shard, and
    /// compares the sample's float and quantized logits.
    pub(super) fn write_ends(&self, streams: &Streams<B>) -> Result<Judgement> {
        let (checkpoint, plan, layout) = (self.request.checkpoint, &self.request.plan, &self.request.checkpoint.layout);
        let mut laps = Laps::start();
        let norm = self.transforms.final_norm(checkpoint)?;
        let mut tensors: Vec<TensorOut> = Vec::new();
        if self.request.steps.transforms.contains(&Transform::FoldNorms) {
            let bytes = norm.iter().flat_map(|value| value.to_le_bytes()).collect();
            tensors.push((self.stored(&layout.final_norm.name), Dtype::F32, layout.final_norm.shape.clone(), Cow::Owned(bytes)));
        } else {
            tensors.push(self.copy(&layout.final_norm.name)?);
        }
        self.with_embedding(|rounded| self.push_linear(&layout.embedding, rounded, &mut tensors))?;
        laps.end("embedding");
        let float_head = self.transforms.head(self.backend, checkpoint)?;
        laps.end("transforms");
        let mut head = match self.request.donors {
            Some(donors) => donors.head_linear(&float_head, &layout.head, plan.head)?,
            None => {
                let rounding = self.rounding(plan.head, layout.head.schemes(plan.head));
                let (hessian, shift) = self.head_moments(&float_head, &norm, streams)?.unzip();
                let hessian = hessian.as_ref().map(|hessian| hessian as &dyn Hessian);
                let corrected = shift.flatten().zip(hessian).map(|(shift, hessian)| shift.corrected(&float_head, hessian));
                let corrected = corrected.transpose()?.flatten();
                quantize_linear(corrected.as_ref().unwrap_or(&float_head), &layout.head, &rounding, hessian)?
            }
        };
        laps.end("rounding");
        head.input_scale = self.head_scale(&norm, streams)?;
        // A tied head is stored apart as soon as it or the embedding is changed.
        if !layout.tied {
            self.push_linear(&layout.head, &head, &mut tensors)?;
        } else if self.unties() {
            self.monitor.warn("embedding and head were tied; each is now stored for itself");
            if head.float().is_some() && !head.changed {
                let (_, dtype, shape, bytes) = self.copy("embeddings.weight")?;
                tensors.push(("lm_head.weight".into(), dtype, shape, bytes));
            } else {
                self.push_linear(&layout.head, &head, &mut tensors)?;
            }
        }
        let extra = || checkpoint.tensors().filter(|(name, _)| name.starts_with("mtp."));
        // They read the residual stream and the head's input, which the transforms change.
        if self.request.steps.transforms.iter().any(|transform| transform.turns_residual() || *transform == Transform::FoldNorms) {
            let dropped = extra().count();
            if dropped > 0 {
                self.monitor.warn(format!("{dropped} tensors of MTP layers are left out: they do not fit the transformed stream and head"));
            }
        } else {
            for (name, tensor) in extra() {
                tensors.push((name.to_owned(), tensor.dtype, tensor.shape.to_vec(), Cow::Owned(tensor.bytes()?.to_vec())));
            }
        }
        publish::write_tensors(&self.files.join(self.shard_name(self.blocks.len())), &tensors)?;
        laps.end("shard");

        let original_norm = checkpoint.read(&layout.final_norm.name)?;
        let (reference, quantized) = (self.backend.prepare(checkpoint.head()?)?, self.backend.prepare(head.weights(layout.head.cols))?);
        let (original_norm, norm) = (self.backend.prepare_vector(original_norm)?, self.backend.prepare_vector(norm)?);
        let logits = |head, norm, h: &B::Tensor, tokens: &[usize]| {
            let rows = self.backend.gather_rows(h, tokens)?;
            let x = self.backend.rms_norm(&rows, norm, checkpoint.config.norm_eps, self.backend.reads(head))?;
            self.backend.linear(head, &x)
        };
        let (mut rows, mut hash) = (Vec::new(), FloatHash::default());
        let both = streams.reference.iter(self.backend).zip(streams.quantized.iter(self.backend));
        for ((float, h), sequences) in both.zip(&streams.sequences) {
            let (float, h) = (float?, h?);
            for tokens in logit_pieces(sequences.tokens(), layout.head.rows) {
                let exact = logits(&reference, &original_norm, &float, &tokens)?;
                let rounded = logits(&quantized, &norm, &h, &tokens)?;
                hash.add_tensor(self.backend, &rounded, "the head")?;
                rows.extend(self.backend.divergence(&exact, &rounded)?);
            }
        }
        laps.end("logits");
        self.monitor.log(laps.line("embedding and head"));
        Ok(Judgement { rows, hash: hash.finish() })
    }

    /// Whether a tied model's embedding and head are no longer the same.
    pub(super) fn unties(&self) -> bool {
        let plan = &self.request.plan;
        plan.head != Format::W16A16 || plan.embedding != Format::W16A16 || self.request.steps.transforms.contains(&Transform::FoldNorms)
    }

    /// The static scale of the head's input, where it has one.
    fn head_scale(&self, norm: &[f32], streams: &Streams<B>) -> Result<Option<f32>> {
        let steps = &self.request.steps;
        if steps.activations.linears != ScaleKind::Static || !self.request.plan.head.quantizes_activations() {
            return Ok(None);
        }
        let eps = self.request.checkpoint.config.norm_eps;
        let norm = self.backend.prepare_vector(norm.to_vec())?;
        let inputs = streams.quantized.iter(self.backend).map(|h| self.backend.rms_norm(&h?, &norm, eps, Emit::FLOAT));
        observe::head_scale(self.backend, inputs, &steps.observers).map(Some)
    }

    /// The Hessian of the head's input, where the method uses one, and the shift where that is corrected too. A token counts by how undecided the model is about what
    /// follows, `1 − Σ p²`: that is the Fisher information of its logits summed over the vocabulary, so that the loss is
    /// the divergence that an error of the logits makes and not the error itself.
    fn head_moments(&self, head: &FloatLinear, norm: &[f32], streams: &Streams<B>) -> Result<Option<(Summed<'_, B>, Option<Shift>)>> {
        let method = self.request.steps.method;
        if !method.uses_hessians() || self.request.plan.head.weight_bits() == 16 {
            return Ok(None);
        }
        let cols = norm.len();
        let head = self.backend.prepare(LinearWeights::float(head.values(), cols))?;
        let norm = self.backend.prepare_vector(norm.to_vec())?;
        let normalize = |h: &B::Tensor| self.backend.rms_norm(h, &norm, self.request.checkpoint.config.norm_eps, Emit::FLOAT);
        let mut sum = None;
        let mut shift = (method == Method::Gptaq).then(Shift::default);
        for (float, h) in streams.reference.iter(self.backend).zip(streams.quantized.iter(self.backend)) {
            let x = normalize(&h?)?;
            let logits = self.backend.linear(&head, &x)?;
            let mut values = self.backend.floats(&x)?;
            let weights: Vec<f32> = self.backend.undecidedness(&logits)?.into_iter().map(|weight| weight.sqrt() as f32).collect();
            let weigh = |values: &mut [f32]| {
                let rows = values.par_chunks_exact_mut(cols).zip(&weights);
                rows.for_each(|(row, weight)| row.iter_mut().for_each(|x| *x *= weight));
            };
            weigh(&mut values);
            if let Some(shift) = &mut shift {
                let turned = asymmetric::turned(self.backend, &float?, self.transforms.rotation())?;
                let mut float = self.backend.floats(&normalize(&turned)?)?;
                weigh(&mut float);
                shift.add(&float, &values, cols);
            }
            let x = self.backend.emit(self.backend.upload(values, cols)?, Emit::FLOAT)?;
            self.backend.add_gram(&mut sum, &x)?;
        }
        let sum = sum.map(|sum| Summed::new(self.backend, sum)).transpose()?;
        Ok(sum.map(|sum| (sum, shift)))
    }
}

/// Tokens of a sequence in pieces of [`logit_rows`].
pub(super) fn logit_pieces(tokens: usize, vocabulary: usize) -> impl Iterator<Item = Vec<usize>> {
    let piece = logit_rows(vocabulary);
    (0..tokens).step_by(piece).map(move |start| (start..tokens.min(start + piece)).collect())
}
