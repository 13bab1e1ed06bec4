//! The 1×1 convolution of the dense unit, forward and backward.

use super::{Planes, plane};
use crate::parallel::{self, Threads};
use crate::shape::Batch;
use crate::simd::Scalar;

/// The 1×1 convolution of the dense unit: weight (C, C), bias (C).
#[derive(Clone, Copy, Debug)]
pub struct Pointwise<'a, T> {
    pub weight: &'a [T],
    pub bias: Option<&'a [T]>,
}

impl<T: Scalar> Pointwise<'_, T> {
    /// p\[n\] = weight · x\[n\] + bias; one task an image.
    pub(super) fn forward(&self, batch: Batch, x: &[T], p: &mut [T], threads: Threads) {
        let planes = Planes::new(p, images(batch));
        let (c, hw) = (batch.c, batch.plane());
        parallel::for_each(threads, batch.n, |n| {
            // SAFETY: this task alone names image n.
            let out = unsafe { planes.plane(n, 0) };
            for (channel, out) in out.chunks_exact_mut(hw).enumerate() {
                out.fill(self.bias.map_or(T::ZERO, |bias| bias[channel]));
            }
            let (a, b) = (self.weight, plane(x, images(batch), n, 0));
            // SAFETY: a is C × C by `check`, b and c are C × HW, an image each.
            unsafe {
                let (rows, columns) = (c as isize, hw as isize);
                T::gemm(
                    c,
                    c,
                    hw,
                    (a.as_ptr(), rows, 1),
                    (b.as_ptr(), columns, 1),
                    T::ONE,
                    (out.as_mut_ptr(), columns, 1),
                );
            }
        });
    }

    /// Adds weightᵀ · gp to gx and writes the weight's gradient Σₙ gp\[n\] · x\[n\]ᵀ.
    pub(super) fn backward(
        &self,
        batch: Batch,
        gp: &[T],
        x: &[T],
        gx: &mut [T],
        gweight: &mut [T],
        threads: Threads,
    ) {
        let (c, hw) = (batch.c, batch.plane());
        // A few partial sums whatever the batch: their number fixes the order of the additions.
        let parts = batch.n.min(8);
        let mut sums = vec![T::ZERO; parts * c * c];
        let gx_planes = Planes::new(gx, images(batch));
        let sum_planes = Planes::new(&mut sums, Batch { n: parts, c: 1, h: c, w: c });
        parallel::for_each(threads, parts, |part| {
            // SAFETY: this task alone names its part and the images n ≡ part.
            let sum = unsafe { sum_planes.plane(part, 0) };
            for n in (part..batch.n).step_by(parts) {
                // SAFETY: as above.
                let out = unsafe { gx_planes.plane(n, 0) };
                let (gp, x) = (plane(gp, images(batch), n, 0), plane(x, images(batch), n, 0));
                let (rows, columns) = (c as isize, hw as isize);
                // SAFETY: the weight and its gradient are C × C, the others C × HW, an image each.
                unsafe {
                    let gp = (gp.as_ptr(), columns, 1);
                    let weight = (self.weight.as_ptr(), 1, rows);
                    T::gemm(c, c, hw, weight, gp, T::ONE, (out.as_mut_ptr(), columns, 1));
                    let turned = (x.as_ptr(), 1, columns);
                    T::gemm(c, hw, c, gp, turned, T::ONE, (sum.as_mut_ptr(), rows, 1));
                }
            }
        });
        gweight.fill(T::ZERO);
        for part in sums.chunks_exact(c * c) {
            gweight
                .iter_mut()
                .zip(part)
                .for_each(|(total, part)| *total = part.fma(T::ONE, *total));
        }
    }
}

/// The batch with an image, not a channel, as its plane.
fn images(batch: Batch) -> Batch {
    Batch { n: batch.n, c: 1, h: batch.c, w: batch.plane() }
}
