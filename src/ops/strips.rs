//! Dense depthwise convolution of one plane after another with the same taps, strip by strip.

use std::ops::Range;

use super::scratch::{Scratch, Window, strip_rows};
use crate::kernels::activation::{Affine, CopyOut, Target};
use crate::kernels::{conv, filtered, masked};
use crate::shape::{Batch, Geometry};
use crate::simd::{self, Scalar};

/// What the kernel reads.
enum Input<T> {
    /// The plane, of which it masks the padding.
    Masked,
    /// The plane, whose rows it filters.
    Filtered,
    /// The padded plane.
    Padded(Window<T>),
}

/// The convolution of planes, or of relu of a map of them.
pub(super) struct Strips<T> {
    geometry: Geometry,
    taps: conv::Taps<T>,
    bias: T,
    relu_of: Option<Affine<T>>,
    input: Input<T>,
    /// Rows of outputs of a strip.
    rows: usize,
    scratch: Scratch<T>,
}

impl<T: Scalar> Strips<T> {
    pub(super) fn new(
        geometry: &Geometry,
        weight: Vec<T>,
        bias: T,
        relu_of: Option<Affine<T>>,
    ) -> Self {
        let Geometry { conv, input, ow, oh, .. } = *geometry;
        let taps = conv::Taps::new(weight, (conv.kh, conv.kw), 1, oh);
        let rows = strip_rows(geometry, input.w, size_of::<T>());
        let last = (oh - 1) % rows + 1;
        let input = if relu_of.is_none() && taps.pads(last, ow, conv.padding) {
            Input::Masked
        } else if taps.filters(conv.padding) {
            Input::Filtered
        } else {
            Input::Padded(Window::new(geometry))
        };
        let rows = match &input {
            Input::Padded(window) => window.strip(geometry),
            _ => rows,
        };
        let scratch = Scratch::new(taps.scratch(rows, ow));
        Self { geometry: *geometry, taps, bias, relu_of, input, rows, scratch }
    }

    /// Rows of outputs of a strip, but for the last one.
    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// Whether [`Strips::run`] writes past the caches what may go there.
    pub(super) fn streams(&self) -> bool {
        self.taps.streams(self.rows, self.geometry.ow)
    }

    /// The rows of the plane among those of the padded one.
    fn inside(&self, rows: Range<usize>) -> Range<usize> {
        let row = |row: usize| {
            row.saturating_sub(self.geometry.conv.padding[0]).min(self.geometry.input.h)
        };
        row(rows.start)..row(rows.end)
    }

    /// The strip of outputs from row y on of the plane that `x` begins with, to `out`. Strips of a plane come in
    /// order; `next` begins with the plane that comes after it. What `copy` says is made meanwhile.
    pub(super) fn run(
        &mut self,
        y: usize,
        x: &[T],
        next: &[T],
        mut out: Target<'_, T>,
        copy: CopyOut<'_, T>,
    ) {
        let Geometry { conv, input: Batch { h, w, .. }, ow, oh, .. } = self.geometry;
        let [top, _, left, right] = conv.padding;
        let end = (y + self.rows).min(oh);
        // The padded rows that this strip reads.
        let padded = y..end + conv.kh - 1;
        let (Range { start, end: last }, above) =
            (self.inside(padded.clone()), top.saturating_sub(y));
        let next = if end < oh {
            &x[last * w..self.inside(end..padded.end + self.rows).end * w]
        } else {
            &next[..next.len().min(self.inside(0..self.rows + conv.kh - 1).end * w)]
        };
        let Self { taps, bias, relu_of, input, scratch, .. } = self;
        let (bias, relu_of) = (&[*bias], *relu_of);
        match input {
            Input::Masked => {
                let padding = [above, padded.end.saturating_sub(top + h), left, right];
                let rows = &x[start * w..];
                let len = masked::input_len(last - start, ow, conv.kh, padding);
                let mut copied;
                let input = if len <= rows.len() {
                    &rows[..len]
                } else {
                    // The last vectors reach over the tensor's end.
                    copied = Scratch::new(len);
                    copied[..rows.len()].copy_from_slice(rows);
                    &copied[..]
                };
                let bias = bias[0];
                simd::dispatch(masked::Forward { input, padding, taps, bias, out, ow, next, copy });
            }
            Input::Filtered => {
                let (rows, padding) = (last - start, [above, left]);
                let data = &x[start * w..last * w];
                let input = filtered::Rows { data, ld: w, rows, width: w, padding, relu_of };
                let to = out.again();
                let filtered =
                    filtered::Forward { input, taps, bias, out: to, ow, scratch, next, copy };
                if !simd::dispatch(filtered) {
                    self.plain(y..end, x, out);
                }
            }
            Input::Padded(window) => {
                window.slide_over(padded, (x, 0), relu_of);
                let (input, ld) = (window.input(), window.ld);
                simd::dispatch(conv::Forward {
                    input,
                    ld,
                    taps,
                    bias,
                    out,
                    ow,
                    scratch,
                    next,
                    copy,
                });
            }
        }
    }

    /// These rows of outputs by plain sums of the padded plane: where filtering spreads infinities and NaNs.
    fn plain(&self, rows: Range<usize>, x: &[T], mut out: Target<'_, T>) {
        // What was written past the caches is written again.
        simd::fence();
        let Self { geometry, taps, bias, relu_of, .. } = self;
        let Geometry { conv, ow, .. } = *geometry;
        let mut window = Window::new(geometry);
        window.restart(rows.start);
        let strip = window.strip(geometry);
        for y in rows.clone().step_by(strip) {
            let end = (y + strip).min(rows.end);
            window.slide_over(y..end + conv.kh - 1, (x, 0), *relu_of);
            let pixels = (y - rows.start) * ow..(end - rows.start) * ow;
            simd::dispatch(conv::Plain(conv::Forward {
                input: window.input(),
                ld: window.ld,
                taps,
                bias: &[*bias],
                out: out.part(pixels),
                ow,
                scratch: &mut [],
                next: &[],
                copy: CopyOut::default(),
            }));
        }
    }
}
