//! Runs: followed, cancelled, killed and resumed from other processes, by way of their folders.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod common;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{short_session, strata, succeeded, text, without_memory};
use serde_json::Value;
use tempfile::TempDir;

/// What `strata runs --json` says of the newest run.
fn newest(data: &Path) -> Value {
    let runs: Value = serde_json::from_str(&succeeded(&strata(data).args(["runs", "--json"]).output().unwrap())).unwrap();
    assert_eq!(runs["schema"], "strata.runs/1");
    runs["runs"][0].clone()
}

/// Starts a replay and waits until two blocks are finished.
fn begun(data: &Path, arguments: &[&str]) -> Child {
    let mut command: Command = strata(data);
    let mut child = command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let start = Instant::now();
    loop {
        let status = newest(data);
        if status["progress"]["stage"] == "quantize" && status["progress"]["done"].as_u64() >= Some(2) {
            assert_eq!((&status["state"], &status["title"]), (&"running".into(), &"replay fit".into()));
            return child;
        }
        assert!(child.try_wait().unwrap().is_none() && start.elapsed() < Duration::from_secs(30), "{status}");
    }
}

fn variants(data: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(data.join("strata/variants")).unwrap().map(|entry| entry.unwrap().path()).collect()
}

#[test]
fn a_killed_run_is_seen_as_interrupted_and_goes_on_where_it_stopped() {
    let data = TempDir::new().unwrap();
    let session = short_session(data.path()).display().to_string();
    let mut child = begun(data.path(), &["replay", &session]);
    child.kill().unwrap();
    child.wait().unwrap();
    let status = newest(data.path());
    assert_eq!(status["state"], "interrupted");
    assert!(status["message"].as_str().unwrap().ends_with("is gone: it was killed"), "{status}");

    let resumed = strata(data.path()).args(["replay", "--resume", "last"]).output().unwrap();
    let table = without_memory(&succeeded(&resumed));
    assert!(text(&resumed.stderr).contains("going on after"), "{}", text(&resumed.stderr));
    assert_eq!((newest(data.path())["state"].as_str(), variants(data.path()).len()), (Some("done"), 1));
    // The same as a replay that nothing interrupted; its variant is the one that is there.
    let whole = strata(data.path()).args(["replay", &session]).output().unwrap();
    assert!(text(&whole.stderr).contains("verified and reused"));
    assert_eq!(without_memory(&succeeded(&whole)), table);
    // Resumed when it is done already: nothing is made again, and the table is the same.
    let again = strata(data.path()).args(["replay", "--resume", newest(data.path())["id"].as_str().unwrap()]).output().unwrap();
    assert_eq!(without_memory(&succeeded(&again)), table);
    assert!(!text(&again.stderr).contains("quantize small"), "{}", text(&again.stderr));
}

#[test]
fn a_run_is_followed_and_cancelled_by_another_process_and_its_id_is_checked() {
    let data = TempDir::new().unwrap();
    let session = short_session(data.path()).display().to_string();
    let child = begun(data.path(), &["replay", &session]);
    let follow = strata(data.path()).args(["runs", "follow", "last"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let busy = strata(data.path()).args(["runs", "remove", "last"]).output().unwrap();
    assert!(busy.status.code() == Some(2) && text(&busy.stderr).contains("another strata (process "), "{}", text(&busy.stderr));
    succeeded(&strata(data.path()).args(["runs", "cancel", "last"]).output().unwrap());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.code() == Some(1) && text(&output.stderr).ends_with("error: cancelled\n"), "{}", text(&output.stderr));
    let followed = follow.wait_with_output().unwrap();
    assert_eq!(followed.status.code(), Some(1));
    let log = text(&followed.stdout);
    for line in ["quantize small: started", "block 1: error", "warning asked to cancel", "warning cancelled"] {
        assert!(log.contains(line), "{line} is missing: {log}");
    }
    assert_eq!(newest(data.path())["state"], "cancelled");

    let over = strata(data.path()).args(["runs", "cancel", "last"]).output().unwrap();
    assert!(over.status.code() == Some(2) && text(&over.stderr).contains("is cancelled already"));
    let unknown = strata(data.path()).args(["replay", "--resume", "1999"]).output().unwrap();
    assert!(unknown.status.code() == Some(2) && text(&unknown.stderr).contains("hint: `strata runs` lists them"));
    let table = succeeded(&strata(data.path()).args(["runs"]).output().unwrap());
    assert!(table.contains("cancelled") && table.contains("strata replay --resume RUN"), "{table}");
    succeeded(&strata(data.path()).args(["runs", "remove", "last"]).output().unwrap());
    assert_eq!(succeeded(&strata(data.path()).args(["runs"]).output().unwrap()), "no runs yet\n");
}

/// A benchmark's temporary checkpoint may have tens of gigabytes.
#[test]
fn a_benchmark_of_quantizing_that_is_told_to_end_leaves_nothing_behind() {
    let data = TempDir::new().unwrap();
    let temporary = data.path().join("temporary");
    std::fs::create_dir(&temporary).unwrap();
    let entries = || std::fs::read_dir(&temporary).unwrap().count();
    let arguments = ["bench", "--quantize", "--blocks", "2", "--sequences", "1", "--length", "16"];
    let mut child =
        strata(data.path()).args(arguments).env("TMPDIR", &temporary).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let start = Instant::now();
    while entries() == 0 {
        assert!(child.try_wait().unwrap().is_none() && start.elapsed() < Duration::from_secs(60), "no temporary checkpoint");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(Command::new("kill").arg(child.id().to_string()).status().unwrap().success());
    assert_eq!((child.wait().unwrap().code(), entries()), (Some(1), 0));
}
