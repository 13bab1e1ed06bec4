//! Depthwise convolution of any geometry, forward and backward.

use super::{Padded, Planes, expect_len, plane, turned};
use crate::kernels::{conv, general};
use crate::parallel;
use crate::shape::{Geometry, ShapeError};
use crate::simd::{self, Scalar};

/// y\[n, c\] = bias\[c\] + x\[n, c\] ⋆ weight\[c\], a cross-correlation as in `torch.nn.Conv2d`.
///
/// `x` is (N, C, H, W) contiguous, `weight` (C, 1, kh, kw), `bias` (C); the output is
/// `geometry.output()`. Errors if a length does not fit the geometry.
pub fn depthwise_forward<T: Scalar>(
    geometry: &Geometry,
    x: &[T],
    weight: &[T],
    bias: Option<&[T]>,
    threads: usize,
) -> Result<Vec<T>, ShapeError> {
    let (input, output, taps) = check(geometry, x, weight)?;
    if let Some(bias) = bias {
        expect_len("bias", bias, input.c)?;
    }
    let mut y = vec![T::ZERO; output.size()];
    let planes = Planes::new(&mut y, output);
    parallel::for_each(threads, input.c, |c| {
        let weight = &weight[c * taps..][..taps];
        let bias = bias.map_or(T::ZERO, |bias| bias[c]);
        let mut padded = padded_input(geometry);
        for n in 0..input.n {
            // SAFETY: this task alone names channel c.
            let out = unsafe { planes.plane(n, c) };
            padded.fill(plane(x, input, n, c), input.w, None);
            let input = &padded.data[..];
            if geometry.is_dense() {
                let kernel = (geometry.conv.kh, geometry.conv.kw);
                simd::dispatch(conv::Forward { input, weight, bias, out, kernel, ow: output.w });
            } else {
                simd::dispatch(general::Forward { geometry, input, weight, bias, out });
            }
        }
    });
    Ok(y)
}

/// The gradients that were asked for.
#[derive(Debug, Default)]
pub struct DepthwiseGradients<T> {
    pub x: Option<Vec<T>>,
    pub weight: Option<Vec<T>>,
    pub bias: Option<Vec<T>>,
}

/// The gradients of [`depthwise_forward`] to x, weight and bias, each only if `needs` asks for it.
pub fn depthwise_backward<T: Scalar>(
    geometry: &Geometry,
    grad: &[T],
    x: &[T],
    weight: &[T],
    needs: [bool; 3],
    threads: usize,
) -> Result<DepthwiseGradients<T>, ShapeError> {
    let (input, output, taps) = check(geometry, x, weight)?;
    expect_len("grad", grad, output.size())?;
    let mut gx = if needs[0] { vec![T::ZERO; input.size()] } else { Vec::new() };
    let gx_planes = needs[0].then(|| Planes::new(&mut gx, input));
    let mut parameters = vec![0.0; input.c * (taps + 1)];
    let per_channel = crate::shape::Batch { n: 1, c: input.c, h: 1, w: taps + 1 };
    let sums = Planes::new(&mut parameters, per_channel);
    parallel::for_each(threads, input.c, |c| {
        let weight = &weight[c * taps..][..taps];
        // SAFETY: this task alone names channel c.
        let (sum_weight, sum_bias) = unsafe { sums.plane(0, c) }.split_at_mut(taps);
        let mut padded = padded_input(geometry);
        let mut transposed = InputGradient::new(geometry, weight);
        for n in 0..input.n {
            let grad = plane(grad, output, n, c);
            if needs[2] {
                sum_bias[0] += grad.iter().map(|g| g.to_f64()).sum::<f64>();
            }
            if needs[1] {
                padded.fill(plane(x, input, n, c), input.w, None);
                let (input, sum) = (&padded.data[..], &mut *sum_weight);
                if geometry.is_dense() {
                    let kernel = (geometry.conv.kh, geometry.conv.kw);
                    let out = (output.h, output.w);
                    let grad_ld = output.w;
                    simd::dispatch(conv::WeightGradient { grad, grad_ld, input, sum, kernel, out });
                } else {
                    simd::dispatch(general::WeightGradient { geometry, grad, input, sum });
                }
            }
            if let Some(planes) = &gx_planes {
                // SAFETY: this task alone names channel c.
                transposed.run(grad, unsafe { planes.plane(n, c) });
            }
        }
    });
    let channels = parameters.chunks_exact(taps + 1);
    Ok(DepthwiseGradients {
        x: needs[0].then_some(gx),
        weight: needs[1].then(|| {
            channels.clone().flat_map(|sums| &sums[..taps]).map(|&s| T::from_f64(s)).collect()
        }),
        bias: needs[2].then(|| channels.map(|sums| T::from_f64(sums[taps])).collect()),
    })
}

/// Checks the lengths of x and weight; returns the two shapes and the taps per channel.
fn check<T>(
    geometry: &Geometry,
    x: &[T],
    weight: &[T],
) -> Result<(crate::shape::Batch, crate::shape::Batch, usize), ShapeError> {
    let taps = geometry.conv.kh * geometry.conv.kw;
    expect_len("x", x, geometry.input.size())?;
    expect_len("weight", weight, geometry.input.c * taps)?;
    Ok((geometry.input, geometry.output(), taps))
}

/// The padded plane that the forward and weight-gradient kernels read.
fn padded_input<T: Scalar>(geometry: &Geometry) -> Padded<T> {
    let Geometry { conv, ow, ph, pw, .. } = *geometry;
    let ld = if geometry.is_dense() { conv::row_stride(ow, conv.kw) } else { pw };
    Padded::new(ph, ld, conv.padding[0], conv.padding[2])
}

/// The gradient to one input plane after another, with its scratch.
struct InputGradient<'a, T> {
    geometry: &'a Geometry,
    weight: Vec<T>,
    padded: Padded<T>,
    /// The gradient of the whole padded input, where padding is cut off afterwards.
    whole: Vec<T>,
}

impl<'a, T: Scalar> InputGradient<'a, T> {
    fn new(geometry: &'a Geometry, weight: &[T]) -> Self {
        let Geometry { conv, ph, pw, .. } = *geometry;
        if !geometry.is_dense() {
            let padded = Padded::new(0, pw, conv.padding[0], conv.padding[2]);
            let whole = vec![T::ZERO; ph * pw];
            return Self { geometry, weight: weight.to_vec(), padded, whole };
        }
        // A convolution of the gradient, padded by k − 1, with the taps turned: it yields the
        // padded input's gradient, of which padding may take any part, so that it is cut off after.
        let ld = conv::row_stride(pw, conv.kw);
        let padded = Padded::new(ph + conv.kh - 1, ld, conv.kh - 1, conv.kw - 1);
        Self { geometry, weight: turned(weight), padded, whole: vec![T::ZERO; ph * pw] }
    }

    fn run(&mut self, grad: &[T], out: &mut [T]) {
        let Geometry { conv, input, ow, pw, .. } = *self.geometry;
        let (weight, padded) = (&self.weight[..], &mut self.whole[..]);
        if self.geometry.is_dense() {
            self.padded.fill(grad, ow, None);
            let input = &self.padded.data[..];
            let (kernel, bias) = ((conv.kh, conv.kw), T::ZERO);
            simd::dispatch(conv::Forward { input, weight, bias, out: padded, kernel, ow: pw });
        } else {
            padded.fill(T::ZERO);
            simd::dispatch(general::InputGradient {
                geometry: self.geometry,
                grad,
                weight,
                padded,
            });
        }
        let rows = self.whole[conv.padding[0] * pw..].chunks_exact(pw);
        for (out, row) in out.chunks_exact_mut(input.w).zip(rows) {
            out.copy_from_slice(&row[conv.padding[2]..][..input.w]);
        }
    }
}
