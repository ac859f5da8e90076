//! The whole front of a model as large as Nemotron-H-8B: 52 layers of 3 linears, 6 formats each.

use strata::analysis::knapsack::{Choice, Front};

fn main() {
    divan::main();
}

/// Losses that fall fourfold a bit from sensitivities over four decades; bytes of linears of `shapes` shapes.
fn table(shapes: u64) -> Vec<Vec<Choice>> {
    let mut seed = 1_u64;
    let mut random = move || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as f64 / f64::from(1_u32 << 31)
    };
    (0..52 * 3_u64)
        .map(|unit| {
            let weights = (4096 + 128 * (unit % shapes)) * 4096;
            let sensitivity = 10_f64.powf(-4.0 * random());
            // w2, w3 and w4 in groups of 128 with bf16 scales, w4 in groups of 32, int8 a row, bf16.
            let widths = [(2.0, 2.125), (3.0, 3.125), (4.0, 4.125), (4.3, 4.5), (8.0, 8.0078), (16.0, 16.0)];
            let choice = |(bits, stored): (f64, f64)| Choice {
                cost: (weights as f64 * stored / 8.0) as u64,
                loss: sensitivity * 0.25_f64.powf(bits) * (0.8 + 0.4 * random()),
            };
            widths.map(choice).to_vec()
        })
        .collect()
}

/// As in a model: few shapes, whose bytes have a large common divisor or nearly one.
#[divan::bench]
fn front_of_six_shapes(bencher: divan::Bencher<'_, '_>) {
    let table = table(6);
    bencher.bench(|| Front::solve(&table));
}

/// The worst case: every linear has a size of its own.
#[divan::bench]
fn front_of_all_shapes_different(bencher: divan::Bencher<'_, '_>) {
    let table = table(156);
    bencher.bench(|| Front::solve(&table));
}

/// A new budget once the front is there.
#[divan::bench]
fn look_up_a_budget(bencher: divan::Bencher<'_, '_>) {
    let Some(front) = Front::solve(&table(156)) else { return };
    let budget = 2 * front.least_cost();
    bencher.bench(|| front.within(divan::black_box(budget)).map(|index| front.options(index)));
}
