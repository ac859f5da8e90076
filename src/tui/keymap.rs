//! [`Keymap`]: which keys mean which command. The command table's, unless the user's `keys.toml` says otherwise.
//!
//! ```toml
//! undo = ["u", "ctrl-u"]   # a command's id and its keys, the first being the one that hints show
//! redo = "ctrl-r"
//! quit = []                # no key: the palette still has it
//! ```

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::command_table::TABLE;
use super::commands::Command;
use super::keys;
use super::state::Pane;
use crate::error::{Error, Result};

/// The keys of every command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keymap {
    keys: BTreeMap<&'static str, Vec<String>>,
}

/// One key or several.
#[derive(Deserialize)]
#[serde(untagged, expecting = "keys are a text or a list of texts")]
enum Keys {
    One(String),
    Several(Vec<String>),
}

impl Default for Keymap {
    fn default() -> Self {
        let keys = |command: &Command| (command.id, command.keys.iter().map(|key| (*key).to_owned()).collect());
        Self { keys: TABLE.iter().map(keys).collect() }
    }
}

impl Keymap {
    /// The user's file: `$XDG_CONFIG_HOME/strata/keys.toml`, or `~/.config/strata/keys.toml`.
    pub fn path() -> Option<PathBuf> {
        let folder = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let config = folder("XDG_CONFIG_HOME").or_else(|| folder("HOME").map(|home| home.join(".config")))?;
        Some(config.join("strata").join("keys.toml"))
    }

    /// The keys of the user's file, where there is one, over the table's.
    pub fn of_user() -> Result<Self> {
        let Some(path) = Self::path() else { return Ok(Self::default()) };
        match std::fs::read_to_string(&path) {
            Ok(text) => Self::parse(&text, &path),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(Error::io("reading", &path, &error)),
        }
    }

    /// The keys that `text` gives, over the table's. A key that the user gives to a command is taken from those that
    /// have it in the same place by default.
    pub fn parse(text: &str, origin: &Path) -> Result<Self> {
        let wrong = |what: String| Error::input(format!("{}: {what}", origin.display()));
        let rows: BTreeMap<String, Keys> = toml::from_str(text).map_err(|error| {
            Error::toml(&origin.display().to_string(), text, &error).hint("write `undo = \"u\"` or `undo = [\"u\", \"ctrl-u\"]`")
        })?;
        let mut own: Vec<(&Command, Vec<String>)> = Vec::new();
        for (id, keys) in rows {
            let command = TABLE.iter().find(|command| command.id == id).ok_or_else(|| {
                wrong(format!("no command is called `{id}`")).hint("the palette (:) and docs/workbench.md list the commands")
            })?;
            let keys = match keys {
                Keys::One(key) => vec![key],
                Keys::Several(keys) => keys,
            };
            for key in &keys {
                if keys::event(key).is_none() {
                    return Err(wrong(format!("`{key}` of {id} is no key"))
                        .hint("keys are written `x`, `X`, `ctrl-x`, `alt-x`, `f5`, `space`, `enter`, `pgdn`, `shift-tab`"));
                }
                if let Some((other, _)) = own.iter().find(|(other, taken)| taken.contains(key) && share_a_place(other, command)) {
                    return Err(wrong(format!("`{key}` is given to {} and to {id}", other.id)).hint("a key means one thing in one place"));
                }
            }
            own.push((command, keys));
        }
        let mut keymap = Self::default();
        for (command, keys) in &own {
            for other in TABLE.iter().filter(|other| share_a_place(other, command)) {
                if let Some(held) = keymap.keys.get_mut(other.id) {
                    held.retain(|key| !keys.contains(key));
                }
            }
        }
        for (command, keys) in own {
            keymap.keys.insert(command.id, keys);
        }
        Ok(keymap)
    }

    /// The keys of a command, the first being the one to show.
    pub fn keys(&self, command: &Command) -> &[String] {
        self.keys.get(command.id).map_or(&[], Vec::as_slice)
    }

    /// `text` with a key in place of every `{command}`: that which hints show, or what the palette takes where there is none.
    pub fn fill(&self, text: &str) -> String {
        let mut filled = String::with_capacity(text.len());
        let mut rest = text;
        while let Some((before, after)) = rest.split_once('{') {
            let found = after.split_once('}').and_then(|(id, after)| Some((TABLE.iter().find(|command| command.id == id)?, after)));
            filled.push_str(before);
            let Some((command, after)) = found else {
                filled.push('{');
                rest = after;
                continue;
            };
            match self.keys(command).first() {
                Some(key) => filled.push_str(key),
                None => filled.extend([":", command.id]),
            }
            rest = after;
        }
        filled + rest
    }

    /// The command of a key: one of the pane before one of everywhere.
    pub fn command(&self, key: &str, pane: Pane) -> Option<&'static Command> {
        let has_key = |command: &&Command| self.keys(command).iter().any(|held| held == key);
        let of_pane = TABLE.iter().filter(has_key).find(|command| command.panes.contains(&pane));
        of_pane.or_else(|| TABLE.iter().filter(has_key).find(|command| command.panes.is_empty()))
    }
}

/// Whether two commands would fight over a key: in the same pane, or both everywhere.
fn share_a_place(a: &Command, b: &Command) -> bool {
    (a.panes.is_empty() && b.panes.is_empty()) || a.panes.iter().any(|pane| b.panes.contains(pane))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Keymap> {
        Keymap::parse(text, Path::new("keys.toml"))
    }

    #[test]
    fn the_users_keys_stand_over_the_tables() {
        let keymap = parse("undo = [\"ctrl-u\", \"u\"]\nzoom = \"f12\"\nquit = []").unwrap();
        assert_eq!(keymap.command("ctrl-u", Pane::Layers).unwrap().id, "undo");
        assert_eq!(keymap.command("f12", Pane::Run).unwrap().id, "zoom");
        assert!(keymap.command("z", Pane::Run).is_none() && keymap.command("q", Pane::Run).is_none());
        let page_up = TABLE.iter().find(|command| command.id == "page-up").unwrap();
        assert_eq!(keymap.keys(page_up), ["pgup"], "ctrl-u was its key");
        // In a pane of its own a key may mean something else than everywhere.
        assert_eq!(parse("sort = \"u\"").unwrap().command("u", Pane::Results).unwrap().id, "sort");
    }

    #[test]
    fn texts_name_the_users_keys() {
        let keymap = parse("run = \"f9\"\nundo = []").unwrap();
        let text = keymap.fill("{run} runs, {undo} undoes, {retry} tries again; {this} and {that are no commands");
        assert_eq!(text, "f9 runs, :undo undoes, r tries again; {this} and {that are no commands");
    }

    #[test]
    fn bad_files_say_what_is_wrong() {
        for (text, expected) in [
            ("udno = \"u\"", "no command is called `udno`"),
            ("undo = \"ctrl-\"", "`ctrl-` of undo is no key"),
            ("undo = \"hyper-u\"", "is no key"),
            ("undo = \"x\"\nredo = \"x\"", "`x` is given to redo and to undo"),
            ("undo = 3", "keys.toml, line 1, column 8: keys are a text or a list of texts"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.message.contains(expected) && error.hint.is_some(), "{}", error.message);
        }
    }
}
