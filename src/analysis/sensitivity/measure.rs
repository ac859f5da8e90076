//! The measurement: donors and output errors in a first walk through the blocks, then end-to-end losses where they tell
//! most, then a few plans that show how far losses add up.
//!
//! The unquantized residual stream walks from block to block. At each block a stream branches off for every (unit, format)
//! to be measured there; only the blocks behind it are computed for the branch, all branches side by side, so that memory
//! holds one block and some streams. A transformed block sits in the unquantized model between a rotation and its inverse.

use std::path::PathBuf;

use super::store::{self, Rows, Store};
use super::{Check, Loss, Request, SENSITIVITY_SCHEMA, Sensitivities, SensitivitySpec, Unit, UnitLosses, common_formats, need, units};
use crate::analysis::allocate::{self, Activations, AllocateRequest, Budget};
use crate::analysis::reference::Reference;
use crate::backend::{Backend, Emit, Sequences};
use crate::checkpoint::{Checkpoint, LinearSpec};
use crate::error::{Error, Result};
use crate::eval::statistics;
use crate::format::{Format, LinearWeights};
use crate::model::{Block, Boundary, Stream};
use crate::monitor::Monitor;
use crate::quant::Donors;

/// Share of the windows on which output errors are taken: they only rank.
const SCREENED: usize = 4;

/// Blocks over all windows that making a unit's donor and taking its output error cost, about.
const SCREENING: f64 = 4.0;

/// Where between the cheapest and the dearest plan the checks are, as shares of the bytes between them.
const CHECKS: [f64; 5] = [0.1, 0.3, 0.5, 0.7, 0.9];

/// Measures what `request` asks for and is not in its store yet. Killed at any moment, it goes on from there when it is run
/// again; `fresh` begins anew, donors apart.
pub fn measure<B: Backend>(backend: &B, request: &Request<'_>, fresh: bool, monitor: &Monitor) -> Result<Sensitivities> {
    let identity = request.identity()?;
    let store = Store::open(request, &identity, fresh)?;
    match store.rows.losses.len() {
        0 => store::changes(&request.store, &identity, &request.checkpoint.name).into_iter().for_each(|why| monitor.log(why)),
        known => monitor.log(format!("going on after {known} measured losses")),
    }
    monitor.log(need::statement(request)?);
    let folder = store::donors_directory(&request.store);
    let donors = Donors::open(backend, request.checkpoint, &request.steps, &request.calibration, &folder, monitor)?;
    let units = units(&request.checkpoint.layout, request.by);
    let mut run = Run { backend, request, basis: Basis::new(backend, &donors)?, donors, units, store, monitor };
    run.plan();
    run.screen()?;
    let reference = Reference::new(backend, request.checkpoint, &request.measured.sequences, request.positions, monitor)?;
    run.ends(&reference)?;
    let pairs: Vec<Pair> = (0..run.units.len()).flat_map(|unit| request.formats.iter().map(move |format| (unit, *format))).collect();
    run.losses(&reference, &probes(&pairs), "probe")?;
    run.losses(&reference, &run.chosen(&pairs), "measure")?;
    run.checks(&reference)?;
    run.store.end(&request.formats)?;
    load(request)
}

/// Reads what was measured before for `request`; an error says why what there is does not fit.
pub fn load(request: &Request<'_>) -> Result<Sensitivities> {
    let identity = request.identity()?;
    let rows = Rows::read(&store::folder(&request.store, &identity, &request.checkpoint.name)?)?;
    let layout = &request.checkpoint.layout;
    let units: Option<Vec<UnitLosses>> = units(layout, request.by).into_iter().map(|unit| losses_of(&unit, &rows, request)).collect();
    let (Some(units), Some((ends_kld, _))) = (units, rows.ends) else {
        return Err(Error::input(format!("the sensitivities of {} are not measured to the end", request.checkpoint.name))
            .hint("run `strata sensitivity` again: it goes on where it stopped"));
    };
    let key = Donors::key(&identity.source, &request.steps, &request.calibration);
    let mut found = Sensitivities {
        schema: SENSITIVITY_SCHEMA.into(),
        model: request.checkpoint.name.clone(),
        identity,
        tokens: request.scored_tokens(),
        complete: common_formats(&units).iter().all(|format| rows.done.contains(format)),
        units,
        ends_kld,
        checks: Vec::new(),
        donors: store::donors_directory(&request.store).join(&key[..16]),
    };
    // What a plan is predicted to lose follows from the losses as they are now.
    let check = |check: Check| Some(Check { predicted: found.predict(&check.plan, layout)?, ..check });
    let mut checks: Vec<Check> = rows.checks.into_iter().filter_map(check).collect();
    checks.sort_by(|a, b| a.predicted.total_cmp(&b.predicted));
    found.checks = checks;
    Ok(found)
}

/// Reads what was measured before and holds for `spec`. The formats of embedding and head touch no unit's loss, so
/// measurements with others serve where there are none with those of `spec`; [`Sensitivities::identity`] says with which.
/// `None` where nothing of the model was measured at all; an error says why what there is does not fit.
pub fn recall(checkpoint: &Checkpoint, spec: &SensitivitySpec, store: PathBuf) -> Result<Option<Sensitivities>> {
    if !store::knows(&store, &checkpoint.name) {
        return Ok(None);
    }
    let request = Request::new(checkpoint, spec, store)?;
    load(&request).map(Some).or_else(|error| {
        let others = store::other_ends(&request.store, &request.identity()?);
        let mut found = others.into_iter().filter_map(|(embedding, head)| load(&Request { embedding, head, ..request.clone() }).ok());
        found.next().map(Some).ok_or(error)
    })
}

/// A unit by index, and a format.
type Pair = (usize, Format);

/// Every loss of a unit that the rows give or from which they let it be estimated; `None` where nothing was measured.
fn losses_of(unit: &Unit, rows: &Rows, request: &Request<'_>) -> Option<UnitLosses> {
    let layout = &request.checkpoint.layout;
    let key = |format| (unit.name.clone(), format);
    let mut formats: Vec<Format> = rows.screened.keys().filter(|(name, _)| *name == unit.name).map(|(_, format)| *format).collect();
    formats.sort_unstable_by(|a, b| b.cmp(a));
    let losses = formats.into_iter().map(|format| {
        let output_error = rows.screened[&key(format)];
        let (kld, stderr, measured) = match rows.losses.get(&key(format)) {
            Some((kld, stderr)) => (*kld, *stderr, true),
            None => {
                let (kld, stderr) = estimate(&unit.name, format, rows)?;
                (kld, stderr, false)
            }
        };
        Some(Loss { format, bytes: unit.bytes(layout, format), output_error, kld, stderr, measured })
    });
    let losses: Vec<Loss> = losses.collect::<Option<_>>()?;
    (!losses.is_empty()).then(|| UnitLosses::new(unit.clone(), layout, losses))
}

/// A loss that was not measured: divergence grows with the square of a small error (its second-order expansion), so the
/// measured format of the unit whose output error is nearest gives the ratio.
fn estimate(unit: &str, format: Format, rows: &Rows) -> Option<(f64, f64)> {
    let error = rows.screened.get(&(unit.to_owned(), format))?;
    let distance = |other: f64| (other.max(f64::MIN_POSITIVE).ln() - error.max(f64::MIN_POSITIVE).ln()).abs();
    let mut nearest: Option<(f64, Format, f64, f64)> = None;
    for ((name, other), (kld, stderr)) in &rows.losses {
        let Some(other_error) = rows.screened.get(&(name.clone(), *other)).filter(|error| name == unit && **error > 0.0) else { continue };
        let found = (distance(*other_error), *other, kld / other_error, stderr / other_error);
        // Formats order what is equally near, whatever the map's order.
        if nearest.is_none_or(|best| (found.0, found.1) < (best.0, best.1)) {
            nearest = Some(found);
        }
    }
    nearest.map(|(_, _, ratio, spread)| (ratio * error, spread * error))
}

struct Run<'a, B: Backend> {
    backend: &'a B,
    request: &'a Request<'a>,
    basis: Basis<B>,
    donors: Donors,
    units: Vec<Unit>,
    store: Store,
    monitor: &'a Monitor<'a>,
}

impl<B: Backend> Run<'_, B> {
    fn screened(&self, unit: usize, format: Format) -> Option<f64> {
        self.store.rows.screened.get(&(self.units[unit].name.clone(), format)).copied()
    }

    fn measured(&self, (unit, format): Pair) -> bool {
        self.store.rows.losses.contains_key(&(self.units[unit].name.clone(), format))
    }

    /// Says ahead what is to be done, in blocks that are computed over all windows.
    fn plan(&self) {
        let (blocks, formats) = (self.request.checkpoint.layout.blocks.len(), &self.request.formats);
        let pairs: Vec<Pair> = (0..self.units.len()).flat_map(|unit| formats.iter().map(move |format| (unit, *format))).collect();
        let open = |pairs: &[Pair]| pairs.iter().filter(|pair| !self.measured(**pair)).copied().collect::<Vec<_>>();
        let behind = |pair: &Pair| (blocks - self.units[pair.0].block) as f64;
        let probes = open(&probes(&pairs));
        let (probed, rest): (f64, f64) = (probes.iter().map(behind).sum(), open(&pairs).iter().map(behind).sum());
        let screened = pairs.iter().filter(|(unit, format)| self.screened(*unit, *format).is_none()).count();
        self.monitor.plan([
            ("screen", SCREENING * screened as f64),
            ("probe", probed),
            ("measure", (self.request.exact * rest - probed).max(0.0)),
            ("check", (CHECKS.len() * self.activations().len() * blocks) as f64),
        ]);
    }

    /// Makes every donor, and takes the output error of every unit in every format.
    fn screen(&mut self) -> Result<()> {
        let (backend, checkpoint, formats) = (self.backend, self.request.checkpoint, &self.request.formats);
        let blocks = &checkpoint.layout.blocks;
        let missing = |unit: usize| formats.iter().any(|format| self.screened(unit, *format).is_none());
        let donors_missing = blocks.iter().any(|block| !self.donors.has_block(block, formats))
            || !self.donors.has(crate::quant::donors::Place::Head, self.request.head);
        if !donors_missing && !(0..self.units.len()).any(missing) {
            return Ok(());
        }
        let _making = if donors_missing { Some(self.donors.lock()?) } else { None };
        let batches =
            |sequences: &[Vec<u32>]| sequences.iter().map(|ids| (ids.clone(), Sequences::new(vec![ids.len()]))).collect::<Vec<_>>();
        let calibration = batches(&self.request.calibration.sequences);
        let windows = &self.request.measured.sequences;
        let screened = batches(&windows[..windows.len().div_ceil(SCREENED)]);
        let lengths = |batches: &[(Vec<u32>, Sequences)]| batches.iter().map(|(_, sequences)| sequences.clone()).collect::<Vec<_>>();
        let (calibration_sequences, screened_sequences) = (lengths(&calibration), lengths(&screened));
        let mut calibration = Stream::new(backend, checkpoint, &calibration)?;
        let mut stream = Stream::new(backend, checkpoint, &screened)?;
        self.monitor.stage("screen", blocks.len() + 1);
        for spec in blocks {
            if !self.donors.has_block(spec, formats) {
                let inputs = self.basis.enter_all(backend, calibration.boundary())?;
                let streams = (calibration.boundary(), &inputs);
                self.donors.make_block(backend, checkpoint, spec, formats, streams, &calibration_sequences, self.monitor)?;
            }
            let units: Vec<usize> = (0..self.units.len()).filter(|unit| self.units[*unit].block == spec.index).collect();
            let todo: Vec<Pair> = units
                .into_iter()
                .flat_map(|unit| formats.iter().map(move |format| (unit, *format)))
                .filter(|(unit, format)| self.screened(*unit, *format).is_none())
                .collect();
            if !todo.is_empty() {
                let inputs = self.basis.enter_all(backend, stream.boundary())?;
                self.screen_block(&todo, &inputs, &screened_sequences)?;
            }
            calibration.advance(spec.index)?;
            stream.advance(spec.index)?;
            self.monitor.step(spec.index + 1, format!("block {}: donors and output errors", spec.index))?;
        }
        let inputs = self.basis.enter_all(backend, calibration.boundary())?;
        self.donors.make_head(backend, checkpoint, self.request.head, &inputs)?;
        self.monitor.step(blocks.len() + 1, "head: donor")
    }

    fn screen_block(&mut self, todo: &[Pair], inputs: &Boundary<B>, sequences: &[Sequences]) -> Result<()> {
        let (backend, checkpoint) = (self.backend, self.request.checkpoint);
        let spec = &checkpoint.layout.blocks[self.units[todo[0].0].block];
        let weights = self.donors.block(backend, checkpoint, spec)?;
        let outputs = |block: &Block<B>| {
            let mix = |(h, sequences): (Result<B::Tensor>, _)| backend.download(&block.mix(backend, &h?, sequences, None, None)?);
            inputs.iter(backend).zip(sequences).map(mix).collect::<Result<Vec<_>>>()
        };
        let exact = outputs(&weights.prepare(backend, |_, _| None)?)?;
        let norm: f64 = exact.iter().flatten().map(|value| f64::from(*value).powi(2)).sum();
        let mut found = Vec::with_capacity(todo.len());
        for (unit, format) in todo {
            let rounded = outputs(&weights.prepare(backend, formats_of(&self.units[*unit], *format))?)?;
            let pairs = exact.iter().flatten().zip(rounded.iter().flatten());
            let difference: f64 = pairs.map(|(exact, rounded)| f64::from(exact - rounded).powi(2)).sum();
            found.push((*unit, *format, if norm > 0.0 { difference / norm } else { 0.0 }));
            self.monitor.check()?;
        }
        for (unit, format, error) in found {
            self.store.add_screened(&self.units[unit].name, format, error)?;
        }
        Ok(())
    }

    /// What embedding and head lose with unquantized blocks between them.
    fn ends(&mut self, reference: &Reference<'_, B>) -> Result<()> {
        if self.store.rows.ends.is_some() {
            return Ok(());
        }
        let (backend, checkpoint) = (self.backend, self.request.checkpoint);
        let table = self.donors.embedding(backend, checkpoint, self.request.embedding)?;
        let embedded: Vec<B::Tensor> = reference.ids().iter().map(|ids| backend.embed(&table, ids)).collect::<Result<_>>()?;
        let mut streams = [self.basis.leave_all(backend, embedded)?];
        reference.run_from(0, &mut streams, self.monitor)?;
        let head = self.donors.head(backend, checkpoint, self.request.head)?;
        let logits = |h: &B::Tensor, rows: &[usize]| {
            let h = self.basis.enter(backend, &backend.gather_rows(h, rows)?)?;
            self.donors.logits(backend, checkpoint, &head, &h)
        };
        let divergence = reference.divergence(&streams[0], logits)?;
        self.store.add_ends(mean_and_error(&divergence))
    }

    /// The pairs of largest estimated loss that fill the share to be measured.
    fn chosen(&self, pairs: &[Pair]) -> Vec<Pair> {
        let wanted = (self.request.exact * pairs.len() as f64).ceil() as usize;
        let (known, mut open): (Vec<Pair>, Vec<Pair>) = pairs.iter().copied().partition(|pair| self.measured(*pair));
        let estimated = |(unit, format): &Pair| estimate(&self.units[*unit].name, *format, &self.store.rows).map_or(0.0, |(kld, _)| kld);
        open.sort_by(|a, b| estimated(b).total_cmp(&estimated(a)).then(a.cmp(b)));
        open.truncate(wanted.saturating_sub(known.len()));
        open
    }

    /// Measures the losses of `pairs` that are not known yet.
    fn losses(&mut self, reference: &Reference<'_, B>, pairs: &[Pair], stage: &str) -> Result<()> {
        let open: Vec<Pair> = pairs.iter().copied().filter(|pair| !self.measured(*pair)).collect();
        let Some(last) = open.iter().map(|(unit, _)| self.units[*unit].block).max() else { return Ok(()) };
        self.store.begin(&self.request.formats)?;
        self.monitor.stage(stage, open.len());
        let mut stream = reference.stream()?;
        let mut done = 0;
        for index in 0..=last {
            let here: Vec<Pair> = open.iter().copied().filter(|(unit, _)| self.units[*unit].block == index).collect();
            for pairs in here.chunks(reference.held_streams()) {
                for (pair, divergence) in pairs.iter().zip(self.branch(reference, &stream, index, pairs)?) {
                    let (unit, (kld, stderr)) = (&self.units[pair.0], mean_and_error(&divergence));
                    self.store.add_loss(&unit.name, pair.1, (kld, stderr))?;
                    self.monitor.measured(index, &unit.name, pair.1, kld);
                    done += 1;
                    self.monitor.step(done, format!("{} {}: {kld:.2e} ± {:.0e} nats", unit.name, pair.1, 1.96 * stderr))?;
                }
            }
            stream.advance(index)?;
        }
        Ok(())
    }

    /// Divergence by sequence of models with one unit of block `index` quantized.
    fn branch(&self, reference: &Reference<'_, B>, stream: &Stream<'_, B>, index: usize, pairs: &[Pair]) -> Result<Vec<Vec<f64>>> {
        let (backend, checkpoint) = (self.backend, self.request.checkpoint);
        let weights = self.donors.block(backend, checkpoint, &checkpoint.layout.blocks[index])?;
        let inputs = self.basis.enter_all(backend, stream.boundary())?;
        let mut streams = Vec::with_capacity(pairs.len());
        for (unit, format) in pairs {
            let block = weights.prepare(backend, formats_of(&self.units[*unit], *format))?;
            let mix = |(h, sequences): (Result<B::Tensor>, _)| block.mix(backend, &h?, sequences, None, None);
            let mixed = inputs.iter(backend).zip(reference.sequences()).map(mix).collect::<Result<Vec<_>>>()?;
            let mixed = self.basis.leave_all(backend, mixed)?;
            let added = stream.boundary().iter(backend).zip(&mixed).map(|(h, mixed)| backend.add(h?, mixed));
            streams.push(added.collect::<Result<Vec<_>>>()?);
            self.monitor.check()?;
        }
        reference.run_from(index + 1, &mut streams, self.monitor)?;
        streams.iter().map(|stream| reference.divergence(stream, |h, rows| reference.logits(h, rows))).collect()
    }

    /// Activation bits of the candidate formats.
    fn activations(&self) -> Vec<Activations> {
        let present = |bits: &Activations| self.request.formats.iter().any(|format| bits.allow(*format));
        [Activations::Int8, Activations::Float].into_iter().filter(present).collect()
    }

    /// Puts some plans along the fronts with int8 and with 16-bit activations together and measures them.
    fn checks(&mut self, reference: &Reference<'_, B>) -> Result<()> {
        let layout = &self.request.checkpoint.layout;
        let losses = load(self.request)?;
        let base = self.request.ends_plan();
        let mut plans = Vec::new();
        for activations in self.activations() {
            for share in CHECKS {
                let wanted = AllocateRequest { activations, ..AllocateRequest::new(base.clone(), Budget::Share(share)) };
                let plan = allocate::allocate(&losses, layout, &wanted)?.plan;
                if !self.store.rows.checks.iter().any(|check| check.plan == plan) && !plans.contains(&plan) {
                    plans.push(plan);
                }
            }
        }
        if plans.is_empty() {
            return Ok(());
        }
        let measured = reference.divergence_of_plans(&self.donors, &plans, self.monitor, "check")?;
        for (plan, divergence) in plans.into_iter().zip(measured) {
            let (measured, stderr) = mean_and_error(&divergence);
            let predicted = losses.predict(&plan, layout).unwrap_or(f64::NAN);
            self.store.add_check(Check { plan, predicted, measured, stderr })?;
        }
        Ok(())
    }
}

/// Of each unit the narrowest format, with 8-bit and with 16-bit activations: what is measured in any case, and tells
/// how much of a unit's output error reaches the logits.
fn probes(pairs: &[Pair]) -> Vec<Pair> {
    let narrowest = |(unit, format): &&Pair| {
        let alike = pairs.iter().filter(|(other, wide)| other == unit && wide.activation_bits() == format.activation_bits());
        alike.map(|(_, format)| format.weight_bits()).min() == Some(format.weight_bits())
    };
    pairs.iter().filter(narrowest).copied().collect()
}

/// Gives `format` to the linears of `unit` and none to the others.
fn formats_of(unit: &Unit, format: Format) -> impl Fn(&LinearSpec, &str) -> Option<Format> {
    move |linear, _| unit.linears.contains(&linear.name).then_some(format)
}

/// Mean over windows and its standard error: tokens of a window are not independent of each other.
fn mean_and_error(by_window: &[f64]) -> (f64, f64) {
    (statistics::mean(by_window), statistics::standard_error(by_window))
}

/// The basis of the residual stream that transformed blocks read and write.
struct Basis<B: Backend> {
    /// `h Q` and `h Qᵀ`; `None` without a rotation.
    rotation: Option<(B::Linear, B::Linear)>,
}

impl<B: Backend> Basis<B> {
    fn new(backend: &B, donors: &Donors) -> Result<Self> {
        let Some(q) = donors.transforms().rotation() else { return Ok(Self { rotation: None }) };
        let n = q.nrows();
        let matrix = |entry: &dyn Fn(usize, usize) -> f64| {
            let values = (0..n).flat_map(|r| (0..n).map(move |c| (r, c))).map(|(r, c)| entry(r, c) as f32).collect();
            backend.prepare(LinearWeights::float(values, n))
        };
        Ok(Self { rotation: Some((matrix(&|r, c| q[(c, r)])?, matrix(&|r, c| q[(r, c)])?)) })
    }

    /// From the model's basis into the transforms'.
    fn enter(&self, backend: &B, h: &B::Tensor) -> Result<B::Tensor> {
        match &self.rotation {
            Some((into, _)) => backend.linear(into, &backend.emit(h.clone(), Emit::FLOAT)?),
            None => Ok(h.clone()),
        }
    }

    fn enter_all(&self, backend: &B, stream: &Boundary<B>) -> Result<Boundary<B>> {
        Ok(stream.iter(backend).map(|h| self.enter(backend, &h?)).collect::<Result<Vec<_>>>()?.into())
    }

    /// From the transforms' basis into the model's.
    fn leave_all(&self, backend: &B, stream: Vec<B::Tensor>) -> Result<Vec<B::Tensor>> {
        let Some((_, out)) = &self.rotation else { return Ok(stream) };
        stream.into_iter().map(|h| backend.linear(out, &backend.emit(h, Emit::FLOAT)?)).collect()
    }
}
