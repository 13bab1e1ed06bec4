//! Memory whose size follows from the data: where there is not enough of it, the operation unwinds
//! with [`NoMemory`], which the binding turns into an exception. The standard library would abort
//! the process.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ops::{Deref, DerefMut};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr::NonNull;
use std::sync::Arc;

/// There was no memory for so many bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoMemory(pub usize);

/// A vector of `len` times `value`.
pub(crate) fn filled<T: Copy>(len: usize, value: T) -> Vec<T> {
    let mut vec = Vec::<T>::new();
    let bytes = len.saturating_mul(size_of::<T>());
    if vec.try_reserve_exact(len).is_err() {
        // No hook is called: nobody need read of this on the standard error.
        resume_unwind(Box::new(NoMemory(bytes)));
    }
    huge_pages(vec.as_mut_ptr().cast(), bytes);
    vec.resize(len, value);
    vec
}

/// A cache line, for alignment.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(crate) struct Line(pub(crate) [u8; 64]);

/// Bytes of a huge page.
pub(crate) const PAGE: usize = 2 << 20;

/// Memory of the system's allocator, zeroed.
#[derive(Debug)]
struct Allocation {
    data: NonNull<u8>,
    layout: Layout,
}

// SAFETY: nobody reads or writes through it.
unsafe impl Send for Allocation {}
// SAFETY: as above.
unsafe impl Sync for Allocation {}

impl Drop for Allocation {
    fn drop(&mut self) {
        // SAFETY: it was allocated with this layout.
        unsafe { dealloc(self.data.as_ptr(), self.layout) }
    }
}

/// Numbers, zero at first, aligned to a cache line. They take no memory before they are written.
#[derive(Debug)]
pub(crate) struct Aligned {
    data: NonNull<f32>,
    len: usize,
    /// What these numbers are in, and nobody else uses them.
    _whole: Arc<Allocation>,
}

// SAFETY: it owns its numbers, as a vector does.
unsafe impl Send for Aligned {}
// SAFETY: as above.
unsafe impl Sync for Aligned {}

impl Aligned {
    pub(crate) fn new(len: usize) -> Self {
        Self::several(&[len]).remove(0)
    }

    /// So many each, in the same few huge pages where there are such. What goes through many small
    /// buffers would else wait for the addresses of their pages.
    pub(crate) fn several(lens: &[usize]) -> Vec<Self> {
        const LINE: usize = align_of::<Line>();
        let lines = |len: usize| len.div_ceil(LINE / size_of::<f32>());
        let total = lens.iter().fold(0_usize, |sum, &len| sum.saturating_add(lines(len)));
        let bytes = total.saturating_mul(LINE);
        // More than is used, as the allocator would write to aligned memory at once; from half a huge page on
        // in whole ones.
        let (align, bytes) = match bytes < PAGE / 2 {
            true => (LINE, bytes),
            false => (PAGE, bytes.checked_next_multiple_of(PAGE).unwrap_or(bytes)),
        };
        let Ok(layout) = Layout::array::<u8>(bytes.saturating_add(align)) else {
            resume_unwind(Box::new(NoMemory(bytes)));
        };
        // SAFETY: the layout is not empty.
        let Some(data) = NonNull::new(unsafe { alloc_zeroed(layout) }) else {
            resume_unwind(Box::new(NoMemory(bytes)));
        };
        let whole = Arc::new(Allocation { data, layout });
        let start = data.align_offset(align);
        huge_pages(data.as_ptr().wrapping_add(start), bytes);
        let mut line = 0;
        let next = |&len: &usize| {
            // SAFETY: the lines of all lengths are in what was allocated.
            let data = unsafe { data.add(start + line * LINE) }.cast();
            line += lines(len);
            Self { data, len, _whole: whole.clone() }
        };
        lens.iter().map(next).collect()
    }

    /// Where they are. Who writes there must be alone.
    pub(crate) fn as_non_null(&self) -> NonNull<f32> {
        self.data
    }

    /// Moves the numbers of all to one place.
    pub(crate) fn gather(all: &mut [&mut Self]) {
        let lens: Vec<_> = all.iter().map(|one| one.len).collect();
        for (one, mut new) in all.iter_mut().zip(Self::several(&lens)) {
            new.copy_from_slice(one);
            **one = new;
        }
    }
}

impl Deref for Aligned {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        // SAFETY: so many were allocated, for this alone; zeroed, they are numbers.
        unsafe { std::slice::from_raw_parts(self.data.as_ptr(), self.len) }
    }
}

impl DerefMut for Aligned {
    fn deref_mut(&mut self) -> &mut [f32] {
        // SAFETY: as in `deref`.
        unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr(), self.len) }
    }
}

/// Asks the system for huge pages inside an allocation, which may be the caller's: most of the time
/// that fresh memory takes goes by the page. An xUnit's forward of 1 × 64 × 512 × 512, k = 7, takes 43 ms
/// with it and 82 without (Zen 4).
pub(crate) fn huge_pages(data: *mut u8, bytes: usize) {
    #[cfg(all(target_os = "linux", not(miri)))]
    {
        let skipped = data.align_offset(PAGE);
        if bytes >= skipped + PAGE {
            // SAFETY: inside one allocation; the advice changes no byte. It may be refused.
            unsafe {
                let start = data.add(skipped).cast();
                libc::madvise(start, (bytes - skipped) / PAGE * PAGE, libc::MADV_HUGEPAGE);
            }
        }
    }
    #[cfg(any(not(target_os = "linux"), miri))]
    let _ = (data, bytes);
}

/// Whether there are pages behind so many bytes, as a page in their middle tells; where there are none, the first
/// to write finds them cleared, and in the cache. False where the system does not tell.
pub(crate) fn is_resident(data: *const u8, bytes: usize) -> bool {
    #[cfg(all(target_os = "linux", not(miri)))]
    {
        // A multiple of the size of any system's pages.
        const UNIT: usize = 64 << 10;
        let middle = data.wrapping_add(bytes / 2);
        let page = middle.wrapping_sub(middle.addr() % UNIT);
        let mut found = 0;
        // SAFETY: it writes one byte, for the one page; where there is no memory, it says so.
        unsafe { libc::mincore(page.cast_mut().cast(), 1, &mut found) == 0 && found & 1 == 1 }
    }
    #[cfg(any(not(target_os = "linux"), miri))]
    {
        let _ = (data, bytes);
        false
    }
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
    fn numbers_side_by_side_are_aligned_zero_and_apart() {
        for lens in [&[3, 0, 16, 1][..], &[1 << 19, 5, 17], &[]] {
            let mut all = Aligned::several(lens);
            for (i, (one, &len)) in all.iter_mut().zip(lens).enumerate() {
                assert!(one.len() == len && one.as_ptr().addr().is_multiple_of(64));
                assert!(one.iter().all(|&x| x == 0.0));
                one.fill(i as f32 + 1.0);
            }
            Aligned::gather(&mut all.iter_mut().rev().collect::<Vec<_>>());
            for (i, (one, &len)) in all.iter().zip(lens).enumerate() {
                assert!(one.len() == len && one.iter().all(|&x| x == i as f32 + 1.0));
            }
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn memory_is_resident_once_it_is_written() {
        let bytes = 64 << 20;
        let mut zeros = vec![0u8; bytes];
        let data = zeros.as_mut_ptr();
        assert!(!is_resident(data, bytes));
        zeros[bytes / 2 - (100 << 10)..bytes / 2 + 1].fill(1);
        assert!(is_resident(data, bytes));
        assert!(!is_resident(std::ptr::null(), 0));
    }

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
