//! Variants on disk: determinism, equality with what was measured, resuming, and the sizes promised.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod common;

use std::path::Path;
use std::sync::Mutex;

use common::{Parts, files, strata, succeeded};
use strata::backend::cpu::Cpu;
use strata::backend::{Backend, Sequences};
use strata::checkpoint::{Checkpoint, StorageLayout, VariantManifest, open, sha256_hex};
use strata::error::ErrorKind;
use strata::format::{Format, Plan};
use strata::model::Hybrid;
use strata::monitor::{CancelToken, Monitor, Report};
use strata::quant::{Method, Override, QuantizeRequest, Recipe, Sample, SampleSpec, Steps, quantize, work_directory};
use tempfile::TempDir;

const SAMPLE: SampleSpec = SampleSpec { source: String::new(), sequences: 2, length: 48, seed: 7, allow_overlap: false };

fn request<'a>(checkpoint: &'a Checkpoint, plan: Plan, output: &Path) -> QuantizeRequest<'a> {
    let spec = SampleSpec { source: "embedded".into(), ..SAMPLE };
    QuantizeRequest {
        checkpoint,
        recipe: "test".into(),
        steps: Steps::new(Vec::new(), Method::Rtn),
        plan,
        sample: Sample::load(checkpoint, &spec).unwrap(),
        storage: StorageLayout::Native,
        output: output.to_owned(),
        force: false,
        host_memory: u64::MAX,
        donors: None,
    }
}

fn plan(checkpoint: &Checkpoint, recipe: &str) -> Plan {
    Recipe::find(recipe).unwrap().plan(&checkpoint.layout, &[]).unwrap()
}

fn uniform(checkpoint: &Checkpoint, format: Format) -> Plan {
    Plan { blocks: vec![format; checkpoint.layout.blocks.len()], head: format, ..Plan::unquantized(0) }
}

/// SHA-256 of the logits that a loaded variant gives for the sample, computed as the manifest's was.
fn logits_hash(directory: &Path, sample: &Sample) -> String {
    let model = Hybrid::load(Cpu, &Checkpoint::open(directory).unwrap()).unwrap();
    let mut bytes = Vec::new();
    for ids in &sample.sequences {
        let logits = model.logits(ids, &Sequences::new(vec![ids.len()]), None).unwrap();
        bytes.extend(Cpu.download(&logits).unwrap().iter().flat_map(|value| value.to_le_bytes()));
    }
    sha256_hex(&bytes)
}

#[test]
fn threads_do_not_change_a_byte() {
    let folder = TempDir::new().unwrap();
    for recipe in ["phase1", "phase2", "phase3"] {
        let made = [1, 2].map(|threads| {
            let out = folder.path().join(format!("{recipe}-{threads}"));
            let threads = threads.to_string();
            let arguments = ["quantize", "demo", "-r", recipe, "-o", out.to_str().unwrap(), "--threads", &threads, "--sequences", "3"];
            succeeded(&strata(folder.path()).args(arguments).output().unwrap());
            files(&out)
        });
        assert!(made[0] == made[1], "{recipe} differs between 1 and 2 threads");
        assert!(made[0].contains_key(Path::new("strata.toml")) && made[0].contains_key(Path::new("tokenizer.json")));
    }
}

#[test]
fn a_variant_read_back_gives_the_logits_that_were_measured() {
    let folder = TempDir::new().unwrap();
    for model in ["demo", "tests/golden/dense", "tests/golden/moe-latent"] {
        let checkpoint = open(model).unwrap();
        for (index, format) in Format::ALL.into_iter().enumerate() {
            let out = folder.path().join(format!("{}-{index}", model.replace('/', "-")));
            let request = request(&checkpoint, uniform(&checkpoint, format), &out);
            let manifest = quantize(&Cpu, &request, &Monitor::silent()).unwrap();
            assert_eq!(logits_hash(&out, &request.sample), manifest.sample.logits, "{model} {format}");
            if format == Format::W16A16 {
                assert_eq!(manifest.sample.kld_mean, 0.0, "an unquantized variant is the model itself");
            } else if format.weight_bits() < 4 {
                // Round-to-nearest at 2 bits is no model any more; what counts here is that it reads back the same.
                assert!(manifest.sample.kld_mean > 0.0, "{model} {format}");
            } else {
                assert!(manifest.sample.kld_mean > 0.0 && manifest.sample.kld_mean < 0.2, "{model} {format} {}", manifest.sample.kld_mean);
            }
        }
    }
}

/// Formats of linears, slices and experts of their own are stored, run and counted as planned.
#[test]
fn a_plan_by_linear_reads_back_the_same_and_takes_the_bytes_it_predicts() {
    let folder = TempDir::new().unwrap();
    let rules = |texts: &[(&str, &str)]| -> Vec<Override> {
        texts.iter().map(|(name, format)| Override { selector: name.parse().unwrap(), format: format.parse().unwrap() }).collect()
    };
    let demo = [
        ("name:in_proj.B", "w8a8"),
        ("name:layers.0.mixer.in_proj.z", "w16a16"),
        ("name:out_proj", "w3a8"),
        ("name:q_proj", "w16a16"),
        ("name:down_proj", "w2a16g64"),
    ];
    let moe = [("name:experts.0.*", "w8a8"), ("name:experts.1.up_proj", "w2a16g32"), ("name:fc1_latent_proj", "w16a16")];
    for (model, texts) in [("demo", demo.as_slice()), ("tests/golden/moe-latent", &moe)] {
        let checkpoint = open(model).unwrap();
        let out = folder.path().join(model.replace('/', "-"));
        let plan = Recipe::find("phase2").unwrap().plan(&checkpoint.layout, &rules(texts)).unwrap();
        let request = request(&checkpoint, plan, &out);
        let manifest = quantize(&Cpu, &request, &Monitor::silent()).unwrap();
        assert_eq!(logits_hash(&out, &request.sample), manifest.sample.logits, "{model}");
        let variant = Checkpoint::open(&out).unwrap();
        assert_eq!(variant.linear_bytes().unwrap(), checkpoint.layout.linear_bytes(&request.plan), "{model}");
        assert_eq!(variant.variant.unwrap().plan, request.plan);
    }
}

#[test]
fn phases_have_the_promised_size() {
    let demo = open("demo").unwrap();
    let base = demo.layout.linear_bytes(&Plan::unquantized(12)) as f64;
    let ratio = |recipe| demo.layout.linear_bytes(&plan(&demo, recipe)) as f64 / base;
    assert!(ratio("phase1") <= 0.52, "{}", ratio("phase1"));
    assert!(ratio("phase2") <= 0.27, "{}", ratio("phase2"));
    assert!(ratio("phase3") > ratio("phase2") && ratio("phase3") < ratio("phase1"));
    // What is predicted is what is stored.
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("v");
    let request = request(&demo, plan(&demo, "phase2"), &out);
    quantize(&Cpu, &request, &Monitor::silent()).unwrap();
    assert_eq!(Checkpoint::open(&out).unwrap().linear_bytes().unwrap(), demo.layout.linear_bytes(&request.plan));
}

#[test]
fn dt_rows_keep_eight_bits_and_widths_without_a_group_say_so() {
    let folder = TempDir::new().unwrap();
    let checkpoint = open("tests/golden/moe-latent").unwrap();
    let out = folder.path().join("v");
    let manifest = quantize(&Cpu, &request(&checkpoint, uniform(&checkpoint, Format::W4A8), &out), &Monitor::silent()).unwrap();
    let variant = Checkpoint::open(&out).unwrap();
    let names: Vec<&str> = variant.tensors().map(|(name, _)| name).collect();
    assert!(names.contains(&"backbone.layers.0.mixer.in_proj.z.weight_packed"));
    assert!(names.contains(&"backbone.layers.0.mixer.in_proj.dt.weight"));
    // Experts are 48 wide, which 128, 64 and 32 do not divide.
    let note = "experts.0.down_proj and";
    assert!(
        manifest.blocks[1].notes.iter().any(|text| text.starts_with(note) && text.contains("int8 per channel")),
        "{:?}",
        manifest.blocks[1].notes
    );
}

#[test]
fn portable_variants_have_one_scheme_a_module() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("v");
    let arguments = ["quantize", "demo", "-r", "phase2", "--portable", "--sequences", "2", "-o", out.to_str().unwrap()];
    let output = strata(folder.path()).args(arguments).output().unwrap();
    succeeded(&output);
    assert!(common::text(&output.stderr).contains("in_proj of SSM blocks takes 8 bits"));
    assert!(common::text(&output.stderr).contains("online rotations are left out"));
    let config: serde_json::Value = serde_json::from_slice(&std::fs::read(out.join("config.json")).unwrap()).unwrap();
    let quantization = &config["quantization_config"];
    assert_eq!(quantization["quant_method"], "compressed-tensors");
    assert_eq!(quantization["format"], "mixed-precision");
    let variant = Checkpoint::open(&out).unwrap();
    assert!(variant.tensors().all(|(name, _)| !name.contains("in_proj.z")));
    assert!(variant.tensors().any(|(name, _)| name == "backbone.layers.1.mixer.up_proj.weight_packed"));
}

#[test]
fn a_cancelled_run_goes_on_where_it_stopped() {
    let folder = TempDir::new().unwrap();
    let demo = open("demo").unwrap();
    let whole = folder.path().join("whole");
    quantize(&Cpu, &request(&demo, plan(&demo, "phase2"), &whole), &Monitor::silent()).unwrap();

    let out = folder.path().join("resumed");
    for stop_after in [1, 5, 12] {
        let cancel = CancelToken::default();
        let watch = |report| {
            if matches!(report, Report::Step { done, ref note } if done == stop_after && note.contains("error")) {
                cancel.cancel();
            }
        };
        let error = quantize(&Cpu, &request(&demo, plan(&demo, "phase2"), &out), &Monitor::new(watch, cancel.clone())).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Cancelled);
        assert!(!out.exists());
    }
    let steps = Mutex::new(0);
    let count = |report| {
        if matches!(report, Report::Step { ref note, .. } if note.contains("error")) {
            *steps.lock().unwrap() += 1;
        }
    };
    quantize(&Cpu, &request(&demo, plan(&demo, "phase2"), &out), &Monitor::new(count, CancelToken::default())).unwrap();
    assert_eq!(*steps.lock().unwrap(), 0, "all blocks were finished before");
    assert!(files(&whole) == files(&out), "a resumed variant is the same to the byte");
    assert!(!work_directory(&out).exists());
}

#[test]
fn another_request_does_not_take_over_unfinished_work() {
    let folder = TempDir::new().unwrap();
    let demo = open("demo").unwrap();
    let out = folder.path().join("v");
    let cancel = CancelToken::default();
    let stop = |report| {
        if matches!(report, Report::Block { index: 3, .. }) {
            cancel.cancel();
        }
    };
    quantize(&Cpu, &request(&demo, plan(&demo, "phase1"), &out), &Monitor::new(stop, cancel.clone())).unwrap_err();
    let manifest = quantize(&Cpu, &request(&demo, plan(&demo, "phase2"), &out), &Monitor::silent()).unwrap();
    assert_eq!(manifest.blocks[0].format, Format::W4A8);
}

#[test]
fn a_variant_that_reads_back_differently_is_put_aside_with_the_reason() {
    let folder = TempDir::new().unwrap();
    let demo = open("demo").unwrap();
    let out = folder.path().join("v");
    let cancel = CancelToken::default();
    let stop = |report| {
        if matches!(report, Report::Step { done: 12, .. }) {
            cancel.cancel();
        }
    };
    quantize(&Cpu, &request(&demo, plan(&demo, "phase1"), &out), &Monitor::new(stop, cancel.clone())).unwrap_err();
    // Every block is finished; one code of a shard is changed behind the pipeline's back.
    let shard = work_directory(&out).join("variant/model-00002-of-00013.safetensors");
    let mut bytes = std::fs::read(&shard).unwrap();
    let at = bytes.len() - 1000;
    bytes[at] ^= 0x40;
    std::fs::write(&shard, bytes).unwrap();
    let error = quantize(&Cpu, &request(&demo, plan(&demo, "phase1"), &out), &Monitor::silent()).unwrap_err();
    assert!(error.message.contains("failed its validation"), "{error}");
    assert!(!out.exists());
    let reason = std::fs::read_to_string(folder.path().join("v.failed/FAILED.txt")).unwrap();
    assert!(reason.contains("differs from what was measured"), "{reason}");
    quantize(&Cpu, &request(&demo, plan(&demo, "phase1"), &out), &Monitor::silent()).unwrap();
}

#[test]
fn killed_at_any_moment_it_leaves_no_variant_or_a_whole_one() {
    let folder = TempDir::new().unwrap();
    let whole = folder.path().join("whole");
    let quantize = |out: &Path| {
        let mut command = strata(folder.path());
        command.args(["quantize", "demo", "-r", "phase2", "--sequences", "3", "-o", out.to_str().unwrap()]);
        command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
        command
    };
    let began = std::time::Instant::now();
    assert!(quantize(&whole).status().unwrap().success());
    let duration = began.elapsed();
    let expected = files(&whole);
    let out = folder.path().join("killed");
    // Twelve kills spread over the run; the work folder survives them all, so they fall into different stages.
    for moment in 1..=12 {
        let mut child = quantize(&out).spawn().unwrap();
        std::thread::sleep(duration.mul_f64(f64::from(moment) / 16.0));
        // The run may be over already.
        let _ = child.kill();
        child.wait().unwrap();
        if out.exists() {
            assert!(files(&out) == expected, "a variant that exists is whole");
            std::fs::remove_dir_all(&out).unwrap();
        }
    }
    assert!(quantize(&out).status().unwrap().success());
    assert!(files(&out) == expected);
    let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| ["whole", "killed", "strata"].contains(&name.to_str().unwrap())), "{left:?}");
}

#[test]
fn force_replaces_and_two_writers_do_not_meet() {
    let folder = TempDir::new().unwrap();
    let demo = open("demo").unwrap();
    let out = folder.path().join("v");
    quantize(&Cpu, &request(&demo, plan(&demo, "phase1"), &out), &Monitor::silent()).unwrap();
    let again = QuantizeRequest { force: true, ..request(&demo, plan(&demo, "phase2"), &out) };
    quantize(&Cpu, &again, &Monitor::silent()).unwrap();
    let manifest = VariantManifest::read(&out.join("strata.toml")).unwrap();
    assert_eq!(manifest.blocks[0].format, Format::W4A8);

    let work = work_directory(&folder.path().join("w"));
    std::fs::create_dir_all(&work).unwrap();
    let lock = std::fs::File::create(work.join("lock")).unwrap();
    lock.lock().unwrap();
    let error = quantize(&Cpu, &request(&demo, plan(&demo, "phase1"), &folder.path().join("w")), &Monitor::silent()).unwrap_err();
    assert!(error.message.contains("another strata"), "{error}");
}

#[test]
fn every_spelling_of_a_checkpoint_is_the_same_model() {
    let folder = TempDir::new().unwrap();
    let ids: Vec<u32> = (3..40).collect();
    let logits = |directory: &Path| {
        let model = Hybrid::load(Cpu, &Checkpoint::open(directory).unwrap()).unwrap();
        Cpu.download(&model.logits(&ids, &Sequences::new(vec![ids.len()]), None).unwrap()).unwrap()
    };
    let expected = logits(Path::new("tests/golden/dense"));

    let sharded = folder.path().join("sharded");
    Parts::dense().write_sharded(&sharded);
    assert_eq!(logits(&sharded), expected);

    let mut parts = Parts::dense();
    parts.tensors = parts.tensors.into_iter().map(|(name, tensor)| (name.replace("backbone.", "model."), tensor)).collect();
    let kinds = serde_json::from_str::<serde_json::Value>(&parts.config).unwrap()["layers_block_type"].to_string();
    assert!(kinds.contains("linear_attention"));
    parts.config = parts.config.replace("\"linear_attention\"", "\"mamba\"").replace("\"full_attention\"", "\"attention\"");
    let renamed = folder.path().join("renamed");
    parts.write(&renamed);
    assert_eq!(logits(&renamed), expected);

    // Weights that bf16 and f16 hold exactly give the same logits in all three types.
    let rounded = |dtype: safetensors::Dtype, name: &str| {
        let mut parts = Parts::dense();
        for (kind, _, bytes) in parts.tensors.values_mut() {
            let values = bytes.as_chunks::<4>().0.iter().map(|b| {
                // Eight significant bits, within the range of f16.
                let value = half::bf16::from_f32(f32::from_le_bytes(*b)).to_f32();
                if value.abs() < 1e-4 { 0.0 } else { value }
            });
            *bytes = match dtype {
                safetensors::Dtype::BF16 => values.flat_map(|v| half::bf16::from_f32(v).to_le_bytes()).collect(),
                safetensors::Dtype::F16 => values.flat_map(|v| half::f16::from_f32(v).to_le_bytes()).collect(),
                _ => values.flat_map(f32::to_le_bytes).collect(),
            };
            *kind = dtype;
        }
        let directory = folder.path().join(name);
        parts.write(&directory);
        logits(&directory)
    };
    let f32 = rounded(safetensors::Dtype::F32, "f32");
    assert_eq!(rounded(safetensors::Dtype::BF16, "bf16"), f32);
    assert_eq!(rounded(safetensors::Dtype::F16, "f16"), f32);
}

#[test]
fn tied_embeddings_and_mtp_layers_survive_quantization() {
    let folder = TempDir::new().unwrap();
    let mut parts = Parts::dense();
    let embedding = parts.tensors["backbone.embeddings.weight"].clone();
    parts.tensors.remove("lm_head.weight");
    parts.tensors.insert("mtp.layers.0.norm.weight".into(), embedding.clone());
    parts.config = parts.config.replace("\"tie_word_embeddings\": false", "\"tie_word_embeddings\": true");
    let tied = folder.path().join("tied");
    parts.write(&tied);
    parts.tensors.insert("lm_head.weight".into(), embedding);
    parts.config = parts.config.replace("\"tie_word_embeddings\": true", "\"tie_word_embeddings\": false");
    let untied = folder.path().join("untied");
    parts.write(&untied);

    let make = |source: &Path, name: &str| {
        let checkpoint = Checkpoint::open(source).unwrap();
        let out = folder.path().join(name);
        let plan = plan(&checkpoint, "phase1");
        let manifest = quantize(&Cpu, &request(&checkpoint, plan, &out), &Monitor::silent()).unwrap();
        let variant = Checkpoint::open(&out).unwrap();
        assert!(variant.tensors().any(|(name, _)| name == "mtp.layers.0.norm.weight"));
        manifest.sample.logits
    };
    assert_eq!(make(&tied, "a"), make(&untied, "b"), "a tied head quantizes as its untied copy does");
}
