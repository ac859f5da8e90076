//! Mixture of experts: sigmoid router in f32, chosen experts, shared expert, optional latent projections.

use super::block::{Mlp, Tap, observe};
use crate::backend::{Assignment, Backend, Emit, RouterShape};
use crate::checkpoint::MoeConfig;
use crate::error::Result;
use crate::format::LinearWeights;

pub(super) struct Moe<B: Backend> {
    router: RouterShape,
    /// Router `[experts, hidden]`, always in float.
    gate: B::Linear,
    /// Added to the scores for choosing, not for weighting.
    correction: B::Vector,
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
            correction: backend.prepare_vector(tensor("gate.e_score_correction_bias")?)?,
            experts: (0..config.experts).map(|expert| mlp(&format!("experts.{expert}"))).collect::<Result<_>>()?,
            shared: if config.shared_intermediate > 0 { Some(mlp("shared_experts")?) } else { None },
            latent: match config.latent {
                Some(_) => Some((linear("fc1_latent_proj")?, linear("fc2_latent_proj")?)),
                None => None,
            },
            router: RouterShape {
                experts: config.experts,
                experts_per_token: config.experts_per_token,
                groups: config.groups,
                top_groups: config.top_groups,
                normalize: config.normalize,
                scaling: config.scaling,
            },
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
        let raw = backend.linear(&self.gate, x)?;
        // Experts are added in ascending order.
        let assigned = backend.route(&raw, &self.correction, &self.router)?;
        let tokens = backend.rows(&raw);
        let latent = match &self.latent {
            Some((into, _)) => {
                observe::<B>(tap, "fc1_latent_proj", x)?;
                Some(backend.emit(backend.linear(into, x)?, self.experts_read(backend))?)
            }
            None => None,
        };
        let input = latent.as_ref().unwrap_or(x);
        let mut sum: Option<B::Tensor> = None;
        for (expert, Assignment { tokens: chosen, weights }) in self.experts.iter().zip(&assigned) {
            if chosen.is_empty() {
                continue;
            }
            let out = expert.forward(backend, &backend.gather(input, chosen)?, tap, None)?;
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
            Some(shared) => backend.add(out, &shared.forward(backend, x, tap, None)?),
            None => Ok(out),
        }
    }

    pub(super) fn resident_bytes(&self, backend: &B) -> u64 {
        let latent = self.latent.iter().map(|(into, back)| backend.resident_bytes(into) + backend.resident_bytes(back)).sum::<u64>();
        latent + self.experts.iter().chain(&self.shared).map(|mlp| mlp.resident_bytes(backend)).sum::<u64>()
    }
}
