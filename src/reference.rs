//! A naive float64 twin of every operation, forward and backward: the oracle of tests and benches.
//!
//! Plain loops over the definitions, in the order in which they are written down; nothing here is
//! shared with the kernels but the names of variants, gates and geometries. Tensors are (N, C, H,
//! W), depthwise weights (C, kh, kw), pointwise weights (C, C). Arguments are trusted: these
//! functions panic where the shapes do not fit.

use ndarray::{Array1, Array2, Array3, Array4, Axis, s};

use crate::kernels::activation::Gate;
use crate::ops::Variant;
use crate::shape::Conv;

/// The batch with zeros around every plane: x̃\[n, c, y + top, x + left\] = x\[n, c, y, x\].
///
/// (N, C, H, W) to (N, C, H + top + bottom, W + left + right). Source: `torch.nn.functional.pad`.
pub fn pad(x: &Array4<f64>, [top, bottom, left, right]: [usize; 4]) -> Array4<f64> {
    let (n, c, h, w) = x.dim();
    let mut padded = Array4::zeros((n, c, h + top + bottom, w + left + right));
    padded.slice_mut(s![.., .., top..top + h, left..left + w]).assign(x);
    padded
}

/// Depthwise convolution: y\[n, c, u, v\] = b\[c\] + Σ w\[c, i, j\] · x̃\[n, c, u·s + i·d, v·s + j·d\].
///
/// x (N, C, H, W), weight (C, kh, kw), bias (C) to (N, C, OH, OW), with x̃ the zero-padded x. Source:
/// `torch.nn.Conv2d` with groups = C.
pub fn depthwise(
    x: &Array4<f64>,
    weight: &Array3<f64>,
    bias: Option<&Array1<f64>>,
    conv: &Conv,
) -> Array4<f64> {
    let (n, c, h, w) = x.dim();
    let Conv { kh, kw, stride: [sh, sw], padding: [top, bottom, left, right], dilation: [dh, dw] } =
        *conv;
    let (oh, ow) = (
        (h + top + bottom - dh * (kh - 1) - 1) / sh + 1,
        (w + left + right - dw * (kw - 1) - 1) / sw + 1,
    );
    let padded = pad(x, conv.padding);
    Array4::from_shape_fn((n, c, oh, ow), |(n, c, u, v)| {
        let (input, weight) = (padded.slice(s![n, c, .., ..]), weight.slice(s![c, .., ..]));
        let mut sum = bias.map_or(0.0, |bias| bias[c]);
        for i in 0..kh {
            for j in 0..kw {
                sum += weight[[i, j]] * input[[u * sh + i * dh, v * sw + j * dw]];
            }
        }
        sum
    })
}

/// The gradients of [`depthwise`] to x, weight and bias: each product of the sum is differentiated
/// where it stands.
///
/// gx̃\[n, c, u·s + i·d, v·s + j·d\] += w\[c, i, j\] · g\[n, c, u, v\], of which gx is the middle;
/// gw\[c, i, j\] = Σ g\[n, c, u, v\] · x̃\[…\]; gb\[c\] = Σ g\[n, c, u, v\]. Shapes as the arguments'.
pub fn depthwise_backward(
    grad: &Array4<f64>,
    x: &Array4<f64>,
    weight: &Array3<f64>,
    conv: &Conv,
) -> (Array4<f64>, Array3<f64>, Array1<f64>) {
    let (_, _, h, w) = x.dim();
    let Conv { kh, kw, stride: [sh, sw], padding: [top, _, left, _], dilation: [dh, dw] } = *conv;
    let padded = pad(x, conv.padding);
    let mut gx = Array4::zeros(padded.raw_dim());
    let mut gweight = Array3::zeros(weight.raw_dim());
    for (n, images) in grad.outer_iter().enumerate() {
        for (c, plane) in images.outer_iter().enumerate() {
            let input = padded.slice(s![n, c, .., ..]);
            let mut gx = gx.slice_mut(s![n, c, .., ..]);
            for ((u, v), &g) in plane.indexed_iter() {
                for i in 0..kh {
                    for j in 0..kw {
                        let at = [u * sh + i * dh, v * sw + j * dw];
                        gx[at] += weight[[c, i, j]] * g;
                        gweight[[c, i, j]] += g * input[at];
                    }
                }
            }
        }
    }
    let gx = gx.slice(s![.., .., top..top + h, left..left + w]).to_owned();
    (gx, gweight, per_channel(grad))
}

/// Pointwise (1×1) convolution: y\[n, o, u, v\] = b\[o\] + Σ w\[o, c\] · x\[n, c, u, v\].
///
/// x (N, C, H, W), weight (O, C), bias (O) to (N, O, H, W). Source: `torch.nn.Conv2d`, kernel 1.
pub fn pointwise(x: &Array4<f64>, weight: &Array2<f64>, bias: Option<&Array1<f64>>) -> Array4<f64> {
    let (n, channels, h, w) = x.dim();
    Array4::from_shape_fn((n, weight.nrows(), h, w), |(n, o, u, v)| {
        let products = (0..channels).map(|c| weight[[o, c]] * x[[n, c, u, v]]);
        bias.map_or(0.0, |bias| bias[o]) + products.sum::<f64>()
    })
}

/// The gradients of [`pointwise`] to x, weight and bias.
///
/// gx\[n, c\] = Σ w\[o, c\] · g\[n, o\]; gw\[o, c\] = Σ g\[n, o, u, v\] · x\[n, c, u, v\]; gb\[o\] =
/// Σ g\[n, o, u, v\]. Shapes as the arguments'.
pub fn pointwise_backward(
    grad: &Array4<f64>,
    x: &Array4<f64>,
    weight: &Array2<f64>,
) -> (Array4<f64>, Array2<f64>, Array1<f64>) {
    let gx = pointwise(grad, &weight.t().to_owned(), None);
    let gweight = Array2::from_shape_fn(weight.raw_dim(), |(o, c)| {
        let (grad, x) = (grad.index_axis(Axis(1), o), x.index_axis(Axis(1), c));
        grad.iter().zip(&x).map(|(g, x)| g * x).sum()
    });
    (gx, gweight, per_channel(grad))
}

/// The parameters of a batch norm: weight and bias (C), and the running mean and biased variance
/// (C) of evaluation, or `None` in training, which uses the batch's.
#[derive(Clone, Debug)]
pub struct Norm {
    pub weight: Array1<f64>,
    pub bias: Array1<f64>,
    pub stats: Option<Stats>,
    pub eps: f64,
}

/// Mean and biased variance per channel, (C) each.
pub type Stats = (Array1<f64>, Array1<f64>);

/// Mean and biased variance of each channel: m\[c\] = Σ x / M, v\[c\] = Σ (x − m)² / M, M = N·H·W.
///
/// (N, C, H, W) to (C) twice. Source: Ioffe and Szegedy, arXiv 1502.03167, algorithm 1.
pub fn batch_statistics(x: &Array4<f64>) -> Stats {
    let count = count(x);
    let mean = per_channel(x) / count;
    let mut squares = x.clone();
    for (c, mut channel) in squares.axis_iter_mut(Axis(1)).enumerate() {
        channel.mapv_inplace(|x| (x - mean[c]).powi(2));
    }
    (mean, per_channel(&squares) / count)
}

/// Batch norm: y = weight · x̂ + bias, x̂ = (x − m) / √(v + ε); with the statistics (m, v) it used.
///
/// (N, C, H, W) to the same. Source: `torch.nn.BatchNorm2d`; arXiv 1502.03167, algorithm 1.
pub fn batch_norm(x: &Array4<f64>, norm: &Norm) -> (Array4<f64>, Stats) {
    let stats = norm.stats.clone().unwrap_or_else(|| batch_statistics(x));
    let mut y = normalised(x, &stats, norm.eps);
    for (c, mut channel) in y.axis_iter_mut(Axis(1)).enumerate() {
        channel.mapv_inplace(|xhat| norm.weight[c] * xhat + norm.bias[c]);
    }
    (y, stats)
}

/// The gradients of [`batch_norm`] to x, weight and bias.
///
/// gx = weight / √(v + ε) · (g − mean(g) − x̂ · mean(g · x̂)) in training, without the two means in
/// evaluation; gweight = Σ g · x̂; gbias = Σ g. Source: arXiv 1502.03167, section 3.
pub fn batch_norm_backward(
    grad: &Array4<f64>,
    x: &Array4<f64>,
    norm: &Norm,
) -> (Array4<f64>, Array1<f64>, Array1<f64>) {
    let stats = norm.stats.clone().unwrap_or_else(|| batch_statistics(x));
    let xhat = normalised(x, &stats, norm.eps);
    let (gweight, gbias) = (per_channel(&(grad * &xhat)), per_channel(grad));
    let gx = Array4::from_shape_fn(x.raw_dim(), |at| {
        let c = at.1;
        let centred = match norm.stats {
            Some(_) => grad[at],
            None => grad[at] - gbias[c] / count(x) - xhat[at] * gweight[c] / count(x),
        };
        norm.weight[c] / (stats.1[c] + norm.eps).sqrt() * centred
    });
    (gx, gweight, gbias)
}

/// max(x, 0), where NaN stays NaN. Any shape. Source: `torch.relu`.
pub fn relu(x: &Array4<f64>) -> Array4<f64> {
    x.mapv(|x| if x <= 0.0 { 0.0 } else { x })
}

/// The gradient of [`relu`]: g where x > 0 or x is NaN, else 0. Shape as x.
pub fn relu_backward(grad: &Array4<f64>, x: &Array4<f64>) -> Array4<f64> {
    ndarray::Zip::from(grad).and(x).map_collect(|&g, &x| if x <= 0.0 { 0.0 } else { g })
}

/// The gate g(d): sigmoid 1 / (1 + exp(−d)) or Gaussian exp(−d²). Any shape.
///
/// Source: the official code of 2021 (sigmoid); arXiv 1711.06445, section 3 (Gaussian).
pub fn gate(gate: Gate, d: &Array4<f64>) -> Array4<f64> {
    d.mapv(|d| match gate {
        Gate::Sigmoid => 1.0 / (1.0 + (-d).exp()),
        Gate::Gaussian => (-d * d).exp(),
    })
}

/// The gradient of [`gate`]: g(d) · (1 − g(d)) or −2 d · exp(−d²), times grad. Shape as d.
pub fn gate_backward(gate: Gate, grad: &Array4<f64>, d: &Array4<f64>) -> Array4<f64> {
    let g = self::gate(gate, d);
    Array4::from_shape_fn(d.raw_dim(), |at| {
        grad[at]
            * match gate {
                Gate::Sigmoid => g[at] * (1.0 - g[at]),
                Gate::Gaussian => g[at] * (-2.0 * d[at]),
            }
    })
}

/// The parameters of an xUnit, xUnitS or xUnitD of C channels.
#[derive(Clone, Debug)]
pub struct XUnit {
    pub variant: Variant,
    pub gate: Gate,
    /// Weight (C, C) and bias (C) of the 1×1 convolution; dense only.
    pub pointwise: Option<(Array2<f64>, Option<Array1<f64>>)>,
    /// Depthwise weight (C, k, k), k odd, and bias (C).
    pub weight: Array3<f64>,
    pub bias: Option<Array1<f64>>,
    /// Full and dense only.
    pub norm1: Option<Norm>,
    pub norm2: Option<Norm>,
}

/// What [`xunit`] returns.
#[derive(Clone, Debug)]
pub struct XUnitForward {
    pub out: Array4<f64>,
    /// The depthwise output before its batch norm.
    pub d: Array4<f64>,
    /// The pointwise output before its batch norm; dense only.
    pub p: Option<Array4<f64>>,
    /// The batch statistics of each batch norm in training.
    pub stats1: Option<Stats>,
    pub stats2: Option<Stats>,
}

/// The gradients to x and to every parameter that there is.
#[derive(Clone, Debug)]
pub struct XUnitGradients {
    pub x: Array4<f64>,
    pub pointwise: Option<(Array2<f64>, Array1<f64>)>,
    pub weight: Array3<f64>,
    pub bias: Array1<f64>,
    /// (weight, bias)
    pub norm1: Option<(Array1<f64>, Array1<f64>)>,
    pub norm2: Option<(Array1<f64>, Array1<f64>)>,
}

/// Every intermediate of an xUnit.
struct Trace {
    p: Option<Array4<f64>>,
    /// What the ReLU sees, and the depthwise convolution after it.
    u: Array4<f64>,
    r: Array4<f64>,
    d: Array4<f64>,
    /// What the gate sees.
    e: Array4<f64>,
    stats1: Option<Stats>,
    stats2: Option<Stats>,
}

impl XUnit {
    fn conv(&self) -> Conv {
        Conv::same(self.weight.dim().1).expect("an odd kernel extent")
    }

    fn trace(&self, x: &Array4<f64>) -> Trace {
        let normalise = |x: &Array4<f64>, norm: &Option<Norm>| match norm {
            Some(norm) => {
                let (y, stats) = batch_norm(x, norm);
                (y, norm.stats.is_none().then_some(stats))
            }
            None => (x.clone(), None),
        };
        let p = self.pointwise.as_ref().map(|(w, b)| pointwise(x, w, b.as_ref()));
        let (u, stats1) = normalise(p.as_ref().unwrap_or(x), &self.norm1);
        let r = if self.variant == Variant::Slim { u.clone() } else { relu(&u) };
        let d = depthwise(&r, &self.weight, self.bias.as_ref(), &self.conv());
        let (e, stats2) = normalise(&d, &self.norm2);
        Trace { p, u, r, d, e, stats1, stats2 }
    }
}

/// An xUnit: out = x · g(\[BN\] DW r), r = relu(\[BN\] x), x (slim) or relu(\[BN\] PW x) (dense).
///
/// (N, C, H, W) to the same. Sources: arXiv 1711.06445, section 3; arXiv 1811.11051 (dense).
pub fn xunit(unit: &XUnit, x: &Array4<f64>) -> XUnitForward {
    let Trace { p, d, e, stats1, stats2, .. } = unit.trace(x);
    XUnitForward { out: x * &gate(unit.gate, &e), d, p, stats1, stats2 }
}

/// The gradients of [`xunit`], by the chain rule over the functions of this file. `grad` as x.
pub fn xunit_backward(unit: &XUnit, grad: &Array4<f64>, x: &Array4<f64>) -> XUnitGradients {
    let Trace { p, u, r, d, e, .. } = unit.trace(x);
    let normalise = |g: Array4<f64>, x: &Array4<f64>, norm: &Option<Norm>| match norm {
        Some(norm) => {
            let (gx, gweight, gbias) = batch_norm_backward(&g, x, norm);
            (gx, Some((gweight, gbias)))
        }
        None => (g, None),
    };
    let past_gate = grad * &gate(unit.gate, &e);
    let ge = gate_backward(unit.gate, &(grad * x), &e);
    let (gd, norm2) = normalise(ge, &d, &unit.norm2);
    let (gr, weight, bias) = depthwise_backward(&gd, &r, &unit.weight, &unit.conv());
    let gu = if unit.variant == Variant::Slim { gr } else { relu_backward(&gr, &u) };
    let (gp, norm1) = normalise(gu, p.as_ref().unwrap_or(x), &unit.norm1);
    let (into_features, pointwise) = match &unit.pointwise {
        Some((w, _)) => {
            let (gx, gweight, gbias) = pointwise_backward(&gp, x, w);
            (gx, Some((gweight, gbias)))
        }
        None => (gp, None),
    };
    XUnitGradients { x: past_gate + into_features, pointwise, weight, bias, norm1, norm2 }
}

/// Values per channel.
fn count(x: &Array4<f64>) -> f64 {
    let (n, _, h, w) = x.dim();
    (n * h * w) as f64
}

/// The sum of each channel.
fn per_channel(x: &Array4<f64>) -> Array1<f64> {
    x.axis_iter(Axis(1)).map(|channel| channel.iter().sum()).collect()
}

/// x̂ = (x − mean) / √(var + ε).
fn normalised(x: &Array4<f64>, (mean, var): &Stats, eps: f64) -> Array4<f64> {
    let mut xhat = x.clone();
    for (c, mut channel) in xhat.axis_iter_mut(Axis(1)).enumerate() {
        channel.mapv_inplace(|x| (x - mean[c]) / (var[c] + eps).sqrt());
    }
    xhat
}

#[cfg(test)]
mod tests {
    use ndarray::{Array, Dimension, ShapeBuilder};

    use super::*;

    /// Numbers in [-1, 1) without a pattern.
    fn noise<D: Dimension, S: ShapeBuilder<Dim = D>>(shape: S, seed: u64) -> Array<f64, D> {
        let mut state = seed;
        Array::from_shape_simple_fn(shape, || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(seed | 1);
            (state >> 33) as f64 / (1u64 << 30) as f64 - 1.0
        })
    }

    /// Compares a gradient with central differences of `f` at `x`, element by element.
    fn check<D: Dimension>(
        name: &str,
        x: &Array<f64, D>,
        gradient: &Array<f64, D>,
        f: impl Fn(&Array<f64, D>) -> f64,
    ) {
        const STEP: f64 = 1e-5;
        assert_eq!(x.shape(), gradient.shape(), "{name}");
        for (i, &got) in gradient.iter().enumerate() {
            let moved = |by: f64| {
                let mut x = x.clone();
                *x.iter_mut().nth(i).unwrap() += by;
                f(&x)
            };
            let want = (moved(STEP) - moved(-STEP)) / (2.0 * STEP);
            assert!((got - want).abs() <= 1e-7 * (1.0 + want.abs()), "{name}[{i}]: {got}, {want}");
        }
    }

    fn dot(a: &Array4<f64>, b: &Array4<f64>) -> f64 {
        (a * b).sum()
    }

    fn norm(channels: usize, training: bool, seed: u64) -> Norm {
        let stats = (noise(channels, seed + 2), noise(channels, seed + 3) * 0.5 + 1.0);
        Norm {
            weight: noise(channels, seed) + 1.5,
            bias: noise(channels, seed + 1),
            stats: (!training).then_some(stats),
            eps: 1e-3,
        }
    }

    #[test]
    fn depthwise_of_a_worked_example() {
        let x = Array::from_shape_vec((1, 1, 2, 3), vec![1., 2., 3., 4., 5., 6.]).unwrap();
        let weight = Array::from_shape_vec((1, 2, 2), vec![1., 10., 100., 1000.]).unwrap();
        let conv = Conv { kh: 2, kw: 2, stride: [1, 2], padding: [1, 0, 0, 1], dilation: [1, 1] };
        let y = depthwise(&x, &weight, Some(&Array::from_elem(1, 0.5)), &conv);
        // Row 0 sees padding above; column 1 starts at x = 2 and sees padding on the right.
        assert_eq!(y.into_raw_vec_and_offset().0, [2100.5, 300.5, 5421.5, 603.5]);
    }

    #[test]
    fn depthwise_gradients() {
        for (kernel, stride, dilation, padding) in [
            ([3, 3], [1, 1], [1, 1], [1, 1, 1, 1]),
            ([2, 3], [2, 1], [1, 2], [1, 0, 2, 3]),
            ([5, 1], [1, 3], [1, 1], [3, 1, 0, 1]),
        ] {
            let conv = Conv { kh: kernel[0], kw: kernel[1], stride, padding, dilation };
            let x = noise((2, 2, 4, 5), 1);
            let (weight, bias) = (noise((2, kernel[0], kernel[1]), 2), noise(2, 3));
            let grad = noise(depthwise(&x, &weight, None, &conv).raw_dim(), 4);
            let (gx, gweight, gbias) = depthwise_backward(&grad, &x, &weight, &conv);
            let loss = |x: &_, w: &_, b: &_| dot(&grad, &depthwise(x, w, Some(b), &conv));
            check("x", &x, &gx, |x| loss(x, &weight, &bias));
            check("weight", &weight, &gweight, |w| loss(&x, w, &bias));
            check("bias", &bias, &gbias, |b| loss(&x, &weight, b));
        }
    }

    #[test]
    fn pointwise_gradients() {
        let (x, weight, bias) = (noise((2, 3, 2, 4), 1), noise((3, 3), 2), noise(3, 3));
        let grad = noise((2, 3, 2, 4), 4);
        let (gx, gweight, gbias) = pointwise_backward(&grad, &x, &weight);
        let loss = |x: &_, w: &_, b: &_| dot(&grad, &pointwise(x, w, Some(b)));
        check("x", &x, &gx, |x| loss(x, &weight, &bias));
        check("weight", &weight, &gweight, |w| loss(&x, w, &bias));
        check("bias", &bias, &gbias, |b| loss(&x, &weight, b));
    }

    #[test]
    fn batch_norm_gradients() {
        for training in [false, true] {
            let (x, norm, grad) =
                (noise((2, 3, 2, 4), 1), norm(3, training, 2), noise((2, 3, 2, 4), 4));
            let (gx, gweight, gbias) = batch_norm_backward(&grad, &x, &norm);
            let loss = |x: &_, norm: &Norm| dot(&grad, &batch_norm(x, norm).0);
            check("x", &x, &gx, |x| loss(x, &norm));
            check("weight", &norm.weight, &gweight, |w| {
                loss(&x, &Norm { weight: w.clone(), ..norm.clone() })
            });
            check("bias", &norm.bias, &gbias, |b| {
                loss(&x, &Norm { bias: b.clone(), ..norm.clone() })
            });
        }
    }

    #[test]
    fn batch_norm_in_training_has_mean_zero_and_variance_one() {
        let norm = Norm { weight: Array::ones(3), bias: Array::zeros(3), stats: None, eps: 0.0 };
        let (y, _) = batch_norm(&(noise((2, 3, 4, 5), 1) * 3.0 + 7.0), &norm);
        let (mean, var) = batch_statistics(&y);
        assert!(
            mean.iter().all(|m| m.abs() < 1e-12) && var.iter().all(|v| (v - 1.0).abs() < 1e-12)
        );
    }

    #[test]
    fn relu_keeps_nan_and_its_gradient() {
        let x = Array::from_shape_vec(
            (1, 1, 1, 5),
            vec![f64::NAN, f64::NEG_INFINITY, -0.0, 2.0, f64::INFINITY],
        )
        .unwrap();
        let (y, g) = (relu(&x), relu_backward(&Array::from_elem(x.raw_dim(), 3.0), &x));
        assert!(y[[0, 0, 0, 0]].is_nan());
        assert_eq!(y.as_slice().unwrap()[1..], [0.0, 0.0, 2.0, f64::INFINITY]);
        assert_eq!(g.as_slice().unwrap(), [3.0, 0.0, 0.0, 3.0, 3.0]);
    }

    #[test]
    fn gate_gradients() {
        for kind in [Gate::Sigmoid, Gate::Gaussian] {
            let (d, grad) = (noise((2, 3, 2, 4), 1) * 3.0, noise((2, 3, 2, 4), 4));
            let gd = gate_backward(kind, &grad, &d);
            check("d", &d, &gd, |d| dot(&grad, &gate(kind, d)));
        }
    }

    #[test]
    fn xunit_gradients() {
        for (variant, kind) in [
            (Variant::Full, Gate::Gaussian),
            (Variant::Full, Gate::Sigmoid),
            (Variant::Slim, Gate::Sigmoid),
            (Variant::Slim, Gate::Gaussian),
            (Variant::Dense, Gate::Sigmoid),
            (Variant::Dense, Gate::Gaussian),
        ] {
            for norms in [None, Some(false), Some(true)] {
                xunit_gradient(variant, kind, norms);
            }
        }
    }

    fn xunit_gradient(variant: Variant, gate: Gate, norms: Option<bool>) {
        let channels = 2;
        let dense = variant == Variant::Dense;
        let unit = XUnit {
            variant,
            gate,
            pointwise: dense.then(|| (noise((channels, channels), 11), Some(noise(channels, 12)))),
            weight: noise((channels, 3, 3), 13),
            bias: Some(noise(channels, 14)),
            norm1: norms.filter(|_| variant != Variant::Slim).map(|t| norm(channels, t, 15)),
            norm2: norms.map(|t| norm(channels, t, 25)),
        };
        let (x, grad) = (noise((2, channels, 4, 3), 1), noise((2, channels, 4, 3), 2));
        let g = xunit_backward(&unit, &grad, &x);
        let loss = |x: &_, change: &dyn Fn(&mut XUnit)| {
            let mut unit = unit.clone();
            change(&mut unit);
            dot(&grad, &xunit(&unit, x).out)
        };
        check("x", &x, &g.x, |x| loss(x, &|_| {}));
        check("weight", &unit.weight, &g.weight, |w| loss(&x, &|u| u.weight = w.clone()));
        check("bias", unit.bias.as_ref().unwrap(), &g.bias, |b| {
            loss(&x, &|u| u.bias = Some(b.clone()))
        });
        assert_eq!(dense, g.pointwise.is_some());
        if let (Some((w, b)), Some((gw, gb))) = (&unit.pointwise, &g.pointwise) {
            check("pointwise weight", w, gw, |w| {
                loss(&x, &|u| u.pointwise.as_mut().unwrap().0 = w.clone())
            });
            check("pointwise bias", b.as_ref().unwrap(), gb, |b| {
                loss(&x, &|u| u.pointwise.as_mut().unwrap().1 = Some(b.clone()))
            });
        }
        assert_eq!(unit.norm1.is_some(), g.norm1.is_some());
        if let (Some(norm), Some((gw, gb))) = (&unit.norm1, &g.norm1) {
            check("norm 1 weight", &norm.weight, gw, |w| {
                loss(&x, &|u| u.norm1.as_mut().unwrap().weight = w.clone())
            });
            check("norm 1 bias", &norm.bias, gb, |b| {
                loss(&x, &|u| u.norm1.as_mut().unwrap().bias = b.clone())
            });
        }
        assert_eq!(unit.norm2.is_some(), g.norm2.is_some());
        if let (Some(norm), Some((gw, gb))) = (&unit.norm2, &g.norm2) {
            check("norm 2 weight", &norm.weight, gw, |w| {
                loss(&x, &|u| u.norm2.as_mut().unwrap().weight = w.clone())
            });
            check("norm 2 bias", &norm.bias, gb, |b| {
                loss(&x, &|u| u.norm2.as_mut().unwrap().bias = b.clone())
            });
        }
    }
}
