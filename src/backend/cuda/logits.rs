//! What is measured of logits, on the device: only one number a row comes to the host.

use std::sync::Arc;

use super::device::{Arguments, Buffer, Pinned};
use super::{Cuda, CudaTensor, lock};
use crate::backend::Divergence;
use crate::error::Result;

/// Logits that a block of `argmax` takes, at least.
const PART: usize = 2048;
/// Blocks among which rows that are few are divided, at most.
const BLOCKS: usize = 256;

impl Cuda {
    pub(super) fn probabilities(&self, logits: &CudaTensor, targets: &[(usize, u32)]) -> Result<Vec<(f64, bool)>> {
        let rows = self.upload_values(&targets.iter().map(|(row, _)| *row as i32).collect::<Vec<_>>())?;
        let tokens = self.upload_values(&targets.iter().map(|(_, token)| *token).collect::<Vec<_>>())?;
        let (probabilities, tops) = (self.buffer::<f64>(targets.len())?, self.buffer::<i32>(targets.len())?);
        let arguments =
            Arguments::default().with(logits.buffer()).with(logits.cols).with(&rows).with(&tokens).with(&probabilities).with(&tops);
        self.launch("log_probability", [targets.len(), 1, 1], 256, 0, arguments)?;
        let tops = tops.download::<i32>(targets.len())?;
        self.check_fault()?;
        Ok(probabilities.download::<f64>(targets.len())?.into_iter().zip(tops).map(|(value, top)| (value, top != 0)).collect())
    }

    pub(super) fn divergences(&self, reference: &CudaTensor, logits: &CudaTensor) -> Result<Vec<Divergence>> {
        let rows = logits.rows;
        let (kl, tops) = (self.buffer::<f64>(rows)?, self.buffer::<i32>(rows)?);
        let arguments = Arguments::default().with(reference.buffer()).with(logits.buffer()).with(logits.cols).with(&kl).with(&tops);
        self.launch("divergence", [rows, 1, 1], 256, 0, arguments)?;
        let tops = tops.download::<i32>(rows)?;
        self.check_fault()?;
        let both = kl.download::<f64>(rows)?.into_iter().zip(tops);
        Ok(both.map(|(kl, top)| Divergence { kl, same_top: top != 0 }).collect())
    }

    /// Of a recorded step's logits it only waits for what the step leaves on the host.
    pub(super) fn first_largest(&self, logits: &CudaTensor) -> Result<Vec<u32>> {
        let mut bytes = vec![0; 4 * (logits.rows + 1)];
        let left = lock(&self.choices).get(&logits.buffer().address()).cloned();
        if let Some(left) = left {
            self.device().synchronize()?;
            left.read(&mut bytes);
        } else {
            let out = self.buffer::<u32>(logits.rows + 1)?;
            self.launch_argmax(logits, out.address())?;
            out.download_at(0, &mut bytes)?;
        }
        let mut tops: Vec<u32> = bytes.as_chunks().0.iter().map(|word| u32::from_ne_bytes(*word)).collect();
        if tops.pop() != Some(0) {
            self.check_fault()?;
        }
        Ok(tops)
    }

    /// Has `argmax` leave the first largest logit of each row, and behind them whether a value was not finite, in page-locked memory.
    pub(super) fn leave_choices(&self, logits: &CudaTensor) -> Result<Arc<dyn Pinned>> {
        let left = self.device().pinned(4 * (logits.rows + 1))?;
        self.launch_argmax(logits, left.address() as u64)?;
        Ok(left)
    }

    /// Counters for `argmax`, made before a recording begins: what clears them must not be in it.
    pub(super) fn tickets(&self) -> Result<Arc<Buffer>> {
        self.kept(&self.tickets, BLOCKS)
    }

    fn launch_argmax(&self, logits: &CudaTensor, out: u64) -> Result<()> {
        let parts = (BLOCKS / logits.rows.max(1)).clamp(1, logits.cols.div_ceil(PART));
        let (tops, tickets, fault) = (self.buffer::<u64>(logits.rows * parts)?, self.tickets()?, lock(&self.fault).clone());
        let arguments = Arguments::default().with(logits.buffer()).with(logits.cols).with(&tops).with(&*tickets);
        self.launch("argmax", [parts, logits.rows, 1], 256, 0, arguments.with(fault.as_deref()).with(out))
    }

    pub(super) fn doubts(&self, logits: &CudaTensor) -> Result<Vec<f64>> {
        let out = self.buffer::<f64>(logits.rows)?;
        let arguments = Arguments::default().with(logits.buffer()).with(logits.cols).with(&out);
        self.launch("undecidedness", [logits.rows, 1, 1], 256, 0, arguments)?;
        let doubts = out.download(logits.rows)?;
        self.check_fault()?;
        Ok(doubts)
    }
}
