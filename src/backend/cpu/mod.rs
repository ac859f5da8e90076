//! The CPU backend.

pub mod int_matmul;
