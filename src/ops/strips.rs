//! Dense depthwise convolution of one plane after another, strip by strip.

use std::ops::Range;

use super::scratch::{Scratch, Window, strip_rows};
use crate::kernels::activation::{Affine, CopyOut, Target};
use crate::kernels::conv::{self, Next};
use crate::kernels::{filtered, masked};
use crate::shape::{Batch, Geometry};
use crate::simd::{self, Scalar};

/// What the planes of a channel are convolved with.
pub(super) struct Weights<T> {
    pub(super) taps: conv::Taps<T>,
    pub(super) bias: T,
    /// What the taps meet is relu of this map of the planes; `None`: the planes as they are.
    pub(super) relu_of: Option<Affine<T>>,
}

/// What the kernel reads.
enum Input<T> {
    /// The plane, of which it masks the padding.
    Masked,
    /// The plane, whose rows it filters.
    Filtered,
    /// The padded plane.
    Padded(Window<T>),
}

/// The convolution of planes of one channel, or of several whose taps are made alike and which have a ReLU.
pub(super) struct Strips<T> {
    geometry: Geometry,
    input: Input<T>,
    /// Rows of outputs of a strip.
    rows: usize,
    scratch: Scratch<T>,
}

impl<T: Scalar> Strips<T> {
    pub(super) fn new(geometry: &Geometry, weights: &Weights<T>) -> Self {
        let Geometry { conv, input, ow, oh, .. } = *geometry;
        let taps = &weights.taps;
        let rows = strip_rows(geometry, input.w, size_of::<T>());
        let last = (oh - 1) % rows + 1;
        let input = if weights.relu_of.is_none() && taps.pads(last, ow, conv.padding) {
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
        Self { geometry: *geometry, input, rows, scratch }
    }

    /// Rows of outputs of a strip, but for the last one.
    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// Whether [`Strips::run`] writes past the caches what may go there.
    pub(super) fn streams(&self, weights: &Weights<T>) -> bool {
        weights.taps.streams(self.rows, self.geometry.ow)
    }

    /// The rows of the plane among those of the padded one.
    fn inside(&self, rows: Range<usize>) -> Range<usize> {
        let row = |row: usize| {
            row.saturating_sub(self.geometry.conv.padding[0]).min(self.geometry.input.h)
        };
        row(rows.start)..row(rows.end)
    }

    /// The next strips of a plane come from row `y` on.
    pub(super) fn restart(&mut self, y: usize) {
        if let Input::Padded(window) = &mut self.input {
            window.restart(y);
        }
    }

    /// What of plane `x` the strip after row `end` of outputs reads that none before it has read; at the last one, what
    /// the first one reads of the plane that `after` begins with.
    pub(super) fn next<'x>(&self, end: usize, x: &'x [T], after: &'x [T]) -> &'x [T] {
        let Geometry { conv, input, oh, .. } = self.geometry;
        if end < oh {
            let rows = |row: usize| self.inside(0..row + conv.kh - 1).end * input.w;
            &x[rows(end)..rows(end + self.rows)]
        } else {
            &after[..after.len().min(self.inside(0..self.rows + conv.kh - 1).end * input.w)]
        }
    }

    /// A strip of outputs, of the plane that `x` holds from its row `first` on, as far as the strip reads it, to
    /// `out`. Strips of a plane come in order. `next` is asked for and what `copy` says is made meanwhile.
    pub(super) fn run(
        &mut self,
        weights: &Weights<T>,
        strip: Range<usize>,
        (x, first): (&[T], usize),
        next: Next<T>,
        mut out: Target<'_, T>,
        copy: CopyOut<'_, T>,
    ) {
        let Geometry { conv, input: Batch { h, w, .. }, ow, .. } = self.geometry;
        let [top, _, left, right] = conv.padding;
        let Range { start: y, end } = strip;
        // The padded rows that this strip reads.
        let padded = y..end + conv.kh - 1;
        let (Range { start, end: last }, above) =
            (self.inside(padded.clone()), top.saturating_sub(y));
        let Weights { taps, bias, relu_of } = weights;
        let (bias, relu_of) = (&[*bias], *relu_of);
        let Self { input, scratch, .. } = self;
        match input {
            Input::Masked => {
                let padding = [above, padded.end.saturating_sub(top + h), left, right];
                let rows = &x[(start - first) * w..];
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
                let data = &x[(start - first) * w..(last - first) * w];
                let input = filtered::Rows { data, ld: w, rows, width: w, padding, relu_of };
                let to = out.again();
                let filtered =
                    filtered::Forward { input, taps, bias, out: to, ow, scratch, next, copy };
                if !simd::dispatch(filtered) {
                    self.plain(weights, y..end, (x, first), out);
                }
            }
            Input::Padded(window) => {
                window.slide_over(padded, (x, first), relu_of);
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
    fn plain(
        &self,
        weights: &Weights<T>,
        rows: Range<usize>,
        (x, first): (&[T], usize),
        mut out: Target<'_, T>,
    ) {
        // What was written past the caches is written again.
        simd::fence();
        let Weights { taps, bias, relu_of } = weights;
        let Geometry { conv, ow, .. } = self.geometry;
        let mut window = Window::new(&self.geometry);
        window.restart(rows.start);
        let strip = window.strip(&self.geometry);
        for y in rows.clone().step_by(strip) {
            let end = (y + strip).min(rows.end);
            window.slide_over(y..end + conv.kh - 1, (x, first), *relu_of);
            let pixels = (y - rows.start) * ow..(end - rows.start) * ow;
            simd::dispatch(conv::Plain(conv::Forward {
                input: window.input(),
                ld: window.ld,
                taps,
                bias: &[*bias],
                out: out.part(pixels),
                ow,
                scratch: &mut [],
                next: Next::default(),
                copy: CopyOut::default(),
            }));
        }
    }
}
