//! The 1×1 convolution of the dense unit, forward and backward: matrix products over panels of
//! pixels.

use std::ops::Range;

use super::groups::Layout;
use super::scratch::Scratch;
use super::small::{from_pixels, turn};
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

/// The most pixels of planes of which several images are turned to pixels, and are one panel.
const TURNED: usize = 256;

/// The most bytes that are asked for ahead.
const AHEAD: usize = 3 << 19;

/// The least channels in channels_last of which the weight's gradient is a product of pixels as they lie: an inner
/// product adds up the lanes of a vector for each pair of channels.
const PIXELS_LIE: usize = 192;
/// Pixels whose products are added up in `T`, for its digits.
const SUMMED: usize = 256;

/// The panels of a batch: of each image, as many as its pixels fill. All images in channels_last are one, and short
/// planes of several are one panel.
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

    /// Whole images, of which several are a panel, as if they were in channels_last.
    fn of_images(batch: Batch) -> Self {
        let plane = batch.plane();
        let panels = Self::new(batch, Layout::ChannelsLast);
        let most = (panels.most / plane).max(1) * plane;
        Self { per_image: (batch.n * plane).div_ceil(most), most, ..panels }
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

/// Whether there are kernels for pixels as they lie in channels_last.
fn has_pixels<T: Scalar>(batch: Batch) -> bool {
    batch.c.is_multiple_of(simd::selected_lanes::<T>()) && size_of::<T>() == size_of::<f32>()
}

/// Whether pixels are multiplied as they lie.
fn is_mixed<T: Scalar>(batch: Batch, layout: Layout) -> bool {
    layout == Layout::ChannelsLast && has_pixels::<T>(batch)
}

/// Whether planes are so short that panels are of several images, which are turned to pixels.
fn is_turned<T: Scalar>(batch: Batch, layout: Layout) -> bool {
    layout == Layout::Planes && batch.plane() <= TURNED && has_pixels::<T>(batch)
}

/// sum\[m\]\[k\] += Σ a\[m\] · b\[k\] over pixels of `c` channels.
fn add_products<T: Scalar>(sum: &mut [f64], a: &[T], b: &[T], c: usize) {
    let mut products = Scratch::<T>::new(c * c);
    for (a, b) in a.chunks(SUMMED * c).zip(b.chunks(SUMMED * c)) {
        let pixels = a.len() / c;
        let a = Packed::transposed(a, pixels, c);
        let (b, c) = (Rows::new(b, pixels, c, c), RowsMut::new(&mut products, c, c, c));
        simd::dispatch(Columns { a: &a, b, start: Start::Zero, c });
        for (sum, product) in sum.iter_mut().zip(&*products) {
            *sum += product.to_f64();
        }
    }
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

/// What pixels are multiplied with.
enum Weight<T> {
    /// In rows of them.
    Rows(Packed<T>),
    /// As they lie in channels_last.
    Pixels(MixWeights<T>),
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
        let c = batch.c;
        let weight = if is_mixed::<T>(batch, layout) {
            let bias = self.bias.map_or_else(|| vec![T::ZERO; c], <[T]>::to_vec);
            Weight::Pixels(MixWeights::new(self.weight, bias, simd::selected_lanes::<T>()))
        } else {
            Weight::Rows(Packed::new(self.weight, c, c))
        };
        let panels = Panels::new(batch, layout);
        let p = Planes::new(p, panels.batch);
        parallel::for_each(threads, panels.len(), |i| {
            let start = self.bias.map_or(Start::Zero, Start::Bias);
            match (&weight, layout) {
                (Weight::Rows(weight), Layout::Planes) => {
                    // SAFETY: this task alone names panel i.
                    let c = unsafe { panels.rows_mut(&p, i) };
                    simd::dispatch(Columns { a: weight, b: panels.rows(x, i), start, c });
                }
                (Weight::Pixels(weights), _) => {
                    // SAFETY: as above.
                    let out = unsafe { panels.pixels_mut(&p, i) };
                    simd::dispatch(Mix { weights, x: panels.pixels_of(x, i), out, relu: false });
                }
                (Weight::Rows(weight), Layout::ChannelsLast) => {
                    let x = panels.gather(x, i);
                    let (ld, len) = (panels.ld(i), panels.pixels(i).1.len());
                    let mut of_p = Scratch::new(c * ld);
                    let to = RowsMut::new(&mut of_p, c, ld, len);
                    let b = panels.rows_of_copy(&x, i);
                    simd::dispatch(Columns { a: weight, b, start, c: to });
                    // SAFETY: as above, all channels of which are borrowed here.
                    let job = unsafe {
                        let to = panels.pixels_mut(&p, i).as_mut_ptr();
                        Transpose::scatter((&of_p, ld), (to, c), len, c)
                    };
                    simd::dispatch(job);
                }
            }
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
        let turned = is_turned::<T>(batch, layout);
        let weight = if turned || is_mixed::<T>(batch, layout) {
            let (bias, lanes) = (vec![T::ZERO; c], simd::selected_lanes::<T>());
            Weight::Pixels(MixWeights::transposed(self.weight, bias, lanes))
        } else {
            Weight::Rows(Packed::transposed(self.weight, c, c))
        };
        let panels = if turned { Panels::of_images(batch) } else { Panels::new(batch, layout) };
        let maps = Maps::new(past.affine.iter().copied());
        let gx = Planes::new(gx, panels.batch);
        let job = Backward { batch, layout, panels, x, past, maps, gx };
        // A few partial sums whatever the threads: their number fixes the order of the additions.
        let parts = job.panels.len().min(16);
        let mut sums = vec![0.0; parts * c * c];
        let sum_planes = Planes::new(&mut sums, Batch { n: parts, c: 1, h: c, w: c });
        parallel::for_each(threads, parts, |part| {
            // SAFETY: this task alone names its part and the panels i ≡ part.
            let sum = unsafe { sum_planes.plane(part, 0) };
            for i in (part..job.panels.len()).step_by(parts) {
                // SAFETY: as above.
                unsafe {
                    match (&weight, layout) {
                        (Weight::Rows(weight), Layout::Planes) => {
                            job.planes(weight, i, i + parts, sum);
                        }
                        (Weight::Pixels(weight), Layout::Planes) => job.turned(weight, i, sum),
                        (Weight::Pixels(weight), Layout::ChannelsLast) => {
                            job.pixels(weight, i, i + parts, sum);
                        }
                        (Weight::Rows(weight), Layout::ChannelsLast) => {
                            job.copies(weight, i, i + parts, sum);
                        }
                    }
                }
            }
        });
        for (at, to) in gweight.iter_mut().enumerate() {
            *to = T::from_f64(sums.chunks_exact(c * c).map(|sum| sum[at]).sum());
        }
    }
}

/// What the panels of [`Pointwise::backward`] share. Each adds the products of its pixels to `sum`; beside inner
/// products it asks for what panel `after` begins with.
struct Backward<'a, T> {
    batch: Batch,
    layout: Layout,
    panels: Panels,
    x: &'a [T],
    past: &'a Past<'a, T>,
    /// Those of `past`.
    maps: Maps<T>,
    gx: Planes<'a, T>,
}

impl<T: Scalar> Backward<'_, T> {
    fn after(&self, after: usize) -> Vec<*const T> {
        let tensors = [self.past.grad, self.past.d, self.x];
        self.panels.after(after, self.layout, tensors, &self.gx)
    }

    /// Planes as they lie.
    ///
    /// # Safety
    /// No other task may name panel `i`.
    unsafe fn planes(&self, weight: &Packed<T>, i: usize, after: usize, sum: &mut [f64]) {
        let Self { batch, panels, past, gx, .. } = self;
        let ((n, pixels), ld) = (panels.pixels(i), panels.ld(i));
        let d = |c: usize| &plane(past.d, *batch, n, c)[pixels.clone()];
        let mut gp = Scratch::new(batch.c * ld);
        for (c, gp) in gp.chunks_exact_mut(ld).enumerate() {
            let grad = &plane(past.grad, *batch, n, c)[pixels.clone()];
            // SAFETY: the caller's promise.
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
        let b = panels.rows(self.x, i);
        simd::dispatch(Inner { a: gp, b, sum, next: &self.after(after) });
        // SAFETY: the caller's promise.
        let c = unsafe { panels.rows_mut(gx, i) };
        simd::dispatch(Columns { a: weight, b: gp, start: Start::Sum, c });
    }

    /// The planes of some images, turned to pixels.
    ///
    /// # Safety
    /// As [`Backward::planes`].
    unsafe fn turned(&self, weights: &MixWeights<T>, i: usize, sum: &mut [f64]) {
        let Self { batch: Batch { c, .. }, panels, past, gx, .. } = self;
        let (c, plane) = (*c, self.batch.plane());
        // SAFETY: the caller's promise.
        let to = unsafe { panels.pixels_mut(gx, i) };
        let [grad, d, x] = [past.grad, past.d, self.x].map(|tensor| panels.pixels_of(tensor, i));
        let (mut gp, mut of_x) = (Scratch::new(to.len()), Scratch::new(to.len()));
        let mut image = Scratch::new(c * plane);
        for at in (0..to.len()).step_by(c * plane) {
            for (c, image) in image.chunks_exact_mut(plane).enumerate() {
                let at = at + c * plane..at + (c + 1) * plane;
                let (grad, d, out) = (&grad[at.clone()], &d[at.clone()], &mut to[at]);
                let next = [grad.as_ptr(), d.as_ptr(), out.as_ptr()];
                simd::dispatch(PastGate {
                    gate: past.gate,
                    grad,
                    d,
                    affine: past.affine[c],
                    out,
                    moved: image,
                    next: next.map(|ptr| ptr.wrapping_add(plane)),
                });
            }
            let at = at..at + c * plane;
            turn(&image, plane, &mut gp[at.clone()]);
            turn(&x[at.clone()], plane, &mut of_x[at]);
        }
        add_products(sum, &gp, &of_x, c);
        // x has been read: its pixels take the gradient.
        simd::dispatch(Mix { weights, x: &gp, out: &mut of_x, relu: false });
        for (of_x, to) in of_x.chunks_exact(c * plane).zip(to.chunks_exact_mut(c * plane)) {
            from_pixels(of_x, &mut image, plane);
            for (to, &gradient) in to.iter_mut().zip(&*image) {
                *to = T::from_f64(to.to_f64() + gradient.to_f64());
            }
        }
    }

    /// Pixels as they lie.
    ///
    /// # Safety
    /// As [`Backward::planes`].
    unsafe fn pixels(&self, weights: &MixWeights<T>, i: usize, after: usize, sum: &mut [f64]) {
        let Self { batch: Batch { c, .. }, panels, past, maps, .. } = self;
        // SAFETY: the caller's promise.
        let to = unsafe { panels.pixels_mut(&self.gx, i) };
        if *c >= PIXELS_LIE {
            add_products(sum, to, panels.pixels_of(self.x, i), *c);
        } else {
            let (gp, x) = (panels.rows_from(to, i), panels.gather(self.x, i));
            let [a, b] = [&gp, &x].map(|copy| panels.rows_of_copy(copy, i));
            simd::dispatch(Inner { a, b, sum, next: &self.after(after) });
        }
        let mut sum = Scratch::new(to.len());
        simd::dispatch(Mix { weights, x: to, out: &mut sum, relu: false });
        simd::dispatch(channelwise::PastGate {
            gate: past.gate,
            grad: Pixels::new(panels.pixels_of(past.grad, i), *c),
            d: Pixels::new(panels.pixels_of(past.d, i), *c),
            maps: maps.of(0..*c),
            sum: &sum,
            out: to,
        });
    }

    /// Pixels copied to rows.
    ///
    /// # Safety
    /// As [`Backward::planes`].
    unsafe fn copies(&self, weight: &Packed<T>, i: usize, after: usize, sum: &mut [f64]) {
        let Self { batch: Batch { c, .. }, panels, past, .. } = self;
        let (c, ld, pixels) = (*c, panels.ld(i), panels.pixels(i).1.len());
        // SAFETY: the caller's promise.
        let to = unsafe { panels.pixels_mut(&self.gx, i) };
        let gp = panels.rows_from(to, i);
        let mut copy = panels.gather(self.x, i);
        let gp = panels.rows_of_copy(&gp, i);
        let b = panels.rows_of_copy(&copy, i);
        simd::dispatch(Inner { a: gp, b, sum, next: &self.after(after) });
        // x has been read: its copy takes the gradient.
        let (grad, d) = (panels.gather(past.grad, i), panels.gather(past.d, i));
        let rows = grad.chunks_exact(ld).zip(d.chunks_exact(ld));
        for (c, ((grad, d), out)) in rows.zip(copy.chunks_exact_mut(ld)).enumerate() {
            simd::dispatch(Apply {
                gate: past.gate,
                x: &grad[..pixels],
                d: &d[..pixels],
                affine: past.affine[c],
                out: Target::new(&mut out[..pixels]),
            });
        }
        let of_copy = RowsMut::new(&mut copy, c, ld, pixels);
        simd::dispatch(Columns { a: weight, b: gp, start: Start::Sum, c: of_copy });
        // SAFETY: all channels of pixels that are borrowed here.
        let job = unsafe { Transpose::scatter((&copy, ld), (to.as_mut_ptr(), c), pixels, c) };
        simd::dispatch(job);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// More pixels than are added up at once.
    #[test]
    fn products_of_pixels_are_added_to_the_sum() {
        let (c, pixels) = (29, 2 * SUMMED + 7);
        let value = |i: usize| (i * 37 % 101) as f32 / 16.0 - 3.0;
        let [a, b] = [0, 5].map(|first| (first..first + c * pixels).map(value).collect::<Vec<_>>());
        let mut sum = vec![1.5; c * c];
        add_products(&mut sum, &a, &b, c);
        for (at, sum) in sum.into_iter().enumerate() {
            let (m, k) = (at / c, at % c);
            let product = |p: usize| f64::from(a[p * c + m]) * f64::from(b[p * c + k]);
            // Products of sixteenths, of which no sum of so many has more digits than f32.
            assert_eq!(sum, 1.5 + (0..pixels).map(product).sum::<f64>(), "{m}, {k}");
        }
    }
}
