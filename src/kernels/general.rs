//! Depthwise convolution of any stride and dilation, as a list of taps: each an offset into the
//! input and a weight.
//!
//! The caller lays the input out such that neighbouring outputs read neighbouring elements whatever
//! the stride (see `ops::phases`); then any geometry, and any part of the transposed one, is the same
//! loop: every tap one unaligned vector load and one multiply-add per vector of outputs.

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
                        (4, ROWS..) => tile.run::<S, 4, ROWS>(simd),
                        (3, ROWS..) => tile.run::<S, 3, ROWS>(simd),
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
                    4 => row.run::<S, 4, 1>(simd),
                    3 => row.run::<S, 3, 1>(simd),
                    2 => row.run::<S, 2, 1>(simd),
                    _ => row.run::<S, 1, 1>(simd),
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
