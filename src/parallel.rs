//! Threads: how many, and the private pools they come from. The only file that names rayon.
//!
//! A pool is keyed by the process and its size and is never dropped: a forked child inherits the
//! memory of its parent's pool but none of its threads, so that it would wait for ever on it.

use std::sync::{Mutex, OnceLock, PoisonError};

use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

/// `(process, threads, pool)` of every pool made so far.
static POOLS: Mutex<Vec<(u32, usize, &'static ThreadPool)>> = Mutex::new(Vec::new());

/// The number of threads used where the caller names none: `XUNIT_NUM_THREADS` if it is a positive
/// integer, else the number of cores available to this process.
pub fn default_threads() -> usize {
    static THREADS: OnceLock<usize> = OnceLock::new();
    *THREADS.get_or_init(|| {
        std::env::var("XUNIT_NUM_THREADS")
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .filter(|&threads| threads > 0)
            .or_else(|| std::thread::available_parallelism().ok().map(Into::into))
            .unwrap_or(1)
    })
}

/// The pool of `threads` threads of this process, or `None` where the system refuses new threads.
fn pool(threads: usize) -> Option<&'static ThreadPool> {
    let process = std::process::id();
    let mut pools = POOLS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, _, pool)) = pools.iter().find(|p| (p.0, p.1) == (process, threads)) {
        return Some(pool);
    }
    let pool = ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(|i| format!("xunit-{i}"))
        .build()
        .ok()?;
    let pool: &'static ThreadPool = Box::leak(Box::new(pool));
    pools.push((process, threads, pool));
    Some(pool)
}

/// Runs `f(0)`, …, `f(tasks - 1)` on at most `threads` threads (0: [`default_threads`]).
///
/// The split into tasks is the caller's, so that results do not depend on the thread count. One
/// thread or one task runs here, on the caller, and touches no pool.
pub fn for_each(threads: usize, tasks: usize, f: impl Fn(usize) + Sync) {
    let threads = if threads == 0 { default_threads() } else { threads };
    // More threads than tasks have nothing to do, but a pool per odd task count would be a waste.
    if threads > 1
        && tasks > 1
        && let Some(pool) = pool(threads.min(256))
    {
        pool.install(|| (0..tasks).into_par_iter().with_max_len(1).for_each(&f));
        return;
    }
    (0..tasks).for_each(f);
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn every_task_runs_once_at_any_thread_count() {
        for threads in [0, 1, 2, 3, 7] {
            for tasks in [0, 1, 2, 5, 64] {
                let runs: Vec<_> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                for_each(threads, tasks, |i| {
                    runs[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(
                    runs.iter().all(|r| r.load(Ordering::Relaxed) == 1),
                    "threads {threads}, tasks {tasks}"
                );
            }
        }
    }
}
