//! Kernels: one plane, one thread, generic over the vectors. No threads, no Python, no allocation.
//!
//! A kernel is a struct of borrowed planes and constants; [`crate::simd::dispatch`] runs it. Slices
//! are checked by assertion at the head of `run`, so that the loops may use pointers.

pub mod activation;
pub mod blocked;
pub mod conv;
pub mod general;
pub mod peak;
pub mod product;
pub mod transpose;
pub mod winograd;

/// The most lanes that any vector has.
pub const MAX_LANES: usize = 16;
