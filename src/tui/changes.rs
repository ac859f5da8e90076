//! How the session on the screen differs from its file.

use std::collections::BTreeSet;

use super::document::Document;
use super::theme::Role;
use crate::error::Result;
use crate::format::Plan;
use crate::session::Session;

/// A line for each change of a variant, with the role it is drawn in.
pub fn since_saved(document: &Document) -> Result<Vec<(Role, String)>> {
    let (saved, now) = (document.saved(), document.session());
    let mut lines = Vec::new();
    for gone in saved.variants.iter().filter(|spec| now.variants.iter().all(|other| other.name != spec.name)) {
        lines.push((Role::Bad, format!("- {}: variant of {}", gone.name, gone.recipe)));
    }
    for draft in &document.drafts {
        let Some(spec) = saved.variants.iter().find(|spec| spec.name == draft.name) else {
            lines.push((Role::Good, format!("+ {}: variant of {}", draft.name, draft.recipe_name)));
            let recipe = draft.recipe.plan(&document.layout, &[])?;
            lines.extend(plan_lines(document, &recipe, &draft.plan));
            continue;
        };
        let (_, before) = spec.plan(&document.layout)?;
        let mut changed = plan_lines(document, &before, &draft.plan);
        if spec.recipe != draft.recipe_name {
            changed.insert(0, (Role::Text, format!("    recipe {} → {}", spec.recipe, draft.recipe_name)));
        }
        if spec.bits != draft.bits {
            let bits = |bits: Option<f64>| bits.map_or_else(|| "the recipe's".to_owned(), |bits| format!("{bits} bits"));
            changed.insert(0, (Role::Text, format!("    budget {} → {}", bits(spec.bits), bits(draft.bits))));
        }
        if !changed.is_empty() {
            lines.push((Role::Strong, format!("  {}", draft.name)));
            lines.extend(changed);
        }
    }
    if settings(saved) != settings(&now) {
        lines.push((Role::Text, "  model, calibration or evaluation".into()));
    }
    Ok(lines)
}

fn settings(session: &Session) -> Session {
    Session { variants: Vec::new(), ui: crate::session::UiSpec::default(), ..session.clone() }
}

/// Neighbouring blocks with the same change share a line.
fn plan_lines(document: &Document, before: &Plan, after: &Plan) -> Vec<(Role, String)> {
    let mut lines = Vec::new();
    let mut ranges: Vec<(usize, usize)> = Vec::new();
    let change = |index: usize| (before.blocks.get(index), after.blocks.get(index), document.kinds.get(index));
    for index in (0..after.blocks.len()).filter(|index| before.blocks.get(*index) != after.blocks.get(*index)) {
        match ranges.last_mut() {
            Some((first, last)) if *last + 1 == index && change(*first) == change(index) => *last = index,
            _ => ranges.push((index, index)),
        }
    }
    for (first, last) in ranges {
        let (Some(from), Some(to), Some(kind)) = change(first) else { continue };
        let name = if first == last { format!("block {first}") } else { format!("blocks {first}-{last}") };
        lines.push((Role::Text, format!("    {name} ({kind})  {from} → {to}")));
    }
    for (name, from, to) in [("embedding", before.embedding, after.embedding), ("head", before.head, after.head)] {
        if from != to {
            lines.push((Role::Text, format!("    {name}  {from} → {to}")));
        }
    }
    for name in before.linears.keys().chain(after.linears.keys()).collect::<BTreeSet<_>>() {
        let format = |plan: &Plan| plan.linears.get(name).map_or_else(|| "as its block".to_owned(), ToString::to_string);
        if before.linears.get(name) != after.linears.get(name) {
            lines.push((Role::Text, format!("    {name}  {} → {}", format(before), format(after))));
        }
    }
    lines
}
