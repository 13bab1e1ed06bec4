//! Threads: how many, and the private pools they come from. The only file that names rayon.
//!
//! A pool is keyed by the process and its size and is never dropped: a forked child inherits the
//! memory of its parent's pool but none of its threads, so that it would wait for ever on it.

use std::any::Any;
use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::simd;

/// A pool of so many threads of a process.
struct Pool {
    process: u32,
    threads: usize,
    pool: ThreadPool,
    next: *const Pool,
}

/// Every pool made so far, the last one first; none is ever dropped. No lock: a child that is forked
/// while another thread holds it would wait for ever.
static POOLS: AtomicPtr<Pool> = AtomicPtr::new(std::ptr::null_mut());

/// The number of threads that `XUNIT_NUM_THREADS` asks for, if it is set and not empty. Errors if it
/// is no positive integer.
pub fn requested_threads() -> Result<Option<usize>, String> {
    let text = std::env::var("XUNIT_NUM_THREADS").unwrap_or_default();
    if text.trim().is_empty() {
        return Ok(None);
    }
    match text.trim().parse() {
        Ok(threads) if threads > 0 => Ok(Some(threads)),
        _ => Err(format!("XUNIT_NUM_THREADS is {text:?}, which is no positive integer")),
    }
}

/// The number of threads used where the caller names none: [`requested_threads`], else the number of
/// cores available to this process.
pub fn default_threads() -> usize {
    static THREADS: OnceLock<usize> = OnceLock::new();
    *THREADS.get_or_init(|| {
        requested_threads()
            .unwrap_or_default()
            .or_else(|| std::thread::available_parallelism().ok().map(Into::into))
            .unwrap_or(1)
    })
}

/// The pool of `threads` threads of this process, or `None` where the system refuses new threads.
fn pool(threads: usize) -> Option<&'static ThreadPool> {
    let process = std::process::id();
    let mut at = POOLS.load(Ordering::Acquire).cast_const();
    // SAFETY: pools are leaked, and complete before they are in the list.
    while let Some(pool) = unsafe { at.as_ref() } {
        if (pool.process, pool.threads) == (process, threads) {
            return Some(&pool.pool);
        }
        at = pool.next;
    }
    let pool = ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(|i| format!("xunit-{i}"))
        .build()
        .ok()?;
    let new = Box::leak(Box::new(Pool { process, threads, pool, next: std::ptr::null() }));
    let node: *mut Pool = new;
    let mut head = POOLS.load(Ordering::Acquire);
    loop {
        // SAFETY: nobody else knows the node before it is in the list.
        unsafe { (*node).next = head };
        match POOLS.compare_exchange_weak(head, node, Ordering::AcqRel, Ordering::Acquire) {
            // SAFETY: as above, from now on it is only read.
            Ok(_) => return Some(unsafe { &(*node).pool }),
            Err(other) => head = other,
        }
    }
}

/// Has done what rayon does once in a process.
pub fn warm_up() {
    if let Ok(pool) = ThreadPoolBuilder::new().num_threads(1).build() {
        pool.install(|| (0..2).into_par_iter().with_max_len(1).for_each(|_| ()));
    }
}

/// How many threads an operation may use, and whose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Threads {
    /// So many of our own; 0 stands for [`default_threads`].
    Own(usize),
    /// So many of the host's, if it has lent them with [`lend`] in this process; else our own.
    Host(usize),
}

/// The multiply-adds that are worth waking other threads for.
const WORTH_WAKING: usize = 1 << 20;

impl Threads {
    /// These threads, or the caller alone where an operation of so many multiply-adds is over
    /// before the others are awake.
    pub fn for_work(self, operations: usize) -> Self {
        if operations < WORTH_WAKING { Threads::Own(1) } else { self }
    }

    /// How many they are.
    pub(crate) fn count(self) -> usize {
        match self {
            Threads::Own(0) | Threads::Host(0) => default_threads(),
            Threads::Own(count) | Threads::Host(count) => count,
        }
    }
}

/// Runs a function on parts of a range in parallel and returns when all are done; not zero on
/// failure: `torch_parallel_for` of PyTorch's C interface.
pub type ParallelFor = unsafe extern "C" fn(
    begin: i64,
    end: i64,
    grain: i64,
    f: unsafe extern "C" fn(begin: i64, end: i64, context: *mut c_void),
    context: *mut c_void,
) -> i32;

/// The host's function, and the process that lent it: a forked child has none of its threads.
static HOST: AtomicPtr<()> = AtomicPtr::new(std::ptr::null_mut());
static HOST_PROCESS: AtomicU32 = AtomicU32::new(0);

/// Lets [`Threads::Host`] run on the threads of the host. A pool of our own beside them loses most
/// of its gain: after an operation the host's idle threads spin for milliseconds on the cores.
///
/// # Safety
/// `parallel_for` must be as [`ParallelFor`] says, for the life of this process.
pub unsafe fn lend(parallel_for: ParallelFor) {
    HOST.store(parallel_for as *mut (), Ordering::Release);
    HOST_PROCESS.store(std::process::id(), Ordering::Release);
}

/// The host's function, if it was lent in this process.
fn host() -> Option<ParallelFor> {
    if HOST_PROCESS.load(Ordering::Acquire) != std::process::id() {
        return None;
    }
    let function = HOST.load(Ordering::Acquire);
    // SAFETY: `lend` puts nothing else there.
    (!function.is_null()).then(|| unsafe { std::mem::transmute::<*mut (), ParallelFor>(function) })
}

/// At its end, what the thread has streamed may be read, even if a task unwinds.
struct Fence;

impl Drop for Fence {
    fn drop(&mut self) {
        simd::fence();
    }
}

/// What the threads of one [`for_each`] share.
struct Work<'a> {
    f: &'a (dyn Fn(usize) + Sync),
    next: AtomicUsize,
    tasks: usize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

impl Work<'_> {
    /// Works on tasks that nobody has begun, until there are none.
    fn run(&self) {
        let _fence = Fence;
        let work = || {
            loop {
                let task = self.next.fetch_add(1, Ordering::Relaxed);
                if task >= self.tasks {
                    return;
                }
                (self.f)(task);
            }
        };
        // No panic may cross the host's frames.
        if let Err(panic) = catch_unwind(AssertUnwindSafe(work)) {
            self.next.store(self.tasks, Ordering::Relaxed);
            *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
        }
    }
}

/// A [`Work`] run by the host: once for every part of its range.
unsafe extern "C" fn run_for_host(_: i64, _: i64, context: *mut c_void) {
    // SAFETY: `for_each` hands in its own work, which outlives the call.
    unsafe { &*context.cast::<Work<'_>>() }.run();
}

/// Runs `f(0)`, …, `f(tasks - 1)`, each once, on at most so many threads.
///
/// The split into tasks is the caller's, so that results do not depend on the thread count. One
/// thread or one task runs here, on the caller, and touches no pool. What the tasks have streamed may be read
/// when this returns.
pub fn for_each(threads: Threads, tasks: usize, f: impl Fn(usize) + Sync) {
    let count = threads.count();
    if count.min(tasks) < 2 {
        let _fence = Fence;
        return (0..tasks).for_each(f);
    }
    let work = Work { f: &f, next: AtomicUsize::new(0), tasks, panic: Mutex::new(None) };
    let host = if matches!(threads, Threads::Host(_)) { host() } else { None };
    if let Some(parallel_for) = host {
        let context = (&raw const work).cast_mut().cast();
        let workers = count.min(tasks) as i64;
        // SAFETY: `lend`'s caller vouches for the function; `work` lives until it returns.
        unsafe { parallel_for(0, workers, 1, run_for_host, context) };
    } else if let Some(pool) = pool(count.min(256)) {
        // More threads than tasks have nothing to do, but a pool per odd task count is a waste.
        pool.install(|| {
            (0..count.min(tasks)).into_par_iter().with_max_len(1).for_each(|_| work.run())
        });
    }
    // What is left if the host failed, or the system refused threads.
    work.run();
    let panic = work.panic.into_inner().unwrap_or_else(PoisonError::into_inner);
    if let Some(panic) = panic {
        resume_unwind(panic);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn every_task_runs_once(threads: Threads) {
        for tasks in [0, 1, 2, 5, 64] {
            let runs: Vec<_> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
            for_each(threads, tasks, |i| {
                runs[i].fetch_add(1, Ordering::Relaxed);
            });
            assert!(
                runs.iter().all(|r| r.load(Ordering::Relaxed) == 1),
                "{threads:?}, tasks {tasks}"
            );
        }
    }

    /// A host of two threads, which fails where it is asked for three.
    unsafe extern "C" fn two_threads(
        begin: i64,
        end: i64,
        _: i64,
        f: unsafe extern "C" fn(i64, i64, *mut c_void),
        context: *mut c_void,
    ) -> i32 {
        if end == 3 {
            return 1;
        }
        let context = context as usize;
        std::thread::scope(|scope| {
            for part in [(begin, 1), (1, end)] {
                // SAFETY: the context lives until this returns.
                scope.spawn(move || unsafe { f(part.0, part.1, context as *mut c_void) });
            }
        });
        0
    }

    #[test]
    fn every_task_runs_once_at_any_thread_count() {
        for count in [0, 1, 2, 3, 7] {
            every_task_runs_once(Threads::Own(count));
            every_task_runs_once(Threads::Host(count));
        }
        // SAFETY: the function is as it should be.
        unsafe { lend(two_threads) };
        for count in [1, 2, 3] {
            every_task_runs_once(Threads::Host(count));
        }
        let panics = || for_each(Threads::Host(2), 5, |i| assert!(i != 3, "task 3"));
        let panic = catch_unwind(panics).unwrap_err();
        assert!(panic.downcast_ref::<&str>().is_some_and(|text| text.contains("task 3")));
        HOST_PROCESS.store(0, Ordering::Release);
    }

    #[test]
    fn a_panic_in_a_task_is_a_panic_of_the_call() {
        for threads in [Threads::Own(1), Threads::Own(2)] {
            let panics = || for_each(threads, 5, |i| assert!(i != 3, "task 3"));
            assert!(catch_unwind(panics).is_err());
        }
    }
}
