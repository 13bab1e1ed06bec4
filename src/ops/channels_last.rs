//! Depthwise convolution of tensors in channels_last (N, H, W, C): where [`pixels`] does not take them as they lie, in
//! blocks of as many channels as a vector has lanes.
//!
//! A strip of a block is copied out, pixel by pixel, between columns of zeros; there it is a plane of
//! `block` times the width. Copies are aligned and stay in cache: nothing is transposed.

use super::pixels;
use super::scratch::{Scratch, Window};
use super::{DepthwiseGradients, Planes, check_depthwise, expect_len, optional_len};
use crate::kernels::activation::{CopyOut, Target};
use crate::kernels::conv::{self, Pixels};
use crate::kernels::general::{BlockForward, BlockWeightGradient, Places};
use crate::parallel::{self, Threads};
use crate::shape::{Batch, Conv, Geometry, ShapeError};
use crate::simd::{self, Scalar};

/// Whether the register-tiled kernels take the geometry, forward and backward: strides and dilations of
/// 1, and less padding than the kernel extends.
fn is_tiled(geometry: &Geometry) -> bool {
    let Conv { kh, kw, padding: [top, bottom, left, right], .. } = geometry.conv;
    geometry.is_dense() && top.max(bottom) < kh && left.max(right) < kw
}

/// [`super::depthwise_forward`] of x (N, H, W, C) to y (N, OH, OW, C), both contiguous.
///
/// Errors if a length does not fit.
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
    let threads = threads.for_work(output.size() * taps);
    if pixels::is_direct(geometry, weight) {
        pixels::forward(geometry, x, weight, bias, y, threads);
    } else if is_tiled(geometry) {
        convolve(geometry, x, weight, bias, y, threads, |tap| tap);
    } else {
        convolve_general(geometry, x, weight, bias, y, threads);
    }
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
    let DepthwiseGradients { x: gx, weight: mut gweight, bias: mut gbias } = gradients;
    expect_len("grad", grad, output.size())?;
    optional_len("x's gradient", gx.as_deref(), input.size())?;
    optional_len("weight's gradient", gweight.as_deref(), input.c * taps)?;
    optional_len("bias's gradient", gbias.as_deref(), input.c)?;
    let threads = threads.for_work(output.size() * taps);
    let direct = pixels::is_direct(geometry, weight);
    if let Some(gx) = gx {
        if direct {
            pixels::input_gradient(geometry, grad, weight, gx, threads);
        } else if is_tiled(geometry) {
            // The convolution of the padded gradient with the taps turned by 180°.
            let Conv { kh, kw, padding: [top, bottom, left, right], .. } = geometry.conv;
            let padding = [kh - 1 - top, kh - 1 - bottom, kw - 1 - left, kw - 1 - right];
            let turned = Geometry::new(output, Conv { padding, ..geometry.conv })?;
            convolve(&turned, grad, weight, None, gx, threads, |tap| taps - 1 - tap);
        } else {
            transposed(geometry, grad, weight, gx, threads);
        }
    }
    let wanted = gweight.is_some() || gbias.is_some();
    if wanted && direct {
        let (gweight, gbias) = (gweight.as_deref_mut(), gbias.as_deref_mut());
        if pixels::parameters(geometry, grad, x, gweight, gbias, threads) {
            return Ok(());
        }
    }
    if wanted {
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

    /// The taps in this order, (taps, lanes), and the bias of each lane, of channels from `first` on.
    fn constants(
        &self,
        first: usize,
        weight: &[T],
        bias: Option<&[T]>,
        order: impl Iterator<Item = usize> + Clone,
    ) -> (Vec<T>, Vec<T>) {
        let taps = weight.len() / self.step;
        let lane = |c: usize| (c < self.channels).then_some(first + c);
        let of_tap = |tap: usize, c| lane(c).map_or(T::ZERO, |c| weight[c * taps + tap]);
        let weights = order.flat_map(|tap| (0..self.block).map(move |c| of_tap(tap, c)));
        let bias = |c| lane(c).and_then(|c| Some(bias?[c])).unwrap_or(T::ZERO);
        (weights.collect(), (0..self.block).map(bias).collect())
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
    let planes = Planes::result(y, output);
    parallel::for_each(threads, input.n * blocks, |task| {
        let (n, first) = (task / blocks, task % blocks * block);
        let from = Block::new(x, input, n, first, block);
        let channels = from.channels;
        let (weights, biases) = from.constants(first, weight, bias, (0..taps).map(&order));
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
                out: Target::new(&mut *out),
                ow: wide.ow,
                scratch: &mut scratch,
                next: conv::Next::default(),
                copy: CopyOut::default(),
            });
            // SAFETY: these channels of pixels top · ow.. of image n are inside the tensor, and this
            // task alone writes them.
            simd::dispatch(unsafe {
                let to = planes.image(n).add(top * ow * input.c + first);
                Pixels::to_raw((out, block), (to, input.c), rows * ow, channels)
                    .streamed(planes.stream)
            });
        }
    });
}

/// What the padded rows of a strip fill, about: they are written and then read once for each tap.
const STRIP_BYTES: usize = 256 << 10;

/// The padded plane of a block, strip by strip, for any stride, dilation and padding.
struct Padded<T> {
    data: Scratch<T>,
    geometry: Geometry,
    block: usize,
}

impl<T: Scalar> Padded<T> {
    fn new(geometry: &Geometry, block: usize) -> Self {
        let Geometry { conv, pw, ph, oh, .. } = *geometry;
        let reach = (conv.kh - 1) * conv.dilation[0] + 1;
        let most = (STRIP_BYTES / (pw * block * size_of::<T>())).saturating_sub(reach);
        let strip = (most / conv.stride[0] + 1).max(4).min(oh);
        let mut data = Scratch::new(((strip - 1) * conv.stride[0] + reach).min(ph) * pw * block);
        data.fill(T::ZERO);
        Self { data, geometry: *geometry, block }
    }

    /// Rows of outputs of a strip.
    fn strip(&self) -> usize {
        let Geometry { conv, pw, .. } = self.geometry;
        let reach = (conv.kh - 1) * conv.dilation[0] + 1;
        (self.data.len() / (pw * self.block) - reach) / conv.stride[0] + 1
    }

    /// Where each tap of the first output lies.
    fn offsets(&self) -> Vec<usize> {
        let Geometry { conv: Conv { kh, kw, dilation: [down, right], .. }, pw, .. } = self.geometry;
        (0..kh * kw).map(|tap| (tap / kw * down * pw + tap % kw * right) * self.block).collect()
    }

    /// Elements from one row of outputs to the next, and from one output to the next.
    fn steps(&self) -> (usize, usize) {
        let Geometry { conv: Conv { stride: [down, right], .. }, pw, .. } = self.geometry;
        (down * pw * self.block, right * self.block)
    }

    /// Takes in what the outputs from row `y` on depend on.
    fn fill(&mut self, from: &Block<'_, T>, y: usize) {
        let Geometry { conv: Conv { stride, padding, .. }, input, pw, .. } = self.geometry;
        let [top, _, left, _] = padding;
        let block = self.block;
        for (i, row) in self.data.chunks_exact_mut(pw * block).enumerate() {
            let row = &mut row[left * block..][..input.w * block];
            match (y * stride[0] + i).checked_sub(top).filter(|&y| y < input.h) {
                Some(y) => from.copy(y * input.w, input.w, row),
                None => row.fill(T::ZERO),
            }
        }
    }
}

/// [`convolve`] of any stride, dilation and padding.
fn convolve_general<T: Scalar>(
    geometry: &Geometry,
    x: &[T],
    weight: &[T],
    bias: Option<&[T]>,
    y: &mut [T],
    threads: Threads,
) {
    let Geometry { conv: Conv { kh, kw, .. }, input, oh, ow, .. } = *geometry;
    let (c, block) = (input.c, simd::selected_lanes::<T>());
    let blocks = c.div_ceil(block);
    let planes = Planes::new(y, geometry.output());
    parallel::for_each(threads, input.n * blocks, |task| {
        let (n, first) = (task / blocks, task % blocks * block);
        let from = Block::new(x, input, n, first, block);
        let (weight, bias) = from.constants(first, weight, bias, 0..kh * kw);
        let mut padded = Padded::new(geometry, block);
        let (offsets, strip) = (padded.offsets(), padded.strip());
        for top in (0..oh).step_by(strip) {
            padded.fill(&from, top);
            let rows = strip.min(oh - top);
            // SAFETY: these channels of these rows of image n are inside the tensor, and this task alone
            // writes them.
            let out = unsafe {
                let first = planes.image(n).add(top * ow * c + first);
                Places::new(first, (ow * c, c), (rows, ow), from.channels)
            };
            let (input, steps) = (&padded.data[..], padded.steps());
            let (offsets, weight, bias) = (&offsets[..], &weight[..], &bias[..]);
            simd::dispatch(BlockForward { input, steps, offsets, weight, bias, out });
        }
    });
}

/// The gradient of x for any stride, dilation and padding: the rows and columns of one phase are a
/// convolution of the gradient with the taps that reach them, as in `ops::phases`.
fn transposed<T: Scalar>(
    geometry: &Geometry,
    grad: &[T],
    weight: &[T],
    gx: &mut [T],
    threads: Threads,
) {
    let Geometry { conv, input, oh, ow, ph, pw } = *geometry;
    let Conv { kh, kw, stride: [sh, sw], padding: [top, _, left, _], dilation: [dh, dw] } = conv;
    let (c, block) = (input.c, simd::selected_lanes::<T>());
    let blocks = c.div_ceil(block);
    let lead = [(kh - 1) * dh / sh, (kw - 1) * dw / sw];
    let (height, width) = (lead[0] + ph.div_ceil(sh), lead[1] + pw.div_ceil(sw));
    let planes = Planes::new(gx, input);
    parallel::for_each(threads, input.n * blocks, |task| {
        let (n, first) = (task / blocks, task % blocks * block);
        let from = Block::new(grad, geometry.output(), n, first, block);
        let mut padded = Scratch::new(height * width * block);
        padded.fill(T::ZERO);
        for y in 0..oh {
            let row = &mut padded[((lead[0] + y) * width + lead[1]) * block..][..ow * block];
            from.copy(y * ow, ow, row);
        }
        // Of a phase beyond the padded plane there is nothing.
        let phases = (0..sh.min(ph)).flat_map(|py| (0..sw.min(pw)).map(move |px| (py, px)));
        for (py, px) in phases {
            let reaches = |&tap: &usize| tap / kw * dh % sh == py && tap % kw * dw % sw == px;
            let taps: Vec<_> = (0..kh * kw).filter(reaches).collect();
            let (weight, zeros) = from.constants(first, weight, None, taps.iter().copied());
            // The first row and column of x of this phase, which it is of the gradient, and how many.
            let places = |phase: usize, stride: usize, padding: usize, len: usize| {
                let at = (phase + stride - padding % stride) % stride;
                (at, (at + padding) / stride, len.saturating_sub(at).div_ceil(stride))
            };
            let (y, row, rows) = places(py, sh, top, input.h);
            let (x, column, columns) = places(px, sw, left, input.w);
            if rows == 0 || columns == 0 {
                continue;
            }
            let of_tap = |&tap: &usize| {
                let (up, before) = (tap / kw * dh / sh, tap % kw * dw / sw);
                ((lead[0] + row - up) * width + lead[1] + column - before) * block
            };
            // SAFETY: these channels of these pixels of image n are inside the tensor, and this task
            // alone writes them.
            let out = unsafe {
                let first = planes.image(n).add((y * input.w + x) * c + first);
                Places::new(first, (sh * input.w * c, sw * c), (rows, columns), from.channels)
            };
            simd::dispatch(BlockForward {
                input: &padded,
                steps: (width * block, block),
                offsets: &taps.iter().map(of_tap).collect::<Vec<_>>(),
                weight: &weight,
                bias: &zeros,
                out,
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
        let mut window = match is_tiled(geometry) {
            true => Ok(Window::new(&wide)),
            false => Err(Padded::new(geometry, block)),
        };
        let offsets = window.as_ref().err().map_or_else(Vec::new, Padded::offsets);
        let strip = window.as_ref().map_or_else(Padded::strip, |window| window.strip(&wide));
        let mut at = Scratch::new(strip * ow * block);
        at.fill(T::ZERO);
        for n in 0..input.n {
            let (from, to) =
                (Block::new(x, input, n, first, block), Block::new(grad, output, n, first, block));
            for top in (0..oh).step_by(strip) {
                let rows = (top + strip).min(oh) - top;
                to.copy(top * ow, rows * ow, &mut at);
                let at = &at[..rows * ow * block];
                if gbias.is_some() {
                    for pixel in at.chunks_exact(block) {
                        sum_bias.iter_mut().zip(pixel).for_each(|(sum, g)| *sum += g.to_f64());
                    }
                }
                match &mut window {
                    _ if gweight.is_none() => {}
                    Ok(window) => {
                        from.slide(window, top..top + rows + kh - 1, input.w);
                        simd::dispatch(conv::WeightGradient {
                            grad: at,
                            grad_ld: ow * block,
                            input: window.input(),
                            ld: window.ld,
                            sum: &mut sum,
                            kernel: (kh, kw),
                            out: (rows, ow * block),
                            block,
                            next: [&[]; 2],
                        });
                    }
                    Err(padded) => {
                        padded.fill(&from, top);
                        simd::dispatch(BlockWeightGradient {
                            grad: at,
                            count: (rows, ow),
                            input: &padded.data,
                            steps: padded.steps(),
                            offsets: &offsets,
                            sum: &mut sum,
                        });
                    }
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
