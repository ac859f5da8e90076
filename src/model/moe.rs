//! Mixture of experts: sigmoid router in f32, chosen experts, shared expert, optional latent projections.

use super::block::{Mlp, Tap, observe};
use crate::backend::{Backend, Emit};
use crate::checkpoint::MoeConfig;
use crate::error::Result;
use crate::format::LinearWeights;

pub(super) struct Moe<B: Backend> {
    config: MoeConfig,
    /// Router `[experts, hidden]`, always in float.
    gate: B::Linear,
    /// Added to the scores for choosing, not for weighting.
    correction: Vec<f32>,
    experts: Vec<Mlp<B>>,
    shared: Option<Mlp<B>>,
    /// Into and out of the experts' latent space.
    latent: Option<(B::Linear, B::Linear)>,
}

impl<B: Backend> Moe<B> {
    pub(super) fn assemble(
        backend: &B,
        config: &MoeConfig,
        tensor: &dyn Fn(&str) -> Result<Vec<f32>>,
        linear: &dyn Fn(&str) -> Result<B::Linear>,
        hidden: usize,
    ) -> Result<Self> {
        let mlp = |name: &str| Ok(Mlp::new(format!("{name}."), linear(&format!("{name}.up_proj"))?, linear(&format!("{name}.down_proj"))?));
        Ok(Self {
            gate: backend.prepare(LinearWeights::float(tensor("gate.weight")?, hidden))?,
            correction: tensor("gate.e_score_correction_bias")?,
            experts: (0..config.experts).map(|expert| mlp(&format!("experts.{expert}"))).collect::<Result<_>>()?,
            shared: if config.shared_intermediate > 0 { Some(mlp("shared_experts")?) } else { None },
            latent: match config.latent {
                Some(_) => Some((linear("fc1_latent_proj")?, linear("fc2_latent_proj")?)),
                None => None,
            },
            config: config.clone(),
        })
    }

    /// The forms in which the experts read the block's input; the router reads floats besides.
    pub(super) fn reads(&self, backend: &B) -> Emit {
        let routed = match &self.latent {
            Some((into, _)) => backend.reads(into),
            None => self.experts_read(backend),
        };
        self.shared.iter().fold(routed, |emit, shared| emit.and(shared.reads(backend)))
    }

    fn experts_read(&self, backend: &B) -> Emit {
        self.experts.iter().fold(Emit::NONE, |emit, expert| emit.and(expert.reads(backend)))
    }

    pub(super) fn forward(&self, backend: &B, x: &B::Activation, tap: Option<&Tap<'_, B>>) -> Result<B::Tensor> {
        let scores = backend.download(&backend.linear(&self.gate, x)?)?;
        let tokens = scores.len() / self.config.experts;
        // For each expert the tokens that chose it, with their weights; experts are added in ascending order.
        let mut assigned = vec![(Vec::new(), Vec::new()); self.config.experts];
        for (token, scores) in scores.chunks_exact(self.config.experts).enumerate() {
            for (expert, weight) in self.route(scores) {
                assigned[expert].0.push(token);
                assigned[expert].1.push(weight);
            }
        }
        let latent = match &self.latent {
            Some((into, _)) => {
                observe::<B>(tap, "fc1_latent_proj", x)?;
                Some(backend.emit(backend.linear(into, x)?, self.experts_read(backend))?)
            }
            None => None,
        };
        let input = latent.as_ref().unwrap_or(x);
        let mut sum: Option<B::Tensor> = None;
        for (expert, (chosen, weights)) in self.experts.iter().zip(&assigned) {
            if chosen.is_empty() {
                continue;
            }
            let out = expert.forward(backend, &backend.gather(input, chosen)?, tap)?;
            let into = match sum.take() {
                Some(sum) => sum,
                None => {
                    let width = backend.features(&out);
                    backend.upload(vec![0.0; tokens * width], width)?
                }
            };
            sum = Some(backend.scatter_add(into, &out, chosen, weights)?);
        }
        // At least one expert is chosen for every token, so there is a sum whenever there are tokens.
        let mut out = sum.ok_or_else(|| crate::error::Error::run("a mixture of experts was given no tokens"))?;
        if let Some((_, back)) = &self.latent {
            let x = backend.emit(out, backend.reads(back))?;
            observe::<B>(tap, "fc2_latent_proj", &x)?;
            out = backend.linear(back, &x)?;
        }
        match &self.shared {
            Some(shared) => backend.add(out, &shared.forward(backend, x, tap)?),
            None => Ok(out),
        }
    }

    /// The experts of one token with their weights, from the router's raw outputs `[experts]`.
    fn route(&self, raw: &[f32]) -> Vec<(usize, f32)> {
        let config = &self.config;
        let scores: Vec<f32> = raw.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect();
        let mut choice: Vec<f32> = scores.iter().zip(&self.correction).map(|(score, correction)| score + correction).collect();
        let size = config.experts / config.groups;
        if config.top_groups < config.groups {
            let group_scores: Vec<f32> =
                choice.chunks_exact(size).map(|group| largest(group, 2).into_iter().map(|expert| group[expert]).sum()).collect();
            let kept = largest(&group_scores, config.top_groups);
            for (group, choice) in choice.chunks_exact_mut(size).enumerate() {
                if !kept.contains(&group) {
                    choice.fill(f32::NEG_INFINITY);
                }
            }
        }
        let chosen = largest(&choice, config.experts_per_token);
        let total: f32 = if config.normalize { chosen.iter().map(|expert| scores[*expert]).sum::<f32>() + 1e-20 } else { 1.0 };
        chosen.into_iter().map(|expert| (expert, scores[expert] / total * config.scaling)).collect()
    }

    pub(super) fn resident_bytes(&self, backend: &B) -> u64 {
        let latent = self.latent.iter().map(|(into, back)| backend.resident_bytes(into) + backend.resident_bytes(back)).sum::<u64>();
        latent + self.experts.iter().chain(&self.shared).map(|mlp| mlp.resident_bytes(backend)).sum::<u64>()
    }
}

/// Indices of the `count` largest values, the first of equals first.
fn largest(values: &[f32], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*b].total_cmp(&values[*a]));
    order.truncate(count);
    order
}
