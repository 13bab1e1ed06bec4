//! Dense convolution, stride 1, zero padding k // 2.
//!
//! A band of output rows is a task. It is worked off in panels of columns: the input under a panel,
//! batch norm applied and padding in place, is copied together so that it stays in the second-level
//! cache, and a register tile of 8 output channels × 3 vectors slides over it. Every output is the
//! bias plus its products in one order (input channel, row, column), whatever the tile it is in, so
//! that neither threads nor the place in the image change a bit.
//!
//! Measured on whole networks (2018, 8 blocks of 64 features, 9 × 9, 256 × 256 pixels, a Xeon with
//! AVX-512; user time a run, mean of ten, three interleaved repeats): 261 ms
//! against 493 ms with k · k shifted calls of matrixmultiply's sgemm per panel. sgemm after im2col
//! took 1.4 times as long as the shifted calls (wall time, one run of five).

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::kernels::MAX_LANES;
use crate::kernels::activation::Affine;
use crate::memory;
use crate::parallel::{self, Threads};
use crate::simd::{self, Kernel, Simd};

/// Rows of a band. 16 rows, or panels of 192 columns, showed no difference beyond the noise (± 5 %,
/// network as above), and smaller panels fit smaller caches.
const ROWS: usize = 8;
/// Columns of a panel: whole register tiles of 3 vectors.
const COLUMNS: usize = 96;
/// Output channels that are packed together.
const BLOCK: usize = 8;

/// The weights of a convolution, (outputs, inputs, k, k), packed for [`Dense::forward`].
#[derive(Debug)]
pub(super) struct Dense {
    outputs: usize,
    inputs: usize,
    k: usize,
    /// (⌈outputs / BLOCK⌉, inputs, k, k, BLOCK), zeros in the channels beyond the last.
    packed: Vec<f32>,
    /// Zeros beyond the last channel.
    bias: Vec<f32>,
}

impl Dense {
    pub(super) fn new(
        outputs: usize,
        inputs: usize,
        k: usize,
        weight: &[f32],
        bias: &[f32],
    ) -> Self {
        let products = inputs * k * k;
        assert!(weight.len() == outputs * products && bias.len() == outputs);
        let mut packed = vec![0.0; outputs.next_multiple_of(BLOCK) * products];
        for (o, row) in weight.chunks_exact(products).enumerate() {
            let block = &mut packed[o / BLOCK * BLOCK * products..];
            for (lanes, &value) in block.chunks_exact_mut(BLOCK).zip(row) {
                lanes[o % BLOCK] = value;
            }
        }
        let mut bias = bias.to_vec();
        bias.resize(outputs.next_multiple_of(BLOCK), 0.0);
        Self { outputs, inputs, k, packed, bias }
    }

    pub(super) fn outputs(&self) -> usize {
        self.outputs
    }

    pub(super) fn inputs(&self) -> usize {
        self.inputs
    }

    pub(super) fn halo(&self) -> usize {
        self.k / 2
    }

    /// y = bias + weight ⋆ affine(x), where the padding is zero, not affine(0).
    ///
    /// x is (inputs, h, w), y (outputs, h, w), `affine` one map per input channel.
    pub(super) fn forward(
        &self,
        affine: Option<&[Affine<f32>]>,
        x: &[f32],
        y: &mut [f32],
        w: usize,
        threads: Threads,
    ) {
        let plane = x.len() / self.inputs;
        assert!(x.len() == self.inputs * plane && y.len() == self.outputs * plane);
        assert!(w > 0 && plane.is_multiple_of(w));
        assert!(affine.is_none_or(|affine| affine.len() == self.inputs));
        let mut bands: Vec<Vec<&mut [f32]>> = Vec::new();
        bands.resize_with(plane.div_ceil(ROWS * w), Vec::new);
        for plane in y.chunks_exact_mut(plane) {
            for (band, rows) in bands.iter_mut().zip(plane.chunks_mut(ROWS * w)) {
                band.push(rows);
            }
        }
        let bands: Vec<_> = bands.into_iter().map(Mutex::new).collect();
        let layout = Layout::new(self, w);
        // A panel's memory moves on from band to band.
        let spare = Mutex::new(Vec::new());
        parallel::for_each(threads, bands.len(), |band| {
            let mut out = lock(&bands[band]);
            let panel = lock(&spare).pop();
            let mut panel = panel.unwrap_or_else(|| memory::filled(layout.size, 0.0));
            let (top, layout) = (band * ROWS, &layout);
            let job = Band { conv: self, affine, x, top, w, out: &mut out, layout };
            simd::dispatch(Panels { band: job, panel: &mut panel });
            lock(&spare).push(panel);
        });
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The layout of the panels of a convolution, (inputs, rows, ld), with room for the padding and
/// for whole vectors.
struct Layout {
    rows: usize,
    ld: usize,
    size: usize,
    /// Where the input of a product is, from that of the first on, in the order of the weights;
    /// the last is the largest.
    taps: Vec<usize>,
}

impl Layout {
    fn new(conv: &Dense, w: usize) -> Self {
        let (inputs, k) = (conv.inputs, conv.k);
        let rows = ROWS + k - 1;
        let ld = COLUMNS.min(w).next_multiple_of(MAX_LANES) + k - 1;
        let taps = (0..inputs * k * k).map(|tap| {
            let (i, ky, kx) = (tap / (k * k), tap / k % k, tap % k);
            (i * rows + ky) * ld + kx
        });
        Self { rows, ld, size: inputs * rows * ld, taps: taps.collect() }
    }
}

/// Output rows from `top` on, of every output channel.
struct Band<'a, 'b> {
    conv: &'a Dense,
    affine: Option<&'a [Affine<f32>]>,
    x: &'a [f32],
    top: usize,
    w: usize,
    /// One slice a channel.
    out: &'a mut [&'b mut [f32]],
    layout: &'a Layout,
}

/// A band with the memory for its panels.
struct Panels<'a, 'b> {
    band: Band<'a, 'b>,
    panel: &'a mut [f32],
}

impl Kernel<f32> for Panels<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<f32>>(self, simd: S) {
        let Self { mut band, panel } = self;
        for left in (0..band.w).step_by(COLUMNS) {
            let width = COLUMNS.min(band.w - left);
            band.fill(panel, left, width);
            band.panel(simd, panel, left, width);
        }
    }
}

impl Band<'_, '_> {
    /// Copies the input under `width` columns from `left` on; every element is written.
    #[inline(always)]
    fn fill(&self, panel: &mut [f32], left: usize, width: usize) {
        let (r, plane) = (self.conv.k / 2, self.x.len() / self.conv.inputs);
        let h = plane / self.w;
        // Columns of the image, and where the first of them goes.
        let columns = left.saturating_sub(r)..(left + width + r).min(self.w);
        let at = columns.start + r - left;
        for (row, target) in panel.chunks_exact_mut(self.layout.ld).enumerate() {
            let (i, y) = (row / self.layout.rows, self.top + row % self.layout.rows);
            let Some(y) = y.checked_sub(r).filter(|&y| y < h) else {
                target.fill(0.0);
                continue;
            };
            let source = &self.x[i * plane + y * self.w..][columns.clone()];
            let (before, target) = target.split_at_mut(at);
            let (target, after) = target.split_at_mut(source.len());
            before.fill(0.0);
            after.fill(0.0);
            let Some(affine) = self.affine else {
                target.copy_from_slice(source);
                continue;
            };
            let Affine { centre, scale, shift } = affine[i];
            for (target, &x) in target.iter_mut().zip(source) {
                *target = (x - centre) * scale + shift;
            }
        }
    }

    /// All output channels of a panel.
    #[inline(always)]
    fn panel<S: Simd<f32>>(&mut self, simd: S, panel: &[f32], left: usize, width: usize) {
        let outputs = self.conv.outputs;
        for y in 0..self.out[0].len() / self.w {
            let mut x = 0;
            while x < width {
                let most = if S::TILE_VECTORS == 4 { 3 } else { 2 };
                let vectors = ((width - x) / simd.lanes()).clamp(1, most);
                let place = Place { panel, left, y, x, n: simd.lanes().min(width - x) };
                // 32 vector registers (AVX-512, NEON) hold 8 × 3 accumulators with their operands,
                // 16 hold 4 × 2: at 4 × 3 the compiler spills.
                if S::TILE_VECTORS == 4 && outputs > BLOCK / 2 {
                    for o in (0..outputs).step_by(8) {
                        match vectors {
                            3 => self.tile::<S, 8, 3>(simd, &place, o),
                            2 => self.tile::<S, 8, 2>(simd, &place, o),
                            _ => self.tile::<S, 8, 1>(simd, &place, o),
                        }
                    }
                } else {
                    for o in (0..outputs).step_by(4) {
                        match vectors {
                            3 => self.tile::<S, 4, 3>(simd, &place, o),
                            2 => self.tile::<S, 4, 2>(simd, &place, o),
                            _ => self.tile::<S, 4, 1>(simd, &place, o),
                        }
                    }
                }
                x += vectors * simd.lanes();
            }
        }
    }

    /// O output channels from `first` on, V vectors of columns.
    #[inline(always)]
    fn tile<S: Simd<f32>, const O: usize, const V: usize>(
        &mut self,
        simd: S,
        place: &Place<'_>,
        first: usize,
    ) {
        let (lanes, Layout { ld, taps, .. }) = (simd.lanes(), self.layout);
        let &Place { panel, left, y, x, n } = place;
        let weight = &self.conv.packed[first / BLOCK * BLOCK * taps.len()..];
        let (weight, _) = weight.as_chunks::<BLOCK>();
        assert!(first % BLOCK + O <= BLOCK);
        assert!(panel.len() >= y * ld + x + taps[taps.len() - 1] + V * lanes);
        let bias = &self.conv.bias[first..first + O];
        let mut acc = [[simd.splat(0.0); V]; O];
        for (acc, &bias) in acc.iter_mut().zip(bias) {
            *acc = [simd.splat(bias); V];
        }
        // SAFETY: what the largest tap reads is inside the panel, and O weights from
        // `first % BLOCK` on inside a group of BLOCK, by the assertions above.
        unsafe {
            let input = panel.as_ptr().add(y * ld + x);
            // One loop over all products: unrolled over a compile-time kernel, it spills.
            for (&tap, weight) in taps.iter().zip(weight) {
                let weight = weight.as_ptr().add(first % BLOCK);
                let mut v = [simd.splat(0.0); V];
                for (c, v) in v.iter_mut().enumerate() {
                    *v = simd.load(input.add(tap + c * lanes));
                }
                for (o, acc) in acc.iter_mut().enumerate() {
                    let w = simd.splat(*weight.add(o));
                    for (acc, &v) in acc.iter_mut().zip(&v) {
                        *acc = simd.fma(w, v, *acc);
                    }
                }
            }
        }
        // `zip` drops the channels beyond the last.
        for (out, acc) in self.out[first..].iter_mut().zip(&acc) {
            let out = &mut out[y * self.w + left + x..];
            for (c, &acc) in acc.iter().enumerate() {
                let n = if V == 1 { n } else { lanes };
                let out = &mut out[c * lanes..][..n];
                // SAFETY: `out` is n ≤ lanes elements long.
                unsafe {
                    if n == lanes {
                        simd.store(acc, out.as_mut_ptr());
                    } else {
                        simd.store_first(acc, out.as_mut_ptr(), n);
                    }
                }
            }
        }
    }
}

/// Where a tile stands: row `y` and column `x` of the panel whose first column is `left`.
struct Place<'a> {
    panel: &'a [f32],
    left: usize,
    y: usize,
    x: usize,
    /// Columns of the first vector.
    n: usize,
}
