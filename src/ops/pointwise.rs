//! The 1×1 convolution of the dense unit, forward and backward: matrix products over panels of
//! pixels.

use std::ops::Range;

use super::groups::Layout;
use super::scratch::Scratch;
use super::{Planes, plane};
use crate::kernels::MAX_LANES;
use crate::kernels::activation::{Affine, Apply, Gate, PastGate, Target};
use crate::kernels::channelwise::{self, Maps, Mix, MixWeights, Pixels};
use crate::kernels::product::{Columns, Inner, Packed, Rows, RowsMut, Start};
use crate::kernels::transpose::Transpose;
use crate::parallel::{self, Threads};
use crate::shape::Batch;
use crate::simd::{self, Scalar};

/// The 1×1 convolution of the dense unit: weight (C, C), bias (C).
#[derive(Clone, Copy, Debug)]
pub struct Pointwise<'a, T> {
    pub weight: &'a [T],
    pub bias: Option<&'a [T]>,
}

/// Pixels of a panel: 64 channels of them take 256 KiB, and the inner product adds up blocks of as
/// many.
const PANEL: usize = 1024;

/// The least pixels of a panel in channels_last, where they may be of several images, and the panels that there should
/// be, for threads to share.
const LEAST_PANEL: usize = 192;
const PANELS: usize = 16;

/// The most bytes that are asked for ahead.
const AHEAD: usize = 3 << 19;

/// The panels of a batch: of each image, as many as its pixels fill. All images in channels_last are one.
struct Panels {
    batch: Batch,
    per_image: usize,
    /// Pixels of a panel, or less of the last one.
    most: usize,
}

impl Panels {
    fn new(batch: Batch, layout: Layout) -> Self {
        let all = batch.n * batch.plane();
        match layout {
            Layout::Planes => Self { batch, per_image: batch.plane().div_ceil(PANEL), most: PANEL },
            Layout::ChannelsLast => {
                let most = all.div_ceil(PANELS).clamp(LEAST_PANEL, PANEL);
                let most = all.div_ceil(all.div_ceil(most));
                let batch = Batch { n: 1, h: 1, w: all, ..batch };
                Self { batch, per_image: all.div_ceil(most), most }
            }
        }
    }

    fn len(&self) -> usize {
        self.batch.n * self.per_image
    }

    /// The pixels of panel `i`, from the first element of its image's first channel on.
    fn pixels(&self, i: usize) -> (usize, Range<usize>) {
        let start = i % self.per_image * self.most;
        (i / self.per_image, start..self.batch.plane().min(start + self.most))
    }

    /// The first element of panel `i` in a tensor.
    fn first(&self, i: usize, layout: Layout) -> usize {
        let ((n, pixels), Batch { c, .. }) = (self.pixels(i), self.batch);
        let step = if layout == Layout::Planes { 1 } else { c };
        n * c * self.batch.plane() + pixels.start * step
    }

    /// The rows of panel `i` in a tensor.
    fn rows<'a, T: Scalar>(&self, tensor: &'a [T], i: usize) -> Rows<'a, T> {
        let (Batch { c, .. }, plane) = (self.batch, self.batch.plane());
        let len = self.pixels(i).1.len();
        Rows::new(&tensor[self.first(i, Layout::Planes)..], c, plane, len)
    }

    /// The rows of panel `i` in a tensor that is written.
    ///
    /// # Safety
    /// No other reference to the same pixels may live.
    unsafe fn rows_mut<'a, T: Scalar>(
        &self,
        tensor: &'a Planes<'_, T>,
        i: usize,
    ) -> RowsMut<'a, T> {
        let (Batch { c, .. }, plane) = (self.batch, self.batch.plane());
        let (n, pixels) = self.pixels(i);
        // SAFETY: the last row ends inside image n, by `pixels`; the caller vouches for the rest.
        unsafe {
            let first = tensor.image(n).add(pixels.start);
            RowsMut::from_raw(first, c, plane, pixels.len())
        }
    }

    /// Where panel `i` begins in what the gate and the inner products will read: asked for while inner products leave
    /// memory waiting. 16 × 64 × 64 × 64 and 64 × 64 × 40 × 40, forward and backward, take 0.96 times as long so (k = 7,
    /// Zen 4). No more than the second-level cache has room for, nothing after the last panel.
    fn after<T: Scalar>(
        &self,
        i: usize,
        layout: Layout,
        tensors: [&[T]; 3],
        gx: &Planes<'_, T>,
    ) -> Vec<*const T> {
        if i >= self.len() {
            return Vec::new();
        }
        let bytes = self.batch.c * self.pixels(i).1.len() * size_of::<T>();
        let at = self.first(i, layout);
        let [grad, d, x] = tensors.map(|tensor| tensor.as_ptr().wrapping_add(at));
        let gx = gx.image(0).wrapping_add(at).cast_const();
        let order = match layout {
            Layout::Planes => [gx, d, grad, x],
            Layout::ChannelsLast => [gx, x, grad, d],
        };
        order.into_iter().take(AHEAD / bytes).collect()
    }

    /// The distance of the rows of a copy: aligned, and an odd number of vectors, lest rows fall on the
    /// same lines of the cache.
    fn ld(&self, i: usize) -> usize {
        self.pixels(i).1.len().next_multiple_of(MAX_LANES) | MAX_LANES
    }

    /// The pixels of panel i of a tensor in channels_last, all channels.
    fn pixels_of<'a, T>(&self, tensor: &'a [T], i: usize) -> &'a [T] {
        let len = self.pixels(i).1.len() * self.batch.c;
        &tensor[self.first(i, Layout::ChannelsLast)..][..len]
    }

    /// The same, copied to rows.
    fn gather<T: Scalar>(&self, tensor: &[T], i: usize) -> Scratch<T> {
        self.rows_from(self.pixels_of(tensor, i), i)
    }

    /// The pixels of panel i, all channels, copied to rows.
    fn rows_from<T: Scalar>(&self, pixels: &[T], i: usize) -> Scratch<T> {
        let (c, ld) = (self.batch.c, self.ld(i));
        let mut copy = Scratch::new(c * ld);
        simd::dispatch(Transpose::gather((pixels, c), (&mut copy, ld), pixels.len() / c, c));
        copy
    }

    fn rows_of_copy<'a, T: Scalar>(&self, copy: &'a [T], i: usize) -> Rows<'a, T> {
        Rows::new(copy, self.batch.c, self.ld(i), self.pixels(i).1.len())
    }

    /// The pixels of panel i of a tensor in channels_last, all channels.
    ///
    /// # Safety
    /// No other reference to them may live.
    #[allow(clippy::mut_from_ref)]
    unsafe fn pixels_mut<'a, T>(&self, tensor: &'a Planes<'_, T>, i: usize) -> &'a mut [T] {
        let (n, pixels) = self.pixels(i);
        let c = self.batch.c;
        // SAFETY: these pixels are inside image n; the caller vouches for the rest.
        unsafe {
            let first = tensor.image(n).add(pixels.start * c);
            std::slice::from_raw_parts_mut(first, pixels.len() * c)
        }
    }
}

/// Whether pixels are multiplied as they lie.
fn is_mixed<T: Scalar>(batch: Batch, layout: Layout) -> bool {
    let is_whole = batch.c.is_multiple_of(simd::selected_lanes::<T>());
    layout == Layout::ChannelsLast && is_whole && size_of::<T>() == size_of::<f32>()
}

/// What goes past the gate to x: grad · g(d).
pub(super) struct Past<'a, T> {
    pub gate: Gate,
    /// Both as x lies.
    pub grad: &'a [T],
    pub d: &'a [T],
    /// Of each channel.
    pub affine: Vec<Affine<T>>,
}

impl<T: Scalar> Pointwise<'_, T> {
    /// p\[n\] = weight · x\[n\] + bias; both lie as `layout` says.
    pub(super) fn forward(
        &self,
        batch: Batch,
        layout: Layout,
        x: &[T],
        p: &mut [T],
        threads: Threads,
    ) {
        let weight = Packed::new(self.weight, batch.c, batch.c);
        let mixed = is_mixed::<T>(batch, layout).then(|| {
            let bias = self.bias.map_or_else(|| vec![T::ZERO; batch.c], <[T]>::to_vec);
            MixWeights::new(self.weight, bias, simd::selected_lanes::<T>())
        });
        let panels = Panels::new(batch, layout);
        let p = Planes::new(p, panels.batch);
        parallel::for_each(threads, panels.len(), |i| {
            let start = self.bias.map_or(Start::Zero, Start::Bias);
            if layout == Layout::Planes {
                // SAFETY: this task alone names panel i.
                let c = unsafe { panels.rows_mut(&p, i) };
                simd::dispatch(Columns { a: &weight, b: panels.rows(x, i), start, c });
                return;
            }
            if let Some(weights) = &mixed {
                // SAFETY: this task alone names panel i.
                let out = unsafe { panels.pixels_mut(&p, i) };
                simd::dispatch(Mix { weights, x: panels.pixels_of(x, i), out, relu: false });
                return;
            }
            let x = panels.gather(x, i);
            let (ld, len) = (panels.ld(i), panels.pixels(i).1.len());
            let mut of_p = Scratch::new(batch.c * ld);
            let c = RowsMut::new(&mut of_p, batch.c, ld, len);
            simd::dispatch(Columns { a: &weight, b: panels.rows_of_copy(&x, i), start, c });
            // SAFETY: this task alone names panel i, all channels of which are borrowed here.
            let job = unsafe {
                let to = panels.pixels_mut(&p, i).as_mut_ptr();
                Transpose::scatter((&of_p, ld), (to, batch.c), len, batch.c)
            };
            simd::dispatch(job);
        });
    }

    /// gx, which holds the gradient at p, becomes that at x, weightᵀ · gp and what goes past the gate; writes
    /// the weight's gradient Σₙ gp\[n\] · x\[n\]ᵀ. x and gx lie as `layout` says.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn backward(
        &self,
        batch: Batch,
        layout: Layout,
        x: &[T],
        past: &Past<'_, T>,
        gx: &mut [T],
        gweight: &mut [T],
        threads: Threads,
    ) {
        let c = batch.c;
        let weight = Packed::transposed(self.weight, c, c);
        let mixed = is_mixed::<T>(batch, layout).then(|| {
            let turned: Vec<_> = (0..c * c).map(|i| self.weight[i % c * c + i / c]).collect();
            let weights = MixWeights::new(&turned, vec![T::ZERO; c], simd::selected_lanes::<T>());
            (weights, Maps::new(past.affine.iter().copied()))
        });
        let panels = Panels::new(batch, layout);
        let gx = Planes::new(gx, panels.batch);
        // A few partial sums whatever the threads: their number fixes the order of the additions.
        let parts = panels.len().min(16);
        let mut sums = vec![0.0; parts * c * c];
        let sum_planes = Planes::new(&mut sums, Batch { n: parts, c: 1, h: c, w: c });
        parallel::for_each(threads, parts, |part| {
            // SAFETY: this task alone names its part and the panels i ≡ part.
            let sum = unsafe { sum_planes.plane(part, 0) };
            for i in (part..panels.len()).step_by(parts) {
                let ((n, pixels), ld) = (panels.pixels(i), panels.ld(i));
                let next = panels.after(i + parts, layout, [past.grad, past.d, x], &gx);
                if layout == Layout::Planes {
                    let d = |c: usize| &plane(past.d, batch, n, c)[pixels.clone()];
                    let mut gp = Scratch::new(c * ld);
                    for (c, gp) in gp.chunks_exact_mut(ld).enumerate() {
                        let grad = &plane(past.grad, batch, n, c)[pixels.clone()];
                        // SAFETY: as above.
                        let out = unsafe { gx.pixels(n, c, pixels.clone()) };
                        let next = [grad.as_ptr(), d(c).as_ptr(), out.as_ptr()];
                        simd::dispatch(PastGate {
                            gate: past.gate,
                            grad,
                            d: d(c),
                            affine: past.affine[c],
                            out,
                            moved: &mut gp[..pixels.len()],
                            next: next.map(|ptr| ptr.wrapping_add(batch.plane())),
                        });
                    }
                    let gp = panels.rows_of_copy(&gp, i);
                    let b = panels.rows(x, i);
                    simd::dispatch(Inner { a: gp, b, sum: &mut *sum, next: &next });
                    // SAFETY: as above.
                    let c = unsafe { panels.rows_mut(&gx, i) };
                    simd::dispatch(Columns { a: &weight, b: gp, start: Start::Sum, c });
                    continue;
                }
                // SAFETY: as above.
                let to = unsafe { panels.pixels_mut(&gx, i) };
                let gp = panels.rows_from(to, i);
                let mut copy = panels.gather(x, i);
                let gp = panels.rows_of_copy(&gp, i);
                let b = panels.rows_of_copy(&copy, i);
                simd::dispatch(Inner { a: gp, b, sum: &mut *sum, next: &next });
                if let Some((weights, maps)) = &mixed {
                    let mut sum = Scratch::new(to.len());
                    simd::dispatch(Mix { weights, x: to, out: &mut sum, relu: false });
                    simd::dispatch(channelwise::PastGate {
                        gate: past.gate,
                        grad: Pixels::new(panels.pixels_of(past.grad, i), c),
                        d: Pixels::new(panels.pixels_of(past.d, i), c),
                        maps: maps.of(0..c),
                        sum: &sum,
                        out: to,
                    });
                    continue;
                }
                // x has been read: its copy takes the gradient.
                let (grad, d) = (panels.gather(past.grad, i), panels.gather(past.d, i));
                let rows = grad.chunks_exact(ld).zip(d.chunks_exact(ld));
                for (c, ((grad, d), out)) in rows.zip(copy.chunks_exact_mut(ld)).enumerate() {
                    simd::dispatch(Apply {
                        gate: past.gate,
                        x: &grad[..pixels.len()],
                        d: &d[..pixels.len()],
                        affine: past.affine[c],
                        out: Target::new(&mut out[..pixels.len()]),
                    });
                }
                let of_copy = RowsMut::new(&mut copy, c, ld, pixels.len());
                simd::dispatch(Columns { a: &weight, b: gp, start: Start::Sum, c: of_copy });
                // SAFETY: all channels of pixels that are borrowed here.
                let job = unsafe {
                    Transpose::scatter((&copy, ld), (to.as_mut_ptr(), c), pixels.len(), c)
                };
                simd::dispatch(job);
            }
        });
        for (at, to) in gweight.iter_mut().enumerate() {
            *to = T::from_f64(sums.chunks_exact(c * c).map(|sum| sum[at]).sum());
        }
    }
}
