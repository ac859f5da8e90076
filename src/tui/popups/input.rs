//! A line of text that is being typed.

use ratatui::style::Modifier;
use ratatui::text::Span;

/// The text and where the next letter goes (in characters).
#[derive(Debug, Clone, Default)]
pub struct Input {
    letters: Vec<char>,
    at: usize,
}

impl Input {
    /// A line that holds `text`, the cursor behind it.
    pub fn new(text: &str) -> Self {
        let letters: Vec<char> = text.chars().collect();
        Self { at: letters.len(), letters }
    }

    /// The text.
    pub fn text(&self) -> String {
        self.letters.iter().collect()
    }

    /// Takes a key; returns whether it meant something here.
    pub fn key(&mut self, key: &str) -> bool {
        match key {
            "left" => self.at = self.at.saturating_sub(1),
            "right" => self.at = (self.at + 1).min(self.letters.len()),
            "home" | "ctrl-a" => self.at = 0,
            "end" | "ctrl-e" => self.at = self.letters.len(),
            "backspace" | "ctrl-h" if self.at > 0 => {
                self.at -= 1;
                self.letters.remove(self.at);
            }
            "delete" if self.at < self.letters.len() => drop(self.letters.remove(self.at)),
            "ctrl-u" => {
                self.letters.drain(..self.at);
                self.at = 0;
            }
            "ctrl-w" => {
                let word = self.letters[..self.at].iter().rev().skip_while(|letter| **letter == ' ');
                let spaces = self.letters[..self.at].iter().rev().take_while(|letter| **letter == ' ').count();
                let start = self.at - spaces - word.take_while(|letter| **letter != ' ').count();
                self.letters.drain(start..self.at);
                self.at = start;
            }
            "space" => self.insert(' '),
            _ => {
                let mut letters = key.chars();
                let (Some(letter), None) = (letters.next(), letters.next()) else { return false };
                self.insert(letter);
            }
        }
        true
    }

    fn insert(&mut self, letter: char) {
        self.letters.insert(self.at, letter);
        self.at += 1;
    }

    /// The text with the cursor's cell reversed, its last `width` characters where it is longer.
    pub fn spans(&self, width: usize) -> Vec<Span<'static>> {
        let first = (self.at + 1).saturating_sub(width);
        let part = |range: std::ops::Range<usize>| self.letters.get(range).unwrap_or_default().iter().collect::<String>();
        let under = self.letters.get(self.at).copied().unwrap_or(' ');
        let end = self.letters.len().min(first + width).max(self.at);
        vec![
            Span::raw(part(first..self.at)),
            Span::raw(under.to_string()).style(Modifier::REVERSED),
            Span::raw(part((self.at + 1).min(end)..end)),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn editing_a_line() {
        let mut input = Input::new("my session.toml");
        for key in ["ctrl-w", "a", "b", "left", "X", "home", "delete", "end", "backspace", "space"] {
            input.key(key);
        }
        assert_eq!(input.text(), "y aX ");
        assert!(!input.key("pgup"));
        input.key("ctrl-u");
        assert_eq!(input.text(), "");
    }
}
