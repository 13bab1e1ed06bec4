//! The three xUnits, fused: forward and backward, training and evaluation.
//!
//! A channel task makes three passes over its planes: statistics, convolution with the statistics
//! of its output, gate. Only x and d (and for the dense unit the pointwise product p) are kept for
//! backward, which recomputes ReLU, batch norm and gate from them.

use super::{Padded, Planes, expect_len, plane, turned};
use crate::kernels::activation::{
    AddGated, Affine, Apply, FillGradient, Finish, Gate, GateGradient, Moments, NormGradient,
    ReluGradient, Sums,
};
use crate::kernels::conv;
use crate::parallel;
use crate::shape::{Batch, Conv, Geometry, ShapeError, shape_error};
use crate::simd::{self, Scalar};

/// What stands before the depthwise convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    /// xUnit: relu(\[BN\] x)
    Full,
    /// xUnitS: x
    Slim,
    /// xUnitD: relu(\[BN\] PW x)
    Dense,
}

/// A batch norm's parameters and, if they are given, the statistics to use instead of the batch's.
#[derive(Clone, Copy, Debug)]
pub struct Norm<'a, T> {
    pub weight: &'a [T],
    pub bias: &'a [T],
    /// Mean and biased variance. Forward: the running ones, or `None` for the batch's. Backward:
    /// the ones that forward used.
    pub stats: Option<(&'a [T], &'a [T])>,
    pub eps: f64,
    /// Backward only: whether `stats` are the batch's own, so that they have a gradient.
    pub training: bool,
}

/// The 1×1 convolution of the dense unit: weight (C, C), bias (C).
#[derive(Clone, Copy, Debug)]
pub struct Pointwise<'a, T> {
    pub weight: &'a [T],
    pub bias: Option<&'a [T]>,
}

/// The parameters of an xUnit.
#[derive(Clone, Copy, Debug)]
pub struct XUnit<'a, T> {
    pub variant: Variant,
    pub gate: Gate,
    /// Odd kernel extent.
    pub kernel: usize,
    /// Dense only.
    pub pointwise: Option<Pointwise<'a, T>>,
    /// Depthwise weight (C, 1, k, k) and bias (C).
    pub weight: &'a [T],
    pub bias: Option<&'a [T]>,
    /// Full and dense only.
    pub norm1: Option<Norm<'a, T>>,
    pub norm2: Option<Norm<'a, T>>,
}

/// Mean and biased variance per channel.
pub type NormStats<T> = (Vec<T>, Vec<T>);

/// What forward returns.
#[derive(Debug)]
pub struct XUnitForward<T> {
    pub out: Vec<T>,
    /// The depthwise output before its batch norm; kept if asked for.
    pub d: Option<Vec<T>>,
    /// The pointwise output before its batch norm (dense); kept if asked for.
    pub p: Option<Vec<T>>,
    /// Batch statistics of the batch norms that used them.
    pub stats1: Option<NormStats<T>>,
    pub stats2: Option<NormStats<T>>,
}

/// The gradients to every input and parameter that there is.
#[derive(Debug)]
pub struct XUnitGradients<T> {
    pub x: Vec<T>,
    pub pointwise_weight: Option<Vec<T>>,
    pub pointwise_bias: Option<Vec<T>>,
    pub weight: Vec<T>,
    pub bias: Vec<T>,
    /// (weight, bias)
    pub norm1: Option<(Vec<T>, Vec<T>)>,
    pub norm2: Option<(Vec<T>, Vec<T>)>,
}

/// One channel of a batch norm, resolved: the affine map and the moments behind it.
#[derive(Clone, Copy)]
struct Channel<T> {
    affine: Affine<T>,
    moments: Moments<T>,
}

impl<T: Scalar> Channel<T> {
    /// Without batch norm: nothing changes.
    fn identity() -> Self {
        Self {
            affine: Affine { scale: T::ONE, shift: T::ZERO },
            moments: Moments { mean: T::ZERO, inv_std: T::ONE },
        }
    }

    fn new(norm: &Norm<'_, T>, c: usize, mean: f64, var: f64) -> Self {
        let inv_std = 1.0 / (var + norm.eps).sqrt();
        let scale = norm.weight[c].to_f64() * inv_std;
        Self {
            affine: Affine {
                scale: T::from_f64(scale),
                shift: T::from_f64(norm.bias[c].to_f64() - mean * scale),
            },
            moments: Moments { mean: T::from_f64(mean), inv_std: T::from_f64(inv_std) },
        }
    }

    /// From given statistics; the identity without batch norm.
    fn given(norm: Option<&Norm<'_, T>>, c: usize) -> Self {
        match norm {
            Some(norm) => {
                let (mean, var) = norm.stats.expect("checked by the caller");
                Self::new(norm, c, mean[c].to_f64(), var[c].to_f64())
            }
            None => Self::identity(),
        }
    }
}

/// Mean and biased variance over the planes of one channel: sums about each plane's first element,
/// joined by Chan's formula.
#[derive(Default)]
struct Statistics {
    count: f64,
    mean: f64,
    squares: f64,
}

impl Statistics {
    fn add<T: Scalar>(&mut self, plane: &[T]) {
        let origin = plane[0];
        let (first, second) = simd::dispatch(Sums { plane, origin });
        let count = plane.len() as f64;
        let mean = origin.to_f64() + first / count;
        // Rounding may take this below zero on a constant plane; NaN must survive.
        let squares = second - first * first / count;
        let squares = if squares < 0.0 { 0.0 } else { squares };
        let total = self.count + count;
        let delta = mean - self.mean;
        self.mean += delta * count / total;
        self.squares += squares + delta * delta * self.count * count / total;
        self.count = total;
    }

    fn var(&self) -> f64 {
        self.squares / self.count
    }
}

/// Forward of an xUnit: out = x · g(d).
///
/// x is (N, C, H, W) contiguous. With `save`, d (and p) come back for [`xunit_backward`]. Errors if
/// a parameter's length does not fit, or a batch norm in training sees one value per channel.
pub fn xunit_forward<T: Scalar>(
    unit: &XUnit<'_, T>,
    batch: Batch,
    x: &[T],
    save: bool,
    threads: usize,
) -> Result<XUnitForward<T>, ShapeError> {
    let geometry = check(unit, batch, x)?;
    let (taps, k) = (unit.kernel * unit.kernel, unit.kernel);
    let p = match unit.pointwise {
        Some(pointwise) => Some(pointwise_forward(&pointwise, batch, x, threads)),
        None => None,
    };
    let u = p.as_deref().unwrap_or(x);

    let mut out = vec![T::ZERO; batch.size()];
    let mut d = if save { vec![T::ZERO; batch.size()] } else { Vec::new() };
    let mut stats = vec![0.0; 4 * batch.c];
    let out_planes = Planes::new(&mut out, batch);
    let d_planes = save.then(|| Planes::new(&mut d, batch));
    let stats_planes = Planes::new(&mut stats, Batch { n: 1, c: batch.c, h: 1, w: 4 });
    // Without statistics of d to wait for, each plane is gated as soon as it is convolved.
    let waits = unit.norm2.is_some_and(|norm| norm.stats.is_none());

    parallel::for_each(threads, batch.c, |c| {
        // SAFETY: this task alone names channel c.
        let stats = unsafe { stats_planes.plane(0, c) };
        let first = match &unit.norm1 {
            Some(norm) if norm.stats.is_none() => {
                let mut statistics = Statistics::default();
                (0..batch.n).for_each(|n| statistics.add(plane(u, batch, n, c)));
                (stats[0], stats[1]) = (statistics.mean, statistics.var());
                Channel::new(norm, c, stats[0], stats[1])
            }
            norm => Channel::given(norm.as_ref(), c),
        };
        let relu_of = (unit.variant != Variant::Slim).then_some(first.affine);
        let weight = &unit.weight[c * taps..][..taps];
        let bias = unit.bias.map_or(T::ZERO, |bias| bias[c]);
        let mut padded = Padded::new(geometry.ph, conv::row_stride(batch.w, k), k / 2, k / 2);
        let mut scratch = vec![T::ZERO; if save || waits { 0 } else { batch.plane() }];
        let mut statistics = Statistics::default();
        let gate = |d: &[T], n: usize, channel: &Channel<T>, out: &mut [T]| {
            let x = plane(x, batch, n, c);
            simd::dispatch(Apply { gate: unit.gate, x, d, affine: channel.affine, out });
        };
        let given = (!waits).then(|| Channel::given(unit.norm2.as_ref(), c));
        for n in 0..batch.n {
            padded.fill(plane(u, batch, n, c), batch.w, relu_of);
            // SAFETY: this task alone names channel c, and `d_n` and `out` are of two tensors.
            let out = unsafe { out_planes.plane(n, c) };
            // Where d is not kept but its statistics are awaited, it waits in the output.
            let d_n = match &d_planes {
                // SAFETY: as above.
                Some(planes) => unsafe { planes.plane(n, c) },
                None if waits => &mut *out,
                None => &mut scratch,
            };
            let (input, kernel) = (&padded.data[..], (k, k));
            simd::dispatch(conv::Forward { input, weight, bias, out: d_n, kernel, ow: batch.w });
            match given {
                Some(channel) => {
                    let d_n = &*d_n;
                    // `d_n` is not `out` here: only a unit that waits puts it there.
                    // SAFETY: as above.
                    gate(d_n, n, &channel, unsafe { out_planes.plane(n, c) });
                }
                None => statistics.add(d_n),
            }
        }
        if let (None, Some(norm)) = (given, &unit.norm2) {
            (stats[2], stats[3]) = (statistics.mean, statistics.var());
            let channel = Channel::new(norm, c, stats[2], stats[3]);
            let mut copy = vec![T::ZERO; if save { 0 } else { batch.plane() }];
            for n in 0..batch.n {
                // SAFETY: this task alone names channel c.
                let out = unsafe { out_planes.plane(n, c) };
                match &d_planes {
                    // SAFETY: as above; the two tensors differ.
                    Some(planes) => gate(unsafe { planes.plane(n, c) }, n, &channel, out),
                    None => {
                        copy.copy_from_slice(out);
                        gate(&copy, n, &channel, out);
                    }
                }
            }
        }
    });
    let collect = |norm: &Option<Norm<'_, T>>, at: usize| {
        norm.filter(|norm| norm.stats.is_none()).map(|_| {
            let pick = |i: usize| stats.chunks_exact(4).map(|s| T::from_f64(s[i])).collect();
            (pick(at), pick(at + 1))
        })
    };
    let (stats1, stats2) = (collect(&unit.norm1, 0), collect(&unit.norm2, 2));
    Ok(XUnitForward { out, d: save.then_some(d), p: p.filter(|_| save), stats1, stats2 })
}

/// Backward of an xUnit: `grad` at out, x, and the d (and p) that forward kept.
///
/// The norms carry the statistics that forward used. Errors if a length does not fit.
pub fn xunit_backward<T: Scalar>(
    unit: &XUnit<'_, T>,
    batch: Batch,
    grad: &[T],
    x: &[T],
    d: &[T],
    p: Option<&[T]>,
    threads: usize,
) -> Result<XUnitGradients<T>, ShapeError> {
    let geometry = check(unit, batch, x)?;
    expect_len("grad", grad, batch.size())?;
    expect_len("d", d, batch.size())?;
    if let Some(p) = p {
        expect_len("p", p, batch.size())?;
    }
    if unit.pointwise.is_some() != p.is_some() {
        return Err(shape_error!(
            "p, the pointwise output, is for the dense unit and needed there"
        ));
    }
    for norm in [&unit.norm1, &unit.norm2].into_iter().flatten() {
        if norm.stats.is_none() {
            return Err(shape_error!("backward needs the statistics that forward used"));
        }
    }
    let (taps, k) = (unit.kernel * unit.kernel, unit.kernel);
    let u = p.unwrap_or(x);
    let count = (batch.n * batch.plane()) as f64;

    let mut gx = vec![T::ZERO; batch.size()];
    let mut gp = vec![T::ZERO; if p.is_some() { batch.size() } else { 0 }];
    // Per channel: taps, bias, norm 1 (weight, bias), norm 2 (weight, bias), pointwise bias.
    let width = taps + 6;
    let mut sums = vec![0.0; batch.c * width];
    let gx_planes = Planes::new(&mut gx, batch);
    let gp_planes = p.is_some().then(|| Planes::new(&mut gp, batch));
    let sum_planes = Planes::new(&mut sums, Batch { n: 1, c: batch.c, h: 1, w: width });
    let means = |norm: &Option<Norm<'_, T>>, first: f64, second: f64| {
        norm.filter(|norm| norm.training).map(|_| (first / count, second / count))
    };

    parallel::for_each(threads, batch.c, |c| {
        // SAFETY: this task alone names channel c.
        let (sum_weight, sum) = unsafe { sum_planes.plane(0, c) }.split_at_mut(taps);
        let first = Channel::given(unit.norm1.as_ref(), c);
        let second = Channel::given(unit.norm2.as_ref(), c);
        let weight = turned(&unit.weight[c * taps..][..taps]);
        let gate = unit.gate;
        // The gradient on its way back to u waits in gp (dense) or gx.
        let target = gp_planes.as_ref().unwrap_or(&gx_planes);
        for n in 0..batch.n {
            let (grad, x) = (plane(grad, batch, n, c), plane(x, batch, n, c));
            let (d, affine, moments) = (plane(d, batch, n, c), second.affine, second.moments);
            // SAFETY: this task alone names channel c.
            let out = unsafe { target.plane(n, c) };
            let job = GateGradient { gate, grad, x, d, affine, moments, out };
            let (bias, scale) = simd::dispatch(job);
            sum[4] += bias;
            sum[3] += scale;
        }
        let norm2 = means(&unit.norm2, sum[4], sum[3]);
        let norm2 = NormGradient::new(second.affine, second.moments, norm2);
        let ld = conv::row_stride(batch.w, k);
        let mut input = Padded::new(geometry.ph, ld, k / 2, k / 2);
        let mut output = Padded::new(geometry.ph, ld, k / 2, k / 2);
        let relu_of = (unit.variant != Variant::Slim).then_some(first.affine);
        for n in 0..batch.n {
            // SAFETY: this task alone names channel c.
            let gu = unsafe { target.plane(n, c) };
            sum[0] += simd::dispatch(FillGradient {
                norm: norm2,
                grad: gu,
                d: plane(d, batch, n, c),
                width: batch.w,
                padded: &mut output.data,
                ld,
                origin: output.origin,
            });
            input.fill(plane(u, batch, n, c), batch.w, relu_of);
            simd::dispatch(conv::WeightGradient {
                grad: &output.data[output.origin..],
                grad_ld: ld,
                input: &input.data,
                sum: sum_weight,
                kernel: (k, k),
                out: (batch.h, batch.w),
            });
            simd::dispatch(conv::Forward {
                input: &output.data,
                weight: &weight,
                bias: T::ZERO,
                out: gu,
                kernel: (k, k),
                ow: batch.w,
            });
            if relu_of.is_some() {
                let x = plane(u, batch, n, c);
                let (affine, moments) = (first.affine, first.moments);
                let (bias, scale) = simd::dispatch(ReluGradient { x, affine, moments, grad: gu });
                sum[2] += bias;
                sum[1] += scale;
            }
        }
        let norm1 = means(&unit.norm1, sum[2], sum[1]);
        let norm1 = NormGradient::new(first.affine, first.moments, norm1);
        for n in 0..batch.n {
            // SAFETY: this task alone names channel c.
            let gu = unsafe { target.plane(n, c) };
            if unit.norm1.is_some() {
                simd::dispatch(Finish { norm: norm1, x: plane(u, batch, n, c), grad: gu });
            }
            if unit.pointwise.is_some() {
                sum[5] += simd::dispatch(Sums { plane: gu, origin: T::ZERO }).0;
            }
            simd::dispatch(AddGated {
                gate,
                grad: plane(grad, batch, n, c),
                d: plane(d, batch, n, c),
                affine: second.affine,
                // SAFETY: as above; `gu` is not used again.
                sum: unsafe { gx_planes.plane(n, c) },
            });
        }
    });
    let pointwise_weight = unit
        .pointwise
        .map(|pointwise| pointwise_backward(&pointwise, batch, &gp, x, &mut gx, threads));
    let pick = |i: usize| -> Vec<T> {
        sums.chunks_exact(width).map(|sum| T::from_f64(sum[taps + i])).collect()
    };
    // Batch norm in training subtracts a bias ahead of it again: the exact gradient is zero, where
    // a sum would return its rounding. Times zero, not zero, so that NaN and infinity show.
    let bias = |i: usize, norm: Option<Norm<'_, T>>| -> Vec<T> {
        let factor = if norm.is_some_and(|norm| norm.training) { 0.0 } else { 1.0 };
        sums.chunks_exact(width).map(|sum| T::from_f64(sum[taps + i] * factor)).collect()
    };
    let weights = sums.chunks_exact(width).flat_map(|sum| &sum[..taps]);
    Ok(XUnitGradients {
        pointwise_weight,
        pointwise_bias: unit
            .pointwise
            .and_then(|pointwise| pointwise.bias)
            .map(|_| bias(5, unit.norm1)),
        weight: weights.map(|&sum| T::from_f64(sum)).collect(),
        bias: bias(0, unit.norm2),
        norm1: unit.norm1.map(|_| (pick(1), pick(2))),
        norm2: unit.norm2.map(|_| (pick(3), pick(4))),
        x: gx,
    })
}

/// Checks what belongs to the variant and every length.
fn check<T: Scalar>(unit: &XUnit<'_, T>, batch: Batch, x: &[T]) -> Result<Geometry, ShapeError> {
    let geometry = Geometry::new(batch, Conv::same(unit.kernel)?)?;
    let dense = unit.variant == Variant::Dense;
    if dense != unit.pointwise.is_some() {
        return Err(shape_error!("a pointwise convolution is for the dense unit and needed there"));
    }
    if unit.variant == Variant::Slim && unit.norm1.is_some() {
        return Err(shape_error!("the slim unit has no batch norm before its convolution"));
    }
    expect_len("x", x, batch.size())?;
    expect_len("weight", unit.weight, batch.c * unit.kernel * unit.kernel)?;
    if let Some(pointwise) = unit.pointwise {
        expect_len("pointwise weight", pointwise.weight, batch.c * batch.c)?;
        expect_len("pointwise bias", pointwise.bias.unwrap_or(&x[..batch.c]), batch.c)?;
    }
    if let Some(bias) = unit.bias {
        expect_len("bias", bias, batch.c)?;
    }
    for norm in [&unit.norm1, &unit.norm2].into_iter().flatten() {
        expect_len("batch norm weight", norm.weight, batch.c)?;
        expect_len("batch norm bias", norm.bias, batch.c)?;
        match norm.stats {
            Some((mean, var)) => {
                expect_len("batch norm mean", mean, batch.c)?;
                expect_len("batch norm variance", var, batch.c)?;
            }
            None if batch.n * batch.plane() == 1 => {
                return Err(shape_error!(
                    "expected more than 1 value per channel when training, got shape {:?}",
                    batch.dims()
                ));
            }
            None => {}
        }
    }
    Ok(geometry)
}

/// p\[n\] = weight · x\[n\] + bias; one task an image.
fn pointwise_forward<T: Scalar>(
    pointwise: &Pointwise<'_, T>,
    batch: Batch,
    x: &[T],
    threads: usize,
) -> Vec<T> {
    let mut p = vec![T::ZERO; batch.size()];
    let planes = Planes::new(&mut p, images(batch));
    let (c, hw) = (batch.c, batch.plane());
    parallel::for_each(threads, batch.n, |n| {
        // SAFETY: this task alone names image n.
        let out = unsafe { planes.plane(n, 0) };
        for (channel, out) in out.chunks_exact_mut(hw).enumerate() {
            out.fill(pointwise.bias.map_or(T::ZERO, |bias| bias[channel]));
        }
        let (a, b) = (pointwise.weight, plane(x, images(batch), n, 0));
        // SAFETY: a is C × C by `check`, b and c are C × HW, an image each.
        unsafe {
            let (rows, columns) = (c as isize, hw as isize);
            T::gemm(
                c,
                c,
                hw,
                (a.as_ptr(), rows, 1),
                (b.as_ptr(), columns, 1),
                T::ONE,
                (out.as_mut_ptr(), columns, 1),
            );
        }
    });
    p
}

/// Adds weightᵀ · gp to gx and returns the weight's gradient Σₙ gp\[n\] · x\[n\]ᵀ.
fn pointwise_backward<T: Scalar>(
    pointwise: &Pointwise<'_, T>,
    batch: Batch,
    gp: &[T],
    x: &[T],
    gx: &mut [T],
    threads: usize,
) -> Vec<T> {
    let (c, hw) = (batch.c, batch.plane());
    // A few partial sums whatever the batch: their number fixes the order of the additions.
    let parts = batch.n.min(8);
    let mut sums = vec![T::ZERO; parts * c * c];
    let gx_planes = Planes::new(gx, images(batch));
    let sum_planes = Planes::new(&mut sums, Batch { n: parts, c: 1, h: c, w: c });
    parallel::for_each(threads, parts, |part| {
        // SAFETY: this task alone names its part and the images n ≡ part.
        let sum = unsafe { sum_planes.plane(part, 0) };
        for n in (part..batch.n).step_by(parts) {
            // SAFETY: as above.
            let out = unsafe { gx_planes.plane(n, 0) };
            let (gp, x) = (plane(gp, images(batch), n, 0), plane(x, images(batch), n, 0));
            let (rows, columns) = (c as isize, hw as isize);
            // SAFETY: the weight and its gradient are C × C, the others C × HW, an image each.
            unsafe {
                let gp = (gp.as_ptr(), columns, 1);
                let weight = (pointwise.weight.as_ptr(), 1, rows);
                T::gemm(c, c, hw, weight, gp, T::ONE, (out.as_mut_ptr(), columns, 1));
                let turned = (x.as_ptr(), 1, columns);
                T::gemm(c, hw, c, gp, turned, T::ONE, (sum.as_mut_ptr(), rows, 1));
            }
        }
    });
    let mut parts = sums.chunks_exact(c * c).map(<[T]>::to_vec);
    let mut total = parts.next().unwrap_or_default();
    for part in parts {
        total.iter_mut().zip(part).for_each(|(total, part)| *total = part.fma(T::ONE, *total));
    }
    total
}

/// The batch with an image, not a channel, as its plane.
fn images(batch: Batch) -> Batch {
    Batch { n: batch.n, c: 1, h: batch.c, w: batch.plane() }
}
