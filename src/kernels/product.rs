//! Small matrix products over rows of pixels: what a 1×1 convolution is made of.
//!
//! [`Columns`] mixes channels pixel by pixel (p = W · x + b, gx += Wᵀ · gp), [`Inner`] takes the
//! inner products of channels (gW = gp · xᵀ). The operands lie as they do in an image, a channel a
//! row, rows `ld` apart ([`Rows`]): a panel of pixels is a range of columns. Where a pixel is a row,
//! gW is a product of [`Columns`]. Panels whose operands fit the second-level cache are fastest;
//! nothing here depends on how an image is cut into panels but the order of the sums of gW.

use std::marker::PhantomData;
use std::mem::MaybeUninit;

use super::transpose::Transpose;
use super::{MAX_LANES, extent};
use crate::simd::{self, Kernel, Scalar, Simd};

/// Rows of `n` elements, `ld` apart, to read.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a, T> {
    ptr: *const T,
    rows: usize,
    ld: usize,
    n: usize,
    data: PhantomData<&'a [T]>,
}

impl<'a, T> Rows<'a, T> {
    /// The first `n` of every `ld` elements of `data`; the last row may end with it.
    ///
    /// Panics if the data is too short, a number is zero or rows overlap.
    pub fn new(data: &'a [T], rows: usize, ld: usize, n: usize) -> Self {
        assert!(data.len() >= extent(rows, ld, n), "{rows} rows of {n}, {ld} apart");
        Self { ptr: data.as_ptr(), rows, ld, n, data: PhantomData }
    }

    /// The rows from `ptr` on: for a tensor that other threads write elsewhere meanwhile.
    ///
    /// # Safety
    /// Every row must be valid for reading, and nobody may write to it, as long as this lives.
    pub unsafe fn from_raw(ptr: *const T, rows: usize, ld: usize, n: usize) -> Self {
        extent(rows, ld, n);
        Self { ptr, rows, ld, n, data: PhantomData }
    }
}

/// Rows of `n` elements, `ld` apart, to write.
#[derive(Debug)]
pub struct RowsMut<'a, T> {
    ptr: *mut T,
    rows: usize,
    ld: usize,
    n: usize,
    data: PhantomData<&'a mut [T]>,
}

impl<'a, T> RowsMut<'a, T> {
    /// As [`Rows::new`].
    pub fn new(data: &'a mut [T], rows: usize, ld: usize, n: usize) -> Self {
        assert!(data.len() >= extent(rows, ld, n), "{rows} rows of {n}, {ld} apart");
        Self { ptr: data.as_mut_ptr(), rows, ld, n, data: PhantomData }
    }

    /// The rows from `ptr` on: for a tensor of which other threads write other columns.
    ///
    /// # Safety
    /// Every row must be valid for reading and writing, and nobody else may use it, as long as
    /// this lives.
    pub unsafe fn from_raw(ptr: *mut T, rows: usize, ld: usize, n: usize) -> Self {
        extent(rows, ld, n);
        Self { ptr, rows, ld, n, data: PhantomData }
    }
}

/// Rows of a matrix that are packed together: whole register tiles of 8 and of 6 rows.
const BLOCK: usize = 24;

/// The matrix of [`Columns`], packed.
#[derive(Clone, Debug)]
pub struct Packed<T> {
    rows: usize,
    columns: usize,
    /// (⌈rows / BLOCK⌉, columns), zeros in the rows beyond the last.
    blocks: Vec<[T; BLOCK]>,
}

impl<T: Scalar> Packed<T> {
    /// `matrix`, rows × columns, contiguous.
    pub fn new(matrix: &[T], rows: usize, columns: usize) -> Self {
        let mut this = Self::zeros(rows, columns, matrix.len());
        let blocks = this.blocks.chunks_exact_mut(columns);
        for (block, matrix) in blocks.zip(matrix.chunks(BLOCK * columns)) {
            let (to, rows) = (block.as_mut_ptr().cast(), matrix.len() / columns);
            // SAFETY: a block has a place for each of these rows, at each column.
            let job = unsafe { Transpose::scatter((matrix, columns), (to, BLOCK), columns, rows) };
            simd::dispatch(job);
        }
        this
    }

    /// The transpose, columns × rows, of `matrix`, which is rows × columns, contiguous.
    pub fn transposed(matrix: &[T], rows: usize, columns: usize) -> Self {
        let mut this = Self::zeros(columns, rows, matrix.len());
        for (block, first) in this.blocks.chunks_exact_mut(rows).zip((0..).step_by(BLOCK)) {
            let count = BLOCK.min(columns - first);
            for (block, row) in block.iter_mut().zip(matrix.chunks_exact(columns)) {
                block[..count].copy_from_slice(&row[first..][..count]);
            }
        }
        this
    }

    /// Of a matrix of so many elements.
    fn zeros(rows: usize, columns: usize, len: usize) -> Self {
        assert!(rows > 0 && columns > 0 && len == rows * columns);
        Self { rows, columns, blocks: vec![[T::ZERO; BLOCK]; rows.div_ceil(BLOCK) * columns] }
    }
}

/// What the sums of [`Columns`] start from.
#[derive(Clone, Copy, Debug)]
pub enum Start<'a, T> {
    /// Zero: c is overwritten.
    Zero,
    /// A value per row: c is overwritten.
    Bias(&'a [T]),
    /// What c holds.
    Sum,
}

/// c\[m\]\[i\] = start + Σₖ a\[m\]\[k\] · b\[k\]\[i\], summed in the order of k wherever i is.
///
/// A register tile of rows × vectors runs down k. The first tile of a strip of columns copies what
/// it loads into a buffer for the tiles below it: the rows of a power-of-two image fall into the
/// same few sets of the first-level cache, and most vectors of others straddle two of its lines.
/// Measured as in `benches/product.rs` (Zen 5, AVX-512, C = 64, best of nine), with and without the
/// copy: `ld` = 4096, n = 1024, 258 and 243 GFLOP/s; `ld` = 65536, n = 1008, 248 and 212; but `ld`
/// = 1600, n = 960, 257 and 267.
///
/// Panics unless a is rows of c × rows of b, b and c have the same n, and the bias a value per row.
pub struct Columns<'a, T> {
    pub a: &'a Packed<T>,
    pub b: Rows<'a, T>,
    pub start: Start<'a, T>,
    pub c: RowsMut<'a, T>,
}

/// Rows of b that are worked off together: with strips of 3 vectors of 64 bytes, 24 KiB of buffer
/// in a first-level cache of 32 KiB or more. C = 256, which takes two passes, is as fast as C = 128
/// (252 and 257 GFLOP/s, n = 512 and 1024, `ld` = 4096, AVX-512, Zen 5).
const DEPTH: usize = 128;
/// The most vectors of a strip.
const VECTORS: usize = 3;

/// A strip of b: `DEPTH` rows of up to `VECTORS` vectors, aligned to cache lines.
#[repr(align(64))]
struct Buffer<T>([MaybeUninit<T>; DEPTH * VECTORS * MAX_LANES]);

impl<T: Scalar> Kernel<T> for Columns<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) {
        let Self { a, b, start, c } = &self;
        assert!(a.rows == c.rows && a.columns == b.rows && b.n == c.n);
        assert!(a.blocks.len() == a.rows.div_ceil(BLOCK) * a.columns);
        if let Start::Bias(bias) = start {
            assert!(bias.len() == a.rows);
        }
        assert!(simd.lanes() <= MAX_LANES);
        // SAFETY: the operands fit each other by the assertions above.
        unsafe {
            // 32 vector registers (AVX-512, NEON) hold 8 × 3 accumulators with their operands, 16
            // hold 6 × 2. AVX-512: 4 × 4 is within 3 % of 8 × 3. AVX2: 6 × 2 makes 129 GFLOP/s,
            // 4 × 2 112, and 4 × 3 spills: 71 (C = 64, n = 1024, ld = 4096, Zen 5).
            if const { S::TILE_VECTORS == 4 } {
                self.strips::<S, 8, 3>(simd);
            } else {
                self.strips::<S, 6, 2>(simd);
            }
        }
    }
}

/// Whether a tile is `narrow`, where `left` are left: so that few rows are computed in vain.
#[inline(always)]
fn is_narrow(left: usize, wide: usize, narrow: usize) -> bool {
    left <= narrow || left == 2 * narrow && left > wide
}

/// A strip of columns, and the rows of b that are being worked off.
struct Strip<T> {
    /// The first column, and how many the first vector has: all lanes unless there is one vector.
    x: usize,
    n: usize,
    /// The first row of b, and how many.
    k: usize,
    depth: usize,
    /// Where they are read, how far apart, and how many elements of the first vector.
    b: *const T,
    ld: usize,
    readable: usize,
    /// A [`Buffer`] to copy them to.
    buffer: *mut T,
    /// Where the next strip will be read, in b: asked for meanwhile.
    next: *const T,
}

impl<T: Scalar> Columns<'_, T> {
    /// # Safety
    /// What `run` asserts.
    #[inline(always)]
    unsafe fn strips<S: Simd<T>, const R: usize, const V: usize>(&self, simd: S) {
        const { assert!(V <= VECTORS && BLOCK.is_multiple_of(R)) };
        let (lanes, n) = (simd.lanes(), self.b.n);
        let mut buffer: MaybeUninit<Buffer<T>> = MaybeUninit::uninit();
        let buffer = buffer.as_mut_ptr().cast();
        let mut x = 0;
        while x < n {
            let left = n - x;
            // SAFETY: columns x..x + V · lanes, or x..x + left.min(lanes), end at n at most.
            unsafe {
                if left >= V * lanes {
                    self.strip::<S, R, V>(simd, x, lanes, buffer);
                    x += V * lanes;
                } else {
                    self.strip::<S, R, 1>(simd, x, left.min(lanes), buffer);
                    x += lanes;
                }
            }
        }
    }

    /// V vectors of columns from `x` on, `n` columns if V is 1.
    ///
    /// # Safety
    /// What `run` asserts; the columns must be inside b and c.
    #[inline(always)]
    unsafe fn strip<S: Simd<T>, const R: usize, const V: usize>(
        &self,
        simd: S,
        x: usize,
        n: usize,
        buffer: *mut T,
    ) {
        let (rows, lanes) = (self.a.rows, simd.lanes());
        for k in (0..self.b.rows).step_by(DEPTH) {
            let depth = DEPTH.min(self.b.rows - k);
            // SAFETY: row k < rows and column x < n of b are readable, as the caller says.
            let b = unsafe { self.b.ptr.add(k * self.b.ld + x) };
            let next = b.wrapping_add(V * lanes);
            let mut strip = Strip { x, n, k, depth, b, ld: self.b.ld, readable: n, buffer, next };
            let mut m = 0;
            while m < rows {
                let left = (rows - m).min(BLOCK - m % BLOCK);
                let narrow = is_narrow(left, R, 4);
                let tall = if narrow { 4 } else { R };
                let copy = m == 0 && left > tall;
                // SAFETY: the strip is of b, inside it as the caller says, or of the copy that the
                // first tile has made of as many rows and vectors.
                unsafe {
                    match (narrow, copy) {
                        (false, false) => self.tile::<S, R, V, false>(simd, &strip, m),
                        (false, true) => self.tile::<S, R, V, true>(simd, &strip, m),
                        (true, false) => self.tile::<S, 4, V, false>(simd, &strip, m),
                        (true, true) => self.tile::<S, 4, V, true>(simd, &strip, m),
                    }
                }
                if copy {
                    (strip.b, strip.ld, strip.readable) = (buffer, V * lanes, lanes);
                }
                m += tall;
            }
        }
    }

    /// R rows from `m` on of a strip.
    ///
    /// # Safety
    /// What `run` asserts; the strip must be inside c and readable, and its buffer writable if
    /// COPY.
    #[inline(always)]
    unsafe fn tile<S: Simd<T>, const R: usize, const V: usize, const COPY: bool>(
        &self,
        simd: S,
        strip: &Strip<T>,
        m: usize,
    ) {
        let lanes = simd.lanes();
        let rows = R.min(self.a.rows - m);
        let &Strip { x, n, k, depth, b, ld, readable, buffer, next } = strip;
        let (n, readable) = if V == 1 { (n, readable) } else { (lanes, lanes) };
        assert!(m < self.a.rows && m % BLOCK + R <= BLOCK);
        let mut acc = [[simd.splat(T::ZERO); V]; R];
        // Here and below the rows are counted to R and then compared: a loop to `rows` would keep
        // the accumulators in memory.
        match self.start {
            Start::Zero if k == 0 => {}
            Start::Bias(bias) if k == 0 => {
                for (r, acc) in acc.iter_mut().enumerate() {
                    if r < rows {
                        *acc = [simd.splat(bias[m + r]); V];
                    }
                }
            }
            _ => {
                for (r, acc) in acc.iter_mut().enumerate() {
                    for (v, acc) in acc.iter_mut().enumerate() {
                        if r < rows {
                            // SAFETY: row m + r and these columns are inside c, as the caller says.
                            *acc = unsafe {
                                load(simd, self.c.ptr.add((m + r) * self.c.ld + x + v * lanes), n)
                            };
                        }
                    }
                }
            }
        }
        // The rows of a tensor are so far apart that the hardware foresees none of them: the next tile
        // of c is asked for, and with each row of taps a vector of the next strip. An xUnitD of
        // 16 × 64 × 64 × 64, k = 7, forward and backward, takes 0.9 times as long with it (Zen 4).
        let (ahead, column) = if m + R < self.a.rows { (m + R, x) } else { (0, x + V * lanes) };
        for r in 0..R {
            for v in 0..V {
                let at = (ahead + r).wrapping_mul(self.c.ld) + column + v * lanes;
                simd.prefetch(self.c.ptr.wrapping_add(at));
            }
        }
        let next = next.wrapping_add(m / R % V * lanes);
        let a = &self.a.blocks[m / BLOCK * self.a.columns + k..][..depth];
        for (i, a) in a.iter().enumerate() {
            simd.prefetch(next.wrapping_add(i.wrapping_mul(self.b.ld)));
            let mut v = [simd.splat(T::ZERO); V];
            for (j, v) in v.iter_mut().enumerate() {
                // SAFETY: the caller says that `depth` rows of the strip are readable, and that
                // the buffer, of `DEPTH` rows of `VECTORS` vectors, is writable.
                unsafe {
                    *v = load(simd, b.add(i * ld + j * lanes), readable);
                    if COPY {
                        simd.store(*v, buffer.add((i * V + j) * lanes));
                    }
                }
            }
            for (r, acc) in acc.iter_mut().enumerate() {
                // SAFETY: m % BLOCK + R ≤ BLOCK by the assertion above.
                let w = simd.splat(unsafe { *a.get_unchecked(m % BLOCK + r) });
                for (acc, &v) in acc.iter_mut().zip(&v) {
                    *acc = simd.fma(w, v, *acc);
                }
            }
        }
        for (r, acc) in acc.iter().enumerate() {
            for (v, &acc) in acc.iter().enumerate() {
                if r < rows {
                    // SAFETY: row m + r and these columns are inside c, as the caller says.
                    unsafe {
                        let c = self.c.ptr.add((m + r) * self.c.ld + x + v * lanes);
                        if n == lanes {
                            simd.store(acc, c);
                        } else {
                            simd.store_first(acc, c, n);
                        }
                    }
                }
            }
        }
    }
}

/// The first `n` elements.
///
/// # Safety
/// As [`Simd::load_first`].
#[inline(always)]
unsafe fn load<T: Scalar, S: Simd<T>>(simd: S, ptr: *const T, n: usize) -> S::V {
    // SAFETY: the caller's promise is the same.
    unsafe { if n == simd.lanes() { simd.load(ptr) } else { simd.load_first(ptr, n) } }
}

/// sum\[m\]\[k\] += Σᵢ a\[m\]\[i\] · b\[k\]\[i\].
///
/// A register tile keeps a vector per product, whose lanes are added up at the end of a block of
/// pixels, and the blocks in `f64`. The order of a sum depends on n and the lanes alone.
///
/// Panics unless a and b have the same n, and the sum rows of a × rows of b.
pub struct Inner<'a, T> {
    pub a: Rows<'a, T>,
    pub b: Rows<'a, T>,
    /// Rows of a × rows of b, contiguous.
    pub sum: &'a mut [f64],
    /// Where as many rows as b has, as far apart, are read after this: asked for meanwhile in the second-level cache, two
    /// rows a register tile, as far as these go. They may be anywhere.
    pub next: &'a [*const T],
}

/// The most pixels of a block: at most 64 products a lane of AVX-512 and 128 of AVX2, for the
/// digits of `f32`. Adding up lanes takes time: with two blocks instead of one, AVX-512 falls from
/// 219 to 198 GFLOP/s (C = 64, n = 960, `ld` = 1600, Zen 5). Blocks of 2048 take the six rows of a
/// tile out of the first-level cache: 148 against 177 (n = `ld` = 4096).
const PIXELS: usize = 1024;

impl<T: Scalar> Kernel<T> for Inner<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(mut self, simd: S) {
        let Self { a, b, sum, .. } = &self;
        assert!(a.n == b.n && a.rows.checked_mul(b.rows) == Some(sum.len()));
        // SAFETY: the operands fit each other by the assertion above.
        unsafe {
            // 32 vector registers hold 4 × 6 accumulators, 16 hold 3 × 4. AVX-512, C = 128, n = ld
            // = 1024, Zen 5: 4 × 6 218 GFLOP/s, 3 × 8 223 (but 134 against 163 where C = 64, n =
            // 1008, ld = 65536), 4 × 5 214, 2 × 12 166. AVX2, C = 64, n = 1024, ld = 4096: 3 × 4
            // 123, 2 × 6 122, 4 × 3 118, 2 × 4 115.
            if const { S::TILE_VECTORS == 4 } {
                self.blocks::<S, 4, 4, 6, 4>(simd);
            } else {
                self.blocks::<S, 3, 2, 4, 4>(simd);
            }
        }
    }
}

impl<T: Scalar> Inner<'_, T> {
    /// Tiles of R rows of a, RN where few are left, by Q, QN rows of b.
    ///
    /// # Safety
    /// What `run` asserts.
    #[inline(always)]
    unsafe fn blocks<
        S: Simd<T>,
        const R: usize,
        const RN: usize,
        const Q: usize,
        const QN: usize,
    >(
        &mut self,
        simd: S,
    ) {
        let n = self.a.n;
        let pixels = n.div_ceil(n.div_ceil(PIXELS)).next_multiple_of(MAX_LANES);
        for x in (0..n).step_by(pixels) {
            let n = pixels.min(n - x);
            let (mut k, mut row) = (0, 0);
            while k < self.b.rows {
                let k_narrow = is_narrow(self.b.rows - k, Q, QN);
                let mut m = 0;
                // The rows of b, which are more, stay in the first-level cache.
                while m < self.a.rows {
                    let m_narrow = is_narrow(self.a.rows - m, R, RN);
                    // SAFETY: m and k are rows, and x + n ≤ n of a and b.
                    unsafe {
                        match (m_narrow, k_narrow) {
                            (false, false) => self.tile::<S, R, Q>(simd, m, k, (x, n), row),
                            (false, true) => self.tile::<S, R, QN>(simd, m, k, (x, n), row),
                            (true, false) => self.tile::<S, RN, Q>(simd, m, k, (x, n), row),
                            (true, true) => self.tile::<S, RN, QN>(simd, m, k, (x, n), row),
                        }
                    }
                    m += if m_narrow { RN } else { R };
                    row += 2;
                }
                k += if k_narrow { QN } else { Q };
            }
        }
    }

    /// R rows of a from `m` on by Q rows of b from `k` on, over n columns from `x` on. Rows beyond
    /// the last are the last once more, and go nowhere. Two rows of what is next, from `row` on, are asked for.
    ///
    /// # Safety
    /// What `run` asserts; `m` and `k` must be rows, the columns inside a and b.
    #[inline(always)]
    unsafe fn tile<S: Simd<T>, const R: usize, const Q: usize>(
        &mut self,
        simd: S,
        m: usize,
        k: usize,
        (x, n): (usize, usize),
        row: usize,
    ) {
        let (lanes, a, b) = (simd.lanes(), self.a, self.b);
        let mut acc = [[simd.splat(T::ZERO); R]; Q];
        let next = [row, row + 1].map(|row| match self.next.get(row / b.rows) {
            Some(next) => next.wrapping_add(row % b.rows * b.ld + x),
            // No branch in the loop below.
            None => a.ptr,
        });
        // SAFETY: rows below the last and columns x..x + n are readable, as the caller says; a
        // partial vector reads only its elements, so that an infinity beyond the panel cannot meet
        // a zero.
        unsafe {
            let a: [*const T; R] =
                std::array::from_fn(|r| a.ptr.add((m + r).min(a.rows - 1) * a.ld + x));
            let b: [*const T; Q] =
                std::array::from_fn(|q| b.ptr.add((k + q).min(b.rows - 1) * b.ld + x));
            let mut i = 0;
            while i + lanes <= n {
                for next in next {
                    simd.prefetch_second(next.wrapping_add(i));
                }
                step(simd, &a, &b, i, lanes, &mut acc);
                i += lanes;
            }
            if i < n {
                step(simd, &a, &b, i, n - i, &mut acc);
            }
        }
        // Added up here and not in the loop below: with its branches the compiler does not unroll
        // it, and then keeps the accumulators in memory.
        let mut sums = [[T::ZERO; R]; Q];
        for (sums, acc) in sums.iter_mut().zip(&acc) {
            for (sum, &acc) in sums.iter_mut().zip(acc) {
                *sum = simd.sum(acc);
            }
        }
        let columns = self.b.rows;
        for (r, row) in self.sum[m * columns..].chunks_exact_mut(columns).take(R).enumerate() {
            for (sum, sums) in row[k..].iter_mut().zip(&sums) {
                *sum += sums[r].to_f64();
            }
        }
    }
}

/// acc += b · aᵀ over `n` columns from `i` on.
///
/// # Safety
/// They must be readable, and `n` ≤ lanes.
#[inline(always)]
unsafe fn step<T: Scalar, S: Simd<T>, const R: usize, const Q: usize>(
    simd: S,
    a: &[*const T; R],
    b: &[*const T; Q],
    i: usize,
    n: usize,
    acc: &mut [[S::V; R]; Q],
) {
    let mut v = [simd.splat(T::ZERO); R];
    for (v, a) in v.iter_mut().zip(a) {
        // SAFETY: the caller's promise is the same.
        *v = unsafe { load(simd, a.add(i), n) };
    }
    for (acc, b) in acc.iter_mut().zip(b) {
        // SAFETY: as above.
        let w = unsafe { load(simd, b.add(i), n) };
        for (acc, &v) in acc.iter_mut().zip(&v) {
            *acc = simd.fma(v, w, *acc);
        }
    }
}
