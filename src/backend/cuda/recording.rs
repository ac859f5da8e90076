//! Decoding steps as graphs: recorded once, launched again for every token.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use super::attention::Positions;
use super::device::{Memory, Pinned, Recording};
use super::{Cuda, CudaTensor, device, lock};
use crate::error::{Error, Result};

/// What a recording under way must keep.
#[derive(Default)]
pub(super) struct Notes {
    /// Host memory that its copies read.
    pub pins: Vec<Arc<dyn Pinned>>,
    /// The token ids among it.
    pub ids: Option<Arc<dyn Pinned>>,
    /// Lengths of the key-value caches that it appends to, and how often these had moved.
    pub positions: Vec<(Arc<Mutex<Positions>>, usize)>,
}

/// The page-locked memory in which each recorded step leaves what `argmax` finds in its logits, by the logits' address.
pub(super) type Choices = Arc<Mutex<HashMap<u64, Arc<dyn Pinned>>>>;

/// A recorded decoding step, with the choice of the most probable tokens behind it: one launch, and one wait, a step.
pub struct CudaRecording {
    graph: Box<dyn Recording>,
    notes: Notes,
    /// Where it leaves its result.
    result: Option<CudaTensor>,
    choices: Choices,
    /// The number under which `memory` keeps its buffers.
    private: u64,
    memory: Arc<Memory>,
}

impl Drop for CudaRecording {
    fn drop(&mut self) {
        // What it launched may still run; a failure shows at the next call.
        drop(self.memory.device.synchronize());
        if let Some(result) = self.result.take() {
            lock(&self.choices).remove(&result.buffer().address());
        }
        self.memory.drop_private(self.private);
    }
}

impl Cuda {
    pub(super) fn record_step(&self, step: &mut dyn FnMut() -> Result<CudaTensor>) -> Result<Option<(CudaRecording, CudaTensor)>> {
        self.tickets()?;
        let private = self.memory.begin_private();
        *lock(&self.recording) = Some(Notes::default());
        let recorded = self.device().begin_recording().and_then(|()| {
            let result = step().and_then(|logits| Ok((self.leave_choices(&logits)?, logits)));
            // Recording ends whatever became of the step.
            let graph = self.device().end_recording();
            Ok((result?, graph?))
        });
        let notes = lock(&self.recording).take().unwrap_or_default();
        self.memory.end_private();
        let launched = recorded.and_then(|(recorded, graph)| graph.launch().map(|()| (recorded, graph)));
        let ((left, result), graph) = launched.inspect_err(|_| self.memory.drop_private(private))?;
        lock(&self.choices).insert(result.buffer().address(), left);
        let (choices, memory) = (Arc::clone(&self.choices), Arc::clone(&self.memory));
        Ok(Some((CudaRecording { graph, notes, result: Some(result.clone()), choices, private, memory }, result)))
    }

    /// Seconds that one of `repeats` recorded runs takes.
    pub(super) fn time_recorded(&self, repeats: usize, run: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        let private = self.memory.begin_private();
        *lock(&self.recording) = Some(Notes::default());
        let recorded = self.device().begin_recording().and_then(|()| {
            let ran = (0..repeats).try_for_each(|_| run());
            let graph = self.device().end_recording();
            ran?;
            graph
        });
        let notes = lock(&self.recording).take();
        self.memory.end_private();
        let timed = recorded.and_then(|graph| {
            graph.launch()?;
            self.device().synchronize()?;
            self.device().mark()?;
            graph.launch()?;
            self.device().mark()
        });
        self.memory.drop_private(private);
        drop(notes);
        Ok(timed? / 1e3 / repeats as f64)
    }

    pub(super) fn replay_step(&self, recording: &mut CudaRecording, ids: &[u32]) -> Result<Option<CudaTensor>> {
        let stays = |positions: &Mutex<Positions>, moves| {
            let positions = lock(positions);
            positions.has_room(1) && positions.moves == moves
        };
        if !recording.notes.positions.iter().all(|(positions, moves)| stays(positions, *moves)) {
            return Ok(None);
        }
        let pinned = recording.notes.ids.as_ref().ok_or_else(|| Error::run("a recorded step reads no token ids"))?;
        // The last launch may still read them.
        self.device().synchronize()?;
        pinned.write(device::as_bytes(ids));
        recording.graph.launch()?;
        recording.notes.positions.iter().for_each(|(positions, _)| lock(positions).advance(1));
        Ok(recording.result.clone())
    }
}
