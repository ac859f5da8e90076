//! The one error type of the library: a sentence with the facts, a hint that says what to do next,
//! and whether the input or the run was at fault (which decides the exit code).

use std::fmt;
use std::path::Path;

/// Whose fault an error is. `Input` ends a command with exit code 2, the others with 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// The user's request or the files it names cannot be used as they are.
    Input,
    /// A run that was asked for correctly failed.
    Run,
    /// The user stopped the run.
    Cancelled,
}

/// An error with its facts in `message` (one sentence, no trailing full stop) and a next step in `hint`.
#[derive(Debug, Clone)]
pub struct Error {
    pub kind: ErrorKind,
    pub message: String,
    pub hint: Option<String>,
}

/// Result with the library's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// The input is at fault.
    pub fn input(message: impl Into<String>) -> Self {
        Self { kind: ErrorKind::Input, message: message.into(), hint: None }
    }

    /// The run failed.
    pub fn run(message: impl Into<String>) -> Self {
        Self { kind: ErrorKind::Run, message: message.into(), hint: None }
    }

    /// The user cancelled.
    pub fn cancelled() -> Self {
        Self { kind: ErrorKind::Cancelled, message: "cancelled".into(), hint: None }
    }

    /// An input or output operation on `path` failed while `doing` (a gerund: "reading").
    pub fn io(doing: &str, path: &Path, error: &std::io::Error) -> Self {
        use std::io::ErrorKind as Io;
        let kind = match error.kind() {
            Io::NotFound | Io::PermissionDenied | Io::ReadOnlyFilesystem | Io::NotADirectory | Io::InvalidInput => ErrorKind::Input,
            _ => ErrorKind::Run,
        };
        let hint = match error.kind() {
            Io::PermissionDenied | Io::ReadOnlyFilesystem => Some("choose a path that you may write to, or change its permissions".into()),
            Io::StorageFull => Some("free some disk space and run the same command again: finished blocks are kept".into()),
            _ if kind == ErrorKind::Input => Some("check the path".into()),
            _ => None,
        };
        Self { kind, message: format!("{doing} {} failed: {error}", path.display()), hint }
    }

    /// `text`, which `origin` names, is not TOML of the expected form: one line with where it is wrong.
    pub fn toml(origin: &str, text: &str, error: &toml::de::Error) -> Self {
        let at = error.span().map_or_else(String::new, |span| {
            let before = &text[..span.start.min(text.len())];
            let line = before.matches('\n').count() + 1;
            let column = before.rsplit('\n').next().unwrap_or("").chars().count() + 1;
            format!(", line {line}, column {column}")
        });
        Self::input(format!("{origin}{at}: {}", error.message().trim_end().replace('\n', ", ")))
    }

    /// Adds the next step.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Puts `context` in front of the message.
    #[must_use]
    pub fn context(mut self, context: impl fmt::Display) -> Self {
        self.message = format!("{context}: {}", self.message);
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        Self::run(format!("tensor operation failed: {error}"))
    }
}
