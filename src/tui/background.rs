//! The terminal's background colour, asked for by OSC 11 and picked out of the keys that it arrives as.
//!
//! Nothing waits for the answer: the first frame is drawn with the default theme, and the theme changes when the answer
//! comes in time. crossterm takes the answer, `ESC ] 11 ; rgb:RRRR/GGGG/BBBB` and `ESC \` or BEL, for keys: alt-], the
//! letters, then alt-\ or ctrl-g. [`Query::keys`] holds keys back only while they spell such an answer, and gives them
//! out as keys when they turn out not to.

use std::time::Duration;

use crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

/// What asks the terminal.
pub const QUESTION: &str = "\x1b]11;?\x1b\\";

/// Time within which an answer still changes the theme.
const PATIENCE: Duration = Duration::from_secs(2);

/// A question that was put to the terminal.
#[derive(Debug, Default)]
pub struct Query {
    asked: Option<Duration>,
    held: Vec<KeyEvent>,
    text: String,
}

/// What came of a key.
#[derive(Debug, PartialEq)]
pub enum Answer {
    /// These are keys.
    Keys(Vec<KeyEvent>),
    /// The background is light, or not.
    Light(bool),
    /// The answer goes on, or came too late to be of use.
    Nothing,
}

impl Query {
    /// The question was put at `clock`.
    pub fn ask(&mut self, clock: Duration) {
        self.asked = Some(clock);
    }

    /// Takes a key at `clock`.
    pub fn keys(&mut self, key: KeyEvent, clock: Duration) -> Answer {
        let Some(asked) = self.asked else { return Answer::Keys(vec![key]) };
        let alt = key.modifiers == KeyModifiers::ALT;
        let plain = key.modifiers.is_empty() || key.modifiers == KeyModifiers::SHIFT;
        match key.code {
            KeyCode::Char(']') if alt && self.held.is_empty() => self.held.push(key),
            KeyCode::Char(letter) if plain && !self.held.is_empty() && "rgba:/;".contains(letter) | letter.is_ascii_hexdigit() => {
                self.held.push(key);
                self.text.push(letter);
            }
            KeyCode::Char(end)
                if !self.held.is_empty() && ((alt && end == '\\') || (key.modifiers == KeyModifiers::CONTROL && end == 'g')) =>
            {
                let light = is_light(&self.text);
                if let Some(light) = light {
                    *self = Self::default();
                    return if clock.saturating_sub(asked) <= PATIENCE { Answer::Light(light) } else { Answer::Nothing };
                }
                return self.give_up(key);
            }
            _ => return self.give_up(key),
        }
        if "11;rgb".starts_with(self.text.get(..6).unwrap_or(&self.text)) { Answer::Nothing } else { self.give_up_held() }
    }

    fn give_up(&mut self, key: KeyEvent) -> Answer {
        self.text.clear();
        let mut keys = std::mem::take(&mut self.held);
        keys.push(key);
        Answer::Keys(keys)
    }

    fn give_up_held(&mut self) -> Answer {
        self.text.clear();
        Answer::Keys(std::mem::take(&mut self.held))
    }
}

/// Whether `11;rgb:RRRR/GGGG/BBBB` (one to four digits each, perhaps with alpha) is a light colour: more than half the
/// luminance of white (ITU-R BT.709 weights).
fn is_light(answer: &str) -> Option<bool> {
    let channels = answer.strip_prefix("11;rgb")?.trim_start_matches('a').strip_prefix(':')?;
    let channel = |text: &str| {
        let most = (1_u32 << (4 * u32::try_from(text.len()).ok()?)) - 1;
        (1..=4).contains(&text.len()).then(|| Some(f64::from(u32::from_str_radix(text, 16).ok()?) / f64::from(most)))?
    };
    let mut channels = channels.split('/').map(channel);
    let [red, green, blue] = [channels.next()??, channels.next()??, channels.next()??];
    Some(0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.5)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(code: char, modifiers: KeyModifiers) -> KeyEvent {
        KeyEvent::new(KeyCode::Char(code), modifiers)
    }

    /// Feeds what crossterm makes of an answer; returns what came out.
    fn feed(query: &mut Query, text: &str, end: KeyEvent, seconds: u64) -> Vec<Answer> {
        let mut keys = vec![key(']', KeyModifiers::ALT)];
        keys.extend(text.chars().map(|letter| key(letter, KeyModifiers::NONE)));
        keys.push(end);
        keys.into_iter().map(|key| query.keys(key, Duration::from_secs(seconds))).filter(|answer| *answer != Answer::Nothing).collect()
    }

    #[test]
    fn answers_are_understood_in_every_spelling_and_only_once() {
        let (st, bell) = (key('\\', KeyModifiers::ALT), key('g', KeyModifiers::CONTROL));
        for (text, end, light) in [
            ("11;rgb:ffff/ffff/dddd", st, true),
            ("11;rgb:1e1e/1e1e/2e2e", bell, false),
            ("11;rgb:00/ff/00", st, true),
            ("11;rgba:0000/0000/0000/ffff", st, false),
        ] {
            let mut query = Query::default();
            query.ask(Duration::ZERO);
            assert_eq!(feed(&mut query, text, end, 1), [Answer::Light(light)], "{text}");
            let letter = key('1', KeyModifiers::NONE);
            assert_eq!(query.keys(letter, Duration::ZERO), Answer::Keys(vec![letter]), "keys are keys again");
        }
        let mut late = Query::default();
        late.ask(Duration::ZERO);
        assert_eq!(feed(&mut late, "11;rgb:ffff/ffff/ffff", st, 9), [], "swallowed, without effect");
    }

    #[test]
    fn what_is_typed_comes_through_whole_and_in_order() {
        let mut query = Query::default();
        query.ask(Duration::ZERO);
        let typed = [key(']', KeyModifiers::ALT), key('1', KeyModifiers::NONE), key('x', KeyModifiers::NONE), key('r', KeyModifiers::NONE)];
        let mut out = Vec::new();
        for key in typed {
            if let Answer::Keys(keys) = query.keys(key, Duration::from_secs(1)) {
                out.extend(keys);
            }
        }
        assert_eq!(out, typed);
        let letter = key('r', KeyModifiers::NONE);
        assert_eq!(query.keys(letter, Duration::ZERO), Answer::Keys(vec![letter]), "an answer does not begin with r");
    }
}
