//! Mixture of experts: sigmoid router in f32, chosen experts, shared expert, optional latent projections.

use super::block::{Mlp, Tap, observe};
use crate::backend::{Assignment, Backend, Emit, RouterShape};
use crate::checkpoint::MoeConfig;
use crate::error::Result;
use crate::format::LinearWeights;

/// How a mixture's router chooses.
pub fn router_shape(moe: &MoeConfig) -> RouterShape {
    RouterShape {
        experts: moe.experts,
        experts_per_token: moe.experts_per_token,
        groups: moe.groups,
        top_groups: moe.top_groups,
        normalize: moe.normalize,
        scaling: moe.scaling,
    }
}

pub(super) struct Moe<B: Backend> {
    router: RouterShape,
    /// Router `[experts, hidden]`, always in float.
    gate: B::Linear,
    /// Added to the scores for choosing, not for weighting.
    correction: B::Vector,
    experts: Vec<Mlp<B>>,
    /// The experts as the device computes them at once, where it does.
    at_once: Option<B::Experts>,
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
        let experts: Vec<Mlp<B>> = (0..config.experts).map(|expert| mlp(&format!("experts.{expert}"))).collect::<Result<_>>()?;
        Ok(Self {
            at_once: backend.prepare_experts(&experts.iter().map(Mlp::linears).collect::<Vec<_>>())?,
            experts,
            gate: backend.prepare(LinearWeights::float(tensor("gate.weight")?, hidden))?,
            correction: backend.prepare_vector(tensor("gate.e_score_correction_bias")?)?,
            shared: if config.shared_intermediate > 0 { Some(mlp("shared_experts")?) } else { None },
            latent: match config.latent {
                Some(_) => Some((linear("fc1_latent_proj")?, linear("fc2_latent_proj")?)),
                None => None,
            },
            router: router_shape(config),
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
        let latent = match &self.latent {
            Some((into, _)) => {
                observe::<B>(tap, "fc1_latent_proj", x)?;
                Some(backend.emit(backend.linear(into, x)?, self.experts_read(backend))?)
            }
            None => None,
        };
        let input = latent.as_ref().unwrap_or(x);
        let mut out = match &self.at_once {
            Some(experts) if tap.is_none() => backend.mixture(experts, input, &raw, &self.correction, &self.router)?,
            _ => self.one_after_another(backend, input, &raw, tap)?,
        };
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

    /// The weighted sum of the experts, each applied to the tokens that chose it; `tap` sees those. The same as
    /// [`Backend::mixture`], to the bit where linears are integer products.
    fn one_after_another(&self, backend: &B, x: &B::Activation, raw: &B::Tensor, tap: Option<&Tap<'_, B>>) -> Result<B::Tensor> {
        // Experts are added in ascending order.
        let assigned = backend.route(raw, &self.correction, &self.router)?;
        let tokens = backend.rows(raw);
        let mut sum: Option<B::Tensor> = None;
        for (expert, Assignment { tokens: chosen, weights }) in self.experts.iter().zip(&assigned) {
            if chosen.is_empty() {
                continue;
            }
            let out = expert.forward(backend, &backend.gather(x, chosen)?, tap, None)?;
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
        sum.ok_or_else(|| crate::error::Error::run("a mixture of experts was given no tokens"))
    }

    /// Whether a decoding step through it can be recorded: experts that are computed one after another are launched as the
    /// router chose.
    pub(super) fn is_recordable(&self) -> bool {
        self.at_once.is_some()
    }

    pub(super) fn resident_bytes(&self, backend: &B) -> u64 {
        self.read_bytes(backend, self.router.experts)
    }

    /// Bytes of its linears that `tokens` tokens read, which may choose different experts, of a mean size.
    pub(super) fn read_bytes(&self, backend: &B, tokens: usize) -> u64 {
        let latent = self.latent.iter().map(|(into, back)| backend.resident_bytes(into) + backend.resident_bytes(back)).sum::<u64>();
        let shared = self.shared.iter().map(|mlp| mlp.resident_bytes(backend)).sum::<u64>();
        let experts = self.experts.iter().map(|mlp| mlp.resident_bytes(backend)).sum::<u64>();
        let read = (tokens * self.router.experts_per_token).min(self.experts.len()) as u64;
        latent + shared + experts * read / self.experts.len() as u64
    }
}
