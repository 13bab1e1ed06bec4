//! The xUnits against the naive twin, the same bits at every thread count, and shapes that are
//! refused.

mod common;

use common::owned::{
    XUnitForward, XUnitGradients, depthwise_backward, depthwise_forward, xunit_backward,
    xunit_backward_in, xunit_forward, xunit_forward_in,
};
use common::{Noise, close, close_beside, flat, nan, on_every_isa, same_bits};
use ndarray::{Array1, Array3, Array4, s};
use xunit_rs::kernels::activation::Gate;
use xunit_rs::ops::{
    self, DepthwiseGradients, Layout, Norm, Pointwise, Variant, XUnit, XUnitSaved,
};
use xunit_rs::parallel::Threads;
use xunit_rs::reference::{self, Stats};
use xunit_rs::shape::{Batch, Conv, Geometry, ShapeError};
use xunit_rs::simd::{self, Scalar};

const VARIANTS: [Variant; 3] = [Variant::Full, Variant::Slim, Variant::Dense];
const GATES: [Gate; 2] = [Gate::Sigmoid, Gate::Gaussian];

/// What stands at the place of a batch norm.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Mode {
    None,
    Evaluation,
    Training,
}

const MODES: [Mode; 3] = [Mode::None, Mode::Evaluation, Mode::Training];

/// Every variant with every gate and every pair of batch norms that it can have.
fn units() -> impl Iterator<Item = (Variant, Gate, [Mode; 2])> {
    let pairs = MODES.into_iter().flat_map(|first| MODES.map(|second| [first, second]));
    let units = VARIANTS.into_iter().flat_map(|variant| GATES.map(|gate| (variant, gate)));
    units
        .flat_map(move |(variant, gate)| pairs.clone().map(move |modes| (variant, gate, modes)))
        .filter(|(variant, _, modes)| *variant != Variant::Slim || modes[0] == Mode::None)
}

fn norm(noise: &mut Noise, channels: usize, mode: Mode) -> Option<reference::Norm> {
    let exact = |x: f64| f64::from(x as f32);
    let weight = noise.array(channels).mapv(|x| exact(1.0 + 0.5 * x));
    let bias = noise.array(channels);
    let mean = noise.array(channels).mapv(|x| exact(0.5 * x));
    let var = noise.array(channels).mapv(|x| exact(1.0 + 0.5 * x));
    let stats = (mode == Mode::Evaluation).then_some((mean, var));
    (mode != Mode::None).then_some(reference::Norm { weight, bias, stats, eps: 1e-5 })
}

/// The twin of a unit, with or without biases, all numbers exact in `f32`.
fn unit(
    noise: &mut Noise,
    channels: usize,
    (variant, gate, modes): (Variant, Gate, [Mode; 2]),
    k: usize,
    biases: bool,
) -> reference::XUnit {
    let pointwise = (noise.array((channels, channels)), biases.then(|| noise.array(channels)));
    reference::XUnit {
        variant,
        gate,
        pointwise: (variant == Variant::Dense).then_some(pointwise),
        weight: noise.array((channels, k, k)),
        bias: biases.then(|| noise.array(channels)),
        norm1: norm(noise, channels, modes[0]),
        norm2: norm(noise, channels, modes[1]),
    }
}

/// A [`unit`] and an input on which it is well conditioned: no value so near to the kink of the
/// ReLU that rounding takes it across, no batch with next to no variance.
fn unit_and_input(
    noise: &mut Noise,
    batch: Batch,
    kind: (Variant, Gate, [Mode; 2]),
    k: usize,
    biases: bool,
) -> (reference::XUnit, Array4<f64>) {
    loop {
        let unit = unit(noise, batch.c, kind, k, biases);
        // Off centre, as what comes out of another unit is.
        let x = noise.array((batch.n, batch.c, batch.h, batch.w)) + 0.25;
        let forward = reference::xunit(&unit, &x);
        let p = forward.p.as_ref().unwrap_or(&x);
        let u = unit.norm1.as_ref().map(|norm| reference::batch_norm(p, norm).0);
        let kinks = unit.variant != Variant::Slim;
        let far = !kinks || u.as_ref().unwrap_or(p).iter().all(|u| u.abs() > 1e-5);
        let spread = |(mean, var): &Stats| {
            var.iter().zip(mean).all(|(var, mean)| *var > 0.02 && *var > 0.02 * mean * mean)
        };
        if far && [&forward.stats1, &forward.stats2].into_iter().flatten().all(spread) {
            return (unit, x);
        }
    }
}

/// The parameters of a unit in the type that is tested, as the vectors that [`XUnit`] borrows.
struct Owned<T> {
    variant: Variant,
    gate: Gate,
    kernel: usize,
    pointwise: Option<(Vec<T>, Option<Vec<T>>)>,
    weight: Vec<T>,
    bias: Option<Vec<T>>,
    norms: [Option<OwnedNorm<T>>; 2],
}

struct OwnedNorm<T> {
    weight: Vec<T>,
    bias: Vec<T>,
    stats: Option<(Vec<f64>, Vec<f64>)>,
    eps: f64,
    training: bool,
}

impl<T: Scalar> Owned<T> {
    fn new(unit: &reference::XUnit) -> Self {
        let norm = |norm: &Option<reference::Norm>| {
            norm.as_ref().map(|norm| OwnedNorm {
                weight: flat(&norm.weight),
                bias: flat(&norm.bias),
                stats: norm.stats.as_ref().map(|(mean, var)| (flat(mean), flat(var))),
                eps: norm.eps,
                training: norm.stats.is_none(),
            })
        };
        let pointwise = unit.pointwise.as_ref();
        Self {
            variant: unit.variant,
            gate: unit.gate,
            kernel: unit.weight.dim().1,
            pointwise: pointwise.map(|(w, b)| (flat(w), b.as_ref().map(flat))),
            weight: flat(&unit.weight),
            bias: unit.bias.as_ref().map(flat),
            norms: [norm(&unit.norm1), norm(&unit.norm2)],
        }
    }

    fn unit(&self) -> XUnit<'_, T> {
        XUnit {
            variant: self.variant,
            gate: self.gate,
            kernel: self.kernel,
            pointwise: self
                .pointwise
                .as_ref()
                .map(|(weight, bias)| Pointwise { weight, bias: bias.as_deref() }),
            weight: &self.weight,
            bias: self.bias.as_deref(),
            norm1: self.norms[0].as_ref().map(OwnedNorm::norm),
            norm2: self.norms[1].as_ref().map(OwnedNorm::norm),
        }
    }

    /// Forward with and without what backward needs, then backward.
    fn run(
        &mut self,
        batch: Batch,
        x: &[T],
        grad: &[T],
        threads: usize,
    ) -> (XUnitForward<T>, XUnitGradients<T>) {
        self.run_in(Layout::Planes, batch, x, grad, threads)
    }

    /// The same of tensors in this layout; those here are in planes.
    fn run_in(
        &mut self,
        layout: Layout,
        batch: Batch,
        x: &[T],
        grad: &[T],
        threads: usize,
    ) -> (XUnitForward<T>, XUnitGradients<T>) {
        let planes = layout == Layout::Planes;
        let laid = |t: &[T]| if planes { t.to_vec() } else { to_channels_last(batch, t) };
        let (x, grad) = (&laid(x)[..], &laid(grad)[..]);
        let forward = xunit_forward_in(layout, &self.unit(), batch, x, true, threads).unwrap();
        let lean = xunit_forward_in(layout, &self.unit(), batch, x, false, threads).unwrap();
        same_bits(&forward.out, &lean.out, || "save changes the output".to_owned());
        assert!(lean.d.is_none() && lean.p.is_none());
        assert_eq!(self.pointwise.is_some(), forward.p.is_some());
        // Backward is told the statistics that forward used.
        for (norm, stats) in self.norms.iter_mut().zip([&forward.stats1, &forward.stats2]) {
            if let Some(norm) = norm {
                assert_eq!(norm.training, stats.is_some());
                norm.stats = stats.clone().or(norm.stats.take());
            }
        }
        let (d, p) = (forward.d.as_deref(), forward.p.as_deref());
        let (unit, saved, gx) = (self.unit(), XUnitSaved { x, d, p }, nan(batch.size()));
        let gradients = xunit_backward_in(layout, &unit, batch, grad, saved, gx, threads).unwrap();
        if planes {
            // The last of what is saved where the gradient will be.
            let (d, there) = if p.is_some() { (d, p) } else { (None, d) };
            let saved = XUnitSaved { x, d, p: None };
            let there = there.unwrap().to_vec();
            let again =
                xunit_backward_in(layout, &unit, batch, grad, saved, there, threads).unwrap();
            same_gradients(&again, &gradients, &gradients.x, "in place");
        }
        for norm in self.norms.iter_mut().flatten().filter(|norm| norm.training) {
            norm.stats = None;
        }
        let back = |t: Vec<T>| if planes { t } else { to_planes(batch, &t) };
        let forward = XUnitForward {
            out: back(forward.out),
            d: forward.d.map(back),
            p: forward.p.map(back),
            ..forward
        };
        (forward, XUnitGradients { x: back(gradients.x), ..gradients })
    }
}

/// `x`: what `got` is to have as the gradient to x.
fn same_gradients<T: Scalar>(
    got: &XUnitGradients<T>,
    want: &XUnitGradients<T>,
    x: &[T],
    how: &str,
) {
    same_bits(&got.x, x, || format!("gradient to x {how}"));
    let parameters = |g: &XUnitGradients<T>| -> Vec<T> {
        let norms = [&g.norm1, &g.norm2].into_iter().flatten();
        let norms = norms.flat_map(|(weight, bias)| [weight, bias]);
        let pointwise = [&g.pointwise_weight, &g.pointwise_bias].into_iter().flatten();
        let all = [&g.weight, &g.bias].into_iter().chain(pointwise).chain(norms);
        all.flatten().copied().collect()
    };
    same_bits(&parameters(got), &parameters(want), || format!("gradients to parameters {how}"));
}

/// (N, H, W, C) from (N, C, H, W).
fn to_channels_last<T: Scalar>(batch: Batch, t: &[T]) -> Vec<T> {
    let at = |i: usize| {
        let (pixel, c) = (i / batch.c, i % batch.c);
        let (n, pixel) = (pixel / batch.plane(), pixel % batch.plane());
        t[(n * batch.c + c) * batch.plane() + pixel]
    };
    (0..t.len()).map(at).collect()
}

/// The way back.
fn to_planes<T: Scalar>(batch: Batch, t: &[T]) -> Vec<T> {
    let at = |i: usize| {
        let (plane, pixel) = (i / batch.plane(), i % batch.plane());
        let (n, c) = (plane / batch.c, plane % batch.c);
        t[(n * batch.plane() + pixel) * batch.c + c]
    };
    (0..t.len()).map(at).collect()
}

impl<T: Scalar> OwnedNorm<T> {
    fn norm(&self) -> Norm<'_, T> {
        Norm {
            weight: &self.weight,
            bias: &self.bias,
            stats: self.stats.as_ref().map(|(mean, var)| (&mean[..], &var[..])),
            eps: self.eps,
            training: self.training,
        }
    }
}

fn matches_reference<T: Scalar>(
    unit: &reference::XUnit,
    x: &Array4<f64>,
    grad: &Array4<f64>,
    case: &str,
) {
    let (forward, backward) = (reference::xunit(unit, x), reference::xunit_backward(unit, grad, x));
    let held = held_statistics(unit, grad, x);
    for layout in [Layout::Planes, Layout::ChannelsLast] {
        let want = (forward.clone(), backward.clone(), held.clone());
        matches_in::<T>(layout, unit, (x, grad), want, case);
    }
}

fn matches_in<T: Scalar>(
    layout: Layout,
    unit: &reference::XUnit,
    (x, grad): (&Array4<f64>, &Array4<f64>),
    (want, want_gradients, held): (
        reference::XUnitForward,
        reference::XUnitGradients,
        reference::XUnitGradients,
    ),
    case: &str,
) {
    let (n, c, h, w) = x.dim();
    let batch = Batch::new(&[n, c, h, w]).unwrap();
    let (forward, got) = Owned::<T>::new(unit).run_in(layout, batch, &flat(x), &flat(grad), 2);
    let name = |what: &'static str| {
        move || format!("{what}, {} bytes, {layout:?}, {case}, x {:?}", size_of::<T>(), x.shape())
    };
    close(&forward.out, &want.out, name("out"));
    close(&forward.d.unwrap(), &want.d, name("d"));
    let stats = |got: Option<(Vec<f64>, Vec<f64>)>, want: Option<Stats>, what| {
        assert_eq!(got.is_some(), want.is_some(), "{what}");
        if let (Some(got), Some(want)) = (got, want) {
            // A mean is judged beside the spread it was taken over.
            let (mean, var) = (common::cast::<T>(&got.0), common::cast::<T>(&got.1));
            close_beside(&mean, &want.0, largest(&want.1).sqrt(), name(what));
            close(&var, &want.1, name(what));
        }
    };
    stats(forward.stats1, want.stats1, "statistics 1");
    stats(forward.stats2, want.stats2, "statistics 2");
    if let (Some(got), Some(want)) = (forward.p, want.p) {
        close(&got, &want, name("p"));
    }

    let want = want_gradients;
    close_beside(&got.x, &want.x, largest(&held.x), name("gradient to x"));
    // Sums over few pixels may cancel by chance: one product is the least they are judged beside.
    let product = largest(&held.x) * largest(x);
    let beside = product.max(largest(&held.weight));
    close_beside(&got.weight, &want.weight, beside, name("gradient to weight"));
    let beside = beside.max(largest(&held.bias));
    close_beside(&got.bias, &want.bias, beside, name("gradient to bias"));
    let biased = unit.pointwise.as_ref().is_some_and(|(_, bias)| bias.is_some());
    assert_eq!(got.pointwise_weight.is_some(), unit.pointwise.is_some());
    assert_eq!(got.pointwise_bias.is_some(), biased);
    if let (Some((weight, bias)), Some(held)) = (&want.pointwise, &held.pointwise) {
        let beside = product.max(largest(&held.0));
        let got_weight = got.pointwise_weight.unwrap();
        close_beside(&got_weight, weight, beside, name("gradient to pointwise weight"));
        if let Some(got) = got.pointwise_bias {
            let beside = beside.max(largest(&held.1));
            close_beside(&got, bias, beside, name("gradient to pointwise bias"));
        }
    }
    for (got, want, held, what) in [
        (got.norm1, want.norm1, held.norm1, ["gradient to norm 1 weight", "… norm 1 bias"]),
        (got.norm2, want.norm2, held.norm2, ["gradient to norm 2 weight", "… norm 2 bias"]),
    ] {
        assert_eq!(got.is_some(), want.is_some(), "{what:?}");
        if let (Some(got), Some(want), Some(held)) = (got, want, held) {
            let beside = product.max(largest(&held.0)).max(largest(&held.1));
            close_beside(&got.0, &want.0, beside, name(what[0]));
            close_beside(&got.1, &want.1, beside, name(what[1]));
        }
    }
}

/// Room for so many elements from the start of a cache line on.
struct Aligned(Vec<f32>, usize);

impl Aligned {
    fn new(len: usize) -> Self {
        let room = nan::<f32>(len + 15);
        let start = room.as_ptr().align_offset(64);
        Self(room, start)
    }

    fn get(&mut self) -> &mut [f32] {
        let (start, len) = (self.1, self.0.len() - 15);
        &mut self.0[start..start + len]
    }
}

/// Large results, where they are aligned, go past the caches.
#[test]
fn large_results_are_the_same_past_the_caches() {
    on_every_isa("large_results_are_the_same_past_the_caches", || {
        let mut noise = Noise::new(11);
        // Of the dense unit in evaluation tiles of several bands, from one side to the other; the last band of 97
        // rows has no row that is not known.
        let (many, odd, wide) = ([1, 300, 96, 80], [1, 300, 97, 80], [1, 48, 60, 1408]);
        let small = [512, 70, 8, 8];
        for (dims, variant) in [many, odd, wide, small]
            .into_iter()
            .flat_map(|dims| VARIANTS.map(|variant| (dims, variant)))
        {
            let (batch, threads) = (Batch::new(&dims).unwrap(), Threads::Own(2));
            let (modes, c) = ([Mode::Training; 2], batch.c);
            let modes = if variant == Variant::Slim { [Mode::None, modes[1]] } else { modes };
            let mut owned =
                Owned::<f32>::new(&unit(&mut noise, c, (variant, Gate::Sigmoid, modes), 7, true));
            let [x, grad] = [(); 2].map(|()| flat::<f32, _>(&noise.array(batch.size())));
            let want = xunit_forward(&owned.unit(), batch, &x, true, 2).unwrap();
            let name = |what: &'static str| move || format!("{what}, {variant:?}, {dims:?}");

            let [mut out, mut d, mut p] = [(); 3].map(|()| Aligned::new(batch.size()));
            let mut stats = [(); 4].map(|()| vec![0.0; c]);
            let [mean1, var1, mean2, var2] = &mut stats;
            let dense = variant == Variant::Dense;
            for save in [false, true] {
                let of = |mean, var| Some(ops::BatchStats { mean, var, running: None });
                let output = ops::XUnitOutput {
                    out: out.get(),
                    d: save.then(|| d.get()),
                    p: (save && dense).then(|| p.get()),
                    stats1: of(&mut mean1[..], &mut var1[..]).filter(|_| variant != Variant::Slim),
                    stats2: of(&mut mean2[..], &mut var2[..]),
                };
                let unit = owned.unit();
                ops::xunit_forward(&unit, batch, Layout::Planes, &x, output, threads).unwrap();
                same_bits(out.get(), &want.out, name("out"));
            }
            let d_want = want.d.as_deref().unwrap();
            same_bits(d.get(), d_want, name("d"));

            for (norm, stats) in owned.norms.iter_mut().zip([want.stats1, want.stats2]) {
                if let Some(norm) = norm {
                    norm.stats = stats;
                }
            }
            let saved = XUnitSaved { x: &x, d: Some(d_want), p: want.p.as_deref() };
            let unit = owned.unit();
            // With statistics given, each strip is gated at once.
            let want_out = xunit_forward(&unit, batch, &x, false, 2).unwrap().out;
            let kept = xunit_forward(&unit, batch, &x, true, 1).unwrap().out;
            same_bits(&want_out, &kept, name("out in evaluation, one thread, d and p kept"));
            let output =
                ops::XUnitOutput { out: out.get(), d: None, p: None, stats1: None, stats2: None };
            ops::xunit_forward(&unit, batch, Layout::Planes, &x, output, threads).unwrap();
            same_bits(out.get(), &want_out, name("out in evaluation"));
            let want = xunit_backward(&unit, batch, &grad, saved, 2).unwrap();
            let [mut weight, mut bias] = [nan(c * 49), nan(c)];
            let mut norms = [(); 4].map(|()| nan(c));
            let [w1, b1, w2, b2] = &mut norms;
            let (mut gw, mut gb) = (nan(c * c), nan(c));
            let gradients = ops::XUnitGradients {
                x: out.get(),
                pointwise: dense
                    .then(|| ops::PointwiseGradients { weight: &mut gw, bias: Some(&mut gb) }),
                weight: &mut weight,
                bias: Some(&mut bias),
                norm1: (variant != Variant::Slim).then_some((&mut w1[..], &mut b1[..])),
                norm2: Some((&mut w2[..], &mut b2[..])),
            };
            ops::xunit_backward(&unit, batch, Layout::Planes, &grad, saved, gradients, threads)
                .unwrap();
            same_bits(out.get(), &want.x, name("gradient to x"));
            same_bits(&weight, &want.weight, name("gradient to weight"));
            same_bits(&bias, &want.bias, name("gradient to bias"));
            if let (Some(weight), Some(bias)) = (&want.pointwise_weight, &want.pointwise_bias) {
                same_bits(&gw, weight, name("gradient to pointwise weight"));
                same_bits(&gb, bias, name("gradient to pointwise bias"));
            }
        }
        // Whole planes of two images, and one in strips, of which the last one is mostly shorter.
        for (k, dims) in [3, 7, 9, 11].into_iter().flat_map(|k| [(k, many), (k, wide)]) {
            let batch = Batch::new(&dims).unwrap();
            let geometry = Geometry::new(batch, Conv::same(k).unwrap()).unwrap();
            let [x, grad] = [(); 2].map(|()| flat::<f32, _>(&noise.array(batch.size())));
            let weight = flat::<f32, _>(&noise.array(batch.c * k * k));
            let bias = Some(&noise.vec(batch.c).iter().map(|&b| b as f32).collect::<Vec<_>>()[..]);
            let [mut want, mut got] = [(); 2].map(|()| Aligned::new(batch.size() + 1));
            let (want, got) = (&mut want.get()[1..], &mut got.get()[..batch.size()]);
            let threads = Threads::Own(2);
            for to in [&mut *want, &mut *got] {
                ops::depthwise_forward(&geometry, &x, &weight, bias, to, threads).unwrap();
            }
            same_bits(got, want, || format!("depthwise, k = {k}, {dims:?}"));
            for to in [&mut *want, &mut *got] {
                let only = DepthwiseGradients { x: Some(to), weight: None, bias: None };
                ops::depthwise_backward(&geometry, &grad, &x, &weight, only, threads).unwrap();
            }
            same_bits(got, want, || format!("depthwise's input gradient, k = {k}, {dims:?}"));
        }
        for k in [3, 7] {
            let threads = Threads::Own(2);
            // 304 channels are whole vectors.
            let batch = Batch::new(&[2, 304, 96, 40]).unwrap();
            let geometry = Geometry::new(batch, Conv::same(k).unwrap()).unwrap();
            let x = flat::<f32, _>(&noise.array(batch.size()));
            let weight = flat::<f32, _>(&noise.array(304 * k * k));
            let mut want = nan::<f32>(batch.size());
            let convolve = |y: &mut [f32]| {
                ops::depthwise_forward_channels_last(&geometry, &x, &weight, None, y, threads)
                    .unwrap();
            };
            convolve(&mut want);
            let mut y = Aligned::new(batch.size());
            convolve(y.get());
            same_bits(y.get(), &want, || format!("depthwise in channels_last, k = {k}"));
            let modes = [Mode::Evaluation; 2];
            let kind = (Variant::Full, Gate::Sigmoid, modes);
            let owned = Owned::<f32>::new(&unit(&mut noise, 304, kind, k, true));
            let evaluate = |out: &mut [f32]| {
                ops::xunit_evaluate_channels_last(&owned.unit(), batch, &x, out, threads).unwrap();
            };
            evaluate(&mut want);
            evaluate(y.get());
            same_bits(y.get(), &want, || format!("evaluation in channels_last, k = {k}"));
        }
    });
}

/// The gradients without those of the batch statistics: what training's gradients cancelled from,
/// all but completely where a scale or a bias stands ahead of a batch norm.
fn held_statistics(
    unit: &reference::XUnit,
    grad: &Array4<f64>,
    x: &Array4<f64>,
) -> reference::XUnitGradients {
    let forward = reference::xunit(unit, x);
    let mut held = unit.clone();
    for (norm, stats) in [(&mut held.norm1, forward.stats1), (&mut held.norm2, forward.stats2)] {
        if let (Some(norm), Some(stats)) = (norm, stats) {
            norm.stats = Some(stats);
        }
    }
    reference::xunit_backward(&held, grad, x)
}

/// The largest finite magnitude.
fn largest<'a>(values: impl IntoIterator<Item = &'a f64>) -> f64 {
    values.into_iter().filter(|x| x.is_finite()).fold(0.0, |m, x| m.max(x.abs()))
}

#[test]
fn xunits_match_the_reference() {
    on_every_isa("xunits_match_the_reference", || {
        let mut noise = Noise::new(1);
        for kind in units() {
            for k in [1, 3, 5, 7, 9, 11] {
                let (h, w) = (1 + noise.below(12), 1 + noise.below(40));
                // In channels_last, 19 channels are two whole tiles and more.
                let wide = (k == 3).then(|| (1, 19, 1 + noise.below(4), 1 + noise.below(20)));
                for (n, c, h, w) in [(2, 3, h, w), (1, 1, 3, 2)].into_iter().chain(wide) {
                    let batch = Batch::new(&[n, c, h, w]).unwrap();
                    let biases = noise.below(3) > 0;
                    let (unit, x) = unit_and_input(&mut noise, batch, kind, k, biases);
                    let grad = noise.array(x.raw_dim());
                    let case = format!("{kind:?}, k {k}, biases {biases}");
                    matches_reference::<f32>(&unit, &x, &grad, &case);
                    matches_reference::<f64>(&unit, &x, &grad, &case);
                }
            }
        }
    });
}

/// Planes whose channels are worked off together, sixteen or eight of them, and what is left.
#[test]
fn xunits_of_small_planes_match_the_reference() {
    on_every_isa("xunits_of_small_planes_match_the_reference", || {
        let mut noise = Noise::new(13);
        for (i, kind) in units().enumerate() {
            for k in [[3, 9], [5, 7]][i % 2] {
                let c = [32, 33, 64, 71, 80][noise.below(5)];
                // The reference takes long for products of so many channels.
                let most = if kind.0 == Variant::Dense { [1, 3, 4] } else { [3, 12, 20] };
                let [n, h, w] = most.map(|most| 1 + noise.below(most));
                let dims = [n, c, h, w];
                let batch = Batch::new(&dims).unwrap();
                if batch.n * batch.plane() > 1 {
                    let (unit, x) = unit_and_input(&mut noise, batch, kind, k, k != 5);
                    let grad = noise.array(x.raw_dim());
                    let case = format!("{kind:?}, k {k}, {dims:?}");
                    matches_reference::<f32>(&unit, &x, &grad, &case);
                }
            }
        }
    });
}

/// Channels of whole vectors, which in channels_last are worked off as they lie: several bands of rows, several
/// chunks of channels, several tasks of an image. Pointwise products of short planes are made so, too.
#[test]
fn xunits_of_whole_vectors_of_channels_match_the_reference() {
    on_every_isa("xunits_of_whole_vectors_of_channels_match_the_reference", || {
        let mut noise = Noise::new(14);
        for (i, kind) in units().enumerate() {
            let dense = kind.0 == Variant::Dense;
            // The reference takes long for products of so many channels.
            let all = match dense {
                true => [[1, 16, 3, 34], [2, 16, 5, 9], [1, 32, 5, 8]],
                false => [[1, 16, 9, 40], [3, 32, 7, 9], [2, 48, 5, 7]],
            };
            for (j, dims) in all.into_iter().enumerate() {
                let k = [3, 5, 7, 9][(i + j) % 4];
                let batch = Batch::new(&dims).unwrap();
                let (unit, x) = unit_and_input(&mut noise, batch, kind, k, k != 5);
                let grad = noise.array(x.raw_dim());
                let case = format!("{kind:?}, k {k}, {dims:?}");
                matches_reference::<f32>(&unit, &x, &grad, &case);
            }
        }
        // Products of several images in a panel, several panels, the last one smaller; many channels.
        for (k, dims) in [(3, [7, 16, 6, 7]), (5, [2, 208, 2, 3])] {
            let kind = (Variant::Dense, Gate::Gaussian, [Mode::Training; 2]);
            let batch = Batch::new(&dims).unwrap();
            let (unit, x) = unit_and_input(&mut noise, batch, kind, k, true);
            let grad = noise.array(x.raw_dim());
            matches_reference::<f32>(&unit, &x, &grad, &format!("{kind:?}, {dims:?}"));
        }
        // Several bands of rows, however many lanes there are, and more images than groups.
        for (variant, gate, first, second) in [
            (Variant::Full, Gate::Sigmoid, Mode::Training, Mode::Training),
            (Variant::Full, Gate::Gaussian, Mode::Evaluation, Mode::Evaluation),
            (Variant::Slim, Gate::Gaussian, Mode::None, Mode::Training),
        ] {
            for (k, dims) in [(3, [1, 16, 9, 1000]), (5, [67, 16, 2, 3])] {
                let (kind, batch) = ((variant, gate, [first, second]), Batch::new(&dims).unwrap());
                let (unit, x) = unit_and_input(&mut noise, batch, kind, k, true);
                let grad = noise.array(x.raw_dim());
                matches_reference::<f32>(&unit, &x, &grad, &format!("{kind:?}, {dims:?}"));
            }
        }
    });
}

/// The main paths of convolutions and units, as small as can be: what Miri has the time for.
#[test]
fn tiny_tensors() {
    on_every_isa("tiny_tensors", || {
        let mut noise = Noise::new(81);
        let lanes = simd::selected_lanes::<f32>();
        for (k, stride, dims, layout) in [
            (3, 1, [1, 1, 3, lanes + 3], Layout::Planes),
            (3, 2, [1, 1, 3, lanes + 3], Layout::Planes),
            (7, 1, [1, 1, 2, lanes + 1], Layout::Planes),
            (3, 1, [2, lanes + 1, 2, 3], Layout::Planes),
            (5, 2, [1, lanes + 1, 3, 2], Layout::ChannelsLast),
            // Tiles of a side and of none.
            (3, 1, [1, lanes, 2, 17], Layout::ChannelsLast),
            (3, 1, [1, 1, 2, 2], Layout::ChannelsLast),
        ] {
            let conv = Conv { stride: [stride; 2], ..Conv::same(k).unwrap() };
            let geometry = Geometry::new(Batch::new(&dims).unwrap(), conv).unwrap();
            depthwise_in::<f32>(layout, &geometry, &mut noise, false);
        }
        for (variant, first, dims) in [
            (Variant::Full, Mode::Training, [1, 2, 3, 5]),
            (Variant::Slim, Mode::None, [1, 4 * lanes.max(8), 2, 2]),
            (Variant::Full, Mode::Training, [1, lanes, 3, 5]),
            (Variant::Dense, Mode::Evaluation, [2, 2, 2, 5]),
        ] {
            let kind = (variant, Gate::Gaussian, [first, Mode::Training]);
            let batch = Batch::new(&dims).unwrap();
            let (unit, x) = unit_and_input(&mut noise, batch, kind, 3, true);
            let grad = noise.array(x.raw_dim());
            matches_reference::<f32>(&unit, &x, &grad, &format!("{kind:?}"));
        }
        for variant in [Variant::Full, Variant::Slim] {
            let first = if variant == Variant::Slim { Mode::None } else { Mode::Evaluation };
            let kind = (variant, Gate::Gaussian, [first, Mode::Evaluation]);
            let batch = Batch::new(&[1, 2 * lanes, 2, 3]).unwrap();
            evaluates(&mut noise, kind, 3, batch, false);
        }
    });
}

#[test]
fn large_planes_keep_their_digits() {
    let mut noise = Noise::new(2);
    for variant in VARIANTS {
        let modes = [if variant == Variant::Slim { Mode::None } else { Mode::Training }; 2];
        let kind = (variant, Gate::Sigmoid, [modes[0], Mode::Training]);
        let batch = Batch::new(&[2, 2, 130, 157]).unwrap();
        let unit = unit(&mut noise, batch.c, kind, 7, true);
        // So large an input has values at the kink of the ReLU; they weigh little in the sums.
        let mut x = noise.array((2, 2, 130, 157));
        x.slice_mut(s![1, .., .., ..]).mapv_inplace(|x| x + 0.5);
        let want = reference::xunit(&unit, &x);
        let (got, _) = Owned::<f32>::new(&unit).run(batch, &flat(&x), &flat(&x), 2);
        close(&got.out, &want.out, || format!("out, {kind:?}"));
        for (got, want) in [(got.stats1, want.stats1), (got.stats2, want.stats2)] {
            if let (Some(got), Some(want)) = (got, want) {
                let (mean, var) = (common::cast::<f32>(&got.0), common::cast::<f32>(&got.1));
                close(&mean, &want.0, || format!("mean, {kind:?}"));
                close(&var, &want.1, || format!("variance, {kind:?}"));
            }
        }
    }
}

/// An outlier in the first pixel, which a sum of squares about it would not survive.
#[test]
fn an_outlier_leaves_the_variance_its_digits() {
    let mut noise = Noise::new(3);
    for (h, w) in [(64, 64), (300, 300)] {
        for variant in [Variant::Full, Variant::Slim] {
            let first = if variant == Variant::Slim { Mode::None } else { Mode::Training };
            let kind = (variant, Gate::Sigmoid, [first, Mode::Training]);
            let batch = Batch::new(&[2, 2, h, w]).unwrap();
            let unit = unit(&mut noise, batch.c, kind, 7, true);
            let mut x = noise.array((2, 2, h, w)) * 1e-3;
            x.slice_mut(s![.., .., 0, 0]).fill(100.0);
            let want = reference::xunit(&unit, &x);
            let (got, _) = Owned::<f32>::new(&unit).run(batch, &flat(&x), &flat(&x), 2);
            for (got, want) in [(got.stats1, want.stats1), (got.stats2, want.stats2)] {
                if let (Some((_, got)), Some((_, want))) = (got, want) {
                    let case = || format!("variance, {h} × {w}, {kind:?}");
                    close(&common::cast::<f32>(&got), &want, case);
                }
            }
        }
    }
}

#[test]
fn running_statistics_follow_the_batch() {
    let mut noise = Noise::new(12);
    let kind = (Variant::Full, Gate::Sigmoid, [Mode::Training; 2]);
    let batch = Batch::new(&[2, 3, 5, 7]).unwrap();
    let (unit, x) = unit_and_input(&mut noise, batch, kind, 3, true);
    let (got, _) = Owned::<f32>::new(&unit).run(batch, &flat(&x), &flat(&x), 2);
    for (stats, running) in [(got.stats1, got.running1), (got.stats2, got.running2)] {
        let ((mean, var), (running_mean, running_var)) = (stats.unwrap(), running.unwrap());
        let want: Vec<_> = mean.iter().map(|mean| 0.25 * mean).collect();
        close(&running_mean, &want, || "running mean".to_owned());
        // The running variance is the unbiased one, of 70 values.
        let want: Vec<_> = var.iter().map(|var| 0.75 + 0.25 * var * 70.0 / 69.0).collect();
        close(&running_var, &want, || "running variance".to_owned());
    }
}

#[test]
fn nan_and_infinity_go_where_the_definition_sends_them() {
    on_every_isa("nan_and_infinity_go_where_the_definition_sends_them", || {
        let mut noise = Noise::new(4);
        for kind in units() {
            for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                for k in [3, 5] {
                    bad_goes_where_it_should(&mut noise, kind, k, [2, 3, 9, 21], bad);
                }
            }
        }
    });
}

/// The same of planes whose channels are worked off together.
#[test]
fn nan_and_infinity_in_small_planes() {
    on_every_isa("nan_and_infinity_in_small_planes", || {
        let mut noise = Noise::new(5);
        let modes = [Mode::Training, Mode::Evaluation, Mode::None];
        let full = modes.map(|mode| (Variant::Full, Gate::Sigmoid, [mode; 2]));
        let slim = modes.map(|mode| (Variant::Slim, Gate::Sigmoid, [Mode::None, mode]));
        // The reference takes long for so many channels.
        for kind in full.into_iter().chain(slim) {
            for bad in [f64::NAN, f64::INFINITY] {
                // In channels_last, 32 channels are worked off as they lie.
                for dims in [[2, 65, 2, 5], [1, 32, 3, 6]] {
                    bad_goes_where_it_should(&mut noise, kind, 3, dims, bad);
                }
            }
        }
    });
}

/// `bad` somewhere in x, then in the gradient.
fn bad_goes_where_it_should(
    noise: &mut Noise,
    kind: (Variant, Gate, [Mode; 2]),
    k: usize,
    dims: [usize; 4],
    bad: f64,
) {
    // An infinity in a batch makes statistics whose mean depends on how it is summed.
    if kind.2.contains(&Mode::Training) && bad.is_infinite() {
        return;
    }
    let batch = Batch::new(&dims).unwrap();
    let (unit, mut x) = unit_and_input(noise, batch, kind, k, true);
    let mut grad = noise.array(x.raw_dim());
    let case = format!("{bad} in x, {kind:?}, k {k}");
    let at = noise.below(x.len());
    let finite = std::mem::replace(&mut x.as_slice_mut().unwrap()[at], bad);
    matches_reference::<f32>(&unit, &x, &grad, &case);
    matches_reference::<f64>(&unit, &x, &grad, &case);
    x.as_slice_mut().unwrap()[at] = finite;
    grad.as_slice_mut().unwrap()[noise.below(x.len())] = bad;
    let case = format!("{bad} in grad, {kind:?}, k {k}");
    matches_reference::<f32>(&unit, &x, &grad, &case);
    matches_reference::<f64>(&unit, &x, &grad, &case);
}

#[test]
fn a_constant_plane_in_training_is_its_bias() {
    let mut noise = Noise::new(6);
    let kind = (Variant::Slim, Gate::Sigmoid, [Mode::None, Mode::Training]);
    let unit = unit(&mut noise, 2, kind, 1, true);
    let x = Array4::from_elem((2, 2, 5, 19), 0.7f32.into());
    let grad = noise.array(x.raw_dim());
    let (got, _) = Owned::<f32>::new(&unit).run(
        Batch::new(&[2, 2, 5, 19]).unwrap(),
        &flat(&x),
        &flat(&grad),
        1,
    );
    let (_, var) = got.stats2.unwrap();
    assert!(var.iter().all(|&v| (0.0..1e-12).contains(&v)), "{var:?}");
    let bias = &unit.norm2.as_ref().unwrap().bias;
    let want = Array4::from_shape_fn(x.raw_dim(), |at| x[at] / (1.0 + (-bias[at.1]).exp()));
    // 1 / √ε ≈ 316 times the rounding of d.
    let worst = got.out.iter().zip(&want).map(|(a, b)| (f64::from(*a) - b).abs());
    assert!(worst.fold(0.0, f64::max) < 1e-4);
}

#[test]
fn xunits_have_the_same_bits_at_every_thread_count() {
    fn threads_in<T: Scalar>(unit: &reference::XUnit, batch: Batch, noise: &mut Noise) {
        for layout in [Layout::Planes, Layout::ChannelsLast] {
            threads_of::<T>(layout, unit, batch, noise);
        }
    }
    fn threads_of<T: Scalar>(
        layout: Layout,
        unit: &reference::XUnit,
        batch: Batch,
        noise: &mut Noise,
    ) {
        let (x, grad): (Vec<T>, Vec<T>) =
            (common::cast(&noise.vec(batch.size())), common::cast(&noise.vec(batch.size())));
        let outputs = |threads| {
            let (f, g) = Owned::<T>::new(unit).run_in(layout, batch, &x, &grad, threads);
            let pairs = [f.running1, f.running2, g.norm1, g.norm2].into_iter().flatten();
            let rest = [f.d, f.p, g.pointwise_weight, g.pointwise_bias].into_iter().flatten();
            let all = [f.out, g.x, g.weight, g.bias].into_iter().chain(rest);
            all.chain(pairs.flat_map(|(a, b)| [a, b])).collect::<Vec<_>>()
        };
        let want = outputs(1);
        for threads in [2, 3, 7, 0] {
            let got = outputs(threads);
            assert_eq!(got.len(), want.len());
            for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                same_bits(got, want, || format!("output {i}, {layout:?}, {threads} threads"));
            }
        }
    }
    let mut noise = Noise::new(8);
    // Fewer and more panels than the partial sums of the pointwise weight, of several images and of many channels, too;
    // fewer and more channels than threads, and than groups of channels.
    for batch in [
        [1, 5, 17, 23],
        [3, 2, 9, 33],
        [19, 3, 6, 7],
        [2, 19, 33, 29],
        [6, 70, 8, 9],
        [3, 48, 33, 29],
        [20, 16, 10, 25],
        [3, 208, 11, 12],
    ] {
        let batch = Batch::new(&batch).unwrap();
        for kind in units() {
            let unit = unit(&mut noise, batch.c, kind, 5, true);
            threads_in::<f32>(&unit, batch, &mut noise);
            threads_in::<f64>(&unit, batch, &mut noise);
        }
    }
}

/// Tiles of the dense unit in evaluation, of which there are more for more threads: where minimal filtering meets an
/// infinity, too.
#[test]
fn dense_tiles_have_the_same_bits_at_every_thread_count() {
    on_every_isa("dense_tiles_have_the_same_bits_at_every_thread_count", || {
        let mut noise = Noise::new(21);
        for (k, dims) in [
            (7, [1, 16, 130, 20]),
            (9, [1, 4, 119, 900]),
            (7, [1, 300, 97, 80]),
            (5, [1, 30, 99, 9]),
        ] {
            let batch = Batch::new(&dims).unwrap();
            let kind = (Variant::Dense, Gate::Sigmoid, [Mode::Evaluation; 2]);
            let owned = Owned::<f32>::new(&unit(&mut noise, batch.c, kind, k, true));
            let mut x: Vec<f32> = common::cast(&noise.vec(batch.size()));
            for spoiled in [false, true] {
                if spoiled {
                    // In one strip alone.
                    x[batch.w * 5 + batch.w / 2] = f32::INFINITY;
                }
                let out =
                    |threads| xunit_forward(&owned.unit(), batch, &x, false, threads).unwrap().out;
                let want = out(1);
                assert_eq!(want.iter().all(|x| x.is_finite()), !spoiled);
                for threads in [2, 3, 8] {
                    same_bits(&out(threads), &want, || format!("{dims:?}, {threads} threads"));
                }
            }
        }
    });
}

#[test]
fn depthwise_has_the_same_bits_at_every_thread_count() {
    fn threads_in<T: Scalar>(geometry: &Geometry, noise: &mut Noise) {
        let Geometry { input, conv, .. } = *geometry;
        let mut vec = |len: usize| common::cast::<T>(&noise.vec(len));
        let (x, grad) = (vec(input.size()), vec(geometry.output().size()));
        let (weight, bias) = (vec(input.c * conv.kh * conv.kw), vec(input.c));
        let outputs = |threads| {
            let y = depthwise_forward(geometry, &x, &weight, Some(&bias), threads).unwrap();
            let g = depthwise_backward(geometry, &grad, &x, &weight, [true; 3], threads).unwrap();
            [y, g.x.unwrap(), g.weight.unwrap(), g.bias.unwrap()]
        };
        let want = outputs(1);
        for threads in [2, 3, 7, 0] {
            for (i, (got, want)) in outputs(threads).iter().zip(&want).enumerate() {
                same_bits(got, want, || format!("output {i}, {threads} threads, {geometry:?}"));
            }
        }
    }
    let mut noise = Noise::new(10);
    for (n, c) in [(1, 1), (1, 8), (5, 3)] {
        let input = Batch::new(&[n, c, 37, 53]).unwrap();
        for k in [3, 4, 9] {
            for (stride, dilation) in [([1, 1], [1, 1]), ([2, 3], [1, 1]), ([1, 1], [3, 2])] {
                let conv = Conv { kh: k, kw: k, stride, padding: [1, 0, 3, 2], dilation };
                let geometry = Geometry::new(input, conv).unwrap();
                threads_in::<f32>(&geometry, &mut noise);
                threads_in::<f64>(&geometry, &mut noise);
            }
        }
    }
}

/// (N, C, H, W) in the order (N, H, W, C).
fn channels_last<T: Scalar>(array: &Array4<f64>) -> Vec<T> {
    flat(&array.view().permuted_axes([0, 2, 3, 1]).to_owned())
}

/// Everything that the operations do in this layout; `spoil` puts what is not finite into the tensors.
fn depthwise_in<T: Scalar>(layout: Layout, geometry: &Geometry, noise: &mut Noise, spoil: bool) {
    let planes = layout == Layout::Planes;
    let forward =
        if planes { ops::depthwise_forward } else { ops::depthwise_forward_channels_last };
    let backward =
        if planes { ops::depthwise_backward } else { ops::depthwise_backward_channels_last };
    let lay = |array: &Array4<f64>| if planes { flat(array) } else { channels_last(array) };
    let Geometry { input, conv, .. } = *geometry;
    let (output, taps) = (geometry.output(), conv.kh * conv.kw);
    let mut spoilt = |dims: [usize; 4]| {
        let mut values = noise.vec(dims.iter().product());
        if spoil {
            noise.spoil(&mut values);
        }
        Array4::from_shape_vec(dims, values).unwrap()
    };
    let (x, grad) = (spoilt(input.dims()), spoilt(output.dims()));
    let weight: Array3<f64> = noise.array((input.c, conv.kh, conv.kw));
    let bias: Array1<f64> = noise.array(input.c);
    let y = reference::depthwise(&x, &weight, Some(&bias), &conv);
    let (gx, gweight, gbias) = reference::depthwise_backward(&grad, &x, &weight, &conv);
    let [x, grad] = [x, grad].map(|array| common::cast::<T>(&lay(&array)));
    let (weight, bias) = (flat::<T, _>(&weight), flat::<T, _>(&bias));
    let case = || format!("{} {} {geometry:?}", size_of::<T>(), simd::selected());
    let mut alone: Option<[Vec<T>; 4]> = None;
    for threads in [1, 3] {
        let threads = Threads::Own(threads);
        let mut got = nan::<T>(output.size());
        forward(geometry, &x, &weight, Some(&bias), &mut got, threads).unwrap();
        close_beside(&got, &lay(&y), 1.0, || format!("y, {}", case()));
        let (mut of_x, mut of_weight) = (nan::<T>(input.size()), nan::<T>(input.c * taps));
        let mut of_bias = nan::<T>(input.c);
        let gradients = DepthwiseGradients {
            x: Some(&mut of_x),
            weight: Some(&mut of_weight),
            bias: Some(&mut of_bias),
        };
        backward(geometry, &grad, &x, &weight, gradients, threads).unwrap();
        close_beside(&of_x, &lay(&gx), 1.0, || format!("gx, {}", case()));
        close_beside(&of_weight, &gweight, 1.0, || format!("gweight, {}", case()));
        close_beside(&of_bias, &gbias, 1.0, || format!("gbias, {}", case()));
        // The same whatever else is asked for, and on however many threads.
        let mut bias_alone = nan::<T>(input.c);
        let gradients = DepthwiseGradients { x: None, weight: None, bias: Some(&mut bias_alone) };
        backward(geometry, &grad, &x, &weight, gradients, threads).unwrap();
        same_bits(&bias_alone, &of_bias, || format!("gbias alone, {}", case()));
        let mut weight_alone = nan::<T>(input.c * taps);
        let gradients = DepthwiseGradients { x: None, weight: Some(&mut weight_alone), bias: None };
        backward(geometry, &grad, &x, &weight, gradients, threads).unwrap();
        same_bits(&weight_alone, &of_weight, || format!("gweight alone, {}", case()));
        let all = [got, of_x, of_weight, of_bias];
        for (i, all) in all.iter().enumerate() {
            let alone = alone.as_ref().map_or(all, |alone| &alone[i]);
            same_bits(all, alone, || format!("output {i}, {threads:?}, {}", case()));
        }
        alone = Some(all);
    }
}

/// Planes of rows that are shorter than vectors, whose channels are the vectors then.
#[test]
fn depthwise_of_small_planes() {
    on_every_isa("depthwise_of_small_planes", || {
        let mut noise = Noise::new(78);
        let check = |conv: Conv, dims: [usize; 4], noise: &mut Noise, spoil: bool| {
            if let Ok(geometry) = Geometry::new(Batch::new(&dims).unwrap(), conv) {
                depthwise_in::<f32>(Layout::Planes, &geometry, noise, spoil);
            }
        };
        for k in [3, 5, 7, 9] {
            for stride in [1, 2] {
                for w in (1..=22).chain([31, 48]) {
                    let kh = [2, 3, 5, 7, 9][noise.below(5)];
                    let mut below = |n: usize| noise.below(n);
                    let padding = [below(kh), below(kh), below(k), below(k)];
                    let dims =
                        [1 + below(3), [15, 16, 17, 31, 40, 150][below(6)], 1 + below(12), w];
                    let conv = Conv { kh, kw: k, stride: [stride; 2], padding, dilation: [1, 1] };
                    check(conv, dims, &mut noise, w % 4 == 0);
                }
                // Several images for each sum, several chunks.
                let conv = Conv { stride: [stride; 2], ..Conv::same(k).unwrap() };
                check(conv, [70, 33, 6, 7], &mut noise, false);
            }
        }
    });
}

/// Where they are aligned, whole lines and not; beside results that are not.
#[test]
fn depthwise_of_small_planes_is_the_same_past_the_caches() {
    on_every_isa("depthwise_of_small_planes_is_the_same_past_the_caches", || {
        let mut noise = Noise::new(80);
        for (dims, stride) in [([65, 512, 8, 8], 1), ([84, 513, 7, 7], 1), ([40, 96, 47, 47], 2)] {
            let conv = Conv { stride: [stride; 2], ..Conv::same(3).unwrap() };
            let geometry = Geometry::new(Batch::new(&dims).unwrap(), conv).unwrap();
            let sizes = [geometry.input.size(), geometry.output().size(), dims[1] * 9];
            let [x, grad, weight] = sizes.map(|len| common::cast::<f32>(&noise.vec(len)));
            let [mut y, mut gx] = [sizes[1], sizes[0]].map(|len| Aligned::new(len + 1));
            let mut run = |from: usize| {
                let y = &mut y.get()[from..][..sizes[1]];
                ops::depthwise_forward(&geometry, &x, &weight, None, y, Threads::Own(2)).unwrap();
                let gx = &mut gx.get()[from..][..sizes[0]];
                let gradients = DepthwiseGradients { x: Some(&mut *gx), ..Default::default() };
                let threads = Threads::Own(2);
                ops::depthwise_backward(&geometry, &grad, &x, &weight, gradients, threads).unwrap();
                (y.to_vec(), gx.to_vec())
            };
            let (want, got) = (run(1), run(0));
            same_bits(&got.0, &want.0, || format!("y, {dims:?}"));
            same_bits(&got.1, &want.1, || format!("gradient to x, {dims:?}"));
        }
    });
}

/// What is not finite where planes are filtered, in strips that are higher than padded planes have them.
#[test]
fn depthwise_of_what_is_not_finite() {
    on_every_isa("depthwise_of_what_is_not_finite", || {
        let mut noise = Noise::new(79);
        for (k, h, w) in [(7, 300, 130), (9, 176, 176), (11, 176, 176)] {
            let input = Batch::new(&[1, 1, h, w]).unwrap();
            let geometry = Geometry::new(input, Conv::same(k).unwrap()).unwrap();
            depthwise_in::<f32>(Layout::Planes, &geometry, &mut noise, true);
        }
    });
}

#[test]
fn depthwise_in_channels_last() {
    fn check_in<T: Scalar>(geometry: &Geometry, noise: &mut Noise, spoil: bool) {
        depthwise_in::<T>(Layout::ChannelsLast, geometry, noise, spoil);
    }
    on_every_isa("depthwise_in_channels_last", || {
        let mut noise = Noise::new(77);
        for c in (1..=33).chain([40, 64]) {
            let k = [1, 2, 3, 5, 7, 9][c % 6];
            let kw = [1, 3, 4, 7][c % 4];
            let mut extent = || 1 + noise.below(17);
            let input = Batch::new(&[1 + c % 2, c, k + extent(), kw + extent()]).unwrap();
            let mut below = |k: usize| noise.below(k);
            let padding = [below(k), below(k), below(kw), below(kw)];
            let conv = Conv { kh: k, kw, stride: [1, 1], padding, dilation: [1, 1] };
            let geometry = Geometry::new(input, conv).unwrap();
            check_in::<f32>(&geometry, &mut noise, c % 3 == 0);
            check_in::<f64>(&geometry, &mut noise, c % 3 == 0);
        }
        // Strides, dilations, and more padding than the kernel extends.
        for c in (1..=33).chain([40, 64]) {
            let (kh, kw) = ([1, 2, 3, 5][c % 4], [1, 3, 4, 7][c % 3]);
            let mut upto = |n: usize| 1 + noise.below(n);
            let (stride, dilation) = ([upto(3), upto(3)], [upto(3), upto(2)]);
            let input = Batch::new(&[1 + c % 2, c, 2 * kh + upto(20), kw + 4 + upto(20)]).unwrap();
            let mut below = |n: usize| noise.below(n);
            let padding = [below(kh + 2), below(kh + 2), below(kw + 2), below(kw + 2)];
            let conv = Conv { kh, kw, stride, padding, dilation };
            let Ok(geometry) = Geometry::new(input, conv) else {
                continue;
            };
            check_in::<f32>(&geometry, &mut noise, c % 3 == 0);
            check_in::<f64>(&geometry, &mut noise, c % 3 == 0);
        }
        // Several strips.
        let conv = Conv { stride: [2, 2], padding: [1; 4], ..Conv::same(3).unwrap() };
        for (h, w, stride) in [(300, 40, [2, 2]), (41, 700, [2, 1]), (50, 300, [1, 2])] {
            let batch = Batch::new(&[1, 17, h, w]).unwrap();
            let geometry = Geometry::new(batch, Conv { stride, ..conv }).unwrap();
            check_in::<f32>(&geometry, &mut noise, h == 50);
        }
        let tall = Batch::new(&[1, 17, 300, 40]).unwrap();
        let geometry = Geometry::new(tall, Conv::same(7).unwrap()).unwrap();
        check_in::<f32>(&geometry, &mut noise, false);
        // As pixels lie in memory: every width of a tile, every padding, channels that are no whole vectors.
        for k in [3, 5, 7, 9] {
            for stride in [1, 2] {
                for w in (1..=20).chain([31, 35, 64, 67, 130]) {
                    let kh = [2, 3, 5, 7, 9][noise.below(5)];
                    let mut below = |n: usize| noise.below(n);
                    let padding = [below(kh), below(kh), below(k), below(k)];
                    let c = [16, 17, 24, 31, 40][below(5)];
                    let input = Batch::new(&[1 + below(2), c, 1 + below(12), w]).unwrap();
                    let conv = Conv { kh, kw: k, stride: [stride; 2], padding, dilation: [1, 1] };
                    if let Ok(geometry) = Geometry::new(input, conv) {
                        check_in::<f32>(&geometry, &mut noise, w % 4 == 0);
                    }
                }
                // Several chunks of channels, strips of rows, groups of images.
                for (n, c, h, w) in [(1, 200, 70, 9), (70, 16, 3, 5), (2, 130, 33, 12)] {
                    let input = Batch::new(&[n, c, h, w]).unwrap();
                    let conv = Conv { stride: [stride; 2], ..Conv::same(k).unwrap() };
                    check_in::<f32>(&Geometry::new(input, conv).unwrap(), &mut noise, false);
                }
            }
        }
        // Few images, of channels that are no multiple of those of a task.
        for c in [72, 80, 96, 100, 144, 192] {
            let input = Batch::new(&[1 + c % 3, c, 14, 13]).unwrap();
            let geometry = Geometry::new(input, Conv::same(3).unwrap()).unwrap();
            check_in::<f32>(&geometry, &mut noise, false);
        }
        // More rows of a gradient than all phases read at a time.
        let conv = Conv { stride: [2, 2], ..Conv::same(3).unwrap() };
        let input = Batch::new(&[1, 128, 96, 96]).unwrap();
        check_in::<f32>(&Geometry::new(input, conv).unwrap(), &mut noise, false);
        // Infinite taps meet the zeros of the padding.
        let input = Batch::new(&[1, 17, 6, 7]).unwrap();
        let geometry = Geometry::new(input, Conv::same(3).unwrap()).unwrap();
        let (x, mut weight) = (noise.array(input.dims()), noise.array((17, 3, 3)));
        weight[[16, 0, 0]] = f64::INFINITY;
        let x: Array4<f64> = x.into_dimensionality().unwrap();
        let want = reference::depthwise(&x, &weight, None, &geometry.conv);
        let mut got = nan::<f32>(input.size());
        let (x, weight) = (channels_last::<f32>(&x), flat::<f32, _>(&weight));
        let one = Threads::Own(1);
        ops::depthwise_forward_channels_last(&geometry, &x, &weight, None, &mut got, one).unwrap();
        assert!(got[16].is_nan());
        close_beside(&got, &channels_last::<f64>(&want), 1.0, || "infinite taps".into());
    });
}

#[track_caller]
#[test]
fn xunits_evaluate_in_channels_last() {
    on_every_isa("xunits_evaluate_in_channels_last", || {
        let mut noise = Noise::new(78);
        let lanes = simd::selected_lanes::<f32>();
        let given = |(_, _, modes): &(Variant, Gate, [Mode; 2])| !modes.contains(&Mode::Training);
        for kind in units().filter(given) {
            for k in [1, 3, 5, 7, 9, 11] {
                // One pixel; every tail of a tile; several tasks of rows and columns.
                let high = if kind.0 == Variant::Dense && [3, 9].contains(&k) { 100 } else { 20 };
                let large = (2, lanes, high + noise.below(30), 97 + noise.below(110));
                let small = (1, 3 * lanes, 1 + noise.below(9), 1 + noise.below(20));
                // Several bands of a task; chunks of several vectors, the last one larger than the others.
                let some = kind.0 != Variant::Dense && kind.1 == Gate::Sigmoid && k == 3;
                let more = if some { &[(16, 64, 21, 50), (8, 176, 9, 20)][..] } else { &[] };
                for &(n, c, h, w) in [(1, lanes, 1, 1), small, large].iter().chain(more) {
                    let batch = Batch::new(&[n, c, h, w]).unwrap();
                    let spoil = kind.0 != Variant::Dense && [5, 9].contains(&k);
                    evaluates(&mut noise, kind, k, batch, spoil);
                }
            }
        }
    });
}

/// A unit in channels_last is what the reference is, the same at one thread and at three.
fn evaluates(
    noise: &mut Noise,
    kind: (Variant, Gate, [Mode; 2]),
    k: usize,
    batch: Batch,
    spoil: bool,
) {
    let biases = noise.below(3) > 0;
    let twin = unit(noise, batch.c, kind, k, biases);
    let mut x = noise.vec(batch.size());
    if spoil {
        noise.spoil(&mut x);
    }
    let x = Array4::from_shape_vec(batch.dims(), x).unwrap();
    let want = channels_last::<f64>(&reference::xunit(&twin, &x).out);
    let (owned, x) = (Owned::<f32>::new(&twin), channels_last::<f32>(&x));
    let case = || format!("{kind:?}, k {k}, {batch:?}, {}", simd::selected());
    let [one, three] = [1, 3].map(|threads| {
        let mut out = nan::<f32>(batch.size());
        let threads = Threads::Own(threads);
        ops::xunit_evaluate_channels_last(&owned.unit(), batch, &x, &mut out, threads).unwrap();
        out
    });
    close_beside(&one, &want, 1.0, case);
    same_bits(&three, &one, case);
}

#[test]
fn xunits_that_channels_last_does_not_take() {
    let lanes = simd::selected_lanes::<f32>();
    let run = |variant: Variant, modes: [Mode; 2], c: usize, wanted: &str| {
        let mut noise = Noise::new(79);
        let unit =
            Owned::<f32>::new(&unit(&mut noise, c, (variant, Gate::Sigmoid, modes), 3, true));
        let batch = Batch::new(&[1, c, 2, 2]).unwrap();
        let (x, mut out) = (vec![0.0; batch.size()], vec![0.0; batch.size()]);
        let threads = Threads::Own(1);
        let result = ops::xunit_evaluate_channels_last(&unit.unit(), batch, &x, &mut out, threads);
        refused(result, &[wanted]);
    };
    run(Variant::Dense, [Mode::Training, Mode::None], lanes, "statistics");
    run(Variant::Full, [Mode::None; 2], lanes + 1, &(lanes + 1).to_string());
    run(Variant::Full, [Mode::Training, Mode::None], lanes, "statistics");
    run(Variant::Slim, [Mode::None, Mode::Training], lanes, "statistics");
}

fn refused<R>(result: Result<R, ShapeError>, words: &[&str]) {
    let message = result.err().expect("should be refused").to_string();
    assert!(words.iter().all(|word| message.contains(word)), "{message:?} lacks {words:?}");
}

#[test]
fn empty_and_overflowing_batches_are_refused() {
    for shape in [[0, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 1], [1, 1, 1, 0], [0; 4]] {
        refused(Batch::new(&shape), &["positive", &format!("{shape:?}")]);
    }
    // A zero is a zero whatever stands beside it.
    refused(Batch::new(&[usize::MAX, usize::MAX, 0, 1]), &["positive"]);
    let big = isize::MAX as usize;
    for shape in [
        [usize::MAX; 4],
        [1, 1, 1, usize::MAX],
        [1, 1, 1, big / 8 + 1],
        [1 << 16, 1 << 16, 1 << 16, 1 << 16],
        // The product wraps round to 0.
        [1 << 32, 1 << 32, 1, 1],
    ] {
        refused(Batch::new(&shape), &["too large", &format!("{shape:?}")]);
    }
    assert_eq!(Batch::new(&[1, 1, 1, big / 8]).unwrap().size(), big / 8);
    for shape in [&[][..], &[1], &[1, 1, 1], &[1, 1, 1, 1, 1]] {
        refused(Batch::new(shape), &["(N, C, H, W)", &format!("{shape:?}")]);
    }
}

#[test]
fn impossible_convolutions_are_refused() {
    let input = Batch::new(&[1, 1, 6, 7]).unwrap();
    let conv = Conv { kh: 3, kw: 3, stride: [1, 1], padding: [0; 4], dilation: [1, 1] };
    for (kh, kw) in [(0, 3), (3, 0)] {
        refused(
            Geometry::new(input, Conv { kh, kw, ..conv }),
            &["positive", &format!("{kh}×{kw}")],
        );
    }
    for pair in [[0, 1], [1, 0]] {
        refused(Geometry::new(input, Conv { stride: pair, ..conv }), &["positive"]);
        refused(Geometry::new(input, Conv { dilation: pair, ..conv }), &["positive"]);
    }
    refused(Geometry::new(input, Conv { kh: 7, ..conv }), &["7×3", "6×7"]);
    refused(Geometry::new(input, Conv { kw: 8, ..conv }), &["3×8", "6×7"]);
    refused(Geometry::new(input, Conv { dilation: [3, 1], ..conv }), &["7×3"]);
    for huge in [usize::MAX, usize::MAX / 2, 1 << 60, (1 << 24) + 1] {
        refused(Geometry::new(input, Conv { kh: huge, ..conv }), &["too large"]);
        refused(Geometry::new(input, Conv { kw: huge, ..conv }), &["too large"]);
        for i in 0..2 {
            let with = |mut pair: [usize; 2]| {
                pair[i] = huge;
                pair
            };
            refused(Geometry::new(input, Conv { stride: with([1, 1]), ..conv }), &["too large"]);
            refused(Geometry::new(input, Conv { dilation: with([1, 1]), ..conv }), &["too large"]);
        }
        for i in 0..4 {
            let mut padding = [0; 4];
            padding[i] = huge;
            refused(Geometry::new(input, Conv { padding, ..conv }), &["too large"]);
        }
    }
    // Padding that is allowed by itself, but not for so many planes.
    let many = Batch::new(&[1 << 12, 1 << 12, 1, 1]).unwrap();
    let wide = Conv { padding: [1 << 24; 4], ..conv };
    refused(Geometry::new(many, wide), &["too large"]);
    // The largest kernel that fits, and a stride beyond the input.
    let all = Geometry::new(input, Conv { kh: 6, kw: 7, ..conv }).unwrap();
    assert_eq!((all.oh, all.ow), (1, 1));
    let one = Geometry::new(input, Conv { stride: [100, 100], ..conv }).unwrap();
    assert_eq!((one.oh, one.ow), (1, 1));
    for k in [0, 2, 4, 100] {
        refused(Conv::same(k), &["odd", &k.to_string()]);
    }
}

#[test]
fn lengths_that_do_not_fit_are_refused() {
    let input = Batch::new(&[2, 3, 5, 6]).unwrap();
    let geometry = Geometry::new(input, Conv::same(3).unwrap()).unwrap();
    let (x, w, b) = (&[0.0f32; 180][..], &[0.0f32; 27][..], &[0.0f32; 3][..]);
    refused(depthwise_forward(&geometry, &x[1..], w, None, 1), &["x", "180", "179"]);
    refused(depthwise_forward(&geometry, x, &w[1..], None, 1), &["weight", "27", "26"]);
    refused(depthwise_forward(&geometry, x, w, Some(&b[1..]), 1), &["bias", "3", "2"]);
    let backward = |grad, x, w| depthwise_backward(&geometry, grad, x, w, [true; 3], 1);
    refused(backward(&x[1..], x, w), &["grad", "180", "179"]);
    refused(backward(x, &x[1..], w), &["x", "180", "179"]);
    refused(backward(x, x, &w[1..]), &["weight", "27", "26"]);
}

#[test]
fn xunits_that_do_not_fit_are_refused() {
    let batch = Batch::new(&[2, 3, 5, 6]).unwrap();
    let (x, w, b) = (&[0.5f32; 180][..], &[0.5f32; 27][..], &[0.5f32; 3][..]);
    let (given, many) = (&[0.5; 3][..], &[0.5; 27][..]);
    let stats = Some((given, given));
    let norm = Norm { weight: b, bias: b, stats, eps: 1e-5, training: false };
    let full = XUnit {
        variant: Variant::Full,
        gate: Gate::Sigmoid,
        kernel: 3,
        pointwise: None,
        weight: w,
        bias: Some(b),
        norm1: Some(norm),
        norm2: Some(norm),
    };
    let pointwise = Some(Pointwise { weight: &x[..9], bias: Some(b) });
    let forward = |unit: XUnit<'_, f32>| xunit_forward(&unit, batch, x, true, 1);
    assert!(forward(full).is_ok());
    refused(forward(XUnit { kernel: 4, ..full }), &["odd", "4"]);
    refused(forward(XUnit { kernel: 0, ..full }), &["odd", "0"]);
    refused(forward(XUnit { kernel: 5, ..full }), &["weight", "75", "27"]);
    refused(forward(XUnit { bias: Some(w), ..full }), &["bias", "3", "27"]);
    refused(forward(XUnit { pointwise, ..full }), &["pointwise"]);
    refused(forward(XUnit { variant: Variant::Dense, ..full }), &["pointwise"]);
    refused(forward(XUnit { variant: Variant::Slim, ..full }), &["slim"]);
    for pointwise in [
        Pointwise { weight: &x[..10], bias: Some(b) },
        Pointwise { weight: &x[..9], bias: Some(w) },
    ] {
        let dense = XUnit { variant: Variant::Dense, pointwise: Some(pointwise), ..full };
        refused(forward(dense), &["pointwise"]);
    }
    for bad in [
        Norm { weight: w, ..norm },
        Norm { bias: w, ..norm },
        Norm { stats: Some((many, given)), ..norm },
        Norm { stats: Some((given, many)), ..norm },
    ] {
        refused(forward(XUnit { norm1: Some(bad), ..full }), &["batch norm", "3", "27"]);
        refused(forward(XUnit { norm2: Some(bad), ..full }), &["batch norm", "3", "27"]);
    }
    refused(xunit_forward(&full, batch, &x[1..], true, 1), &["x", "180", "179"]);

    // One value a channel has no variance.
    let one = Batch::new(&[1, 3, 1, 1]).unwrap();
    let training = Some(Norm { stats: None, ..norm });
    for unit in [XUnit { norm1: training, ..full }, XUnit { norm2: training, ..full }] {
        refused(xunit_forward(&unit, one, b, true, 1), &["more than 1 value", "[1, 3, 1, 1]"]);
    }
    assert!(xunit_forward(&full, one, b, true, 1).is_ok());

    let backward = |unit: XUnit<'_, f32>, grad, d, p| {
        xunit_backward(&unit, batch, grad, XUnitSaved { x, d, p }, 1)
    };
    let d = Some(x);
    assert!(backward(full, x, d, None).is_ok());
    refused(backward(full, &x[1..], d, None), &["grad", "180", "179"]);
    refused(backward(full, x, Some(&x[1..]), None), &["d", "180", "179"]);
    refused(backward(full, x, d, Some(x)), &["p", "dense"]);
    refused(backward(XUnit { norm1: training, ..full }, x, d, None), &["statistics"]);
    refused(backward(XUnit { norm2: training, ..full }, x, d, None), &["statistics"]);
    let dense = XUnit { variant: Variant::Dense, pointwise, ..full };
    assert!(backward(dense, x, d, Some(x)).is_ok());
    refused(backward(dense, x, None, Some(x)), &["d", "missing"]);
    refused(backward(dense, x, None, None), &["d", "missing"]);
    refused(backward(dense, x, d, Some(&x[1..])), &["p", "180", "179"]);
    for (unit, d) in [(full, None), (dense, d)] {
        let saved = XUnitSaved { x, d, p: None };
        let last = Layout::ChannelsLast;
        let got = xunit_backward_in(last, &unit, batch, x, saved, x.to_vec(), 1);
        refused(got, &["channels_last", "gradient"]);
    }
}
