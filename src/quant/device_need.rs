//! What quantizing takes of a device with memory of its own, before it starts: step by step what the pipeline holds there at once.
//! Start with [`DeviceNeed::of`].

use super::recipe::{Method, Steps};
use crate::backend::Side;
use crate::backend::cuda::footprint::{self as on, Kept};
use crate::checkpoint::{BlockSpec, Config, Layout, LinearSpec};
use crate::error::{Error, Result};
use crate::format::{BlockKind, Format, Plan, Scheme, SsmActivations, Transform};
use crate::model::{PIECE, attention_shape, mamba_shape, router_shape};

/// Tokens whose logits, of `vocabulary` entries each, take at most 32 MiB.
pub(super) fn logit_rows(vocabulary: usize) -> usize {
    ((1 << 23) / vocabulary).max(1)
}

/// Small buffers that no step counts: tables of sequences, scales, sums, norms.
const SMALL: u64 = 1 << 18;

/// What is quantized, by its shapes.
#[derive(Debug, Clone, Copy)]
pub struct Shapes<'a> {
    pub layout: &'a Layout,
    pub config: &'a Config,
    /// Whether the checkpoint's linears are in bf16, which devices keep as it is.
    pub bf16: bool,
    pub steps: &'a Steps,
    pub plan: &'a Plan,
    /// Whether codes are chosen by Hessians, and not taken from elsewhere.
    pub hessians: bool,
    /// Tokens of each sequence of the sample.
    pub lengths: &'a [usize],
}

/// Bytes of a device's memory, from shapes: never less than what is then found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceNeed {
    /// One residual stream of the sample.
    pub stream: u64,
    /// A pass of a whole model over the sample, besides the stream that waits: the second moment's, and validation.
    pub pass: u64,
    /// The largest block at the step that takes most, besides the three streams that wait.
    pub block: u64,
    /// The same of embedding and head.
    pub ends: u64,
    /// `pass` and `block` with the next block read meanwhile.
    pub ahead: [u64; 2],
}

/// What a device has room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// The sample's streams.
    pub streams: bool,
    /// The next block while one is at work.
    pub ahead: bool,
    /// What is then taken at most.
    pub bytes: u64,
}

/// Residual streams that wait while blocks are quantized.
const STREAMS: u64 = 3;

impl DeviceNeed {
    /// What quantizing these shapes takes.
    pub fn of(shapes: &Shapes<'_>) -> Self {
        let hidden = shapes.config.hidden_size;
        let steps = || shapes.layout.blocks.iter().map(|spec| Step { shapes, spec });
        let stored = steps().map(|step| step.weights(|_| vec![shapes.stored()])).max().unwrap_or(0);
        let quantized = steps().map(|step| step.weights(|linear| step.quantized(linear))).max().unwrap_or(0);
        let (moment, validation) = (shapes.second_moment(), shapes.validation());
        let moment_ahead = if moment > 0 { moment + stored } else { 0 };
        let block = steps().map(|step| step.largest()).max().unwrap_or(0);
        let passed = steps().map(|step| step.passed()).max().unwrap_or(0);
        Self {
            stream: shapes.lengths.iter().map(|tokens| on::tensor(*tokens, hidden)).sum(),
            pass: SMALL + moment.max(validation),
            block: SMALL + block,
            ends: SMALL + shapes.ends(),
            ahead: [SMALL + moment_ahead.max(validation + quantized), SMALL + block.max(passed + stored)],
        }
    }

    /// With the sample's streams on the device or elsewhere, from where a batch at a time is brought; with the next block there before
    /// one is done, or not.
    pub fn bytes(&self, streams: bool, ahead: bool) -> u64 {
        let stream = if streams { self.stream } else { 0 };
        let [pass, block] = if ahead { self.ahead } else { [self.pass, self.block] };
        (stream + pass).max(STREAMS * stream + block.max(self.ends))
    }

    /// What `free` bytes have room for, the streams first; an error where not even the largest step fits. `device` is its name.
    pub fn within(&self, free: u64, device: &str) -> Result<Room> {
        let choices = [(true, true), (true, false), (false, true), (false, false)];
        let rooms = choices.map(|(streams, ahead)| Room { streams, ahead, bytes: self.bytes(streams, ahead) });
        if let Some(room) = rooms.into_iter().find(|room| room.bytes <= free) {
            return Ok(room);
        }
        let parts = [(self.block, "the largest block"), (self.ends, "embedding and head"), (self.pass, "a pass over the sample")];
        let largest = parts.iter().max_by_key(|(bytes, _)| *bytes).map_or("", |(_, name)| *name);
        let least = gib(self.bytes(false, false));
        Err(Error::input(format!(
            "quantizing takes about {least} of the memory of {device} for {largest}, the sample's streams not counted, where {} are free",
            gib(free)
        ))
        .hint(format!("a device with {least} free would do; shorter sequences or the method rtn take less, or --device cpu")))
    }

    /// In words.
    pub fn statement(&self) -> String {
        format!(
            "needs at most {} of the device's memory with the sample's streams there, {} with them in the host's",
            gib(self.bytes(true, false)),
            gib(self.bytes(false, false))
        )
    }
}

fn gib(bytes: u64) -> String {
    format!("{:.2} GiB", bytes as f64 / f64::from(1 << 30))
}

impl Shapes<'_> {
    fn longest(&self) -> usize {
        self.lengths.iter().copied().max().unwrap_or(0)
    }

    fn stored(&self) -> Kept {
        if self.bf16 { Kept::Bf16 } else { Kept::F32 }
    }

    /// Residual streams of one batch.
    fn batch(&self, count: u64) -> u64 {
        count * on::tensor(self.longest(), self.config.hidden_size)
    }

    /// Embedding and head in these forms.
    fn both_ends(&self, embedding: Kept, head: Kept) -> u64 {
        let bytes = |linear: &LinearSpec, kept| on::weights(kept, linear.rows, linear.cols);
        bytes(&self.layout.embedding, embedding) + bytes(&self.layout.head, head)
    }

    fn planned(&self, linear: &LinearSpec, format: Format) -> Kept {
        match linear.schemes(format).first() {
            None | Some(Scheme::Float) => self.stored(),
            Some(scheme) => Kept::Quantized(*scheme),
        }
    }

    fn has(&self, transform: Transform) -> bool {
        self.steps.transforms.contains(&transform)
    }

    fn turns_residual(&self) -> bool {
        self.steps.transforms.iter().any(|transform| transform.turns_residual())
    }

    /// The float model's pass for the rotation of the residual stream.
    fn second_moment(&self) -> u64 {
        if !self.has(Transform::RotateResidual) {
            return 0;
        }
        let hidden = self.config.hidden_size;
        let turned = on::gram(hidden) + on::turn(hidden, hidden, Side::Inputs);
        let observed = on::gram(hidden) + on::add_gram(hidden, self.longest()) + self.batch(2);
        let passed = self.layout.blocks.iter().map(|spec| {
            let step = Step { shapes: self, spec };
            step.weights(|_| vec![self.stored()]) + step.mixer(|_| self.stored()) + self.batch(3)
        });
        let passes = on::gram(hidden) + passed.max().unwrap_or(0);
        turned.max(self.both_ends(self.stored(), self.stored()) + observed.max(passes))
    }

    /// A linear at work on `tokens` tokens, weights not counted.
    fn at_work(kept: Kept, linear: &LinearSpec, tokens: usize) -> u64 {
        on::activations(linear.rows, linear.cols, tokens) + on::product(kept, linear.rows, linear.cols, tokens)
    }

    /// The finished variant's pass.
    fn validation(&self) -> u64 {
        let (layout, plan) = (self.layout, self.plan);
        let passed = layout.blocks.iter().map(|spec| {
            let step = Step { shapes: self, spec };
            step.weights(|linear| step.quantized(linear)) + step.mixer(|linear| step.quantized(linear)[0]) + self.batch(3)
        });
        let (embedding, head) = (self.planned(&layout.embedding, plan.embedding), self.planned(&layout.head, plan.head));
        let rows = logit_rows(layout.head.rows).min(self.longest());
        let logits = on::tensor(rows, layout.head.cols) + Self::at_work(head, &layout.head, rows) + self.batch(1);
        self.both_ends(embedding, head) + logits.max(passed.max().unwrap_or(0))
    }

    /// Embedding and head while they are turned, rounded and compared.
    fn ends(&self) -> u64 {
        let (layout, plan, tokens) = (self.layout, self.plan, self.longest());
        let (embedding, head) = (&layout.embedding, &layout.head);
        let table = on::weights(self.planned(embedding, plan.embedding), embedding.rows, embedding.cols);
        let embedded = self.both_ends(self.stored(), self.stored()).max(table) + self.batch(1);
        let turned = if self.turns_residual() { on::turn(head.rows, head.cols, Side::Inputs) } else { 0 };
        let rounded = self.planned(head, plan.head);
        let pieces = logit_rows(head.rows).min(tokens);
        let piece = |kept| on::tensor(pieces, head.cols) + Self::at_work(kept, head, pieces);
        let compared = on::weights(self.stored(), head.rows, head.cols)
            + on::weights(rounded, head.rows, head.cols)
            + piece(self.stored())
            + piece(rounded)
            + self.batch(2);
        let mut largest = embedded.max(turned).max(compared);
        if self.hessians && plan.head.weight_bits() < 16 {
            let sum = on::gram(head.cols);
            let observed = on::tensor(head.rows, head.cols)
                + Self::at_work(Kept::F32, head, tokens)
                + on::add_gram(head.cols, tokens)
                + self.batch(4)
                + self.corrected();
            let group = head.schemes(plan.head).first().map_or(head.cols, |scheme| scheme.group(head.cols));
            largest = largest.max(sum + observed.max(on::gptq(head.rows, head.cols, group)));
        }
        largest
    }

    /// The float stream of a batch in the quantized one's basis, which the asymmetric correction compares with.
    fn corrected(&self) -> u64 {
        if self.steps.method != Method::Gptaq {
            return 0;
        }
        let hidden = self.config.hidden_size;
        on::tensor(hidden, hidden)
            + on::activations(hidden, hidden, self.longest())
            + on::product(Kept::F32, hidden, hidden, self.longest())
    }
}

/// A block at work.
struct Step<'a> {
    shapes: &'a Shapes<'a>,
    spec: &'a BlockSpec,
}

impl Step<'_> {
    /// The block at the step that takes most.
    fn largest(&self) -> u64 {
        let (shapes, spec) = (self.shapes, self.spec);
        let in_proj = |kept: Kept| {
            let again = |linear: &LinearSpec| on::weights(kept, linear.rows, linear.cols) + Shapes::at_work(kept, linear, self.tokens());
            spec.linear("in_proj").map_or(0, again)
        };
        let float = self.float();
        let float_pass = self.weights(|_| vec![shapes.stored()])
            + self.mixer(|_| shapes.stored())
            + shapes.batch(3)
            + if shapes.has(Transform::SmoothConv) { in_proj(shapes.stored()) } else { 0 };
        let transformed = self.weights(|_| vec![float]);
        let mixed = transformed + self.mixer(|_| float) + shapes.batch(3);
        let internals = shapes.steps.activations.ssm == SsmActivations::Int8Static;
        // The convolution's inside is observed with a cache of its own, within what the scan takes.
        let observed = mixed + if internals { in_proj(float) } else { 0 };
        let mut largest = float_pass.max(self.turned()).max(observed).max(self.passed());
        if shapes.hessians {
            let sums: u64 = spec.linears.iter().map(|linear| on::gram(linear.cols)).sum();
            let widest = spec.linears.iter().map(|linear| linear.cols).max().unwrap_or(0);
            let summed = mixed + on::add_gram(widest, self.tokens()) + shapes.corrected();
            let rounded = spec.linears.iter().flat_map(|linear| self.gptq(linear)).max().unwrap_or(0);
            largest = largest.max(sums + summed.max(transformed + rounded));
        }
        largest
    }

    /// Weights that a transform changed are in f32, the others as they were.
    fn float(&self) -> Kept {
        if self.shapes.steps.transforms.is_empty() { self.shapes.stored() } else { Kept::F32 }
    }

    /// The transformed block and the quantized one beside it.
    fn passed(&self) -> u64 {
        let float = self.float();
        let mixer = self.mixer(|_| float).max(self.mixer(|linear| self.quantized(linear)[0]));
        self.weights(|_| vec![float]) + self.weights(|linear| self.quantized(linear)) + mixer + self.shapes.batch(4)
    }

    fn gptq<'s>(&'s self, linear: &'s LinearSpec) -> impl Iterator<Item = u64> + 's {
        let schemes = linear.planned_schemes(self.shapes.plan, self.spec.index);
        // Slices of one scheme are rounded together.
        let together = schemes.windows(2).all(|pair| pair[0] == pair[1]);
        let rows = linear.slices.iter().map(move |slice| if together { linear.rows } else { slice.rows });
        rows.zip(schemes)
            .filter(|(_, scheme)| *scheme != Scheme::Float)
            .map(|(rows, scheme)| on::gptq(rows, linear.cols, scheme.group(linear.cols)))
    }

    /// Tokens that the block computes at a time.
    fn tokens(&self) -> usize {
        self.shapes.longest().min(PIECE)
    }

    /// How the slices of a linear are kept once they are quantized.
    fn quantized(&self, linear: &LinearSpec) -> Vec<Kept> {
        let kept = |scheme| if scheme == Scheme::Float { self.shapes.stored() } else { Kept::Quantized(scheme) };
        linear.planned_schemes(self.shapes.plan, self.spec.index).into_iter().map(kept).collect()
    }

    /// The block's weights, a form for each slice of a linear or one for all; its other tensors.
    fn weights(&self, kept: impl Fn(&LinearSpec) -> Vec<Kept>) -> u64 {
        let linear = |linear: &LinearSpec| match kept(linear).as_slice() {
            [one] => on::weights(*one, linear.rows, linear.cols),
            each => linear.slices.iter().zip(each).map(|(slice, kept)| on::weights(*kept, slice.rows, linear.cols)).sum(),
        };
        let others = self.spec.others.iter().map(|other| on::tensor(other.elements() as usize, 1));
        self.spec.linears.iter().map(linear).sum::<u64>() + others.sum::<u64>()
    }

    /// What the mixer computes of a batch, its weights in these forms and not counted.
    fn mixer(&self, kept: impl Fn(&LinearSpec) -> Kept) -> u64 {
        let (spec, config, tokens) = (self.spec, self.shapes.config, self.tokens());
        // What linears read and put out stays; what they work with does not.
        let linears = |names: &[&str]| {
            let found = || names.iter().filter_map(|name| spec.linear(name));
            let work = found().map(|linear| on::product(kept(linear), linear.rows, linear.cols, tokens)).max();
            found().map(|linear| on::activations(linear.rows, linear.cols, tokens)).sum::<u64>() + work.unwrap_or(0)
        };
        let norm = on::tensor(tokens, config.hidden_size);
        norm + match spec.kind {
            BlockKind::Ssm => linears(&["in_proj", "out_proj"]) + on::scan(&mamba_shape(&config.mamba), tokens),
            BlockKind::Mlp => linears(&["up_proj", "down_proj"]),
            BlockKind::Attention => {
                let attention = on::attention(&attention_shape(&config.attention), tokens, self.shapes.longest());
                linears(&["q_proj", "k_proj", "v_proj", "o_proj"]) + attention
            }
            BlockKind::Moe => {
                let moe = &config.moe;
                let (inner, width) = (moe.intermediate, moe.latent.unwrap_or(config.hidden_size));
                let of_experts = spec.linear("experts.0.up_proj").map_or(Kept::F32, &kept);
                let router = on::activations(moe.experts, config.hidden_size, tokens)
                    + on::product(Kept::F32, moe.experts, config.hidden_size, tokens);
                let others = ["fc1_latent_proj", "fc2_latent_proj", "shared_experts.up_proj", "shared_experts.down_proj"];
                router + on::mixture(&router_shape(moe), of_experts, inner, width, tokens) + linears(&others) + self.shapes.batch(1)
            }
        }
    }

    /// The transform of one of the block's linears that takes most.
    fn turned(&self) -> u64 {
        let (shapes, spec) = (self.shapes, self.spec);
        let (readers, writers) = (spec.residual_readers(), spec.residual_writers());
        let one = |linear: &LinearSpec| {
            let name = linear.name.as_str();
            let turn = |applies: bool, side| if applies { on::turn(linear.rows, linear.cols, side) } else { 0 };
            let heads = shapes.has(Transform::RotateVo) && name == "v_proj"
                || shapes.has(Transform::RotateQk) && matches!(name, "q_proj" | "k_proj");
            let inputs = shapes.turns_residual() && readers.contains(&name) || shapes.has(Transform::RotateVo) && name == "o_proj";
            let online = linear.hadamard(&shapes.steps.transforms).map_or(0, |block| on::turn(linear.rows, block, Side::Inputs));
            let outputs = shapes.turns_residual() && writers.contains(&name) || heads;
            online.max(turn(inputs, Side::Inputs)).max(turn(outputs, Side::Outputs))
        };
        spec.linears.iter().map(one).max().unwrap_or(0)
    }
}
