//! The machine's own limits, measured: what the times of the operations are held against.

use std::hint::black_box;
use std::sync::Mutex;
use std::time::Instant;

use crate::kernels::peak::{Copy, MultiplyAdd, Read};
use crate::parallel::{self, Threads};
use crate::simd;

/// Tasks for each thread of a turn, so that a thread that is late or disturbed has less to do.
const TASKS: usize = 32;
/// About 0.1 ms a task, 3 ms a turn: long beside the 20 µs in which a pool wakes up, short enough
/// to fall between two disturbances of a busy machine.
const ROUNDS: usize = 40_000;

/// Single-precision floating-point operations per second of `threads` threads (0: the default) in
/// fused multiply-adds on registers, on the selected instruction set: the best turn in `seconds`.
pub fn fma_peak(threads: usize, seconds: f64) -> f64 {
    let threads = resolve(threads);
    best(seconds, || {
        let flops = Mutex::new(0);
        parallel::for_each(Threads::Own(threads), threads * TASKS, |_| {
            let (done, sum) = simd::dispatch::<f32, _>(MultiplyAdd { rounds: ROUNDS });
            black_box(sum);
            *flops.lock().unwrap() += done;
        });
        flops.into_inner().unwrap()
    })
}

/// Bytes per second to and from memory.
#[derive(Clone, Copy, Debug)]
pub struct Bandwidth {
    /// Of reading alone.
    pub read: f64,
    /// Of copying; what is read and what is written both count, as in STREAM.
    pub copy: f64,
}

/// The bandwidth that `threads` threads (0: the default) reach together over two buffers of `mib`
/// mebibytes each, which should be a few times the last cache: the best turns in `seconds`.
pub fn bandwidth(threads: usize, seconds: f64, mib: usize) -> Bandwidth {
    let threads = resolve(threads);
    let len = mib.max(1) << 18;
    let (from, mut to) = (vec![1.0f32; len], vec![2.0f32; len]);
    let part = len.div_ceil(threads * TASKS).next_multiple_of(1024);
    let reads: Vec<&[f32]> = from.chunks(part).chain(to.chunks(part)).collect();
    let read = best(seconds / 2.0, || {
        parallel::for_each(Threads::Own(threads), reads.len(), |i| {
            black_box(simd::dispatch(Read { from: reads[i] }));
        });
        2 * 4 * len
    });
    let copies: Vec<_> = from.chunks(part).zip(to.chunks_mut(part)).map(Mutex::new).collect();
    let copy = best(seconds / 2.0, || {
        parallel::for_each(Threads::Own(threads), copies.len(), |i| {
            let (from, to) = &mut *copies[i].lock().unwrap();
            simd::dispatch(Copy { from, to });
            black_box(to);
        });
        2 * 4 * len
    });
    Bandwidth { read, copy }
}

fn resolve(threads: usize) -> usize {
    if threads == 0 { parallel::default_threads() } else { threads }
}

/// The highest rate at which `turn` has done the work it returns; at least one turn, and one that
/// does not count.
fn best(seconds: f64, turn: impl Fn() -> usize) -> f64 {
    turn();
    let begin = Instant::now();
    let mut best = 0.0f64;
    loop {
        let start = Instant::now();
        let work = turn();
        best = best.max(work as f64 / start.elapsed().as_secs_f64().max(1e-9));
        if begin.elapsed().as_secs_f64() >= seconds {
            return best;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_finite_and_positive() {
        for threads in [0, 1, 2] {
            let Bandwidth { read, copy } = bandwidth(threads, 1e-3, 1);
            for limit in [fma_peak(threads, 1e-3), read, copy] {
                assert!(limit.is_finite() && limit > 0.0, "{threads} threads: {limit}");
            }
        }
    }
}
