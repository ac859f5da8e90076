//! Which machine a command computes on, as `--device` names it.

use std::fmt;
use std::str::FromStr;

use super::cuda::driver;
use crate::error::{Error, Result};

/// `cpu`, `cuda:N`, or `emulated`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    #[default]
    Cpu,
    /// The driver's number of a GPU.
    Cuda(usize),
    /// The GPU's kernels on the processor, to prove them.
    Emulated,
}

impl DeviceChoice {
    /// Whether it is there: an error says what is missing.
    pub fn check(self) -> Result<()> {
        match self {
            Self::Cpu | Self::Emulated => Ok(()),
            Self::Cuda(index) => driver::check(index),
        }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
            Self::Emulated => f.write_str("emulated"),
        }
    }
}

impl FromStr for DeviceChoice {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            "emulated" => Ok(Self::Emulated),
            _ => text.strip_prefix("cuda:").and_then(|index| index.parse().ok()).map(Self::Cuda).ok_or_else(|| {
                Error::input(format!("unknown device `{text}`")).hint("the devices are cpu, cuda:0 (and further GPUs), and emulated")
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_round_trip_as_text() {
        for text in ["cpu", "cuda:0", "cuda:3", "emulated"] {
            assert_eq!(text.parse::<DeviceChoice>().unwrap().to_string(), text);
        }
        assert_eq!("cuda".parse::<DeviceChoice>().unwrap(), DeviceChoice::Cuda(0));
        assert!("cuda:x".parse::<DeviceChoice>().is_err());
    }
}
