//! Results on their way past the caches while the next ones are computed.

use std::ops::Range;

use super::Planes;
use super::scratch::Scratch;
use crate::kernels::activation::CopyOut;
use crate::simd::{self, Scalar};

/// What goes past the caches, piece by piece: one is written while the one before it is copied to its place, as
/// memory would else wait for arithmetic and arithmetic for memory. Time of a depthwise convolution over that with
/// a copy after each piece (Xeon, one thread): 0.87 to 0.93 for K = 7, where rows are not whole vectors.
pub(super) struct Staged<'a, T: Scalar> {
    /// What is written now or was written last, and what was before it.
    pieces: [Scratch<T>; 2],
    /// Image, channel and pixels of the last one, which is not yet in its place.
    waiting: Option<(usize, usize, Range<usize>)>,
    out: &'a Planes<'a, T>,
}

impl<'a, T: Scalar> Staged<'a, T> {
    /// For pieces of at most so many pixels; `None` where they do not go past the caches.
    pub(super) fn new(len: usize, out: &'a Planes<'a, T>) -> Option<Self> {
        let staged = || Self { pieces: [(); 2].map(|()| Scratch::new(len)), waiting: None, out };
        out.streams_pieces(len).then(staged)
    }

    /// Where to write these pixels of plane (n, c), and the copy to make meanwhile.
    ///
    /// # Safety
    /// As [`Planes::target`], until this is dropped: by the task of a [`crate::parallel::for_each`] that made it.
    pub(super) unsafe fn stage(
        &mut self,
        (n, c): (usize, usize),
        pixels: Range<usize>,
    ) -> (&mut [T], CopyOut<'_, T>) {
        let (len, waiting) = (pixels.len(), self.waiting.replace((n, c, pixels)));
        self.pieces.swap(0, 1);
        let [now, before] = &mut self.pieces;
        // SAFETY: the caller's promise, when they were staged.
        let copy = waiting.map(|pixels| unsafe { copy_out(before, pixels, self.out) });
        (&mut now[..len], copy.unwrap_or_default())
    }
}

impl<T: Scalar> Drop for Staged<'_, T> {
    fn drop(&mut self) {
        if let Some(pixels) = self.waiting.take() {
            // SAFETY: the caller's promise, when they were staged.
            simd::dispatch(unsafe { copy_out(&self.pieces[0], pixels, self.out) });
        }
    }
}

/// # Safety
/// As [`Planes::target`].
unsafe fn copy_out<'a, T: Scalar>(
    piece: &'a [T],
    (n, c, pixels): (usize, usize, Range<usize>),
    out: &'a Planes<'_, T>,
) -> CopyOut<'a, T> {
    let from = &piece[..pixels.len()];
    // SAFETY: the caller's promise.
    CopyOut { from, to: unsafe { out.target(n, c, pixels) } }
}
