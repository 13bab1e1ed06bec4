//! The operations with results of their own, filled with NaN beforehand: every element of them must
//! be written.

use xunit_rs::ops::{
    self, BatchStats, Layout, PointwiseGradients, Running, XUnit, XUnitOutput, XUnitSaved,
};
use xunit_rs::parallel::Threads;
use xunit_rs::shape::{Batch, Geometry, ShapeError};
use xunit_rs::simd::Scalar;

use super::nan;

pub type Stats = (Vec<f64>, Vec<f64>);

#[derive(Debug)]
pub struct XUnitForward<T> {
    pub out: Vec<T>,
    pub d: Option<Vec<T>>,
    pub p: Option<Vec<T>>,
    pub stats1: Option<Stats>,
    pub stats2: Option<Stats>,
    /// What became of running statistics of zeros and ones with a momentum of 1/4.
    pub running1: Option<(Vec<T>, Vec<T>)>,
    pub running2: Option<(Vec<T>, Vec<T>)>,
}

/// Forward, with what backward needs only if `save`.
pub fn xunit_forward<T: Scalar>(
    unit: &XUnit<'_, T>,
    batch: Batch,
    x: &[T],
    save: bool,
    threads: usize,
) -> Result<XUnitForward<T>, ShapeError> {
    xunit_forward_in(Layout::Planes, unit, batch, x, save, threads)
}

pub fn xunit_forward_in<T: Scalar>(
    layout: Layout,
    unit: &XUnit<'_, T>,
    batch: Batch,
    x: &[T],
    save: bool,
    threads: usize,
) -> Result<XUnitForward<T>, ShapeError> {
    let c = batch.c;
    let [waits1, waits2] = [&unit.norm1, &unit.norm2]
        .map(|norm| norm.as_ref().is_some_and(|norm| norm.stats.is_none()));
    let stats = |waits: bool| waits.then(|| (nan::<f64>(c), nan::<f64>(c)));
    let running = |waits: bool| waits.then(|| (vec![T::ZERO; c], vec![T::ONE; c]));
    let mut done = XUnitForward {
        out: nan(batch.size()),
        d: save.then(|| nan(batch.size())),
        p: (save && unit.pointwise.is_some()).then(|| nan(batch.size())),
        stats1: stats(waits1),
        stats2: stats(waits2),
        running1: running(waits1),
        running2: running(waits2),
    };
    fn place<'a, T>(
        stats: &'a mut Option<Stats>,
        running: &'a mut Option<(Vec<T>, Vec<T>)>,
    ) -> Option<BatchStats<'a, T>> {
        let running = running.as_mut().map(|(mean, var)| Running { mean, var, momentum: 0.25 });
        stats.as_mut().map(|(mean, var)| BatchStats { mean, var, running })
    }
    let output = XUnitOutput {
        out: &mut done.out,
        d: done.d.as_deref_mut(),
        p: done.p.as_deref_mut(),
        stats1: place(&mut done.stats1, &mut done.running1),
        stats2: place(&mut done.stats2, &mut done.running2),
    };
    ops::xunit_forward(unit, batch, layout, x, output, Threads::Own(threads))?;
    Ok(done)
}

#[derive(Debug)]
pub struct XUnitGradients<T> {
    pub x: Vec<T>,
    pub pointwise_weight: Option<Vec<T>>,
    pub pointwise_bias: Option<Vec<T>>,
    pub weight: Vec<T>,
    pub bias: Vec<T>,
    pub norm1: Option<(Vec<T>, Vec<T>)>,
    pub norm2: Option<(Vec<T>, Vec<T>)>,
}

pub fn xunit_backward<T: Scalar>(
    unit: &XUnit<'_, T>,
    batch: Batch,
    grad: &[T],
    saved: XUnitSaved<'_, T>,
    threads: usize,
) -> Result<XUnitGradients<T>, ShapeError> {
    xunit_backward_in(Layout::Planes, unit, batch, grad, saved, nan(batch.size()), threads)
}

/// `x`: what lies where the gradient will.
pub fn xunit_backward_in<T: Scalar>(
    layout: Layout,
    unit: &XUnit<'_, T>,
    batch: Batch,
    grad: &[T],
    saved: XUnitSaved<'_, T>,
    x: Vec<T>,
    threads: usize,
) -> Result<XUnitGradients<T>, ShapeError> {
    let c = batch.c;
    let biased = unit.pointwise.is_some_and(|pointwise| pointwise.bias.is_some());
    let pair = |there: bool| there.then(|| (nan::<T>(c), nan::<T>(c)));
    let mut done = XUnitGradients {
        x,
        pointwise_weight: unit.pointwise.map(|_| nan(c * c)),
        pointwise_bias: biased.then(|| nan(c)),
        weight: nan(c * unit.kernel * unit.kernel),
        bias: nan(c),
        norm1: pair(unit.norm1.is_some()),
        norm2: pair(unit.norm2.is_some()),
    };
    let gradients = ops::XUnitGradients {
        x: &mut done.x,
        pointwise: done
            .pointwise_weight
            .as_deref_mut()
            .map(|weight| PointwiseGradients { weight, bias: done.pointwise_bias.as_deref_mut() }),
        weight: &mut done.weight,
        bias: Some(&mut done.bias),
        norm1: done.norm1.as_mut().map(|(weight, bias)| (&mut weight[..], &mut bias[..])),
        norm2: done.norm2.as_mut().map(|(weight, bias)| (&mut weight[..], &mut bias[..])),
    };
    ops::xunit_backward(unit, batch, layout, grad, saved, gradients, Threads::Own(threads))?;
    Ok(done)
}

pub fn depthwise_forward<T: Scalar>(
    geometry: &Geometry,
    x: &[T],
    weight: &[T],
    bias: Option<&[T]>,
    threads: usize,
) -> Result<Vec<T>, ShapeError> {
    let mut y = nan(geometry.output().size());
    ops::depthwise_forward(geometry, x, weight, bias, &mut y, Threads::Own(threads))?;
    Ok(y)
}

#[derive(Debug)]
pub struct DepthwiseGradients<T> {
    pub x: Option<Vec<T>>,
    pub weight: Option<Vec<T>>,
    pub bias: Option<Vec<T>>,
}

/// The gradients that `needs` asks for: to x, weight and bias.
pub fn depthwise_backward<T: Scalar>(
    geometry: &Geometry,
    grad: &[T],
    x: &[T],
    weight: &[T],
    needs: [bool; 3],
    threads: usize,
) -> Result<DepthwiseGradients<T>, ShapeError> {
    let Geometry { input, conv, .. } = *geometry;
    let mut done = DepthwiseGradients {
        x: needs[0].then(|| nan(input.size())),
        weight: needs[1].then(|| nan(input.c * conv.kh * conv.kw)),
        bias: needs[2].then(|| nan(input.c)),
    };
    let gradients = ops::DepthwiseGradients {
        x: done.x.as_deref_mut(),
        weight: done.weight.as_deref_mut(),
        bias: done.bias.as_deref_mut(),
    };
    ops::depthwise_backward(geometry, grad, x, weight, gradients, Threads::Own(threads))?;
    Ok(done)
}
