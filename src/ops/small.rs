//! Depthwise convolution of small planes, and of those with a stride: some channels at a time are turned to
//! channels_last, in a cache, and back. There vectors are full where a row of a plane has less elements than they, those
//! of the outputs of a stride lie side by side, and nothing is padded.

use std::ops::Range;

use super::pixels::{Chunks, Phase, Pixels, TapSums, all, grid_of, is_direct, taps_of};
use super::scratch::Scratch;
use super::{DepthwiseGradients, Planes, part};
use crate::kernels::activation::{CopyOut, Target};
use crate::kernels::general::Places;
use crate::kernels::pixels::{self, Image};
use crate::kernels::transpose::Transpose;
use crate::parallel::{self, Threads};
use crate::shape::{Batch, Geometry};
use crate::simd::{self, Scalar};

/// Whether planes are so small that this takes less time, and kernels take them.
pub(super) fn suits<T: Scalar>(geometry: &Geometry, weight: &[T]) -> bool {
    let bytes = channel_bytes::<T>(geometry) * simd::selected_lanes::<T>();
    geometry.ow <= longest::<T>(geometry)[0]
        && bytes <= BYTES[(geometry.conv.stride != [1, 1]) as usize]
        && is_direct(geometry, weight)
}

/// The longest rows of outputs of which this takes less time than the operations on planes: forward and input gradient;
/// weight gradient. Time over theirs, forward and input gradient; weight gradient (Zen 4, one thread, 32 images):
///
/// | | 768 × 7 × 7 | 512 × 10 × 10 | 384 × 14 × 14 | 384 × 16 × 16 | 256 × 20 × 20 |
/// |---|---|---|---|---|---|
/// | AVX-512, K = 3 | | 0.9; 0.6 | 0.6; 0.5 | 1.2 to 1.3; 0.8 | 1.0 to 1.1; 0.8 |
/// | 5 | | 0.9; 0.6 | 0.9; 0.8 | 1.2 to 1.3; 1.1 | 1.0; 0.9 |
/// | 7 | | 0.4 to 0.5; 0.6 | 0.5; 0.65 | 0.8; 0.8 | 0.8; 0.7 |
/// | 9 | | 0.4 to 0.5; 0.6 | 0.6; 0.65 | 0.8; 0.75 | 0.7; 0.6 |
/// | AVX2, 3 | 0.2; 0.2 | 0.5; 0.6 | 0.5; 0.8 | 0.7; 1.0 | 0.7 to 0.8; 1.1 |
/// | 5 | 0.1 to 0.2; 0.5 | 0.5; 0.7 | 0.5; 0.5 | 0.6; 0.85 | 0.6; 0.65 |
/// | 7 | 0.2; 0.6 | 0.4; 0.4 | 0.5; 0.65 | 0.7; 0.9 | 0.7; 0.7 |
/// | 9 | 0.2; 0.8 | 0.5; 0.5 | 0.6; 0.8 | 0.7; 1.1 | 0.7 to 0.8; 0.85 |
///
/// Weight gradients of k = 3, of 5 with AVX-512 and of 7 × 7 and 10 × 10, but for those of 7 and 9 at 10 × 10 with AVX2,
/// are of the kernel before, and take less time since.
///
/// Rows of 24 and more take 0.9 to 1.6 times as long. With a stride of 2 planes are split into phases: AVX-512 0.4 to
/// 0.9 from 14 × 14 to 60 × 60, but 0.8 to 1.5 and 0.8 to 1.9 at 32 × 32 and 64 × 64, where planes fall on the same lines
/// of the cache and all vectors of outputs are full; AVX2 0.3 to 1.0 from 14 × 14 to 40 × 40, 1.0 to 1.6 at 32 × 32, 48 ×
/// 48, 64 × 64 and 80 × 80. Vectors of four, without an instruction set: 0.6 to 1.0; 0.8 to 1.0 at 7 × 7, 0.8; 1.2 to 1.3
/// at 10 × 10; with a stride of 2 0.8 to 1.4; 0.4 to 0.7 at 14 × 14.
fn longest<T: Scalar>(geometry: &Geometry) -> [usize; 2] {
    match (geometry.conv.stride, simd::selected_lanes::<T>(), geometry.conv.kw) {
        ([2, 2], 8.., _) if geometry.ow.is_multiple_of(16) => [0, 0],
        ([2, 2], 16, _) => [usize::MAX; 2],
        ([2, 2], 8, _) => [20, 20],
        (_, 16, 3 | 5) => [14, 14],
        (_, 16, _) => [20, 20],
        (_, 8, 3) => [20, 14],
        (_, 8, _) => [20, 20],
        _ => [10, 8],
    }
}

/// Bytes of a channel of what is read or written, whichever is more.
fn channel_bytes<T>(geometry: &Geometry) -> usize {
    geometry.input.plane().max(geometry.output().plane()) * size_of::<T>()
}

/// The most bytes of the image of a vector of channels, without a stride and with one: it lies in the first-level cache
/// or in the second, with its result.
const BYTES: [usize; 2] = [32 << 10, 256 << 10];
/// The most channels of a chunk, if the first of those bytes hold its image.
const CHUNK: usize = 64;

fn chunks_of<T: Scalar>(geometry: &Geometry) -> Chunks {
    let lanes = simd::selected_lanes::<T>();
    let chunk = (BYTES[0] / channel_bytes::<T>(geometry)).min(CHUNK) / lanes * lanes;
    Chunks::new(geometry.input.c, chunk.max(lanes))
}

/// Planes of so many elements, one after the other, pixel by pixel.
pub(super) fn to_pixels<T: Scalar>(planes: &[T], plane: usize) -> Scratch<T> {
    let mut to = Scratch::new(planes.len());
    turn(planes, plane, &mut to);
    to
}

/// [`to_pixels`], to this slice, which is as long.
pub(super) fn turn<T: Scalar>(planes: &[T], plane: usize, to: &mut [T]) {
    let c = planes.len() / plane;
    assert!(planes.len() == c * plane && to.len() == planes.len());
    // SAFETY: the target has as many pixels of as many channels.
    simd::dispatch(unsafe { Transpose::scatter((planes, plane), (to.as_mut_ptr(), c), plane, c) });
}

/// The other way.
pub(super) fn from_pixels<T: Scalar>(pixels: &[T], planes: &mut [T], plane: usize) {
    let c = planes.len() / plane;
    simd::dispatch(Transpose::gather((pixels, c), (planes, plane), plane, c));
}

/// Some channels of image n.
fn chunk_of<'a, T>(planes: &'a [T], batch: Batch, n: usize, channels: &Range<usize>) -> &'a [T] {
    &planes[(n * batch.c + channels.start) * batch.plane()..][..channels.len() * batch.plane()]
}

/// Where channels from `first` on of image n begin.
fn planes_from<T>(planes: &[T], batch: Batch, n: usize, first: usize) -> *const T {
    planes.as_ptr().wrapping_add((n * batch.c + first) * batch.plane())
}

/// Writes the pixels of some channels back to planes: turned in the cache, then in the order of memory.
///
/// # Safety
/// As [`Planes::target`], for these channels of image n.
unsafe fn to_planes<T: Scalar>(
    from: &[T],
    planes: &Planes<'_, T>,
    n: usize,
    channels: &Range<usize>,
) {
    let plane = planes.batch.plane();
    let mut turned = Scratch::new(channels.len() * plane);
    from_pixels(from, &mut turned, plane);
    // SAFETY: the caller's promise.
    let to = unsafe { Target::streamed(planes.planes(n, channels), planes.stream) };
    simd::dispatch(CopyOut { from: &turned, to });
}

/// Pixels of such a chunk; what is read after them begins at `next`.
pub(super) fn image<T>(pixels: &[T], batch: Batch, c: usize, next: *const T) -> Image<'_, T> {
    Image::new(pixels, (batch.h, batch.w), c, 0..c).before(next)
}

/// [`super::depthwise_forward`]: a task is a chunk of channels of some images.
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
    let chunks = chunks_of::<T>(geometry);
    let groups = chunks.groups(input.n);
    let planes = Planes::result(y, output);
    parallel::for_each(threads, groups * chunks.len(), |task| {
        let (group, chunk) = (task / chunks.len(), task % chunks.len());
        let channels = chunks.channels(chunk);
        let (c, bias) = (channels.len(), &bias[channels.clone()]);
        let weight = &weight[channels.start * kernel..channels.end * kernel];
        let taps = taps_of(weight, grid.kernel, &all(conv.kh), &all(conv.kw));
        let mut to = Scratch::<T>::new(output.plane() * c);
        for n in part(group, groups, input.n) {
            let next = planes_from(x, input, n + 1, channels.start);
            let x = to_pixels(chunk_of(x, input, n, &channels), input.plane());
            // SAFETY: all of it.
            let out = unsafe { places(&mut to, output, c) };
            let (image, taps) = (image(&x, input, c, next), &taps[..]);
            simd::dispatch(pixels::Forward { image, grid, taps, bias, rows: 0..output.h, out });
            // SAFETY: this task alone names these channels of image n.
            unsafe { to_planes(&to, &planes, n, &channels) };
        }
    });
}

/// The pixels of a chunk, all to be written.
///
/// # Safety
/// It must have as many; no other reference may live.
pub(super) unsafe fn places<T: Scalar>(to: &mut [T], batch: Batch, c: usize) -> Places<'_, T> {
    // SAFETY: the caller's promise.
    unsafe { Places::new(to.as_mut_ptr(), (batch.w * c, c), (batch.h, batch.w), c) }
}

/// [`super::depthwise_backward`]: a task is a chunk of channels of some images. Returns whether the gradients that were
/// asked for are all made: those to weight and bias not where others take less time, or where they are not finite, as
/// then they may be wrong.
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
    let chunks = chunks_of::<T>(geometry);
    let groups = chunks.groups(input.n);
    let wanted = gweight.is_some() || gbias.is_some();
    let sums = wanted && geometry.ow <= longest::<T>(geometry)[1];
    if !sums && gx.is_none() {
        return !wanted;
    }
    let phases = Phase::both(geometry);
    let mut tap_sums = TapSums::new::<T>(if sums { groups } else { 0 }, chunks, grid.kernel);
    let sum_planes = sums.then(|| tap_sums.planes());
    let gx = gx.map(|gx| Planes::result(gx, input));
    parallel::for_each(threads, groups * chunks.len(), |task| {
        let (group, chunk) = (task / chunks.len(), task % chunks.len());
        let channels = chunks.channels(chunk);
        let c = channels.len();
        let weight = &weight[channels.start * kernel..channels.end * kernel];
        let of_phases = gx.as_ref().map(|gx| (gx, Pixels::all(&phases, weight, grid.kernel)));
        let zeros = vec![T::ZERO; c];
        let len = pixels::sums(grid.kernel, c, simd::selected_lanes::<T>());
        // SAFETY: this task alone names them.
        let mut sums = sum_planes
            .as_ref()
            .map(|planes| unsafe { (&mut planes.plane(group, chunk)[..len], Scratch::new(len)) });
        for n in part(group, groups, input.n) {
            let next = planes_from(grad, output, n + 1, channels.start);
            let grad = to_pixels(chunk_of(grad, output, n, &channels), output.plane());
            let grad = image(&grad, output, c, next);
            if let Some((gx, of_phases)) = &of_phases {
                let mut to = Scratch::<T>::new(input.plane() * c);
                for of_phase in of_phases {
                    let Pixels { row, column, taps } = of_phase;
                    let first = (row.first * input.w + column.first) * c;
                    let steps = (conv.stride[0] * input.w * c, conv.stride[1] * c);
                    // SAFETY: pixels of the image, of which nobody else knows.
                    let out = unsafe {
                        let count = (row.count, column.count);
                        Places::new(to.as_mut_ptr().add(first), steps, count, c)
                    };
                    let (image, grid, rows) = (grad, of_phase.grid(), 0..row.count);
                    simd::dispatch(pixels::Forward { image, grid, taps, bias: &zeros, rows, out });
                }
                // SAFETY: this task alone names these channels of image n.
                unsafe { to_planes(&to, gx, n, &channels) };
            }
            if let Some((sums, scratch)) = &mut sums {
                let next = planes_from(x, input, n + 1, channels.start);
                let x = to_pixels(chunk_of(x, input, n, &channels), input.plane());
                simd::dispatch(pixels::WeightGradient {
                    image: image(&x, input, c, next),
                    grid,
                    grad,
                    rows: 0..output.h,
                    taps: gweight.is_some(),
                    bias: gbias.is_some(),
                    sums,
                    scratch,
                });
            }
        }
    });
    if sums { tap_sums.write(gweight, gbias) } else { !wanted }
}
