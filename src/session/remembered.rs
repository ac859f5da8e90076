//! [`Remembered`]: what the workbench keeps from one start to the next beside sessions: recent files, and how the screen
//! looked.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::UiSpec;
use crate::error::{Error, Result};

/// Recent files kept.
const RECENT: usize = 20;

/// The state file. Unknown keys are left alone: another version may have written them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Remembered {
    /// Session files, the latest first.
    pub recent: Vec<PathBuf>,
    /// The focused pane filled the screen.
    pub zoom: bool,
    pub hide_differences: bool,
    /// Clicks and the wheel were left to the terminal.
    pub mouse_off: bool,
    /// What the strip showed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub strip: Option<String>,
    /// Theme that was chosen while running.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub theme: Option<String>,
    /// What a session's file may say otherwise.
    pub ui: UiSpec,
    /// Name of the variant that was edited, by the session's file, or by the model where there is none.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub variants: BTreeMap<String, String>,
}

impl Remembered {
    /// What `path` holds; nothing when it is not there or damaged, which costs only comfort.
    pub fn read(path: &Path) -> Self {
        fs::read_to_string(path).ok().and_then(|text| toml::from_str(&text).ok()).unwrap_or_default()
    }

    /// Writes it down.
    pub fn write(&self, path: &Path) -> Result<()> {
        let text = toml::to_string(self).map_err(|error| Error::run(format!("the state file cannot be written: {error}")))?;
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(|error| Error::io("creating", folder, &error))?;
        }
        crate::files::write_atomically(path, text.as_bytes())
    }

    /// The variant that was edited last in the session of this file, or without a file on this model.
    pub fn edited(&self, path: Option<&Path>, model: &str) -> Option<&str> {
        self.variants.get(&key(path, model)).map(String::as_str)
    }

    /// Takes note of the variant that is edited. What is known of files that are no longer recent is forgotten.
    pub fn edits(&mut self, path: Option<&Path>, model: &str, variant: &str) {
        let own = key(path, model);
        let recent: Vec<String> = self.recent.iter().map(|path| key(Some(path), model)).collect();
        self.variants.retain(|other, _| recent.contains(other) || !Path::new(other).is_absolute());
        self.variants.insert(own, variant.to_owned());
    }

    /// Takes note that the session file `path` was opened or saved.
    pub fn used(&mut self, path: &Path) {
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        self.recent.retain(|other| *other != path);
        self.recent.insert(0, path);
        self.recent.truncate(RECENT);
    }
}

fn key(path: Option<&Path>, model: &str) -> String {
    path.map_or_else(|| model.to_owned(), |path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned()).display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_damage_is_as_good_as_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new").join("workbench.toml");
        assert_eq!(Remembered::read(&path), Remembered::default());
        let ui = UiSpec { sort: Some("-KLD".into()), layers_grouped: true, ..UiSpec::default() };
        let mut remembered = Remembered { zoom: true, theme: Some("light".into()), ui, ..Remembered::default() };
        for name in ["/a.toml", "/b.toml", "/a.toml"] {
            remembered.used(Path::new(name));
        }
        assert_eq!(remembered.recent, [Path::new("/a.toml"), Path::new("/b.toml")]);
        for (file, variant) in [(Some("/b.toml"), "mixed"), (Some("/gone.toml"), "lost"), (None, "phase2")] {
            remembered.edits(file.map(Path::new), "demo", variant);
        }
        remembered.write(&path).unwrap();
        assert_eq!(Remembered::read(&path), remembered);
        let edited = |file: Option<&str>| Remembered::read(&path).edited(file.map(Path::new), "demo").map(str::to_owned);
        assert_eq!(edited(Some("/b.toml")).as_deref(), Some("mixed"));
        assert_eq!((edited(None).as_deref(), edited(Some("/gone.toml"))), (Some("phase2"), None));
        fs::write(&path, "zoom = 3").unwrap();
        assert_eq!(Remembered::read(&path), Remembered::default());
    }
}
