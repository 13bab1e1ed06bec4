//! Depthwise convolution of tensors in channels_last (N, H, W, C) as they are in memory: few taps, strides of 1
//! and 2. See [`crate::kernels::pixels`].

use std::ops::Range;

use super::Planes;
use super::scratch::Scratch;
use crate::kernels::general::Places;
use crate::kernels::pixels::{self, Grid, Image};
use crate::parallel::{self, Threads};
use crate::shape::{Batch, Conv, Geometry};
use crate::simd::{self, Scalar};

/// Whether kernels take the geometry, forward and backward, and are the fastest.
pub(super) fn is_direct<T: Scalar>(geometry: &Geometry, weight: &[T]) -> bool {
    let Geometry { conv, input, .. } = *geometry;
    let Conv { kh, kw, stride, padding: [top, bottom, left, right], dilation } = conv;
    size_of::<T>() == size_of::<f32>()
        && matches!(kw, 3 | 5 | 7 | 9)
        && (2..=9).contains(&kh)
        && matches!(stride, [1, 1] | [2, 2])
        && dilation == [1, 1]
        && top.max(bottom) < kh
        && left.max(right) < kw
        && input.c >= simd::selected_lanes::<T>()
        // Times a zero of the padding they would be NaN.
        && weight.iter().all(|tap| tap.to_f64().is_finite())
}

/// Whether the weight's gradient, too, is the fastest so; with K = 9 and a stride of 1 it takes 1.1 to 1.2 times as
/// long as that of blocks (Xeon).
pub(super) fn has_weight_gradient(geometry: &Geometry) -> bool {
    geometry.conv.kw < 9 || geometry.conv.stride == [2, 2]
}

/// The most channels of a task, but for the last, which takes what is left, where images are large: pieces of four
/// lines are read, and some rows of so many stay in the second-level cache.
const CHUNK: usize = 64;

/// Bytes of an image that the second-level cache holds, of which all channels are read together, in the order of
/// memory: 0.55 to 0.8 of the time at 32 × 768 × 7 × 7 (Zen 4, one thread).
const IMAGE_BYTES: usize = 512 << 10;

/// The most channels of a task that reads images of this shape row by row.
fn chunk_of<T>(image: Batch) -> usize {
    let whole = image.c * image.plane() * size_of::<T>() <= IMAGE_BYTES;
    if whole { image.c.max(CHUNK) } else { CHUNK }
}

/// Rows of a task, at least: its neighbours read those again that both need.
const ROWS: usize = 8;

/// Tasks that are wanted: not to depend on how many threads there are.
const TASKS: usize = 16;

/// The split into tasks: rows of an image, a chunk of channels.
#[derive(Clone, Copy)]
struct Tasks {
    images: usize,
    rows: usize,
    strips: usize,
    channels: usize,
    chunk: usize,
    chunks: usize,
}

impl Tasks {
    /// Of chunks of so many channels, or less, if there are not enough tasks.
    fn new<T: Scalar>(images: usize, rows: usize, channels: usize, mut chunk: usize) -> Self {
        let strips = |chunks: usize| TASKS.div_ceil(images * chunks).min(rows / ROWS).max(1);
        let mut chunks = (channels / chunk).max(1);
        while images * strips(chunks) * chunks < TASKS && chunk > simd::selected_lanes::<T>() {
            chunk = (chunk / 2).next_multiple_of(simd::selected_lanes::<T>());
            chunks = (channels / chunk).max(1);
        }
        Self { images, rows, strips: strips(chunks), channels, chunk, chunks }
    }

    fn count(&self) -> usize {
        self.images * self.strips * self.chunks
    }

    /// Image, rows and channels.
    fn task(&self, task: usize) -> (usize, Range<usize>, Range<usize>) {
        let (strip, chunk) = (task / self.chunks, task % self.chunks);
        let (rows, channels) = (self.strip(strip % self.strips), self.chunk(chunk));
        (strip / self.strips, rows, channels)
    }

    fn strip(&self, strip: usize) -> Range<usize> {
        strip * self.rows / self.strips..(strip + 1) * self.rows / self.strips
    }

    fn chunk(&self, chunk: usize) -> Range<usize> {
        let end = if chunk + 1 < self.chunks { (chunk + 1) * self.chunk } else { self.channels };
        chunk * self.chunk..end
    }
}

/// Some channels of image n of a tensor.
fn image<T>(tensor: &[T], shape: Batch, n: usize, channels: Range<usize>) -> Image<'_, T> {
    let Batch { c, h, w, .. } = shape;
    Image::new(&tensor[n * h * w * c..][..h * w * c], (h, w), c, channels)
}

/// Where the taps of a convolution meet its input.
pub(super) fn grid_of(conv: &Conv) -> Grid {
    let Conv { kh, kw, stride, padding: [top, _, left, _], .. } = *conv;
    Grid { kernel: (kh, kw), stride: stride.into(), origin: (-(top as isize), -(left as isize)) }
}

/// All rows or columns of a kernel.
pub(super) fn all(k: usize) -> Vec<usize> {
    (0..k).collect()
}

/// The taps of these rows and columns of the kernel, in this order: (rows, columns, channels).
pub(super) fn taps_of<T: Scalar>(
    weight: &[T],
    (kh, kw): (usize, usize),
    rows: &[usize],
    columns: &[usize],
) -> Vec<T> {
    let channels = weight.len() / (kh * kw);
    let taps = rows.iter().flat_map(|i| columns.iter().map(move |j| i * kw + j));
    taps.flat_map(|tap| (0..channels).map(move |c| weight[c * kh * kw + tap])).collect()
}

/// [`super::depthwise_forward_channels_last`].
pub(super) fn forward<T: Scalar>(
    geometry: &Geometry,
    x: &[T],
    weight: &[T],
    bias: Option<&[T]>,
    y: &mut [T],
    threads: Threads,
) {
    let Geometry { conv, input, oh, ow, .. } = *geometry;
    let Conv { kh, kw, .. } = conv;
    let grid = grid_of(&conv);
    let taps = taps_of(weight, grid.kernel, &all(kh), &all(kw));
    let zeros = vec![T::ZERO; input.c];
    let bias = bias.unwrap_or(&zeros);
    let tasks = Tasks::new::<T>(input.n, oh, input.c, chunk_of::<T>(input));
    let planes = Planes::result(y, geometry.output());
    parallel::for_each(threads, tasks.count(), |task| {
        let (n, rows, channels) = tasks.task(task);
        // SAFETY: these channels of these rows of image n are inside the tensor, and this task alone writes them.
        let out = unsafe {
            let first = planes.image(n).add(rows.start * ow * input.c + channels.start);
            Places::new(first, (ow * input.c, input.c), (rows.len(), ow), channels.len())
                .streamed(planes.stream)
        };
        let image = image(x, input, n, channels.clone());
        let (taps, bias) = (&taps[channels.start..], &bias[channels]);
        simd::dispatch(pixels::Forward { image, grid, taps, bias, rows, out });
    });
}

/// The rows or columns of the input of one phase of a stride.
pub(super) struct Phase {
    /// The first of them, and how many.
    pub(super) first: usize,
    pub(super) count: usize,
    /// The taps that reach them, turned, and where the first of these meets the gradient.
    pub(super) taps: Vec<usize>,
    pub(super) origin: isize,
}

impl Phase {
    /// Those of `len`, with so much padding before them, that have any.
    pub(super) fn all(len: usize, k: usize, stride: usize, padding: usize) -> Vec<Self> {
        let phase = |phase: usize| {
            let first = (phase + stride - padding % stride) % stride;
            let taps: Vec<_> = (phase..k).step_by(stride).rev().collect();
            let origin = ((first + padding) / stride) as isize + 1 - taps.len() as isize;
            Self { first, count: len.saturating_sub(first).div_ceil(stride), taps, origin }
        };
        (0..stride).map(phase).filter(|phase| phase.count > 0).collect()
    }
}

/// Bytes of a gradient's rows that all phases read before the next ones are.
const PHASE_BYTES: usize = 256 << 10;

/// The gradient of x: the rows and columns of one phase of the stride are a convolution of the gradient with the
/// taps that reach them.
pub(super) fn input_gradient<T: Scalar>(
    geometry: &Geometry,
    grad: &[T],
    weight: &[T],
    gx: &mut [T],
    threads: Threads,
) {
    let Geometry { conv, input, ow, .. } = *geometry;
    let Conv { kh, kw, stride: [sh, sw], padding: [top, _, left, _], .. } = conv;
    let (c, output) = (input.c, geometry.output());
    let rows = Phase::all(input.h, kh, sh, top);
    let phases: Vec<_> = rows
        .iter()
        .flat_map(|row| {
            Phase::all(input.w, kw, sw, left).into_iter().map(move |column| (row, column))
        })
        .map(|(row, column)| {
            let taps = taps_of(weight, (kh, kw), &row.taps, &column.taps);
            (row, column, taps)
        })
        .collect();
    let zeros = vec![T::ZERO; c];
    let tasks = Tasks::new::<T>(input.n, input.h.div_ceil(sh), c, chunk_of::<T>(output));
    let step = (PHASE_BYTES / (ow * c.min(2 * CHUNK) * size_of::<T>())).max(2);
    let planes = Planes::result(gx, input);
    parallel::for_each(threads, tasks.count(), |task| {
        let (n, all, channels) = tasks.task(task);
        let image = image(grad, output, n, channels.clone());
        for start in all.clone().step_by(step) {
            let end = (start + step).min(all.end);
            for (row, column, taps) in &phases {
                let rows = start..end.min(row.count);
                if rows.is_empty() {
                    continue;
                }
                let grid = Grid {
                    kernel: (row.taps.len(), column.taps.len()),
                    stride: (1, 1),
                    origin: (row.origin, column.origin),
                };
                // SAFETY: these channels of these pixels of image n are inside the tensor, and this task alone
                // writes them.
                let out = unsafe {
                    let pixel = (row.first + start * sh) * input.w + column.first;
                    let first = planes.image(n).add(pixel * c + channels.start);
                    let count = (rows.len(), column.count);
                    Places::new(first, (sh * input.w * c, sw * c), count, channels.len())
                        .streamed(planes.stream)
                };
                let (taps, bias) = (&taps[channels.start..], &zeros[channels.clone()]);
                simd::dispatch(pixels::Forward { image, grid, taps, bias, rows, out });
            }
        }
    });
}

/// Sums that are added up at the end, of as many channels as there are chunks.
pub(super) const SUMS: usize = 64;

/// The gradients of weight and bias: each task some rows of some images, of a chunk of channels; their sums are
/// added in order. Returns whether all of `grad` is finite: else, in the padding, weights' gradients would be NaN.
pub(super) fn parameters<T: Scalar>(
    geometry: &Geometry,
    grad: &[T],
    x: &[T],
    gweight: Option<&mut [T]>,
    gbias: Option<&mut [T]>,
    threads: Threads,
) -> bool {
    let Geometry { conv, input, oh, .. } = *geometry;
    let Conv { kh, kw, .. } = conv;
    let (output, taps, lanes) = (geometry.output(), kh * kw, simd::selected_lanes::<T>());
    let grid = grid_of(&conv);
    let tasks = Tasks::new::<T>(input.n, oh, input.c, CHUNK);
    let strips = tasks.images * tasks.strips;
    let groups = strips.min(SUMS.div_ceil(tasks.chunks));
    // Of the last chunk, which is the largest.
    let len = pixels::sums(grid.kernel, tasks.chunk(tasks.chunks - 1).len(), lanes);
    let mut sums = vec![0.0; groups * tasks.chunks * len];
    let planes = Planes::new(&mut sums, Batch { n: groups, c: tasks.chunks, h: 1, w: len });
    parallel::for_each(threads, groups * tasks.chunks, |task| {
        let (group, chunk) = (task / tasks.chunks, task % tasks.chunks);
        let channels = tasks.chunk(chunk);
        let len = pixels::sums(grid.kernel, channels.len(), lanes);
        // SAFETY: this task alone names them.
        let sums = unsafe { &mut planes.plane(group, chunk)[..len] };
        let mut scratch = Scratch::new(len);
        for strip in group * strips / groups..(group + 1) * strips / groups {
            let n = strip / tasks.strips;
            simd::dispatch(pixels::WeightGradient {
                image: image(x, input, n, channels.clone()),
                grid,
                grad: image(grad, output, n, channels.clone()),
                rows: tasks.strip(strip % tasks.strips),
                taps: gweight.is_some(),
                sums: &mut *sums,
                scratch: &mut scratch,
            });
        }
    });
    let sum = |c: usize, tap: usize| {
        let chunk = (c / tasks.chunk).min(tasks.chunks - 1);
        let channels = tasks.chunk(chunk);
        let at = pixels::place(c - channels.start, channels.len(), lanes, taps, tap);
        let of_group = |group: usize| sums[(group * tasks.chunks + chunk) * len + at];
        T::from_f64((0..groups).map(of_group).sum())
    };
    write_sums(input.c, taps, sum, gweight, gbias)
}

/// Writes the sums of each channel and tap, where the tap after the last stands for the bias: unless these are not all
/// finite, as gradients are not then, and what they add in the padding has been left out. Returns whether they are.
pub(super) fn write_sums<T: Scalar>(
    channels: usize,
    taps: usize,
    sum: impl Fn(usize, usize) -> T,
    gweight: Option<&mut [T]>,
    gbias: Option<&mut [T]>,
) -> bool {
    if (0..channels).any(|c| !sum(c, taps).to_f64().is_finite()) {
        return false;
    }
    for (i, g) in gweight.into_iter().flatten().enumerate() {
        *g = sum(i / taps, i % taps);
    }
    for (c, g) in gbias.into_iter().flatten().enumerate() {
        *g = sum(c, taps);
    }
    true
}
