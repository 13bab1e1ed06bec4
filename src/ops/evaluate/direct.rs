//! Units of few taps: a band of rows of some channels is convolved pixel by pixel, as it lies, without what the padding
//! would add, by [`pixels::Forward`]; the rectifier before and the gate behind go over it in the cache.

use std::ops::Range;

use super::{LEAST_FILTERED, folded_bias, rectifier};
use crate::kernels::blocked::padding;
use crate::kernels::channelwise::{Apply, BlocksMut, Maps, Pixels, Rectify};
use crate::kernels::general::Places;
use crate::kernels::pixels::{self, Grid, Image};
use crate::ops::Planes;
use crate::ops::pixels::{Tasks, all, all_finite, chunk_of, grid_of, is_direct, taps_of};
use crate::ops::scratch::Scratch;
use crate::ops::xunit::{Channel, Variant, XUnit};
use crate::parallel::{self, Threads};
use crate::shape::{Batch, Geometry};
use crate::simd;

/// The widest images: bands are as wide. Those of 64 × 2048 take 0.9 to 1.5 of the time of blocks, of 128 × 1024 0.7 to
/// 1.1 (Zen 4).
const WIDEST: usize = 1024;
/// Bytes of the sums of a band, about.
const BYTES: usize = 256 << 10;
/// The least rows of a band: what is around it is rectified twice.
const LEAST_ROWS: usize = 8;

/// A unit with all constants folded: batch norm 2 into the taps and the bias.
pub(super) struct Direct<'a> {
    unit: &'a XUnit<'a, f32>,
    batch: Batch,
    grid: Grid,
    tasks: Tasks,
    /// (k, k, channels); with a rectifier (k, k, channels of the chunk) of each chunk.
    taps: Vec<f32>,
    bias: Vec<f32>,
    /// Of xUnit.
    rectifier: Option<Maps>,
}

impl<'a> Direct<'a> {
    /// None where blocks take less time, or taps are not finite, which would meet zeros of the padding.
    ///
    /// Time over that of blocks, one thread, at 7 × 7, 14 × 14, 28 × 28, 40 × 40, 64 × 64 and 256 × 256 (Zen 4; AVX2 is
    /// alike): xUnitS with k = 3 0.6 to 0.8, with 7 0.6 to 0.9, with 9 0.6 to 1.0; xUnit with 3 0.7 to 0.9, with 7 0.8 to
    /// 1.1, with 9 0.9 at 7 × 7 and 1.0 to 1.1 of the others, which are filtered. xUnitD 0.9 to 1.1.
    pub(super) fn new(unit: &'a XUnit<'a, f32>, geometry: &Geometry) -> Option<Self> {
        let (batch, k) = (geometry.input, unit.kernel);
        let Batch { n, c, h, w } = batch;
        let is_faster = match unit.variant {
            Variant::Full => k < 9 || h < LEAST_FILTERED,
            Variant::Slim => true,
            Variant::Dense => false,
        };
        if w > WIDEST || !is_faster || !is_direct(geometry, unit.weight) {
            return None;
        }
        let mut taps = taps_of(unit.weight, (k, k), &all(k), &all(k));
        let mut scales = Vec::with_capacity(c);
        let mut bias = Vec::with_capacity(c);
        for channel in 0..c {
            let norm = Channel::given(unit.norm2.as_ref(), channel).affine;
            scales.push(norm.scale);
            bias.push(folded_bias(unit.bias, channel, norm));
        }
        for of_tap in taps.chunks_exact_mut(c) {
            of_tap.iter_mut().zip(&scales).for_each(|(tap, scale)| *tap *= scale);
        }
        if !all_finite(&taps) {
            return None;
        }
        let tasks = Tasks::new::<f32>(n, h, c, chunk_of::<f32>(batch));
        let rectifier = (unit.variant == Variant::Full).then(|| rectifier(unit, 0..c));
        let mut of_tasks = Vec::with_capacity(taps.len());
        match rectifier {
            Some(_) => {
                for chunk in (0..tasks.chunks.len()).map(|i| tasks.chunks.channels(i)) {
                    for of_tap in taps.chunks_exact(c) {
                        of_tasks.extend_from_slice(&of_tap[chunk.clone()]);
                    }
                }
            }
            None => of_tasks.extend_from_slice(&taps),
        }
        let grid = grid_of(&geometry.conv);
        Some(Self { unit, batch, grid, tasks, taps: of_tasks, bias, rectifier })
    }

    pub(super) fn run(&self, x: &[f32], out: &mut [f32], threads: Threads) {
        let Batch { c, h, w, .. } = self.batch;
        let planes = Planes::result(out, self.batch);
        parallel::for_each(threads, self.tasks.count(), |task| {
            let (n, strip, channels) = self.tasks.task(task);
            let x = &x[n * h * w * c..][..h * w * c];
            let halo = self.unit.kernel / 2;
            let step = (BYTES / (w * channels.len() * size_of::<f32>())).max(LEAST_ROWS);
            for start in strip.clone().step_by(step) {
                let rows = start..strip.end.min(start + step);
                let (top, bottom) = padding(&rows, halo, h);
                let reached = rows.start + top - halo..rows.end + halo - bottom;
                let band = Band { of: self, x, rows, reached, channels: channels.clone() };
                // SAFETY: this task alone has these channels of these rows, which are read after all tasks.
                unsafe { band.run(planes.image(n), planes.stream) };
            }
        });
    }
}

/// Some rows of outputs of an image, of some channels.
struct Band<'a> {
    of: &'a Direct<'a>,
    /// The image.
    x: &'a [f32],
    rows: Range<usize>,
    /// Those of the image that the outputs depend on.
    reached: Range<usize>,
    /// A chunk.
    channels: Range<usize>,
}

impl Band<'_> {
    /// # Safety
    /// `out` must be an image of which nobody else uses these channels of these rows, and nobody may read them before
    /// this thread's fence if they are streamed.
    unsafe fn run(self, out: *mut f32, stream: bool) {
        let Self { of, x, rows, reached, channels } = self;
        let Batch { c, w, .. } = of.batch;
        let (count, first, kernel) = (channels.len(), channels.start, of.grid.kernel);
        let size = (reached.len(), w);
        let rows_of = |range: &Range<usize>| &x[range.start * w * c..range.end * w * c];
        let mut u;
        let (image, taps) = match &of.rectifier {
            None => (Image::new(rows_of(&reached), size, c, channels.clone()), &of.taps[first..]),
            Some(maps) => {
                u = Scratch::new(size.0 * size.1 * count);
                let v = Pixels::new(&rows_of(&reached)[first..], c);
                let maps = Some(maps.of(channels.clone()));
                let to = BlocksMut::new(&mut u, 0, count);
                let pixels = size.0 * size.1;
                simd::dispatch(Rectify { v, pixels, maps, channels: count, u: to });
                // Meanwhile the next band's pixels are asked for, if they lie alike, or those that are there already.
                let next = match count == c {
                    true => x.as_ptr().wrapping_add(reached.end * w * c),
                    false => u.as_ptr(),
                };
                let image = Image::new(&u, size, count, 0..count).before(next);
                (image, &of.taps[first * kernel.0 * kernel.1..])
            }
        };
        // The image begins with the first row that is reached.
        let (row, column) = of.grid.origin;
        let row = row + (rows.start - reached.start) as isize;
        let grid = Grid { origin: (row, column), ..of.grid };
        let bias = &of.bias[channels];
        let mut d = Scratch::new(rows.len() * w * count);
        // SAFETY: all of it.
        let to = unsafe { Places::new(d.as_mut_ptr(), (w * count, count), (rows.len(), w), count) };
        simd::dispatch(pixels::Forward { image, grid, taps, bias, rows: 0..rows.len(), out: to });
        // SAFETY: the caller's promise; they are inside.
        let out = unsafe {
            let first = out.add(rows.start * w * c + first);
            Places::new(first, (w * c, c), (rows.len(), w), count).streamed(stream)
        };
        let x = Pixels::new(&rows_of(&rows)[first..], c);
        let d = Pixels::new(&d, count);
        simd::dispatch(Apply { gate: of.unit.gate, x, d, maps: None, out });
    }
}
