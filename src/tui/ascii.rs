//! The screen without Unicode: every cell that is not ASCII gets a stand-in of the same width.

use ratatui::buffer::Buffer;

/// Replaces what is not ASCII, cell by cell, once a frame is drawn.
pub fn flatten(buffer: &mut Buffer) {
    for cell in &mut buffer.content {
        if !cell.symbol().is_ascii() {
            let letter = cell.symbol().chars().next().map_or(' ', stand_in);
            cell.set_char(letter);
        }
    }
}

/// What stands for a character; `?` for those that the workbench does not draw itself.
fn stand_in(letter: char) -> char {
    match letter {
        '─' | '−' | '–' | '—' => '-',
        '│' => '|',
        '╭' | '╮' | '╰' | '╯' | '├' | '└' => '+',
        '▁' | '▂' | '▃' => '_',
        '▄' | '▅' => '=',
        '▆' | '▇' | '█' => '#',
        '░' | '·' | '…' => '.',
        '▸' => '!',
        '▶' | '→' => '>',
        '↑' => '^',
        '⏎' => '/',
        '●' | '•' => '*',
        '○' => 'o',
        'Δ' => 'd',
        '°' => ' ',
        '←' => '<',
        '✓' | '↓' => 'v',
        'µ' => 'u',
        '✗' | '×' => 'x',
        _ => '?',
    }
}
