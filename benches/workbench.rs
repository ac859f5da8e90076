//! The workbench on a stack of 118 blocks: what a key costs until its frame is drawn.
//!
//! `cargo bench --bench workbench`; the shape is that of a 56B model (54 SSM, 54 MLP and 10 attention blocks).

use divan::Bencher;
use strata::tui::bench::Workbench;

fn main() {
    divan::main();
}

const SIZES: [(u16, u16); 2] = [(80, 24), (160, 48)];

fn press(bencher: Bencher, size: (u16, u16), keys: &'static [&'static str]) {
    let mut workbench = Workbench::deep(size);
    let mut turn = 0;
    bencher.bench_local(|| {
        workbench.press(keys[turn % keys.len()]);
        turn += 1;
        workbench.draw();
    });
}

/// The cursor moves a block.
#[divan::bench(args = SIZES)]
fn scroll(bencher: Bencher, size: (u16, u16)) {
    press(bencher, size, &["j", "j", "j", "k"]);
}

/// A letter of a filter is typed or taken back.
#[divan::bench(args = SIZES)]
fn filter(bencher: Bencher, size: (u16, u16)) {
    press(bencher, size, &["/", "d", "o", "w", "n", "esc"]);
}

/// The format of all SSM blocks changes, and every prediction with it.
#[divan::bench(args = SIZES)]
fn edit_a_kind(bencher: Bencher, size: (u16, u16)) {
    press(bencher, size, &["s", "4", "8"]);
}

/// The format of one block changes.
#[divan::bench(args = SIZES)]
fn edit_a_block(bencher: Bencher, size: (u16, u16)) {
    press(bencher, size, &["4", "j", "8", ">", "u"]);
}

/// The list is sorted and grouped.
#[divan::bench(args = SIZES)]
fn sort(bencher: Bencher, size: (u16, u16)) {
    press(bencher, size, &["o", "O", "K"]);
}
