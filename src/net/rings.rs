//! The rows of an image that are alive, in memory that does not grow with its height.

use std::marker::PhantomData;
use std::ops::Range;

use crate::kernels::blocked::{Row, RowMut};
use crate::memory::Aligned;

/// The last so many rows of a blocked image: row y lies in slot y mod `rows`, (blocks, pixels, lanes),
/// with zeros for padding on both sides. Rows above and below the image are zeros.
#[derive(Debug)]
pub(super) struct Ring {
    data: Aligned,
    rows: usize,
    height: usize,
    blocks: usize,
    lanes: usize,
    /// Pixels of padding on the left.
    pad: usize,
    /// Elements from one block to the next.
    stride: usize,
}

impl Ring {
    /// For `rows` rows of an image of these extents, with `pad` pixels on each side and room for
    /// tiles of four pixels.
    pub(super) fn new(
        rows: usize,
        [channels, height, width]: [usize; 3],
        pad: usize,
        lanes: usize,
    ) -> Self {
        let (rows, blocks) = (rows.min(height), channels.div_ceil(lanes));
        let stride = (pad + width.next_multiple_of(4) + pad) * lanes;
        // One slot more: the row of zeros.
        let data = Aligned::new((rows + 1) * blocks * stride);
        Self { data, rows, height, blocks, lanes, pad, stride }
    }

    /// The bytes it takes.
    pub(super) fn size(&self) -> usize {
        self.data.len() * size_of::<f32>()
    }

    /// The bytes a pixel of width takes.
    pub(super) fn bytes(rows: usize, channels: usize) -> usize {
        (rows + 1) * channels * size_of::<f32>()
    }

    /// The ring, for tasks that read some rows and write others.
    pub(super) fn share(&mut self) -> Shared<'_> {
        Shared {
            ptr: self.data.as_mut_ptr(),
            row_len: self.blocks * self.stride,
            ring: self,
            data: PhantomData,
        }
    }

    fn slot(&self, y: isize) -> usize {
        match usize::try_from(y) {
            Ok(y) if y < self.height => y % self.rows,
            _ => self.rows,
        }
    }
}

/// A [`Ring`] whose rows tasks read and write.
#[derive(Clone, Copy)]
pub(super) struct Shared<'a> {
    ptr: *mut f32,
    row_len: usize,
    ring: &'a Ring,
    data: PhantomData<&'a mut [f32]>,
}

// SAFETY: the callers of `row` and `row_mut` vouch that nobody reads what another writes.
unsafe impl Send for Shared<'_> {}
// SAFETY: as above.
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    /// How many are kept.
    pub(super) fn rows(&self) -> usize {
        self.ring.rows
    }

    /// Row `y`, from pixel `x` − `before` on.
    ///
    /// # Safety
    /// Nobody may write to the pixels that are read of it as long as this lives; to others they may.
    pub(super) unsafe fn row(&self, y: isize, x: usize, before: usize) -> Row<'a> {
        let ring = self.ring;
        assert!(before <= ring.pad + x);
        let at = (ring.pad + x - before) * ring.lanes;
        assert!(at <= ring.stride);
        // SAFETY: a slot has `row_len` elements, of which `at` are left out; the caller vouches for
        // the rest.
        unsafe {
            let first = self.ptr.add(ring.slot(y) * self.row_len + at);
            Row::from_raw(first, self.row_len - at, ring.stride, ring.lanes)
        }
    }

    /// Pixels `x` of rows `y`.
    ///
    /// # Safety
    /// Nobody else may use these pixels as long as this lives.
    pub(super) unsafe fn rows_mut(self, y: Range<usize>, x: Range<usize>) -> Vec<RowMut<'a>> {
        let ring = self.ring;
        assert!(y.end <= ring.height && x.start <= x.end);
        let len = (ring.blocks - 1) * ring.stride + x.len() * ring.lanes;
        let at = (ring.pad + x.start) * ring.lanes;
        assert!(at + len <= self.row_len);
        let row = |y: usize| {
            let start = ring.slot(y as isize) * self.row_len + at;
            // SAFETY: inside the slot, by the assertion; the caller vouches for the rest.
            unsafe { RowMut::from_raw(self.ptr.add(start), len, ring.stride, ring.lanes) }
        };
        y.map(row).collect()
    }
}
