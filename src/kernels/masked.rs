//! Depthwise convolution of 3 × 3 and 5 × 5 taps on planes as they are in memory: rows of padding are left out, and
//! columns of it are masked. To pad a plane takes 6 to 7 cycles a vector, as long as half the multiply-adds of 5 × 5
//! taps. Time over that with padded planes (Xeon, one thread, 64 × 64 to 256 × 256): 0.77 to 0.93 of the forward pass,
//! 0.8 to 0.96 of the input gradient.
//!
//! Strips as in [`conv`], but the columns of taps are unrolled, so that masks stay in registers. Such code for 7 × 7
//! taps spills (35 cycles a vector, for 28 of padded planes), and to a loop masks cost 3 cycles, which leaves little
//! to gain.

use std::hint::black_box;

use super::MAX_LANES;
use super::activation::{CopyOut, Target};
use super::conv::{self, Meanwhile, Next, Taps};
use crate::simd::{Kernel, Scalar, Simd};

/// out\[y\]\[x\] = bias + Σ weight\[i\]\[j\] · input\[y + i − top\]\[x + j − left\], one plane, zero around it.
///
/// Only where [`Taps::pads`] says so.
pub struct Forward<'a, T> {
    /// [`input_len`] elements: rows without padding, one after the other.
    pub input: &'a [T],
    /// Top, bottom, left, right.
    pub padding: [usize; 4],
    pub taps: &'a Taps<T>,
    pub bias: T,
    /// oh × ow, contiguous; every element is written; past the caches, if it may, where [`Taps::streams`] says so.
    pub out: Target<'a, T>,
    pub ow: usize,
    /// As of [`conv::Forward`].
    pub next: Next<T>,
    pub copy: CopyOut<'a, T>,
}

/// The elements from the first of `rows` rows of inputs to the last that a vector may touch, which is beyond the
/// last row where `ow` outputs of a row are not whole vectors.
pub fn input_len(rows: usize, ow: usize, k: usize, padding: [usize; 4]) -> usize {
    let [.., left, right] = padding;
    (rows - 1) * (ow + k - 1 - left - right) + conv::row_length(ow, k) - left - right
}

impl<T: Scalar> Kernel<T> for Forward<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) {
        if const { S::MASKED_LOADS } {
            let streams = self.ow.is_multiple_of(simd.lanes()) && self.out.streams(simd);
            macro_rules! square {
                ($($k:literal)+) => {
                    match (self.taps.rows(), streams, self.copy.from.is_empty()) {
                        $(($k, true, _) => simd.apart(Square::<T, $k, true, false>(self)),
                        ($k, false, true) => simd.apart(Square::<T, $k, false, false>(self)),
                        ($k, false, false) => simd.apart(Square::<T, $k, false, true>(self)),)+
                        (rows, ..) => panic!("{rows} rows of taps"),
                    }
                };
            }
            // As `Taps::pads` says.
            square!(3 5);
        } else {
            panic!("no masks");
        }
    }
}

/// [`Forward`] of K × K taps.
struct Square<'a, T, const K: usize, const STREAM: bool, const COPY: bool>(Forward<'a, T>);

impl<T: Scalar, const K: usize, const STREAM: bool, const COPY: bool> Kernel<T>
    for Square<'_, T, K, STREAM, COPY>
{
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) {
        self.0.strips::<S, K, STREAM, COPY>(simd);
    }
}

impl<T: Scalar> Forward<'_, T> {
    #[inline(always)]
    fn strips<S: Simd<T>, const K: usize, const STREAM: bool, const COPY: bool>(self, simd: S) {
        const WIDEST: usize = 4;
        let Self { input, padding, taps, bias, out, ow, next, copy } = self;
        let ([top, bottom, left, right], lanes) = (padding, simd.lanes());
        let oh = out.slice.len() / ow;
        let rows = oh + K - 1 - top - bottom;
        assert!(lanes == MAX_LANES && taps.pads(oh, ow, padding) && oh * ow == out.slice.len());
        assert!(input.len() >= input_len(rows, ow, K, padding));
        let vectors = ow.div_ceil(lanes);
        let count = vectors.div_ceil(WIDEST);
        let mut meanwhile = Meanwhile::new(simd, next, copy, count * (oh + 1 - K));
        for x in (0..vectors).step_by(WIDEST).map(|vector| vector * lanes) {
            let wide = WIDEST.min(vectors - x / lanes);
            let end = x + wide * lanes;
            // SAFETY: the strip reads columns x − left.. up to end + K − 1 − left of `rows` rows but for those that are
            // masked, of the last row as far as `input_len` says, and writes columns x..end that are below ow: inside
            // the slices. What is streamed are whole vectors, aligned as `streams` asserts.
            unsafe {
                let strip = Strip::<T, K> {
                    input: input.as_ptr().wrapping_add(x).wrapping_sub(left),
                    ld: ow + K - 1 - left - right,
                    taps: taps.square::<K>().as_ptr(),
                    bias,
                    out: out.slice.as_mut_ptr().add(x),
                    ow,
                    oh,
                    last: lanes - end.saturating_sub(ow),
                    // The same for all strips, which the compiler would make code for.
                    top: black_box(top),
                    bottom: black_box(bottom),
                    left: if x == 0 { left } else { 0 },
                    right: if end >= ow { right } else { 0 },
                };
                match wide {
                    4 => strip.run::<S, 4, STREAM, COPY>(simd, &mut meanwhile),
                    3 => strip.run::<S, 3, STREAM, COPY>(simd, &mut meanwhile),
                    2 => strip.run::<S, 2, STREAM, COPY>(simd, &mut meanwhile),
                    _ => strip.run::<S, 1, STREAM, COPY>(simd, &mut meanwhile),
                }
            }
        }
        meanwhile.finish(simd);
    }
}

/// A strip of vectors.
struct Strip<T, const K: usize> {
    /// Where the first column of taps meets the first row: before the row, if that begins with padding.
    input: *const T,
    ld: usize,
    /// Column by column.
    taps: *const T,
    bias: T,
    out: *mut T,
    ow: usize,
    oh: usize,
    /// Outputs of the last vector of a row.
    last: usize,
    /// Rows and columns of padding of the strip.
    top: usize,
    bottom: usize,
    left: usize,
    right: usize,
}

impl<T: Scalar, const K: usize> Strip<T, K> {
    /// All rows of C vectors, as `conv`'s strips; rows of padding add nothing.
    ///
    /// # Safety
    /// Inputs, taps and outputs must be in reach, as [`Forward::strips`] says, which are K − 1 rows or more. STREAM
    /// takes rows of whole aligned vectors, which nobody may read before this thread's fence.
    #[inline(always)]
    unsafe fn run<S: Simd<T>, const C: usize, const STREAM: bool, const COPY: bool>(
        &self,
        simd: S,
        meanwhile: &mut Meanwhile<'_, T>,
    ) {
        let bias = simd.splat(self.bias);
        // Of the output row whose next row of taps is i.
        let mut acc = [[bias; C]; K];
        let (mut input, mut out) = (self.input, self.out);
        macro_rules! row {
            ($low:expr, $high:expr, $inside:expr) => {
                if $inside {
                    acc = self.taps::<S, C>(simd, acc, input, $low, $high);
                    input = input.wrapping_add(self.ld);
                }
                if $high == K {
                    for (c, &sum) in acc[K - 1].iter().enumerate() {
                        let out = out.add(c * simd.lanes());
                        match STREAM {
                            true => simd.stream(sum, out),
                            false if c == C - 1 => simd.store_first(sum, out, self.last),
                            false => simd.store(sum, out),
                        }
                    }
                    out = out.wrapping_add(self.ow);
                }
                for i in (1..K).rev() {
                    acc[i] = acc[i - 1];
                }
                acc[0] = [bias; C];
            };
        }
        macro_rules! rows {
            (above $($n:literal)+) => { $(if K > $n { row!(0, $n, $n > self.top); })+ };
            (below $($n:literal)+) => { $(if K > $n { row!($n, K, $n + self.bottom < K); })+ };
        }
        // SAFETY: the caller's promise.
        unsafe {
            rows!(above 1 2 3 4);
            for _ in K - 1..self.oh {
                meanwhile.ask(simd);
                if COPY {
                    meanwhile.copy(simd);
                }
                row!(0, K, true);
            }
            rows!(below 1 2 3 4);
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
        macro_rules! columns {
            ($($j:literal)+) => {$(
                let j = $j;
                if j < K {
                    // Columns of padding are at most K / 2 on either side.
                    let (first, end) = (
                        self.left.saturating_sub(j),
                        (self.last + K - 1 - self.right - j).min(simd.lanes()),
                    );
                    let mut v = [simd.splat(T::ZERO); C];
                    for (c, v) in v.iter_mut().enumerate() {
                        let input = input.wrapping_add(j + c * simd.lanes());
                        *v = if c == 0 && j < K / 2 {
                            simd.load_range(input, first, simd.lanes())
                        } else if c == C - 1 && j > K / 2 {
                            simd.load_range(input, 0, end)
                        } else {
                            simd.load(input)
                        };
                    }
                    for (i, acc) in acc.iter_mut().enumerate() {
                        if i < low || i >= high {
                            continue;
                        }
                        let w = simd.splat(*self.taps.add(j * K + i));
                        for (acc, &v) in acc.iter_mut().zip(&v) {
                            *acc = simd.fma(w, v, *acc);
                        }
                    }
                }
            )+};
        }
        // SAFETY: the caller's promise.
        unsafe {
            columns!(0 1 2 3 4);
        }
        acc
    }
}
