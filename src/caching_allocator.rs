//! Memory for large tensors that stays with the process from one tensor to the next, because the system takes
//! long to clear fresh pages: an xUnit's training step at 1 × 64 × 512 × 512, k = 7, takes 0.62 of the time so on
//! two threads and 0.8 on one, its evaluation 0.42 and 0.66 (Xeon). Below 32 MB the C library keeps memory, too, if
//! less reliably: 0.9 to 1 of an evaluation's time, and the same for training.
//!
//! What nobody uses is at the system's disposal meanwhile (`MADV_FREE`): it takes the pages, without a word, when
//! memory is short, and gives cleared ones where they are used again. Linux alone has all of this; elsewhere
//! there are no blocks.

use std::ptr::NonNull;
use std::sync::{LazyLock, Mutex, MutexGuard, TryLockError};

/// Bytes of a huge page, which blocks consist of.
const PAGE: usize = 2 << 20;
/// Bytes of the smallest tensor that has a block, at most a quarter of which is not used.
pub const SMALLEST: usize = 8 << 20;
/// Most bytes that are kept unused, where `XUNIT_CACHE_MB` does not say.
const LIMIT: usize = 1 << 30;

/// The limit in bytes that `XUNIT_CACHE_MB` asks for, if it is set and not empty. Errors if it is no whole number.
pub fn requested_limit() -> Result<Option<usize>, String> {
    let text = std::env::var("XUNIT_CACHE_MB").unwrap_or_default();
    if text.trim().is_empty() {
        return Ok(None);
    }
    match text.trim().parse::<usize>() {
        Ok(mb) => Ok(Some(mb.saturating_mul(1 << 20))),
        Err(_) => Err(format!("XUNIT_CACHE_MB is {text:?}, which is no whole number of MiB")),
    }
}

/// Pages of the system, given back to it when this is dropped.
#[derive(Debug)]
struct Mapping {
    data: NonNull<u8>,
    len: usize,
}

// SAFETY: it owns its pages, as a vector does.
unsafe impl Send for Mapping {}

#[cfg(target_os = "linux")]
impl Mapping {
    /// Huge pages, as many as `len` bytes are.
    fn new(len: usize) -> Option<Self> {
        let whole = Self::map(len.checked_add(PAGE)?)?;
        let skipped = whole.data.align_offset(PAGE);
        let whole = whole.cut(skipped..skipped + len);
        crate::memory::huge_pages(whole.data.as_ptr(), len);
        Some(whole)
    }

    fn map(len: usize) -> Option<Self> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: it takes no memory that anybody else has.
        let data = unsafe { libc::mmap(std::ptr::null_mut(), len, access, kind, -1, 0) };
        (data != libc::MAP_FAILED).then(|| Self { data: NonNull::new(data).unwrap().cast(), len })
    }

    /// These bytes alone, whole pages.
    fn cut(self, bytes: std::ops::Range<usize>) -> Self {
        let Self { data, len } = self;
        std::mem::forget(self);
        assert!(bytes.start < bytes.end && bytes.end <= len);
        for rest in [0..bytes.start, bytes.end..len] {
            if !rest.is_empty() {
                // SAFETY: both ends are inside the mapping.
                drop(Self { data: unsafe { data.add(rest.start) }, len: rest.len() });
            }
        }
        // SAFETY: as above.
        Self { data: unsafe { data.add(bytes.start) }, len: bytes.len() }
    }

    /// Leaves the pages to the system, should it need them, until they are written again.
    fn lend(&self) {
        // SAFETY: they are this mapping's, and nobody reads them before they are written. It may be refused.
        unsafe { libc::madvise(self.data.as_ptr().cast(), self.len, libc::MADV_FREE) };
    }
}

#[cfg(target_os = "linux")]
impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: whole pages of this mapping, which nobody else has.
        unsafe { libc::munmap(self.data.as_ptr().cast(), self.len) };
    }
}

#[cfg(not(target_os = "linux"))]
impl Mapping {
    fn new(_: usize) -> Option<Self> {
        None
    }

    fn lend(&self) {}
}

/// Memory of a tensor, of any content; it goes back to the process's allocator when this is dropped.
#[derive(Debug)]
pub struct Block(Option<Mapping>);

impl Block {
    /// At least so many bytes, aligned to a huge page; None where the allocator has none to give.
    pub fn new(bytes: usize) -> Option<Self> {
        if ALLOCATOR.limit == 0 || bytes < SMALLEST {
            return None;
        }
        let len = bytes.checked_next_multiple_of(PAGE)?;
        let kept = ALLOCATOR.kept().and_then(|mut kept| kept.take(len));
        kept.or_else(|| Mapping::new(len)).map(|mapping| Self(Some(mapping)))
    }

    pub fn as_ptr(&self) -> *mut u8 {
        self.0.as_ref().map_or(std::ptr::null_mut(), |mapping| mapping.data.as_ptr())
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        if let Some(mapping) = self.0.take() {
            mapping.lend();
            let given_up = match ALLOCATOR.kept() {
                Some(mut kept) => kept.put(mapping, ALLOCATOR.limit),
                None => vec![mapping],
            };
            // Here, where nobody waits for it.
            drop(given_up);
        }
    }
}

/// Gives to the system what is kept unused, and returns how many bytes that were.
pub fn empty_cache() -> usize {
    let given_up = ALLOCATOR.kept().map(|mut kept| std::mem::take(&mut *kept)).unwrap_or_default();
    given_up.0.iter().map(|mapping| mapping.len).sum()
}

/// The mappings that nobody uses; the last one was given back last, and may be in a cache yet.
#[derive(Debug, Default)]
struct Kept(Vec<Mapping>);

impl Kept {
    fn take(&mut self, len: usize) -> Option<Mapping> {
        let at = self.0.iter().rposition(|mapping| mapping.len == len)?;
        Some(self.0.remove(at))
    }

    /// Keeps one more, and returns those that have lain there longest, down to so many bytes.
    fn put(&mut self, mapping: Mapping, limit: usize) -> Vec<Mapping> {
        self.0.push(mapping);
        let mut bytes: usize = self.0.iter().map(|mapping| mapping.len).sum();
        let too_many = self.0.iter().take_while(|mapping| {
            let too_much = bytes > limit;
            bytes -= if too_much { mapping.len } else { 0 };
            too_much
        });
        let too_many = too_many.count();
        self.0.drain(..too_many).collect()
    }
}

struct Allocator {
    limit: usize,
    kept: Mutex<Kept>,
}

static ALLOCATOR: LazyLock<Allocator> = LazyLock::new(|| Allocator {
    limit: requested_limit().ok().flatten().unwrap_or(LIMIT),
    kept: Mutex::default(),
});

impl Allocator {
    /// None while another thread is at it; in a child that was forked then, for ever.
    fn kept(&self) -> Option<MutexGuard<'_, Kept>> {
        match self.kept.try_lock() {
            Ok(kept) => Some(kept),
            Err(TryLockError::Poisoned(kept)) => Some(kept.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_aligned_pages_of_their_own() {
        for len in [PAGE, 3 * PAGE, 8 * PAGE] {
            let mappings = [(); 3].map(|()| Mapping::new(len).unwrap());
            for (i, mapping) in mappings.iter().enumerate() {
                assert!(mapping.len == len && mapping.data.addr().get().is_multiple_of(PAGE));
                // SAFETY: so many bytes are this mapping's.
                unsafe { mapping.data.write_bytes(i as u8 + 1, len) };
            }
            for (i, mapping) in mappings.iter().enumerate() {
                // SAFETY: as above; they were written.
                let bytes = unsafe { std::slice::from_raw_parts(mapping.data.as_ptr(), len) };
                assert!(bytes.iter().all(|&byte| byte == i as u8 + 1));
                mapping.lend();
                // SAFETY: as above.
                unsafe { mapping.data.write_bytes(7, len) };
            }
        }
        assert!(Mapping::new(usize::MAX).is_none() && Mapping::new(1 << 60).is_none());
    }

    #[test]
    fn the_last_of_the_same_length_is_taken_and_the_oldest_are_given_up() {
        let mut kept = Kept::default();
        let new = |pages| Mapping::new(pages * PAGE).unwrap();
        let at = |mapping: &Mapping| mapping.data;
        let [a, b, c] = [1, 2, 1].map(new);
        let (first, second, third) = (at(&a), at(&b), at(&c));
        for mapping in [a, b, c] {
            assert!(kept.put(mapping, 4 * PAGE).is_empty());
        }
        assert!(kept.take(3 * PAGE).is_none());
        let taken = kept.take(PAGE).unwrap();
        assert_eq!(at(&taken), third);
        assert!(kept.put(taken, 4 * PAGE).is_empty());
        // Five pages: the first one is too much; then six: the second one.
        assert_eq!(kept.put(new(1), 4 * PAGE).iter().map(at).collect::<Vec<_>>(), [first]);
        assert_eq!(kept.put(new(2), 4 * PAGE).iter().map(at).collect::<Vec<_>>(), [second]);
        let lens: Vec<_> = kept.0.iter().map(|mapping| mapping.len / PAGE).collect();
        assert_eq!(lens, [1, 1, 2]);
        // More than all that may be kept.
        assert_eq!(kept.put(new(8), 4 * PAGE).len(), 4);
        assert!(kept.0.is_empty());
    }

    #[test]
    fn a_block_comes_back_from_other_threads_too() {
        assert!(Block::new(SMALLEST - 1).is_none() && Block::new(usize::MAX).is_none());
        let block = Block::new(SMALLEST + 1).unwrap();
        let at = block.as_ptr().addr();
        std::thread::spawn(move || drop(block)).join().unwrap();
        let block = Block::new(SMALLEST + 1).unwrap();
        assert_eq!(block.as_ptr().addr(), at);
        assert_ne!(Block::new(SMALLEST + 1).unwrap().as_ptr().addr(), at);
        drop(block);
        assert!(empty_cache() > SMALLEST);
    }
}
