//! Depthwise convolution of any stride and dilation, as a list of taps: each an offset into the
//! input and a weight.
//!
//! The caller lays the input out such that neighbouring outputs read neighbouring elements whatever
//! the stride (see `ops::phases`); then any geometry, and any part of the transposed one, is the same
//! loop: every tap one unaligned vector load and one multiply-add per vector of outputs.

use std::marker::PhantomData;

use super::activation::Target;
use super::{MAX_LANES, extent};
use crate::simd::{Kernel, Scalar, Simd};

/// out\[y\]\[x\] = bias + Σ weight · input\[y · step + offset + x\], one plane.
pub struct Forward<'a, T> {
    /// Whole vectors are read: past the last output, up to [`super::MAX_LANES`] − 1 elements must be
    /// there; what they hold does not matter.
    pub input: &'a [T],
    /// Elements of input from one row of outputs to the next.
    pub step: usize,
    pub taps: &'a [(usize, T)],
    pub bias: T,
    /// Rows of `ow`, contiguous; every element is written.
    pub out: &'a mut [T],
    pub ow: usize,
}

/// Rows of the register tile. A row of taps that several rows of outputs share is loaded anew for
/// each: at stride 2 two of three loads would be new ones anyway.
const ROWS: usize = 4;

impl<T: Scalar> Kernel<T> for Forward<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) {
        let (ow, lanes) = (self.ow, simd.lanes());
        let oh = self.out.len() / ow;
        assert!(oh > 0 && self.out.len() == oh * ow);
        let reach = self.taps.iter().map(|&(offset, _)| offset).max().unwrap_or(0);
        assert!(
            self.taps.is_empty()
                || self.input.len() >= (oh - 1) * self.step + reach + ow.next_multiple_of(lanes)
        );
        let vectors = ow.div_ceil(lanes);
        for y in (0..oh).step_by(ROWS) {
            let mut v = 0;
            while v < vectors {
                let wide = (vectors - v).min(S::TILE_VECTORS);
                let x = v * lanes;
                let last = (ow - x - (wide - 1) * lanes).min(lanes);
                // SAFETY: the tile reads rows y..y + R ≤ oh and columns up to x + wide · lanes of
                // each tap and writes columns x..x + (wide − 1) · lanes + last ≤ ow of those rows:
                // inside the slices by the assertions above.
                unsafe {
                    let tile = Tile {
                        input: self.input.as_ptr().wrapping_add(y * self.step + x),
                        step: self.step,
                        taps: self.taps,
                        bias: self.bias,
                        out: self.out.as_mut_ptr().add(y * ow + x),
                        ow,
                        last,
                    };
                    match (wide, oh - y) {
                        (4, ROWS..) if const { S::TILE_VECTORS == 4 } => {
                            tile.run::<S, 4, ROWS>(simd)
                        }
                        (3, ROWS..) if const { S::TILE_VECTORS == 4 } => {
                            tile.run::<S, 3, ROWS>(simd)
                        }
                        (2, ROWS..) => tile.run::<S, 2, ROWS>(simd),
                        (_, ROWS..) => tile.run::<S, 1, ROWS>(simd),
                        (_, left) => tile.by_row(simd, wide, left),
                    }
                }
                v += wide;
            }
        }
    }
}

struct Tile<'a, T> {
    input: *const T,
    step: usize,
    taps: &'a [(usize, T)],
    bias: T,
    out: *mut T,
    ow: usize,
    /// Outputs of the last vector of a row.
    last: usize,
}

impl<T: Scalar> Tile<'_, T> {
    /// # Safety
    /// Inputs and outputs of R rows of C vectors must be in reach, as [`Forward`] says.
    #[inline(always)]
    unsafe fn run<S: Simd<T>, const C: usize, const R: usize>(&self, simd: S) {
        let lanes = simd.lanes();
        let mut acc = [[simd.splat(self.bias); C]; R];
        // SAFETY: the caller's promise.
        unsafe {
            for &(offset, w) in self.taps {
                let w = simd.splat(w);
                for (r, acc) in acc.iter_mut().enumerate() {
                    for (c, acc) in acc.iter_mut().enumerate() {
                        let v = simd.load(self.input.add(r * self.step + offset + c * lanes));
                        *acc = simd.fma(w, v, *acc);
                    }
                }
            }
            for (r, acc) in acc.iter().enumerate() {
                for (c, &v) in acc.iter().enumerate() {
                    let out = self.out.add(r * self.ow + c * lanes);
                    if c + 1 < C {
                        simd.store(v, out);
                    } else {
                        simd.store_first(v, out, self.last);
                    }
                }
            }
        }
    }

    /// Fewer than [`ROWS`] rows, one by one.
    ///
    /// # Safety
    /// As [`Tile::run`].
    #[inline(always)]
    unsafe fn by_row<S: Simd<T>>(&self, simd: S, wide: usize, rows: usize) {
        for r in 0..rows {
            // SAFETY: the caller's promise holds for each row.
            unsafe {
                let row = Tile {
                    input: self.input.wrapping_add(r * self.step),
                    out: self.out.add(r * self.ow),
                    ..*self
                };
                match wide {
                    4 if const { S::TILE_VECTORS == 4 } => row.run::<S, 4, 1>(simd),
                    3 if const { S::TILE_VECTORS == 4 } => row.run::<S, 3, 1>(simd),
                    2 => row.run::<S, 2, 1>(simd),
                    _ => row.run::<S, 1, 1>(simd),
                }
            }
        }
    }
}

/// Splits rows into their even and odd elements, for a stride of two.
pub struct Split<'a, T> {
    /// Rows of `width`, contiguous.
    pub from: &'a [T],
    pub width: usize,
    /// Rows `ld` apart; what else they hold stays.
    pub to: &'a mut [T],
    pub ld: usize,
    /// Where the first even and the first odd element of a row go.
    pub places: [usize; 2],
    /// Rows that are read next, as many or none: asked for meanwhile.
    pub next: &'a [T],
}

impl<T: Scalar> Kernel<T> for Split<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) {
        let Self { from, width, to, ld, places: [even, odd], next } = self;
        let (rows, lanes) = (from.len() / width, simd.lanes());
        assert!(from.len() == rows * width && rows > 0);
        let reach = (even + width.div_ceil(2)).max(odd + width / 2);
        assert!(to.len() >= (rows - 1) * ld + reach);
        let next = if next.is_empty() { from } else { next }.as_ptr();
        for y in 0..rows {
            let mut x = 0;
            // SAFETY: elements x.. of row y, and of both halves of its place, by the assertions above.
            unsafe {
                let row = from.as_ptr().add(y * width);
                let to = to.as_mut_ptr().add(y * ld);
                while x + 2 * lanes <= width {
                    let at = row.add(x);
                    let ahead = next.wrapping_add(y * width + x);
                    simd.prefetch_second(ahead);
                    simd.prefetch_second(ahead.wrapping_add(lanes));
                    let [a, b] = simd.unzip(simd.load(at), simd.load(at.add(lanes)));
                    simd.store(a, to.add(even + x / 2));
                    simd.store(b, to.add(odd + x / 2));
                    x += 2 * lanes;
                }
                if x < width {
                    let (at, left) = (row.add(x), width - x);
                    simd.prefetch_second(next.wrapping_add(y * width + x));
                    let second =
                        simd.load_first(at.add(left.min(lanes)), left.saturating_sub(lanes));
                    let [a, b] = simd.unzip(simd.load_first(at, left.min(lanes)), second);
                    simd.store_first(a, to.add(even + x / 2), left.div_ceil(2));
                    simd.store_first(b, to.add(odd + x / 2), left / 2);
                }
            }
        }
    }
}

/// What [`Split`] undoes: rows of a plane, of their even and odd elements.
pub struct Merge<'a, T> {
    /// Those of the rows that are written, contiguous.
    pub parts: [&'a [T]; 2],
    /// The whole plane; only its rows `first`, `first` + `step` and so on are written, past the caches, if it may,
    /// where rows are whole vectors.
    pub out: Target<'a, T>,
    pub width: usize,
    pub first: usize,
    pub step: usize,
}

impl<T: Scalar> Kernel<T> for Merge<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) {
        let Self { parts: [even, odd], out, width, first, step } = self;
        let (height, lanes) = (out.slice.len() / width, simd.lanes());
        assert!(out.slice.len() == height * width && step > 0);
        let rows = height.saturating_sub(first).div_ceil(step);
        assert!(even.len() == rows * width.div_ceil(2) && odd.len() == rows * (width / 2));
        let stream = width.is_multiple_of(lanes) && out.streams(simd);
        for y in 0..rows {
            let mut x = 0;
            // SAFETY: elements of both parts of row y, and x.. of its place, by the assertions above; what is
            // streamed is aligned, as `streams` says.
            unsafe {
                let even = even.as_ptr().add(y * width.div_ceil(2));
                let odd = odd.as_ptr().add(y * (width / 2));
                let to = out.slice.as_mut_ptr().add((first + y * step) * width);
                while x < width {
                    let left = width - x;
                    let whole = left >= 2 * lanes;
                    let part = |from: *const T, n: usize| match whole {
                        true => simd.load(from.add(x / 2)),
                        false => simd.load_first(from.add(x / 2), n),
                    };
                    let [a, b] = simd.zip(part(even, left.div_ceil(2)), part(odd, left / 2));
                    let to = to.add(x);
                    match (whole, stream) {
                        (true, true) => {
                            simd.stream(a, to);
                            simd.stream(b, to.add(lanes));
                        }
                        (true, false) => {
                            simd.store(a, to);
                            simd.store(b, to.add(lanes));
                        }
                        _ => {
                            let n = left.min(lanes);
                            simd.store_first(a, to, n);
                            simd.store_first(b, to.add(n), left - n);
                        }
                    }
                    x += 2 * lanes;
                }
            }
        }
    }
}

/// sum\[t\] += Σ grad\[y\]\[x\] · input\[y · step + offsets\[t\] + x\], one plane.
pub struct WeightGradient<'a, T> {
    /// Rows of `ow`, contiguous.
    pub grad: &'a [T],
    pub ow: usize,
    pub input: &'a [T],
    pub step: usize,
    pub offsets: &'a [usize],
    pub sum: &'a mut [f64],
}

/// Vectors of gradient that are added up in lanes, as in `conv::WeightGradient`.
const BLOCK: usize = 256;

impl<T: Scalar> Kernel<T> for WeightGradient<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(mut self, simd: S) {
        let ow = self.ow;
        let oh = self.grad.len() / ow;
        assert!(oh > 0 && self.grad.len() == oh * ow && self.sum.len() == self.offsets.len());
        let reach = self.offsets.iter().max().map_or(0, |&offset| offset + ow);
        assert!(self.input.len() >= (oh - 1) * self.step + reach);
        let block = (BLOCK / ow.div_ceil(simd.lanes())).max(8);
        for y in (0..oh).step_by(block) {
            let rows = (y, oh.min(y + block));
            let mut t = 0;
            while t < self.offsets.len() {
                // SAFETY: every row of every tap is in reach by the assertions above.
                t += unsafe {
                    match self.offsets.len() - t {
                        9.. if const { S::TILE_VECTORS == 4 } => self.taps::<S, 9>(simd, rows, t),
                        8.. => self.taps::<S, 8>(simd, rows, t),
                        5.. => self.taps::<S, 5>(simd, rows, t),
                        3.. => self.taps::<S, 3>(simd, rows, t),
                        _ => self.taps::<S, 1>(simd, rows, t),
                    }
                };
            }
        }
    }
}

impl<T: Scalar> WeightGradient<'_, T> {
    /// J taps from the one at `t` on, over some rows of the gradient; returns J.
    ///
    /// # Safety
    /// There are so many taps, and their rows are in reach.
    #[inline(always)]
    unsafe fn taps<S: Simd<T>, const J: usize>(
        &mut self,
        simd: S,
        (first, end): (usize, usize),
        t: usize,
    ) -> usize {
        let (ow, lanes, offsets) = (self.ow, simd.lanes(), &self.offsets[t..t + J]);
        let mut acc = [simd.splat(T::ZERO); J];
        for y in first..end {
            // SAFETY: the caller's promise; a partial vector reads only its elements, so that an
            // infinity beyond the row cannot meet a zero gradient.
            unsafe {
                let grad = self.grad.as_ptr().add(y * ow);
                let input = self.input.as_ptr().add(y * self.step);
                let mut x = 0;
                while x + lanes <= ow {
                    let g = simd.load(grad.add(x));
                    for (acc, &offset) in acc.iter_mut().zip(offsets) {
                        *acc = simd.fma(g, simd.load(input.add(offset + x)), *acc);
                    }
                    x += lanes;
                }
                if x < ow {
                    let g = simd.load_first(grad.add(x), ow - x);
                    for (acc, &offset) in acc.iter_mut().zip(offsets) {
                        let v = simd.load_first(input.add(offset + x), ow - x);
                        *acc = simd.fma(g, v, *acc);
                    }
                }
            }
        }
        for (sum, acc) in self.sum[t..].iter_mut().zip(acc) {
            *sum += simd.sum(acc).to_f64();
        }
        J
    }
}

/// Pixels of a block of channels to write: rows and columns of them, so many elements apart.
pub struct Places<'a, T> {
    ptr: *mut T,
    steps: (usize, usize),
    pub(super) count: (usize, usize),
    pub(super) channels: usize,
    stream: bool,
    target: PhantomData<&'a mut [T]>,
}

impl<T> Places<'_, T> {
    /// # Safety
    /// `channels` elements at each place must be valid for writing, and nobody else's, as long as this
    /// lives.
    pub unsafe fn new(
        ptr: *mut T,
        steps: (usize, usize),
        count: (usize, usize),
        channels: usize,
    ) -> Self {
        Self { ptr, steps, count, channels, stream: false, target: PhantomData }
    }

    /// Past the caches, if `stream`, where vectors are whole lines.
    ///
    /// # Safety
    /// After the kernel, nobody may read them before this thread has called [`crate::simd::fence`], as
    /// [`crate::parallel::for_each`] does at the end.
    pub unsafe fn streamed(self, stream: bool) -> Self {
        Self { stream, ..self }
    }

    /// Whether vectors of all channels go past the caches.
    pub(super) fn streams(&self, lanes: usize) -> bool
    where
        T: Scalar,
    {
        let aligned = [self.ptr.addr() / size_of::<T>(), self.steps.0, self.steps.1, self.channels];
        self.stream
            && lanes == MAX_LANES
            && aligned.into_iter().all(|at| at.is_multiple_of(MAX_LANES))
    }

    /// The first channel of pixel (y, x).
    ///
    /// # Safety
    /// The pixel must be one of these.
    pub(super) unsafe fn at(&self, y: usize, x: usize) -> *mut T {
        // SAFETY: the caller's promise.
        unsafe { self.ptr.add(y * self.steps.0 + x * self.steps.1) }
    }
}

/// [`Forward`] of a block of as many channels as a vector has lanes, pixel by pixel: an element is a
/// vector, and nothing need be laid out anew for a stride.
pub struct BlockForward<'a, T> {
    pub input: &'a [T],
    /// Elements of input from one row of outputs to the next, and from one output to the next.
    pub steps: (usize, usize),
    /// Of each tap.
    pub offsets: &'a [usize],
    /// (taps, lanes)
    pub weight: &'a [T],
    /// (lanes)
    pub bias: &'a [T],
    pub out: Places<'a, T>,
}

impl<T: Scalar> Kernel<T> for BlockForward<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) {
        let (lanes, (rows, columns)) = (simd.lanes(), self.out.count);
        assert!(self.out.channels <= lanes && self.bias.len() == lanes);
        assert!(self.weight.len() == self.offsets.len() * lanes);
        assert!(self.input.len() >= block_extent(self.steps, self.out.count, self.offsets, lanes));
        for y in 0..rows {
            let mut x = 0;
            while x < columns {
                // SAFETY: pixels x..x + C of row y, inside by the assertions above.
                x += unsafe {
                    match columns - x {
                        8.. if const { S::TILE_VECTORS == 4 } => self.tile::<S, 8>(simd, y, x),
                        4.. => self.tile::<S, 4>(simd, y, x),
                        _ => self.tile::<S, 1>(simd, y, x),
                    }
                };
            }
        }
    }
}

/// The elements that all taps of so many outputs reach.
fn block_extent(
    steps: (usize, usize),
    (rows, columns): (usize, usize),
    offsets: &[usize],
    lanes: usize,
) -> usize {
    let reach = offsets.iter().max().map_or(0, |&offset| offset + lanes);
    (rows - 1) * steps.0 + (columns - 1) * steps.1 + reach
}

impl<T: Scalar> BlockForward<'_, T> {
    /// C pixels of row y. Returns C.
    ///
    /// # Safety
    /// What `run` asserts; the pixels must be inside.
    #[inline(always)]
    unsafe fn tile<S: Simd<T>, const C: usize>(&self, simd: S, y: usize, x: usize) -> usize {
        let (lanes, (row, column), out) = (simd.lanes(), self.steps, &self.out);
        // SAFETY: the caller's promise.
        unsafe {
            let mut acc = [simd.load(self.bias.as_ptr()); C];
            let input = self.input.as_ptr().add(y * row + x * column);
            for (tap, &offset) in self.offsets.iter().enumerate() {
                let w = simd.load(self.weight.as_ptr().add(tap * lanes));
                for (c, acc) in acc.iter_mut().enumerate() {
                    *acc = simd.fma(w, simd.load(input.add(offset + c * column)), *acc);
                }
            }
            for (c, &v) in acc.iter().enumerate() {
                let to = out.at(y, x + c);
                if out.channels == lanes {
                    simd.store(v, to);
                } else {
                    simd.store_first(v, to, out.channels);
                }
            }
        }
        C
    }
}

/// [`WeightGradient`] of a block, as in [`BlockForward`].
pub struct BlockWeightGradient<'a, T> {
    /// Rows and columns, contiguous.
    pub grad: &'a [T],
    pub count: (usize, usize),
    pub input: &'a [T],
    pub steps: (usize, usize),
    pub offsets: &'a [usize],
    /// (taps, lanes)
    pub sum: &'a mut [f64],
}

impl<T: Scalar> Kernel<T> for BlockWeightGradient<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(mut self, simd: S) {
        let (lanes, (rows, columns)) = (simd.lanes(), self.count);
        assert!(self.grad.len() >= extent(rows, columns * lanes, columns * lanes));
        assert!(self.input.len() >= block_extent(self.steps, self.count, self.offsets, lanes));
        assert!(self.sum.len() == self.offsets.len() * lanes);
        let height = (BLOCK / columns).max(1);
        for y in (0..rows).step_by(height) {
            let rows = (y, rows.min(y + height));
            let mut t = 0;
            while t < self.offsets.len() {
                // SAFETY: all pixels of these taps are in reach by the assertions above.
                t += unsafe {
                    match self.offsets.len() - t {
                        9.. if const { S::TILE_VECTORS == 4 } => self.taps::<S, 9>(simd, rows, t),
                        5.. => self.taps::<S, 5>(simd, rows, t),
                        3.. => self.taps::<S, 3>(simd, rows, t),
                        _ => self.taps::<S, 1>(simd, rows, t),
                    }
                };
            }
        }
    }
}

impl<T: Scalar> BlockWeightGradient<'_, T> {
    /// J taps from the one at `t` on, over some rows of the gradient. Returns J.
    ///
    /// # Safety
    /// What `run` asserts; there must be so many taps and rows.
    #[inline(always)]
    unsafe fn taps<S: Simd<T>, const J: usize>(
        &mut self,
        simd: S,
        (first, end): (usize, usize),
        t: usize,
    ) -> usize {
        let (lanes, (row, column), columns) = (simd.lanes(), self.steps, self.count.1);
        let mut acc = [simd.splat(T::ZERO); J];
        let mut list = [T::ZERO; MAX_LANES];
        // SAFETY: the caller's promise; a vector has no more lanes than `list`.
        unsafe {
            for y in first..end {
                let grad = self.grad.as_ptr().add(y * columns * lanes);
                let input = self.input.as_ptr().add(y * row);
                for x in 0..columns {
                    let g = simd.load(grad.add(x * lanes));
                    for (acc, &offset) in acc.iter_mut().zip(&self.offsets[t..t + J]) {
                        *acc = simd.fma(g, simd.load(input.add(offset + x * column)), *acc);
                    }
                }
            }
            for (sums, &acc) in self.sum[t * lanes..].chunks_exact_mut(lanes).zip(&acc) {
                simd.store(acc, list.as_mut_ptr());
                sums.iter_mut().zip(&list).for_each(|(sum, v)| *sum += v.to_f64());
            }
        }
        J
    }
}
