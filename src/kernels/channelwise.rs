//! The pointwise passes of an xUnit over tensors in channels_last, as [`super::activation`] has them over planes: a
//! vector is some channels of a pixel, so that what belongs to a channel are vectors, too.
//!
//! Channels are whole vectors here. There are no kernels for `f64`.

use std::marker::PhantomData;
use std::ops::Range;

use super::activation::{Affine, Gate, NormGradient};
use super::extent;
use super::general::Places;
use super::transpose::Transpose;
use crate::simd::{self, Kernel, Scalar, Simd};

/// Pixels whose constants, vector by vector, stay in registers, and that are added up in lanes before the sum moves
/// on to `f64`.
const SEGMENT: usize = 8;

/// Elements from one that is read to the one that is asked for meanwhile, about, where tensors come from memory.
const AHEAD: usize = 1024;

/// An affine map per channel, v ↦ scale · (v − centre) + shift, whole vectors.
#[derive(Clone, Debug)]
pub struct Maps<T = f32> {
    pub centre: Vec<T>,
    pub scale: Vec<T>,
    pub shift: Vec<T>,
}

impl<T: Scalar> Maps<T> {
    pub fn new(affines: impl Iterator<Item = Affine<T>> + Clone) -> Self {
        Self {
            centre: affines.clone().map(|affine| affine.centre).collect(),
            scale: affines.clone().map(|affine| affine.scale).collect(),
            shift: affines.map(|affine| affine.shift).collect(),
        }
    }

    pub fn set(&mut self, c: usize, affine: Affine<T>) {
        (self.centre[c], self.scale[c], self.shift[c]) =
            (affine.centre, affine.scale, affine.shift);
    }

    /// Centre, scale and shift of these channels.
    pub fn of(&self, channels: Range<usize>) -> [&[T]; 3] {
        [&self.centre, &self.scale, &self.shift].map(|map| &map[channels.clone()])
    }
}

/// The [`NormGradient`] of each channel.
#[derive(Clone, Debug)]
pub struct NormMaps<T> {
    scale: Vec<T>,
    centre: Vec<T>,
    /// Slope and shift, in two parts each, where statistics have gradients.
    batch: Option<[Vec<T>; 4]>,
}

/// [`NormMaps`] of some channels.
#[derive(Clone, Copy, Debug)]
pub struct NormMapsOf<'a, T> {
    scale: &'a [T],
    centre: &'a [T],
    batch: Option<[&'a [T]; 4]>,
}

impl<T: Scalar> NormMaps<T> {
    /// All of them have statistics with gradients, or none.
    pub fn new(norms: &[NormGradient<T>]) -> Self {
        let part = |part: fn(&[(T, T); 2]) -> T| -> Option<Vec<T>> {
            norms.iter().map(|norm| norm.batch.as_ref().map(part)).collect()
        };
        let slope = part(|batch| batch[0].0).zip(part(|batch| batch[0].1));
        let shift = part(|batch| batch[1].0).zip(part(|batch| batch[1].1));
        Self {
            scale: norms.iter().map(|norm| norm.scale).collect(),
            centre: norms.iter().map(|norm| norm.centre).collect(),
            batch: slope.zip(shift).map(|((a, b), (c, d))| [a, b, c, d]),
        }
    }

    pub fn of(&self, channels: Range<usize>) -> NormMapsOf<'_, T> {
        let batch = self.batch.as_ref();
        NormMapsOf {
            scale: &self.scale[channels.clone()],
            centre: &self.centre[channels.clone()],
            batch: batch.map(|batch| batch.each_ref().map(|part| &part[channels.clone()])),
        }
    }
}

/// Some channels of pixels to read.
#[derive(Clone, Copy, Debug)]
pub struct Pixels<'a, T> {
    /// The first of these channels of the first pixel.
    ptr: *const T,
    len: usize,
    step: usize,
    data: PhantomData<&'a [T]>,
}

impl<'a, T> Pixels<'a, T> {
    /// From the first of the channels of the first pixel on, pixels `step` elements apart.
    pub fn new(data: &'a [T], step: usize) -> Self {
        Self { ptr: data.as_ptr(), len: data.len(), step, data: PhantomData }
    }

    /// The same of a tensor of which other threads write other channels.
    ///
    /// # Safety
    /// So many `channels` of so many pixels must be valid for reading, and nobody may write to them, as long as this
    /// lives.
    pub unsafe fn from_raw(ptr: *const T, step: usize, pixels: usize, channels: usize) -> Self {
        Self { ptr, len: extent(pixels, step, channels), step, data: PhantomData }
    }

    /// Whether there are so many.
    fn holds(&self, pixels: usize, channels: usize) -> bool {
        channels <= self.step && self.len >= extent(pixels, self.step, channels)
    }

    /// From channel `c` of a pixel on.
    #[inline(always)]
    fn at(&self, pixel: usize, c: usize) -> *const T {
        self.ptr.wrapping_add(pixel * self.step + c)
    }

    /// About [`AHEAD`] elements of so many channels after that.
    #[inline(always)]
    fn ahead(&self, pixel: usize, c: usize, channels: usize) -> *const T {
        self.at(pixel + (AHEAD / channels).max(1), c)
    }
}

/// Channels of pixels in blocks: (blocks, pixels, channels of a block), blocks `stride` elements apart. Where a kernel
/// meets the same pixels again and again, those of all channels would fall on the same lines of the first-level cache.
#[derive(Clone, Copy, Debug)]
pub struct Blocks<'a, T> {
    data: &'a [T],
    stride: usize,
    block: usize,
}

/// The same to write.
#[derive(Debug)]
pub struct BlocksMut<'a, T> {
    data: &'a mut [T],
    stride: usize,
    block: usize,
}

/// The end of so many pixels of so many channels.
fn end(pixels: usize, channels: usize, stride: usize, block: usize) -> usize {
    assert!(block > 0 && channels.is_multiple_of(block));
    extent(channels / block, stride, pixels * block)
}

impl<'a, T> Blocks<'a, T> {
    /// From the first pixel on.
    pub fn new(data: &'a [T], stride: usize, block: usize) -> Self {
        Self { data, stride, block }
    }

    fn holds(&self, pixels: usize, channels: usize) -> bool {
        self.data.len() >= end(pixels, channels, self.stride, self.block)
    }

    /// From channel `c` of a pixel on.
    #[inline(always)]
    fn at(&self, pixel: usize, c: usize) -> *const T {
        let at = c / self.block * self.stride + pixel * self.block + c % self.block;
        self.data.as_ptr().wrapping_add(at)
    }
}

impl<'a, T> BlocksMut<'a, T> {
    /// As [`Blocks::new`].
    pub fn new(data: &'a mut [T], stride: usize, block: usize) -> Self {
        Self { data, stride, block }
    }

    fn holds(&self, pixels: usize, channels: usize) -> bool {
        self.data.len() >= end(pixels, channels, self.stride, self.block)
    }

    #[inline(always)]
    fn at(&mut self, pixel: usize, c: usize) -> *mut T {
        let at = c / self.block * self.stride + pixel * self.block + c % self.block;
        self.data.as_mut_ptr().wrapping_add(at)
    }
}

/// Runs what there is of a kernel in `f32`.
macro_rules! in_f32 {
    ($body:block) => {
        if const { size_of::<T>() == size_of::<f32>() } {
            $body
        } else {
            panic!("no kernel for f64")
        }
    };
}

/// A vector of each of these slices.
///
/// # Safety
/// They must have it.
#[inline(always)]
unsafe fn load_all<T: Scalar, S: Simd<T>, const N: usize>(
    simd: S,
    slices: [&[T]; N],
    c: usize,
) -> [S::V; N] {
    let mut vectors = [simd.splat(T::ZERO); N];
    for (vector, slice) in vectors.iter_mut().zip(slices) {
        // SAFETY: the caller's promise.
        *vector = unsafe { simd.load(slice.as_ptr().add(c)) };
    }
    vectors
}

/// scale · (v − centre) + shift
#[inline(always)]
fn mapped<T: Scalar, S: Simd<T>>(simd: S, [centre, scale, shift]: [S::V; 3], v: S::V) -> S::V {
    simd.fma(scale, simd.sub(v, centre), shift)
}

/// Adds lanes to `f64` sums.
///
/// # Safety
/// There must be a sum for each lane.
#[inline(always)]
unsafe fn add_lanes<T: Scalar, S: Simd<T>>(simd: S, v: S::V, sums: *mut f64) {
    let mut lanes = [T::ZERO; super::MAX_LANES];
    // SAFETY: no vector has more lanes; the caller's promise.
    unsafe {
        simd.store(v, lanes.as_mut_ptr());
        for (i, lane) in lanes.iter().take(simd.lanes()).enumerate() {
            *sums.add(i) += lane.to_f64();
        }
    }
}

/// sums\[c\] += Σ (v − origin), squares\[c\] += Σ (v − origin)²
pub struct Sums<'a, T> {
    pub v: Pixels<'a, T>,
    pub pixels: usize,
    pub origin: &'a [T],
    /// One for each channel, as of origin.
    pub sums: [&'a mut [f64]; 2],
}

impl<T: Scalar> Kernel<T> for Sums<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) {
        in_f32!({
            let Self { v, pixels, origin, sums: [first, second] } = self;
            let (channels, lanes) = (origin.len(), simd.lanes());
            assert!(channels.is_multiple_of(lanes) && v.holds(pixels, channels));
            assert!(first.len() == channels && second.len() == channels);
            for start in (0..pixels).step_by(SEGMENT) {
                let end = pixels.min(start + SEGMENT);
                for c in (0..channels).step_by(lanes) {
                    // SAFETY: whole vectors of what is there, by the assertions above.
                    unsafe {
                        let origin = simd.load(origin.as_ptr().add(c));
                        let (mut a, mut b) = (simd.splat(T::ZERO), simd.splat(T::ZERO));
                        for pixel in start..end {
                            simd.prefetch(v.ahead(pixel, c, channels));
                            let x = simd.sub(simd.load(v.at(pixel, c)), origin);
                            a = simd.add(a, x);
                            b = simd.fma(x, x, b);
                        }
                        add_lanes(simd, a, first.as_mut_ptr().add(c));
                        add_lanes(simd, b, second.as_mut_ptr().add(c));
                    }
                }
            }
        });
    }
}

/// u = relu(map(v))
pub struct Rectify<'a, T> {
    pub v: Pixels<'a, T>,
    pub pixels: usize,
    /// As of [`Maps::of`]; `None`: u = v.
    pub maps: Option<[&'a [T]; 3]>,
    pub channels: usize,
    pub u: BlocksMut<'a, T>,
}

impl<T: Scalar> Kernel<T> for Rectify<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) {
        in_f32!({
            let Self { v, pixels, maps, channels, mut u } = self;
            let lanes = simd.lanes();
            assert!(
                u.block.is_multiple_of(lanes)
                    && maps.iter().flatten().all(|map| map.len() == channels)
            );
            assert!(u.holds(pixels, channels) && v.holds(pixels, channels));
            for start in (0..pixels).step_by(SEGMENT) {
                let end = pixels.min(start + SEGMENT);
                for c in (0..channels).step_by(lanes) {
                    let (from, to) = (v.at(start, c), u.at(start, c));
                    // SAFETY: whole vectors of what is there, by the assertions above.
                    unsafe {
                        match maps {
                            Some(maps) => {
                                let maps = load_all(simd, maps, c);
                                for i in 0..end - start {
                                    let v = simd.load(from.add(i * v.step));
                                    let v = mapped(simd, maps, v);
                                    let v = simd.select_le_zero(v, simd.splat(T::ZERO), v);
                                    simd.store(v, to.add(i * u.block));
                                }
                            }
                            None => {
                                for i in 0..end - start {
                                    let v = simd.load(from.add(i * v.step));
                                    simd.store(v, to.add(i * u.block));
                                }
                            }
                        }
                    }
                }
            }
        });
    }
}

/// Runs a kernel by a gate that the compiler knows.
macro_rules! by_gate {
    ($kernel:ident, $simd:expr) => {
        in_f32!({
            match $kernel.gate {
                Gate::Sigmoid => $kernel.by($simd, Gate::Sigmoid),
                Gate::Gaussian => $kernel.by($simd, Gate::Gaussian),
            }
        })
    };
}

/// out = x · g(map(d))
pub struct Apply<'a, T> {
    pub gate: Gate,
    pub x: Pixels<'a, T>,
    pub d: Pixels<'a, T>,
    /// `None`: as it is.
    pub maps: Option<[&'a [T]; 3]>,
    pub out: Places<'a, T>,
}

impl<T: Scalar> Kernel<T> for Apply<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) {
        by_gate!(self, simd)
    }
}

impl<T: Scalar> Apply<'_, T> {
    #[inline(always)]
    fn by<S: Simd<T>>(self, simd: S, gate: Gate) {
        let Self { x, d, maps, out, .. } = self;
        let ((rows, columns), channels, lanes) = (out.count, out.channels, simd.lanes());
        assert!(channels.is_multiple_of(lanes));
        assert!([x, d].iter().all(|of| of.holds(rows * columns, channels)));
        assert!(maps.iter().flatten().all(|map| map.len() == channels));
        let stream = out.streams(lanes);
        for y in 0..rows {
            for column in 0..columns {
                // SAFETY: whole vectors of what is there, by the assertions above; `out` vouches for its places, and
                // says whether they are aligned.
                unsafe {
                    let (to, pixel) = (out.at(y, column), y * columns + column);
                    for c in (0..channels).step_by(lanes) {
                        let d = simd.load(d.at(pixel, c));
                        let d = match maps {
                            Some(maps) => mapped(simd, load_all(simd, maps, c), d),
                            None => d,
                        };
                        let gated = simd.mul(simd.load(x.at(pixel, c)), gate.value(simd, d));
                        match stream {
                            true => simd.stream(gated, to.add(c)),
                            false => simd.store(gated, to.add(c)),
                        }
                    }
                }
            }
        }
    }
}

/// sums\[0\]\[c\] += Σ e, sums\[1\]\[c\] += Σ e · (d − centre), with e = grad · x · g′(map(d)).
pub struct GateSums<'a, T> {
    pub gate: Gate,
    pub grad: Pixels<'a, T>,
    pub x: Pixels<'a, T>,
    pub d: Pixels<'a, T>,
    pub maps: [&'a [T]; 3],
    pub pixels: usize,
    pub sums: [&'a mut [f64]; 2],
}

impl<T: Scalar> Kernel<T> for GateSums<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) {
        by_gate!(self, simd)
    }
}

impl<T: Scalar> GateSums<'_, T> {
    #[inline(always)]
    fn by<S: Simd<T>>(self, simd: S, gate: Gate) {
        let Self { grad, x, d, maps, pixels, sums: [first, second], .. } = self;
        let (channels, lanes) = (maps[0].len(), simd.lanes());
        assert!(channels.is_multiple_of(lanes) && maps.iter().all(|map| map.len() == channels));
        assert!([grad, x, d].iter().all(|of| of.holds(pixels, channels)));
        assert!(first.len() == channels && second.len() == channels);
        for start in (0..pixels).step_by(SEGMENT) {
            let end = pixels.min(start + SEGMENT);
            for c in (0..channels).step_by(lanes) {
                // SAFETY: whole vectors of what is there, by the assertions above.
                unsafe {
                    let maps = load_all(simd, maps, c);
                    let (mut a, mut b) = (simd.splat(T::ZERO), simd.splat(T::ZERO));
                    for pixel in start..end {
                        for of in [grad, x, d] {
                            simd.prefetch(of.ahead(pixel, c, channels));
                        }
                        let centred = simd.sub(simd.load(d.at(pixel, c)), maps[0]);
                        let u = simd.fma(maps[1], centred, maps[2]);
                        let value = gate.value(simd, u);
                        let grad = simd.load(grad.at(pixel, c));
                        let slope = gate.slope(simd, u, value);
                        let e = simd.mul(simd.mul(grad, simd.load(x.at(pixel, c))), slope);
                        a = simd.add(a, e);
                        b = simd.fma(e, centred, b);
                    }
                    add_lanes(simd, a, first.as_mut_ptr().add(c));
                    add_lanes(simd, b, second.as_mut_ptr().add(c));
                }
            }
        }
    }
}

/// The gradient at d, that at the gate's argument past batch norm, and the one past the gate to x, grad · g(map(d)).
pub struct GateGradient<'a, T> {
    pub gate: Gate,
    pub grad: Pixels<'a, T>,
    pub x: Pixels<'a, T>,
    pub d: Pixels<'a, T>,
    pub maps: [&'a [T]; 3],
    pub norm: NormMapsOf<'a, T>,
    pub pixels: usize,
    pub e: BlocksMut<'a, T>,
    /// `None`: not wanted.
    pub direct: Option<BlocksMut<'a, T>>,
}

impl<T: Scalar> Kernel<T> for GateGradient<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) {
        by_gate!(self, simd)
    }
}

impl<T: Scalar> GateGradient<'_, T> {
    #[inline(always)]
    fn by<S: Simd<T>>(self, simd: S, gate: Gate) {
        match (self.norm.batch, self.direct.is_some()) {
            (Some(batch), true) => self.to::<S, true, true>(simd, gate, batch),
            (Some(batch), false) => self.to::<S, true, false>(simd, gate, batch),
            (None, true) => self.to::<S, false, true>(simd, gate, [&[]; 4]),
            (None, false) => self.to::<S, false, false>(simd, gate, [&[]; 4]),
        }
    }

    #[inline(always)]
    fn to<S: Simd<T>, const BATCH: bool, const DIRECT: bool>(
        self,
        simd: S,
        gate: Gate,
        batch: [&[T]; 4],
    ) {
        let Self { grad, x, d, maps, norm, pixels, mut e, mut direct, .. } = self;
        let (channels, lanes) = (maps[0].len(), simd.lanes());
        assert!(e.block.is_multiple_of(lanes) && e.holds(pixels, channels));
        let direct_block = direct.as_ref().map_or(0, |direct| direct.block);
        assert!(direct_block.is_multiple_of(lanes));
        assert!(direct.as_ref().is_none_or(|direct| direct.holds(pixels, channels)));
        let constants = [maps[0], maps[1], maps[2], norm.scale];
        assert!(constants.iter().all(|of| of.len() == channels));
        assert!(!BATCH || batch.iter().all(|of| of.len() == channels));
        assert!([grad, x, d].iter().all(|of| of.holds(pixels, channels)));
        for start in (0..pixels).step_by(SEGMENT) {
            let end = pixels.min(start + SEGMENT);
            for c in (0..channels).step_by(lanes) {
                // SAFETY: whole vectors of what is there, by the assertions above.
                unsafe {
                    let [centre, scale, shift, of_norm] = load_all(simd, constants, c);
                    let mut parts = [simd.splat(T::ZERO); 4];
                    if BATCH {
                        parts = load_all(simd, batch, c);
                    }
                    let to_e = e.at(start, c);
                    let to_direct = direct.as_mut().map_or(to_e, |direct| direct.at(start, c));
                    for pixel in start..end {
                        for of in [grad, x, d] {
                            simd.prefetch(of.ahead(pixel, c, channels));
                        }
                        let centred = simd.sub(simd.load(d.at(pixel, c)), centre);
                        let u = simd.fma(scale, centred, shift);
                        let value = gate.value(simd, u);
                        let grad = simd.load(grad.at(pixel, c));
                        if DIRECT {
                            let to = to_direct.add((pixel - start) * direct_block);
                            simd.store(simd.mul(grad, value), to);
                        }
                        let slope = gate.slope(simd, u, value);
                        let v = simd.mul(simd.mul(grad, simd.load(x.at(pixel, c))), slope);
                        // As NormGradient::apply.
                        let v = if BATCH {
                            let large = simd.fma(centred, parts[0], parts[2]);
                            let small = simd.fma(centred, parts[1], parts[3]);
                            simd.add(simd.fma(v, of_norm, large), small)
                        } else {
                            simd.mul(v, of_norm)
                        };
                        simd.store(v, to_e.add((pixel - start) * e.block));
                    }
                }
            }
        }
    }
}

/// out = scale · e + direct, where e is the gradient at a rectified u, masked where relu(map(u)) is flat; sums\[0\]\[c\]
/// += Σ e, sums\[1\]\[c\] += Σ e · (u − centre).
pub struct ReluGradient<'a, T> {
    pub u: Pixels<'a, T>,
    pub maps: [&'a [T]; 3],
    pub grad: Blocks<'a, T>,
    /// `None`: zero.
    pub direct: Option<Blocks<'a, T>>,
    pub out: Places<'a, T>,
    pub sums: [&'a mut [f64]; 2],
}

impl<T: Scalar> Kernel<T> for ReluGradient<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) {
        in_f32!({
            let Self { u, maps, grad, direct, out, sums: [first, second] } = self;
            let ((rows, columns), channels, lanes) = (out.count, out.channels, simd.lanes());
            let pixels = rows * columns;
            assert!(channels.is_multiple_of(lanes) && maps.iter().all(|map| map.len() == channels));
            assert!(u.holds(pixels, channels) && grad.holds(pixels, channels));
            assert!(direct.is_none_or(|direct| direct.holds(pixels, channels)));
            let blocks = [grad.block, direct.map_or(0, |direct| direct.block)];
            assert!(blocks.iter().all(|block| block.is_multiple_of(lanes)));
            assert!(first.len() == channels && second.len() == channels);
            let (stream, zero) = (out.streams(lanes), simd.splat(T::ZERO));
            for y in 0..rows {
                for start in (0..columns).step_by(SEGMENT) {
                    let end = columns.min(start + SEGMENT);
                    for c in (0..channels).step_by(lanes) {
                        // SAFETY: whole vectors of what is there, by the assertions above; `out` vouches for its
                        // places, and says whether they are aligned.
                        unsafe {
                            let [centre, scale, shift] = load_all(simd, maps, c);
                            let (mut a, mut b) = (zero, zero);
                            let from = grad.at(y * columns + start, c);
                            let more = direct.map_or(from, |of| of.at(y * columns + start, c));
                            for x in start..end {
                                let pixel = y * columns + x;
                                let centred = simd.sub(simd.load(u.at(pixel, c)), centre);
                                let v = simd.load(from.add((x - start) * blocks[0]));
                                let mapped = simd.fma(scale, centred, shift);
                                let v = simd.select_le_zero(mapped, zero, v);
                                a = simd.add(a, v);
                                b = simd.fma(v, centred, b);
                                let mut v = simd.mul(v, scale);
                                if direct.is_some() {
                                    let more = more.add((x - start) * blocks[1]);
                                    v = simd.add(v, simd.load(more));
                                }
                                let to = out.at(y, x).add(c);
                                match stream {
                                    true => simd.stream(v, to),
                                    false => simd.store(v, to),
                                }
                            }
                            add_lanes(simd, a, first.as_mut_ptr().add(c));
                            add_lanes(simd, b, second.as_mut_ptr().add(c));
                        }
                    }
                }
            }
        });
    }
}

/// out = a + b
pub struct Add<'a, T> {
    pub a: Blocks<'a, T>,
    pub b: Blocks<'a, T>,
    pub out: Places<'a, T>,
}

impl<T: Scalar> Kernel<T> for Add<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) {
        in_f32!({
            let Self { a, b, out } = self;
            let ((rows, columns), channels, lanes) = (out.count, out.channels, simd.lanes());
            assert!([a, b].iter().all(|of| of.holds(rows * columns, channels)));
            assert!([a, b].iter().all(|of| of.block.is_multiple_of(lanes)));
            let stream = out.streams(lanes);
            for y in 0..rows {
                for start in (0..columns).step_by(SEGMENT) {
                    let end = columns.min(start + SEGMENT);
                    for c in (0..channels).step_by(lanes) {
                        let [from_a, from_b] = [a, b].map(|of| of.at(y * columns + start, c));
                        for x in start..end {
                            let i = x - start;
                            // SAFETY: whole vectors of what is there, by the assertions above; `out` vouches for its
                            // places, and says whether they are aligned.
                            unsafe {
                                let a = simd.load(from_a.add(i * a.block));
                                let b = simd.load(from_b.add(i * b.block));
                                let (v, to) = (simd.add(a, b), out.at(y, x).add(c));
                                match stream {
                                    true => simd.stream(v, to),
                                    false => simd.store(v, to),
                                }
                            }
                        }
                    }
                }
            }
        });
    }
}

/// grad += slope · (u − centre) + shift: what the statistics of a batch norm add to the gradient at u.
pub struct BatchGradient<'a, T> {
    pub u: Pixels<'a, T>,
    pub norm: NormMapsOf<'a, T>,
    /// As many pixels, as far apart.
    pub grad: Places<'a, T>,
}

impl<T: Scalar> Kernel<T> for BatchGradient<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) {
        in_f32!({
            let Self { u, norm, grad } = self;
            let NormMapsOf { centre, batch: Some([slope, slope2, shift, shift2]), .. } = norm
            else {
                return;
            };
            let ((rows, columns), channels, lanes) = (grad.count, grad.channels, simd.lanes());
            let constants = [centre, slope, slope2, shift, shift2];
            assert!(channels.is_multiple_of(lanes) && u.holds(rows * columns, channels));
            assert!(constants.iter().all(|of| of.len() == channels));
            for y in 0..rows {
                for start in (0..columns).step_by(SEGMENT) {
                    let end = columns.min(start + SEGMENT);
                    for c in (0..channels).step_by(lanes) {
                        // SAFETY: whole vectors of what is there, by the assertions above; `grad` vouches for its
                        // places.
                        unsafe {
                            let [centre, slope, slope2, shift, shift2] =
                                load_all(simd, constants, c);
                            for x in start..end {
                                let pixel = y * columns + x;
                                let to = grad.at(y, x).add(c);
                                simd.prefetch(u.ahead(pixel, c, channels));
                                let next = (AHEAD / channels).max(1) * u.step;
                                simd.prefetch(to.wrapping_add(next).cast_const());
                                let centred = simd.sub(simd.load(u.at(pixel, c)), centre);
                                let large = simd.fma(centred, slope, shift);
                                let small = simd.fma(centred, slope2, shift2);
                                let v = simd.add(simd.add(simd.load(to), large), small);
                                simd.store(v, to);
                            }
                        }
                    }
                }
            }
        });
    }
}

/// out = sum + grad · g(map(d))
pub struct PastGate<'a, T> {
    pub gate: Gate,
    pub grad: Pixels<'a, T>,
    pub d: Pixels<'a, T>,
    pub maps: [&'a [T]; 3],
    /// (pixels, channels)
    pub sum: &'a [T],
    /// The same.
    pub out: &'a mut [T],
}

impl<T: Scalar> Kernel<T> for PastGate<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) {
        by_gate!(self, simd)
    }
}

impl<T: Scalar> PastGate<'_, T> {
    #[inline(always)]
    fn by<S: Simd<T>>(self, simd: S, gate: Gate) {
        let Self { grad, d, maps, sum, out, .. } = self;
        let (channels, lanes) = (maps[0].len(), simd.lanes());
        assert!(channels > 0 && channels.is_multiple_of(lanes));
        assert!(out.len().is_multiple_of(channels) && sum.len() == out.len());
        assert!(maps.iter().all(|map| map.len() == channels));
        assert!([grad, d].iter().all(|of| of.holds(out.len() / channels, channels)));
        for (pixel, out) in out.chunks_exact_mut(channels).enumerate() {
            for c in (0..channels).step_by(lanes) {
                // SAFETY: whole vectors of what is there, by the assertions above.
                unsafe {
                    for of in [grad, d] {
                        simd.prefetch(of.ahead(pixel, c, channels));
                    }
                    let d = mapped(simd, load_all(simd, maps, c), simd.load(d.at(pixel, c)));
                    let sum = simd.load(sum.as_ptr().add(pixel * channels + c));
                    let v = simd.fma(simd.load(grad.at(pixel, c)), gate.value(simd, d), sum);
                    simd.store(v, out.as_mut_ptr().add(c));
                }
            }
        }
    }
}

/// Weights of a convolution 1 × 1, packed for [`Mix`], and its bias.
#[derive(Debug)]
pub struct MixWeights<T> {
    inputs: usize,
    /// (groups of outputs, inputs, outputs of the group): a group is [`MIXED`] vectors, the last may be
    /// one.
    packed: Vec<T>,
    bias: Vec<T>,
}

/// Vectors of output channels of a register tile of a [`Mix`].
const MIXED: usize = 2;

impl<T: Scalar> MixWeights<T> {
    /// `weight` is (outputs, inputs), `bias` (outputs), both whole blocks.
    pub fn new(weight: &[T], bias: Vec<T>, lanes: usize) -> Self {
        let (inputs, group) = (weight.len() / bias.len(), MIXED * lanes);
        let mut this = Self::zeros(weight, bias, lanes);
        let groups = this.packed.chunks_mut(group * inputs);
        for (packed, weight) in groups.zip(weight.chunks(group * inputs)) {
            let (to, size) = (packed.as_mut_ptr(), packed.len() / inputs);
            // SAFETY: a group has a place for each of its outputs, at each input.
            let job = unsafe { Transpose::scatter((weight, inputs), (to, size), inputs, size) };
            simd::dispatch(job);
        }
        this
    }

    /// `weight` is (inputs, outputs).
    pub fn transposed(weight: &[T], bias: Vec<T>, lanes: usize) -> Self {
        let (outputs, group) = (bias.len(), MIXED * lanes);
        let inputs = weight.len() / outputs;
        let mut this = Self::zeros(weight, bias, lanes);
        let groups = this.packed.chunks_mut(group * inputs);
        for (packed, first) in groups.zip((0..outputs).step_by(group)) {
            let size = packed.len() / inputs;
            for (packed, row) in packed.chunks_exact_mut(size).zip(weight.chunks_exact(outputs)) {
                packed.copy_from_slice(&row[first..][..size]);
            }
        }
        this
    }

    fn zeros(weight: &[T], bias: Vec<T>, lanes: usize) -> Self {
        let (outputs, inputs) = (bias.len(), weight.len() / bias.len());
        assert!(outputs % lanes == 0 && weight.len() == inputs * outputs);
        Self { inputs, packed: vec![T::ZERO; weight.len()], bias }
    }
}

/// out = bias + weight · x, or relu of it, pixel by pixel: (pixels, channels) each.
pub struct Mix<'a, T> {
    pub weights: &'a MixWeights<T>,
    pub x: &'a [T],
    pub out: &'a mut [T],
    pub relu: bool,
}

impl<T: Scalar> Kernel<T> for Mix<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) {
        match self.relu {
            true => self.all::<S, true>(simd),
            false => self.all::<S, false>(simd),
        }
    }
}

impl<T: Scalar> Mix<'_, T> {
    #[inline(always)]
    fn all<S: Simd<T>, const RELU: bool>(mut self, simd: S) {
        let (inputs, outputs) = (self.weights.inputs, self.weights.bias.len());
        let (lanes, pixels) = (simd.lanes(), self.x.len() / inputs);
        assert!(self.x.len() == pixels * inputs && self.out.len() == pixels * outputs);
        assert!(outputs % lanes == 0);
        let mut o = 0;
        // A group after the other, whose weights stay in the first-level cache.
        while o < outputs {
            let pair = outputs - o >= MIXED * lanes;
            let mut t = 0;
            while t < pixels {
                let left = pixels - t;
                // SAFETY: these pixels and channels are there, by the assertions above.
                unsafe {
                    // 12 × 2 accumulators and their operands fit 32 registers, 6 × 2 fit 16.
                    t += match (left, pair) {
                        (12.., true) if const { S::TILE_VECTORS == 4 } => {
                            self.tile::<S, 12, MIXED, RELU>(simd, t, o)
                        }
                        (12.., false) if const { S::TILE_VECTORS == 4 } => {
                            self.tile::<S, 12, 1, RELU>(simd, t, o)
                        }
                        (6.., true) => self.tile::<S, 6, MIXED, RELU>(simd, t, o),
                        (6.., false) => self.tile::<S, 6, 1, RELU>(simd, t, o),
                        (_, true) => self.tile::<S, 1, MIXED, RELU>(simd, t, o),
                        (_, false) => self.tile::<S, 1, 1, RELU>(simd, t, o),
                    };
                }
            }
            o += if pair { MIXED * lanes } else { lanes };
        }
    }

    /// R pixels and V vectors of outputs. Returns R.
    ///
    /// # Safety
    /// What `run` asserts; pixels and channels must be inside.
    #[inline(always)]
    unsafe fn tile<S: Simd<T>, const R: usize, const V: usize, const RELU: bool>(
        &mut self,
        simd: S,
        t: usize,
        o: usize,
    ) -> usize {
        let (MixWeights { inputs, packed, bias }, lanes) = (self.weights, simd.lanes());
        let (inputs, outputs, zero) = (*inputs, bias.len(), simd.splat(T::ZERO));
        // SAFETY: the caller's promise.
        unsafe {
            let mut acc = [[zero; V]; R];
            for v in 0..V {
                let bias = simd.load(bias.as_ptr().add(o + v * lanes));
                for acc in &mut acc {
                    acc[v] = bias;
                }
            }
            let x = self.x.as_ptr().add(t * inputs);
            let w = packed.as_ptr().add(o * inputs);
            for i in 0..inputs {
                let mut weight = [zero; V];
                for (v, weight) in weight.iter_mut().enumerate() {
                    *weight = simd.load(w.add((i * V + v) * lanes));
                }
                for (r, acc) in acc.iter_mut().enumerate() {
                    let x = simd.splat(*x.add(r * inputs + i));
                    for v in 0..V {
                        acc[v] = simd.fma(x, weight[v], acc[v]);
                    }
                }
            }
            let out = self.out.as_mut_ptr().add(t * outputs + o);
            for (r, acc) in acc.iter().enumerate() {
                for (v, &acc) in acc.iter().enumerate() {
                    let acc = if RELU { simd.select_le_zero(acc, zero, acc) } else { acc };
                    simd.store(acc, out.add(r * outputs + v * lanes));
                }
            }
        }
        R
    }
}
