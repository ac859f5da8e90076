//! The runs of all processes: follow one live, cancel it by its file, go on with one that was interrupted, forget one.

use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::text::{Line, Span};

use super::{Choice, Confirm, Popup, Reply, show, window};
use crate::session::runs;
use crate::tui::message::Effect;
use crate::tui::panes::run as pane;
use crate::tui::state::State;
use crate::tui::text::cut;
use crate::tui::theme::Role;

/// Which run is chosen, and whether it is looked at closely.
#[derive(Debug, Clone, Default)]
pub struct Runs {
    /// The chosen run's name; without one, the newest.
    chosen: Option<String>,
    follow: bool,
}

impl Runs {
    /// The run whose log is to be read.
    pub fn followed(&self) -> Option<String> {
        self.chosen.clone().filter(|_| self.follow)
    }

    fn at(&self, state: &State) -> usize {
        self.chosen.as_ref().and_then(|id| state.runs.0.iter().position(|run| run.id == *id)).unwrap_or(0)
    }

    fn status<'a>(&self, state: &'a State) -> Option<&'a runs::Status> {
        state.runs.0.get(self.at(state))
    }

    pub(super) fn key(&mut self, key: &str, state: &mut State) -> Reply {
        let count = state.runs.0.len();
        let go = |popup: &mut Self, at: usize| popup.chosen = state.runs.0.get(at).map(|run| run.id.clone());
        match key {
            "esc" | "q" | "ctrl-c" if self.follow => self.follow = false,
            "esc" | "q" | "ctrl-c" => return Reply::Close,
            "j" | "down" if !self.follow => go(self, (self.at(state) + 1).min(count.saturating_sub(1))),
            "k" | "up" if !self.follow => go(self, self.at(state).saturating_sub(1)),
            "enter" | "space" if count > 0 => {
                self.follow = !self.follow;
                go(self, self.at(state));
                return self.look();
            }
            "x" | "r" | "D" => return self.act(key, state),
            _ => {}
        }
        Reply::Stay
    }

    /// The runs are read again, and the popup stays.
    fn look(&self) -> Reply {
        let again = self.clone();
        Reply::Act(Box::new(move |state| {
            state.popups.push(Popup::Runs(again.clone()));
            vec![Effect::LookAtRuns { follow: again.followed() }]
        }))
    }

    /// Cancels, resumes or forgets the chosen run, where that is possible.
    fn act(&self, key: &str, state: &mut State) -> Reply {
        let Some(run) = self.status(state) else { return Reply::Stay };
        let (id, run_state, title) = (run.id.clone(), run.state, run.title.clone());
        let refusal = match key {
            _ if state.read_only => Some("read-only: nothing can be changed"),
            "x" if run_state.is_over() => Some("this run is over"),
            "r" if !run_state.can_resume() => Some("only a run that is interrupted, cancelled or failed can go on"),
            "D" if !run_state.is_over() => Some("this run is not over: cancel it first"),
            _ => None,
        };
        if let Some(refusal) = refusal {
            state.say(refusal);
            return Reply::Stay;
        }
        let (again, key) = (self.clone(), key.to_owned());
        Reply::Act(Box::new(move |state| {
            state.popups.push(Popup::Runs(again.clone()));
            let (id, look) = (id.clone(), Effect::LookAtRuns { follow: again.followed() });
            match key.as_str() {
                "r" => {
                    state.say(format!("{id} goes on without a screen"));
                    vec![Effect::ResumeRun(id), look]
                }
                "x" => {
                    let stop = Choice::new('y', "cancel it", move |_| vec![Effect::CancelRun(id.clone())]);
                    let lines = vec!["Its process stops at the next step. What it has finished is kept.".to_owned()];
                    state.popups.push(Confirm::popup(format!("Cancel {title}?"), lines, vec![stop]));
                    Vec::new()
                }
                _ => {
                    let follow = again.followed();
                    let forget = Choice::new('y', "forget it", move |_| {
                        vec![Effect::RemoveRun(id.clone()), Effect::LookAtRuns { follow: follow.clone() }]
                    });
                    let lines = vec!["Its log and its status are removed. Variants and results stay.".to_owned()];
                    state.popups.push(Confirm::popup(format!("Forget {title}?"), lines, vec![forget]));
                    Vec::new()
                }
            }
        }))
    }

    pub(super) fn draw(&self, frame: &mut Frame, area: Rect, state: &State) {
        let width = area.width.saturating_sub(4).min(120);
        let inner = width as usize - 2;
        let room = area.height.saturating_sub(6).max(3) as usize;
        let list = &state.runs.0;
        let mut lines = Vec::new();
        if list.is_empty() {
            lines.push(Line::styled(state.keymap.fill(" no runs yet: {run} starts one"), state.theme.style(Role::Dim)));
        }
        let at = self.at(state);
        let rows = if self.follow { at..(at + 1).min(list.len()) } else { window(at, list.len(), room) };
        for index in rows {
            lines.push(row(state, &list[index], index == at && !self.follow, inner));
        }
        if let Some(run) = list.get(at).filter(|_| self.follow) {
            lines.extend(pane::progress_lines(state, &run.progress, inner));
            lines.extend(pane::plot_lines(state, &run.progress, inner));
            if let Some(message) = &run.message {
                let hint = run.hint.as_ref().map_or_else(String::new, |hint| format!(" ({hint})"));
                lines.push(Line::styled(format!(" {message}{hint}"), state.theme.style(Role::Bad)));
            }
            lines.push(Line::styled(format!("─ log {}", "─".repeat(inner.saturating_sub(6))), state.theme.style(Role::Border)));
            let left = room.saturating_sub(lines.len());
            let log = &state.runs.1;
            let tail = &log[log.len().saturating_sub(left)..];
            lines.extend(tail.iter().map(|line| Line::styled(format!(" {}", cut(line, inner - 2)), state.theme.style(level(line)))));
        }
        let keys = if self.follow { " x cancel  r go on  esc list" } else { " enter follow  x cancel  r go on  D forget  esc leave" };
        lines.push(Line::styled(keys, state.theme.style(Role::Dim)));
        show(frame, area, state, "Runs", width, lines);
    }
}

fn row(state: &State, run: &runs::Status, chosen: bool, width: usize) -> Line<'static> {
    let role = match run.state {
        runs::State::Running => Role::Progress,
        runs::State::Done => Role::Good,
        runs::State::Failed => Role::Bad,
        runs::State::Interrupted | runs::State::Cancelled | runs::State::Paused => Role::Warning,
        runs::State::Waiting => Role::Dim,
    };
    let share = run.progress.share.filter(|_| !run.state.is_over()).map_or_else(String::new, |share| format!(" {:.0}%", 100.0 * share));
    let job = if run.job == 0 { String::new() } else { format!(", job {} of {}", run.job, run.jobs) };
    let own = if state.queue.runs.iter().any(|own| own.id.as_deref() == Some(&run.id)) { " (here)" } else { "" };
    let text = cut(&format!("{} on {}{job}{share}{own}", run.title, run.model), width.saturating_sub(40));
    Line::from(vec![
        Span::styled(if chosen { " ▶ " } else { "   " }, state.theme.style(Role::Key)),
        Span::styled(format!("{:<11} ", run.state.name()), state.theme.style(role)),
        Span::styled(format!("{:<21} ", run.id), state.theme.style(Role::Dim)),
        Span::styled(text, state.theme.style(if chosen { Role::Strong } else { Role::Text })),
    ])
}

/// How loud a line of a run's log is: its second word.
fn level(line: &str) -> Role {
    match line.split_whitespace().nth(1) {
        Some("warning") => Role::Warning,
        Some("error") => Role::Bad,
        _ => Role::Dim,
    }
}
