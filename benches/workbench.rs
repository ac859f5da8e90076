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
    type_into(bencher, Workbench::deep(size), keys);
}

fn type_into(bencher: Bencher, mut workbench: Workbench, keys: &'static [&'static str]) {
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

/// The format of one block changes where losses are known: the predicted divergence follows.
#[divan::bench(args = SIZES)]
fn edit_with_losses(bencher: Bencher, size: (u16, u16)) {
    type_into(bencher, Workbench::measured(size), &["4", "j", "8", ">", "u"]);
}

/// The budget moves over the front: the plan of all blocks follows.
#[divan::bench(args = SIZES)]
fn move_the_budget(bencher: Bencher, size: (u16, u16)) {
    let mut workbench = Workbench::measured(size);
    workbench.press("a");
    let front = workbench.solve();
    workbench.take_in(front);
    type_into(bencher, workbench, &["left", "left", "left", "right"]);
}

/// The front is asked for: every plan worth having is to be found in the background.
#[divan::bench(args = SIZES)]
fn ask_for_the_front(bencher: Bencher, size: (u16, u16)) {
    bencher.with_inputs(|| Workbench::measured(size)).bench_local_values(|mut workbench| {
        workbench.press("a");
        workbench.draw();
        workbench
    });
}

/// The front is there, and is drawn.
#[divan::bench(args = SIZES)]
fn open_the_front(bencher: Bencher, size: (u16, u16)) {
    let asked = || {
        let mut workbench = Workbench::measured(size);
        workbench.press("a");
        let front = workbench.solve();
        (workbench, front)
    };
    bencher.with_inputs(asked).bench_local_values(|(mut workbench, front)| {
        workbench.take_in(front);
        workbench.draw();
        workbench
    });
}

/// What the background does meanwhile.
#[divan::bench]
fn find_the_front(bencher: Bencher) {
    let asked = || {
        let mut workbench = Workbench::measured(SIZES[0]);
        workbench.press("a");
        workbench
    };
    bencher.with_inputs(asked).bench_local_values(|mut workbench| workbench.solve());
}
