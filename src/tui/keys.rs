//! Names of keys, as the command table and the help write them: `ctrl-s`, `shift-tab`, `G`, `space`.

use crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

/// The name of a key, or nothing for keys that the workbench has no use for.
pub fn name(event: KeyEvent) -> Option<String> {
    let mut shift = event.modifiers.contains(KeyModifiers::SHIFT);
    let key = match event.code {
        KeyCode::Char(' ') => "space".into(),
        KeyCode::Char(letter) => {
            // The letter itself says whether shift was held.
            shift = false;
            letter.to_string()
        }
        KeyCode::BackTab => {
            shift = true;
            "tab".into()
        }
        KeyCode::F(number) => format!("f{number}"),
        KeyCode::Enter => "enter".into(),
        KeyCode::Esc => "esc".into(),
        KeyCode::Tab => "tab".into(),
        KeyCode::Backspace => "backspace".into(),
        KeyCode::Delete => "delete".into(),
        KeyCode::Up => "up".into(),
        KeyCode::Down => "down".into(),
        KeyCode::Left => "left".into(),
        KeyCode::Right => "right".into(),
        KeyCode::Home => "home".into(),
        KeyCode::End => "end".into(),
        KeyCode::PageUp => "pgup".into(),
        KeyCode::PageDown => "pgdn".into(),
        _ => return None,
    };
    let ctrl = if event.modifiers.contains(KeyModifiers::CONTROL) { "ctrl-" } else { "" };
    let alt = if event.modifiers.contains(KeyModifiers::ALT) { "alt-" } else { "" };
    Some(format!("{ctrl}{alt}{}{key}", if shift { "shift-" } else { "" }))
}

/// The event of a key name, where there is such a key: the inverse of [`name`].
pub fn event(name: &str) -> Option<KeyEvent> {
    let mut modifiers = KeyModifiers::NONE;
    let mut rest = name;
    for (prefix, modifier) in [("ctrl-", KeyModifiers::CONTROL), ("alt-", KeyModifiers::ALT), ("shift-", KeyModifiers::SHIFT)] {
        if let Some(stripped) = rest.strip_prefix(prefix) {
            rest = stripped;
            modifiers |= modifier;
        }
    }
    let mut letters = rest.chars();
    let code = match (letters.next(), letters.next(), rest) {
        (_, _, "space") => KeyCode::Char(' '),
        (_, _, "enter") => KeyCode::Enter,
        (_, _, "esc") => KeyCode::Esc,
        (_, _, "tab") if modifiers.contains(KeyModifiers::SHIFT) => KeyCode::BackTab,
        (_, _, "tab") => KeyCode::Tab,
        (_, _, "backspace") => KeyCode::Backspace,
        (_, _, "delete") => KeyCode::Delete,
        (_, _, "up") => KeyCode::Up,
        (_, _, "down") => KeyCode::Down,
        (_, _, "left") => KeyCode::Left,
        (_, _, "right") => KeyCode::Right,
        (_, _, "home") => KeyCode::Home,
        (_, _, "end") => KeyCode::End,
        (_, _, "pgup") => KeyCode::PageUp,
        (_, _, "pgdn") => KeyCode::PageDown,
        (Some(letter), None, _) => KeyCode::Char(letter),
        (Some('f'), _, number) => KeyCode::F(number.get(1..)?.parse().ok().filter(|number| (1..=12).contains(number))?),
        _ => return None,
    };
    Some(KeyEvent::new(code, modifiers))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_events_are_inverse() {
        for key in ["j", "G", "4", "ctrl-s", "shift-tab", "tab", "f3", "space", "pgdn", "alt-4", ":"] {
            assert_eq!(event(key).and_then(name).as_deref(), Some(key));
        }
        assert!(["f13", "ctrl-", "hyper-x", ""].iter().all(|key| event(key).is_none()));
    }
}
