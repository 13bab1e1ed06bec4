//! Kernels on images whose channels lie in blocks of as many as a vector has lanes: a pixel of a
//! block is a vector. First and last convolution of a network, and the spatial gate in evaluation.
//!
//! They work on rows, which need not lie at equal distances: those of a ring do not. All loads and
//! stores are whole vectors, and aligned if the rows are.

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::activation::Gate;
use crate::memory::Line;
use crate::simd::{Kernel, Simd};

/// A row to read: (blocks, pixels, lanes), a block `stride` elements after the one before, a pixel
/// `step` elements: as many as lanes, or more where it lies in a tensor in channels_last.
#[derive(Clone, Copy, Debug)]
pub struct Row<'a> {
    ptr: *const f32,
    stride: usize,
    step: usize,
    len: usize,
    data: PhantomData<&'a [f32]>,
}

impl<'a> Row<'a> {
    pub fn new(data: &'a [f32], stride: usize, step: usize) -> Self {
        Self { ptr: data.as_ptr(), stride, step, len: data.len(), data: PhantomData }
    }

    /// The row of `len` elements from `ptr` on: for a row of which other threads write other pixels.
    ///
    /// # Safety
    /// The elements must be valid for reading, and nobody may write to those that the kernel reads, as
    /// long as this lives.
    pub unsafe fn from_raw(ptr: *const f32, len: usize, stride: usize, step: usize) -> Self {
        Self { ptr, stride, step, len, data: PhantomData }
    }

    /// Whether so many pixels of so many blocks can be read, next to each other.
    #[inline(always)]
    pub(super) fn holds(&self, blocks: usize, pixels: usize, lanes: usize) -> bool {
        self.step == lanes && self.reaches(blocks, pixels, lanes)
    }

    /// Whether they can, `step` elements apart.
    #[inline(always)]
    fn reaches(&self, blocks: usize, pixels: usize, lanes: usize) -> bool {
        self.len >= (blocks - 1) * self.stride + pixels.saturating_sub(1) * self.step + lanes
    }

    /// The first pixel of a block.
    #[inline(always)]
    pub(super) fn block(&self, block: usize) -> *const f32 {
        self.ptr.wrapping_add(block * self.stride)
    }
}

/// A row to write, as [`Row`].
#[derive(Debug)]
pub struct RowMut<'a> {
    ptr: *mut f32,
    stride: usize,
    step: usize,
    len: usize,
    data: PhantomData<&'a mut [f32]>,
}

impl<'a> RowMut<'a> {
    pub fn new(data: &'a mut [f32], stride: usize, step: usize) -> Self {
        Self { ptr: data.as_mut_ptr(), stride, step, len: data.len(), data: PhantomData }
    }

    /// The row of `len` elements from `ptr` on: for a row of which other threads write other pixels.
    ///
    /// # Safety
    /// The elements must be valid for writing, and nobody else may use those that the kernel writes,
    /// as long as this lives.
    pub unsafe fn from_raw(ptr: *mut f32, len: usize, stride: usize, step: usize) -> Self {
        Self { ptr, stride, step, len, data: PhantomData }
    }

    /// As [`Row::holds`] and [`Row::reaches`].
    #[inline(always)]
    fn holds(&self, blocks: usize, pixels: usize, lanes: usize) -> bool {
        self.step == lanes && self.reaches(blocks, pixels, lanes)
    }

    #[inline(always)]
    fn reaches(&self, blocks: usize, pixels: usize, lanes: usize) -> bool {
        self.len >= (blocks - 1) * self.stride + pixels.saturating_sub(1) * self.step + lanes
    }

    #[inline(always)]
    fn block(&self, block: usize) -> *mut f32 {
        self.ptr.wrapping_add(block * self.stride)
    }
}

/// An affine map per channel, v ↦ scale · v + shift, whole blocks.
#[derive(Clone, Debug)]
pub struct Maps {
    pub scale: Vec<f32>,
    pub shift: Vec<f32>,
}

/// Where the outputs of a convolution go, row by row.
#[derive(Debug)]
pub struct Sink<'a> {
    pub rows: &'a [RowMut<'a>],
    /// The rows get relu(v) instead of v.
    pub relu: bool,
    /// relu(map(v)) goes to these rows, besides.
    pub rectified: Option<(&'a [RowMut<'a>], &'a Maps)>,
}

impl Sink<'_> {
    /// Whether `rows` rows of so many pixels and blocks can be written.
    #[inline(always)]
    pub(super) fn holds(&self, blocks: usize, pixels: usize, lanes: usize) -> bool {
        self.rows.iter().all(|row| row.holds(blocks, pixels, lanes))
            && self.rectified.is_none_or(|(rows, maps)| {
                rows.len() == self.rows.len()
                    && rows.iter().all(|row| row.holds(blocks, pixels, lanes))
                    && maps.scale.len() >= blocks * lanes
                    && maps.shift.len() >= blocks * lanes
            })
    }

    /// Writes a pixel of a block.
    ///
    /// # Safety
    /// There must be such a row, block and pixel, as [`Sink::holds`] says.
    #[inline(always)]
    pub(super) unsafe fn put<S: Simd<f32>>(
        &self,
        simd: S,
        v: S::V,
        row: usize,
        block: usize,
        pixel: usize,
    ) {
        let (lanes, zero) = (simd.lanes(), simd.splat(0.0));
        // SAFETY: the caller's promise.
        unsafe {
            let out = self.rows.get_unchecked(row).block(block).add(pixel * lanes);
            simd.store(if self.relu { simd.select_le_zero(v, zero, v) } else { v }, out);
            if let Some((rows, maps)) = self.rectified {
                let scale = simd.load(maps.scale.as_ptr().add(block * lanes));
                let shift = simd.load(maps.shift.as_ptr().add(block * lanes));
                let out = rows.get_unchecked(row).block(block).add(pixel * lanes);
                let mapped = simd.fma(scale, v, shift);
                simd.store(simd.select_le_zero(mapped, zero, mapped), out);
            }
        }
    }
}

/// Weights and bias of a convolution from few channels, packed for [`First`].
#[derive(Debug)]
pub struct FirstWeights {
    inputs: usize,
    k: usize,
    blocks: usize,
    lanes: usize,
    /// (blocks, inputs, k, k, lanes), zeros in the channels beyond the last.
    packed: Vec<f32>,
    bias: Vec<f32>,
}

impl FirstWeights {
    /// `weight` is (outputs, inputs, k, k), `bias` (outputs).
    pub fn new(inputs: usize, k: usize, weight: &[f32], bias: &[f32], lanes: usize) -> Self {
        let taps = inputs * k * k;
        assert!(taps > 0 && weight.len() == bias.len() * taps);
        let blocks = bias.len().div_ceil(lanes);
        let mut packed = vec![0.0; blocks * taps * lanes];
        for (o, row) in weight.chunks_exact(taps).enumerate() {
            for (tap, &value) in row.iter().enumerate() {
                packed[(o / lanes * taps + tap) * lanes + o % lanes] = value;
            }
        }
        Self { inputs, k, blocks, lanes, packed, bias: padded(bias, lanes) }
    }

    pub fn outputs(&self) -> usize {
        self.blocks * self.lanes
    }

    pub fn inputs(&self) -> usize {
        self.inputs
    }

    pub fn k(&self) -> usize {
        self.k
    }
}

/// `values` with zeros up to whole blocks.
pub fn padded(values: &[f32], lanes: usize) -> Vec<f32> {
    let mut values = values.to_vec();
    values.resize(values.len().next_multiple_of(lanes), 0.0);
    values
}

/// Convolves planes to blocks: one row of outputs from k rows of each plane.
pub struct First<'a> {
    pub weights: &'a FirstWeights,
    /// Row ky of plane i at i · k + ky, from the first column that a tap reads on.
    pub rows: &'a [&'a [f32]],
    pub pixels: usize,
    pub sink: Sink<'a>,
}

impl Kernel<f32> for First<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<f32>>(self, simd: S) {
        let Self { weights, rows, pixels, sink } = &self;
        let &FirstWeights { inputs, k, blocks, lanes, .. } = *weights;
        assert!(lanes == simd.lanes() && rows.len() == inputs * k && sink.rows.len() == 1);
        assert!(rows.iter().all(|row| row.len() >= pixels + k - 1));
        assert!(sink.holds(blocks, *pixels, lanes));
        for block in 0..blocks {
            let mut x = 0;
            while x < *pixels {
                // SAFETY: pixels x..x + 4 or x alone, inside rows and sink by the assertions above.
                unsafe {
                    if pixels - x >= 4 {
                        self.tile::<S, 4>(simd, block, x);
                        x += 4;
                    } else {
                        self.tile::<S, 1>(simd, block, x);
                        x += 1;
                    }
                }
            }
        }
    }
}

impl First<'_> {
    /// C pixels of a block.
    ///
    /// # Safety
    /// What `run` asserts; the pixels must be inside.
    #[inline(always)]
    unsafe fn tile<S: Simd<f32>, const C: usize>(&self, simd: S, block: usize, x: usize) {
        let (lanes, k) = (simd.lanes(), self.weights.k);
        // SAFETY: what the constructor packed has a vector for each tap of each block; the rows
        // hold k − 1 pixels more than there are.
        unsafe {
            let mut acc = [simd.load(self.weights.bias.as_ptr().add(block * lanes)); C];
            let mut w = self.weights.packed.as_ptr().add(block * self.rows.len() * k * lanes);
            for row in self.rows {
                for kx in 0..k {
                    let weight = simd.load(w);
                    for (c, acc) in acc.iter_mut().enumerate() {
                        *acc = simd.fma(simd.splat(*row.as_ptr().add(x + kx + c)), weight, *acc);
                    }
                    w = w.add(lanes);
                }
            }
            for (c, &acc) in acc.iter().enumerate() {
                self.sink.put(simd, acc, 0, block, x + c);
            }
        }
    }
}

/// Weights and bias of a convolution to few channels, packed for [`Last`].
#[derive(Debug)]
pub struct LastWeights {
    k: usize,
    blocks: usize,
    lanes: usize,
    /// (outputs, blocks, k, k, lanes), zeros in the channels beyond the last.
    packed: Vec<f32>,
    bias: Vec<f32>,
}

impl LastWeights {
    /// `weight` is (outputs, inputs, k, k), `bias` (outputs).
    pub fn new(inputs: usize, k: usize, weight: &[f32], bias: &[f32], lanes: usize) -> Self {
        let (blocks, square) = (inputs.div_ceil(lanes), k * k);
        assert!(square > 0 && weight.len() == bias.len() * inputs * square);
        let mut packed = vec![0.0; bias.len() * blocks * square * lanes];
        for (at, &value) in weight.iter().enumerate() {
            let (o, i, tap) = (at / square / inputs, at / square % inputs, at % square);
            packed[((o * blocks + i / lanes) * square + tap) * lanes + i % lanes] = value;
        }
        Self { k, blocks, lanes, packed, bias: bias.to_vec() }
    }

    pub fn outputs(&self) -> usize {
        self.bias.len()
    }

    pub fn k(&self) -> usize {
        self.k
    }
}

/// Convolves blocks to planes: one row of each plane from k rows.
pub struct Last<'a> {
    pub weights: &'a LastWeights,
    /// The k rows, from the first column that a tap reads on.
    pub rows: &'a [Row<'a>],
    /// (outputs, pixels)
    pub out: &'a mut [f32],
}

impl Kernel<f32> for Last<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<f32>>(mut self, simd: S) {
        let &LastWeights { k, blocks, lanes, .. } = self.weights;
        let pixels = self.out.len() / self.weights.outputs();
        assert!(lanes == simd.lanes() && self.rows.len() == k);
        assert!(self.out.len() == self.weights.outputs() * pixels);
        assert!(self.rows.iter().all(|row| row.holds(blocks, pixels + k - 1, lanes)));
        for o in 0..self.weights.outputs() {
            let mut x = 0;
            while x < pixels {
                // SAFETY: pixels x..x + 4 or x alone, inside by the assertions above.
                unsafe {
                    if pixels - x >= 4 {
                        self.tile::<S, 4>(simd, o, o * pixels, x);
                        x += 4;
                    } else {
                        self.tile::<S, 1>(simd, o, o * pixels, x);
                        x += 1;
                    }
                }
            }
        }
    }
}

impl Last<'_> {
    /// C pixels of a plane that starts at `plane`.
    ///
    /// # Safety
    /// What `run` asserts; the pixels must be inside.
    #[inline(always)]
    unsafe fn tile<S: Simd<f32>, const C: usize>(
        &mut self,
        simd: S,
        o: usize,
        plane: usize,
        x: usize,
    ) {
        let &LastWeights { k, blocks, lanes, .. } = self.weights;
        let mut acc = [simd.splat(0.0); C];
        // SAFETY: what the constructor packed has a vector for each tap of each block and output;
        // the rows hold k − 1 pixels more than there are.
        unsafe {
            let mut w = self.weights.packed.as_ptr().add(o * blocks * k * k * lanes);
            for block in 0..blocks {
                for row in self.rows {
                    let input = row.block(block).add(x * lanes);
                    for kx in 0..k {
                        let weight = simd.load(w);
                        for (c, acc) in acc.iter_mut().enumerate() {
                            *acc = simd.fma(simd.load(input.add((kx + c) * lanes)), weight, *acc);
                        }
                        w = w.add(lanes);
                    }
                }
            }
        }
        for (c, &acc) in acc.iter().enumerate() {
            self.out[plane + x + c] = self.weights.bias[o] + simd.sum(acc);
        }
    }
}

/// The spatial gate of a unit in evaluation, all constants folded: taps and bias of the depthwise
/// convolution with the batch norm behind it, and the map of what follows the unit.
#[derive(Debug)]
pub struct GateWeights {
    pub gate: Gate,
    pub k: usize,
    /// (blocks, k, k, lanes)
    pub taps: Vec<f32>,
    /// Whole blocks.
    pub bias: Vec<f32>,
    pub after: Maps,
}

/// Pixels of the widest tile of a [`Gated`].
const MAX_TILE: usize = 6;

/// out = after(x · g(bias + taps ⋆ u)), rows of all blocks.
pub struct Gated<'a> {
    pub weights: &'a GateWeights,
    /// 2 ⌊k / 2⌋ rows more than there are of x, from the first column that a tap reads on, their pixels
    /// next to each other.
    pub u: &'a [Row<'a>],
    pub x: &'a [Row<'a>],
    pub pixels: usize,
    pub out: &'a [RowMut<'a>],
}

impl Kernel<f32> for Gated<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<f32>>(self, simd: S) {
        let (k, lanes, pixels) = (self.weights.k, simd.lanes(), self.pixels);
        let blocks = self.weights.bias.len() / lanes;
        assert!(k % 2 == 1 && self.u.len() == self.x.len() + k - 1);
        assert!(self.x.len() == self.out.len() && self.weights.bias.len() == blocks * lanes);
        assert!(self.weights.taps.len() == blocks * k * k * lanes);
        let Maps { scale, shift } = &self.weights.after;
        assert!(scale.len() == blocks * lanes && shift.len() == blocks * lanes);
        assert!(self.u.iter().all(|row| row.holds(blocks, pixels + k - 1, lanes)));
        assert!(self.x.iter().all(|row| row.reaches(blocks, pixels, lanes)));
        assert!(self.out.iter().all(|row| row.reaches(blocks, pixels, lanes)));
        for block in 0..blocks {
            let mut y = 0;
            while y < self.x.len() {
                // A tile ramps in and out over one row less than its height.
                let tall = self.x.len() - y >= 4 && k >= 3;
                // SAFETY: rows y..y + 4 or y alone, inside by the assertions above.
                unsafe {
                    if tall {
                        self.strip::<S, 4>(simd, block, y);
                    } else {
                        self.strip::<S, 1>(simd, block, y);
                    }
                }
                y += if tall { 4 } else { 1 };
            }
        }
    }
}

impl Gated<'_> {
    /// R rows of a block.
    ///
    /// # Safety
    /// What `run` asserts; the rows must be inside, and k ≥ R − 1.
    #[inline(always)]
    unsafe fn strip<S: Simd<f32>, const R: usize>(&self, simd: S, block: usize, y: usize) {
        let mut x = 0;
        while x < self.pixels {
            let left = self.pixels - x;
            // SAFETY: the pixels x..x + C are inside.
            unsafe {
                if S::TILE_VECTORS == 4 && left >= 6 {
                    self.tile::<S, R, 6>(simd, block, y, x);
                    x += 6;
                } else if left >= 3 {
                    self.tile::<S, R, 3>(simd, block, y, x);
                    x += 3;
                } else {
                    self.tile::<S, R, 1>(simd, block, y, x);
                    x += 1;
                }
            }
        }
    }

    /// R rows of C pixels of a block.
    ///
    /// # Safety
    /// What `run` asserts; the pixels must be inside, and k ≥ R − 1.
    #[inline(always)]
    unsafe fn tile<S: Simd<f32>, const R: usize, const C: usize>(
        &self,
        simd: S,
        block: usize,
        y: usize,
        x: usize,
    ) {
        let (weights, lanes, k) = (self.weights, simd.lanes(), self.weights.k);
        // Of the tile after this one: the rows come from the third-level cache, and the first ones that
        // a tile reads are those that it has the least to do with.
        for row in &self.u[y..y + k - 1 + R] {
            for c in 0..C {
                simd.prefetch(row.block(block).wrapping_add((x + k - 1 + C + c) * lanes));
            }
        }
        // SAFETY: there is a bias for each channel.
        let mut acc = [[unsafe { simd.load(weights.bias.as_ptr().add(block * lanes)) }; C]; R];
        let mut sums = MaybeUninit::<[[Line; MAX_TILE]; R]>::uninit();
        let sums = sums.as_mut_ptr().cast::<f32>();
        // SAFETY: rows 0..k + R − 1 from y on are rows of u, and `row − r` < k, as `taps` asks; `sums` has
        // a line for each vector, which is no longer than a line.
        unsafe {
            if R > 1 {
                acc = self.taps(simd, acc, block, (y, x), 0..1, (0, 1));
                acc = self.taps(simd, acc, block, (y, x), 1..2, (0, 2));
                acc = self.taps(simd, acc, block, (y, x), 2..3, (0, 3));
            }
            acc = self.taps(simd, acc, block, (y, x), R - 1..k, (0, R));
            if R > 1 {
                acc = self.taps(simd, acc, block, (y, x), k..k + 1, (1, R));
                acc = self.taps(simd, acc, block, (y, x), k + 1..k + 2, (2, R));
                acc = self.taps(simd, acc, block, (y, x), k + 2..k + 3, (3, R));
            }
            for (r, acc) in acc.iter().enumerate() {
                for (c, &acc) in acc.iter().enumerate() {
                    simd.store(acc, sums.add((r * C + c) * lanes));
                }
            }
            // Not unrolled: R · C copies of the gate would not fit the first-level cache.
            let scale = simd.load(weights.after.scale.as_ptr().add(block * lanes));
            let shift = simd.load(weights.after.shift.as_ptr().add(block * lanes));
            for r in 0..R {
                let (from, to) = (self.x.get_unchecked(y + r), self.out.get_unchecked(y + r));
                for c in 0..C {
                    let g = weights.gate.value(simd, simd.load(sums.add((r * C + c) * lanes)));
                    let x_at = simd.load(from.block(block).add((x + c) * from.step));
                    let out = simd.fma(scale, simd.mul(x_at, g), shift);
                    simd.store(out, to.block(block).add((x + c) * to.step));
                }
            }
        }
    }

    /// Some rows of u: each feeds rows low..high of the tile. By value: accumulators behind a reference
    /// are stored after every tap.
    ///
    /// # Safety
    /// As [`Gated::tile`], with the rows in reach and `row − r` a row of taps for r in low..high.
    #[inline(always)]
    unsafe fn taps<S: Simd<f32>, const R: usize, const C: usize>(
        &self,
        simd: S,
        mut acc: [[S::V; C]; R],
        block: usize,
        (y, x): (usize, usize),
        rows: Range<usize>,
        (low, high): (usize, usize),
    ) -> [[S::V; C]; R] {
        let (lanes, k) = (simd.lanes(), self.weights.k);
        // SAFETY: the caller's promise.
        unsafe {
            let taps = self.weights.taps.as_ptr().add(block * k * k * lanes);
            for row in rows {
                let input = self.u.get_unchecked(y + row).block(block).add(x * lanes);
                for j in 0..k {
                    let mut v = [simd.splat(0.0); C];
                    for (c, v) in v.iter_mut().enumerate() {
                        *v = simd.load(input.add((j + c) * lanes));
                    }
                    for (r, acc) in acc.iter_mut().enumerate() {
                        if r < low || r >= high {
                            continue;
                        }
                        let w = simd.load(taps.add(((row - r) * k + j) * lanes));
                        for c in 0..C {
                            acc[c] = simd.fma(w, v[c], acc[c]);
                        }
                    }
                }
            }
        }
        acc
    }
}

/// u = relu(scale · (x − centre) + shift) or x, for a [`Gated`]: a block of a row in channels_last.
pub struct Gather<'a> {
    /// From the block of the first pixel on.
    pub x: &'a [f32],
    /// Elements from one pixel of x to the next.
    pub step: usize,
    /// Centre, scale and shift of the block.
    pub rectifier: Option<[&'a [f32]; 3]>,
    pub out: &'a mut [f32],
}

impl Kernel<f32> for Gather<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<f32>>(self, simd: S) {
        let Self { x, step, rectifier, out } = self;
        let lanes = simd.lanes();
        let pixels = out.len() / lanes;
        assert!(pixels == 0 || x.len() >= (pixels - 1) * step + lanes);
        assert!(rectifier.is_none_or(|maps| maps.iter().all(|map| map.len() >= lanes)));
        let zero = simd.splat(0.0);
        // SAFETY: pixels of x and out, and vectors of the maps, by the assertions above.
        unsafe {
            if let Some(maps) = rectifier {
                let [centre, scale, shift] = [maps[0], maps[1], maps[2]];
                let centre = simd.load(centre.as_ptr());
                let (scale, shift) = (simd.load(scale.as_ptr()), simd.load(shift.as_ptr()));
                for pixel in 0..pixels {
                    let v = simd.sub(simd.load(x.as_ptr().add(pixel * step)), centre);
                    let v = simd.fma(scale, v, shift);
                    simd.store(
                        simd.select_le_zero(v, zero, v),
                        out.as_mut_ptr().add(pixel * lanes),
                    );
                }
            } else {
                for pixel in 0..pixels {
                    let v = simd.load(x.as_ptr().add(pixel * step));
                    simd.store(v, out.as_mut_ptr().add(pixel * lanes));
                }
            }
        }
    }
}

/// Weights of a convolution 1 × 1 in channels_last, packed for [`Mix`], and its bias.
#[derive(Debug)]
pub struct MixWeights {
    inputs: usize,
    /// (groups of outputs, inputs, outputs of the group): a group is [`MIXED`] vectors, the last may be
    /// one.
    packed: Vec<f32>,
    bias: Vec<f32>,
}

/// Vectors of output channels of a register tile of a [`Mix`].
const MIXED: usize = 2;

impl MixWeights {
    /// `weight` is (outputs, inputs), `bias` (outputs), both whole blocks.
    pub fn new(weight: &[f32], bias: Vec<f32>, lanes: usize) -> Self {
        let (outputs, group) = (bias.len(), MIXED * lanes);
        let inputs = weight.len() / outputs;
        assert!(outputs % lanes == 0 && weight.len() == inputs * outputs);
        let mut packed = vec![0.0; weight.len()];
        for (o, row) in weight.chunks_exact(inputs).enumerate() {
            let first = o / group * group;
            let size = group.min(outputs - first);
            for (i, &value) in row.iter().enumerate() {
                packed[first * inputs + i * size + o - first] = value;
            }
        }
        Self { inputs, packed, bias }
    }
}

/// out = relu(bias + weight · x), pixel by pixel: (pixels, channels) each.
pub struct Mix<'a> {
    pub weights: &'a MixWeights,
    pub x: &'a [f32],
    pub out: &'a mut [f32],
}

impl Kernel<f32> for Mix<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<f32>>(mut self, simd: S) {
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
                    t += match (S::TILE_VECTORS == 4 && left >= 12, left >= 6, pair) {
                        (true, _, true) => self.tile::<S, 12, MIXED>(simd, t, o),
                        (true, _, false) => self.tile::<S, 12, 1>(simd, t, o),
                        (_, true, true) => self.tile::<S, 6, MIXED>(simd, t, o),
                        (_, true, false) => self.tile::<S, 6, 1>(simd, t, o),
                        (_, _, true) => self.tile::<S, 1, MIXED>(simd, t, o),
                        (_, _, false) => self.tile::<S, 1, 1>(simd, t, o),
                    };
                }
            }
            o += if pair { MIXED * lanes } else { lanes };
        }
    }
}

impl Mix<'_> {
    /// R pixels and V vectors of outputs. Returns R.
    ///
    /// # Safety
    /// What `run` asserts; pixels and channels must be inside.
    #[inline(always)]
    unsafe fn tile<S: Simd<f32>, const R: usize, const V: usize>(
        &mut self,
        simd: S,
        t: usize,
        o: usize,
    ) -> usize {
        let (MixWeights { inputs, packed, bias }, lanes) = (self.weights, simd.lanes());
        let (inputs, outputs, zero) = (*inputs, bias.len(), simd.splat(0.0));
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
                    let acc = simd.select_le_zero(acc, zero, acc);
                    simd.store(acc, out.add(r * outputs + v * lanes));
                }
            }
        }
        R
    }
}
