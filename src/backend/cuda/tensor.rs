//! Tensors on the device and what is done to them row by row or element by element.

use std::sync::{Arc, Mutex};

use super::device::{Arguments, Buffer};
use super::{Cuda, lock, missing, padded};
use crate::backend::Emit;
use crate::error::Result;

/// Threads of a kernel that goes row by row: with few rows each has a multiprocessor to itself, with many they share one.
fn row_threads(tokens: usize, cols: usize) -> usize {
    match (tokens > 64, cols > 4096) {
        (false, true) => 1024,
        (false, false) | (true, true) => 512,
        (true, false) => 256,
    }
}

/// `[rows, cols]` in f32.
#[derive(Clone)]
pub struct CudaTensor {
    buffer: Arc<Buffer>,
    pub rows: usize,
    pub cols: usize,
}

impl CudaTensor {
    pub(super) fn new(buffer: Buffer, rows: usize, cols: usize) -> Self {
        Self { buffer: Arc::new(buffer), rows, cols }
    }

    pub(super) fn buffer(&self) -> &Buffer {
        &self.buffer
    }
}

/// int8 codes `[tokens, padded(cols)]` with a scale a token.
pub(super) struct Codes {
    pub codes: Buffer,
    pub scales: Buffer,
}

/// What a linear reads.
pub struct CudaActivation {
    pub(super) tokens: usize,
    pub(super) cols: usize,
    float: Option<CudaTensor>,
    int8: Option<Codes>,
    /// The float form rounded to bf16, made when a matrix product first asks for it.
    bf16: Mutex<Option<Arc<Buffer>>>,
}

impl CudaActivation {
    pub(super) fn of(x: CudaTensor) -> Self {
        Self { tokens: x.rows, cols: x.cols, float: Some(x), int8: None, bf16: Mutex::default() }
    }

    pub(super) fn float(&self) -> Result<&CudaTensor> {
        self.float.as_ref().ok_or_else(|| missing("float"))
    }

    pub(super) fn int8(&self) -> Result<&Codes> {
        self.int8.as_ref().ok_or_else(|| missing("int8"))
    }
}

impl Cuda {
    pub(super) fn tensor(&self, rows: usize, cols: usize) -> Result<CudaTensor> {
        Ok(CudaTensor::new(self.buffer::<f32>(rows * cols)?, rows, cols))
    }

    fn codes(&self, tokens: usize, cols: usize) -> Result<Codes> {
        Ok(Codes { codes: self.buffer::<i8>(tokens * padded(cols))?, scales: self.buffer::<f32>(tokens)? })
    }

    /// Runs a kernel that works row by row and hands its result on; `arguments` are those in front of where to.
    pub(super) fn emitted(&self, kernel: &str, tokens: usize, cols: usize, emit: Emit, arguments: Arguments) -> Result<CudaActivation> {
        let float = if emit.float { Some(self.tensor(tokens, cols)?) } else { None };
        let int8 = if emit.int8 { Some(self.codes(tokens, cols)?) } else { None };
        let scale = emit.scale.map(|scale| self.static_scale(scale)).transpose()?;
        let arguments = arguments
            .with(float.as_ref().map(CudaTensor::buffer))
            .with(int8.as_ref().map(|int8| &int8.codes))
            .with(int8.as_ref().map(|int8| &int8.scales))
            .with(scale.as_deref())
            .with(emit.hadamard.unwrap_or(0));
        self.launch(kernel, [tokens, 1, 1], row_threads(tokens, cols), 4 * (cols + cols.div_ceil(32)), arguments)?;
        Ok(CudaActivation { tokens, cols, float, int8, bf16: Mutex::default() })
    }

    /// The float form in bf16, `[tokens, padded(cols)]`.
    pub(super) fn bf16(&self, x: &CudaActivation) -> Result<Arc<Buffer>> {
        let mut kept = lock(&x.bf16);
        if let Some(bf16) = &*kept {
            return Ok(Arc::clone(bf16));
        }
        let float = x.float()?;
        let bf16 = Arc::new(self.buffer::<u16>(x.tokens * padded(x.cols))?);
        let arguments = Arguments::default().with(float.buffer()).with(x.cols).with(&*bf16);
        self.launch("to_bf16", [x.tokens, 1, 1], 256, 0, arguments)?;
        *kept = Some(Arc::clone(&bf16));
        Ok(bf16)
    }

    pub(super) fn sum(&self, a: &CudaTensor, b: &CudaTensor) -> Result<CudaTensor> {
        let out = self.tensor(b.rows, b.cols)?;
        let count = b.rows * b.cols;
        let arguments = Arguments::default().with(a.buffer()).with(b.buffer()).with(count).with(out.buffer());
        self.launch("add", [count.div_ceil(1024), 1, 1], 256, 0, arguments)?;
        Ok(out)
    }

    fn indices(&self, tokens: &[usize]) -> Result<Buffer> {
        self.upload_values(&tokens.iter().map(|token| *token as i32).collect::<Vec<_>>())
    }

    pub(super) fn gather_tensor(&self, x: &CudaTensor, tokens: &[usize]) -> Result<CudaTensor> {
        // A decoding step gathers the last token of each sequence: all of them, in order.
        if tokens.iter().copied().eq(0..x.rows) {
            return Ok(x.clone());
        }
        let (rows, out) = (self.indices(tokens)?, self.tensor(tokens.len(), x.cols)?);
        let arguments = Arguments::default().with(x.buffer()).with(&rows).with(x.cols).with(out.buffer());
        self.launch("gather_rows", [tokens.len(), 1, 1], 256, 0, arguments)?;
        Ok(out)
    }

    pub(super) fn gather_activation(&self, x: &CudaActivation, tokens: &[usize]) -> Result<CudaActivation> {
        let float = x.float.as_ref().map(|float| self.gather_tensor(float, tokens)).transpose()?;
        let int8 = match &x.int8 {
            Some(from) => {
                let (rows, to) = (self.indices(tokens)?, self.codes(tokens.len(), x.cols)?);
                let arguments =
                    Arguments::default().with(&from.codes).with(&from.scales).with(&rows).with(x.cols).with(&to.codes).with(&to.scales);
                self.launch("gather_codes", [tokens.len(), 1, 1], 256, 0, arguments)?;
                Some(to)
            }
            None => None,
        };
        Ok(CudaActivation { tokens: tokens.len(), cols: x.cols, float, int8, bf16: Mutex::default() })
    }

    pub(super) fn scatter(&self, into: &CudaTensor, x: &CudaTensor, tokens: &[usize], weights: &[f32]) -> Result<CudaTensor> {
        let out = self.tensor(into.rows, into.cols)?;
        out.buffer().copy_from(0, into.buffer(), 0, 4 * into.rows * into.cols)?;
        let (rows, weights) = (self.indices(tokens)?, self.upload_values(weights)?);
        let arguments = Arguments::default().with(out.buffer()).with(x.buffer()).with(&rows).with(&weights).with(tokens.len()).with(x.cols);
        self.launch("scatter_add", [x.cols.div_ceil(256), 1, 1], 256, 0, arguments)?;
        Ok(out)
    }
}
