//! Depthwise convolution with stride and dilation 1 by [`minimal`] filtering down the columns: of the plane as it
//! lies in memory, or of a padded one.
//!
//! Rows are transformed to a scratch, some tiles of them at a time, which stay in the first-level cache: a column of
//! vectors after the other, so that every element is read, and mapped, once. Register tiles of products then go over
//! the scratch as [`conv`](super::conv)'s go over a padded plane.

use std::mem::MaybeUninit;

use super::activation::{Affine, CopyOut, Target};
use super::conv::{Meanwhile, Next, Taps, of_channel};
use super::{MAX_LANES, extent, minimal};
use crate::memory::Line;
use crate::simd::{Kernel, Scalar, Simd};

/// Tiles down a column of the tallest register tile.
pub(super) const MAX_TILES: usize = 7;

/// Rows that the taps meet, between zeros: as many above and to the left as it says, and below and to the right as
/// many as the outputs ask for.
#[derive(Clone, Copy)]
pub struct Rows<'a, T> {
    /// `rows` rows of `width` elements, `ld` apart.
    pub data: &'a [T],
    pub ld: usize,
    pub rows: usize,
    pub width: usize,
    /// Rows above; and columns to the left, of which there are no more than lanes in the longest vector.
    pub padding: [usize; 2],
    /// What the taps meet is relu of this map of the rows; `None`: the rows as they are.
    pub relu_of: Option<Affine<T>>,
}

/// out\[y\]\[x\] = bias + Σ weight\[i\]\[j\] · input\[y + i\]\[x + j\], one plane, zeros around it, by taps that are
/// made for it.
///
/// Returns whether all outputs are finite: infinities and NaNs reach others here than they should.
pub struct Forward<'a, T> {
    pub input: Rows<'a, T>,
    pub taps: &'a Taps<T>,
    /// One for each channel.
    pub bias: &'a [T],
    /// oh × ow, contiguous; every element is written; past the caches, if it may, where [`Taps::streams`] says so.
    pub out: Target<'a, T>,
    pub ow: usize,
    /// [`Taps::scratch`] elements.
    pub scratch: &'a mut [T],
    /// As of [`conv::Forward`](super::conv::Forward).
    pub next: Next<T>,
    pub copy: CopyOut<'a, T>,
}

impl<T: Scalar> Kernel<T> for Forward<'_, T> {
    type Output = bool;

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) -> bool {
        if const { T::FILTERED } {
            let filter = self.taps.filter().map(|filter| (filter.tile, filter.groups));
            macro_rules! filters {
                ($(($tile:literal $points:literal $groups:literal))+) => {
                    match (filter, self.taps.block()) {
                        $((Some(($tile, $groups)), 1) => {
                            simd.apart(Filtered::<T, $tile, $points, $groups, false>(self))
                        }
                        (Some(($tile, $groups)), _) => {
                            simd.apart(Filtered::<T, $tile, $points, $groups, true>(self))
                        })+
                        (filter, _) => panic!("{filter:?}"),
                    }
                };
            }
            // As `Filter::of` says.
            filters!((3 5 3) (4 7 2) (4 7 3))
        } else {
            panic!("not filtered")
        }
    }
}

/// [`Forward`] of M rows in P points, of G groups of rows of taps; BLOCK says whether vectors are channels.
struct Filtered<'a, T, const M: usize, const P: usize, const G: usize, const BLOCK: bool>(
    Forward<'a, T>,
);

impl<T: Scalar, const M: usize, const P: usize, const G: usize, const BLOCK: bool> Kernel<T>
    for Filtered<'_, T, M, P, G, BLOCK>
{
    type Output = bool;

    #[inline(always)]
    fn run<S: Simd<T>>(self, simd: S) -> bool {
        let Forward { input, taps, bias, out, ow, scratch, next, copy } = self.0;
        let (lanes, oh) = (simd.lanes(), out.slice.len() / ow);
        let (kw, block) = (taps.columns(), taps.block());
        assert!(block == if BLOCK { lanes } else { 1 } && ow.is_multiple_of(block));
        assert!(oh > 0 && out.slice.len() == oh * ow && bias.len() == block);
        assert!(scratch.len() >= taps.scratch(oh, ow));
        assert!(input.data.len() >= extent(input.rows, input.ld, input.width));
        // Where column 0 of the rows is in the scratch: aligned.
        let lead = input.padding[1].next_multiple_of(MAX_LANES);
        let row = lead + taps.row(ow);
        let filled = lead + input.width.next_multiple_of(lanes);
        assert!(lead <= MAX_LANES && filled <= row);
        let stream = !BLOCK && lanes == MAX_LANES && ow.is_multiple_of(lanes) && out.streams(simd);
        let vectors = ow.div_ceil(lanes);
        // Of equal width, as far as whole vectors allow: a narrow last tile wastes its loads.
        let tiles = vectors.div_ceil(S::TILE_VECTORS);
        let mut meanwhile = Meanwhile::new(simd, next, copy, oh.div_ceil(M) * tiles * P);
        if next.soon {
            meanwhile = meanwhile.near();
        }
        let mut job = Job::<T, M, P, G, BLOCK> {
            input,
            row,
            taps: taps.filtered().as_ptr(),
            kw,
            bias: bias.as_ptr(),
            scratch: scratch.as_mut_ptr(),
            from: lead - input.padding[1],
            lead,
            out: out.slice.as_mut_ptr(),
            out_rows: oh,
            ow,
            stream,
        };
        // SAFETY: the scratch has a row for every point of the tiles; what is beyond the rows of inputs is zero, and
        // its transform too.
        unsafe {
            job.clear(
                simd,
                filled,
                taps.filter().map_or(0, |filter| filter.rows(oh.min(MAX_TILES * M))),
            )
        };
        let mut check = simd.splat(T::ZERO);
        let mut y = 0;
        while y < oh {
            let left = (oh - y).div_ceil(M);
            // The last seven, as a plane of 28 × 28 has with K = 7, at once: one tile alone leaves the units idle.
            let seven = left == MAX_TILES && lanes == MAX_LANES && vectors < S::TILE_VECTORS;
            let high = if seven {
                left
            } else {
                [6, 4, 2].into_iter().find(|&high| left >= high).unwrap_or(1)
            };
            // No more rows than these tiles read: they stay in the first-level cache.
            // SAFETY: rows of tiles that the scratch has room for.
            unsafe { job.transform(simd, y, high + G - 1) };
            let mut x = 0;
            for t in 0..tiles {
                let wide = (vectors - x / lanes).div_ceil(tiles - t);
                let last = (ow - x - (wide - 1) * lanes).min(lanes);
                macro_rules! tiles {
                    ($($wide:literal: $($high:literal)+,)+) => {
                        match (wide, high) {
                            $($(($wide, $high) if const { $wide <= S::TILE_VECTORS } => {
                                job.tiles::<S, $wide, $high>(simd, (y, x), last, &mut meanwhile)
                            })+)+
                            _ => unreachable!("{wide} × {high}"),
                        }
                    };
                }
                // SAFETY: the tiles were transformed, and their outputs are inside: rows as far as
                // there are, `wide` vectors of which the last is cut.
                let of_tiles = unsafe {
                    tiles! { 1: 1 2 4 6 7, 2: 1 2 4 6 7, 3: 1 2 4 6 7, 4: 1 2 4 6, }
                };
                check = simd.add(check, of_tiles);
                x += wide * lanes;
            }
            y += high * M;
        }
        meanwhile.finish(simd);
        simd.sum(check) == T::ZERO
    }
}

/// What the parts of [`Filtered`] share.
struct Job<'a, T, const M: usize, const P: usize, const G: usize, const BLOCK: bool> {
    input: Rows<'a, T>,
    /// Elements of a row of the scratch.
    row: usize,
    taps: *const T,
    kw: usize,
    bias: *const T,
    /// Tiles × points × rows.
    scratch: *mut T,
    /// Where in a row of it the first tap of the first output is.
    from: usize,
    /// Where in a row of it column 0 of the inputs is.
    lead: usize,
    out: *mut T,
    out_rows: usize,
    ow: usize,
    stream: bool,
}

impl<T: Scalar, const M: usize, const P: usize, const G: usize, const BLOCK: bool>
    Job<'_, T, M, P, G, BLOCK>
{
    /// Zeros before and after the inputs of so many rows of the scratch, where those are from `lead` to `filled`.
    ///
    /// # Safety
    /// The scratch must have them.
    #[inline(always)]
    unsafe fn clear<S: Simd<T>>(&mut self, simd: S, filled: usize, rows: usize) {
        let zero = simd.splat(T::ZERO);
        for y in 0..rows {
            let row = self.scratch.wrapping_add(y * self.row);
            for x in (0..self.lead).chain(filled..self.row).step_by(simd.lanes()) {
                // SAFETY: the caller's promise; all three are whole vectors.
                unsafe { simd.store(zero, row.add(x)) };
            }
        }
    }

    /// Transforms `count` rows of tiles, of the rows from `first` on, counted from those of padding.
    ///
    /// # Safety
    /// The scratch must have room for them, and the inputs be as long as `run` asserts.
    #[inline(always)]
    unsafe fn transform<S: Simd<T>>(&mut self, simd: S, first: usize, count: usize) {
        let Rows { rows, width, padding: [top, _], relu_of, .. } = self.input;
        let inside = first >= top && first + count * M + M - 1 <= top + rows;
        for x in (0..width).step_by(simd.lanes()) {
            let whole = inside && x + simd.lanes() <= width;
            // SAFETY: the caller's promise.
            unsafe {
                match (relu_of, whole) {
                    (None, true) => self.column::<S, false, false>(simd, first, count, x),
                    (None, false) => self.column::<S, false, true>(simd, first, count, x),
                    (Some(_), true) => self.column::<S, true, false>(simd, first, count, x),
                    (Some(_), false) => self.column::<S, true, true>(simd, first, count, x),
                }
            }
        }
    }

    /// A vector of each, from column x on; MAP through relu and map, EDGE where there may be less than all rows and
    /// columns.
    ///
    /// # Safety
    /// As [`Job::transform`].
    #[inline(always)]
    unsafe fn column<S: Simd<T>, const MAP: bool, const EDGE: bool>(
        &mut self,
        simd: S,
        first: usize,
        count: usize,
        x: usize,
    ) {
        let Rows { data, ld, rows, width, padding: [top, _], relu_of } = self.input;
        let (zero, n) = (simd.splat(T::ZERO), (width - x).min(simd.lanes()));
        let affine = relu_of.unwrap_or(Affine::identity());
        let mut at = data.as_ptr().wrapping_add(x).wrapping_add(first * ld).wrapping_sub(top * ld);
        let mut row = first.wrapping_sub(top);
        let mut to = self.scratch.wrapping_add(self.lead + x);
        macro_rules! load {
            () => {{
                let mut v = zero;
                if !EDGE || row < rows {
                    // SAFETY: a row of the inputs; of a vector at the edge what is there.
                    v = unsafe { if EDGE { simd.load_first(at, n) } else { simd.load(at) } };
                    if MAP {
                        let u = affine.apply(simd, v);
                        v = simd.select_le_zero(u, zero, u);
                        if EDGE {
                            v = simd.keep(v, n);
                        }
                    }
                }
                at = at.wrapping_add(ld);
                row = row.wrapping_add(1);
                v
            }};
        }
        let mut d = [zero; P];
        for d in &mut d[M..] {
            *d = load!();
        }
        for _ in 0..count {
            for i in 0..M - 1 {
                d[i] = d[i + M];
            }
            for d in &mut d[M - 1..] {
                *d = load!();
            }
            for (p, &v) in minimal::transform_input::<T, S, M, P>(simd, d).iter().enumerate() {
                // SAFETY: the caller's promise.
                unsafe { simd.store(v, to.wrapping_add(p * self.row)) };
            }
            to = to.wrapping_add(P * self.row);
        }
        let _ = (at, row);
    }

    /// The H rows of tiles that were transformed, of outputs from row y on, C vectors across from column
    /// x on, of which the last is of `last` elements. Returns zeros if all are finite.
    ///
    /// # Safety
    /// H + G − 1 rows of tiles must be transformed, and the first rows of H be inside.
    #[inline(always)]
    unsafe fn tiles<S: Simd<T>, const C: usize, const H: usize>(
        &mut self,
        simd: S,
        (y, x): (usize, usize),
        last: usize,
        meanwhile: &mut Meanwhile<'_, T>,
    ) -> S::V {
        let lanes = simd.lanes();
        let mut products = MaybeUninit::<[[[Line; C]; H]; P]>::uninit();
        let products = products.as_mut_ptr().cast::<T>();
        let mut check = simd.splat(T::ZERO);
        // SAFETY: the caller's promise; a line for each vector, which is no longer.
        unsafe {
            for point in 0..P {
                let acc = self.products::<S, C, H>(simd, x, point);
                meanwhile.go_on(simd, H);
                for (h, acc) in acc.iter().enumerate() {
                    for (c, &acc) in acc.iter().enumerate() {
                        simd.store(acc, products.add(((point * H + h) * C + c) * lanes));
                    }
                }
            }
            let bias = of_channel::<T, S, BLOCK>(simd, self.bias, 0);
            for h in 0..H {
                for c in 0..C {
                    let mut m = [bias; P];
                    for (point, m) in m.iter_mut().enumerate() {
                        *m = simd.load(products.add(((point * H + h) * C + c) * lanes));
                    }
                    for (i, &v) in
                        minimal::transform_output::<T, S, M, P>(simd, m).iter().enumerate()
                    {
                        let row = y + h * M + i;
                        if row >= self.out_rows {
                            break;
                        }
                        let v = simd.add(v, bias);
                        let out = self.out.add(row * self.ow + x + c * lanes);
                        if c + 1 < C || last == lanes {
                            check = simd.fma(v, simd.splat(T::ZERO), check);
                            if self.stream {
                                simd.stream(v, out);
                            } else {
                                simd.store(v, out);
                            }
                        } else {
                            let v = simd.keep(v, last);
                            check = simd.fma(v, simd.splat(T::ZERO), check);
                            simd.store_first(v, out, last);
                        }
                    }
                }
            }
        }
        check
    }

    /// A point of H tiles and C vectors. By value: behind a reference, sums are stored after every tap.
    ///
    /// # Safety
    /// As [`Job::tiles`].
    #[inline(always)]
    unsafe fn products<S: Simd<T>, const C: usize, const H: usize>(
        &self,
        simd: S,
        x: usize,
        point: usize,
    ) -> [[S::V; C]; H] {
        let (lanes, row) = (simd.lanes(), self.row);
        let step = if BLOCK { lanes } else { 1 };
        let zero = simd.splat(T::ZERO);
        let mut acc = [[zero; C]; H];
        // SAFETY: the caller's promise; there are taps for each point, column and group.
        unsafe {
            let from = self.scratch.add(point * row + self.from + x);
            let taps = self.taps.add(point * self.kw * G * step);
            for j in 0..self.kw {
                let mut w = [zero; G];
                for (g, w) in w.iter_mut().enumerate() {
                    *w = of_channel::<T, S, BLOCK>(simd, taps, j * G + g);
                }
                let from = from.add(j * step);
                macro_rules! rows {
                    ($($i:literal)+) => {$(
                        if $i < H + G - 1 {
                            let from = from.add($i * P * row);
                            for c in 0..C {
                                let v = simd.load(from.add(c * lanes));
                                for g in 0..G {
                                    if $i >= g && $i - g < H {
                                        acc[$i - g][c] = simd.fma(w[g], v, acc[$i - g][c]);
                                    }
                                }
                            }
                        }
                    )+};
                }
                rows!(0 1 2 3 4 5 6 7 8);
            }
        }
        acc
    }
}
