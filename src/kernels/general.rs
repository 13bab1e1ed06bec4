//! Depthwise convolution of any stride, dilation and kernel: plain loops over a padded plane.
//!
//! The compiler vectorises the inner loops where the stride is 1. Padded planes have ph rows of pw
//! elements, `ld` apart.

use crate::shape::Geometry;
use crate::simd::{Kernel, Scalar, Simd};

/// The start of the padded row and the columns `x · sw` that tap (i, j) of output row y reads.
#[inline(always)]
fn tap_row(geometry: &Geometry, ld: usize, y: usize, i: usize, j: usize) -> usize {
    let conv = &geometry.conv;
    (y * conv.stride[0] + i * conv.dilation[0]) * ld + j * conv.dilation[1]
}

/// out = bias + Σ weight · input, one plane.
pub struct Forward<'a, T> {
    pub geometry: &'a Geometry,
    pub input: &'a [T],
    pub ld: usize,
    pub weight: &'a [T],
    pub bias: T,
    pub out: &'a mut [T],
}

impl<T: Scalar> Kernel<T> for Forward<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, _: S) {
        let Geometry { conv, ow, .. } = *self.geometry;
        for (y, out) in self.out.chunks_exact_mut(ow).enumerate() {
            out.fill(self.bias);
            for i in 0..conv.kh {
                for j in 0..conv.kw {
                    let w = self.weight[i * conv.kw + j];
                    let input = &self.input[tap_row(self.geometry, self.ld, y, i, j)..];
                    let input = &input[..(ow - 1) * conv.stride[1] + 1];
                    for (out, &v) in out.iter_mut().zip(input.iter().step_by(conv.stride[1])) {
                        *out = w.fma(v, *out);
                    }
                }
            }
        }
    }
}

/// The gradient with respect to the padded input, added to `padded`.
pub struct InputGradient<'a, T> {
    pub geometry: &'a Geometry,
    pub grad: &'a [T],
    pub weight: &'a [T],
    pub padded: &'a mut [T],
    pub ld: usize,
}

impl<T: Scalar> Kernel<T> for InputGradient<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, _: S) {
        let Geometry { conv, ow, .. } = *self.geometry;
        for (y, grad) in self.grad.chunks_exact(ow).enumerate() {
            for i in 0..conv.kh {
                for j in 0..conv.kw {
                    let w = self.weight[i * conv.kw + j];
                    let row = &mut self.padded[tap_row(self.geometry, self.ld, y, i, j)..];
                    let row = &mut row[..(ow - 1) * conv.stride[1] + 1];
                    for (v, &g) in row.iter_mut().step_by(conv.stride[1]).zip(grad) {
                        *v = w.fma(g, *v);
                    }
                }
            }
        }
    }
}

/// The gradient with respect to the taps, added to `sum` row by row in `f64`.
pub struct WeightGradient<'a, T> {
    pub geometry: &'a Geometry,
    pub grad: &'a [T],
    pub input: &'a [T],
    pub ld: usize,
    pub sum: &'a mut [f64],
}

impl<T: Scalar> Kernel<T> for WeightGradient<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, _: S) {
        let Geometry { conv, ow, .. } = *self.geometry;
        for (y, grad) in self.grad.chunks_exact(ow).enumerate() {
            for i in 0..conv.kh {
                for j in 0..conv.kw {
                    let input = &self.input[tap_row(self.geometry, self.ld, y, i, j)..];
                    let input = input.iter().step_by(conv.stride[1]);
                    let products = grad.iter().zip(input).map(|(&g, &v)| g.to_f64() * v.to_f64());
                    self.sum[i * conv.kw + j] += products.sum::<f64>();
                }
            }
        }
    }
}
