//! Convolution with strides or dilation: planes laid out so that it is a convolution without.
//!
//! A row of the padded plane is split by phase: columns 0, s, 2s, … of a stride of s, then columns
//! 1, s + 1, …. Neighbouring outputs then read neighbouring elements, whatever the tap. Backward,
//! the rows and columns of the input of one phase are a convolution of the gradient with the taps
//! that reach that phase.

use super::Planes;
use super::scratch::Scratch;
use crate::kernels::{MAX_LANES, general};
use crate::shape::{Conv, Geometry};
use crate::simd::{self, Scalar};

/// The padded plane of a geometry, split by phase.
pub(super) struct Phases<T> {
    data: Scratch<T>,
    geometry: Geometry,
    /// Columns of a phase, elements of a row.
    columns: usize,
    ld: usize,
}

impl<T: Scalar> Phases<T> {
    pub(super) fn new(geometry: &Geometry) -> Self {
        let Geometry { conv, pw, ph, .. } = *geometry;
        let columns = pw.div_ceil(conv.stride[1]);
        let ld = columns * conv.stride[1];
        let mut data = Scratch::new(ph * ld + MAX_LANES);
        data.fill(T::ZERO);
        Self { data, geometry: *geometry, columns, ld }
    }

    /// Takes in the plane that `x` begins with; `next` begins with the next one.
    pub(super) fn fill(&mut self, x: &[T], next: &[T]) {
        let Self { geometry: Geometry { conv, input, .. }, columns, ld, .. } = *self;
        let ([top, _, left, _], stride) = (conv.padding, conv.stride[1]);
        if stride == 2 {
            let (from, to) = (&x[..input.plane()], &mut self.data[top * ld..]);
            let places = [left, left + 1].map(|column| column % 2 * columns + column / 2);
            let next = &next[..next.len().min(input.plane())];
            return simd::dispatch(general::Split { from, width: input.w, to, ld, places, next });
        }
        let rows = self.data[top * ld..].chunks_exact_mut(ld);
        for (to, from) in rows.zip(x.chunks_exact(input.w)).take(input.h) {
            for phase in 0..stride {
                // The first column of the plane of this phase, and where it goes.
                let first = (phase + stride - left % stride) % stride;
                let to = &mut to[phase * columns + (left + first) / stride..];
                scatter_from(to, from, first, stride);
            }
        }
    }

    /// Where each tap of the first output row starts.
    pub(super) fn offsets(&self) -> impl Iterator<Item = usize> + '_ {
        let Self { geometry: Geometry { conv, .. }, columns, ld, .. } = self;
        let Conv { kh, kw, stride, dilation, .. } = *conv;
        (0..kh * kw).map(move |tap| {
            let (row, column) = (tap / kw * dilation[0], tap % kw * dilation[1]);
            row * ld + column % stride[1] * columns + column / stride[1]
        })
    }

    /// Elements from one row of outputs to the next.
    fn step(&self) -> usize {
        self.geometry.conv.stride[0] * self.ld
    }

    /// Convolves the plane that was taken in.
    pub(super) fn forward(&self, taps: &[(usize, T)], bias: T, out: &mut [T]) {
        let (input, step, ow) = (&self.data[..], self.step(), self.geometry.ow);
        simd::dispatch(general::Forward { input, step, taps, bias, out, ow });
    }

    /// Adds the gradient of the taps for the plane that was taken in.
    pub(super) fn weight_gradient(&self, offsets: &[usize], grad: &[T], sum: &mut [f64]) {
        let (input, step, ow) = (&self.data[..], self.step(), self.geometry.ow);
        simd::dispatch(general::WeightGradient { grad, ow, input, step, offsets, sum });
    }
}

/// to\[i\] = from\[first + i · stride\]
fn scatter_from<T: Scalar>(to: &mut [T], from: &[T], first: usize, stride: usize) {
    match (stride, from.get(first..)) {
        (_, None) => {}
        (1, Some(from)) => to[..from.len()].copy_from_slice(from),
        (_, Some(from)) => {
            to.iter_mut().zip(from.iter().step_by(stride)).for_each(|(to, &from)| *to = from);
        }
    }
}

/// The gradient to one input plane after another, phase by phase.
pub(super) struct Transposed<T> {
    geometry: Geometry,
    /// The gradient with zeros around it, rows `ld` apart; where its first element lies.
    grad: Scratch<T>,
    ld: usize,
    lead: [usize; 2],
    /// Per phase of rows and columns: its taps.
    taps: Vec<Vec<(usize, T)>>,
    /// The rows of one phase, its columns phase by phase.
    part: Scratch<T>,
}

impl<T: Scalar> Transposed<T> {
    pub(super) fn new(geometry: &Geometry, weight: &[T]) -> Self {
        let Geometry { conv, input, ph, pw, .. } = *geometry;
        let Conv { kh, kw, stride: [sh, sw], dilation: [dh, dw], .. } = conv;
        let lead = [(kh - 1) * dh / sh, (kw - 1) * dw / sw];
        let (rows, columns) = (ph.div_ceil(sh), pw.div_ceil(sw));
        let ld = lead[1] + columns;
        let mut grad = Scratch::new((lead[0] + rows) * ld + MAX_LANES);
        grad.fill(T::ZERO);
        let mut taps = vec![Vec::new(); sh * sw];
        for (tap, &w) in weight.iter().enumerate() {
            let (row, column) = (tap / kw * dh, tap % kw * dw);
            let offset = (lead[0] - row / sh) * ld + lead[1] - column / sw;
            taps[row % sh * sw + column % sw].push((offset, w));
        }
        let part = Scratch::new(input.h.div_ceil(sh) * input.w);
        Self { geometry: *geometry, grad, ld, lead, taps, part }
    }

    /// Writes the gradient of the plane that `grad` begins with to plane (n, c) of `out`.
    ///
    /// # Safety
    /// As [`Planes::target`].
    pub(super) unsafe fn run(&mut self, grad: &[T], out: &Planes<'_, T>, (n, c): (usize, usize)) {
        let Self { geometry: Geometry { conv, input, ow, oh, .. }, ld, lead, .. } = *self;
        let Conv { stride: [sh, sw], padding: [top, _, left, _], .. } = conv;
        let rows = self.grad[lead[0] * ld..].chunks_exact_mut(ld);
        for (to, from) in rows.zip(grad.chunks_exact(ow)).take(oh) {
            to[lead[1]..][..ow].copy_from_slice(from);
        }
        for py in 0..sh {
            // The rows of x of this phase, and the first of them in the gradient.
            let y = (py + sh - top % sh) % sh;
            let rows = input.h.saturating_sub(y).div_ceil(sh);
            if rows == 0 {
                continue;
            }
            let mut parts = &mut self.part[..];
            let mut columns = [&[][..]; 2];
            for px in 0..sw {
                let x = (px + sw - left % sw) % sw;
                let width = input.w.saturating_sub(x).div_ceil(sw);
                if width == 0 {
                    continue;
                }
                let (part, rest) = std::mem::take(&mut parts).split_at_mut(rows * width);
                simd::dispatch(general::Forward {
                    input: &self.grad[(y + top) / sh * ld + (x + left) / sw..],
                    step: ld,
                    taps: &self.taps[py * sw + px],
                    bias: T::ZERO,
                    out: &mut *part,
                    ow: width,
                });
                parts = rest;
                if sw == 2 {
                    columns[x] = &*part;
                    continue;
                }
                // SAFETY: the caller's promise.
                let out = unsafe { out.plane(n, c) }.chunks_exact_mut(input.w).skip(y).step_by(sh);
                for (to, from) in out.zip(part.chunks_exact(width)) {
                    match sw {
                        1 => to.copy_from_slice(from),
                        _ => to[x..]
                            .iter_mut()
                            .step_by(sw)
                            .zip(from)
                            .for_each(|(to, &from)| *to = from),
                    }
                }
            }
            if sw == 2 {
                // SAFETY: the caller's promise.
                let out = unsafe { out.target(n, c, 0..input.plane()) };
                let (parts, width) = (columns, input.w);
                simd::dispatch(general::Merge { parts, out, width, first: y, step: sh });
            }
        }
    }
}
