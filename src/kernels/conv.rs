//! Register-tiled depthwise convolution with stride and dilation 1, and its weight gradient.
//!
//! Both read a zero-padded plane of rows `ld` apart ([`row_stride`]), so that no tap needs a border
//! check. The forward tile keeps 4 rows × TILE_VECTORS vectors of outputs in registers and slides
//! down the input: a loaded vector feeds up to four output rows, a broadcast tap all vectors of a
//! row. The input gradient is the same convolution with the taps turned by 180°.

use super::MAX_LANES;
use crate::simd::{Kernel, Scalar, Simd};

/// Elements from one row of a padded plane to the next: `ow` outputs rounded up to whole vectors,
/// and the taps beyond the last one.
pub fn row_stride(ow: usize, kw: usize) -> usize {
    ow.next_multiple_of(MAX_LANES) + kw - 1
}

/// out\[y\]\[x\] = bias + Σ weight\[i\]\[j\] · input\[y + i\]\[x + j\], one plane.
pub struct Forward<'a, T> {
    /// (oh + kh − 1) rows of [`row_stride`] elements.
    pub input: &'a [T],
    /// kh × kw taps.
    pub weight: &'a [T],
    pub bias: T,
    /// oh × ow, contiguous; every element is written.
    pub out: &'a mut [T],
    pub kernel: (usize, usize),
    pub ow: usize,
}

impl<T: Scalar> Kernel<T> for Forward<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) {
        match self.kernel {
            (3, 3) => forward::<T, S, 3>(simd, self),
            (5, 5) => forward::<T, S, 5>(simd, self),
            (7, 7) => forward::<T, S, 7>(simd, self),
            (9, 9) => forward::<T, S, 9>(simd, self),
            _ => forward::<T, S, 0>(simd, self),
        }
    }
}

/// Rows of the register tile.
const ROWS: usize = 4;

/// K is the compile-time kernel extent, 0 where only run time knows it.
#[inline(always)]
fn forward<T: Scalar, S: Simd<T>, const K: usize>(simd: S, job: Forward<'_, T>) {
    let (kh, kw) = if K == 0 { job.kernel } else { (K, K) };
    let (ow, oh) = (job.ow, job.out.len() / job.ow);
    let ld = row_stride(ow, kw);
    assert!(job.input.len() >= (oh + kh - 1) * ld && job.weight.len() == kh * kw);
    assert!(job.out.len() == oh * ow);
    let lanes = simd.lanes();
    let mut y = 0;
    while y < oh {
        // The four-row tile ramps in and out over three rows, which takes three rows of taps.
        let tall = oh - y >= ROWS && kh >= ROWS - 1;
        let mut x = 0;
        while x < ow {
            let wide = if S::TILE_VECTORS == 4 && ow - x >= 4 * lanes {
                4
            } else if ow - x >= 2 * lanes {
                2
            } else {
                1
            };
            let first = (ow - x).min(lanes);
            // SAFETY: the tile reads rows y..y + rows + kh − 1 < oh + kh and columns up to
            // x + wide · lanes + kw − 1 ≤ ld, and writes rows y..y + rows ≤ oh at columns
            // x..x + wide · lanes ≤ ow (only `first` of them if wide is 1): inside the slices by
            // the assertions above.
            unsafe {
                let tile = Tile::<T, K> {
                    input: job.input.as_ptr().add(y * ld + x),
                    ld,
                    weight: job.weight.as_ptr(),
                    bias: job.bias,
                    out: job.out.as_mut_ptr().add(y * ow + x),
                    ow,
                    kh,
                    kw,
                    first,
                };
                match (tall, wide) {
                    (true, 4) => tile.tall::<S, 4>(simd),
                    (true, 2) => tile.tall::<S, 2>(simd),
                    (true, _) => tile.tall::<S, 1>(simd),
                    (false, 4) => tile.single::<S, 4>(simd),
                    (false, 2) => tile.single::<S, 2>(simd),
                    (false, _) => tile.single::<S, 1>(simd),
                }
            }
            x += wide * lanes;
        }
        y += if tall { ROWS } else { 1 };
    }
}

/// One register tile; K as in [`forward`].
struct Tile<T, const K: usize> {
    input: *const T,
    ld: usize,
    weight: *const T,
    bias: T,
    out: *mut T,
    ow: usize,
    kh: usize,
    kw: usize,
    /// Outputs of the last vector of a row: fewer than a vector only if the tile is one wide.
    first: usize,
}

impl<T: Scalar, const K: usize> Tile<T, K> {
    /// One input row: feeds output rows LOW..HIGH of the tile.
    #[inline(always)]
    unsafe fn taps<S: Simd<T>, const C: usize, const LOW: usize, const HIGH: usize>(
        &self,
        simd: S,
        acc: &mut [[S::V; C]; ROWS],
        row: usize,
    ) {
        let kw = if K == 0 { self.kw } else { K };
        for j in 0..kw {
            // SAFETY: `forward` proves that every row and column of the tile is readable; `row - r`
            // is a row of taps by the ranges that `tall` and `single` walk.
            unsafe {
                let input = self.input.add(row * self.ld + j);
                let mut v = [simd.splat(T::ZERO); C];
                for (c, v) in v.iter_mut().enumerate() {
                    *v = simd.load(input.add(c * simd.lanes()));
                }
                for (r, acc) in acc.iter_mut().enumerate().take(HIGH).skip(LOW) {
                    let w = simd.splat(*self.weight.add((row - r) * kw + j));
                    for (acc, &v) in acc.iter_mut().zip(&v) {
                        *acc = simd.fma(w, v, *acc);
                    }
                }
            }
        }
    }

    /// Writes rows 0..rows of the accumulators.
    #[inline(always)]
    unsafe fn store<S: Simd<T>, const C: usize>(
        &self,
        simd: S,
        acc: &[[S::V; C]; ROWS],
        rows: usize,
    ) {
        for (r, acc) in acc.iter().enumerate().take(rows) {
            for (c, &v) in acc.iter().enumerate() {
                // SAFETY: `forward` proves that the tile's outputs are writable.
                unsafe {
                    let out = self.out.add(r * self.ow + c * simd.lanes());
                    if C == 1 {
                        simd.store_first(v, out, self.first);
                    } else {
                        simd.store(v, out);
                    }
                }
            }
        }
    }

    /// Four rows; kh ≥ 3.
    #[inline(always)]
    unsafe fn tall<S: Simd<T>, const C: usize>(&self, simd: S) {
        let kh = if K == 0 { self.kh } else { K };
        let mut acc = [[simd.splat(self.bias); C]; ROWS];
        // SAFETY: rows 0..kh + 3, and `row - r` < kh, as `forward` asks.
        unsafe {
            self.taps::<S, C, 0, 1>(simd, &mut acc, 0);
            self.taps::<S, C, 0, 2>(simd, &mut acc, 1);
            self.taps::<S, C, 0, 3>(simd, &mut acc, 2);
            for row in 3..kh {
                self.taps::<S, C, 0, 4>(simd, &mut acc, row);
            }
            self.taps::<S, C, 1, 4>(simd, &mut acc, kh);
            self.taps::<S, C, 2, 4>(simd, &mut acc, kh + 1);
            self.taps::<S, C, 3, 4>(simd, &mut acc, kh + 2);
            self.store(simd, &acc, ROWS);
        }
    }

    /// One row: what is left at the bottom, and kernels of one or two rows.
    #[inline(always)]
    unsafe fn single<S: Simd<T>, const C: usize>(&self, simd: S) {
        let kh = if K == 0 { self.kh } else { K };
        let mut acc = [[simd.splat(self.bias); C]; ROWS];
        // SAFETY: rows 0..kh, as `forward` asks.
        unsafe {
            for row in 0..kh {
                self.taps::<S, C, 0, 1>(simd, &mut acc, row);
            }
            self.store(simd, &acc, 1);
        }
    }
}

/// sum\[i\]\[j\] += Σ grad\[y\]\[x\] · input\[y + i\]\[x + j\], one plane.
///
/// The taps of a row share each loaded gradient and keep an accumulator each; two rows of taps run
/// together for enough independent chains. Lanes are added up every [`ROW_BLOCK`] rows, in `f64`:
/// a long sum in `f32` lanes would lose digits.
pub struct WeightGradient<'a, T> {
    /// oh rows, `grad_ld` apart.
    pub grad: &'a [T],
    pub grad_ld: usize,
    /// (oh + kh − 1) rows of [`row_stride`] elements.
    pub input: &'a [T],
    pub sum: &'a mut [f64],
    pub kernel: (usize, usize),
    pub out: (usize, usize),
}

/// Rows of gradient that stay in the first-level cache while every tap row passes over them.
const ROW_BLOCK: usize = 16;

impl<T: Scalar> Kernel<T> for WeightGradient<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(mut self, simd: S) {
        let ((kh, kw), (oh, ow)) = (self.kernel, self.out);
        let ld = row_stride(ow, kw);
        assert!(self.input.len() >= (oh + kh - 1) * ld && self.sum.len() == kh * kw);
        assert!(oh > 0 && self.grad_ld >= ow && self.grad.len() >= (oh - 1) * self.grad_ld + ow);
        for y in (0..oh).step_by(ROW_BLOCK) {
            let rows = y..oh.min(y + ROW_BLOCK);
            let mut i = 0;
            while i < kh {
                let two = kh - i >= 2;
                // SAFETY: rows of `rows` + taps ≤ oh + kh − 1 and columns ≤ ow + kw − 1 are inside
                // the slices by the assertions above.
                unsafe {
                    match (kw, two) {
                        (3, true) => self.taps::<S, 3, 2>(simd, rows.clone(), i, 0, ld),
                        (3, false) => self.taps::<S, 3, 1>(simd, rows.clone(), i, 0, ld),
                        (5, true) => self.taps::<S, 5, 2>(simd, rows.clone(), i, 0, ld),
                        (5, false) => self.taps::<S, 5, 1>(simd, rows.clone(), i, 0, ld),
                        (7, true) => self.taps::<S, 7, 2>(simd, rows.clone(), i, 0, ld),
                        (7, false) => self.taps::<S, 7, 1>(simd, rows.clone(), i, 0, ld),
                        (9, _) => {
                            self.taps::<S, 9, 1>(simd, rows.clone(), i, 0, ld);
                            if two {
                                self.taps::<S, 9, 1>(simd, rows.clone(), i + 1, 0, ld);
                            }
                        }
                        _ => {
                            for i in i..i + 1 + usize::from(two) {
                                let mut j = 0;
                                while j + 4 <= kw {
                                    self.taps::<S, 4, 1>(simd, rows.clone(), i, j, ld);
                                    j += 4;
                                }
                                while j < kw {
                                    self.taps::<S, 1, 1>(simd, rows.clone(), i, j, ld);
                                    j += 1;
                                }
                            }
                        }
                    }
                }
                i += 1 + usize::from(two);
            }
        }
    }
}

impl<T: Scalar> WeightGradient<'_, T> {
    /// Taps (i..i + I, j..j + J) over `rows` of the gradient.
    #[inline(always)]
    unsafe fn taps<S: Simd<T>, const J: usize, const I: usize>(
        &mut self,
        simd: S,
        rows: std::ops::Range<usize>,
        i: usize,
        j: usize,
        ld: usize,
    ) {
        let (ow, lanes) = (self.out.1, simd.lanes());
        let mut acc = [[simd.splat(T::ZERO); J]; I];
        for y in rows {
            // SAFETY: `run` proves the rows and columns; a partial vector reads only its elements,
            // so that an infinity beyond the row cannot meet a zero gradient.
            unsafe {
                let grad = self.grad.as_ptr().add(y * self.grad_ld);
                let input = self.input.as_ptr().add((y + i) * ld + j);
                let mut x = 0;
                while x + lanes <= ow {
                    let g = simd.load(grad.add(x));
                    for (r, acc) in acc.iter_mut().enumerate() {
                        for (c, acc) in acc.iter_mut().enumerate() {
                            *acc = simd.fma(g, simd.load(input.add(r * ld + x + c)), *acc);
                        }
                    }
                    x += lanes;
                }
                if x < ow {
                    let g = simd.load_first(grad.add(x), ow - x);
                    for (r, acc) in acc.iter_mut().enumerate() {
                        for (c, acc) in acc.iter_mut().enumerate() {
                            let v = simd.load_first(input.add(r * ld + x + c), ow - x);
                            *acc = simd.fma(g, v, *acc);
                        }
                    }
                }
            }
        }
        for (r, acc) in acc.iter().enumerate() {
            for (c, &acc) in acc.iter().enumerate() {
                self.sum[(i + r) * self.kernel.1 + j + c] += simd.sum(acc).to_f64();
            }
        }
    }
}
