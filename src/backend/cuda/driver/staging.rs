//! Large copies between the host and the GPU, through page-locked memory.

use std::collections::VecDeque;

use cudarc::driver::result::{self, event};
use cudarc::driver::sys;
use rayon::prelude::*;

use super::{Event, Gpu, failed, lock};
use crate::backend::cuda::device::{Device, Pinned};
use crate::error::Result;

/// Page-locked buffers that large copies go through, some filled while others are copied, and bytes of each.
const STAGES: usize = 4;
const STAGE: usize = 16 << 20;

/// A page-locked buffer with the event that tells when it was copied. Whoever fills one has taken it out of the queue, so that no
/// lock is held meanwhile.
pub(super) struct Stage {
    buffer: PageLocked,
    pub(super) copied: Event,
}

/// Page-locked host memory.
pub(super) struct PageLocked {
    pub(super) address: *mut u8,
    bytes: usize,
}

// SAFETY: plain memory; writes are ordered by who owns it.
unsafe impl Send for PageLocked {}
// SAFETY: as above.
unsafe impl Sync for PageLocked {}

impl PageLocked {
    pub(super) fn new(bytes: usize) -> Result<Self> {
        // SAFETY: a context is current.
        let address = unsafe { result::malloc_host(bytes.max(1), 0) }.map_err(|error| failed("allocating page-locked memory", error))?;
        Ok(Self { address: address.cast(), bytes })
    }
}

impl Drop for PageLocked {
    fn drop(&mut self) {
        // SAFETY: allocated by `new`; the driver waits for copies that use it, and whoever has kernels write it for these.
        let _ = unsafe { result::free_host(self.address.cast()) };
    }
}

impl Pinned for PageLocked {
    fn write(&self, bytes: &[u8]) {
        let count = bytes.len().min(self.bytes);
        // SAFETY: the count lies inside; copies under way have been waited for, as `Pinned` asks.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.address, count) };
    }

    fn read(&self, bytes: &mut [u8]) {
        let count = bytes.len().min(self.bytes);
        // SAFETY: the count lies inside; kernels under way have been waited for, as `Pinned` asks.
        unsafe { std::ptr::copy_nonoverlapping(self.address, bytes.as_mut_ptr(), count) };
    }

    fn address(&self) -> *mut u8 {
        self.address
    }
}

impl Gpu {
    /// A stage that nobody fills; `None` where all are being filled.
    fn stage(&self) -> Result<Option<Stage>> {
        let mut stages = lock(&self.stages);
        if stages.is_none() {
            let stage = || Ok(Stage { buffer: PageLocked::new(STAGE)?, copied: Self::new_event()? });
            *stages = Some((0..STAGES).map(|_| stage()).collect::<Result<_>>()?);
        }
        Ok(stages.as_mut().and_then(VecDeque::pop_front))
    }

    /// Copies `bytes` to `address` on `stream`; they may change when it returns.
    ///
    /// # Safety
    /// As for [`Device::upload`].
    pub(super) unsafe fn upload_on(&self, stream: sys::CUstream, address: u64, bytes: &[u8]) -> Result<()> {
        self.enter()?;
        let failed = |error| failed("copying to the GPU", error);
        for (index, chunk) in bytes.chunks(STAGE).enumerate() {
            let to = address + (index * STAGE) as u64;
            let stage = if bytes.len() > STAGE / 16 { self.stage()? } else { None };
            let Some(stage) = stage else {
                // SAFETY: the caller's promise; the driver has read a pageable slice when the call returns.
                unsafe { result::memcpy_htod_async(to, chunk, stream) }.map_err(failed)?;
                continue;
            };
            // SAFETY: the stage is ours, and its last copy is waited for before it is written; it lives as long as `self`.
            let copied = unsafe {
                event::synchronize(stage.copied.0).and_then(|()| {
                    let pinned = std::slice::from_raw_parts_mut(stage.buffer.address, chunk.len());
                    let pieces = pinned.par_chunks_mut(1 << 20).zip(chunk.par_chunks(1 << 20));
                    pieces.for_each(|(to, from)| to.copy_from_slice(from));
                    result::memcpy_htod_async(to, pinned, stream)?;
                    event::record(stage.copied.0, stream)
                })
            };
            lock(&self.stages).get_or_insert_default().push_back(stage);
            copied.map_err(failed)?;
        }
        Ok(())
    }

    /// Takes what is copied to `stage` into `bytes`, and gives the stage back.
    fn empty(&self, stage: Stage, bytes: &mut [u8]) -> Result<()> {
        // SAFETY: the event was recorded behind the copy, and the stage holds as many bytes.
        let copied = unsafe {
            event::synchronize(stage.copied.0).map(|()| {
                let pinned = std::slice::from_raw_parts(stage.buffer.address, bytes.len());
                bytes.par_chunks_mut(1 << 20).zip(pinned.par_chunks(1 << 20)).for_each(|(to, from)| to.copy_from_slice(from));
            })
        };
        lock(&self.stages).get_or_insert_default().push_back(stage);
        copied.map_err(|error| failed("copying from the GPU", error))
    }

    /// Copies what is at `address` behind everything launched.
    ///
    /// # Safety
    /// As for [`crate::backend::cuda::device::Device::download`].
    pub(super) unsafe fn download_in_stages(&self, address: u64, bytes: &mut [u8]) -> Result<()> {
        let failed = |error| failed("copying from the GPU", error);
        let large = bytes.len() > STAGE / 16;
        // One stage is emptied while the next is filled.
        let mut filled: VecDeque<(Stage, &mut [u8])> = VecDeque::new();
        let mut copied = Ok(());
        for (index, chunk) in bytes.chunks_mut(STAGE).enumerate() {
            let from = address + (index * STAGE) as u64;
            let stage = if large { self.stage()? } else { None };
            copied = match stage {
                // SAFETY: the caller's promise, and the copy is waited for.
                None => unsafe { result::memcpy_dtoh_async(chunk, from, self.stream) }.map_err(failed),
                Some(stage) => {
                    // SAFETY: the stage is ours, and its last copy is waited for; it lives until this one was.
                    let asked = unsafe {
                        event::synchronize(stage.copied.0).and_then(|()| {
                            let pinned = std::slice::from_raw_parts_mut(stage.buffer.address, chunk.len());
                            result::memcpy_dtoh_async(pinned, from, self.stream)?;
                            event::record(stage.copied.0, self.stream)
                        })
                    };
                    filled.push_back((stage, chunk));
                    let earlier = if filled.len() > 1 { filled.pop_front() } else { None };
                    asked.map_err(failed).and(earlier.map_or(Ok(()), |(stage, chunk)| self.empty(stage, chunk)))
                }
            };
            if copied.is_err() {
                break;
            }
        }
        // Every stage is given back, whatever became of the copies.
        for (stage, chunk) in filled {
            copied = self.empty(stage, chunk).and(copied);
        }
        copied?;
        self.synchronize()
    }
}
