//! The three xUnits, fused: forward and backward, training and evaluation.
//!
//! A task makes three passes over the planes of a channel, or of some if they are small: statistics,
//! convolution with the statistics of its output, gate; in channels_last, where [`direct`] can, all tasks make each of
//! them before the next one. Only x and d (and for the dense unit the pointwise product p) are kept for
//! backward, which recomputes ReLU, batch norm and gate from them.

mod direct;
mod small;

use std::ops::Range;

use direct::Direct;

use super::dense;
use super::groups::{self, Layout};
use super::pointwise::{Past, Pointwise};
use super::scratch::{Scratch, Window};
use super::strips::{Strips, Weights};
use super::{Planes, Source, expect_len, optional_len, turned};
use crate::kernels::activation::{
    Affine, Apply, CopyOut, FillGradient, Finish, Gate, GateGradient, NormGradient, ReluGradient,
    Sums, Target,
};
use crate::kernels::conv::{self, Next};
use crate::memory;
use crate::parallel::{self, Threads};
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
    /// the ones that forward used; they are not rounded to `T` in between, see [`NormGradient`].
    pub stats: Option<(&'a [f64], &'a [f64])>,
    pub eps: f64,
    /// Backward only: whether `stats` are the batch's own, so that they have a gradient.
    pub training: bool,
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

impl<T: Scalar> XUnit<'_, T> {
    /// What planes of so many rows of channel c are convolved with, `norm1` before it.
    pub(super) fn weights(&self, c: usize, rows: usize, norm1: Affine<T>) -> Weights<T> {
        let (k, taps) = (self.kernel, self.kernel * self.kernel);
        Weights {
            taps: conv::Taps::new(self.weight[c * taps..][..taps].to_vec(), (k, k), 1, rows),
            bias: self.bias.map_or(T::ZERO, |bias| bias[c]),
            relu_of: (self.variant != Variant::Slim).then_some(norm1),
        }
    }
}

/// Where forward leaves its results; every element is written.
#[derive(Debug)]
pub struct XUnitOutput<'a, T> {
    pub out: &'a mut [T],
    /// The depthwise output before its batch norm, for [`xunit_backward`].
    pub d: Option<&'a mut [T]>,
    /// The pointwise output before its batch norm (dense), for [`xunit_backward`].
    pub p: Option<&'a mut [T]>,
    /// The statistics of a batch norm that uses the batch's; else nothing is written.
    pub stats1: Option<BatchStats<'a, T>>,
    pub stats2: Option<BatchStats<'a, T>>,
}

/// Mean and biased variance of a batch per channel, and the running ones that follow them.
#[derive(Debug)]
pub struct BatchStats<'a, T> {
    pub mean: &'a mut [f64],
    pub var: &'a mut [f64],
    pub running: Option<Running<'a, T>>,
}

/// The running mean and unbiased variance: r ← (1 − momentum) · r + momentum · batch.
#[derive(Debug)]
pub struct Running<'a, T> {
    pub mean: &'a mut [T],
    pub var: &'a mut [T],
    pub momentum: f64,
}

impl<T: Scalar> BatchStats<'_, T> {
    /// Writes the statistics of `count` values per channel, (mean, biased variance) pairs.
    fn write(self, stats: impl Iterator<Item = (f64, f64)>, count: f64) {
        let Self { mean, var, mut running } = self;
        for (c, (m, v)) in stats.enumerate() {
            (mean[c], var[c]) = (m, v);
            if let Some(Running { mean, var, momentum }) = &mut running {
                let follow =
                    |r: T, new: f64| T::from_f64(r.to_f64() * (1.0 - *momentum) + new * *momentum);
                mean[c] = follow(mean[c], m);
                var[c] = follow(var[c], v * (count / (count - 1.0)));
            }
        }
    }
}

/// What forward read and left: x and d, in the dense unit p, too.
///
/// The last of them may lie where x's gradient will, which takes its place: no memory is fresh then, and what
/// is written is in the cache already. It is None then, and all are in planes.
#[derive(Clone, Copy, Debug)]
pub struct XUnitSaved<'a, T> {
    pub x: &'a [T],
    pub d: Option<&'a [T]>,
    pub p: Option<&'a [T]>,
}

/// Where the gradients go; every element is written.
#[derive(Debug)]
pub struct XUnitGradients<'a, T> {
    /// Holds what [`XUnitSaved`] leaves out, and is read then.
    pub x: &'a mut [T],
    /// Dense only.
    pub pointwise: Option<PointwiseGradients<'a, T>>,
    pub weight: &'a mut [T],
    pub bias: Option<&'a mut [T]>,
    /// (weight, bias)
    pub norm1: Option<(&'a mut [T], &'a mut [T])>,
    pub norm2: Option<(&'a mut [T], &'a mut [T])>,
}

/// The gradients of the 1×1 convolution.
#[derive(Debug)]
pub struct PointwiseGradients<'a, T> {
    pub weight: &'a mut [T],
    pub bias: Option<&'a mut [T]>,
}

/// One channel of a batch norm, resolved: the affine map and the statistics behind it.
#[derive(Clone, Copy)]
pub(super) struct Channel<T> {
    pub(super) affine: Affine<T>,
    mean: f64,
    inv_std: f64,
}

impl<T: Scalar> Channel<T> {
    fn new(norm: &Norm<'_, T>, c: usize, mean: f64, var: f64) -> Self {
        let inv_std = 1.0 / (var + norm.eps).sqrt();
        let scale = norm.weight[c].to_f64() * inv_std;
        let centre = T::from_f64(mean);
        let shift = norm.bias[c].to_f64() + (centre.to_f64() - mean) * scale;
        let affine = Affine { centre, scale: T::from_f64(scale), shift: T::from_f64(shift) };
        Self { affine, mean, inv_std }
    }

    /// From given statistics; the identity without batch norm.
    pub(super) fn given(norm: Option<&Norm<'_, T>>, c: usize) -> Self {
        match norm {
            Some(norm) => {
                let (mean, var) = norm.stats.expect("checked by the caller");
                Self::new(norm, c, mean[c], var[c])
            }
            None => Self { affine: Affine::identity(), mean: 0.0, inv_std: 1.0 },
        }
    }

    /// Σ e · x̂, from Σ e and Σ e · (x − centre).
    fn normalised(&self, [sum, centred]: [f64; 2]) -> f64 {
        let offset = self.affine.centre.to_f64() - self.mean;
        // No zero, and no sign of a rounding, may meet an infinite sum.
        let offset = if sum.is_infinite() { 0.0 } else { offset * sum };
        (centred + offset) * self.inv_std
    }

    /// The gradient to the norm's input; `training`: the number of values, whose statistics it used.
    fn gradient(&self, training: Option<f64>, sums: [f64; 2]) -> NormGradient<T> {
        let batch = training.map(|count| {
            let scale = self.affine.scale.to_f64();
            let slope = -scale * self.inv_std * self.normalised(sums) / count;
            let shift = -scale * sums[0] / count;
            (slope, shift + slope * (self.affine.centre.to_f64() - self.mean))
        });
        NormGradient::new(self.affine, batch)
    }
}

/// What values are taken about for their variance.
fn origin<T: Scalar>(mean: f64) -> T {
    if mean.is_finite() { T::from_f64(mean) } else { T::ZERO }
}

/// Mean and biased variance over the planes of one channel.
#[derive(Clone, Copy, Default)]
struct Statistics {
    count: f64,
    sum: f64,
    squares: f64,
}

impl Statistics {
    /// Adds up about the mean so far, at first the plane's own: about an outlier the squares, which
    /// are added up in `T`, would swamp the variance.
    fn add<T: Scalar>(&mut self, plane: &[T]) {
        let count = plane.len() as f64;
        let mean = if self.count == 0.0 {
            simd::dispatch(Sums { plane, origin: T::ZERO }).0 / count
        } else {
            self.mean()
        };
        let origin = origin(mean);
        self.add_about(origin, count, simd::dispatch(Sums { plane, origin }));
    }

    /// Adds so many values, of which these are the sum, and that of squares, about `origin`.
    fn add_about<T: Scalar>(&mut self, origin: T, count: f64, (first, second): (f64, f64)) {
        // Rounding may take this below zero on a constant plane; NaN must survive.
        let squares = second - first * first / count;
        let squares = if squares < 0.0 { 0.0 } else { squares };
        self.join(&Self { count, sum: origin.to_f64() * count + first, squares });
    }

    /// Adds those of other values, by Chan's formula.
    fn join(&mut self, other: &Self) {
        if self.count > 0.0 {
            let delta = other.mean() - self.mean();
            self.squares += delta * delta * self.count * other.count / (self.count + other.count);
        }
        self.squares += other.squares;
        self.sum += other.sum;
        self.count += other.count;
    }

    fn mean(&self) -> f64 {
        self.sum / self.count
    }

    fn var(&self) -> f64 {
        self.squares / self.count
    }
}

/// The multiply-adds that an activation's exponentials and sums are worth, beside its taps.
pub(super) const POINTWISE_WORK: usize = 16;

/// Forward of an xUnit: out = x · g(d).
///
/// x, out, d and p are (N, C, H, W) or, as `layout` says, (N, H, W, C). Contiguous.
/// [`xunit_backward`] wants `output.d` (and `output.p`). Errors if a length does not fit, or a batch
/// norm in training sees one value per channel.
pub fn xunit_forward<T: Scalar>(
    unit: &XUnit<'_, T>,
    batch: Batch,
    layout: Layout,
    x: &[T],
    output: XUnitOutput<'_, T>,
    threads: Threads,
) -> Result<(), ShapeError> {
    let geometry = check(unit, batch, x)?;
    let XUnitOutput { out, d, p, stats1, stats2 } = output;
    expect_len("out", out, batch.size())?;
    optional_len("d", d.as_deref(), batch.size())?;
    optional_len("p", p.as_deref(), batch.size())?;
    for (norm, stats) in [(&unit.norm1, &stats1), (&unit.norm2, &stats2)] {
        check_stats(norm, stats, batch.c)?;
    }
    let threads = threads.for_work(batch.size() * (unit.kernel * unit.kernel + POINTWISE_WORK));
    let keeps = p.is_some() || d.is_some() || awaits(&unit.norm1) || awaits(&unit.norm2);
    let is_small = small::suits(&geometry, unit.weight);
    // Small planes are not: then it would be other sums than where d and p are kept.
    let is_tiled = layout == Layout::Planes && !keeps && !is_small;
    if let (Some(pointwise), true) = (&unit.pointwise, is_tiled) {
        let (x, out) = (Source::new(x, batch), Planes::result(out, batch));
        dense::forward(unit, pointwise, x, &out, threads);
        return Ok(());
    }
    let mut own = Vec::new();
    let p = match unit.pointwise {
        Some(pointwise) => {
            let p = p.unwrap_or_else(|| {
                own = memory::filled(batch.size(), T::ZERO);
                &mut own
            });
            pointwise.forward(batch, layout, x, p, threads);
            Some(&*p)
        }
        None => None,
    };
    let mut stats = vec![0.0; 4 * batch.c];
    let out_planes = Planes::result(out, batch);
    let stats_planes = Planes::new(&mut stats, Batch { n: 1, c: batch.c, h: 1, w: 4 });
    let task = Forward { unit, geometry, is_small };
    let chunks = small::chunks::<T>(batch, is_small);
    let each_chunk = |x: &[T], p: Option<&[T]>, d: Option<&Planes<'_, T>>, out: &Planes<'_, T>| {
        parallel::for_each(threads, chunks.len(), |i| {
            let (x, p) = (Source::new(x, batch), p.map(|p| Source::new(p, batch)));
            let tensors = Tensors { x, u: p.unwrap_or(x), d, out, step: threads.count() };
            // SAFETY: this task alone names these channels.
            unsafe { task.each(chunks.channels(i), tensors, &stats_planes) };
        });
    };
    let direct = Direct::new(unit, &geometry, layout);
    if let Some(direct) = direct {
        direct.forward(x, p, d, &out_planes, &mut stats, threads);
    } else {
        let d = d.map(|d| Planes::new(d, batch));
        match (layout, small::groups::<T>(batch, is_small, threads)) {
            (Layout::Planes, _) => each_chunk(x, p, d.as_ref(), &out_planes),
            (Layout::ChannelsLast, Some(groups)) => {
                parallel::for_each(threads, groups.len(), |i| {
                    let (first, group) = groups.group(i);
                    let (x, p) = (groups.gather(x, i), p.map(|p| groups.gather(p, i)));
                    let mut out = Scratch::new(group.size());
                    let mut of_d = Scratch::new(if d.is_some() { group.size() } else { 0 });
                    let planes = Planes::group(&mut out, group, first);
                    let d_planes = d.is_some().then(|| Planes::group(&mut of_d, group, first));
                    let (x, p) = (groups.source(&x, i), p.as_ref().map(|p| groups.source(p, i)));
                    let u = p.unwrap_or(x);
                    let tensors = Tensors { x, u, d: d_planes.as_ref(), out: &planes, step: 1 };
                    // SAFETY: this task alone names these channels, and `planes` are its own.
                    unsafe { task.each(first..first + group.c, tensors, &stats_planes) };
                    // SAFETY: this task alone names these channels.
                    unsafe {
                        groups.scatter(&out, &out_planes, i);
                        if let Some(d) = &d {
                            groups.scatter(&of_d, d, i);
                        }
                    }
                })
            }
            (Layout::ChannelsLast, None) => {
                let x = groups::to_planes(batch, x, threads);
                let p = p.map(|p| groups::to_planes(batch, p, threads));
                let mut out = memory::filled(batch.size(), T::ZERO);
                let mut of_d = d.as_ref().map(|_| memory::filled(batch.size(), T::ZERO));
                let d_planes = of_d.as_mut().map(|d| Planes::new(d, batch));
                each_chunk(&x, p.as_deref(), d_planes.as_ref(), &Planes::new(&mut out, batch));
                groups::from_planes(&out, &out_planes, threads);
                if let (Some(of_d), Some(d)) = (&of_d, &d) {
                    groups::from_planes(of_d, d, threads);
                }
            }
        }
    }
    let count = (batch.n * batch.plane()) as f64;
    for (i, given) in [(0, stats1), (2, stats2)] {
        if let Some(given) = given {
            given.write(stats.chunks_exact(4).map(|s| (s[i], s[i + 1])), count);
        }
    }
    Ok(())
}

/// What the channel tasks of [`xunit_forward`] share.
struct Forward<'a, T> {
    unit: &'a XUnit<'a, T>,
    geometry: Geometry,
    /// Whether planes are, so that channels are worked off together.
    is_small: bool,
}

/// What they read and write, in planes: all of it, or their channels.
#[derive(Clone, Copy)]
struct Tensors<'a, T> {
    x: Source<'a, T>,
    /// What the depthwise convolution takes, before norm 1.
    u: Source<'a, T>,
    d: Option<&'a Planes<'a, T>>,
    out: &'a Planes<'a, T>,
    /// As of [`Source::channel_after`].
    step: usize,
}

impl<T: Scalar> Forward<'_, T> {
    /// [`Forward::channel`] of each, or [`Forward::channels`].
    ///
    /// # Safety
    /// As there.
    unsafe fn each(
        &self,
        channels: Range<usize>,
        tensors: Tensors<'_, T>,
        stats: &Planes<'_, f64>,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            if self.is_small {
                return self.channels(channels, tensors, stats);
            }
            for c in channels {
                self.channel(c, tensors, stats.plane(0, c));
            }
        }
    }

    /// All planes of channel c, from x to out; leaves mean and variance of both norms in `stats`.
    ///
    /// # Safety
    /// No other task may name the channel of d and out meanwhile.
    unsafe fn channel(&self, c: usize, tensors: Tensors<'_, T>, stats: &mut [f64]) {
        let Self { unit, geometry, .. } = self;
        let Tensors { x, u, d, out, step } = tensors;
        let batch = geometry.input;
        // Without statistics of d to wait for, each strip is gated as soon as it is convolved.
        let waits = awaits(&unit.norm2);
        let first = self.first(u, c, stats);
        let weights = unit.weights(c, batch.h, first.affine);
        let given = (!waits).then(|| Channel::given(unit.norm2.as_ref(), c));
        let mut strips = Strips::new(geometry, &weights);
        let strip = strips.rows();
        let keeps = waits || d.is_some();
        let mut of_strip = Scratch::new(if keeps { 0 } else { strip * batch.w });
        let mut statistics = Statistics::default();
        for n in 0..batch.n {
            let plane = u.planes_from(n, c);
            let after = if n + 1 < batch.n { Some(u.plane(n + 1, c)) } else { u.after(0, c, step) };
            // Where statistics have gone over all planes of a channel, the cache holds some: they go over the next
            // channel's after this one's.
            let later = if awaits(&unit.norm1) { u.after(n, c, step) } else { None };
            for y in (0..batch.h).step_by(strip) {
                let rows = y..(y + strip).min(batch.h);
                let pixels = rows.start * batch.w..rows.end * batch.w;
                // Where d is not kept but its statistics are awaited, it waits in the output.
                let d = match d.or(waits.then_some(out)) {
                    // SAFETY: this task alone names channel c.
                    Some(planes) => unsafe { &mut planes.plane(n, c)[pixels.clone()] },
                    None => &mut of_strip[..pixels.len()],
                };
                let next = match later {
                    Some(plane) => Next::later(&plane[pixels.clone()]),
                    None => Next::soon(strips.next(rows.end, plane, after.unwrap_or(&[]))),
                };
                let to = Target::new(&mut *d);
                strips.run(&weights, rows, (plane, 0), next, to, CopyOut::default());
                match given {
                    // SAFETY: this task alone names channel c; d is in another tensor.
                    Some(channel) => unsafe { self.gate((n, c), pixels, x, d, &channel, out) },
                    None => statistics.add(d),
                }
            }
        }
        if waits {
            // SAFETY: the caller's promise.
            unsafe { self.gate_all(c, &statistics, tensors, stats) };
        }
    }

    /// Norm 1, of whose batch statistics, if it uses them, mean and variance are left in `stats`.
    fn first(&self, u: Source<'_, T>, c: usize, stats: &mut [f64]) -> Channel<T> {
        match &self.unit.norm1 {
            Some(norm) if norm.stats.is_none() => {
                let mut statistics = Statistics::default();
                (0..u.batch.n).for_each(|n| statistics.add(u.plane(n, c)));
                (stats[0], stats[1]) = (statistics.mean(), statistics.var());
                Channel::new(norm, c, stats[0], stats[1])
            }
            norm => Channel::given(norm.as_ref(), c),
        }
    }

    /// Some pixels of x past the gate, of d by `channel`, to those of out.
    ///
    /// # Safety
    /// No other reference to them may live.
    unsafe fn gate(
        &self,
        (n, c): (usize, usize),
        pixels: Range<usize>,
        x: Source<'_, T>,
        d: &[T],
        channel: &Channel<T>,
        out: &Planes<'_, T>,
    ) {
        simd::dispatch(Apply {
            gate: self.unit.gate,
            x: &x.plane(n, c)[pixels.clone()],
            d,
            affine: channel.affine,
            // SAFETY: the caller's promise.
            out: unsafe { out.target(n, c, pixels) },
        });
    }

    /// All planes of channel c past the gate, where norm 2 has waited for the statistics of d, which are left in
    /// `stats`.
    ///
    /// # Safety
    /// As [`Forward::channel`].
    unsafe fn gate_all(
        &self,
        c: usize,
        statistics: &Statistics,
        tensors: Tensors<'_, T>,
        stats: &mut [f64],
    ) {
        let Some(norm) = &self.unit.norm2 else { return };
        let Tensors { x, d, out, .. } = tensors;
        let plane = self.geometry.input.plane();
        (stats[2], stats[3]) = (statistics.mean(), statistics.var());
        let channel = Channel::new(norm, c, stats[2], stats[3]);
        let mut copy = Scratch::new(if d.is_some() { 0 } else { plane });
        for n in 0..self.geometry.input.n {
            // SAFETY: the caller's promise; d is in another tensor, or copied before the output is written.
            unsafe {
                let d = match d {
                    Some(d) => &*d.plane(n, c),
                    None => {
                        copy.copy_from_slice(out.plane(n, c));
                        &copy
                    }
                };
                self.gate((n, c), 0..plane, x, d, &channel, out);
            }
        }
    }
}

/// Backward of an xUnit, from `grad` at out.
///
/// grad, x, d, p and x's gradient lie as `layout` says. The norms carry the statistics that forward
/// used. Errors if a length does not fit.
pub fn xunit_backward<T: Scalar>(
    unit: &XUnit<'_, T>,
    batch: Batch,
    layout: Layout,
    grad: &[T],
    saved: XUnitSaved<'_, T>,
    gradients: XUnitGradients<'_, T>,
    threads: Threads,
) -> Result<(), ShapeError> {
    let XUnitSaved { x, d, p } = saved;
    let geometry = check(unit, batch, x)?;
    expect_len("grad", grad, batch.size())?;
    optional_len("d", d, batch.size())?;
    optional_len("p", p, batch.size())?;
    let dense = unit.pointwise.is_some();
    if !dense && p.is_some() {
        return Err(shape_error!("p, the pointwise output, is for the dense unit"));
    }
    if dense && d.is_none() {
        return Err(shape_error!("d, the depthwise output, is missing"));
    }
    let in_place = if dense { p.is_none() } else { d.is_none() };
    if in_place && layout == Layout::ChannelsLast {
        return Err(shape_error!("in channels_last nothing can lie where x's gradient will"));
    }
    check_gradients(unit, batch, &gradients)?;
    let XUnitGradients { x: gx, pointwise, weight: gweight, bias, norm1, norm2 } = gradients;
    let taps = unit.kernel * unit.kernel;
    let threads = threads.for_work(batch.size() * (taps + POINTWISE_WORK));

    // Per channel: taps, bias, norm 1 (weight, bias), norm 2 (weight, bias), pointwise bias, which the dense
    // unit alone has.
    let width = taps + 6;
    let mut sums = vec![0.0; batch.c * width];
    // Nothing is streamed to what the cache holds.
    let gx_planes =
        if in_place { Planes::new(&mut *gx, batch) } else { Planes::result(&mut *gx, batch) };
    let sum_planes = Planes::new(&mut sums, Batch { n: 1, c: batch.c, h: 1, w: width });
    let is_small = small::suits(&geometry, unit.weight);
    let task = Backward { unit, geometry, is_small };
    let chunks = small::chunks::<T>(batch, is_small);
    let each_chunk = |grad: &[T], x: &[T], d: Option<&[T]>, p: Option<&[T]>, gx: &Planes<'_, T>| {
        let source = |tensor| Source::new(tensor, batch);
        let u = if dense { p } else { Some(x) };
        let (grad, x, u, d) = (source(grad), source(x), u.map(source), d.map(source));
        parallel::for_each(threads, chunks.len(), |i| {
            let tensors = BackwardTensors { grad, x, u, d, gx, step: threads.count() };
            // SAFETY: this task alone names these channels.
            unsafe { task.each(chunks.channels(i), tensors, &sum_planes) };
        });
    };
    let direct = Direct::new(unit, &geometry, layout);
    let of_direct = |direct: Direct<'_, T>| {
        let (d, u) = (d?, if dense { p? } else { x });
        direct.backward([grad, x, u, d], &gx_planes, threads)
    };
    if let Some(found) = direct.and_then(of_direct) {
        sums = found;
    } else {
        match (layout, small::groups::<T>(batch, is_small, threads)) {
            (Layout::Planes, _) => each_chunk(grad, x, d, p, &gx_planes),
            (Layout::ChannelsLast, Some(groups)) => {
                parallel::for_each(threads, groups.len(), |i| {
                    let (first, group) = groups.group(i);
                    let gather = |tensor: &[T]| groups.gather(tensor, i);
                    let (grad, x, d, p) = (gather(grad), gather(x), d.map(gather), p.map(gather));
                    let mut gx = Scratch::new(group.size());
                    let planes = Planes::group(&mut gx, group, first);
                    let x = groups.source(&x, i);
                    let p = p.as_ref().map(|p| groups.source(p, i));
                    let d = d.as_ref().map(|d| groups.source(d, i));
                    let (grad, u) = (groups.source(&grad, i), if dense { p } else { Some(x) });
                    let tensors = BackwardTensors { grad, x, u, d, gx: &planes, step: 1 };
                    // SAFETY: this task alone names these channels, and `planes` are its own.
                    unsafe { task.each(first..first + group.c, tensors, &sum_planes) };
                    // SAFETY: this task alone names these channels.
                    unsafe { groups.scatter(&gx, &gx_planes, i) };
                })
            }
            (Layout::ChannelsLast, None) => {
                let to_planes = |tensor: &[T]| groups::to_planes(batch, tensor, threads);
                let (grad, x) = (to_planes(grad), to_planes(x));
                let (d, p) = (d.map(to_planes), p.map(to_planes));
                let mut gx = memory::filled(batch.size(), T::ZERO);
                let planes = Planes::new(&mut gx, batch);
                each_chunk(&grad, &x, d.as_deref(), p.as_deref(), &planes);
                groups::from_planes(&gx, &gx_planes, threads);
            }
        }
    }
    let column = |i: usize, factor: f64, to: &mut [T]| {
        for (to, sum) in to.iter_mut().zip(sums.chunks_exact(width)) {
            *to = T::from_f64(sum[i] * factor);
        }
    };
    for (to, sum) in gweight.chunks_exact_mut(taps).zip(sums.chunks_exact(width)) {
        to.iter_mut().zip(sum).for_each(|(to, &sum)| *to = T::from_f64(sum));
    }
    for (norm, at) in [(norm1, taps + 1), (norm2, taps + 3)] {
        if let Some((weight, bias)) = norm {
            column(at, 1.0, weight);
            column(at + 1, 1.0, bias);
        }
    }
    // Batch norm in training subtracts a bias ahead of it again: the exact gradient is zero, where
    // a sum would return its rounding. Times zero, not zero, so that NaN and infinity show.
    let factor = |norm| if is_training(norm) { 0.0 } else { 1.0 };
    if let Some(bias) = bias {
        column(taps, factor(&unit.norm2), bias);
    }
    if let (Some(gradients), Some(pointwise), Some(d)) = (pointwise, &unit.pointwise, d) {
        if let Some(bias) = gradients.bias {
            column(taps + 5, factor(&unit.norm1), bias);
        }
        let affine = |c| Channel::given(unit.norm2.as_ref(), c).affine;
        let affine = (0..batch.c).map(affine).collect();
        let past = Past { gate: unit.gate, grad, d, affine };
        pointwise.backward(batch, layout, x, &past, gx, gradients.weight, threads);
    }
    Ok(())
}

/// What the channel tasks of [`xunit_backward`] share.
struct Backward<'a, T> {
    unit: &'a XUnit<'a, T>,
    geometry: Geometry,
    /// As in [`Forward`].
    is_small: bool,
}

/// What they read and write, in planes: all of it, or their channels.
#[derive(Clone, Copy)]
struct BackwardTensors<'a, T> {
    grad: Source<'a, T>,
    x: Source<'a, T>,
    /// What the depthwise convolution has taken, before norm 1, and what it has made; `None`: it is in `gx`.
    u: Option<Source<'a, T>>,
    d: Option<Source<'a, T>>,
    gx: &'a Planes<'a, T>,
    /// As of [`Source::channel_after`].
    step: usize,
}

impl<T: Scalar> Backward<'_, T> {
    /// [`Backward::channel`] of each, or [`Backward::channels`].
    ///
    /// # Safety
    /// As there.
    unsafe fn each(
        &self,
        channels: Range<usize>,
        tensors: BackwardTensors<'_, T>,
        sums: &Planes<'_, f64>,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            if self.is_small {
                return self.channels(channels, tensors, sums);
            }
            for c in channels {
                self.channel(c, tensors, sums.plane(0, c));
            }
        }
    }

    /// All planes of channel c, from grad to gx (dense: to the gradient at p, in its place); leaves the
    /// gradients of the taps, and those that [`xunit_backward`] lists, in `sums`.
    ///
    /// # Safety
    /// No other task may name the channel of gx meanwhile.
    unsafe fn channel(&self, c: usize, tensors: BackwardTensors<'_, T>, sums: &mut [f64]) {
        let Self { unit, geometry, .. } = self;
        let (batch, k, taps) = (geometry.input, unit.kernel, unit.kernel * unit.kernel);
        let count = (batch.n * batch.plane()) as f64;
        let (waits1, waits2) = (is_training(&unit.norm1), is_training(&unit.norm2));
        let dense = unit.pointwise.is_some();
        let (sum_weight, sum) = sums.split_at_mut(taps);
        // SAFETY: the caller's promise.
        let channel = unsafe { ChannelGradient::new(unit, c, tensors) };
        let weight = turned(&unit.weight[c * taps..][..taps]);
        let weight = conv::Taps::of_padded(weight, (k, k), batch.h);
        // The gradients on their way to u and, past the gate, to x, where they are added up: of one image, or
        // of all. The dense unit's go past its pointwise convolution, which adds them.
        let size = batch.plane();
        let images = if waits1 || waits2 { batch.n } else { 1 };
        let mut on_its_way = Scratch::new(images * size);
        let mut direct = Scratch::new(if dense { 0 } else { images * size });
        let at = |n: usize| n.min(images - 1) * size..(n.min(images - 1) + 1) * size;
        let direct_at = |n: usize| if dense { 0..0 } else { at(n) };
        if waits2 {
            for n in 0..batch.n {
                let next = (if n + 1 < batch.n { n + 1 } else { n }, c);
                channel.gate(n, next, sum, &mut on_its_way[at(n)], &mut direct[direct_at(n)]);
            }
        }
        let norm2 = channel.second.gradient(waits2.then_some(count), [sum[4], sum[3]]);
        let norm1 = channel.first.gradient(None, [0.0; 2]);
        let relu_of = (unit.variant != Variant::Slim).then_some(channel.first.affine);
        let mut input = Window::new(geometry);
        let mut output = Window::new(geometry);
        let (ld, strip) = (input.ld, input.strip(geometry));
        let mut tiles = Scratch::new(weight.scratch(strip, batch.w));
        // Back from the last image: where all have just been read, the cache holds more of the last ones.
        for n in (0..batch.n).rev() {
            // The plane that is worked off after this one, and the one whose gradients at the gate are made then, or
            // after this channel's. 64 × 64 × 40 × 40, forward and backward, takes 0.93 to 0.95 times as long if they are
            // asked for meanwhile, 1 × 64 × 256 × 256 0.99 (k = 7, Zen 4).
            let of_next = |n| tensors.x.channel_after(c, tensors.step).map(|c| (n, c));
            let next = if n > 0 { Some((n - 1, c)) } else { of_next(batch.n - 1) };
            let gated = if waits2 { of_next(n) } else { next };
            if !waits2 {
                let next = next.unwrap_or((n, c));
                channel.gate(n, next, sum, &mut on_its_way[at(n)], &mut direct[direct_at(n)]);
            }
            let e = &mut on_its_way[at(n)];
            for y in (0..batch.h).step_by(strip) {
                let end = (y + strip).min(batch.h);
                let pixels = y * batch.w..end * batch.w;
                // All above is in the window or done with.
                input.slide_over(y..end + k - 1, (channel.u(n, y * batch.w..size), y), relu_of);
                output.slide(y..end + k - 1, |rows, padded, origin| {
                    let pixels = rows.start * batch.w..rows.end * batch.w;
                    sum[0] += simd::dispatch(FillGradient {
                        norm: norm2,
                        grad: &e[pixels.clone()],
                        d: channel.d(n, pixels),
                        width: batch.w,
                        padded,
                        ld,
                        origin,
                    });
                });
                simd::dispatch(conv::WeightGradient {
                    grad: output.middle(),
                    grad_ld: ld,
                    input: input.input(),
                    ld,
                    sum: &mut *sum_weight,
                    kernel: (k, k),
                    out: (end - y, batch.w),
                    block: 1,
                    next: [tensors.grad, tensors.x]
                        .map(|of| channel.later(Some(of), gated, pixels.clone())),
                });
                // In the place of e, of which the window has taken all that is yet needed.
                let gu = &mut e[pixels.clone()];
                simd::dispatch(conv::Forward {
                    input: output.input(),
                    ld,
                    taps: &weight,
                    bias: &[T::ZERO],
                    out: Target::new(&mut *gu),
                    ow: batch.w,
                    scratch: &mut tiles,
                    next: Next::later(match dense {
                        true => channel.later(tensors.u, next, pixels.clone()),
                        false => channel.later(tensors.d, gated, pixels.clone()),
                    }),
                    copy: CopyOut::default(),
                });
                channel.rectify(n, pixels.clone(), sum, gu);
                if !waits1 {
                    let direct = direct.get(at(n)).map(|direct| &direct[pixels.clone()]);
                    sum[5] += channel.finish(norm1, n, pixels, gu, direct);
                }
            }
        }
        if waits1 {
            let norm1 = channel.first.gradient(Some(count), [sum[2], sum[1]]);
            for n in 0..batch.n {
                sum[5] += channel.finish(norm1, n, 0..size, &on_its_way[at(n)], direct.get(at(n)));
            }
        }
        channel.normalise(sum);
    }
}

/// A channel of [`xunit_backward`]. Its sums are those that follow the taps'.
struct ChannelGradient<'a, T> {
    gate: Gate,
    rectifies: bool,
    c: usize,
    of: BackwardTensors<'a, T>,
    first: Channel<T>,
    second: Channel<T>,
}

impl<'a, T: Scalar> ChannelGradient<'a, T> {
    /// # Safety
    /// As [`Backward::channel`], as long as this lives.
    unsafe fn new(unit: &XUnit<'_, T>, c: usize, of: BackwardTensors<'a, T>) -> Self {
        Self {
            gate: unit.gate,
            rectifies: unit.variant != Variant::Slim,
            c,
            of,
            first: Channel::given(unit.norm1.as_ref(), c),
            second: Channel::given(unit.norm2.as_ref(), c),
        }
    }

    /// Pixels of image n of what is saved. Where it lies in gx, each is read before it is written.
    fn saved(&self, source: Option<Source<'a, T>>, n: usize, pixels: Range<usize>) -> &[T] {
        match source {
            Some(source) => &source.plane(n, self.c)[pixels],
            // SAFETY: this task alone names channel c, and no other reference to these pixels lives.
            None => unsafe { &*self.of.gx.pixels(n, self.c, pixels) },
        }
    }

    /// Where plane (n, c) of it is.
    fn saved_at(&self, source: Option<Source<'a, T>>, n: usize, c: usize) -> *const T {
        match source {
            Some(source) => source.plane(n, c).as_ptr(),
            None => {
                let Planes { batch, first, .. } = *self.of.gx;
                self.of.gx.image(n).wrapping_add((c - first) * batch.plane())
            }
        }
    }

    /// Pixels of plane `at` of one of the tensors, if there is such a plane: to be asked for.
    fn later(
        &self,
        source: Option<Source<'a, T>>,
        at: Option<(usize, usize)>,
        pixels: Range<usize>,
    ) -> *const [T] {
        match at {
            Some((n, c)) => {
                let first = self.saved_at(source, n, c).wrapping_add(pixels.start);
                std::ptr::slice_from_raw_parts(first, pixels.len())
            }
            None => &[],
        }
    }

    fn u(&self, n: usize, pixels: Range<usize>) -> &[T] {
        self.saved(self.of.u, n, pixels)
    }

    fn d(&self, n: usize, pixels: Range<usize>) -> &[T] {
        self.saved(self.of.d, n, pixels)
    }

    /// The gradients of image n at the gate's argument and, unless `direct` is empty, past the gate. Plane `next`
    /// comes after it.
    fn gate(&self, n: usize, next: (usize, usize), sum: &mut [f64], e: &mut [T], direct: &mut [T]) {
        let (plane, (next, c)) = (0..e.len(), next);
        let d = self.saved_at(self.of.d, next, c);
        let (bias, scale) = simd::dispatch(GateGradient {
            gate: self.gate,
            grad: self.of.grad.plane(n, self.c),
            x: self.of.x.plane(n, self.c),
            d: self.d(n, plane),
            affine: self.second.affine,
            direct: (!direct.is_empty()).then(|| Target::new(direct)),
            e,
            next: [self.of.grad.plane(next, c).as_ptr(), self.of.x.plane(next, c).as_ptr(), d],
        });
        sum[4] += bias;
        sum[3] += scale;
    }

    /// The gradient past the ReLU, in the place of that at its result.
    fn rectify(&self, n: usize, pixels: Range<usize>, sum: &mut [f64], grad: &mut [T]) {
        if self.rectifies {
            let (x, affine) = (self.u(n, pixels), self.first.affine);
            let (bias, scale) = simd::dispatch(ReluGradient { x, affine, grad });
            sum[2] += bias;
            sum[1] += scale;
        }
    }

    /// The gradient at u, finished by norm 1, goes on to x: directly or through the product. Returns its sum.
    fn finish(
        &self,
        norm: NormGradient<T>,
        n: usize,
        pixels: Range<usize>,
        grad: &[T],
        direct: Option<&[T]>,
    ) -> f64 {
        let x = self.of.u.map(|u| &u.plane(n, self.c)[pixels.clone()]);
        // SAFETY: this task alone names channel c.
        let out = unsafe { self.of.gx.target(n, self.c, pixels) };
        simd::dispatch(Finish { norm, x, grad, direct, out })
    }

    /// The sums of what is centred become those of what is normalised.
    fn normalise(&self, sum: &mut [f64]) {
        sum[1] = self.first.normalised([sum[2], sum[1]]);
        sum[3] = self.second.normalised([sum[4], sum[3]]);
    }
}

/// Whether a norm uses the statistics of the batch, which forward makes.
fn awaits<T>(norm: &Option<Norm<'_, T>>) -> bool {
    norm.as_ref().is_some_and(|norm| norm.stats.is_none())
}

fn is_training<T>(norm: &Option<Norm<'_, T>>) -> bool {
    norm.as_ref().is_some_and(|norm| norm.training)
}

/// Checks that statistics are given a place if, and only if, the batch's are made.
fn check_stats<T>(
    norm: &Option<Norm<'_, T>>,
    stats: &Option<BatchStats<'_, T>>,
    channels: usize,
) -> Result<(), ShapeError> {
    let Some(BatchStats { mean, var, running }) = stats else {
        return Ok(());
    };
    if norm.as_ref().is_none_or(|norm| norm.stats.is_some()) {
        return Err(shape_error!("batch statistics are made where batch norm is given none"));
    }
    expect_len("batch mean", mean, channels)?;
    expect_len("batch variance", var, channels)?;
    if let Some(Running { mean, var, .. }) = running {
        expect_len("running mean", mean, channels)?;
        expect_len("running variance", var, channels)?;
    }
    Ok(())
}

/// Checks that every gradient that backward makes has a place of its length.
fn check_gradients<T>(
    unit: &XUnit<'_, T>,
    batch: Batch,
    gradients: &XUnitGradients<'_, T>,
) -> Result<(), ShapeError> {
    let c = batch.c;
    let XUnitGradients { x, pointwise, weight, bias, norm1, norm2 } = gradients;
    if pointwise.is_some() != unit.pointwise.is_some() {
        return Err(shape_error!(
            "gradients of a pointwise convolution are for the dense unit and needed there"
        ));
    }
    expect_len("x's gradient", x, batch.size())?;
    if let Some(PointwiseGradients { weight, bias }) = pointwise {
        expect_len("pointwise weight's gradient", weight, c * c)?;
        optional_len("pointwise bias's gradient", bias.as_deref(), c)?;
    }
    expect_len("weight's gradient", weight, c * unit.kernel * unit.kernel)?;
    optional_len("bias's gradient", bias.as_deref(), c)?;
    for (norm, gradient) in [(&unit.norm1, norm1), (&unit.norm2, norm2)] {
        if norm.as_ref().is_some_and(|norm| norm.stats.is_none()) {
            return Err(shape_error!("backward needs the statistics that forward used"));
        }
        if norm.is_some() != gradient.is_some() {
            return Err(shape_error!("a batch norm has gradients, and needs a place for them"));
        }
        if let Some((weight, bias)) = gradient {
            expect_len("batch norm weight's gradient", weight, c)?;
            expect_len("batch norm bias's gradient", bias, c)?;
        }
    }
    Ok(())
}

/// Checks what belongs to the variant and every length.
pub(super) fn check<T: Scalar>(
    unit: &XUnit<'_, T>,
    batch: Batch,
    x: &[T],
) -> Result<Geometry, ShapeError> {
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
