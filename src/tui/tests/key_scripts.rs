//! Keys through `update`, without an engine.

use std::time::Duration;

use crossterm::event::{KeyCode, KeyEvent, KeyModifiers, MouseButton, MouseEvent, MouseEventKind};
use proptest::prelude::*;

use super::fixture::{answer, busy, fresh, manifest, press, render, result, text, tick, type_text};
use crate::engine::inspect::{Look, RoundingError};
use crate::engine::{Event, Job, JobId};
use crate::error::{Error, ErrorKind};
use crate::eval::run::Evaluated;
use crate::format::Format;
use crate::quant::{Method, Recipe};
use crate::session::runs::Ending;
use crate::tui::command_table::TABLE;
use crate::tui::document::Document;
use crate::tui::keymap::Keymap;
use crate::tui::keys;
use crate::tui::message::{Effect, Msg, SaveOutcome};
use crate::tui::popups::{Popup, Tour};
use crate::tui::queue::Status;
use crate::tui::state::{Pane, State};
use crate::tui::tree::{self, Row};
use crate::tui::update::update;

fn formats(state: &State) -> String {
    state.document.draft().plan.blocks.iter().map(|format| format.weight_bits().to_string().replace("16", "f")).collect()
}

#[test]
fn formats_go_to_the_selection_and_to_the_cursor_without_one() {
    let mut state = fresh((80, 24));
    press(&mut state, &["j", "4"]);
    assert_eq!(formats(&state), "848888888888");
    press(&mut state, &["s", "6"]);
    assert_eq!(formats(&state), "8f8f88f8f88f", "the kind under the cursor");
    press(&mut state, &["esc", "g", "v", "j", "j", "4", "v"]);
    assert_eq!(formats(&state), "444f88f8f88f", "a range");
    press(&mut state, &["esc", "G", "space", "k", "k", "space", "4"]);
    assert_eq!(formats(&state), "444f88f8f484", "single blocks");
    press(&mut state, &["u", "u", "u"]);
    assert_eq!(formats(&state), "848888888888");
    press(&mut state, &["U", "ctrl-r"]);
    assert_eq!(formats(&state), "444f88f8f88f");
}

#[test]
fn formats_cycle_and_are_copied_between_blocks() {
    let mut state = fresh((80, 24));
    press(&mut state, &[">"]);
    assert_eq!(state.document.draft().plan.blocks[0], Format::W4A16, "after w8a8");
    press(&mut state, &["<", "<"]);
    assert_eq!(state.document.draft().plan.blocks[0], Format::W8A16);
    press(&mut state, &["p"]);
    assert!(state.message.as_ref().unwrap().text.contains("nothing is copied"));
    press(&mut state, &["6", "y", "j", "s", "p", "esc"]);
    assert_eq!(formats(&state), "ff8f88f8f88f", "one format goes to the selection");
    press(&mut state, &["g", "v", "j", "j", "y", "v", "esc", "G", "k", "k", "k", "p"]);
    assert_eq!(formats(&state), "ff8f88f8ff8f", "several go to the blocks from the cursor on");
    assert_eq!(state.document.history().0.last(), Some(&"formats pasted to blocks 8-10"));
}

#[test]
fn presets_plan_beside_history_and_gpu() {
    let mut state = fresh((80, 24));
    press(&mut state, &["P", "3"]);
    assert_eq!(formats(&state), "484848848488", "phase 3");
    press(&mut state, &["P"]);
    press(&mut state, &vec!["down"; Recipe::built_in().unwrap().iter().filter(|recipe| recipe.allocate.is_none()).count()]);
    press(&mut state, &["enter"]);
    assert_eq!(formats(&state), "484888848888", "SSM blocks in front of attention stay wide");
    press(&mut state, &["2", "b"]);
    let screen = text(&render(&state, (80, 24)));
    assert!(screen.contains("difference") && screen.contains("blocks      9: 1 3 4 5 6 8 9 10 11"), "{screen}");
    press(&mut state, &["b", "t", "8"]);
    assert_eq!(state.plan.gpu.name, "H200");
    assert_eq!(state.ui().gpu.as_deref(), Some("H200"));
    assert!(text(&render(&state, (80, 24))).contains("H200        ~fits with"));
    press(&mut state, &["H", "up", "up", "enter"]);
    assert_eq!(formats(&state), "888888888888", "as opened");
    assert_eq!(state.document.history().1, ["formats of phase3", "formats of suggested"]);
    press(&mut state, &["H", "down", "enter"]);
    assert_eq!(formats(&state), "484848848488");
}

#[test]
fn predictions_change_in_the_same_frame() {
    let mut state = fresh((160, 48));
    let before = text(&render(&state, (160, 48)));
    press(&mut state, &["ctrl-a", "4"]);
    let after = text(&render(&state, (160, 48)));
    assert!(before.contains("linears     ~5.38 MB of 10.6 MB  ~50.6%"), "{before}");
    assert!(after.contains("linears     ~2.75 MB of 10.6 MB  ~25.8%"), "{after}");
    assert!(after.contains("kind:ssm w4a8") || after.contains("block:0-11 w4a8"), "{after}");
}

#[test]
fn the_filter_narrows_what_is_moved_over_and_selected() {
    let mut state = fresh((80, 24));
    press(&mut state, &["/"]);
    type_text(&mut state, "att");
    assert_eq!(state.visible_blocks(), [5, 10], "while typing");
    assert_eq!(state.layers.cursor, 5);
    press(&mut state, &["esc"]);
    assert_eq!(state.visible_blocks().len(), 12, "esc brings back what was there");
    press(&mut state, &["/"]);
    type_text(&mut state, "att");
    press(&mut state, &["enter", "ctrl-a", "6", "esc", "esc"]);
    assert_eq!(formats(&state), "88888f8888f8");
    assert_eq!(state.visible_blocks().len(), 12);
}

#[test]
fn variants_by_keys() {
    let mut state = fresh((80, 24));
    press(&mut state, &["2", "n", "3"]);
    assert_eq!(state.document.draft().name, "phase3");
    press(&mut state, &["r", "ctrl-u"]);
    type_text(&mut state, "mixed");
    press(&mut state, &["enter", "y"]);
    assert_eq!(state.document.draft().name, "mixed-2");
    press(&mut state, &["D", "n"]);
    assert_eq!(state.document.drafts.len(), 4, "n keeps it");
    press(&mut state, &["D", "y", "e", "2", "h", "1"]);
    assert_eq!(state.document.drafts.len(), 3);
    let plan = &state.document.draft().plan;
    assert_eq!((plan.embedding, plan.head), (Format::W8A16, Format::W16A16));
    press(&mut state, &["u", "u", "u"]);
    assert_eq!(state.document.drafts.len(), 4, "a deleted variant comes back");
}

#[test]
fn palette_commands_act_and_impossible_ones_say_why() {
    let mut state = fresh((80, 24));
    press(&mut state, &[":"]);
    type_text(&mut state, "w8a16");
    press(&mut state, &["enter"]);
    assert_eq!(state.document.draft().plan.blocks[0], Format::W8A16);
    press(&mut state, &["x"]);
    assert_eq!(state.message.as_ref().unwrap().text, "no job runs");
}

fn steps(state: &State) -> Vec<Status> {
    state.queue.runs.iter().flat_map(|run| &run.steps).map(|step| step.status.clone()).collect()
}

fn submitted(effects: &[Effect]) -> Vec<&Job> {
    effects.iter().filter_map(|effect| if let Effect::Submit(job) = effect { Some(&**job) } else { None }).collect()
}

#[test]
fn a_run_quantizes_then_evaluates_what_was_made() {
    let mut state = fresh((80, 24));
    let effects = press(&mut state, &["A"]);
    assert!(matches!(submitted(&effects)[..], [Job::Quantize(_)]), "one job at a time");
    let mut jobs = Vec::new();
    for number in 1..=3 {
        let id = JobId(number);
        update(&mut state, Msg::Submitted(Ok(id)));
        if number < 3 {
            let index = number as usize - 1;
            let manifest = Box::new(manifest(&state, index, 0.01));
            let name = state.document.drafts[index].name.clone();
            update(&mut state, Msg::Engine(Event::Quantized { id, path: format!("/v/{name}").into(), name, manifest, reused: false }));
        } else {
            for (name, loss) in [("base", 0.0), ("phase1", 0.01), ("phase2", 0.02)] {
                let evaluated = Box::new(Evaluated { result: result(name, 1_000_000, 8.0, loss), samples: Vec::new() });
                update(&mut state, Msg::Engine(Event::Evaluated { id, evaluated }));
            }
        }
        jobs.extend(update(&mut state, Msg::Engine(Event::Finished { id, outcome: Ok(()) })));
    }
    let [Job::Quantize(second), Job::Evaluate(request)] = submitted(&jobs)[..] else { panic!("{jobs:?}") };
    assert_eq!(second.name, "phase2");
    assert_eq!(request.reference.as_ref().unwrap().name, "base");
    let paths: Vec<&str> = request.models.iter().map(|model| model.path.as_str()).collect();
    assert_eq!(paths, ["/v/phase1", "/v/phase2"]);
    assert!(steps(&state).iter().all(|status| *status == Status::Done));

    // Results follow the plan: an edit hides them, undoing it brings them back.
    let has_result = |state: &State| {
        let draft = state.document.draft();
        state.measurements.of(draft).is_some_and(|row| row.result.is_some())
    };
    assert!(has_result(&state));
    press(&mut state, &["1", "4"]);
    assert!(!has_result(&state));
    press(&mut state, &["u"]);
    assert!(has_result(&state));
}

#[test]
fn a_failed_job_shows_its_hint_and_what_needed_it_is_skipped() {
    let mut state = fresh((80, 24));
    press(&mut state, &["R"]);
    update(&mut state, Msg::Submitted(Ok(JobId(1))));
    let outcome = Err(Error::run("writing /v failed: no space left").hint("free some disk space"));
    update(&mut state, Msg::Engine(Event::Finished { id: JobId(1), outcome }));
    assert!(matches!(steps(&state)[0], Status::Failed { .. }));
    assert_eq!(steps(&state)[1], Status::Skipped);
    let screen = text(&render(&state, (80, 24)));
    assert!(screen.contains("no space left") && screen.contains("hint: free some disk space"), "{screen}");
}

#[test]
fn cancelling_asks_and_drops_what_waits() {
    let mut state = busy((80, 24));
    assert!(press(&mut state, &["x", "n"]).is_empty());
    let effects = press(&mut state, &["x", "y"]);
    assert!(matches!(effects[..], [Effect::Cancel(JobId(1))]), "{effects:?}");
    assert_eq!(state.queue.waiting(), 0);
    let cancelled = Error { kind: ErrorKind::Cancelled, message: "cancelled".into(), hint: None };
    let effects = update(&mut state, Msg::Engine(Event::Finished { id: JobId(1), outcome: Err(cancelled) }));
    assert!(matches!(effects[..], [Effect::EndRun { ending: Ending::Cancelled, .. }]), "{effects:?}");
    assert!(steps(&state).iter().all(|status| *status == Status::Cancelled));
}

#[test]
fn leaving_a_job_running_stops_it_and_hands_it_over() {
    let mut state = busy((80, 24));
    let effects = press(&mut state, &["q", "l"]);
    assert!(matches!(effects[..], [Effect::Cancel(JobId(1))]), "{effects:?}");
    let cancelled = || Error { kind: ErrorKind::Cancelled, message: "cancelled".into(), hint: None };
    let effects = update(&mut state, Msg::Engine(Event::Finished { id: JobId(1), outcome: Err(cancelled()) }));
    assert!(matches!(effects[..], [Effect::HandOver]), "{effects:?}");
    assert!(steps(&state).iter().all(|status| *status == Status::Waiting), "nothing was cancelled");

    // Where no other process can be started, this one stays and goes on.
    let effects = update(&mut state, Msg::HandOverFailed(Error::run("no more processes")));
    assert!(matches!(effects[..], [Effect::OpenRun { .. }, Effect::Submit(_)]), "{effects:?}");
    assert!(text(&render(&state, (80, 24))).contains("no more processes"));

    // A job that does not stop in time is left to be stopped by the end of the process.
    let mut state = busy((80, 24));
    press(&mut state, &["q", "l"]);
    assert!(update(&mut state, Msg::Second).iter().all(|effect| !matches!(effect, Effect::HandOver)));
    tick(&mut state, 60);
    assert!(update(&mut state, Msg::Second).iter().any(|effect| matches!(effect, Effect::HandOver)));
}

#[test]
fn what_happens_by_itself_is_said_for_a_while_and_kept_among_the_messages() {
    let mut state = fresh((80, 24));
    update(&mut state, Msg::Trouble(Error::run("the disk is full").hint("free some space")));
    let shown = |state: &State| text(&render(state, (80, 24))).contains("the disk is full (free some space)");
    assert!(shown(&state));
    tick(&mut state, 60);
    assert!(!shown(&state));
    press(&mut state, &["E"]);
    assert!(shown(&state));
}

#[test]
fn a_read_only_workbench_looks_and_does_not_touch() {
    let mut state = fresh((80, 24));
    state.read_only = true;
    // What is measured may be read.
    tick(&mut state, 1);
    for key in ["4", "R", "A", "ctrl-s"] {
        assert!(press(&mut state, &[key]).is_empty());
        assert!(state.message.as_ref().is_some_and(|message| message.text.starts_with("read-only")), "{key}");
    }
    press(&mut state, &["j", "s", "2", "j", "5", "s"]);
    assert!(!state.document.unsaved() && state.layers.cursor == 1 && state.document.current() == 1);
    assert!(matches!(press(&mut state, &["q"])[..], [Effect::Quit]));
}

#[test]
fn quitting_asks_for_unsaved_changes_and_running_jobs() {
    let mut state = fresh((80, 24));
    tick(&mut state, 1);
    assert!(matches!(press(&mut state, &["q"])[..], [Effect::Quit]));
    press(&mut state, &["4"]);
    assert!(press(&mut state, &["ctrl-c"]).is_empty());
    assert!(text(&render(&state, (80, 24))).contains("changes that are not saved"));
    assert!(press(&mut state, &["esc"]).is_empty());
    assert!(matches!(press(&mut state, &["q", "y"])[..], [Effect::Quit]));
    let mut state = busy((80, 24));
    press(&mut state, &["q"]);
    assert!(text(&render(&state, (80, 24))).contains("quantize phase3 is not finished"));
}

#[test]
fn saving_asks_for_a_path_and_before_it_replaces_a_file() {
    let mut state = fresh((80, 24));
    press(&mut state, &["4"]);
    let effects = press(&mut state, &["ctrl-s", "enter"]);
    let [Effect::Save { path, session, overwrite: false }] = &effects[..] else { panic!("{effects:?}") };
    assert_eq!(path.to_str(), Some("session.toml"));
    assert_eq!(session.ui.pane.as_deref(), Some("layers"));
    let answer = |outcome| Msg::Saved { path: path.clone(), session: session.clone(), outcome };
    update(&mut state, answer(SaveOutcome::Exists));
    assert_eq!(state.path, None);
    let effects = press(&mut state, &["y"]);
    assert!(matches!(effects[..], [Effect::Save { overwrite: true, .. }]));
    update(&mut state, answer(SaveOutcome::Done));
    assert!(!state.document.unsaved());
    assert!(matches!(press(&mut state, &["q"])[..], [Effect::Quit]));
}

#[test]
fn results_sort_by_any_column_and_the_base_stays_first() {
    let mut state = busy((160, 48));
    press(&mut state, &["5", "z", "s"]);
    let names = |state: &State| {
        let screen = text(&render(state, (160, 48)));
        ["base", "phase1", "phase2", "phase3"]
            .map(|name| screen.lines().position(|line| line.starts_with('│') && line.contains(name)).unwrap())
    };
    let [base, one, two, three] = names(&state);
    assert!(base < two && two < one && one < three, "smallest first");
    press(&mut state, &["S"]);
    let [base, one, two, three] = names(&state);
    assert!(base < three && three < one && one < two, "largest first");
    assert_eq!(state.ui().sort.as_deref(), Some("-linears"));
}

#[test]
fn every_pane_is_reached_by_its_number_or_function_key() {
    let mut state = fresh((80, 24));
    for (key, pane) in [
        ("2", Pane::Plan),
        ("3", Pane::Run),
        ("4", Pane::Block),
        ("5", Pane::Results),
        ("6", Pane::Playground),
        ("1", Pane::Layers),
        ("f4", Pane::Block),
    ] {
        press(&mut state, &[key]);
        assert_eq!(state.focus, pane);
    }
    press(&mut state, &["tab", "shift-tab", "shift-tab"]);
    assert_eq!(state.focus, Pane::Run);
}

fn click(state: &mut State, column: u16, row: u16) {
    let kind = MouseEventKind::Down(MouseButton::Left);
    update(state, Msg::Mouse(MouseEvent { kind, column, row, modifiers: KeyModifiers::NONE }));
}

/// The place of a text on the screen.
fn place(state: &State, what: &str) -> (u16, u16) {
    let screen = text(&render(state, state.size));
    let row = screen.lines().position(|line| line.contains(what)).unwrap_or_else(|| panic!("{what} is not on\n{screen}"));
    let line = screen.lines().nth(row).unwrap();
    (line[..line.find(what).unwrap()].chars().count() as u16, row as u16)
}

#[test]
fn clicks_take_panes_rows_tabs_and_the_strip() {
    let mut state = fresh((160, 48));
    let (column, row) = place(&state, "phase2             phase2");
    click(&mut state, column, row);
    assert_eq!((state.focus, state.document.current()), (Pane::Plan, 1));
    let (column, row) = place(&state, "  7  M SSM");
    click(&mut state, column, row);
    assert_eq!((state.focus, state.layers.cursor), (Pane::Layers, 7));
    click(&mut state, column, row);
    assert!(state.layers.selected.contains(&7), "a second click selects");
    let (column, row) = place(&state, "M-M-M*-M-M*-");
    click(&mut state, column + 5, row);
    assert_eq!(state.layers.cursor, 5, "the strip is a map");
    let wheel = MouseEvent { kind: MouseEventKind::ScrollDown, column: 5, row: 10, modifiers: KeyModifiers::NONE };
    update(&mut state, Msg::Mouse(wheel));
    assert_eq!(state.layers.cursor, 8);
    let (column, row) = place(&state, "phase1         ~5.38 MB");
    click(&mut state, column, row);
    assert_eq!((state.focus, state.results.cursor), (Pane::Results, 1));

    let mut state = fresh((80, 24));
    let (column, row) = place(&state, "3 Run");
    click(&mut state, column, row);
    assert_eq!(state.focus, Pane::Run);
    press(&mut state, &["?"]);
    update(&mut state, Msg::Mouse(wheel));
    assert_eq!(state.popups.len(), 1, "the wheel scrolls a popup, clicks stay away from what is under it");
    press(&mut state, &["esc"]);
    assert!(matches!(press(&mut state, &["ctrl-t"])[..], [Effect::Mouse(false)]));
}

#[test]
fn an_open_block_lists_modules_and_slices_that_take_formats_of_their_own() {
    let mut state = fresh((80, 24));
    press(&mut state, &["l", "j", "4"]);
    let plan = &state.document.draft().plan;
    assert_eq!(plan.linears.get("layers.0.mixer.in_proj"), Some(&Format::W4A8), "{:?}", plan.linears);
    assert_eq!(formats(&state), "888888888888", "the block keeps its format");
    press(&mut state, &["j", "8"]);
    let names: Vec<&String> = state.document.draft().plan.linears.keys().collect();
    assert_eq!(names, ["layers.0.mixer.in_proj", "layers.0.mixer.in_proj.z"]);
    press(&mut state, &["6"]);
    assert!(state.document.draft().plan.linears.len() == 2, "a slice in float goes with any linear");
    press(&mut state, &[":"]);
    type_text(&mut state, "w8a16");
    press(&mut state, &["enter"]);
    assert!(state.message.as_ref().unwrap().text.contains("read the same activations"), "{:?}", state.message);
    press(&mut state, &["u", "u", "u"]);
    assert!(state.document.draft().plan.linears.is_empty());
    press(&mut state, &["h", "j"]);
    assert_eq!(state.layers.cursor, 1, "closed again");
}

#[test]
fn the_list_is_sorted_grouped_and_selected_by_pattern() {
    let mut state = fresh((80, 24));
    let blocks = |state: &State| {
        tree::rows(state).into_iter().filter_map(|row| if let Row::Block(block) = row { Some(block) } else { None }).collect::<Vec<_>>()
    };
    press(&mut state, &["o", "o"]);
    assert_eq!(blocks(&state)[..4], [5, 10, 0, 2], "fewest parameters first");
    press(&mut state, &["O"]);
    assert_eq!(blocks(&state)[..2], [1, 3]);
    assert_eq!(state.ui().layers_sort.as_deref(), Some("-params"));
    press(&mut state, &["K"]);
    assert_eq!(blocks(&state)[..6], [0, 2, 4, 7, 9, 1]);
    assert_eq!(tree::rows(&state).len(), 15, "and a line for each of three kinds");
    press(&mut state, &["+"]);
    type_text(&mut state, "qproj");
    press(&mut state, &["enter", "+"]);
    type_text(&mut state, "0-1");
    press(&mut state, &["enter"]);
    assert_eq!(state.layers.selected.iter().copied().collect::<Vec<_>>(), [0, 1, 5, 10]);
}

#[test]
fn the_terminals_background_chooses_the_theme_and_typing_is_not_disturbed() {
    let mut state = fresh((80, 24));
    state.background.ask(Duration::ZERO);
    let feed = |state: &mut State, answer: &str| {
        update(state, Msg::Key(keys::event("alt-]").unwrap()));
        for letter in answer.chars() {
            update(state, Msg::Key(KeyEvent::from(KeyCode::Char(letter))));
        }
        update(state, Msg::Key(keys::event("alt-\\").unwrap()));
    };
    press(&mut state, &["j"]);
    feed(&mut state, "11;rgb:ffff/ffff/ffff");
    assert_eq!((state.theme.name.as_str(), state.layers.cursor), ("light", 1));
    assert!(state.document.history().0.is_empty(), "no letter of the answer was taken for a key");
}

#[test]
fn keys_of_the_users_file_work_and_are_shown() {
    let mut state = fresh((80, 24));
    state.keymap = Keymap::parse("format-w4a8 = \"f\"\nundo = \"backspace\"", "keys.toml".as_ref()).unwrap();
    press(&mut state, &["4", "f"]);
    assert_eq!(formats(&state), "488888888888");
    assert!(text(&render(&state, (80, 24))).contains(" f w4a8"), "the hint line");
    press(&mut state, &["backspace"]);
    assert_eq!(formats(&state), "888888888888");
}

#[test]
fn the_tour_goes_at_any_key_which_means_what_it_means() {
    let mut state = fresh((80, 24));
    state.popups.push(Popup::Tour(Tour));
    press(&mut state, &["4"]);
    assert!(state.popups.is_empty());
    assert_eq!(formats(&state), "488888888888");
    state.popups.push(Popup::Tour(Tour));
    press(&mut state, &["enter"]);
    assert!(state.popups.is_empty() && state.focus == Pane::Layers);
}

#[test]
fn two_variants_are_compared_their_flips_read_and_exported() {
    let mut state = busy((80, 24));
    let effects = press(&mut state, &["5", "j", "b", "c"]);
    answer(&mut state, &effects);
    let compared = state.compared().unwrap();
    assert_eq!((compared.comparison.base.as_str(), compared.comparison.variant.as_str()), ("base", "phase1"));
    assert!(press(&mut state, &["c", "c"]).is_empty(), "what is known is not computed again");
    let effects = press(&mut state, &["esc", "j", "j", "b", "a", "k", "k", "k", "b", "f"]);
    answer(&mut state, &effects);
    let compared = state.compared().unwrap();
    assert_eq!(compared.comparison.variant, "base", "any two rows");
    let flips = compared.comparison.flips.len();
    assert!(flips > 0 && compared.questions.len() == flips);
    let screen = text(&render(&state, (80, 24)));
    assert!(screen.contains("▶ ✓ arc_easy") || screen.contains("▶ ✗ arc_easy"), "{screen}");
    press(&mut state, &["e", "ctrl-u"]);
    type_text(&mut state, "flips.json");
    let effects = press(&mut state, &["enter"]);
    let [Effect::Write { path, text }] = &effects[..] else { panic!("{effects:?}") };
    assert_eq!(path.to_str(), Some("flips.json"));
    let set: crate::eval::result::ResultSet = serde_json::from_str(text).unwrap();
    assert_eq!((set.results[0].variant.as_str(), set.comparisons[0].flips.len()), ("base", flips));
    press(&mut state, &["e", "ctrl-u"]);
    type_text(&mut state, "flips.txt");
    assert!(press(&mut state, &["enter"]).is_empty());
    assert!(state.message.as_ref().unwrap().text.contains(".csv, .md and .json"));
}

#[test]
fn the_results_are_filtered_and_copied() {
    let mut state = busy((160, 48));
    press(&mut state, &["5", "/"]);
    type_text(&mut state, "phase2");
    press(&mut state, &["enter"]);
    let effects = press(&mut state, &["Y"]);
    let [Effect::Copy(text)] = &effects[..] else { panic!("{effects:?}") };
    assert!(text.contains("| base |") && text.contains("| phase2 |") && !text.contains("phase1"), "{text}");
    let effects = press(&mut state, &["2", "Y"]);
    let [Effect::Copy(text)] = &effects[..] else { panic!("{effects:?}") };
    assert!(text.starts_with("[[variant]]\nname = \"phase3\""), "{text}");
}

#[test]
fn looking_at_a_block_stops_when_the_cursor_moves_on() {
    let mut state = fresh((160, 48));
    let looks = |effects: Vec<Effect>| {
        let look = |effect| if let Effect::Look { block, cancel, .. } = effect { Some((block, cancel)) } else { None };
        effects.into_iter().filter_map(look).collect::<Vec<_>>()
    };
    let first = looks(press(&mut state, &["j"]));
    assert_eq!(first[0].0, 1);
    let second = looks(press(&mut state, &["j"]));
    assert!(first[0].1.is_cancelled() && !second[0].1.is_cancelled());
    // What comes late from the block that was left is not shown as another's.
    let look = Look::Rounding(RoundingError { method: Method::Rtn, format: Format::W8A16, error: 0.5 });
    let late = Msg::Looked { model: "demo".into(), block: 1, look: Ok(Some(look)) };
    update(&mut state, late);
    assert!(state.looks.blocks[&2].roundings.is_empty() && !state.looks.blocks.contains_key(&1));
    update(&mut state, Msg::Looked { model: "demo".into(), block: 2, look: Ok(None) });
    assert!(looks(press(&mut state, &["j", "k"])).iter().all(|(block, _)| *block != 2), "what is known stays known");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever is typed: nothing panics, every screen can be drawn, and the session says what the screen shows.
    #[test]
    fn any_keys_leave_a_session_that_gives_the_same_plans(script in prop::collection::vec(any::<prop::sample::Index>(), 1..60)) {
        let mut all: Vec<&'static str> = TABLE.iter().flat_map(|command| command.keys).copied().collect();
        all.extend(["y", "a", "b", "4", "8", "6", "4", "8", "6", "down", "enter", "esc", "space", "backspace"]);
        let mut state = fresh((80, 24));
        for index in script {
            update(&mut state, Msg::Key(keys::event(index.get::<&str>(&all)).unwrap()));
        }
        for size in [(60, 15), (80, 24), (120, 40), (10, 3)] {
            render(&state, size);
        }
        let session = state.document.session();
        let reopened = Document::of_config(session.clone(), (*state.document.config).clone()).unwrap();
        prop_assert_eq!(reopened.session(), session);
        for (again, draft) in reopened.drafts.iter().zip(&state.document.drafts) {
            prop_assert_eq!(&again.plan, &draft.plan);
        }
    }
}

#[test]
fn readings_of_gpus_go_with_the_job() {
    let mut state = busy((80, 24));
    let readings = state.gpus.clone();
    assert!(!readings.is_empty());
    press(&mut state, &["x", "y"]);
    update(&mut state, Msg::Engine(Event::Finished { id: JobId(1), outcome: Err(Error::cancelled()) }));
    assert!(state.gpus.is_empty());
    // An answer may come after the end.
    update(&mut state, Msg::Gpus(readings));
    assert!(state.gpus.is_empty());
}
