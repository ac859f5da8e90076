//! [`Command`]: one row of the table that feeds keys, the hint line, `?` help, the `:` palette and the documentation.

use nucleo_matcher::pattern::{AtomKind, CaseMatching, Normalization, Pattern};
use nucleo_matcher::{Config, Matcher, Utf32Str};

use super::command_table::TABLE;
use super::message::Effect;
use super::state::{Pane, State};

/// What the user can do.
pub struct Command {
    /// What the palette takes.
    pub id: &'static str,
    pub title: &'static str,
    /// One sentence for the help.
    pub help: &'static str,
    /// Rank (low first) and one or two words for the hint line; without them the command is not hinted at.
    pub hint: Option<(u8, &'static str)>,
    /// Keys, the first being the one to show.
    pub keys: &'static [&'static str],
    /// Where the keys work; empty for everywhere.
    pub panes: &'static [Pane],
    /// An error says why it is not possible now.
    pub enabled: fn(&State) -> Result<(), &'static str>,
    pub run: fn(&mut State) -> Vec<Effect>,
}

impl Command {
    /// Runs the command, or says why it cannot.
    pub fn invoke(&self, state: &mut State) -> Vec<Effect> {
        match self.possible(state) {
            Ok(()) => (self.run)(state),
            Err(reason) => {
                state.say(reason);
                Vec::new()
            }
        }
    }

    /// An error says why it cannot be done now.
    pub fn possible(&self, state: &State) -> Result<(), &'static str> {
        if state.read_only && !LOOKING.contains(&self.id) {
            return Err("read-only: nothing can be changed");
        }
        (self.enabled)(state)
    }

    /// Where the keys work, in words.
    pub fn place(&self) -> String {
        if self.panes.is_empty() {
            return "everywhere".into();
        }
        self.panes.iter().map(|pane| pane.title()).collect::<Vec<_>>().join(", ")
    }
}

/// What a read-only workbench can do. What is not named here may change a session, a file or a job.
const LOOKING: &[&str] = &[
    "select",
    "select-range",
    "select-kind",
    "select-all",
    "clear",
    "filter",
    "look",
    "back",
    "next-variant",
    "previous-variant",
    "sort",
    "reverse",
    "differences",
    "columns-right",
    "columns-left",
    "edit-result",
    "side-a",
    "side-b",
    "compare",
    "flips",
    "plot",
    "ordinate",
    "table",
    "filter-results",
    "history",
    "gpu",
    "beside",
    "allocate",
    "budget-less",
    "budget-more",
    "budget",
    "plan-formats",
    "leave-plan",
    "why",
    "strip",
    "select-pattern",
    "order",
    "reverse-order",
    "group",
    "open-block",
    "close-block",
    "copy",
    "mouse",
    "tour",
    "token-left",
    "token-right",
    "parting",
    "pane-playground",
    "down",
    "up",
    "page-down",
    "page-up",
    "first",
    "last",
    "next-pane",
    "previous-pane",
    "pane-layers",
    "pane-plan",
    "pane-run",
    "pane-block",
    "pane-results",
    "zoom",
    "theme",
    "redraw",
    "runs",
    "log-level",
    "messages",
    "changes",
    "open",
    "recent",
    "suspend",
    "quit",
    "palette",
    "help",
];

/// Keys to hint at with what they do, by rank: the commands that are possible now, those of the pane first.
pub fn hinted(state: &State) -> Vec<(String, &'static str)> {
    let of_pane = TABLE.iter().filter(|command| command.panes.contains(&state.focus));
    let everywhere = TABLE.iter().filter(|command| command.panes.is_empty());
    let possible = of_pane.chain(everywhere).filter(|command| command.possible(state).is_ok());
    let mut hints: Vec<(u8, String, &str)> = possible
        .filter_map(|command| {
            let (rank, hint) = command.hint?;
            // A key may mean something else in this pane.
            let means = |key: &&String| state.keymap.command(key, state.focus).is_some_and(|meant| meant.id == command.id);
            Some((rank, state.keymap.keys(command).iter().find(means)?.clone(), hint))
        })
        .collect();
    hints.sort_by_key(|(rank, _, _)| *rank);
    hints.into_iter().map(|(_, key, hint)| (key, hint)).collect()
}

/// A command that matches what was typed, and the letters of its id that do.
pub struct Match {
    pub command: &'static Command,
    pub letters: Vec<u32>,
}

/// Letters from which on a word is also looked for in what commands say of themselves.
const WORD: usize = 4;

/// Commands that match what was typed in the palette, best first: words in any order, the letters of each in theirs. Behind
/// them those whose sentence has the words, for who does not know what a command is called.
pub fn search(query: &str) -> Vec<Match> {
    let pattern = Pattern::parse(query, CaseMatching::Ignore, Normalization::Smart);
    let words = Pattern::new(query, CaseMatching::Ignore, Normalization::Smart, AtomKind::Substring);
    let whole_words = query.split_whitespace().all(|word| word.len() >= WORD);
    let mut matcher = Matcher::new(Config::DEFAULT);
    let mut buffer = Vec::new();
    let mut found: Vec<((bool, u32), Match)> = Vec::new();
    for command in &TABLE {
        let mut letters = Vec::new();
        let by_id = pattern.indices(Utf32Str::new(command.id, &mut buffer), &mut matcher, &mut letters);
        // The title has words that the id leaves out; where both match, the id is what one types.
        let by_title = pattern.score(Utf32Str::new(command.title, &mut buffer), &mut matcher);
        let by_name = by_id.map(|score| score + 1).max(by_title).map(|score| (true, score));
        let by_sentence = || words.score(Utf32Str::new(command.help, &mut buffer), &mut matcher).map(|score| (false, score));
        if let Some(score) = by_name.or_else(|| whole_words.then(by_sentence).flatten()) {
            letters.sort_unstable();
            letters.dedup();
            found.push((score, Match { command, letters }));
        }
    }
    if query.trim().is_empty() {
        return found.into_iter().map(|(_, found)| found).collect();
    }
    found.sort_by(|(a, first), (b, second)| b.cmp(a).then(first.command.id.len().cmp(&second.command.id.len())));
    found.into_iter().map(|(_, found)| found).collect()
}

/// The key table of docs/workbench.md.
#[cfg(test)]
pub fn key_table() -> String {
    let row = |command: &Command| {
        let keys = command.keys.iter().map(|key| format!("`{key}`")).collect::<Vec<_>>().join(" ");
        format!("| {keys} | `{}` | {} | {} |\n", command.id, command.help, command.place())
    };
    let rows: String = TABLE.iter().map(row).collect();
    format!("| keys | command | what it does | where |\n|---|---|---|---|\n{rows}")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn no_key_means_two_things_in_one_place_and_ids_are_unique() {
        let ids: BTreeSet<&str> = TABLE.iter().map(|command| command.id).collect();
        assert_eq!(ids.len(), TABLE.len());
        for pane in Pane::ALL {
            for (places, what) in [(true, "pane"), (false, "everywhere")] {
                let mut keys = BTreeSet::new();
                for command in TABLE.iter().filter(|command| if places { command.panes.contains(&pane) } else { command.panes.is_empty() })
                {
                    for key in command.keys {
                        assert!(keys.insert(*key), "{key} has two meanings in {pane:?} ({what})");
                    }
                }
            }
        }
    }

    #[test]
    fn what_a_read_only_workbench_can_do_exists() {
        for id in LOOKING {
            assert!(TABLE.iter().any(|command| command.id == *id), "{id}");
        }
    }

    #[test]
    fn keys_are_spelt_as_events_are_named() {
        for key in TABLE.iter().flat_map(|command| command.keys) {
            assert_eq!(super::super::keys::event(key).and_then(super::super::keys::name).as_deref(), Some(*key));
        }
    }

    #[test]
    fn the_palette_puts_the_closest_first() {
        for (query, id) in [("quit", "quit"), ("q", "quit"), ("w8a16", "format-w8a16"), ("runall", "run-all"), ("var new", "new-variant")] {
            assert_eq!(search(query)[0].command.id, id, "{query}");
        }
        assert_eq!(search("runall")[0].letters, [0, 1, 2, 4, 5, 6], "the letters to mark");
        assert!(search("clipboard").iter().any(|found| found.command.id == "copy"), "by what it says of itself");
        assert_eq!(search("").len(), TABLE.len());
        assert!(search("zzz").is_empty());
    }

    #[test]
    fn the_documents_key_table_is_this_one() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/workbench.md");
        let text = std::fs::read_to_string(path).unwrap();
        assert!(text.contains(&key_table()), "put this into docs/workbench.md:\n{}", key_table());
    }
}
