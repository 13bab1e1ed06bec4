//! Times of the operations on one thread: `cargo bench`.

use divan::{Bencher, counter::ItemsCount};
use xunit_rs::ops;
use xunit_rs::shape::{Batch, Conv, Geometry};

fn main() {
    divan::main();
}

/// Values of both signs and of no pattern that a kernel could profit from.
fn noise(len: usize) -> Vec<f32> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

fn geometry(k: usize) -> Geometry {
    Geometry::new(Batch { n: 4, c: 16, h: 64, w: 64 }, Conv::same(k).unwrap()).unwrap()
}

/// Items are multiply-adds.
fn flops(geometry: &Geometry) -> ItemsCount {
    ItemsCount::new(geometry.output().size() * geometry.conv.kh * geometry.conv.kw)
}

#[divan::bench(args = [3, 5, 7, 9, 11])]
fn depthwise_forward(bencher: Bencher, k: usize) {
    let geometry = geometry(k);
    let (x, weight) = (noise(geometry.input.size()), noise(16 * k * k));
    bencher
        .counter(flops(&geometry))
        .bench(|| ops::depthwise_forward(&geometry, &x, &weight, None, 1).unwrap());
}

#[divan::bench(args = [3, 5, 7, 9, 11])]
fn depthwise_weight_gradient(bencher: Bencher, k: usize) {
    let geometry = geometry(k);
    let (x, weight) = (noise(geometry.input.size()), noise(16 * k * k));
    let grad = noise(geometry.output().size());
    bencher.counter(flops(&geometry)).bench(|| {
        let needs = [false, true, false];
        ops::depthwise_backward(&geometry, &grad, &x, &weight, needs, 1).unwrap()
    });
}
