//! [`Command`]: one row of the table that feeds keys, the hint line, `?` help, the `:` palette and the documentation.

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

/// The command of a key: one of the pane before one of everywhere.
pub fn of_key(key: &str, pane: Pane) -> Option<&'static Command> {
    let has_key = |command: &&Command| command.keys.contains(&key);
    let of_pane = TABLE.iter().filter(has_key).find(|command| command.panes.contains(&pane));
    of_pane.or_else(|| TABLE.iter().filter(has_key).find(|command| command.panes.is_empty()))
}

/// Keys to hint at with what they do, by rank: the commands that are possible now, those of the pane first.
pub fn hinted(state: &State) -> Vec<(&'static str, &'static str)> {
    let of_pane = TABLE.iter().filter(|command| command.panes.contains(&state.focus));
    let everywhere = TABLE.iter().filter(|command| command.panes.is_empty());
    let possible = of_pane.chain(everywhere).filter(|command| command.possible(state).is_ok());
    let mut hints: Vec<(u8, &str, &str)> =
        possible.filter_map(|command| command.hint.and_then(|(rank, hint)| Some((rank, *command.keys.first()?, hint)))).collect();
    hints.sort_by_key(|(rank, _, _)| *rank);
    hints.into_iter().map(|(_, key, hint)| (key, hint)).collect()
}

/// Commands that match what was typed in the palette, best first: letters in order, earlier and closer is better.
pub fn search(query: &str) -> Vec<&'static Command> {
    let mut found: Vec<(usize, &Command)> = TABLE
        .iter()
        .filter_map(|command| {
            let by_id = score(query, command.id);
            let by_title = score(query, command.title).map(|score| score + 1);
            Some((by_id.into_iter().chain(by_title).min()?, command))
        })
        .collect();
    found.sort_by_key(|(score, _)| *score);
    found.into_iter().map(|(_, command)| command).collect()
}

/// How far `query`'s letters, in order, lie apart in `text`; nothing when they do not all occur.
fn score(query: &str, text: &str) -> Option<usize> {
    let text: Vec<char> = text.to_lowercase().chars().collect();
    let (mut at, mut score) = (0, 0);
    for letter in query.to_lowercase().chars().filter(|letter| *letter != ' ') {
        let step = text[at..].iter().position(|other| *other == letter)?;
        score += step * if at == 0 { 2 } else { 3 };
        at += step + 1;
    }
    Some(score)
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
            assert_eq!(super::super::keys::name(super::super::keys::event(key)).as_deref(), Some(*key));
        }
    }

    #[test]
    fn the_palette_puts_the_closest_first() {
        assert_eq!(search("quit")[0].id, "quit");
        assert_eq!(search("q")[0].id, "quit");
        assert_eq!(search("w8a16")[0].id, "format-w8a16");
        assert_eq!(search("runall")[0].id, "run-all");
        assert!(search("zzz").is_empty());
    }

    #[test]
    fn the_documents_key_table_is_this_one() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/workbench.md");
        let text = std::fs::read_to_string(path).unwrap();
        assert!(text.contains(&key_table()), "put this into docs/workbench.md:\n{}", key_table());
    }
}
