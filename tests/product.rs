//! The matrix products on every instruction set of the machine, at every tail length, against naive
//! `f64` loops; what lies between rows is NaN, and so is an output before it is written.

mod common;

use common::{Noise, cast, first_apart, nan, spread, tolerance};
use xunit_rs::kernels::product::{Columns, Inner, Packed, Rows, RowsMut, Start};
use xunit_rs::simd::{Scalar, available};

/// Rows and columns of the matrix: around the tiles of 4, 6 and 8 rows and the blocks of 24.
const SIZES: [usize; 14] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 25, 63, 64, 65];
/// Columns of a panel around the tiles of one, two and three vectors.
const WIDTHS: [usize; 12] = [1, 7, 15, 16, 17, 31, 32, 33, 47, 48, 49, 100];

/// Shapes (m, k, n): every pair of sizes at a few widths, every width at a few sizes.
fn shapes() -> Vec<(usize, usize, usize)> {
    let mut shapes = Vec::new();
    for (i, m) in SIZES.into_iter().enumerate() {
        for (j, k) in SIZES.into_iter().enumerate() {
            shapes.push((m, k, WIDTHS[(i + 5 * j) % WIDTHS.len()]));
        }
    }
    for (m, k) in [(1, 1), (5, 3), (7, 9), (8, 8), (13, 6), (24, 7)] {
        shapes.extend((1..=100).map(|n| (m, k, n)));
    }
    // More rows than one pass takes, and more pixels than one block.
    shapes.extend([(9, 127, 50), (9, 128, 50), (10, 129, 50), (6, 257, 19), (33, 300, 5)]);
    shapes.extend([(3, 5, 1023), (5, 7, 1024), (7, 5, 1025), (4, 6, 2049), (2, 3, 5000)]);
    shapes
}

/// The cases that fail, told all at once.
#[derive(Default)]
struct Failures(Vec<String>);

impl Failures {
    /// Compares with `want`, finite values within the tolerance of `scale`.
    fn check<T: Scalar>(&mut self, got: &[T], want: &[f64], scale: f64, case: &str) {
        assert_eq!(got.len(), want.len());
        let bound = tolerance::<T>() * scale;
        if let Some(i) = first_apart(got, want, bound) {
            let (got, want) = (got[i], want[i]);
            self.0.push(format!("{case}: element {i} is {got:?}, should be {want}, ± {bound:e}"));
        }
    }
}

impl Drop for Failures {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let (count, first) = (self.0.len(), &self.0[..self.0.len().min(40)]);
            assert!(count == 0, "{count} cases fail:\n{}", first.join("\n"));
        }
    }
}

/// The rows without what lies between them; that must still be NaN.
fn gather<T: Scalar>(values: &[T], width: usize, ld: usize) -> Vec<T> {
    let mut rows = Vec::new();
    for row in values.chunks(ld) {
        let (row, gap) = row.split_at(width);
        rows.extend_from_slice(row);
        assert!(gap.iter().all(|x| x.to_f64().is_nan()), "written between rows");
    }
    rows
}

/// A matrix, a panel, an output, with NaN and infinities if `spoil`.
fn operands(
    (m, k, n): (usize, usize, usize),
    spoil: bool,
) -> (Vec<f64>, Vec<f64>, Vec<f64>, Vec<f64>) {
    let mut noise = Noise::new((m * 7919 + k * 104_729 + n) as u64);
    let (mut a, mut b) = (noise.vec(m * k), noise.vec(k * n));
    let (bias, mut old) = (noise.vec(m), noise.vec(m * n));
    if spoil {
        noise.spoil(&mut b);
        noise.spoil(&mut old);
        // Zero times infinity is NaN.
        let at = noise.below(a.len());
        a[at] = 0.0;
        if n.is_multiple_of(3) {
            noise.spoil(&mut a);
        }
    }
    (a, b, bias, old)
}

#[test]
fn columns() {
    let mut failures = Failures::default();
    for (i, shape) in shapes().into_iter().enumerate() {
        columns_of::<f32>(&mut failures, shape, i % 3 == 0);
        columns_of::<f64>(&mut failures, shape, i % 3 == 0);
    }
}

fn columns_of<T: Scalar>(failures: &mut Failures, shape: (usize, usize, usize), spoil: bool) {
    let (m, k, n) = shape;
    let (a, b, bias, old) = operands(shape, spoil);
    let product = |r: usize, x: usize| (0..k).map(|i| a[r * k + i] * b[i * n + x]).sum::<f64>();
    let want = |start: &dyn Fn(usize, usize) -> f64| -> Vec<f64> {
        (0..m * n).map(|at| start(at / n, at % n) + product(at / n, at % n)).collect()
    };
    let turned: Vec<f64> = (0..k * m).map(|at| a[at % m * k + at / m]).collect();
    let a = Packed::new(&cast::<T>(&a), m, k);
    let turned = Packed::transposed(&cast::<T>(&turned), k, m);
    let (bias_of, scale) = (cast::<T>(&bias), (k as f64).sqrt());
    let wants = [want(&|_, _| 0.0), want(&|r, _| bias[r]), want(&|r, x| old[r * n + x])];
    let starts = [Start::Zero, Start::Bias(&bias_of), Start::Sum];
    for (ldb, ldc) in [(n, n), (n + 5, n + 3)] {
        let b = spread(&cast::<T>(&b), n, ldb);
        // The last row ends with its last element.
        let b = &b[..(k - 1) * ldb + n];
        for (start, want) in starts.iter().zip(&wants) {
            for isa in available() {
                for a in [&a, &turned] {
                    let mut c = match start {
                        Start::Sum => spread(&cast(&old), n, ldc),
                        _ => nan::<T>(m * ldc),
                    };
                    let end = (m - 1) * ldc + n;
                    let (b, out) =
                        (Rows::new(b, k, ldb, n), RowsMut::new(&mut c[..end], m, ldc, n));
                    T::dispatch(isa, Columns { a, b, start: *start, c: out });
                    let name = match start {
                        Start::Zero => "zero",
                        Start::Bias(_) => "bias",
                        Start::Sum => "sum",
                    };
                    let size = size_of::<T>();
                    let case = format!("{size} {isa}: {m}×{k}×{n}, strides {ldb}, {ldc}, {name}");
                    failures.check(&gather(&c, n, ldc), want, scale, &case);
                }
            }
        }
    }
}

#[test]
fn a_column_does_not_depend_on_its_panel() {
    let (m, k, n) = (13, 150, 131);
    let (a, b, bias, _) = operands((m, k, n), false);
    let (a, b, bias) = (Packed::new(&cast::<f32>(&a), m, k), cast::<f32>(&b), cast::<f32>(&bias));
    let start = Start::Bias(&bias[..]);
    for isa in available() {
        let (mut whole, mut parts) = (nan::<f32>(m * n), nan::<f32>(m * n));
        let c = RowsMut::new(&mut whole, m, n, n);
        f32::dispatch(isa, Columns { a: &a, b: Rows::new(&b, k, n, n), start, c });
        for (x, width) in [(0, 1), (1, 17), (18, 64), (82, 49)] {
            let c = RowsMut::new(&mut parts[x..], m, n, width);
            f32::dispatch(isa, Columns { a: &a, b: Rows::new(&b[x..], k, n, width), start, c });
        }
        common::same_bits(&whole, &parts, || isa.to_string());
    }
}

#[test]
fn inner() {
    let mut failures = Failures::default();
    for (i, shape) in shapes().into_iter().enumerate() {
        inner_of::<f32>(&mut failures, shape, i % 3 == 0);
        inner_of::<f64>(&mut failures, shape, i % 3 == 0);
    }
}

fn inner_of<T: Scalar>(failures: &mut Failures, (m, k, n): (usize, usize, usize), spoil: bool) {
    let mut noise = Noise::new((m * 31 + k * 7 + n * 1009) as u64);
    let (mut a, mut b) = (noise.vec(m * n), noise.vec(k * n));
    if spoil {
        noise.spoil(&mut b);
        let at = noise.below(a.len());
        a[at] = 0.0;
        if n.is_multiple_of(3) {
            noise.spoil(&mut a);
        }
    }
    let product = |r: usize, q: usize| (0..n).map(|i| a[r * n + i] * b[q * n + i]).sum::<f64>();
    // Sums go on top of what is there.
    let want: Vec<f64> = (0..m * k).map(|at| 1.0 + product(at / k, at % k)).collect();
    let scale = (n as f64).sqrt();
    for (lda, ldb) in [(n, n), (n + 7, n + 2)] {
        // Beyond a row there are infinities, which must not meet the zeros of a masked lane.
        let spread = |values: &[f64], ld: usize| -> Vec<T> {
            let rows = values.chunks_exact(n).flat_map(|row| {
                let beyond = std::iter::repeat_n(f64::INFINITY, ld - n);
                row.iter().copied().chain(beyond)
            });
            let mut rows: Vec<T> = rows.map(T::from_f64).collect();
            rows.truncate(rows.len() - (ld - n));
            rows
        };
        let (a, b) = (spread(&a, lda), spread(&b, ldb));
        for isa in available() {
            let mut sum = vec![1.0; m * k];
            // What is asked for may be anywhere, and nowhere.
            let next = [a.as_ptr_range().end, std::ptr::null()];
            let (a, b) = (Rows::new(&a, m, lda, n), Rows::new(&b, k, ldb, n));
            T::dispatch(isa, Inner { a, b, sum: &mut sum, next: &next });
            let sum: Vec<T> = sum.into_iter().map(T::from_f64).collect();
            let case = format!("{} {isa}: {m}×{k}×{n}, strides {lda}, {ldb}", size_of::<T>());
            failures.check(&sum, &want, scale, &case);
        }
    }
}

/// A long sum of positive products keeps the digits that sums in `f32` lanes alone would lose.
#[test]
fn a_long_inner_product_keeps_its_digits() {
    let n = 1 << 20;
    let mut noise = Noise::new(3);
    let a: Vec<f64> = noise.vec(n).iter().map(|x| x.abs()).collect();
    let want: f64 = a.iter().map(|x| x * x).sum();
    let a = cast::<f32>(&a);
    for isa in available() {
        let mut sum = [0.0];
        let rows = Rows::new(&a, 1, n, n);
        f32::dispatch(isa, Inner { a: rows, b: rows, sum: &mut sum, next: &[] });
        let error = (sum[0] - want).abs() / want;
        assert!(error < 2e-7, "{isa}: relative error {error:e}");
    }
}

#[test]
#[should_panic(expected = "2 rows of 3, 4 apart")]
fn rows_beyond_the_data_are_refused() {
    Rows::new(&[0.0f32; 6], 2, 4, 3);
}

#[test]
#[should_panic(expected = "2 rows of 3, 2 apart")]
fn rows_that_overlap_are_refused() {
    RowsMut::new(&mut [0.0f32; 6], 2, 2, 3);
}

#[test]
#[should_panic(expected = "too many elements")]
fn rows_that_overflow_are_refused() {
    Rows::new(&[0.0f32; 6], 3, usize::MAX / 2, 3);
}
