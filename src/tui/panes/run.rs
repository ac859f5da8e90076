//! The runs: the queue, the job at hand with its plots, memory and GPUs, the log.

use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::text::{Line, Span};

use super::{dim, percent};
use crate::engine::{GpuReading, Snapshot};
use crate::session::report;
use crate::tui::popups::window;
use crate::tui::queue::{Level, Run, Status, Step};
use crate::tui::state::State;
use crate::tui::text::{cut, wrap};
use crate::tui::theme::Role;
use crate::tui::view::{bar, bar_letter, duration};

/// Rows of the queue, at most.
const QUEUE_ROWS: usize = 8;

pub fn draw(frame: &mut Frame, area: Rect, state: &State) {
    let width = area.width as usize;
    let queue = &state.queue;
    let mut lines = Vec::new();
    if queue.runs.is_empty() {
        for text in [
            " {run} quantizes and evaluates the variant being edited,",
            " {run-all} all variants of the session; {runs} lists earlier runs.",
        ] {
            lines.push(Line::from(dim(state, state.keymap.fill(text))));
        }
    }
    lines.extend(queue_lines(state, (area.height as usize / 3).clamp(2, QUEUE_ROWS), width));
    if queue.running().is_some() {
        let snapshot = queue.progress.snapshot(state.clock);
        lines.extend(progress_lines(state, &snapshot, width));
        lines.push(note_line(state, &snapshot, width));
        lines.push(memory_line(state));
        lines.extend(state.gpus.iter().map(|gpu| gpu_line(state, gpu, width)));
    }
    if queue.running().is_some() || !queue.progress.errors.is_empty() || !queue.progress.losses.is_empty() {
        lines.extend(plot_lines(state, &queue.progress.snapshot(state.clock), width));
    }
    let room = (area.height as usize).saturating_sub(lines.len());
    lines.extend(log_lines(state, room, width));
    for (line, y) in lines.into_iter().zip(area.y..area.bottom()) {
        frame.render_widget(line, Rect { y, height: 1, ..area });
    }
}

/// A line a run; the steps of the one that runs, or else of the one under the cursor, below it.
fn queue_lines(state: &State, most: usize, width: usize) -> Vec<Line<'static>> {
    let queue = &state.queue;
    let open = queue.running_run().or_else(|| queue.selected()).map(|run| run.key);
    let mut lines = Vec::new();
    let mut at = 0;
    for (index, run) in queue.runs.iter().enumerate() {
        if index == queue.cursor {
            at = lines.len();
        }
        let expanded = Some(run.key) == open;
        if !expanded || queue.runs.len() > 1 {
            lines.push(run_line(state, run, index == queue.cursor && queue.runs.len() > 1, width));
        }
        if expanded {
            for step in &run.steps {
                if matches!(step.status, Status::Running(_)) && index == queue.cursor {
                    at = lines.len();
                }
                lines.push(step_line(state, step, width));
                if let Status::Failed { hint: Some(hint), .. } = &step.status {
                    for (index, part) in wrap(hint, width.saturating_sub(12)).into_iter().enumerate() {
                        let label = if index == 0 { "     hint: " } else { "           " };
                        lines.push(Line::from(vec![Span::styled(label, state.theme.style(Role::Key)), Span::raw(part)]));
                    }
                }
            }
        }
    }
    let shown = window(at, lines.len(), most);
    lines.drain(shown).collect()
}

fn mark(status: &Status) -> (&'static str, Role) {
    match status {
        Status::Waiting => ("·", Role::Dim),
        Status::Running(_) => ("▶", Role::Progress),
        Status::Done => ("✓", Role::Good),
        Status::Failed { .. } => ("✗", Role::Bad),
        Status::Cancelled => ("✗", Role::Warning),
        Status::Skipped => ("·", Role::Warning),
    }
}

fn run_line(state: &State, run: &Run, chosen: bool, width: usize) -> Line<'static> {
    let (mark, role) = mark(run.status());
    let steps = run.steps.len();
    let finished = run.steps.iter().filter(|step| !matches!(step.status, Status::Waiting | Status::Running(_))).count();
    let note = match run.status() {
        Status::Waiting if finished == 0 => "waits".to_owned(),
        Status::Waiting | Status::Running(_) => format!("step {} of {steps}", finished + 1),
        Status::Done => "done".into(),
        Status::Failed { .. } => state.keymap.fill("failed; {retry} tries again"),
        Status::Cancelled => state.keymap.fill("cancelled; {retry} tries again"),
        Status::Skipped => "skipped".into(),
    };
    let title = cut(&run.title, width.saturating_sub(note.chars().count() + 12));
    Line::from(vec![
        Span::styled(if chosen { "▶" } else { " " }, state.theme.style(Role::Key)),
        Span::styled(format!("{mark} "), state.theme.style(role)),
        Span::styled(format!("run {title}  "), state.theme.style(if chosen { Role::Strong } else { Role::Text })),
        dim(state, note),
    ])
}

fn step_line(state: &State, step: &Step, width: usize) -> Line<'static> {
    let (mark, role) = mark(&step.status);
    let note = match &step.status {
        Status::Waiting => "waits".to_owned(),
        Status::Running(_) => format!("{} so far", duration(state.clock.saturating_sub(step.began))),
        Status::Done if step.reused => "found on disk, verified".into(),
        Status::Done => format!("took {}", duration(step.ended.saturating_sub(step.began))),
        Status::Failed { message, .. } => message.clone(),
        Status::Cancelled => "cancelled".into(),
        Status::Skipped => "skipped: nothing to evaluate".into(),
    };
    let indent = if state.queue.runs.len() > 1 { "   " } else { " " };
    let note = cut(&note, width.saturating_sub(step.title.chars().count() + indent.len() + 5));
    Line::from(vec![
        Span::styled(format!("{indent}{mark} "), state.theme.style(role)),
        Span::raw(format!("{}  ", step.title)),
        Span::styled(note, state.theme.style(if role == Role::Bad { Role::Bad } else { Role::Dim })),
    ])
}

/// The whole job with its bar and the time left; the stage with its own bar and its rate.
pub fn progress_lines(state: &State, job: &Snapshot, width: usize) -> Vec<Line<'static>> {
    let line = |name: &str, share: f64, role: Role, what: String| {
        let room = width.saturating_sub(16 + what.chars().count()).clamp(4, 30);
        let mut spans = vec![Span::raw(format!(" {:<13} ", cut(name, 13)))];
        spans.extend(bar(share, room, state.theme.style(role), state.theme.style(Role::Border)));
        spans.push(Span::raw(what));
        Line::from(spans)
    };
    let mut lines = Vec::new();
    if let Some(share) = job.share {
        let left = match (job.paused, job.remaining_seconds) {
            (true, _) => "  paused".into(),
            (false, Some(seconds)) => format!("  {} left", duration(std::time::Duration::from_secs(seconds))),
            (false, None) => String::new(),
        };
        lines.push(line("whole job", share, Role::Progress, format!(" {:>3.0}%{left}", 100.0 * share)));
    }
    let share = if job.total == 0 { 0.0 } else { job.done as f64 / job.total as f64 };
    let rate = job.step_seconds.filter(|_| !job.paused).map_or_else(String::new, |seconds| format!("  {}", rate(seconds)));
    lines.push(line(&job.stage, share, Role::Dim, format!(" {}/{}{rate}", job.done, job.total)));
    lines
}

/// Time a step, or steps a second where that is the larger number.
fn rate(seconds: f64) -> String {
    match seconds {
        seconds if seconds <= 0.0 => String::new(),
        seconds if seconds < 0.1 => format!("{:.0} a second", 1.0 / seconds),
        seconds if seconds < 10.0 => format!("{seconds:.1} s each"),
        seconds => format!("{seconds:.0} s each"),
    }
}

/// What the stage did last, and of which model.
fn note_line(state: &State, job: &Snapshot, width: usize) -> Line<'static> {
    let queue = &state.queue;
    let evaluated = queue.progress.evaluated;
    let model = queue
        .models
        .get(evaluated)
        .map_or_else(String::new, |model| format!("model {} of {}, {model}: ", evaluated + 1, queue.models.len()));
    Line::from(dim(state, cut(&format!("   {model}{}", job.note), width.saturating_sub(1))))
}

fn memory_line(state: &State) -> Line<'static> {
    let total = state.host_bytes.map_or_else(String::new, |total| format!(" of {}", report::bytes(total)));
    Line::from(vec![dim(state, " host memory   "), Span::raw(format!("{}{total}", report::bytes(state.resident_bytes)))])
}

/// Memory, load, temperature and power of a GPU.
fn gpu_line(state: &State, gpu: &GpuReading, width: usize) -> Line<'static> {
    let temperature = gpu.temperature.map_or_else(String::new, |degrees| format!("  {degrees}°C"));
    let power = gpu.power.map_or_else(String::new, |milliwatts| format!("  {} W", milliwatts / 1000));
    let memory = format!("{} of {}", report::bytes(gpu.used_bytes), report::bytes(gpu.total_bytes));
    let what = format!("{memory}  {}% busy{temperature}{power}", gpu.utilization);
    let name = gpu.name.trim_start_matches("NVIDIA ").split(' ').next().unwrap_or_default();
    Line::from(vec![dim(state, format!(" {name:<13} ")), Span::raw(cut(&what, width.saturating_sub(16)))])
}

/// A bar a block, as high as its error, or as its largest loss so far; a bar a text window, as high as the mean divergence
/// up to there.
pub fn plot_lines(state: &State, job: &Snapshot, width: usize) -> Vec<Line<'static>> {
    let (errors, losses, divergence) = (&job.errors, &job.losses, &job.divergence);
    let plot = |label: &'static str, values: &[f64], what: String| {
        let worst = values.iter().copied().fold(0.0, f64::max);
        // The latest are those that are looked at.
        let room = width.saturating_sub(label.len() + what.chars().count() + 3).max(4);
        let shown = &values[values.len().saturating_sub(room)..];
        let bars: String = shown.iter().map(|value| bar_letter(if worst > 0.0 { value / worst } else { 0.0 })).collect();
        Line::from(vec![dim(state, label), Span::styled(bars, state.theme.style(Role::Progress)), dim(state, format!("  {what}"))])
    };
    let mut lines = Vec::new();
    if !errors.is_empty() {
        let worst = errors.iter().copied().fold(0.0, f64::max);
        lines.push(plot(" error a block ", errors, format!("worst {}", percent(worst))));
    }
    if !losses.is_empty() {
        let worst = losses.iter().copied().fold(0.0, f64::max);
        // Losses lie decades apart: the root lets the small ones be seen.
        let roots: Vec<f64> = losses.iter().map(|loss| loss.sqrt()).collect();
        lines.push(plot(" loss a block  ", &roots, format!("worst {worst:.1e} nats")));
    }
    if let Some(latest) = divergence.last() {
        lines.push(plot(" KLD so far    ", divergence, format!("{latest:.1e} nats a token")));
    }
    lines
}

fn log_lines(state: &State, room: usize, width: usize) -> Vec<Line<'static>> {
    let queue = &state.queue;
    let log: Vec<_> = queue.log.iter().filter(|line| line.level >= queue.least).collect();
    if queue.log.is_empty() || room < 2 {
        return Vec::new();
    }
    let level = match queue.least {
        Level::Info => "",
        Level::Warning => " of warnings",
        Level::Error => " of errors",
    };
    let back = if queue.scroll > 0 { format!(", {} lines back", queue.scroll) } else { String::new() };
    let title = format!(" log{level}{back} ");
    let rule = "─".repeat(width.saturating_sub(title.len() + 1));
    let mut lines = vec![Line::styled(format!("─{title}{rule}"), state.theme.style(Role::Border))];
    let end = log.len() - queue.scroll.min(log.len().saturating_sub(1));
    let start = end.saturating_sub(room - 1);
    let mut tail = Vec::new();
    for line in &log[start..end] {
        let (mark, role) = match line.level {
            Level::Info => ("  ", Role::Dim),
            Level::Warning => ("! ", Role::Warning),
            Level::Error => ("✗ ", Role::Bad),
        };
        for (index, part) in wrap(&line.text, width.saturating_sub(4)).into_iter().enumerate() {
            let mark = if index == 0 { mark } else { "    " };
            tail.push(Line::styled(format!(" {mark}{part}"), state.theme.style(role)));
        }
    }
    lines.extend(tail.split_off(tail.len().saturating_sub(room - 1)));
    lines
}
