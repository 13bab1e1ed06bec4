//! The pointwise passes of an xUnit: statistics, batch norm with ReLU, gate, and their gradients.
//!
//! Batch norm appears as the affine map that it is once its statistics are known; without batch norm the map is the identity, which changes no value.

use std::mem::replace;
use std::ops::Range;

use super::MAX_LANES;
use crate::simd::{Kernel, Scalar, Simd};

/// The gate function g.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// 1 / (1 + exp(−d))
    Sigmoid,
    /// exp(−d²)
    Gaussian,
}

impl Gate {
    #[inline(always)]
    pub(super) fn value<T: Scalar, S: Simd<T>>(self, simd: S, d: S::V) -> S::V {
        match self {
            Gate::Sigmoid => simd.sigmoid(d),
            Gate::Gaussian => simd.exp(simd.mul(simd.sub(simd.splat(T::ZERO), d), d)),
        }
    }

    /// dg/dd, given g.
    #[inline(always)]
    pub(super) fn slope<T: Scalar, S: Simd<T>>(self, simd: S, d: S::V, g: S::V) -> S::V {
        match self {
            Gate::Sigmoid => simd.mul(g, simd.sub(simd.splat(T::ONE), g)),
            Gate::Gaussian => simd.mul(g, simd.mul(simd.splat(T::from_f64(-2.0)), d)),
        }
    }
}

/// u = scale · (x − centre) + shift.
///
/// With the mean as centre, batch norm keeps its digits where the mean is far above the deviation:
/// scale · x and the shift of the plain form would cancel there.
#[derive(Clone, Copy, Debug)]
pub struct Affine<T> {
    pub centre: T,
    pub scale: T,
    pub shift: T,
}

impl<T: Scalar> Affine<T> {
    /// The map that changes no value.
    pub fn identity() -> Self {
        Self { centre: T::ZERO, scale: T::ONE, shift: T::ZERO }
    }

    #[inline(always)]
    fn centred<S: Simd<T>>(self, simd: S, x: S::V) -> S::V {
        simd.sub(x, simd.splat(self.centre))
    }

    #[inline(always)]
    pub(super) fn apply<S: Simd<T>>(self, simd: S, x: S::V) -> S::V {
        simd.fma(simd.splat(self.scale), self.centred(simd, x), simd.splat(self.shift))
    }
}

/// Vectors that are added up in lanes before the sum moves on to `f64`: a longer sum in `f32`
/// lanes would lose digits.
const BLOCK: usize = 32;

/// Elements from one that is read to the one that is asked for meanwhile, where tensors come from memory: the
/// processor itself asks ahead inside a page alone. A training step of an xUnit with batch norm takes 0.93 to
/// 0.98 of the time so (Xeon with 2 MiB of second-level cache; 2 KiB to 8 KiB are alike), and 0.97 of that at 40 × 40
/// where what is past the end of a plane is asked for in the next one.
const AHEAD: usize = 1024;

/// Calls `$body` for every vector of `$len` elements in order, with `$at` its first element and
/// `$n` the elements it holds; `$flush` after every [`BLOCK`] vectors and at the end.
macro_rules! each_vector {
    ($simd:ident, $len:expr, |$at:ident, $n:ident| $body:block, $flush:block) => {{
        let (len, lanes) = ($len, $simd.lanes());
        let whole = len - len % lanes;
        let mut $at = 0;
        while $at < whole {
            let end = whole.min($at + BLOCK * lanes);
            while $at < end {
                let $n = lanes;
                $body
                $at += lanes;
            }
            $flush
        }
        if $at < len {
            let $n = len - $at;
            $body
            $flush
        }
    }};
    ($simd:ident, $len:expr, |$at:ident, $n:ident| $body:block) => {
        each_vector!($simd, $len, |$at, $n| $body, {})
    };
}

/// The `n` elements of `slice` from `at` on, then zeros.
#[inline(always)]
fn load<T: Scalar, S: Simd<T>>(simd: S, slice: &[T], at: usize, n: usize) -> S::V {
    debug_assert!(at + n <= slice.len());
    // SAFETY: `each_vector` and [`Copying`] stay below the length that is asserted of every slice.
    unsafe {
        let ptr = slice.as_ptr().add(at);
        if n == simd.lanes() { simd.load(ptr) } else { simd.load_first(ptr, n) }
    }
}

/// Writes `n` elements of `slice` from `at` on.
#[inline(always)]
fn store<T: Scalar, S: Simd<T>>(simd: S, v: S::V, slice: &mut [T], at: usize, n: usize) {
    debug_assert!(at + n <= slice.len());
    // SAFETY: `each_vector` and [`Copying`] stay below the length that is asserted of every slice.
    unsafe {
        let ptr = slice.as_mut_ptr().add(at);
        if n == simd.lanes() { simd.store(v, ptr) } else { simd.store_first(v, ptr, n) }
    }
}

/// A slice to write, perhaps past the caches: see [`Simd::stream`].
pub struct Target<'a, T> {
    pub(super) slice: &'a mut [T],
    stream: bool,
}

impl<'a, T: Scalar> Target<'a, T> {
    pub fn new(slice: &'a mut [T]) -> Self {
        Self { slice, stream: false }
    }

    /// For a while.
    pub(crate) fn again(&mut self) -> Target<'_, T> {
        self.part(0..self.slice.len())
    }

    /// A part of it, for a while.
    pub(crate) fn part(&mut self, range: Range<usize>) -> Target<'_, T> {
        Target { slice: &mut self.slice[range], stream: self.stream }
    }

    /// Past the caches, if `stream`, where vectors are aligned.
    ///
    /// # Safety
    /// After the kernel, nobody may read it before this thread has called [`crate::simd::fence`], as
    /// [`crate::parallel::for_each`] does at the end.
    pub unsafe fn streamed(slice: &'a mut [T], stream: bool) -> Self {
        Self { slice, stream }
    }

    /// Whether whole vectors of it may be streamed.
    #[inline(always)]
    pub(super) fn streams<S: Simd<T>>(&self, simd: S) -> bool {
        self.stream && self.slice.as_ptr().addr().is_multiple_of(simd.lanes() * size_of::<T>())
    }
}

/// [`store`]; `stream` is what [`Target::streams`] says, and `at` a multiple of the lanes.
#[inline(always)]
fn put<T: Scalar, S: Simd<T>>(
    simd: S,
    v: S::V,
    target: &mut Target<'_, T>,
    at: usize,
    n: usize,
    stream: bool,
) {
    if stream && n == simd.lanes() {
        debug_assert!(at + n <= target.slice.len() && at.is_multiple_of(n));
        // SAFETY: as in `store`; aligned, as `streams` says.
        unsafe { simd.stream(v, target.slice.as_mut_ptr().add(at)) }
    } else {
        store(simd, v, target.slice, at, n);
    }
}

/// `v` with zeros from lane `n` on.
#[inline(always)]
fn keep<T: Scalar, S: Simd<T>>(simd: S, v: S::V, n: usize) -> S::V {
    if n == simd.lanes() { v } else { simd.keep(v, n) }
}

/// Σ (x − origin) and Σ (x − origin)²; an origin near the mean keeps the digits of the variance.
pub struct Sums<'a, T> {
    pub plane: &'a [T],
    pub origin: T,
}

impl<T: Scalar> Kernel<T> for Sums<'_, T> {
    type Output = (f64, f64);

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) -> (f64, f64) {
        let zero = simd.splat(T::ZERO);
        let origin = simd.splat(self.origin);
        let (mut first, mut second) = (0.0, 0.0);
        let (mut a, mut b) = (zero, zero);
        each_vector!(
            simd,
            self.plane.len(),
            |at, n| {
                let x = keep(simd, simd.sub(load(simd, self.plane, at, n), origin), n);
                a = simd.add(a, x);
                b = simd.fma(x, x, b);
            },
            {
                first += simd.sum(replace(&mut a, zero)).to_f64();
                second += simd.sum(replace(&mut b, zero)).to_f64();
            }
        );
        (first, second)
    }
}

/// Writes relu(scale · x + shift), or x as it is, into the middle of a padded plane.
pub struct Fill<'a, T> {
    pub plane: &'a [T],
    pub width: usize,
    /// `None` copies.
    pub relu_of: Option<Affine<T>>,
    pub padded: &'a mut [T],
    pub ld: usize,
    /// Where the plane's first element goes.
    pub origin: usize,
}

impl<T: Scalar> Kernel<T> for Fill<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) {
        let zero = simd.splat(T::ZERO);
        for (y, row) in self.plane.chunks_exact(self.width).enumerate() {
            let out = &mut self.padded[self.origin + y * self.ld..][..self.width];
            let Some(affine) = self.relu_of else {
                // Not `copy_from_slice`, whose call takes longer than to copy a short row.
                each_vector!(simd, row.len(), |at, n| {
                    store(simd, load(simd, row, at, n), out, at, n);
                });
                continue;
            };
            each_vector!(simd, row.len(), |at, n| {
                let u = affine.apply(simd, load(simd, row, at, n));
                store(simd, simd.select_le_zero(u, zero, u), out, at, n);
            });
        }
    }
}

/// out = x · g(scale · d + shift)
pub struct Apply<'a, T> {
    pub gate: Gate,
    pub x: &'a [T],
    pub d: &'a [T],
    pub affine: Affine<T>,
    pub out: Target<'a, T>,
}

impl<T: Scalar> Kernel<T> for Apply<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) {
        let Apply { gate, x, d, affine, mut out } = self;
        assert!(x.len() == d.len() && x.len() == out.slice.len());
        let stream = out.streams(simd);
        each_vector!(simd, x.len(), |at, n| {
            let g = gate.value(simd, affine.apply(simd, load(simd, d, at, n)));
            put(simd, simd.mul(load(simd, x, at, n), g), &mut out, at, n, stream);
        });
    }
}

/// Writes the gradient past the gate to x, grad · g(u), and the one at the gate's argument,
/// e = grad · x · g′(u), with u the affine map of d; returns Σ e and Σ e · (d − centre), of which
/// batch norm's gradients to its bias and weight are made.
pub struct GateGradient<'a, T> {
    pub gate: Gate,
    pub grad: &'a [T],
    pub x: &'a [T],
    pub d: &'a [T],
    pub affine: Affine<T>,
    /// `None`: not wanted.
    pub direct: Option<Target<'a, T>>,
    pub e: &'a mut [T],
    /// What will be read after grad, x and d, to ask for it towards their ends. They may point anywhere.
    pub next: [*const T; 3],
}

impl<T: Scalar> Kernel<T> for GateGradient<'_, T> {
    type Output = (f64, f64);

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) -> (f64, f64) {
        let GateGradient { gate, grad, x, d, affine, mut direct, e, next } = self;
        let direct_len = direct.as_ref().map_or(e.len(), |direct| direct.slice.len());
        let lens = [grad.len(), x.len(), d.len(), direct_len];
        assert!(lens.iter().all(|&len| len == e.len()));
        let stream = direct.as_ref().is_some_and(|direct| direct.streams(simd));
        let zero = simd.splat(T::ZERO);
        let (mut first, mut second) = (0.0, 0.0);
        let (mut a, mut b) = (zero, zero);
        each_vector!(
            simd,
            e.len(),
            |at, n| {
                for (tensor, next) in [grad, x, d].into_iter().zip(next) {
                    let ahead = at + AHEAD.min(e.len());
                    simd.prefetch(match ahead < e.len() {
                        true => tensor.as_ptr().wrapping_add(ahead),
                        false => next.wrapping_add(ahead - e.len()),
                    });
                }
                let d = load(simd, d, at, n);
                let u = affine.apply(simd, d);
                let value = gate.value(simd, u);
                let grad = load(simd, grad, at, n);
                if let Some(direct) = &mut direct {
                    put(simd, simd.mul(grad, value), direct, at, n, stream);
                }
                let slope = gate.slope(simd, u, value);
                let v = simd.mul(simd.mul(grad, load(simd, x, at, n)), slope);
                store(simd, v, e, at, n);
                // Lanes past the end hold no infinity to meet their zeros: grad and x are 0 there.
                a = simd.add(a, v);
                b = simd.fma(v, affine.centred(simd, d), b);
            },
            {
                first += simd.sum(replace(&mut a, zero)).to_f64();
                second += simd.sum(replace(&mut b, zero)).to_f64();
            }
        );
        (first, second)
    }
}

/// Moves what is in `out` to `moved` and writes the gradient past the gate there, grad · g(u), with u the affine
/// map of d.
pub struct PastGate<'a, T> {
    pub gate: Gate,
    pub grad: &'a [T],
    pub d: &'a [T],
    pub affine: Affine<T>,
    pub out: &'a mut [T],
    pub moved: &'a mut [T],
    /// Where the next call may read as much, of `grad`, `d` and `out`: asked for meanwhile. They may point anywhere.
    pub next: [*const T; 3],
}

impl<T: Scalar> Kernel<T> for PastGate<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) {
        let PastGate { gate, grad, d, affine, out, moved, next } = self;
        assert!([grad.len(), d.len(), moved.len()].iter().all(|&len| len == out.len()));
        each_vector!(simd, out.len(), |at, n| {
            for next in next {
                simd.prefetch(next.wrapping_add(at));
            }
            let value = gate.value(simd, affine.apply(simd, load(simd, d, at, n)));
            store(simd, load(simd, out, at, n), moved, at, n);
            store(simd, simd.mul(load(simd, grad, at, n), value), out, at, n);
        });
    }
}

/// Batch norm's gradient to its input: scale · e + slope · (x − centre) + shift, of which slope and
/// shift are zero outside training.
///
/// They are kept in two parts each: a sum of many such gradients may cancel down to the rounding of
/// its constants, as it does ahead of a 1×1 depthwise weight, which batch norm makes all but void.
#[derive(Clone, Copy, Debug)]
pub struct NormGradient<T> {
    pub(super) scale: T,
    pub(super) centre: T,
    /// Slope and shift.
    pub(super) batch: Option<[Parts<T>; 2]>,
}

/// A number as the sum of two, of which the first is the larger.
pub(super) type Parts<T> = (T, T);

impl<T: Scalar> NormGradient<T> {
    /// `batch` is (slope, shift) in training.
    pub fn new(affine: Affine<T>, batch: Option<(f64, f64)>) -> Self {
        let parts = |x: f64| {
            let first = T::from_f64(x);
            let rest = x - first.to_f64();
            (first, T::from_f64(if rest.is_finite() { rest } else { 0.0 }))
        };
        let batch = batch.map(|(slope, shift)| [parts(slope), parts(shift)]);
        Self { scale: affine.scale, centre: affine.centre, batch }
    }

    #[inline(always)]
    fn apply<S: Simd<T>>(self, simd: S, e: S::V, x: S::V) -> S::V {
        let scale = simd.splat(self.scale);
        let Some([slope, shift]) = self.batch else {
            return simd.mul(e, scale);
        };
        let centred = simd.sub(x, simd.splat(self.centre));
        let large = simd.fma(centred, simd.splat(slope.0), simd.splat(shift.0));
        // Last, where rounding favours no side: beside a constant alone it would vanish every time.
        let small = simd.fma(centred, simd.splat(slope.1), simd.splat(shift.1));
        simd.add(simd.fma(e, scale, large), small)
    }
}

/// Writes the [`NormGradient`] of `grad` at `d` into the middle of a padded plane; returns its sum.
pub struct FillGradient<'a, T> {
    pub norm: NormGradient<T>,
    pub grad: &'a [T],
    pub d: &'a [T],
    pub width: usize,
    pub padded: &'a mut [T],
    pub ld: usize,
    pub origin: usize,
}

impl<T: Scalar> Kernel<T> for FillGradient<'_, T> {
    type Output = f64;

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) -> f64 {
        assert!(self.grad.len() == self.d.len());
        let zero = simd.splat(T::ZERO);
        let rows = self.grad.chunks_exact(self.width).zip(self.d.chunks_exact(self.width));
        // Short rows are added up together: a row ends with one flush, or two if its last vector is partial.
        let flushes = if self.width.is_multiple_of(simd.lanes()) { 1 } else { 2 };
        let together = flushes * (BLOCK / self.width.div_ceil(simd.lanes()).clamp(1, BLOCK));
        let (mut sum, mut a, mut added) = (0.0, zero, 0);
        for (y, (grad, d)) in rows.enumerate() {
            let out = &mut self.padded[self.origin + y * self.ld..][..self.width];
            each_vector!(
                simd,
                grad.len(),
                |at, n| {
                    simd.prefetch(d.as_ptr().wrapping_add(at + AHEAD));
                    let (e, d) = (load(simd, grad, at, n), load(simd, d, at, n));
                    let v = self.norm.apply(simd, e, d);
                    store(simd, v, out, at, n);
                    a = simd.add(a, keep(simd, v, n));
                },
                {
                    added += 1;
                    if added == together {
                        sum += simd.sum(replace(&mut a, zero)).to_f64();
                        added = 0;
                    }
                }
            );
        }
        sum + simd.sum(a).to_f64()
    }
}

/// Masks `grad` in place where relu(u) is flat, u the affine map of x, and returns Σ grad and
/// Σ grad · (x − centre).
pub struct ReluGradient<'a, T> {
    pub x: &'a [T],
    pub affine: Affine<T>,
    pub grad: &'a mut [T],
}

impl<T: Scalar> Kernel<T> for ReluGradient<'_, T> {
    type Output = (f64, f64);

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) -> (f64, f64) {
        let ReluGradient { x, affine, grad } = self;
        assert!(x.len() == grad.len());
        let zero = simd.splat(T::ZERO);
        let (mut first, mut second) = (0.0, 0.0);
        let (mut a, mut b) = (zero, zero);
        each_vector!(
            simd,
            x.len(),
            |at, n| {
                let x = load(simd, x, at, n);
                let e = load(simd, grad, at, n);
                let e = simd.select_le_zero(affine.apply(simd, x), zero, e);
                store(simd, e, grad, at, n);
                a = simd.add(a, e);
                b = simd.fma(e, affine.centred(simd, x), b);
            },
            {
                first += simd.sum(replace(&mut a, zero)).to_f64();
                second += simd.sum(replace(&mut b, zero)).to_f64();
            }
        );
        (first, second)
    }
}

/// Writes the [`NormGradient`] of `grad` at `x`, plus `direct` if there is such; returns the sum of the
/// former.
pub struct Finish<'a, T> {
    pub norm: NormGradient<T>,
    /// `None`: it is in `out`.
    pub x: Option<&'a [T]>,
    pub grad: &'a [T],
    pub direct: Option<&'a [T]>,
    pub out: Target<'a, T>,
}

impl<T: Scalar> Kernel<T> for Finish<'_, T> {
    type Output = f64;

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) -> f64 {
        let Finish { norm, x, grad, direct, mut out } = self;
        let len = out.slice.len();
        assert!(grad.len() == len);
        assert!([x, direct].iter().flatten().all(|slice| slice.len() == len));
        let stream = out.streams(simd);
        let zero = simd.splat(T::ZERO);
        let (mut sum, mut a) = (0.0, zero);
        each_vector!(
            simd,
            len,
            |at, n| {
                let x = load(simd, x.unwrap_or(out.slice), at, n);
                let v = norm.apply(simd, load(simd, grad, at, n), x);
                a = simd.add(a, keep(simd, v, n));
                let whole = match direct {
                    Some(direct) => simd.add(v, load(simd, direct, at, n)),
                    None => v,
                };
                put(simd, whole, &mut out, at, n, stream);
            },
            {
                sum += simd.sum(replace(&mut a, zero)).to_f64();
            }
        );
        sum
    }
}

/// Copies to where it is not read again soon.
pub struct CopyOut<'a, T> {
    pub from: &'a [T],
    pub to: Target<'a, T>,
}

impl<T: Scalar> Default for CopyOut<'_, T> {
    fn default() -> Self {
        Self { from: &[], to: Target::new(&mut []) }
    }
}

/// A [`CopyOut`] that is made bit by bit, while something else is computed.
pub(super) struct Copying<'a, T> {
    copy: CopyOut<'a, T>,
    stream: bool,
    /// Elements that are copied, and that are copied in a part.
    done: usize,
    part: usize,
}

impl<'a, T: Scalar> Copying<'a, T> {
    /// In about so many parts, of whole lines.
    #[inline(always)]
    pub(super) fn new<S: Simd<T>>(simd: S, copy: CopyOut<'a, T>, parts: usize) -> Self {
        assert!(copy.from.len() == copy.to.slice.len());
        let part = copy.from.len().div_ceil(MAX_LANES).div_ceil(parts.max(1)) * MAX_LANES;
        Self { stream: copy.to.streams(simd), copy, done: 0, part }
    }

    /// Makes that many parts, but for the last elements, which are no whole vector.
    #[inline(always)]
    pub(super) fn make<S: Simd<T>>(&mut self, simd: S, parts: usize) {
        self.up_to(simd, self.copy.from.len().min(self.done + parts * self.part));
    }

    /// Makes what is left.
    #[inline(always)]
    pub(super) fn finish<S: Simd<T>>(mut self, simd: S) {
        self.up_to(simd, self.copy.from.len());
        let Self { copy: CopyOut { from, mut to }, done, .. } = self;
        if done < from.len() {
            let rest = from.len() - done;
            put(simd, load(simd, from, done, rest), &mut to, done, rest, false);
        }
    }

    /// Copies whole vectors up to element `end`, of those that there are.
    #[inline(always)]
    fn up_to<S: Simd<T>>(&mut self, simd: S, end: usize) {
        let (Self { copy: CopyOut { from, to }, stream, done, .. }, lanes) = (self, simd.lanes());
        while *done + lanes <= end {
            put(simd, load(simd, from, *done, lanes), to, *done, lanes, *stream);
            *done += lanes;
        }
    }
}

impl<T: Scalar> Kernel<T> for CopyOut<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) {
        Copying::new(simd, self, 1).finish(simd);
    }
}
