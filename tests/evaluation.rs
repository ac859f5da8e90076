//! Evaluations that are stopped go on where they stopped, and several models are compared in one.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::sync::Mutex;

use strata::backend::cpu::Cpu;
use strata::error::ErrorKind;
use strata::eval::{EvaluateRequest, Evaluated, ModelToEvaluate, ResultSet, Task, evaluate};
use strata::monitor::{CancelToken, Monitor, Report};

fn request() -> EvaluateRequest {
    let base = ModelToEvaluate { name: "base".into(), path: "demo".into() };
    EvaluateRequest {
        models: vec![base],
        tasks: vec![Task::Piqa, Task::Hellaswag],
        limit: Some(60),
        windows: 0,
        ..EvaluateRequest::default()
    }
}

fn run(request: &EvaluateRequest, monitor: &Monitor) -> Vec<Evaluated> {
    let mut results = Vec::new();
    evaluate(|| Cpu, request, monitor, |evaluated| results.push(evaluated)).unwrap();
    results
}

#[test]
fn a_cancelled_evaluation_goes_on_without_repeating_finished_rows() {
    let folder = tempfile::tempdir().unwrap();
    let request = EvaluateRequest { journal: Some(folder.path().join("evals")), ..request() };
    let cancel = CancelToken::default();
    let token = cancel.clone();
    let stop_in_hellaswag = move |report| {
        if matches!(&report, Report::Stage { name, .. } if name == "hellaswag") {
            token.cancel();
        }
    };
    let error = evaluate(|| Cpu, &request, &Monitor::new(stop_in_hellaswag, cancel), |_| panic!("nothing is finished")).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Cancelled);

    let log = Mutex::new(Vec::new());
    let listen = |report| {
        if let Report::Log(line) = report {
            log.lock().unwrap().push(line);
        }
    };
    let resumed = run(&request, &Monitor::new(listen, CancelToken::default()));
    assert!(log.into_inner().unwrap().iter().any(|line| line.starts_with("piqa") && line.contains("did not end")));
    let whole = run(&EvaluateRequest { journal: None, ..request.clone() }, &Monitor::silent());
    assert_eq!(resumed[0].result.tasks, whole[0].result.tasks);
    for (resumed, whole) in resumed[0].samples.iter().zip(&whole[0].samples) {
        for (a, b) in resumed.loglikelihoods.iter().zip(&whole.loglikelihoods) {
            assert!((a - b).abs() < 1e-12, "{} row {}", whole.task, whole.index);
        }
    }
    assert_eq!(std::fs::read_dir(folder.path().join("evals")).unwrap().count(), 0, "the journal goes when all is done");
}

#[test]
fn a_model_against_itself_has_no_flips_and_no_divergence() {
    let mut request = request();
    request.reference = Some(request.models[0].clone());
    (request.windows, request.window_tokens, request.limit) = (2, 64, Some(20));
    let set = ResultSet::new(run(&request, &Monitor::silent()));
    let (comparison, kld) = (&set.comparisons[0], set.results[1].kld.unwrap());
    assert!(comparison.flips.is_empty() && comparison.all.as_ref().unwrap().p_value == 1.0);
    assert_eq!((comparison.tasks["piqa"].metric.as_str(), comparison.tasks["hellaswag"].metric.as_str()), ("acc", "acc_norm"));
    assert_eq!((kld.max, kld.top1, kld.rms_probability, kld.tokens), (0.0, 1.0, Some(0.0), 128));
    let perplexity = set.results[0].perplexities.unwrap();
    assert_eq!(set.results[0].perplexity, Some(perplexity.gptq));
    assert!(perplexity.llama_cpp < perplexity.gptq, "more context, fewer surprises: {perplexity:?}");
    let json = serde_json::to_value(&set).unwrap();
    assert_eq!(json["schema"], "strata.results/1");
    assert_eq!(json["comparisons"][0]["tasks"]["piqa"]["test"], "exact");
}
