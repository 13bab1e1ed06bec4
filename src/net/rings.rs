//! What is alive of an image between two works, in memory that grows with neither side of it.

use std::marker::PhantomData;
use std::ops::Range;

use crate::kernels::blocked::{Row, RowMut};
use crate::memory::Aligned;

/// The extents of a [`Ring`] and its [`Edge`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extents {
    pub(super) rows: usize,
    /// The pixels that a panel takes from the one before.
    pub(super) lead: usize,
    /// Its own, at most.
    pub(super) pixels: usize,
    /// Zeros, where the image ends.
    pub(super) trail: usize,
    pub(super) blocks: usize,
    pub(super) lanes: usize,
}

impl Extents {
    /// Elements from one block of a row to the next.
    fn stride(&self) -> usize {
        (self.lead + self.pixels + self.trail) * self.lanes
    }

    /// Elements of a ring: a row more, of zeros.
    pub(super) fn ring(&self) -> usize {
        (self.rows + 1) * self.blocks * self.stride()
    }

    /// Elements that an edge has of a row.
    pub(super) fn edge(&self) -> usize {
        self.blocks * self.lead * self.lanes
    }
}

/// The last so many rows of a panel of a blocked image: row y lies in slot y mod `rows`, (blocks, pixels,
/// lanes). Rows above and below the image are zeros.
#[derive(Debug)]
pub(super) struct Ring {
    data: Aligned,
    extents: Extents,
}

impl Ring {
    /// One of each extents.
    pub(super) fn several(extents: &[Extents]) -> Vec<Self> {
        let lens: Vec<_> = extents.iter().map(Extents::ring).collect();
        let data = Aligned::several(&lens).into_iter();
        data.zip(extents).map(|(data, &extents)| Self { data, extents }).collect()
    }

    /// The ring of an image so high, for tasks that read some rows and write others.
    pub(super) fn share(&mut self, height: usize) -> Shared<'_> {
        let Self { ref mut data, extents } = *self;
        Shared { ptr: data.as_mut_ptr(), extents, height, data: PhantomData }
    }
}

/// A [`Ring`] whose rows tasks read and write.
#[derive(Clone, Copy)]
pub(super) struct Shared<'a> {
    ptr: *mut f32,
    extents: Extents,
    height: usize,
    data: PhantomData<&'a mut [f32]>,
}

// SAFETY: the callers of its functions vouch that nobody reads what another writes.
unsafe impl Send for Shared<'_> {}
// SAFETY: as above.
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    /// Where the panel's own pixels of row `y` start, less `before`, and the elements from there on.
    fn at(&self, y: isize, before: usize) -> (*mut f32, usize) {
        let Extents { rows, lead, blocks, lanes, .. } = self.extents;
        let slot = match usize::try_from(y) {
            Ok(y) if y < self.height => y % rows,
            _ => rows,
        };
        assert!(before <= lead);
        let (row, skipped) = (blocks * self.extents.stride(), (lead - before) * lanes);
        // SAFETY: inside the slot.
        (unsafe { self.ptr.add(slot * row + skipped) }, row - skipped)
    }

    /// Row `y`, from `before` pixels ahead of the panel's own on.
    ///
    /// # Safety
    /// Nobody may write to the pixels that are read of it as long as this lives; to others they may.
    pub(super) unsafe fn row(&self, y: isize, before: usize) -> Row<'a> {
        let (first, len) = self.at(y, before);
        // SAFETY: the elements are the ring's; the caller vouches for the rest.
        unsafe { Row::from_raw(first, len, self.extents.stride(), self.extents.lanes) }
    }

    /// The panel's own pixels of rows `y`.
    ///
    /// # Safety
    /// Nobody else may use these pixels as long as this lives.
    pub(super) unsafe fn rows_mut(self, y: Range<usize>) -> Vec<RowMut<'a>> {
        assert!(y.end <= self.height);
        let row = |y: usize| {
            let (first, len) = self.at(y as isize, 0);
            // SAFETY: as in `row`.
            unsafe { RowMut::from_raw(first, len, self.extents.stride(), self.extents.lanes) }
        };
        y.map(row).collect()
    }

    /// Fills what lies beside the `pixels` of the panel's own in rows `y`: what the panel before has left
    /// on the edge, or zeros, and at the end of the image, zeros.
    ///
    /// # Safety
    /// As [`Shared::rows_mut`], of all pixels, and of the rows of the edge.
    pub(super) unsafe fn surround(
        &self,
        y: Range<usize>,
        pixels: usize,
        before: Option<SharedEdge<'_>>,
        ends: bool,
    ) {
        let Extents { lead, trail, blocks, lanes, .. } = self.extents;
        assert!(y.end <= self.height && pixels <= self.extents.pixels);
        for y in y {
            for block in 0..blocks {
                // SAFETY: the pixels are in the slot, the row and block on the edge.
                unsafe {
                    let row = self.at(y as isize, lead).0.add(block * self.extents.stride());
                    match before {
                        Some(edge) => {
                            let from = edge.at(y, block, &self.extents);
                            row.copy_from_nonoverlapping(from, lead * lanes);
                        }
                        None => row.write_bytes(0, lead * lanes),
                    }
                    if ends {
                        row.add((lead + pixels) * lanes).write_bytes(0, trail * lanes);
                    }
                }
            }
        }
    }

    /// Leaves the last pixels of rows `y`, of which the panel's own are `pixels`, to the next panel.
    ///
    /// # Safety
    /// Nobody may write to the rows, or use those of the edge.
    pub(super) unsafe fn leave(&self, y: Range<usize>, pixels: usize, edge: SharedEdge<'_>) {
        let Extents { lead, blocks, lanes, .. } = self.extents;
        assert!(y.end <= self.height && pixels <= self.extents.pixels);
        for y in y {
            for block in 0..blocks {
                // SAFETY: as in `surround`.
                unsafe {
                    let row = self.at(y as isize, lead).0.add(block * self.extents.stride());
                    let to = edge.at(y, block, &self.extents);
                    to.copy_from_nonoverlapping(row.add(pixels * lanes), lead * lanes);
                }
            }
        }
    }
}

/// The last pixels of every row of a panel, for the next one: (rows, blocks, pixels, lanes).
#[derive(Debug)]
pub(super) struct Edge {
    data: Aligned,
    rows: usize,
}

impl Edge {
    /// One of each extents.
    pub(super) fn several(rows: usize, extents: &[Extents]) -> Vec<Self> {
        let lens: Vec<_> = extents.iter().map(|extents| rows * extents.edge()).collect();
        Aligned::several(&lens).into_iter().map(|data| Self { data, rows }).collect()
    }

    pub(super) fn share(&mut self) -> SharedEdge<'_> {
        SharedEdge { ptr: self.data.as_mut_ptr(), rows: self.rows, data: PhantomData }
    }
}

/// An [`Edge`] whose rows tasks read and write.
#[derive(Clone, Copy)]
pub(super) struct SharedEdge<'a> {
    ptr: *mut f32,
    rows: usize,
    data: PhantomData<&'a mut [f32]>,
}

// SAFETY: as for `Shared`.
unsafe impl Send for SharedEdge<'_> {}
// SAFETY: as above.
unsafe impl Sync for SharedEdge<'_> {}

impl SharedEdge<'_> {
    /// The pixels of a block of row `y`.
    fn at(&self, y: usize, block: usize, extents: &Extents) -> *mut f32 {
        assert!(y < self.rows && block < extents.blocks);
        // SAFETY: inside the rows, which are of these extents.
        unsafe { self.ptr.add(y * extents.edge() + block * extents.lead * extents.lanes) }
    }
}
