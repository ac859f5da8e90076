//! Evaluations that are stopped go on where they stopped, several models are compared in one, and what was measured is
//! kept, listed, imported and exported.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Mutex;
use std::time::Duration;

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
    assert!(log.into_inner().unwrap().iter().any(|line| line.starts_with("piqa") && line.contains("earlier evaluation")));
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

#[test]
fn the_base_of_several_evaluations_is_scored_once() {
    let folder = tempfile::tempdir().unwrap();
    let base = request().models.remove(0);
    let request = EvaluateRequest { reference: Some(base), limit: Some(4), journal: Some(folder.path().to_owned()), ..request() };
    let logged = || {
        let log = Mutex::new(Vec::new());
        let listen = |report| {
            if let Report::Log(line) = report {
                log.lock().unwrap().push(line);
            }
        };
        let results = run(&request, &Monitor::new(listen, CancelToken::default()));
        (results[0].result.tasks.clone(), log.into_inner().unwrap().len())
    };
    let (first, again) = (logged(), logged());
    assert_eq!(first.0, again.0);
    // The variant here is the base itself, whose rows are those of the base.
    assert_eq!((first.1, again.1), (2, 4), "a line a task that was scored before");
}

/// The program with a data folder of its own.
fn strata(data: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_strata"));
    command.env("XDG_DATA_HOME", data).args(arguments);
    command
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[test]
fn a_killed_evaluation_goes_on() {
    let data = tempfile::tempdir().unwrap();
    let arguments = ["eval", "demo", "--tasks", "arc_easy,hellaswag", "--windows", "0", "--no-speed"];
    let mut killed = strata(data.path(), &arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let scored = || {
        let files = std::fs::read_dir(data.path().join("strata/evals")).into_iter().flatten().flatten();
        files.map(|file| std::fs::read_to_string(file.path()).unwrap().lines().count()).sum::<usize>()
    };
    while scored() == 0 {
        assert!(killed.try_wait().unwrap().is_none(), "the evaluation ended before it could be killed");
        std::thread::sleep(Duration::from_millis(5));
    }
    killed.kill().unwrap();
    killed.wait().unwrap();
    let resumed = strata(data.path(), &arguments).output().unwrap();
    assert!(String::from_utf8_lossy(&resumed.stderr).contains("were scored by an earlier evaluation"));
    assert!(stdout(&resumed).contains("53.2"), "arc_easy of the whole task, as the harness has it");
    assert_eq!(scored(), 0);
}

#[test]
fn results_are_kept_listed_imported_and_exported() {
    let data = tempfile::tempdir().unwrap();
    let run = |arguments: &[&str]| stdout(&strata(data.path(), arguments).output().unwrap());
    assert!(run(&["results"]).starts_with("no results in "));
    let page = data.path().join("page.html");
    let page = page.to_str().unwrap();
    run(&["eval", "demo", "--tasks", "piqa", "--limit", "8", "--windows", "0", "--no-speed", "--html", page]);
    assert!(std::fs::read_to_string(page).unwrap().contains("<svg"));
    let harness = data.path().join("results_2026.json");
    std::fs::write(&harness, r#"{"model_name": "org/other", "date": 0, "results": {"piqa": {"acc,none": 0.625}}}"#).unwrap();
    let table = run(&["results", "--import", harness.to_str().unwrap(), "--import", harness.to_str().unwrap()]);
    assert_eq!(table.lines().count(), 3, "{table}");
    let found = run(&["results", "--variant", "other", "--format", "csv"]);
    assert!(found.ends_with('\n') && found.contains("lm-evaluation-harness,-,org/other,other,-,-,62.5,62.50,"), "{found}");
    let records: serde_json::Value = serde_json::from_str(&run(&["results", "--json", "--model", "demo"])).unwrap();
    assert_eq!((records["schema"].as_str(), records["records"][0]["schema"].as_str()), (Some("strata.records/1"), Some("strata.record/1")));
    assert_eq!(records["records"][0]["result"]["tasks"]["piqa"]["rows"], 8);
}
