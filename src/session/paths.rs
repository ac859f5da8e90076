//! Where strata keeps what the user did not name a place for.

use std::path::PathBuf;

use super::store::Store;

/// `$XDG_DATA_HOME/strata`, or `~/.local/share/strata`.
pub fn data_directory() -> PathBuf {
    directory("XDG_DATA_HOME", ".local/share")
}

/// The folder of variants that were given no output of their own.
pub fn variants_directory() -> PathBuf {
    data_directory().join("variants")
}

/// The folder of evaluations that have not ended.
pub fn evaluations_directory() -> PathBuf {
    data_directory().join("evals")
}

/// The folder of what unquantized models say about texts, which can be computed again.
pub fn references_directory() -> PathBuf {
    directory("XDG_CACHE_HOME", ".cache").join("references")
}

/// The folder of runs: see [`crate::session::runs`].
pub fn runs_directory() -> PathBuf {
    data_directory().join("runs")
}

/// The folders of one user, or of a test.
#[derive(Debug, Clone)]
pub struct Places {
    pub data: PathBuf,
    pub state: PathBuf,
}

impl Places {
    /// The user's.
    pub fn user() -> Self {
        Self { data: data_directory(), state: state_directory() }
    }

    /// Variants that were given no output of their own.
    pub fn variants(&self) -> PathBuf {
        self.data.join("variants")
    }

    /// Evaluations that have not ended.
    pub fn evaluations(&self) -> PathBuf {
        self.data.join("evals")
    }

    /// Folders of runs.
    pub fn runs(&self) -> PathBuf {
        self.data.join("runs")
    }

    /// The store of results.
    pub fn results(&self) -> Store {
        Store::at(self.data.join("results.jsonl"))
    }

    /// Sessions that were not saved.
    pub fn recovery(&self) -> PathBuf {
        self.state.join("recovery")
    }

    /// What is kept from one start of the workbench to the next.
    pub fn remembered(&self) -> PathBuf {
        self.state.join("workbench.toml")
    }
}

/// `$XDG_STATE_HOME/strata`, or `~/.local/state/strata`: what the workbench remembers from one start to the next.
pub fn state_directory() -> PathBuf {
    directory("XDG_STATE_HOME", ".local/state")
}

fn directory(variable: &str, fallback: &str) -> PathBuf {
    let base = std::env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from);
    let base = base.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(fallback)));
    base.unwrap_or_else(std::env::temp_dir).join("strata")
}
