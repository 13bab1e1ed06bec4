//! Kernels: one plane, one thread, generic over the vectors. No threads, no Python, no allocation.
//!
//! A kernel is a struct of borrowed planes and constants; [`crate::simd::dispatch`] runs it. Slices
//! are checked by assertion at the head of `run`, so that the loops may use pointers.

pub mod activation;
pub mod blocked;
pub mod channelwise;
pub mod conv;
pub mod filtered;
pub mod general;
pub mod masked;
pub mod minimal;
pub mod peak;
pub mod pixels;
pub mod product;
pub mod transpose;
pub mod winograd;

/// The most lanes that any vector has.
pub const MAX_LANES: usize = 16;

/// The elements from the first of the first row to the last of the last, of rows of `n` elements `ld`
/// apart. Panics if a number is zero or rows overlap.
fn extent(rows: usize, ld: usize, n: usize) -> usize {
    assert!(rows > 0 && n > 0 && (rows == 1 || ld >= n), "{rows} rows of {n}, {ld} apart");
    let extent = (rows - 1).checked_mul(ld).and_then(|start| start.checked_add(n));
    extent.filter(|&extent| extent <= isize::MAX as usize / 8).expect("too many elements")
}
