//! Headless replay of a session: quantize its variants, evaluate the model and them, hand out the results.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc::UnboundedReceiver;

use super::file::{Session, VariantSpec};
use super::paths;
use crate::checkpoint::{self, StorageLayout};
use crate::engine::{AllocateJob, Engine, Event, Job, QuantizeJob, SensitivityJob};
use crate::error::{Error, Result};
use crate::eval::run::{Evaluated, ModelToEvaluate};
use crate::monitor::CancelToken;

/// What a replay does beside what its session says.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ReplayOptions {
    /// Only this variant.
    pub variant: Option<String>,
    /// Make variants again that are there already, and forget what an evaluation that did not end has scored.
    pub fresh: bool,
    /// Folder for the variants, each under its name; without it they go to the user's data folder.
    pub output: Option<PathBuf>,
    /// Quantize only.
    pub skip_evaluation: bool,
    /// Only measure what the parts of the model lose under the steps of each variant.
    #[serde(default)]
    pub measure: bool,
    /// Bytes of memory that quantizing and evaluation may take; `None` for what is free.
    pub host_memory: Option<u64>,
    /// Bytes that the folder of references may hold; `None` for the usual.
    #[serde(default)]
    pub reference_bytes: Option<u64>,
}

/// A session being replayed on an engine.
pub struct Replay<'a> {
    pub session: &'a Session,
    pub options: ReplayOptions,
    /// Variants that an earlier process of the same run has made.
    pub made: BTreeMap<String, PathBuf>,
    /// Looked at between two jobs; the engine has tokens of its own for those that run.
    pub cancel: CancelToken,
}

impl Replay<'_> {
    /// Runs the session to its end; every event of the engine is also handed to `watch`. Returns the evaluated models,
    /// the unquantized one first.
    pub fn run(&self, engine: &Engine, events: &mut UnboundedReceiver<Event>, watch: &mut dyn FnMut(&Event)) -> Result<Vec<Evaluated>> {
        let variants = self.variants()?;
        if self.options.measure {
            for variant in variants {
                self.cancel.check()?;
                engine.submit(Job::Sensitivity(Box::new(self.sensitivity_job(variant)?)))?;
                finish(events, watch)?;
            }
            return Ok(Vec::new());
        }
        let mut models = Vec::new();
        for variant in variants {
            self.cancel.check()?;
            if let Some(path) = self.made.get(&variant.name) {
                models.push(ModelToEvaluate { name: variant.name.clone(), path: path.display().to_string() });
                continue;
            }
            engine.submit(Job::Quantize(Box::new(self.quantize_job(variant)?)))?;
            let mut path = None;
            finish(events, &mut |event| {
                if let Event::Quantized { path: at, .. } = event {
                    path = Some(at.display().to_string());
                }
                watch(event);
            })?;
            let path = path.ok_or_else(|| Error::run(format!("variant `{}` ended without a result", variant.name)))?;
            models.push(ModelToEvaluate { name: variant.name.clone(), path });
        }
        if self.options.skip_evaluation {
            return Ok(Vec::new());
        }
        self.cancel.check()?;
        let mut request = self.session.evaluate.request()?;
        request.reference = Some(ModelToEvaluate { name: "base".into(), path: self.session.model.name() });
        request.models = models;
        request.journal = Some(paths::evaluations_directory());
        request.fresh = self.options.fresh;
        request.references = Some(paths::references_directory());
        request.reference_bytes = self.options.reference_bytes.unwrap_or(request.reference_bytes);
        request.host_memory = self.options.host_memory;
        engine.submit(Job::Evaluate(Box::new(request)))?;
        let mut results = Vec::new();
        finish(events, &mut |event| {
            if let Event::Evaluated { evaluated, .. } = event {
                results.push((**evaluated).clone());
            }
            watch(event);
        })?;
        Ok(results)
    }

    fn variants(&self) -> Result<Vec<&VariantSpec>> {
        let all = &self.session.variants;
        let Some(name) = &self.options.variant else { return Ok(all.iter().collect()) };
        match all.iter().find(|variant| variant.name == *name) {
            Some(variant) => Ok(vec![variant]),
            None => {
                let names = all.iter().map(|variant| variant.name.as_str()).collect::<Vec<_>>().join(", ");
                Err(Error::input(format!("the session has no variant `{name}`")).hint(format!("its variants are {names}")))
            }
        }
    }

    fn sensitivity_job(&self, variant: &VariantSpec) -> Result<SensitivityJob> {
        let (model, store) = (self.session.model.name(), paths::data_directory());
        let (recipe, plan) = variant.plan(&checkpoint::open(&model)?.layout)?;
        let allocate = AllocateJob::new(&recipe, &variant.overrides, store.clone());
        Ok(SensitivityJob::new(model, recipe.steps(), &plan, self.session.calibration.clone(), allocate.as_ref(), store))
    }

    fn quantize_job(&self, variant: &VariantSpec) -> Result<QuantizeJob> {
        let checkpoint = checkpoint::open(&self.session.model.name())?;
        if let Some(expected) = &self.session.model.sha256 {
            let found = checkpoint.sha256()?;
            if *expected != found {
                return Err(Error::input(format!("{} has the hash {found}, and the session was made for {expected}", checkpoint.name))
                    .hint("give the checkpoint that the session names, or remove `sha256` from its [model]"));
            }
        }
        let (recipe, plan) = variant.plan(&checkpoint.layout)?;
        Ok(QuantizeJob {
            model: self.session.model.name(),
            name: variant.name.clone(),
            steps: recipe.steps(),
            allocate: AllocateJob::new(&recipe, &variant.overrides, paths::data_directory()),
            recipe: recipe.name,
            plan,
            sample: self.session.calibration.clone(),
            evaluation: self.session.evaluate.files(),
            storage: StorageLayout::Native,
            output: self.options.output.as_ref().map(|folder| folder.join(&variant.name)),
            store: paths::variants_directory(),
            force: self.options.fresh,
            host_memory: self.options.host_memory,
            donors: None,
        })
    }
}

/// Hands events to `watch` until the job that runs is finished.
pub fn finish(events: &mut UnboundedReceiver<Event>, watch: &mut dyn FnMut(&Event)) -> Result<()> {
    while let Some(event) = events.blocking_recv() {
        watch(&event);
        if let Event::Finished { outcome, .. } = event {
            return outcome;
        }
    }
    Err(Error::run("the engine stopped before the job was finished"))
}
