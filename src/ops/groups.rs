//! Tensors in channels_last for operations that work on planes: a few channels at a time are copied to
//! planes, and back.

use std::ops::Range;

use super::scratch::Scratch;
use super::{Planes, Source};
use crate::kernels::transpose::Transpose;
use crate::memory;
use crate::parallel::{self, Threads};
use crate::shape::Batch;
use crate::simd::{self, Scalar};

/// How a tensor lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// (N, C, H, W)
    Planes,
    /// (N, H, W, C)
    ChannelsLast,
}

/// The channels of a group: what a cache line holds, or half of it, whose lines are then read twice, for
/// the sake of the cache or of the threads. By fours, which the kernel has no tile for, a training step took 1.7 times as
/// long as by eights (xUnit, 1 × 64 × 512 × 512, k = 7, Zen 4).
const CHANNELS: [usize; 2] = [16, 8];

/// What the planes of a group take at most, unless eight channels are more. Backward has three such, of
/// which a thread keeps the memory.
const BYTES: usize = 4 << 20;

/// Pixels of all channels that are copied by a task.
const PIXELS: usize = 1024;

/// The channels of a batch, group by group.
#[derive(Clone, Copy)]
pub(super) struct Groups {
    batch: Batch,
    channels: usize,
}

impl Groups {
    /// None if there would be fewer groups than threads: then whole tensors are better copied, by
    /// [`to_planes`] and [`from_planes`].
    pub(super) fn new<T>(batch: Batch, threads: Threads) -> Option<Self> {
        let (threads, per_channel) = (threads.count(), batch.n * batch.plane() * size_of::<T>());
        let suits = |&channels: &usize| {
            channels * per_channel <= BYTES
                && (threads == 1 || batch.c.div_ceil(channels) >= 2 * threads)
        };
        let channels = CHANNELS.into_iter().find(suits).unwrap_or(CHANNELS[1]);
        let groups = Self { batch, channels };
        (groups.len() >= threads).then_some(groups)
    }

    /// Of so many channels.
    pub(super) fn of(batch: Batch, channels: usize) -> Self {
        Self { batch, channels }
    }

    pub(super) fn len(&self) -> usize {
        self.batch.c.div_ceil(self.channels)
    }

    /// The first channel of group i, and its shape.
    pub(super) fn group(&self, i: usize) -> (usize, Batch) {
        let first = i * self.channels;
        (first, Batch { c: self.channels.min(self.batch.c - first), ..self.batch })
    }

    /// The planes of group i of a tensor in channels_last.
    pub(super) fn gather<T: Scalar>(&self, tensor: &[T], i: usize) -> Scratch<T> {
        let (first, group) = self.group(i);
        let (c, plane) = (self.batch.c, group.plane());
        let mut planes = Scratch::new(group.size());
        for (n, to) in planes.chunks_exact_mut(group.c * plane).enumerate() {
            let from = &tensor[n * c * plane + first..(n + 1) * c * plane];
            simd::dispatch(Transpose::gather((from, c), (to, plane), plane, group.c));
        }
        planes
    }

    /// Writes the planes of group i to a tensor in channels_last.
    ///
    /// # Safety
    /// No other reference to these channels may live.
    pub(super) unsafe fn scatter<T: Scalar>(&self, planes: &[T], tensor: &Planes<'_, T>, i: usize) {
        let (first, group) = self.group(i);
        let (c, plane) = (self.batch.c, group.plane());
        for (n, from) in planes.chunks_exact(group.c * plane).enumerate() {
            // SAFETY: channels first.. of every pixel of image n; the caller vouches for the rest.
            let job = unsafe {
                let to = tensor.image(n).add(first);
                Transpose::scatter((from, plane), (to, c), plane, group.c)
            };
            simd::dispatch(job);
        }
    }

    /// Group i as channel tasks see it.
    pub(super) fn source<'a, T>(&self, planes: &'a [T], i: usize) -> Source<'a, T> {
        let (first, batch) = self.group(i);
        Source { tensor: planes, batch, first }
    }
}

/// The tasks of [`to_planes`] and [`from_planes`]: calls `f(image, pixels)` for each.
fn each_panel(batch: Batch, threads: Threads, f: impl Fn(usize, Range<usize>) + Sync) {
    let panels = batch.plane().div_ceil(PIXELS);
    parallel::for_each(threads, batch.n * panels, |task| {
        let start = task % panels * PIXELS;
        f(task / panels, start..batch.plane().min(start + PIXELS));
    });
}

/// The planes of a tensor in channels_last.
pub(super) fn to_planes<T: Scalar>(batch: Batch, tensor: &[T], threads: Threads) -> Vec<T> {
    let (c, plane) = (batch.c, batch.plane());
    let mut planes = memory::filled(batch.size(), T::ZERO);
    let target = Planes::new(&mut planes, batch);
    each_panel(batch, threads, |n, pixels| {
        let from = &tensor[(n * plane + pixels.start) * c..][..pixels.len() * c];
        // SAFETY: these pixels of image n's planes are inside, and this task alone names them.
        let job = unsafe {
            let to = target.image(n).add(pixels.start);
            Transpose::gather_to((from, c), (to, plane), pixels.len(), c)
        };
        simd::dispatch(job);
    });
    planes
}

/// Writes planes to a tensor in channels_last.
pub(super) fn from_planes<T: Scalar>(planes: &[T], tensor: &Planes<'_, T>, threads: Threads) {
    let batch = tensor.batch;
    let (c, plane) = (batch.c, batch.plane());
    each_panel(batch, threads, |n, pixels| {
        let from = &planes[n * c * plane + pixels.start..(n + 1) * c * plane];
        // SAFETY: these pixels of image n are inside, and this task alone names them.
        let job = unsafe {
            let to = tensor.image(n).add(pixels.start * c);
            Transpose::scatter((from, plane), (to, c), pixels.len(), c)
        };
        simd::dispatch(job);
    });
}
