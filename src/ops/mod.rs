//! Whole tensors: checks, scratch, the split over channels, and calls to kernels. Results go where
//! the caller says, so that no pass over memory clears what another overwrites.
//!
//! The task is a channel: all its planes in a fixed order on one thread, so that every sum has one
//! order whatever the thread count, and the planes of a channel stay in cache from one pass to the
//! next. But where channels are mixed or lie next to each other it is a tile of all channels, or of many, whose sums
//! are added in a fixed order, and where planes are small some channels, of some images or of all.

mod channels_last;
mod dense;
mod depthwise;
mod evaluate;
mod groups;
mod phases;
mod pixels;
mod pointwise;
pub(crate) mod scratch;
mod small;
mod staged;
mod strips;
mod xunit;

use std::marker::PhantomData;
use std::ops::Range;

pub use channels_last::{depthwise_backward_channels_last, depthwise_forward_channels_last};
pub use depthwise::{DepthwiseGradients, depthwise_backward, depthwise_forward};
pub use evaluate::xunit_evaluate_channels_last;
pub use groups::Layout;
pub use pointwise::Pointwise;
pub use xunit::{
    BatchStats, Norm, PointwiseGradients, Running, Variant, XUnit, XUnitGradients, XUnitOutput,
    XUnitSaved, xunit_backward, xunit_forward,
};

use crate::kernels::MAX_LANES;
use crate::kernels::activation::Target;
use crate::memory;
use crate::shape::{Batch, Geometry, ShapeError, shape_error};
use crate::simd::{self, Scalar};

/// A tensor that channel tasks write, each its own planes.
struct Planes<'a, T> {
    ptr: *mut T,
    batch: Batch,
    /// The channel of the whole that its first one is.
    first: usize,
    /// Whether it is written past the caches.
    stream: bool,
    tensor: PhantomData<&'a mut [T]>,
}

/// Bytes from which on a result is written past the caches, where the instruction set can; from the second number
/// on unless it is of fresh pages, which the system has just cleared in the cache: smaller ones seldom are. Time
/// over that of plain stores (Xeon, one thread): 0.85 to 0.9 of the unit's evaluation at 16 and 26 MB, and at 67 MB
/// 0.84, but 1.15 with fresh pages.
const STREAMED: [usize; 2] = [8 << 20, 32 << 20];

// SAFETY: `plane` hands out disjoint planes to tasks that name different (n, c).
unsafe impl<T: Send> Sync for Planes<'_, T> {}

impl<'a, T> Planes<'a, T> {
    fn new(tensor: &'a mut [T], batch: Batch) -> Self {
        Self::group(tensor, batch, 0)
    }

    /// A result, which is not read again soon: see [`STREAMED`].
    fn result(tensor: &'a mut [T], batch: Batch) -> Self
    where
        T: Scalar,
    {
        let bytes = size_of_val(tensor);
        let stream = simd::streams::<T>()
            && bytes >= STREAMED[0]
            && (bytes < STREAMED[1] || memory::is_resident(tensor.as_ptr().cast(), bytes));
        Self { stream, ..Self::new(tensor, batch) }
    }

    /// Whether every plane, cut into pieces of so many elements, is aligned as vectors must be to be streamed.
    fn streams_pieces(&self, len: usize) -> bool {
        let lines = [self.batch.plane(), len, self.ptr.addr() / size_of::<T>()];
        self.stream && lines.into_iter().all(|elements| elements.is_multiple_of(MAX_LANES))
    }

    /// Of the channels from `first` on.
    fn group(tensor: &'a mut [T], batch: Batch, first: usize) -> Self {
        assert_eq!(tensor.len(), batch.size());
        Self { ptr: tensor.as_mut_ptr(), batch, first, stream: false, tensor: PhantomData }
    }

    /// The first element of image n.
    fn image(&self, n: usize) -> *mut T {
        assert!(n < self.batch.n);
        self.ptr.wrapping_add(n * self.batch.c * self.batch.plane())
    }

    /// Plane (n, c).
    ///
    /// # Safety
    /// No other reference to the same plane may live.
    #[allow(clippy::mut_from_ref)]
    unsafe fn plane(&self, n: usize, c: usize) -> &mut [T] {
        // SAFETY: the caller's promise.
        unsafe { self.pixels(n, c, 0..self.batch.plane()) }
    }

    /// Some pixels of plane (n, c).
    ///
    /// # Safety
    /// No other reference to the same pixels may live.
    #[allow(clippy::mut_from_ref)]
    unsafe fn pixels(&self, n: usize, c: usize, pixels: Range<usize>) -> &mut [T] {
        let c = c.wrapping_sub(self.first);
        assert!(n < self.batch.n && c < self.batch.c);
        let len = self.batch.plane();
        assert!(pixels.start <= pixels.end && pixels.end <= len);
        // SAFETY: they are inside the plane, which is inside the tensor, whose length `group` checks; the
        // caller vouches for exclusivity.
        unsafe {
            let first = self.ptr.add((n * self.batch.c + c) * len + pixels.start);
            std::slice::from_raw_parts_mut(first, pixels.len())
        }
    }

    /// The planes of some channels of image n.
    ///
    /// # Safety
    /// No other reference to the same planes may live.
    #[allow(clippy::mut_from_ref)]
    unsafe fn planes(&self, n: usize, channels: &Range<usize>) -> &mut [T] {
        let (start, plane) = (channels.start.wrapping_sub(self.first), self.batch.plane());
        assert!(
            n < self.batch.n && start <= self.batch.c && channels.len() <= self.batch.c - start
        );
        // SAFETY: they are inside the tensor, whose length `group` checks; the caller vouches for exclusivity.
        unsafe {
            let first = self.ptr.add((n * self.batch.c + start) * plane);
            std::slice::from_raw_parts_mut(first, channels.len() * plane)
        }
    }

    /// [`Planes::pixels`], for [`crate::parallel::for_each`] to end before anybody reads them.
    ///
    /// # Safety
    /// As [`Planes::pixels`]; nobody may read them before.
    unsafe fn target(&self, n: usize, c: usize, pixels: Range<usize>) -> Target<'_, T>
    where
        T: Scalar,
    {
        // SAFETY: the caller's promises.
        unsafe { Target::streamed(self.pixels(n, c, pixels), self.stream) }
    }
}

/// A tensor that channel tasks read, or its channels from `first` on.
#[derive(Clone, Copy)]
struct Source<'a, T> {
    tensor: &'a [T],
    batch: Batch,
    first: usize,
}

impl<'a, T> Source<'a, T> {
    fn new(tensor: &'a [T], batch: Batch) -> Self {
        Self { tensor, batch, first: 0 }
    }

    /// Plane (n, c).
    fn plane(&self, n: usize, c: usize) -> &'a [T] {
        plane(self.tensor, self.batch, n, c - self.first)
    }

    /// The channel, if there is one, to which a thread is likely to come after this one, `step` channels on.
    fn channel_after(&self, c: usize, step: usize) -> Option<usize> {
        let after = c.saturating_add(step);
        (after < self.first + self.batch.c).then_some(after)
    }

    /// Its plane n.
    fn after(&self, n: usize, c: usize, step: usize) -> Option<&'a [T]> {
        self.channel_after(c, step).map(|c| self.plane(n, c))
    }

    /// Plane (n, c) and all after it.
    fn planes_from(&self, n: usize, c: usize) -> &'a [T] {
        from_plane(self.tensor, self.batch, n, c - self.first)
    }
}

/// Part i of so many of what is counted from 0 to `all`.
fn part(i: usize, parts: usize, all: usize) -> Range<usize> {
    i * all / parts..(i + 1) * all / parts
}

/// Plane (n, c) of a tensor of this shape.
fn plane<T>(tensor: &[T], batch: Batch, n: usize, c: usize) -> &[T] {
    &from_plane(tensor, batch, n, c)[..batch.plane()]
}

/// Plane (n, c) and all after it.
fn from_plane<T>(tensor: &[T], batch: Batch, n: usize, c: usize) -> &[T] {
    &tensor[(n * batch.c + c) * batch.plane()..]
}

/// Checks that a tensor has as many elements as its shape says.
fn expect_len<T>(name: &str, tensor: &[T], len: usize) -> Result<(), ShapeError> {
    if tensor.len() == len {
        Ok(())
    } else {
        Err(shape_error!("{name} must have {len} elements, got {}", tensor.len()))
    }
}

fn optional_len<T>(name: &str, tensor: Option<&[T]>, len: usize) -> Result<(), ShapeError> {
    tensor.map_or(Ok(()), |tensor| expect_len(name, tensor, len))
}

/// Checks the lengths of a depthwise convolution's x and weight; returns the shapes of x and of the
/// output, and the taps per channel.
fn check_depthwise<T>(
    geometry: &Geometry,
    x: &[T],
    weight: &[T],
) -> Result<(Batch, Batch, usize), ShapeError> {
    let taps = geometry.conv.kh * geometry.conv.kw;
    expect_len("x", x, geometry.input.size())?;
    expect_len("weight", weight, geometry.input.c * taps)?;
    Ok((geometry.input, geometry.output(), taps))
}

/// The taps turned by 180°: the kernel of the transposed convolution.
fn turned<T: Copy>(weight: &[T]) -> Vec<T> {
    weight.iter().rev().copied().collect()
}
