//! The pointwise passes of an xUnit: statistics, batch norm with ReLU, gate, and their gradients.
//!
//! Batch norm appears as the affine map u = scale · x + shift that it is once its statistics are
//! known; without batch norm the map is the identity, which changes no value.

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
    fn value<T: Scalar, S: Simd<T>>(self, simd: S, d: S::V) -> S::V {
        match self {
            Gate::Sigmoid => simd.sigmoid(d),
            Gate::Gaussian => simd.exp(simd.mul(simd.sub(simd.splat(T::ZERO), d), d)),
        }
    }

    /// dg/dd, given g.
    #[inline(always)]
    fn slope<T: Scalar, S: Simd<T>>(self, simd: S, d: S::V, g: S::V) -> S::V {
        match self {
            Gate::Sigmoid => simd.mul(g, simd.sub(simd.splat(T::ONE), g)),
            Gate::Gaussian => simd.mul(g, simd.mul(simd.splat(T::from_f64(-2.0)), d)),
        }
    }
}

/// u = scale · x + shift.
#[derive(Clone, Copy, Debug)]
pub struct Affine<T> {
    pub scale: T,
    pub shift: T,
}

impl<T: Scalar> Affine<T> {
    #[inline(always)]
    fn apply<S: Simd<T>>(self, simd: S, x: S::V) -> S::V {
        simd.fma(simd.splat(self.scale), x, simd.splat(self.shift))
    }
}

/// The mean and 1 / √(var + ε) of one channel, as batch norm uses them.
#[derive(Clone, Copy, Debug)]
pub struct Moments<T> {
    pub mean: T,
    pub inv_std: T,
}

impl<T: Scalar> Moments<T> {
    #[inline(always)]
    fn normalise<S: Simd<T>>(self, simd: S, x: S::V) -> S::V {
        simd.mul(simd.sub(x, simd.splat(self.mean)), simd.splat(self.inv_std))
    }
}

/// Vectors that are added up in lanes before the sum moves on to `f64`: a longer sum in `f32`
/// lanes would lose digits.
const BLOCK: usize = 32;

/// Calls `$body` for every vector of `$len` elements in order, with `$at` its first element and
/// `$n` the elements it holds; `$flush` after every [`BLOCK`] vectors and at the end.
macro_rules! each_vector {
    ($simd:ident, $len:expr, |$at:ident, $n:ident| $body:block, $flush:block) => {{
        let (len, lanes) = ($len, $simd.lanes());
        let mut $at = 0;
        while $at < len {
            let end = len.min($at + BLOCK * lanes);
            while $at < end {
                let $n = (end - $at).min(lanes);
                $body
                $at += $n;
            }
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
    // SAFETY: `each_vector` stays below the length that `run` asserts of every slice.
    unsafe {
        let ptr = slice.as_ptr().add(at);
        if n == simd.lanes() { simd.load(ptr) } else { simd.load_first(ptr, n) }
    }
}

/// Writes `n` elements of `slice` from `at` on.
#[inline(always)]
fn store<T: Scalar, S: Simd<T>>(simd: S, v: S::V, slice: &mut [T], at: usize, n: usize) {
    debug_assert!(at + n <= slice.len());
    // SAFETY: `each_vector` stays below the length that `run` asserts of every slice.
    unsafe {
        let ptr = slice.as_mut_ptr().add(at);
        if n == simd.lanes() { simd.store(v, ptr) } else { simd.store_first(v, ptr, n) }
    }
}

/// `v` with zeros from lane `n` on.
#[inline(always)]
fn keep<T: Scalar, S: Simd<T>>(simd: S, v: S::V, n: usize) -> S::V {
    if n == simd.lanes() {
        return v;
    }
    let mut lanes = [T::ZERO; super::MAX_LANES];
    // SAFETY: no vector has more than MAX_LANES lanes.
    unsafe {
        simd.store(v, lanes.as_mut_ptr());
        simd.load_first(lanes.as_ptr(), n)
    }
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
                first += simd.sum(a).to_f64();
                second += simd.sum(b).to_f64();
                (a, b) = (zero, zero);
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
                out.copy_from_slice(row);
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
    pub out: &'a mut [T],
}

impl<T: Scalar> Kernel<T> for Apply<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) {
        let Apply { gate, x, d, affine, out } = self;
        assert!(x.len() == d.len() && x.len() == out.len());
        each_vector!(simd, x.len(), |at, n| {
            let g = gate.value(simd, affine.apply(simd, load(simd, d, at, n)));
            store(simd, simd.mul(load(simd, x, at, n), g), out, at, n);
        });
    }
}

/// Writes the gradient at the gate's argument, e = grad · x · g′(u) with u = scale · d + shift, and
/// returns Σ e and Σ e · (d − mean) · inv_std: batch norm's gradients to its bias and weight.
pub struct GateGradient<'a, T> {
    pub gate: Gate,
    pub grad: &'a [T],
    pub x: &'a [T],
    pub d: &'a [T],
    pub affine: Affine<T>,
    pub moments: Moments<T>,
    pub out: &'a mut [T],
}

impl<T: Scalar> Kernel<T> for GateGradient<'_, T> {
    type Output = (f64, f64);

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) -> (f64, f64) {
        let GateGradient { gate, grad, x, d, affine, moments, out } = self;
        assert!([grad.len(), x.len(), d.len()].iter().all(|&len| len == out.len()));
        let zero = simd.splat(T::ZERO);
        let (mut first, mut second) = (0.0, 0.0);
        let (mut a, mut b) = (zero, zero);
        each_vector!(
            simd,
            out.len(),
            |at, n| {
                let d = load(simd, d, at, n);
                let u = affine.apply(simd, d);
                let slope = gate.slope(simd, u, gate.value(simd, u));
                let gx = simd.mul(load(simd, grad, at, n), load(simd, x, at, n));
                let e = simd.mul(gx, slope);
                store(simd, e, out, at, n);
                // Lanes past the end hold no infinity to meet their zeros: grad and x are 0 there.
                a = simd.add(a, e);
                b = simd.fma(e, moments.normalise(simd, d), b);
            },
            {
                first += simd.sum(a).to_f64();
                second += simd.sum(b).to_f64();
                (a, b) = (zero, zero);
            }
        );
        (first, second)
    }
}

/// Batch norm's gradient to its input: scale · (e − mean_e − x̂ · mean_ex̂), where the means over
/// the batch are zero outside training. In place on rows, or from `plane` into a padded plane.
#[derive(Clone, Copy, Debug)]
pub struct NormGradient<T> {
    scale: T,
    /// `(mean, slope, shift)` of scale · e + slope · (x − mean) + shift, in training.
    batch: Option<(T, T, T)>,
}

impl<T: Scalar> NormGradient<T> {
    /// `means` are Σ e / M and Σ e · x̂ / M in training.
    pub fn new(affine: Affine<T>, moments: Moments<T>, means: Option<(f64, f64)>) -> Self {
        let scale = affine.scale.to_f64();
        Self {
            scale: affine.scale,
            batch: means.map(|(mean, mean_xhat)| {
                let slope = -scale * moments.inv_std.to_f64() * mean_xhat;
                (moments.mean, T::from_f64(slope), T::from_f64(-scale * mean))
            }),
        }
    }

    #[inline(always)]
    fn apply<S: Simd<T>>(self, simd: S, e: S::V, x: S::V) -> S::V {
        let scale = simd.splat(self.scale);
        let Some((mean, slope, shift)) = self.batch else {
            return simd.mul(e, scale);
        };
        let centred = simd.sub(x, simd.splat(mean));
        simd.fma(e, scale, simd.fma(centred, simd.splat(slope), simd.splat(shift)))
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
        let mut sum = 0.0;
        for (y, (grad, d)) in rows.enumerate() {
            let out = &mut self.padded[self.origin + y * self.ld..][..self.width];
            let mut a = zero;
            each_vector!(
                simd,
                grad.len(),
                |at, n| {
                    let (e, d) = (load(simd, grad, at, n), load(simd, d, at, n));
                    let v = self.norm.apply(simd, e, d);
                    store(simd, v, out, at, n);
                    a = simd.add(a, keep(simd, v, n));
                },
                {
                    sum += simd.sum(a).to_f64();
                    a = zero;
                }
            );
        }
        sum
    }
}

/// Masks `grad` in place where relu(scale · x + shift) is flat, and returns Σ grad and
/// Σ grad · (x − mean) · inv_std.
pub struct ReluGradient<'a, T> {
    pub x: &'a [T],
    pub affine: Affine<T>,
    pub moments: Moments<T>,
    pub grad: &'a mut [T],
}

impl<T: Scalar> Kernel<T> for ReluGradient<'_, T> {
    type Output = (f64, f64);

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) -> (f64, f64) {
        let ReluGradient { x, affine, moments, grad } = self;
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
                b = simd.fma(e, moments.normalise(simd, x), b);
            },
            {
                first += simd.sum(a).to_f64();
                second += simd.sum(b).to_f64();
                (a, b) = (zero, zero);
            }
        );
        (first, second)
    }
}

/// The [`NormGradient`] of `grad` at `x`, in place.
pub struct Finish<'a, T> {
    pub norm: NormGradient<T>,
    pub x: &'a [T],
    pub grad: &'a mut [T],
}

impl<T: Scalar> Kernel<T> for Finish<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) {
        let Finish { norm, x, grad } = self;
        assert!(x.len() == grad.len());
        each_vector!(simd, x.len(), |at, n| {
            let e = norm.apply(simd, load(simd, grad, at, n), load(simd, x, at, n));
            store(simd, e, grad, at, n);
        });
    }
}

/// sum += grad · g(scale · d + shift): the gradient past the gate to x.
pub struct AddGated<'a, T> {
    pub gate: Gate,
    pub grad: &'a [T],
    pub d: &'a [T],
    pub affine: Affine<T>,
    pub sum: &'a mut [T],
}

impl<T: Scalar> Kernel<T> for AddGated<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) {
        let AddGated { gate, grad, d, affine, sum } = self;
        assert!(grad.len() == d.len() && grad.len() == sum.len());
        each_vector!(simd, grad.len(), |at, n| {
            let g = gate.value(simd, affine.apply(simd, load(simd, d, at, n)));
            let v = simd.fma(load(simd, grad, at, n), g, load(simd, sum, at, n));
            store(simd, v, sum, at, n);
        });
    }
}
