//! Memory whose size follows from the data: where there is not enough of it, the operation unwinds
//! with [`NoMemory`], which the binding turns into an exception. The standard library would abort
//! the process.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

/// There was no memory for so many bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoMemory(pub usize);

/// Makes `vec` `len` elements long; new ones are `value`.
pub(crate) fn resize<T: Copy>(vec: &mut Vec<T>, len: usize, value: T) {
    if len > vec.len() && vec.try_reserve_exact(len - vec.len()).is_err() {
        // No hook is called: nobody need read of this on the standard error.
        resume_unwind(Box::new(NoMemory(len.saturating_mul(size_of::<T>()))));
    }
    vec.resize(len, value);
}

/// A vector of `len` times `value`.
pub(crate) fn filled<T: Copy>(len: usize, value: T) -> Vec<T> {
    let mut vec = Vec::new();
    resize(&mut vec, len, value);
    vec
}

/// What `f` returns, or that it found too little memory.
pub fn enough<R>(f: impl FnOnce() -> R) -> Result<R, NoMemory> {
    catch_unwind(AssertUnwindSafe(f)).map_err(|panic| match panic.downcast() {
        Ok(no_memory) => *no_memory,
        Err(panic) => resume_unwind(panic),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::depthwise_forward;
    use crate::parallel::Threads;
    use crate::shape::{Batch, Conv, Geometry};

    #[test]
    fn too_little_memory_is_an_error() {
        // A padded plane of 2^48 elements around one.
        let padding = [1 << 23; 4];
        let conv = Conv { kh: 1, kw: 1, stride: [1 << 23; 2], padding, dilation: [1, 1] };
        let geometry = Geometry::new(Batch { n: 1, c: 2, h: 1, w: 1 }, conv).unwrap();
        let mut y = vec![0.0f32; geometry.output().size()];
        for threads in [1, 2] {
            let threads = Threads::Own(threads);
            let run = || depthwise_forward(&geometry, &[1.0; 2], &[1.0; 2], None, &mut y, threads);
            let NoMemory(bytes) = enough(run).unwrap_err();
            assert!(bytes >= 1 << 50, "{bytes}");
        }
        assert_eq!(enough(|| filled(3, 1u8)), Ok(vec![1; 3]));
    }
}
