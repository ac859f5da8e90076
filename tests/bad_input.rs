//! Bad input gets one clear sentence with the path and a hint, exit code 2, and no panic.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod common;

use std::path::Path;

use common::{Parts, strata, text};
use safetensors::tensor::Dtype;
use tempfile::TempDir;

/// Runs strata and checks that it refuses: exit code 2, one error line that holds every text of `expected`, a hint.
fn refused(arguments: &[&str], expected: &[&str]) {
    let data = TempDir::new().unwrap();
    let output = strata(data.path()).args(arguments).output().unwrap();
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{arguments:?}\n{stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    let errors: Vec<&str> = stderr.lines().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!(errors.len(), 1, "{stderr}");
    for part in expected {
        assert!(errors[0].contains(part), "`{part}` is not in: {}", errors[0]);
    }
    assert!(stderr.lines().any(|line| line.starts_with("hint: ")), "no hint:\n{stderr}");
}

/// A broken variation of the dense golden checkpoint in `folder`.
fn broken(folder: &Path, change: impl FnOnce(&mut Parts)) -> String {
    let mut parts = Parts::dense();
    change(&mut parts);
    parts.write(folder);
    folder.display().to_string()
}

#[test]
fn missing_directory() {
    refused(&["analyze", "/no/such/model"], &["/no/such/model", "does not exist"]);
}

#[test]
fn unknown_gpu() {
    refused(&["analyze", "demo", "--gpu", "GTX 480"], &["no figures of a GPU `GTX 480`"]);
}

#[test]
fn directory_without_config() {
    let folder = TempDir::new().unwrap();
    refused(&["analyze", folder.path().to_str().unwrap()], &["has no config.json"]);
}

#[test]
fn another_architecture() {
    let folder = TempDir::new().unwrap();
    let model = broken(folder.path(), |parts| parts.config = parts.config.replace("\"nemotron_h\"", "\"llama\""));
    refused(&["analyze", &model], &["config.json", "`llama`"]);
}

#[test]
fn unknown_layer() {
    let folder = TempDir::new().unwrap();
    let model = broken(folder.path(), |parts| parts.config = parts.config.replace("\"full_attention\"", "\"sliding\""));
    refused(&["analyze", &model], &["config.json", "layer 3", "`sliding`"]);
    let pattern = TempDir::new().unwrap();
    let config = std::fs::read_to_string("models/demo/config.json").unwrap().replace("M-M-M*", "M-M-X*");
    std::fs::write(pattern.path().join("config.json"), config).unwrap();
    refused(&["analyze", pattern.path().to_str().unwrap()], &["layer 4", "letter `X`"]);
}

#[test]
fn truncated_shard() {
    let folder = TempDir::new().unwrap();
    let model = broken(folder.path(), |_| {});
    let path = folder.path().join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    refused(&["analyze", &model], &["model.safetensors"]);
    std::fs::write(&path, &bytes[..5]).unwrap();
    refused(&["analyze", &model], &["model.safetensors"]);
}

#[test]
fn shard_index_that_names_what_is_not_there_or_leaves_the_directory() {
    for (file, expected) in [("gone.safetensors", "not there"), ("../a.safetensors", "plain file name"), ("/etc/passwd", "plain file name")]
    {
        let folder = TempDir::new().unwrap();
        Parts::dense().write_sharded(folder.path());
        let index = folder.path().join("model.safetensors.index.json");
        let text = std::fs::read_to_string(&index).unwrap().replace("\"a.safetensors\"", &format!("\"{file}\""));
        std::fs::write(&index, text).unwrap();
        refused(&["analyze", folder.path().to_str().unwrap()], &["model.safetensors.index.json", file, expected]);
    }
}

#[test]
fn wrong_shape_names_tensor_expected_and_found() {
    let folder = TempDir::new().unwrap();
    let name = "backbone.layers.1.mixer.up_proj.weight";
    let model = broken(folder.path(), |parts| parts.tensors.get_mut(name).unwrap().1 = vec![96, 160]);
    refused(&["analyze", &model], &[name, "[96, 160]", "[160, 96]"]);
}

#[test]
fn missing_tensor_is_named() {
    let folder = TempDir::new().unwrap();
    let name = "backbone.layers.0.mixer.dt_bias";
    let model = broken(folder.path(), |parts| drop(parts.tensors.remove(name)));
    refused(&["analyze", &model], &[name, "missing"]);
}

#[test]
fn activations_that_overflow_name_block_and_linear() {
    let folder = TempDir::new().unwrap();
    let model = broken(folder.path(), |parts| {
        let values = &mut parts.tensors.get_mut("backbone.layers.4.mixer.up_proj.weight").unwrap().2;
        values.as_chunks_mut::<4>().0.iter_mut().for_each(|value| *value = (f32::from_le_bytes(*value) * 1e30).to_le_bytes());
    });
    let plain = folder.path().join("gptq.toml");
    let formats = "ssm = \"w4a8\"\nmlp = \"w4a8\"\nattention = \"w4a8\"\nmoe = \"w4a8\"\nembedding = \"w16a16\"\nhead = \"w16a16\"\n";
    std::fs::write(&plain, format!("schema = \"strata.recipe/1\"\nname = \"plain\"\nmethod = \"gptq\"\n[formats]\n{formats}")).unwrap();
    for (recipe, expected) in [
        (plain.to_str().unwrap(), "block 4: the input of `down_proj` is not finite"),
        ("phase1", "the residual stream in front of block 5 is not finite"),
        ("rtn", "behind block 4 is not finite"),
    ] {
        let out = folder.path().join("out");
        let output = strata(folder.path()).args(["quantize", &model, "--recipe", recipe, "-o", out.to_str().unwrap()]).output().unwrap();
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        assert!(stderr.lines().any(|line| line.starts_with("error: ") && line.contains(expected)), "{stderr}");
        assert!(!out.exists());
    }
}

#[test]
fn nan_in_a_weight() {
    let folder = TempDir::new().unwrap();
    let name = "backbone.layers.4.mixer.down_proj.weight";
    let model = broken(folder.path(), |parts| parts.tensors.get_mut(name).unwrap().2[40..44].copy_from_slice(&f32::NAN.to_le_bytes()));
    let out = folder.path().join("out");
    refused(&["quantize", &model, "--recipe", "phase1", "-o", out.to_str().unwrap()], &[name, "NaN", "element 10"]);
    assert!(!out.exists());
}

#[test]
fn integer_weights_are_not_floats() {
    let folder = TempDir::new().unwrap();
    let name = "backbone.layers.1.mixer.up_proj.weight";
    let model = broken(folder.path(), |parts| parts.tensors.get_mut(name).unwrap().0 = Dtype::I32);
    refused(&["quantize", &model, "--recipe", "phase1", "-o", "/tmp/never"], &[name, "I32"]);
}

#[test]
fn unknown_recipe() {
    refused(&["quantize", "demo", "--recipe", "phase7"], &["`phase7`"]);
}

#[test]
fn unknown_task() {
    refused(&["eval", "demo", "--tasks", "piqa,mmlu"], &["`mmlu`"]);
}

#[test]
fn unknown_device_and_threads() {
    refused(&["analyze", "demo", "--device", "tpu"], &["`tpu`"]);
    refused(&["analyze", "demo", "--device", "cuda:99"], &["there is no GPU"]);
    refused(&["analyze", "demo", "--threads", "0"], &["--threads"]);
}

#[test]
fn unwritable_output() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "in the way").unwrap();
    let out = file.join("variant");
    refused(&["quantize", "demo", "--recipe", "phase1", "-o", out.to_str().unwrap()], &[file.to_str().unwrap()]);
}

#[test]
fn output_that_exists() {
    let folder = TempDir::new().unwrap();
    refused(&["quantize", "demo", "--recipe", "phase1", "-o", folder.path().to_str().unwrap()], &["exists"]);
}

#[test]
fn session_with_a_misspelt_key_or_a_newer_schema() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("s.toml");
    let demo = std::fs::read_to_string("sessions/demo.toml").unwrap();
    std::fs::write(&path, demo.replace("windows =", "windoes =")).unwrap();
    refused(&["replay", path.to_str().unwrap()], &["s.toml", "line 25, column 1", "windoes"]);
    std::fs::write(&path, demo.replace("strata.session/1", "strata.session/2")).unwrap();
    refused(&["replay", path.to_str().unwrap()], &["s.toml", "strata.session/2"]);
    refused(&["replay", "/no/such/session.toml"], &["/no/such/session.toml"]);
}

#[test]
fn recipe_files_that_are_none_say_where_and_what_to_read() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("mine.toml");
    let formats = ["ssm", "mlp", "attention", "moe", "embedding", "head"].map(|part| format!("{part} = \"w8a8\"\n")).concat();
    let recipe = format!("schema = \"strata.recipe/1\"\nname = \"mine\"\nmethod = \"rtn\"\ntransforms = []\n[formats]\n{formats}");
    for (right, wrong, expected) in [
        ("method =", "metod =", ["line 3, column 1", "metod"]),
        ("\"rtn\"", "\"awq\"", ["line 3, column 10", "awq"]),
        ("[]", "[\"rotate-everything\"]", ["line 4, column 15", "rotate-everything"]),
        ("mlp = \"w8a8\"", "mlp = \"w5a8\"", ["line 7, column 7", "unknown format `w5a8`"]),
        ("[formats]", "[formats", ["line 5, column", "unclosed"]),
        ("moe = \"w8a8\"\n", "", ["line 5, column 1", "missing field `moe`"]),
        ("strata.recipe/1", "strata.recipe/2", ["strata.recipe/2", "strata.recipe/1"]),
    ] {
        std::fs::write(&path, recipe.replace(right, wrong)).unwrap();
        refused(&["quantize", "demo", "--recipe", path.to_str().unwrap()], &[&["mine.toml"][..], &expected].concat());
    }
}

/// A block whose `down_proj` never reads anything but zeros has no Hessian to round by, and the width 96 no group of 128.
#[test]
fn a_singular_hessian_and_a_group_that_does_not_divide_are_reported() {
    let folder = TempDir::new().unwrap();
    let model = broken(folder.path(), |parts| parts.tensors.get_mut("backbone.layers.1.mixer.up_proj.weight").unwrap().2.fill(0));
    let recipe = folder.path().join("gptq.toml");
    let formats = ["ssm", "mlp", "attention", "moe"].map(|part| format!("{part} = \"w4a8\"\n")).concat();
    let head = "schema = \"strata.recipe/1\"\nname = \"plain\"\nmethod = \"gptq\"\n[formats]\n";
    std::fs::write(&recipe, format!("{head}{formats}embedding = \"w16a16\"\nhead = \"w16a16\"\n")).unwrap();
    let out = folder.path().join("out");
    let arguments = ["quantize", &model, "--recipe", recipe.to_str().unwrap(), "-o", out.to_str().unwrap()];
    let run = strata(folder.path()).args(arguments).output().unwrap();
    let (stderr, manifest) = (text(&run.stderr), std::fs::read_to_string(out.join("strata.toml")).unwrap());
    common::succeeded(&run);
    for what in
        ["down_proj: its Hessian is singular, so weights were rounded to nearest", "groups of 32, since 128 does not divide 96 inputs"]
    {
        assert!(stderr.lines().any(|line| line.contains("block 1") && line.contains(what)), "`{what}` is not in:\n{stderr}");
        assert!(manifest.contains(what), "{manifest}");
    }
}

#[test]
fn overrides_that_match_nothing_or_contradict() {
    let quantize = |rules: &[&str], expected: &[&str]| {
        let mut arguments = vec!["quantize", "demo", "--recipe", "phase1"];
        for rule in rules {
            arguments.extend(["--override", rule]);
        }
        refused(&arguments, expected);
    };
    quantize(&["kind:moe=w4a8"], &["kind:moe"]);
    quantize(&["name:*.gate_proj=w4a8"], &["name:*.gate_proj", "matches no linear"]);
    quantize(&["name:layers.1.*=w8a8", "name:up_proj=w4a8"], &["layers.1.mixer.up_proj", "both w8a8 and w4a8"]);
    quantize(&["block:3=w4a8", "block:3=w8a8"], &["block:3", "w4a8", "w8a8"]);
    quantize(&["block:3=w5a8"], &["w5a8"]);
}

#[test]
fn calibration_text_too_short_or_not_text() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("text.txt");
    std::fs::write(&path, "A cow eats grass.").unwrap();
    refused(&["quantize", "demo", "--recipe", "phase1", "--calibration", path.to_str().unwrap()], &["too short"]);
    std::fs::write(&path, [0xff, 0xfe, 0x00]).unwrap();
    refused(&["quantize", "demo", "--recipe", "phase1", "--calibration", path.to_str().unwrap()], &["not UTF-8"]);
}

#[test]
fn a_variant_is_not_quantized_again_nor_compared_with_itself() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("variant");
    let out = out.to_str().unwrap();
    common::succeeded(&strata(folder.path()).args(["quantize", "demo", "-r", "phase1", "-o", out]).output().unwrap());
    refused(&["quantize", out, "--recipe", "phase1"], &["quantized already"]);
    refused(&["compare", out, out], &["quantized itself"]);
}

/// The demo as a directory, its configuration and tokenizer changed.
fn demo_copy(folder: &Path, change: impl Fn(&str, String) -> String) -> String {
    for file in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
        let text = std::fs::read_to_string(Path::new("models/demo").join(file)).unwrap();
        std::fs::write(folder.join(file), change(file, text)).unwrap();
    }
    std::fs::copy("models/demo/model.safetensors", folder.join("model.safetensors")).unwrap();
    folder.display().to_string()
}

/// Arguments of an evaluation of tasks or text alone.
const SHORT: [&str; 5] = ["--no-speed", "--window-tokens", "32", "--limit", "6"];

#[test]
fn bad_rows_name_file_and_line_or_are_counted() {
    let folder = TempDir::new().unwrap();
    let data = folder.path().to_str().unwrap();
    let piqa = r#"{"goal": "g", "sol1": "a", "sol2": "b", "label": 0}"#;
    let arc = r#"{"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}"#;
    let winogrande = r#"{"sentence": "The _ is red.", "option1": "a", "option2": "b", "answer": "2"}"#;
    let bad = |good: &str, from: &str, to: &str| good.replace(from, to).into_bytes();
    let rows: [(&str, &str, Vec<u8>, &str); 9] = [
        ("piqa", piqa, bad(piqa, r#""sol2": "b", "#, ""), "missing field `sol2`"),
        ("piqa", piqa, bad(piqa, r#""label": 0"#, r#""label": 2"#), "there are 2"),
        ("piqa", piqa, bad(piqa, r#""a""#, r#""""#), "choice 0 is empty"),
        ("piqa", piqa, b"\xff\xfe".to_vec(), "not UTF-8"),
        ("piqa", piqa, b"{]".to_vec(), "column 2"),
        ("arc_easy", arc, bad(arc, r#"["a", "b"]"#, r#"["a", "b", "c"]"#), "3 texts of choices and 2 labels"),
        ("arc_challenge", arc, bad(arc, r#""answerKey": "B""#, r#""answerKey": "C""#), "answerKey `C` is not among the labels"),
        ("winogrande", winogrande, bad(winogrande, "_", "it"), "the sentence has no `_`"),
        ("winogrande", winogrande, bad(winogrande, r#""answer": "2""#, r#""answer": "3""#), "answer is `3`"),
    ];
    for (task, good, row, expected) in rows {
        let file = format!("{task}.jsonl");
        std::fs::write(folder.path().join(&file), [good.as_bytes(), &row, good.as_bytes()].join(&b'\n')).unwrap();
        let arguments = [&["eval", "demo", "--tasks", task, "--data", data, "--windows", "0"][..], &SHORT].concat();
        refused(&arguments, &[&format!("{file}, line 2"), expected]);
        let skipping = strata(folder.path()).args(arguments).args(["--skip-bad-rows", "--json"]).output().unwrap();
        let results: serde_json::Value = serde_json::from_str(&common::succeeded(&skipping)).unwrap();
        assert_eq!(
            (&results["results"][0]["tasks"][task]["rows"], &results["results"][0]["tasks"][task]["skipped"]),
            (&2.into(), &1.into())
        );
        assert!(text(&skipping.stderr).contains("1 bad rows were left out"));
    }
}

#[test]
fn a_session_leaves_bad_rows_out_when_it_says_so() {
    let folder = TempDir::new().unwrap();
    let good = r#"{"goal": "g", "sol1": "a", "sol2": "b", "label": 0}"#;
    std::fs::write(folder.path().join("piqa.jsonl"), format!("{good}\n{{}}\n{good}\n")).unwrap();
    let session = folder.path().join("s.toml");
    let text = format!(
        "schema = \"strata.session/1\"\n[model]\nid = \"demo\"\n[evaluate]\ntasks = [\"piqa\"]\ndata = {:?}\nwindows = 0\nspeed = false\n",
        folder.path()
    );
    std::fs::write(&session, &text).unwrap();
    refused(&["replay", session.to_str().unwrap()], &["piqa.jsonl, line 2", "missing field"]);
    std::fs::write(&session, text + "skip_bad_rows = true\n").unwrap();
    let run = strata(folder.path()).args(["replay", session.to_str().unwrap(), "--json"]).output().unwrap();
    let results: serde_json::Value = serde_json::from_str(&common::succeeded(&run)).unwrap();
    let task = &results["results"][0]["tasks"]["piqa"];
    assert_eq!((&task["rows"], &task["skipped"]), (&2.into(), &1.into()));
}

#[test]
fn nothing_to_measure_and_tasks_named_twice() {
    refused(&["eval", "demo", "--tasks", "piqa", "--limit", "0"], &["a limit of 0 rows"]);
    refused(&["eval", "demo", "--tasks", "piqa,arc_easy,piqa"], &["task `piqa` is named twice"]);
    refused(&["eval", "demo", "--window-tokens", "1"], &["half of a window of fewer than 3 tokens"]);
}

#[test]
fn a_task_without_rows() {
    let folder = TempDir::new().unwrap();
    let data = folder.path().to_str().unwrap();
    refused(&["eval", "demo", "--tasks", "piqa", "--data", data], &["has no piqa.jsonl"]);
    std::fs::write(folder.path().join("piqa.jsonl"), "\n\n").unwrap();
    refused(&["eval", "demo", "--tasks", "piqa", "--data", data], &["piqa.jsonl has no rows"]);
}

#[test]
fn a_context_longer_than_the_model_is_cut_and_counted() {
    let folder = TempDir::new().unwrap();
    let long = std::fs::read_to_string("models/demo/config.json").unwrap();
    let long = long.lines().find(|line| line.contains("max_position_embeddings")).unwrap().to_owned();
    let model = demo_copy(folder.path(), |_, text| text.replace(&long, "  \"max_position_embeddings\": 16,"));
    let run = strata(folder.path()).args(["eval", &model, "--tasks", "piqa", "--windows", "0", "--json"]).args(SHORT).output().unwrap();
    let results: serde_json::Value = serde_json::from_str(&common::succeeded(&run)).unwrap();
    let task = &results["results"][0]["tasks"]["piqa"];
    let cut = task["truncated"].as_u64().unwrap();
    assert!(cut > 0 && task["rows"] == 6, "{task}");
    let stderr = text(&run.stderr);
    assert!(stderr.contains(&format!("piqa: {cut} contexts were cut from the left to 16 tokens")), "{stderr}");
}

#[test]
fn a_tokenizer_of_another_model() {
    let folder = TempDir::new().unwrap();
    let small = broken(folder.path(), |_| {});
    std::fs::copy("models/demo/tokenizer.json", folder.path().join("tokenizer.json")).unwrap();
    refused(&["eval", &small, "--tasks", "piqa", "--data", "embedded"], &["the tokenizer has 1536 tokens", "vocabulary"]);
    let missing = TempDir::new().unwrap();
    let model = broken(missing.path(), |_| {});
    refused(&["eval", &model, "--tasks", "piqa", "--data", "embedded"], &["has no tokenizer.json"]);
}

#[test]
fn a_reference_with_another_tokenizer() {
    let folder = TempDir::new().unwrap();
    // The same tokens, spelt in another file: nothing says that it is the same tokenizer.
    let model = demo_copy(folder.path(), |file, text| if file == "tokenizer.json" { format!("{text}\n") } else { text });
    let arguments = [&["compare", "demo", &model, "--tasks", "piqa", "--windows", "1"][..], &SHORT].concat();
    refused(&arguments, &["another tokenizer"]);
    let run = strata(folder.path()).args(arguments).output().unwrap();
    assert!(!text(&run.stderr).contains("steps in"), "nothing is computed before it is noticed: {}", text(&run.stderr));
}

#[test]
fn memory_and_speed_that_cannot_be() {
    refused(&["eval", "demo", "--speed-prompts", "0"], &["0 tokens"]);
    refused(&["eval", "demo", "--host-memory", "1MB", "--tasks", "piqa", "--limit", "2"], &["demo cannot be read", "1 MB may be taken"]);
}
