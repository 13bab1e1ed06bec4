//! xUnits in evaluation of tensors in channels_last (N, H, W, C): in blocks of as many channels as a
//! vector has lanes, in which the depthwise convolution takes whole vectors and the gate follows it in
//! registers. Where it is faster, by way of [`direct`].

mod direct;

use std::ops::Range;

use direct::Direct;

use super::pointwise::Pointwise;
use super::scratch::Scratch;
use super::xunit::{Channel, POINTWISE_WORK, Variant, XUnit, check};
use super::{Planes, expect_len};
use crate::kernels::activation::Affine;
use crate::kernels::blocked::{GateWeights, Gated, Row, RowMut, padding};
use crate::kernels::channelwise::{Maps, Mix, MixWeights};
use crate::parallel::{self, Threads};
use crate::shape::{Batch, ShapeError, shape_error};
use crate::simd;

/// The least rows of images that are filtered: below, taps take long to transform. xUnitS of 8 × 512 × 7 × 7, in blocks,
/// took 0.7 of the time with plain sums, k = 7 and 9, of 8 × 256 × 14 × 14 0.9 and 1.1 (Zen 4).
const LEAST_FILTERED: usize = 10;
/// Rows and columns of a band: with what is around it, k = 9 and 64 channels, 850 KB of x, and as much of what
/// xUnitD makes of it. Rows are whole tiles of minimal filtering.
const ROWS: usize = 24;
const COLUMNS: usize = 96;
/// The most bands of a task of xUnitD, below each other: what two of them read is mixed once.
const BANDS: usize = 4;
/// Tasks that there should be, for threads to share.
const TASKS: usize = 16;

/// What a channel's bias becomes in a convolution that `norm` is folded into.
fn folded_bias(bias: Option<&[f32]>, c: usize, norm: Affine<f32>) -> f32 {
    let own = bias.map_or(0.0, |bias| bias[c]);
    let [own, centre, scale, shift] = [own, norm.centre, norm.scale, norm.shift].map(f64::from);
    (scale * (own - centre) + shift) as f32
}

/// Batch norm 1 of these channels.
fn rectifier(unit: &XUnit<'_, f32>, channels: Range<usize>) -> Maps {
    Maps::new(channels.map(|c| Channel::given(unit.norm1.as_ref(), c).affine))
}

/// The constants of a block of channels, from `first` on. Batch norm 2 is folded into the taps, which
/// it follows.
fn block(unit: &XUnit<'_, f32>, first: usize, lanes: usize) -> GateWeights {
    let taps = unit.kernel * unit.kernel;
    let mut folded = vec![0.0; taps * lanes];
    let mut bias = Vec::new();
    for (lane, c) in (first..first + lanes).enumerate() {
        let norm = Channel::given(unit.norm2.as_ref(), c).affine;
        for (tap, &weight) in unit.weight[c * taps..][..taps].iter().enumerate() {
            folded[tap * lanes + lane] = norm.scale * weight;
        }
        bias.push(folded_bias(unit.bias, c, norm));
    }
    let rectifier = (unit.variant == Variant::Full).then(|| rectifier(unit, first..first + lanes));
    let after = Maps { centre: vec![0.0; lanes], scale: vec![1.0; lanes], shift: vec![0.0; lanes] };
    GateWeights::new((unit.gate, unit.kernel), folded, bias, rectifier, after, lanes)
}

/// relu(\[BN\] PW x) of xUnitD, batch norm folded into the weights.
fn pointwise(unit: &XUnit<'_, f32>, pointwise: &Pointwise<'_, f32>, c: usize) -> MixWeights<f32> {
    let mut weight = pointwise.weight.to_vec();
    let mut bias = Vec::new();
    for (o, row) in weight.chunks_exact_mut(c).enumerate() {
        let norm = Channel::given(unit.norm1.as_ref(), o).affine;
        row.iter_mut().for_each(|weight| *weight *= norm.scale);
        bias.push(folded_bias(pointwise.bias, o, norm));
    }
    MixWeights::new(&weight, bias, simd::selected_lanes::<f32>())
}

/// Some rows of relu(\[BN\] PW x) of an image in channels_last: of these columns and all channels.
struct Mixed {
    data: Scratch<f32>,
    rows: Range<usize>,
    columns: Range<usize>,
    c: usize,
}

impl Mixed {
    /// Room for so many.
    fn new(rows: usize, columns: Range<usize>, c: usize) -> Self {
        Self { data: Scratch::new(rows * columns.len() * c), rows: 0..0, columns, c }
    }

    /// Elements of a row.
    fn len(&self) -> usize {
        self.columns.len() * self.c
    }

    /// Slides down to `rows`, which are made of an image of x, (H, W, C), unless they were there.
    fn slide(&mut self, rows: Range<usize>, weights: &MixWeights<f32>, x: &[f32], w: usize) {
        let (len, c) = (self.len(), self.c);
        let kept = self.rows.end.saturating_sub(rows.start);
        if kept > 0 {
            let from = (rows.start - self.rows.start) * len;
            self.data.copy_within(from..from + kept * len, 0);
        }
        for (y, out) in rows.clone().zip(self.data.chunks_exact_mut(len)).skip(kept) {
            let x = &x[(y * w + self.columns.start) * c..][..len];
            simd::dispatch(Mix { weights, x, out, relu: true });
        }
        self.rows = rows;
    }

    /// Row y, from channel `first` on.
    fn row(&self, y: usize, first: usize) -> Row<'_> {
        Row::new(&self.data[(y - self.rows.start) * self.len() + first..], 0, self.c)
    }
}

/// [`super::xunit_forward`] of x to out, both (N, H, W, C) contiguous, where batch norms are given
/// their statistics.
///
/// Errors if a length does not fit, C is no multiple of [`simd::selected_lanes`], or a norm is to use
/// the batch's statistics.
pub fn xunit_evaluate_channels_last(
    unit: &XUnit<'_, f32>,
    batch: Batch,
    x: &[f32],
    out: &mut [f32],
    threads: Threads,
) -> Result<(), ShapeError> {
    let geometry = check(unit, batch, x)?;
    expect_len("out", out, batch.size())?;
    let lanes = simd::selected_lanes::<f32>();
    let Batch { n: images, c, h, w } = batch;
    if c % lanes != 0 {
        return Err(shape_error!("channels_last is for a multiple of {lanes} channels, got {c}"));
    }
    if [&unit.norm1, &unit.norm2].into_iter().flatten().any(|norm| norm.stats.is_none()) {
        return Err(shape_error!("channels_last is for evaluation: batch norm needs statistics"));
    }
    let threads = threads.for_work(batch.size() * (unit.kernel * unit.kernel + POINTWISE_WORK));
    if let Some(direct) = Direct::new(unit, &geometry) {
        direct.run(x, out, threads);
        return Ok(());
    }
    let weights = unit.pointwise.as_ref().map(|own| pointwise(unit, own, c));
    let of_block = |c| match block(unit, c, lanes) {
        weights if h < LEAST_FILTERED => weights,
        weights => weights.filtered(lanes),
    };
    let blocks: Vec<_> = (0..c).step_by(lanes).map(of_block).collect();
    let halo = unit.kernel / 2;
    let chunks = w.div_ceil(COLUMNS);
    let bands = match weights {
        Some(_) => h.div_ceil(TASKS.div_ceil(images * chunks)).div_ceil(ROWS).clamp(1, BANDS),
        None => 1,
    };
    let tall = bands * ROWS;
    let down = h.div_ceil(tall);
    let planes = Planes::result(out, batch);
    parallel::for_each(threads, images * down * chunks, |task| {
        let (n, part, chunk) = (task / chunks / down, task / chunks % down, task % chunks);
        let image = &x[n * h * w * c..][..h * w * c];
        let columns = w * chunk / chunks..w * (chunk + 1) / chunks;
        let (left, right) = padding(&columns, halo, w);
        let around = columns.start + left - halo..columns.end + halo - right;
        let all = part * tall..h.min((part + 1) * tall);
        let highest = ROWS.min(all.len());
        let mut scratch = Scratch::new(blocks[0].scratch(highest, columns.len(), lanes));
        let mut mixed =
            weights.as_ref().map(|_| Mixed::new(h.min(highest + 2 * halo), around.clone(), c));
        for start in all.clone().step_by(ROWS) {
            let rows = start..all.end.min(start + ROWS);
            let (top, bottom) = padding(&rows, halo, h);
            let reached = rows.start + top - halo..rows.end + halo - bottom;
            if let (Some(mixed), Some(weights)) = (&mut mixed, &weights) {
                mixed.slide(reached.clone(), weights, image, w);
            }
            let of_x = |y, column, first| Row::new(&image[(y * w + column) * c + first..], 0, c);
            for (i, weights) in blocks.iter().enumerate() {
                let first = i * lanes;
                let of_out = |y| {
                    let start = (y * w + columns.start) * c + first;
                    let len = (columns.len() - 1) * c + lanes;
                    // SAFETY: these channels of these pixels are inside image n, and this task alone
                    // writes them; nobody reads them before all tasks are done.
                    unsafe {
                        let row = RowMut::from_raw(planes.image(n).add(start), len, 0, c);
                        if planes.stream { row.streamed() } else { row }
                    }
                };
                let of_v = |y| match &mixed {
                    Some(mixed) => mixed.row(y, first),
                    None => of_x(y, around.start, first),
                };
                let v: Vec<_> = reached.clone().map(of_v).collect();
                let x: Vec<_> = rows.clone().map(|y| of_x(y, columns.start, first)).collect();
                let out: Vec<_> = rows.clone().map(of_out).collect();
                let (padding, pixels, out) = ([top, bottom, left, right], columns.len(), &out[..]);
                let gated = |weights, scratch: &mut [f32]| {
                    simd::dispatch(Gated { weights, v: &v, x: &x, padding, pixels, out, scratch })
                };
                if !gated(weights, &mut scratch) {
                    // Infinities and NaNs where they should be.
                    let weights = block(unit, first, lanes);
                    let len = weights.scratch(rows.len(), pixels, lanes);
                    gated(&weights, &mut Scratch::new(len));
                }
            }
        }
    });
    Ok(())
}
