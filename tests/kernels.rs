//! Every kernel on every instruction set of the machine, at every tail length, against the naive
//! twin; outputs start as NaN, and so does whatever memory a kernel may read but must not use.

mod common;

use common::owned::{depthwise_backward, depthwise_forward};
use common::{Noise, cast, close, close_beside, flat, nan, on_every_isa, same_bits, spread};
use ndarray::{Array1, Array3, Array4, ArrayView2, s};
use xunit_rs::kernels::activation::{
    Affine, Apply, CopyOut, Fill, FillGradient, Finish, Gate, GateGradient, NormGradient, PastGate,
    ReluGradient, Sums, Target,
};
use xunit_rs::kernels::minimal::Filter;
use xunit_rs::kernels::transpose::Transpose;
use xunit_rs::kernels::{MAX_LANES, conv, filtered, general, masked, pixels};
use xunit_rs::reference;
use xunit_rs::shape::{Batch, Conv, Geometry};
use xunit_rs::simd::{Isa, Kernel, Scalar, Simd, available, dispatch, fence, selected};

/// Kernel extents: each size that has its own code, those between, even ones, flat and tall ones.
const KERNELS: [(usize, usize); 26] = [
    (1, 1),
    (2, 2),
    (3, 3),
    (4, 4),
    (5, 5),
    (6, 6),
    (7, 7),
    (8, 8),
    (9, 9),
    (10, 10),
    (11, 11),
    (13, 13),
    (16, 16),
    (31, 31),
    (1, 7),
    (7, 1),
    (2, 5),
    (5, 2),
    (3, 5),
    (9, 3),
    (4, 9),
    (1, 31),
    (31, 1),
    (12, 3),
    (3, 16),
    (6, 19),
];

/// Every tail of every vector, then widths around the tiles of 2 and 4 vectors.
fn widths() -> impl Iterator<Item = usize> {
    (1..=40).chain([47, 48, 49, 63, 64, 65, 79, 96, 113, 128, 131])
}

/// [`close`], where sums of products of at most 1 may cancel by chance.
#[track_caller]
fn near<'a, T: Scalar>(
    got: &[T],
    want: impl IntoIterator<Item = &'a f64>,
    case: impl FnOnce() -> String,
) {
    close_beside(got, want, 1.0, case);
}

fn dense(kh: usize, kw: usize) -> Conv {
    Conv { kh, kw, stride: [1, 1], padding: [0; 4], dilation: [1, 1] }
}

/// A plane and its place in a batch of one.
fn one(values: Vec<f64>, h: usize, w: usize) -> Array4<f64> {
    Array4::from_shape_vec((1, 1, h, w), values).unwrap()
}

#[test]
fn convolution() {
    for (kh, kw) in KERNELS {
        for w in widths() {
            // Heights below, at and above the four rows of the tile, in turn.
            for h in if kh * kw <= 81 { vec![1 + w % 3, 4 + w % 5, 9] } else { vec![1 + w % 9] } {
                convolution_of(kh, kw, h, w, false);
            }
            convolution_of(kh, kw, 5, w, true);
            // Several blocks of rows, whose sums are added up one after the other.
            if kw < 12 && matches!(kh, 5 | 7 | 9 | 11) && w % 16 == 5 {
                convolution_of(kh, kw, 62 + w, w, w > 40);
            }
            // Those that minimal filtering computes: every count of tiles of the register tiles.
            if matches!(kh, 7 | 9 | 11) {
                convolution_of(kh, kw, 6 + w % 23, w, false);
                convolution_of(kh, kw, 6 + w % 7, w, true);
            }
        }
    }
}

fn convolution_of(kh: usize, kw: usize, oh: usize, ow: usize, spoil: bool) {
    let mut noise = Noise::new((kh * 97 + kw * 31 + oh * 7 + ow) as u64);
    let (h, w) = (oh + kh - 1, ow + kw - 1);
    let mut input = noise.vec(h * w);
    let mut weight = noise.vec(kh * kw);
    if spoil {
        noise.spoil(&mut input);
        if ow.is_multiple_of(4) {
            let at = noise.below(weight.len());
            weight[at] = f64::INFINITY;
        }
    }
    let mut grad = noise.vec(oh * ow);
    if spoil {
        noise.spoil(&mut grad);
    }
    let bias = noise.next();
    let conv = dense(kh, kw);
    let x = one(input, h, w);
    let taps = Array3::from_shape_vec((1, kh, kw), weight).unwrap();
    let y = reference::depthwise(&x, &taps, Some(&Array1::from_elem(1, bias)), &conv);
    let g = one(grad, oh, ow);
    let (_, gweight, _) = reference::depthwise_backward(&g, &x, &taps, &conv);
    convolution_in::<f32>(&x, &taps, bias, &y, &g, &gweight);
    convolution_in::<f64>(&x, &taps, bias, &y, &g, &gweight);
}

fn convolution_in<T: Scalar>(
    x: &Array4<f64>,
    taps: &Array3<f64>,
    bias: f64,
    y: &Array4<f64>,
    grad: &Array4<f64>,
    gweight: &Array3<f64>,
) {
    let ((_, kh, kw), (_, _, oh, ow)) = (taps.dim(), y.dim());
    let ld = conv::row_length(ow, kw) + oh % 3;
    let input = spread(&flat::<T, _>(x), ow + kw - 1, ld);
    let (weight, bias) = (flat::<T, _>(taps), T::from_f64(bias));
    for isa in available() {
        let case = || format!("{} {isa}: kernel {kh}×{kw}, output {oh}×{ow}", size_of::<T>());
        let (input, kernel) = (&input[..], (kh, kw));
        let next = &input[..input.len().min(oh * 40)];
        // As the machine has it, which may be without a filter, and with the filter.
        for taps in [
            conv::Taps::new(weight.clone(), kernel, 1, oh),
            conv::Taps::with(weight.clone(), kernel, 1, Filter::of(kh)),
        ] {
            let mut scratch = nan(taps.scratch(oh, ow));
            // Less than there are rows and more than there is time for.
            let from = &input[..[0, oh, oh * ow / 2, input.len()][(oh + ow) % 4]];
            let mut run = |out: Target<'_, T>, to: Target<'_, T>| {
                let (bias, taps, scratch) = (&[bias], &taps, &mut scratch[..]);
                let copy = CopyOut { from, to };
                let next = conv::Next::soon(next);
                let job = conv::Forward { input, ld, taps, bias, out, ow, scratch, next, copy };
                T::dispatch(isa, job);
            };
            let mut out = nan::<T>(oh * ow);
            let mut copied = streamed(from.len(), |to| run(Target::new(&mut out), to));
            near(&out, y, || format!("forward, {}", case()));
            same_bits(&copied, from, || format!("copied meanwhile, {}", case()));
            let out_streamed = streamed(oh * ow, |out| run(out, Target::new(&mut copied)));
            same_bits(&out_streamed, &out, || format!("forward, streamed, {}", case()));
        }
        for grad_ld in [ow, ow + 5] {
            let grad = spread(&flat::<T, _>(grad), ow, grad_ld);
            // Sums go on top of what is there.
            let mut sum = vec![1.0; kh * kw];
            let (grad, out) = (&grad[..], (oh, ow));
            let sum_of = &mut sum;
            let (sum, block) = (sum_of, 1);
            let job = conv::WeightGradient {
                grad,
                grad_ld,
                input,
                ld,
                sum,
                kernel,
                out,
                block,
                next: [next, &grad[..grad.len().min(ow * 3)]],
            };
            T::dispatch(isa, job);
            let sum: Vec<T> = sum.iter().map(|&sum| T::from_f64(sum)).collect();
            let want = gweight.mapv(|g| g + 1.0);
            near(&sum, &want, || format!("weight gradient, stride {grad_ld}, {}", case()));
        }
    }
}

/// Rows and columns of padding that are not in memory, which the instruction set with masks has.
#[test]
fn convolution_that_pads() {
    let mut ran = 0;
    for k in [3, 5, 7] {
        for w in widths() {
            let mut noise = Noise::new((k * 97 + w) as u64);
            for _ in 0..4 {
                let padding = [(); 4].map(|()| noise.below(k / 2 + 1));
                let (h, [top, bottom, left, right]) = (k - 1 + noise.below(9), padding);
                if h + top + bottom >= k && w + left + right >= k {
                    ran += usize::from(convolution_padded(k, (h, w), padding, &mut noise));
                }
            }
        }
    }
    assert_eq!(ran > 0, selected() == Isa::Avx512, "{ran} cases");
}

/// Whether the kernel takes this padding.
fn convolution_padded(
    k: usize,
    (h, w): (usize, usize),
    padding: [usize; 4],
    noise: &mut Noise,
) -> bool {
    let conv = Conv { padding, ..dense(k, k) };
    let x = one(noise.vec(h * w), h, w);
    let weight = Array3::from_shape_vec((1, k, k), noise.vec(k * k)).unwrap();
    let bias = noise.next();
    let y = reference::depthwise(&x, &weight, Some(&Array1::from_elem(1, bias)), &conv);
    let (_, _, oh, ow) = y.dim();
    let taps = conv::Taps::with(flat::<f32, _>(&weight), (k, k), 1, None);
    if !taps.pads(oh, ow, padding) {
        return false;
    }
    // Nothing around the plane is zero.
    let len = masked::input_len(h, ow, k, padding);
    let mut memory = nan::<f32>(16 + len);
    memory[16..][..h * w].copy_from_slice(&flat::<f32, _>(&x));
    let input = &memory[16..];
    let case = || format!("kernel {k}, plane {h}×{w}, padding {padding:?}");
    let run = |out: Target<'_, f32>, to: Target<'_, f32>| {
        let copy = CopyOut { from: &input[..h * w / 2], to };
        let (taps, bias, next) = (&taps, bias as f32, conv::Next::soon(input));
        dispatch(masked::Forward { input, padding, taps, bias, out, ow, next, copy });
    };
    let mut out = nan::<f32>(oh * ow);
    let mut copied = streamed(h * w / 2, |to| run(Target::new(&mut out), to));
    near(&out, &y, || format!("forward, {}", case()));
    same_bits(&copied, &input[..h * w / 2], || format!("copied meanwhile, {}", case()));
    let out_streamed = streamed(oh * ow, |out| run(out, Target::new(&mut copied)));
    same_bits(&out_streamed, &out, || format!("forward, streamed, {}", case()));
    true
}

/// Planes without their padding, as they are and through relu of a map.
#[test]
fn convolution_of_filtered_planes() {
    for (kh, kw) in [(7, 7), (9, 9), (11, 11), (7, 1), (9, 3), (11, 31)] {
        for w in widths() {
            let mut noise = Noise::new((kh * 89 + w) as u64);
            for maps in [false, true] {
                let mut below = |n: usize| noise.below(n);
                let padding = [below(kh), below(kh), below(kw.min(16)), below(kw.min(16))];
                let [top, bottom, left, right] = padding;
                // Any height, and those of the tallest register tile.
                let tile = Filter::of(kh).unwrap().tile;
                let tall = 7 * tile - noise.below(tile) + kh - 1 - top - bottom;
                for h in [1 + noise.below(40), tall] {
                    if h + top + bottom >= kh && w + left + right >= kw {
                        convolution_filtered((kh, kw), (h, w), padding, maps, &mut noise);
                    }
                }
            }
        }
    }
}

fn convolution_filtered(
    (kh, kw): (usize, usize),
    (h, w): (usize, usize),
    padding: [usize; 4],
    maps: bool,
    noise: &mut Noise,
) {
    let conv = Conv { padding, ..dense(kh, kw) };
    let x = one(noise.vec(h * w), h, w);
    let weight = Array3::from_shape_vec((1, kh, kw), noise.vec(kh * kw)).unwrap();
    let affine = Affine { centre: noise.next(), scale: noise.next(), shift: noise.next() };
    let map = |x: f64| (affine.scale * (x - affine.centre) + affine.shift).max(0.0);
    let u = if maps { x.mapv(map) } else { x.clone() };
    let bias = noise.next();
    let y = reference::depthwise(&u, &weight, Some(&Array1::from_elem(1, bias)), &conv);
    let (_, _, oh, ow) = y.dim();
    let affine = Affine {
        centre: affine.centre as f32,
        scale: affine.scale as f32,
        shift: affine.shift as f32,
    };
    let taps = conv::Taps::with(flat::<f32, _>(&weight), (kh, kw), 1, Filter::of(kh));
    assert!(taps.filters(padding));
    // Rows farther apart than they are long, and whatever lies between them.
    let ld = w + noise.below(5);
    let data = spread(&flat::<f32, _>(&x), w, ld);
    let input = filtered::Rows {
        data: &data,
        ld,
        rows: h,
        width: w,
        padding: [padding[0], padding[2]],
        relu_of: maps.then_some(affine),
    };
    for isa in available() {
        let case =
            || format!("{isa}: kernel {kh}×{kw}, plane {h}×{w}, padding {padding:?}, {maps}");
        let mut scratch = nan(taps.scratch(oh, ow));
        let mut run = |out: Target<'_, f32>, to: Target<'_, f32>| {
            let (bias, next) = (&[bias as f32], conv::Next::soon(&data));
            let scratch = &mut scratch[..];
            let (taps, copy) = (&taps, CopyOut { from: &data[..h * w / 2], to });
            let job = filtered::Forward { input, taps, bias, out, ow, scratch, next, copy };
            assert!(f32::dispatch(isa, job), "{}", case());
        };
        let mut out = nan::<f32>(oh * ow);
        let mut copied = streamed(h * w / 2, |to| run(Target::new(&mut out), to));
        near(&out, &y, || format!("forward, {}", case()));
        same_bits(&copied, &data[..h * w / 2], || format!("copied meanwhile, {}", case()));
        let out_streamed = streamed(oh * ow, |out| run(out, Target::new(&mut copied)));
        same_bits(&out_streamed, &out, || format!("forward, streamed, {}", case()));
        // Sums that are not finite are told of.
        let mut spoilt = data.clone();
        spoilt[noise.below(h) * ld + noise.below(w)] = f32::INFINITY;
        let input = filtered::Rows { data: &spoilt, relu_of: None, ..input };
        let (bias, next, copy) = (&[0.0], conv::Next::default(), CopyOut::default());
        let (taps, scratch, out) = (&taps, &mut scratch[..], Target::new(&mut out));
        let job = filtered::Forward { input, taps, bias, out, ow, scratch, next, copy };
        assert!(!f32::dispatch(isa, job), "{}", case());
    }
}

#[test]
fn convolution_by_taps() {
    for ow in widths() {
        for spoil in [false, true] {
            let mut noise = Noise::new(ow as u64 + 5);
            let (oh, step) = (1 + noise.below(11), noise.below(2 * ow + 40));
            // Zero to twenty: every remainder of the weight gradient's groups.
            let offsets: Vec<_> = (0..ow % 21).map(|_| noise.below(3 * step + 50)).collect();
            taps_of(&mut noise, (oh, ow), step, &offsets, spoil);
        }
    }
}

fn taps_of(
    noise: &mut Noise,
    (oh, ow): (usize, usize),
    step: usize,
    offsets: &[usize],
    spoil: bool,
) {
    let used = (oh - 1) * step + offsets.iter().max().unwrap_or(&0) + ow;
    let (mut input, mut grad) = (noise.vec(used), noise.vec(oh * ow));
    if spoil {
        noise.spoil(&mut input);
        noise.spoil(&mut grad);
    }
    let (weight, bias) = (noise.vec(offsets.len()), noise.next());
    let at = |offset: usize, pixel: usize| input[pixel / ow * step + offset + pixel % ow];
    let want: Vec<f64> = (0..oh * ow)
        .map(|pixel| {
            let taps = offsets.iter().zip(&weight);
            bias + taps.map(|(&offset, w)| w * at(offset, pixel)).sum::<f64>()
        })
        .collect();
    let want_sum: Vec<f64> = offsets
        .iter()
        .map(|&offset| 1.0 + grad.iter().enumerate().map(|(i, g)| g * at(offset, i)).sum::<f64>())
        .collect();
    taps_in::<f32>(&input, step, offsets, (&weight, bias), &grad, ow, (&want, &want_sum));
    taps_in::<f64>(&input, step, offsets, (&weight, bias), &grad, ow, (&want, &want_sum));
}

fn taps_in<T: Scalar>(
    input: &[f64],
    step: usize,
    offsets: &[usize],
    (weight, bias): (&[f64], f64),
    grad: &[f64],
    ow: usize,
    (want, want_sum): (&[f64], &[f64]),
) {
    let used = cast::<T>(input);
    let padded = [&used[..], &nan::<T>(MAX_LANES)[..]].concat();
    let grad = &cast::<T>(grad)[..];
    let taps: Vec<_> = offsets.iter().copied().zip(cast::<T>(weight)).collect();
    for isa in available() {
        let case = || format!("{} {isa}: {ow} wide, step {step}, {offsets:?}", size_of::<T>());
        let (mut out, bias) = (nan::<T>(grad.len()), T::from_f64(bias));
        let job = general::Forward { input: &padded, step, taps: &taps, bias, out: &mut out, ow };
        T::dispatch(isa, job);
        near(&out, want, || format!("forward, {}", case()));
        let mut sum = vec![1.0; offsets.len()];
        let job = general::WeightGradient { grad, ow, input: &used, step, offsets, sum: &mut sum };
        T::dispatch(isa, job);
        let sum: Vec<T> = sum.iter().map(|&sum| T::from_f64(sum)).collect();
        near(&sum, want_sum, || format!("weight gradient, {}", case()));
    }
}

/// Plane lengths: every tail, and more than the vectors that are added up in lanes.
fn lengths() -> impl Iterator<Item = usize> {
    (1..=40).chain([63, 64, 65, 127, 255, 256, 257, 511, 512, 513, 1023, 1030])
}

/// A plane's values and a batch norm's constants, exact in `f32`.
struct Activation {
    x: Vec<f64>,
    d: Vec<f64>,
    grad: Vec<f64>,
    /// Centre, scale and shift.
    affine: (f64, f64, f64),
}

impl Activation {
    fn new(len: usize, spoil: bool) -> Self {
        let mut noise = Noise::new(len as u64 + 1000);
        let mut new = || noise.vec(len).iter().map(|x| 4.0 * x).collect::<Vec<_>>();
        let (mut x, mut d, mut grad) = (new(), new(), new());
        if spoil {
            noise.spoil(&mut x);
            noise.spoil(&mut d);
            noise.spoil(&mut grad);
        }
        Self { x, d, grad, affine: (0.5, 0.75, 0.125) }
    }

    fn affine<T: Scalar>(&self) -> Affine<T> {
        let (centre, scale, shift) = self.affine;
        Affine { centre: T::from_f64(centre), scale: T::from_f64(scale), shift: T::from_f64(shift) }
    }

    fn u(&self, values: &[f64]) -> Array4<f64> {
        let (centre, scale, shift) = self.affine;
        one(values.iter().map(|x| scale * (x - centre) + shift).collect(), 1, values.len())
    }

    /// Σ e and Σ e · (x − centre).
    fn sums(&self, e: &Array4<f64>, x: &[f64]) -> [f64; 2] {
        let centred = x.iter().map(|x| x - self.affine.0);
        [e.iter().sum(), e.iter().zip(centred).map(|(e, x)| e * x).sum()]
    }
}

fn each_activation(test: impl Fn(&Activation)) {
    for len in lengths() {
        for spoil in [false, true] {
            test(&Activation::new(len, spoil));
        }
    }
}

/// The sum of magnitudes: what a sum that cancels is to be judged beside.
fn magnitude<'a>(values: impl IntoIterator<Item = &'a f64>) -> f64 {
    values.into_iter().filter(|x| x.is_finite()).map(|x| x.abs()).sum()
}

#[test]
fn sums() {
    fn sums_in<T: Scalar>(offset: f64, plane: &[f64]) {
        let plane: Vec<_> = plane.iter().map(|x| x + offset).collect();
        let centred: Vec<_> = plane.iter().map(|x| x - offset).collect();
        let squares: Vec<_> = centred.iter().map(|x| x * x).collect();
        for isa in available() {
            let (plane, origin) = (&cast::<T>(&plane)[..], T::from_f64(offset));
            let (first, second) = T::dispatch(isa, Sums { plane, origin });
            let case =
                || format!("{} {isa}, {} elements from {offset}", size_of::<T>(), plane.len());
            let (first, second) = ([T::from_f64(first)], [T::from_f64(second)]);
            close_beside(&first, &[centred.iter().sum()], magnitude(&centred), case);
            close(&second, &[squares.iter().sum()], case);
        }
    }
    each_activation(|a| {
        // An offset that costs no bits of these values.
        let coarse: Vec<_> = a.x.iter().map(|x| (x * 1024.0).round() / 1024.0).collect();
        for offset in [0.0, 1000.0] {
            sums_in::<f32>(offset, &coarse);
            sums_in::<f64>(offset, &coarse);
        }
    });
}

#[test]
fn fill() {
    fn fill_in<T: Scalar>(a: &Activation, width: usize, want: &[f64], relu: bool) {
        let rows = want.len() / width;
        let (ld, origin) = (width + 7, 2 * (width + 7) + 3);
        for isa in available() {
            let mut padded = nan::<T>((rows + 4) * ld);
            let (plane, relu_of) = (&cast::<T>(&a.x)[..], relu.then(|| a.affine::<T>()));
            T::dispatch(isa, Fill { plane, width, relu_of, padded: &mut padded, ld, origin });
            check_middle(&padded, want, width, ld, origin, &format!("{isa}, width {width}"));
        }
    }
    each_activation(|a| {
        let relu = reference::relu(&a.u(&a.x)).into_raw_vec_and_offset().0;
        let len = a.x.len();
        for width in
            [len, 1].into_iter().chain([3, 8, 33].into_iter().filter(|&w| len.is_multiple_of(w)))
        {
            for (want, is_relu) in [(&a.x, false), (&relu, true)] {
                fill_in::<f32>(a, width, want, is_relu);
                fill_in::<f64>(a, width, want, is_relu);
            }
        }
    });
}

/// Checks the middle of a padded plane, and that its margins were left as they were: NaN.
fn check_middle<T: Scalar>(
    padded: &[T],
    want: &[f64],
    width: usize,
    ld: usize,
    origin: usize,
    case: &str,
) {
    let rows = want.len() / width;
    let view = ArrayView2::from_shape((padded.len() / ld, ld), padded).unwrap();
    let (top, left) = (origin / ld, origin % ld);
    let middle = view.slice(s![top..top + rows, left..left + width]);
    close(&middle.iter().copied().collect::<Vec<_>>(), want, || case.to_owned());
    for ((y, x), value) in view.indexed_iter() {
        let inside = (top..top + rows).contains(&y) && (left..left + width).contains(&x);
        assert!(inside || value.to_f64().is_nan(), "{case}: margin ({y}, {x}) is {value:?}");
    }
}

/// What `write` streams to `len` elements, aligned and one element off; both must be the same.
fn streamed<T: Scalar>(len: usize, mut write: impl FnMut(Target<'_, T>)) -> Vec<T> {
    let mut both = [0, 1].map(|off| {
        let mut buffer = nan::<T>(len + 16 + off);
        let start = buffer.as_ptr().align_offset(64) + off;
        // SAFETY: nobody reads it before the fence.
        write(unsafe { Target::streamed(&mut buffer[start..start + len], true) });
        fence();
        let outside = buffer[..start].iter().chain(&buffer[start + len..]);
        assert!(outside.into_iter().all(|x| x.to_f64().is_nan()));
        buffer[start..start + len].to_vec()
    });
    same_bits(&both[0], &both[1], || format!("streamed, {len} elements"));
    std::mem::take(&mut both[0])
}

#[test]
fn gates() {
    /// What is wanted: the output, the gradient at the gate's argument, and the one past the gate.
    struct Want {
        out: Array4<f64>,
        e: Array4<f64>,
        direct: Array4<f64>,
    }

    fn gate_in<T: Scalar>(a: &Activation, gate: Gate, want: &Want) {
        let (x, d, grad) = (&cast::<T>(&a.x)[..], &cast::<T>(&a.d)[..], &cast::<T>(&a.grad)[..]);
        for isa in available() {
            let case = || format!("{} {isa}: {gate:?}, {} elements", size_of::<T>(), x.len());
            let mut got = nan::<T>(x.len());
            let affine = a.affine::<T>();
            let out = Target::new(&mut got);
            T::dispatch(isa, Apply { gate, x, d, affine, out });
            close(&got, &want.out, || format!("apply, {}", case()));
            let got_streamed = streamed(x.len(), |out| {
                T::dispatch(isa, Apply { gate, x, d, affine, out });
            });
            same_bits(&got_streamed, &got, || format!("streamed, {}", case()));

            let mut e = nan::<T>(x.len());
            let next = [grad, x, d].map(|next| next.as_ptr_range().end);
            let got = streamed(x.len(), |direct| {
                let (direct, e) = (Some(direct), &mut e);
                T::dispatch(isa, GateGradient { gate, grad, x, d, affine, direct, e, next });
            });
            close(&got, &want.direct, || format!("streamed past the gate, {}", case()));
            let (mut direct, mut e) = (nan::<T>(x.len()), nan::<T>(x.len()));
            let (past, at) = (Some(Target::new(&mut direct)), &mut e);
            let job = GateGradient { gate, grad, x, d, affine, direct: past, e: at, next };
            let sums = T::dispatch(isa, job);
            let mut alone = nan::<T>(x.len());
            let (past, at) = (None, &mut alone);
            let job = GateGradient { gate, grad, x, d, affine, direct: past, e: at, next };
            let of_alone = T::dispatch(isa, job);
            let [of_alone, sums] = [of_alone, sums].map(<[f64; 2]>::from);
            same_bits(&of_alone, &sums, || format!("sums of the gradient alone, {}", case()));
            same_bits(&alone, &e, || format!("gradient alone, {}", case()));
            let (mut out, mut moved) = (x.to_vec(), nan::<T>(x.len()));
            let (next, to) = ([grad, d, x].map(|next| next.as_ptr_range().end), &mut moved);
            let job = PastGate { gate, grad, d, affine, out: &mut out, moved: to, next };
            T::dispatch(isa, job);
            same_bits(&moved, x, || format!("moved, {}", case()));
            close(&out, &want.direct, || format!("past the gate alone, {}", case()));
            close(&direct, &want.direct, || format!("gradient past the gate, {}", case()));
            close(&e, &want.e, || format!("gradient, {}", case()));
            let sums = sums.map(T::from_f64);
            // Up to 4.5: the largest |d − centre| of this test.
            let scale = 4.5 * magnitude(&want.e);
            let sums_want = a.sums(&want.e, &a.d);
            close_beside(&sums, &sums_want, scale, || format!("sums, {}", case()));
        }
    }
    each_activation(|a| {
        for gate in [Gate::Sigmoid, Gate::Gaussian] {
            let (u, len) = (a.u(&a.d), a.x.len());
            let (x, grad) = (one(a.x.clone(), 1, len), one(a.grad.clone(), 1, len));
            let g = reference::gate(gate, &u);
            let e = reference::gate_backward(gate, &(&grad * &x), &u);
            let want = Want { out: &x * &g, e, direct: &grad * &g };
            gate_in::<f32>(a, gate, &want);
            gate_in::<f64>(a, gate, &want);
        }
    });
}

#[test]
fn gates_far_from_zero() {
    fn far_in<T: Scalar>(gate: Gate, d: &[f64], want: &Array4<f64>) {
        for isa in available() {
            let (d, x) = (&cast::<T>(d)[..], &vec![T::ONE; d.len()][..]);
            let affine = Affine::identity();
            let mut out = nan::<T>(d.len());
            let target = Target::new(&mut out);
            T::dispatch(isa, Apply { gate, x, d, affine, out: target });
            // Relative to each value; subnormal ones may be flushed to zero.
            for ((out, want), d) in out.iter().zip(want).zip(d) {
                let (got, want) = (out.to_f64(), *want);
                let bound = common::tolerance::<T>() * want + f64::from(f32::MIN_POSITIVE);
                assert!((got - want).abs() <= bound, "{isa} {gate:?}({d:?}): {got}, {want}");
            }
        }
    }
    let mut d: Vec<f64> = (-3200..=3200).map(|i| f64::from(i) / 32.0).collect();
    d.extend([1e4, -1e4, 1e20, -1e20, 3e38, -3e38, f64::INFINITY, f64::NEG_INFINITY, 0.0, -0.0]);
    for gate in [Gate::Sigmoid, Gate::Gaussian] {
        let want = reference::gate(gate, &one(d.clone(), 1, d.len()));
        far_in::<f32>(gate, &d, &want);
        far_in::<f64>(gate, &d, &want);
    }
}

#[test]
fn relu_gradient() {
    fn relu_in<T: Scalar>(a: &Activation, want: &Array4<f64>) {
        for isa in available() {
            let case = || format!("{} {isa}: {} elements", size_of::<T>(), a.x.len());
            let (x, mut grad) = (&cast::<T>(&a.x)[..], cast::<T>(&a.grad));
            let job = ReluGradient { x, affine: a.affine(), grad: &mut grad };
            let sums = T::dispatch(isa, job);
            close(&grad, want, case);
            let (sums, scale) = ([T::from_f64(sums.0), T::from_f64(sums.1)], 4.5 * magnitude(want));
            close_beside(&sums, &a.sums(want, &a.x), scale, || format!("sums, {}", case()));
        }
    }
    each_activation(|a| {
        let grad = one(a.grad.clone(), 1, a.grad.len());
        let want = reference::relu_backward(&grad, &a.u(&a.x));
        relu_in::<f32>(a, &want);
        relu_in::<f64>(a, &want);
    });
}

#[test]
fn norm_gradient() {
    fn norm_in<T: Scalar>(a: &Activation, batch: Option<(f64, f64)>, want: &[f64]) {
        let len = a.x.len();
        let norm = NormGradient::new(a.affine::<T>(), batch);
        for isa in available() {
            let case = || format!("{} {isa}: {len} elements, {batch:?}", size_of::<T>());
            let (x, grad) = (&cast::<T>(&a.x)[..], &cast::<T>(&a.grad)[..]);
            let direct = &vec![T::from_f64(0.5); len][..];
            let mut got = nan::<T>(len);
            let out = Target::new(&mut got);
            let (x_of, direct_of) = (Some(x), Some(direct));
            let sum = T::dispatch(isa, Finish { norm, x: x_of, grad, direct: direct_of, out });
            let mut in_place = x.to_vec();
            let out = Target::new(&mut in_place);
            T::dispatch(isa, Finish { norm, x: None, grad, direct: direct_of, out });
            same_bits(&in_place, &got, || format!("in place, {}", case()));
            let added: Vec<_> = want.iter().map(|g| g + 0.5).collect();
            close(&got, &added, || format!("added, {}", case()));
            let (sum, scale) = ([T::from_f64(sum)], magnitude(want));
            close_beside(&sum, &[want.iter().sum()], scale, || format!("its sum, {}", case()));
            let got = streamed(len, |out| {
                T::dispatch(isa, Finish { norm, x: Some(x), grad, direct: None, out });
            });
            close(&got, want, || format!("alone, {}", case()));
            same_bits(&streamed(len, |to| T::dispatch(isa, CopyOut { from: x, to })), x, || {
                format!("copy, {}", case())
            });
            for width in [len, 1].into_iter().chain(len.is_multiple_of(8).then_some(8)) {
                let (ld, origin) = (width + 5, width + 5 + 2);
                let mut padded = nan::<T>((len / width + 2) * ld);
                let (d, padded_mut) = (x, &mut padded[..]);
                let job = FillGradient { norm, grad, d, width, padded: padded_mut, ld, origin };
                let sum = T::dispatch(isa, job);
                check_middle(&padded, want, width, ld, origin, &case());
                let (sum, scale) = ([T::from_f64(sum)], magnitude(want));
                close_beside(&sum, &[want.iter().sum()], scale, || format!("sum, {}", case()));
            }
        }
    }
    each_activation(|a| {
        // Constants that need both of their parts: 1/3 and 1/7 in f32 are off by 1e-8.
        for batch in [None, Some((1.0 / 3.0, -1.0 / 7.0))] {
            // An infinity makes a batch's statistics, and so all its gradients, NaN.
            if batch.is_some() && a.x.iter().any(|x| x.is_infinite()) {
                continue;
            }
            let (slope, shift) = batch.unwrap_or_default();
            let want: Vec<_> = a
                .grad
                .iter()
                .zip(&a.x)
                .map(|(e, x)| {
                    let rest = if batch.is_some() { slope * (x - a.affine.0) + shift } else { 0.0 };
                    a.affine.1 * e + rest
                })
                .collect();
            norm_in::<f32>(a, batch, &want);
            norm_in::<f64>(a, batch, &want);
        }
    });
}

#[test]
fn norm_gradients_that_cancel() {
    // e = −slope/scale · (x − centre) − shift/scale, all but for the rounding of e.
    let affine = Affine { centre: 0.5f32, scale: 0.75, shift: 0.0 };
    let (slope, shift) = (1.0 / 3.0, -1.0 / 7.0);
    let norm = NormGradient::new(affine, Some((slope, shift)));
    // With digits in all their bits, so that roundings are as good as random.
    let x: Vec<f32> = Noise::new(1).vec(10_000).iter().map(|x| (x * 0.9137) as f32).collect();
    let exact = |x: f32| -(slope * (f64::from(x) - 0.5) + shift) / 0.75;
    let e: Vec<f32> = x.iter().map(|&x| exact(x) as f32).collect();
    let rounding = |(e, x): (&f32, &f32)| (f64::from(*e) - exact(*x)) * 0.75;
    let want: f64 = e.iter().zip(&x).map(rounding).sum();
    for isa in available() {
        let mut grad = nan::<f32>(e.len());
        let out = Target::new(&mut grad);
        f32::dispatch(isa, Finish { norm, x: Some(&x), grad: &e, direct: None, out });
        let sum: f64 = grad.iter().map(|&g| f64::from(g)).sum();
        // 2e-5 of roundings; rounded constants would give 1.1e-4.
        assert!((sum - want).abs() < 5e-5, "{isa}: {sum:e}, {want:e}");
    }
}

#[test]
fn depthwise_operation() {
    on_every_isa("depthwise_operation", || {
        let mut noise = Noise::new(7);
        for (kh, kw) in KERNELS.into_iter().chain([(15, 15), (21, 21), (20, 3), (2, 31)]) {
            for round in 0..24 {
                // Every other round keeps to stride and dilation 1, which has code of its own.
                let any = |noise: &mut Noise| 1 + noise.below(if round % 2 == 0 { 1 } else { 3 });
                let conv = Conv {
                    kh,
                    kw,
                    stride: [any(&mut noise), any(&mut noise)],
                    padding: match round % 4 {
                        0 => [kh / 2, kh / 2, kw / 2, kw / 2],
                        // More than the kernel reaches, too.
                        _ => [kh, kh, kw, kw].map(|k| noise.below(k + 3)),
                    },
                    dilation: [any(&mut noise), any(&mut noise)],
                };
                let (h, w) = (1 + noise.below(14), 1 + noise.below(40));
                let input = Batch::new(&[1 + noise.below(2), 1 + noise.below(3), h, w]).unwrap();
                if let Ok(geometry) = Geometry::new(input, conv) {
                    depthwise_of(&mut noise, &geometry, round % 3 == 2);
                }
            }
        }
    });
}

#[test]
fn depthwise_operation_at_every_width_and_height() {
    on_every_isa("depthwise_operation_at_every_width_and_height", || {
        let mut noise = Noise::new(9);
        for k in [3, 7, 9] {
            for w in 1..=40 {
                for h in 1..=9 {
                    let conv = Conv::same(k).unwrap();
                    let input = Batch::new(&[1, 1, h, w]).unwrap();
                    depthwise_of(&mut noise, &Geometry::new(input, conv).unwrap(), h == 5);
                }
            }
            // Rows are split into even and odd elements, two vectors at a time.
            for w in (1..=70).chain([96, 127, 128]) {
                for left in 0..k {
                    let input = Batch::new(&[2, 1, 1 + noise.below(9), w]).unwrap();
                    let padding = [noise.below(k), noise.below(k), left, noise.below(k)];
                    let stride = [1 + left % 2, 2];
                    let conv = Conv { stride, padding, ..Conv::same(k).unwrap() };
                    if let Ok(geometry) = Geometry::new(input, conv) {
                        depthwise_of(&mut noise, &geometry, w % 5 == 0);
                    }
                }
            }
        }
    });
}

fn depthwise_of(noise: &mut Noise, geometry: &Geometry, spoil: bool) {
    let (conv, c) = (geometry.conv, geometry.input.c);
    let (mut x, mut grad) =
        (noise.array(geometry.input.dims()), noise.array(geometry.output().dims()));
    if spoil {
        noise.spoil(x.as_slice_mut().unwrap());
        noise.spoil(grad.as_slice_mut().unwrap());
    }
    let (x, grad) = (x.into_dimensionality().unwrap(), grad.into_dimensionality().unwrap());
    let (weight, bias) = (noise.array((c, conv.kh, conv.kw)), noise.array(c));
    let bias = (noise.below(4) > 0).then_some(bias);
    let y = reference::depthwise(&x, &weight, bias.as_ref(), &conv);
    let gradients = reference::depthwise_backward(&grad, &x, &weight, &conv);
    depthwise_in::<f32>(geometry, &x, &weight, bias.as_ref(), &grad, &y, &gradients);
    depthwise_in::<f64>(geometry, &x, &weight, bias.as_ref(), &grad, &y, &gradients);
}

fn depthwise_in<T: Scalar>(
    geometry: &Geometry,
    x: &Array4<f64>,
    weight: &Array3<f64>,
    bias: Option<&Array1<f64>>,
    grad: &Array4<f64>,
    y: &Array4<f64>,
    (gx, gweight, gbias): &(Array4<f64>, Array3<f64>, Array1<f64>),
) {
    let (x, weight, bias) = (flat::<T, _>(x), flat::<T, _>(weight), bias.map(flat::<T, _>));
    let case = || format!("{} bytes: {geometry:?}", size_of::<T>());
    let got = depthwise_forward(geometry, &x, &weight, bias.as_deref(), 1).unwrap();
    near(&got, y, || format!("forward, {}", case()));
    let scale = magnitude(grad);
    let flat_grad = flat::<T, _>(grad);
    let got = depthwise_backward(geometry, &flat_grad, &x, &weight, [true; 3], 1).unwrap();
    near(&got.x.unwrap(), gx, || format!("gradient to x, {}", case()));
    near(&got.weight.unwrap(), gweight, || format!("gradient to weight, {}", case()));
    close_beside(&got.bias.unwrap(), gbias, scale, || format!("gradient to bias, {}", case()));
}

#[test]
fn depthwise_gradients_that_nobody_needs_are_not_computed() {
    let input = Batch::new(&[2, 3, 5, 6]).unwrap();
    for conv in [Conv::same(3).unwrap(), Conv { stride: [2, 1], ..Conv::same(3).unwrap() }] {
        let geometry = Geometry::new(input, conv).unwrap();
        let mut noise = Noise::new(3);
        let (x, weight) = (noise.vec(input.size()), noise.vec(3 * 9));
        let grad = noise.vec(geometry.output().size());
        let all = depthwise_backward(&geometry, &grad, &x, &weight, [true; 3], 1).unwrap();
        for needs in (0..8).map(|bits| [bits & 1 > 0, bits & 2 > 0, bits & 4 > 0]) {
            let some = depthwise_backward(&geometry, &grad, &x, &weight, needs, 1).unwrap();
            assert_eq!(some.x, all.x.clone().filter(|_| needs[0]));
            assert_eq!(some.weight, all.weight.clone().filter(|_| needs[1]));
            assert_eq!(some.bias, all.bias.clone().filter(|_| needs[2]));
        }
    }
}

/// What goes past the caches is the same.
#[test]
fn pixels_past_the_caches() {
    let (h, w, c) = (5, 11, 32);
    let mut noise = Noise::new(12);
    let mut vec = |n: usize| cast::<f32>(&noise.vec(n));
    let (x, taps, bias) = (vec(h * w * c), vec(9 * c), vec(c));
    let grid = pixels::Grid { kernel: (3, 3), stride: (1, 1), origin: (-1, -1) };
    for isa in available() {
        let run = |stream: bool| {
            let mut out = nan::<f32>(h * w * c + MAX_LANES);
            let first = out.as_ptr().align_offset(64);
            let to = out[first..].as_mut_ptr();
            // SAFETY: there are so many pixels, and nobody reads them before the fence.
            let out_places =
                unsafe { general::Places::new(to, (w * c, c), (h, w), c).streamed(stream) };
            f32::dispatch(
                isa,
                pixels::Forward {
                    image: pixels::Image::new(&x, (h, w), c, 0..c),
                    grid,
                    taps: &taps,
                    bias: &bias,
                    rows: 0..h,
                    out: out_places,
                },
            );
            fence();
            out[first..][..h * w * c].to_vec()
        };
        let plain = run(false);
        assert!(plain.iter().all(|y| y.is_finite()));
        same_bits(&run(true), &plain, || format!("{isa}"));
    }
}

/// Every remainder of the tiles, between elements that are not touched.
#[test]
fn transposes() {
    for isa in available() {
        for pixels in 1..=40 {
            for channels in 1..=20 {
                transpose_in::<f32>(isa, pixels, channels);
                transpose_in::<f64>(isa, pixels, channels);
            }
        }
    }
}

fn transpose_in<T: Scalar>(isa: Isa, pixels: usize, channels: usize) {
    let (step, plane) = (channels + pixels % 3, pixels + channels % 4);
    let number = |p: usize, c: usize| T::from_f64((p * 100 + c) as f64);
    let case = || format!("{isa}: {pixels} pixels, {channels} channels");
    let mut last = nan::<T>(pixels * step);
    let mut planes = nan::<T>(channels * plane);
    for p in 0..pixels {
        for c in 0..channels {
            last[p * step + c] = number(p, c);
            planes[c * plane + p] = number(p, c);
        }
    }
    let mut got = nan::<T>(planes.len());
    T::dispatch(isa, Transpose::gather((&last, step), (&mut got, plane), pixels, channels));
    same_bits(&got, &planes, || format!("gather, {}", case()));
    let mut got = nan::<T>(last.len());
    // SAFETY: the target is as long as `pixels` times `step`.
    let job =
        unsafe { Transpose::scatter((&planes, plane), (got.as_mut_ptr(), step), pixels, channels) };
    T::dispatch(isa, job);
    same_bits(&got, &last, || format!("scatter, {}", case()));
}

#[test]
#[should_panic = "too many elements"]
fn a_transpose_whose_extent_overflows() {
    let mut to = [0f32; 17];
    let _ = Transpose::gather((&[0f32; 1], 1 << 60), (&mut to, 17), 17, 1);
}

/// Sigmoids of numbers.
struct Sigmoids<'a>(&'a [f32]);

impl Kernel<f32> for Sigmoids<'_> {
    type Output = Vec<f32>;

    #[inline(always)]
    fn run<S: Simd<f32>>(self, simd: S) -> Vec<f32> {
        let mut out = vec![0.0; self.0.len()];
        for (out, &x) in out.iter_mut().zip(self.0) {
            // SAFETY: one element.
            unsafe { simd.store_first(simd.sigmoid(simd.splat(x)), out, 1) };
        }
        out
    }
}

#[test]
fn sigmoids_are_within_a_few_roundings() {
    let grid: Vec<_> = (-870_000..=1_000_000).step_by(7).map(|i| i as f32 * 1e-4).collect();
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    for isa in available() {
        for (&x, got) in grid.iter().zip(f32::dispatch(isa, Sigmoids(&grid))) {
            let want = 1.0 / (1.0 + (-f64::from(x)).exp());
            let error = (f64::from(got) - want).abs() / want;
            assert!(error <= 3e-7, "{isa}: {x}: {got}, not {want}: {error:e}");
        }
        let edges = f32::dispatch(isa, Sigmoids(&[0.0, -0.0, inf, -inf, 3e38, -3e38, nan]));
        assert_eq!(edges[..6], [0.5, 0.5, 1.0, 0.0, 1.0, 0.0], "{isa}");
        assert!(edges[6].is_nan(), "{isa}");
    }
}
