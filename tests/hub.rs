//! Downloads from a hub that runs inside the test: answers as huggingface.co gives them (redirects of small files to a
//! cache address, of weights to a storage host, etags, commits, ranges), and the ways in which they go wrong.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on should stop at that line")]

use std::collections::HashMap;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};
use strata::checkpoint::hub::{Hub, looks_like_id};
use strata::error::ErrorKind;
use strata::monitor::{CancelToken, Monitor, Report};
use tempfile::TempDir;

const ID: &str = "owner/tiny";
const FIRST: &str = "0123456789abcdef0123456789abcdef01234567";
const SECOND: &str = "89abcdef0123456789abcdef0123456789abcdef";
const SHARDS: [&str; 2] = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
/// Where transfers are cut; behind the first network buffer, before the end of a shard.
const CUT: usize = 150_000;

/// One request as the server saw it.
#[derive(Debug, Clone)]
struct Seen {
    method: String,
    /// The file asked for, without what precedes it in the address.
    file: String,
    /// The request went to the storage host.
    storage: bool,
    range: Option<u64>,
    token: bool,
}

/// What happens to the bodies of weights.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    None,
    /// The next body ends at `CUT`, later ones are whole.
    CutOnce,
    /// The next body ends at `CUT`, later ones before their first byte.
    CutForGood,
    /// Later ones of `CutForGood`.
    Nothing,
    /// Bodies stop at `CUT` with the connection open.
    Stall,
}

struct World {
    files: HashMap<String, Vec<u8>>,
    commit: String,
    /// Answers everything with this status when set.
    status: Option<u16>,
    fault: Fault,
    ranges: bool,
    storage: String,
    log: Vec<Seen>,
}

struct Server {
    endpoint: String,
    world: Arc<Mutex<World>>,
}

fn hex_sha256(data: &[u8]) -> String {
    Sha256::digest(data).iter().fold(String::new(), |mut out, byte| {
        write!(out, "{byte:02x}").unwrap();
        out
    })
}

/// Bytes that differ from position to position, so that a resume at the wrong place shows.
fn content(seed: u32, len: u32) -> Vec<u8> {
    (0..len).map(|i| ((i ^ seed).wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

fn sharded() -> HashMap<String, Vec<u8>> {
    let index = format!(r#"{{"metadata": {{}}, "weight_map": {{"a": "{}", "b": "{}", "c": "{}"}}}}"#, SHARDS[0], SHARDS[1], SHARDS[0]);
    HashMap::from([
        ("config.json".to_owned(), br#"{"model_type": "nemotron_h"}"#.to_vec()),
        ("tokenizer.json".to_owned(), b"{}".to_vec()),
        ("tokenizer_config.json".to_owned(), b"{ }".to_vec()),
        ("model.safetensors.index.json".to_owned(), index.into_bytes()),
        (SHARDS[0].to_owned(), content(1, 400_000)),
        (SHARDS[1].to_owned(), content(2, 300_001)),
    ])
}

impl Server {
    fn start(files: HashMap<String, Vec<u8>>) -> Self {
        let hub = TcpListener::bind("127.0.0.1:0").unwrap();
        let storage = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = |listener: &TcpListener| format!("http://{}", listener.local_addr().unwrap());
        let endpoint = address(&hub);
        let world = Arc::new(Mutex::new(World {
            files,
            commit: FIRST.into(),
            status: None,
            fault: Fault::None,
            ranges: true,
            storage: address(&storage),
            log: Vec::new(),
        }));
        for (listener, is_storage) in [(hub, false), (storage, true)] {
            let world = Arc::clone(&world);
            thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let world = Arc::clone(&world);
                    // A client that hangs up is part of several tests.
                    thread::spawn(move || drop(answer(&stream, &world, is_storage)));
                }
            });
        }
        Self { endpoint, world }
    }

    fn hub(&self, home: &Path) -> Hub {
        Hub {
            endpoint: self.endpoint.clone(),
            home: home.to_path_buf(),
            token: Some("secret".into()),
            offline: false,
            retry_wait: Duration::from_millis(2),
        }
    }

    fn set(&self, change: impl FnOnce(&mut World)) {
        change(&mut self.world.lock().unwrap());
    }

    fn log(&self) -> Vec<Seen> {
        self.world.lock().unwrap().log.clone()
    }

    /// Ranges of the requests for the body of `file` that reached the storage host.
    fn bodies(&self, file: &str) -> Vec<Option<u64>> {
        self.log().iter().filter(|seen| seen.storage && seen.method == "GET" && seen.file == file).map(|seen| seen.range).collect()
    }

    fn assert_whole(&self, dir: &Path) {
        for (file, data) in &self.world.lock().unwrap().files {
            assert!(std::fs::read(dir.join(file)).unwrap() == *data, "{file} differs from the server's");
        }
    }
}

/// Answers one request and closes the connection.
fn answer(stream: &TcpStream, world: &Mutex<World>, storage: bool) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let mut words = line.split_whitespace().map(str::to_owned);
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let (mut range, mut token) = (None, false);
    loop {
        let mut header = String::new();
        reader.read_line(&mut header)?;
        let header = header.trim().to_ascii_lowercase();
        if header.is_empty() {
            break;
        }
        range = range.or_else(|| header.strip_prefix("range: bytes=")?.trim_end_matches('-').parse::<u64>().ok());
        token |= header == "authorization: bearer secret";
    }

    let (head, body, hang) = {
        let mut world = world.lock().unwrap();
        let file = path.rsplit('/').next().unwrap_or_default().to_owned();
        world.log.push(Seen { method: method.clone(), file: file.clone(), storage, range, token });
        let (head, mut body) = respond(&world, &path, &file, storage, range);
        let mut hang = false;
        if storage && method == "GET" {
            match world.fault {
                Fault::None => {}
                Fault::CutOnce => (body.truncate(CUT), world.fault = Fault::None).1,
                Fault::CutForGood => (body.truncate(CUT), world.fault = Fault::Nothing).1,
                Fault::Nothing => body.clear(),
                Fault::Stall => {
                    body.truncate(CUT);
                    hang = true;
                }
            }
        }
        (head, if method == "HEAD" { Vec::new() } else { body }, hang)
    };
    let mut stream = stream;
    stream.write_all(head.as_bytes())?;
    stream.write_all(&body)?;
    stream.flush()?;
    if hang {
        thread::sleep(Duration::from_secs(60));
    }
    Ok(())
}

fn respond(world: &World, path: &str, file: &str, storage: bool, range: Option<u64>) -> (String, Vec<u8>) {
    let reply = |status: &str, headers: &str, body: &[u8]| {
        (format!("HTTP/1.1 {status}\r\n{headers}Content-Length: {}\r\nConnection: close\r\n\r\n", body.len()), body.to_vec())
    };
    if let Some(status) = world.status {
        return reply(&format!("{status} No"), "", b"no");
    }
    let resolve = format!("/{ID}/resolve/");
    let known = path.strip_prefix(&resolve).and_then(|rest| rest.split('/').next()).is_none_or(|rev| rev == "main" || rev == world.commit);
    let Some(data) = world.files.get(file).filter(|_| known && (storage || path.contains(ID))) else {
        return reply("404 Not Found", "X-Error-Code: EntryNotFound\r\n", b"Entry not found");
    };
    let commit = &world.commit;
    if path.starts_with(&resolve) {
        if file.ends_with(".safetensors") {
            let (etag, size, to) = (hex_sha256(data), data.len(), &world.storage);
            let headers = format!(
                "X-Repo-Commit: {commit}\r\nX-Linked-Etag: \"{etag}\"\r\nX-Linked-Size: {size}\r\nETag: \"not-the-files\"\r\nLocation: {to}/signed/{file}\r\n"
            );
            return reply("302 Found", &headers, b"Found. Redirecting");
        }
        return reply("307 Temporary Redirect", &format!("Location: /api/resolve-cache/models/{ID}/{commit}/{file}\r\n"), b"moved");
    }
    let headers = format!("X-Repo-Commit: {commit}\r\nETag: W/\"{}\"\r\n", &hex_sha256(data)[..40]);
    let from = range.filter(|_| world.ranges).map(|from| usize::try_from(from).unwrap());
    match from {
        None => reply("200 OK", &headers, data),
        Some(from) if from >= data.len() => reply("416 Range Not Satisfiable", &headers, b""),
        Some(from) => {
            let (last, size) = (data.len() - 1, data.len());
            reply("206 Partial Content", &format!("{headers}Content-Range: bytes {from}-{last}/{size}\r\n"), &data[from..])
        }
    }
}

fn repo_dir(home: &TempDir) -> PathBuf {
    home.path().join("hub/models--owner--tiny")
}

fn part_sizes(home: &TempDir) -> Vec<u64> {
    let blobs = std::fs::read_dir(repo_dir(home).join("blobs")).unwrap().flatten();
    blobs.filter(|entry| entry.path().extension().is_some_and(|e| e == "part")).map(|entry| entry.metadata().unwrap().len()).collect()
}

#[test]
fn sharded_checkpoint_arrives_whole_in_the_shared_layout() {
    let (server, home) = (Server::start(sharded()), TempDir::new().unwrap());
    let reports = Mutex::new(Vec::new());
    let monitor = Monitor::new(|report| reports.lock().unwrap().push(report), CancelToken::default());
    let dir = server.hub(home.path()).fetch(ID, None, &monitor).unwrap();

    server.assert_whole(&dir);
    assert_eq!(dir, repo_dir(&home).join("snapshots").join(FIRST));
    assert_eq!(std::fs::read_to_string(repo_dir(&home).join("refs/main")).unwrap(), FIRST);
    let blob = hex_sha256(&server.world.lock().unwrap().files[SHARDS[0]]);
    assert!(repo_dir(&home).join("blobs").join(blob).is_file());
    assert!(repo_dir(&home).join(".no_exist").join(FIRST).join("generation_config.json").is_file());
    assert!(part_sizes(&home).is_empty());

    // The token goes to the hub, never to the storage host.
    assert!(server.log().iter().all(|seen| seen.token != seen.storage));

    let reports = reports.lock().unwrap();
    assert!(reports.contains(&Report::Stage { name: "download".into(), total: 6 }));
    let last = reports.iter().rev().find(|report| matches!(report, Report::Step { .. })).unwrap();
    assert_eq!(*last, Report::Step { done: 6, note: format!("{}: 300.0 kB", SHARDS[1]) });
}

#[test]
fn single_file_checkpoint() {
    let mut files = sharded();
    files.retain(|name, _| !name.contains("safetensors"));
    files.insert("model.safetensors".into(), content(3, 1000));
    let (server, home) = (Server::start(files), TempDir::new().unwrap());
    let dir = server.hub(home.path()).fetch(ID, Some(FIRST), &Monitor::silent()).unwrap();
    server.assert_whole(&dir);
    assert!(!server.log().iter().any(|seen| seen.file.contains("index")));
}

#[test]
fn shards_in_a_folder_of_the_model() {
    let mut files = sharded();
    let index = format!(r#"{{"weight_map": {{"a": "weights/{}"}}}}"#, SHARDS[0]);
    files.insert("model.safetensors.index.json".into(), index.into_bytes());
    let (server, home) = (Server::start(files), TempDir::new().unwrap());
    let dir = server.hub(home.path()).fetch(ID, None, &Monitor::silent()).unwrap();
    assert!(std::fs::read(dir.join("weights").join(SHARDS[0])).unwrap() == sharded()[SHARDS[0]]);
}

#[test]
fn config_alone_then_the_rest() {
    let (server, home) = (Server::start(sharded()), TempDir::new().unwrap());
    let hub = server.hub(home.path());
    let dir = hub.fetch_config(ID, None, &Monitor::silent()).unwrap();
    assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 1);
    assert!(dir.join("config.json").is_file());
    assert_eq!(hub.fetch(ID, None, &Monitor::silent()).unwrap(), dir);
    server.assert_whole(&dir);
}

#[test]
fn interrupted_transfer_is_resumed_within_the_call() {
    let (server, home) = (Server::start(sharded()), TempDir::new().unwrap());
    server.set(|world| world.fault = Fault::CutOnce);
    let dir = server.hub(home.path()).fetch(ID, None, &Monitor::silent()).unwrap();
    server.assert_whole(&dir);
    assert_eq!(server.bodies(SHARDS[0]), [None, Some(CUT as u64)]);
}

#[test]
fn interrupted_download_is_resumed_by_the_next_call() {
    let (server, home) = (Server::start(sharded()), TempDir::new().unwrap());
    server.set(|world| world.fault = Fault::CutForGood);
    let hub = server.hub(home.path());
    let error = hub.fetch(ID, None, &Monitor::silent()).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Run, "{error}");
    assert!(error.message.contains("150.0 kB of 400.0 kB"), "{error}");
    assert!(error.hint.unwrap().contains("resumes"));
    assert_eq!(part_sizes(&home), [CUT as u64]);

    server.set(|world| {
        world.fault = Fault::None;
        world.log.clear();
    });
    let dir = hub.fetch(ID, None, &Monitor::silent()).unwrap();
    server.assert_whole(&dir);
    assert_eq!(server.bodies(SHARDS[0]), [Some(CUT as u64)]);
    assert_eq!(server.bodies(SHARDS[1]), [None]);
}

/// hf-hub 0.5 appended the whole file to what was there.
#[test]
fn server_without_ranges_sends_the_file_again() {
    let (server, home) = (Server::start(sharded()), TempDir::new().unwrap());
    server.set(|world| {
        world.fault = Fault::CutOnce;
        world.ranges = false;
    });
    let dir = server.hub(home.path()).fetch(ID, None, &Monitor::silent()).unwrap();
    server.assert_whole(&dir);
}

#[test]
fn damaged_partial_file_is_noticed_and_replaced() {
    let (server, home) = (Server::start(sharded()), TempDir::new().unwrap());
    let blob = repo_dir(&home).join("blobs").join(hex_sha256(&sharded()[SHARDS[0]]));
    std::fs::create_dir_all(blob.parent().unwrap()).unwrap();
    std::fs::write(blob.with_extension("part"), vec![7; 1000]).unwrap();
    let warned = Mutex::new(false);
    let sink = |report| *warned.lock().unwrap() |= matches!(report, Report::Warning(_));
    let dir = server.hub(home.path()).fetch(ID, None, &Monitor::new(sink, CancelToken::default())).unwrap();
    server.assert_whole(&dir);
    assert_eq!(server.bodies(SHARDS[0]), [Some(1000), None]);
    assert!(warned.into_inner().unwrap());
}

/// hf-hub 0.5 asked for bytes behind the end for ever (416).
#[test]
fn partial_file_that_is_already_whole_needs_no_request() {
    let (server, home) = (Server::start(sharded()), TempDir::new().unwrap());
    let shard = &sharded()[SHARDS[0]];
    let blob = repo_dir(&home).join("blobs").join(hex_sha256(shard));
    std::fs::create_dir_all(blob.parent().unwrap()).unwrap();
    std::fs::write(blob.with_extension("part"), shard).unwrap();
    let dir = server.hub(home.path()).fetch(ID, None, &Monitor::silent()).unwrap();
    server.assert_whole(&dir);
    assert!(server.bodies(SHARDS[0]).is_empty());
}

#[test]
fn second_fetch_needs_no_network() {
    let (server, home) = (Server::start(sharded()), TempDir::new().unwrap());
    let hub = server.hub(home.path());
    let dir = hub.fetch(ID, None, &Monitor::silent()).unwrap();
    server.set(|world| world.log.clear());
    for revision in [None, Some("main"), Some(FIRST)] {
        assert_eq!(hub.fetch(ID, revision, &Monitor::silent()).unwrap(), dir);
        assert_eq!(hub.fetch_config(ID, revision, &Monitor::silent()).unwrap(), dir);
    }
    assert!(server.log().is_empty());
}

#[test]
fn weights_in_the_cache_are_used_when_optional_files_cannot_be_asked_for() {
    let (server, home) = (Server::start(sharded()), TempDir::new().unwrap());
    let hub = server.hub(home.path());
    let dir = hub.fetch(ID, None, &Monitor::silent()).unwrap();
    // As another program leaves a cache that it filled with the weights alone.
    std::fs::remove_dir_all(repo_dir(&home).join(".no_exist")).unwrap();
    server.set(|world| world.status = Some(401));
    let warnings = Mutex::new(Vec::new());
    let sink = |report| {
        if let Report::Warning(line) = report {
            warnings.lock().unwrap().push(line);
        }
    };
    assert_eq!(hub.fetch(ID, None, &Monitor::new(sink, CancelToken::default())).unwrap(), dir);
    let warnings = warnings.into_inner().unwrap();
    assert!(warnings[0].contains("without generation_config.json, special_tokens_map.json"), "{warnings:?}");
}

#[test]
fn moved_branch_brings_a_consistent_snapshot_and_keeps_what_did_not_change() {
    let (server, home) = (Server::start(sharded()), TempDir::new().unwrap());
    server.set(|world| world.fault = Fault::CutForGood);
    let hub = server.hub(home.path());
    hub.fetch(ID, None, &Monitor::silent()).unwrap_err();
    server.set(|world| {
        world.fault = Fault::None;
        world.commit = SECOND.into();
        world.files.insert("config.json".into(), b"{\"new\": 1}".to_vec());
        world.log.clear();
    });
    let dir = hub.fetch(ID, None, &Monitor::silent()).unwrap();
    assert!(dir.ends_with(SECOND));
    server.assert_whole(&dir);
    assert_eq!(std::fs::read_to_string(repo_dir(&home).join("refs/main")).unwrap(), SECOND);
    assert_eq!(server.bodies(SHARDS[0]), [Some(CUT as u64)]);
}

#[test]
fn offline_uses_the_cache_and_names_what_it_lacks() {
    let (server, home) = (Server::start(sharded()), TempDir::new().unwrap());
    let online = server.hub(home.path());
    let offline = Hub { offline: true, ..online.clone() };

    let error = offline.fetch(ID, None, &Monitor::silent()).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Input);
    assert!(error.message.starts_with("config.json of owner/tiny"), "{error}");
    assert!(error.hint.unwrap().contains("HF_HUB_OFFLINE"));
    assert!(server.log().is_empty());

    server.set(|world| world.fault = Fault::CutForGood);
    online.fetch(ID, None, &Monitor::silent()).unwrap_err();
    let error = offline.fetch(ID, None, &Monitor::silent()).unwrap_err();
    assert!(error.message.starts_with(SHARDS[0]), "{error}");
    offline.fetch_config(ID, None, &Monitor::silent()).unwrap();

    server.set(|world| world.fault = Fault::None);
    let dir = online.fetch(ID, None, &Monitor::silent()).unwrap();
    server.set(|world| world.log.clear());
    assert_eq!(offline.fetch(ID, None, &Monitor::silent()).unwrap(), dir);
    assert!(server.log().is_empty());
}

#[test]
fn refused_model_hints_at_licence_and_token() {
    for status in [401, 403] {
        let (server, home) = (Server::start(sharded()), TempDir::new().unwrap());
        server.set(|world| world.status = Some(status));
        let error = server.hub(home.path()).fetch(ID, None, &Monitor::silent()).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Input);
        assert!(error.message.contains(&status.to_string()) && error.message.contains(ID), "{error}");
        let hint = error.hint.unwrap();
        assert!(hint.contains("licence") && hint.contains("HF_TOKEN") && hint.contains(ID), "{hint}");
    }
}

#[test]
fn token_file_is_read() {
    let (server, home) = (Server::start(sharded()), TempDir::new().unwrap());
    std::fs::write(home.path().join("token"), "secret\n").unwrap();
    let hub = Hub { token: None, ..server.hub(home.path()) };
    hub.fetch_config(ID, None, &Monitor::silent()).unwrap();
    assert!(server.log().iter().all(|seen| seen.token));
}

#[test]
fn unknown_model_names_id_file_and_revision() {
    let (server, home) = (Server::start(sharded()), TempDir::new().unwrap());
    let hub = server.hub(home.path());
    for (id, revision) in [("owner/other", "main"), (ID, "no/such")] {
        let error = hub.fetch(id, Some(revision), &Monitor::silent()).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Input);
        assert!([id, revision, "config.json", "404"].iter().all(|fact| error.message.contains(fact)), "{error}");
        assert!(error.hint.unwrap().contains("spelling"));
    }
}

#[test]
fn model_without_safetensors() {
    let mut files = sharded();
    files.retain(|name, _| !name.contains("safetensors"));
    let (server, home) = (Server::start(files), TempDir::new().unwrap());
    let error = server.hub(home.path()).fetch(ID, None, &Monitor::silent()).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Input);
    assert!(error.message.contains("neither model.safetensors nor"), "{error}");
}

#[test]
fn nobody_listening_fails_soon_and_says_where() {
    let home = TempDir::new().unwrap();
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let hub = Hub {
        endpoint: format!("http://{free}/"),
        home: home.path().to_path_buf(),
        token: None,
        offline: false,
        retry_wait: Duration::from_millis(500),
    };
    let start = Instant::now();
    let error = hub.fetch(ID, None, &Monitor::silent()).unwrap_err();
    assert!(start.elapsed() < Duration::from_secs(3));
    assert_eq!(error.kind, ErrorKind::Input);
    assert!(error.message.contains(&free.to_string()), "{error}");
    let hint = error.hint.unwrap();
    assert!(["HF_ENDPOINT", "local directory", "HF_HUB_OFFLINE"].iter().all(|way| hint.contains(way)), "{hint}");
}

#[test]
fn busy_server_is_asked_again_and_then_reported() {
    let (server, home) = (Server::start(sharded()), TempDir::new().unwrap());
    server.set(|world| world.status = Some(503));
    let error = server.hub(home.path()).fetch(ID, None, &Monitor::silent()).unwrap_err();
    assert!(error.message.contains("503"), "{error}");
    assert_eq!(server.log().len(), 5);
}

#[test]
fn index_that_points_outside_is_refused() {
    for entry in ["../../../outside.safetensors", "/tmp/outside.safetensors", "sub/../../x.safetensors", r"..\\x.safetensors", "x.bin"] {
        let mut files = sharded();
        files.insert("model.safetensors.index.json".into(), format!(r#"{{"weight_map": {{"a": "{entry}"}}}}"#).into_bytes());
        let (server, home) = (Server::start(files), TempDir::new().unwrap());
        let hub = server.hub(home.path());
        hub.fetch_config(ID, None, &Monitor::silent()).unwrap();
        // From the network, then from the cache.
        for hub in [hub.clone(), Hub { offline: true, ..hub }] {
            let error = hub.fetch(ID, None, &Monitor::silent()).unwrap_err();
            assert_eq!(error.kind, ErrorKind::Input);
            assert!(error.message.contains(entry), "{error}");
        }
        assert!(server.log().iter().all(|seen| !seen.file.contains("outside") && !seen.storage));
    }
}

#[test]
fn cancelling_stops_inside_a_stalled_file_and_keeps_its_bytes() {
    let (server, home) = (Server::start(sharded()), TempDir::new().unwrap());
    server.set(|world| world.fault = Fault::Stall);
    let cancel = CancelToken::default();
    let later = cancel.clone();
    let watched = repo_dir(&home).join("blobs").join(hex_sha256(&sharded()[SHARDS[0]])).with_extension("part");
    let canceller = thread::spawn(move || {
        let end = Instant::now() + Duration::from_secs(10);
        while Instant::now() < end && std::fs::metadata(&watched).map_or(0, |m| m.len()) < CUT as u64 {
            thread::sleep(Duration::from_millis(5));
        }
        later.cancel();
        Instant::now()
    });
    let error = server.hub(home.path()).fetch(ID, None, &Monitor::new(|_| {}, cancel)).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Cancelled);
    assert!(canceller.join().unwrap().elapsed() < Duration::from_secs(2));
    assert_eq!(part_sizes(&home), [CUT as u64]);

    server.set(|world| world.fault = Fault::None);
    let dir = server.hub(home.path()).fetch(ID, None, &Monitor::silent()).unwrap();
    server.assert_whole(&dir);
    assert_eq!(server.bodies(SHARDS[0]), [None, Some(CUT as u64)]);
}

#[test]
fn cancelling_between_files() {
    let (server, home) = (Server::start(sharded()), TempDir::new().unwrap());
    let cancel = CancelToken::default();
    let sink = |report| {
        if matches!(report, Report::Step { done: 2, .. }) {
            cancel.cancel();
        }
    };
    let error = server.hub(home.path()).fetch(ID, None, &Monitor::new(sink, cancel.clone())).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Cancelled);
    assert!(server.bodies(SHARDS[0]).is_empty());
}

#[test]
fn two_downloads_at_once_share_the_work() {
    let (server, home) = (Server::start(sharded()), TempDir::new().unwrap());
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| server.assert_whole(&server.hub(home.path()).fetch(ID, None, &Monitor::silent()).unwrap()));
        }
    });
    for shard in SHARDS {
        assert_eq!(server.bodies(shard), [None]);
    }
}

#[test]
fn ids_and_paths_are_told_apart() {
    for id in ["nvidia/Nemotron-H-8B-Base-8K", "a/b", "ibm-ai-platform/Bamba-9B_v2.1"] {
        assert!(looks_like_id(id), "{id}");
    }
    // `tests/golden` exists where the tests run.
    for other in ["gpt2", "a/b/c", "/a/b", "./model", "../model", "a/..", "a/", "/b", "a b/c", r"a\b/c", "", "tests/golden"] {
        assert!(!looks_like_id(other), "{other}");
    }
}

#[test]
fn requests_that_make_no_sense_are_refused_before_any_network() {
    let (server, home) = (Server::start(sharded()), TempDir::new().unwrap());
    let hub = server.hub(home.path());
    let bad = Hub { endpoint: "huggingface.co".into(), ..hub.clone() };
    for (hub, id, revision) in [(&hub, "tiny", "main"), (&hub, "../tiny", "main"), (&hub, ID, "../main"), (&bad, ID, "main")] {
        let error = hub.fetch(id, Some(revision), &Monitor::silent()).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Input);
        assert!(error.hint.is_some());
    }
    assert!(server.log().is_empty());
}
