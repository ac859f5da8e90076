//! What an allocation is asked for: a budget, what plans are short of, and what they may use.

use std::str::FromStr;

use crate::analysis::gpu::Gpu;
use crate::analysis::predict::{self, AnswerTime};
use crate::analysis::sensitivity::{Loss, UnitLosses};
use crate::checkpoint::{Config, Layout};
use crate::error::{Error, Result};
use crate::format::{BlockKind, Format, Plan};
use crate::quant::{AllocateSpec, Override};
use crate::size;

/// What a plan may take, or lose.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Budget {
    /// Stored bits a weight of the blocks' linears, scales included.
    Bits(f64),
    /// Bytes of the blocks' linears.
    LinearBytes(u64),
    /// Bytes of the whole model.
    ModelBytes(u64),
    /// The cheapest plan whose corrected prediction is at most so many nats a token.
    Kld(f64),
    /// A share (0…1) of the way from the cheapest plan to the dearest.
    Share(f64),
    /// Predicted seconds of an answered token, where that is the [`Cost`].
    Seconds(f64),
}

/// What plans are short of.
#[derive(Debug, Clone, PartialEq)]
pub enum Cost {
    /// Bytes of the blocks' linears.
    Bytes,
    /// Predicted time of an answered token.
    Time(AnswerTime),
}

/// Units of cost in a second: picoseconds.
pub(super) const TICKS: f64 = 1e12;

impl Cost {
    /// Bytes, or picoseconds, of a unit in a format.
    pub(super) fn of(&self, unit: &UnitLosses, loss: &Loss) -> u64 {
        self.seconds(unit, loss).map_or(loss.bytes, |seconds| (seconds * TICKS).ceil() as u64)
    }

    /// Seconds of a unit in a format, where they count.
    pub(super) fn seconds(&self, unit: &UnitLosses, loss: &Loss) -> Option<f64> {
        match self {
            Self::Bytes => None,
            Self::Time(time) => {
                let routed = unit.kind == BlockKind::Moe && unit.linears.iter().all(|name| name.starts_with("experts."));
                Some(time.linears(loss.bytes, unit.weights, loss.format, routed))
            }
        }
    }
}

impl Budget {
    /// What fits on `gpu` beside the states and caches of one sequence of `context` tokens.
    pub fn fitting(config: &Config, gpu: &Gpu, context: usize) -> Result<Self> {
        predict::weight_room(config, gpu, context).map(Self::ModelBytes).ok_or_else(|| {
            Error::input(format!("the caches of {context} tokens alone do not fit on a {}", gpu.name))
                .hint("give a shorter context or a larger GPU")
        })
    }
}

/// Which activation bits plans may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activations {
    Int8,
    Float,
    Any,
}

impl Activations {
    /// Those of plans that use `formats`; what is not quantized reads nothing of its own.
    pub fn of(formats: impl IntoIterator<Item = Format>) -> Self {
        let quantized = formats.into_iter().filter(|format| *format != Format::W16A16);
        let [mut int8, mut float] = [false; 2];
        quantized.for_each(|format| *(if format.quantizes_activations() { &mut int8 } else { &mut float }) = true);
        match (int8, float) {
            (true, false) => Self::Int8,
            (false, true) => Self::Float,
            _ => Self::Any,
        }
    }

    /// Those of `plan`.
    pub fn of_plan(plan: &Plan) -> Self {
        Self::of(plan.blocks.iter().chain(plan.linears.values()).copied())
    }

    pub(crate) fn allow(self, format: Format) -> bool {
        match self {
            Self::Int8 => format.quantizes_activations(),
            Self::Float => !format.quantizes_activations(),
            Self::Any => true,
        }
    }
}

impl FromStr for Activations {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "8" => Ok(Self::Int8),
            "16" => Ok(Self::Float),
            "any" => Ok(Self::Any),
            _ => Err(Error::input(format!("activations of `{text}` bits are not known")).hint("write 8, 16 or any")),
        }
    }
}

/// What counts as loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Objective {
    /// Measured end to end.
    Kld,
    /// Relative squared error of the block's output: what is known without running the model behind it.
    OutputError,
}

/// A question.
#[derive(Debug, Clone, PartialEq)]
pub struct AllocateRequest {
    /// Gives the formats of embedding and head.
    pub base: Plan,
    pub budget: Budget,
    pub cost: Cost,
    /// Formats that plans may use; `None`: all that were measured.
    pub formats: Option<Vec<Format>>,
    pub activations: Activations,
    /// Parts that keep a format.
    pub pins: Vec<Override>,
    /// All linears of a block take one format.
    pub whole_blocks: bool,
    pub objective: Objective,
}

impl AllocateRequest {
    /// `budget` with int8 activations and no pins; embedding and head as in `base`.
    pub fn new(base: Plan, budget: Budget) -> Self {
        Self {
            base,
            budget,
            cost: Cost::Bytes,
            formats: None,
            activations: Activations::Int8,
            pins: Vec::new(),
            whole_blocks: false,
            objective: Objective::Kld,
        }
    }

    /// What a recipe's `[allocate]` asks for. `start` gives the bytes where it names no other budget, and the formats of
    /// embedding and head; `pins` keep their formats.
    pub fn of_recipe(spec: &AllocateSpec, pins: &[Override], config: &Config, layout: &Layout, start: &Plan) -> Result<Self> {
        let budget = match (spec.bits, &spec.size, spec.kld, &spec.gpu) {
            (Some(bits), ..) => Budget::Bits(bits),
            (_, Some(size), ..) => Budget::ModelBytes(size::parse(size)?),
            (_, _, Some(kld), _) => Budget::Kld(kld),
            (.., Some(name)) => Budget::fitting(config, &Gpu::find(name)?, spec.context.unwrap_or(CONTEXT))?,
            _ => Budget::LinearBytes(layout.linear_bytes(start)),
        };
        let ends = Plan { embedding: start.embedding, head: start.head, ..Plan::unquantized(layout.blocks.len()) };
        Ok(Self { formats: Some(spec.formats.clone()), activations: Activations::Any, pins: pins.to_vec(), ..Self::new(ends, budget) })
    }
}

/// Tokens that have to fit on a GPU beside the weights unless it is said how many.
pub const CONTEXT: usize = 8192;
