//! Times of the operations on one thread: `cargo bench`.

mod common;

use common::noise;
use divan::{Bencher, counter::ItemsCount};
use xunit_rs::kernels::activation::Gate;
use xunit_rs::ops::{
    self, BatchStats, DepthwiseGradients, Layout, Norm, Pointwise, PointwiseGradients, Variant,
    XUnit, XUnitGradients, XUnitOutput, XUnitSaved,
};
use xunit_rs::parallel::Threads;
use xunit_rs::shape::{Batch, Conv, Geometry};

const BATCH: Batch = Batch { n: 4, c: 16, h: 64, w: 64 };
const SIZES: [usize; 5] = [3, 5, 7, 9, 11];
const ONE: Threads = Threads::Own(1);

fn main() {
    divan::main();
}

fn geometry(k: usize, stride: usize) -> Geometry {
    let conv = Conv { stride: [stride; 2], ..Conv::same(k).unwrap() };
    Geometry::new(BATCH, conv).unwrap()
}

/// Items are multiply-adds.
fn flops(geometry: &Geometry) -> ItemsCount {
    ItemsCount::new(geometry.output().size() * geometry.conv.kh * geometry.conv.kw)
}

fn depthwise(bencher: Bencher, geometry: &Geometry, layout: Layout) {
    let taps = geometry.conv.kh * geometry.conv.kw;
    let (x, weight) = (noise(geometry.input.size()), noise(BATCH.c * taps));
    let mut y = noise(geometry.output().size());
    let run = match layout {
        Layout::Planes => ops::depthwise_forward,
        Layout::ChannelsLast => ops::depthwise_forward_channels_last,
    };
    bencher.counter(flops(geometry)).bench_local(|| {
        run(geometry, &x, &weight, None, &mut y, ONE).unwrap();
    });
}

fn depthwise_gradient(bencher: Bencher, geometry: &Geometry, layout: Layout, of_x: bool) {
    let taps = geometry.conv.kh * geometry.conv.kw;
    let (x, weight) = (noise(geometry.input.size()), noise(BATCH.c * taps));
    let grad = noise(geometry.output().size());
    let (mut gx, mut gweight) = (x.clone(), weight.clone());
    let run = match layout {
        Layout::Planes => ops::depthwise_backward,
        Layout::ChannelsLast => ops::depthwise_backward_channels_last,
    };
    bencher.counter(flops(geometry)).bench_local(|| {
        let gradients = DepthwiseGradients {
            x: of_x.then_some(&mut gx[..]),
            weight: (!of_x).then_some(&mut gweight[..]),
            bias: None,
        };
        run(geometry, &grad, &x, &weight, gradients, ONE).unwrap();
    });
}

/// A module of the three operations for a layout and a stride.
macro_rules! depthwise {
    ($name:ident, $layout:expr, $stride:expr) => {
        mod $name {
            use super::*;

            #[divan::bench(args = SIZES)]
            fn forward(bencher: Bencher, k: usize) {
                depthwise(bencher, &geometry(k, $stride), $layout);
            }

            #[divan::bench(args = SIZES)]
            fn input_gradient(bencher: Bencher, k: usize) {
                depthwise_gradient(bencher, &geometry(k, $stride), $layout, true);
            }

            #[divan::bench(args = SIZES)]
            fn weight_gradient(bencher: Bencher, k: usize) {
                depthwise_gradient(bencher, &geometry(k, $stride), $layout, false);
            }
        }
    };
}

depthwise!(depthwise_planes, Layout::Planes, 1);
depthwise!(depthwise_planes_stride_2, Layout::Planes, 2);
depthwise!(depthwise_channels_last, Layout::ChannelsLast, 1);
depthwise!(depthwise_channels_last_stride_2, Layout::ChannelsLast, 2);

/// The parameters of a unit with batch norms.
struct Parameters {
    variant: Variant,
    k: usize,
    weight: Vec<f32>,
    pointwise: Vec<f32>,
    ones: Vec<f32>,
    zeros: Vec<f32>,
    /// Mean and variance.
    stats: (Vec<f64>, Vec<f64>),
}

impl Parameters {
    fn new(variant: Variant, k: usize) -> Self {
        let c = BATCH.c;
        Self {
            variant,
            k,
            weight: noise(c * k * k),
            pointwise: noise(c * c),
            ones: vec![1.0; c],
            zeros: vec![0.0; c],
            stats: (vec![0.0; c], vec![1.0; c]),
        }
    }

    /// With `training`, forward takes the statistics of the batch; `given` is for the rest.
    fn unit(&self, given: bool, training: bool) -> XUnit<'_, f32> {
        let norm = Norm {
            weight: &self.ones,
            bias: &self.zeros,
            stats: given.then_some((&self.stats.0[..], &self.stats.1[..])),
            eps: 1e-5,
            training,
        };
        XUnit {
            variant: self.variant,
            gate: Gate::Sigmoid,
            kernel: self.k,
            pointwise: (self.variant == Variant::Dense)
                .then_some(Pointwise { weight: &self.pointwise, bias: Some(&self.zeros) }),
            weight: &self.weight,
            bias: Some(&self.zeros),
            norm1: (self.variant != Variant::Slim).then_some(norm),
            norm2: Some(norm),
        }
    }
}

fn unit_evaluation(bencher: Bencher, variant: Variant, k: usize) {
    let (parameters, x) = (Parameters::new(variant, k), noise(BATCH.size()));
    let (unit, mut out) = (parameters.unit(true, false), noise(BATCH.size()));
    bencher.counter(flops(&geometry(k, 1))).bench_local(|| {
        let out = &mut out[..];
        let output = XUnitOutput { out, d: None, p: None, stats1: None, stats2: None };
        ops::xunit_forward(&unit, BATCH, Layout::Planes, &x, output, ONE).unwrap();
    });
}

fn unit_forward(bencher: Bencher, variant: Variant, k: usize) {
    let (parameters, x) = (Parameters::new(variant, k), noise(BATCH.size()));
    let unit = parameters.unit(false, true);
    let (mut out, mut d, mut p) = (x.clone(), x.clone(), x.clone());
    let mut stats = [parameters.stats.clone(), parameters.stats.clone()];
    bencher.counter(flops(&geometry(k, 1))).bench_local(|| {
        let [stats1, stats2] =
            stats.each_mut().map(|(mean, var)| Some(BatchStats { mean, var, running: None }));
        let output = XUnitOutput {
            out: &mut out,
            d: Some(&mut d),
            p: unit.pointwise.map(|_| &mut p[..]),
            stats1: stats1.filter(|_| unit.norm1.is_some()),
            stats2,
        };
        ops::xunit_forward(&unit, BATCH, Layout::Planes, &x, output, ONE).unwrap();
    });
}

fn unit_backward(bencher: Bencher, variant: Variant, k: usize) {
    let (parameters, x) = (Parameters::new(variant, k), noise(BATCH.size()));
    let unit = parameters.unit(true, true);
    let (d, p, grad) = (noise(BATCH.size()), noise(BATCH.size()), noise(BATCH.size()));
    let saved = XUnitSaved { x: &x, d: Some(&d), p: unit.pointwise.map(|_| &p[..]) };
    let mut gx = x.clone();
    let (mut gweight, mut gpointwise) = (noise(BATCH.c * k * k), noise(BATCH.c * BATCH.c));
    let mut small: [Vec<f32>; 4] = std::array::from_fn(|_| noise(BATCH.c));
    bencher.counter(flops(&geometry(k, 1))).bench_local(|| {
        let [a, b, c, d] = small.each_mut().map(|small| &mut small[..]);
        let gradients = XUnitGradients {
            x: &mut gx,
            pointwise: unit
                .pointwise
                .map(|_| PointwiseGradients { weight: &mut gpointwise, bias: None }),
            weight: &mut gweight,
            bias: None,
            norm1: unit.norm1.map(|_| (a, b)),
            norm2: Some((c, d)),
        };
        ops::xunit_backward(&unit, BATCH, Layout::Planes, &grad, saved, gradients, ONE).unwrap();
    });
}

macro_rules! units {
    ($($name:ident: $variant:ident),*) => {$(
        mod $name {
            use super::*;

            #[divan::bench(args = SIZES)]
            fn evaluation(bencher: Bencher, k: usize) {
                unit_evaluation(bencher, Variant::$variant, k);
            }

            /// Training.
            #[divan::bench(args = SIZES)]
            fn forward(bencher: Bencher, k: usize) {
                unit_forward(bencher, Variant::$variant, k);
            }

            #[divan::bench(args = SIZES)]
            fn backward(bencher: Bencher, k: usize) {
                unit_backward(bencher, Variant::$variant, k);
            }
        }
    )*};
}

units!(xunit: Full, xunit_s: Slim, xunit_d: Dense);

/// The FMA peak that the others are measured by; items are multiply-adds.
#[divan::bench]
fn fma_peak(bencher: Bencher) {
    use xunit_rs::kernels::peak::MultiplyAdd;
    use xunit_rs::simd;
    let run = || simd::dispatch::<f32, _>(MultiplyAdd { rounds: 1000 });
    bencher.counter(ItemsCount::new(run().0 / 2)).bench(run);
}
