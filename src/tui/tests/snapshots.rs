//! Whole screens with their styles in every theme, and without Unicode.

use std::path::Path;

use ratatui::buffer::Buffer;
use ratatui::style::Style;
use rstest::rstest;

use super::fixture::{answer, busy, evaluating, fresh, looked, press, render, run_status, spoken, text, type_text, with_losses};
use crate::session::recovery::{Recovery, lost};
use crate::session::runs;
use crate::tui::actions::files::offer_lost;
use crate::tui::message::Msg;
use crate::tui::queue::Level;
use crate::tui::state::State;
use crate::tui::theme::{BUILT_IN, Theme};
use crate::tui::update::update;

/// The themes in the order of the legend.
fn themes() -> Vec<Theme> {
    BUILT_IN.iter().map(|(name, _)| Theme::find(Some(name), false).unwrap()).collect()
}

/// The text; then the same cells with a letter for each combination of styles that the themes give them; then what the
/// letters mean, a theme a column; then the text without Unicode.
fn styled(state: &mut State, size: (u16, u16)) -> String {
    let screens: Vec<Buffer> = themes()
        .into_iter()
        .map(|theme| {
            state.theme = theme;
            render(state, size)
        })
        .collect();
    for other in &screens[1..] {
        assert_eq!(text(other), text(&screens[0]), "a theme changes colours only");
    }
    let mut known: Vec<Vec<Style>> = Vec::new();
    let mut letters = String::new();
    for place in 0..screens[0].content.len() {
        let styles: Vec<Style> = screens.iter().map(|screen| screen.content[place].style()).collect();
        let index = known.iter().position(|other| *other == styles).unwrap_or_else(|| {
            known.push(styles);
            known.len() - 1
        });
        letters.push(letter(index));
        if (place + 1).is_multiple_of(size.0 as usize) {
            letters.push('\n');
        }
    }
    let names = BUILT_IN.map(|(name, _)| name).join(" | ");
    let legend = known.iter().enumerate().map(|(index, styles)| {
        let styles: Vec<String> = styles.iter().map(describe).collect();
        format!("{} {}\n", letter(index), styles.join(" | "))
    });
    let legend: String = legend.collect();
    state.ascii = true;
    let ascii = render(state, size);
    state.ascii = false;
    format!("{}\n{letters}\n  {names}\n{legend}\n{}", text(&screens[0]), text(&ascii))
}

fn letter(index: usize) -> char {
    if index == 0 { '.' } else { ('a'..='z').chain('A'..='Z').nth(index - 1).unwrap_or('?') }
}

fn describe(style: &Style) -> String {
    let color = |color: Option<ratatui::style::Color>| color.filter(|color| *color != ratatui::style::Color::Reset);
    let fg = color(style.fg).map_or_else(|| "-".to_owned(), |color| color.to_string());
    let bg = color(style.bg).map_or_else(String::new, |color| format!(" on {color}"));
    let modifiers = if style.add_modifier.is_empty() { String::new() } else { format!(" {:?}", style.add_modifier) };
    format!("{fg}{bg}{}", modifiers.to_lowercase())
}

/// Every view by name: its pane and what is typed to see it. `measured` views know what the model's parts lose.
const VIEWS: [(&str, bool, &[&str]); 15] = [
    ("layers", false, &["1", "esc", "l", "j", "j", "4"]),
    ("layers_grouped", false, &["1", "o", "o", "o", "O", "K", "esc"]),
    ("layers_losses", true, &["1", "esc", "m", "j", "4"]),
    ("plan", false, &["2"]),
    ("plan_beside", false, &["2", "b", "1"]),
    ("plan_front", true, &["2", "a", "left", "left", "left", "left", "left", "left", "left", "left"]),
    ("why", true, &["1", "esc", "g", "w"]),
    ("run", false, &["f3"]),
    ("run_evaluation", false, &["f3"]),
    ("block", false, &["f4"]),
    ("results", false, &["f5"]),
    ("compare", false, &["f5", "j", "j", "j", "b", "c"]),
    ("flips", false, &["f5", "j", "j", "j", "b", "f", "j"]),
    ("plot", false, &["f5", "p"]),
    ("playground", false, &["f6", "p"]),
];

fn view(name: &str, size: (u16, u16)) -> State {
    let (_, measured, script) = VIEWS.into_iter().find(|(other, ..)| *other == name).unwrap();
    let mut state = looked(spoken(busy(size)));
    if measured {
        // The variant that was edited first.
        press(&mut state, &["[", "["]);
        state = with_losses(state);
    }
    if name == "run_evaluation" {
        state = evaluating(state);
    }
    let effects = press(&mut state, script);
    answer(&mut state, &effects);
    state
}

#[rstest]
fn a_view_in_every_theme(
    #[values(
        "layers",
        "layers_grouped",
        "layers_losses",
        "plan",
        "plan_beside",
        "plan_front",
        "why",
        "run",
        "run_evaluation",
        "block",
        "results",
        "compare",
        "flips",
        "plot",
        "playground"
    )]
    name: &str,
) {
    let size = (80, 24);
    insta::assert_snapshot!(format!("{name}_80x24"), styled(&mut view(name, size), size));
}

/// Panes that fill a larger screen, which `all_120x40` shows side by side, and views that take the place of another.
#[rstest]
fn a_larger_view_in_every_theme(
    #[values(
        "layers",
        "layers_losses",
        "plan",
        "plan_front",
        "why",
        "run",
        "run_evaluation",
        "block",
        "results",
        "compare",
        "flips",
        "plot",
        "playground"
    )]
    name: &str,
) {
    let size = (120, 40);
    let mut state = view(name, size);
    state.zoom = true;
    insta::assert_snapshot!(format!("{name}_120x40"), styled(&mut state, size));
}

#[test]
fn too_small_a_screen_in_every_theme() {
    let size = (40, 10);
    insta::assert_snapshot!("too_small_40x10", styled(&mut busy(size), size));
}

/// No view is drawn on too small a screen, and none fails on the smallest.
#[rstest]
fn a_view_on_small_screens(#[values((40, 10), (60, 15), (79, 23))] size: (u16, u16)) {
    for (name, ..) in VIEWS {
        let shown = text(&render(&view(name, size), size));
        let refused = shown.trim_end() == format!("strata needs 60x15; this is {}x{}", size.0, size.1);
        assert_eq!(refused, size == (40, 10), "{name}\n{shown}");
    }
}

#[test]
fn all_panes_side_by_side() {
    for size in [(120, 40), (160, 48)] {
        let mut state = looked(busy(size));
        insta::assert_snapshot!(format!("all_{}x{}", size.0, size.1), styled(&mut state, size));
    }
}

#[test]
fn a_deep_stack_with_experts_is_seen_at_once() {
    let pattern = "M-M-M-*EM-".repeat(12)[..118].to_owned();
    let mut state = super::fixture::synthetic(&pattern, (120, 40));
    press(&mut state, &["/"]);
    type_text(&mut state, "moe");
    press(&mut state, &["enter", "ctrl-a", "4", "esc", "l", "esc"]);
    insta::assert_snapshot!("all_118_blocks_120x40", text(&render(&state, (120, 40))));
}

#[test]
fn unmeasured() {
    let mut state = fresh((80, 24));
    insta::assert_snapshot!("layers_fresh_80x24", text(&render(&state, (80, 24))));
    press(&mut state, &["5"]);
    insta::assert_snapshot!("results_fresh_80x24", text(&render(&state, (80, 24))));
}

/// Popups by name: what is typed to open them, and then into them.
#[rstest]
#[case("help", &["?"], "format")]
#[case("palette", &[":"], "sav")]
#[case("confirm_quit", &["q"], "")]
#[case("confirm_cancel", &["x"], "")]
#[case("choose_recipe", &["2", "n"], "")]
#[case("history", &["H"], "")]
#[case("prompt_filter", &["/"], "ssm")]
#[case("changes", &["C"], "")]
#[case("messages", &["E"], "")]
#[case("theme", &[":", "t", "h", "e", "m", "e", "enter"], "")]
#[case("tour", &[":", "t", "o", "u", "r", "enter"], "")]
fn a_popup_in_every_theme(#[case] name: &str, #[case] script: &[&str], #[case] typed: &str) {
    let size = (80, 24);
    let mut state = busy(size);
    press(&mut state, script);
    type_text(&mut state, typed);
    insta::assert_snapshot!(format!("popup_{name}"), styled(&mut state, size));
}

#[test]
fn runs_of_all_processes_in_every_theme() {
    let size = (80, 24);
    let mut state = busy(size);
    press(&mut state, &["3", "v"]);
    let log = ["04:20:01 info quantize phase1: started", "04:20:09 warning block 3: down_proj takes int8"].map(str::to_owned).to_vec();
    let list = vec![run_status(&state, 2, runs::State::Running), run_status(&state, 1, runs::State::Interrupted)];
    update(&mut state, Msg::Runs { list: list.clone(), log: Vec::new() });
    insta::assert_snapshot!("popup_runs", styled(&mut state, size));
    press(&mut state, &["enter"]);
    update(&mut state, Msg::Runs { list, log });
    insta::assert_snapshot!("popup_run_followed", styled(&mut state, size));
}

#[test]
fn what_was_lost_is_offered_in_every_theme() {
    let folder = tempfile::tempdir().unwrap();
    let mut state = fresh((80, 24));
    Recovery::begin(folder.path()).unwrap().keep(&state.document.session(), Some(Path::new("/home/me/fit.toml"))).unwrap();
    offer_lost(&mut state, lost(folder.path()).remove(0));
    insta::assert_snapshot!("popup_recovery", styled(&mut state, (80, 24)));
}

#[test]
fn toasts_in_every_theme() {
    let size = (80, 24);
    let mut state = busy(size);
    state.toast(Level::Info, "evaluate base, phase1: done");
    state.toast(Level::Warning, "1 run interrupted; :runs can go on with it");
    state.toast(Level::Error, "quantize phase2: block 3 overflows in int8 (choose wider activations for it)");
    insta::assert_snapshot!("toasts_80x24", styled(&mut state, size));
}

#[test]
fn ascii_screens_hold_ascii_only_and_nothing_unknown() {
    for size in [(80, 24), (160, 48)] {
        for (name, ..) in VIEWS {
            let mut state = view(name, size);
            let plain = text(&render(&state, size));
            state.ascii = true;
            let text = text(&render(&state, size));
            assert!(text.is_ascii());
            assert_eq!(text.matches('?').count(), plain.matches('?').count(), "{name}\n{text}");
        }
    }
}
