//! Dense 3 × 3 convolution on blocked images by minimal filtering, F(4 × 4, 3 × 3): Lavin and Gray,
//! "Fast Algorithms for Convolutional Neural Networks" (CVPR 2016). 36 products of channels make 16
//! outputs, where the plain sum needs 144.
//!
//! The points of interpolation are 0, ±1/√2, ±√2 and ∞: among those with this symmetry they leave
//! the smallest error of those tried, a fifth of that of 0, ±1, ±2 and ∞ (64 channels, float32:
//! 4.4e-6 against 2.4e-5 for outputs near 0.7).
//!
//! F(6 × 6, 3 × 3) by 0, ±1/2, ±1, ±2 and ∞ was tried: products took 21 % less time, as counted, but
//! input transforms 45 % more. A network of ten layers gained 3 to 5 % (Zen 4, one thread), at four
//! times the rounding error of a layer.

use std::f32::consts::{FRAC_1_SQRT_2, SQRT_2};

use super::blocked::{Row, Sink, padded};
use crate::memory::Aligned;
use crate::simd::{self, Kernel, Simd};

/// Rows and columns of outputs of a tile.
pub const TILE: usize = 4;
/// Rows and columns of inputs of a tile.
pub const EXTENT: usize = 6;
/// Products of a tile, per pair of channels.
const POINTS: usize = EXTENT * EXTENT;
/// Vectors of output channels of a register tile.
const VECTORS: usize = 2;

/// The weights of a convolution, transformed, and its bias.
#[derive(Debug)]
pub struct Weights {
    /// Channels, whole blocks.
    inputs: usize,
    outputs: usize,
    lanes: usize,
    /// (POINTS, groups of outputs, inputs, outputs of the group): a group is [`VECTORS`] vectors, the
    /// last may be one.
    packed: Aligned,
    /// How far ahead of their use they are asked for: the elements of a group, or 0 for not at all.
    ahead: usize,
    bias: Vec<f32>,
}

impl Weights {
    /// `weight` is (outputs, inputs, 3, 3), `bias` (outputs).
    pub fn new(inputs: usize, weight: &[f32], bias: &[f32], lanes: usize) -> Self {
        assert!(inputs > 0 && !bias.is_empty() && weight.len() == bias.len() * inputs * 9);
        let depth = inputs.next_multiple_of(lanes);
        let bias = padded(bias, lanes);
        let (outputs, group) = (bias.len(), VECTORS * lanes);
        let mut packed = Aligned::new(POINTS * depth * outputs);
        for (at, weight) in weight.as_chunks::<9>().0.iter().enumerate() {
            let (o, i) = (at / inputs, at % inputs);
            let first = o / group * group;
            let size = group.min(outputs - first);
            for (point, value) in transform_weight(weight).into_iter().enumerate() {
                let at = (point * outputs + first) * depth + i * size + o - first;
                packed[at] = value as f32;
            }
        }
        // Weights come from the third-level cache, step by step of an image. Of the time of a network this
        // saves 1 to 5 % on an Intel Xeon; on Zen 3, 4 and 5 it costs 2 to 3 %.
        let ahead = if simd::has_large_second_level_cache() { group * depth } else { 0 };
        Self { inputs: depth, outputs, lanes, packed, ahead, bias }
    }

    /// Moves the weights of all convolutions to one place, in the pages of which they are found faster.
    pub fn gather<'a>(all: impl Iterator<Item = &'a mut Self>) {
        Aligned::gather(&mut all.map(|weights| &mut weights.packed).collect::<Vec<_>>());
    }

    /// Input channels, whole blocks.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Output channels, whole blocks.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// The elements that [`Convolve`] needs for so many tiles.
    pub fn scratch(&self, tiles: usize) -> usize {
        POINTS * self.pitch(tiles) + MAX_ROWS * self.outputs
    }

    /// Elements from one block to the next, of a point. Whole register tiles.
    fn stride(&self, tiles: usize) -> usize {
        tiles.next_multiple_of(4) * self.lanes
    }

    /// Elements from one point to the next, of which the points do not fall into the same few sets of
    /// the first-level cache.
    fn pitch(&self, tiles: usize) -> usize {
        self.stride(tiles) * self.inputs.max(self.outputs) / self.lanes + 16
    }
}

/// G w Gᵀ.
fn transform_weight(w: &[f32; 9]) -> [f64; POINTS] {
    let (a, b) = (0.5f64.sqrt(), 2f64.sqrt());
    // The rows of G are 1, p, p² for each point p, over the product of its distances to the others.
    let (na, nb) = (2.0 * a * a * (a * a - b * b), 2.0 * b * b * (b * b - a * a));
    let row = |p: f64, n: f64| [1.0 / n, p / n, p * p / n];
    let g = [row(0.0, 1.0), row(a, na), row(-a, na), row(b, nb), row(-b, nb), [0.0, 0.0, 1.0]];
    let mut out = [0.0; POINTS];
    for (at, out) in out.iter_mut().enumerate() {
        for (tap, &w) in w.iter().enumerate() {
            *out += g[at / EXTENT][tap / 3] * f64::from(w) * g[at % EXTENT][tap % 3];
        }
    }
    out
}

/// Bᵀ d: the values of the polynomial with these coefficients at the points, so to say.
#[inline(always)]
fn transform_input<S: Simd<f32>>(simd: S, d: [S::V; EXTENT]) -> [S::V; EXTENT] {
    // Even and odd parts at ±a and ±b, of which a² = 1/2 and b² = 2.
    let (two, half, both) = (simd.splat(-2.0), simd.splat(-0.5), simd.splat(-2.5));
    let (a, b) = (simd.splat(FRAC_1_SQRT_2), simd.splat(SQRT_2));
    let (even_a, odd_a) = (simd.fma(two, d[2], d[4]), simd.mul(a, simd.fma(two, d[1], d[3])));
    let (even_b, odd_b) = (simd.fma(half, d[2], d[4]), simd.mul(b, simd.fma(half, d[1], d[3])));
    [
        simd.add(simd.fma(both, d[2], d[4]), d[0]),
        simd.add(even_a, odd_a),
        simd.sub(even_a, odd_a),
        simd.add(even_b, odd_b),
        simd.sub(even_b, odd_b),
        simd.add(simd.fma(both, d[3], d[5]), d[1]),
    ]
}

/// Aᵀ m.
#[inline(always)]
fn transform_output<S: Simd<f32>>(simd: S, m: [S::V; EXTENT]) -> [S::V; TILE] {
    let (even_a, odd_a) = (simd.add(m[1], m[2]), simd.sub(m[1], m[2]));
    let (even_b, odd_b) = (simd.add(m[3], m[4]), simd.sub(m[3], m[4]));
    // a, a³, b, b³
    let (a, b) = (FRAC_1_SQRT_2, SQRT_2);
    let cubes = simd.fma(simd.splat(2.0 * b), odd_b, m[5]);
    [
        simd.add(simd.add(m[0], even_a), even_b),
        simd.fma(simd.splat(a), odd_a, simd.mul(simd.splat(b), odd_b)),
        simd.fma(simd.splat(0.5), even_a, simd.add(even_b, even_b)),
        simd.fma(simd.splat(0.5 * a), odd_a, cubes),
    ]
}

/// Rows of tiles, all output channels: so many rows of outputs, rounded up to whole tiles, from two rows
/// of inputs more.
pub struct Convolve<'a> {
    pub weights: &'a Weights,
    /// From the row above and the column before the first output on; rows of padding are zero.
    pub rows: &'a [Row<'a>],
    /// Columns of outputs. The inputs must be readable as far as whole tiles reach.
    pub pixels: usize,
    /// [`Weights::scratch`] elements: (points, blocks, tiles, lanes), before and after the product, and
    /// room for a register tile.
    pub scratch: &'a mut [f32],
    pub sink: Sink<'a>,
}

/// Tiles of the largest register tile.
const MAX_ROWS: usize = 12;

impl Kernel<f32> for Convolve<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<f32>>(mut self, simd: S) {
        let (weights, width) = (self.weights, self.pixels.div_ceil(TILE));
        let tiles = width * self.sink.rows.len().div_ceil(TILE);
        let (ins, outs) = (weights.inputs / simd.lanes(), weights.outputs / simd.lanes());
        assert!(weights.lanes == simd.lanes() && tiles > 0);
        assert!(self.rows.len() == tiles / width * TILE + 2);
        assert!(self.rows.iter().all(|row| row.holds(ins, width * TILE + 2, simd.lanes())));
        assert!(self.sink.holds(outs, self.pixels, simd.lanes()));
        assert!(self.scratch.len() >= weights.scratch(tiles));
        // SAFETY: the assertions above.
        unsafe {
            self.inputs(simd, tiles);
            // 32 vector registers (AVX-512, NEON) hold 12 × 2 accumulators with their operands, 16
            // hold 6 × 2.
            if const { S::TILE_VECTORS == 4 } {
                self.products::<S, MAX_ROWS>(simd, tiles);
            } else {
                self.products::<S, 6>(simd, tiles);
            }
            self.outputs(simd, tiles);
        }
    }
}

impl Convolve<'_> {
    /// Transforms the inputs of all tiles.
    ///
    /// # Safety
    /// What `run` asserts.
    #[inline(always)]
    unsafe fn inputs<S: Simd<f32>>(&mut self, simd: S, tiles: usize) {
        let (lanes, weights) = (simd.lanes(), self.weights);
        let (stride, pitch) = (weights.stride(tiles), weights.pitch(tiles));
        let zero = simd.splat(0.0);
        let width = self.pixels.div_ceil(TILE);
        for block in 0..weights.inputs / lanes {
            for t in 0..tiles {
                let (top, left) = (t / width * TILE, t % width * TILE);
                let mut rows = [[zero; EXTENT]; EXTENT];
                // SAFETY: six rows from `top` on have six pixels from `left` on of each block; the
                // point, block and tile are in the scratch.
                unsafe {
                    let inputs = self.rows.get_unchecked(top..top + EXTENT);
                    for (row, d) in inputs.iter().zip(&mut rows) {
                        let input = row.block(block).add(left * lanes);
                        for (x, d) in d.iter_mut().enumerate() {
                            *d = simd.load(input.add(x * lanes));
                        }
                        // Of the tile after the next one: 2 % of the time of a network.
                        for x in EXTENT..EXTENT + TILE {
                            simd.prefetch(input.wrapping_add((TILE + x) * lanes));
                        }
                        *d = transform_input(simd, *d);
                    }
                    let out = self.scratch.as_mut_ptr().add(block * stride + t * lanes);
                    for x in 0..EXTENT {
                        let mut column = [zero; EXTENT];
                        for (v, row) in column.iter_mut().zip(&rows) {
                            *v = row[x];
                        }
                        for (y, &v) in transform_input(simd, column).iter().enumerate() {
                            simd.store(v, out.add((y * EXTENT + x) * pitch));
                        }
                    }
                }
            }
        }
    }

    /// Mixes the channels of every tile and point, in place.
    ///
    /// # Safety
    /// What `run` asserts.
    #[inline(always)]
    unsafe fn products<S: Simd<f32>, const R: usize>(&mut self, simd: S, tiles: usize) {
        let (stride, pitch) = (self.weights.stride(tiles), self.weights.pitch(tiles));
        for point in 0..POINTS {
            let mut t = 0;
            while t < tiles {
                let left = tiles - t;
                // SAFETY: R tiles, or as many as a multiple of 4 beyond the last reaches.
                unsafe {
                    let tile = self.scratch.as_mut_ptr().add(point * pitch + t * simd.lanes());
                    let buffer = self.scratch.as_mut_ptr().add(POINTS * pitch);
                    t += if left >= R {
                        self.product::<S, R>(simd, point, (tile, stride), buffer)
                    } else if const { R > 6 } && left >= 6 {
                        self.product::<S, 6>(simd, point, (tile, stride), buffer)
                    } else if left > 2 {
                        self.product::<S, 4>(simd, point, (tile, stride), buffer)
                    } else {
                        self.product::<S, 2>(simd, point, (tile, stride), buffer)
                    };
                }
            }
        }
    }

    /// R tiles of a point, which wait in `buffer` until all are read. Returns R.
    ///
    /// # Safety
    /// The tiles must be in the scratch, block after block.
    #[inline(always)]
    unsafe fn product<S: Simd<f32>, const R: usize>(
        &self,
        simd: S,
        point: usize,
        (tile, stride): (*mut f32, usize),
        buffer: *mut f32,
    ) -> usize {
        let &Weights { inputs, outputs, lanes, ahead, ref packed, .. } = self.weights;
        // SAFETY: the groups from o on are in what `new` packed, the buffer has MAX_ROWS tiles, the
        // tiles are in reach as the caller says.
        unsafe {
            let u = packed.as_ptr().add(point * outputs * inputs);
            let mut o = 0;
            while o < outputs {
                let u = u.add(o * inputs);
                // Nobody reads the tiles after the last group.
                let last = outputs - o <= VECTORS * lanes;
                let out = match last {
                    true => (tile.add(o / lanes * stride), stride),
                    false => (buffer.add(o * R), R * lanes),
                };
                if outputs - o >= VECTORS * lanes {
                    mix::<S, R, VECTORS>(simd, (tile, stride), (u, ahead), inputs / lanes, out);
                } else {
                    mix::<S, R, 1>(simd, (tile, stride), (u, ahead), inputs / lanes, out);
                }
                if last {
                    break;
                }
                o += VECTORS * lanes;
            }
            for block in 0..o / lanes {
                for r in 0..R {
                    let v = simd.load(buffer.add((block * R + r) * lanes));
                    simd.store(v, tile.add(block * stride + r * lanes));
                }
            }
        }
        R
    }

    /// Transforms the products back.
    ///
    /// # Safety
    /// What `run` asserts.
    #[inline(always)]
    unsafe fn outputs<S: Simd<f32>>(&self, simd: S, tiles: usize) {
        let (lanes, weights) = (simd.lanes(), self.weights);
        let (stride, pitch) = (weights.stride(tiles), weights.pitch(tiles));
        let zero = simd.splat(0.0);
        let width = self.pixels.div_ceil(TILE);
        for block in 0..weights.outputs / lanes {
            // SAFETY: there is a bias for each channel.
            let bias = unsafe { simd.load(weights.bias.as_ptr().add(block * lanes)) };
            for t in 0..tiles {
                let (top, left) = (t / width * TILE, t % width * TILE);
                let height = (self.sink.rows.len() - top).min(TILE);
                let columns = (self.pixels - left).min(TILE);
                let mut rows = [[zero; EXTENT]; TILE];
                // SAFETY: the point, block and tile are in the scratch; the row, block and pixel are
                // in the sink.
                unsafe {
                    let m = self.scratch.as_ptr().add(block * stride + t * lanes);
                    for x in 0..EXTENT {
                        let mut column = [zero; EXTENT];
                        for (y, v) in column.iter_mut().enumerate() {
                            *v = simd.load(m.add((y * EXTENT + x) * pitch));
                        }
                        for (row, &v) in rows.iter_mut().zip(&transform_output(simd, column)) {
                            row[x] = v;
                        }
                    }
                    for (y, &row) in rows.iter().enumerate() {
                        if y == height {
                            break;
                        }
                        for (x, &v) in transform_output(simd, row).iter().enumerate() {
                            if x < columns {
                                let v = simd.add(v, bias);
                                self.sink.put(simd, v, top + y, block, left + x);
                            }
                        }
                    }
                }
            }
        }
    }
}

/// out\[r\] = Σᵢ tile\[r\]\[i\] · u\[i\]: R tiles of `blocks` blocks, V vectors of outputs. Both come
/// with the elements from one block to the next, `u` with how far ahead to ask for more.
///
/// # Safety
/// The tiles, all their inputs times V vectors of `u`, and R times V vectors of `out` must be in reach.
#[inline(always)]
unsafe fn mix<S: Simd<f32>, const R: usize, const V: usize>(
    simd: S,
    (tile, stride): (*const f32, usize),
    (mut u, ahead): (*const f32, usize),
    blocks: usize,
    (out, out_stride): (*mut f32, usize),
) {
    let lanes = simd.lanes();
    let mut acc = [[simd.splat(0.0); V]; R];
    // SAFETY: the caller's promise.
    unsafe {
        for block in 0..blocks {
            let tile = tile.add(block * stride);
            for i in 0..lanes {
                let mut weight = [simd.splat(0.0); V];
                for (v, weight) in weight.iter_mut().enumerate() {
                    *weight = simd.load(u.add(v * lanes));
                }
                if ahead > 0 {
                    for v in 0..V {
                        simd.prefetch(u.wrapping_add(ahead + v * lanes));
                    }
                }
                u = u.add(V * lanes);
                for (r, acc) in acc.iter_mut().enumerate() {
                    let x = simd.splat(*tile.add(r * lanes + i));
                    for (acc, &weight) in acc.iter_mut().zip(&weight) {
                        *acc = simd.fma(x, weight, *acc);
                    }
                }
            }
        }
        for (r, acc) in acc.iter().enumerate() {
            for (v, &acc) in acc.iter().enumerate() {
                simd.store(acc, out.add(v * out_stride + r * lanes));
            }
        }
    }
}
