//! xUnits in evaluation of tensors in channels_last (N, H, W, C): in blocks of as many channels as a
//! vector has lanes, in which the depthwise convolution takes whole vectors and the gate follows it in
//! registers.

use super::pointwise::Pointwise;
use super::scratch::Scratch;
use super::xunit::{Channel, POINTWISE_WORK, Variant, XUnit, check};
use super::{Planes, expect_len};
use crate::kernels::activation::Affine;
use crate::kernels::blocked::{GateWeights, Gated, Maps, Mix, MixWeights, Row, RowMut, padding};
use crate::memory::Aligned;
use crate::parallel::{self, Threads};
use crate::shape::{Batch, ShapeError, shape_error};
use crate::simd;

/// Rows and columns of a task: with what is around it, k = 9 and 64 channels, 850 KB of x. Rows are whole
/// tiles of minimal filtering.
const ROWS: usize = 24;
const COLUMNS: usize = 96;

/// What a channel's bias becomes in a convolution that `norm` is folded into.
fn folded_bias(bias: Option<&[f32]>, c: usize, norm: Affine<f32>) -> f32 {
    let own = bias.map_or(0.0, |bias| bias[c]);
    let [own, centre, scale, shift] = [own, norm.centre, norm.scale, norm.shift].map(f64::from);
    (scale * (own - centre) + shift) as f32
}

/// The constants of a block of channels, from `first` on. Batch norm 2 is folded into the taps, which
/// it follows.
fn block(unit: &XUnit<'_, f32>, first: usize, lanes: usize) -> GateWeights {
    let taps = unit.kernel * unit.kernel;
    let mut folded = vec![0.0; taps * lanes];
    let mut bias = Vec::new();
    let mut rectifier = Maps { centre: Vec::new(), scale: Vec::new(), shift: Vec::new() };
    for (lane, c) in (first..first + lanes).enumerate() {
        let norm = Channel::given(unit.norm2.as_ref(), c).affine;
        for (tap, &weight) in unit.weight[c * taps..][..taps].iter().enumerate() {
            folded[tap * lanes + lane] = norm.scale * weight;
        }
        bias.push(folded_bias(unit.bias, c, norm));
        let norm = Channel::given(unit.norm1.as_ref(), c).affine;
        rectifier.centre.push(norm.centre);
        rectifier.scale.push(norm.scale);
        rectifier.shift.push(norm.shift);
    }
    let rectifier = (unit.variant == Variant::Full).then_some(rectifier);
    let after = Maps { centre: vec![0.0; lanes], scale: vec![1.0; lanes], shift: vec![0.0; lanes] };
    GateWeights::new((unit.gate, unit.kernel), folded, bias, rectifier, after, lanes)
}

/// Pixels of a task of the convolution 1 × 1.
const PANEL: usize = 192;

/// relu(\[BN\] PW x) of xUnitD, batch norm folded into the weights.
fn pointwise(
    unit: &XUnit<'_, f32>,
    pointwise: &Pointwise<'_, f32>,
    x: &[f32],
    c: usize,
    threads: Threads,
) -> Aligned {
    let mut weight = pointwise.weight.to_vec();
    let mut bias = Vec::new();
    for (o, row) in weight.chunks_exact_mut(c).enumerate() {
        let norm = Channel::given(unit.norm1.as_ref(), o).affine;
        row.iter_mut().for_each(|weight| *weight *= norm.scale);
        bias.push(folded_bias(pointwise.bias, o, norm));
    }
    let weights = MixWeights::new(&weight, bias, simd::selected_lanes::<f32>());
    let mut p = Aligned::new(x.len());
    let panels = Planes::new(&mut p, Batch { n: 1, c: 1, h: x.len() / c, w: c });
    let pixels = x.len() / c;
    parallel::for_each(threads, pixels.div_ceil(PANEL), |task| {
        let first = task * PANEL;
        let len = PANEL.min(pixels - first) * c;
        // SAFETY: these pixels are inside, and this task alone writes them.
        let out = unsafe { std::slice::from_raw_parts_mut(panels.image(0).add(first * c), len) };
        simd::dispatch(Mix { weights: &weights, x: &x[first * c..][..len], out });
    });
    p
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
    check(unit, batch, x)?;
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
    let mixed = unit.pointwise.as_ref().map(|own| pointwise(unit, own, x, c, threads));
    let source = mixed.as_deref().unwrap_or(x);
    let blocks: Vec<_> =
        (0..c).step_by(lanes).map(|c| block(unit, c, lanes).filtered(lanes)).collect();
    let halo = unit.kernel / 2;
    let (bands, chunks) = (h.div_ceil(ROWS), w.div_ceil(COLUMNS));
    let planes = Planes::result(out, batch);
    parallel::for_each(threads, images * bands * chunks, |task| {
        let (n, band, chunk) = (task / chunks / bands, task / chunks % bands, task % chunks);
        let (rows, columns) =
            (band * ROWS..h.min((band + 1) * ROWS), w * chunk / chunks..w * (chunk + 1) / chunks);
        let (top, bottom) = padding(&rows, halo, h);
        let (left, right) = padding(&columns, halo, w);
        let first = columns.start + left - halo;
        let scratch = blocks[0].scratch(rows.len(), columns.len(), lanes);
        let mut scratch = Scratch::new(scratch);
        for (i, weights) in blocks.iter().enumerate() {
            let at = |y, column| ((n * h + y) * w + column) * c + i * lanes;
            let of_out = |y| {
                let start = (y * w + columns.start) * c + i * lanes;
                let len = (columns.len() - 1) * c + lanes;
                // SAFETY: these channels of these pixels are inside image n, and this task alone
                // writes them; nobody reads them before all tasks are done.
                unsafe {
                    let row = RowMut::from_raw(planes.image(n).add(start), len, 0, c);
                    if planes.stream { row.streamed() } else { row }
                }
            };
            let around = rows.start + top - halo..rows.end + halo - bottom;
            let v: Vec<_> = around.map(|y| Row::new(&source[at(y, first)..], 0, c)).collect();
            let x: Vec<_> =
                rows.clone().map(|y| Row::new(&x[at(y, columns.start)..], 0, c)).collect();
            let (out, padding) =
                (rows.clone().map(of_out).collect::<Vec<_>>(), [top, bottom, left, right]);
            let (pixels, out) = (columns.len(), &out[..]);
            let gated = |weights, scratch: &mut [f32]| {
                simd::dispatch(Gated { weights, v: &v, x: &x, padding, pixels, out, scratch })
            };
            if !gated(weights, &mut scratch) {
                // Infinities and NaNs where they should be.
                let weights = block(unit, i * lanes, lanes);
                gated(&weights, &mut Scratch::new(weights.scratch(rows.len(), pixels, lanes)));
            }
        }
    });
    Ok(())
}
