//! Transforms that leave a model's float function unchanged and make it easier to quantize.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A function-preserving change of a model's weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Transform {
    /// Norm weights into the linears that follow (QuaRot).
    FoldNorms,
    /// An orthogonal Q on the residual stream, fused offline into every reader and writer: eigenvectors of the
    /// normalised stream's second moment times a full Hadamard matrix (MambaQuant's KLT-enhanced rotation).
    RotateResidual,
    /// The same with the Hadamard matrix alone (QuaRot), to see what the eigenvectors add.
    HadamardResidual,
    /// Scales between `v_proj` and `o_proj` (SmoothQuant), before any rotation of them.
    SmoothVo,
    /// Scales between `up_proj` and `down_proj` through relu²: relu²(s·x) = s²·relu²(x).
    SmoothRelu2,
    /// Scales between the gated norm's weight and `out_proj` (the smoothing of MambaQuant's smooth-fused rotation).
    SmoothOut,
    /// Scales between `in_proj`'s rows of x, B and C and the depthwise convolution (MambaQuant).
    SmoothConv,
    /// Per-head Hadamard on queries and keys, all offline since there is no rotary embedding (QuaRot).
    RotateQk,
    /// Per-head Hadamard on values, undone in `o_proj` (QuaRot).
    RotateVo,
    /// Online block-Hadamard behind the gated norm, its inverse fused into `out_proj` (the rotation of MambaQuant's
    /// smooth-fused rotation).
    RotateOut,
    /// Online block-Hadamard behind relu², its inverse fused into `down_proj` (QuaRot).
    RotateRelu2,
    /// Online Hadamard U on B and C of a state group and V on x of a head, behind the convolution; V is undone on the
    /// scan's output. Exact in Mamba-2, where a head decays by one scalar.
    RotateState,
}

impl Transform {
    pub const ALL: [Self; 12] = [
        Self::FoldNorms,
        Self::RotateResidual,
        Self::HadamardResidual,
        Self::SmoothVo,
        Self::SmoothRelu2,
        Self::SmoothOut,
        Self::SmoothConv,
        Self::RotateQk,
        Self::RotateVo,
        Self::RotateOut,
        Self::RotateRelu2,
        Self::RotateState,
    ];

    /// The word used in recipes.
    pub fn name(self) -> &'static str {
        match self {
            Self::FoldNorms => "fold-norms",
            Self::RotateResidual => "rotate-residual",
            Self::HadamardResidual => "hadamard-residual",
            Self::SmoothVo => "smooth-vo",
            Self::SmoothRelu2 => "smooth-relu2",
            Self::SmoothOut => "smooth-out",
            Self::SmoothConv => "smooth-conv",
            Self::RotateQk => "rotate-qk",
            Self::RotateVo => "rotate-vo",
            Self::RotateOut => "rotate-out",
            Self::RotateRelu2 => "rotate-relu2",
            Self::RotateState => "rotate-state",
        }
    }

    /// Whether the model has to compute something more when it runs.
    pub fn is_online(self) -> bool {
        matches!(self, Self::RotateOut | Self::RotateRelu2 | Self::RotateState)
    }

    /// Whether the stream between the blocks is no longer the checkpoint's.
    pub fn turns_residual(self) -> bool {
        matches!(self, Self::RotateResidual | Self::HadamardResidual)
    }

    /// Whether it needs the largest magnitudes of activations on the calibration text.
    pub fn smooths(self) -> bool {
        matches!(self, Self::SmoothVo | Self::SmoothRelu2 | Self::SmoothOut | Self::SmoothConv)
    }
}

impl fmt::Display for Transform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
