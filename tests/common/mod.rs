//! What the kernel and operation tests share: numbers, comparisons, instruction sets.

#![allow(dead_code)]

pub mod owned;

use std::fmt::Debug;
use std::process::Command;

use ndarray::{Array, Dimension, ShapeBuilder};
use xunit_rs::simd::{self, Scalar};

/// Numbers in [-1, 1) without a pattern, all of them exact in `f32`: so that one reference serves
/// both types.
pub struct Noise(u64);

impl Noise {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0x5DEE_CE66)
    }

    pub fn next(&mut self) -> f64 {
        f64::from(self.integer() as i32 >> 8) / f64::from(1 << 23)
    }

    pub fn integer(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963);
        (self.0 >> 32) as u32
    }

    pub fn below(&mut self, n: usize) -> usize {
        self.integer() as usize % n
    }

    pub fn vec(&mut self, len: usize) -> Vec<f64> {
        (0..len).map(|_| self.next()).collect()
    }

    pub fn array<D: Dimension, S: ShapeBuilder<Dim = D>>(&mut self, shape: S) -> Array<f64, D> {
        Array::from_shape_simple_fn(shape, || self.next())
    }

    /// Puts NaN, ∞ and −∞ at one place each.
    pub fn spoil(&mut self, values: &mut [f64]) {
        for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let at = self.below(values.len());
            values[at] = bad;
        }
    }
}

pub fn cast<T: Scalar>(values: &[f64]) -> Vec<T> {
    values.iter().map(|&x| T::from_f64(x)).collect()
}

/// The elements in row-major order, as `T`.
pub fn flat<T: Scalar, D: Dimension>(array: &Array<f64, D>) -> Vec<T> {
    array.iter().map(|&x| T::from_f64(x)).collect()
}

/// `rows` of `width` elements, `ld` apart from `origin` on, NaN all around.
pub fn spread<T: Scalar>(values: &[T], width: usize, ld: usize) -> Vec<T> {
    let rows = values.len() / width;
    let mut spread = vec![T::from_f64(f64::NAN); rows * ld];
    for (target, row) in spread.chunks_exact_mut(ld).zip(values.chunks_exact(width)) {
        target[..width].copy_from_slice(row);
    }
    spread
}

/// A vector of NaN, for an output that must be written in full.
pub fn nan<T: Scalar>(len: usize) -> Vec<T> {
    vec![T::from_f64(f64::NAN); len]
}

/// The tolerance relative to the largest magnitude.
pub fn tolerance<T: Scalar>() -> f64 {
    if size_of::<T>() == 4 { 2e-5 } else { 1e-10 }
}

/// Asserts that `got` equals `want` within [`tolerance`] of the largest finite magnitude, and that
/// NaN and ±∞ are where they are in `want`.
#[track_caller]
pub fn close<'a, T: Scalar>(
    got: &[T],
    want: impl IntoIterator<Item = &'a f64>,
    case: impl FnOnce() -> String,
) {
    close_beside(got, want, 0.0, case);
}

/// [`close`], where `scale` is a magnitude that the sums behind `want` had before they cancelled.
#[track_caller]
pub fn close_beside<'a, T: Scalar>(
    got: &[T],
    want: impl IntoIterator<Item = &'a f64>,
    scale: f64,
    case: impl FnOnce() -> String,
) {
    let want: Vec<f64> = want.into_iter().copied().collect();
    assert_eq!(got.len(), want.len(), "{}: length", case());
    let finite = want.iter().filter(|x| x.is_finite());
    let bound = tolerance::<T>() * finite.fold(scale, |m, x| m.max(x.abs()));
    if let Some(i) = first_apart(got, &want, bound) {
        panic!("{}: element {i} is {:?}, should be {}, ± {bound:e}", case(), got[i], want[i]);
    }
}

/// The first element that is further than `bound` from a finite one of `want`, or is not the NaN or
/// infinity that is wanted.
pub fn first_apart<T: Scalar>(got: &[T], want: &[f64], bound: f64) -> Option<usize> {
    got.iter().zip(want).position(|(got, &want)| {
        let got = got.to_f64();
        let agree = if want.is_finite() {
            (got - want).abs() <= bound
        } else {
            got == want || got.is_nan() && want.is_nan()
        };
        !agree
    })
}

/// Runs `body` on every instruction set of the machine, as operations choose it: once a process.
///
/// `test` is the full name of the calling test, which this runs again in a child process per
/// instruction set.
pub fn on_every_isa(test: &str, body: impl FnOnce()) {
    // Miri starts no processes: it checks the instruction set of `XUNIT_ISA` alone.
    if cfg!(miri) {
        assert_eq!(Ok(simd::selected()), simd::requested());
        return body();
    }
    const CHILD: &str = "XUNIT_TEST_CHILD";
    if std::env::var_os(CHILD).is_some() {
        assert_eq!(Ok(simd::selected()), simd::requested());
        return body();
    }
    for isa in simd::available() {
        let output = this_program()
            .args([test, "--exact", "--nocapture"])
            .env(CHILD, "1")
            .env("XUNIT_ISA", isa.to_string())
            .output()
            .unwrap();
        let (out, err) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "on {isa}:\n{out}{err}");
        assert!(out.contains("1 passed"), "no test is named {test}:\n{out}");
    }
}

/// The program of this test, by the emulator that cargo runs it with where that is of another architecture.
fn this_program() -> Command {
    let program = std::env::current_exe().unwrap();
    let runner = match cfg!(target_arch = "aarch64") {
        true => std::env::var("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER").unwrap_or_default(),
        false => String::new(),
    };
    let mut words = runner.split_whitespace();
    match words.next() {
        Some(emulator) => {
            let mut command = Command::new(emulator);
            command.args(words).arg(program);
            command
        }
        None => Command::new(program),
    }
}

/// Asserts equality bit for bit; one NaN is as good as another: their signs are the compiler's.
#[track_caller]
pub fn same_bits<T: Scalar + Debug>(a: &[T], b: &[T], case: impl FnOnce() -> String) {
    assert_eq!(a.len(), b.len());
    let bits = |x: &T| if x.to_f64().is_nan() { f64::NAN } else { x.to_f64() }.to_bits();
    if let Some(i) = a.iter().zip(b).position(|(a, b)| bits(a) != bits(b)) {
        panic!("{}: element {i} is {:?} and {:?}", case(), a[i], b[i]);
    }
}
