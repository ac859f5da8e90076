//! `strata eval`.

use std::path::{Path, PathBuf};

use clap::Args;
use strata::checkpoint;
use strata::engine::{Event, Job};
use strata::error::{Error, Result};
use strata::eval::run::{EvaluateRequest, Evaluated, ModelToEvaluate};
use strata::eval::speed::SpeedRequest;
use strata::eval::tasks::Task;
use strata::eval::{DataSource, ResultSet};
use strata::session::paths;
use strata::session::replay::finish;

use super::progress::Follow;
use super::results::Recorder;
use super::{Common, output};

#[derive(Args)]
pub struct Eval {
    /// Models or variants; with several, the first unquantized one is what the others are compared with.
    #[arg(required = true)]
    models: Vec<String>,
    #[command(flatten)]
    measure: Measure,
}

/// What to measure; shared with `compare`.
#[derive(Args)]
pub struct Measure {
    /// Tasks, separated by commas; all five unless given, `none` for none.
    #[arg(long, value_delimiter = ',')]
    tasks: Option<Vec<String>>,
    /// `embedded`, `hub`, or a directory with a JSON-lines file a task. Unless given: the rows compiled in for the demo
    /// and its variants, the public datasets from the hub for other models.
    #[arg(long, value_name = "SOURCE")]
    data: Option<PathBuf>,
    /// First rows of each task only.
    #[arg(long)]
    limit: Option<usize>,
    /// Write one JSON line a row.
    #[arg(long, value_name = "FILE")]
    samples: Option<PathBuf>,
    /// Write a page with tables and plots that needs no network.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// List the rows that a variant has right and the base wrong, or the other way round.
    #[arg(long)]
    flips: bool,
    /// Text for perplexity and divergence; the demo's held-out text unless given.
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Windows of that text; 0 for none.
    #[arg(long, default_value_t = 24)]
    windows: usize,
    /// Tokens of each window.
    #[arg(long, default_value_t = 256)]
    window_tokens: usize,
    /// Tokens of that text that variants with rounded caches decode one by one; 0 for none.
    #[arg(long, default_value_t = strata::eval::decode::DEFAULT_TOKENS)]
    decode_tokens: usize,
    /// Leave out rows that cannot be used, and count them.
    #[arg(long)]
    skip_bad_rows: bool,
    /// Score all rows again, though an evaluation that did not end has scored some.
    #[arg(long)]
    fresh: bool,
    /// Size that the folder of what reference models said may have; those used longest ago are removed.
    #[arg(long, value_name = "SIZE", default_value = "8GiB", value_parser = strata::size::parse)]
    reference_cache: u64,
    /// Do not measure speed.
    #[arg(long)]
    no_speed: bool,
    /// Prompt lengths at which speed is measured beside 512 tokens, separated by commas.
    #[arg(long, value_delimiter = ',', value_name = "TOKENS")]
    speed_prompts: Vec<usize>,
    /// Numbers of sequences at once at which speed is measured beside 1, separated by commas.
    #[arg(long, value_delimiter = ',', value_name = "SEQUENCES")]
    speed_batches: Vec<usize>,
}

impl Eval {
    pub fn run(&self, common: &Common) -> Result<()> {
        let mut request = self.measure.request(common.host_memory)?;
        let mut models = self.models.iter().map(|path| name(path)).collect::<Result<Vec<_>>>()?;
        if models.len() > 1
            && let Some(base) = models.iter().position(|model| model.name == "base")
        {
            request.reference = Some(models.remove(base));
        }
        request.models = models;
        self.measure.evaluate(request, common)
    }
}

impl Measure {
    /// The engine's request, models yet to be named.
    pub fn request(&self, host_memory: Option<u64>) -> Result<EvaluateRequest> {
        let tasks = match &self.tasks {
            None => Task::ALL.to_vec(),
            Some(names) if names.as_slice() == ["none"] => Vec::new(),
            Some(names) => names.iter().map(|name| name.trim().parse()).collect::<Result<_>>()?,
        };
        Ok(EvaluateRequest {
            reference: None,
            models: Vec::new(),
            tasks,
            data: self.data.as_deref().map_or(DataSource::Automatic, DataSource::named),
            limit: self.limit,
            text: self.text.clone(),
            windows: self.windows,
            window_tokens: self.window_tokens,
            decode_tokens: self.decode_tokens,
            speed: (!self.no_speed).then(|| SpeedRequest::with_grid(&self.speed_prompts, &self.speed_batches)),
            skip_bad_rows: self.skip_bad_rows,
            journal: Some(paths::evaluations_directory()),
            fresh: self.fresh,
            references: Some(paths::references_directory()),
            reference_bytes: self.reference_cache,
            host_memory,
        })
    }

    /// Runs `request`, writes the samples asked for, and prints the results.
    pub fn evaluate(&self, request: EvaluateRequest, common: &Common) -> Result<()> {
        let (engine, mut events) = common.engine()?;
        engine.submit(Job::Evaluate(Box::new(request)))?;
        let mut follow = Follow::new();
        let recorder = Recorder::new(None);
        let mut results: Vec<Evaluated> = Vec::new();
        finish(&mut events, &mut |event| {
            follow.event(event);
            recorder.event(event);
            if let Event::Evaluated { evaluated, .. } = event {
                results.push((**evaluated).clone());
            }
        })?;
        if let Some(path) = &self.samples {
            write_samples(path, &results)?;
        }
        let set = ResultSet::new(results);
        if let Some(path) = &self.html {
            strata::files::write_atomically(path, output::page(&set).as_bytes())?;
        }
        output::results(&set, self.flips, common)
    }
}

/// What a model is called in results: `base` unless it is a variant, then its folder's name.
pub fn name(path: &str) -> Result<ModelToEvaluate> {
    let quantized = checkpoint::open(path)?.variant.is_some();
    let folder = Path::new(path).file_name().map_or_else(|| path.to_owned(), |name| name.to_string_lossy().into_owned());
    Ok(ModelToEvaluate { name: if quantized { folder } else { "base".into() }, path: path.to_owned() })
}

/// One JSON line a row; with several models each line names its own.
fn write_samples(path: &Path, results: &[Evaluated]) -> Result<()> {
    let mut lines = String::new();
    for evaluated in results {
        for sample in &evaluated.samples {
            let mut line = serde_json::to_value(sample).map_err(|error| Error::run(format!("a sample cannot be written: {error}")))?;
            if results.len() > 1 {
                line["variant"] = evaluated.result.variant.clone().into();
            }
            lines.push_str(&line.to_string());
            lines.push('\n');
        }
    }
    strata::files::write_atomically(path, lines.as_bytes())
}
