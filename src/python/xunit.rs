//! The three xUnits.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use super::{Input, Number, array, batch_of, by_dtype, slice_of};
use crate::kernels::activation::Gate;
use crate::ops::{self, Norm, Pointwise, Variant, XUnit};

type Array<'py> = Bound<'py, PyAny>;
/// (weight, bias, mean or None, var or None, eps)
type ForwardNorm<'py> = (Array<'py>, Array<'py>, Option<Array<'py>>, Option<Array<'py>>, f64);
/// (weight, bias, mean, var, eps, training)
type BackwardNorm<'py> = (Array<'py>, Array<'py>, Array<'py>, Array<'py>, f64, bool);
/// (mean, biased var)
type Stats<'py> = Option<(Array<'py>, Array<'py>)>;

fn variant_of(name: &str) -> PyResult<Variant> {
    match name {
        "xunit" => Ok(Variant::Full),
        "slim" => Ok(Variant::Slim),
        "dense" => Ok(Variant::Dense),
        _ => Err(PyValueError::new_err(format!(
            "variant must be 'xunit', 'slim' or 'dense', got {name:?}"
        ))),
    }
}

fn gate_of(name: &str) -> PyResult<Gate> {
    match name {
        "sigmoid" => Ok(Gate::Sigmoid),
        "gaussian" => Ok(Gate::Gaussian),
        _ => Err(PyValueError::new_err(format!(
            "gate must be 'sigmoid' or 'gaussian', got {name:?}"
        ))),
    }
}

/// A batch norm's arrays.
struct NormInput<'py, T: Number> {
    weight: Input<'py, T>,
    bias: Input<'py, T>,
    stats: Option<(Input<'py, T>, Input<'py, T>)>,
    eps: f64,
    training: bool,
}

impl<'py, T: Number> NormInput<'py, T> {
    fn forward(name: &str, norm: Option<ForwardNorm<'py>>) -> PyResult<Option<Self>> {
        let Some((weight, bias, mean, var, eps)) = norm else {
            return Ok(None);
        };
        let stats = match (mean, var) {
            (Some(mean), Some(var)) => Some((mean, var)),
            (None, None) => None,
            _ => {
                return Err(PyValueError::new_err(format!(
                    "{name} must have both mean and var or neither"
                )));
            }
        };
        Self::new(name, &weight, &bias, stats, eps, false).map(Some)
    }

    fn backward(name: &str, norm: Option<BackwardNorm<'py>>) -> PyResult<Option<Self>> {
        let Some((weight, bias, mean, var, eps, training)) = norm else {
            return Ok(None);
        };
        Self::new(name, &weight, &bias, Some((mean, var)), eps, training).map(Some)
    }

    fn new(
        name: &str,
        weight: &Array<'py>,
        bias: &Array<'py>,
        stats: Option<(Array<'py>, Array<'py>)>,
        eps: f64,
        training: bool,
    ) -> PyResult<Self> {
        let input = |part: &str, array: &Array<'py>| Input::new(&format!("{name} {part}"), array);
        Ok(Self {
            weight: input("weight", weight)?,
            bias: input("bias", bias)?,
            stats: match stats {
                Some((mean, var)) => Some((input("mean", &mean)?, input("var", &var)?)),
                None => None,
            },
            eps,
            training,
        })
    }

    fn borrow(&self) -> PyResult<Norm<'_, T>> {
        Ok(Norm {
            weight: self.weight.slice()?,
            bias: self.bias.slice()?,
            stats: match &self.stats {
                Some((mean, var)) => Some((mean.slice()?, var.slice()?)),
                None => None,
            },
            eps: self.eps,
            training: self.training,
        })
    }
}

/// The kernel extent of a weight (C, 1, k, k).
fn kernel_of<T: Number>(weight: &Input<'_, T>, channels: usize) -> PyResult<usize> {
    let shape = weight.shape();
    let k = shape.last().copied().unwrap_or(0);
    weight.expect_shape("weight", &[channels, 1, k, k])?;
    Ok(k)
}

/// out = x · g(\[BN\] DW(relu(\[BN\] x))) for "xunit", without relu and inner BN for "slim", with a
/// 1×1 convolution before them for "dense".
///
/// Returns (out, d, p, stats1, stats2): d the depthwise and p the pointwise output if `save`,
/// stats the (mean, biased var) of each batch norm that used the batch's.
#[pyfunction]
#[pyo3(signature = (variant, gate, x, pw_weight, pw_bias, weight, bias, bn1, bn2, save, threads))]
#[allow(clippy::too_many_arguments)]
pub fn xunit_forward<'py>(
    variant: &str,
    gate: &str,
    x: &Array<'py>,
    pw_weight: Option<&Array<'py>>,
    pw_bias: Option<&Array<'py>>,
    weight: &Array<'py>,
    bias: Option<&Array<'py>>,
    bn1: Option<ForwardNorm<'py>>,
    bn2: Option<ForwardNorm<'py>>,
    save: bool,
    threads: usize,
) -> PyResult<Forward<'py>> {
    let kind = (variant_of(variant)?, gate_of(gate)?);
    let pointwise = (pw_weight, pw_bias);
    by_dtype!(x, forward(kind, x, pointwise, weight, bias, bn1, bn2, save, threads))
}

/// out, d, p, stats1, stats2
type Forward<'py> = (Array<'py>, Option<Array<'py>>, Option<Array<'py>>, Stats<'py>, Stats<'py>);

#[allow(clippy::too_many_arguments)]
fn forward<'py, T: Number>(
    (variant, gate): (Variant, Gate),
    x: &Array<'py>,
    pointwise: (Option<&Array<'py>>, Option<&Array<'py>>),
    weight: &Array<'py>,
    bias: Option<&Array<'py>>,
    bn1: Option<ForwardNorm<'py>>,
    bn2: Option<ForwardNorm<'py>>,
    save: bool,
    threads: usize,
) -> PyResult<Forward<'py>> {
    let py = x.py();
    let (x, weight) = (Input::<T>::new("x", x)?, Input::<T>::new("weight", weight)?);
    let bias = Input::<T>::optional("bias", bias)?;
    let pw_weight = Input::<T>::optional("pw_weight", pointwise.0)?;
    let pw_bias = Input::<T>::optional("pw_bias", pointwise.1)?;
    let (norm1, norm2) = (NormInput::forward("bn1", bn1)?, NormInput::forward("bn2", bn2)?);
    let batch = batch_of(&x)?;
    let unit = XUnit {
        variant,
        gate,
        kernel: kernel_of(&weight, batch.c)?,
        pointwise: match &pw_weight {
            Some(weight) => {
                weight.expect_shape("pw_weight", &[batch.c, batch.c, 1, 1])?;
                Some(Pointwise { weight: weight.slice()?, bias: slice_of(pw_bias.as_ref())? })
            }
            None => None,
        },
        weight: weight.slice()?,
        bias: slice_of(bias.as_ref())?,
        norm1: norm1.as_ref().map(NormInput::borrow).transpose()?,
        norm2: norm2.as_ref().map(NormInput::borrow).transpose()?,
    };
    let x = x.slice()?;
    let result = py.detach(|| ops::xunit_forward(&unit, batch, x, save, threads))?;
    let tensor = |data: Vec<T>| array(py, data, &batch.dims());
    let stats = |stats: Option<(Vec<T>, Vec<T>)>| -> PyResult<Stats<'py>> {
        let Some((mean, var)) = stats else {
            return Ok(None);
        };
        Ok(Some((array(py, mean, &[batch.c])?, array(py, var, &[batch.c])?)))
    };
    Ok((
        tensor(result.out)?,
        result.d.map(tensor).transpose()?,
        result.p.map(tensor).transpose()?,
        stats(result.stats1)?,
        stats(result.stats2)?,
    ))
}

/// Gradients of xunit_forward: x, pw_weight, pw_bias, weight, bias, and each batch norm's weight
/// and bias, None where there is none. The norms carry the statistics that forward used.
#[pyfunction]
#[pyo3(signature = (variant, gate, grad, x, d, p, pw_weight, weight, bn1, bn2, threads))]
#[allow(clippy::too_many_arguments)]
pub fn xunit_backward<'py>(
    variant: &str,
    gate: &str,
    grad: &Array<'py>,
    x: &Array<'py>,
    d: &Array<'py>,
    p: Option<&Array<'py>>,
    pw_weight: Option<&Array<'py>>,
    weight: &Array<'py>,
    bn1: Option<BackwardNorm<'py>>,
    bn2: Option<BackwardNorm<'py>>,
    threads: usize,
) -> PyResult<Backward<'py>> {
    let kind = (variant_of(variant)?, gate_of(gate)?);
    by_dtype!(x, backward(kind, grad, x, d, p, pw_weight, weight, bn1, bn2, threads))
}

/// x, pw_weight, pw_bias, weight, bias, bn1_weight, bn1_bias, bn2_weight, bn2_bias
type Backward<'py> = (
    Array<'py>,
    Option<Array<'py>>,
    Option<Array<'py>>,
    Array<'py>,
    Array<'py>,
    Option<Array<'py>>,
    Option<Array<'py>>,
    Option<Array<'py>>,
    Option<Array<'py>>,
);

#[allow(clippy::too_many_arguments)]
fn backward<'py, T: Number>(
    (variant, gate): (Variant, Gate),
    grad: &Array<'py>,
    x: &Array<'py>,
    d: &Array<'py>,
    p: Option<&Array<'py>>,
    pw_weight: Option<&Array<'py>>,
    weight: &Array<'py>,
    bn1: Option<BackwardNorm<'py>>,
    bn2: Option<BackwardNorm<'py>>,
    threads: usize,
) -> PyResult<Backward<'py>> {
    let py = x.py();
    let (x, weight) = (Input::<T>::new("x", x)?, Input::<T>::new("weight", weight)?);
    let (grad, d) = (Input::<T>::new("grad", grad)?, Input::<T>::new("d", d)?);
    let p = Input::<T>::optional("p", p)?;
    let pw_weight = Input::<T>::optional("pw_weight", pw_weight)?;
    let (norm1, norm2) = (NormInput::backward("bn1", bn1)?, NormInput::backward("bn2", bn2)?);
    let batch = batch_of(&x)?;
    for (name, tensor) in [("grad", Some(&grad)), ("d", Some(&d)), ("p", p.as_ref())] {
        if let Some(tensor) = tensor {
            tensor.expect_shape(name, &batch.dims())?;
        }
    }
    // The bias itself is not needed for its gradient, which comes back whenever p is there.
    let zeros = vec![T::ZERO; batch.c];
    let unit = XUnit {
        variant,
        gate,
        kernel: kernel_of(&weight, batch.c)?,
        pointwise: match &pw_weight {
            Some(weight) => {
                weight.expect_shape("pw_weight", &[batch.c, batch.c, 1, 1])?;
                Some(Pointwise { weight: weight.slice()?, bias: Some(&zeros) })
            }
            None => None,
        },
        weight: weight.slice()?,
        bias: None,
        norm1: norm1.as_ref().map(NormInput::borrow).transpose()?,
        norm2: norm2.as_ref().map(NormInput::borrow).transpose()?,
    };
    let (grad, x, d, p) = (grad.slice()?, x.slice()?, d.slice()?, slice_of(p.as_ref())?);
    let g = py.detach(|| ops::xunit_backward(&unit, batch, grad, x, d, p, threads))?;
    let vector = |data: Vec<T>| array(py, data, &[batch.c]);
    let pair = |norm: Option<(Vec<T>, Vec<T>)>| -> PyResult<_> {
        let Some((weight, bias)) = norm else {
            return Ok((None, None));
        };
        Ok((Some(vector(weight)?), Some(vector(bias)?)))
    };
    let ((bn1_weight, bn1_bias), (bn2_weight, bn2_bias)) = (pair(g.norm1)?, pair(g.norm2)?);
    let square = |data: Vec<T>| array(py, data, &[batch.c, batch.c, 1, 1]);
    Ok((
        array(py, g.x, &batch.dims())?,
        g.pointwise_weight.map(square).transpose()?,
        g.pointwise_bias.map(vector).transpose()?,
        array(py, g.weight, &[batch.c, 1, unit.kernel, unit.kernel])?,
        vector(g.bias)?,
        bn1_weight,
        bn1_bias,
        bn2_weight,
        bn2_bias,
    ))
}
