//! Depthwise convolution of any geometry, forward and backward.

use super::phases::{self, Phases};
use super::scratch::Window;
use super::small;
use super::staged::Staged;
use super::strips::{Strips, Weights};
use super::{Planes, check_depthwise, expect_len, from_plane, optional_len, plane, turned};
use crate::kernels::activation::{CopyOut, Sums, Target};
use crate::kernels::conv::{self, Next};
use crate::parallel::{self, Threads};
use crate::shape::{Batch, Conv, Geometry, ShapeError};
use crate::simd::{self, Scalar};

/// y\[n, c\] = bias\[c\] + x\[n, c\] ⋆ weight\[c\], a cross-correlation as in `torch.nn.Conv2d`.
///
/// `x` is (N, C, H, W) contiguous, `weight` (C, 1, kh, kw), `bias` (C); every element of `y`, of
/// the shape `geometry.output()`, is written. Errors if a length does not fit the geometry.
pub fn depthwise_forward<T: Scalar>(
    geometry: &Geometry,
    x: &[T],
    weight: &[T],
    bias: Option<&[T]>,
    y: &mut [T],
    threads: Threads,
) -> Result<(), ShapeError> {
    let (input, output, taps) = check_depthwise(geometry, x, weight)?;
    optional_len("bias", bias, input.c)?;
    expect_len("y", y, output.size())?;
    let threads = threads.for_work(output.size() * taps);
    if small::suits(geometry, weight) {
        small::forward(geometry, x, weight, bias, y, threads);
        return Ok(());
    }
    let planes = Planes::result(y, output);
    parallel::for_each(threads, input.c, |c| {
        let bias = bias.map_or(T::ZERO, |bias| bias[c]);
        let weight = weight[c * taps..][..taps].to_vec();
        let mut convolution = Convolution::new(geometry, weight, bias, &planes);
        let from = |n| from_plane(x, input, n, c);
        for n in 0..input.n {
            let next = if n + 1 < input.n { from(n + 1) } else { &[] };
            // SAFETY: this task alone names channel c.
            unsafe { convolution.run(from(n), next, (n, c)) };
        }
    });
    Ok(())
}

/// Where the gradients go that are asked for; every element is written.
#[derive(Debug, Default)]
pub struct DepthwiseGradients<'a, T> {
    pub x: Option<&'a mut [T]>,
    pub weight: Option<&'a mut [T]>,
    pub bias: Option<&'a mut [T]>,
}

/// The gradients of [`depthwise_forward`] to x, weight and bias, each only if it is asked for.
pub fn depthwise_backward<T: Scalar>(
    geometry: &Geometry,
    grad: &[T],
    x: &[T],
    weight: &[T],
    gradients: DepthwiseGradients<'_, T>,
    threads: Threads,
) -> Result<(), ShapeError> {
    let (input, output, taps) = check_depthwise(geometry, x, weight)?;
    let DepthwiseGradients { x: mut gx, weight: mut gweight, bias: mut gbias } = gradients;
    expect_len("grad", grad, output.size())?;
    optional_len("x's gradient", gx.as_deref(), input.size())?;
    optional_len("weight's gradient", gweight.as_deref(), input.c * taps)?;
    optional_len("bias's gradient", gbias.as_deref(), input.c)?;
    let threads = threads.for_work(output.size() * taps);
    if small::suits(geometry, weight) {
        let (weight_gradient, bias) = (gweight.as_deref_mut(), gbias.as_deref_mut());
        let gradients = DepthwiseGradients { x: gx.take(), weight: weight_gradient, bias };
        if small::backward(geometry, grad, x, weight, gradients, threads) {
            return Ok(());
        }
    }
    let per_channel = |w: usize| Batch { n: 1, c: input.c, h: 1, w };
    let gx = gx.map(|gx| Planes::result(gx, input));
    let gweight = gweight.map(|gweight| Planes::new(gweight, per_channel(taps)));
    let gbias = gbias.map(|gbias| Planes::new(gbias, per_channel(1)));
    parallel::for_each(threads, input.c, |c| {
        let weight = &weight[c * taps..][..taps];
        let mut sum = vec![0.0; taps];
        let mut sum_bias = 0.0;
        let mut transposed = gx.as_ref().map(|gx| Transposed::new(geometry, weight, gx));
        let mut of_weight = gweight.is_some().then(|| WeightGradient::new(geometry));
        for n in 0..input.n {
            let at = plane(grad, output, n, c);
            let next = if n + 1 < input.n { from_plane(grad, output, n + 1, c) } else { &[] };
            if gbias.is_some() {
                sum_bias += simd::dispatch(Sums { plane: at, origin: T::ZERO }).0;
            }
            if let Some(of_weight) = &mut of_weight {
                let next_x = if n + 1 < input.n { plane(x, input, n + 1, c) } else { &[] };
                of_weight.add(at, plane(x, input, n, c), [next, next_x], &mut sum);
            }
            if let Some(transposed) = &mut transposed {
                // SAFETY: this task alone names channel c.
                unsafe { transposed.run(from_plane(grad, output, n, c), next, (n, c)) };
            }
        }
        if let Some(gweight) = &gweight {
            // SAFETY: as above.
            let gweight = unsafe { gweight.plane(0, c) };
            gweight.iter_mut().zip(&sum).for_each(|(g, &sum)| *g = T::from_f64(sum));
        }
        if let Some(gbias) = &gbias {
            // SAFETY: as above.
            let gbias = unsafe { gbias.plane(0, c) };
            gbias[0] = T::from_f64(sum_bias);
        }
    });
    Ok(())
}

/// The convolution of one plane after another with the same taps, to planes of `out`.
enum Convolution<'a, T: Scalar> {
    Dense(Box<Dense<'a, T>>),
    General { taps: Vec<(usize, T)>, bias: T, plane: Box<Phases<T>>, out: &'a Planes<'a, T> },
}

impl<'a, T: Scalar> Convolution<'a, T> {
    fn new(geometry: &Geometry, weight: Vec<T>, bias: T, out: &'a Planes<'a, T>) -> Self {
        if geometry.is_dense() {
            return Self::Dense(Box::new(Dense::new(geometry, weight, bias, out)));
        }
        let plane = Box::new(Phases::new(geometry));
        Self::General { taps: plane.offsets().zip(weight).collect(), bias, plane, out }
    }

    /// Writes the convolution of the plane that `x` begins with to plane (n, c) of `out`, by the time that this is
    /// dropped; `next` begins with that of the next call.
    ///
    /// # Safety
    /// As [`Planes::target`], until then.
    unsafe fn run(&mut self, x: &[T], next: &[T], (n, c): (usize, usize)) {
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                Self::Dense(dense) => dense.run(x, next, (n, c)),
                Self::General { taps, bias, plane, out } => {
                    plane.fill(x, next);
                    plane.forward(taps, *bias, out.plane(n, c));
                }
            }
        }
    }
}

/// Planes of stride and dilation 1.
struct Dense<'a, T: Scalar> {
    weights: Weights<T>,
    strips: Strips<T>,
    staged: Option<Staged<'a, T>>,
    out: &'a Planes<'a, T>,
}

impl<'a, T: Scalar> Dense<'a, T> {
    fn new(geometry: &Geometry, weight: Vec<T>, bias: T, out: &'a Planes<'a, T>) -> Self {
        let Geometry { conv, ow, oh, .. } = *geometry;
        let taps = conv::Taps::new(weight, (conv.kh, conv.kw), 1, oh);
        let weights = Weights { taps, bias, relu_of: None };
        let strips = Strips::new(geometry, &weights);
        let len = strips.rows() * ow;
        let staged = if strips.streams(&weights) { None } else { Staged::new(len, out) };
        Self { weights, strips, staged, out }
    }

    /// [`Convolution::run`].
    ///
    /// # Safety
    /// As there.
    unsafe fn run(&mut self, x: &[T], next: &[T], (n, c): (usize, usize)) {
        let Self { weights, strips, staged, out } = self;
        let Batch { h, w, .. } = out.batch;
        for y in (0..h).step_by(strips.rows()) {
            let rows = y..(y + strips.rows()).min(h);
            let pixels = rows.start * w..rows.end * w;
            let (out, copy) = match staged {
                Some(staged) => {
                    // SAFETY: the caller's promise.
                    let (to, copy) = unsafe { staged.stage((n, c), pixels) };
                    (Target::new(to), copy)
                }
                // SAFETY: as above.
                None => (unsafe { out.target(n, c, pixels) }, CopyOut::default()),
            };
            let next = strips.next(rows.end, x, next);
            strips.run(weights, rows, (x, 0), Next::soon(next), out, copy);
        }
    }
}

/// The weight's gradient, plane by plane.
enum WeightGradient<T> {
    Dense { geometry: Geometry, window: Window<T> },
    General { offsets: Vec<usize>, plane: Phases<T> },
}

impl<T: Scalar> WeightGradient<T> {
    fn new(geometry: &Geometry) -> Self {
        if geometry.is_dense() {
            return Self::Dense { geometry: *geometry, window: Window::new(geometry) };
        }
        let plane = Phases::new(geometry);
        Self::General { offsets: plane.offsets().collect(), plane }
    }

    /// Adds that of one plane to `sum`; `next` are the gradient and the plane of the next call.
    fn add(&mut self, grad: &[T], x: &[T], next: [&[T]; 2], sum: &mut [f64]) {
        let (geometry, window) = match self {
            Self::Dense { geometry, window } => (&*geometry, window),
            Self::General { offsets, plane } => {
                plane.fill(x, next[1]);
                return plane.weight_gradient(offsets, grad, sum);
            }
        };
        let Geometry { conv, ow, oh, .. } = *geometry;
        let strip = window.strip(geometry);
        for y in (0..oh).step_by(strip) {
            let end = (y + strip).min(oh);
            let rows = end - y;
            window.slide_over(y..end + conv.kh - 1, (x, 0), None);
            let after = (end + strip).min(oh);
            let next = if end < oh {
                [&grad[end * ow..after * ow], window.ahead(end..after + conv.kh - 1, x)]
            } else if next[0].is_empty() {
                next
            } else {
                [&next[0][..strip * ow], window.ahead(0..strip + conv.kh - 1, next[1])]
            };
            simd::dispatch(conv::WeightGradient {
                grad: &grad[y * ow..end * ow],
                grad_ld: ow,
                input: window.input(),
                ld: window.ld,
                sum: &mut *sum,
                kernel: (conv.kh, conv.kw),
                out: (rows, ow),
                block: 1,
                next: next.map(|next| &raw const *next),
            });
        }
    }
}

/// The gradient to one input plane after another.
enum Transposed<'a, T: Scalar> {
    /// A convolution of the padded gradient with the taps turned.
    Dense(Box<Convolution<'a, T>>),
    General(Box<phases::Transposed<T>>, &'a Planes<'a, T>),
}

impl<'a, T: Scalar> Transposed<'a, T> {
    fn new(geometry: &Geometry, weight: &[T], out: &'a Planes<'a, T>) -> Self {
        let Conv { kh, kw, padding: [top, bottom, left, right], .. } = geometry.conv;
        if geometry.is_dense() && top.max(bottom) < kh && left.max(right) < kw {
            let padding = [kh - 1 - top, kh - 1 - bottom, kw - 1 - left, kw - 1 - right];
            let conv = Conv { padding, ..geometry.conv };
            if let Ok(geometry) = Geometry::new(geometry.output(), conv) {
                let convolution = Convolution::new(&geometry, turned(weight), T::ZERO, out);
                return Self::Dense(Box::new(convolution));
            }
        }
        Self::General(Box::new(phases::Transposed::new(geometry, weight)), out)
    }

    /// Writes the gradient, of what `grad` begins with, to plane (n, c) of `out`, by the time that this is dropped;
    /// `next` begins with the gradient of the next call.
    ///
    /// # Safety
    /// As [`Planes::target`], until then.
    unsafe fn run(&mut self, grad: &[T], next: &[T], (n, c): (usize, usize)) {
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                Self::Dense(convolution) => convolution.run(grad, next, (n, c)),
                Self::General(transposed, out) => transposed.run(grad, out, (n, c)),
            }
        }
    }
}
