//! The matrix products of the 1×1 convolution beside matrixmultiply, on one thread:
//! `cargo bench --bench product`. Items are floating-point operations.
//!
//! C channels, n pixels of a plane of 64 × 64.

mod common;

use common::noise;
use divan::{Bencher, counter::ItemsCount};
use matrixmultiply::sgemm;
use xunit_rs::kernels::product::{Columns, Inner, Packed, Rows, RowsMut, Start};
use xunit_rs::simd;

fn main() {
    divan::main();
}

const PLANE: usize = 4096;
const SHAPES: [(usize, usize); 8] = [
    (32, 1024),
    (32, 4096),
    (64, 1024),
    (64, 4096),
    (96, 1024),
    (96, 4096),
    (128, 1024),
    (128, 4096),
];

fn flops((c, n): (usize, usize)) -> ItemsCount {
    ItemsCount::new(2 * c * c * n)
}

#[divan::bench(args = SHAPES)]
fn columns(bencher: Bencher, (c, n): (usize, usize)) {
    let (x, mut p) = (noise(c * PLANE), vec![0.0; c * PLANE]);
    let (weight, bias) = (Packed::new(&noise(c * c), c, c), noise(c));
    bencher.counter(flops((c, n))).bench_local(|| {
        simd::dispatch(Columns {
            a: &weight,
            b: Rows::new(&x, c, PLANE, n),
            start: Start::Bias(&bias),
            c: RowsMut::new(&mut p, c, PLANE, n),
        });
    });
}

#[divan::bench(args = SHAPES)]
fn columns_matrixmultiply(bencher: Bencher, (c, n): (usize, usize)) {
    let (x, weight, mut p) = (noise(c * PLANE), noise(c * c), vec![0.0; c * PLANE]);
    let ld = PLANE as isize;
    bencher.counter(flops((c, n))).bench_local(|| {
        let (a, b, p) = (weight.as_ptr(), x.as_ptr(), p.as_mut_ptr());
        // SAFETY: a is c × c; b and p are c rows of n ≤ PLANE elements, PLANE apart.
        unsafe { sgemm(c, c, n, 1.0, a, c as isize, 1, b, ld, 1, 0.0, p, ld, 1) };
    });
}

#[divan::bench(args = SHAPES)]
fn inner(bencher: Bencher, (c, n): (usize, usize)) {
    let (grad, x, mut sum) = (noise(c * PLANE), noise(c * PLANE), vec![0.0; c * c]);
    bencher.counter(flops((c, n))).bench_local(|| {
        simd::dispatch(Inner {
            a: Rows::new(&grad, c, PLANE, n),
            b: Rows::new(&x, c, PLANE, n),
            sum: &mut sum,
            next: &[],
        });
    });
}

#[divan::bench(args = SHAPES)]
fn inner_matrixmultiply(bencher: Bencher, (c, n): (usize, usize)) {
    let (grad, x, mut sum) = (noise(c * PLANE), noise(c * PLANE), vec![0.0; c * c]);
    let ld = PLANE as isize;
    bencher.counter(flops((c, n))).bench_local(|| {
        let (a, b, sum) = (grad.as_ptr(), x.as_ptr(), sum.as_mut_ptr());
        // SAFETY: a and b are c rows of n ≤ PLANE elements, PLANE apart; the sum is c × c.
        unsafe { sgemm(c, n, c, 1.0, a, ld, 1, b, 1, ld, 1.0, sum, c as isize, 1) };
    });
}
