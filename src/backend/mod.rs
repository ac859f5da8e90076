//! The operations a model needs, as one trait, and the machines that implement it.

pub mod cpu;
