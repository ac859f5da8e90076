//! Evaluations that are stopped go on where they stopped, several models are compared in one, and what was measured is
//! kept, listed, imported and exported.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use strata::backend::cpu::Cpu;
use strata::backend::{Backend, Sequences};
use strata::checkpoint::DEMO_HELDOUT;
use strata::error::ErrorKind;
use strata::eval::{EvaluateRequest, Evaluated, ModelToEvaluate, ResultSet, Task, evaluate};
use strata::model::{Hybrid, MemoryNeed};
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
    let memory = whole[0].result.memory;
    assert!(
        memory.peak_bytes > memory.resident_weight_bytes && memory.device_peak_bytes.is_none(),
        "the processor's memory is the process's"
    );
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
    assert_eq!(set.results[0].perplexity, perplexity.gptq);
    assert!((perplexity.llama_cpp.ln() - llama_cpp(2, 64)).abs() < 1e-4, "{perplexity:?}");
    let json = serde_json::to_value(&set).unwrap();
    assert_eq!(json["schema"], "strata.results/1");
    assert_eq!(json["comparisons"][0]["tasks"]["piqa"]["test"], "exact");
}

/// The logarithm of the demo's perplexity as `llama-perplexity` computes it (`tools/perplexity/perplexity.cpp`): one stream of
/// tokens, the beginning of sequence in place of the first token of each chunk, the negative log-likelihood of what the logits
/// `n_ctx / 2` … `n_ctx - 2` predict.
fn llama_cpp(chunks: usize, n_ctx: usize) -> f64 {
    let demo = strata::checkpoint::open("demo").unwrap();
    let (tokenizer, model) = (demo.tokenizer().unwrap(), Hybrid::load(Cpu, &demo).unwrap());
    let tokens = tokenizer.encode(DEMO_HELDOUT.trim_end_matches('\n'), true).unwrap().get_ids().to_vec();
    let mut scores = Vec::new();
    for chunk in tokens.chunks(n_ctx).take(chunks) {
        let chunk: Vec<u32> = std::iter::once(tokens[0]).chain(chunk[1..].iter().copied()).collect();
        let logits = Cpu.download(&model.logits(&chunk, &Sequences::new(vec![n_ctx]), None).unwrap()).unwrap();
        for position in n_ctx / 2..n_ctx - 1 {
            let row: Vec<f64> = logits[position * model.vocabulary()..][..model.vocabulary()].iter().map(|x| f64::from(*x)).collect();
            scores.push(row.iter().map(|x| x.exp()).sum::<f64>().ln() - row[chunk[position + 1] as usize]);
        }
    }
    assert_eq!(scores.len(), chunks * (n_ctx - 1 - n_ctx / 2));
    scores.iter().sum::<f64>() / scores.len() as f64
}

/// What `monitor` logged while `request` ran, and the results.
fn logged(request: &EvaluateRequest) -> (String, Vec<Evaluated>) {
    let log = Mutex::new(String::new());
    let listen = |report| {
        if let Report::Log(line) | Report::Warning(line) = report {
            log.lock().unwrap().extend([line.as_str(), "\n"]);
        }
    };
    let results = run(request, &Monitor::new(listen, CancelToken::default()));
    (log.into_inner().unwrap(), results)
}

#[test]
fn one_reference_pass_serves_later_evaluations_and_damage_is_computed_again() {
    let folder = tempfile::tempdir().unwrap();
    let base = ModelToEvaluate { name: "base".into(), path: "demo".into() };
    let request = EvaluateRequest {
        reference: Some(base.clone()),
        models: vec![base],
        tasks: Vec::new(),
        windows: 3,
        window_tokens: 48,
        references: Some(folder.path().into()),
        ..EvaluateRequest::default()
    };
    let (log, first) = logged(&request);
    assert!(!log.contains("was found in"), "{log}");
    let floor = first[0].result.noise_floor.as_ref().unwrap();
    assert!(floor.kld.mean > 1e-9 && floor.kld.mean < 1e-3 && floor.kld.tokens == 3 * 48, "{floor:?}");
    assert!(floor.kld.rms_probability.unwrap() > 0.0 && floor.rounding.contains("bf16"));
    assert_eq!((first[0].result.kld, first[1].result.kld.unwrap().max), (None, 0.0));

    let (log, second) = logged(&request);
    assert!(log.contains("base says was found in"), "{log}");
    let figures = |evaluated: &[Evaluated]| {
        let figures = evaluated.iter().map(|e| (e.result.kld, e.result.noise_floor.clone(), e.result.perplexities));
        figures.collect::<Vec<_>>()
    };
    assert_eq!(figures(&first), figures(&second), "a reference on disk changes no figure");

    let file = std::fs::read_dir(folder.path()).unwrap().next().unwrap().unwrap().path();
    let mut bytes = std::fs::read(&file).unwrap();
    bytes[100] ^= 0x40;
    std::fs::write(&file, bytes).unwrap();
    let (log, third) = logged(&request);
    assert!(log.contains("is damaged") && log.contains("computed again"), "{log}");
    assert_eq!(figures(&first), figures(&third));
}

#[test]
fn a_model_read_block_by_block_gives_the_same_figures() {
    let need = MemoryNeed::of(&strata::checkpoint::open("demo").unwrap(), 4096).unwrap();
    let base = ModelToEvaluate { name: "base".into(), path: "demo".into() };
    let request = EvaluateRequest { reference: Some(base), windows: 2, window_tokens: 64, ..request() };
    let (log, whole) = logged(&request);
    assert!(!log.contains("block by block"), "{log}");
    // Room for what waits between two blocks, then none.
    for (room, spilled) in [(need.resident() - need.streamed() - 1, false), (0, true)] {
        let (log, streamed) = logged(&EvaluateRequest { host_memory: Some(need.streamed() + room), ..request.clone() });
        assert!(log.contains("block by block") && log.contains("scratch file") == spilled, "{log}");
        for (streamed, whole) in streamed.iter().zip(&whole) {
            assert_eq!(streamed.samples, whole.samples);
            assert_eq!((streamed.result.kld, &streamed.result.noise_floor), (whole.result.kld, &whole.result.noise_floor));
            assert_eq!(streamed.result.perplexities, whole.result.perplexities);
            assert!(streamed.result.memory.resident_weight_bytes < whole.result.memory.resident_weight_bytes / 4);
        }
    }
    let refused = EvaluateRequest { host_memory: Some(need.streamed() - 1), ..request };
    let error = evaluate(|| Cpu, &refused, &Monitor::silent(), |_| {}).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Input);
    assert!(error.message.contains("may be taken") && error.hint.unwrap().contains("--host-memory"));
}

#[test]
fn the_base_of_several_evaluations_is_scored_once() {
    let folder = tempfile::tempdir().unwrap();
    let base = request().models.remove(0);
    let request = EvaluateRequest { reference: Some(base), limit: Some(4), journal: Some(folder.path().to_owned()), ..request() };
    let (first, again) = (logged(&request), logged(&request));
    assert_eq!(first.1[0].result.tasks, again.1[0].result.tasks);
    let found = |log: &str| log.matches("scored by an earlier evaluation").count();
    // The variant here is the base itself, whose rows are those of the base.
    assert_eq!((found(&first.0), found(&again.0)), (2, 4), "a line a task that was scored before");
}

/// The program with a data folder of its own.
fn strata(data: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_strata"));
    command.env("XDG_DATA_HOME", data).env("XDG_CACHE_HOME", data.join("cache")).args(arguments);
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
        files.map(|file| std::fs::read_to_string(file.path()).unwrap().matches('\n').count()).sum::<usize>()
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
    assert!(found.starts_with("time,source,session,model,variant,recipe,weight_bytes,") && found.ends_with('\n'), "{found}");
    assert!(found.contains("lm-evaluation-harness,,org/other,other,,,,,0.625,"), "{found}");
    let records: serde_json::Value = serde_json::from_str(&run(&["results", "--json", "--model", "demo"])).unwrap();
    assert_eq!((records["schema"].as_str(), records["records"][0]["schema"].as_str()), (Some("strata.records/1"), Some("strata.record/1")));
    assert_eq!(records["records"][0]["result"]["tasks"]["piqa"]["rows"], 8);
}

/// Rows of the tables of `printed`, cell by cell.
fn cells(printed: &str) -> Vec<Vec<&str>> {
    let tables = printed.split("\n\n").filter(|paragraph| paragraph.starts_with("variant  ") || paragraph.starts_with("time  "));
    tables.flat_map(str::lines).map(|line| line.split("  ").map(str::trim).filter(|cell| !cell.is_empty()).collect()).collect()
}

#[test]
fn pages_have_the_figures_of_the_terminal_and_flips_are_listed() {
    let data = tempfile::tempdir().unwrap();
    let run = |arguments: &[&str]| stdout(&strata(data.path(), arguments).output().unwrap());
    let (variant, page) = (data.path().join("rounded"), data.path().join("page.html"));
    let (variant, page) = (variant.to_str().unwrap(), page.to_str().unwrap());
    run(&["quantize", "demo", "-r", "rtn", "-o", variant]);
    let measure = ["--tasks", "arc_easy,winogrande", "--limit", "100", "--windows", "2", "--window-tokens", "64", "--no-speed"];
    let same_page = |printed: &str| {
        let html = std::fs::read_to_string(page).unwrap();
        let cells = cells(printed);
        for cell in cells.iter().flatten() {
            assert!(html.contains(&format!(">{cell}</t")), "`{cell}` is not on the page\n{printed}");
        }
        (html, cells.len())
    };
    let printed = run(&[&["compare", "demo", variant, "--flips", "--html", page][..], &measure].concat());
    let (html, _) = same_page(&printed);
    let rows = cells(&printed);
    // The plot's points are the table's.
    let scores = &rows[2];
    assert_eq!(rows[0][4..6], ["arc_easy", "winogrande"]);
    let accuracy = scores[4].split(' ').next().unwrap();
    assert!(scores[0] == "rounded" && html.contains(&format!("<title>rounded: {accuracy} % (")), "{scores:?}");
    assert!(html.contains(&format!(", KLD {}</title>", scores[7])), "{scores:?}");
    let changes = rows.iter().filter(|row| ["lost", "gained"].contains(row.get(3).unwrap_or(&""))).count();
    let all = rows.iter().find(|row| row.get(1) == Some(&"all")).unwrap();
    assert_eq!(changes, all[4].parse::<usize>().unwrap() + all[5].parse::<usize>().unwrap());
    assert!(changes > 0, "{printed}");

    let (html, rows) = same_page(&run(&["results", "--html", page]));
    assert!(rows == 3 && html.contains("<h2>Size against divergence from demo on 2 x 64 tokens of demo held-out text</h2>"), "{rows}");
}

#[test]
fn files_of_other_engines_are_imported_by_several_processes_at_once() {
    let data = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = data.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let mut files = vec![
        write("out/org__model/samples_piqa_2026-01-01T00-00-00.1.jsonl", "{\"doc_id\": 0, \"acc\": 1.0, \"acc_norm\": 0.0}\n"),
        write(
            "ppl.txt",
            "print_info: file size   = 3.50 GiB (4.54 BPW)\n\
             perplexity: calculating perplexity over 4 chunks, n_ctx=512, batch_size=512, n_seq=1\nFinal estimate: PPL = 7.5 +/- 0.1\n",
        ),
    ];
    for index in 0..22 {
        let text =
            format!(r#"{{"model_name": "org/m{index}", "results": {{"piqa": {{"acc,none": 0.5}}}}, "padding": "{}"}}"#, "x".repeat(20_000));
        files.push(write(&format!("results_{index}.json"), &text));
    }
    let mut children: Vec<_> = files
        .chunks(4)
        .map(|files| {
            let imports = files.iter().flat_map(|file| ["--import", file.as_str()]);
            let mut command = strata(data.path(), &["results"]);
            command.args(imports).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
        })
        .collect();
    for child in &mut children {
        assert!(child.wait().unwrap().success());
    }
    let run = |arguments: &[&str]| stdout(&strata(data.path(), arguments).output().unwrap());
    let count = |arguments: &[&str]| {
        let records: serde_json::Value = serde_json::from_str(&run(&[&["results", "--json"], arguments].concat())).unwrap();
        records["records"].as_array().unwrap().len()
    };
    assert_eq!(count(&[]), files.len(), "nothing is lost and nothing torn");
    assert_eq!(count(&["--source", "llama-perplexity"]), 1);
    assert_eq!((count(&["--last", "3"]), count(&["--since", "2100-01-01"]), count(&["--session", "none"])), (3, 0, 0));
    let table = run(&["results", "--variant", "ppl.txt", "--format", "markdown"]);
    assert!(table.contains("| llama-perplexity |") && table.contains("| 7.5000 |"), "{table}");
    assert!(table.contains("| 3.76 GB (file) | 4.54 |"), "an engine that tells the file's size alone: {table}");
}
