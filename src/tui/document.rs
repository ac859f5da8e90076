//! [`Document`]: the session being edited, as drafts of its variants over the model's layout, with undo.
//!
//! The screen edits plans; the session file holds recipes with overrides. A [`Draft`] keeps both in step: every edit
//! computes the shortest overrides again, and a plan that is back at what the file says gets the file's own spelling.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::overrides;
use crate::analysis::Footprint;
use crate::checkpoint::{self, Config, Layout};
use crate::error::{Error, Result};
use crate::format::{BlockKind, Format, Plan, Selector};
use crate::quant::{Override, Recipe};
use crate::session::{Session, UiSpec, VariantSpec};

/// Edits that can be undone, at most.
const HISTORY: usize = 200;

/// A variant as it is edited.
#[derive(Debug, Clone, PartialEq)]
pub struct Draft {
    /// Stays the same through renaming and undo.
    pub id: u32,
    pub name: String,
    /// As the session names it.
    pub recipe_name: String,
    /// With the variant's budget, where it has one of its own.
    pub recipe: Arc<Recipe>,
    /// Where the formats are found by measurement, the budget and what is pinned.
    pub plan: Plan,
    /// Bits a weight in place of the recipe's budget.
    pub bits: Option<f64>,
    /// What turns the recipe's plan into `plan`.
    pub overrides: Vec<Override>,
}

impl Draft {
    /// As a session file has it.
    pub fn spec(&self) -> VariantSpec {
        VariantSpec { bits: self.bits, overrides: self.overrides.clone(), ..VariantSpec::new(&self.name, &self.recipe_name) }
    }

    /// Whether its formats are found by measurement.
    pub fn is_allocated(&self) -> bool {
        self.recipe.allocate.is_some()
    }
}

/// What undo goes back to.
#[derive(Debug, Clone)]
struct Snapshot {
    label: String,
    drafts: Vec<Draft>,
    current: usize,
}

/// A variant's overrides and plan as the file has them.
#[derive(Debug, Clone)]
struct Written {
    overrides: Vec<Override>,
    plan: Plan,
}

/// The session that is open.
#[derive(Debug)]
pub struct Document {
    /// Everything but the variants.
    session: Session,
    /// What was last opened or saved.
    saved: Session,
    written: BTreeMap<u32, Written>,
    pub config: Arc<Config>,
    pub layout: Arc<Layout>,
    /// The layout's bytes in every format.
    pub footprint: Arc<Footprint>,
    pub kinds: Vec<BlockKind>,
    pub drafts: Vec<Draft>,
    current: usize,
    next_id: u32,
    undo: Vec<Snapshot>,
    redo: Vec<Snapshot>,
}

impl Document {
    /// Opens the session's model, as far as its layout, and its variants. A session without variants gets one of
    /// phase 1 to begin with.
    pub fn open(mut session: Session) -> Result<Self> {
        let config = checkpoint::open(&session.model.name())?.config;
        if session.variants.is_empty() {
            session.variants.push(VariantSpec::new("phase1", "phase1"));
        }
        Self::of_config(session, config)
    }

    /// The session over a model of this configuration.
    pub fn of_config(session: Session, config: Config) -> Result<Self> {
        let layout = Arc::new(Layout::new(&config));
        let mut document = Self {
            saved: session.clone(),
            session,
            written: BTreeMap::new(),
            kinds: layout.kinds(),
            footprint: Arc::new(Footprint::new(&config, Arc::clone(&layout))),
            config: Arc::new(config),
            layout,
            drafts: Vec::new(),
            current: 0,
            next_id: 0,
            undo: Vec::new(),
            redo: Vec::new(),
        };
        for spec in std::mem::take(&mut document.session.variants) {
            let (recipe, plan) = spec.plan(&document.layout)?;
            let id = document.new_id();
            document.written.insert(id, Written { overrides: spec.overrides.clone(), plan: plan.clone() });
            document.drafts.push(Draft {
                id,
                name: spec.name,
                recipe_name: spec.recipe,
                recipe: Arc::new(recipe),
                plan,
                bits: spec.bits,
                overrides: spec.overrides,
            });
        }
        Ok(document)
    }

    fn new_id(&mut self) -> u32 {
        self.next_id += 1;
        self.next_id
    }

    /// The variant being edited.
    pub fn draft(&self) -> &Draft {
        &self.drafts[self.current]
    }

    /// Its place among the variants.
    pub fn current(&self) -> usize {
        self.current
    }

    /// Edits another variant.
    pub fn select(&mut self, index: usize) {
        self.current = index.min(self.drafts.len() - 1);
    }

    /// Edits the variant of this name, if there is one.
    pub fn select_named(&mut self, name: Option<&str>) {
        if let Some(index) = self.drafts.iter().position(|draft| Some(draft.name.as_str()) == name) {
            self.current = index;
        }
    }

    /// Model, calibration and evaluation of the session.
    pub fn settings(&self) -> &Session {
        &self.session
    }

    /// The whole session as it stands.
    pub fn session(&self) -> Session {
        Session { variants: self.drafts.iter().map(Draft::spec).collect(), ..self.session.clone() }
    }

    /// What was last opened or saved.
    pub fn saved(&self) -> &Session {
        &self.saved
    }

    /// Whether the session differs from what was last opened or saved; how the screen looks does not count.
    pub fn unsaved(&self) -> bool {
        let plain = |session: &Session| Session { ui: UiSpec::default(), ..session.clone() };
        plain(&self.session()) != plain(&self.saved)
    }

    /// How the screen looks, to be saved along.
    pub fn set_ui(&mut self, ui: UiSpec) {
        self.session.ui = ui;
    }

    /// Takes note that `session` is what the file holds now.
    pub fn mark_saved(&mut self, session: &Session) {
        self.saved.clone_from(session);
        self.written.clear();
        for draft in &self.drafts {
            if session.variants.iter().any(|spec| spec.name == draft.name && spec.overrides == draft.overrides) {
                self.written.insert(draft.id, Written { overrides: draft.overrides.clone(), plan: draft.plan.clone() });
            }
        }
    }

    /// The format that the file has for a block of the current variant; a variant that is not in the file yet is
    /// compared with its recipe.
    pub fn saved_format(&self, block: usize) -> Option<Format> {
        let draft = self.draft();
        if let Some(written) = self.written.get(&draft.id) {
            return written.plan.blocks.get(block).copied();
        }
        let formats = &draft.recipe.formats;
        Some(match self.kinds.get(block)? {
            BlockKind::Ssm => formats.ssm,
            BlockKind::Mlp => formats.mlp,
            BlockKind::Attention => formats.attention,
            BlockKind::Moe => formats.moe,
        })
    }

    /// Whether a variant differs from the file.
    pub fn changed(&self, index: usize) -> bool {
        let draft = &self.drafts[index];
        let same = |spec: &VariantSpec| {
            spec.name == draft.name
                && spec.recipe == draft.recipe_name
                && spec.bits == draft.bits
                && self.written.get(&draft.id).is_some_and(|w| w.plan == draft.plan)
        };
        !self.saved.variants.iter().any(same)
    }

    /// Gives `format` to every selector's blocks, as one edit; returns whether anything changed.
    pub fn set_format(&mut self, selectors: &[Selector], format: Format, label: impl Into<String>) -> Result<bool> {
        if self.draft().is_allocated() {
            return self.pin(selectors, format, label);
        }
        let mut plan = self.draft().plan.clone();
        for selector in selectors {
            plan.set(selector, &self.kinds, format);
        }
        self.set_plan(plan, label)
    }

    /// Gives `format` to what `selectors` name in a variant whose other formats are found by measurement; returns whether
    /// anything changed. A pin is a rule even where the budget has this format.
    fn pin(&mut self, selectors: &[Selector], format: Format, label: impl Into<String>) -> Result<bool> {
        let within = |rule: &Override| {
            selectors.iter().any(|selector| match (&rule.selector, selector) {
                (Selector::Blocks(first, last), Selector::Blocks(from, to)) => from <= first && last <= to,
                (rule, selector) => rule == selector,
            })
        };
        let mut overrides: Vec<Override> = self.draft().overrides.iter().filter(|rule| !within(rule)).cloned().collect();
        overrides.extend(selectors.iter().map(|selector| Override { selector: selector.clone(), format }));
        if overrides == self.draft().overrides {
            return Ok(false);
        }
        let plan = self.draft().recipe.plan(&self.layout, &overrides)?;
        self.remember(label);
        let draft = &mut self.drafts[self.current];
        (draft.plan, draft.overrides) = (plan, overrides);
        Ok(true)
    }

    /// Gives `format` to linears and slices of block `block`, by their canonical names; returns whether anything changed.
    pub fn set_linears(&mut self, block: usize, names: &[String], format: Format, label: impl Into<String>) -> Result<bool> {
        if self.draft().is_allocated() {
            let selector = |name: &String| format!("name:{name}").parse().map_err(Error::input);
            return self.pin(&names.iter().map(selector).collect::<Result<Vec<_>>>()?, format, label);
        }
        let mut plan = self.draft().plan.clone();
        for name in names {
            // What is said of a linear holds for its slices.
            plan.linears.retain(|known, _| known != name && !known.starts_with(&format!("{name}.")));
            let linear = self.layout.blocks[block].linears.iter().find(|linear| name.starts_with(&format!("{}.", linear.stem)));
            let inherited = linear.map_or(plan.blocks[block], |linear| plan.linear(block, &linear.stem));
            if format != inherited {
                plan.linears.insert(name.clone(), format);
            }
        }
        self.set_plan(plan, label)
    }

    /// Replaces the current variant's plan; returns whether that changed anything.
    pub fn set_plan(&mut self, mut plan: Plan, label: impl Into<String>) -> Result<bool> {
        let draft = self.draft();
        if plan == draft.plan {
            return Ok(false);
        }
        if draft.is_allocated() {
            return Err(Error::input(format!("the formats of {} are found by measurement", draft.name)).hint(
                "{allocate} moves its budget, {format-w4a8} and {format-w8a8} pin blocks; {new-variant} makes a variant of another recipe",
            ));
        }
        let rules = match self.written.get(&draft.id) {
            Some(written) if written.plan == plan => written.overrides.clone(),
            _ => {
                let rules = overrides::minimal(&draft.recipe.plan(&self.layout, &[])?, &plan, &self.kinds);
                let (of_names, mut kept): (Vec<_>, Vec<_>) =
                    rules.iter().cloned().partition(|rule| matches!(rule.selector, Selector::Name(_)));
                // Patterns that still say the same are kept as they were written.
                kept.extend(draft.overrides.iter().filter(|rule| matches!(rule.selector, Selector::Name(_))).cloned());
                let same = !of_names.is_empty() && draft.recipe.plan(&self.layout, &kept).is_ok_and(|written| written == plan);
                if same { kept } else { rules }
            }
        };
        if !plan.linears.is_empty() {
            // Formats of slices may not be possible together: the rules are tried before anything changes.
            let ruled = draft.recipe.plan(&self.layout, &rules)?;
            if ruled == draft.plan {
                return Ok(false);
            }
            plan = ruled;
        }
        self.remember(label);
        let draft = &mut self.drafts[self.current];
        draft.plan = plan;
        draft.overrides = rules;
        Ok(true)
    }

    /// Gives the current variant, whose formats are found by measurement, a budget of its own; returns whether that changed
    /// anything.
    pub fn set_bits(&mut self, bits: f64, label: impl Into<String>) -> Result<bool> {
        let draft = self.draft();
        if draft.bits == Some(bits) {
            return Ok(false);
        }
        let (recipe, _) = VariantSpec { bits: Some(bits), ..draft.spec() }.plan(&self.layout)?;
        self.remember(label);
        let draft = &mut self.drafts[self.current];
        (draft.bits, draft.recipe) = (Some(bits), Arc::new(recipe));
        Ok(true)
    }

    /// Takes the current variant back to what its recipe says; returns whether that changed anything.
    pub fn reset(&mut self, label: impl Into<String>) -> Result<bool> {
        let (recipe, plan) = VariantSpec::new(&self.draft().name, &self.draft().recipe_name).plan(&self.layout)?;
        let plain = Draft { recipe: Arc::new(recipe), plan, bits: None, overrides: Vec::new(), ..self.draft().clone() };
        let changed = plain != *self.draft();
        if changed {
            self.remember(label);
            self.drafts[self.current] = plain;
        }
        Ok(changed)
    }

    /// Adds a variant of a recipe behind the current one and edits it.
    pub fn add(&mut self, recipe_name: &str) -> Result<()> {
        let recipe = Recipe::find(recipe_name)?;
        let plan = recipe.plan(&self.layout, &[])?;
        let id = self.new_id();
        let name = self.free_name(&recipe.name);
        let draft =
            Draft { id, name, recipe_name: recipe_name.to_owned(), recipe: Arc::new(recipe), plan, bits: None, overrides: Vec::new() };
        self.insert(draft, "new variant");
        Ok(())
    }

    /// Copies the current variant and edits the copy.
    pub fn duplicate(&mut self) {
        let id = self.new_id();
        let draft = Draft { id, name: self.free_name(&self.draft().name), ..self.draft().clone() };
        self.insert(draft, "duplicate");
    }

    fn insert(&mut self, draft: Draft, label: &str) {
        self.remember(format!("{label} {}", draft.name));
        self.drafts.insert(self.current + 1, draft);
        self.current += 1;
    }

    /// `name`, or the first of `name-2`, `name-3` … that no variant has.
    fn free_name(&self, name: &str) -> String {
        let taken = |name: &str| self.drafts.iter().any(|draft| draft.name == name);
        if !taken(name) {
            return name.to_owned();
        }
        let stem = match name.rsplit_once('-') {
            Some((stem, number)) if number.parse::<u32>().is_ok() => stem,
            _ => name,
        };
        (2..self.drafts.len() + 3).map(|number| format!("{stem}-{number}")).find(|name| !taken(name)).unwrap_or_default()
    }

    /// Renames the current variant.
    pub fn rename(&mut self, name: &str) -> Result<()> {
        let name = name.trim();
        if name == self.draft().name {
            return Ok(());
        }
        if self.drafts.iter().any(|draft| draft.name == name) {
            return Err(Error::input(format!("another variant is named `{name}`")));
        }
        let plain = !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\\']);
        if !plain || name == "base" {
            return Err(Error::input(format!("a variant cannot be named `{name}`"))
                .hint("a name is a file name of its own; `base` is the unquantized model"));
        }
        self.remember(format!("rename {}", self.draft().name));
        name.clone_into(&mut self.drafts[self.current].name);
        Ok(())
    }

    /// Removes the current variant; the last one stays.
    pub fn remove(&mut self) -> Result<()> {
        if self.drafts.len() == 1 {
            return Err(Error::input("the last variant cannot be deleted").hint("make a new one first"));
        }
        self.remember(format!("delete {}", self.draft().name));
        self.drafts.remove(self.current);
        self.current = self.current.min(self.drafts.len() - 1);
        Ok(())
    }

    fn remember(&mut self, label: impl Into<String>) {
        self.redo.clear();
        self.undo.push(self.snapshot(label.into()));
        if self.undo.len() > HISTORY {
            self.undo.remove(0);
        }
    }

    fn snapshot(&self, label: String) -> Snapshot {
        Snapshot { label, drafts: self.drafts.clone(), current: self.current }
    }

    fn restore(&mut self, snapshot: Snapshot) {
        self.drafts = snapshot.drafts;
        self.current = snapshot.current;
    }

    /// Takes the last edit back; returns what it was.
    pub fn undo(&mut self) -> Option<String> {
        let snapshot = self.undo.pop()?;
        let label = snapshot.label.clone();
        self.redo.push(self.snapshot(label.clone()));
        self.restore(snapshot);
        Some(label)
    }

    /// Does again what was undone; returns what it was.
    pub fn redo(&mut self) -> Option<String> {
        let snapshot = self.redo.pop()?;
        let label = snapshot.label.clone();
        self.undo.push(self.snapshot(label.clone()));
        self.restore(snapshot);
        Some(label)
    }

    /// Edits that can be undone, the latest last, and edits that were undone, the next to come back first.
    pub fn history(&self) -> (Vec<&str>, Vec<&str>) {
        (
            self.undo.iter().map(|snapshot| snapshot.label.as_str()).collect(),
            self.redo.iter().rev().map(|snapshot| snapshot.label.as_str()).collect(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document() -> Document {
        Document::open(Session::demo().unwrap()).unwrap()
    }

    #[test]
    fn edits_become_overrides_and_undo_takes_them_back() {
        let mut document = document();
        assert!(!document.unsaved());
        let kind = Selector::Kind(BlockKind::Ssm);
        assert!(document.set_format(std::slice::from_ref(&kind), Format::W4A8, "w4a8").unwrap());
        assert!(document.unsaved() && document.changed(0) && !document.changed(1));
        assert_eq!(document.session().variants[0].overrides, [Override { selector: kind, format: Format::W4A8 }]);
        assert_eq!(document.saved_format(0), Some(Format::W8A8));
        assert_eq!(document.undo().as_deref(), Some("w4a8"));
        assert!(!document.unsaved());
        assert_eq!(document.redo().as_deref(), Some("w4a8"));
        document.mark_saved(&document.session());
        assert!(!document.unsaved());
        assert_eq!(document.saved_format(0), Some(Format::W4A8));
        document.undo();
        assert!(document.unsaved(), "going back behind what was saved is a change");
    }

    #[test]
    fn the_files_spelling_of_overrides_stays_while_the_plan_is_the_same() {
        let mut session = Session::demo().unwrap();
        let rule = |selector: &str| Override { selector: selector.parse().unwrap(), format: Format::W4A8 };
        session.variants[0].overrides = vec![rule("block:0"), rule("block:1")];
        let mut document = Document::open(session.clone()).unwrap();
        document.set_format(&[Selector::Blocks(2, 2)], Format::W4A8, "edit").unwrap();
        assert_eq!(document.session().variants[0].overrides, [rule("block:0-2")]);
        document.set_format(&[Selector::Blocks(2, 2)], Format::W8A8, "back").unwrap();
        assert_eq!(document.session(), session);
    }

    #[test]
    fn patterns_for_linears_outlive_edits_of_blocks() {
        let mut session = Session::demo().unwrap();
        let rule = |selector: &str, format| Override { selector: selector.parse().unwrap(), format };
        session.variants[0].overrides = vec![rule("name:*.in_proj", Format::W8A16)];
        let mut document = Document::open(session).unwrap();
        document.set_format(&[Selector::Blocks(1, 1)], Format::W4A8, "edit").unwrap();
        let expected = [rule("block:1", Format::W4A8), rule("name:*.in_proj", Format::W8A16)];
        assert_eq!(document.session().variants[0].overrides, expected);
    }

    #[test]
    fn variants_are_added_copied_renamed_and_removed() {
        let mut document = document();
        document.add("phase3").unwrap();
        assert_eq!((document.draft().name.as_str(), document.current()), ("phase3", 1));
        document.duplicate();
        document.duplicate();
        assert_eq!(document.draft().name, "phase3-3");
        assert!(document.rename("phase1").unwrap_err().message.contains("another variant"));
        assert!(document.rename("base").is_err() && document.rename("a/b").is_err());
        document.rename("mixed").unwrap();
        document.remove().unwrap();
        let names: Vec<&str> = document.drafts.iter().map(|draft| draft.name.as_str()).collect();
        assert_eq!(names, ["phase1", "phase3", "phase3-2", "phase2"]);
        for _ in 0..3 {
            document.remove().unwrap();
        }
        assert!(document.remove().is_err());
    }
}
