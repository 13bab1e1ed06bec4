//! Kernels on images whose channels lie in blocks of as many as a vector has lanes: a pixel of a
//! block is a vector. First and last convolution of a network, and the spatial gate in evaluation.
//!
//! They work on rows, which need not lie at equal distances: those of a ring do not. All loads and
//! stores are whole vectors, and aligned if the rows are.

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::activation::Gate;
use super::channelwise::Maps;
use super::minimal::{self, Filter};
use crate::memory::Line;
use crate::simd::{Kernel, Simd};

/// Elements of a cache line.
const LINE: usize = size_of::<Line>() / size_of::<f32>();

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
    /// All vectors begin a cache line, and [`Gated`] streams those that are whole lines: half a line at a time
    /// would be worse than nothing.
    stream: bool,
    data: PhantomData<&'a mut [f32]>,
}

impl<'a> RowMut<'a> {
    pub fn new(data: &'a mut [f32], stride: usize, step: usize) -> Self {
        // SAFETY: they are borrowed for as long as this lives.
        unsafe { Self::from_raw(data.as_mut_ptr(), data.len(), stride, step) }
    }

    /// The row of `len` elements from `ptr` on: for a row of which other threads write other pixels.
    ///
    /// # Safety
    /// The elements must be valid for writing, and nobody else may use those that the kernel writes,
    /// as long as this lives.
    pub unsafe fn from_raw(ptr: *mut f32, len: usize, stride: usize, step: usize) -> Self {
        Self { ptr, stride, step, len, stream: false, data: PhantomData }
    }

    /// To be written past the caches by [`Gated`], where its vectors are aligned lines.
    ///
    /// # Safety
    /// After the kernel, nobody may read the row before this thread has called [`crate::simd::fence`], as
    /// [`crate::parallel::for_each`] does at the end.
    pub unsafe fn streamed(self) -> Self {
        let aligned = |elements: usize| elements.is_multiple_of(LINE);
        let start = self.ptr.addr() / size_of::<f32>();
        Self { stream: [start, self.stride, self.step].into_iter().all(aligned), ..self }
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

/// Where the outputs of a convolution go, row by row.
#[derive(Debug)]
pub struct Sink<'a> {
    pub rows: &'a [RowMut<'a>],
    /// The rows get relu(v) instead of v.
    pub relu: bool,
}

impl Sink<'_> {
    /// Whether `rows` rows of so many pixels and blocks can be written.
    #[inline(always)]
    pub(super) fn holds(&self, blocks: usize, pixels: usize, lanes: usize) -> bool {
        self.rows.iter().all(|row| row.holds(blocks, pixels, lanes))
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
        // SAFETY: the caller's promise.
        unsafe {
            let out = self.rows.get_unchecked(row).block(block).add(pixel * simd.lanes());
            simd.store(if self.relu { simd.select_le_zero(v, simd.splat(0.0), v) } else { v }, out);
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
                // SAFETY: as many pixels as there are from x on at least, by the assertions above.
                unsafe {
                    if pixels - x >= 8 {
                        self.tile::<S, 8>(simd, o, o * pixels, x);
                        x += 8;
                    } else if pixels - x >= 4 {
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
/// convolution with the batch norm behind it.
#[derive(Debug)]
pub struct GateWeights {
    gate: Gate,
    k: usize,
    /// (blocks, k, k, lanes); of [`minimal`] filtering (blocks, points, k, groups, lanes).
    taps: Vec<f32>,
    /// None where the sums are plain.
    filter: Option<Filter>,
    /// Whole blocks.
    bias: Vec<f32>,
    /// The gate sees relu(map(v)), or v.
    rectifier: Option<Maps>,
    /// Of what the unit yields.
    after: Maps,
}

impl GateWeights {
    /// `taps` is (blocks, k, k, lanes), the others whole blocks; k must be odd. `after` has no centre.
    pub fn new(
        (gate, k): (Gate, usize),
        taps: Vec<f32>,
        bias: Vec<f32>,
        rectifier: Option<Maps>,
        after: Maps,
        lanes: usize,
    ) -> Self {
        let len = bias.len();
        assert!(k % 2 == 1 && len.is_multiple_of(lanes) && taps.len() == len * k * k);
        for Maps { centre, scale, shift } in rectifier.iter().chain([&after]) {
            assert!([centre, scale, shift].iter().all(|list| list.len() == len));
        }
        Self { gate, k, taps, filter: None, bias, rectifier, after }
    }

    /// Takes rows by minimal filtering, where that is faster: then where a sum is not finite others
    /// around it may not be either.
    pub fn filtered(self, lanes: usize) -> Self {
        let (k, filter) = (self.k, Filter::of(self.k));
        match filter {
            None => self,
            Some(of) => Self {
                taps: minimal::transform_taps(&self.taps, (k, k), of, lanes),
                filter,
                ..self
            },
        }
    }

    pub fn k(&self) -> usize {
        self.k
    }

    /// Whether the gate sees the values as they are: those of zeros are zero.
    pub fn keeps_zeros(&self) -> bool {
        self.rectifier.is_none()
    }

    /// The elements that a [`Gated`] of so many rows and pixels needs.
    pub fn scratch(&self, rows: usize, pixels: usize, lanes: usize) -> usize {
        let rows = rows.min(MAX_ROWS);
        let rows = self.filter.map_or(rows + self.k - 1, |filter| filter.rows(rows));
        rows * (pixels + self.k - 1) * lanes
    }
}

/// The padding of an image `len` wide that `halo` numbers below a range and as many above reach.
pub fn padding(range: &Range<usize>, halo: usize, len: usize) -> (usize, usize) {
    (halo.saturating_sub(range.start), (range.end + halo).saturating_sub(len))
}

/// Rows of outputs of which the inputs are in the scratch together: the fewer, the more inputs are
/// there more than once; the more, the more of the second-level cache they take.
const MAX_ROWS: usize = 24;

/// Pixels of the widest register tile of a [`Gated`].
const MAX_TILE: usize = 6;
/// Rows of outputs that a register tile of minimal filtering has, at most: whole tiles of all filters.
const STRIP: usize = 12;

/// out = after(x · g(bias + taps ⋆ u)), u = relu(map(v)) or v: rows of all blocks.
pub struct Gated<'a> {
    pub weights: &'a GateWeights,
    /// ⌊k / 2⌋ rows above the first row of outputs to as many below the last, and as many columns to
    /// the left of the first pixel and to the right of the last, without those of `padding`.
    pub v: &'a [Row<'a>],
    pub x: &'a [Row<'a>],
    /// Rows above and below, columns to the left and to the right, of which u is zero.
    pub padding: [usize; 4],
    pub pixels: usize,
    pub out: &'a [RowMut<'a>],
    /// [`GateWeights::scratch`] elements.
    pub scratch: &'a mut [f32],
}

/// Where the taps of plain sums read u.
#[derive(Clone, Copy)]
enum Source {
    /// The rows of v themselves.
    Rows,
    /// What was copied to the scratch.
    Copy,
}

impl Kernel<f32> for Gated<'_> {
    /// Whether all sums of minimal filtering are finite: infinities and NaNs reach other outputs there
    /// than they should.
    type Output = bool;

    #[inline(always)]
    fn run<S: Simd<f32>>(mut self, simd: S) -> bool {
        let mut check = simd.splat(0.0);
        let &GateWeights { k, filter, .. } = self.weights;
        let (lanes, rows) = (simd.lanes(), self.out.len());
        let [top, bottom, left, right] = self.padding;
        let blocks = self.weights.bias.len() / lanes;
        assert!(self.weights.bias.len() == blocks * lanes && self.pixels > 0);
        assert!([top, bottom, left, right].iter().all(|&padding| padding <= k / 2));
        assert!(self.v.len() + top + bottom == rows + k - 1 && self.x.len() == rows);
        let columns = self.width() - left - right;
        assert!(self.v.iter().all(|row| row.reaches(blocks, columns, lanes)));
        assert!(self.v.iter().all(|row| row.step == self.v[0].step));
        assert!(self.x.iter().all(|row| row.reaches(blocks, self.pixels, lanes)));
        assert!(self.out.iter().all(|row| row.reaches(blocks, self.pixels, lanes)));
        assert!(self.scratch.len() >= self.weights.scratch(rows, self.pixels, lanes));
        for block in 0..blocks {
            for y in (0..rows).step_by(MAX_ROWS) {
                let rows = y..rows.min(y + MAX_ROWS);
                // SAFETY: rows of out, by the assertions above.
                let of_rows = unsafe {
                    match filter.map(|filter| (filter.tile, filter.groups)) {
                        None => {
                            self.plain(simd, block, rows);
                            continue;
                        }
                        Some((3, 3)) => self.minimal::<S, 3, 5, 3>(simd, block, rows),
                        Some((4, 2)) => self.minimal::<S, 4, 7, 2>(simd, block, rows),
                        Some((4, 3)) => self.minimal::<S, 4, 7, 3>(simd, block, rows),
                        Some(filter) => unreachable!("{filter:?}"),
                    }
                };
                check = simd.add(check, of_rows);
            }
        }
        simd.sum(check) == 0.0
    }
}

impl Gated<'_> {
    /// Pixels of a row of u, padding and all.
    #[inline(always)]
    fn width(&self) -> usize {
        self.pixels + self.weights.k - 1
    }

    /// Whether a row of u, counted from the first that a tap reads on, is none of padding.
    #[inline(always)]
    fn is_inside(&self, row: usize) -> bool {
        (self.padding[0]..self.padding[0] + self.v.len()).contains(&row)
    }

    /// The first pixel of v of a row of u, or of the row next to it if it is padding.
    #[inline(always)]
    fn row(&self, block: usize, row: usize) -> *const f32 {
        let row = row.saturating_sub(self.padding[0]).min(self.v.len() - 1);
        self.v[row].block(block)
    }

    /// The map of the rectifier of a block.
    #[inline(always)]
    fn rectifier<S: Simd<f32>>(&self, simd: S, block: usize) -> Option<[S::V; 3]> {
        let Maps { centre, scale, shift } = self.weights.rectifier.as_ref()?;
        let at = block * simd.lanes();
        let of = |list: &[f32]| {
            let list = &list[at..][..simd.lanes()];
            // SAFETY: as many as lanes.
            unsafe { simd.load(list.as_ptr()) }
        };
        Some([of(centre), of(scale), of(shift)])
    }

    /// Rows of outputs by plain sums.
    ///
    /// # Safety
    /// What `run` asserts; the rows must be inside, no more than [`MAX_ROWS`].
    #[inline(always)]
    unsafe fn plain<S: Simd<f32>>(&mut self, simd: S, block: usize, rows: Range<usize>) {
        let k = self.weights.k;
        let step = self.v[0].step;
        // SAFETY: the caller's promise; what is read of u was written before.
        unsafe {
            let source = match self.rectifier(simd, block) {
                Some(maps) => self.copy::<S, true>(simd, block, rows.clone(), maps),
                None if self.padding == [0; 4] && step == simd.lanes() => Source::Rows,
                None => self.copy::<S, false>(simd, block, rows.clone(), [simd.splat(0.0); 3]),
            };
            let mut y = 0;
            while y < rows.len() {
                // A tile ramps in and out over one row less than its height.
                let tall = rows.len() - y >= 4 && k >= 3;
                let mut x = 0;
                while x < self.pixels {
                    let at = (rows.start, y, x);
                    x += match (tall, self.pixels - x) {
                        (true, 6..) if const { S::TILE_VECTORS == 4 } => {
                            self.tile::<S, 4, 6>(simd, block, source, at)
                        }
                        (true, 3..) => self.tile::<S, 4, 3>(simd, block, source, at),
                        (true, _) => self.tile::<S, 4, 1>(simd, block, source, at),
                        (_, 6..) if const { S::TILE_VECTORS == 4 } => {
                            self.tile::<S, 1, 6>(simd, block, source, at)
                        }
                        (_, 3..) => self.tile::<S, 1, 3>(simd, block, source, at),
                        _ => self.tile::<S, 1, 1>(simd, block, source, at),
                    };
                }
                y += if tall { 4 } else { 1 };
            }
        }
    }

    /// Copies the rows of u that these rows depend on: to (rows, pixels, lanes), the source of the taps.
    ///
    /// # Safety
    /// As [`Gated::plain`].
    #[inline(always)]
    unsafe fn copy<S: Simd<f32>, const RECTIFY: bool>(
        &mut self,
        simd: S,
        block: usize,
        rows: Range<usize>,
        maps: [S::V; 3],
    ) -> Source {
        let (lanes, width, step) = (simd.lanes(), self.width(), self.v[0].step);
        let [_, _, left, right] = self.padding;
        for row in rows.start..rows.end + self.weights.k - 1 {
            let from = self.row(block, row);
            let inside = self.is_inside(row);
            let u = &mut self.scratch[(row - rows.start) * width * lanes..][..width * lanes];
            if !inside {
                u.fill(0.0);
                continue;
            }
            u[..left * lanes].fill(0.0);
            u[(width - right) * lanes..].fill(0.0);
            for x in 0..width - left - right {
                // SAFETY: a pixel of v and of u.
                unsafe {
                    let v = simd.load(from.add(x * step));
                    let v = if RECTIFY { rectified(simd, maps, v) } else { v };
                    simd.store(v, u.as_mut_ptr().add((left + x) * lanes));
                }
            }
        }
        Source::Copy
    }

    /// R rows of C pixels of a block, the y-th of those from `start` on. Returns C.
    ///
    /// # Safety
    /// As [`Gated::plain`], with what is read of u in the source, and k ≥ R − 1.
    #[inline(always)]
    unsafe fn tile<S: Simd<f32>, const R: usize, const C: usize>(
        &self,
        simd: S,
        block: usize,
        source: Source,
        (start, y, x): (usize, usize, usize),
    ) -> usize {
        let (weights, lanes, k) = (self.weights, simd.lanes(), self.weights.k);
        // SAFETY: there is a bias for each channel.
        let mut acc = [[unsafe { simd.load(weights.bias.as_ptr().add(block * lanes)) }; C]; R];
        let at = (start, y, x);
        let mut sums = MaybeUninit::<[[Line; MAX_TILE]; R]>::uninit();
        let sums = sums.as_mut_ptr().cast::<f32>();
        // SAFETY: rows 0..k + R − 1 from y on are rows of u, and `row − r` < k, as `taps` asks; `sums` has
        // a line for each vector, which is no longer than a line.
        unsafe {
            if R > 1 {
                acc = self.taps(simd, acc, (block, source), at, 0..1, (0, 1));
                acc = self.taps(simd, acc, (block, source), at, 1..2, (0, 2));
                acc = self.taps(simd, acc, (block, source), at, 2..3, (0, 3));
            }
            acc = self.taps(simd, acc, (block, source), at, R - 1..k, (0, R));
            if R > 1 {
                acc = self.taps(simd, acc, (block, source), at, k..k + 1, (1, R));
                acc = self.taps(simd, acc, (block, source), at, k + 1..k + 2, (2, R));
                acc = self.taps(simd, acc, (block, source), at, k + 2..k + 3, (3, R));
            }
            for (r, acc) in acc.iter().enumerate() {
                for (c, &acc) in acc.iter().enumerate() {
                    simd.store(acc, sums.add((r * C + c) * lanes));
                }
            }
            self.gate::<S, C>(simd, block, start + y..start + y + R, x, sums);
        }
        C
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
        (block, source): (usize, Source),
        (start, y, x): (usize, usize, usize),
        rows: Range<usize>,
        (low, high): (usize, usize),
    ) -> [[S::V; C]; R] {
        let (lanes, k, width) = (simd.lanes(), self.weights.k, self.width());
        // SAFETY: the caller's promise.
        unsafe {
            let taps = self.weights.taps.as_ptr().add(block * k * k * lanes);
            for row in rows {
                let input = match source {
                    Source::Rows => self.v.get_unchecked(start + y + row).block(block),
                    Source::Copy => self.scratch.as_ptr().add((y + row) * width * lanes),
                };
                let input = input.add(x * lanes);
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

    /// Gates rows of C pixels, of which `sums` holds the sums, row by row.
    ///
    /// # Safety
    /// What `run` asserts; rows and pixels must be inside.
    #[inline(always)]
    unsafe fn gate<S: Simd<f32>, const C: usize>(
        &self,
        simd: S,
        block: usize,
        rows: Range<usize>,
        x: usize,
        sums: *const f32,
    ) {
        let (GateWeights { gate, after, .. }, lanes) = (self.weights, simd.lanes());
        // SAFETY: the caller's promise.
        unsafe {
            let scale = simd.load(after.scale.as_ptr().add(block * lanes));
            let shift = simd.load(after.shift.as_ptr().add(block * lanes));
            // Not unrolled: so many copies of the gate would not fit the first-level cache.
            for (r, y) in rows.enumerate() {
                let (from, to) = (self.x.get_unchecked(y), self.out.get_unchecked(y));
                for c in 0..C {
                    let g = gate.value(simd, simd.load(sums.add((r * C + c) * lanes)));
                    let x_at = simd.load(from.block(block).add((x + c) * from.step));
                    let out = simd.fma(scale, simd.mul(x_at, g), shift);
                    let to_pixel = to.block(block).add((x + c) * to.step);
                    if to.stream && lanes == LINE {
                        simd.stream(out, to_pixel);
                    } else {
                        simd.store(out, to_pixel);
                    }
                }
            }
        }
    }

    /// Rows of outputs by minimal filtering down the columns, M rows in P points, of which the taps are
    /// G groups. Returns zeros if all sums are finite.
    ///
    /// # Safety
    /// As [`Gated::plain`].
    #[inline(always)]
    unsafe fn minimal<S: Simd<f32>, const M: usize, const P: usize, const G: usize>(
        &mut self,
        simd: S,
        block: usize,
        rows: Range<usize>,
    ) -> S::V {
        let zero = simd.splat(0.0);
        let mut check = zero;
        // SAFETY: the caller's promise; the tiles are transformed before they are read.
        unsafe {
            for tile in 0..rows.len().div_ceil(M) + G - 1 {
                let at = (tile, rows.start + tile * M);
                match self.rectifier(simd, block) {
                    Some(maps) => self.transform::<S, M, P, true>(simd, block, at, maps),
                    None => self.transform::<S, M, P, false>(simd, block, at, [zero; 3]),
                }
            }
            // 20 or 18 accumulators and 3 taps fit 32 registers, 8 or 12 and 3 or 2 fit 16.
            let wide = match (S::TILE_VECTORS == 4, M) {
                (true, 3) => 5,
                (true, _) => 6,
                (false, 3) => 2,
                (false, _) => 3,
            };
            let mut x = 0;
            while x < self.pixels {
                let (rows, last) = (rows.clone(), self.pixels.saturating_sub(wide));
                let of_tiles = if self.pixels < wide {
                    self.tiles::<S, M, P, 1, G>(simd, block, rows, x)
                } else {
                    // The last tile may lie on the one before.
                    let x = x.min(last);
                    match wide {
                        6 if const { S::TILE_VECTORS == 4 && M != 3 } => {
                            self.tiles::<S, M, P, 6, G>(simd, block, rows, x)
                        }
                        5 if const { S::TILE_VECTORS == 4 && M == 3 } => {
                            self.tiles::<S, M, P, 5, G>(simd, block, rows, x)
                        }
                        3 if const { S::TILE_VECTORS != 4 && M != 3 } => {
                            self.tiles::<S, M, P, 3, G>(simd, block, rows, x)
                        }
                        _ => self.tiles::<S, M, P, 2, G>(simd, block, rows, x),
                    }
                };
                check = simd.add(check, of_tiles);
                x += if self.pixels < wide { 1 } else { wide };
            }
        }
        check
    }

    /// Transforms a row of tiles of u, the first row of which is `row`: to (points, pixels, lanes).
    ///
    /// # Safety
    /// What `run` asserts.
    #[inline(always)]
    unsafe fn transform<S: Simd<f32>, const M: usize, const P: usize, const RECTIFY: bool>(
        &mut self,
        simd: S,
        block: usize,
        (tile, row): (usize, usize),
        maps: [S::V; 3],
    ) {
        let (lanes, width, step) = (simd.lanes(), self.width(), self.v[0].step);
        let [_, _, left, right] = self.padding;
        let mut rows = [self.row(block, row); P];
        let mut inside = [false; P];
        for i in 0..P {
            (rows[i], inside[i]) = (self.row(block, row + i), self.is_inside(row + i));
        }
        // What the next tile reads.
        let mut next = [self.row(block, row); M];
        for (i, next) in next.iter_mut().enumerate() {
            *next = self.row(block, row + P + i);
        }
        let whole = inside.iter().all(|&inside| inside);
        let tile = &mut self.scratch[tile * P * width * lanes..][..P * width * lanes];
        for point in tile.chunks_exact_mut(width * lanes) {
            point[..left * lanes].fill(0.0);
            point[(width - right) * lanes..].fill(0.0);
        }
        for x in 0..width - left - right {
            let mut d = [simd.splat(0.0); P];
            // SAFETY: all rows have these pixels, and the tile those of all points.
            unsafe {
                for i in 0..P {
                    d[i] = simd.load(rows[i].add(x * step));
                    if RECTIFY {
                        d[i] = rectified(simd, maps, d[i]);
                    }
                    if !whole && !inside[i] {
                        d[i] = simd.splat(0.0);
                    }
                }
                for row in &next {
                    simd.prefetch(row.wrapping_add(x * step));
                }
                let to = tile.as_mut_ptr().add((left + x) * lanes);
                for (p, &v) in minimal::transform_input::<_, S, M, P>(simd, d).iter().enumerate() {
                    simd.store(v, to.add(p * width * lanes));
                }
            }
        }
    }

    /// Rows of C pixels, up to [`STRIP`] at a time. Returns zeros if all sums are finite.
    ///
    /// # Safety
    /// What `run` asserts; the pixels must be inside, their tiles transformed.
    #[inline(always)]
    unsafe fn tiles<
        S: Simd<f32>,
        const M: usize,
        const P: usize,
        const C: usize,
        const G: usize,
    >(
        &self,
        simd: S,
        block: usize,
        rows: Range<usize>,
        x: usize,
    ) -> S::V {
        let (weights, lanes) = (self.weights, simd.lanes());
        let mut check = simd.splat(0.0);
        // Tiles of three rows, the smallest, are the most.
        let mut products = MaybeUninit::<[[Line; STRIP / 3 * MAX_TILE]; P]>::uninit();
        let mut sums = MaybeUninit::<[[Line; MAX_TILE]; STRIP]>::uninit();
        let (products, sums) =
            (products.as_mut_ptr().cast::<f32>(), sums.as_mut_ptr().cast::<f32>());
        // Of the tile after this one, while there are products to compute.
        for y in rows.clone() {
            let to = &self.out[y];
            for c in if to.stream && lanes == LINE { 0..0 } else { x + C..x + 2 * C } {
                simd.prefetch(to.block(block).wrapping_add(c * to.step));
            }
        }
        // SAFETY: the caller's promise; a line for each vector, which is no longer.
        unsafe {
            let bias = simd.load(weights.bias.as_ptr().add(block * lanes));
            let mut first = rows.start;
            while first < rows.end {
                let tile = (first - rows.start) / M;
                let tiles = (rows.end - first).div_ceil(M);
                let tiles = [STRIP / M, 2].into_iter().find(|&some| tiles >= some).unwrap_or(1);
                for point in 0..P {
                    let at = (tile, x, point);
                    match tiles {
                        4 => self.products::<S, P, 4, C, G>(simd, block, at, products),
                        3 => self.products::<S, P, 3, C, G>(simd, block, at, products),
                        2 => self.products::<S, P, 2, C, G>(simd, block, at, products),
                        _ => self.products::<S, P, 1, C, G>(simd, block, at, products),
                    }
                }
                for at in 0..tiles * C {
                    let mut m = [bias; P];
                    for (point, m) in m.iter_mut().enumerate() {
                        *m = simd.load(products.add((point * tiles * C + at) * lanes));
                    }
                    for (i, &v) in
                        minimal::transform_output::<_, S, M, P>(simd, m).iter().enumerate()
                    {
                        let (row, v) = (at / C * M + i, simd.add(v, bias));
                        // What lies below the last row is made of rows that do not exist.
                        if first + row < rows.end {
                            check = simd.fma(v, simd.splat(0.0), check);
                        }
                        simd.store(v, sums.add((row * C + at % C) * lanes));
                    }
                }
                let end = (first + tiles * M).min(rows.end);
                self.gate::<S, C>(simd, block, first..end, x, sums);
                first = end;
            }
        }
        check
    }

    /// A point of T tiles of C pixels, from row `tile` of the transformed tiles and pixel `x` on, to
    /// (points, T, C, lanes).
    ///
    /// # Safety
    /// The tiles must be transformed, T + G − 1 of them.
    #[inline(always)]
    unsafe fn products<
        S: Simd<f32>,
        const P: usize,
        const T: usize,
        const C: usize,
        const G: usize,
    >(
        &self,
        simd: S,
        block: usize,
        (tile, x, point): (usize, usize, usize),
        to: *mut f32,
    ) {
        let (k, lanes, zero) = (self.weights.k, simd.lanes(), simd.splat(0.0));
        let row = self.width() * lanes;
        let mut acc = [[zero; C]; T];
        // SAFETY: the caller's promise.
        unsafe {
            let first = (tile * P + point) * row + x * lanes;
            let from = self.scratch.as_ptr().add(first);
            let taps = (block * P + point) * k * G * lanes;
            let taps = self.weights.taps.as_ptr().add(taps);
            for j in 0..k {
                let mut w = [zero; G];
                for (g, w) in w.iter_mut().enumerate() {
                    *w = simd.load(taps.add((j * G + g) * lanes));
                }
                macro_rules! rows {
                    ($($i:literal)+) => {$(
                        if $i < T + G - 1 {
                            let from = from.add($i * P * row + j * lanes);
                            for c in 0..C {
                                let v = simd.load(from.add(c * lanes));
                                for g in 0..G {
                                    if $i >= g && $i - g < T {
                                        acc[$i - g][c] = simd.fma(w[g], v, acc[$i - g][c]);
                                    }
                                }
                            }
                        }
                    )+};
                }
                rows!(0 1 2 3 4 5 6);
            }
            for (t, acc) in acc.iter().enumerate() {
                for (c, &acc) in acc.iter().enumerate() {
                    simd.store(acc, to.add(((point * T + t) * C + c) * lanes));
                }
            }
        }
    }
}

/// relu(map(v)).
#[inline(always)]
fn rectified<S: Simd<f32>>(simd: S, [centre, scale, shift]: [S::V; 3], v: S::V) -> S::V {
    let v = simd.fma(scale, simd.sub(v, centre), shift);
    simd.select_le_zero(v, simd.splat(0.0), v)
}
