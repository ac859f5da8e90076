//! Tensors on the device and what is done to them row by row or element by element.

use std::sync::{Arc, Mutex, OnceLock};

use super::device::{Arguments, Buffer};
use super::{Cuda, lock, missing, padded, stream};
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

/// Values of a row that a warp of `emit_rows` has, and warps of its blocks at most: with more a multiprocessor holds a single block, and waits
/// for memory while that computes.
const RUN: usize = 1024;
const RUNS: usize = 10;

/// Whether the kernel that keeps rows in registers serves.
fn in_registers(front: &Front, hadamard: Option<usize>) -> bool {
    let cols = front.row.cols;
    let norm = front.norm.as_ref().is_none_or(|norm| cols.is_multiple_of(128) && norm.group.is_multiple_of(128));
    cols.is_multiple_of(4) && cols <= RUN * RUNS && norm && hadamard.is_none_or(|size| size <= RUN)
}

/// Values of a row that a block of `turn_row` may have, and of a block of its transform.
const PART: usize = 2048;
const TURNED: usize = 1024;

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

/// A norm's weight, and how many features it goes over at a time.
pub(super) struct Norm {
    pub weight: Arc<Buffer>,
    pub eps: f32,
    pub group: usize,
}

/// What stands in front of a linear: a norm of `row`; without one the row as it is, or the squares of its positive values.
pub(super) struct Front {
    pub row: CudaTensor,
    pub norm: Option<Norm>,
    pub square: bool,
}

impl Front {
    /// The row as it is.
    pub(super) fn plain(row: CudaTensor) -> Self {
        Self { row, norm: None, square: false }
    }
}

struct Forms {
    float: Option<CudaTensor>,
    int8: Option<Codes>,
}

/// What a linear reads. The forms of a single token are made when something first asks for them: linears whose kernels
/// compute the front themselves never do.
pub struct CudaActivation {
    pub(super) tokens: usize,
    pub(super) cols: usize,
    pub(super) emit: Emit,
    front: Option<Front>,
    forms: OnceLock<Forms>,
    /// The float form rounded to bf16, made when a matrix product first asks for it.
    bf16: Mutex<Option<Arc<Buffer>>>,
}

impl CudaActivation {
    fn new(tokens: usize, cols: usize, emit: Emit, forms: OnceLock<Forms>, front: Option<Front>) -> Self {
        Self { tokens, cols, emit, front, forms, bf16: Mutex::default() }
    }

    pub(super) fn of(x: CudaTensor) -> Self {
        let (tokens, cols) = (x.rows, x.cols);
        Self::new(tokens, cols, Emit::FLOAT, OnceLock::from(Forms { float: Some(x), int8: None }), None)
    }

    /// What is still to be computed in front of whoever reads this.
    pub(super) fn pending(&self) -> Option<&Front> {
        self.front.as_ref().filter(|_| self.forms.get().is_none())
    }
}

impl Cuda {
    pub(super) fn tensor(&self, rows: usize, cols: usize) -> Result<CudaTensor> {
        Ok(CudaTensor::new(self.buffer::<f32>(rows * cols)?, rows, cols))
    }

    fn codes(&self, tokens: usize, cols: usize) -> Result<Codes> {
        Ok(Codes { codes: self.buffer::<i8>(tokens * padded(cols))?, scales: self.buffer::<f32>(tokens)? })
    }

    /// What `front` hands on: now, or where the kernels of linears can compute it, when somebody asks for it.
    pub(super) fn activation(&self, front: Front, emit: Emit) -> Result<CudaActivation> {
        let (tokens, cols) = (front.row.rows, front.row.cols);
        if stream::serves(self.device().arch()) && stream::serves_front(&front) {
            let Some(size) = emit.hadamard else {
                return Ok(CudaActivation::new(tokens, cols, emit, OnceLock::new(), Some(front)));
            };
            if let Some(turned) = self.turned(&front, size)? {
                let emit = Emit { hadamard: None, ..emit };
                if !emit.int8 {
                    return Ok(CudaActivation::new(tokens, cols, emit, OnceLock::from(Forms { float: Some(turned), int8: None }), None));
                }
                return Ok(CudaActivation::new(tokens, cols, emit, OnceLock::new(), Some(Front::plain(turned))));
            }
        }
        Ok(CudaActivation::new(tokens, cols, emit, OnceLock::from(self.computed(&front, emit)?), None))
    }

    /// The row of a single token as `front` and an online Hadamard transform leave it, in floats: by many blocks, each of which has whole
    /// groups of the norm and blocks of the transform, where a row to be rounded would be one's. `None`: no such parts.
    fn turned(&self, front: &Front, size: usize) -> Result<Option<CudaTensor>> {
        let cols = front.row.cols;
        let unit = front.norm.as_ref().map_or(size.max(4), |norm| norm.group);
        if !(2..=TURNED).contains(&size) || unit > PART || !unit.is_multiple_of(size.max(4)) || !cols.is_multiple_of(unit) {
            return Ok(None);
        }
        // Of a norm each has one group.
        let most = if front.norm.is_some() { 1 } else { (PART / 2 / unit).max(1) };
        let units = (1..=most).rev().find(|units| (cols / unit).is_multiple_of(*units)).unwrap_or(1);
        let (width, turned) = (units * unit, self.tensor(1, cols)?);
        let norm = front.norm.as_ref();
        let arguments =
            Arguments::default().with(front.row.buffer()).with(norm.map(|norm| &*norm.weight)).with(norm.map_or(0.0, |norm| norm.eps));
        let arguments = arguments.with(usize::from(front.square)).with(width).with(size).with(turned.buffer());
        self.launch("turn_row", [cols / width, 1, 1], 256, 0, arguments)?;
        Ok(Some(turned))
    }

    /// By a kernel that works row by row.
    fn computed(&self, front: &Front, emit: Emit) -> Result<Forms> {
        let (tokens, cols) = (front.row.rows, front.row.cols);
        let row = Arguments::default().with(front.row.buffer());
        let in_registers = in_registers(front, emit.hadamard);
        let (kernel, arguments) = match &front.norm {
            _ if in_registers => {
                let norm = front.norm.as_ref();
                let arguments = row.with(norm.map(|norm| &*norm.weight)).with(norm.map_or(0.0, |norm| norm.eps));
                ("emit_rows", arguments.with(norm.map_or(0, |norm| norm.group)).with(usize::from(front.square)).with(cols))
            }
            Some(norm) => ("rms_norm", row.with(&*norm.weight).with(norm.eps).with(cols).with(norm.group)),
            None => (if front.square { "relu2" } else { "emit" }, row.with(cols)),
        };
        let float = if emit.float { Some(self.tensor(tokens, cols)?) } else { None };
        let int8 = if emit.int8 { Some(self.codes(tokens, cols)?) } else { None };
        let scale = emit.scale.map(|scale| self.static_scale(scale)).transpose()?;
        let arguments = arguments
            .with(float.as_ref().map(CudaTensor::buffer))
            .with(int8.as_ref().map(|int8| &int8.codes))
            .with(int8.as_ref().map(|int8| &int8.scales))
            .with(scale.as_deref())
            .with(emit.hadamard.unwrap_or(0));
        let (threads, shared) =
            if in_registers { (32 * cols.div_ceil(RUN), 0) } else { (row_threads(tokens, cols), 4 * (cols + cols.div_ceil(32))) };
        self.launch(kernel, [tokens, 1, 1], threads, shared, arguments)?;
        Ok(Forms { float, int8 })
    }

    fn forms<'a>(&self, x: &'a CudaActivation) -> Result<&'a Forms> {
        if let (None, Some(front)) = (x.forms.get(), &x.front) {
            let made = self.computed(front, x.emit)?;
            return Ok(x.forms.get_or_init(|| made));
        }
        x.forms.get().ok_or_else(|| missing("any"))
    }

    pub(super) fn float<'a>(&self, x: &'a CudaActivation) -> Result<&'a CudaTensor> {
        self.forms(x)?.float.as_ref().ok_or_else(|| missing("float"))
    }

    pub(super) fn int8<'a>(&self, x: &'a CudaActivation) -> Result<&'a Codes> {
        self.forms(x)?.int8.as_ref().ok_or_else(|| missing("int8"))
    }

    /// Computes what was put off.
    pub(super) fn settle_activation(&self, x: &CudaActivation) -> Result<()> {
        self.forms(x).map(drop)
    }

    /// The float form in bf16, `[tokens, padded(cols)]`.
    pub(super) fn bf16(&self, x: &CudaActivation) -> Result<Arc<Buffer>> {
        let mut kept = lock(&x.bf16);
        if let Some(bf16) = &*kept {
            return Ok(Arc::clone(bf16));
        }
        let float = self.float(x)?;
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
        let forms = self.forms(x)?;
        let float = forms.float.as_ref().map(|float| self.gather_tensor(float, tokens)).transpose()?;
        let int8 = match &forms.int8 {
            Some(from) => {
                let (rows, to) = (self.indices(tokens)?, self.codes(tokens.len(), x.cols)?);
                let arguments =
                    Arguments::default().with(&from.codes).with(&from.scales).with(&rows).with(x.cols).with(&to.codes).with(&to.scales);
                self.launch("gather_codes", [tokens.len(), 1, 1], 256, 0, arguments)?;
                Some(to)
            }
            None => None,
        };
        Ok(CudaActivation::new(tokens.len(), x.cols, x.emit, OnceLock::from(Forms { float, int8 }), None))
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
