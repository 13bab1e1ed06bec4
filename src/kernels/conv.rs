//! Register-tiled depthwise convolution with stride and dilation 1, and its weight gradient.
//!
//! Both read a zero-padded plane of rows `ld` apart, so that no tap needs a border check. Where there
//! are 32 registers, a strip of vectors runs down all rows of outputs with an accumulator for each row
//! of taps ([`Strip`]); else, and for other kernels than the usual ones, a tile of 6 rows ×
//! TILE_VECTORS vectors ([`Tile`]). A loaded vector feeds all output rows that it reaches, a broadcast
//! tap all vectors of a row. The input gradient is the same convolution with the taps turned by 180°.
//! Kernels of 11, 9 and 7 rows go by [`minimal`] filtering down the columns, in `f32` and where that is
//! faster. The weight gradient keeps a tile of taps in registers: a loaded vector of input meets the
//! gradients of all rows that it reaches.
//!
//! Both take planes, or blocks of as many channels as a vector has lanes, pixel by pixel: a block is
//! a plane `block` times as wide whose taps lie `block` elements apart and are vectors themselves.
//! All loads of a block are aligned.

use std::hint::black_box;
use std::marker::PhantomData;
use std::mem::{MaybeUninit, replace, take};

use super::MAX_LANES;
use super::activation::{CopyOut, Copying, Target};
use super::filtered;
use super::minimal::{self, Filter};
use crate::memory::Line;
use crate::simd::{self, Kernel, Scalar, Simd};

/// Elements of a row of the padded plane that the kernels may read: `ow` outputs rounded up to
/// whole vectors, and the taps beyond the last one. Of a block, ow and kw − 1 are `block` times the
/// pixels.
pub fn row_length(ow: usize, kw: usize) -> usize {
    ow.next_multiple_of(MAX_LANES) + kw - 1
}

/// Rows of taps that have strips.
const STRIPS: [usize; 5] = [3, 5, 7, 9, 11];

/// What the caller reads after this: asked for meanwhile, and not read, so that it may be anywhere.
#[derive(Clone, Copy, Debug)]
pub struct Next<T> {
    pub(super) memory: *const [T],
    /// Whether [`filtered::Forward`] asks for it in the first-level cache, if it is not too much for that.
    pub(super) soon: bool,
}

impl<T> Next<T> {
    /// What is read at once.
    pub fn soon(memory: &[T]) -> Self {
        Self { memory, soon: true }
    }

    /// What the second-level cache should have by the time that it is read.
    pub fn later(memory: *const [T]) -> Self {
        Self { memory, soon: false }
    }
}

/// Nothing.
impl<T> Default for Next<T> {
    fn default() -> Self {
        Self::later(&[])
    }
}

/// The taps of a plane or block.
pub struct Taps<T> {
    /// kh × kw, each of `block` channels.
    plain: Vec<T>,
    /// kw × kh, each of `block` channels, where strips may be asked for.
    columns: Vec<T>,
    kernel: (usize, usize),
    block: usize,
    /// Times a zero of the padding others would be NaN.
    finite: bool,
    /// (points, kw, groups, block) of [`minimal`] filtering down the columns; none where the sums are
    /// plain.
    minimal: Option<(Vec<T>, Filter)>,
}

impl<T: Scalar> Taps<T> {
    /// `taps` are kh × kw for each of `block` channels, which lie next to each other; `rows` are those
    /// of the planes: rows are filtered where that is faster.
    pub fn new(taps: Vec<T>, kernel: (usize, usize), block: usize, rows: usize) -> Self {
        // Two units for multiplication take less time for 7 and 9 rows of plain sums than for filtering.
        let plain = matches!(kernel.0, 7 | 9) && simd::has_large_second_level_cache();
        let filter = Filter::of(kernel.0);
        Self::with(taps, kernel, block, filter.filter(|of| !plain && rows >= 2 * of.tile))
    }

    /// [`Taps::new`] for planes that are padded anyway: with AVX-512 plain sums of 7 rows take 0.95 times as long there
    /// as filtering, where they take 1.02 to 1.1 times as long if they have to pad them (Zen 4).
    pub fn of_padded(taps: Vec<T>, kernel: (usize, usize), rows: usize) -> Self {
        if kernel.0 == 7 && simd::vectors_are_lines() {
            return Self::with(taps, kernel, 1, None);
        }
        Self::new(taps, kernel, 1, rows)
    }

    /// [`Taps::new`] with this filter, which must be [`Filter::of`] the rows, or none.
    pub fn with(
        taps: Vec<T>,
        (kh, kw): (usize, usize),
        block: usize,
        filter: Option<Filter>,
    ) -> Self {
        assert!(taps.len() == kh * kw * block && (filter.is_none() || filter == Filter::of(kh)));
        let minimal = filter
            .filter(|_| T::FILTERED)
            .map(|filter| (minimal::transform_taps(&taps, (kh, kw), filter, block), filter));
        let mut columns = Vec::new();
        if size_of::<T>() == size_of::<f32>() && STRIPS.contains(&kh) {
            columns.reserve_exact(taps.len());
            for j in 0..kw {
                if block == 1 {
                    columns.extend(taps[j..].iter().step_by(kw));
                    continue;
                }
                for i in 0..kh {
                    columns.extend_from_slice(&taps[(i * kw + j) * block..][..block]);
                }
            }
        }
        // Of all, even if one is not: vectors of them are faster.
        let finite = taps.iter().fold(true, |finite, tap| finite & tap.to_f64().is_finite());
        Self { plain: taps, columns, kernel: (kh, kw), block, finite, minimal }
    }

    /// Whether a [`Forward`] of `rows` rows of `ow` outputs writes past the caches what may go there.
    pub fn streams(&self, rows: usize, ow: usize) -> bool {
        let lines = self.block == 1 && ow.is_multiple_of(MAX_LANES) && simd::vectors_are_lines();
        lines && (self.minimal.is_some() || self.goes_by_strips(rows))
    }

    /// Whether a [`filtered::Forward`] takes planes between no more than this padding.
    pub fn filters(&self, [top, bottom, left, right]: [usize; 4]) -> bool {
        let (kh, kw) = self.kernel;
        self.minimal.is_some() && top.max(bottom) < kh && left.max(right) < kw.min(MAX_LANES)
    }

    /// Whether a [`masked::Forward`](super::masked::Forward) makes `rows` rows or more of `ow` outputs with no more
    /// than this padding.
    pub fn pads(&self, rows: usize, ow: usize, padding: [usize; 4]) -> bool {
        let (kh, kw) = self.kernel;
        // No vector but the last one of a row may reach over its end.
        let last = (ow - 1) % MAX_LANES + 1;
        kh == kw
            && matches!(kh, 3 | 5)
            && padding.into_iter().all(|padding| padding <= kh / 2)
            && padding[3] <= last
            && self.finite
            && self.goes_by_strips(rows)
    }

    /// Of planes, in vectors of [`MAX_LANES`].
    fn goes_by_strips(&self, rows: usize) -> bool {
        let strips = self.block == 1 && !self.columns.is_empty() && rows + 1 >= self.kernel.0;
        strips && self.minimal.is_none() && simd::vectors_are_lines()
    }

    pub(super) fn rows(&self) -> usize {
        self.kernel.0
    }

    pub(super) fn columns(&self) -> usize {
        self.kernel.1
    }

    pub(super) fn block(&self) -> usize {
        self.block
    }

    /// Of minimal filtering; none where the sums are plain.
    pub fn filter(&self) -> Option<Filter> {
        self.minimal.as_ref().map(|(_, filter)| *filter)
    }

    /// The taps that are made for it.
    pub(super) fn filtered(&self) -> &[T] {
        self.minimal.as_ref().map_or(&[], |(taps, _)| taps)
    }

    /// K × K taps of a plane, column by column.
    pub(super) fn square<const K: usize>(&self) -> &[T] {
        assert!(self.kernel == (K, K) && self.block == 1 && self.columns.len() == K * K);
        &self.columns
    }

    /// The elements that a [`Forward`] of so many rows of outputs needs.
    pub fn scratch(&self, rows: usize, ow: usize) -> usize {
        let of = |(_, filter): &(_, Filter)| {
            filter.rows(rows.min(filtered::MAX_TILES * filter.tile)) * (MAX_LANES + self.row(ow))
        };
        self.minimal.as_ref().map_or(0, of)
    }

    /// Elements of a row of tiles of the padded plane, and as many more as make whole vectors.
    pub(super) fn row(&self, ow: usize) -> usize {
        row_length(ow, (self.kernel.1 - 1) * self.block + 1).next_multiple_of(MAX_LANES)
    }
}

/// out\[y\]\[x\] = bias + Σ weight\[i\]\[j\] · input\[y + i\]\[x + j\], one plane.
///
/// By minimal filtering, where the taps are made for it; should it yield a number that is not finite,
/// again by plain sums, for infinities and NaNs reach other outputs there.
pub struct Forward<'a, T> {
    /// (oh + kh − 1) rows of [`row_length`] elements, `ld` apart.
    pub input: &'a [T],
    pub ld: usize,
    pub taps: &'a Taps<T>,
    /// One for each channel.
    pub bias: &'a [T],
    /// oh × ow, contiguous; every element is written; past the caches, if it may, where [`Taps::streams`] says so.
    pub out: Target<'a, T>,
    /// Elements of a row: `block` for each pixel.
    pub ow: usize,
    /// [`Taps::scratch`] elements.
    pub scratch: &'a mut [T],
    /// Asked for meanwhile.
    pub next: Next<T>,
    /// Made meanwhile: what was computed before, mostly.
    pub copy: CopyOut<'a, T>,
}

impl<T: Scalar> Kernel<T> for Forward<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(mut self, simd: S) {
        if const { T::FILTERED } && self.taps.filter().is_some() {
            let oh = self.rows(simd);
            let (kh, kw) = self.taps.kernel;
            let filtered = filtered::Forward {
                input: filtered::Rows {
                    data: self.input,
                    ld: self.ld,
                    rows: oh + kh - 1,
                    width: row_length(self.ow, (kw - 1) * self.taps.block + 1),
                    padding: [0; 2],
                    relu_of: None,
                },
                taps: self.taps,
                bias: self.bias,
                out: self.out.again(),
                ow: self.ow,
                scratch: &mut *self.scratch,
                next: self.next,
                copy: take(&mut self.copy),
            };
            if filtered.run(simd) {
                return;
            }
            // What was written past the caches is written again.
            simd::fence();
        }
        Plain(self).run(simd);
    }
}

/// [`Forward`] by plain sums, whatever the taps are made for.
pub struct Plain<'a, T>(pub Forward<'a, T>);

impl<T: Scalar> Kernel<T> for Plain<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) {
        let Self(job) = self;
        if const { S::TILE_VECTORS == 4 } && job.out.slice.len() / job.ow + 1 >= job.taps.kernel.0 {
            macro_rules! strips {
                ($($rows:literal)+) => {
                    match (job.taps.kernel.0, job.taps.block) {
                        $(($rows, 1) => return simd.apart(Strips::<T, $rows, false>(job)),
                        ($rows, _) => return simd.apart(Strips::<T, $rows, true>(job)),)+
                        _ => {}
                    }
                };
            }
            // As `STRIPS` says.
            strips! { 3 5 7 9 11 }
        }
        // Code for a 3 × 3 kernel is 1.05 times (AVX-512) to 1.4 times (AVX2) as fast as the loop over
        // taps; for 7 × 7 and 9 × 9 the loop is 1.3 to 1.6 times as fast as unrolled code, which
        // spills (divan bench depthwise_planes, Zen 5).
        match (job.taps.kernel, job.taps.block) {
            ((3, 3), 1) => simd.apart(Tiles::<T, 3, false>(job)),
            (_, 1) => simd.apart(Tiles::<T, 0, false>(job)),
            ((3, 3), _) => simd.apart(Tiles::<T, 3, true>(job)),
            _ => simd.apart(Tiles::<T, 0, true>(job)),
        }
    }
}

/// [`strips`]
struct Strips<'a, T, const K: usize, const BLOCK: bool>(Forward<'a, T>);

impl<T: Scalar, const K: usize, const BLOCK: bool> Kernel<T> for Strips<'_, T, K, BLOCK> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) {
        strips::<T, S, K, BLOCK>(simd, self.0);
    }
}

/// [`forward`]
struct Tiles<'a, T, const K: usize, const BLOCK: bool>(Forward<'a, T>);

impl<T: Scalar, const K: usize, const BLOCK: bool> Kernel<T> for Tiles<'_, T, K, BLOCK> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) {
        forward::<T, S, K, BLOCK>(simd, self.0);
    }
}

/// The most vectors of a strip, of kernels of so many rows: as 32 registers hold with their operands. In the
/// first-level cache, at 64 rows and as many vectors, K = 5 makes 85 % of the FMA peak, 7 85 %, 9 91 % and 11 85
/// to 92 % (Xeon); tiles made 67 % of it at K = 7.
const fn widest(rows: usize) -> usize {
    match rows {
        3 | 5 => 4,
        7 | 9 => 3,
        _ => 2,
    }
}

/// Whether strips of so many vectors copy between their rows: sums and what copies need would not fit the
/// registers together otherwise. 40 × 40, K = 9, takes 1.06 times as long so, and 0.92 with K = 7 (Xeon).
const fn copies_between(rows: usize, wide: usize) -> bool {
    wide <= widest(rows) && rows * wide <= 22
}

/// Strips of kernels of K rows, down all outputs.
#[inline(always)]
fn strips<T: Scalar, S: Simd<T>, const K: usize, const BLOCK: bool>(simd: S, job: Forward<'_, T>) {
    let (_, kw) = job.taps.kernel;
    let (ow, lanes) = (job.ow, simd.lanes());
    let oh = job.rows(simd);
    assert!(job.taps.kernel.0 == K && oh + 1 >= K);
    assert_eq!(job.taps.columns.len(), job.taps.plain.len());
    let vectors = ow.div_ceil(lanes);
    let count = vectors.div_ceil(widest(K));
    // Where every vector is a line of the cache, which goes out at once: time over that with pieces that are
    // copied, 0.86 to 0.88 for K = 3 and 7, 0.93 for K = 9 (Xeon).
    let lines = !BLOCK && lanes == MAX_LANES && ow.is_multiple_of(lanes);
    let stream = lines && job.out.streams(simd);
    let copies = !job.copy.from.is_empty();
    let mut meanwhile = Meanwhile::new(simd, job.next, job.copy, count * (oh + 1 - K));
    let mut x = 0;
    for t in 0..count {
        // In the cache K = 7 takes 28.2 cycles a vector in strips of 3 and 1 vectors and 30.1 in two of 2, but in place
        // 56 × 56 takes 1.05 times as long so, K = 9 1.08 (Xeon).
        let wide = (vectors - x / lanes).div_ceil(count - t);
        let last = (ow - x - (wide - 1) * lanes).min(lanes);
        // SAFETY: the strip reads rows 0..oh + K − 1 and columns up to x + wide · lanes + (kw − 1) · block ≤
        // row_length, and writes columns x..x + (wide − 1) · lanes + last ≤ ow: inside the slices, as `rows`
        // asserts. What is streamed are whole vectors, aligned as `streams` asserts.
        unsafe {
            let strip = Strip::<T, K, BLOCK> {
                input: job.input.as_ptr().add(x),
                ld: job.ld,
                taps: job.taps.columns.as_ptr(),
                // The loop over columns of taps is faster than unrolled code, which fills the cache of decoded
                // instructions.
                kw: black_box(kw),
                bias: job.bias.as_ptr(),
                out: job.out.slice.as_mut_ptr().add(x),
                ow,
                oh,
                last,
            };
            macro_rules! run {
                ($($width:literal)+) => {
                    match (wide, stream, copies) {
                        $(($width, false, true) if const { copies_between(K, $width) && !BLOCK } => {
                            strip.run::<S, $width, false, true>(simd, &mut meanwhile)
                        }
                        ($width, false, _) if const { $width <= widest(K) } => {
                            strip.run::<S, $width, false, false>(simd, &mut meanwhile)
                        }
                        ($width, true, _) if const { $width <= widest(K) && !BLOCK } => {
                            strip.run::<S, $width, true, false>(simd, &mut meanwhile)
                        })+
                        _ => unreachable!("{wide} vectors"),
                    }
                };
            }
            run! { 1 2 3 4 }
        }
        x += wide * lanes;
    }
    meanwhile.finish(simd);
}

/// A strip of vectors; K and BLOCK as in [`strips`].
struct Strip<T, const K: usize, const BLOCK: bool> {
    input: *const T,
    ld: usize,
    /// (kw, K), each of the channels of a block.
    taps: *const T,
    kw: usize,
    bias: *const T,
    out: *mut T,
    ow: usize,
    oh: usize,
    /// Outputs of the last vector of a row.
    last: usize,
}

impl<T: Scalar, const K: usize, const BLOCK: bool> Strip<T, K, BLOCK> {
    /// All rows of C vectors. Every row of inputs is read once: it is row i of the taps of the output row
    /// i rows above it, for all i, whose sums are in registers.
    ///
    /// # Safety
    /// Inputs, taps and outputs must be in reach, as [`strips`] says, which are K − 1 rows or more. STREAM takes
    /// rows of whole aligned vectors, which nobody may read before this thread's fence.
    #[inline(always)]
    unsafe fn run<S: Simd<T>, const C: usize, const STREAM: bool, const COPY: bool>(
        &self,
        simd: S,
        meanwhile: &mut Meanwhile<'_, T>,
    ) {
        // SAFETY: there is a bias for each channel.
        let bias = unsafe { of_channel::<T, S, BLOCK>(simd, self.bias, 0) };
        // Of the output row whose next row of taps is i.
        let mut acc = [[bias; C]; K];
        let (mut input, mut out) = (self.input, self.out);
        // No branch comes after the sums: the compiler would put off what only the next row needs, and keep
        // all taps and inputs for it.
        macro_rules! row {
            ($low:expr, $high:expr) => {
                acc = self.taps::<S, C>(simd, acc, input, $low, $high);
                if $high == K {
                    for c in 0..C - 1 {
                        let out = out.add(c * simd.lanes());
                        match STREAM {
                            true => simd.stream(acc[K - 1][c], out),
                            false => simd.store(acc[K - 1][c], out),
                        }
                    }
                    let out_last = out.add((C - 1) * simd.lanes());
                    // Shorter vectors have no masks: there `store_first` is a loop.
                    if STREAM {
                        simd.stream(acc[K - 1][C - 1], out_last);
                    } else if simd.lanes() == MAX_LANES || self.last < simd.lanes() {
                        simd.store_first(acc[K - 1][C - 1], out_last, self.last);
                    } else {
                        simd.store(acc[K - 1][C - 1], out_last);
                    }
                    out = out.wrapping_add(self.ow);
                }
                for i in (1..K).rev() {
                    acc[i] = acc[i - 1];
                }
                acc[0] = [bias; C];
                input = input.wrapping_add(self.ld);
            };
        }
        macro_rules! rows {
            (above $($n:literal)+) => { $(if K > $n { row!(0, $n); })+ };
            (below $($n:literal)+) => { $(if K > $n { row!($n, K); })+ };
        }
        // SAFETY: rows 0..oh + K − 1 of the input, of which row y meets the taps i where 0 ≤ y − i < oh.
        unsafe {
            rows!(above 1 2 3 4 5 6 7 8 9 10);
            for _ in K - 1..self.oh {
                meanwhile.ask(simd);
                if COPY {
                    meanwhile.copy(simd);
                }
                row!(0, K);
            }
            rows!(below 1 2 3 4 5 6 7 8 9 10);
        }
        let _ = (acc, input, out);
    }

    /// Adds a row of inputs times the rows low..high of taps.
    ///
    /// # Safety
    /// As [`Strip::run`], with the row in reach.
    #[inline(always)]
    unsafe fn taps<S: Simd<T>, const C: usize>(
        &self,
        simd: S,
        mut acc: [[S::V; C]; K],
        input: *const T,
        low: usize,
        high: usize,
    ) -> [[S::V; C]; K] {
        let block = if BLOCK { simd.lanes() } else { 1 };
        for j in 0..self.kw {
            // SAFETY: the caller's promise.
            unsafe {
                let mut v = [simd.splat(T::ZERO); C];
                for (c, v) in v.iter_mut().enumerate() {
                    *v = simd.load(input.add(j * block + c * simd.lanes()));
                }
                for (i, acc) in acc.iter_mut().enumerate() {
                    if i < low || i >= high {
                        continue;
                    }
                    let w = of_channel::<T, S, BLOCK>(simd, self.taps, j * K + i);
                    for (acc, &v) in acc.iter_mut().zip(&v) {
                        *acc = simd.fma(w, v, *acc);
                    }
                }
            }
        }
        acc
    }
}

/// K is the compile-time kernel extent, 0 where only run time knows it; BLOCK says whether vectors
/// are channels.
#[inline(always)]
fn forward<T: Scalar, S: Simd<T>, const K: usize, const BLOCK: bool>(simd: S, job: Forward<'_, T>) {
    let (kh, kw) = if K == 0 { job.taps.kernel } else { (K, K) };
    let (ow, ld, lanes) = (job.ow, job.ld, simd.lanes());
    let oh = job.rows(simd);
    // Tiles of equal width, as far as whole vectors allow: a narrow last tile wastes its loads.
    let vectors = ow.div_ceil(lanes);
    let tiles = vectors.div_ceil(S::TILE_VECTORS);
    let mut meanwhile = Meanwhile::new(simd, job.next, job.copy, tiles * oh);
    let mut x = 0;
    for t in 0..tiles {
        let wide = (vectors - x / lanes).div_ceil(tiles - t);
        let last = (ow - x - (wide - 1) * lanes).min(lanes);
        let mut y = 0;
        while y < oh {
            let rows = tile_rows(oh - y, kh);
            // SAFETY: the tile reads rows y..y + rows + kh − 1 < oh + kh and columns up to
            // x + wide · lanes + (kw − 1) · block ≤ row_length, and writes rows y..y + rows ≤ oh at columns
            // x..x + (wide − 1) · lanes + last ≤ ow: inside the slices by the assertions above.
            unsafe {
                let tile = Tile::<T, K, BLOCK> {
                    input: job.input.as_ptr().add(y * ld + x),
                    ld,
                    weight: job.taps.plain.as_ptr(),
                    bias: job.bias.as_ptr(),
                    out: job.out.slice.as_mut_ptr().add(y * ow + x),
                    ow,
                    kh,
                    kw,
                    last,
                };
                match wide {
                    4 if const { S::TILE_VECTORS == 4 } => tile.rows::<S, 4>(simd, rows),
                    3 if const { S::TILE_VECTORS == 4 } => tile.rows::<S, 3>(simd, rows),
                    2 => tile.rows::<S, 2>(simd, rows),
                    _ => tile.rows::<S, 1>(simd, rows),
                }
            }
            meanwhile.go_on(simd, rows);
            y += rows;
        }
        x += wide * lanes;
    }
    meanwhile.finish(simd);
}

impl<T: Scalar> Forward<'_, T> {
    /// Rows of outputs. Panics unless all slices are as long as they must be.
    #[inline(always)]
    fn rows<S: Simd<T>>(&self, simd: S) -> usize {
        let ((kh, kw), block, ow) = (self.taps.kernel, self.taps.block, self.ow);
        let oh = self.out.slice.len() / ow;
        assert!([1, simd.lanes()].contains(&block) && ow.is_multiple_of(block));
        assert!(oh > 0 && self.out.slice.len() == oh * ow && self.bias.len() == block);
        let row = row_length(ow, (kw - 1) * block + 1);
        assert!(self.ld >= row && self.input.len() >= (oh + kh - 2) * self.ld + row);
        oh
    }
}

/// Element i of a list with one for each channel, for the lanes of a vector.
///
/// # Safety
/// The list must be so long.
#[inline(always)]
pub(super) unsafe fn of_channel<T: Scalar, S: Simd<T>, const BLOCK: bool>(
    simd: S,
    list: *const T,
    i: usize,
) -> S::V {
    // SAFETY: the caller's promise.
    unsafe { if BLOCK { simd.load(list.add(i * simd.lanes())) } else { simd.splat(*list.add(i)) } }
}

/// The height of the next tile, with `left` rows to go. A tile ramps in and out over one row less
/// than its height, which takes as many rows of taps.
#[inline(always)]
fn tile_rows(left: usize, kh: usize) -> usize {
    [6, 4, 2].into_iter().find(|&rows| left >= rows && kh >= rows - 1).unwrap_or(1)
}

/// Memory that is asked for bit by bit.
struct Ahead<T> {
    ptr: *const T,
    left: usize,
    step: usize,
    /// To the first-level cache.
    near: bool,
}

impl<T: Scalar> Ahead<T> {
    const LINE: usize = 64 / size_of::<T>();

    /// In about `steps` parts, to the second-level cache.
    #[inline(always)]
    fn new(memory: *const [T], steps: usize) -> Self {
        let left = memory.len().div_ceil(Self::LINE);
        Self { ptr: memory.cast(), left, step: left.div_ceil(steps.max(1)), near: false }
    }

    #[inline(always)]
    fn ask<S: Simd<T>>(&mut self, simd: S, parts: usize) {
        for _ in 0..self.left.min(parts * self.step) {
            match self.near {
                true => simd.prefetch(self.ptr),
                false => simd.prefetch_second(self.ptr),
            }
            self.ptr = self.ptr.wrapping_add(Self::LINE);
            self.left -= 1;
        }
    }
}

/// Memory of two tensors that is asked for evenly, a step at a time: so many requests at once as a column of a
/// plane has rows would wait for each other. Weight gradients take 0.8 to 0.9 of the time so (Xeon). No branch and
/// little arithmetic: it goes on beside a dozen multiply-adds.
#[derive(Clone, Copy)]
struct Even<T> {
    from: [*const T; 2],
    /// Bytes.
    at: usize,
    step: usize,
}

impl<T: Scalar> Even<T> {
    /// Both, if they are as long, in about so many steps of at most a line; for nothing, what is `at_hand`.
    #[inline(always)]
    fn new(next: [*const [T]; 2], steps: usize, at_hand: &[T]) -> Self {
        let len = next[0].len().max(next[1].len()) * size_of::<T>();
        let from = next.map(|next| if next.is_empty() { at_hand } else { next }.cast());
        Self { from, at: 0, step: len.div_ceil(steps.max(1)).min(64) }
    }

    #[inline(always)]
    fn ask<S: Simd<T>>(&mut self, simd: S) {
        for from in self.from {
            simd.prefetch_second(from.wrapping_byte_add(self.at));
        }
        self.at += self.step;
    }
}

/// The most lines that are asked for in the first-level cache, half of it. Filtered planes of 40 × 40 to 64 × 64 take
/// 0.95 to 0.98 times as long so, and larger ones 1.02 times (Zen 4).
const NEAR: usize = 256;

/// What goes on between register tiles.
pub(super) struct Meanwhile<'a, T> {
    next: Ahead<T>,
    copying: Copying<'a, T>,
}

impl<'a, T: Scalar> Meanwhile<'a, T> {
    /// In about `steps` parts.
    #[inline(always)]
    pub(super) fn new<S: Simd<T>>(
        simd: S,
        next: Next<T>,
        copy: CopyOut<'a, T>,
        steps: usize,
    ) -> Self {
        Self { next: Ahead::new(next.memory, steps), copying: Copying::new(simd, copy, steps) }
    }

    /// Asks for it in the first-level cache, where it is not too much for that.
    #[inline(always)]
    pub(super) fn near(mut self) -> Self {
        self.next.near = self.next.left <= NEAR;
        self
    }

    /// Asks for a part.
    #[inline(always)]
    pub(super) fn ask<S: Simd<T>>(&mut self, simd: S) {
        self.next.ask(simd, 1);
    }

    /// Copies a part.
    #[inline(always)]
    pub(super) fn copy<S: Simd<T>>(&mut self, simd: S) {
        self.copying.make(simd, 1);
    }

    #[inline(always)]
    pub(super) fn finish<S: Simd<T>>(self, simd: S) {
        self.copying.finish(simd);
    }

    #[inline(always)]
    pub(super) fn go_on<S: Simd<T>>(&mut self, simd: S, parts: usize) {
        self.next.ask(simd, parts);
        self.copying.make(simd, parts);
    }
}

/// One register tile; K and BLOCK as in [`forward`].
struct Tile<T, const K: usize, const BLOCK: bool> {
    input: *const T,
    ld: usize,
    weight: *const T,
    bias: *const T,
    out: *mut T,
    ow: usize,
    kh: usize,
    kw: usize,
    /// Outputs of the last vector of a row.
    last: usize,
}

impl<T: Scalar, const K: usize, const BLOCK: bool> Tile<T, K, BLOCK> {
    /// # Safety
    /// Inputs, taps and outputs of `rows` rows and C vectors must be in reach, as [`forward`] says.
    #[inline(always)]
    unsafe fn rows<S: Simd<T>, const C: usize>(&self, simd: S, rows: usize) {
        // SAFETY: the caller's promise is the same; `tile_rows` sees to kh ≥ R − 1.
        unsafe {
            match rows {
                // Of K = 3 tiles have four rows at most.
                6 if K != 3 => self.tile::<S, C, 6>(simd),
                4 => self.tile::<S, C, 4>(simd),
                2 => self.tile::<S, C, 2>(simd),
                _ => self.tile::<S, C, 1>(simd),
            }
        }
    }

    /// R rows of C vectors; kh ≥ R − 1.
    ///
    /// # Safety
    /// As [`Tile::rows`].
    #[inline(always)]
    unsafe fn tile<S: Simd<T>, const C: usize, const R: usize>(&self, simd: S) {
        let kh = if K == 0 { self.kh } else { K };
        // SAFETY: there is a bias for each channel.
        let mut acc = [[unsafe { of_channel::<T, S, BLOCK>(simd, self.bias, 0) }; C]; R];
        // SAFETY: rows 0..kh + R − 1, and `row − r` < kh, as `forward` asks.
        unsafe {
            // Ramping in, row i feeds the output rows 0..=i.
            if R > 1 {
                self.taps::<S, C, R>(simd, &mut acc, 0, 0, 1);
            }
            if R > 2 {
                self.taps::<S, C, R>(simd, &mut acc, 1, 0, 2);
            }
            if R > 3 {
                self.taps::<S, C, R>(simd, &mut acc, 2, 0, 3);
            }
            if R > 4 {
                self.taps::<S, C, R>(simd, &mut acc, 3, 0, 4);
            }
            if R > 5 {
                self.taps::<S, C, R>(simd, &mut acc, 4, 0, 5);
            }
            for row in R - 1..kh {
                self.taps::<S, C, R>(simd, &mut acc, row, 0, R);
            }
            if R > 1 {
                self.taps::<S, C, R>(simd, &mut acc, kh, 1, R);
            }
            if R > 2 {
                self.taps::<S, C, R>(simd, &mut acc, kh + 1, 2, R);
            }
            if R > 3 {
                self.taps::<S, C, R>(simd, &mut acc, kh + 2, 3, R);
            }
            if R > 4 {
                self.taps::<S, C, R>(simd, &mut acc, kh + 3, 4, R);
            }
            if R > 5 {
                self.taps::<S, C, R>(simd, &mut acc, kh + 4, 5, R);
            }
            for (r, acc) in acc.iter().enumerate() {
                for (c, &v) in acc.iter().enumerate() {
                    let out = self.out.add(r * self.ow + c * simd.lanes());
                    if c + 1 < C || self.last == simd.lanes() {
                        simd.store(v, out);
                    } else {
                        simd.store_first(v, out, self.last);
                    }
                }
            }
        }
    }

    /// One input row: feeds output rows low..high of the tile.
    ///
    /// # Safety
    /// As [`Tile::rows`], with the row in reach and `row − r` a row of taps for r in low..high.
    #[inline(always)]
    unsafe fn taps<S: Simd<T>, const C: usize, const R: usize>(
        &self,
        simd: S,
        acc: &mut [[S::V; C]; R],
        row: usize,
        low: usize,
        high: usize,
    ) {
        let kw = if K == 0 { self.kw } else { K };
        let block = if BLOCK { simd.lanes() } else { 1 };
        for j in 0..kw {
            // SAFETY: the caller's promise.
            unsafe {
                let input = self.input.add(row * self.ld + j * block);
                let mut v = [simd.splat(T::ZERO); C];
                for (c, v) in v.iter_mut().enumerate() {
                    *v = simd.load(input.add(c * simd.lanes()));
                }
                for (r, acc) in acc.iter_mut().enumerate() {
                    if r < low || r >= high {
                        continue;
                    }
                    let w = of_channel::<T, S, BLOCK>(simd, self.weight, (row - r) * kw + j);
                    for (acc, &v) in acc.iter_mut().zip(&v) {
                        *acc = simd.fma(w, v, *acc);
                    }
                }
            }
        }
    }
}

/// sum\[i\]\[j\] += Σ grad\[y\]\[x\] · input\[y + i\]\[x + j\], one plane.
///
/// A tile of I × J taps has an accumulator each. An input row is passed over once: each vector of
/// it, at each of J shifts, meets the gradients of the I rows that reach it through the I rows of
/// taps. Lanes are added up, in `f64`, after a block of rows: a long sum in `f32` lanes would lose
/// digits.
///
/// Minimal filtering, as in [`Forward`], does not pay: 5/9 of the multiply-adds for k = 9, but 135 sums to
/// add up over lanes where there are 81, and two planes to transform. A training step of an xUnit was 2 %
/// faster by it at 16 × 64 × 64 × 64, 5 % at 256 × 256, and up to 3 % slower at 64 × 64 × 40 × 40 (Zen 4).
pub struct WeightGradient<'a, T> {
    /// oh rows, `grad_ld` apart.
    pub grad: &'a [T],
    pub grad_ld: usize,
    /// (oh + kh − 1) rows of ow + (kw − 1) · block elements, `ld` apart.
    pub input: &'a [T],
    pub ld: usize,
    /// kh × kw taps, each of `block` channels.
    pub sum: &'a mut [f64],
    pub kernel: (usize, usize),
    /// Rows, and elements of a row: `block` for each pixel.
    pub out: (usize, usize),
    /// As in [`Forward`].
    pub block: usize,
    /// As what [`Next::later`] takes.
    pub next: [*const [T]; 2],
}

/// Vectors of gradient that are added up in lanes: at 16 lanes a block of 64 × 64 pixels.
const BLOCK: usize = 256;

/// The most rows that a column is passed down at once: the two lines of gradient and input of each that the taps
/// read, or three, stay in the first-level cache from one tile of taps to the next.
const ROWS: usize = 64;

impl<T: Scalar> Kernel<T> for WeightGradient<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(mut self, simd: S) {
        let ((kh, kw), (oh, ow), block) = (self.kernel, self.out, self.block);
        assert!([1, simd.lanes()].contains(&block) && ow.is_multiple_of(block));
        let row = ow + (kw - 1) * block;
        assert!(oh > 0 && ow > 0 && self.grad_ld >= ow && self.ld >= row);
        assert!(self.input.len() >= (oh + kh - 2) * self.ld + row);
        assert!(self.grad.len() >= (oh - 1) * self.grad_ld + ow);
        assert!(self.sum.len() == kh * kw * block);
        if const { S::TILE_VECTORS == 4 } && oh >= kh && kw <= 11 {
            match kh {
                5 => return self.by_columns::<S, 5>(simd),
                7 => return self.by_columns::<S, 7>(simd),
                9 => return self.by_columns::<S, 9>(simd),
                11 => return self.by_columns::<S, 11>(simd),
                _ => {}
            }
        }
        let columns = ow.div_ceil(simd.lanes());
        let height = (BLOCK / columns).max(8);
        // In the passes of the first tile of taps.
        let mut next = Even::new(self.next, columns * oh, self.grad);
        for y in (0..oh).step_by(height) {
            let rows = (y, oh.min(y + height));
            let mut i = 0;
            while i < kh {
                i += self.tap_rows(simd, rows, i, &mut next);
            }
        }
    }
}

impl<T: Scalar> WeightGradient<'_, T> {
    /// Taps of K rows: tiles of all their rows, one after the other at each column of the plane, whose sums wait
    /// in memory. K = 7 at 64 × 64 takes 27 cycles a vector in the cache, and 36 by tiles of four and three rows
    /// and columns that pass over the plane one by one; K = 9 46 and 64 (Xeon).
    #[inline(always)]
    fn by_columns<S: Simd<T>, const K: usize>(&mut self, simd: S) {
        let ((oh, ow), (_, kw), lanes) = (self.out, self.kernel, simd.lanes());
        // As many columns of taps as there are registers for, beside a gradient for each row and an input: but
        // three of K = 5, with which 64 × 64 takes 15 cycles a vector, and 20 with five (Xeon).
        let most = const {
            match K {
                5 | 7 => 3,
                9 => 2,
                _ => 1,
            }
        };
        let (blocks, columns) = (oh.div_ceil(ROWS), ow.div_ceil(lanes));
        let steps = columns * kw.div_ceil(most) * oh;
        let mut next = Even::new(self.next, steps, self.grad);
        // Of each tap, column by column of taps.
        let mut sums = [const { MaybeUninit::<Line>::uninit() }; 11 * 11];
        assert!(K * kw <= sums.len() && lanes * size_of::<T>() <= size_of::<Line>());
        let sums = sums.as_mut_ptr().cast::<T>();
        let (at, zero) = (|tap: usize| sums.wrapping_add(tap * lanes), simd.splat(T::ZERO));
        for block in 0..blocks {
            let rows = (oh * block / blocks, oh * (block + 1) / blocks);
            let mut vectors = 0;
            for x in (0..ow).step_by(lanes) {
                // SAFETY: K · kw lines, all of which are written before they are read. Blocks are all rows, K or
                // more, or ROWS / 2 or more; j + width ≤ kw; the extents are as `run` asserts.
                unsafe {
                    if vectors == 0 {
                        (0..K * kw).for_each(|tap| simd.store(zero, at(tap)));
                    }
                    let mut j = 0;
                    for parts in (1..=kw.div_ceil(most)).rev() {
                        let width = (kw - j).div_ceil(parts);
                        let (sums, place) = (at(j * K), (x, j));
                        match width {
                            3 if const { K <= 7 } => {
                                self.stored::<S, 3, K>(simd, rows, place, sums, &mut next)
                            }
                            2 if const { K <= 9 } => {
                                self.stored::<S, 2, K>(simd, rows, place, sums, &mut next)
                            }
                            _ => self.stored::<S, 1, K>(simd, rows, place, sums, &mut next),
                        }
                        j += width;
                    }
                }
                vectors += rows.1 - rows.0;
                if vectors + ROWS > BLOCK || x + lanes >= ow {
                    for tap in 0..K * kw {
                        // SAFETY: as above.
                        let sum = unsafe { simd.load(at(tap)) };
                        self.add(simd, tap % K * kw + tap / K, sum);
                    }
                    vectors = 0;
                }
            }
        }
    }

    /// [`WeightGradient::column`] of all rows of J columns of taps, with the sums in memory.
    ///
    /// # Safety
    /// As [`WeightGradient::column`]; the sums must be valid for reading and writing.
    #[inline(always)]
    unsafe fn stored<S: Simd<T>, const J: usize, const K: usize>(
        &self,
        simd: S,
        rows: (usize, usize),
        (x, j): (usize, usize),
        sums: *mut T,
        next: &mut Even<T>,
    ) {
        let mut acc = [[simd.splat(T::ZERO); J]; K];
        // SAFETY: the caller's promise.
        unsafe {
            for (i, acc) in acc.iter_mut().enumerate() {
                for (j, acc) in acc.iter_mut().enumerate() {
                    *acc = simd.load(sums.add((j * K + i) * simd.lanes()));
                }
            }
            acc = match x + simd.lanes() <= self.out.1 {
                true => self.column::<S, J, K, false>(simd, acc, rows, (x, 0, j), next),
                false => self.column::<S, J, K, true>(simd, acc, rows, (x, 0, j), next),
            };
            for (i, acc) in acc.iter().enumerate() {
                for (j, &acc) in acc.iter().enumerate() {
                    simd.store(acc, sums.add((j * K + i) * simd.lanes()));
                }
            }
        }
    }

    /// Adds the lanes of a tap's sum.
    #[inline(always)]
    fn add<S: Simd<T>>(&mut self, simd: S, tap: usize, sum: S::V) {
        if self.block == 1 {
            self.sum[tap] += simd.sum(sum).to_f64();
            return;
        }
        let mut lanes = [T::ZERO; MAX_LANES];
        // SAFETY: no vector has more lanes than MAX_LANES.
        unsafe { simd.store(sum, lanes.as_mut_ptr()) };
        let sums = &mut self.sum[tap * self.block..][..self.block];
        sums.iter_mut().zip(lanes).for_each(|(sum, lane)| *sum += lane.to_f64());
    }

    /// The taps of one row of tiles, from row i on; returns how many rows they are.
    #[inline(always)]
    fn tap_rows<S: Simd<T>>(
        &mut self,
        simd: S,
        rows: (usize, usize),
        i: usize,
        next: &mut Even<T>,
    ) -> usize {
        let (kh, kw) = self.kernel;
        // As many taps as there are registers for, with a gradient for each row and an input; as many
        // rows as that leaves, as most loads straddle two cache lines. But three rows of nine taps, 31
        // registers, spill: AVX-512, Zen 4, 16 × 64 × 64 × 64, k = 9: 10.9 ms, of five and four 9.6;
        // k = 7: three rows of four, four of three 7.1, four and three of four and three 6.7.
        let many = S::TILE_VECTORS == 4;
        // No more rows of taps than there are of gradients.
        let high = match ((kh - i).min(rows.1 - rows.0), many) {
            (left @ (1 | 2 | 4 | 5), true) => left,
            (left, true) if left % 3 == 0 => 3,
            (_, true) => 4,
            (4, false) => 2,
            (left, false) => left.min(3),
        };
        let most = match (high, many) {
            (3 | 4, true) => 6,
            (5, true) => 5,
            _ => 4,
        };
        let mut nothing = Even::new([&[]; 2], 1, self.grad);
        let mut j = 0;
        for parts in (1..=kw.div_ceil(most)).rev() {
            let width = (kw - j).div_ceil(parts);
            let next = if (i, j) == (0, 0) { &mut *next } else { &mut nothing };
            macro_rules! taps {
                ($($height:literal: $($width:literal)+,)+) => {
                    match (width, high) {
                        $($(
                            ($width, $height) => {
                                self.taps::<S, $width, $height>(simd, rows, i, j, next);
                            }
                        )+)+
                        _ => unreachable!("{width} × {high} taps"),
                    }
                };
            }
            // SAFETY: i + I ≤ kh and j + J ≤ kw: `run` asserts that all their rows and columns are in
            // reach; I is at most the rows of the gradient.
            unsafe {
                if const { S::TILE_VECTORS == 4 } {
                    taps! {
                        1: 1 2 3 4,
                        2: 1 2 3 4,
                        3: 1 2 3 4 5 6,
                        4: 1 2 3 4 5 6,
                        5: 1 2 3 4 5,
                    }
                } else {
                    taps! {
                        1: 1 2 3 4,
                        2: 1 2 3 4,
                        3: 1 2 3 4,
                    }
                }
            }
            j += width;
        }
        high
    }

    /// Taps (i..i + I, j..j + J) over some rows of the gradient.
    ///
    /// # Safety
    /// There must be I rows or more, i + I ≤ kh, j + J ≤ kw, and the extents as `run` asserts.
    #[inline(always)]
    unsafe fn taps<S: Simd<T>, const J: usize, const I: usize>(
        &mut self,
        simd: S,
        rows: (usize, usize),
        i: usize,
        j: usize,
        next: &mut Even<T>,
    ) {
        let mut acc = [[simd.splat(T::ZERO); J]; I];
        let (ow, lanes) = (self.out.1, simd.lanes());
        let mut x = 0;
        // SAFETY: the caller's promise.
        unsafe {
            while x + lanes <= ow {
                acc = self.column::<S, J, I, false>(simd, acc, rows, (x, i, j), next);
                x += lanes;
            }
            if x < ow {
                acc = self.column::<S, J, I, true>(simd, acc, rows, (x, i, j), next);
            }
        }
        for (r, acc) in acc.iter().enumerate() {
            for (c, &acc) in acc.iter().enumerate() {
                self.add(simd, (i + r) * self.kernel.1 + j + c, acc);
            }
        }
    }

    /// What [`WeightGradient::taps`] adds up from column x on, a vector wide or, if PART, up to the end
    /// of the rows. The sums come and go by value: behind a reference each of them would be stored
    /// after every multiply-add.
    ///
    /// # Safety
    /// As [`WeightGradient::taps`], with the column in reach.
    #[inline(always)]
    unsafe fn column<S: Simd<T>, const J: usize, const I: usize, const PART: bool>(
        &self,
        simd: S,
        mut acc: [[S::V; J]; I],
        (first, end): (usize, usize),
        (x, i, j): (usize, usize, usize),
        next: &mut Even<T>,
    ) -> [[S::V; J]; I] {
        // A partial vector reads only its elements, so that an infinity beyond the row cannot meet a
        // zero gradient.
        let columns = if PART { self.out.1 - x } else { simd.lanes() };
        // The gradients of row y and of those above it, which input row y + i reaches through the
        // taps i, i + 1 and so on.
        let mut g = [simd.splat(T::ZERO); I];
        let mut grad = self.grad.as_ptr().wrapping_add(first * self.grad_ld + x);
        let mut input =
            self.input.as_ptr().wrapping_add((first + i) * self.ld + x + j * self.block);
        // In registers.
        let mut ahead = *next;
        macro_rules! row {
            ($low:expr, $high:expr) => {
                let mut newer = simd.splat(T::ZERO);
                if $low == 0 {
                    newer = load::<T, S, PART>(simd, grad, columns);
                    grad = grad.wrapping_add(self.grad_ld);
                    ahead.ask(simd);
                }
                // For other ways to move them the compiler keeps sums in memory (K = 9: 55 cycles a vector for 47).
                for g in &mut g {
                    newer = replace(g, newer);
                }
                for c in 0..J {
                    let v = load::<T, S, PART>(simd, input.wrapping_add(c * self.block), columns);
                    for r in $low..$high {
                        acc[r][c] = simd.fma(g[r], v, acc[r][c]);
                    }
                }
                input = input.wrapping_add(self.ld);
            };
        }
        // SAFETY: the caller's promise; input row y + i, for y in first..end + I − 1, meets the
        // gradient rows y − r in first..end alone.
        unsafe {
            // Ramping in, the first rows of input have no gradients through the lower taps.
            macro_rules! rows {
                (above $($n:literal)+) => { $(if I > $n { row!(0, $n); })+ };
                (below $($n:literal)+) => { $(if I > $n { row!($n, I); })+ };
            }
            rows!(above 1 2 3 4 5 6 7 8 9 10);
            for _ in first + I - 1..end {
                row!(0, I);
            }
            rows!(below 1 2 3 4 5 6 7 8 9 10);
        }
        let _ = (grad, input);
        *next = ahead;
        acc
    }
}

/// A vector or, if PART, its first `n` elements and zeros.
///
/// # Safety
/// They must be valid for reading.
#[inline(always)]
unsafe fn load<T: Scalar, S: Simd<T>, const PART: bool>(simd: S, from: *const T, n: usize) -> S::V {
    // SAFETY: the caller's promise.
    unsafe { if PART { simd.load_first(from, n) } else { simd.load(from) } }
}

/// Copies pixels, some channels of each, between a tensor in channels_last and a block.
pub struct Pixels<'a, T> {
    from: &'a [T],
    from_step: usize,
    to: *mut T,
    to_step: usize,
    count: usize,
    channels: usize,
    stream: bool,
    target: PhantomData<&'a mut [T]>,
}

impl<'a, T> Pixels<'a, T> {
    /// From every `from_step` elements to every `to_step`; `channels` must be at most the lanes of a
    /// vector.
    pub fn new(
        (from, from_step): (&'a [T], usize),
        (to, to_step): (&'a mut [T], usize),
        count: usize,
        channels: usize,
    ) -> Self {
        assert!(count > 0 && to.len() >= (count - 1) * to_step + channels);
        // SAFETY: the target is long enough by the assertion above, and borrowed for 'a.
        unsafe { Self::to_raw((from, from_step), (to.as_mut_ptr(), to_step), count, channels) }
    }

    /// [`Pixels::new`] to memory whose other channels may be in use elsewhere.
    ///
    /// # Safety
    /// For 'a, the `channels` elements from each of `count` places `to_step` apart must be valid for
    /// writing, and nobody else's.
    pub unsafe fn to_raw(
        (from, from_step): (&'a [T], usize),
        (to, to_step): (*mut T, usize),
        count: usize,
        channels: usize,
    ) -> Self {
        assert!(count > 0 && from.len() >= (count - 1) * from_step + channels);
        let stream = false;
        Self { from, from_step, to, to_step, count, channels, stream, target: PhantomData }
    }

    /// Past the caches, if `stream`, where whole cache lines are written.
    ///
    /// # Safety
    /// After the kernel, nobody may read them before this thread has called [`simd::fence`], as
    /// [`crate::parallel::for_each`] does at the end.
    pub unsafe fn streamed(self, stream: bool) -> Self {
        Self { stream, ..self }
    }
}

impl<T: Scalar> Kernel<T> for Pixels<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) {
        let Self { from, from_step, to, to_step, count, channels, stream, .. } = self;
        assert!(channels <= simd.lanes());
        const LINE: usize = size_of::<Line>();
        let aligned = |bytes: usize| bytes.is_multiple_of(LINE);
        // Half a line at a time would be worse than nothing.
        let whole = simd.lanes() * size_of::<T>() == LINE;
        let stream = stream && whole && aligned(to.addr()) && aligned(to_step * size_of::<T>());
        for i in 0..count {
            // SAFETY: pixel i < count has `channels` elements on both sides, as `to_raw` says.
            unsafe {
                let (from, to) = (from.as_ptr().add(i * from_step), to.add(i * to_step));
                if channels < simd.lanes() {
                    simd.store_first(simd.load_first(from, channels), to, channels);
                } else if stream {
                    simd.stream(simd.load(from), to);
                } else {
                    simd.store(simd.load(from), to);
                }
            }
        }
    }
}
