//! The session file: reading with clear errors, and saving that keeps the file's comments.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use toml_edit::{DocumentMut, Item, TableLike};

use crate::checkpoint::{DEMO, Layout};
use crate::error::{Error, Result};
use crate::eval::DataSource;
use crate::eval::decode::DEFAULT_TOKENS;
use crate::eval::run::EvaluateRequest;
use crate::eval::speed::SpeedRequest;
use crate::eval::tasks::Task;
use crate::format::Plan;
use crate::quant::overlap::EvaluationFiles;
use crate::quant::{Override, Recipe, SampleSpec};

/// Schema of a session file.
pub const SESSION_SCHEMA: &str = "strata.session/1";

/// What a session file says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Session {
    pub schema: String,
    pub model: ModelSpec,
    #[serde(default)]
    pub calibration: SampleSpec,
    #[serde(default, rename = "variant", skip_serializing_if = "Vec::is_empty")]
    pub variants: Vec<VariantSpec>,
    #[serde(default)]
    pub evaluate: EvaluateSpec,
    /// Ignored by replay.
    #[serde(default, skip_serializing_if = "UiSpec::is_default")]
    pub ui: UiSpec,
}

/// Which model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSpec {
    /// `demo`, a directory, or a hub id.
    pub id: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// Hash that the checkpoint must have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
}

impl ModelSpec {
    /// The name that [`crate::checkpoint::open`] takes.
    pub fn name(&self) -> String {
        self.revision.as_ref().map_or_else(|| self.id.clone(), |revision| format!("{}@{revision}", self.id))
    }
}

/// One variant: a recipe with changes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VariantSpec {
    pub name: String,
    /// A built-in recipe's name or a recipe file.
    pub recipe: String,
    /// Stored bits a weight of the blocks' linears, in place of the budget of the recipe's `[allocate]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bits: Option<f64>,
    #[serde(default, rename = "override", skip_serializing_if = "Vec::is_empty")]
    pub overrides: Vec<Override>,
}

impl VariantSpec {
    /// A recipe as it is.
    pub fn new(name: impl Into<String>, recipe: impl Into<String>) -> Self {
        Self { name: name.into(), recipe: recipe.into(), bits: None, overrides: Vec::new() }
    }

    /// The variant's recipe with its budget, and its plan for a model of this layout.
    pub fn plan(&self, layout: &Layout) -> Result<(Recipe, Plan)> {
        let mut recipe = Recipe::find(&self.recipe)?;
        match (self.bits, &mut recipe.allocate) {
            (Some(bits), Some(allocate)) => *allocate = std::mem::take(allocate).with_bits(bits),
            (Some(_), None) => {
                return Err(Error::input(format!("variant `{}` has a budget, and its recipe gives the formats itself", self.name))
                    .hint("remove `bits`, or take a recipe with [allocate], such as phase3-allocated"));
            }
            (None, _) => {}
        }
        let plan = recipe.plan(layout, &self.overrides).map_err(|error| error.context(format!("variant `{}`", self.name)))?;
        Ok((recipe, plan))
    }
}

/// What is measured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EvaluateSpec {
    pub tasks: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<usize>,
    /// `embedded`, `hub`, or a directory with the tasks' rows; without it the rows compiled in for the demo, the hub's for others.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<PathBuf>,
    /// Leave out rows that cannot be used, and count them.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub skip_bad_rows: bool,
    /// `embedded` or a text file, for perplexity and divergence.
    pub text: String,
    /// Windows of that text, and tokens of each.
    pub windows: usize,
    pub window_tokens: usize,
    /// Tokens of that text that variants with rounded caches decode one by one, 0 for none.
    pub decode_tokens: usize,
    pub speed: bool,
    /// Further prompt lengths and batch sizes whose speed is measured.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub speed_prompts: Vec<usize>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub speed_batches: Vec<usize>,
}

impl Default for EvaluateSpec {
    fn default() -> Self {
        Self {
            tasks: Task::ALL.map(|task| task.name().to_owned()).to_vec(),
            limit: None,
            data: None,
            skip_bad_rows: false,
            text: "embedded".into(),
            windows: 24,
            window_tokens: 256,
            decode_tokens: DEFAULT_TOKENS,
            speed: true,
            speed_prompts: Vec::new(),
            speed_batches: Vec::new(),
        }
    }
}

impl EvaluateSpec {
    /// The files that are evaluated on, beside what is compiled in.
    pub fn files(&self) -> EvaluationFiles {
        EvaluationFiles { text: (self.text != "embedded").then(|| PathBuf::from(&self.text)), data: self.data.clone() }
    }

    /// The engine's request for this, models yet to be named.
    pub fn request(&self) -> Result<EvaluateRequest> {
        Ok(EvaluateRequest {
            reference: None,
            models: Vec::new(),
            tasks: self.tasks.iter().map(|name| name.parse()).collect::<Result<_>>()?,
            data: self.data.as_deref().map_or(DataSource::Automatic, DataSource::named),
            limit: self.limit,
            skip_bad_rows: self.skip_bad_rows,
            text: (self.text != "embedded").then(|| PathBuf::from(&self.text)),
            windows: self.windows,
            window_tokens: self.window_tokens,
            decode_tokens: self.decode_tokens,
            speed: self.speed.then(|| SpeedRequest::with_grid(&self.speed_prompts, &self.speed_batches)),
            ..EvaluateRequest::default()
        })
    }
}

/// How the workbench looked when the session was saved.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct UiSpec {
    /// Name of the pane that had the focus.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pane: Option<String>,
    /// Column that the results were sorted by.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sort: Option<String>,
    /// Column that the list of blocks was sorted by, `-` in front for largest first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers_sort: Option<String>,
    /// Blocks of a kind were listed together.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub layers_grouped: bool,
    /// GPU that costs were predicted for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpu: Option<String>,
}

impl UiSpec {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl Session {
    /// A session on `model` with nothing in it yet.
    pub fn new(model: &str) -> Self {
        Self {
            schema: SESSION_SCHEMA.into(),
            model: ModelSpec { id: model.into(), revision: None, sha256: None },
            calibration: SampleSpec::default(),
            variants: Vec::new(),
            evaluate: EvaluateSpec::default(),
            ui: UiSpec::default(),
        }
    }

    /// The session that is compiled in, `sessions/demo.toml`.
    pub fn demo() -> Result<Self> {
        Self::parse(include_str!("../../sessions/demo.toml"), "sessions/demo.toml")
    }

    /// Reads a session file.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|error| Error::io("reading", path, &error))?;
        Self::parse(&text, &path.display().to_string())
    }

    /// Parses a session; errors name `origin`, line and column.
    pub fn parse(text: &str, origin: &str) -> Result<Self> {
        let located = |error: toml::de::Error| Error::toml(origin, text, &error).hint("docs/sessions.md lists the keys of a session file");
        let table: toml::Table = toml::from_str(text).map_err(located)?;
        match table.get("schema").and_then(toml::Value::as_str) {
            Some(SESSION_SCHEMA) => {}
            Some(other) => {
                let newer = other.strip_prefix("strata.session/").and_then(|version| version.parse::<u32>().ok()).is_some_and(|v| v > 1);
                let hint = if newer { "it was written by a newer strata: update strata" } else { "set schema = \"strata.session/1\"" };
                return Err(Error::input(format!("{origin} has schema `{other}`, and this strata reads `{SESSION_SCHEMA}`")).hint(hint));
            }
            None => {
                return Err(Error::input(format!("{origin} has no `schema`")).hint(format!("begin it with schema = \"{SESSION_SCHEMA}\"")));
            }
        }
        let session: Self = toml::from_str(text).map_err(located)?;
        session.check().map_err(|error| error.context(origin))?;
        Ok(session)
    }

    fn check(&self) -> Result<()> {
        for (index, variant) in self.variants.iter().enumerate() {
            let plain = !variant.name.is_empty() && !variant.name.starts_with('.') && !variant.name.contains(['/', '\\']);
            if !plain || variant.name == "base" {
                return Err(Error::input(format!("a variant cannot be named `{}`", variant.name))
                    .hint("a name is a file name of its own; `base` is the unquantized model"));
            }
            if self.variants[..index].iter().any(|other| other.name == variant.name) {
                return Err(Error::input(format!("two variants are named `{}`", variant.name)));
            }
        }
        self.evaluate.request()?.check()
    }

    /// Whether the session is on the embedded model.
    pub fn is_demo(&self) -> bool {
        self.model.id == DEMO
    }

    /// The session as TOML. Where `existing` is the text of an earlier version of the file, its comments, order and
    /// spelling stay wherever the value is the same.
    pub fn to_toml(&self, existing: Option<&str>) -> Result<String> {
        let unwritable = |error: &dyn std::fmt::Display| Error::run(format!("the session cannot be written: {error}"));
        let text = toml::to_string(self).map_err(|error| unwritable(&error))?;
        let new: DocumentMut = text.parse().map_err(|error| unwritable(&error))?;
        let Some(mut old) = existing.and_then(|text| text.parse::<DocumentMut>().ok()) else { return Ok(text) };
        merge(old.as_table_mut(), new.as_table());
        Ok(old.to_string())
    }

    /// Saves the session to `path`, keeping the comments of what is there, by writing beside it and renaming.
    pub fn save(&self, path: &Path) -> Result<()> {
        let existing = std::fs::read_to_string(path).ok();
        let text = self.to_toml(existing.as_deref())?;
        crate::files::write_atomically(path, text.as_bytes())
    }
}

/// Makes `old` say what `new` says, leaving alone what is the same already.
fn merge(old: &mut dyn TableLike, new: &dyn TableLike) {
    let gone: Vec<String> = old.iter().map(|(key, _)| key.to_owned()).filter(|key| !new.contains_key(key)).collect();
    for key in gone {
        old.remove(&key);
    }
    for (key, item) in new.iter() {
        match (old.get_mut(key), item) {
            (Some(Item::ArrayOfTables(old)), Item::ArrayOfTables(new)) => {
                while old.len() > new.len() {
                    old.remove(old.len() - 1);
                }
                for (index, table) in new.iter().enumerate() {
                    match old.get_mut(index) {
                        Some(old) => merge(old, table),
                        None => old.push(table.clone()),
                    }
                }
            }
            (Some(existing), item) if same_value(existing, item) => {}
            (Some(existing), item) => match (existing.as_table_like_mut(), item.as_table_like()) {
                (Some(old), Some(new)) => merge(old, new),
                _ => *existing = item.clone(),
            },
            (None, item) => {
                old.insert(key, item.clone());
            }
        }
    }
}

/// Whether two items say the same, however they are spelt.
fn same_value(a: &Item, b: &Item) -> bool {
    let value = |item: &Item| {
        let text = format!("x = {}", item.to_string().trim());
        toml::from_str::<toml::Table>(&text).ok()
    };
    matches!((value(a), value(b)), (Some(a), Some(b)) if a == b)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# my session\nschema = \"strata.session/1\"\n\n[model]\nid = \"demo\" # embedded\n\n[[variant]]\nname = \"a\"\nrecipe = \"phase1\"\n\n[evaluate]\ntasks = [\n    \"piqa\", # quick\n]\n";

    #[test]
    fn saving_keeps_comments_and_reads_back_the_same() {
        let mut session = Session::parse(TEXT, "test").unwrap();
        session.variants.push(VariantSpec {
            bits: Some(4.5),
            overrides: vec![Override { selector: "block:0".parse().unwrap(), format: "w8a8".parse().unwrap() }],
            ..VariantSpec::new("b", "phase3-allocated")
        });
        let text = session.to_toml(Some(TEXT)).unwrap();
        for comment in ["# my session", "# embedded", "# quick"] {
            assert!(text.contains(comment), "{text}");
        }
        assert_eq!(Session::parse(&text, "test").unwrap(), session);
        session.variants.clear();
        let text = session.to_toml(Some(&text)).unwrap();
        assert_eq!(Session::parse(&text, "test").unwrap(), session);
    }

    #[test]
    fn misspelt_keys_name_line_and_column_and_newer_schemas_are_refused() {
        let error = Session::parse(&TEXT.replace("recipe", "recipee"), "s.toml").unwrap_err();
        assert!(error.message.starts_with("s.toml, line 9, column 1:") && error.message.contains("recipee"), "{error}");
        let error = Session::parse(&TEXT.replace("session/1", "session/2"), "s.toml").unwrap_err();
        assert!(error.hint.unwrap().contains("newer"));
        let error = Session::parse(&TEXT.replace("piqa", "pika"), "s.toml").unwrap_err();
        assert!(error.message.contains("unknown task `pika`"), "{error}");
    }

    #[test]
    fn what_cannot_be_measured_is_refused_when_the_file_is_read() {
        for (line, expected) in [
            ("limit = 0", "a limit of 0 rows"),
            ("window_tokens = 2", "half of a window of fewer than 3 tokens"),
            ("speed_batches = [1, 0]", "0 tokens or sequences"),
        ] {
            let error = Session::parse(&format!("{TEXT}{line}\n"), "s.toml").unwrap_err();
            assert!(error.message.starts_with("s.toml: ") && error.message.contains(expected) && error.hint.is_some(), "{error}");
        }
        let error = Session::parse(&TEXT.replace("\"piqa\",", "\"piqa\", \"piqa\","), "s.toml").unwrap_err();
        assert!(error.message.contains("task `piqa` is named twice"), "{error}");
        let session = Session::parse(&format!("{TEXT}skip_bad_rows = true\n"), "s.toml").unwrap();
        assert!(session.evaluate.request().unwrap().skip_bad_rows);
        assert_eq!(Session::parse(&session.to_toml(None).unwrap(), "s.toml").unwrap(), session);
    }

    #[test]
    fn a_variants_budget_takes_the_place_of_its_recipes_and_needs_one_there() {
        let layout = crate::checkpoint::open("demo").unwrap().layout;
        let variant = VariantSpec { bits: Some(4.5), ..VariantSpec::new("a", "fit-24gb") };
        let allocate = variant.plan(&layout).unwrap().0.allocate.unwrap();
        assert_eq!((allocate.bits, allocate.gpu, allocate.context), (Some(4.5), None, None));
        let error = VariantSpec { recipe: "phase3".into(), ..variant }.plan(&layout).unwrap_err();
        assert!(error.message.contains("variant `a` has a budget"), "{error}");
    }

    #[test]
    fn the_compiled_in_session_is_valid() {
        assert!(Session::demo().unwrap().is_demo());
    }

    #[test]
    fn every_shipped_session_is_valid() {
        let files: Vec<PathBuf> = std::fs::read_dir("sessions").unwrap().map(|entry| entry.unwrap().path()).collect();
        assert!(files.len() >= 5);
        for file in files {
            Session::read(&file).unwrap();
        }
    }
}
