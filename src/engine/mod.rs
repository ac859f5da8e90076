//! The worker that owns the device: jobs in over a bounded channel, events out.
//!
//! [`Engine::start`] spawns one thread. It takes [`Job`]s in order and reports [`Event`]s; [`Progress`] makes of them
//! how far a job is. The workbench and the headless commands use the same engine and the same jobs; neither holds a
//! tensor.

mod gpu;
pub mod inspect;
mod job;
mod measure;
mod observe;
pub mod playground;
mod progress;

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

pub use gpu::{GpuMonitor, GpuReading};
pub use job::{GenerateJob, Job, QuantizeJob, TraceJob};
pub use measure::{AllocateJob, SensitivityJob, StudyJob};
pub use observe::{BlockInputs, ObserveJob};
pub use playground::{PlaygroundJob, PlaygroundStep, Spoken};
pub use progress::{Progress, Snapshot};

use crate::analysis::sensitivity::Sensitivities;
use crate::analysis::study::StudyRow;
use crate::backend::DeviceChoice;
use crate::backend::cpu::Cpu;
use crate::backend::cuda::Cuda;
use crate::checkpoint::VariantManifest;
use crate::error::{Error, Result};
use crate::eval::run::Evaluated;
use crate::monitor::{CancelToken, PauseToken, Report};

/// Jobs that may wait.
const QUEUE: usize = 64;

/// Names a submitted job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobId(pub u64);

/// What happened to a job. Every submitted job ends with exactly one `Finished`.
#[derive(Debug)]
pub enum Event {
    Started {
        id: JobId,
        title: String,
    },
    /// A report of the running job: stages, steps, blocks, log lines.
    Report {
        id: JobId,
        report: Report,
    },
    /// A variant is on disk, new or found there.
    Quantized {
        id: JobId,
        name: String,
        path: std::path::PathBuf,
        manifest: Box<VariantManifest>,
        reused: bool,
    },
    /// A model was evaluated.
    Evaluated {
        id: JobId,
        evaluated: Box<Evaluated>,
    },
    /// A piece of generated text; `tokens` counts those generated so far.
    Text {
        id: JobId,
        piece: String,
        tokens: usize,
    },
    /// What each part of a model loses.
    Sensitivities {
        id: JobId,
        sensitivities: Box<Sensitivities>,
    },
    /// Allocated plans beside others.
    Study {
        id: JobId,
        rows: Vec<StudyRow>,
    },
    /// The inputs of a block's linears were observed.
    Observed {
        id: JobId,
        inputs: Box<BlockInputs>,
    },
    /// Both models of a playground said their next token.
    Spoken {
        id: JobId,
        step: Box<PlaygroundStep>,
    },
    Finished {
        id: JobId,
        outcome: Result<()>,
    },
}

/// What the engine runs on.
#[derive(Debug, Clone, Default)]
pub struct EngineOptions {
    /// Threads of the computing pool; `None` takes one for each processor.
    pub threads: Option<usize>,
    pub device: DeviceChoice,
}

/// The device, opened when the first job needs it.
#[derive(Default)]
struct Computer {
    cuda: Option<Cuda>,
}

impl Computer {
    fn cuda(&mut self, open: impl FnOnce() -> Result<Cuda>) -> Result<&Cuda> {
        match &mut self.cuda {
            Some(cuda) => Ok(cuda),
            none => Ok(none.insert(open()?)),
        }
    }
}

/// A handle on the worker thread. Dropping it cancels what runs and ends the thread.
pub struct Engine {
    jobs: Option<SyncSender<(JobId, Job, CancelToken)>>,
    tokens: Arc<Mutex<HashMap<JobId, CancelToken>>>,
    pause: PauseToken,
    next: Mutex<u64>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Engine {
    /// Starts the worker; events come over the returned channel.
    pub fn start(options: &EngineOptions) -> Result<(Self, mpsc::UnboundedReceiver<Event>)> {
        let (jobs, queue) = sync_channel::<(JobId, Job, CancelToken)>(QUEUE);
        let (event_sender, events) = mpsc::unbounded_channel();
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(options.threads.unwrap_or(0))
            .thread_name(|index| format!("strata-compute-{index}"))
            .build()
            .map_err(|error| Error::run(format!("the computing threads cannot be started: {error}")))?;
        let tokens = Arc::new(Mutex::new(HashMap::new()));
        let finished = Arc::clone(&tokens);
        let device = options.device;
        let pause = PauseToken::default();
        let paused = pause.clone();
        let worker = move || {
            let mut computer = Computer::default();
            while let Ok((id, job, cancel)) = queue.recv() {
                let title = job.title();
                // Receivers may be gone when the program is ending: nobody is left to be told.
                let send = |event| drop(event_sender.send(event));
                send(Event::Started { id, title: title.clone() });
                // A panic in a job is that job's failure; the panic hook has told where it was.
                let run = || match device {
                    DeviceChoice::Cpu => job::run(&Cpu, id, job, &cancel, &paused, &send),
                    DeviceChoice::Cuda(index) => job::run(computer.cuda(|| Cuda::new(index))?, id, job, &cancel, &paused, &send),
                    DeviceChoice::Emulated => job::run(computer.cuda(Cuda::emulated)?, id, job, &cancel, &paused, &send),
                };
                let run = AssertUnwindSafe(|| pool.install(run));
                let outcome = catch_unwind(run).unwrap_or_else(|_| {
                    Err(Error::run(format!("the job `{title}` crashed; this is a fault of strata"))
                        .hint("please report it with what was printed above"))
                });
                lock(&finished).remove(&id);
                send(Event::Finished { id, outcome });
            }
        };
        let thread = std::thread::Builder::new()
            .name("strata-engine".into())
            .spawn(worker)
            .map_err(|error| Error::run(format!("the engine's thread cannot be started: {error}")))?;
        Ok((Self { jobs: Some(jobs), tokens, pause, next: Mutex::new(1), thread: Some(thread) }, events))
    }

    /// Puts a job into the queue.
    pub fn submit(&self, job: Job) -> Result<JobId> {
        let id = {
            let mut next = lock(&self.next);
            let id = JobId(*next);
            *next += 1;
            id
        };
        let cancel = CancelToken::default();
        lock(&self.tokens).insert(id, cancel.clone());
        let Some(jobs) = &self.jobs else { return Err(Error::run("the engine has stopped")) };
        jobs.try_send((id, job, cancel)).map_err(|error| {
            lock(&self.tokens).remove(&id);
            match error {
                TrySendError::Full(_) => Error::input(format!("{QUEUE} jobs are waiting already")),
                TrySendError::Disconnected(_) => Error::run("the engine has stopped"),
            }
        })?;
        Ok(id)
    }

    /// Asks a waiting or running job to stop at the next block or batch.
    pub fn cancel(&self, id: JobId) {
        if let Some(token) = lock(&self.tokens).get(&id) {
            token.cancel();
        }
    }

    /// Makes the running job wait at its next step, or lets it go on. Jobs that follow wait, too.
    pub fn pause(&self, paused: bool) {
        self.pause.set(paused);
    }

    /// Something that cancels all jobs and may be kept elsewhere.
    pub fn canceller(&self) -> impl Fn() + Send + use<> {
        let tokens = Arc::clone(&self.tokens);
        move || lock(&tokens).values().for_each(CancelToken::cancel)
    }

    /// Cancels everything and gives the worker `patience` to end; returns whether it did. A worker that did not is
    /// left behind: what a job writes survives being killed at any moment, so the process may end under it.
    pub fn shutdown(mut self, patience: Duration) -> bool {
        self.canceller()();
        self.jobs = None;
        let start = Instant::now();
        while self.thread.as_ref().is_some_and(|thread| !thread.is_finished()) {
            if start.elapsed() >= patience {
                self.thread = None;
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        true
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.canceller()();
        self.jobs = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            // The worker panicked; the panic hook has reported it already.
        }
    }
}

/// A poisoned lock only means that another thread panicked while holding it; the maps stay usable.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
