//! Is allocation worth it? Allocated plans against what one would do without measuring, at the same bytes, all put together
//! from the same donors and measured on text that nothing was chosen on. Start with [`study`].

use rand::SeedableRng;
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use serde::Serialize;

use super::allocate::{AllocateRequest, Budget, Objective, Solution, write_plan};
use super::reference::Reference;
use super::sensitivity::{Request, Sensitivities, UnitLosses, donors_directory};
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::eval::statistics;
use crate::format::{BlockKind, Format, Plan};
use crate::monitor::Monitor;
use crate::quant::{Donors, Recipe};

/// What to compare.
pub struct StudyRequest<'a> {
    /// What the sensitivities were measured with.
    pub measurement: &'a Request<'a>,
    pub losses: &'a Sensitivities,
    /// Formats that plans may use.
    pub formats: Vec<Format>,
    /// Budgets in bits a weight; the bytes of the phase-3 recipe and of the hand rule (with wide blocks in W8A8, and as they
    /// are) come in addition.
    pub bits: Vec<f64>,
    /// Random plans a budget.
    pub random: usize,
    /// Windows of text that neither calibration nor sensitivities have seen.
    pub windows: Vec<Vec<u32>>,
    pub seed: u64,
}

/// A plan of the comparison.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StudyRow {
    pub budget: String,
    pub name: String,
    pub linear_bytes: u64,
    pub bits_per_weight: f64,
    pub predicted_kld: f64,
    /// With what was learned from measured plans.
    pub corrected_kld: f64,
    /// Mean divergence in nats a token, with its bootstrap interval (95 %, over windows).
    pub kld: f64,
    pub interval: [f64; 2],
    /// What this plan loses more than the allocated one of the same budget, with the interval of the paired difference.
    pub excess: f64,
    pub excess_interval: [f64; 2],
}

/// The name of the allocated plan's rows.
pub const ALLOCATED: &str = "allocated";

/// A budget: what it is called, and its bytes of linears.
struct Round {
    name: String,
    bytes: u64,
    plans: Vec<(String, Plan)>,
}

/// Measures every plan of the comparison; rows come budget by budget, the allocated plan first.
pub fn study<B: Backend>(backend: &B, request: &StudyRequest<'_>, monitor: &Monitor) -> Result<Vec<StudyRow>> {
    let measurement = request.measurement;
    let (checkpoint, layout) = (measurement.checkpoint, &measurement.checkpoint.layout);
    let folder = donors_directory(&measurement.store);
    let donors = Donors::open(backend, checkpoint, &measurement.steps, &measurement.calibration, &folder, monitor)?;
    let tokens = request.windows.iter().map(Vec::len).max().unwrap_or(0);
    let reference = Reference::new(backend, checkpoint, &request.windows, tokens, monitor)?;
    let base = measurement.ends_plan();
    let allocation = |objective| AllocateRequest {
        formats: Some(request.formats.clone()),
        objective,
        activations: super::allocate::Activations::Any,
        ..AllocateRequest::new(base.clone(), Budget::Share(0.0))
    };
    let ours = Solution::new(request.losses, layout, &allocation(Objective::Kld))?;
    let by_error = Solution::new(request.losses, layout, &allocation(Objective::OutputError))?;

    let uniform: Vec<Plan> =
        request.formats.iter().map(|format| Plan { blocks: vec![*format; layout.blocks.len()], ..base.clone() }).collect();
    let uniform_kld = reference.divergence_of_plans(&donors, &uniform, monitor, "uniform plans")?;

    let mut rounds = rounds(request)?;
    let mut rng = SmallRng::seed_from_u64(request.seed);
    for round in &mut rounds {
        let at = |solution: &Solution<'_>| solution.find(Budget::LinearBytes(round.bytes)).map(|place| solution.at(place).plan);
        let mut plans = vec![(ALLOCATED.to_owned(), at(&ours)?)];
        let fitting =
            uniform.iter().zip(&uniform_kld).zip(&request.formats).filter(|((plan, _), _)| layout.linear_bytes(plan) <= round.bytes);
        let best = fitting.min_by(|((_, a), _), ((_, b), _)| statistics::mean(a).total_cmp(&statistics::mean(b)));
        if let Some(((plan, _), format)) = best {
            plans.push((format!("uniform {format}"), plan.clone()));
            plans.push((format!("{format}, rest front to back"), fill(request, &base, *format, round.bytes)));
        }
        plans.push(("least output error".into(), at(&by_error)?));
        for index in 0..request.random {
            plans.push((format!("random {index}"), random(request, &base, round.bytes, &mut rng)));
        }
        plans.append(&mut round.plans);
        round.plans = plans;
    }
    let plans: Vec<Plan> = rounds.iter().flat_map(|round| &round.plans).map(|(_, plan)| plan.clone()).collect();
    let divergence = reference.divergence_of_plans(&donors, &plans, monitor, "plans")?;

    let mut rows = Vec::new();
    let mut divergence = divergence.into_iter();
    for round in rounds {
        let measured: Vec<(String, Plan, Vec<f64>)> =
            round.plans.into_iter().zip(divergence.by_ref()).map(|((name, plan), kld)| (name, plan, kld)).collect();
        let Some(allocated) = measured.first().map(|(_, _, kld)| kld.clone()) else { continue };
        for (name, plan, kld) in measured {
            let difference: Vec<f64> = kld.iter().zip(&allocated).map(|(kld, ours)| kld - ours).collect();
            let predicted = request.losses.predict(&plan, layout).unwrap_or(f64::NAN);
            rows.push(StudyRow {
                budget: round.name.clone(),
                name,
                linear_bytes: layout.linear_bytes(&plan),
                bits_per_weight: layout.bits_per_weight(&plan),
                predicted_kld: predicted,
                corrected_kld: ours.correction().map_or(predicted, |correction| correction.apply(predicted)),
                kld: statistics::mean(&kld),
                interval: statistics::bootstrap(&kld),
                excess: statistics::mean(&difference),
                excess_interval: statistics::bootstrap(&difference),
            });
        }
    }
    Ok(rows)
}

/// The budgets, with the plans that define two of them.
fn rounds(request: &StudyRequest<'_>) -> Result<Vec<Round>> {
    let layout = &request.measurement.checkpoint.layout;
    let base = request.measurement.ends_plan();
    let weights = layout.linear_weights() as f64;
    let mut rounds: Vec<Round> = request
        .bits
        .iter()
        .map(|bits| Round { name: format!("{bits:.1} bits"), bytes: (bits * weights / 8.0) as u64, plans: Vec::new() })
        .collect();
    let phase3 = Plan { embedding: base.embedding, head: base.head, ..Recipe::find("phase3")?.plan(layout, &[])? };
    let hand = |wide| Plan { blocks: hand_rule(&layout.kinds(), wide, Format::W4A8), ..base.clone() };
    let named = [("phase 3", phase3), ("hand rule", hand(Format::W8A8)), ("hand rule in 16 bits", hand(Format::W16A16))];
    for (name, plan) in named {
        rounds.push(Round { name: format!("bytes of {name}"), bytes: layout.linear_bytes(&plan), plans: vec![(name.into(), plan)] });
    }
    if rounds.iter().any(|round| round.bytes == 0) {
        return Err(Error::input("a budget of no bits holds no plan"));
    }
    Ok(rounds)
}

/// NVIDIA's rule for Nemotron 3 Nano: attention blocks and the SSM block in front of each stay wide.
pub fn hand_rule(kinds: &[BlockKind], wide: Format, narrow: Format) -> Vec<Format> {
    let is_wide = |index: usize| {
        kinds[index] == BlockKind::Attention || (kinds[index] == BlockKind::Ssm && kinds.get(index + 1) == Some(&BlockKind::Attention))
    };
    (0..kinds.len()).map(|index| if is_wide(index) { wide } else { narrow }).collect()
}

/// A unit's allowed formats with their bytes, ascending.
fn ladder(unit: &UnitLosses, formats: &[Format]) -> Vec<(u64, Format)> {
    let mut steps: Vec<(u64, Format)> =
        formats.iter().filter_map(|format| unit.loss(*format)).map(|loss| (loss.bytes, loss.format)).collect();
    steps.sort_unstable();
    steps
}

/// A uniform plan with the bytes that it leaves spent from the front to the back: every unit gets the widest format that
/// still fits.
fn fill(request: &StudyRequest<'_>, base: &Plan, format: Format, budget: u64) -> Plan {
    let units = &request.losses.units;
    let mut left = budget - units.iter().filter_map(|unit| unit.loss(format)).map(|loss| loss.bytes).sum::<u64>();
    let mut chosen = Vec::with_capacity(units.len());
    for unit in units {
        let own = unit.loss(format).map_or(0, |loss| loss.bytes);
        let widest = ladder(unit, &request.formats).into_iter().rev().find(|(bytes, _)| *bytes >= own && bytes - own <= left);
        let (bytes, format) = widest.unwrap_or((own, format));
        left -= bytes - own;
        chosen.push((format, unit));
    }
    plan_of(request, base, &chosen)
}

/// A plan that spends the bytes at random: units in random order are raised by one format at a time until none can be.
fn random(request: &StudyRequest<'_>, base: &Plan, budget: u64, rng: &mut SmallRng) -> Plan {
    let units = &request.losses.units;
    let ladders: Vec<Vec<(u64, Format)>> = units.iter().map(|unit| ladder(unit, &request.formats)).collect();
    let mut at = vec![0; units.len()];
    let mut spent: u64 = ladders.iter().map(|ladder| ladder[0].0).sum();
    let mut order: Vec<usize> = (0..units.len()).collect();
    loop {
        order.shuffle(rng);
        let cost = |unit: usize, at: usize| ladders[unit].get(at + 1).map(|next| next.0 - ladders[unit][at].0);
        let Some(unit) = order.iter().copied().find(|unit| cost(*unit, at[*unit]).is_some_and(|cost| spent + cost <= budget)) else {
            break;
        };
        spent += cost(unit, at[unit]).unwrap_or(0);
        at[unit] += 1;
    }
    let chosen: Vec<(Format, &UnitLosses)> =
        units.iter().zip(&ladders).zip(&at).map(|((unit, ladder), at)| (ladder[*at].1, unit)).collect();
    plan_of(request, base, &chosen)
}

fn plan_of(request: &StudyRequest<'_>, base: &Plan, chosen: &[(Format, &UnitLosses)]) -> Plan {
    let mut plan = base.clone();
    write_plan(&mut plan, &request.measurement.checkpoint.layout, chosen);
    plan
}
