//! Units of few taps in channels_last, forward and backward: a band of rows of some channels is convolved pixel by
//! pixel, as it lies, by [`crate::kernels::pixels`], and the pointwise passes of [`crate::kernels::channelwise`] go
//! over it in the cache.
//!
//! All channels of a pixel lie together, so a pass that awaits statistics is made over the whole tensor, and no copy
//! of it is kept meanwhile: what backward needs again, the gradient at the gate, is computed again.

use std::ops::Range;

use super::{Channel, Norm, Statistics, Variant, XUnit, is_training};
use crate::kernels::MAX_LANES;
use crate::kernels::blocked::padding;
use crate::kernels::channelwise::{
    Add, Apply, BatchGradient, Blocks, BlocksMut, GateGradient, GateSums, Maps, NormMaps, Pixels,
    Rectify, ReluGradient, Sums,
};
use crate::kernels::general::Places;
use crate::kernels::pixels::{self, Grid, Image};
use crate::memory;
use crate::ops::pixels::{TapSums, Tasks, all, chunk_of, grid_of, is_direct, taps_of};
use crate::ops::scratch::Scratch;
use crate::ops::{Layout, Planes, part};
use crate::parallel::{self, Threads};
use crate::shape::{Batch, Geometry};
use crate::simd::{self, Scalar};

/// Bytes of a band's rows of outputs, about: 64 to 256 KiB take the same time within 4 % (Zen 4, one thread, 40 to 64
/// columns of 64 channels).
const BYTES: usize = 128 << 10;
/// The least rows of a band.
const LEAST_ROWS: usize = 4;
/// The widest images, as in evaluation: bands are as wide.
const WIDEST: usize = 1024;

/// A unit that is taken so, and how it is split. Time over that of planes, some channels at a time, which all others
/// take (Zen 4, one thread, training, k = 3 to 9): at 7 × 7 and 14 × 14 0.6 to 0.8, of many images of 40 × 40, where
/// those planes are large, 0.6 to 0.8, at 64 × 64 and 256 × 256 xUnitS 0.7 to 1.0, xUnit 0.95 to 1.16, xUnitD 0.7 to 0.9;
/// on two threads less.
pub(super) struct Direct<'a, T> {
    unit: &'a XUnit<'a, T>,
    batch: Batch,
    grid: Grid,
    tasks: Tasks,
    /// Those of a chunk go one after the other in so many groups, whose sums are added in order.
    groups: usize,
}

impl<'a, T: Scalar> Direct<'a, T> {
    pub(super) fn new(unit: &'a XUnit<'a, T>, geometry: &Geometry, layout: Layout) -> Option<Self> {
        let batch = geometry.input;
        let Batch { n, c, h, w } = batch;
        let is_whole = c.is_multiple_of(simd::selected_lanes::<T>());
        let is_read_so = layout == Layout::ChannelsLast && is_direct(geometry, unit.weight);
        if !is_read_so || !is_whole || w > WIDEST {
            return None;
        }
        let tasks = Tasks::new::<T>(n, h, c, chunk_of::<T>(batch));
        let groups = tasks.chunks.groups(tasks.parts());
        Some(Self { unit, batch, grid: grid_of(&geometry.conv), tasks, groups })
    }

    /// Calls `f` for each group of each chunk, which it alone names; `back`: in the opposite order, as a cache may still
    /// hold what a pass has read last.
    fn each(&self, back: bool, threads: Threads, f: impl Fn(usize, usize) + Sync) {
        let chunks = self.tasks.chunks.len();
        let count = self.groups * chunks;
        parallel::for_each(threads, count, |task| {
            let task = if back { count - 1 - task } else { task };
            f(task / chunks, task % chunks);
        });
    }

    /// Rows of outputs of a band of so many channels, at most.
    fn most_rows(&self, channels: usize) -> usize {
        (BYTES / (self.batch.w * channels * size_of::<T>())).max(LEAST_ROWS)
    }

    /// The rows of a group, band by band.
    fn bands(&self, group: usize, chunk: usize) -> impl Iterator<Item = Band> {
        let (parts, tasks) = (self.tasks.parts(), self.tasks);
        let channels = tasks.chunks.channels(chunk);
        let step = self.most_rows(channels.len());
        let (halo, h) = (self.unit.kernel / 2, self.batch.h);
        part(group, self.groups, parts).flat_map(move |part| {
            let (n, all) = tasks.part(part);
            let channels = channels.clone();
            all.clone().step_by(step).map(move |start| {
                let rows = start..all.end.min(start + step);
                let (top, bottom) = padding(&rows, halo, h);
                let reached = rows.start + top - halo..rows.end + halo - bottom;
                Band { n, is_first: start == all.start, rows, reached, channels: channels.clone() }
            })
        })
    }

    /// `values` for each channel of each group.
    fn sums(&self, values: usize) -> GroupSums {
        let chunks = self.tasks.chunks;
        let (groups, chunk) = (self.groups, chunks.channels(chunks.len() - 1).len());
        let batch = Batch { n: groups, c: chunks.len(), h: values, w: chunk };
        GroupSums { sums: vec![0.0; batch.size()], batch }
    }

    /// The sums of channel c, group by group, in order.
    fn of_channel<const N: usize>(
        &self,
        sums: &GroupSums,
        c: usize,
    ) -> impl Iterator<Item = [f64; N]> {
        let chunks = self.tasks.chunks;
        let chunk = chunks.of(c);
        let first = c - chunks.channels(chunk).start;
        let Batch { c: count, h, w, .. } = sums.batch;
        let of_group = sums.sums.chunks_exact(count * h * w);
        of_group.map(move |group| std::array::from_fn(|i| group[(chunk * h + i) * w + first]))
    }

    fn pixels<'t>(&self, tensor: &'t [T], band: &Band, rows: &Range<usize>) -> Pixels<'t, T> {
        let Batch { c, h, w, .. } = self.batch;
        let first = (band.n * h + rows.start) * w * c;
        let last = (band.n * h + rows.end) * w * c;
        Pixels::new(&tensor[first + band.channels.start..last], c)
    }

    /// Rows of a band, and some of its channels, in a tensor that is written.
    ///
    /// # Safety
    /// Nobody else may use them, as long as this lives.
    unsafe fn places<'t>(
        &self,
        tensor: &'t Planes<'_, T>,
        band: &Band,
        channels: &Range<usize>,
    ) -> Places<'t, T> {
        let Batch { c, w, .. } = self.batch;
        let start = band.channels.start + channels.start;
        // SAFETY: they are inside; the caller's promise.
        unsafe {
            let first = tensor.image(band.n).add(band.rows.start * w * c + start);
            Places::new(first, (w * c, c), (band.rows.len(), w), channels.len())
        }
    }

    /// The same to read.
    ///
    /// # Safety
    /// Nobody may write to them, as long as this lives.
    unsafe fn written<'t>(&self, tensor: &'t Planes<'_, T>, band: &Band) -> Pixels<'t, T> {
        let Batch { c, w, .. } = self.batch;
        // SAFETY: they are inside; the caller's promise.
        unsafe {
            let first = tensor.image(band.n).add(band.rows.start * w * c + band.channels.start);
            Pixels::from_raw(first, c, band.rows.len() * w, band.channels.len())
        }
    }

    /// Part `i` of what is read after the rows that a band reaches, of as many elements as a block's rows of outputs
    /// have; where that is not all channels, `otherwise`.
    fn next(&self, tensor: &[T], band: &Band, i: usize, otherwise: &Window<T>) -> *const T {
        let Batch { c, h, w, .. } = self.batch;
        if band.channels.len() < c {
            return otherwise.data.as_ptr();
        }
        let part = i * band.rows.len() * w * otherwise.block;
        tensor.as_ptr().wrapping_add((band.n * h + band.reached.end) * w * c + part)
    }

    /// Channels of a block of so many.
    fn block(&self, channels: usize) -> usize {
        if channels.is_multiple_of(MAX_LANES) { MAX_LANES } else { simd::selected_lanes::<T>() }
    }

    /// The taps in this order of rows and columns, block by block of each chunk.
    fn taps(&self, order: &[usize]) -> Vec<Vec<Scratch<T>>> {
        let (k, chunks) = (self.unit.kernel, self.tasks.chunks);
        let of_block = |channels: Range<usize>| {
            let weight = &self.unit.weight[channels.start * k * k..channels.end * k * k];
            taps_of(weight, (k, k), order, order)
        };
        let of_chunk = |i: usize| {
            let channels = chunks.channels(i);
            let block = self.block(channels.len());
            channels.step_by(block).map(|c| of_block(c..c + block)).collect()
        };
        (0..chunks.len()).map(of_chunk).collect()
    }

    fn rectifies(&self) -> bool {
        self.unit.variant != Variant::Slim
    }

    /// Σ over all values of a tensor, and that of squares about the mean, of each channel.
    fn statistics(&self, v: &[T], threads: Threads) -> Vec<Statistics> {
        let mut sums = self.sums(3);
        let planes = Planes::new(&mut sums.sums, sums.batch);
        self.each(false, threads, |group, chunk| {
            let mut statistics = BandStatistics::new(self.tasks.chunks.channels(chunk).len());
            for band in self.bands(group, chunk) {
                statistics.add(self.pixels(v, &band, &band.rows), band.rows.len() * self.batch.w);
            }
            // SAFETY: this task alone names them.
            statistics.write(unsafe { planes.plane(group, chunk) }, sums.batch.w);
        });
        self.joined(&sums)
    }

    fn joined(&self, sums: &GroupSums) -> Vec<Statistics> {
        let of_channel = |c| {
            let mut all = Statistics::default();
            for [count, sum, squares] in self.of_channel(sums, c) {
                all.join(&Statistics { count, sum, squares });
            }
            all
        };
        (0..self.batch.c).map(of_channel).collect()
    }

    /// [`super::xunit_forward`], from the pointwise output, if there is one, on; mean and variance of both norms, if
    /// they are the batch's, go to `stats`.
    pub(super) fn forward(
        &self,
        x: &[T],
        p: Option<&[T]>,
        d: Option<&mut [T]>,
        out: &Planes<'_, T>,
        stats: &mut [f64],
        threads: Threads,
    ) {
        let Self { unit, batch, .. } = *self;
        let u = p.unwrap_or(x);
        let mut own = Vec::new();
        let d = d.unwrap_or_else(|| {
            own = memory::filled(batch.size(), T::ZERO);
            &mut own
        });
        let taps = self.taps(&all(unit.kernel));
        let zeros = vec![T::ZERO; batch.c];
        let bias = unit.bias.unwrap_or(&zeros);
        let d_planes = Planes::new(d, batch);
        let [norm1, norm2] = [&unit.norm1, &unit.norm2];
        let [mut first, mut second] = [norm1, norm2].map(|norm| self.given(norm));
        let mut resolve = |norm: &Norm<'_, T>, maps: &mut Maps<T>, of: &[Statistics], at| {
            for (c, of) in of.iter().enumerate() {
                let (mean, var) = (of.mean(), of.var());
                stats[4 * c + at..][..2].copy_from_slice(&[mean, var]);
                maps.set(c, Channel::new(norm, c, mean, var).affine);
            }
        };
        if let Some(norm) = awaited(norm1) {
            resolve(&norm, &mut first, &self.statistics(u, threads), 0);
        }
        let waits = awaited(norm2);
        let mut sums = self.sums(3);
        let sum_planes = Planes::new(&mut sums.sums, sums.batch);
        self.each(true, threads, |group, chunk| {
            let channels = self.tasks.chunks.channels(chunk);
            let mut window = Window::<T>::new(self, channels.len(), true);
            let mut statistics = BandStatistics::new(channels.len());
            for band in self.bands(group, chunk) {
                self.rectify(&mut window, u, &band, &first);
                for (i, taps) in taps[chunk].iter().enumerate() {
                    let channels = window.channels(i);
                    simd::dispatch(pixels::Forward {
                        image: window.image(i).before(self.next(u, &band, i, &window)),
                        grid: self.grid_of(&band),
                        taps,
                        bias: &bias[band.channels.start + channels.start..][..channels.len()],
                        rows: 0..band.rows.len(),
                        // SAFETY: this task alone names these channels.
                        out: unsafe { self.places(&d_planes, &band, &channels) },
                    });
                }
                // SAFETY: as above; they have been written.
                let d = unsafe { self.written(&d_planes, &band) };
                match waits {
                    Some(_) => statistics.add(d, band.rows.len() * batch.w),
                    // SAFETY: as above.
                    None => unsafe { self.gate(&band, x, d, &second, out) },
                }
            }
            if waits.is_some() {
                // SAFETY: this task alone names them.
                statistics.write(unsafe { sum_planes.plane(group, chunk) }, sums.batch.w);
            }
        });
        let Some(norm) = waits else { return };
        resolve(&norm, &mut second, &self.joined(&sums), 2);
        self.each(false, threads, |group, chunk| {
            for band in self.bands(group, chunk) {
                // SAFETY: this task alone names these channels; d has been written.
                unsafe { self.gate(&band, x, self.written(&d_planes, &band), &second, out) };
            }
        });
    }

    /// The maps of a norm, as far as its statistics are given.
    fn given(&self, norm: &Option<Norm<'_, T>>) -> Maps<T> {
        let norm = norm.as_ref().filter(|norm| norm.stats.is_some());
        Maps::new((0..self.batch.c).map(|c| Channel::given(norm, c).affine))
    }

    /// Where the taps of a band's convolution meet the rows that it reaches.
    fn grid_of(&self, band: &Band) -> Grid {
        let (row, column) = self.grid.origin;
        let row = row + (band.rows.start - band.reached.start) as isize;
        Grid { origin: (row, column), ..self.grid }
    }

    /// What the convolution takes, of the rows that a band reaches.
    fn rectify(&self, window: &mut Window<T>, u: &[T], band: &Band, maps: &Maps<T>) {
        let new = window.slide(band);
        // The last rows may all be there.
        if !new.is_empty() {
            simd::dispatch(Rectify {
                v: self.pixels(u, band, &new),
                pixels: new.len() * self.batch.w,
                maps: self.rectifies().then(|| maps.of(band.channels.clone())),
                channels: band.channels.len(),
                u: window.rows_mut(&new),
            });
        }
    }

    /// # Safety
    /// As [`Direct::places`].
    unsafe fn gate(
        &self,
        band: &Band,
        x: &[T],
        d: Pixels<'_, T>,
        maps: &Maps<T>,
        out: &Planes<'_, T>,
    ) {
        simd::dispatch(Apply {
            gate: self.unit.gate,
            x: self.pixels(x, band, &band.rows),
            d,
            maps: Some(maps.of(band.channels.clone())),
            // SAFETY: the caller's promise.
            out: unsafe { self.places(out, band, &(0..band.channels.len())).streamed(out.stream) },
        });
    }

    /// [`super::xunit_backward`], up to the gradient at the pointwise output, if there is one. Returns the sums of
    /// channels that are listed there, or None where they are not finite, as then they may be wrong.
    pub(super) fn backward(
        &self,
        [grad, x, u, d]: [&[T]; 4],
        gx: &Planes<'_, T>,
        threads: Threads,
    ) -> Option<Vec<f64>> {
        let Self { unit, batch, .. } = *self;
        let Batch { c, w, .. } = batch;
        let (dense, k) = (unit.pointwise.is_some(), unit.kernel);
        let count = (batch.n * batch.plane()) as f64;
        let (waits1, waits2) = (is_training(&unit.norm1), is_training(&unit.norm2));
        let of = |norm: &Option<Norm<'_, T>>| -> Vec<_> {
            (0..c).map(|c| Channel::given(norm.as_ref(), c)).collect()
        };
        let (first, second) = (of(&unit.norm1), of(&unit.norm2));
        let maps = |norm: &[Channel<T>]| Maps::new(norm.iter().map(|channel| channel.affine));
        let (maps1, maps2) = (maps(&first), maps(&second));
        let gradients = |norm: &[Channel<T>], training, sums: &[[f64; 2]]| {
            let training = if training { Some(count) } else { None };
            let of = |(channel, sums): (&Channel<T>, &[f64; 2])| channel.gradient(training, *sums);
            NormMaps::new(&norm.iter().zip(sums).map(of).collect::<Vec<_>>())
        };
        let turned: Vec<_> = (0..k).rev().collect();
        let taps = self.taps(&turned);
        let zeros = vec![T::ZERO; c];
        let mut tap_sums = TapSums::new::<T>(self.groups, self.tasks.chunks, (k, k));
        let tap_planes = tap_sums.planes();
        let mut gate_sums = self.sums(2);
        let width = gate_sums.batch.w;
        if unit.norm2.is_some() {
            let planes = Planes::new(&mut gate_sums.sums, gate_sums.batch);
            self.each(false, threads, |group, chunk| {
                // SAFETY: this task alone names them.
                let [a, b] = two(unsafe { planes.plane(group, chunk) }, width);
                for band in self.bands(group, chunk) {
                    let [grad, x, d] =
                        [grad, x, d].map(|tensor| self.pixels(tensor, &band, &band.rows));
                    let len = band.channels.len();
                    simd::dispatch(GateSums {
                        gate: unit.gate,
                        grad,
                        x,
                        d,
                        maps: maps2.of(band.channels.clone()),
                        pixels: band.rows.len() * w,
                        sums: [&mut a[..len], &mut b[..len]],
                    });
                }
            });
        }
        let gate_sums = self.totals(&gate_sums);
        let norm2 = gradients(&second, waits2, &gate_sums);
        let mut relu_sums = self.sums(2);
        let relu_planes = Planes::new(&mut relu_sums.sums, relu_sums.batch);
        self.each(true, threads, |group, chunk| {
            let channels = self.tasks.chunks.channels(chunk);
            let len = channels.len();
            let of_taps = pixels::sums((k, k), len, simd::selected_lanes::<T>());
            // SAFETY: this task alone names them.
            let (tap_sums, relu_sums) = unsafe {
                (&mut tap_planes.plane(group, chunk)[..of_taps], relu_planes.plane(group, chunk))
            };
            let [a, b] = two(relu_sums, width);
            let new = |wanted| Window::<T>::new(self, len, wanted);
            let (mut rectified, mut at_d, mut direct) = (new(true), new(true), new(!dense));
            let mut at_u = Window::of_outputs(self, len);
            let of_block = pixels::sums((k, k), at_d.block, simd::selected_lanes::<T>());
            let mut scratch = Scratch::new(of_block);
            for band in self.bands(group, chunk) {
                let new = at_d.slide(&band);
                if !dense {
                    direct.slide(&band);
                }
                if !new.is_empty() {
                    let [grad, x, d] = [grad, x, d].map(|tensor| self.pixels(tensor, &band, &new));
                    simd::dispatch(GateGradient {
                        gate: unit.gate,
                        grad,
                        x,
                        d,
                        maps: maps2.of(channels.clone()),
                        norm: norm2.of(channels.clone()),
                        pixels: new.len() * w,
                        e: at_d.rows_mut(&new),
                        direct: (!dense).then(|| direct.rows_mut(&new)),
                    });
                }
                self.rectify(&mut rectified, u, &band, &maps1);
                at_u.rows = band.rows.clone();
                let y = band.rows.start - band.reached.start;
                for (i, taps) in taps[chunk].iter().enumerate() {
                    // What the next band needs is asked for where the kernels read as much of their own.
                    let ahead = |tensor| self.next(tensor, &band, i, &at_d);
                    let shifted = |tensor| ahead(tensor).wrapping_sub(y * at_d.len);
                    simd::dispatch(pixels::WeightGradient {
                        image: rectified.image(i).before(shifted(x)),
                        grid: self.grid,
                        grad: at_d.image(i).before(shifted(d)),
                        rows: y..y + band.rows.len(),
                        taps: true,
                        bias: true,
                        sums: &mut tap_sums[i * of_block..][..of_block],
                        scratch: &mut scratch,
                    });
                    simd::dispatch(pixels::Forward {
                        image: at_d.image(i).before(ahead(grad)),
                        grid: self.grid_of(&band),
                        taps,
                        bias: &zeros[..at_d.block],
                        rows: 0..band.rows.len(),
                        out: at_u.places(i),
                    });
                }
                // SAFETY: this task alone names these channels.
                let out =
                    unsafe { self.places(gx, &band, &(0..len)).streamed(gx.stream && !waits1) };
                let direct = (!dense).then(|| direct.rows(&band.rows));
                let grad = at_u.rows(&band.rows);
                match direct {
                    Some(direct) if !self.rectifies() => {
                        simd::dispatch(Add { a: grad, b: direct, out });
                    }
                    direct => simd::dispatch(ReluGradient {
                        u: self.pixels(u, &band, &band.rows),
                        maps: maps1.of(channels.clone()),
                        grad,
                        direct,
                        out,
                        sums: [&mut a[..len], &mut b[..len]],
                    }),
                }
            }
        });
        let relu_sums = self.totals(&relu_sums);
        if waits1 {
            let norm1 = gradients(&first, true, &relu_sums);
            self.each(false, threads, |group, chunk| {
                for band in self.bands(group, chunk) {
                    simd::dispatch(BatchGradient {
                        u: self.pixels(u, &band, &band.rows),
                        norm: norm1.of(band.channels.clone()),
                        // SAFETY: this task alone names these channels.
                        grad: unsafe { self.places(gx, &band, &(0..band.channels.len())) },
                    });
                }
            });
        }
        // Where they are not finite, they may be wrong.
        let (mut of_taps, mut of_bias) = (vec![T::ZERO; c * k * k], vec![T::ZERO; c]);
        if !tap_sums.write(Some(&mut of_taps), Some(&mut of_bias)) {
            return None;
        }
        let mut sums = Vec::with_capacity(c * (k * k + 6));
        for channel in 0..c {
            let (relu, gate) = (relu_sums[channel], gate_sums[channel]);
            sums.extend(of_taps[channel * k * k..][..k * k].iter().map(|sum| sum.to_f64()));
            let (first, second) = (&first[channel], &second[channel]);
            let at_p = relu[0] * first.affine.scale.to_f64();
            sums.extend([of_bias[channel].to_f64(), first.normalised(relu), relu[0]]);
            sums.extend([second.normalised(gate), gate[0], at_p]);
        }
        Some(sums)
    }

    /// The sums of each channel over all groups.
    fn totals(&self, sums: &GroupSums) -> Vec<[f64; 2]> {
        let total = |c| self.of_channel(sums, c).fold([0.0; 2], |[a, b], [c, d]| [a + c, b + d]);
        (0..self.batch.c).map(total).collect()
    }
}

/// A norm that uses the statistics of the batch.
fn awaited<'a, T: Scalar>(norm: &Option<Norm<'a, T>>) -> Option<Norm<'a, T>> {
    norm.filter(|norm| norm.stats.is_none())
}

/// Two slices of so many sums.
fn two(sums: &mut [f64], len: usize) -> [&mut [f64]; 2] {
    sums.split_at_mut(len).into()
}

/// Sums of channels: (groups, chunks, values, channels of a chunk).
struct GroupSums {
    sums: Vec<f64>,
    batch: Batch,
}

/// The [`Statistics`] of some channels, band by band.
struct BandStatistics<T> {
    statistics: Vec<Statistics>,
    origin: Vec<T>,
    sums: [Vec<f64>; 2],
}

impl<T: Scalar> BandStatistics<T> {
    fn new(channels: usize) -> Self {
        let sums = [vec![0.0; channels], vec![0.0; channels]];
        let statistics = vec![Statistics::default(); channels];
        Self { statistics, origin: vec![T::ZERO; channels], sums }
    }

    /// As [`Statistics::add`].
    fn add(&mut self, band: Pixels<'_, T>, pixels: usize) {
        let count = pixels as f64;
        let is_first = self.statistics[0].count == 0.0;
        if is_first {
            self.sum(band, pixels);
        }
        for (i, origin) in self.origin.iter_mut().enumerate() {
            let mean = if is_first { self.sums[0][i] / count } else { self.statistics[i].mean() };
            *origin = super::origin(mean);
        }
        self.sum(band, pixels);
        for (i, statistics) in self.statistics.iter_mut().enumerate() {
            statistics.add_about(self.origin[i], count, (self.sums[0][i], self.sums[1][i]));
        }
    }

    /// Sums and those of squares about the origins.
    fn sum(&mut self, v: Pixels<'_, T>, pixels: usize) {
        let [first, second] = &mut self.sums;
        first.fill(0.0);
        second.fill(0.0);
        simd::dispatch(Sums { v, pixels, origin: &self.origin, sums: [first, second] });
    }

    /// Count, sum and squares, `step` elements apart.
    fn write(&self, to: &mut [f64], step: usize) {
        for (i, of) in self.statistics.iter().enumerate() {
            for (to, value) in to[i..].iter_mut().step_by(step).zip([of.count, of.sum, of.squares])
            {
                *to = value;
            }
        }
    }
}

/// Some rows of outputs of image n, of some channels.
struct Band {
    n: usize,
    /// Whether the one before is not right above.
    is_first: bool,
    rows: Range<usize>,
    /// Those that the outputs depend on.
    reached: Range<usize>,
    channels: Range<usize>,
}

/// Rows of a band's channels, (blocks, rows, columns, channels of a block): where the next band reaches them, too, they
/// move up.
struct Window<T> {
    data: Scratch<T>,
    rows: Range<usize>,
    columns: usize,
    /// Elements of a block's row, and from one block to the next.
    len: usize,
    stride: usize,
    block: usize,
}

impl<T: Scalar> Window<T> {
    /// For the rows that bands of so many channels reach; empty if it is not `wanted`.
    fn new(of: &Direct<'_, T>, channels: usize, wanted: bool) -> Self {
        let rows = of.most_rows(channels) + of.unit.kernel - 1;
        Self::of_rows(of, channels, if wanted { rows } else { 0 })
    }

    /// For those of outputs.
    fn of_outputs(of: &Direct<'_, T>, channels: usize) -> Self {
        Self::of_rows(of, channels, of.most_rows(channels))
    }

    fn of_rows(of: &Direct<'_, T>, channels: usize, rows: usize) -> Self {
        let (block, columns) = (of.block(channels), of.batch.w);
        let len = columns * block;
        let stride = of.batch.h.min(rows) * len;
        let data = Scratch::new(channels / block * stride);
        Self { data, rows: 0..0, columns, len, stride, block }
    }

    /// Moves to the rows that a band reaches; returns those of them that are not there yet.
    fn slide(&mut self, band: &Band) -> Range<usize> {
        let (reached, len) = (&band.reached, self.len);
        let kept = if band.is_first { 0 } else { self.rows.end - reached.start };
        if kept > 0 {
            let from = (reached.start - self.rows.start) * len;
            let moved = |block: &mut [T]| block.copy_within(from..from + kept * len, 0);
            self.data.chunks_exact_mut(self.stride).for_each(moved);
        }
        self.rows = reached.clone();
        reached.start + kept..reached.end
    }

    /// Where these rows are, in each block.
    fn at(&self, rows: &Range<usize>) -> usize {
        assert!(rows.start >= self.rows.start && rows.end <= self.rows.end);
        (rows.start - self.rows.start) * self.len
    }

    fn rows(&self, rows: &Range<usize>) -> Blocks<'_, T> {
        Blocks::new(&self.data[self.at(rows)..], self.stride, self.block)
    }

    fn rows_mut(&mut self, rows: &Range<usize>) -> BlocksMut<'_, T> {
        let at = self.at(rows);
        BlocksMut::new(&mut self.data[at..], self.stride, self.block)
    }

    /// The channels of block i, from the first one on.
    fn channels(&self, i: usize) -> Range<usize> {
        i * self.block..(i + 1) * self.block
    }

    /// All rows of block i.
    fn image(&self, i: usize) -> Image<'_, T> {
        let data = &self.data[i * self.stride..][..self.rows.len() * self.len];
        Image::new(data, (self.rows.len(), self.columns), self.block, 0..self.block)
    }

    /// The same to write.
    fn places(&mut self, i: usize) -> Places<'_, T> {
        let data = &mut self.data[i * self.stride..][..self.rows.len() * self.len];
        let count = (self.rows.len(), self.columns);
        // SAFETY: all of it is borrowed.
        unsafe { Places::new(data.as_mut_ptr(), (self.len, self.block), count, self.block) }
    }
}
