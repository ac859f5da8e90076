//! The five tasks as lm-evaluation-harness 0.4.13 defines them: from a dataset's row to contexts and continuations.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::checkpoint::DEMO_TASKS;
use crate::error::{Error, Result};

/// A multiple-choice task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Task {
    ArcEasy,
    ArcChallenge,
    Piqa,
    Winogrande,
    Hellaswag,
}

/// One row of a task, ready to be scored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// (context, continuation) of each choice.
    pub requests: Vec<(String, String)>,
    /// Characters of each choice, which acc_norm divides by.
    pub lengths: Vec<usize>,
    /// Index of the right choice.
    pub gold: usize,
}

/// The questions of a task.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rows {
    pub questions: Vec<Question>,
    /// Bad rows that were left out.
    pub skipped: usize,
}

impl Task {
    pub const ALL: [Self; 5] = [Self::ArcEasy, Self::ArcChallenge, Self::Piqa, Self::Winogrande, Self::Hellaswag];

    /// The harness's name of the task.
    pub fn name(self) -> &'static str {
        match self {
            Self::ArcEasy => "arc_easy",
            Self::ArcChallenge => "arc_challenge",
            Self::Piqa => "piqa",
            Self::Winogrande => "winogrande",
            Self::Hellaswag => "hellaswag",
        }
    }

    /// Whether the task has the length-normalized accuracy.
    pub fn has_acc_norm(self) -> bool {
        self != Self::Winogrande
    }

    /// Whether acc_norm is the figure that is usually quoted.
    pub fn quotes_acc_norm(self) -> bool {
        matches!(self, Self::ArcChallenge | Self::Hellaswag)
    }

    /// The rows compiled in with the demo model.
    pub fn embedded(self) -> Result<Rows> {
        let rows = DEMO_TASKS.iter().find(|(name, _)| *name == self.name()).map_or("", |(_, rows)| rows);
        self.rows(rows.as_bytes(), &format!("embedded {self}"), false)
    }

    /// The rows of `{task}.jsonl` in `directory`.
    pub fn from_directory(self, directory: &Path, skip_bad_rows: bool) -> Result<Rows> {
        let path = directory.join(format!("{}.jsonl", self.name()));
        if !path.exists() {
            return Err(Error::input(format!("{} has no {}.jsonl", directory.display(), self.name()))
                .hint("--data names a directory with one JSON-lines file a task, with the hub's field names"));
        }
        let bytes = std::fs::read(&path).map_err(|error| Error::io("reading", &path, &error))?;
        self.rows(&bytes, &path.display().to_string(), skip_bad_rows)
    }

    /// The rows of JSON lines. A bad one is an error that names `origin` and the line, or is left out and counted.
    pub fn rows(self, lines: &[u8], origin: &str, skip_bad_rows: bool) -> Result<Rows> {
        let mut rows = Rows::default();
        rows.add(self, lines, &format!("{origin}, line"), skip_bad_rows)?;
        rows.some(origin)
    }

    fn question(self, line: &str) -> Result<Question, String> {
        match self {
            Self::ArcEasy | Self::ArcChallenge => {
                let row: ArcRow = parse(line)?;
                let (texts, labels) = (row.choices.text.len(), row.choices.label.len());
                if texts != labels {
                    return Err(format!("there are {texts} texts of choices and {labels} labels"));
                }
                let gold = row.choices.label.iter().position(|label| *label == row.answer_key);
                let context = format!("Question: {}\nAnswer:", row.question);
                let gold = gold.ok_or_else(|| format!("answerKey `{}` is not among the labels", row.answer_key))?;
                Ok(Question::of_choices(&context, &row.choices.text, gold))
            }
            Self::Piqa => {
                let row: PiqaRow = parse(line)?;
                let context = format!("Question: {}\nAnswer:", row.goal);
                Ok(Question::of_choices(&context, &[row.sol1, row.sol2], row.label))
            }
            Self::Winogrande => {
                let row: WinograndeRow = parse(line)?;
                let (before, after) = row.sentence.split_once('_').ok_or("the sentence has no `_`")?;
                let gold = match row.answer.as_str() {
                    "1" => 0,
                    "2" => 1,
                    other => return Err(format!("answer is `{other}`, expected 1 or 2")),
                };
                let contexts = [row.option1, row.option2].map(|option| format!("{before}{option}"));
                let continuation = format!(" {}", after.trim());
                Ok(Question {
                    lengths: contexts.iter().map(|context| context.chars().count()).collect(),
                    requests: contexts.into_iter().map(|context| (context, continuation.clone())).collect(),
                    gold,
                })
            }
            Self::Hellaswag => {
                let row: HellaswagRow = parse(line)?;
                let gold = row.label.parse().map_err(|_| format!("label is `{}`, expected a number", row.label))?;
                let context = preprocess(&format!("{}: {} {}", row.activity_label, row.ctx_a, capitalize(&row.ctx_b)));
                let endings: Vec<String> = row.endings.iter().map(|ending| preprocess(ending)).collect();
                Ok(Question::of_choices(&context, &endings, gold))
            }
        }
    }
}

impl Rows {
    /// Adds the rows of JSON lines. A bad one is an error that begins with `place` and its number, or is left out and counted.
    pub fn add(&mut self, task: Task, lines: &[u8], place: &str, skip_bad_rows: bool) -> Result<()> {
        for (number, line) in lines.split(|byte| *byte == b'\n').enumerate().filter(|(_, line)| !line.trim_ascii().is_empty()) {
            let line = std::str::from_utf8(line).map_err(|error| format!("byte {} is not UTF-8", error.valid_up_to() + 1));
            match line.and_then(|line| task.question(line)).and_then(Question::checked) {
                Ok(question) => self.questions.push(question),
                Err(_) if skip_bad_rows => self.skipped += 1,
                Err(what) => {
                    return Err(Error::input(format!("{place} {}: {what}", number + 1))
                        .hint("mend the row, or leave such rows out with --skip-bad-rows (`skip_bad_rows = true` in a session)"));
                }
            }
        }
        Ok(())
    }

    /// The rows, of which there must be some; `origin` is where they were looked for.
    pub fn some(self, origin: &str) -> Result<Self> {
        if self.questions.is_empty() {
            let usable = if self.skipped > 0 { " that can be used" } else { "" };
            return Err(Error::input(format!("{origin} has no rows{usable}"))
                .hint("give one JSON object a line with the field names of the dataset on the hub"));
        }
        Ok(self)
    }
}

impl Question {
    fn of_choices(context: &str, choices: &[String], gold: usize) -> Self {
        Self {
            lengths: choices.iter().map(|choice| choice.chars().count()).collect(),
            requests: choices.iter().map(|choice| (context.to_owned(), format!(" {choice}"))).collect(),
            gold,
        }
    }

    fn checked(self) -> Result<Self, String> {
        if let Some(empty) = self.lengths.iter().position(|length| *length == 0) {
            return Err(format!("choice {empty} is empty"));
        }
        if self.gold < self.requests.len() {
            return Ok(self);
        }
        Err(format!("the right choice has number {}, and there are {}", self.gold, self.requests.len()))
    }
}

fn parse<T: DeserializeOwned>(line: &str) -> Result<T, String> {
    serde_json::from_str(line).map_err(|error| error.to_string())
}

#[derive(Deserialize)]
struct ArcRow {
    question: String,
    choices: ArcChoices,
    #[serde(rename = "answerKey")]
    answer_key: String,
}

#[derive(Deserialize)]
struct ArcChoices {
    text: Vec<String>,
    label: Vec<String>,
}

#[derive(Deserialize)]
struct PiqaRow {
    goal: String,
    sol1: String,
    sol2: String,
    label: usize,
}

#[derive(Deserialize)]
struct WinograndeRow {
    sentence: String,
    option1: String,
    option2: String,
    answer: String,
}

#[derive(Deserialize)]
struct HellaswagRow {
    activity_label: String,
    ctx_a: String,
    ctx_b: String,
    endings: Vec<String>,
    label: String,
}

/// HellaSwag's clean-up of WikiHow's artefacts: strip, `" [title]"` → `". "`, drop `\[.*?\]`, one pass of
/// two spaces → one.
fn preprocess(text: &str) -> String {
    let text = text.trim().replace(" [title]", ". ");
    let mut out = String::with_capacity(text.len());
    let mut rest = text.as_str();
    while let Some(open) = rest.find('[') {
        // `.` does not match a newline, so a bracket must close on its own line.
        let close = rest[open..].find([']', '\n']).filter(|at| rest[open + at..].starts_with(']'));
        let keep = if close.is_some() { open } else { open + 1 };
        out.push_str(&rest[..keep]);
        rest = &rest[close.map_or(open + 1, |at| open + at + 1)..];
    }
    out.push_str(rest);
    out.replace("  ", " ")
}

/// Python's `str.capitalize`: the first character in title case, the others in lower case.
fn capitalize(text: &str) -> String {
    let mut characters = text.chars();
    match characters.next() {
        Some(first) => first.to_uppercase().chain(characters.as_str().to_lowercase().chars()).collect(),
        None => String::new(),
    }
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Task {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|task| task.name() == text).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            Error::input(format!("unknown task `{text}`")).hint(format!("the tasks are {names}"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hellaswag_rows_are_cleaned_as_in_the_harness() {
        assert_eq!(preprocess("  on [substeps] the [title] roof  [x][y]. "), "on the. roof .");
        assert_eq!(preprocess("an [open bracket\n] stays"), "an [open bracket\n] stays");
        assert_eq!(capitalize("éCLAIRS Are"), "Éclairs are");
    }

    #[test]
    fn bad_rows_name_file_line_and_fault() {
        let good = r#"{"goal": "g", "sol1": "a", "sol2": "b", "label": 0}"#;
        for (line, expected) in [
            (r#"{"goal": "g", "sol1": "a", "label": 0}"#, "missing field `sol2`"),
            (r#"{"goal": "g", "sol1": "a", "sol2": "b", "label": 2}"#, "there are 2"),
            (r#"{"goal": "g", "sol1": "", "sol2": "b", "label": 0}"#, "choice 0 is empty"),
            ("{", "EOF"),
            ("\u{fffd}", "is not UTF-8"),
        ] {
            let mut lines = format!("{good}\n{line}\n{good}").into_bytes();
            // A replacement character stands for its own first byte alone.
            lines = if line == "\u{fffd}" { [good.as_bytes(), b"\n\xef\n", good.as_bytes()].concat() } else { lines };
            let error = Task::Piqa.rows(&lines, "rows.jsonl", false).unwrap_err().message;
            assert!(error.starts_with("rows.jsonl, line 2: ") && error.contains(expected), "{error}");
            let rows = Task::Piqa.rows(&lines, "rows.jsonl", true).unwrap();
            assert_eq!((rows.questions.len(), rows.skipped), (2, 1));
        }
        let arc = br#"{"question": "q", "choices": {"text": ["a", "b", "c"], "label": ["A", "B"]}, "answerKey": "B"}"#;
        let error = Task::ArcEasy.rows(arc, "arc.jsonl", false).unwrap_err().message;
        assert_eq!(error, "arc.jsonl, line 1: there are 3 texts of choices and 2 labels");
        assert!(Task::Piqa.rows(b"\n", "rows.jsonl", false).unwrap_err().message.contains("no rows"));
        assert!(Task::Piqa.rows(b"{", "rows.jsonl", true).unwrap_err().message.contains("no rows that can be used"));
    }

    #[test]
    fn every_embedded_task_has_rows() {
        let rows = Task::ALL.map(|task| task.embedded().unwrap().questions.len());
        assert_eq!(rows, [436, 288, 300, 400, 400]);
    }
}
