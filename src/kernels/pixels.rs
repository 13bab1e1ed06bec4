//! Depthwise convolution of tensors in channels_last as they are in memory, and its weight gradient, in `f32`: for
//! kernels 3, 5, 7 and 9 wide and strides of 1 and 2, and the parts of such kernels that reach one phase of a stride.
//!
//! A vector is some channels of a pixel. A tile of outputs keeps the taps of a row of the kernel in registers, and
//! every loaded pixel meets the taps of all outputs that it reaches; what lies outside of the image is left out. So
//! nothing is copied, padded or laid out anew, and memory is read and written in order. Time over that by
//! [`super::conv`]'s blocks, which are copied (Xeon, one thread, 64 × 64 and 56 × 56): forward 0.57 to 0.66 of K = 3,
//! 0.53 to 0.6 of 5, 0.7 of 7, 0.77 of 9; input gradient 0.5 to 0.7. In the weight gradient it is the
//! gradients of a row that stay in registers: see [`Columns::shifted`].

use std::hint::black_box;
use std::ops::Range;

use super::general::Places;
use super::{MAX_LANES, extent};
use crate::simd::{Kernel, Scalar, Simd};

/// Some channels of an image in channels_last.
#[derive(Clone, Copy)]
pub struct Image<'a, T> {
    /// From the first of these channels of the first pixel on.
    data: &'a [T],
    rows: usize,
    columns: usize,
    /// Elements from one pixel to the next.
    step: usize,
    channels: usize,
    /// What is read after it, if it is in a cache itself.
    next: Option<*const T>,
}

impl<'a, T> Image<'a, T> {
    /// `pixels` are (rows, columns, step).
    pub fn new(
        pixels: &'a [T],
        (rows, columns): (usize, usize),
        step: usize,
        channels: Range<usize>,
    ) -> Self {
        assert!(pixels.len() == rows * columns * step && !pixels.is_empty());
        assert!(channels.start < channels.end && channels.end <= step);
        let data = &pixels[channels.start..];
        Self { data, rows, columns, step, channels: channels.len(), next: None }
    }

    /// For an image that a cache holds: not its own next rows are asked for, but as many elements from `next` on.
    pub fn before(self, next: *const T) -> Self {
        Self { next: Some(next), ..self }
    }

    /// Elements from one row to the next.
    fn row(&self) -> usize {
        self.columns * self.step
    }

    /// Where pixel (y, x) is, which need not be there.
    fn at(&self, y: isize, x: isize) -> *const T {
        self.data.as_ptr().wrapping_offset(self.offset(y, x))
    }

    fn offset(&self, y: isize, x: isize) -> isize {
        y.wrapping_mul(self.row() as isize).wrapping_add(x * self.step as isize)
    }
}

/// Where taps meet an image.
#[derive(Clone, Copy)]
pub struct Grid {
    /// Rows and columns of taps.
    pub kernel: (usize, usize),
    /// Rows and columns of the image from one output to the next.
    pub stride: (usize, usize),
    /// The row and column of the image that the first tap of the first output meets, outside of it in padding.
    pub origin: (isize, isize),
}

impl Grid {
    /// The row of the image that the first tap of outputs `y` meets, and which of `count` rows from there on are of an
    /// image of `rows` rows.
    fn inside(&self, y: usize, rows: usize, count: usize) -> (isize, Range<usize>) {
        let first = self.origin.0 + (y * self.stride.0) as isize;
        let clamp = |row: isize| row.clamp(0, count as isize) as usize;
        let low = clamp(-first);
        (first, low..clamp(rows as isize - first).max(low))
    }
}

/// What the next row needs, asked for vector by vector in the order of memory: so the processor asks ahead, too.
#[derive(Clone, Copy)]
struct Ahead<T> {
    ptr: *const T,
    /// Vectors of the pixel that are left.
    left: usize,
    blocks: usize,
    /// From the last vector of a pixel to the first of the next one.
    skip: usize,
}

impl<T: Scalar> Ahead<T> {
    /// From so many vectors after pixel (y, x) on, which may be outside, or after as many pixels of what is read
    /// next as there are before pixel `done`.
    #[inline(always)]
    fn new(
        image: Image<'_, T>,
        (y, x): (isize, isize),
        done: (usize, usize),
        vectors: usize,
        lanes: usize,
    ) -> Self {
        let blocks = blocks(image.channels, lanes);
        let (pixel, vector) = (vectors / blocks, vectors % blocks);
        let ptr = match image.next {
            Some(next) => next.wrapping_offset(image.offset(done.0 as isize, done.1 as isize)),
            None => image.at(y, x),
        };
        let ptr = ptr.wrapping_add(pixel * image.step + vector * lanes);
        Self { ptr, left: blocks - vector, blocks, skip: image.step - (blocks - 1) * lanes }
    }

    /// A vector of each of so many rows, `row` elements apart; of several in a line of the cache, the first.
    #[inline(always)]
    fn ask<S: Simd<T>>(&mut self, simd: S, rows: usize, row: usize) {
        if (self.blocks - self.left).is_multiple_of(MAX_LANES / simd.lanes()) {
            for i in 0..rows {
                simd.prefetch_second(self.ptr.wrapping_add(i * row));
            }
        }
        self.left -= 1;
        self.ptr = self.ptr.wrapping_add(if self.left == 0 { self.skip } else { simd.lanes() });
        self.left = if self.left == 0 { self.blocks } else { self.left };
    }
}

/// Blocks of channels: each a vector, of which the last may begin inside the one before.
pub fn blocks(channels: usize, lanes: usize) -> usize {
    channels.div_ceil(lanes)
}

/// The first channel of a block.
fn start(block: usize, channels: usize, lanes: usize) -> usize {
    (block * lanes).min(channels - lanes)
}

/// A kernel with the columns of taps and the stride of columns as constants.
struct Constant<K, const KW: usize, const STRIDE: usize>(K);

/// Runs a kernel as a [`Constant`] one. There is none for `f64`, which can do without.
macro_rules! with_constants {
    ($simd:expr, $kernel:expr, $(($kw:literal $stride:literal))+) => {
        if const { size_of::<T>() == size_of::<f32>() } {
            match ($kernel.grid.kernel.1, $kernel.grid.stride.1) {
                $(($kw, $stride) => $simd.apart(Constant::<_, $kw, $stride>($kernel)),)+
                other => panic!("{other:?} columns of taps and stride"),
            }
        } else {
            panic!("no kernel for f64")
        }
    };
}

/// out\[y\]\[x\] = bias + Σ taps\[i\]\[j\] · image\[y · stride + i\]\[x · stride + j\], counted from the origin, of all
/// channels, at least as many as a vector has lanes; there must be as many rows of taps as the stride has, or more.
pub struct Forward<'a, T> {
    pub image: Image<'a, T>,
    pub grid: Grid,
    /// (kh, kw, step), from the first of the channels on, as many a step as in the image.
    pub taps: &'a [T],
    /// (channels)
    pub bias: &'a [T],
    /// Rows of outputs: those of `out`.
    pub rows: Range<usize>,
    pub out: Places<'a, T>,
}

impl<T: Scalar> Kernel<T> for Forward<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) {
        let (rows, columns) = self.out.count;
        let Image { channels, step, .. } = self.image;
        let (kh, kw) = self.grid.kernel;
        assert!(rows == self.rows.len() && columns > 0);
        // Else no output would read some rows between those that are read.
        assert!(kh >= self.grid.stride.0 && self.grid.stride.0 > 0);
        assert!(channels == self.out.channels && channels >= simd.lanes());
        assert!(self.taps.len() >= extent(kh * kw, step, channels) && self.bias.len() == channels);
        with_constants!(
            simd,
            self,
            (1 1) (2 1) (3 1) (4 1) (5 1) (7 1) (9 1) (3 2) (5 2) (7 2) (9 2)
        );
    }
}

/// Outputs of a row of a tile.
const WIDE: usize = 8;

impl<T: Scalar, const KW: usize, const STRIDE: usize> Kernel<T>
    for Constant<Forward<'_, T>, KW, STRIDE>
{
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) {
        let Self(job) = self;
        let columns = job.out.count.1;
        let stream = job.out.streams(simd.lanes());
        let mut y = job.rows.start;
        while y < job.rows.end {
            // Two rows share what they read, where registers hold the taps of both. Of a stride of 2 they share little: one
            // at a time, with `input` opaque and fewer columns checked, takes 0.73 to 0.95 of the time together (Zen 4).
            let pair =
                const { S::TILE_VECTORS == 4 && KW <= 5 && STRIDE == 1 } && y + 1 < job.rows.end;
            for x in (0..columns).step_by(WIDE) {
                // The last tile begins inside the one before, unless it is the only one.
                let at = x.min(columns.saturating_sub(WIDE));
                // SAFETY: outputs from row y and column `at` on; a second row only if there is one.
                unsafe {
                    if const { S::TILE_VECTORS == 4 && KW <= 5 && STRIDE == 1 } && pair {
                        job.tiles::<S, KW, STRIDE, 2>(simd, (y, at), stream);
                    } else {
                        job.tiles::<S, KW, STRIDE, 1>(simd, (y, at), stream);
                    }
                }
            }
            y += if pair { 2 } else { 1 };
        }
    }
}

impl<T: Scalar> Forward<'_, T> {
    /// All channels of R × [`WIDE`] outputs from row y and column x on, as far as there are columns.
    ///
    /// # Safety
    /// The rows must be inside. What is streamed are whole aligned vectors, which nobody may read before this
    /// thread's fence.
    #[inline(always)]
    unsafe fn tiles<S: Simd<T>, const KW: usize, const STRIDE: usize, const R: usize>(
        &self,
        simd: S,
        (y, x): (usize, usize),
        stream: bool,
    ) {
        let Self { image, grid, .. } = *self;
        let (channels, lanes) = (image.channels, simd.lanes());
        let high = (R - 1) * grid.stride.0 + grid.kernel.0;
        let (first, inside) = grid.inside(y, image.rows, high);
        let column = grid.origin.1 + (x * STRIDE) as isize;
        let wide = WIDE.min(self.out.count.1 - x);
        let read = (WIDE - 1) * STRIDE + KW;
        let inside_from = |first: usize, end: usize| {
            column + first as isize >= 0 && image.columns as isize - column >= end as isize
        };
        let border = match wide == WIDE {
            true if inside_from(0, read) => Border::NONE,
            true if const { KW - 1 <= (WIDE - 1) * STRIDE }
                && inside_from(KW - 1, (WIDE - 1) * STRIDE + 1) =>
            {
                Border::SIDES
            }
            _ => Border::ANY,
        };
        // What the next rows of outputs read besides: asked for meanwhile.
        let next = (first + high as isize, column);
        let done = (y * grid.stride.0, x * STRIDE);
        let y = y - self.rows.start;
        for block in 0..blocks(channels, lanes) {
            let c = start(block, channels, lanes);
            let mut ahead = Ahead::new(image, next, done, block * wide * STRIDE, lanes);
            for _ in 0..wide * STRIDE {
                ahead.ask(simd, STRIDE * R, image.row());
            }
            // SAFETY: rows `inside` are of the image; columns are checked but for those that `border` says are of it;
            // the caller vouches for the outputs.
            unsafe {
                let tile = Tile {
                    input: image.at(first + inside.start as isize, column).wrapping_add(c),
                    image,
                    column,
                    taps: self.taps.as_ptr().add(c),
                    kernel: (grid.kernel.0, grid.stride.0),
                    inside: inside.clone(),
                    bias: self.bias.as_ptr().add(c),
                };
                let sums = match border {
                    Border::NONE => tile.run::<S, KW, STRIDE, R, { Border::NONE }>(simd),
                    Border::SIDES => tile.run::<S, KW, STRIDE, R, { Border::SIDES }>(simd),
                    _ => tile.run::<S, KW, STRIDE, R, { Border::ANY }>(simd),
                };
                for (r, sums) in sums.iter().enumerate() {
                    for (p, &sum) in sums.iter().enumerate() {
                        if p >= wide {
                            break;
                        }
                        let out = self.out.at(y + r, x + p).add(c);
                        match stream {
                            true => simd.stream(sum, out),
                            false => simd.store(sum, out),
                        }
                    }
                }
            }
        }
    }
}

/// Which of the columns that a tile reads may be beyond the image.
struct Border;

impl Border {
    const NONE: u8 = 0;
    /// Those before the last one that the first output reads, and behind the first one that the last output reads.
    const SIDES: u8 = 1;
    const ANY: u8 = 2;

    /// Whether column `q` of those of a tile may be beyond.
    const fn may_be_beyond(border: u8, q: usize, kw: usize, stride: usize) -> bool {
        match border {
            Self::NONE => false,
            Self::SIDES => q < kw - 1 || q > (WIDE - 1) * stride,
            _ => true,
        }
    }
}

/// A block of channels of some outputs.
struct Tile<'a, T> {
    /// In `column` of the first row inside.
    input: *const T,
    image: Image<'a, T>,
    /// Of the first tap of the first output.
    column: isize,
    taps: *const T,
    /// Rows of taps, and the stride of rows.
    kernel: (usize, usize),
    /// Those of the rows that outputs read, from that of the first tap of the first one on, that are of the image.
    inside: Range<usize>,
    bias: *const T,
}

impl<T: Scalar> Tile<'_, T> {
    /// The sums of R × [`WIDE`] outputs, without the columns beyond the image.
    ///
    /// # Safety
    /// Rows, and columns that BORDER does not name, must be inside; R is 1 or 2.
    #[inline(always)]
    unsafe fn run<
        S: Simd<T>,
        const KW: usize,
        const STRIDE: usize,
        const R: usize,
        const BORDER: u8,
    >(
        &self,
        simd: S,
    ) -> [[S::V; WIDE]; R] {
        let Self { mut input, image, column, taps, kernel: (kh, down), .. } = *self;
        let mut row = self.inside.start;
        // SAFETY: the caller's promise.
        unsafe {
            let mut acc = [[simd.load(self.bias); WIDE]; R];
            let mut w = [[simd.splat(T::ZERO); KW]; R];
            macro_rules! pixels {
                ($low:expr, $high:expr, $phase:literal, $($q:literal)+) => {
                    for r in $low..$high {
                        for (j, w) in w[r].iter_mut().enumerate() {
                            if j % STRIDE == $phase {
                                let tap = (row - r * down) * KW + j;
                                *w = simd.load(taps.wrapping_add(tap * image.step));
                            }
                        }
                    }
                    $(
                    if $q < (WIDE - 1) * STRIDE + KW
                        && (!const { Border::may_be_beyond(BORDER, $q, KW, STRIDE) }
                            || (0..image.columns as isize).contains(&(column + $q)))
                    {
                        let v = simd.load(input.wrapping_add($q * image.step));
                        for r in $low..$high {
                            for (j, &w) in w[r].iter().enumerate() {
                                if $q >= j && ($q - j) % STRIDE == 0 && ($q - j) / STRIDE < WIDE {
                                    let p = ($q - j) / STRIDE;
                                    acc[r][p] = simd.fma(w, v, acc[r][p]);
                                }
                            }
                        }
                    }
                    )+
                };
            }
            // The rows up to `end`, which the outputs low..high read. One phase of a stride after the other: sixteen
            // registers hold the sums and the taps of one, of K = 9, too.
            macro_rules! rows {
                ($end:expr, $low:expr, $high:expr) => {
                    let end = self.inside.end.min($end);
                    while row < end {
                        // Else the compiler may keep pointers to all columns, in memory.
                        input = black_box(input);
                        if STRIDE == 1 {
                            pixels!($low, $high, 0, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
                        } else {
                            pixels!($low, $high, 0, 0 2 4 6 8 10 12 14 16 18 20 22);
                            pixels!($low, $high, 1, 1 3 5 7 9 11 13 15 17 19 21);
                        }
                        input = input.wrapping_add(image.row());
                        row += 1;
                    }
                };
            }
            if R == 2 {
                rows!(down, 0, 1);
                rows!(kh, 0, 2);
                rows!(kh + down, 1, 2);
            } else {
                rows!(kh, 0, 1);
            }
            acc
        }
    }
}

/// Gradients of outputs that are added up in lanes before the sum moves on to `f64`, about.
const LANE_SUMS: usize = 256;
/// Columns whose gradients and inputs meet all taps while they are in the first-level cache.
const SEGMENT: usize = 64;

/// Elements of the sums of [`WeightGradient`], and of its scratch.
pub fn sums((kh, kw): (usize, usize), channels: usize, lanes: usize) -> usize {
    blocks(channels, lanes) * (kh * kw + 1) * lanes
}

/// Where the sums of [`WeightGradient`] have a tap of a channel; the tap after the last stands for grad alone.
pub fn place(c: usize, channels: usize, lanes: usize, taps: usize, tap: usize) -> usize {
    let block = c / lanes;
    (block * (taps + 1) + tap) * lanes + c - start(block, channels, lanes)
}

/// sums\[i\]\[j\] += Σ grad\[y\]\[x\] · image\[y · stride + i\]\[x · stride + j\], counted from the origin, for each
/// channel, and those of grad alone, for the bias. Where a sum is not finite, it may be NaN instead of an infinity, or
/// lack what gradients that are not finite add in the padding, NaN.
pub struct WeightGradient<'a, T> {
    pub image: Image<'a, T>,
    pub grid: Grid,
    pub grad: Image<'a, T>,
    /// Those of `grad` to take.
    pub rows: Range<usize>,
    /// Whether to add up those of taps, and those of grad alone.
    pub taps: bool,
    pub bias: bool,
    /// [`sums`]: (blocks, kh · kw + 1, lanes), the last of a block those of grad.
    pub sums: &'a mut [f64],
    /// As many.
    pub scratch: &'a mut [T],
}

impl<T: Scalar> Kernel<T> for WeightGradient<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) {
        let Self { image, grid, grad, .. } = self;
        let len = sums(grid.kernel, image.channels, simd.lanes());
        assert!(image.channels == grad.channels && image.channels >= simd.lanes());
        assert!(self.sums.len() == len && self.scratch.len() == len);
        assert!(self.rows.end <= grad.rows);
        with_constants!(simd, self, (3 1) (5 1) (7 1) (9 1) (3 2) (5 2) (7 2) (9 2));
    }
}

impl<T: Scalar, const KW: usize, const STRIDE: usize> Kernel<T>
    for Constant<WeightGradient<'_, T>, KW, STRIDE>
{
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) {
        let WeightGradient { image, grid, grad, rows, taps, bias, sums: all, scratch } = self.0;
        let (kh, lanes) = (grid.kernel.0, simd.lanes());
        // Outputs of which all columns of taps are inside.
        let left = ((-grid.origin.1).max(0) as usize).div_ceil(STRIDE).min(grad.columns);
        let right =
            (image.columns as isize - grid.origin.1 - KW as isize).div_euclid(STRIDE as isize) + 1;
        let right = (right.max(0) as usize).clamp(left, grad.columns);
        let height = (LANE_SUMS / grad.columns).max(1);
        scratch.fill(T::ZERO);
        for y in rows.clone() {
            let (_, reached) = grid.inside(y, image.rows, kh);
            for x in (0..grad.columns).step_by(SEGMENT) {
                let end = (x + SEGMENT).min(grad.columns);
                let inner = left.clamp(x, end)..right.clamp(x, end);
                // Sums are loaded and stored for each part: of few columns all at once.
                let inner = if inner.len() < WIDE { end..end } else { inner };
                // Of a stride of 1, which alone takes pixels: those that are left behind the last outputs, too.
                let right = if end < grad.columns { end } else { image.columns };
                let pixels = x.min(image.columns)..right.min(image.columns);
                let of_block = |block: usize, sums: *mut T| Columns {
                    image,
                    grid,
                    grad,
                    block,
                    c: start(block, image.channels, lanes),
                    y,
                    sums,
                };
                let mut next = of_block(0, scratch.as_mut_ptr()).ahead::<S, 1>(simd, &pixels);
                for block in 0..blocks(image.channels, lanes) {
                    let sums = scratch[block * (kh * KW + 1) * lanes..].as_mut_ptr();
                    let columns = of_block(block, sums);
                    // SAFETY: these columns are inside, and all of their taps where it is said.
                    unsafe {
                        if bias {
                            columns.alone(simd, kh * KW, x..end);
                        }
                        if !taps {
                            continue;
                        }
                        if const { STRIDE == 1 } {
                            let (pixels, reached) = (pixels.clone(), reached.clone());
                            next = columns.pixels::<S, KW>(simd, pixels, reached, next);
                        } else {
                            columns.rows::<S, KW, STRIDE, true>(simd, x..inner.start);
                            columns.rows::<S, KW, STRIDE, false>(simd, inner.clone());
                            columns.rows::<S, KW, STRIDE, true>(simd, inner.end..end);
                        }
                    }
                }
            }
            if (y + 1 - rows.start).is_multiple_of(height) || y + 1 == rows.end {
                for (sum, part) in all.iter_mut().zip(&mut *scratch) {
                    *sum += part.to_f64();
                    *part = T::ZERO;
                }
            }
        }
    }
}

/// A block of channels of some gradients of a row.
struct Columns<'a, T> {
    image: Image<'a, T>,
    grid: Grid,
    grad: Image<'a, T>,
    block: usize,
    /// Its first channel.
    c: usize,
    y: usize,
    /// (kh · kw + 1, lanes)
    sums: *mut T,
}

impl<T: Scalar> Columns<'_, T> {
    /// The gradients themselves, whose sums are those of this tap.
    ///
    /// # Safety
    /// They must be inside.
    #[inline(always)]
    unsafe fn alone<S: Simd<T>>(&self, simd: S, tap: usize, columns: Range<usize>) {
        let mut from = self.grad.at(self.y as isize, columns.start as isize).wrapping_add(self.c);
        // SAFETY: the caller's promise; there is such a sum.
        unsafe {
            let to = self.sums.add(tap * simd.lanes());
            // Two, as additions to one take longer than all else.
            let mut sum = [simd.load(to), simd.splat(T::ZERO)];
            for _ in columns {
                sum = [sum[1], simd.add(sum[0], simd.load(from))];
                from = from.wrapping_add(self.grad.step);
            }
            simd.store(simd.add(sum[0], sum[1]), to);
        }
    }

    /// What the next row needs of image and gradient, asked for while some columns of gradients are taken.
    #[inline(always)]
    fn ahead<S: Simd<T>, const STRIDE: usize>(
        &self,
        simd: S,
        columns: &Range<usize>,
    ) -> [Ahead<T>; 2] {
        let Self { image, grid, grad, block, y, .. } = *self;
        let (vectors, lanes) = (block * columns.len(), simd.lanes());
        let column = grid.origin.1 + (columns.start * STRIDE) as isize;
        let below = grid.origin.0 + (y * grid.stride.0 + grid.kernel.0) as isize;
        let of_image = (y * grid.stride.0, columns.start * STRIDE);
        let of_grad = (y as isize + 1, columns.start as isize);
        [
            Ahead::new(image, (below, column), of_image, vectors * STRIDE, lanes),
            Ahead::new(grad, of_grad, (y, columns.start), vectors, lanes),
        ]
    }

    /// As many rows of taps at a time as registers hold; BORDER leaves out the columns beyond the image.
    ///
    /// # Safety
    /// The gradients must be inside, and all columns of their taps unless BORDER.
    #[inline(always)]
    unsafe fn rows<S: Simd<T>, const KW: usize, const STRIDE: usize, const BORDER: bool>(
        &self,
        simd: S,
        columns: Range<usize>,
    ) {
        let (_, rows) = self.grid.inside(self.y, self.image.rows, self.grid.kernel.0);
        let mut i = rows.start;
        while i < rows.end && !columns.is_empty() {
            let columns = columns.clone();
            let asks = i == rows.start;
            macro_rules! taps {
                ($($rows:literal)+) => {
                    match (rows.end - i).min(const { most_rows(KW, S::TILE_VECTORS) }) {
                        $($rows if const { $rows <= most_rows(KW, S::TILE_VECTORS) } => {
                            // SAFETY: the caller's promise; rows i..i + $rows of taps are inside.
                            unsafe { self.taps::<S, KW, STRIDE, $rows, BORDER>(simd, columns, i, asks) }
                            i += $rows;
                        })+
                        rows => unreachable!("{rows} rows"),
                    }
                };
            }
            taps!(1 2 3 4 5);
        }
    }

    /// The same for a stride of 1, of these pixels of these rows, counted from the first tap's, by
    /// [`Columns::shifted`]. Returns what the next block asks for.
    ///
    /// # Safety
    /// They must be inside.
    #[inline(always)]
    unsafe fn pixels<S: Simd<T>, const KW: usize>(
        &self,
        simd: S,
        columns: Range<usize>,
        rows: Range<usize>,
        mut next: [Ahead<T>; 2],
    ) -> [Ahead<T>; 2] {
        let mut i = rows.start;
        while i < rows.end && !columns.is_empty() {
            let columns = columns.clone();
            macro_rules! shifted {
                ($asks:literal, $($rows:literal)+) => {
                    match (rows.end - i).min(const { rows_of_shifted(KW, S::TILE_VECTORS) }) {
                        $($rows if const { $rows <= rows_of_shifted(KW, S::TILE_VECTORS) } => {
                            // SAFETY: the caller's promise; rows i..i + $rows of taps are inside.
                            next = unsafe {
                                self.shifted::<S, KW, 0, KW, $rows, $asks>(simd, columns, i, next)
                            };
                            i += $rows;
                        })+
                        _ => {
                            // SAFETY: as above, row i.
                            unsafe {
                                let first = columns.clone();
                                next = self.shifted::<S, KW, 0, 5, 1, $asks>(simd, first, i, next);
                                next = self.shifted::<S, KW, 5, 4, 1, false>(simd, columns, i, next);
                            }
                            i += 1;
                        }
                    }
                };
            }
            if i == rows.start {
                shifted!(true, 1 2 3 4 5);
            } else {
                shifted!(false, 1 2 3 4 5);
            }
        }
        next
    }

    /// Columns FIRST..FIRST + J of rows i..i + I of taps, for a stride of 1: each pixel of the image meets the gradients
    /// of all outputs that it reaches, which move on through registers, so that little is read. Zeros stand for those
    /// beyond. Time over that of [`Columns::taps`], in the second-level cache (Zen 4, AVX-512; AVX2): k = 3 0.6 to 0.9;
    /// 0.7 to 0.9, k = 5 0.5 to 0.7; 0.5 to 0.7, k = 7 0.45 to 0.7; 0.45 to 0.8, k = 9 0.55 to 0.7.
    ///
    /// # Safety
    /// As [`Columns::pixels`], and these must be inside.
    #[inline(always)]
    unsafe fn shifted<
        S: Simd<T>,
        const KW: usize,
        const FIRST: usize,
        const J: usize,
        const I: usize,
        const ASKS: bool,
    >(
        &self,
        simd: S,
        columns: Range<usize>,
        i: usize,
        mut next: [Ahead<T>; 2],
    ) -> [Ahead<T>; 2] {
        let Self { image, grid, grad, c, y, sums, .. } = *self;
        let lanes = simd.lanes();
        let row = grid.origin.0 + (y * grid.stride.0 + i) as isize;
        let mut input = image.at(row, columns.start as isize).wrapping_add(c);
        let zeros = [T::ZERO; MAX_LANES];
        let gradient = |x: isize| match (0..grad.columns as isize).contains(&x) {
            true => grad.at(y as isize, x).wrapping_add(c),
            false => zeros.as_ptr(),
        };
        // The last output that a pixel reaches, by the first of these taps.
        let mut x = columns.start as isize - grid.origin.1 - FIRST as isize;
        // SAFETY: the caller's promise; there are sums for all taps.
        unsafe {
            let sums = sums.add((i * KW + FIRST) * lanes);
            let mut acc = [[simd.splat(T::ZERO); J]; I];
            for (r, acc) in acc.iter_mut().enumerate() {
                for (j, acc) in acc.iter_mut().enumerate() {
                    *acc = simd.load(sums.add((r * KW + j) * lanes));
                }
            }
            let mut g = [simd.splat(T::ZERO); J];
            for (j, g) in g.iter_mut().enumerate().take(J - 1) {
                *g = simd.load(gradient(x - 1 - j as isize));
            }
            for _ in columns {
                if ASKS {
                    next[0].ask(simd, 1, image.row());
                    next[1].ask(simd, 1, grad.row());
                }
                for j in (1..J).rev() {
                    g[j] = g[j - 1];
                }
                g[0] = simd.load(gradient(x));
                for (r, acc) in acc.iter_mut().enumerate() {
                    let v = simd.load(input.wrapping_add(r * image.row()));
                    for (acc, &g) in acc.iter_mut().zip(&g) {
                        *acc = simd.fma(g, v, *acc);
                    }
                }
                input = input.wrapping_add(image.step);
                x += 1;
            }
            for (r, acc) in acc.iter().enumerate() {
                for (j, &acc) in acc.iter().enumerate() {
                    simd.store(acc, sums.add((r * KW + j) * lanes));
                }
            }
        }
        next
    }

    /// Rows i..i + I of taps.
    ///
    /// # Safety
    /// As [`Columns::rows`], and these must be inside.
    #[inline(always)]
    unsafe fn taps<
        S: Simd<T>,
        const KW: usize,
        const STRIDE: usize,
        const I: usize,
        const BORDER: bool,
    >(
        &self,
        simd: S,
        columns: Range<usize>,
        i: usize,
        asks: bool,
    ) {
        let Self { image, grid, grad, c, y, sums, .. } = *self;
        let lanes = simd.lanes();
        let row = grid.origin.0 + (y * grid.stride.0 + i) as isize;
        let mut next = self.ahead::<S, STRIDE>(simd, &columns);
        let mut column = grid.origin.1 + (columns.start * STRIDE) as isize;
        let mut input = image.at(row, column).wrapping_add(c);
        let mut from = grad.at(y as isize, columns.start as isize).wrapping_add(c);
        // SAFETY: the caller's promise; there are sums for all taps.
        unsafe {
            let sums = sums.add(i * KW * lanes);
            let mut acc = [[simd.splat(T::ZERO); KW]; I];
            for (r, acc) in acc.iter_mut().enumerate() {
                for (j, acc) in acc.iter_mut().enumerate() {
                    *acc = simd.load(sums.add((r * KW + j) * lanes));
                }
            }
            for _ in columns {
                if asks {
                    for _ in 0..STRIDE {
                        next[0].ask(simd, STRIDE, image.row());
                    }
                    next[1].ask(simd, 1, grad.row());
                }
                let g = simd.load(from);
                macro_rules! columns {
                    ($($j:literal)+) => {$(
                        if $j < KW
                            && (!BORDER || (0..image.columns as isize).contains(&(column + $j)))
                        {
                            for (r, acc) in acc.iter_mut().enumerate() {
                                let at = input.wrapping_add(r * image.row() + $j * image.step);
                                acc[$j % KW] = simd.fma(g, simd.load(at), acc[$j % KW]);
                            }
                        }
                    )+};
                }
                columns!(0 1 2 3 4 5 6 7 8);
                from = from.wrapping_add(grad.step);
                input = input.wrapping_add(STRIDE * image.step);
                column += STRIDE as isize;
            }
            let _ = column;
            for (r, acc) in acc.iter().enumerate() {
                for (j, &acc) in acc.iter().enumerate() {
                    simd.store(acc, sums.add((r * KW + j) * lanes));
                }
            }
        }
    }
}

/// Rows of so many taps whose sums registers hold, with a gradient.
const fn most_rows(kw: usize, tile_vectors: usize) -> usize {
    let rows = if tile_vectors == 4 { 28 / kw } else { 12 / kw };
    match rows {
        0 => 1,
        1..=5 => rows,
        _ => 5,
    }
}

/// Rows of so many taps whose sums registers hold, with as many gradients and a pixel; 0: too many.
const fn rows_of_shifted(kw: usize, tile_vectors: usize) -> usize {
    let registers = if tile_vectors == 4 { 31 } else { 15 };
    if 2 * kw > registers {
        return 0;
    }
    let rows = (registers - kw) / kw;
    if rows > 5 { 5 } else { rows }
}
