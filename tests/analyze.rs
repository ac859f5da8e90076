//! `strata analyze` through the program.

#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{strata, succeeded};
use tempfile::TempDir;

#[test]
fn costs_are_predicted_from_a_configuration_alone() {
    let config = concat!(env!("CARGO_MANIFEST_DIR"), "/models/demo/config.json");
    let data = TempDir::new().unwrap();
    let analyze = |more: &[&str]| succeeded(&strata(data.path()).args(["analyze", config]).args(more).output().unwrap());
    let document: serde_json::Value = serde_json::from_str(&analyze(&["--gpu", "rtx 4090", "--gpu", "H200", "--json"])).unwrap();
    assert_eq!(document["gpus"][0]["name"], "RTX 4090");
    let plans: Vec<&str> = document["predictions"].as_array().unwrap().iter().map(|plan| plan["plan"].as_str().unwrap()).collect();
    assert_eq!(plans, ["base", "phase1", "phase2", "phase3", "suggested"]);
    let seconds = |plan: usize, gpu: usize| document["predictions"][plan]["predictions"][gpu]["decode_seconds"].as_f64().unwrap();
    assert!(seconds(2, 0) < seconds(0, 0) && seconds(0, 1) < seconds(0, 0), "fewer bytes and a faster memory take less time");

    let text = analyze(&["--gpu", "4090"]);
    assert!(text.contains("phase2     RTX 4090") && text.contains("is predicted from bytes and operations, not measured"), "{text}");
}
