//! Memory for the length of a task: taken from the thread and given back, so that no operation pays
//! for fresh pages.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut, Range};

use crate::kernels::activation::{Affine, Fill};
use crate::kernels::minimal::Filter;
use crate::kernels::{MAX_LANES, conv};
use crate::memory::{self, Line};
use crate::shape::Geometry;
use crate::simd::{self, Scalar};

/// The most that a thread keeps for its next task: 16 MiB.
const KEPT_LINES: usize = 1 << 18;

thread_local! {
    static SPARE: RefCell<Vec<Vec<Line>>> = const { RefCell::new(Vec::new()) };
}

/// A slice of numbers, aligned to a cache line, of arbitrary content.
pub(crate) struct Scratch<T> {
    lines: Vec<Line>,
    len: usize,
    kind: PhantomData<T>,
}

impl<T: Scalar> Scratch<T> {
    pub(crate) fn new(len: usize) -> Self {
        let count = (len * size_of::<T>()).div_ceil(size_of::<Line>());
        // The smallest that will do, but none that others will ask for; none is grown, which would copy
        // what nobody reads.
        let lines = SPARE.with_borrow_mut(|spare| {
            let fits = |lines: &Vec<Line>| (count..=4 * count).contains(&lines.len());
            let fit = spare.iter().enumerate().filter(|(_, lines)| fits(lines));
            let best = fit.min_by_key(|(_, lines)| lines.len()).map(|(i, _)| i);
            best.map(|i| spare.remove(i))
        });
        let lines = lines.unwrap_or_else(|| memory::filled(count, Line([0; 64])));
        Self { lines, len, kind: PhantomData }
    }
}

impl<T> Drop for Scratch<T> {
    fn drop(&mut self) {
        let lines = std::mem::take(&mut self.lines);
        if lines.is_empty() || lines.len() > KEPT_LINES {
            return;
        }
        // The thread may be ending, and its spare memory be gone.
        let _ = SPARE.try_with(|spare| {
            let mut spare = spare.borrow_mut();
            spare.push(lines);
            // What has lain there longest gives way.
            while spare.iter().map(Vec::len).sum::<usize>() > KEPT_LINES {
                spare.remove(0);
            }
        });
    }
}

impl<T: Scalar> Deref for Scratch<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `new` makes the lines long enough for `len` elements; they are initialised, and
        // any bits are a valid floating-point number, which is all that a `Scalar` is.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }
}

impl<T: Scalar> DerefMut for Scratch<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }
}

/// Rows of a zero-padded plane, which slide down it strip by strip: what two strips share is moved,
/// not made again. Column 0 of the plane is aligned to a vector.
pub(super) struct Window<T> {
    data: Scratch<T>,
    pub(super) ld: usize,
    /// Where column 0 of the plane is, and the columns of padding before it.
    lead: usize,
    left: usize,
    /// Rows of padding above the plane, rows and columns of the plane.
    top: usize,
    h: usize,
    w: usize,
    /// The padded rows that are in the window.
    rows: Range<usize>,
}

/// What a strip's padded rows may fill, so that they stay in the second-level cache beside their
/// outputs. xUnit at 1 × 64 × 512 × 512, forward and backward, on one core with 1 MiB (Zen 5) takes
/// the same time at 64, 128 and 256 KiB and with whole planes (± 5 %, three interleaved rounds):
/// strips are for memory that does not grow with the image.
const STRIP_BYTES: usize = 128 << 10;

impl<T: Scalar> Window<T> {
    /// A window on the padded input of `geometry`, which is dense, for its strips.
    pub(super) fn new(geometry: &Geometry) -> Self {
        let Geometry { conv, input, ow, ph, .. } = *geometry;
        assert!(geometry.is_dense());
        let left = conv.padding[2];
        let lead = left.next_multiple_of(MAX_LANES);
        let read = conv::row_length(ow, conv.kw);
        let ld = (lead - left + read.max(left + input.w)).next_multiple_of(MAX_LANES);
        let rows = ph.min(strip_rows(geometry, ld, size_of::<T>()) + conv.kh - 1);
        let mut data = Scratch::new(rows * ld);
        data.fill(T::ZERO);
        let (top, h, w) = (conv.padding[0], input.h, input.w);
        Self { data, ld, lead, left, top, h, w, rows: 0..0 }
    }

    /// Output rows of a strip.
    pub(super) fn strip(&self, geometry: &Geometry) -> usize {
        (self.data.len() / self.ld + 1 - geometry.conv.kh).min(geometry.oh)
    }

    /// Slides down to the padded rows `rows`, from the top if they start there. `fill` is asked to
    /// write the rows of the plane that are new, from the element at an offset on.
    pub(super) fn slide(
        &mut self,
        rows: Range<usize>,
        mut fill: impl FnMut(Range<usize>, &mut [T], usize),
    ) {
        let Self { ld, lead, top, h, .. } = *self;
        let kept = if rows.start == 0 { 0..0 } else { rows.start..self.rows.end };
        let from = (kept.start - self.rows.start.min(kept.start)) * ld;
        self.data.copy_within(from..from + kept.len() * ld, 0);
        let plane = |row: usize| row.saturating_sub(top).min(h);
        let new = rows.start + kept.len()..rows.end;
        // Above, inside and below the plane.
        let inside = plane(new.start)..plane(new.end);
        let at = |row: usize| (row - rows.start) * ld;
        let (first, last) = match inside.is_empty() {
            true => (new.end, new.end),
            false => (inside.start + top, inside.end + top),
        };
        self.data[at(new.start)..at(first)].fill(T::ZERO);
        self.data[at(last)..at(new.end)].fill(T::ZERO);
        if !inside.is_empty() {
            fill(inside, &mut self.data, at(first) + lead);
        }
        self.rows = rows;
    }

    /// [`Window::slide`] over a plane, as it is or through ReLU and an affine map.
    pub(super) fn slide_over(
        &mut self,
        rows: Range<usize>,
        plane: &[T],
        relu_of: Option<Affine<T>>,
    ) {
        let (ld, width) = (self.ld, self.w);
        self.slide(rows, |rows, padded, origin| {
            let plane = &plane[rows.start * width..rows.end * width];
            simd::dispatch(Fill { plane, width, relu_of, padded, ld, origin });
        });
    }

    /// From the first tap of the first row on.
    pub(super) fn input(&self) -> &[T] {
        &self.data[self.lead - self.left..]
    }

    /// From the element of the plane on that lies in the middle of the first rows of taps.
    pub(super) fn middle(&self) -> &[T] {
        &self.data[self.top * self.ld + self.lead..]
    }

    /// The rows of the plane that sliding down to `rows` will ask for, if it starts at the top or
    /// goes on from here.
    pub(super) fn ahead<'a>(&self, rows: Range<usize>, plane: &'a [T]) -> &'a [T] {
        let start = if rows.start == 0 { 0 } else { self.rows.end };
        let row = |row: usize| row.saturating_sub(self.top).min(self.h) * self.w;
        &plane[row(start)..row(rows.end.max(start))]
    }
}

/// Output rows of a strip: all, if they fit, else strips of about equal height.
fn strip_rows(geometry: &Geometry, ld: usize, size: usize) -> usize {
    let (oh, kh) = (geometry.oh, geometry.conv.kh);
    let most = (STRIP_BYTES / (ld * size)).saturating_sub(kh - 1).max(kh).max(16);
    // Whole tiles of minimal filtering.
    oh.div_ceil(oh.div_ceil(most))
        .next_multiple_of(Filter::of(kh).map_or(1, |filter| filter.tile))
        .min(oh)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shape::{Batch, Conv};

    #[test]
    fn scratch_is_aligned_and_comes_back() {
        let first = Scratch::<f32>::new(1000).as_ptr();
        let again = Scratch::<f64>::new(400);
        assert_eq!(first.cast::<f64>(), again.as_ptr());
        assert!(first.addr().is_multiple_of(64) && again.len() == 400);
    }

    #[test]
    fn a_window_shows_the_padded_plane() {
        let input = Batch::new(&[1, 1, 9, 5]).unwrap();
        let conv = Conv { kh: 4, kw: 3, stride: [1, 1], padding: [2, 3, 1, 2], dilation: [1, 1] };
        let geometry = Geometry::new(input, conv).unwrap();
        let plane: Vec<f32> = (1..=45).map(|i| i as f32).collect();
        let padded = |row: usize, column: usize| match (row.checked_sub(2), column.checked_sub(1)) {
            (Some(y), Some(x)) if y < 9 && x < 5 => plane[y * 5 + x],
            _ => 0.0,
        };
        for strip in [1, 2, 3, 5, geometry.oh] {
            let mut window = Window::<f32>::new(&geometry);
            let ld = window.ld;
            for _ in 0..2 {
                for start in (0..geometry.oh).step_by(strip) {
                    let rows = start..geometry.oh.min(start + strip) + 3;
                    let ahead = window.ahead(rows.clone(), &plane).len();
                    let mut asked = 0;
                    window.slide(rows.clone(), |rows, data, origin| {
                        asked += rows.len() * 5;
                        for (i, y) in rows.enumerate() {
                            let row = &plane[y * 5..][..5];
                            data[origin + i * ld..][..5].copy_from_slice(row);
                        }
                    });
                    assert_eq!(ahead, asked);
                    for (i, row) in rows.enumerate() {
                        for column in 0..8 {
                            let got = window.input()[i * ld + column];
                            assert_eq!(got, padded(row, column), "{strip}: {row}, {column}");
                        }
                    }
                    assert_eq!(window.middle()[0], padded(start + 2, 1));
                }
            }
        }
    }
}
