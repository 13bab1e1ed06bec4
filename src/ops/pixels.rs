//! Depthwise convolution of tensors in channels_last (N, H, W, C) as they are in memory: few taps, strides of 1
//! and 2. See [`crate::kernels::pixels`].

use std::ops::Range;

use super::scratch::Scratch;
use super::{Planes, part};
use crate::kernels::general::Places;
use crate::kernels::pixels::{self, Grid, Image};
use crate::kernels::transpose::Transpose;
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
        && all_finite(weight)
}

/// Whether all are: of many, as vectors.
pub(super) fn all_finite<T: Scalar>(values: &[T]) -> bool {
    values.iter().fold(true, |all, x| all & x.to_f64().is_finite())
}

/// The most channels of a task, but for the last, which takes what is left, where images are large: pieces of four
/// lines are read, and some rows of so many stay in the second-level cache.
const CHUNK: usize = 64;

/// Bytes of an image that the second-level cache holds, of which all channels are read together, in the order of
/// memory: 0.55 to 0.8 of the time at 32 × 768 × 7 × 7 (Zen 4, one thread).
const IMAGE_BYTES: usize = 512 << 10;

/// The most channels of a task that reads images of this shape row by row.
pub(super) fn chunk_of<T>(image: Batch) -> usize {
    let whole = image.c * image.plane() * size_of::<T>() <= IMAGE_BYTES;
    if whole { image.c.max(CHUNK) } else { CHUNK }
}

/// Rows of a task, at least: its neighbours read those again that both need.
const ROWS: usize = 8;

/// Tasks that are wanted: not to depend on how many threads there are.
const TASKS: usize = 16;

/// The channels of a tensor, chunk by chunk: the last one takes what is left, too.
#[derive(Clone, Copy)]
pub(super) struct Chunks {
    channels: usize,
    chunk: usize,
}

impl Chunks {
    pub(super) fn new(channels: usize, chunk: usize) -> Self {
        Self { channels, chunk }
    }

    pub(super) fn len(&self) -> usize {
        (self.channels / self.chunk).max(1)
    }

    pub(super) fn channels(&self, i: usize) -> Range<usize> {
        let end = if i + 1 < self.len() { (i + 1) * self.chunk } else { self.channels };
        i * self.chunk..end
    }

    /// Groups of so many parts of the work that are added up one by one, whatever the threads.
    pub(super) fn groups(&self, parts: usize) -> usize {
        // Chunks of many channels have many sums.
        let most = (SUMS * CHUNK / self.channels).max(TASKS.div_ceil(self.len()));
        parts.min(SUMS.div_ceil(self.len())).min(most)
    }

    /// The chunk that has a channel.
    pub(super) fn of(&self, c: usize) -> usize {
        (c / self.chunk).min(self.len() - 1)
    }
}

/// The split into tasks: rows of an image, a chunk of channels.
#[derive(Clone, Copy)]
pub(super) struct Tasks {
    images: usize,
    rows: usize,
    strips: usize,
    pub(super) chunks: Chunks,
}

impl Tasks {
    /// Of chunks of so many channels, or less, if there are not enough tasks.
    pub(super) fn new<T: Scalar>(
        images: usize,
        rows: usize,
        channels: usize,
        chunk: usize,
    ) -> Self {
        let lanes = simd::selected_lanes::<T>();
        let mut chunks = Chunks::new(channels, chunk);
        let strips = |chunks: Chunks| TASKS.div_ceil(images * chunks.len()).min(rows / ROWS).max(1);
        while images * strips(chunks) * chunks.len() < TASKS && chunks.chunk > lanes {
            chunks.chunk = (chunks.chunk / 2).next_multiple_of(lanes);
        }
        Self { images, rows, strips: strips(chunks), chunks }
    }

    pub(super) fn count(&self) -> usize {
        self.images * self.strips * self.chunks.len()
    }

    /// Image, rows and channels.
    pub(super) fn task(&self, task: usize) -> (usize, Range<usize>, Range<usize>) {
        let (strip, chunk) = (task / self.chunks.len(), task % self.chunks.len());
        let (rows, channels) = (self.strip(strip % self.strips), self.chunks.channels(chunk));
        (strip / self.strips, rows, channels)
    }

    fn strip(&self, strip: usize) -> Range<usize> {
        part(strip, self.strips, self.rows)
    }

    /// Tasks of a chunk.
    pub(super) fn parts(&self) -> usize {
        self.images * self.strips
    }

    /// Image and rows of one of them.
    pub(super) fn part(&self, part: usize) -> (usize, Range<usize>) {
        (part / self.strips, self.strip(part % self.strips))
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
) -> Scratch<T> {
    let (taps, channels) = (kh * kw, weight.len() / (kh * kw));
    let mut of_these = Scratch::new(rows.len() * columns.len() * channels);
    let mut turned = Scratch::new(weight.len());
    // SAFETY: the target has as many taps of as many channels.
    simd::dispatch(unsafe {
        Transpose::scatter((weight, taps), (turned.as_mut_ptr(), channels), taps, channels)
    });
    let names = rows.iter().flat_map(|i| columns.iter().map(move |j| i * kw + j));
    for (to, tap) in of_these.chunks_exact_mut(channels).zip(names) {
        to.copy_from_slice(&turned[tap * channels..][..channels]);
    }
    of_these
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
    /// Those of the rows, and of the columns, of a convolution's input.
    pub(super) fn both(geometry: &Geometry) -> [Vec<Self>; 2] {
        let Geometry { conv, input, .. } = geometry;
        let Conv { kh, kw, stride: [sh, sw], padding: [top, _, left, _], .. } = *conv;
        [Self::all(input.h, kh, sh, top), Self::all(input.w, kw, sw, left)]
    }

    /// Those of `len`, with so much padding before them, that have any.
    fn all(len: usize, k: usize, stride: usize, padding: usize) -> Vec<Self> {
        let phase = |phase: usize| {
            let first = (phase + stride - padding % stride) % stride;
            let taps: Vec<_> = (phase..k).step_by(stride).rev().collect();
            let origin = ((first + padding) / stride) as isize + 1 - taps.len() as isize;
            Self { first, count: len.saturating_sub(first).div_ceil(stride), taps, origin }
        };
        (0..stride).map(phase).filter(|phase| phase.count > 0).collect()
    }
}

/// The rows of one phase and the columns of one, with the taps that reach them.
pub(super) struct Pixels<'a, T> {
    pub(super) row: &'a Phase,
    pub(super) column: &'a Phase,
    pub(super) taps: Scratch<T>,
}

impl<'a, T: Scalar> Pixels<'a, T> {
    pub(super) fn all(
        [rows, columns]: &'a [Vec<Phase>; 2],
        weight: &[T],
        kernel: (usize, usize),
    ) -> Vec<Self> {
        let pairs = rows.iter().flat_map(|row| columns.iter().map(move |column| (row, column)));
        let of = |(row, column): (&'a Phase, &'a Phase)| Self {
            row,
            column,
            taps: taps_of(weight, kernel, &row.taps, &column.taps),
        };
        pairs.map(of).collect()
    }

    /// Where they meet the gradient.
    pub(super) fn grid(&self) -> Grid {
        Grid {
            kernel: (self.row.taps.len(), self.column.taps.len()),
            stride: (1, 1),
            origin: (self.row.origin, self.column.origin),
        }
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
    let Conv { kh, kw, stride: [sh, sw], .. } = conv;
    let (c, output) = (input.c, geometry.output());
    let phases = Phase::both(geometry);
    let pixels = Pixels::all(&phases, weight, (kh, kw));
    let zeros = vec![T::ZERO; c];
    let tasks = Tasks::new::<T>(input.n, input.h.div_ceil(sh), c, chunk_of::<T>(output));
    let step = (PHASE_BYTES / (ow * c.min(2 * CHUNK) * size_of::<T>())).max(2);
    let planes = Planes::result(gx, input);
    parallel::for_each(threads, tasks.count(), |task| {
        let (n, all, channels) = tasks.task(task);
        let image = image(grad, output, n, channels.clone());
        for start in all.clone().step_by(step) {
            let end = (start + step).min(all.end);
            for of_phase in &pixels {
                let Pixels { row, column, ref taps } = *of_phase;
                let rows = start..end.min(row.count);
                if rows.is_empty() {
                    continue;
                }
                // SAFETY: these channels of these pixels of image n are inside the tensor, and this task alone
                // writes them.
                let out = unsafe {
                    let pixel = (row.first + start * sh) * input.w + column.first;
                    let first = planes.image(n).add(pixel * c + channels.start);
                    let count = (rows.len(), column.count);
                    Places::new(first, (sh * input.w * c, sw * c), count, channels.len())
                        .streamed(planes.stream)
                };
                let (grid, taps) = (of_phase.grid(), &taps[channels.start..]);
                let bias = &zeros[channels.clone()];
                simd::dispatch(pixels::Forward { image, grid, taps, bias, rows, out });
            }
        }
    });
}

/// Sums that are added up at the end, of as many channels as there are chunks.
const SUMS: usize = 64;

/// Sums for the gradients of weight and bias: of each group of the work, chunk by chunk, as
/// [`pixels::WeightGradient`] has them.
pub(super) struct TapSums {
    sums: Vec<f64>,
    chunks: Chunks,
    /// Elements of a chunk: as many as of the last one, which is the largest.
    len: usize,
    kernel: (usize, usize),
    lanes: usize,
}

impl TapSums {
    /// Zeros.
    pub(super) fn new<T: Scalar>(groups: usize, chunks: Chunks, kernel: (usize, usize)) -> Self {
        let lanes = simd::selected_lanes::<T>();
        let len = pixels::sums(kernel, chunks.channels(chunks.len() - 1).len(), lanes);
        Self { sums: vec![0.0; groups * chunks.len() * len], chunks, len, kernel, lanes }
    }

    /// A channel for each chunk, of an image for each group.
    pub(super) fn planes(&mut self) -> Planes<'_, f64> {
        let (c, w) = (self.chunks.len(), self.len);
        let batch = Batch { n: self.sums.len() / (c * w), c, h: 1, w };
        Planes::new(&mut self.sums, batch)
    }

    /// Writes the gradients, the groups' sums added in order: unless not all are finite, as then they may be wrong.
    /// Returns whether they are. A gradient that is not finite shows without the sums for the bias, too: each output
    /// has a tap that meets a pixel.
    pub(super) fn write<T: Scalar>(
        mut self,
        mut gweight: Option<&mut [T]>,
        mut gbias: Option<&mut [T]>,
    ) -> bool {
        let (sums, groups) = self.sums.split_at_mut(self.chunks.len() * self.len);
        for group in groups.chunks_exact(sums.len()) {
            sums.iter_mut().zip(group).for_each(|(sum, part)| *sum += part);
        }
        let (taps, lanes) = (self.kernel.0 * self.kernel.1, self.lanes);
        // Where the taps of a channel are, `lanes` apart, and after them the bias.
        let at = |c: usize| {
            let chunk = self.chunks.of(c);
            let channels = self.chunks.channels(chunk);
            chunk * self.len + pixels::place(c - channels.start, channels.len(), lanes, taps, 0)
        };
        let channels = 0..self.chunks.channels;
        let first = if gweight.is_some() { 0 } else { taps };
        let is_finite = |&sum: &f64| T::from_f64(sum).to_f64().is_finite();
        let of_channel = |c: usize| sums[at(c)..].iter().step_by(lanes).take(taps + 1).skip(first);
        if !channels.clone().all(|c| of_channel(c).all(is_finite)) {
            return false;
        }
        for c in channels {
            let of_channel = sums[at(c)..].iter().step_by(lanes);
            if let Some(gweight) = &mut gweight {
                let to = &mut gweight[c * taps..(c + 1) * taps];
                to.iter_mut().zip(of_channel).for_each(|(to, &sum)| *to = T::from_f64(sum));
            }
            if let Some(gbias) = &mut gbias {
                gbias[c] = T::from_f64(sums[at(c) + taps * lanes]);
            }
        }
        true
    }
}

/// The gradients of weight and bias: each task some rows of some images, of a chunk of channels; their sums are
/// added in order. Returns whether they are finite, as [`TapSums::write`].
pub(super) fn parameters<T: Scalar>(
    geometry: &Geometry,
    grad: &[T],
    x: &[T],
    gweight: Option<&mut [T]>,
    gbias: Option<&mut [T]>,
    threads: Threads,
) -> bool {
    let Geometry { conv, input, oh, .. } = *geometry;
    let (output, grid) = (geometry.output(), grid_of(&conv));
    let tasks = Tasks::new::<T>(input.n, oh, input.c, CHUNK);
    let (chunks, parts) = (tasks.chunks, tasks.parts());
    let groups = chunks.groups(parts);
    let mut sums = TapSums::new::<T>(groups, chunks, grid.kernel);
    let planes = sums.planes();
    parallel::for_each(threads, groups * chunks.len(), |task| {
        let (group, chunk) = (task / chunks.len(), task % chunks.len());
        let channels = chunks.channels(chunk);
        let len = pixels::sums(grid.kernel, channels.len(), simd::selected_lanes::<T>());
        // SAFETY: this task alone names them.
        let sums = unsafe { &mut planes.plane(group, chunk)[..len] };
        let mut scratch = Scratch::new(len);
        for i in part(group, groups, parts) {
            let (n, rows) = tasks.part(i);
            simd::dispatch(pixels::WeightGradient {
                image: image(x, input, n, channels.clone()),
                grid,
                grad: image(grad, output, n, channels.clone()),
                rows,
                taps: gweight.is_some(),
                bias: gbias.is_some(),
                sums: &mut *sums,
                scratch: &mut scratch,
            });
        }
    });
    sums.write(gweight, gbias)
}
