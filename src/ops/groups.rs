//! Tensors in channels_last for operations that work on planes: a few channels at a time are copied to
//! planes that stay in cache, and back.

use super::scratch::Scratch;
use super::{Planes, Source};
use crate::kernels::transpose::Transpose;
use crate::parallel::Threads;
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
/// the sake of the cache or of many threads.
const CHANNELS: [usize; 2] = [16, 8];

/// What the planes of a group may take, of which backward has three.
const BYTES: usize = 4 << 20;

/// The channels of a batch, group by group.
#[derive(Clone, Copy)]
pub(super) struct Groups {
    batch: Batch,
    channels: usize,
}

impl Groups {
    pub(super) fn new<T>(batch: Batch, threads: Threads) -> Self {
        let per_channel = batch.n * batch.plane() * size_of::<T>();
        let suits = |&channels: &usize| {
            channels * per_channel <= BYTES
                && (threads.count() == 1 || batch.c.div_ceil(channels) >= 2 * threads.count())
        };
        let channels = CHANNELS.into_iter().find(suits).unwrap_or(CHANNELS[1]);
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
