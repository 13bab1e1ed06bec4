//! The units of small planes: a task makes the passes over some channels, whose convolutions go by way of channels_last,
//! as [`crate::ops::small`] says.

use std::ops::Range;

use super::{
    Backward, BackwardTensors, Channel, ChannelGradient, Forward, Statistics, Tensors, Variant,
    awaits, is_training,
};
use crate::kernels::activation::{Affine, Fill, FillGradient};
use crate::kernels::pixels::{self, Grid};
use crate::ops::Planes;
use crate::ops::groups::Groups;
use crate::ops::pixels::{Chunks, all, grid_of, taps_of};
use crate::ops::scratch::Scratch;
use crate::ops::small::{self, from_pixels, image, places, to_pixels};
use crate::parallel::Threads;
use crate::shape::{Batch, Geometry};
use crate::simd::{self, Scalar};

/// Tasks that there must be, for threads to share.
const TASKS: usize = 4;
/// The most bytes of a task's planes, of which the backward pass has two scratches: at 256 × 128 × 14 × 14, 3.2 MB,
/// nothing is gained in training (Zen 4, k = 7).
const BYTES: usize = 4 << 20;

/// Channels of a task: a vector, or what [`crate::kernels::transpose`] has a tile for.
fn together<T: Scalar>() -> usize {
    simd::selected_lanes::<T>().max(8)
}

/// Whether planes are so small that this takes less time. Time over that of single channels, training; evaluation, of
/// xUnitS, k = 3, 7 and 9 (Zen 4, one thread): AVX-512 16 × 128 × 10 × 10 0.6 to 0.8; 0.4 to 0.7, 20 × 20 0.8 to 1.0; 0.7
/// to 1.0, 8 × 512 × 7 × 7 0.3 to 0.5; 0.2 to 0.4. AVX2 10 × 10 0.7 to 0.9; 0.5 to 0.8, 16 × 16 1.1 to 1.4; 0.8 to 1.2.
pub(super) fn suits<T: Scalar>(geometry: &Geometry, weight: &[T]) -> bool {
    let (Batch { n, c, .. }, together) = (geometry.input, together::<T>());
    let longest = if simd::selected_lanes::<T>() == 16 { usize::MAX } else { 12 };
    c >= TASKS * together
        && n * geometry.input.plane() * together * size_of::<T>() <= BYTES
        && geometry.ow <= longest
        && small::suits(geometry, weight)
}

/// The tasks: single channels, or where planes are small some together.
pub(super) fn chunks<T: Scalar>(batch: Batch, is_small: bool) -> Chunks {
    Chunks::new(batch.c, if is_small { together::<T>() } else { 1 })
}

/// The same of tensors in channels_last; None if they do not come out even, as whole tensors do in planes.
pub(super) fn groups<T: Scalar>(batch: Batch, is_small: bool, threads: Threads) -> Option<Groups> {
    match is_small {
        true => batch.c.is_multiple_of(together::<T>()).then(|| Groups::of(batch, together::<T>())),
        false => Groups::new::<T>(batch, threads),
    }
}

/// Some channels of the unit's convolution, or of its transpose.
struct Convolution<T> {
    batch: Batch,
    grid: Grid,
    taps: Scratch<T>,
    bias: Vec<T>,
}

impl<T: Scalar> Convolution<T> {
    /// By the taps of these channels, turned by 180° if they go `back`.
    fn new(batch: Batch, grid: Grid, weight: &[T], bias: Vec<T>, back: bool) -> Self {
        let mut order = all(grid.kernel.0);
        if back {
            order.reverse();
        }
        Self { batch, grid, taps: taps_of(weight, grid.kernel, &order, &order), bias }
    }

    /// The planes of an image, from its pixels; what is read after them begins at `next`.
    fn run(&self, from: &[T], planes: &mut [T], next: *const T) {
        let Self { batch, grid, ref taps, ref bias } = *self;
        let c = bias.len();
        let mut to = Scratch::<T>::new(from.len());
        // SAFETY: all of it.
        let out = unsafe { places(&mut to, batch, c) };
        let (image, rows) = (image(from, batch, c, next), 0..batch.h);
        simd::dispatch(pixels::Forward { image, grid, taps, bias, rows, out });
        from_pixels(&to, planes, batch.plane());
    }
}

/// The pixels of some planes that lie one after the other, or of what a ReLU makes of them.
fn pixels_of<T: Scalar>(planes: &[T], plane: usize, relu_of: Option<&[Affine<T>]>) -> Scratch<T> {
    let Some(relu_of) = relu_of else {
        return to_pixels(planes, plane);
    };
    let mut mapped = Scratch::new(planes.len());
    for (i, (from, &affine)) in planes.chunks_exact(plane).zip(relu_of).enumerate() {
        simd::dispatch(Fill {
            plane: from,
            width: plane,
            relu_of: Some(affine),
            padded: &mut mapped,
            ld: plane,
            origin: i * plane,
        });
    }
    to_pixels(&mapped, plane)
}

impl<T: Scalar> Forward<'_, T> {
    /// As [`Forward::channel`], of some channels together.
    ///
    /// # Safety
    /// As there, for these channels; `stats` has a channel for each.
    pub(super) unsafe fn channels(
        &self,
        channels: Range<usize>,
        tensors: Tensors<'_, T>,
        stats: &Planes<'_, f64>,
    ) {
        let Self { unit, geometry, .. } = self;
        let Tensors { x, u, d, out, .. } = tensors;
        let (batch, plane, taps) =
            (geometry.input, geometry.input.plane(), unit.kernel * unit.kernel);
        let (start, count) = (channels.start, channels.len());
        let waits = awaits(&unit.norm2);
        // SAFETY: this task alone names these channels.
        let stats = |c: usize| unsafe { stats.plane(0, c) };
        let first: Vec<_> = channels.clone().map(|c| self.first(u, c, stats(c)).affine).collect();
        let relu_of = (unit.variant != Variant::Slim).then_some(&first[..]);
        let given = |c: usize| Channel::given(unit.norm2.as_ref(), c);
        let given: Option<Vec<_>> = (!waits).then(|| channels.clone().map(given).collect());
        let weight = &unit.weight[start * taps..channels.end * taps];
        let bias = channels.clone().map(|c| unit.bias.map_or(T::ZERO, |bias| bias[c])).collect();
        let convolution = Convolution::new(batch, grid_of(&geometry.conv), weight, bias, false);
        let mut of_image = Scratch::new(count * plane);
        let mut statistics: Vec<_> = channels.clone().map(|_| Statistics::default()).collect();
        for n in 0..batch.n {
            let pixels = pixels_of(&u.planes_from(n, start)[..count * plane], plane, relu_of);
            let next = u.planes_from((n + 1).min(batch.n - 1), start).as_ptr();
            convolution.run(&pixels, &mut of_image, next);
            for (i, of_channel) in of_image.chunks_exact(plane).enumerate() {
                let c = start + i;
                // Where d is not kept but its statistics are awaited, it waits in the output. Copied, as pixels are turned
                // in the cache: see `to_planes`.
                if let Some(kept) = d.or(waits.then_some(out)) {
                    // SAFETY: this task alone names channel c.
                    unsafe { kept.plane(n, c) }.copy_from_slice(of_channel);
                }
                match &given {
                    // SAFETY: as above.
                    Some(given) => unsafe {
                        self.gate((n, c), 0..plane, x, of_channel, &given[i], out);
                    },
                    None => statistics[i].add(of_channel),
                }
            }
        }
        if waits {
            for (c, statistics) in channels.zip(&statistics) {
                // SAFETY: as above.
                unsafe { self.gate_all(c, statistics, tensors, stats(c)) };
            }
        }
    }
}

impl<T: Scalar> Backward<'_, T> {
    /// As [`Backward::channel`], of some channels together.
    ///
    /// # Safety
    /// As there, for these channels; `sums` has a channel of zeros for each.
    pub(super) unsafe fn channels(
        &self,
        channels: Range<usize>,
        tensors: BackwardTensors<'_, T>,
        sums: &Planes<'_, f64>,
    ) {
        let Self { unit, geometry, .. } = self;
        let (batch, plane, taps) =
            (geometry.input, geometry.input.plane(), unit.kernel * unit.kernel);
        let (start, count, lanes) = (channels.start, channels.len(), simd::selected_lanes::<T>());
        let of = |norm| is_training(norm).then_some((batch.n * plane) as f64);
        // SAFETY: this task alone names these channels.
        let (all, sums) = unsafe {
            let all = channels.clone().map(|c| ChannelGradient::new(unit, c, tensors));
            (all.collect::<Vec<_>>(), |i: usize| sums.plane(0, start + i))
        };
        // The gradients on their way to u and, past the gate, to x, as in `channel`, image by image.
        let mut on_its_way = Scratch::new(batch.n * count * plane);
        let mut direct = Scratch::new(if unit.pointwise.is_some() { 0 } else { on_its_way.len() });
        let at = |n: usize, i: usize| (n * count + i) * plane..(n * count + i + 1) * plane;
        for n in 0..batch.n {
            for (i, channel) in all.iter().enumerate() {
                let next = match (i + 1 < count, n + 1 < batch.n) {
                    (true, _) => (n, start + i + 1),
                    (false, true) => (n + 1, start),
                    (false, false) => (n, start + i),
                };
                let direct = direct.get_mut(at(n, i)).unwrap_or_default();
                channel.gate(n, next, &mut sums(i)[taps..], &mut on_its_way[at(n, i)], direct);
            }
        }
        let norm2 = |(i, channel): (usize, &ChannelGradient<'_, T>)| {
            channel.second.gradient(of(&unit.norm2), [sums(i)[taps + 4], sums(i)[taps + 3]])
        };
        let norms2: Vec<_> = all.iter().enumerate().map(norm2).collect();
        let rectified: Vec<_> = all.iter().map(|channel| channel.first.affine).collect();
        let relu_of = (unit.variant != Variant::Slim).then_some(&rectified[..]);
        let grid = grid_of(&geometry.conv);
        let weight = &unit.weight[start * taps..channels.end * taps];
        let convolution = Convolution::new(batch, grid, weight, vec![T::ZERO; count], true);
        let len = pixels::sums(grid.kernel, count, lanes);
        let (mut sums_of_taps, mut scratch) = (vec![0.0; len], Scratch::new(len));
        let mut at_d = Scratch::new(count * plane);
        for n in (0..batch.n).rev() {
            for (i, channel) in all.iter().enumerate() {
                sums(i)[taps] += simd::dispatch(FillGradient {
                    norm: norms2[i],
                    grad: &on_its_way[at(n, i)],
                    d: channel.d(n, 0..plane),
                    width: plane,
                    padded: &mut at_d,
                    ld: plane,
                    origin: i * plane,
                });
            }
            let at_d = to_pixels(&at_d, plane);
            let u = match tensors.u {
                Some(u) => &u.planes_from(n, start)[..count * plane],
                // SAFETY: this task alone names these channels, and no other reference to them lives.
                None => unsafe { &*tensors.gx.planes(n, &channels) },
            };
            let u = pixels_of(u, plane, relu_of);
            let after = n.saturating_sub(1);
            let next = |saved| all[0].saved_at(saved, after, start);
            simd::dispatch(pixels::WeightGradient {
                image: image(&u, batch, count, next(tensors.u)),
                grid,
                grad: image(&at_d, batch, count, next(tensors.d)),
                rows: 0..batch.h,
                taps: true,
                bias: true,
                sums: &mut sums_of_taps,
                scratch: &mut scratch,
            });
            let of_image = at(n, 0).start..at(n, count).start;
            convolution.run(&at_d, &mut on_its_way[of_image], at_d.as_ptr());
            for (i, channel) in all.iter().enumerate() {
                channel.rectify(n, 0..plane, &mut sums(i)[taps..], &mut on_its_way[at(n, i)]);
            }
        }
        // Where sums are not finite, they may be wrong, and those of planes are right: all of these channels are made of
        // them then, for the result to be the same whatever the threads.
        if !sums_of_taps.iter().all(|sum| sum.is_finite()) {
            for (i, c) in channels.enumerate() {
                sums(i).fill(0.0);
                // SAFETY: the caller's promise; nothing has been written yet to where something is saved.
                unsafe { self.channel(c, tensors, sums(i)) };
            }
            return;
        }
        for (i, channel) in all.iter().enumerate() {
            let (of_taps, sum) = sums(i).split_at_mut(taps);
            let first = pixels::place(i, count, lanes, taps, 0);
            let found = sums_of_taps[first..].iter().step_by(lanes);
            of_taps.iter_mut().zip(found).for_each(|(to, &sum)| *to = sum);
            let norm1 = channel.first.gradient(of(&unit.norm1), [sum[2], sum[1]]);
            for n in 0..batch.n {
                let (grad, direct) = (&on_its_way[at(n, i)], direct.get(at(n, i)));
                sum[5] += channel.finish(norm1, n, 0..plane, grad, direct);
            }
            channel.normalise(sum);
        }
    }
}
