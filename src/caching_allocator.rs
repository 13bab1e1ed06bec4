//! Memory for large tensors that stays with the process from one tensor to the next, because the system takes
//! long to clear fresh pages: an xUnit's training step at 1 × 64 × 512 × 512, k = 7, takes 0.62 of the time so on
//! two threads and 0.8 on one, its evaluation 0.42 and 0.66 (Xeon). Below 32 MB the C library keeps memory, too, but
//! not always: there it is 0.5 to 1.
//!
//! What nobody has used for a second is at the system's disposal (`MADV_FREE`): it takes the pages, without a word,
//! when memory is short, and gives cleared ones where they are used again. To leave it what is used again at once
//! takes 3 % of a training step at 8 × 96 × 56 × 56 on two threads. Linux alone has all of this; elsewhere there are
//! no blocks.

use std::mem::ManuallyDrop;
use std::ptr::NonNull;
use std::sync::{LazyLock, Mutex, MutexGuard, TryLockError};
use std::time::{Duration, Instant};

use crate::memory::PAGE;

/// Bytes of the smallest tensor that has a block: of whole huge pages, so that a fifth of it at most is unused.
pub const SMALLEST: usize = 8 << 20;
/// Most bytes that are kept unused, where `XUNIT_CACHE_MB` does not say.
const LIMIT: usize = 1 << 30;
/// How long something is unused before it is left to the system: at the next call, as nobody keeps watch.
const REST: Duration = Duration::from_secs(1);

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

/// What a tensor is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// It is written past the caches.
    Result,
    /// It is written and soon read again.
    Saved,
}

/// Memory of a tensor, of any content; it goes back to the process's allocator when this is dropped.
#[derive(Debug)]
pub struct Block {
    mapping: ManuallyDrop<Mapping>,
    purpose: Purpose,
}

impl Block {
    /// At least so many bytes, aligned to a huge page; None where the allocator has none to give.
    pub fn new(bytes: usize, purpose: Purpose) -> Option<Self> {
        if ALLOCATOR.limit == 0 || bytes < SMALLEST {
            return None;
        }
        let len = bytes.checked_next_multiple_of(PAGE)?;
        let kept = ALLOCATOR.kept().and_then(|mut kept| kept.take(len, purpose));
        let mapping = kept.or_else(|| Mapping::new(len)).or_else(|| {
            // What is kept counts where addresses or promises of memory are limited.
            empty_cache();
            Mapping::new(len)
        })?;
        Some(Self { mapping: ManuallyDrop::new(mapping), purpose })
    }

    /// The first byte. They may be read and written as long as this lives.
    pub fn as_ptr(&self) -> *mut u8 {
        self.mapping.data.as_ptr()
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: nobody uses it again.
        let mapping = unsafe { ManuallyDrop::take(&mut self.mapping) };
        let unused = Unused { mapping, purpose: self.purpose, since: Instant::now(), lent: false };
        let given_up = match ALLOCATOR.kept() {
            Some(mut kept) => kept.put(unused, ALLOCATOR.limit),
            None => vec![unused],
        };
        // Here, where others may have the lock.
        drop(given_up);
    }
}

/// Gives to the system what is kept unused, and returns how many bytes that were.
pub fn empty_cache() -> usize {
    // Others have the lock for microseconds; in a child that was forked meanwhile, for ever.
    let kept = (0..1000).find_map(|_| {
        let kept = ALLOCATOR.kept();
        if kept.is_none() {
            std::thread::yield_now();
        }
        kept
    });
    let given_up = kept.map(|mut kept| std::mem::take(&mut *kept)).unwrap_or_default();
    given_up.0.iter().map(|unused| unused.mapping.len).sum()
}

/// A mapping that nobody uses.
#[derive(Debug)]
struct Unused {
    mapping: Mapping,
    /// Of the tensor that was there.
    purpose: Purpose,
    since: Instant,
    /// Whether it is left to the system.
    lent: bool,
}

/// All of them; the last one was given back last, and may be in a cache yet.
#[derive(Debug, Default)]
struct Kept(Vec<Unused>);

impl Kept {
    /// One that will do and is at most a quarter larger: rather of the same purpose, then rather small. Saved
    /// tensors find their lines in the cache so, from where results would have to push others: forward takes 1.3 ms
    /// for 2.05 (`xUnitS`, k = 7, 8 × 96 × 56 × 56, two threads).
    fn take(&mut self, len: usize, purpose: Purpose) -> Option<Mapping> {
        let fits = |unused: &Unused| (len..=len + len / 4).contains(&unused.mapping.len);
        let fit = self.0.iter().enumerate().rev().filter(|(_, unused)| fits(unused));
        let rank = |unused: &Unused| (unused.purpose != purpose, unused.mapping.len);
        let at = fit.min_by_key(|(_, unused)| rank(unused)).map(|(at, _)| at)?;
        Some(self.0.remove(at).mapping)
    }

    /// Keeps one more, and returns those that have lain there longest, down to so many bytes, or that one if it
    /// is larger.
    fn put(&mut self, unused: Unused, limit: usize) -> Vec<Unused> {
        if unused.mapping.len > limit {
            return vec![unused];
        }
        for old in &mut self.0 {
            if !old.lent && unused.since.saturating_duration_since(old.since) >= REST {
                old.mapping.lend();
                old.lent = true;
            }
        }
        self.0.push(unused);
        let mut bytes: usize = self.0.iter().map(|unused| unused.mapping.len).sum();
        let too_many = self.0.iter().take_while(|unused| {
            let too_much = bytes > limit;
            bytes -= if too_much { unused.mapping.len } else { 0 };
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

    fn unused(pages: usize, purpose: Purpose) -> Unused {
        let mapping = Mapping::new(pages * PAGE).unwrap();
        Unused { mapping, purpose, since: Instant::now(), lent: false }
    }

    fn pages(kept: &[Unused]) -> Vec<usize> {
        kept.iter().map(|unused| unused.mapping.len / PAGE).collect()
    }

    #[test]
    fn the_oldest_are_given_up_and_left_to_the_system() {
        let (mut kept, limit) = (Kept::default(), 4 * PAGE);
        let new = |pages| unused(pages, Purpose::Result);
        for pages in [1, 2, 1] {
            assert!(kept.put(new(pages), limit).is_empty());
        }
        // Six pages: one is not enough.
        assert_eq!(pages(&kept.put(new(2), limit)), [1, 2]);
        assert_eq!(pages(&kept.put(new(8), limit)), [8]);
        assert_eq!(pages(&kept.0), [1, 2]);
        assert!(kept.0.iter().all(|unused| !unused.lent));
        kept.0[0].since = Instant::now().checked_sub(REST).unwrap();
        assert!(kept.put(new(1), limit).is_empty());
        assert_eq!(
            kept.0.iter().map(|unused| unused.lent).collect::<Vec<_>>(),
            [true, false, false]
        );
    }

    #[test]
    fn the_last_of_the_purpose_is_taken_and_the_smallest_that_is_large_enough() {
        use Purpose::{Result, Saved};
        let mut kept = Kept::default();
        for (pages, purpose) in [(8, Saved), (8, Result), (8, Saved), (8, Result), (10, Saved)] {
            assert!(kept.put(unused(pages, purpose), usize::MAX).is_empty());
        }
        let places: Vec<_> = kept.0.iter().map(|unused| unused.mapping.data).collect();
        let mut take = |pages: usize, purpose| {
            let taken = kept.take(pages * PAGE, purpose)?;
            Some(places.iter().position(|&place| place == taken.data).unwrap())
        };
        assert_eq!(take(11, Saved), None);
        assert_eq!([take(8, Saved), take(8, Saved), take(8, Saved)], [2, 0, 4].map(Some));
        assert_eq!([take(7, Saved), take(8, Result), take(8, Result)], [Some(3), Some(1), None]);
        for pages in [13, 10, 11] {
            assert!(kept.put(unused(pages, Saved), usize::MAX).is_empty());
        }
        let mut take = |len| kept.take(len * PAGE, Result).map(|mapping| mapping.len / PAGE);
        assert_eq!([take(9), take(9), take(9)], [Some(10), Some(11), None]);
    }

    #[test]
    fn a_block_comes_back_from_other_threads_too() {
        let new = |bytes| Block::new(bytes, Purpose::Saved);
        assert!(new(SMALLEST - 1).is_none() && new(usize::MAX).is_none());
        let block = new(SMALLEST + 1).unwrap();
        let at = block.as_ptr().addr();
        std::thread::spawn(move || drop(block)).join().unwrap();
        let block = new(SMALLEST + 1).unwrap();
        assert_eq!(block.as_ptr().addr(), at);
        assert_ne!(new(SMALLEST + 1).unwrap().as_ptr().addr(), at);
        drop(block);
        assert!(empty_cache() > SMALLEST);
    }
}
