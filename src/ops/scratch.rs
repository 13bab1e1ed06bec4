//! Memory for the length of a task: taken from the thread and given back, so that no operation pays
//! for fresh pages.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut, Range};
use std::ptr::NonNull;

use crate::kernels::activation::{Affine, Fill};
use crate::kernels::minimal::Filter;
use crate::kernels::{MAX_LANES, conv};
use crate::memory::{Aligned, Line};
use crate::shape::Geometry;
use crate::simd::{self, Scalar};

const LINE: usize = align_of::<Line>() / size_of::<f32>();
/// Elements of a thread's stack: two huge pages, of which small planes leave the second one untouched.
const STACK: usize = 1 << 20;
/// The most that a thread keeps beside its stack for its next task: 32 MiB, two planes of 2048 × 2048.
const KEPT: usize = 1 << 23;

/// The memory that a thread does not give back.
#[derive(Default)]
struct Spare {
    /// Where most scratches come from, one after the other: all in a huge page, and what one task has left
    /// in a cache is there for the next one.
    stack: Option<Aligned>,
    /// The ends of what was taken of it, and whether it is still in use.
    taken: Vec<(usize, bool)>,
    /// What was too large for it.
    large: Vec<Aligned>,
}

thread_local! {
    static SPARE: RefCell<Spare> = RefCell::default();
}

impl Spare {
    /// So many elements of the stack, if there are as many, and which they are.
    fn take(&mut self, len: usize) -> Option<(NonNull<f32>, usize)> {
        let start = self.taken.last().map_or(0, |&(end, _)| end);
        if len > STACK - start {
            return None;
        }
        let stack = self.stack.get_or_insert_with(|| Aligned::new(STACK)).as_non_null();
        self.taken.push((start + len.next_multiple_of(LINE), true));
        // SAFETY: it has so many elements.
        Some((unsafe { stack.add(start) }, self.taken.len() - 1))
    }

    fn give_back(&mut self, taken: usize) {
        self.taken[taken].1 = false;
        // Mostly in the opposite order.
        while self.taken.pop_if(|&mut (_, used)| !used).is_some() {}
    }

    /// The smallest that will do, but none that others will ask for; none is grown, which would copy what
    /// nobody reads.
    fn take_large(&mut self, len: usize) -> Option<Aligned> {
        let fits = |large: &Aligned| (len..=len.saturating_mul(4)).contains(&large.len());
        let fit = self.large.iter().enumerate().filter(|(_, large)| fits(large));
        let best = fit.min_by_key(|(_, large)| large.len()).map(|(i, _)| i);
        best.map(|i| self.large.remove(i))
    }

    fn give_back_large(&mut self, large: Aligned) {
        if large.len() > KEPT {
            return;
        }
        self.large.push(large);
        // What has lain there longest gives way.
        while self.large.iter().map(|large| large.len()).sum::<usize>() > KEPT {
            self.large.remove(0);
        }
    }
}

/// A slice of numbers, aligned to a cache line, of arbitrary content. It must not lie in a thread-local, which
/// may outlive the thread's stack.
pub(crate) struct Scratch<T> {
    data: NonNull<T>,
    len: usize,
    source: Source,
}

// SAFETY: others can but read it; it is given back by the thread that took it, as it is not `Send`.
unsafe impl<T: Sync> Sync for Scratch<T> {}

enum Source {
    /// Of this thread.
    Stack(usize),
    Large(Option<Aligned>),
}

impl<T: Scalar> Scratch<T> {
    pub(crate) fn new(len: usize) -> Self {
        let elements = len.saturating_mul(size_of::<T>()).div_ceil(size_of::<f32>());
        SPARE.with_borrow_mut(|spare| match spare.take(elements) {
            Some((data, taken)) => Self { data: data.cast(), len, source: Source::Stack(taken) },
            None => {
                let large = spare.take_large(elements).unwrap_or_else(|| Aligned::new(elements));
                Self { data: large.as_non_null().cast(), len, source: Source::Large(Some(large)) }
            }
        })
    }
}

impl<T> Drop for Scratch<T> {
    fn drop(&mut self) {
        SPARE.with_borrow_mut(|spare| match &mut self.source {
            Source::Stack(taken) => spare.give_back(*taken),
            Source::Large(large) => spare.give_back_large(large.take().unwrap()),
        });
    }
}

impl<T: Scalar> Deref for Scratch<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `new` takes `len` elements for this alone; they are initialised, and any bits are a valid
        // floating-point number, which is all that a `Scalar` is.
        unsafe { std::slice::from_raw_parts(self.data.as_ptr(), self.len) }
    }
}

impl<T: Scalar> DerefMut for Scratch<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`.
        unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr(), self.len) }
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
        // In a window that holds a whole plane the padding is there from the one before.
        if self.rows != rows {
            self.data[at(new.start)..at(first)].fill(T::ZERO);
            self.data[at(last)..at(new.end)].fill(T::ZERO);
        }
        if !inside.is_empty() {
            fill(inside, &mut self.data, at(first) + lead);
        }
        self.rows = rows;
    }

    /// To slide down from the padded row `row` on.
    pub(super) fn restart(&mut self, row: usize) {
        self.rows = row..row;
    }

    /// [`Window::slide`] over a plane, given from its row `first` on, as it is or through ReLU and an affine
    /// map.
    pub(super) fn slide_over(
        &mut self,
        rows: Range<usize>,
        (plane, first): (&[T], usize),
        relu_of: Option<Affine<T>>,
    ) {
        let (ld, width) = (self.ld, self.w);
        self.slide(rows, |rows, padded, origin| {
            let plane = &plane[(rows.start - first) * width..(rows.end - first) * width];
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

/// Output rows of a strip, of rows of `ld` elements of so many bytes: all, if they fit, else strips of about equal
/// height.
pub(super) fn strip_rows(geometry: &Geometry, ld: usize, size: usize) -> usize {
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
    fn scratches_are_apart_in_whatever_order_they_go() {
        let lens = [100, STACK / 2, 0, STACK, 7, STACK / 2, 1000];
        for first in 0..lens.len() {
            let mut all: Vec<_> = lens.iter().map(|&len| Some(Scratch::<f32>::new(len))).collect();
            for round in 0..2 * lens.len() {
                let i = (first + 3 * round) % lens.len();
                all[i] = None;
                all[i] = Some(Scratch::new(lens[i]));
                all[i].as_mut().unwrap().fill(i as f32);
                for (i, one) in
                    all.iter().enumerate().skip(usize::from(round < lens.len()) * lens.len())
                {
                    assert!(one.as_ref().unwrap().iter().all(|&x| x == i as f32));
                }
            }
        }
        assert!(SPARE.with_borrow(|spare| spare.taken.is_empty()));
    }

    #[test]
    fn a_window_shows_the_padded_plane() {
        let input = Batch::new(&[1, 1, 9, 5]).unwrap();
        let conv = Conv { kh: 4, kw: 3, stride: [1, 1], padding: [2, 3, 1, 2], dilation: [1, 1] };
        let geometry = Geometry::new(input, conv).unwrap();
        let plane = |i: usize| -> Vec<f32> { (1..=45).map(|x| (x + 100 * i) as f32).collect() };
        let padded = |plane: &[f32], row: usize, column: usize| match (
            row.checked_sub(2),
            column.checked_sub(1),
        ) {
            (Some(y), Some(x)) if y < 9 && x < 5 => plane[y * 5 + x],
            _ => 0.0,
        };
        for strip in [1, 2, 3, 5, geometry.oh] {
            let mut window = Window::<f32>::new(&geometry);
            let ld = window.ld;
            // From the top, again, and from row 3 on.
            for (i, first) in [0, 0, 3].into_iter().enumerate() {
                let plane = plane(i);
                if first > 0 {
                    window.restart(first);
                }
                for start in (first..geometry.oh).step_by(strip) {
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
                            assert_eq!(
                                got,
                                padded(&plane, row, column),
                                "{strip}: {row}, {column}"
                            );
                        }
                    }
                    assert_eq!(window.middle()[0], padded(&plane, start + 2, 1));
                }
            }
        }
    }
}
