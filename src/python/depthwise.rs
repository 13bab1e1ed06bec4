//! Depthwise convolution.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use super::{Input, Number, array, batch_of, by_dtype, slice_of};
use crate::ops;
use crate::shape::{Conv, Geometry};

type Pair = [usize; 2];

/// Depthwise convolution of x (N, C, H, W) with weight (C, 1, kh, kw) and bias (C,) or None.
///
/// stride (sh, sw), padding (top, bottom, left, right), dilation (dh, dw); threads 0 is the
/// default. Returns (N, C, OH, OW).
#[pyfunction]
#[pyo3(signature = (x, weight, bias, stride, padding, dilation, threads))]
pub fn depthwise_conv2d<'py>(
    x: &Bound<'py, PyAny>,
    weight: &Bound<'py, PyAny>,
    bias: Option<&Bound<'py, PyAny>>,
    stride: Pair,
    padding: [usize; 4],
    dilation: Pair,
    threads: usize,
) -> PyResult<Bound<'py, PyAny>> {
    by_dtype!(x, forward(x, weight, bias, stride, padding, dilation, threads))
}

fn forward<'py, T: Number>(
    x: &Bound<'py, PyAny>,
    weight: &Bound<'py, PyAny>,
    bias: Option<&Bound<'py, PyAny>>,
    stride: Pair,
    padding: [usize; 4],
    dilation: Pair,
    threads: usize,
) -> PyResult<Bound<'py, PyAny>> {
    let py = x.py();
    let (x, weight) = (Input::<T>::new("x", x)?, Input::<T>::new("weight", weight)?);
    let bias = Input::<T>::optional("bias", bias)?;
    let geometry = geometry(&x, &weight, stride, padding, dilation)?;
    let (x, weight, bias) = (x.slice()?, weight.slice()?, slice_of(bias.as_ref())?);
    let y = py.detach(|| ops::depthwise_forward(&geometry, x, weight, bias, threads))?;
    array(py, y, &geometry.output().dims())
}

/// Gradients of depthwise_conv2d to x, weight and bias, each None unless `needs` asks for it.
#[pyfunction]
#[pyo3(signature = (grad, x, weight, stride, padding, dilation, needs, threads))]
#[allow(clippy::too_many_arguments)]
pub fn depthwise_conv2d_backward<'py>(
    grad: &Bound<'py, PyAny>,
    x: &Bound<'py, PyAny>,
    weight: &Bound<'py, PyAny>,
    stride: Pair,
    padding: [usize; 4],
    dilation: Pair,
    needs: [bool; 3],
    threads: usize,
) -> PyResult<Gradients<'py>> {
    by_dtype!(x, backward(grad, x, weight, stride, padding, dilation, needs, threads))
}

/// Gradients to x, weight and bias.
type Gradients<'py> =
    (Option<Bound<'py, PyAny>>, Option<Bound<'py, PyAny>>, Option<Bound<'py, PyAny>>);

#[allow(clippy::too_many_arguments)]
fn backward<'py, T: Number>(
    grad: &Bound<'py, PyAny>,
    x: &Bound<'py, PyAny>,
    weight: &Bound<'py, PyAny>,
    stride: Pair,
    padding: [usize; 4],
    dilation: Pair,
    needs: [bool; 3],
    threads: usize,
) -> PyResult<Gradients<'py>> {
    let py = x.py();
    let (x, weight) = (Input::<T>::new("x", x)?, Input::<T>::new("weight", weight)?);
    let grad = Input::<T>::new("grad", grad)?;
    let geometry = geometry(&x, &weight, stride, padding, dilation)?;
    grad.expect_shape("grad", &geometry.output().dims())?;
    let (grad, x_data, weight_data) = (grad.slice()?, x.slice()?, weight.slice()?);
    let g = py
        .detach(|| ops::depthwise_backward(&geometry, grad, x_data, weight_data, needs, threads))?;
    let give =
        |data: Option<Vec<T>>, shape: &[usize]| data.map(|data| array(py, data, shape)).transpose();
    Ok((give(g.x, x.shape())?, give(g.weight, weight.shape())?, give(g.bias, &[geometry.input.c])?))
}

/// Checks weight's shape against x and resolves the geometry.
fn geometry<T: Number>(
    x: &Input<'_, T>,
    weight: &Input<'_, T>,
    stride: Pair,
    padding: [usize; 4],
    dilation: Pair,
) -> PyResult<Geometry> {
    let batch = batch_of(x)?;
    let &[_, 1, kh, kw] = weight.shape() else {
        return Err(PyValueError::new_err(format!(
            "weight must have shape (C, 1, kh, kw), got {:?}",
            weight.shape()
        )));
    };
    weight.expect_shape("weight", &[batch.c, 1, kh, kw])?;
    Ok(Geometry::new(batch, Conv { kh, kw, stride, padding, dilation })?)
}
