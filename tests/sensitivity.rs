//! `strata sensitivity` and what stands on it, through the binary: killed and resumed, on a changed model, and recipes with
//! `[allocate]`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod common;

use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use common::{strata, succeeded, text};
use serde_json::Value;
use tempfile::TempDir;

/// Options of a measurement that takes seconds.
const QUICK: [&str; 10] = ["-r", "rtn-w8a8", "--sequences", "2", "--length", "64", "--windows", "4", "--positions", "32"];

fn run(data: &Path, command: &[&str], options: &[&str]) -> Output {
    strata(data).args(command).args(QUICK).args(options).output().unwrap()
}

/// The folders of measurements.
fn measurements(data: &Path) -> Vec<PathBuf> {
    let folders = std::fs::read_dir(data.join("strata/sensitivity")).into_iter().flatten();
    folders.map(|entry| entry.unwrap().path()).collect()
}

/// How many lines tell a loss.
fn losses(data: &Path) -> usize {
    let rows = measurements(data).first().map(|folder| std::fs::read_to_string(folder.join("rows.jsonl")).unwrap_or_default());
    rows.unwrap_or_default().matches(r#""row":"loss""#).count()
}

#[test]
fn a_killed_measurement_goes_on_and_finds_the_same() {
    let (whole, killed) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let command = ["sensitivity", "demo", "--json"];
    let expected: Value = serde_json::from_str(&succeeded(&run(whole.path(), &command, &[]))).unwrap();
    assert_eq!(expected["complete"], true);

    let mut child = strata(killed.path()).args(command).args(QUICK).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let start = Instant::now();
    while losses(killed.path()) < 10 {
        assert!(child.try_wait().unwrap().is_none() && start.elapsed() < Duration::from_secs(60), "it was to be killed midway");
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let known = losses(killed.path());

    let refused = run(killed.path(), &["allocate", "demo", "--bits", "4"], &[]);
    assert!(refused.status.code() == Some(2) && text(&refused.stderr).contains("goes on where it stopped"), "{}", text(&refused.stderr));
    let resumed = run(killed.path(), &command, &[]);
    let found: Value = serde_json::from_str(&succeeded(&resumed)).unwrap();
    assert!(text(&resumed.stderr).contains("going on after "), "{}", text(&resumed.stderr));
    assert_eq!((&found["units"], &found["checks"], &found["complete"]), (&expected["units"], &expected["checks"], &expected["complete"]));
    assert!(losses(killed.path()) > known);

    // Without its end, what is there serves, with a warning.
    let rows = measurements(killed.path())[0].join("rows.jsonl");
    let lines = std::fs::read_to_string(&rows).unwrap();
    let unfinished: Vec<&str> = lines.lines().filter(|line| !line.contains(r#""row":"done""#)).collect();
    std::fs::write(&rows, unfinished.join("\n")).unwrap();
    let allocate = ["allocate", "demo", "--bits", "7.5"];
    let warned = run(killed.path(), &allocate, &[]);
    assert!(succeeded(&warned).contains(" ~"), "estimates are marked: {}", text(&warned.stdout));
    assert!(text(&warned.stderr).contains("warning: the measurement was stopped before its end"), "{}", text(&warned.stderr));
    let complete = run(whole.path(), &allocate, &[]);
    assert!(succeeded(&complete) == text(&warned.stdout) && text(&complete.stderr).is_empty(), "{}", text(&complete.stderr));
}

#[test]
fn a_changed_model_or_calibration_is_told_before_it_is_measured_again() {
    let data = TempDir::new().unwrap();
    let model = data.path().join("model");
    std::fs::create_dir(&model).unwrap();
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        std::fs::copy(Path::new("models/demo").join(file), model.join(file)).unwrap();
    }
    let name = model.to_str().unwrap();
    let quick = ["--by", "block"];
    let measure = |options: &[&str]| {
        let command = ["sensitivity", name, "--formats", "w4a8,w2a8", "--exact", "0"];
        let output = run(data.path(), &command, &[&quick[..], options].concat());
        succeeded(&output);
        text(&output.stderr)
    };
    let refused = |options: &[&str]| {
        let output = run(data.path(), &["allocate", name, "--bits", "4"], &[&quick[..], options].concat());
        assert_eq!(output.status.code(), Some(2));
        text(&output.stderr)
    };
    let told = |stderr: &str, why: &str| assert!(stderr.contains("do not hold here: ") && stderr.contains(why), "{stderr}");
    let first = measure(&[]);
    assert!(!first.contains("do not hold here") && first.contains("of memory for donors"), "{first}");
    told(&refused(&["--seed", "1"]), "another calibration text, sample or seed");
    told(&measure(&["--seed", "1"]), "another calibration text, sample or seed");

    let weights = model.join("model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    let last = bytes.len() - 2;
    bytes[last] ^= 1;
    std::fs::write(&weights, bytes).unwrap();
    told(&refused(&[]), "the checkpoint has changed since they were measured");
    told(&measure(&[]), "the checkpoint has changed since they were measured");
    assert!(measure(&[]).contains("going on after"), "nothing has changed since");
}

/// A recipe whose formats are found by measurement, with these lines in its `[allocate]`.
fn recipe(folder: &Path, allocate: &str) -> String {
    let formats = "ssm = \"w8a16\"\nmlp = \"w8a16\"\nattention = \"w8a16\"\nmoe = \"w8a16\"\nembedding = \"w8a16\"\nhead = \"w8a16\"\n";
    let text = format!("schema = \"strata.recipe/1\"\nname = \"own\"\nmethod = \"rtn\"\n[formats]\n{formats}[allocate]\n{allocate}");
    let path = folder.join("own.toml");
    std::fs::write(&path, text).unwrap();
    path.display().to_string()
}

#[test]
fn a_recipe_allocates_16_bit_activations_and_refuses_at_once_what_cannot_be() {
    let data = TempDir::new().unwrap();
    let quantize = |allocate: &str, options: &[&str]| {
        let recipe = recipe(data.path(), allocate);
        let output = data.path().join("variant");
        let command = ["quantize", "demo", "-r", &recipe, "--sequences", "2", "--length", "64", "--force", "-o", output.to_str().unwrap()];
        strata(data.path()).args(command).args(options).output().unwrap()
    };
    let formats = "formats = [\"w8a16\", \"w4a16\"]\n";
    for (budget, why) in [
        ("bits = 1.0", "no plan takes 1 bits a weight: the smallest that is possible takes 4.133 bits"),
        ("size = \"10kB\"", "no plan takes a model of 10000 bytes"),
        ("bits = 5.0\nkld = 1e-4", "[allocate] has the budgets bits and kld"),
        ("size = \"big\"", "`big` is not a size"),
    ] {
        let output = quantize(&format!("{formats}{budget}"), &[]);
        assert!(output.status.code() == Some(2) && text(&output.stderr).contains(why), "{budget}: {}", text(&output.stderr));
        assert!(measurements(data.path()).is_empty(), "{budget}: it was measured first");
    }
    let output = quantize(&format!("{formats}size = \"5MB\""), &["--override", "kind:attention=w16a16"]);
    succeeded(&output);
    assert!(text(&output.stderr).contains("plan found: "), "{}", text(&output.stderr));
    let manifest = std::fs::read_to_string(data.path().join("variant/strata.toml")).unwrap();
    for format in ["\"w16a16\"", "\"w8a16\"", "\"w4a16\""] {
        assert!(manifest.contains(format), "{format}: {manifest}");
    }
}
