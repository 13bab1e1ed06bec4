//! The three xUnits.

use std::ops::Range;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyTuple, PyType};

use super::tensor::are_plain;
use super::{Number, View, by_dtype, detached, disjoint};
use crate::kernels::activation::Gate;
use crate::ops::{
    self, BatchStats, Layout, Norm, Pointwise, PointwiseGradients, Running, Variant, XUnit,
    XUnitGradients, XUnitOutput, XUnitSaved,
};
use crate::parallel::Threads;
use crate::shape::Batch;

type Array<'py> = Bound<'py, PyAny>;
/// (weight or None, bias or None, mean, var, eps, batch, running): `batch` says whether the batch's
/// statistics are used and left in mean and var, float64, else those there are used; running is None
/// or (mean, var, momentum), which follow the batch.
type ForwardNorm<'py> = (
    Option<Array<'py>>,
    Option<Array<'py>>,
    Array<'py>,
    Array<'py>,
    f64,
    bool,
    Option<(Array<'py>, Array<'py>, f64)>,
);
/// A `BatchNormState`: weight, bias, mean, var, eps, momentum, num_batches_tracked.
type State<'py> = (
    Option<Array<'py>>,
    Option<Array<'py>>,
    Option<Array<'py>>,
    Option<Array<'py>>,
    f64,
    Array<'py>,
    Array<'py>,
);
/// (weight or None, bias or None, mean, var, eps, batch, gradient of weight, gradient of bias): mean
/// and var are float64.
type BackwardNorm<'py> = (
    Option<Array<'py>>,
    Option<Array<'py>>,
    Array<'py>,
    Array<'py>,
    f64,
    bool,
    Array<'py>,
    Array<'py>,
);

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

fn layout_of(channels_last: bool) -> Layout {
    if channels_last { Layout::ChannelsLast } else { Layout::Planes }
}

/// The shape of a tensor that lies in memory as `layout` says.
fn batch_of<T: Number>(x: &View<'_, T>, layout: Layout) -> PyResult<Batch> {
    match (x.shape(), layout) {
        (shape, Layout::Planes) => Ok(Batch::new(shape)?),
        (&[n, h, w, c], Layout::ChannelsLast) => Ok(Batch::new(&[n, c, h, w])?),
        (shape, Layout::ChannelsLast) => {
            Err(PyValueError::new_err(format!("x must have shape (N, H, W, C), got {shape:?}")))
        }
    }
}

type Io<'py, T> = Option<View<'py, T>>;

fn ranges<'a, T: Number>(views: &'a [Io<'_, T>]) -> impl Iterator<Item = Range<usize>> + 'a {
    views.iter().flatten().map(View::range)
}

/// A batch norm's parameters: ones and zeros where there are none.
struct NormInput<'py, T> {
    weight: Io<'py, T>,
    bias: Io<'py, T>,
    plain: [Vec<T>; 2],
    /// To use, but for a forward pass that uses the batch's.
    given: Option<[Vec<f64>; 2]>,
    eps: f64,
    /// Whether a backward pass takes them for the batch's.
    training: bool,
    /// Where forward leaves the batch's statistics.
    found: Option<[View<'py, f64>; 2]>,
    running: Option<([View<'py, T>; 2], f64)>,
    /// Of weight and bias, in backward.
    gradients: Option<[View<'py, T>; 2]>,
}

impl<'py, T: Number> NormInput<'py, T> {
    fn new(
        weight: Option<&Array<'py>>,
        bias: Option<&Array<'py>>,
        eps: f64,
        channels: usize,
    ) -> PyResult<Self> {
        Ok(Self {
            weight: View::read("batch norm weight", weight)?,
            bias: View::read("batch norm bias", bias)?,
            plain: [vec![T::ONE; channels], vec![T::ZERO; channels]],
            given: None,
            eps,
            training: false,
            found: None,
            running: None,
            gradients: None,
        })
    }

    fn forward(norm: Option<ForwardNorm<'py>>, channels: usize) -> PyResult<Option<Self>> {
        let Some((weight, bias, mean, var, eps, batch, running)) = norm else {
            return Ok(None);
        };
        let mut this = Self::new(weight.as_ref(), bias.as_ref(), eps, channels)?;
        if batch {
            this.found = Some([View::output("mean", &mean)?, View::output("var", &var)?]);
        } else {
            let read = |name: &str, array: &Array<'py>| -> PyResult<_> {
                let view = View::<T>::input(name, array)?;
                Ok(view.slice().iter().map(|x| x.to_f64()).collect())
            };
            this.given = Some([read("mean", &mean)?, read("var", &var)?]);
        }
        if let Some((mean, var, momentum)) = running {
            let views = [View::output("running mean", &mean)?, View::output("running var", &var)?];
            this.running = Some((views, momentum));
        }
        Ok(Some(this))
    }

    fn backward(norm: Option<BackwardNorm<'py>>, channels: usize) -> PyResult<Option<Self>> {
        let Some((weight, bias, mean, var, eps, batch, gweight, gbias)) = norm else {
            return Ok(None);
        };
        let mut this = Self::new(weight.as_ref(), bias.as_ref(), eps, channels)?;
        let read = |name: &str, array: &Array<'py>| -> PyResult<_> {
            Ok(View::<f64>::input(name, array)?.slice().to_vec())
        };
        this.given = Some([read("mean", &mean)?, read("var", &var)?]);
        this.training = batch;
        this.gradients = Some([View::output("gweight", &gweight)?, View::output("gbias", &gbias)?]);
        Ok(Some(this))
    }

    fn norm(&self) -> Norm<'_, T> {
        let [ones, zeros] = &self.plain;
        Norm {
            weight: self.weight.as_ref().map_or(ones, View::slice),
            bias: self.bias.as_ref().map_or(zeros, View::slice),
            stats: self.given.as_ref().map(|[mean, var]| (&mean[..], &var[..])),
            eps: self.eps,
            training: self.training,
        }
    }

    fn inputs(&self) -> impl Iterator<Item = Range<usize>> {
        [&self.weight, &self.bias].into_iter().flatten().map(View::range)
    }

    fn outputs(&self) -> impl Iterator<Item = Range<usize>> {
        let running = self.running.as_ref().map(|(views, _)| views);
        let found = self.found.iter().flatten().map(View::range);
        let others = [running, self.gradients.as_ref()].into_iter().flatten().flatten();
        found.chain(others.map(View::range))
    }

    /// Where forward leaves the batch's statistics.
    ///
    /// # Safety
    /// Once, of views that are disjoint.
    unsafe fn batch_stats(&self) -> Option<BatchStats<'py, T>> {
        // SAFETY: the caller's promise.
        unsafe {
            self.found.as_ref().map(|[mean, var]| BatchStats {
                mean: mean.slice_mut(),
                var: var.slice_mut(),
                running: self.running.as_ref().map(|([mean, var], momentum)| Running {
                    mean: mean.slice_mut(),
                    var: var.slice_mut(),
                    momentum: *momentum,
                }),
            })
        }
    }

    /// Where backward leaves the gradients of weight and bias.
    ///
    /// # Safety
    /// Once, of views that are disjoint.
    unsafe fn gradients(&self) -> Option<(&'py mut [T], &'py mut [T])> {
        // SAFETY: the caller's promise.
        self.gradients.as_ref().map(|[w, b]| unsafe { (w.slice_mut(), b.slice_mut()) })
    }
}

/// The kernel extent of a weight (C, 1, k, k).
fn kernel_of<T: Number>(weight: &View<'_, T>, channels: usize) -> PyResult<usize> {
    let shape = weight.shape();
    let k = shape.last().copied().unwrap_or(0);
    weight.expect_shape("weight", &[channels, 1, k, k])?;
    Ok(k)
}

/// out = x · g(\[BN\] DW(relu(\[BN\] x))) for "xunit", without relu and inner BN for "slim", with a
/// 1×1 convolution before them for "dense". x, out, d and p have shape (N, C, H, W) or, if
/// channels_last, (N, H, W, C).
///
/// Writes out; d the depthwise and p the pointwise output, where they are not None; the statistics
/// of each batch norm that uses the batch's. bn1, bn2: None or (weight or None, bias or None, mean,
/// var, eps, batch, None or (running mean, running var, momentum)).
#[pyfunction]
#[pyo3(signature = (
    variant, gate, x, pw_weight, pw_bias, weight, bias, bn1, bn2, out, d, p, channels_last, threads
))]
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
    out: &Array<'py>,
    d: Option<&Array<'py>>,
    p: Option<&Array<'py>>,
    channels_last: bool,
    threads: usize,
) -> PyResult<()> {
    let kind = (variant_of(variant)?, gate_of(gate)?);
    let parameters = [pw_weight, pw_bias, Some(weight), bias];
    by_dtype!(
        x,
        forward(
            kind,
            x,
            parameters,
            [bn1, bn2],
            [Some(out), d, p],
            (layout_of(channels_last), threads)
        )
    )
}

fn forward<'py, T: Number>(
    (variant, gate): (Variant, Gate),
    x: &Array<'py>,
    [pw_weight, pw_bias, weight, bias]: [Option<&Array<'py>>; 4],
    [bn1, bn2]: [Option<ForwardNorm<'py>>; 2],
    [out, d, p]: [Option<&Array<'py>>; 3],
    (layout, threads): (Layout, usize),
) -> PyResult<()> {
    let py = x.py();
    let x = View::<T>::input("x", x)?;
    let batch = batch_of(&x, layout)?;
    let (pw_weight, pw_bias) =
        (View::read("pw_weight", pw_weight)?, View::read("pw_bias", pw_bias)?);
    let (weight, bias) = (View::read("weight", weight)?, View::read("bias", bias)?);
    let norms = [NormInput::<T>::forward(bn1, batch.c)?, NormInput::forward(bn2, batch.c)?];
    let outputs = [
        View::written("out", out, x.shape())?,
        View::written("d", d, x.shape())?,
        View::written("p", p, x.shape())?,
    ];
    let norms_of = || norms.iter().flatten();
    disjoint(
        [Some(&x), pw_weight.as_ref(), pw_bias.as_ref(), weight.as_ref(), bias.as_ref()]
            .into_iter()
            .flatten()
            .map(View::range)
            .chain(norms_of().flat_map(NormInput::inputs)),
        ranges(&outputs).chain(norms_of().flat_map(NormInput::outputs)),
    )?;
    let unit = unit((variant, gate), batch, [&pw_weight, &pw_bias, &weight, &bias], &norms)?;
    let x = x.slice();
    let [norm1, norm2] = &norms;
    // SAFETY: checked to be disjoint, and each taken once.
    let output = unsafe {
        let [out, d, p] = outputs.each_ref().map(|view| view.as_ref().map(|view| view.slice_mut()));
        XUnitOutput {
            out: out.unwrap_or_default(),
            d,
            p,
            stats1: norm1.as_ref().and_then(|norm| norm.batch_stats()),
            stats2: norm2.as_ref().and_then(|norm| norm.batch_stats()),
        }
    };
    let threads = Threads::Host(threads);
    detached(py, || ops::xunit_forward(&unit, batch, layout, x, output, threads))??;
    Ok(())
}

/// xunit_forward in evaluation, if is_plain says so of all tensors and batch norm is given its statistics;
/// else False, and nothing is done. One call, because Python takes longer than a small tensor.
///
/// operands: x (N, C, H, W), contiguous, pw_weight, pw_bias, weight, bias; norms: None or a
/// BatchNormState each; parameter: torch.nn.Parameter.
#[pyfunction]
#[pyo3(signature = (variant, gate, operands, norms, out, threads, parameter))]
pub fn xunit_evaluate<'py>(
    variant: &str,
    gate: &str,
    operands: [Option<Array<'py>>; 5],
    norms: [Option<Bound<'py, PyTuple>>; 2],
    out: &Array<'py>,
    threads: usize,
    parameter: &Bound<'py, PyType>,
) -> PyResult<bool> {
    let kind = (variant_of(variant)?, gate_of(gate)?);
    let mut states = [None, None];
    for (state, norm) in states.iter_mut().zip(norms) {
        if let Some(norm) = norm {
            let (weight, bias, mean, var, eps, ..): State<'py> = norm.extract()?;
            let (Some(mean), Some(var)) = (mean, var) else {
                return Ok(false);
            };
            *state = Some((weight, bias, mean, var, eps, false, None));
        }
    }
    let of_norms = states.iter().flatten().flat_map(|(weight, bias, mean, var, ..)| {
        [weight.as_ref(), bias.as_ref(), Some(mean), Some(var)].into_iter().flatten()
    });
    if !are_plain(operands.iter().flatten().chain(of_norms).cloned(), parameter) {
        return Ok(false);
    }
    let [Some(x), operands @ ..] = &operands else {
        return Err(PyValueError::new_err("there is no x"));
    };
    let parameters = operands.each_ref().map(Option::as_ref);
    let how = (Layout::Planes, threads);
    by_dtype!(x, forward(kind, x, parameters, states, [Some(out), None, None], how))?;
    Ok(true)
}

/// xunit_forward of x (N, H, W, C), float32, in evaluation: the batch norms use the statistics that
/// they come with, and C is a multiple of build_info()["lanes"].
#[pyfunction]
#[pyo3(signature = (variant, gate, x, pw_weight, pw_bias, weight, bias, bn1, bn2, out, threads))]
#[allow(clippy::too_many_arguments)]
pub fn xunit_evaluate_channels_last<'py>(
    variant: &str,
    gate: &str,
    x: &Array<'py>,
    pw_weight: Option<&Array<'py>>,
    pw_bias: Option<&Array<'py>>,
    weight: &Array<'py>,
    bias: Option<&Array<'py>>,
    bn1: Option<ForwardNorm<'py>>,
    bn2: Option<ForwardNorm<'py>>,
    out: &Array<'py>,
    threads: usize,
) -> PyResult<()> {
    let (kind, py) = ((variant_of(variant)?, gate_of(gate)?), x.py());
    let x = View::<f32>::input("x", x)?;
    let batch = batch_of(&x, Layout::ChannelsLast)?;
    let c = batch.c;
    let (pw_weight, pw_bias) =
        (View::read("pw_weight", pw_weight)?, View::read("pw_bias", pw_bias)?);
    let (weight, bias) = (View::read("weight", Some(weight))?, View::read("bias", bias)?);
    let norms = [NormInput::<f32>::forward(bn1, c)?, NormInput::forward(bn2, c)?];
    let out = View::written("out", Some(out), x.shape())?;
    let norms_of = || norms.iter().flatten();
    disjoint(
        [Some(&x), pw_weight.as_ref(), pw_bias.as_ref(), weight.as_ref(), bias.as_ref()]
            .into_iter()
            .flatten()
            .map(View::range)
            .chain(norms_of().flat_map(NormInput::inputs)),
        out.iter().map(View::range).chain(norms_of().flat_map(NormInput::outputs)),
    )?;
    let unit = unit(kind, batch, [&pw_weight, &pw_bias, &weight, &bias], &norms)?;
    // SAFETY: checked to be disjoint, and taken once.
    let (x, out) = (x.slice(), out.map(|out| unsafe { out.slice_mut() }).unwrap_or_default());
    let threads = Threads::Host(threads);
    detached(py, || ops::xunit_evaluate_channels_last(&unit, batch, x, out, threads))??;
    Ok(())
}

fn unit<'a, T: Number>(
    (variant, gate): (Variant, Gate),
    batch: Batch,
    [pw_weight, pw_bias, weight, bias]: [&'a Io<'_, T>; 4],
    [norm1, norm2]: &'a [Option<NormInput<'_, T>>; 2],
) -> PyResult<XUnit<'a, T>> {
    let Some(weight) = weight else {
        return Err(PyValueError::new_err("there is no weight"));
    };
    Ok(XUnit {
        variant,
        gate,
        kernel: kernel_of(weight, batch.c)?,
        pointwise: match pw_weight {
            Some(weight) => {
                weight.expect_shape("pw_weight", &[batch.c, batch.c, 1, 1])?;
                let bias = pw_bias.as_ref().map(View::slice);
                Some(Pointwise { weight: weight.slice(), bias })
            }
            None => None,
        },
        weight: weight.slice(),
        bias: bias.as_ref().map(View::slice),
        norm1: norm1.as_ref().map(|norm| norm.norm()),
        norm2: norm2.as_ref().map(|norm| norm.norm()),
    })
}

/// Writes the gradients of xunit_forward at x, weight and, where they are not None, bias, pw_weight
/// and pw_bias, and those of the batch norms.
///
/// bn1, bn2: None or (weight or None, bias or None, mean, var, eps, batch, gradient of weight, of
/// bias), with the statistics that forward used.
/// d None ("dense": p None): gx holds it, and takes its place.
/// channels_last: grad, x, d, p and gx have shape (N, H, W, C).
#[pyfunction]
#[pyo3(signature = (
    variant, gate, grad, x, d, p, pw_weight, weight, bn1, bn2, gx, gpw_weight, gpw_bias, gweight, gbias,
    channels_last, threads
))]
#[allow(clippy::too_many_arguments)]
pub fn xunit_backward<'py>(
    variant: &str,
    gate: &str,
    grad: &Array<'py>,
    x: &Array<'py>,
    d: Option<&Array<'py>>,
    p: Option<&Array<'py>>,
    pw_weight: Option<&Array<'py>>,
    weight: &Array<'py>,
    bn1: Option<BackwardNorm<'py>>,
    bn2: Option<BackwardNorm<'py>>,
    gx: &Array<'py>,
    gpw_weight: Option<&Array<'py>>,
    gpw_bias: Option<&Array<'py>>,
    gweight: &Array<'py>,
    gbias: Option<&Array<'py>>,
    channels_last: bool,
    threads: usize,
) -> PyResult<()> {
    let kind = (variant_of(variant)?, gate_of(gate)?);
    let saved = [Some(grad), d, p];
    let gradients = [Some(gx), gpw_weight, gpw_bias, Some(gweight), gbias];
    by_dtype!(
        x,
        backward(
            kind,
            x,
            saved,
            [pw_weight, Some(weight)],
            [bn1, bn2],
            gradients,
            (layout_of(channels_last), threads)
        )
    )
}

fn backward<'py, T: Number>(
    kind: (Variant, Gate),
    x: &Array<'py>,
    [grad, d, p]: [Option<&Array<'py>>; 3],
    [pw_weight, weight]: [Option<&Array<'py>>; 2],
    [bn1, bn2]: [Option<BackwardNorm<'py>>; 2],
    [gx, gpw_weight, gpw_bias, gweight, gbias]: [Option<&Array<'py>>; 5],
    (layout, threads): (Layout, usize),
) -> PyResult<()> {
    let py = x.py();
    let x = View::<T>::input("x", x)?;
    let batch = batch_of(&x, layout)?;
    let c = batch.c;
    let saved = [View::read("grad", grad)?, View::read("d", d)?, View::read("p", p)?];
    for (name, view) in ["grad", "d", "p"].into_iter().zip(&saved) {
        if let Some(view) = view {
            view.expect_shape(name, x.shape())?;
        }
    }
    let (pw_weight, weight) = (View::read("pw_weight", pw_weight)?, View::read("weight", weight)?);
    let norms = [NormInput::<T>::backward(bn1, c)?, NormInput::backward(bn2, c)?];
    let shape_of = |view: &Io<'_, T>| view.as_ref().map_or(vec![], |view| view.shape().to_vec());
    let outputs = [
        View::written("gx", gx, x.shape())?,
        View::written("gpw_weight", gpw_weight, &shape_of(&pw_weight))?,
        View::written("gpw_bias", gpw_bias, &[c])?,
        View::written("gweight", gweight, &shape_of(&weight))?,
        View::written("gbias", gbias, &[c])?,
    ];
    let norms_of = || norms.iter().flatten();
    disjoint(
        [Some(&x), pw_weight.as_ref(), weight.as_ref()]
            .into_iter()
            .flatten()
            .map(View::range)
            .chain(ranges(&saved))
            .chain(norms_of().flat_map(NormInput::inputs)),
        ranges(&outputs).chain(norms_of().flat_map(NormInput::outputs)),
    )?;
    let unit = unit(kind, batch, [&pw_weight, &None, &weight, &None], &norms)?;
    let [grad, d, p] = saved.each_ref().map(|view| view.as_ref().map(View::slice));
    let saved = XUnitSaved { x: x.slice(), d, p };
    let [norm1, norm2] = &norms;
    // SAFETY: checked to be disjoint, and each taken once.
    let gradients = unsafe {
        let [gx, gpw_weight, gpw_bias, gweight, gbias] =
            outputs.each_ref().map(|view| view.as_ref().map(|view| view.slice_mut()));
        XUnitGradients {
            x: gx.unwrap_or_default(),
            pointwise: gpw_weight.map(|weight| PointwiseGradients { weight, bias: gpw_bias }),
            weight: gweight.unwrap_or_default(),
            bias: gbias,
            norm1: norm1.as_ref().and_then(|norm| norm.gradients()),
            norm2: norm2.as_ref().and_then(|norm| norm.gradients()),
        }
    };
    let (grad, threads) = (grad.unwrap_or_default(), Threads::Host(threads));
    detached(py, || ops::xunit_backward(&unit, batch, layout, grad, saved, gradients, threads))??;
    Ok(())
}
