//! Vectors of `f32` and `f64`, and the choice of the instruction set they run on. The only file
//! that names the SIMD crate.
//!
//! `f32` runs on rten-simd's tokens: zero-sized types that exist only where the CPU has the
//! instruction set. `f64` serves gradient checks: it is an array of eight lanes that the compiler
//! vectorises for the same instruction set, because every kernel is inlined into a function for it: see
//! [`Compiled`].

use std::fmt;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use std::mem::transmute_copy;
use std::sync::{LazyLock, OnceLock};

#[cfg(target_arch = "aarch64")]
use rten_simd::isa::ArmNeonIsa;
use rten_simd::isa::GenericIsa;
#[cfg(target_arch = "x86_64")]
use rten_simd::isa::{Avx2Isa, Avx512Isa};
use rten_simd::ops::{BitOps, FloatOps, IntOps, NumOps};
use rten_simd::{Isa as RtenIsa, Simd as _};

use crate::kernels::MAX_LANES;

/// An instruction set that the kernels can run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// No SIMD instructions named: what the compiler's baseline has.
    Portable,
    /// 128-bit Arm vectors.
    Neon,
    /// 256-bit x86 vectors with fused multiply-add.
    Avx2,
    /// 512-bit x86 vectors.
    Avx512,
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Isa::Portable => "portable",
            Isa::Neon => "neon",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
        })
    }
}

/// The instruction sets of this machine, the best one first.
pub fn available() -> Vec<Isa> {
    let mut isas = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        if Avx512Isa::new().is_some() {
            isas.push(Isa::Avx512);
        }
        if Avx2Isa::new().is_some() {
            isas.push(Isa::Avx2);
        }
    }
    #[cfg(target_arch = "aarch64")]
    if ArmNeonIsa::new().is_some() {
        isas.push(Isa::Neon);
    }
    isas.push(Isa::Portable);
    isas
}

/// The instruction set that `XUNIT_ISA` names (`portable`, `neon`, `avx2` or `avx512`), the best
/// one if it is empty or not set. Errors if the machine has none of that name.
pub fn requested() -> Result<Isa, String> {
    let isas = available();
    let name = std::env::var("XUNIT_ISA").unwrap_or_default();
    if name.is_empty() {
        return Ok(isas[0]);
    }
    isas.iter().find(|isa| isa.to_string() == name).copied().ok_or_else(|| {
        let names: Vec<_> = isas.iter().map(ToString::to_string).collect();
        format!("XUNIT_ISA is {name:?}, which this machine lacks: it has {}", names.join(", "))
    })
}

/// The instruction set in use: [`requested`] when first asked for, the best one if that fails.
pub fn selected() -> Isa {
    static ISA: OnceLock<Isa> = OnceLock::new();
    *ISA.get_or_init(|| requested().unwrap_or_else(|_| available()[0]))
}

/// Whether a core with AVX-512 has a second-level cache of 2 MiB or more, as Intel's have whose third-level
/// cache is far away; no, where that is not known. Without AVX-512 several cores may share one.
pub(crate) fn has_large_second_level_cache() -> bool {
    static LARGE: LazyLock<bool> =
        LazyLock::new(|| selected() == Isa::Avx512 && second_level_cache() >= 2 << 20);
    *LARGE
}

/// Bytes of a core's second-level cache; 0 where that is not known.
#[cfg(target_arch = "x86_64")]
fn second_level_cache() -> usize {
    use std::arch::x86_64::__cpuid_count;
    // The processor's list of its caches: AMD's leaf first, which Intel lacks, then Intel's, which a virtual
    // AMD machine may seem to have. Both are of the same form.
    for leaf in [0x8000_001d, 4] {
        if __cpuid_count(leaf & 0x8000_0000, 0).eax < leaf {
            continue;
        }
        for cache in (0..16).map(|i| __cpuid_count(leaf, i)) {
            let (kind, level) = (cache.eax & 31, cache.eax >> 5 & 7);
            if kind == 0 {
                break;
            }
            if level == 2 {
                let field =
                    |low: u32, bits: u32| (cache.ebx >> low & ((1 << bits) - 1)) as usize + 1;
                // Ways, partitions, bytes of a line, sets.
                return field(22, 10) * field(12, 10) * field(0, 12) * (cache.ecx as usize + 1);
            }
        }
    }
    0
}

#[cfg(not(target_arch = "x86_64"))]
fn second_level_cache() -> usize {
    0
}

/// Whether [`Simd::stream`] is more than a store with the instruction set in use.
pub(crate) fn streams<T: Scalar>() -> bool {
    matches!(selected(), Isa::Avx512 | Isa::Avx2) && size_of::<T>() == size_of::<f32>()
}

/// Whether a vector of the instruction set in use is a whole line of the cache.
pub(crate) fn vectors_are_lines() -> bool {
    selected() == Isa::Avx512
}

/// After [`Simd::stream`]s of this thread: what they wrote may be read, by any thread.
pub fn fence() {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: every x86-64 CPU has the instruction.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}

/// A floating-point type that the kernels compute in.
pub trait Scalar: Copy + Send + Sync + PartialOrd + Default + fmt::Debug + 'static {
    const ZERO: Self;
    const ONE: Self;
    /// Whether convolutions go by minimal filtering where that is faster: code for each
    /// instruction set that `f64` can do without. 4 × 64 × 64 × 64, one thread: k = 9 6.3 ms with and
    /// without, k = 11 8 ms of plain sums and 12 filtered (AVX-512).
    const FILTERED: bool;
    fn from_f64(x: f64) -> Self;
    fn to_f64(self) -> f64;
    /// `self · a + b`, rounded once or twice.
    fn fma(self, a: Self, b: Self) -> Self;
    /// Runs `kernel` with the vectors of `isa`; with the portable ones if the machine lacks it.
    fn dispatch<K: Kernel<Self>>(isa: Isa, kernel: K) -> K::Output;
}

/// Work that is generic over the vectors it runs on.
pub trait Kernel<T: Scalar> {
    type Output;
    /// Must be `#[inline(always)]`, with all that it calls, or it is compiled for the baseline.
    fn run<S: Simd<T>>(self, simd: S) -> Self::Output;
}

/// Vector operations of one instruction set on elements of type `T`.
pub trait Simd<T: Scalar>: Copy {
    type V: Copy;
    /// Column vectors of the widest register tile: 4 where there are 32 vector registers (AVX-512,
    /// NEON), 2 where there are 16. What depends on it is in `if const`, or the compiler spends much time
    /// on tiles that nobody runs.
    const TILE_VECTORS: usize;
    /// Whether there is [`Simd::load_range`].
    const MASKED_LOADS: bool = false;
    /// Lanes of a vector.
    fn lanes(self) -> usize;
    fn splat(self, x: T) -> Self::V;
    /// # Safety
    /// `ptr` must be valid for reading `lanes` elements.
    unsafe fn load(self, ptr: *const T) -> Self::V;
    /// The first `n` elements, then zeros.
    ///
    /// # Safety
    /// `ptr` must be valid for reading `n` ≤ `lanes` elements.
    unsafe fn load_first(self, ptr: *const T, n: usize) -> Self::V;
    /// The elements `first`..`end`, zeros elsewhere; `ptr` points to element 0, which need not be there. Only where
    /// [`Simd::MASKED_LOADS`].
    ///
    /// # Safety
    /// They must be valid for reading, and first ≤ end ≤ `lanes`.
    unsafe fn load_range(self, _ptr: *const T, _first: usize, _end: usize) -> Self::V {
        unreachable!("MASKED_LOADS is false")
    }
    /// Asks for the cache line at `ptr`, which may point anywhere.
    fn prefetch(self, ptr: *const T);
    /// [`Simd::prefetch`] to the second-level cache.
    #[inline(always)]
    fn prefetch_second(self, ptr: *const T) {
        self.prefetch(ptr);
    }
    /// # Safety
    /// `ptr` must be valid for writing `lanes` elements.
    unsafe fn store(self, x: Self::V, ptr: *mut T);
    /// # Safety
    /// `ptr` must be valid for writing `n` ≤ `lanes` elements.
    unsafe fn store_first(self, x: Self::V, ptr: *mut T, n: usize);
    /// [`Simd::store`] past the caches, if [`streams`]: what is not read again soon takes half the traffic so,
    /// as its lines are not fetched before they are written.
    ///
    /// # Safety
    /// `ptr` must be valid for writing `lanes` elements, and aligned to as many. Nobody may read them before
    /// this thread has called [`fence`].
    #[inline(always)]
    unsafe fn stream(self, x: Self::V, ptr: *mut T) {
        // SAFETY: the caller's promise is the same.
        unsafe { self.store(x, ptr) }
    }
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// a · b + c
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The first `n` lanes of x, then zeros.
    fn keep(self, x: Self::V, n: usize) -> Self::V;
    /// `then` where u ≤ 0, else (NaN too) `other`.
    fn select_le_zero(self, u: Self::V, then: Self::V, other: Self::V) -> Self::V;
    fn sum(self, x: Self::V) -> T;
    /// exp(x) of x ≤ 88; in `f32` zero where it is no normal number.
    fn exp(self, x: Self::V) -> Self::V;
    /// Eight rows of eight elements, `from_ld` apart, become columns: rows `to_ld` apart.
    ///
    /// # Safety
    /// The rows must be valid for reading and for writing, and not overlap.
    #[inline(always)]
    unsafe fn transpose(self, from: *const T, from_ld: usize, to: *mut T, to_ld: usize) {
        // SAFETY: the caller's promise.
        unsafe { transpose(from, from_ld, to, to_ld) }
    }
    fn sigmoid(self, x: Self::V) -> Self::V;
    /// The even and the odd elements of a and b, one after the other.
    #[inline(always)]
    fn unzip(self, a: Self::V, b: Self::V) -> [Self::V; 2] {
        unzip(self, a, b)
    }
    /// The elements of a and b by turns: what [`Simd::unzip`] undoes.
    #[inline(always)]
    fn zip(self, a: Self::V, b: Self::V) -> [Self::V; 2] {
        zip(self, a, b)
    }
    /// Runs a part of a kernel, of `f32` as a function of its own, for the sake of the compiler's time.
    #[inline(always)]
    fn apart<K: Kernel<T>>(self, kernel: K) -> K::Output {
        kernel.run(self)
    }
}

/// [`Simd::unzip`], element by element.
#[inline(always)]
fn unzip<T: Scalar, S: Simd<T>>(simd: S, a: S::V, b: S::V) -> [S::V; 2] {
    let mut pairs = [T::ZERO; 2 * MAX_LANES];
    let mut parts = [[T::ZERO; MAX_LANES]; 2];
    // SAFETY: no vector has more lanes.
    unsafe {
        simd.store(a, pairs.as_mut_ptr());
        simd.store(b, pairs[simd.lanes()..].as_mut_ptr());
        for (i, &x) in pairs[..2 * simd.lanes()].iter().enumerate() {
            parts[i % 2][i / 2] = x;
        }
        [simd.load(parts[0].as_ptr()), simd.load(parts[1].as_ptr())]
    }
}

/// [`Simd::zip`], element by element.
#[inline(always)]
fn zip<T: Scalar, S: Simd<T>>(simd: S, a: S::V, b: S::V) -> [S::V; 2] {
    let mut pairs = [T::ZERO; 2 * MAX_LANES];
    let mut parts = [[T::ZERO; MAX_LANES]; 2];
    // SAFETY: no vector has more lanes.
    unsafe {
        simd.store(a, parts[0].as_mut_ptr());
        simd.store(b, parts[1].as_mut_ptr());
        for (i, x) in pairs[..2 * simd.lanes()].iter_mut().enumerate() {
            *x = parts[i % 2][i / 2];
        }
        [simd.load(pairs.as_ptr()), simd.load(pairs[simd.lanes()..].as_ptr())]
    }
}

/// [`Simd::transpose`], element by element.
///
/// # Safety
/// As there.
#[inline(always)]
unsafe fn transpose<T: Scalar>(from: *const T, from_ld: usize, to: *mut T, to_ld: usize) {
    for i in 0..8 {
        for j in 0..8 {
            // SAFETY: the caller's promise.
            unsafe { *to.add(j * to_ld + i) = *from.add(i * from_ld + j) };
        }
    }
}

/// [`Simd::transpose`]: the compiler makes 7 cycles an element of the loops.
///
/// # Safety
/// As there, on a CPU with AVX.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn avx_transpose(from: *const f32, from_ld: usize, to: *mut f32, to_ld: usize) {
    use std::arch::x86_64::*;
    // SAFETY: the caller's promise.
    unsafe {
        let row = |i: usize| _mm256_loadu_ps(from.add(i * from_ld));
        let store = |v: __m256, j: usize| _mm256_storeu_ps(to.add(j * to_ld), v);
        let (a, b) = (row(0), row(1));
        let (t0, t1) = (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
        let (a, b) = (row(2), row(3));
        let (t2, t3) = (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
        let (a, b) = (row(4), row(5));
        let (t4, t5) = (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
        let (a, b) = (row(6), row(7));
        let (t6, t7) = (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
        // Columns j of rows 0 to 3 (u) and 4 to 7 (v), and columns j + 4 in the upper halves.
        let (u, v) = (_mm256_shuffle_ps::<0x44>(t0, t2), _mm256_shuffle_ps::<0x44>(t4, t6));
        store(_mm256_permute2f128_ps::<0x20>(u, v), 0);
        store(_mm256_permute2f128_ps::<0x31>(u, v), 4);
        let (u, v) = (_mm256_shuffle_ps::<0xEE>(t0, t2), _mm256_shuffle_ps::<0xEE>(t4, t6));
        store(_mm256_permute2f128_ps::<0x20>(u, v), 1);
        store(_mm256_permute2f128_ps::<0x31>(u, v), 5);
        let (u, v) = (_mm256_shuffle_ps::<0x44>(t1, t3), _mm256_shuffle_ps::<0x44>(t5, t7));
        store(_mm256_permute2f128_ps::<0x20>(u, v), 2);
        store(_mm256_permute2f128_ps::<0x31>(u, v), 6);
        let (u, v) = (_mm256_shuffle_ps::<0xEE>(t1, t3), _mm256_shuffle_ps::<0xEE>(t5, t7));
        store(_mm256_permute2f128_ps::<0x20>(u, v), 3);
        store(_mm256_permute2f128_ps::<0x31>(u, v), 7);
    }
}

/// Of two vectors of sixteen lanes, one after the other: the even and the odd elements; those of both by turns, of
/// the first and of the second halves.
#[cfg(target_arch = "x86_64")]
const EVEN_ODD: [[i32; 16]; 2] = {
    let mut lists = [[0; 16]; 2];
    let mut i = 0;
    while i < 32 {
        lists[i % 2][i / 2] = i as i32;
        i += 1;
    }
    lists
};
#[cfg(target_arch = "x86_64")]
const BY_TURNS: [[i32; 16]; 2] = {
    let mut lists = [[0; 16]; 2];
    let mut i = 0;
    while i < 32 {
        lists[i / 16][i % 16] = (i / 2 + i % 2 * 16) as i32;
        i += 1;
    }
    lists
};

/// For both lists, the elements that they name.
///
/// # Safety
/// On a CPU with AVX-512; V must be `__m512`.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn avx512_permute<V>(a: V, b: V, lists: &'static [[i32; 16]; 2]) -> [V; 2] {
    use std::arch::x86_64::{__m512, _mm512_loadu_si512, _mm512_permutex2var_ps};
    // SAFETY: the caller's promise; the lists are as long as vectors.
    unsafe {
        let (a, b) = (transmute_copy::<V, __m512>(&a), transmute_copy::<V, __m512>(&b));
        let of = |list: &[i32; 16]| {
            let list = _mm512_loadu_si512(list.as_ptr().cast());
            transmute_copy(&_mm512_permutex2var_ps(a, list, b))
        };
        [of(&lists[0]), of(&lists[1])]
    }
}

/// `f32` vectors of an rten-simd instruction set.
#[derive(Clone, Copy)]
struct F32<I, const TILE_VECTORS: usize>(I);

impl<I: RtenIsa, const TILE_VECTORS: usize> F32<I, TILE_VECTORS> {
    /// The mask of the first `n` lanes: one comparison, where `first_n_mask` is a loop.
    #[inline(always)]
    fn first(self, n: usize) -> <I::F32 as rten_simd::Simd>::Mask {
        const NUMBERS: [f32; 16] =
            [0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.];
        let ops = self.0.f32();
        assert!(ops.len() <= NUMBERS.len());
        // SAFETY: there are as many numbers as lanes, by the assertion above.
        let numbers = unsafe { ops.load_ptr(NUMBERS.as_ptr()) };
        ops.lt(numbers, ops.splat(n as f32))
    }

    /// Whether this is AVX-512, which of this architecture's instruction sets alone has 16 lanes: its vectors
    /// are `__m512`. It has instructions for what others do in several.
    #[cfg(target_arch = "x86_64")]
    const AVX512: bool = size_of::<I::F32>() == 64;

    /// 1 / x, a normal number.
    #[inline(always)]
    fn reciprocal(self, x: I::F32) -> I::F32 {
        let ops = self.0.f32();
        #[cfg(target_arch = "x86_64")]
        if const { Self::AVX512 } {
            use std::arch::x86_64::{__m512, _mm512_rcp14_ps};
            // SAFETY: see `AVX512`.
            let rough: I::F32 =
                unsafe { transmute_copy(&_mm512_rcp14_ps(transmute_copy::<I::F32, __m512>(&x))) };
            // A step of Newton's takes 14 bits to 28. A division of so many lanes takes 16 cycles (Intel).
            let error = ops.mul_sub_from(rough, x, ops.one());
            return ops.mul_add(rough, error, rough);
        }
        ops.reciprocal(x)
    }

    /// [`Simd::exp`] of x, or of −x if NEGATE.
    #[inline(always)]
    fn exp_of<const NEGATE: bool>(self, x: I::F32) -> I::F32 {
        #[cfg(target_arch = "x86_64")]
        if const { Self::AVX512 } {
            // SAFETY: see `AVX512`.
            return unsafe { transmute_copy(&avx512_exp::<NEGATE>(transmute_copy(&x))) };
        }
        // rten-vecmath's `Exp` has the same steps, and twice as many for x > 0 and for results that
        // are no normal numbers.
        let (ops, ints) = (self.0.f32(), self.0.i32());
        let x = if NEGATE { ops.neg(x) } else { x };
        let fma = |a, b, c| ops.mul_add(a, ops.splat(b), c);
        // x = n · ln 2 + r with an integer n, of which the sum with 1.5 · 2²³ has no fraction.
        let magic = ops.splat(12_582_912.0);
        let n = ops.sub(fma(x, std::f32::consts::LOG2_E, magic), magic);
        let r = fma(n, -LN_2[1], fma(n, -LN_2[0], x));
        // exp(r) within 3e-9 where |r| ≤ ln 2 / 2, all but the rounding of its steps.
        let mut y = ops.splat(1.381_446_7e-3);
        for coefficient in [8.368_781e-3, 4.166_839_4e-2, 0.166_665_2, 0.499_999_93, 1.0, 1.0] {
            y = ops.mul_add(y, r, ops.splat(coefficient));
        }
        let least = ops.splat(LEAST);
        let power = ints.shift_left::<23>(ints.add(ops.to_int_trunc(n), ints.splat(127)));
        let y = ops.mul(y, power.reinterpret_cast());
        ops.select(ops.zero(), y, ops.lt(x, least))
    }
}

/// ln 2 in two parts, of which the products of the first and a multiple of 1 / 16, as large as they come, are exact.
const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];

/// Below, the exponential is no normal number.
const LEAST: f32 = -87.336_54;

/// [`Simd::exp`] of x, or of −x if NEGATE, with sixteenths of powers of two from a register, so that half the
/// polynomial will do.
///
/// # Safety
/// On a CPU with AVX-512.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn avx512_exp<const NEGATE: bool>(
    x: std::arch::x86_64::__m512,
) -> std::arch::x86_64::__m512 {
    use std::arch::x86_64::*;
    // 2^(i / 16)
    const ROOTS: [f32; 16] = [
        1.0,
        1.044_273_7,
        1.090_507_7,
        1.138_788_6,
        1.189_207_1,
        1.241_857_8,
        1.296_839_6,
        1.354_255_6,
        std::f32::consts::SQRT_2,
        1.476_826_2,
        1.542_210_8,
        1.610_490_3,
        1.681_792_9,
        1.756_252_2,
        1.834_008_1,
        1.915_206_6,
    ];
    // SAFETY: the caller's promise; there are sixteen roots.
    unsafe {
        let splat = |x: f32| _mm512_set1_ps(x);
        // ±x = n · ln 2 + r with n a multiple of 1 / 16: the sum with 1.5 · 2¹⁹ has no finer fraction, and n's
        // sixteenths in its last four bits, which are all that the permutation looks at.
        let (sign, magic) = (if NEGATE { -1.0 } else { 1.0 }, splat(786_432.0));
        let sum = _mm512_fmadd_ps(x, splat(sign * std::f32::consts::LOG2_E), magic);
        let n = _mm512_sub_ps(sum, magic);
        let root = _mm512_permutexvar_ps(_mm512_castps_si512(sum), _mm512_loadu_ps(ROOTS.as_ptr()));
        let first = splat(LN_2[0]);
        let r = if NEGATE { _mm512_fnmsub_ps(n, first, x) } else { _mm512_fnmadd_ps(n, first, x) };
        let r = _mm512_fmadd_ps(n, splat(-LN_2[1]), r);
        // exp(r) − 1 = r · p within 1e-8 where |r| ≤ ln 2 / 32.
        let p = _mm512_fmadd_ps(_mm512_fmadd_ps(r, splat(1.0 / 6.0), splat(0.5)), r, splat(1.0));
        let y = _mm512_fmadd_ps(_mm512_mul_ps(root, r), p, root);
        // Subnormal numbers would take 280 cycles; they are masked. NaN is not.
        let normal = if NEGATE {
            _mm512_cmp_ps_mask::<_CMP_NGT_UQ>(x, splat(-LEAST))
        } else {
            _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, splat(LEAST))
        };
        // By 2^⌊n⌋.
        _mm512_maskz_scalef_ps(normal, y, n)
    }
}

impl<I: RtenIsa, const TILE_VECTORS: usize> Simd<f32> for F32<I, TILE_VECTORS> {
    type V = I::F32;
    const TILE_VECTORS: usize = TILE_VECTORS;
    #[cfg(target_arch = "x86_64")]
    const MASKED_LOADS: bool = Self::AVX512;

    #[inline(always)]
    fn lanes(self) -> usize {
        self.0.f32().len()
    }
    #[inline(always)]
    fn splat(self, x: f32) -> I::F32 {
        self.0.f32().splat(x)
    }
    #[inline(always)]
    unsafe fn load(self, ptr: *const f32) -> I::F32 {
        // SAFETY: the caller's promise is the same.
        unsafe { self.0.f32().load_ptr(ptr) }
    }
    #[inline(always)]
    unsafe fn load_first(self, ptr: *const f32, n: usize) -> I::F32 {
        // SAFETY: the mask is set for the first `n` lanes alone, which the caller vouches for.
        unsafe { self.0.f32().load_ptr_mask(ptr, self.first(n)) }
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load_range(self, ptr: *const f32, first: usize, end: usize) -> I::F32 {
        use std::arch::x86_64::_mm512_maskz_loadu_ps;
        if const { Self::AVX512 } {
            let mask = ((1u32 << end) - (1 << first)) as u16;
            // SAFETY: see `AVX512`; the mask is set for lanes alone that the caller vouches for.
            return unsafe { transmute_copy(&_mm512_maskz_loadu_ps(mask, ptr)) };
        }
        unreachable!("MASKED_LOADS is false")
    }
    #[inline(always)]
    fn prefetch(self, ptr: *const f32) {
        self.0.f32().prefetch(ptr);
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn prefetch_second(self, ptr: *const f32) {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: every x86-64 CPU has the instruction, which does nothing but ask.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(ptr.cast()) }
    }
    #[inline(always)]
    unsafe fn store(self, x: I::F32, ptr: *mut f32) {
        // SAFETY: the caller's promise is the same.
        unsafe { self.0.f32().store_ptr(x, ptr) }
    }
    #[inline(always)]
    unsafe fn store_first(self, x: I::F32, ptr: *mut f32, n: usize) {
        // SAFETY: the mask is set for the first `n` lanes alone, which the caller vouches for.
        unsafe { self.0.f32().store_ptr_mask(x, ptr, self.first(n)) }
    }
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    #[inline(always)]
    unsafe fn stream(self, x: I::F32, ptr: *mut f32) {
        use std::arch::x86_64::{_mm256_stream_ps, _mm512_stream_ps};
        // SAFETY: the caller's promise is the same; of this architecture's instruction sets those with so
        // many lanes are AVX-512 and AVX2.
        unsafe {
            match self.lanes() {
                16 => _mm512_stream_ps(ptr, transmute_copy(&x)),
                8 => _mm256_stream_ps(ptr, transmute_copy(&x)),
                _ => self.store(x, ptr),
            }
        }
    }
    #[inline(always)]
    fn add(self, a: I::F32, b: I::F32) -> I::F32 {
        self.0.f32().add(a, b)
    }
    #[inline(always)]
    fn sub(self, a: I::F32, b: I::F32) -> I::F32 {
        self.0.f32().sub(a, b)
    }
    #[inline(always)]
    fn mul(self, a: I::F32, b: I::F32) -> I::F32 {
        self.0.f32().mul(a, b)
    }
    #[inline(always)]
    fn fma(self, a: I::F32, b: I::F32, c: I::F32) -> I::F32 {
        self.0.f32().mul_add(a, b, c)
    }
    #[inline(always)]
    fn keep(self, x: I::F32, n: usize) -> I::F32 {
        let ops = self.0.f32();
        ops.select(x, ops.zero(), self.first(n))
    }
    #[inline(always)]
    fn select_le_zero(self, u: I::F32, then: I::F32, other: I::F32) -> I::F32 {
        let ops = self.0.f32();
        ops.select(then, other, ops.le(u, ops.zero()))
    }
    #[inline(always)]
    fn sum(self, x: I::F32) -> f32 {
        self.0.f32().sum(x)
    }
    #[inline(always)]
    fn exp(self, x: I::F32) -> I::F32 {
        self.exp_of::<false>(x)
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn transpose(self, from: *const f32, from_ld: usize, to: *mut f32, to_ld: usize) {
        // SAFETY: the caller's promise; of this architecture's instruction sets, those with as many
        // lanes include AVX.
        unsafe {
            if self.lanes() >= 8 {
                avx_transpose(from, from_ld, to, to_ld);
            } else {
                transpose(from, from_ld, to, to_ld);
            }
        }
    }
    #[inline(always)]
    fn sigmoid(self, x: I::F32) -> I::F32 {
        // rten-vecmath's `Sigmoid` takes more steps for the same.
        let ops = self.0.f32();
        let e = self.exp_of::<true>(x);
        let y = self.reciprocal(ops.add(ops.one(), e));
        // Where it is no normal number, the exponential of −x may be none at all.
        ops.select(ops.zero(), y, ops.lt(x, ops.splat(LEAST)))
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn unzip(self, a: I::F32, b: I::F32) -> [I::F32; 2] {
        use std::arch::x86_64::*;
        // SAFETY: of this architecture's instruction sets those with so many lanes are AVX-512 and AVX2.
        unsafe {
            match self.lanes() {
                16 => avx512_permute(a, b, &EVEN_ODD),
                8 => {
                    let (a, b) = (transmute_copy(&a), transmute_copy(&b));
                    // Two of a, two of b in each half.
                    let in_order = |x| _mm256_permute4x64_pd::<0xD8>(_mm256_castps_pd(x));
                    let even = in_order(_mm256_shuffle_ps::<0x88>(a, b));
                    let odd = in_order(_mm256_shuffle_ps::<0xDD>(a, b));
                    [transmute_copy(&even), transmute_copy(&odd)]
                }
                _ => unzip(self, a, b),
            }
        }
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn zip(self, a: I::F32, b: I::F32) -> [I::F32; 2] {
        use std::arch::x86_64::*;
        // SAFETY: as in `unzip`.
        unsafe {
            match self.lanes() {
                16 => avx512_permute(a, b, &BY_TURNS),
                8 => {
                    let (a, b) = (transmute_copy(&a), transmute_copy(&b));
                    let (low, high) = (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
                    let first = _mm256_permute2f128_ps::<0x20>(low, high);
                    let second = _mm256_permute2f128_ps::<0x31>(low, high);
                    [transmute_copy(&first), transmute_copy(&second)]
                }
                _ => zip(self, a, b),
            }
        }
    }
    #[cfg(target_arch = "aarch64")]
    #[inline(always)]
    fn unzip(self, a: I::F32, b: I::F32) -> [I::F32; 2] {
        use std::arch::aarch64::{vuzp1q_f32, vuzp2q_f32};
        const { assert!(size_of::<I::F32>() == 16) };
        // SAFETY: every CPU of this architecture has the instructions; vectors are four numbers.
        unsafe {
            let (a, b) = (transmute_copy(&a), transmute_copy(&b));
            [transmute_copy(&vuzp1q_f32(a, b)), transmute_copy(&vuzp2q_f32(a, b))]
        }
    }
    #[cfg(target_arch = "aarch64")]
    #[inline(always)]
    fn zip(self, a: I::F32, b: I::F32) -> [I::F32; 2] {
        use std::arch::aarch64::{vzip1q_f32, vzip2q_f32};
        const { assert!(size_of::<I::F32>() == 16) };
        // SAFETY: as in `unzip`.
        unsafe {
            let (a, b) = (transmute_copy(&a), transmute_copy(&b));
            [transmute_copy(&vzip1q_f32(a, b)), transmute_copy(&vzip2q_f32(a, b))]
        }
    }
    #[inline(always)]
    fn apart<K: Kernel<f32>>(self, kernel: K) -> K::Output {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: of this architecture's instruction sets those with so many lanes are AVX-512 and AVX2.
        unsafe {
            match size_of::<I::F32>() {
                64 => return kernel.on_avx512(self),
                32 => return kernel.on_avx2(self),
                _ => {}
            }
        }
        kernel.on_any(self)
    }
}

const F64_LANES: usize = 8;

/// `f64` vectors: eight lanes that the compiler maps onto the registers there are.
#[derive(Clone, Copy)]
struct F64;

#[inline(always)]
fn lanes(f: impl Fn(usize) -> f64) -> [f64; F64_LANES] {
    [f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7)]
}

impl Simd<f64> for F64 {
    type V = [f64; F64_LANES];
    const TILE_VECTORS: usize = 2;

    #[inline(always)]
    fn lanes(self) -> usize {
        F64_LANES
    }
    #[inline(always)]
    fn splat(self, x: f64) -> Self::V {
        [x; F64_LANES]
    }
    #[inline(always)]
    unsafe fn load(self, ptr: *const f64) -> Self::V {
        // SAFETY: the caller vouches for eight readable elements.
        unsafe { ptr.cast::<Self::V>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_first(self, ptr: *const f64, n: usize) -> Self::V {
        let mut x = [0.0; F64_LANES];
        // SAFETY: the caller vouches for `n` readable elements; `n` ≤ 8.
        unsafe { std::ptr::copy_nonoverlapping(ptr, x.as_mut_ptr(), n) };
        x
    }
    #[inline(always)]
    fn prefetch(self, _: *const f64) {}
    #[inline(always)]
    unsafe fn store(self, x: Self::V, ptr: *mut f64) {
        // SAFETY: the caller vouches for eight writable elements.
        unsafe { ptr.cast::<Self::V>().write_unaligned(x) }
    }
    #[inline(always)]
    unsafe fn store_first(self, x: Self::V, ptr: *mut f64, n: usize) {
        // SAFETY: the caller vouches for `n` writable elements; `n` ≤ 8.
        unsafe { std::ptr::copy_nonoverlapping(x.as_ptr(), ptr, n) }
    }
    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        lanes(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        lanes(|i| a[i] - b[i])
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        lanes(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        lanes(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    fn keep(self, x: Self::V, n: usize) -> Self::V {
        lanes(|i| if i < n { x[i] } else { 0.0 })
    }
    #[inline(always)]
    fn select_le_zero(self, u: Self::V, then: Self::V, other: Self::V) -> Self::V {
        lanes(|i| if u[i] <= 0.0 { then[i] } else { other[i] })
    }
    #[inline(always)]
    fn sum(self, x: Self::V) -> f64 {
        ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]))
    }
    #[inline(always)]
    fn exp(self, x: Self::V) -> Self::V {
        lanes(|i| x[i].exp())
    }
    #[inline(always)]
    fn sigmoid(self, x: Self::V) -> Self::V {
        lanes(|i| 1.0 / (1.0 + (-x[i]).exp()))
    }
}

/// A kernel as a function for each instruction set. Methods, because the compiler puts those into the module of their
/// `self`: so it works on several modules of kernels at a time. Not inlined, because what it takes grows faster than
/// the length of a function.
trait Compiled<T: Scalar>: Kernel<T> {
    /// # Safety
    /// On a CPU with AVX-512.
    #[cfg(target_arch = "x86_64")]
    unsafe fn on_avx512(self, simd: impl Simd<T>) -> Self::Output;
    /// # Safety
    /// On a CPU with AVX2.
    #[cfg(target_arch = "x86_64")]
    unsafe fn on_avx2(self, simd: impl Simd<T>) -> Self::Output;
    fn on_any(self, simd: impl Simd<T>) -> Self::Output;
}

impl<T: Scalar, K: Kernel<T>> Compiled<T> for K {
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c")]
    #[inline(never)]
    unsafe fn on_avx512(self, simd: impl Simd<T>) -> K::Output {
        self.run(simd)
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline(never)]
    unsafe fn on_avx2(self, simd: impl Simd<T>) -> K::Output {
        self.run(simd)
    }

    #[inline(never)]
    fn on_any(self, simd: impl Simd<T>) -> K::Output {
        self.run(simd)
    }
}

macro_rules! scalar {
    ($type:ty, |$isa:ident, $tile:ident| $simd:expr) => {
        impl Scalar for $type {
            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;
            const FILTERED: bool = size_of::<Self>() == size_of::<f32>();
            #[inline(always)]
            fn from_f64(x: f64) -> Self {
                x as $type
            }
            #[inline(always)]
            fn to_f64(self) -> f64 {
                f64::from(self)
            }
            #[inline(always)]
            fn fma(self, a: Self, b: Self) -> Self {
                self * a + b
            }
            fn dispatch<K: Kernel<Self>>(isa: Isa, kernel: K) -> K::Output {
                #[cfg(target_arch = "x86_64")]
                {
                    if isa == Isa::Avx512
                        && let Some($isa) = Avx512Isa::new()
                    {
                        const $tile: usize = 4;
                        // SAFETY: the token proves that the CPU has these features.
                        return unsafe { kernel.on_avx512($simd) };
                    }
                    if isa == Isa::Avx2
                        && let Some($isa) = Avx2Isa::new()
                    {
                        const $tile: usize = 2;
                        // SAFETY: the token proves that the CPU has these features.
                        return unsafe { kernel.on_avx2($simd) };
                    }
                }
                #[cfg(target_arch = "aarch64")]
                if isa == Isa::Neon
                    && let Some($isa) = ArmNeonIsa::new()
                {
                    const $tile: usize = 4;
                    return kernel.on_any($simd);
                }
                let $isa = GenericIsa::new();
                const $tile: usize = 2;
                let _ = isa;
                kernel.on_any($simd)
            }
        }
    };
}

scalar!(f32, |isa, TILE| F32::<_, TILE>(isa));
scalar!(f64, |isa, TILE| {
    let _ = (isa, TILE);
    F64
});

/// Runs `kernel` on the [`selected`] instruction set.
#[inline]
pub fn dispatch<T: Scalar, K: Kernel<T>>(kernel: K) -> K::Output {
    T::dispatch(selected(), kernel)
}

/// The lanes of a vector of the [`selected`] instruction set.
pub fn selected_lanes<T: Scalar>() -> usize {
    struct Lanes;
    impl<T: Scalar> Kernel<T> for Lanes {
        type Output = usize;
        #[inline(always)]
        fn run<S: Simd<T>>(self, simd: S) -> usize {
            simd.lanes()
        }
    }
    dispatch::<T, _>(Lanes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_level_cache_is_of_a_plausible_size() {
        let bytes = second_level_cache();
        assert!(bytes == 0 || (1 << 17..1 << 26).contains(&bytes), "{bytes}");
        assert_eq!(bytes % 4096, 0);
    }
}
