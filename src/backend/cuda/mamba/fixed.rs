//! Launches of `kernels/fixed.cu`: int8 internals under static scales, four channels a thread.

use super::cache::Windows;
use super::tables::Level;
use super::{Parameters, Slices, Taps};
use crate::backend::cuda::device::{Arguments, Buffer};
use crate::backend::cuda::{Cuda, CudaTensor};
use crate::backend::{MambaShape, StateRotation};
use crate::error::Result;

/// Channels and tokens of a block.
const CHANNELS: usize = 512;
const TOKENS: usize = 8;
/// Taps of the convolution, and the largest block of a rotation.
const TAPS: usize = 4;
const BLOCK: usize = 128;

/// Static scales in front of and behind the convolution, and the rotation's blocks.
pub(super) struct Fixed<'a> {
    in_front: &'a Buffer,
    behind: &'a Buffer,
    rotation: StateRotation,
}

/// Whether the kernels serve mixers of this shape: slices are of whole fours, and blocks begin where whole warps may.
pub fn serves(shape: &MambaShape, rotation: Option<StateRotation>) -> bool {
    let fours = [shape.inner(), shape.conv_channels(), shape.heads].into_iter().all(|count| count.is_multiple_of(4));
    let blocks = rotation.is_none_or(|rotation| {
        rotation.head.max(rotation.state) <= BLOCK && shape.inner().is_multiple_of(rotation.state.max(rotation.head))
    });
    fours && blocks && shape.kernel == TAPS
}

/// What they need of a mixer that they serve.
pub(super) fn of<'a>(parameters: &'a Parameters, shape: &MambaShape) -> Option<Fixed<'a>> {
    let (in_front, behind) = parameters.fixed().filter(|_| serves(shape, parameters.rotation))?;
    Some(Fixed { in_front, behind, rotation: parameters.rotation.unwrap_or(StateRotation { state: 1, head: 1 }) })
}

impl Cuda {
    /// Codes of `in_proj`'s output.
    pub(super) fn round_by_fours(&self, fixed: &Fixed<'_>, projected: &CudaTensor) -> Result<Buffer> {
        let codes = self.buffer::<i8>(projected.rows * projected.cols)?;
        let arguments = Arguments::default().with(projected.buffer()).with(projected.rows).with(projected.cols).with(fixed.in_front);
        let blocks = [projected.cols.div_ceil(CHANNELS), projected.rows.div_ceil(TOKENS), 1];
        self.launch("fixed_round", blocks, 128, 0, arguments.with(&codes).with(&*self.fault()?))?;
        Ok(codes)
    }

    /// x | B | C of the sequences of a level behind the convolution, into `out`.
    #[allow(clippy::too_many_arguments, reason = "what the kernel reads and writes")]
    pub(super) fn convolve_by_fours(
        &self,
        fixed: &Fixed<'_>,
        slices: &Slices,
        taps: &Taps,
        parameters: &Parameters,
        shape: &MambaShape,
        level: &Level,
        windows: Option<&Buffer>,
        out: &Buffer,
    ) -> Result<()> {
        let arguments = Arguments::default().with(&slices.codes).with(shape.projected()).with(shape.inner());
        let arguments = arguments.with(&taps.codes).with(&taps.scales).with(&parameters.conv_bias).with(shape.conv_channels());
        let arguments = arguments.with(fixed.rotation.head).with(fixed.rotation.state).with(&level.sequences).with(windows);
        let blocks = [shape.conv_channels().div_ceil(CHANNELS), level.longest.div_ceil(TOKENS), level.count];
        self.launch("fixed_conv", blocks, 128, 0, arguments.with(fixed.behind).with(out).with(&*self.fault()?))
    }

    /// A step of every slot: x | B | C behind the convolution into `out`, what the codes of z and dt stand for into `widened`.
    #[allow(clippy::too_many_arguments, reason = "what the kernel reads and writes")]
    pub(super) fn convolve_step_by_fours(
        &self,
        fixed: &Fixed<'_>,
        projected: &CudaTensor,
        taps: &Taps,
        parameters: &Parameters,
        shape: &MambaShape,
        windows: &Windows,
        widened: &CudaTensor,
        out: &Buffer,
    ) -> Result<()> {
        let arguments = Arguments::default().with(projected.buffer()).with(fixed.in_front).with(&taps.codes).with(&taps.scales);
        let arguments = arguments.with(&parameters.conv_bias).with(shape.inner()).with(shape.conv_channels()).with(shape.heads);
        let arguments = arguments.with(fixed.rotation.head).with(fixed.rotation.state).with(&windows.values).with(fixed.behind);
        let blocks = [projected.cols.div_ceil(CHANNELS), projected.rows, 1];
        self.launch("fixed_conv_step", blocks, 128, 0, arguments.with(widened.buffer()).with(out).with(&*self.fault()?))
    }

    /// Turns y back, in blocks of `block` channels, and multiplies it by its gate.
    pub(super) fn turn_by_fours(&self, fixed: &Fixed<'_>, y: &CudaTensor, block: usize, slices: &Slices, shape: &MambaShape) -> Result<()> {
        let arguments = Arguments::default().with(y.buffer()).with(y.rows).with(y.cols).with(block);
        let arguments = arguments.with(&slices.codes).with(shape.projected()).with(fixed.in_front);
        self.launch("fixed_turn", [y.cols.div_ceil(CHANNELS), y.rows.div_ceil(TOKENS), 1], 128, 0, arguments)
    }
}
