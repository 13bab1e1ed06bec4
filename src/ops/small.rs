//! Depthwise convolution of small planes: some channels at a time are turned to channels_last, in the first-level
//! cache, and back. There vectors are full where a row of a plane has less elements than they, and nothing is padded.

use std::ops::Range;

use super::pixels::{
    Phase, SUMS, all, grid_of, has_weight_gradient, is_direct, taps_of, write_sums,
};
use super::scratch::Scratch;
use super::{DepthwiseGradients, Planes};
use crate::kernels::general::Places;
use crate::kernels::pixels::{self, Grid, Image};
use crate::kernels::transpose::Transpose;
use crate::parallel::{self, Threads};
use crate::shape::{Batch, Geometry};
use crate::simd::{self, Scalar};

/// Whether planes are so small that this takes less time, and kernels take them. Time over that of the operations on
/// planes, forward and input gradient, at 32 × 768 × 7 × 7 (Zen 4, one thread): AVX-512 0.8 for K = 3, 0.6 to 0.8 for 5,
/// 0.4 to 0.6 for 7, 0.25 to 0.4 for 9, AVX2 0.25 to 0.4; at 32 × 512 × 10 × 10 1.3 for 3 and 5, 0.6 to 0.75 for 7 and
/// 9; at 32 × 384 × 14 × 14 1.4 to 1.9 for 3 and 5, 0.95 for 7 and 9, of which the weight gradient takes 1.5. Vectors of
/// four were not timed.
pub(super) fn suits<T: Scalar>(geometry: &Geometry, weight: &[T]) -> bool {
    let longest = if geometry.conv.kw < 7 { 8 } else { 12 };
    let lanes = simd::selected_lanes::<T>();
    geometry.ow <= longest
        && channel_bytes::<T>(geometry) * lanes <= BYTES
        && is_direct(geometry, weight)
}

/// Bytes of a channel of what is read or written, whichever is more.
fn channel_bytes<T>(geometry: &Geometry) -> usize {
    geometry.input.plane().max(geometry.output().plane()) * size_of::<T>()
}

/// The most channels of a chunk, and bytes of its image.
const CHUNK: usize = 64;
const BYTES: usize = 16 << 10;

/// The channels of a batch, chunk by chunk: whole vectors, but for the last one, which takes what is left.
struct Chunks {
    channels: usize,
    chunk: usize,
}

impl Chunks {
    fn new<T: Scalar>(geometry: &Geometry) -> Self {
        let lanes = simd::selected_lanes::<T>();
        // A vector or more, as `suits` says.
        let chunk = (BYTES / channel_bytes::<T>(geometry)).min(CHUNK) / lanes * lanes;
        Self { channels: geometry.input.c, chunk }
    }

    fn len(&self) -> usize {
        (self.channels / self.chunk).max(1)
    }

    fn channels(&self, i: usize) -> Range<usize> {
        let end = if i + 1 < self.len() { (i + 1) * self.chunk } else { self.channels };
        i * self.chunk..end
    }
}

/// Some channels of image n, pixel by pixel.
fn to_pixels<T: Scalar>(
    planes: &[T],
    batch: Batch,
    n: usize,
    channels: &Range<usize>,
) -> Scratch<T> {
    let (plane, c) = (batch.plane(), channels.len());
    let from = &planes[(n * batch.c + channels.start) * plane..][..c * plane];
    let mut to = Scratch::new(plane * c);
    // SAFETY: the target has as many pixels of as many channels.
    simd::dispatch(unsafe { Transpose::scatter((from, plane), (to.as_mut_ptr(), c), plane, c) });
    to
}

/// Writes them back to planes.
///
/// # Safety
/// No other reference to these planes may live.
unsafe fn to_planes<T: Scalar>(
    from: &[T],
    planes: &Planes<'_, T>,
    n: usize,
    channels: &Range<usize>,
) {
    let (plane, c) = (planes.batch.plane(), channels.len());
    // SAFETY: these planes are of image n; the caller vouches for the rest.
    let job = unsafe {
        let to = planes.image(n).add(channels.start * plane);
        Transpose::gather_to((from, c), (to, plane), plane, c)
    };
    simd::dispatch(job);
}

/// Pixels of such a chunk.
fn image<T>(pixels: &[T], batch: Batch, c: usize) -> Image<'_, T> {
    Image::new(pixels, (batch.h, batch.w), c, 0..c)
}

/// [`super::depthwise_forward`]
pub(super) fn forward<T: Scalar>(
    geometry: &Geometry,
    x: &[T],
    weight: &[T],
    bias: Option<&[T]>,
    y: &mut [T],
    threads: Threads,
) {
    let Geometry { conv, input, .. } = *geometry;
    let (output, grid, kernel) = (geometry.output(), grid_of(&conv), conv.kh * conv.kw);
    let zeros = vec![T::ZERO; input.c];
    let bias = bias.unwrap_or(&zeros);
    let chunks = Chunks::new::<T>(geometry);
    let taps_of_chunk = |i| {
        let Range { start, end } = chunks.channels(i);
        taps_of(&weight[start * kernel..end * kernel], grid.kernel, &all(conv.kh), &all(conv.kw))
    };
    let taps: Vec<_> = (0..chunks.len()).map(taps_of_chunk).collect();
    let planes = Planes::new(y, output);
    parallel::for_each(threads, input.n * chunks.len(), |task| {
        let (n, chunk) = (task / chunks.len(), task % chunks.len());
        let (channels, taps) = (chunks.channels(chunk), &taps[chunk][..]);
        let x = to_pixels(x, input, n, &channels);
        let mut to = Scratch::<T>::new(output.plane() * channels.len());
        // SAFETY: all of it.
        let out = unsafe { places(&mut to, output, channels.len()) };
        let (image, bias) = (image(&x, input, channels.len()), &bias[channels.clone()]);
        simd::dispatch(pixels::Forward { image, grid, taps, bias, rows: 0..output.h, out });
        // SAFETY: this task alone names these channels of image n.
        unsafe { to_planes(&to, &planes, n, &channels) };
    });
}

/// The pixels of a chunk, all to be written.
///
/// # Safety
/// It must have as many; no other reference may live.
unsafe fn places<T: Scalar>(to: &mut [T], batch: Batch, c: usize) -> Places<'_, T> {
    // SAFETY: the caller's promise.
    unsafe { Places::new(to.as_mut_ptr(), (batch.w * c, c), (batch.h, batch.w), c) }
}

/// [`super::depthwise_backward`]: a task is a chunk of channels of some images. Returns whether the gradients that were
/// asked for are all made: those to weight and bias not where there are no kernels, or where `grad` is not finite and
/// they would be NaN in the padding.
pub(super) fn backward<T: Scalar>(
    geometry: &Geometry,
    grad: &[T],
    x: &[T],
    weight: &[T],
    gradients: DepthwiseGradients<'_, T>,
    threads: Threads,
) -> bool {
    let DepthwiseGradients { x: gx, weight: gweight, bias: gbias } = gradients;
    let Geometry { conv, input, .. } = *geometry;
    let (output, grid, kernel) = (geometry.output(), grid_of(&conv), conv.kh * conv.kw);
    let [rows, columns] = [
        Phase::all(input.h, conv.kh, conv.stride[0], conv.padding[0]),
        Phase::all(input.w, conv.kw, conv.stride[1], conv.padding[2]),
    ];
    let lanes = simd::selected_lanes::<T>();
    let chunks = Chunks::new::<T>(geometry);
    let groups = input.n.min(SUMS.div_ceil(chunks.len()));
    let wanted = gweight.is_some() || gbias.is_some();
    let sums = wanted && has_weight_gradient(geometry);
    if !sums && gx.is_none() {
        return !wanted;
    }
    // Of the last chunk, which is the largest.
    let len = pixels::sums(grid.kernel, chunks.channels(chunks.len() - 1).len(), lanes);
    let mut sum = vec![0.0; if sums { groups * chunks.len() * len } else { 0 }];
    let of_chunks = Batch { n: groups, c: chunks.len(), h: 1, w: if sums { len } else { 0 } };
    let sum_planes = Planes::new(&mut sum, of_chunks);
    let gx = gx.map(|gx| Planes::new(gx, input));
    parallel::for_each(threads, groups * chunks.len(), |task| {
        let (group, chunk) = (task / chunks.len(), task % chunks.len());
        let channels = chunks.channels(chunk);
        let c = channels.len();
        let weight = &weight[channels.start * kernel..channels.end * kernel];
        let phases: Vec<_> = rows
            .iter()
            .flat_map(|row| columns.iter().map(move |column| (row, column)))
            .map(|(row, column)| {
                (row, column, taps_of(weight, grid.kernel, &row.taps, &column.taps))
            })
            .collect();
        let zeros = vec![T::ZERO; c];
        // SAFETY: this task alone names them.
        let sum = unsafe { sum_planes.plane(group, chunk) };
        let len = pixels::sums(grid.kernel, c, lanes);
        let mut scratch = Scratch::new(if sums { len } else { 0 });
        for n in group * input.n / groups..(group + 1) * input.n / groups {
            let grad = to_pixels(grad, output, n, &channels);
            if let Some(gx) = &gx {
                let mut to = Scratch::<T>::new(input.plane() * c);
                for (row, column, taps) in &phases {
                    let grid = Grid {
                        kernel: (row.taps.len(), column.taps.len()),
                        stride: (1, 1),
                        origin: (row.origin, column.origin),
                    };
                    let first = (row.first * input.w + column.first) * c;
                    let steps = (conv.stride[0] * input.w * c, conv.stride[1] * c);
                    // SAFETY: pixels of the image, of which nobody else knows.
                    let out = unsafe {
                        let count = (row.count, column.count);
                        Places::new(to.as_mut_ptr().add(first), steps, count, c)
                    };
                    let (image, rows) = (image(&grad, output, c), 0..row.count);
                    simd::dispatch(pixels::Forward { image, grid, taps, bias: &zeros, rows, out });
                }
                // SAFETY: this task alone names these channels of image n.
                unsafe { to_planes(&to, gx, n, &channels) };
            }
            if sums {
                let x = to_pixels(x, input, n, &channels);
                simd::dispatch(pixels::WeightGradient {
                    image: image(&x, input, c),
                    grid,
                    grad: image(&grad, output, c),
                    rows: 0..output.h,
                    taps: gweight.is_some(),
                    sums: &mut sum[..len],
                    scratch: &mut scratch,
                });
            }
        }
    });
    if !sums {
        return !wanted;
    }
    let of = |c: usize, tap: usize| {
        let chunk = (c / chunks.chunk).min(chunks.len() - 1);
        let channels = chunks.channels(chunk);
        let at = pixels::place(c - channels.start, channels.len(), lanes, kernel, tap);
        let of_group = |group: usize| sum[(group * chunks.len() + chunk) * len + at];
        T::from_f64((0..groups).map(of_group).sum())
    };
    write_sums(input.c, kernel, of, gweight, gbias)
}
