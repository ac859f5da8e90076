//! Bit allocation: the plan with the least predicted divergence within a budget, from measured sensitivities.
//!
//! Losses of units add up (a second-order expansion without its cross terms), so the best plan is a multiple-choice
//! knapsack: [`Solution::new`] solves it for every budget at once, [`Solution::find`] looks a budget up. How far losses
//! really add up is known from plans that were put together and measured; [`Correction`] is learned from them.

mod correction;
mod explain;
mod request;

use std::sync::Arc;

use serde::Serialize;

pub use correction::{Correction, checks_of};
use explain::explain;
pub use explain::{Exchange, UnitChoice};
use request::TICKS;
pub use request::{Activations, AllocateRequest, Budget, CONTEXT, Cost, Objective};

use super::knapsack::{Choice, Front};
use super::sensitivity::{Loss, Sensitivities, UnitLosses, common_formats};
use crate::checkpoint::Layout;
use crate::error::{Error, Result};
use crate::format::{Format, Plan, Selector};

/// A plan on the front.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Allocation {
    pub plan: Plan,
    pub linear_bytes: u64,
    pub total_bytes: u64,
    pub bits_per_weight: f64,
    /// Sum of losses, embedding and head included.
    pub predicted_kld: f64,
    /// With what was learned from measured plans.
    pub corrected_kld: f64,
    /// How much less the best plan within the budget may lose at most, as a share; 0 where the solution is exact.
    pub gap: f64,
    /// Nats that a further megabyte is worth, or a further microsecond a token where that is the cost.
    pub price: f64,
    /// Predicted seconds of an answered token, where that is the cost.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
    pub units: Vec<UnitChoice>,
}

/// A point of the front.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct FrontPoint {
    pub linear_bytes: u64,
    pub bits_per_weight: f64,
    pub predicted_kld: f64,
    pub corrected_kld: f64,
    /// How much less the best plan of the same cost may lose at most, as a share; 0 where the solution is exact.
    pub gap: f64,
    /// Predicted seconds of an answered token, where that is the cost.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
}

/// A plan of the front by its number, and the cost that it was allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    pub index: usize,
    allowed: u64,
}

/// Units that take a format together, with what they may take.
struct Item<'a> {
    units: Vec<&'a UnitLosses>,
    /// Formats by ascending cost.
    formats: Vec<Format>,
}

impl Item<'_> {
    fn cost(&self, format: Format, cost: &Cost) -> u64 {
        self.units.iter().filter_map(|unit| Some(cost.of(unit, &unit.loss(format)?))).sum()
    }

    fn sum(&self, format: Format) -> Option<Loss> {
        let mut losses = self.units.iter().map(|unit| unit.loss(format));
        let first = losses.next()??;
        losses.try_fold(first, |sum, loss| {
            let loss = loss?;
            Some(Loss { bytes: sum.bytes + loss.bytes, kld: sum.kld + loss.kld, output_error: sum.output_error + loss.output_error, ..sum })
        })
    }
}

/// Every plan worth having.
pub struct Solution<'a> {
    layout: &'a Layout,
    base: Plan,
    ends_kld: f64,
    objective: Objective,
    cost: Cost,
    items: Vec<Item<'a>>,
    front: Arc<Front>,
    correction: Option<Correction>,
}

impl<'a> Solution<'a> {
    /// Solves for every budget; that of `request` is not looked at.
    pub fn new(losses: &'a Sensitivities, layout: &'a Layout, request: &AllocateRequest) -> Result<Self> {
        Ok(Self::of(&losses.units, layout, request, None)?.expecting(losses, request))
    }

    /// The solution whose front was found before, from the same losses and a request that differs in its budget at most:
    /// for those who keep the front and borrow the rest when they ask for a plan.
    pub fn with_front(losses: &'a Sensitivities, layout: &'a Layout, request: &AllocateRequest, front: Arc<Front>) -> Result<Self> {
        Ok(Self::of(&losses.units, layout, request, Some(front))?.expecting(losses, request))
    }

    /// The front, to be kept.
    pub fn shared_front(&self) -> Arc<Front> {
        Arc::clone(&self.front)
    }

    /// What units alone say: embedding and head lose nothing yet.
    fn of(units: &'a [UnitLosses], layout: &'a Layout, request: &AllocateRequest, front: Option<Arc<Front>>) -> Result<Self> {
        let items = items(units, layout, request)?;
        let front = front.map_or_else(|| solve(&items, request).map(Arc::new), Ok)?;
        let (base, objective, cost) = (request.base.clone(), request.objective, request.cost.clone());
        Ok(Self { layout, base, ends_kld: 0.0, objective, cost, items, front, correction: None })
    }

    /// With what embedding and head lose, and what was learned from measured plans of the same activation bits.
    fn expecting(self, losses: &Sensitivities, request: &AllocateRequest) -> Self {
        let activations = match request.activations {
            Activations::Any => {
                request.formats.as_ref().map_or_else(|| Activations::of(losses.formats()), |own| Activations::of(own.clone()))
            }
            bits => bits,
        };
        Self { ends_kld: losses.ends_kld, correction: Correction::learn(losses, activations), ..self }
    }

    /// What was learned from measured plans, if predictions were off.
    pub fn correction(&self) -> Option<Correction> {
        self.correction
    }

    fn corrected(&self, predicted: f64) -> f64 {
        self.correction.map_or(predicted, |correction| correction.apply(predicted))
    }

    /// The plans by ascending cost.
    pub fn front(&self) -> Vec<FrontPoint> {
        let weights = self.layout.linear_weights() as f64;
        let point = |index: usize| {
            let cost = self.front.points()[index].cost;
            let predicted = self.ends_kld + self.front.points()[index].loss;
            let (bytes, seconds) = match &self.cost {
                Cost::Bytes => (cost, None),
                Cost::Time(time) => (self.bytes(index), Some(time.fixed() + cost as f64 / TICKS)),
            };
            FrontPoint {
                linear_bytes: bytes,
                bits_per_weight: 8.0 * bytes as f64 / weights,
                predicted_kld: predicted,
                corrected_kld: self.corrected(predicted),
                gap: self.gap(index, cost),
                seconds,
            }
        };
        (0..self.front.points().len()).map(point).collect()
    }

    /// Bytes of the linears of the plan at `index`.
    fn bytes(&self, index: usize) -> u64 {
        let chosen = self.items.iter().zip(self.front.options(index));
        chosen.filter_map(|(item, option)| item.sum(item.formats[option])).map(|sum| sum.bytes).sum()
    }

    /// Bytes that the model takes beside the blocks' linears.
    fn other_bytes(&self) -> u64 {
        self.layout.total_bytes(&self.base) - self.layout.linear_bytes(&self.base)
    }

    /// The plan at `index` of the front, for a budget of its own cost.
    pub fn place(&self, index: usize) -> Place {
        Place { index, allowed: self.front.points()[index].cost }
    }

    /// The plan for `budget`. One that cannot be met is an error that says the least that can.
    pub fn find(&self, budget: Budget) -> Result<Place> {
        let points = self.front.points();
        let (least, most) = (self.front.least_cost(), points.last().map_or(0, |point| point.cost));
        let weights = self.layout.linear_weights() as f64;
        match (&self.cost, budget) {
            (Cost::Bytes, Budget::Seconds(_)) => return Err(Error::input("a budget of time needs time as the cost")),
            (Cost::Time(_), Budget::Bits(_) | Budget::LinearBytes(_) | Budget::ModelBytes(_)) => {
                return Err(Error::input("a budget of bytes needs bytes as the cost"));
            }
            _ => {}
        }
        let allowed = match budget {
            Budget::Seconds(seconds) => ((seconds - self.fixed_seconds()) * TICKS).max(0.0) as u64,
            Budget::Bits(bits) => (bits * weights / 8.0).max(0.0) as u64,
            Budget::LinearBytes(bytes) => bytes,
            Budget::ModelBytes(bytes) => bytes.saturating_sub(self.other_bytes()),
            Budget::Share(share) => least + (share.clamp(0.0, 1.0) * (most - least) as f64) as u64,
            Budget::Kld(ceiling) => {
                let index = points.partition_point(|point| self.corrected(self.ends_kld + point.loss) > ceiling);
                return if index < points.len() {
                    Ok(self.place(index))
                } else {
                    let best = points.last().map_or(0.0, |point| self.corrected(self.ends_kld + point.loss));
                    Err(Error::input(format!(
                        "no plan is predicted to lose as little as {ceiling:.2e} nats a token: the best loses {best:.2e}"
                    ))
                    .hint("allow wider formats, 16-bit activations, or a recipe with a wider embedding and head"))
                };
            }
        };
        self.front.within(allowed).map(|index| Place { index, allowed }).ok_or_else(|| {
            let asked = match budget {
                Budget::Bits(bits) => format!("{bits} bits a weight"),
                Budget::ModelBytes(bytes) => format!("a model of {bytes} bytes"),
                Budget::Seconds(seconds) => format!("{:.4} ms a token", 1e3 * seconds),
                _ => format!("linears of {allowed} bytes"),
            };
            let smallest = match budget {
                Budget::ModelBytes(_) => format!("{} bytes", least + self.other_bytes()),
                Budget::Seconds(_) => format!("{:.4} ms", 1e3 * (self.fixed_seconds() + least as f64 / TICKS)),
                Budget::Bits(_) => {
                    format!("{:.3} bits a weight ({least} bytes of linears)", (8000.0 * least as f64 / weights).ceil() / 1000.0)
                }
                _ => format!("{least} bytes"),
            };
            let least = if matches!(budget, Budget::Seconds(_)) { "fastest" } else { "smallest" };
            Error::input(format!("no plan takes {asked}: the {least} that is possible takes {smallest}"))
                .hint("raise the budget, allow narrower formats, or remove pins")
        })
    }

    /// Predicted seconds of an answered token that no linear is the reason of; 0 where time does not count.
    fn fixed_seconds(&self) -> f64 {
        match &self.cost {
            Cost::Bytes => 0.0,
            Cost::Time(time) => time.fixed(),
        }
    }

    /// What the units take in `plan`, whatever it came from, and the exchanges beside that; units whose linears differ in
    /// format, or have one that the request does not allow, are left out.
    pub fn choices(&self, plan: &Plan) -> Vec<UnitChoice> {
        let option = |item: &Item<'_>| {
            let format = super::sensitivity::unit_format(plan, self.layout, item.units.first()?)?;
            item.formats.iter().position(|other| *other == format)
        };
        self.items.iter().filter_map(|item| Some(explain(item, option(item)?, &self.cost))).flatten().collect()
    }

    /// Nats that a further megabyte (or microsecond a token, where that is the cost) is worth at `cost` bytes (or picoseconds).
    pub fn price(&self, cost: u64) -> f64 {
        if matches!(self.cost, Cost::Bytes) { 1e6 * self.front.price(cost) } else { TICKS / 1e6 * self.front.price(cost) }
    }

    /// By how much the plan at `index` can lose more than the best one that costs at most `allowed`, as a share.
    fn gap(&self, index: usize, allowed: u64) -> f64 {
        if self.objective == Objective::Kld { self.front.gap(index, allowed) } else { 0.0 }
    }

    /// The plan at a place of the front.
    pub fn at(&self, Place { index, allowed }: Place) -> Allocation {
        let options = self.front.options(index);
        let mut plan = self.base.clone();
        let mut units: Vec<(Format, &UnitLosses)> = Vec::new();
        for (item, option) in self.items.iter().zip(&options) {
            units.extend(item.units.iter().map(|unit| (item.formats[*option], *unit)));
        }
        write_plan(&mut plan, self.layout, &units);
        let predicted: f64 = self.ends_kld + units.iter().filter_map(|(format, unit)| unit.loss(*format)).map(|loss| loss.kld).sum::<f64>();
        let cost = self.front.points()[index].cost;
        let choices = self.items.iter().zip(&options).flat_map(|(item, option)| explain(item, *option, &self.cost)).collect();
        Allocation {
            linear_bytes: self.layout.linear_bytes(&plan),
            total_bytes: self.layout.total_bytes(&plan),
            bits_per_weight: self.layout.bits_per_weight(&plan),
            plan,
            predicted_kld: predicted,
            corrected_kld: self.corrected(predicted),
            gap: self.gap(index, allowed),
            price: self.price(cost),
            seconds: matches!(self.cost, Cost::Time(_)).then(|| self.fixed_seconds() + cost as f64 / TICKS),
            units: choices,
        }
    }
}

/// The plan for one budget.
pub fn allocate(losses: &Sensitivities, layout: &Layout, request: &AllocateRequest) -> Result<Allocation> {
    let solution = Solution::new(losses, layout, request)?;
    Ok(solution.at(solution.find(request.budget)?))
}

/// An error where no plan of `units` can meet `request`, whatever they lose: their bytes are known before anything is measured.
pub fn check(units: &[UnitLosses], layout: &Layout, request: &AllocateRequest) -> Result<()> {
    Solution::of(units, layout, request, None)?.find(request.budget).map(drop)
}

/// Gives each block the format of most of its weights, and a format of its own to every linear that has another one.
pub fn write_plan(plan: &mut Plan, layout: &Layout, units: &[(Format, &UnitLosses)]) {
    plan.blocks.resize(layout.blocks.len(), Format::W16A16);
    for block in &layout.blocks {
        let own = || units.iter().filter(|(_, unit)| unit.block == block.index);
        let weights = |format: Format| own().filter(|(other, _)| *other == format).map(|(_, unit)| unit.weights).sum::<u64>();
        let Some(most) = own().map(|(format, _)| *format).max_by_key(|format| (weights(*format), *format)) else { continue };
        plan.blocks[block.index] = most;
        for linear in &block.linears {
            plan.linears.remove(&linear.stem);
        }
        for (format, unit) in own().filter(|(format, _)| *format != most) {
            for linear in unit.linears.iter().filter_map(|name| block.linear(name)) {
                plan.linears.insert(linear.stem.clone(), *format);
            }
        }
    }
}

fn items<'a>(units: &'a [UnitLosses], layout: &Layout, request: &AllocateRequest) -> Result<Vec<Item<'a>>> {
    let measured = common_formats(units);
    let wanted = request.formats.clone().unwrap_or_else(|| measured.clone());
    if let Some(unknown) = wanted.iter().find(|format| **format != Format::W16A16 && !measured.contains(format)) {
        let names = measured.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        return Err(Error::input(format!("{unknown} was not measured; {names} were"))
            .hint("run `strata sensitivity` with this format among its --formats: what is measured already stays"));
    }
    let allowed: Vec<Format> = wanted.into_iter().filter(|format| request.activations.allow(*format)).collect();
    if allowed.is_empty() {
        return Err(Error::input("no allowed format has the activation bits asked for").hint("change --activations or --formats"));
    }
    let mut items: Vec<Item<'a>> = Vec::new();
    for unit in units {
        match items.last_mut() {
            Some(item) if request.whole_blocks && item.units[0].block == unit.block => item.units.push(unit),
            _ => items.push(Item { units: vec![unit], formats: allowed.clone() }),
        }
    }
    for pin in &request.pins {
        let mut met = false;
        for item in &mut items {
            if item.units.iter().any(|unit| selects(&pin.selector, unit, layout)) {
                if item.units.iter().any(|unit| unit.loss(pin.format).is_none()) {
                    return Err(Error::input(format!("{} was not measured in {}", item.units[0].name, pin.format))
                        .hint("run `strata sensitivity` with this format among its --formats"));
                }
                item.formats = vec![pin.format];
                met = true;
            }
        }
        if !met {
            return Err(match &pin.selector {
                Selector::Name(pattern) if !layout.named(pattern).is_empty() => {
                    Error::input(format!("`{}` pins slices, and a plan is found for whole linears", pin.selector))
                        .hint("pin the linear; overrides in a session of the plan (`strata allocate --session`) reach its slices")
                }
                _ => Error::input(format!("`{}` pins nothing", pin.selector))
                    .hint("pin blocks, kinds or linears; the recipe gives the formats of embedding and head"),
            });
        }
    }
    for item in &mut items {
        let mut formats = std::mem::take(&mut item.formats);
        formats.sort_by_key(|format| (item.cost(*format, &request.cost), *format));
        item.formats = formats;
    }
    Ok(items)
}

/// The front of all selections of a format an item.
fn solve(items: &[Item<'_>], request: &AllocateRequest) -> Result<Front> {
    let loss = |loss: Loss| match request.objective {
        Objective::Kld => loss.kld,
        Objective::OutputError => loss.output_error,
    };
    let options = |item: &Item<'_>| {
        let choice = |format: &Format| item.sum(*format).map(|sum| Choice { cost: item.cost(*format, &request.cost), loss: loss(sum) });
        item.formats.iter().filter_map(choice).collect()
    };
    let choices: Vec<Vec<Choice>> = items.iter().map(options).collect();
    Front::solve(&choices).ok_or_else(|| Error::input("a part of the model may take no format"))
}

fn selects(selector: &Selector, unit: &UnitLosses, layout: &Layout) -> bool {
    match selector {
        Selector::Kind(kind) => unit.kind == *kind,
        Selector::Blocks(first, last) => (*first..=*last).contains(&unit.block),
        Selector::Name(pattern) => {
            let stems = unit.linears.iter().filter_map(|name| layout.blocks[unit.block].linear(name)).map(|linear| &linear.stem);
            stems.into_iter().any(|stem| pattern.matches(stem))
        }
        Selector::Embedding | Selector::Head => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::analysis::sensitivity::{CANDIDATES, Granularity, Identity, SENSITIVITY_SCHEMA, units, unmeasured_units};
    use crate::analysis::{AnswerTime, Footprint, Gpu, Prediction};
    use crate::quant::Override;

    /// Losses that fall fourfold with each bit and rise with the block's number; int8 activations add a little.
    pub(super) fn losses(layout: &Layout) -> Sensitivities {
        let identity = Identity {
            schema: SENSITIVITY_SCHEMA.into(),
            tool: String::new(),
            source: String::new(),
            method: "gptq".into(),
            transforms: Vec::new(),
            internals: crate::quant::Internals::default(),
            embedding: Format::W8A16,
            head: Format::W8A8,
            by: Granularity::Linear,
            calibration: String::new(),
            measured: String::new(),
            positions: 1,
        };
        let unit = |unit: crate::analysis::sensitivity::Unit| {
            let loss = |format: &Format| {
                let kld = 1e-3 * (1.0 + unit.block as f64) * 0.25_f64.powi(format.weight_bits().into())
                    + if format.quantizes_activations() { 1e-8 } else { 0.0 };
                Loss { format: *format, bytes: unit.bytes(layout, *format), output_error: 1.0, kld, stderr: 0.0, measured: true }
            };
            UnitLosses {
                block: unit.block,
                kind: layout.blocks[unit.block].kind,
                linears: unit.linears.clone(),
                weights: unit.weights(layout),
                unquantized_bytes: unit.bytes(layout, Format::W16A16),
                losses: CANDIDATES.iter().map(loss).collect(),
                name: unit.name,
            }
        };
        Sensitivities {
            schema: SENSITIVITY_SCHEMA.into(),
            model: "demo".into(),
            identity,
            tokens: 1,
            complete: true,
            units: units(layout, Granularity::Linear).into_iter().map(unit).collect(),
            ends_kld: 1e-6,
            checks: Vec::new(),
            donors: "donors".into(),
        }
    }

    pub(super) fn layout() -> Layout {
        crate::checkpoint::open("demo").unwrap().layout
    }

    pub(super) fn request(layout: &Layout, budget: Budget) -> AllocateRequest {
        let base = Plan { embedding: Format::W8A16, head: Format::W8A8, ..Plan::unquantized(layout.blocks.len()) };
        AllocateRequest::new(base, budget)
    }

    #[test]
    fn a_plan_keeps_its_budget_and_predicts_the_sum_of_its_units() {
        let layout = layout();
        let losses = losses(&layout);
        for bits in [2.5, 4.0, 6.0] {
            let found = allocate(&losses, &layout, &request(&layout, Budget::Bits(bits))).unwrap();
            assert!(found.bits_per_weight <= bits && found.bits_per_weight > bits - 0.1, "{bits} {}", found.bits_per_weight);
            assert_eq!(found.linear_bytes, found.units.iter().map(|unit| unit.bytes).sum::<u64>());
            let predicted = losses.predict(&found.plan, &layout).unwrap();
            assert!((found.predicted_kld - predicted).abs() < 1e-15, "{} {predicted}", found.predicted_kld);
            assert!(found.plan.blocks.iter().all(|format| format.quantizes_activations()));
        }
        let size = layout.total_bytes(&allocate(&losses, &layout, &request(&layout, Budget::Bits(4.0))).unwrap().plan);
        assert_eq!(allocate(&losses, &layout, &request(&layout, Budget::ModelBytes(size))).unwrap().total_bytes, size);
    }

    #[test]
    fn pins_hold_ties_stay_together_and_activations_are_those_asked_for() {
        let layout = layout();
        let losses = losses(&layout);
        let pin = |selector: &str, format| Override { selector: selector.parse().unwrap(), format };
        let pins = vec![pin("kind:attention", Format::W2A8), pin("name:layers.0.mixer.out_proj", Format::W8A8)];
        let pinned = AllocateRequest { pins, whole_blocks: false, ..request(&layout, Budget::Bits(4.0)) };
        let plan = allocate(&losses, &layout, &pinned).unwrap().plan;
        assert_eq!((plan.blocks[5], plan.blocks[10]), (Format::W2A8, Format::W2A8));
        assert_eq!(plan.linear(0, "layers.0.mixer.out_proj"), Format::W8A8);
        let whole = AllocateRequest { whole_blocks: true, activations: Activations::Any, ..request(&layout, Budget::Bits(4.0)) };
        let plan = allocate(&losses, &layout, &whole).unwrap().plan;
        assert!(plan.linears.is_empty());
        assert!(plan.blocks.iter().all(|format| !format.quantizes_activations()), "at equal bytes 16-bit activations lose less");
    }

    /// What is not quantized was not measured either: it loses nothing, and takes the bytes that it has.
    #[test]
    fn parts_can_be_pinned_to_what_the_checkpoint_has() {
        let layout = layout();
        let losses = losses(&layout);
        let pins = vec![Override { selector: "kind:attention".parse().unwrap(), format: Format::W16A16 }];
        let found = allocate(&losses, &layout, &AllocateRequest { pins, ..request(&layout, Budget::Bits(5.0)) }).unwrap();
        assert_eq!((found.plan.blocks[5], found.plan.blocks[10]), (Format::W16A16, Format::W16A16));
        assert!(found.bits_per_weight <= 5.0 && found.bits_per_weight > 4.9, "{}", found.bits_per_weight);
        assert_eq!(found.linear_bytes, found.units.iter().map(|unit| unit.bytes).sum::<u64>());
        assert!(found.units.iter().filter(|unit| unit.block == 5).all(|unit| unit.pinned && unit.kld == 0.0));
    }

    /// Where time is short and not bytes, int8 activations are taken where they are worth it, and a narrow budget is met.
    #[test]
    fn time_as_the_cost_chooses_activations_too() {
        let demo = crate::checkpoint::open("demo").unwrap();
        let (layout, losses) = (&demo.layout, losses(&demo.layout));
        let gpu = Gpu::find("H100").unwrap();
        let base = request(layout, Budget::Share(0.0)).base;
        let footprint = Footprint::new(&demo.config, std::sync::Arc::new(layout.clone()));
        let cost = Cost::Time(AnswerTime::new(&demo.config, &footprint, &base, &gpu));
        let timed =
            |budget| AllocateRequest { activations: Activations::Any, cost: cost.clone(), ..AllocateRequest::new(base.clone(), budget) };
        let solution = Solution::new(&losses, layout, &timed(Budget::Share(0.0))).unwrap();
        let front = solution.front();
        assert!(front.windows(2).all(|pair| pair[0].seconds < pair[1].seconds && pair[0].predicted_kld >= pair[1].predicted_kld));
        // A budget between two plans is asked what the best plan within it may lose, not within what was found. (The front by bytes has no
        // gaps.)
        let index = (0..front.len() - 1).find(|index| front[*index].gap > 0.0).unwrap();
        let (own, next) = (solution.place(index), solution.place(index + 1));
        let wide = solution.at(Place { allowed: next.allowed - 1, ..own });
        assert!(solution.at(own).plan == wide.plan && solution.at(own).gap == front[index].gap && wide.gap > front[index].gap);
        let (fastest, slowest) = (front[0].seconds.unwrap(), front[front.len() - 1].seconds.unwrap());
        for share in [0.0, 0.3, 0.7] {
            let budget = fastest + share * (slowest - fastest) + 1e-12;
            let found = solution.at(solution.find(Budget::Seconds(budget)).unwrap());
            let predicted = Prediction::new(&demo.config, &footprint, &found.plan, &gpu).answer_seconds();
            assert!(
                found.seconds.unwrap() <= budget && predicted <= found.seconds.unwrap() * (1.0 + 1e-9),
                "{predicted} {:?}",
                found.seconds
            );
            assert_eq!(found.linear_bytes, found.units.iter().map(|unit| unit.bytes).sum::<u64>());
        }
        let ends = [0, front.len() - 1].map(|index| solution.at(solution.place(index)));
        assert!(ends[0].units.iter().all(|unit| unit.format == Format::W2A8), "the fastest");
        assert!(ends[1].units.iter().all(|unit| unit.format == Format::W8A16), "what loses least");
        let refused = |budget| solution.find(budget).unwrap_err().message;
        assert!(refused(Budget::Seconds(fastest / 2.0)).contains("the fastest that is possible takes"));
        assert!(refused(Budget::Bits(4.0)).contains("needs bytes as the cost"));
        assert!(allocate(&losses, layout, &request(layout, Budget::Seconds(1.0))).unwrap_err().message.contains("needs time as the cost"));
    }

    #[test]
    fn what_cannot_be_is_refused_with_the_least_that_can() {
        let layout = layout();
        let losses = losses(&layout);
        let refused = |request: &AllocateRequest| allocate(&losses, &layout, request).unwrap_err();
        let error = refused(&request(&layout, Budget::Bits(1.5)));
        assert!(error.message.contains("smallest that is possible takes 2.137 bits"), "{error}");
        let least = allocate(&losses, &layout, &request(&layout, Budget::Bits(2.137))).unwrap();
        let error = refused(&request(&layout, Budget::ModelBytes(least.total_bytes - 1)));
        assert!(error.message.contains(&format!("takes {} bytes", least.total_bytes)), "{error}");
        assert!(refused(&request(&layout, Budget::Kld(1e-7))).message.contains("the best loses"));
        let unmeasured = AllocateRequest { formats: Some(vec!["w4a8g32".parse().unwrap()]), ..request(&layout, Budget::Bits(4.0)) };
        assert!(refused(&unmeasured).message.contains("was not measured"));
        let pinned = |selector: &str| {
            let pins = vec![Override { selector: selector.parse().unwrap(), format: Format::W8A8 }];
            refused(&AllocateRequest { pins, ..request(&layout, Budget::Bits(4.0)) })
        };
        assert!(pinned("kind:moe").message.contains("pins nothing"));
        let slice = pinned("name:in_proj.B");
        assert!(slice.message.contains("pins slices") && slice.hint.unwrap().contains("--session"), "{}", slice.message);
        // Bytes are known before anything is measured, and say the same.
        let units = unmeasured_units(&layout, Granularity::Linear, &CANDIDATES);
        let impossible = request(&layout, Budget::Bits(1.5));
        assert_eq!(check(&units, &layout, &impossible).unwrap_err().message, refused(&impossible).message);
        check(&units, &layout, &request(&layout, Budget::Kld(1e-7))).unwrap();
    }
}
