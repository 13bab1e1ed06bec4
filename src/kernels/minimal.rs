//! Minimal filtering F(M, M) along one axis, for kernels of many taps: M outputs of M taps by 2 M − 1
//! products in place of M². Winograd, "Arithmetic Complexity of Computations" (1980).
//!
//! A kernel of k rows is ⌈k / M⌉ groups of M: the tiles of their inputs are the same, so that an
//! input is transformed once, and their products are added up before they are transformed back. The
//! points of interpolation are ±p and ∞. In a simulation in float32 the rounding errors of F(3, 3) with
//! k = 9 were 1.4 times those of plain sums, by 0, ±1, 2 and ∞ 1.7 times; those of F(4, 4) with k = 7
//! 2.4 times, by 0, ±1/2, ±1, 2 and ∞ 3.0 times.

use crate::simd::{Scalar, Simd};

/// How the rows of a kernel are filtered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Filter {
    /// Outputs of a tile, and taps of a group.
    pub tile: usize,
    pub groups: usize,
}

impl Filter {
    /// Of k rows of taps; none where plain sums are as fast everywhere.
    ///
    /// Time over that of plain sums, one thread of a Zen 4, AVX-512, at 16 × 64 × 64 × 64, 64 × 64 × 40 × 40,
    /// 64 × 256 × 256 and 64 × 512 × 512: forward k = 7 0.95, 0.97, 0.97 and 1.0, evaluation of an xUnit 0.97, 0.9 and
    /// 0.97 at the first three; forward k = 9 0.8, 0.8, 0.84 and 0.8. In an earlier version k = 11 0.78, 0.85 and 0.68 at
    /// the first two and the last.
    pub fn of(k: usize) -> Option<Self> {
        let tile = match k {
            9 => 3,
            7 | 11 => 4,
            _ => return None,
        };
        Some(Self { tile, groups: k.div_ceil(tile) })
    }

    /// Rows of transformed inputs, of all points, that so many rows of outputs read.
    pub fn rows(self, outputs: usize) -> usize {
        (outputs.div_ceil(self.tile) + self.groups - 1) * (2 * self.tile - 1)
    }
}

/// The points but ∞: each stands for itself and its negative.
const fn points(tile: usize) -> &'static [f64] {
    match tile {
        3 => &[0.5, 1.5],
        _ => &[0.35, 0.9, 2.0],
    }
}

/// The coefficients of ∏ (x − p²) of all points but one, from the constant on.
#[inline(always)]
fn product(tile: usize, but: usize) -> [f64; 4] {
    let mut out = [1.0, 0.0, 0.0, 0.0];
    for (i, p) in points(tile).iter().enumerate() {
        if i != but {
            out = [
                -p * p * out[0],
                out[0] - p * p * out[1],
                out[1] - p * p * out[2],
                out[2] - p * p * out[3],
            ];
        }
    }
    out
}

/// For each point what the taps of a group are multiplied with: its powers over the product of its distances to the
/// others. The last one, ∞, has the last tap.
fn factors(tile: usize) -> [[f64; 4]; 7] {
    let mut out = [[0.0; 4]; 7];
    for (i, &p) in points(tile).iter().enumerate() {
        let others = points(tile).iter().enumerate().filter(|&(j, _)| j != i);
        let distances = others.map(|(_, q)| p * p - q * q).product::<f64>() * 2.0 * p;
        let mut power = 1.0 / distances;
        for factor in &mut out[2 * i][..tile] {
            *factor = power;
            power *= p;
        }
        out[2 * i + 1] = out[2 * i];
        out[2 * i + 1].iter_mut().step_by(2).for_each(|factor| *factor = -*factor);
    }
    out[2 * tile - 2][tile - 1] = 1.0;
    out
}

/// Taps that are transformed together.
const TOGETHER: usize = 8;
/// The most rows of all groups.
const MAX_ROWS: usize = 12;

/// (blocks, k, columns, lanes) to (blocks, points, columns, groups, lanes).
///
/// Of one plane this takes as long as the convolution of some vectors, so what is short has a fixed length.
pub fn transform_taps<T: Scalar>(
    taps: &[T],
    (k, columns): (usize, usize),
    filter: Filter,
    lanes: usize,
) -> Vec<T> {
    let Filter { tile, groups } = filter;
    assert!(k <= groups * tile && groups * tile <= MAX_ROWS);
    let (points, row) = (2 * tile - 1, columns * lanes);
    let factors = factors(tile);
    let mut out = vec![T::ZERO; taps.len() / k * groups * points];
    // Neighbours in a row of taps are neighbours in the result, too, but those of one lane, between which are the
    // other groups.
    let (length, step) = if lanes == 1 { (columns, groups) } else { (lanes, 1) };
    let of_blocks = taps.chunks_exact(k * row).zip(out.chunks_exact_mut(points * groups * row));
    for (taps, out) in of_blocks {
        for first in (0..row).step_by(length) {
            for from in (first..first + length).step_by(TOGETHER) {
                let count = TOGETHER.min(first + length - from);
                let mut rows = [[0.0; TOGETHER]; MAX_ROWS];
                for (to, taps) in rows.iter_mut().zip(taps.chunks_exact(row)) {
                    for (to, tap) in to.iter_mut().zip(&taps[from..][..count]) {
                        *to = tap.to_f64();
                    }
                }
                let to = first * groups + (from - first) * step;
                for point in 0..points {
                    for group in 0..groups {
                        let mut sums = [0.0; TOGETHER];
                        let rows = &rows[group * tile..];
                        for (factor, row) in factors[point][..tile].iter().zip(rows) {
                            for (sum, tap) in sums.iter_mut().zip(row) {
                                *sum += factor * tap;
                            }
                        }
                        let out = &mut out[(point * row * groups) + group * lanes + to..];
                        for (out, &sum) in out.iter_mut().step_by(step).zip(&sums[..count]) {
                            *out = T::from_f64(sum);
                        }
                    }
                }
            }
        }
    }
    out
}

/// Bᵀ d.
#[inline(always)]
pub fn transform_input<T: Scalar, S: Simd<T>, const M: usize, const P: usize>(
    simd: S,
    d: [S::V; P],
) -> [S::V; P] {
    const { assert!(P == 2 * M - 1) };
    let of = |x: f64| simd.splat(T::from_f64(x));
    let mut out = d;
    for (i, &p) in points(M).iter().enumerate() {
        // Even and odd part of the tile as a polynomial.
        let (mut odd, mut even) = (d[2 * M - 3], d[2 * M - 4]);
        let coefficients = product(M, i);
        for c in (0..M - 2).rev() {
            odd = simd.fma(of(coefficients[c]), d[2 * c + 1], odd);
            even = simd.fma(of(coefficients[c]), d[2 * c], even);
        }
        let even = simd.mul(of(p), even);
        out[2 * i] = simd.add(odd, even);
        out[2 * i + 1] = simd.sub(odd, even);
    }
    let mut last = d[P - 1];
    let coefficients = product(M, M);
    for c in (0..M - 1).rev() {
        last = simd.fma(of(coefficients[c]), d[2 * c], last);
    }
    out[P - 1] = last;
    out
}

/// Aᵀ m.
#[inline(always)]
pub fn transform_output<T: Scalar, S: Simd<T>, const M: usize, const P: usize>(
    simd: S,
    m: [S::V; P],
) -> [S::V; M] {
    const { assert!(P == 2 * M - 1) };
    let of = |x: f64| simd.splat(T::from_f64(x));
    let mut parts = m;
    for i in 0..M - 1 {
        let (at, at_negative) = (m[2 * i], m[2 * i + 1]);
        parts[2 * i] = simd.add(at, at_negative);
        parts[2 * i + 1] = simd.sub(at, at_negative);
    }
    // Powers of points, from 1 on.
    let mut powers = [1.0; 4];
    let mut out = [m[P - 1]; M];
    for (t, out) in out.iter_mut().enumerate() {
        for (i, &p) in points(M).iter().enumerate() {
            let part = parts[2 * i + t % 2];
            *out = match (t, i) {
                (0, 0) => part,
                (0, _) => simd.add(part, *out),
                (_, 0) if t + 1 < M => simd.mul(of(powers[i]), part),
                _ => simd.fma(of(powers[i]), part, *out),
            };
            powers[i] *= p;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{self, Kernel, Scalar};

    /// M outputs of P inputs and M taps.
    struct Tile<const M: usize, const P: usize> {
        d: [f32; P],
        taps: [f32; M],
    }

    impl<const M: usize, const P: usize> Kernel<f32> for Tile<M, P> {
        type Output = [f32; M];

        fn run<S: Simd<f32>>(self, simd: S) -> [f32; M] {
            let lanes = simd.lanes();
            let mut taps = vec![0.0; M * lanes];
            for (i, &tap) in self.taps.iter().enumerate() {
                taps[i * lanes] = tap;
            }
            let u = transform_taps(&taps, (M, 1), Filter { tile: M, groups: 1 }, lanes);
            let v = transform_input::<_, S, M, P>(simd, self.d.map(|d| simd.splat(d)));
            let mut m = v;
            for (point, m) in m.iter_mut().enumerate() {
                *m = simd.mul(*m, simd.splat(u[point * lanes]));
            }
            transform_output::<_, S, M, P>(simd, m).map(|v| simd.sum(v) / lanes as f32)
        }
    }

    fn a_tile_is_the_convolution<const M: usize, const P: usize>() {
        for isa in simd::available() {
            for (i, tap) in (0..P).flat_map(|i| (0..M).map(move |tap| (i, tap))) {
                let mut job = Tile::<M, P> { d: [0.0; P], taps: [0.0; M] };
                (job.d[i], job.taps[tap]) = (3.0, 2.0);
                for (o, got) in f32::dispatch(isa, job).into_iter().enumerate() {
                    let expected = if o + tap == i { 6.0 } else { 0.0 };
                    assert!((got - expected).abs() < 1e-5, "{M}, {isa}, {i}, {tap}, {o}: {got}");
                }
            }
        }
    }

    #[test]
    fn tiles_are_the_convolution() {
        a_tile_is_the_convolution::<3, 5>();
        a_tile_is_the_convolution::<4, 7>();
    }
}
