//! Depthwise convolution.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use super::{Number, View, by_dtype, detached, disjoint};
use crate::ops::{self, DepthwiseGradients};
use crate::parallel::Threads;
use crate::shape::{Batch, Conv, Geometry};

type Pair = [usize; 2];
type Array<'a, 'py> = &'a Bound<'py, PyAny>;
/// stride (sh, sw), padding (top, bottom, left, right), dilation (dh, dw), channels last
type Placement = (Pair, [usize; 4], Pair, bool);

/// Depthwise convolution of x (N, C, H, W) with weight (C, 1, kh, kw) and bias (C) or None.
///
/// stride (sh, sw), padding (top, bottom, left, right), dilation (dh, dw); threads 0 is the
/// default. Writes out (N, C, OH, OW). With channels_last, x is (N, H, W, C) and out
/// (N, OH, OW, C).
#[pyfunction]
#[pyo3(signature = (x, weight, bias, stride, padding, dilation, out, threads, channels_last=false))]
#[allow(clippy::too_many_arguments)]
pub fn depthwise_conv2d(
    x: Array<'_, '_>,
    weight: Array<'_, '_>,
    bias: Option<Array<'_, '_>>,
    stride: Pair,
    padding: [usize; 4],
    dilation: Pair,
    out: Array<'_, '_>,
    threads: usize,
    channels_last: bool,
) -> PyResult<()> {
    let placement = (stride, padding, dilation, channels_last);
    by_dtype!(x, forward(x, weight, bias, placement, out, threads))
}

fn forward<T: Number>(
    x: Array<'_, '_>,
    weight: Array<'_, '_>,
    bias: Option<Array<'_, '_>>,
    placement: Placement,
    out: Array<'_, '_>,
    threads: usize,
) -> PyResult<()> {
    let py = x.py();
    let (x, weight) = (View::<T>::input("x", x)?, View::<T>::input("weight", weight)?);
    let bias = View::<T>::read("bias", bias)?;
    let geometry = geometry(&x, &weight, placement)?;
    let channels_last = placement.3;
    let shape = dims(geometry.output(), channels_last);
    let out = View::<T>::written("out", Some(out), &shape)?;
    let inputs = [Some(&x), Some(&weight), bias.as_ref()];
    disjoint(inputs.into_iter().flatten().map(View::range), out.iter().map(View::range))?;
    let (x, weight, bias) = (x.slice(), weight.slice(), bias.as_ref().map(View::slice));
    // SAFETY: checked to be disjoint, and taken once.
    let out = out.map_or(&mut [][..], |out| unsafe { out.slice_mut() });
    let run =
        if channels_last { ops::depthwise_forward_channels_last } else { ops::depthwise_forward };
    detached(py, || run(&geometry, x, weight, bias, out, Threads::Host(threads)))??;
    Ok(())
}

/// Writes the gradients of depthwise_conv2d to those of gx, gweight and gbias that are not None.
#[pyfunction]
#[pyo3(signature = (
    grad, x, weight, stride, padding, dilation, gx, gweight, gbias, threads, channels_last=false
))]
#[allow(clippy::too_many_arguments)]
pub fn depthwise_conv2d_backward(
    grad: Array<'_, '_>,
    x: Array<'_, '_>,
    weight: Array<'_, '_>,
    stride: Pair,
    padding: [usize; 4],
    dilation: Pair,
    gx: Option<Array<'_, '_>>,
    gweight: Option<Array<'_, '_>>,
    gbias: Option<Array<'_, '_>>,
    threads: usize,
    channels_last: bool,
) -> PyResult<()> {
    let placement = (stride, padding, dilation, channels_last);
    by_dtype!(x, backward(grad, x, weight, placement, [gx, gweight, gbias], threads))
}

fn backward<T: Number>(
    grad: Array<'_, '_>,
    x: Array<'_, '_>,
    weight: Array<'_, '_>,
    placement: Placement,
    gradients: [Option<Array<'_, '_>>; 3],
    threads: usize,
) -> PyResult<()> {
    let py = x.py();
    let (x, weight) = (View::<T>::input("x", x)?, View::<T>::input("weight", weight)?);
    let grad = View::<T>::input("grad", grad)?;
    let geometry = geometry(&x, &weight, placement)?;
    let channels_last = placement.3;
    grad.expect_shape("grad", &dims(geometry.output(), channels_last))?;
    let [gx, gweight, gbias] = gradients;
    let gx = View::written("gx", gx, x.shape())?;
    let gweight = View::written("gweight", gweight, weight.shape())?;
    let gbias = View::written("gbias", gbias, &[geometry.input.c])?;
    disjoint(
        [&grad, &x, &weight].map(View::range),
        [&gx, &gweight, &gbias].into_iter().flatten().map(View::range),
    )?;
    let (grad, x, weight) = (grad.slice(), x.slice(), weight.slice());
    // SAFETY: checked to be disjoint, and each taken once.
    let gradients = unsafe {
        DepthwiseGradients {
            x: gx.as_ref().map(|view| view.slice_mut()),
            weight: gweight.as_ref().map(|view| view.slice_mut()),
            bias: gbias.as_ref().map(|view| view.slice_mut()),
        }
    };
    let threads = Threads::Host(threads);
    let run =
        if channels_last { ops::depthwise_backward_channels_last } else { ops::depthwise_backward };
    detached(py, || run(&geometry, grad, x, weight, gradients, threads))??;
    Ok(())
}

/// Checks weight's shape against x and resolves the geometry.
fn geometry<T: Number>(
    x: &View<'_, T>,
    weight: &View<'_, T>,
    (stride, padding, dilation, channels_last): Placement,
) -> PyResult<Geometry> {
    let shape = match *x.shape() {
        [n, h, w, c] if channels_last => vec![n, c, h, w],
        ref shape => shape.to_vec(),
    };
    let batch = Batch::new(&shape)?;
    let &[_, 1, kh, kw] = weight.shape() else {
        return Err(PyValueError::new_err(format!(
            "weight must have shape (C, 1, kh, kw), got {:?}",
            weight.shape()
        )));
    };
    weight.expect_shape("weight", &[batch.c, 1, kh, kw])?;
    Ok(Geometry::new(batch, Conv { kh, kw, stride, padding, dilation })?)
}

/// The extents in the order of memory.
fn dims(batch: Batch, channels_last: bool) -> [usize; 4] {
    let [n, c, h, w] = batch.dims();
    if channels_last { [n, h, w, c] } else { [n, c, h, w] }
}
