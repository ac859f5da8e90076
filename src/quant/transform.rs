//! The transforms applied to weights: folded norms, smoothing and fused rotations, in that order.

use faer::{Mat, MatRef};

use super::calibrate::Maxima;
use super::eigen::eigenvectors;
use super::hadamard;
use super::smooth;
use super::weights::{BlockWeights, FloatLinear};
use crate::backend::{Backend, Side};
use crate::checkpoint::{BlockSpec, Checkpoint};
use crate::error::{Error, Result};
use crate::format::{BlockKind, Transform};

/// The transforms of a run, with the rotation of the residual stream where there is one.
#[derive(Clone)]
pub struct Transforms {
    pub list: Vec<Transform>,
    /// Q `[hidden, hidden]`: the rotated stream is `h Q`.
    rotation: Option<Mat<f64>>,
}

impl Transforms {
    /// Checks the order that the transforms need: a rotated residual needs folded norms. `second_moment` `[hidden, hidden]`
    /// is that of the normalised stream, needed for the rotation only.
    pub fn new<B: Backend>(backend: &B, list: &[Transform], second_moment: Option<&[f64]>, hidden: usize) -> Result<Self> {
        let turning: Vec<Transform> = list.iter().copied().filter(|transform| transform.turns_residual()).collect();
        let rotation = match turning.as_slice() {
            [] => None,
            [one] if !list.contains(&Transform::FoldNorms) => {
                return Err(Error::input(format!("{one} needs fold-norms: a norm's weight does not commute with a rotation"))
                    .hint("add \"fold-norms\" to the recipe's transforms"));
            }
            [Transform::RotateResidual] => Some(residual_rotation(backend, second_moment, hidden)?),
            [_] => Some(hadamard::for_width(hidden).0),
            _ => {
                return Err(
                    Error::input("rotate-residual and hadamard-residual both rotate the residual stream").hint("keep one of the two")
                );
            }
        };
        Ok(Self { list: list.to_vec(), rotation })
    }

    /// Q `[hidden, hidden]` where the residual stream is rotated: the rotated stream is `h Q`.
    pub fn rotation(&self) -> Option<MatRef<'_, f64>> {
        self.rotation.as_ref().map(Mat::as_ref)
    }

    fn has(&self, transform: Transform) -> bool {
        self.list.contains(&transform)
    }

    /// Reads a block and applies the transforms to it; `backend` turns weights. `maxima` are those of its linears' inputs in the float model;
    /// only smoothing needs them.
    pub fn block<B: Backend>(&self, backend: &B, checkpoint: &Checkpoint, spec: &BlockSpec, maxima: &Maxima) -> Result<BlockWeights> {
        let mut weights = BlockWeights::read(checkpoint, spec)?;
        let (readers, writers) = (spec.residual_readers(), spec.residual_writers());
        let gate = format!("{}mixer.gate.weight", spec.prefix);
        if spec.kind == BlockKind::Moe && self.has(Transform::FoldNorms) {
            let rows = checkpoint.config.moe.experts;
            let router = FloatLinear::read(checkpoint, gate.trim_end_matches(".weight"), rows, checkpoint.config.hidden_size, false)?;
            weights.linears.insert("gate".into(), router);
        }
        if self.has(Transform::FoldNorms) {
            let name = format!("{}norm.weight", spec.prefix);
            let norm: Vec<f64> = checkpoint.read(&name)?.into_iter().map(f64::from).collect();
            for reader in readers.iter().copied().chain(weights.linears.contains_key("gate").then_some("gate")) {
                weights.linear_mut(reader)?.scale_inputs(&norm);
            }
            weights.tensors.insert(name, vec![1.0; norm.len()]);
        }
        match spec.kind {
            BlockKind::Ssm => {
                self.gated_norm(&mut weights, checkpoint, spec, maxima)?;
                if self.has(Transform::SmoothConv) {
                    smooth::convolution(&mut weights, checkpoint, spec, maxima)?;
                }
            }
            BlockKind::Attention => {
                if self.has(Transform::SmoothVo) {
                    smooth::values(&mut weights, checkpoint, maxima)?;
                }
                self.rotate_heads(backend, &mut weights, checkpoint)?;
            }
            BlockKind::Mlp | BlockKind::Moe if self.has(Transform::SmoothRelu2) => smooth::relu2(&mut weights, spec, maxima)?,
            BlockKind::Mlp | BlockKind::Moe => {}
        }
        if let Some(rotation) = &self.rotation {
            for reader in readers.iter().copied().chain(weights.linears.contains_key("gate").then_some("gate")) {
                weights.linear_mut(reader)?.rotate_inputs(backend, rotation.as_ref())?;
            }
            for writer in writers {
                weights.linear_mut(writer)?.rotate_outputs(backend, rotation.as_ref())?;
            }
        }
        for linear in &spec.linears {
            if let Some(block) = linear.hadamard(&self.list) {
                weights.linear_mut(&linear.name)?.transform_inputs(backend, block)?;
            }
        }
        if let Some(router) = weights.linears.remove("gate") {
            weights.tensors.insert(gate, router.values().into_iter().map(f64::from).collect());
        }
        for linear in spec.linears.iter().filter(|linear| linear.bias) {
            let float = weights.linear(&linear.name)?;
            if let (true, Some(bias)) = (float.changed, float.bias.clone()) {
                weights.tensors.insert(format!("{}.bias", linear.stem), bias);
            }
        }
        Ok(weights)
    }

    /// The gated norm's weight: folded into `out_proj`, then a scale that evens out what `out_proj` reads.
    fn gated_norm(&self, weights: &mut BlockWeights, checkpoint: &Checkpoint, spec: &BlockSpec, maxima: &Maxima) -> Result<()> {
        if !self.has(Transform::FoldNorms) && !self.has(Transform::SmoothOut) {
            return Ok(());
        }
        let name = format!("{}mixer.norm.weight", spec.prefix);
        let before: Vec<f64> = checkpoint.read(&name)?.into_iter().map(f64::from).collect();
        let mut now = before.clone();
        if self.has(Transform::FoldNorms) {
            weights.linear_mut("out_proj")?.scale_inputs(&before);
            now.fill(1.0);
        }
        if self.has(Transform::SmoothOut) {
            smooth::out(weights, maxima, &before, &mut now)?;
        }
        weights.tensors.insert(name, now);
        Ok(())
    }

    /// Per-head Hadamard R on values (`v' = Rᵀ v`, undone by every query head of the group in `o_proj`), and on queries
    /// and keys, whose products it leaves alone.
    fn rotate_heads<B: Backend>(&self, backend: &B, weights: &mut BlockWeights, checkpoint: &Checkpoint) -> Result<()> {
        let shape = &checkpoint.config.attention;
        let rotation = hadamard::for_width(shape.head_dim).0;
        let across = |heads: usize| {
            let d = shape.head_dim;
            Mat::from_fn(heads * d, heads * d, |i, j| if i / d == j / d { rotation[(i % d, j % d)] } else { 0.0 })
        };
        if self.has(Transform::RotateVo) {
            weights.linear_mut("v_proj")?.rotate_outputs(backend, across(shape.kv_heads).as_ref())?;
            weights.linear_mut("o_proj")?.rotate_inputs(backend, across(shape.heads).as_ref())?;
        }
        if self.has(Transform::RotateQk) {
            weights.linear_mut("q_proj")?.rotate_outputs(backend, across(shape.heads).as_ref())?;
            weights.linear_mut("k_proj")?.rotate_outputs(backend, across(shape.kv_heads).as_ref())?;
        }
        Ok(())
    }

    /// The embedding table.
    pub fn embedding<B: Backend>(&self, backend: &B, checkpoint: &Checkpoint) -> Result<FloatLinear> {
        let spec = &checkpoint.layout.embedding;
        let mut table = FloatLinear::read(checkpoint, &spec.stem, spec.rows, spec.cols, false)?;
        if let Some(rotation) = &self.rotation {
            table.rotate_inputs(backend, rotation.as_ref())?;
        }
        Ok(table)
    }

    /// The head (the embedding's weights where they are tied), with the final norm's weight folded in where norms are.
    pub fn head<B: Backend>(&self, backend: &B, checkpoint: &Checkpoint) -> Result<FloatLinear> {
        let spec = &checkpoint.layout.head;
        let stem = if checkpoint.layout.tied { &checkpoint.layout.embedding.stem } else { &spec.stem };
        let mut head = FloatLinear::read(checkpoint, stem, spec.rows, spec.cols, false)?;
        if self.has(Transform::FoldNorms) {
            let norm: Vec<f64> = checkpoint.read(&checkpoint.layout.final_norm.name)?.into_iter().map(f64::from).collect();
            head.scale_inputs(&norm);
        }
        if let Some(rotation) = &self.rotation {
            head.rotate_inputs(backend, rotation.as_ref())?;
        }
        Ok(head)
    }

    /// The final norm's weight.
    pub fn final_norm(&self, checkpoint: &Checkpoint) -> Result<Vec<f32>> {
        let norm = checkpoint.read(&checkpoint.layout.final_norm.name)?;
        Ok(if self.has(Transform::FoldNorms) { vec![1.0; norm.len()] } else { norm })
    }
}

/// Q = K·H: K the eigenvectors of the second moment of the normalised stream, H a Hadamard matrix, so that every
/// channel of the rotated stream has the same variance.
fn residual_rotation<B: Backend>(backend: &B, second_moment: Option<&[f64]>, hidden: usize) -> Result<Mat<f64>> {
    let moment = second_moment.ok_or_else(|| Error::run("rotate-residual was given no second moment"))?;
    let symmetric = Mat::from_fn(hidden, hidden, |i, j| 0.5 * (moment[i * hidden + j] + moment[j * hidden + i]));
    let mut rotation = eigenvectors(symmetric.as_ref()).map_err(|error| error.context("the residual stream's second moment"))?;
    let (hadamard, _) = hadamard::for_width(hidden);
    backend.turn(rotation.as_mut(), hadamard.as_ref(), Side::Inputs)?;
    Ok(rotation)
}
