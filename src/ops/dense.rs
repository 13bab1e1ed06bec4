//! Forward of the dense unit where no statistics are awaited, nothing is kept for backward and planes are not small:
//! tile by tile, so that its pointwise output stays in a cache.

use std::ops::Range;

use super::pointwise::Pointwise;
use super::scratch::{Scratch, Window};
use super::xunit::{Channel, XUnit};
use super::{Planes, Source};
use crate::kernels::activation::{Affine, Apply, CopyOut, Gate, Target};
use crate::kernels::product::{Columns, Packed, Rows, RowsMut, Start};
use crate::kernels::{MAX_LANES, conv};
use crate::parallel::{self, Threads};
use crate::shape::{Batch, Conv, Geometry};
use crate::simd::{self, Scalar};

/// Bytes of x, of all channels, that a band of short rows asks for, and of its products, so that both stay in the
/// second-level cache. From 400 KiB to 1 MiB times at 64, 40 and 56 columns are the same within 5 % (Xeon).
const BAND: usize = 640 << 10;
/// The same of the lowest band of long rows: the longer they are, the better the hardware foresees what is read.
/// Evaluation of 1 × 64 × 512 × 512, k = 7, takes 59 ms by 128 columns, 58 by 256 and 53 by 512 (Xeon).
const LONG: usize = 5 << 19;
/// The least columns of a tile, and the most.
const COLUMNS: [usize; 2] = [64, 512];
/// Rows of whole tiles of minimal filtering, of any kernel.
const FILTERED: usize = 12;
/// The least rows of a tile, and the most, in bands: what two bands share is kept, what two tiles share is made
/// twice.
const ROWS: [usize; 2] = [3 * FILTERED, 11 * FILTERED];
/// Tiles that there should be, for threads to share. Their number does not depend on that of the threads, nor
/// then does the result: minimal filtering is repeated by plain sums where a strip of a tile has an infinity.
const TILES: usize = 16;

/// How planes are cut into tiles, and these into bands.
struct Tiles {
    batch: Batch,
    halo: usize,
    columns: usize,
    rows: usize,
    band: usize,
}

impl Tiles {
    fn new<T>(batch: Batch, kernel: usize) -> Self {
        let Batch { n, c, h, w } = batch;
        let halo = kernel / 2;
        let column = (FILTERED + 2 * halo) * c * size_of::<T>();
        let most = (LONG / column).clamp(COLUMNS[0], COLUMNS[1]);
        let columns = match w > most + most / 2 {
            true => w.div_ceil(w.div_ceil(most)).next_multiple_of(MAX_LANES),
            false => w,
        };
        let row = (columns + 2 * halo).min(w) * c * size_of::<T>();
        let most = (BAND / row).saturating_sub(2 * halo).max(FILTERED) / FILTERED * FILTERED;
        // All, if they are not many more.
        let band = if h * row <= BAND + BAND / 4 { h } else { most };
        let down = TILES.div_ceil(n * w.div_ceil(columns));
        let rows = h.div_ceil(down).next_multiple_of(FILTERED).clamp(ROWS[0], ROWS[1]);
        Self { batch, halo, columns, rows, band: band.min(rows) }
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

    /// What of `length` rows or columns the taps of these reach.
    fn around(&self, of: &Range<usize>, length: usize) -> Range<usize> {
        of.start.saturating_sub(self.halo)..length.min(of.end + self.halo)
    }
}

/// What all tiles ask of a channel.
struct Constants<T> {
    relu_of: Affine<T>,
    taps: conv::Taps<T>,
    bias: T,
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
        relu_of: Channel::given(unit.norm1.as_ref(), c).affine,
        // As where d is kept, to the same bits.
        taps: conv::Taps::new(unit.weight[c * k * k..][..k * k].to_vec(), (k, k), 1, batch.h),
        bias: unit.bias.map_or(T::ZERO, |bias| bias[c]),
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
    let tiles = Tiles::new::<T>(batch, k);
    parallel::for_each(threads, tiles.len(), |i| {
        // SAFETY: no other task names these pixels.
        unsafe { forward.tile(&tiles, i) };
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
    /// # Safety
    /// No other task may name the pixels of this tile meanwhile.
    unsafe fn tile(&self, tiles: &Tiles, i: usize) {
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
        let mut window = Window::new(&geometry);
        let band = tiles.band.min(rows.len());
        let strip = window.strip(&geometry).min(band);
        let mut d = Scratch::new(strip * columns.len());
        let mut scratch = Scratch::new(self.channels[0].taps.scratch(strip, columns.len()));
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
            if kept > 0 {
                let from = (needed.start - made.start) * width;
                let moved = |plane: &mut [T]| plane.copy_within(from..from + at, 0);
                x.chunks_exact_mut(ld).for_each(moved);
                p.chunks_exact_mut(ld).for_each(moved);
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
                window.restart(y);
                for y in band.clone().step_by(strip) {
                    let rows = y..band.end.min(y + strip);
                    let relu_of = Some(channel.relu_of);
                    window.slide_over(y..rows.end + k - 1, (&p[at.clone()], made.start), relu_of);
                    let d = &mut d[..rows.len() * columns.len()];
                    simd::dispatch(conv::Forward {
                        input: window.input(),
                        ld: window.ld,
                        taps: &channel.taps,
                        bias: &[channel.bias],
                        out: Target::new(&mut *d),
                        ow: columns.len(),
                        scratch: &mut scratch,
                        next: &[],
                        copy: CopyOut::default(),
                    });
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
