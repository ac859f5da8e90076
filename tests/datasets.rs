//! Rows of the public datasets from a hub that runs inside the test: Parquet in parts, the converted branch, JSON lines,
//! the cache without a network, and damage.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on should stop at that line")]

mod common;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use strata::checkpoint::hub::Hub;
use strata::checkpoint::sha256_hex;
use strata::error::{ErrorKind, Result};
use strata::eval::dataset::from_hub;
use strata::eval::{Rows, Task};
use strata::monitor::Monitor;
use tempfile::TempDir;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// Files by `dataset@revision/path`, as `main` and the converted branch hold them.
type Files = BTreeMap<String, Vec<u8>>;

struct Server {
    endpoint: String,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Server {
    fn start(files: Files) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = Self { endpoint: format!("http://{}", listener.local_addr().unwrap()), asked: Arc::default() };
        let asked = Arc::clone(&server.asked);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                answer(&stream, &files, &asked).unwrap();
            }
        });
        server
    }

    fn hub(&self, home: &Path, offline: bool) -> Hub {
        let retry_wait = Duration::from_millis(2);
        Hub { endpoint: self.endpoint.clone(), home: home.to_owned(), token: None, offline, retry_wait }
    }

    fn rows(&self, home: &Path, task: Task) -> Result<Rows> {
        from_hub(&self.hub(home, false), task, false, &Monitor::silent())
    }

    fn requests(&self) -> usize {
        self.asked.lock().unwrap().len()
    }
}

/// `/api/datasets/ID/revision/REV` lists, `/datasets/ID/resolve/REV/FILE` gives; a commit is what `main` is.
fn answer(mut stream: &TcpStream, files: &Files, asked: &Mutex<Vec<String>>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let mut header = String::new();
    while reader.read_line(&mut header)? > 2 {
        header.clear();
    }
    asked.lock().unwrap().push(line.trim().to_owned());
    let path = line.split(' ').nth(1).unwrap().replace("%2F", "/");
    let listed = path.strip_prefix("/api/datasets/").and_then(|rest| rest.split_once("/revision/")).map(|(id, revision)| {
        let prefix = format!("{id}@{}/", if revision == COMMIT { "main" } else { revision });
        let names = files.keys().filter_map(|name| name.strip_prefix(&prefix));
        let siblings: Vec<_> = names.map(|name| serde_json::json!({ "rfilename": name })).collect();
        serde_json::json!({ "sha": COMMIT, "siblings": siblings }).to_string().into_bytes()
    });
    let given = path.strip_prefix("/datasets/").and_then(|rest| rest.split_once("/resolve/")).and_then(|(id, rest)| {
        let file = rest.strip_prefix(COMMIT)?.trim_start_matches('/');
        files.iter().find(|(name, _)| name.starts_with(id) && name.ends_with(&format!("/{file}"))).map(|(_, bytes)| bytes.clone())
    });
    let body = listed.filter(|list| list.windows(9).any(|w| w == b"rfilename")).or(given);
    let (status, body) = body.map_or(("404 Not Found", b"no".to_vec()), |body| ("200 OK", body));
    let etag = sha256_hex(&body);
    let head = format!(
        "HTTP/1.1 {status}\r\nX-Repo-Commit: {COMMIT}\r\nETag: \"{etag}\"\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes())?;
    if line.starts_with("GET") {
        stream.write_all(&body)?;
    }
    Ok(())
}

fn parquet(name: &str) -> Vec<u8> {
    std::fs::read(Path::new("tests/data/datasets").join(name)).unwrap()
}

/// ARC as the hub has it, PIQA on the converted branch only, HellaSwag as JSON lines with a bad row at the end.
fn files() -> Files {
    let hellaswag = std::fs::read_to_string("models/demo/tasks/hellaswag.jsonl").unwrap();
    let hellaswag = hellaswag.lines().take(5).chain(["{\"label\": \"9\"}"]).collect::<Vec<_>>().join("\n");
    BTreeMap::from([
        ("allenai/ai2_arc@main/ARC-Easy/test-00000-of-00002.parquet".into(), parquet("arc-0.parquet")),
        ("allenai/ai2_arc@main/ARC-Easy/test-00001-of-00002.parquet".into(), parquet("arc-1.parquet")),
        ("allenai/ai2_arc@main/ARC-Easy/train-00000-of-00001.parquet".into(), b"never asked for".to_vec()),
        ("allenai/ai2_arc@main/ARC-Challenge/test-00000-of-00001.parquet".into(), b"PAR1 but damaged behind that PAR1".to_vec()),
        ("baber/piqa@main/piqa.py".into(), b"a script".to_vec()),
        ("baber/piqa@refs/convert/parquet/plain_text/validation/0000.parquet".into(), parquet("piqa.parquet")),
        ("Rowan/hellaswag@main/data/val.jsonl".into(), hellaswag.into_bytes()),
    ])
}

#[test]
fn parquet_rows_are_those_compiled_in() {
    let (server, home) = (Server::start(files()), TempDir::new().unwrap());
    for (task, count) in [(Task::ArcEasy, 12), (Task::Piqa, 10)] {
        let rows = server.rows(home.path(), task).unwrap();
        assert_eq!(rows.questions, task.embedded().unwrap().questions[..count], "{task}");
    }
    assert!(!server.asked.lock().unwrap().iter().any(|line| line.contains("train") || line.contains("piqa.py")));
}

#[test]
fn cached_rows_need_no_network_and_missing_ones_are_named() {
    let (server, home) = (Server::start(files()), TempDir::new().unwrap());
    let offline = |task| from_hub(&server.hub(home.path(), true), task, false, &Monitor::silent());
    let error = offline(Task::ArcEasy).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Input);
    assert!(error.message.contains("allenai/ai2_arc ARC-Easy, split test") && error.hint.unwrap().contains("HF_HUB_OFFLINE"));
    let fetched = server.rows(home.path(), Task::ArcEasy).unwrap();
    let converted = server.rows(home.path(), Task::Piqa).unwrap();
    let asked = server.requests();
    assert_eq!(server.rows(home.path(), Task::ArcEasy).unwrap(), fetched);
    assert_eq!((offline(Task::ArcEasy).unwrap(), offline(Task::Piqa).unwrap()), (fetched, converted));
    assert_eq!(server.requests(), asked, "what is in the cache is not asked for");

    // Half of a split, as an interrupted download leaves it, is not taken for all of it.
    let snapshot = home.path().join("hub/datasets--allenai--ai2_arc/snapshots").join(COMMIT);
    std::fs::remove_file(snapshot.join("ARC-Easy/test-00001-of-00002.parquet")).unwrap();
    assert!(offline(Task::ArcEasy).is_err());
    assert_eq!(server.rows(home.path(), Task::ArcEasy).unwrap().questions.len(), 12);
}

#[test]
fn damaged_bad_and_missing_rows_are_said() {
    let (server, home) = (Server::start(files()), TempDir::new().unwrap());
    let error = server.rows(home.path(), Task::ArcChallenge).unwrap_err();
    assert!(error.message.contains("test-00000-of-00001.parquet cannot be read as Parquet"), "{error}");
    let error = server.rows(home.path(), Task::Hellaswag).unwrap_err();
    let place = "/data/val.jsonl, line 6: missing field";
    assert!(error.message.starts_with("Rowan/hellaswag, split validation: /") && error.message.contains(place), "{error}");
    let rows = from_hub(&server.hub(home.path(), false), Task::Hellaswag, true, &Monitor::silent()).unwrap();
    assert_eq!((rows.questions.len(), rows.skipped), (5, 1));
    let error = server.rows(home.path(), Task::Winogrande).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Input);
    assert!(error.message.contains("allenai/winogrande winogrande_xl, split validation was not found"), "{error}");
}

#[test]
fn the_command_evaluates_rows_of_the_hub() {
    let (server, home) = (Server::start(files()), TempDir::new().unwrap());
    let run = |offline: &str| {
        let mut command = common::strata(home.path());
        command.env("HF_ENDPOINT", &server.endpoint).env("HF_HUB_OFFLINE", offline);
        command.args(["eval", "demo", "--data", "hub", "--tasks", "arc_easy,piqa", "--windows", "0", "--no-speed", "--json"]);
        serde_json::from_str::<serde_json::Value>(&common::succeeded(&command.output().unwrap())).unwrap()
    };
    let online = run("0");
    assert_eq!(
        (&online["results"][0]["tasks"]["arc_easy"]["rows"], &online["results"][0]["tasks"]["piqa"]["rows"]),
        (&12.into(), &10.into())
    );
    assert_eq!(run("1")["results"][0]["tasks"], online["results"][0]["tasks"]);
}
