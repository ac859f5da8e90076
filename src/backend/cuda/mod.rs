//! One NVIDIA GPU, or the same kernels emulated on the processor: [`Cuda`], written once over [`device::Device`].
//!
//! *Kernel*: a function of `kernels/*.cu`; `kernels/README.md` gives each one's parameters and grid, which the launches here
//! follow. *Recording*: a decoding step as a graph of launches whose addresses do not change; what differs from step to
//! step (token ids, lengths of caches) is read from device memory. *Few* tokens go through matrix-vector kernels, more
//! through matrix products.

mod attention;
mod calibration;
pub mod device;
pub mod driver;
pub mod emulated;
mod experts;
pub mod footprint;
pub mod libraries;
mod linear;
mod logits;
mod mamba;
pub mod nvrtc;
mod recording;
mod scan;
pub mod sources;
mod stream;
mod tensor;
mod turn;
pub mod verify;
mod wgmma;

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use faer::{MatMut, MatRef};

use self::device::{Arguments, Buffer, Device, Grid, Memory, Pinned, Plain};
pub use self::experts::CudaExperts;
pub use self::linear::{CudaEmbedding, CudaLinear};
pub use self::recording::CudaRecording;
pub use self::tensor::{CudaActivation, CudaTensor};
use self::tensor::{Front, Norm};
use super::{
    Assignment, AttentionShape, Backend, Divergence, Emit, Gptq, GptqCodes, MambaParameters, MambaShape, RouterShape, Sequences, Side,
};
use crate::error::{Error, Result};
use crate::format::{CacheFormats, LinearWeights};

/// A GPU that models run on. Clones share it.
#[derive(Clone)]
pub struct Cuda {
    memory: Arc<Memory>,
    /// Tables of the last batch of sequences: every layer asks for the same.
    tables: Arc<Mutex<Option<Arc<mamba::Tables>>>>,
    /// What a recording under way needs to keep.
    recording: Arc<Mutex<Option<recording::Notes>>>,
    /// Static scales on the device, by their bits.
    scales: Arc<Mutex<HashMap<u32, Arc<Buffer>>>>,
    /// Whether what is uploaded is uploaded ahead.
    ahead: bool,
    /// An `int` that kernels set where codes hide a value that is not finite.
    fault: Kept,
    /// Counters of blocks that share a row of logits; 0 between launches.
    tickets: Kept,
    /// Where recorded steps leave their choices.
    choices: recording::Choices,
}

/// A buffer that is made when it is first needed.
type Kept = Arc<Mutex<Option<Arc<Buffer>>>>;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Cuda {
    /// GPU `index`.
    pub fn new(index: usize) -> Result<Self> {
        Ok(Self::on(Arc::new(driver::Gpu::new(index)?)))
    }

    /// The kernels on the processor.
    pub fn emulated() -> Result<Self> {
        Ok(Self::on(Arc::new(emulated::Emulated::new()?)))
    }

    pub fn on(device: Arc<dyn Device>) -> Self {
        Self {
            memory: Memory::new(device),
            tables: Arc::default(),
            recording: Arc::default(),
            scales: Arc::default(),
            ahead: false,
            fault: Kept::default(),
            tickets: Kept::default(),
            choices: recording::Choices::default(),
        }
    }

    pub fn device(&self) -> &dyn Device {
        &*self.memory.device
    }

    /// Bytes in buffers now, and the most there were.
    pub fn memory_usage(&self) -> (u64, u64) {
        self.memory.usage()
    }

    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// A sum of outer products of these values, which no inputs need to have.
    #[cfg(test)]
    pub(crate) fn gram_of(&self, values: &[f64]) -> Result<calibration::Gram> {
        calibration::Gram::of(self, values)
    }

    fn buffer<T>(&self, count: usize) -> Result<Buffer> {
        self.memory.allocate(count * size_of::<T>())
    }

    /// `values` on the device. While recording they are kept, and copied each time the recording is launched.
    fn upload_values<T: Plain>(&self, values: &[T]) -> Result<Buffer> {
        if self.ahead {
            let buffer = self.memory.allocate_ahead(size_of_val(values))?;
            buffer.upload_ahead(values)?;
            return Ok(buffer);
        }
        let buffer = self.buffer::<T>(values.len())?;
        if let Some(notes) = &mut *lock(&self.recording) {
            notes.pins.push(self.copy_pinned(&buffer, values)?);
        } else {
            buffer.upload(values)?;
        }
        Ok(buffer)
    }

    /// A static scale on the device, uploaded once.
    fn static_scale(&self, scale: f32) -> Result<Arc<Buffer>> {
        let mut scales = lock(&self.scales);
        if let Some(buffer) = scales.get(&scale.to_bits()) {
            return Ok(Arc::clone(buffer));
        }
        let buffer = Arc::new(self.upload_values(&[scale])?);
        scales.insert(scale.to_bits(), Arc::clone(&buffer));
        Ok(buffer)
    }

    /// `count` ints that were 0 when they were first asked for.
    fn kept(&self, kept: &Kept, count: usize) -> Result<Arc<Buffer>> {
        let mut kept = lock(kept);
        if let Some(buffer) = &*kept {
            return Ok(Arc::clone(buffer));
        }
        let buffer = Arc::new(self.buffer::<i32>(count)?);
        buffer.zero()?;
        *kept = Some(Arc::clone(&buffer));
        Ok(buffer)
    }

    /// Where kernels that round to codes say that a value was not finite.
    fn fault(&self) -> Result<Arc<Buffer>> {
        self.kept(&self.fault, 1)
    }

    /// An error when a value that was rounded to a code since the last call was not finite. Called wherever results come to the host.
    fn check_fault(&self) -> Result<()> {
        let Some(buffer) = lock(&self.fault).clone() else { return Ok(()) };
        if buffer.download::<i32>(1)? == [0] {
            return Ok(());
        }
        buffer.zero()?;
        Err(Error::run("values inside a state-space block are not finite"))
    }

    /// Copies through page-locked memory that a recording may read again.
    fn copy_pinned<T: Plain>(&self, buffer: &Buffer, values: &[T]) -> Result<Arc<dyn Pinned>> {
        let bytes = device::as_bytes(values);
        let pinned = self.device().pinned(bytes.len())?;
        pinned.write(bytes);
        // SAFETY: the buffer was allocated for as many values.
        unsafe { self.device().copy_from_host(buffer.address(), &pinned, bytes.len())? };
        Ok(pinned)
    }

    /// Launches a kernel. The modules of this folder give it what `kernels/README.md` says, in buffers whose sizes follow
    /// from the same shapes.
    fn launch(&self, kernel: &str, blocks: [usize; 3], threads: usize, shared: usize, arguments: Arguments) -> Result<()> {
        let grid = Grid { blocks: blocks.map(|count| count as u32), threads: [threads as u32, 1, 1], shared: shared as u32 };
        // SAFETY: as said above; buffers in use are held by the caller until the launch is queued, and go back to free
        // lists whose next user is queued behind it.
        unsafe { arguments.launch(self.device(), kernel, grid) }
    }
}

/// Bytes of shared memory that a block may have on a GPU of this architecture, sm_90 or later: data-centre GPUs have more than others.
fn shared_limit(arch: u32) -> usize {
    if arch < 120 { 227 << 10 } else { 99 << 10 }
}

/// Columns of codes and bf16 rows in memory: kernels read whole lines.
fn padded(cols: usize) -> usize {
    cols.next_multiple_of(64)
}

impl Backend for Cuda {
    type Tensor = CudaTensor;
    type Linear = Arc<CudaLinear>;
    type Experts = CudaExperts;
    type Embedding = CudaEmbedding;
    type Vector = Arc<Buffer>;
    type Recording = CudaRecording;
    type Activation = CudaActivation;
    type Mamba = mamba::Parameters;
    type Projection = mamba::Projection;
    type SsmCache = mamba::SsmCache;
    type KvCache = attention::KvCache;
    type Gram = calibration::Gram;

    fn name(&self) -> String {
        self.device().name()
    }

    fn libraries(&self) -> Vec<(String, String)> {
        self.device().libraries()
    }

    fn upload(&self, values: Vec<f32>, cols: usize) -> Result<CudaTensor> {
        Ok(CudaTensor::new(self.upload_values(&values)?, values.len() / cols, cols))
    }

    fn download(&self, tensor: &CudaTensor) -> Result<Vec<f32>> {
        let values = tensor.buffer().download(tensor.rows * tensor.cols)?;
        self.check_fault()?;
        Ok(values)
    }

    fn floats(&self, activation: &CudaActivation) -> Result<Vec<f32>> {
        self.download(self.float(activation)?)
    }

    fn rows(&self, tensor: &CudaTensor) -> usize {
        tensor.rows
    }

    fn features(&self, tensor: &CudaTensor) -> usize {
        tensor.cols
    }

    fn prepare_vector(&self, values: Vec<f32>) -> Result<Arc<Buffer>> {
        self.upload_values(&values).map(Arc::new)
    }

    fn prepare(&self, weights: LinearWeights) -> Result<Arc<CudaLinear>> {
        self.prepare_linear(weights).map(Arc::new)
    }

    fn resident_bytes(&self, linear: &Arc<CudaLinear>) -> u64 {
        linear.bytes()
    }

    fn reads(&self, linear: &Arc<CudaLinear>) -> Emit {
        linear.reads()
    }

    fn prepare_embedding(&self, table: LinearWeights) -> Result<CudaEmbedding> {
        self.prepare_table(table)
    }

    fn embedding_bytes(&self, table: &CudaEmbedding) -> u64 {
        table.bytes()
    }

    fn embed(&self, table: &CudaEmbedding, ids: &[u32]) -> Result<CudaTensor> {
        self.look_up(table, ids)
    }

    fn linear(&self, linear: &Arc<CudaLinear>, x: &CudaActivation) -> Result<CudaTensor> {
        self.product(linear, x, None)
    }

    fn linear_add(&self, into: CudaTensor, linear: &Arc<CudaLinear>, x: &CudaActivation) -> Result<CudaTensor> {
        self.product(linear, x, Some(&into))
    }

    fn emit(&self, x: CudaTensor, emit: Emit) -> Result<CudaActivation> {
        if emit == Emit::FLOAT {
            return Ok(CudaActivation::of(x));
        }
        self.activation(Front::plain(x), emit)
    }

    fn group_norm(&self, x: &CudaTensor, weight: &Arc<Buffer>, group: usize, eps: f32, emit: Emit) -> Result<CudaActivation> {
        let norm = Norm { weight: Arc::clone(weight), eps, group };
        self.activation(Front { norm: Some(norm), ..Front::plain(x.clone()) }, emit)
    }

    fn relu2(&self, x: &CudaTensor, emit: Emit) -> Result<CudaActivation> {
        self.activation(Front { square: true, ..Front::plain(x.clone()) }, emit)
    }

    fn settle(&self, activation: &CudaActivation) -> Result<()> {
        self.settle_activation(activation)
    }

    fn add(&self, a: CudaTensor, b: &CudaTensor) -> Result<CudaTensor> {
        self.sum(&a, b)
    }

    fn prepare_mamba(&self, parameters: MambaParameters) -> Result<mamba::Parameters> {
        self.mamba_parameters(&parameters)
    }

    fn ssm_cache(&self, _: &mamba::Parameters, shape: &MambaShape, sequences: usize, formats: CacheFormats) -> mamba::SsmCache {
        mamba::SsmCache::new(shape, sequences, formats)
    }

    fn ssm_cache_bytes(&self, cache: &mamba::SsmCache) -> u64 {
        cache.bytes()
    }

    fn project(
        &self,
        in_proj: &Arc<CudaLinear>,
        x: &CudaActivation,
        parameters: &mamba::Parameters,
        shape: &MambaShape,
    ) -> Result<mamba::Projection> {
        mamba::Projection::new(self.product(in_proj, x, None)?, parameters, shape)
    }

    fn mamba_scan(
        &self,
        projection: &mamba::Projection,
        parameters: &mamba::Parameters,
        shape: &MambaShape,
        sequences: &Sequences,
        cache: Option<&mut mamba::SsmCache>,
    ) -> Result<CudaTensor> {
        self.scan(projection, parameters, shape, sequences, cache)
    }

    fn records_attention(&self, shape: &AttentionShape) -> bool {
        Self::steps_attention(shape)
    }

    fn kv_cache(&self, shape: &AttentionShape, sequences: usize, formats: CacheFormats) -> attention::KvCache {
        attention::KvCache::new(shape, sequences, formats)
    }

    fn kv_cache_bytes(&self, cache: &attention::KvCache) -> u64 {
        cache.bytes()
    }

    fn attention(
        &self,
        q: &CudaTensor,
        k: &CudaTensor,
        v: &CudaTensor,
        shape: &AttentionShape,
        sequences: &Sequences,
        cache: Option<&mut attention::KvCache>,
    ) -> Result<CudaTensor> {
        match cache {
            Some(cache) => self.attend_cached([q, k, v], shape, sequences, cache),
            None => self.attend([q, k, v], shape, sequences),
        }
    }

    fn prepare_experts(&self, experts: &[[&Arc<CudaLinear>; 2]]) -> Result<Option<CudaExperts>> {
        self.experts_at_once(experts)
    }

    fn mixture(
        &self,
        experts: &CudaExperts,
        x: &CudaActivation,
        raw: &CudaTensor,
        correction: &Arc<Buffer>,
        shape: &RouterShape,
    ) -> Result<CudaTensor> {
        self.sum_of_experts(experts, x, raw, correction, shape)
    }

    fn route(&self, raw: &CudaTensor, correction: &Arc<Buffer>, shape: &RouterShape) -> Result<Vec<Assignment>> {
        self.assignments(raw, correction, shape)
    }

    fn gather(&self, x: &CudaActivation, tokens: &[usize]) -> Result<CudaActivation> {
        self.gather_activation(x, tokens)
    }

    fn gather_rows(&self, x: &CudaTensor, tokens: &[usize]) -> Result<CudaTensor> {
        self.gather_tensor(x, tokens)
    }

    fn scatter_add(&self, into: CudaTensor, x: &CudaTensor, tokens: &[usize], weights: &[f32]) -> Result<CudaTensor> {
        self.scatter(&into, x, tokens, weights)
    }

    fn beside<T: Send>(&self, ahead: impl FnOnce(&Self) -> Result<T> + Send, now: impl FnOnce() -> Result<()>) -> Result<T> {
        if !self.memory.begin_ahead()? {
            now()?;
            return ahead(self);
        }
        let uploading = Self { ahead: true, ..self.clone() };
        let (mut made, mut done) = (None, Ok(()));
        rayon::in_place_scope(|scope| {
            scope.spawn(|_| made = Some(ahead(&uploading)));
            done = now();
        });
        self.memory.end_ahead()?;
        done?;
        made.unwrap_or_else(|| Err(Error::run("what was to be made ahead was not")))
    }

    fn record(&self, step: &mut dyn FnMut() -> Result<CudaTensor>) -> Result<Option<(CudaRecording, CudaTensor)>> {
        self.record_step(step)
    }

    fn replay(&self, recording: &mut CudaRecording, ids: &[u32]) -> Result<Option<CudaTensor>> {
        self.replay_step(recording, ids)
    }

    fn time(&self, repeats: usize, run: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        run()?;
        self.time_recorded(repeats, run)
    }

    fn copy_seconds(&self, bytes: usize) -> Result<f64> {
        const ROUND: usize = 10;
        let (from, to) = (self.buffer::<u8>(bytes)?, self.buffer::<u8>(bytes)?);
        from.zero()?;
        // Launched one by one: as part of a recording a copy has two thirds of the speed (measured on an H200). The first rounds find the clocks at rest.
        let (begun, mut fastest) = (Instant::now(), f64::INFINITY);
        while fastest.is_infinite() || begun.elapsed() < Duration::from_millis(200) {
            self.device().mark()?;
            (0..ROUND).try_for_each(|_| to.copy_from(0, &from, 0, bytes))?;
            fastest = fastest.min(self.device().mark()? / 1e3 / ROUND as f64);
        }
        Ok(fastest)
    }

    fn free_bytes(&self) -> Result<Option<u64>> {
        // What lies in the free lists is free too.
        self.memory.release()?;
        Ok(Some(self.device().memory()?.0))
    }

    fn peak_bytes(&self) -> Option<u64> {
        Some(self.memory.usage().1)
    }

    fn reset_peak(&self) -> Result<()> {
        self.memory.release()?;
        self.memory.reset_peak();
        Ok(())
    }

    fn add_gram(&self, sum: &mut Option<calibration::Gram>, x: &CudaActivation) -> Result<()> {
        self.add_to_gram(sum, x)
    }

    fn gram_values<'a>(&self, sum: &'a calibration::Gram) -> Result<Cow<'a, [f64]>> {
        sum.values().map(Cow::Owned)
    }

    fn gram_diagonal(&self, sum: &calibration::Gram) -> Result<Vec<f64>> {
        self.diagonal(sum)
    }

    fn gptq(&self, task: &Gptq<'_, calibration::Gram>) -> Result<Option<GptqCodes>> {
        self.round_gptq(task).map(Some)
    }

    fn turn(&self, weights: MatMut<'_, f64>, rotation: MatRef<'_, f64>, side: Side) -> Result<()> {
        self.turn_weights(weights, rotation, side)
    }

    fn largest_magnitudes(&self, x: &CudaActivation) -> Result<Vec<f32>> {
        self.magnitudes(self.float(x)?)
    }

    fn add_difference(&self, a: &CudaTensor, b: &CudaTensor, sums: &mut (f64, f64)) -> Result<()> {
        let (difference, norm) = self.difference(a, b)?;
        *sums = (sums.0 + difference, sums.1 + norm);
        Ok(())
    }

    fn digest(&self, tensor: &CudaTensor) -> Result<Option<[u8; 32]>> {
        self.digest_of(tensor).map(Some)
    }

    fn mixer_magnitudes(
        &self,
        in_proj: &Arc<CudaLinear>,
        x: &CudaActivation,
        parameters: &mamba::Parameters,
        shape: &MambaShape,
        cache: &mut mamba::SsmCache,
    ) -> Result<Option<[Vec<f32>; 2]>> {
        let projected = self.product(in_proj, x, None)?;
        let xbc = self.convolve_cached(&projected, parameters, shape, cache)?;
        Ok(Some([self.magnitudes(&projected)?, self.magnitudes(&xbc)?]))
    }

    fn undecidedness(&self, logits: &CudaTensor) -> Result<Vec<f64>> {
        self.doubts(logits)
    }

    fn log_probabilities(&self, logits: &CudaTensor, targets: &[(usize, u32)]) -> Result<Vec<(f64, bool)>> {
        self.probabilities(logits, targets)
    }

    fn argmax(&self, logits: &CudaTensor) -> Result<Vec<u32>> {
        self.first_largest(logits)
    }

    fn divergence(&self, reference: &CudaTensor, logits: &CudaTensor) -> Result<Vec<Divergence>> {
        self.divergences(reference, logits)
    }
}

fn missing(form: &str) -> Error {
    Error::run(format!("a linear reads {form} activations that its input does not carry"))
}
