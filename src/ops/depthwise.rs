//! Depthwise convolution of any geometry, forward and backward.

use super::scratch::{Scratch, Window};
use super::{Planes, expect_len, optional_len, plane, turned};
use crate::kernels::{conv, general};
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
    let (input, output, taps) = check(geometry, x, weight)?;
    optional_len("bias", bias, input.c)?;
    expect_len("y", y, output.size())?;
    let planes = Planes::new(y, output);
    parallel::for_each(threads.for_work(output.size() * taps), input.c, |c| {
        let bias = bias.map_or(T::ZERO, |bias| bias[c]);
        let weight = weight[c * taps..][..taps].to_vec();
        let mut convolution = Convolution::new(geometry, weight, bias);
        for n in 0..input.n {
            let next = if n + 1 < input.n { plane(x, input, n + 1, c) } else { &[] };
            // SAFETY: this task alone names channel c.
            convolution.run(plane(x, input, n, c), next, unsafe { planes.plane(n, c) });
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
    let (input, output, taps) = check(geometry, x, weight)?;
    let DepthwiseGradients { x: gx, weight: gweight, bias: gbias } = gradients;
    expect_len("grad", grad, output.size())?;
    optional_len("x's gradient", gx.as_deref(), input.size())?;
    optional_len("weight's gradient", gweight.as_deref(), input.c * taps)?;
    optional_len("bias's gradient", gbias.as_deref(), input.c)?;
    let per_channel = |w: usize| Batch { n: 1, c: input.c, h: 1, w };
    let gx = gx.map(|gx| Planes::new(gx, input));
    let gweight = gweight.map(|gweight| Planes::new(gweight, per_channel(taps)));
    let gbias = gbias.map(|gbias| Planes::new(gbias, per_channel(1)));
    parallel::for_each(threads.for_work(output.size() * taps), input.c, |c| {
        let weight = &weight[c * taps..][..taps];
        let mut sum = vec![0.0; taps];
        let mut sum_bias = 0.0;
        let mut transposed = gx.is_some().then(|| Transposed::new(geometry, weight));
        let mut window = gweight.is_some().then(|| Window::new(geometry));
        for n in 0..input.n {
            let at = plane(grad, output, n, c);
            if gbias.is_some() {
                sum_bias += at.iter().map(|g| g.to_f64()).sum::<f64>();
            }
            if let Some(window) = &mut window {
                weight_gradient(geometry, window, at, plane(x, input, n, c), &mut sum);
            }
            if let (Some(transposed), Some(gx)) = (&mut transposed, &gx) {
                let next = if n + 1 < input.n { plane(grad, output, n + 1, c) } else { &[] };
                // SAFETY: this task alone names channel c.
                transposed.run(at, next, unsafe { gx.plane(n, c) });
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

/// Checks the lengths of x and weight; returns the two shapes and the taps per channel.
fn check<T>(
    geometry: &Geometry,
    x: &[T],
    weight: &[T],
) -> Result<(Batch, Batch, usize), ShapeError> {
    let taps = geometry.conv.kh * geometry.conv.kw;
    expect_len("x", x, geometry.input.size())?;
    expect_len("weight", weight, geometry.input.c * taps)?;
    Ok((geometry.input, geometry.output(), taps))
}

/// The convolution of one plane after another with the same taps.
struct Convolution<T> {
    geometry: Geometry,
    weight: Vec<T>,
    bias: T,
    window: Window<T>,
}

impl<T: Scalar> Convolution<T> {
    fn new(geometry: &Geometry, weight: Vec<T>, bias: T) -> Self {
        Self { geometry: *geometry, weight, bias, window: Window::new(geometry) }
    }

    /// Writes the convolution of `x` to `out`; `next` is the plane of the next call.
    fn run(&mut self, x: &[T], next: &[T], out: &mut [T]) {
        let Self { ref geometry, ref weight, bias, ref mut window } = *self;
        let Geometry { conv, ow, oh, ph, .. } = *geometry;
        if !geometry.is_dense() {
            window.slide_over(0..ph, x, None);
            let (input, ld) = (window.input(), window.ld);
            simd::dispatch(general::Forward { geometry, input, ld, weight, bias, out });
            return;
        }
        let strip = window.strip(geometry);
        for (y, out) in (0..oh).step_by(strip).zip(out.chunks_mut(strip * ow)) {
            window.slide_over(y..(y + strip).min(oh) + conv.kh - 1, x, None);
            let end = y + strip;
            let next = if end < oh {
                window.ahead(end..(end + strip).min(oh) + conv.kh - 1, x)
            } else if next.is_empty() {
                next
            } else {
                window.ahead(0..strip + conv.kh - 1, next)
            };
            let (input, ld, kernel) = (window.input(), window.ld, (conv.kh, conv.kw));
            simd::dispatch(conv::Forward { input, ld, weight, bias, out, kernel, ow, next });
        }
    }
}

/// Adds the weight's gradient of one plane to `sum`.
fn weight_gradient<T: Scalar>(
    geometry: &Geometry,
    window: &mut Window<T>,
    grad: &[T],
    x: &[T],
    sum: &mut [f64],
) {
    let Geometry { conv, ow, oh, ph, .. } = *geometry;
    if !geometry.is_dense() {
        window.slide_over(0..ph, x, None);
        let (input, ld) = (window.input(), window.ld);
        simd::dispatch(general::WeightGradient { geometry, grad, input, ld, sum });
        return;
    }
    let strip = window.strip(geometry);
    for (y, grad) in (0..oh).step_by(strip).zip(grad.chunks(strip * ow)) {
        let rows = (y + strip).min(oh) - y;
        window.slide_over(y..y + rows + conv.kh - 1, x, None);
        simd::dispatch(conv::WeightGradient {
            grad,
            grad_ld: ow,
            input: window.input(),
            ld: window.ld,
            sum: &mut *sum,
            kernel: (conv.kh, conv.kw),
            out: (rows, ow),
        });
    }
}

/// The gradient to one input plane after another.
enum Transposed<'a, T> {
    /// A convolution of the padded gradient with the taps turned.
    Dense(Box<Convolution<T>>),
    /// Into the whole padded plane, of which padding is cut off after.
    General { geometry: &'a Geometry, weight: &'a [T] },
}

impl<'a, T: Scalar> Transposed<'a, T> {
    fn new(geometry: &'a Geometry, weight: &'a [T]) -> Self {
        let Conv { kh, kw, padding: [top, bottom, left, right], .. } = geometry.conv;
        if geometry.is_dense() && top.max(bottom) < kh && left.max(right) < kw {
            let padding = [kh - 1 - top, kh - 1 - bottom, kw - 1 - left, kw - 1 - right];
            let conv = Conv { padding, ..geometry.conv };
            if let Ok(geometry) = Geometry::new(geometry.output(), conv) {
                let convolution = Convolution::new(&geometry, turned(weight), T::ZERO);
                return Self::Dense(Box::new(convolution));
            }
        }
        Self::General { geometry, weight }
    }

    /// Writes the gradient to `out`; `next` is the gradient of the next call.
    fn run(&mut self, grad: &[T], next: &[T], out: &mut [T]) {
        match self {
            Self::Dense(convolution) => convolution.run(grad, next, out),
            Self::General { geometry, weight } => {
                let Geometry { conv, input, ph, pw, .. } = **geometry;
                let mut whole = Scratch::new(ph * pw);
                whole.fill(T::ZERO);
                let (padded, ld) = (&mut whole[..], pw);
                simd::dispatch(general::InputGradient { geometry, grad, weight, padded, ld });
                let rows = whole[conv.padding[0] * pw..].chunks_exact(pw);
                for (out, row) in out.chunks_exact_mut(input.w).zip(rows) {
                    out.copy_from_slice(&row[conv.padding[2]..][..input.w]);
                }
            }
        }
    }
}
