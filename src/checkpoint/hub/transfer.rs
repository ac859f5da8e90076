//! Asking a hub for the files of one repository: what it says about a file, its bytes from a position on, and what went
//! wrong. Start with [`Source`]; nothing here knows the cache.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use hf_hub::RepoType;
use serde::Deserialize;
use ureq::http::{HeaderMap, Response, StatusCode};
use ureq::{Agent, Body};

use super::{Hub, is_commit, is_file_name, is_id, is_inner_path};
use crate::error::{Error, Result};
use crate::monitor::Monitor;

/// Requests for one thing before giving up; a transfer that got further starts counting again.
pub const ATTEMPTS: u32 = 5;
/// Redirects followed for one request.
const HOPS: usize = 10;
/// Connecting to a machine that does not answer ends after this time.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(8);
/// A connection on which nothing arrives for this time counts as lost.
const STALL_TIMEOUT: Duration = Duration::from_secs(30);
/// How often waiting loops look at the monitor.
const POLL: Duration = Duration::from_millis(50);
/// Time between two progress notes inside a file.
const NOTE_EVERY: Duration = Duration::from_millis(250);
/// Bytes read at a time, from the network and from disk.
pub const CHUNK: usize = 1 << 17;
/// Longest listing of a repository that is read.
const MAX_LISTING: u64 = 16 << 20;

/// What the hub says about a file.
pub struct Remote {
    pub commit: String,
    pub etag: String,
    pub size: u64,
}

/// What a revision of a repository holds.
#[derive(Deserialize)]
pub struct Listing {
    #[serde(rename = "sha")]
    pub commit: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

impl Listing {
    /// Paths of the files that lie inside the repository.
    pub fn files(&self) -> Vec<String> {
        self.siblings.iter().map(|file| file.rfilename.clone()).filter(|file| is_inner_path(file)).collect()
    }
}

/// Why one request did not do its work.
pub enum Trouble {
    /// Asking again would not help.
    Fatal(Error),
    /// No connection could be made.
    Unreachable(String),
    /// The connection broke, stalled, or the server was busy.
    Passing(String),
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        Self::Fatal(error)
    }
}

impl From<ureq::Error> for Trouble {
    fn from(error: ureq::Error) -> Self {
        use io::ErrorKind as Io;
        use ureq::{Error as Http, Timeout};
        let text = error.to_string();
        match error {
            Http::Io(e)
                if matches!(e.kind(), Io::ConnectionReset | Io::ConnectionAborted | Io::UnexpectedEof | Io::BrokenPipe | Io::TimedOut) =>
            {
                Self::Passing(text)
            }
            Http::Timeout(Timeout::Connect | Timeout::Resolve) => Self::Unreachable(text),
            Http::Timeout(_) | Http::Protocol(_) | Http::BodyStalled => Self::Passing(text),
            _ => Self::Unreachable(text),
        }
    }
}

/// One repository of a hub at one revision.
pub struct Source<'a> {
    pub hub: &'a Hub,
    pub id: &'a str,
    pub revision: &'a str,
    pub monitor: &'a Monitor<'a>,
    endpoint: &'a str,
    kind: RepoType,
    token: Option<String>,
    agent: Agent,
}

impl<'a> Source<'a> {
    /// The repository `id` (`owner/name`) at `revision`; `token` is for the hub when the settings have none.
    pub fn new(
        hub: &'a Hub,
        kind: RepoType,
        id: &'a str,
        revision: &'a str,
        token: Option<String>,
        monitor: &'a Monitor<'a>,
    ) -> Result<Self> {
        if !is_id(id) {
            return Err(Error::input(format!("{id:?} is not a hub id")).hint("write owner/name, or the path of a local directory"));
        }
        if !is_inner_path(revision) {
            return Err(Error::input(format!("{revision:?} is not a revision")).hint("name a branch, a tag or a commit of the repository"));
        }
        let endpoint = hub.endpoint.trim_end_matches('/');
        let host = endpoint.strip_prefix("http://").or_else(|| endpoint.strip_prefix("https://")).unwrap_or_default();
        if host.is_empty() {
            return Err(Error::input(format!("the hub address {endpoint:?} is not an http or https address"))
                .hint("set HF_ENDPOINT to one such as https://huggingface.co, or unset it"));
        }
        let mut agent = Agent::config_builder()
            .user_agent(concat!("strata/", env!("CARGO_PKG_VERSION")))
            // A compressed body would have other byte positions than the file.
            .accept_encoding("identity")
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_resolve(Some(CONNECT_TIMEOUT))
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_recv_response(Some(STALL_TIMEOUT))
            .timeout_per_read(Some(STALL_TIMEOUT));
        // A proxy could not reach a hub that runs on this machine.
        if ["127.", "localhost", "[::1]"].iter().any(|local| host.starts_with(local)) {
            agent = agent.proxy(None);
        }
        let token = hub.token.clone().or(token);
        Ok(Self { hub, id, revision, monitor, endpoint, kind, token, agent: agent.build().into() })
    }

    /// `owner/name (revision)` for messages.
    pub fn name(&self) -> String {
        format!("{} (revision {})", self.id, self.revision)
    }

    /// Where the hub keeps repositories of this kind, in its addresses: nothing for models, `datasets/` for datasets.
    fn folder(&self) -> &'static str {
        match self.kind {
            RepoType::Model => "",
            RepoType::Dataset => "datasets/",
            RepoType::Space => "spaces/",
        }
    }

    fn url(&self, revision: &str, file: &str) -> String {
        format!("{}/{}{}/resolve/{}/{}", self.endpoint, self.folder(), self.id, encode(revision, ""), encode(file, "/"))
    }

    /// Files and commit of `revision`; `None` when the hub has no such repository or revision.
    pub fn listing(&self, revision: &str) -> Result<Option<Listing>> {
        // The models' folder in the address of the interface has a name, unlike in those of files.
        let folder = if self.folder().is_empty() { "models/" } else { self.folder() };
        let address = format!("{}/api/{folder}{}/revision/{}", self.endpoint, self.id, encode(revision, ""));
        self.patiently("the list of files", || self.try_listing(&address))
    }

    fn try_listing(&self, address: &str) -> Result<Option<Listing>, Trouble> {
        let mut url = address.to_owned();
        for _ in 0..HOPS {
            let mut response = self.ask(false, &url, 0)?;
            if let Some(next) = redirect(&response, &url) {
                url = next;
                continue;
            }
            if response.status() == StatusCode::NOT_FOUND {
                return Ok(None);
            }
            if !response.status().is_success() {
                return Err(self.refusal(&response, "the list of files"));
            }
            let text = response.body_mut().with_config().limit(MAX_LISTING).read_to_vec()?;
            let listing: Option<Listing> = serde_json::from_slice(&text).ok();
            return match listing.filter(|listing| is_commit(&listing.commit)) {
                Some(listing) => Ok(Some(listing)),
                None => Err(Trouble::Fatal(
                    Error::input(format!("the answer of {} for the list of files of {} is not one", self.endpoint, self.name()))
                        .hint("HF_ENDPOINT must be the address of a Hugging Face hub or of a full mirror of one"),
                )),
            };
        }
        Err(Trouble::Passing(format!("{} redirects for ever", self.endpoint)))
    }

    /// One request, without following redirects. `from`: the first byte wanted.
    fn ask(&self, head: bool, url: &str, from: u64) -> Result<Response<Body>, ureq::Error> {
        let mut request = if head { self.agent.head(url) } else { self.agent.get(url) };
        if from > 0 {
            request = request.header("range", format!("bytes={from}-"));
        }
        // Storage hosts that the hub redirects to have signed addresses; the token is none of their business.
        if let Some(token) = &self.token
            && origin(url) == origin(self.endpoint)
        {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        request.call()
    }

    /// What the hub knows of `file`; `None` when it has no such file.
    pub fn head(&self, revision: &str, file: &str) -> Result<Option<Remote>> {
        self.patiently(file, || self.try_head(revision, file))
    }

    /// Asks for `what` until there is an answer or no hope of one.
    fn patiently<T>(&self, what: &str, ask: impl Fn() -> Result<Option<T>, Trouble>) -> Result<Option<T>> {
        let mut failures = 0;
        loop {
            self.monitor.check()?;
            let (cause, last) = match ask() {
                Ok(found) => return Ok(found),
                Err(Trouble::Fatal(error)) => return Err(error),
                Err(Trouble::Unreachable(cause)) => (cause, true),
                Err(Trouble::Passing(cause)) => (cause, failures + 1 >= ATTEMPTS),
            };
            if last {
                return Err(Error::input(format!("{} cannot be reached for {what} of {}: {cause}", self.endpoint, self.name())).hint(
                    "check the network, set HF_ENDPOINT to a mirror, name a local directory, or set HF_HUB_OFFLINE=1 to use only the cache",
                ));
            }
            self.sleep(self.hub.retry_wait * 2_u32.pow(failures))?;
            failures += 1;
        }
    }

    fn try_head(&self, revision: &str, file: &str) -> Result<Option<Remote>, Trouble> {
        let mut url = self.url(revision, file);
        let (mut commit, mut etag, mut size) = (None, None, None);
        // The hub describes the file before it redirects to where the content is; a moved model redirects before that.
        for _ in 0..HOPS {
            let response = self.ask(true, &url, 0)?;
            let headers = response.headers();
            commit = commit.or_else(|| text(headers, "x-repo-commit"));
            etag = etag.or_else(|| text(headers, "x-linked-etag"));
            size = size.or_else(|| text(headers, "x-linked-size"));
            match redirect(&response, &url) {
                Some(next) if commit.is_none() || etag.is_none() || size.is_none() => {
                    url = next;
                    continue;
                }
                Some(_) => {}
                None if response.status() == StatusCode::NOT_FOUND => return Ok(None),
                None if !response.status().is_success() => return Err(self.refusal(&response, file)),
                None => {
                    etag = etag.or_else(|| text(headers, "etag"));
                    size = size.or_else(|| text(headers, "content-length"));
                }
            }
            break;
        }
        let etag = etag.map(|etag| etag.trim_start_matches("W/").trim_matches('"').to_owned());
        let lacks = |what: &str| {
            Error::input(format!("the answer of {} for {file} of {} lacks a usable {what}", self.endpoint, self.name()))
                .hint("HF_ENDPOINT must be the address of a Hugging Face hub or of a full mirror of one")
        };
        Ok(Some(Remote {
            commit: commit.filter(|commit| is_file_name(commit)).ok_or_else(|| lacks("X-Repo-Commit header"))?,
            etag: etag.filter(|etag| is_file_name(etag)).ok_or_else(|| lacks("ETag header"))?,
            size: size.and_then(|size| size.parse().ok()).ok_or_else(|| lacks("size"))?,
        }))
    }

    /// Appends what the hub sends from byte `have` on; `have` follows what is on disk.
    pub fn receive(
        &self,
        commit: &str,
        file: &str,
        remote: &Remote,
        out: &mut File,
        have: &mut u64,
        report: &dyn Fn(u64) -> Result<()>,
    ) -> Result<(), Trouble> {
        let fail = |e: &io::Error| Trouble::Fatal(Error::io("writing the download of", Path::new(file), e));
        self.monitor.check()?;
        let mut url = self.url(commit, file);
        let mut response = self.ask(false, &url, *have)?;
        for _ in 0..HOPS {
            let Some(next) = redirect(&response, &url) else { break };
            url = next;
            response = self.ask(false, &url, *have)?;
        }
        match response.status() {
            StatusCode::PARTIAL_CONTENT => {
                let range = text(response.headers(), "content-range").unwrap_or_default();
                if !range.starts_with(&format!("bytes {have}-")) {
                    return Err(Trouble::Passing(format!("asked for bytes from {have} on, the server sent {range:?}")));
                }
            }
            // A server that does not know ranges sends everything, one that refuses this range must send everything.
            StatusCode::OK => *have = 0,
            StatusCode::RANGE_NOT_SATISFIABLE => {
                *have = 0;
                out.set_len(0).map_err(|e| fail(&e))?;
                return Err(Trouble::Passing("the server cannot continue where the download stopped".into()));
            }
            StatusCode::NOT_FOUND => return Err(self.not_found(file).into()),
            _ => return Err(self.refusal(&response, file)),
        }
        out.set_len(*have).and_then(|()| out.seek(SeekFrom::Start(*have))).map_err(|e| fail(&e))?;

        let chunks = pump(response.into_body());
        let mut noted = Instant::now();
        while *have < remote.size {
            let chunk = match chunks.recv_timeout(POLL) {
                Ok(chunk) => chunk.map_err(|e| Trouble::Passing(format!("the connection broke: {e}")))?,
                Err(RecvTimeoutError::Timeout) => {
                    self.monitor.check()?;
                    continue;
                }
                Err(RecvTimeoutError::Disconnected) => return Err(Trouble::Passing("the connection was closed too early".into())),
            };
            if *have + chunk.len() as u64 > remote.size {
                return Err(Trouble::Passing(format!("the server sent more than the {} bytes it announced", remote.size)));
            }
            out.write_all(&chunk).map_err(|e| fail(&e))?;
            *have += chunk.len() as u64;
            if noted.elapsed() >= NOTE_EVERY {
                noted = Instant::now();
                report(*have)?;
            }
            self.monitor.check()?;
        }
        Ok(())
    }

    /// Sleeps in short pieces, so that cancelling does not wait.
    pub fn sleep(&self, time: Duration) -> Result<()> {
        let end = Instant::now() + time;
        loop {
            self.monitor.check()?;
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            thread::sleep(left.min(POLL));
        }
    }

    pub fn not_found(&self, file: &str) -> Error {
        Error::input(format!("{file} of {} was not found at {} (404)", self.name(), self.endpoint))
            .hint("check the spelling of the id and of the revision")
    }

    /// What an answer that is neither success, redirect nor 404 means.
    fn refusal(&self, response: &Response<Body>, file: &str) -> Trouble {
        let status = response.status();
        if matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) {
            let page = format!("{}/{}{}", self.endpoint, self.folder(), self.id);
            let token = if self.token.is_some() { "a token of that account" } else { "a token (none was found)" };
            return Trouble::Fatal(
                Error::input(format!("{} refused {file} of {} ({})", self.endpoint, self.name(), status.as_u16())).hint(format!(
                    "for a gated or private repository accept the licence on {page} and set HF_TOKEN to {token}; \
                     one that does not exist is answered alike, so check the spelling too"
                )),
            );
        }
        if status.is_server_error() || matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT) {
            return Trouble::Passing(format!("the server answered {status}"));
        }
        Trouble::Fatal(
            Error::input(format!("{} answered {status} for {file} of {}", self.endpoint, self.name()))
                .hint("check the id, the revision and HF_ENDPOINT"),
        )
    }
}

/// Reads a body on a thread of its own, so that the receiving side can be cancelled while the network stalls.
/// The thread ends with the body, with the first error (at the latest after [`STALL_TIMEOUT`]), or when nobody listens.
fn pump(body: Body) -> Receiver<io::Result<Vec<u8>>> {
    let (send, receive) = mpsc::sync_channel(4);
    thread::spawn(move || {
        let mut body = body.into_reader();
        loop {
            let mut chunk = vec![0; CHUNK];
            let (chunk, last) = match body.read(&mut chunk) {
                Ok(0) => return,
                Ok(n) => {
                    chunk.truncate(n);
                    (Ok(chunk), false)
                }
                Err(error) => (Err(error), true),
            };
            if send.send(chunk).is_err() || last {
                return;
            }
        }
    });
    receive
}

/// A header's value, when it is text.
fn text(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_owned)
}

/// Where a redirect leads, as a whole address.
fn redirect(response: &Response<Body>, url: &str) -> Option<String> {
    if !response.status().is_redirection() {
        return None;
    }
    let location = text(response.headers(), "location")?;
    Some(if location.contains("://") {
        location
    } else if location.starts_with("//") {
        let scheme = url.split_once("//").map_or("https:", |(scheme, _)| scheme);
        format!("{scheme}{location}")
    } else if location.starts_with('/') {
        format!("{}{location}", origin(url))
    } else {
        let folder = url.split(['?', '#']).next().and_then(|path| path.rsplit_once('/')).map_or(url, |(folder, _)| folder);
        format!("{folder}/{location}")
    })
}

/// Scheme, host and port of an address.
fn origin(url: &str) -> &str {
    let start = url.find("://").map_or(0, |at| at + 3);
    let end = url[start..].find(['/', '?', '#']).map_or(url.len(), |at| start + at);
    &url[..end]
}

/// Percent-encodes what an address cannot hold; characters of `keep` stay.
fn encode(text: &str, keep: &str) -> String {
    use std::fmt::Write as _;
    text.bytes().fold(String::with_capacity(text.len()), |mut out, byte| {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) || keep.as_bytes().contains(&byte) {
            out.push(char::from(byte));
        } else {
            // Writing to a String cannot fail.
            let _ = write!(out, "%{byte:02X}");
        }
        out
    })
}

/// A size for people, in decimal units as the hub's pages show it.
pub fn bytes(count: u64) -> String {
    match count as f64 {
        n if n >= 1e9 => format!("{:.2} GB", n / 1e9),
        n if n >= 1e6 => format!("{:.1} MB", n / 1e6),
        n if n >= 1e3 => format!("{:.1} kB", n / 1e3),
        n => format!("{n} B"),
    }
}
