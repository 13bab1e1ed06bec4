//! Depthwise convolution of tensors in channels_last (N, H, W, C): in blocks of as many channels as
//! a vector has lanes.
//!
//! A strip of a block is copied out, pixel by pixel, between columns of zeros; there it is a plane of
//! `block` times the width. Copies are aligned and stay in cache: nothing is transposed.

use super::scratch::{Scratch, Window};
use super::{DepthwiseGradients, Planes, check_depthwise, expect_len, optional_len};
use crate::kernels::conv::{self, Pixels};
use crate::parallel::{self, Threads};
use crate::shape::{Batch, Conv, Geometry, ShapeError, shape_error};
use crate::simd::{self, Scalar};

/// Errors unless [`forward`] and [`backward`] take the geometry: strides and dilations of 1, and
/// less padding than the kernel extends.
fn supported(geometry: &Geometry) -> Result<(), ShapeError> {
    let Conv { kh, kw, padding: [top, bottom, left, right], .. } = geometry.conv;
    if geometry.is_dense() && top.max(bottom) < kh && left.max(right) < kw {
        return Ok(());
    }
    Err(shape_error!(
        "channels_last is for strides and dilations of 1 and padding below the kernel size, got {:?}",
        geometry.conv
    ))
}

/// [`super::depthwise_forward`] of x (N, H, W, C) to y (N, OH, OW, C), both contiguous.
///
/// Errors if a length does not fit, strides or dilations are not 1, or padding reaches the kernel
/// size.
pub fn depthwise_forward_channels_last<T: Scalar>(
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
    supported(geometry)?;
    let threads = threads.for_work(output.size() * taps);
    convolve(geometry, x, weight, bias, y, threads, |tap| tap);
    Ok(())
}

/// The gradients of [`depthwise_forward_channels_last`], each only if it is asked for; grad, x and
/// its gradient in channels_last.
pub fn depthwise_backward_channels_last<T: Scalar>(
    geometry: &Geometry,
    grad: &[T],
    x: &[T],
    weight: &[T],
    gradients: DepthwiseGradients<'_, T>,
    threads: Threads,
) -> Result<(), ShapeError> {
    let (input, output, taps) = check_depthwise(geometry, x, weight)?;
    let DepthwiseGradients { x: gx, weight: gweight, bias: gbias } = gradients;
    expect_len("grad", grad, output.size())?;
    optional_len("x's gradient", gx.as_deref(), input.size())?;
    optional_len("weight's gradient", gweight.as_deref(), input.c * taps)?;
    optional_len("bias's gradient", gbias.as_deref(), input.c)?;
    supported(geometry)?;
    let threads = threads.for_work(output.size() * taps);
    if let Some(gx) = gx {
        // The convolution of the padded gradient with the taps turned by 180°.
        let Conv { kh, kw, padding: [top, bottom, left, right], .. } = geometry.conv;
        let padding = [kh - 1 - top, kh - 1 - bottom, kw - 1 - left, kw - 1 - right];
        let turned = Geometry::new(output, Conv { padding, ..geometry.conv })?;
        convolve(&turned, grad, weight, None, gx, threads, |tap| taps - 1 - tap);
    }
    if gweight.is_some() || gbias.is_some() {
        parameters(geometry, grad, x, gweight, gbias, threads);
    }
    Ok(())
}

/// The geometry of one block: each pixel `block` elements wide.
fn widened(geometry: &Geometry, block: usize) -> Geometry {
    let Geometry { conv, input, .. } = *geometry;
    let [top, bottom, left, right] = conv.padding;
    let kw = (conv.kw - 1) * block + 1;
    let conv = Conv { kw, padding: [top, bottom, left * block, right * block], ..conv };
    let input = Batch { n: 1, c: 1, w: input.w * block, ..input };
    Geometry { conv, input, ow: geometry.ow * block, pw: geometry.pw * block, ..*geometry }
}

/// Some channels of one image in channels_last, from its first pixel on.
#[derive(Clone, Copy)]
struct Block<'a, T> {
    image: &'a [T],
    /// Channels of the tensor, and of this block.
    step: usize,
    channels: usize,
    /// Elements of a pixel where it is copied to.
    block: usize,
}

impl<'a, T: Scalar> Block<'a, T> {
    fn new(tensor: &'a [T], shape: Batch, n: usize, first: usize, block: usize) -> Self {
        let image =
            &tensor[n * shape.plane() * shape.c + first..][..shape.plane() * shape.c - first];
        Self { image, step: shape.c, channels: block.min(shape.c - first), block }
    }

    /// Copies `count` pixels from the one at `pixel` on.
    fn copy(&self, pixel: usize, count: usize, to: &mut [T]) {
        let Self { image, step, channels, block } = *self;
        let from = &image[pixel * step..];
        simd::dispatch(Pixels::new((from, step), (to, block), count, channels));
    }

    /// Slides the window down to the padded rows `rows`.
    fn slide(&self, window: &mut Window<T>, rows: std::ops::Range<usize>, width: usize) {
        let ld = window.ld;
        window.slide(rows, |rows, padded, origin| {
            for (i, y) in rows.enumerate() {
                self.copy(y * width, width, &mut padded[origin + i * ld..]);
            }
        });
    }
}

/// y = bias + x ⋆ weight, tap `i` of which is the one at `order(i)`.
fn convolve<T: Scalar>(
    geometry: &Geometry,
    x: &[T],
    weight: &[T],
    bias: Option<&[T]>,
    y: &mut [T],
    threads: Threads,
    order: impl Fn(usize) -> usize + Sync,
) {
    let Geometry { conv: Conv { kh, kw, .. }, input, oh, ow, .. } = *geometry;
    let (output, taps, block) = (geometry.output(), kh * kw, simd::selected_lanes::<T>());
    let blocks = input.c.div_ceil(block);
    let wide = widened(geometry, block);
    let planes = Planes::new(y, output);
    parallel::for_each(threads, input.n * blocks, |task| {
        let (n, first) = (task / blocks, task % blocks * block);
        let from = Block::new(x, input, n, first, block);
        let channels = from.channels;
        let (mut weights, mut biases) = (vec![T::ZERO; taps * block], vec![T::ZERO; block]);
        for c in 0..channels {
            let of_channel = &weight[(first + c) * taps..][..taps];
            (0..taps).for_each(|i| weights[i * block + c] = of_channel[order(i)]);
            biases[c] = bias.map_or(T::ZERO, |bias| bias[first + c]);
        }
        let mut window = Window::new(&wide);
        let strip = window.strip(&wide);
        let mut out = Scratch::new(strip * wide.ow);
        let taps = conv::Taps::new(weights, (kh, kw), block, oh);
        let mut scratch = Scratch::new(taps.scratch(strip, wide.ow));
        for top in (0..oh).step_by(strip) {
            let rows = (top + strip).min(oh) - top;
            from.slide(&mut window, top..top + rows + kh - 1, input.w);
            let out = &mut out[..rows * wide.ow];
            simd::dispatch(conv::Forward {
                input: window.input(),
                ld: window.ld,
                taps: &taps,
                bias: &biases,
                out: &mut *out,
                ow: wide.ow,
                scratch: &mut scratch,
                next: &[],
            });
            // SAFETY: these channels of pixels top · ow.. of image n are inside the tensor, and this
            // task alone writes them.
            simd::dispatch(unsafe {
                let to = planes.image(n).add(top * ow * input.c + first);
                Pixels::to_raw((out, block), (to, input.c), rows * ow, channels)
            });
        }
    });
}

/// The gradients of weight and bias: a task is a block, its images in order.
fn parameters<T: Scalar>(
    geometry: &Geometry,
    grad: &[T],
    x: &[T],
    gweight: Option<&mut [T]>,
    gbias: Option<&mut [T]>,
    threads: Threads,
) {
    let Geometry { conv: Conv { kh, kw, .. }, input, oh, ow, .. } = *geometry;
    let (output, taps, block) = (geometry.output(), kh * kw, simd::selected_lanes::<T>());
    let wide = widened(geometry, block);
    let per_channel = |w: usize| Batch { n: 1, c: input.c, h: 1, w };
    let gweight = gweight.map(|gweight| Planes::new(gweight, per_channel(taps)));
    let gbias = gbias.map(|gbias| Planes::new(gbias, per_channel(1)));
    parallel::for_each(threads, input.c.div_ceil(block), |task| {
        let first = task * block;
        let mut sum = vec![0.0; taps * block];
        let mut sum_bias = vec![0.0; block];
        let mut window = Window::new(&wide);
        let strip = window.strip(&wide);
        let mut at = Scratch::new(strip * wide.ow);
        at.fill(T::ZERO);
        for n in 0..input.n {
            let (from, to) =
                (Block::new(x, input, n, first, block), Block::new(grad, output, n, first, block));
            for top in (0..oh).step_by(strip) {
                let rows = (top + strip).min(oh) - top;
                to.copy(top * ow, rows * ow, &mut at);
                let at = &at[..rows * wide.ow];
                if gbias.is_some() {
                    for pixel in at.chunks_exact(block) {
                        sum_bias.iter_mut().zip(pixel).for_each(|(sum, g)| *sum += g.to_f64());
                    }
                }
                if gweight.is_some() {
                    from.slide(&mut window, top..top + rows + kh - 1, input.w);
                    simd::dispatch(conv::WeightGradient {
                        grad: at,
                        grad_ld: wide.ow,
                        input: window.input(),
                        ld: window.ld,
                        sum: &mut sum,
                        kernel: (kh, kw),
                        out: (rows, wide.ow),
                        block,
                        next: [&[]; 2],
                    });
                }
            }
        }
        for c in 0..block.min(input.c - first) {
            if let Some(gweight) = &gweight {
                // SAFETY: this task alone names these channels.
                let gweight = unsafe { gweight.plane(0, first + c) };
                let of_channel = sum[c..].iter().step_by(block);
                gweight.iter_mut().zip(of_channel).for_each(|(g, &sum)| *g = T::from_f64(sum));
            }
            if let Some(gbias) = &gbias {
                // SAFETY: as above.
                unsafe { gbias.plane(0, first + c)[0] = T::from_f64(sum_bias[c]) };
            }
        }
    });
}
