//! Minimal filtering F(3, 3) along one axis, for kernels of many taps: three outputs of three taps by
//! five products in place of nine. Winograd, "Arithmetic Complexity of Computations" (1980).
//!
//! A kernel of k rows is ⌈k / 3⌉ groups of three: the tiles of their inputs are the same, so that an
//! input is transformed once, and their products are added up before they are transformed back. The
//! points of interpolation are ±1/2, ±3/2 and ∞: in a simulation of k = 9 in float32 rounding errors were 1.4
//! times those of plain sums, by 0, ±1, 2 and ∞ 1.7 times.

use crate::simd::{Scalar, Simd};

/// Outputs of a tile, and taps of a group.
pub const TILE: usize = 3;
/// Inputs of a tile, and its products.
pub const POINTS: usize = 5;

/// The points but ∞: ±[`A`] and ±[`B`].
const A: f64 = 0.5;
const B: f64 = 1.5;

/// The groups that k rows of taps make, 0 where plain sums are as fast.
///
/// One thread of a Zen 4, AVX-512, depthwise forward of 16 × 64 × 64 × 64 and 64 × 64 × 40 × 40 in
/// milliseconds: k = 9 7.0 and 12.7, plain 8.2 and 13.5; k = 7, of which the third group has one row, 6.2 and
/// 11.1, plain 5.9 and 9.1. The products run at the peak; the transforms and the memory do not.
pub fn groups(k: usize) -> usize {
    match k {
        9 | 11 => k.div_ceil(TILE),
        _ => 0,
    }
}

/// (blocks, k, columns, lanes) to (blocks, points, columns, groups, lanes).
pub fn transform_taps<T: Scalar>(
    taps: &[T],
    (k, columns): (usize, usize),
    groups: usize,
    lanes: usize,
) -> Vec<T> {
    // The powers of each point over the product of its distances to the others.
    let row = |p: f64, other: f64| {
        let n = 2.0 * p * (p * p - other * other);
        [1.0 / n, p / n, p * p / n]
    };
    let g = [row(A, B), row(-A, B), row(B, A), row(-B, A), [0.0, 0.0, 1.0]];
    let mut out = Vec::with_capacity(taps.len() / k * groups * POINTS);
    for taps in taps.chunks_exact(k * columns * lanes) {
        for powers in &g {
            for j in 0..columns {
                for first in (0..groups * TILE).step_by(TILE) {
                    for lane in 0..lanes {
                        let of_row = |(i, power): (usize, &f64)| {
                            power * taps[(i * columns + j) * lanes + lane].to_f64()
                        };
                        let sum: f64 = (first..k).zip(powers).map(of_row).sum();
                        out.push(T::from_f64(sum));
                    }
                }
            }
        }
    }
    out
}

/// Bᵀ d.
#[inline(always)]
pub fn transform_input<T: Scalar, S: Simd<T>>(simd: S, d: [S::V; POINTS]) -> [S::V; POINTS] {
    let (a, b) = (simd.splat(T::from_f64(A)), simd.splat(T::from_f64(B)));
    let (a2, b2) = (simd.splat(T::from_f64(-A * A)), simd.splat(T::from_f64(-B * B)));
    let (even_a, odd_a) = (simd.fma(b2, d[1], d[3]), simd.mul(a, simd.fma(b2, d[0], d[2])));
    let (even_b, odd_b) = (simd.fma(a2, d[1], d[3]), simd.mul(b, simd.fma(a2, d[0], d[2])));
    let last = simd.fma(simd.splat(T::from_f64(-A * A - B * B)), d[2], d[4]);
    [
        simd.add(even_a, odd_a),
        simd.sub(even_a, odd_a),
        simd.add(even_b, odd_b),
        simd.sub(even_b, odd_b),
        simd.fma(simd.splat(T::from_f64(A * A * B * B)), d[0], last),
    ]
}

/// Aᵀ m.
#[inline(always)]
pub fn transform_output<T: Scalar, S: Simd<T>>(simd: S, m: [S::V; POINTS]) -> [S::V; TILE] {
    let (even_a, odd_a) = (simd.add(m[0], m[1]), simd.sub(m[0], m[1]));
    let (even_b, odd_b) = (simd.add(m[2], m[3]), simd.sub(m[2], m[3]));
    let (a, b) = (simd.splat(T::from_f64(A)), simd.splat(T::from_f64(B)));
    let last = simd.fma(simd.splat(T::from_f64(A * A)), even_a, m[4]);
    [
        simd.add(even_a, even_b),
        simd.fma(a, odd_a, simd.mul(b, odd_b)),
        simd.fma(simd.splat(T::from_f64(B * B)), even_b, last),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{self, Kernel, Scalar};

    /// Three outputs of five inputs and three taps.
    struct Tile {
        d: [f32; POINTS],
        taps: [f32; TILE],
    }

    impl Kernel<f32> for Tile {
        type Output = [f32; TILE];

        fn run<S: Simd<f32>>(self, simd: S) -> [f32; TILE] {
            let lanes = simd.lanes();
            let mut taps = vec![0.0; 9 * lanes];
            for (i, &tap) in self.taps.iter().enumerate() {
                taps[i * 3 * lanes] = tap;
            }
            let u = transform_taps(&taps, (3, 3), 1, lanes);
            let v = transform_input(simd, self.d.map(|d| simd.splat(d)));
            let mut m = v;
            for (point, m) in m.iter_mut().enumerate() {
                *m = simd.mul(*m, simd.splat(u[point * 3 * lanes]));
            }
            transform_output(simd, m).map(|v| simd.sum(v) / lanes as f32)
        }
    }

    #[test]
    fn a_tile_is_the_convolution() {
        for isa in simd::available() {
            for (i, tap) in (0..POINTS).flat_map(|i| (0..TILE).map(move |tap| (i, tap))) {
                let mut job = Tile { d: [0.0; POINTS], taps: [0.0; TILE] };
                (job.d[i], job.taps[tap]) = (3.0, 2.0);
                for (o, got) in f32::dispatch(isa, job).into_iter().enumerate() {
                    let expected = if o + tap == i { 6.0 } else { 0.0 };
                    assert!((got - expected).abs() < 1e-5, "{isa}, {i}, {tap}, {o}: {got}");
                }
            }
        }
    }
}
