//! Whole screens with their styles.

use ratatui::buffer::Buffer;
use ratatui::style::Style;

use super::fixture::{busy, fresh, press, render, text, type_text};
use crate::tui::state::{Pane, State};
use crate::tui::theme::Theme;

/// The text, then the same cells with a letter for each style, then what the letters mean.
fn styled(buffer: &Buffer) -> String {
    let mut styles: Vec<Style> = Vec::new();
    let mut letters = String::new();
    for cells in buffer.content.chunks(buffer.area.width as usize) {
        for cell in cells {
            let style = cell.style();
            let known = styles.iter().position(|other| *other == style);
            let index = known.unwrap_or_else(|| {
                styles.push(style);
                styles.len() - 1
            });
            letters.push(if index == 0 { '.' } else { char::from(b'a' + index as u8 - 1) });
        }
        letters.push('\n');
    }
    let legend = styles.iter().enumerate().map(|(index, style)| {
        let letter = if index == 0 { '.' } else { char::from(b'a' + index as u8 - 1) };
        format!("{letter} {:?} on {:?} {:?}\n", style.fg.unwrap_or_default(), style.bg.unwrap_or_default(), style.add_modifier)
    });
    format!("{}\n{letters}\n{}", text(buffer), legend.collect::<String>())
}

fn plain(mut state: State) -> State {
    state.theme = Theme::find(None, true).unwrap();
    state.ascii = true;
    state
}

#[test]
fn every_pane_at_80x24() {
    for pane in Pane::ALL {
        let mut state = busy((80, 24));
        state.focus = pane;
        let name = pane.title().to_lowercase();
        insta::assert_snapshot!(format!("{name}_80x24_ansi16"), styled(&render(&state, (80, 24))));
        let state = plain(state);
        insta::assert_snapshot!(format!("{name}_80x24_mono_ascii"), styled(&render(&state, (80, 24))));
    }
}

#[test]
fn all_panes_side_by_side() {
    for size in [(120, 40), (160, 48)] {
        let name = format!("{}x{}", size.0, size.1);
        let state = busy(size);
        insta::assert_snapshot!(format!("all_{name}_ansi16"), styled(&render(&state, size)));
        insta::assert_snapshot!(format!("all_{name}_mono_ascii"), styled(&render(&plain(state), size)));
    }
}

#[test]
fn a_deep_stack_with_experts_is_seen_at_once() {
    let pattern = "M-M-M-*EM-".repeat(12)[..118].to_owned();
    let mut state = super::fixture::synthetic(&pattern, (120, 40));
    press(&mut state, &["/"]);
    type_text(&mut state, "moe");
    press(&mut state, &["enter", "ctrl-a", "4", "esc", "esc", "pgdn"]);
    insta::assert_snapshot!("all_118_blocks_120x40", text(&render(&state, (120, 40))));
}

#[test]
fn too_small_and_unmeasured() {
    insta::assert_snapshot!("too_small", text(&render(&busy((40, 10)), (40, 10))));
    let mut state = fresh((80, 24));
    insta::assert_snapshot!("layers_fresh_80x24", text(&render(&state, (80, 24))));
    press(&mut state, &["5"]);
    insta::assert_snapshot!("results_fresh_80x24", text(&render(&state, (80, 24))));
}

#[test]
fn popups() {
    for (name, script, typed) in [
        ("help", &["?"][..], "format"),
        ("palette", &[":"], "sav"),
        ("confirm_quit", &["q"], ""),
        ("confirm_cancel", &["x"], ""),
        ("choose_recipe", &["2", "n"], ""),
        ("prompt_filter", &["/"], "ssm"),
    ] {
        let mut state = busy((80, 24));
        press(&mut state, script);
        type_text(&mut state, typed);
        insta::assert_snapshot!(format!("popup_{name}"), styled(&render(&state, (80, 24))));
    }
}

#[test]
fn ascii_screens_hold_ascii_only_and_nothing_unknown() {
    for size in [(80, 24), (160, 48)] {
        for pane in Pane::ALL {
            let mut state = plain(busy(size));
            state.focus = pane;
            let text = text(&render(&state, size));
            assert!(text.is_ascii());
            // The hint of the help key is the only question mark.
            assert_eq!(text.matches('?').count(), 1, "{text}");
        }
    }
}
