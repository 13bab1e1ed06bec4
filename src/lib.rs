//! Spatial activations (xUnits) and depthwise convolution on the CPU.
//!
//! The arrows of this crate run one way: `python` calls [`net`] and [`ops`], which split whole
//! tensors over planes and threads and call `kernels`; a kernel works on one plane, on one thread,
//! and is generic over the instruction set that [`simd`] hands it. [`mod@reference`] is the naive
//! float64 twin that the tests compare everything with.

pub mod caching_allocator;
pub mod kernels;
pub mod machine;
pub mod memory;
pub mod net;
pub mod ops;
pub mod parallel;
#[cfg(feature = "python")]
mod python;
pub mod reference;
pub mod shape;
pub mod simd;
