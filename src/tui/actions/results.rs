//! The table of results: order, columns, differences.

use std::path::PathBuf;
use std::sync::Arc;

use super::super::message::{Effect, ToCompare};
use super::super::panes::results::COLUMNS;
use super::super::popups::Prompt;
use super::super::state::{Ordinate, Pane, ResultsTab, Side, State};
use super::super::{panes, view};
use crate::eval::score::Sample;

pub fn sort(state: &mut State) -> Vec<Effect> {
    let at = state.results.sort.as_ref().and_then(|sort| COLUMNS.iter().position(|column| column.title == sort));
    state.results.sort = COLUMNS.get(at.map_or(0, |at| at + 1)).map(|column| column.title.to_owned());
    state.say(match &state.results.sort {
        Some(column) => format!("sorted by {column}"),
        None => "in the order of the session".into(),
    });
    Vec::new()
}

pub fn reverse(state: &mut State) -> Vec<Effect> {
    state.results.descending = !state.results.descending;
    Vec::new()
}

pub fn differences(state: &mut State) -> Vec<Effect> {
    state.results.hide_differences = !state.results.hide_differences;
    Vec::new()
}

pub fn columns_right(state: &mut State) -> Vec<Effect> {
    state.results.first_column = (state.results.first_column + 1).min(COLUMNS.len() - 1);
    Vec::new()
}

pub fn columns_left(state: &mut State) -> Vec<Effect> {
    state.results.first_column = state.results.first_column.saturating_sub(1);
    Vec::new()
}

pub fn edit(state: &mut State) -> Vec<Effect> {
    if let Some(index) = state.results.cursor.checked_sub(1).and_then(|row| panes::results::shown(state).get(row).copied()) {
        state.document.select(index);
        state.focus = Pane::Plan;
    }
    Vec::new()
}

/// Makes the row under the cursor A, or B.
fn side(state: &mut State, side: Side) -> Vec<Effect> {
    let shown = panes::results::shown(state);
    let name = match state.results.cursor.checked_sub(1).map(|row| shown.get(row)) {
        None => "base".to_owned(),
        Some(Some(index)) => state.document.drafts[*index].name.clone(),
        Some(None) => return Vec::new(),
    };
    state.say(format!("{side:?} is {name}"));
    state.results.sides[side as usize] = Some(name);
    state.results.flip = 0;
    Vec::new()
}

pub fn side_a(state: &mut State) -> Vec<Effect> {
    side(state, Side::A)
}

pub fn side_b(state: &mut State) -> Vec<Effect> {
    side(state, Side::B)
}

/// Shows a tab, or the table again.
fn tab(state: &mut State, tab: ResultsTab) -> Vec<Effect> {
    state.results.tab = if state.results.tab == tab { ResultsTab::Table } else { tab };
    Vec::new()
}

pub fn compare(state: &mut State) -> Vec<Effect> {
    tab(state, ResultsTab::Compare)
}

pub fn flips(state: &mut State) -> Vec<Effect> {
    tab(state, ResultsTab::Flips)
}

pub fn plot(state: &mut State) -> Vec<Effect> {
    tab(state, ResultsTab::Plot)
}

pub fn table(state: &mut State) -> Vec<Effect> {
    state.results.tab = ResultsTab::Table;
    Vec::new()
}

pub fn ordinate(state: &mut State) -> Vec<Effect> {
    state.results.ordinate = match state.results.ordinate {
        Ordinate::Kld => Ordinate::Accuracy,
        Ordinate::Accuracy => Ordinate::Kld,
    };
    Vec::new()
}

pub fn filter(state: &mut State) -> Vec<Effect> {
    let apply = |state: &mut State, text: &str| {
        text.clone_into(&mut state.results.filter);
        state.results.cursor = 0;
    };
    let text = state.results.filter.clone();
    let prompt = Prompt::new("Show variants whose name, recipe or formats have", &text, move |state, text| {
        apply(state, text);
        Vec::new()
    });
    state.popups.push(prompt.live(apply).popup());
    Vec::new()
}

/// What is to be compared and is not yet.
pub fn to_compare(state: &mut State) -> Option<Effect> {
    let needed = matches!(state.results.tab, ResultsTab::Compare | ResultsTab::Flips) && view::shows(state, Pane::Results);
    if !needed || state.compared().is_some() {
        return None;
    }
    let [a, b] = [Side::A, Side::B].map(|side| state.side(side));
    let samples = [a.samples?.clone(), b.samples?.clone()];
    let same = |other: &[Arc<Vec<Sample>>; 2]| samples.iter().zip(other).all(|(own, other)| Arc::ptr_eq(own, other));
    if state.results.comparing.as_ref().is_some_and(same) {
        return None;
    }
    let names = [a.name, b.name];
    state.results.comparing = Some(samples.clone());
    let data = state.document.settings().evaluate.data.clone();
    Some(Effect::Compare(Box::new(ToCompare { names, samples, data })))
}

/// Writes what is shown into a file, in the form that its name says.
pub fn export(state: &mut State) -> Vec<Effect> {
    let prompt = Prompt::new("Write this view to (.csv, .md or .json)", "results.csv", |state, path| {
        let path = PathBuf::from(path.trim());
        let form = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
        match panes::results::export(state, form) {
            Ok(text) => vec![Effect::Write { path, text }],
            Err(error) => {
                state.complain(&error);
                Vec::new()
            }
        }
    });
    state.popups.push(prompt.popup());
    Vec::new()
}
