//! The twins of the demo compute what the demo computes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

#[path = "common/twins.rs"]
mod twins;

use strata::backend::cpu::Cpu;
use strata::backend::{Backend, Sequences};
use strata::checkpoint::{Checkpoint, open};
use strata::model::{Hybrid, Stream};
use strata::monitor::Monitor;
use tempfile::TempDir;

fn logits(checkpoint: &Checkpoint) -> Vec<f32> {
    let ids: Vec<u32> = (0..200).map(|i| (i * 37 + 5) % 1000).collect();
    let model = Hybrid::load(Cpu, checkpoint).unwrap();
    Cpu.download(&model.logits(&ids, &Sequences::new(vec![ids.len()]), None).unwrap()).unwrap()
}

/// Largest share of a row or column that one element may have of the sum of squares, over channels: how uneven they are.
fn spread(values: &[f32]) -> f64 {
    let squares: Vec<f64> = values.iter().map(|value| f64::from(value * value)).collect();
    squares.iter().copied().fold(0.0, f64::max) * squares.len() as f64 / squares.iter().sum::<f64>()
}

#[test]
fn the_outlier_twin_has_the_demos_logits_to_the_last_bit() {
    let folder = TempDir::new().unwrap();
    twins::outlier(folder.path());
    let twin = Checkpoint::open(folder.path()).unwrap();
    assert!(logits(&twin) == logits(&open("demo").unwrap()));
    let norm = "layers.0.norm.weight";
    assert!(spread(&twin.read(norm).unwrap()) > 20.0 * spread(&open("demo").unwrap().read(norm).unwrap()));
}

#[test]
fn the_skewed_twin_has_the_demos_logits_and_an_uneven_stream() {
    let folder = TempDir::new().unwrap();
    twins::skewed(folder.path());
    let twin = Checkpoint::open(folder.path()).unwrap();
    let largest = logits(&twin).iter().zip(logits(&open("demo").unwrap())).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(largest < 1e-4, "{largest}");
    assert!(twin.read("layers.3.norm.weight").unwrap().iter().all(|weight| *weight == 1.0));
    // Energy of the stream by channel: the demo spreads it, the twin does not.
    let energy = |checkpoint: &Checkpoint| {
        let ids: Vec<u32> = (0..200).map(|i| (i * 37 + 5) % 1000).collect();
        let mut stream = Stream::new(&Cpu, checkpoint, &[(ids, Sequences::new(vec![200]))]).unwrap();
        stream.run(&Monitor::silent(), "run").unwrap();
        let (values, width) = (Cpu.download(&stream.boundary().get(&Cpu, 0).unwrap()).unwrap(), checkpoint.config.hidden_size);
        let column = |c: usize| values.iter().skip(c).step_by(width).map(|x| x * x).sum::<f32>().sqrt();
        spread(&(0..width).map(column).collect::<Vec<_>>())
    };
    assert!(energy(&twin) > 1.5 * energy(&open("demo").unwrap()), "{} {}", energy(&twin), energy(&open("demo").unwrap()));
}
