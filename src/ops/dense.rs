//! Forward of the dense unit where no statistics are awaited, nothing is kept for backward and planes are not small:
//! tile by tile, so that its pointwise output stays in a cache.

use std::ops::Range;

use super::pointwise::Pointwise;
use super::scratch::Scratch;
use super::strips::{Strips, Weights};
use super::xunit::{Channel, XUnit};
use super::{Planes, Source};
use crate::kernels::MAX_LANES;
use crate::kernels::activation::{Affine, Apply, CopyOut, Gate, Target};
use crate::kernels::conv::Next;
use crate::kernels::minimal::Filter;
use crate::kernels::product::{Columns, Packed, Rows, RowsMut, Start};
use crate::parallel::{self, Threads};
use crate::shape::{Batch, Conv, Geometry};
use crate::simd::{self, Scalar};

/// Bytes of x, of all channels, that a band asks for, and as many of its products: as much as one core's part of the
/// last cache may hold, as the fewer bands there are, the less is moved, and the longer their rows are, the better the
/// hardware foresees what is read. With 1 MiB, 4 × 64 × 128 × 128 takes 1.04 times as long, 1 × 64 × 256 × 256 1.07 and
/// 1 × 64 × 512 × 512 1.01 (k = 7, Zen 4), with 640 KiB, which cut the planes of 16 × 64 × 64 × 64, these 1.1.
/// 1 × 64 × 512 × 512 by 128 columns took 1.1 times as long as by 512 (Xeon).
const BAND: usize = 5 << 19;
/// The least columns of a tile, and the most.
const COLUMNS: [usize; 2] = [64, 512];
/// The least rows of a band, whole tiles of minimal filtering with any kernel: what two bands share is kept.
const LEAST_BAND: usize = 12;
/// The least rows of a tile, about: what two tiles share is made twice.
const LEAST_TILE: usize = 24;
/// Rows of a strip, about, and the most strips of a batch that are worth it for threads to share.
/// 8 × 96 × 56 × 56 takes 0.88 times as long by strips of 28 rows, all of a plane in one tile, as by tiles of 36 and 20
/// rows, 1 × 64 × 256 × 256 0.92 times in one tile as in such of 36 rows (k = 7, one thread, Zen 4).
const ROWS: usize = 32;
const STRIPS: usize = 16;
/// Tiles for each thread, where there are several.
const TILES: usize = 2;

/// How planes are cut into tiles, and these into bands and strips.
///
/// Strips do not depend on the number of threads, nor then does the result: minimal filtering is repeated by plain sums
/// where one has an infinity.
struct Tiles {
    batch: Batch,
    halo: usize,
    columns: usize,
    /// Rows of a strip; of bands and tiles whole strips, or all there are.
    strip: usize,
    band: usize,
    rows: usize,
}

impl Tiles {
    fn new<T>(batch: Batch, kernel: usize, threads: usize) -> Self {
        let Batch { n, c, h, w } = batch;
        let halo = kernel / 2;
        let column = (LEAST_BAND + 2 * halo) * c * size_of::<T>();
        let most = (BAND / column).clamp(COLUMNS[0], COLUMNS[1]);
        let columns = match w > most + most / 2 {
            true => w.div_ceil(w.div_ceil(most)).next_multiple_of(MAX_LANES),
            false => w,
        };
        let row = (columns + 2 * halo).min(w) * c * size_of::<T>();
        let most = (BAND / row).saturating_sub(2 * halo).max(LEAST_BAND);
        let across = w.div_ceil(columns);
        // Of about equal height.
        let strips = (h / ROWS).max((h / LEAST_TILE).clamp(1, 2)).min(STRIPS.div_ceil(n * across));
        let filtered = Filter::of(kernel).map_or(1, |filter| filter.tile);
        let of = |strips| h.div_ceil(strips).next_multiple_of(filtered);
        let strip = if most < of(strips) { of(h.div_ceil(most)) } else { of(strips) };
        // All, if they are not many more.
        let band = if h * row <= BAND + BAND / 4 { h } else { (most / strip).max(1) * strip };
        let tiles = if threads == 1 { 1 } else { TILES.saturating_mul(threads) };
        let down = tiles.div_ceil(n * across);
        let rows = h.div_ceil(down).max(LEAST_TILE).next_multiple_of(strip);
        Self { batch, halo, columns, strip, band: band.min(rows), rows }
    }

    fn across(&self) -> usize {
        self.batch.w.div_ceil(self.columns)
    }

    fn down(&self) -> usize {
        self.batch.h.div_ceil(self.rows)
    }

    fn len(&self) -> usize {
        self.batch.n * self.down() * self.across()
    }

    /// Image, rows and columns of tile i.
    fn tile(&self, i: usize) -> (usize, Range<usize>, Range<usize>) {
        let Self { batch, rows, columns, .. } = *self;
        let (y, x) = (i / self.across() % self.down() * rows, i % self.across() * columns);
        let n = i / self.across() / self.down();
        (n, y..batch.h.min(y + rows), x..batch.w.min(x + columns))
    }

    /// Rows of x that are read after a band of these rows of a tile, and their image: by the next band, or by the first
    /// one of tile `after`.
    fn reached_next(
        &self,
        (n, rows): (usize, &Range<usize>),
        band: &Range<usize>,
        after: usize,
    ) -> Option<(usize, Range<usize>)> {
        let of = |start: usize, rows: &Range<usize>| {
            self.around(&(start..rows.end.min(start + self.band)), self.batch.h)
        };
        if band.end < rows.end {
            let read = self.around(band, self.batch.h).end;
            return Some((n, read..of(band.end, rows).end));
        }
        (after < self.len()).then(|| {
            let (n, rows, _) = self.tile(after);
            (n, of(rows.start, &rows))
        })
    }

    /// The rows of each strip of a band, of no more than `most` rows.
    fn strips(&self, band: &Range<usize>, most: usize) -> impl Iterator<Item = Range<usize>> {
        let cut = |rows: Range<usize>, step: usize| {
            rows.clone().step_by(step).map(move |y| y..rows.end.min(y + step))
        };
        cut(band.clone(), self.strip).flat_map(move |rows| cut(rows, most))
    }

    /// What of `length` rows or columns the taps of these reach.
    fn around(&self, of: &Range<usize>, length: usize) -> Range<usize> {
        of.start.saturating_sub(self.halo)..length.min(of.end + self.halo)
    }
}

/// What all tiles ask of a channel.
struct Constants<T> {
    weights: Weights<T>,
    gated: Affine<T>,
}

/// out = x · g(\[BN\] DW(relu(\[BN\] PW x))), all batch norms with given statistics; x and out in planes.
pub(super) fn forward<T: Scalar>(
    unit: &XUnit<'_, T>,
    pointwise: &Pointwise<'_, T>,
    x: Source<'_, T>,
    out: &Planes<'_, T>,
    threads: Threads,
) {
    let (batch, k) = (x.batch, unit.kernel);
    let constants = |c: usize| Constants {
        // As where d is kept, to the same bits.
        weights: unit.weights(c, batch.h, Channel::given(unit.norm1.as_ref(), c).affine),
        gated: Channel::given(unit.norm2.as_ref(), c).affine,
    };
    let forward = Forward {
        gate: unit.gate,
        kernel: k,
        weight: Packed::new(pointwise.weight, batch.c, batch.c),
        start: pointwise.bias.map_or(Start::Zero, Start::Bias),
        channels: (0..batch.c).map(constants).collect(),
        x,
        out,
    };
    let tiles = Tiles::new::<T>(batch, k, threads.count());
    parallel::for_each(threads, tiles.len(), |i| {
        // SAFETY: no other task names these pixels.
        unsafe { forward.tile(&tiles, i, i.saturating_add(threads.count())) };
    });
}

struct Forward<'a, T> {
    gate: Gate,
    kernel: usize,
    weight: Packed<T>,
    start: Start<'a, T>,
    channels: Vec<Constants<T>>,
    x: Source<'a, T>,
    out: &'a Planes<'a, T>,
}

impl<T: Scalar> Forward<'_, T> {
    /// Tile i; `after` it, this thread is likely to come to that one.
    ///
    /// # Safety
    /// No other task may name the pixels of this tile meanwhile.
    unsafe fn tile(&self, tiles: &Tiles, i: usize, after: usize) {
        let (batch, k) = (self.x.batch, self.kernel);
        let (n, rows, columns) = tiles.tile(i);
        let around = tiles.around(&columns, batch.w);
        let (width, halo) = (around.len(), tiles.halo);
        // What is beside the tile is padding where it is beside the plane.
        let (left, right) = (columns.start - around.start, around.end - columns.end);
        let padding = [halo, halo, halo - left, halo - right];
        let conv = Conv { padding, ..Conv::same(k).expect("an odd kernel") };
        let input = Batch { n: 1, c: 1, h: batch.h, w: width };
        let geometry = Geometry::new(input, conv).expect("no larger than the plane's");
        let mut strips = Strips::new(&geometry, &self.channels[0].weights);
        let band = tiles.band.min(rows.len());
        let mut d = Scratch::new(strips.rows().min(tiles.strip) * columns.len());
        // x and its products, of the rows that a band needs. Channels lie an odd number of vectors apart, lest
        // they fall on the same lines of the cache.
        let ld = ((band + 2 * halo).min(batch.h) * width).next_multiple_of(MAX_LANES) | MAX_LANES;
        let (mut x, mut p) = (Scratch::new(batch.c * ld), Scratch::new(batch.c * ld));
        let mut made: Range<usize> = 0..0;
        for y in rows.clone().step_by(band) {
            let band = y..rows.end.min(y + band);
            let needed = tiles.around(&band, batch.h);
            let kept = made.end.saturating_sub(needed.start);
            let (at, new) = (kept * width, needed.start + kept..needed.end);
            let next = tiles.reached_next((n, &rows), &band, after);
            if kept > 0 {
                let from = (needed.start - made.start) * width;
                // Of x the gate alone reads rows again, and none above the band.
                let above = (band.start - needed.start) * width;
                for (x, p) in x.chunks_exact_mut(ld).zip(p.chunks_exact_mut(ld)) {
                    x.copy_within(from + above..from + at, above);
                    p.copy_within(from..from + at, 0);
                }
            }
            for (c, to) in x.chunks_exact_mut(ld).enumerate() {
                self.copy((n, c), (new.clone(), &around), &mut to[at..]);
            }
            // The last rows may all be known.
            if !new.is_empty() {
                simd::dispatch(Columns {
                    a: &self.weight,
                    b: Rows::new(&x[at..], batch.c, ld, new.len() * width),
                    start: self.start,
                    c: RowsMut::new(&mut p[at..], batch.c, ld, new.len() * width),
                });
            }
            made = needed;
            for (c, channel) in self.channels.iter().enumerate() {
                let at = c * ld..c * ld + made.len() * width;
                strips.restart(y);
                // Of columns that are no whole rows nothing is asked for.
                let next = match &next {
                    Some((n, rows)) if width == batch.w => {
                        &self.x.plane(*n, c)[rows.start * width..rows.end * width]
                    }
                    _ => &[],
                };
                for rows in tiles.strips(&band, strips.rows()) {
                    let y = rows.start;
                    let part = [y - band.start, rows.end - band.start]
                        .map(|row| row * next.len() / band.len());
                    let next = &next[part[0]..part[1]];
                    let d = &mut d[..rows.len() * columns.len()];
                    let (p, to) = ((&p[at.clone()], made.start), Target::new(&mut *d));
                    strips.run(
                        &channel.weights,
                        rows.clone(),
                        p,
                        Next::later(next),
                        to,
                        CopyOut::default(),
                    );
                    let x = &x[at.clone()][(y - made.start) * width + left..];
                    // SAFETY: the caller's promise.
                    unsafe { self.gate((n, c), (rows, &columns), (x, width), d) };
                }
            }
        }
    }

    /// Copies these rows and columns of plane (n, c) of x.
    fn copy(
        &self,
        (n, c): (usize, usize),
        (rows, columns): (Range<usize>, &Range<usize>),
        to: &mut [T],
    ) {
        let (x, w, len) = (self.x.plane(n, c), self.x.batch.w, columns.len());
        if len == w {
            return to[..rows.len() * w].copy_from_slice(&x[rows.start * w..rows.end * w]);
        }
        for (y, to) in rows.zip(to.chunks_exact_mut(len)) {
            to.copy_from_slice(&x[y * w + columns.start..][..len]);
        }
    }

    /// Gates these pixels of plane (n, c), of which the rows of x lie `ld` apart.
    ///
    /// # Safety
    /// No other task may name them meanwhile.
    unsafe fn gate(
        &self,
        (n, c): (usize, usize),
        (rows, columns): (Range<usize>, &Range<usize>),
        (x, ld): (&[T], usize),
        d: &[T],
    ) {
        let (gate, affine, w) = (self.gate, self.channels[c].gated, self.x.batch.w);
        // Rows of whole planes are one.
        let (rows, len) = match columns.len() == w {
            true => (rows.start..rows.start + 1, d.len()),
            false => (rows, columns.len()),
        };
        for ((y, d), x) in rows.zip(d.chunks_exact(len)).zip(x.chunks(ld.max(len))) {
            let pixels = y * w + columns.start..y * w + columns.start + len;
            // SAFETY: the caller's promise; d is a copy.
            let out = unsafe { self.out.target(n, c, pixels) };
            simd::dispatch(Apply { gate, x: &x[..len], d, affine, out });
        }
    }
}
