//! Twins of the embedded demo: the same function, with weights that are harder to quantize.
//!
//! *Outlier twin*: scales moved between neighbouring matrices for a few channels, powers of two throughout, so that the
//! twin's logits are the demo's to the last bit. *Skewed twin*: norms folded, and the residual stream rotated into the
//! eigenvectors of its own second moment, which puts most of its energy into a few channels that no norm can even out.

use std::collections::BTreeMap;
use std::path::Path;

use faer::{Mat, Side};
use half::bf16;
use rand::rngs::SmallRng;
use rand::seq::index;
use rand::{RngExt, SeedableRng};
use safetensors::serialize;
use safetensors::tensor::{Dtype, TensorView};
use strata::backend::Sequences;
use strata::backend::cpu::Cpu;
use strata::checkpoint::{Checkpoint, open};
use strata::format::BlockKind;
use strata::model::Stream;
use strata::quant::{Sample, SampleSpec};

const SEED: u64 = 2026;

/// Share of channels that get a scale of their own.
const SHARE: f64 = 0.02;

/// The demo's tensors in f64: shape and values, by stored name.
struct Weights {
    demo: Checkpoint,
    tensors: BTreeMap<String, (Vec<usize>, Vec<f64>)>,
}

impl Weights {
    fn of_demo() -> Self {
        let demo = open("demo").unwrap();
        let tensors = demo
            .tensors()
            .map(|(name, tensor)| {
                (name.to_owned(), (tensor.shape.to_vec(), tensor.to_f32().unwrap().unwrap().into_iter().map(f64::from).collect()))
            })
            .collect();
        Self { demo, tensors }
    }

    fn tensor(&mut self, canonical: &str) -> (usize, &mut Vec<f64>) {
        let (shape, values) = self.tensors.get_mut(&self.demo.stored_name(canonical)).unwrap();
        (*shape.last().unwrap(), values)
    }

    fn scale_row(&mut self, name: &str, row: usize, scale: f64) {
        let (cols, values) = self.tensor(name);
        values[row * cols..(row + 1) * cols].iter_mut().for_each(|value| *value *= scale);
    }

    fn scale_column(&mut self, name: &str, column: usize, scale: f64) {
        let (cols, values) = self.tensor(name);
        values.chunks_exact_mut(cols).for_each(|row| row[column] *= scale);
    }

    fn scale_element(&mut self, name: &str, at: usize, scale: f64) {
        self.tensor(name).1[at] *= scale;
    }

    fn update(&mut self, name: &str, change: impl Fn(Mat<f64>) -> Mat<f64>) {
        let (cols, values) = self.tensor(name);
        let changed = change(Mat::from_fn(values.len() / cols, cols, |r, c| values[r * cols + c]));
        *values = (0..changed.nrows()).flat_map(|r| (0..cols).map(move |c| (r, c))).map(|at| changed[at]).collect();
    }

    /// Multiplies the columns of `names` by the weights of norm `norm`, which become 1.
    fn fold(&mut self, norm: &str, names: &[String]) {
        let weights = self.tensor(norm).1.clone();
        self.tensor(norm).1.fill(1.0);
        for name in names {
            for (column, weight) in weights.iter().enumerate() {
                self.scale_column(name, column, *weight);
            }
        }
    }

    /// The linears of block `index` that read the residual stream, and the one that writes to it.
    fn readers_and_writer(&self, index: usize) -> (Vec<String>, String) {
        let (readers, writer): (&[&str], _) = match self.demo.layout.blocks[index].kind {
            BlockKind::Ssm => (&["in_proj"], "out_proj"),
            BlockKind::Mlp => (&["up_proj"], "down_proj"),
            BlockKind::Attention => (&["q_proj", "k_proj", "v_proj"], "o_proj"),
            BlockKind::Moe => panic!("the demo has no experts"),
        };
        let name = |linear: &str| format!("layers.{index}.mixer.{linear}.weight");
        (readers.iter().map(|linear| name(linear)).collect(), name(writer))
    }

    /// Writes a checkpoint whose floats are of type `dtype`, BF16 or F32.
    fn write(&self, directory: &Path, dtype: Dtype) {
        std::fs::create_dir_all(directory).unwrap();
        let word = if dtype == Dtype::F32 { "\"float32\"" } else { "\"bfloat16\"" };
        std::fs::write(directory.join("config.json"), self.demo.config_text().unwrap().replace("\"bfloat16\"", word)).unwrap();
        for (name, bytes) in self.demo.companions().unwrap() {
            std::fs::write(directory.join(name), bytes).unwrap();
        }
        let bytes: BTreeMap<&String, (Vec<usize>, Vec<u8>)> = self
            .tensors
            .iter()
            .map(|(name, (shape, values))| {
                let bytes = if dtype == Dtype::F32 {
                    values.iter().flat_map(|value| (*value as f32).to_le_bytes()).collect()
                } else {
                    values.iter().flat_map(|value| bf16::from_f64(*value).to_le_bytes()).collect()
                };
                (name, (shape.clone(), bytes))
            })
            .collect();
        let views = bytes.iter().map(|(name, (shape, bytes))| (name.as_str(), TensorView::new(dtype, shape.clone(), bytes).unwrap()));
        std::fs::write(directory.join("model.safetensors"), serialize(views, None).unwrap()).unwrap();
    }
}

/// Writes the outlier twin.
pub fn outlier(directory: &Path) {
    let mut weights = Weights::of_demo();
    let mut rng = SmallRng::seed_from_u64(SEED);
    let some = |rng: &mut SmallRng, of: usize| index::sample(rng, of, (SHARE * of as f64).ceil() as usize).into_vec();
    let attention = weights.demo.config.attention.clone();
    for block in 0..weights.demo.layout.blocks.len() {
        let name = |tensor: &str| format!("layers.{block}.{tensor}.weight");
        let (readers, writer) = weights.readers_and_writer(block);
        let hidden = weights.demo.config.hidden_size;
        for channel in some(&mut rng, hidden) {
            let scale = f64::from(1_u32 << rng.random_range(4..=7));
            weights.scale_element(&name("norm"), channel, scale);
            for reader in &readers {
                weights.scale_column(reader, channel, scale.recip());
            }
        }
        match weights.demo.layout.blocks[block].kind {
            BlockKind::Ssm => {
                for channel in some(&mut rng, weights.demo.config.mamba.inner()) {
                    let scale = f64::from(1_u32 << rng.random_range(4..=7));
                    weights.scale_element(&name("mixer.norm"), channel, scale);
                    weights.scale_column(&writer, channel, scale.recip());
                }
            }
            BlockKind::Mlp => {
                for channel in some(&mut rng, weights.demo.config.mlp.intermediate) {
                    let scale = if rng.random() { 4.0_f64 } else { 8.0 };
                    weights.scale_row(&readers[0], channel, scale);
                    weights.scale_column(&writer, channel, (scale * scale).recip());
                }
            }
            BlockKind::Attention => {
                let (width, queries) = (attention.head_dim, attention.heads / attention.kv_heads);
                for channel in some(&mut rng, attention.kv_heads * width) {
                    weights.scale_row(&name("mixer.v_proj"), channel, 16.0);
                    let first = channel / width * queries;
                    (first..first + queries).for_each(|head| weights.scale_column(&writer, head * width + channel % width, 1.0 / 16.0));
                }
            }
            BlockKind::Moe => panic!("the demo has no experts"),
        }
    }
    weights.write(directory, Dtype::BF16);
}

/// Writes the skewed twin.
pub fn skewed(directory: &Path) {
    let mut weights = Weights::of_demo();
    let rotation = eigenvectors(&weights.demo);
    let transposed = rotation.transpose().to_owned();
    weights.fold("norm_f.weight", &["lm_head.weight".into()]);
    for name in ["embeddings.weight", "lm_head.weight"] {
        weights.update(name, |matrix| matrix * &rotation);
    }
    for block in 0..weights.demo.layout.blocks.len() {
        let (readers, writer) = weights.readers_and_writer(block);
        if weights.demo.layout.blocks[block].kind == BlockKind::Ssm {
            weights.fold(&format!("layers.{block}.mixer.norm.weight"), std::slice::from_ref(&writer));
        }
        weights.fold(&format!("layers.{block}.norm.weight"), &readers);
        for reader in &readers {
            weights.update(reader, |matrix| matrix * &rotation);
        }
        weights.update(&writer, |matrix| &transposed * matrix);
    }
    weights.write(directory, Dtype::F32);
}

/// Eigenvectors of the second moment of the stream in front of the demo's blocks, over some of the calibration text.
fn eigenvectors(demo: &Checkpoint) -> Mat<f64> {
    let sample = Sample::load(demo, &SampleSpec { sequences: 16, ..SampleSpec::default() }).unwrap();
    let batches: Vec<_> = sample.sequences.iter().map(|ids| (ids.clone(), Sequences::new(vec![ids.len()]))).collect();
    let mut stream = Stream::new(&Cpu, demo, &batches).unwrap();
    let hidden = demo.config.hidden_size;
    let mut moment = Mat::<f64>::zeros(hidden, hidden);
    for block in 0..stream.blocks() {
        for h in stream.boundary().iter(&Cpu) {
            let values = strata::backend::Backend::download(&Cpu, &h.unwrap()).unwrap();
            let tokens = values.len() / hidden;
            let rows = Mat::from_fn(tokens, hidden, |t, c| f64::from(values[t * hidden + c]));
            moment += rows.transpose() * &rows;
        }
        stream.advance(block).unwrap();
    }
    moment.self_adjoint_eigen(Side::Lower).unwrap().U().to_owned()
}
