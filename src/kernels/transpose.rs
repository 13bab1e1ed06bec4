//! Some channels between channels_last, where a pixel's channels lie side by side, and planes.

use std::marker::PhantomData;
use std::ops::Range;

use super::extent;
use crate::simd::{Kernel, Scalar, Simd};

/// Extents of a tile: those of [`Simd::transpose`].
const TILE: usize = 8;
/// Pixels that are copied at a time: a cache line of a plane, so that planes whose distance is a
/// multiple of what one way of the cache holds do not push each other's half-written lines out.
const RUN: usize = 16;

/// How many pixels ahead they are asked for: training steps of units in channels_last take 0.91 to 0.97 times
/// as long (Xeon).
const AHEAD: usize = 4 * RUN;

/// to\[c · `to_step`.1 + p · `to_step`.0\] = from\[c · `from_step`.1 + p · `from_step`.0\] for `channels`
/// channels c of `pixels` pixels p; one of the steps is 1 on each side, not the same.
pub struct Transpose<'a, T> {
    from: *const T,
    from_step: (usize, usize),
    to: *mut T,
    to_step: (usize, usize),
    pixels: usize,
    channels: usize,
    data: PhantomData<&'a mut [T]>,
}

impl<'a, T> Transpose<'a, T> {
    /// From channels_last, from the first channel of the first pixel on, `step` channels in a pixel,
    /// to planes `plane` elements apart.
    ///
    /// Panics if data are too short, a number is zero or pixels or planes overlap.
    pub fn gather(
        from: (&'a [T], usize),
        (to, plane): (&'a mut [T], usize),
        pixels: usize,
        channels: usize,
    ) -> Self {
        assert!(to.len() >= extent(channels, plane, pixels));
        // SAFETY: the target is long enough by the assertion above, and borrowed for 'a.
        unsafe { Self::gather_to(from, (to.as_mut_ptr(), plane), pixels, channels) }
    }

    /// [`Transpose::gather`] to planes of which other pixels may be in use elsewhere.
    ///
    /// # Safety
    /// For 'a, `pixels` elements from each of `channels` places `plane` apart, from `to` on, must be
    /// valid for writing, and nobody else's.
    pub unsafe fn gather_to(
        (from, step): (&'a [T], usize),
        (to, plane): (*mut T, usize),
        pixels: usize,
        channels: usize,
    ) -> Self {
        assert!(from.len() >= extent(pixels, step, channels));
        extent(channels, plane, pixels);
        let from = from.as_ptr();
        let (from_step, to_step, data) = ((step, 1), (1, plane), PhantomData);
        Self { from, from_step, to, to_step, pixels, channels, data }
    }

    /// From planes to channels_last, as [`Transpose::gather`] the other way; other threads may use the
    /// other channels of the pixels meanwhile.
    ///
    /// # Safety
    /// For 'a, `channels` elements from each of `pixels` places `step` apart, from `to` on, must be
    /// valid for writing, and nobody else's.
    pub unsafe fn scatter(
        (from, plane): (&'a [T], usize),
        (to, step): (*mut T, usize),
        pixels: usize,
        channels: usize,
    ) -> Self {
        assert!(from.len() >= extent(channels, plane, pixels));
        extent(pixels, step, channels);
        let from = from.as_ptr();
        let (from_step, to_step, data) = ((1, plane), (step, 1), PhantomData);
        Self { from, from_step, to, to_step, pixels, channels, data }
    }
}

impl<T: Scalar> Kernel<T> for Transpose<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) {
        let Self { pixels, channels, .. } = self;
        if pixels.min(channels) < TILE {
            return self.each(0..pixels, 0..channels);
        }
        for run in (0..pixels).step_by(RUN) {
            self.ask(simd, run + AHEAD);
            for c in (0..channels).step_by(TILE) {
                for p in (run..pixels.min(run + RUN)).step_by(TILE) {
                    // The last tiles begin inside those before.
                    let (p, c) = (p.min(pixels - TILE), c.min(channels - TILE));
                    // SAFETY: pixels p..p + TILE and channels c..c + TILE are inside.
                    unsafe { self.tile(simd, p, c) };
                }
            }
        }
    }
}

impl<T: Scalar> Transpose<'_, T> {
    /// Asks for a run of pixels from p on, on the side where each of them lies in lines of its own.
    #[inline(always)]
    fn ask<S: Simd<T>>(&self, simd: S, p: usize) {
        let (pixels, step) = match self.from_step.1 {
            1 => (self.from, self.from_step.0),
            _ => (self.to.cast_const(), self.to_step.0),
        };
        for p in p..(p + RUN).min(self.pixels) {
            for c in (0..self.channels).step_by(64 / size_of::<T>()) {
                simd.prefetch(pixels.wrapping_add(p * step + c));
            }
        }
    }

    /// # Safety
    /// Pixels p..p + TILE and channels c..c + TILE must be inside.
    #[inline(always)]
    unsafe fn tile<S: Simd<T>>(&self, simd: S, p: usize, c: usize) {
        let Self { from_step: (from_p, from_c), to_step: (to_p, to_c), .. } = *self;
        // SAFETY: as the caller says; a step of 1 makes rows on either side.
        unsafe {
            let from = self.from.add(p * from_p + c * from_c);
            let to = self.to.add(p * to_p + c * to_c);
            simd.transpose(from, from_p.max(from_c), to, to_p.max(to_c));
        }
    }

    /// Element by element.
    #[inline(always)]
    fn each(&self, pixels: Range<usize>, channels: Range<usize>) {
        let Self { from_step, to_step, .. } = *self;
        for c in channels {
            for p in pixels.clone() {
                // SAFETY: the pixel and the channel are inside, as the constructors check or ask.
                unsafe {
                    let from = self.from.add(p * from_step.0 + c * from_step.1);
                    *self.to.add(p * to_step.0 + c * to_step.1) = *from;
                }
            }
        }
    }
}
