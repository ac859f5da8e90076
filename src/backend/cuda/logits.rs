//! What is measured of logits, on the device: only one number a row comes to the host.

use super::device::Arguments;
use super::{Cuda, CudaTensor};
use crate::backend::Divergence;
use crate::error::Result;

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

    pub(super) fn first_largest(&self, logits: &CudaTensor) -> Result<Vec<u32>> {
        let out = self.buffer::<u32>(logits.rows)?;
        let arguments = Arguments::default().with(logits.buffer()).with(logits.cols).with(&out);
        self.launch("argmax", [logits.rows, 1, 1], 1024, 0, arguments)?;
        let tops = out.download(logits.rows)?;
        self.check_fault()?;
        Ok(tops)
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
