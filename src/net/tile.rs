//! The cut of an image into tiles with their halo.

use std::ops::Range;

use crate::memory;
use crate::shape::Batch;

/// A tile: the rows and columns it is to yield, and those it is computed from. The latter end at
/// the image's border or a halo away, so that zero padding is met at true borders alone: what it
/// spoils at a cut stays in the halo.
pub(super) struct Tile {
    core: [Range<usize>; 2],
    region: [Range<usize>; 2],
}

/// The tiles of an image, `side` pixels a side (0: one tile), row by row.
pub(super) fn tiles(h: usize, w: usize, side: usize, halo: usize) -> impl Iterator<Item = Tile> {
    let side = if side == 0 { h.max(w) } else { side };
    let cut = move |extent: usize| {
        (0..extent).step_by(side).map(move |start| {
            let end = start.saturating_add(side).min(extent);
            (start..end, start.saturating_sub(halo)..end.saturating_add(halo).min(extent))
        })
    };
    cut(h).flat_map(move |rows| {
        cut(w).map(move |columns| Tile {
            core: [rows.0.clone(), columns.0],
            region: [rows.1.clone(), columns.1],
        })
    })
}

impl Tile {
    /// Rows to compute.
    pub(super) fn height(&self) -> usize {
        self.region[0].len()
    }

    /// Columns to compute.
    pub(super) fn width(&self) -> usize {
        self.region[1].len()
    }

    /// Copies the region of every plane of `image` to `out`.
    pub(super) fn cut(&self, image: &[f32], batch: Batch, out: &mut Vec<f32>) {
        out.clear();
        let size = batch.c * self.height() * self.width();
        memory::resize(out, size, 0.0);
        out.clear();
        for plane in image.chunks_exact(batch.plane()) {
            for y in self.region[0].clone() {
                out.extend_from_slice(&plane[y * batch.w..][self.region[1].clone()]);
            }
        }
    }

    /// Joins the core of `result`, computed on the region, to the pixels of `image`.
    pub(super) fn paste(
        &self,
        result: &[f32],
        batch: Batch,
        image: &mut [f32],
        join: impl Fn(f32, f32) -> f32,
    ) {
        let [rows, columns] = &self.core;
        let (top, left) = (rows.start - self.region[0].start, columns.start - self.region[1].start);
        let planes = image.chunks_exact_mut(batch.plane());
        for (plane, result) in planes.zip(result.chunks_exact(self.height() * self.width())) {
            for (i, y) in rows.clone().enumerate() {
                let pixels = &mut plane[y * batch.w..][columns.clone()];
                let result = &result[(top + i) * self.width() + left..];
                for (pixel, &result) in pixels.iter_mut().zip(result) {
                    *pixel = join(*pixel, result);
                }
            }
        }
    }
}
