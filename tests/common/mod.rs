//! Small checkpoints to break, and the binary to run.
#![allow(dead_code, reason = "each test file uses its own part")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensors, serialize};
use strata::backend::cpu::Cpu;
use strata::backend::cuda::Cuda;
use strata::backend::{Backend, Sequences};
use strata::checkpoint::Checkpoint;
use strata::model::Hybrid;

/// A tensor taken out of a file: type, shape, bytes.
pub type Tensor = (Dtype, Vec<usize>, Vec<u8>);

/// The dense golden checkpoint as parts that a test can change before writing them out.
pub struct Parts {
    pub config: String,
    pub tensors: BTreeMap<String, Tensor>,
}

impl Parts {
    pub fn dense() -> Self {
        Self::of("tests/golden/dense")
    }

    pub fn of(directory: &str) -> Self {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join(directory);
        let bytes = std::fs::read(directory.join("model.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let tensors = file.iter().map(|(name, view)| (name.to_owned(), (view.dtype(), view.shape().to_vec(), view.data().to_vec())));
        Self { config: std::fs::read_to_string(directory.join("config.json")).unwrap(), tensors: tensors.collect() }
    }

    /// Writes the tensors that `keep` takes into one safetensors file.
    pub fn write_shard(&self, path: &Path, keep: impl Fn(&str) -> bool) {
        let views = self
            .tensors
            .iter()
            .filter(|(name, _)| keep(name))
            .map(|(name, (dtype, shape, bytes))| (name.clone(), TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
        std::fs::write(path, serialize(views, None).unwrap()).unwrap();
    }

    /// A checkpoint with one weight file.
    pub fn write(&self, directory: &Path) {
        std::fs::create_dir_all(directory).unwrap();
        std::fs::write(directory.join("config.json"), &self.config).unwrap();
        self.write_shard(&directory.join("model.safetensors"), |_| true);
    }

    /// A checkpoint in two shards with an index.
    pub fn write_sharded(&self, directory: &Path) {
        std::fs::create_dir_all(directory).unwrap();
        std::fs::write(directory.join("config.json"), &self.config).unwrap();
        let first = |name: &str| name.contains("layers.0.") || name.contains("embeddings");
        self.write_shard(&directory.join("a.safetensors"), first);
        self.write_shard(&directory.join("b.safetensors"), |name| !first(name));
        let map: BTreeMap<&String, &str> =
            self.tensors.keys().map(|name| (name, if first(name) { "a.safetensors" } else { "b.safetensors" })).collect();
        let index = serde_json::json!({ "metadata": {}, "weight_map": map });
        std::fs::write(directory.join("model.safetensors.index.json"), index.to_string()).unwrap();
    }
}

/// The binary with a data folder of the test's own.
pub fn strata(data: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_strata"));
    command
        .env("XDG_DATA_HOME", data)
        .env("XDG_CACHE_HOME", data.join("cache"))
        .env("HF_HUB_OFFLINE", "1")
        .env("HF_HOME", data.join("hf"))
        .env_remove("RUST_BACKTRACE");
    command.current_dir(env!("CARGO_MANIFEST_DIR"));
    command
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Asserts that a run ended well and returns its stdout.
pub fn succeeded(output: &Output) -> String {
    assert!(output.status.success(), "exit {:?}\n{}", output.status.code(), text(&output.stderr));
    text(&output.stdout)
}

/// Every file below a folder with its bytes.
pub fn files(directory: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        found.insert(path.strip_prefix(directory).unwrap().to_owned(), std::fs::read(&path).unwrap());
    }
    found
}

/// Largest difference of values, all of which must be finite.
pub fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    assert!(a.iter().chain(b).all(|value| value.is_finite()));
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Two sequences go on from a cache on both backends: prompts of these lengths, then steps, of which the last are recorded. Logits
/// differ by less than `tolerance`.
pub fn compare_from_caches(cuda: &Cuda, checkpoint: &Checkpoint, prompts: &[Vec<usize>], tolerance: f32, what: &str) {
    let (on_cpu, on_cuda) = (Hybrid::load(Cpu, checkpoint).unwrap(), Hybrid::load(cuda.clone(), checkpoint).unwrap());
    let count = prompts[0].len();
    let (mut cpu_cache, mut cuda_cache) = (on_cpu.cache(count), on_cuda.cache(count));
    let compare = |expected: &_, found: &_, place: &str| {
        let difference = largest_difference(&Cpu.download(expected).unwrap(), &cuda.download(found).unwrap());
        assert!(difference < tolerance, "{what}, {place}: logits differ by {difference}");
    };
    for lengths in prompts {
        let tokens: usize = lengths.iter().sum();
        let ids: Vec<u32> = (0..tokens).map(|i| ((11 * i + 3) % checkpoint.config.vocab_size) as u32).collect();
        let sequences = Sequences::new(lengths.clone());
        let expected = on_cpu.last_logits(&ids, &sequences, Some(&mut cpu_cache)).unwrap();
        compare(&expected, &on_cuda.last_logits(&ids, &sequences, Some(&mut cuda_cache)).unwrap(), "prompt");
    }
    for step in 0..4 {
        let ids = &[3 + step, 40 - 2 * step][..count];
        let expected = on_cpu.step(ids, &mut cpu_cache).unwrap();
        compare(&expected, &on_cuda.step(ids, &mut cuda_cache).unwrap(), "step");
    }
}

/// A printed table without the paragraph on memory: the peak of a process is not the same twice.
pub fn without_memory(table: &str) -> String {
    let kept: Vec<&str> = table.split("\n\n").filter(|paragraph| !paragraph.contains("peak of process")).collect();
    assert!(kept.len() > 1, "{table}");
    kept.join("\n\n")
}

/// A session file in `folder` whose one variant takes some seconds, and whose evaluation takes none.
pub fn short_session(folder: &Path) -> PathBuf {
    let path = folder.join("fit.toml");
    let text = "schema = \"strata.session/1\"\n[model]\nid = \"demo\"\n[calibration]\nsequences = 10\nlength = 256\n\
        [[variant]]\nname = \"small\"\nrecipe = \"phase2\"\n\
        [evaluate]\ntasks = [\"piqa\"]\nlimit = 4\nwindows = 1\nwindow_tokens = 32\nspeed = false\n";
    std::fs::write(&path, text).unwrap();
    path
}
