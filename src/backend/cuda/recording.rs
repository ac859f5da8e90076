//! Decoding steps as graphs: recorded once, launched again for every token.

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

/// A recorded decoding step.
pub struct CudaRecording {
    graph: Box<dyn Recording>,
    notes: Notes,
    /// Where it leaves its result.
    result: Option<CudaTensor>,
    /// The number under which `memory` keeps its buffers.
    private: u64,
    memory: Arc<Memory>,
}

impl Drop for CudaRecording {
    fn drop(&mut self) {
        self.result = None;
        // What it launched may still run; a failure shows at the next call.
        drop(self.memory.device.synchronize());
        self.memory.drop_private(self.private);
    }
}

impl Cuda {
    pub(super) fn record_step(&self, step: &mut dyn FnMut() -> Result<CudaTensor>) -> Result<Option<(CudaRecording, CudaTensor)>> {
        let private = self.memory.begin_private();
        *lock(&self.recording) = Some(Notes::default());
        let recorded = self.device().begin_recording().and_then(|()| {
            let result = step();
            // Recording ends whatever became of the step.
            let graph = self.device().end_recording();
            Ok((result?, graph?))
        });
        let notes = lock(&self.recording).take().unwrap_or_default();
        self.memory.end_private();
        let (result, graph) = recorded?;
        graph.launch()?;
        let recording = CudaRecording { graph, notes, result: Some(result.clone()), private, memory: Arc::clone(&self.memory) };
        Ok(Some((recording, result)))
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
