//! The kernels on blocked images against naive float64 sums, on every instruction set there is.

use xunit_rs::kernels::activation::Gate;
use xunit_rs::kernels::blocked::{GateWeights, Gated, Row, RowMut, Sink};
use xunit_rs::kernels::channelwise::Maps;
use xunit_rs::kernels::winograd::{Convolve, TILE, Weights};
use xunit_rs::simd::{self, Isa, Kernel, Scalar, Simd};

/// Numbers in [-1, 1) without a pattern.
fn noise(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963);
        (state >> 33) as f32 / (1u64 << 30) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

fn lanes(isa: Isa) -> usize {
    struct Lanes;
    impl Kernel<f32> for Lanes {
        type Output = usize;
        #[inline(always)]
        fn run<S: Simd<f32>>(self, simd: S) -> usize {
            simd.lanes()
        }
    }
    f32::dispatch(isa, Lanes)
}

/// A blocked image: rows of (blocks, width, lanes), NaN where nothing is.
struct Image {
    rows: Vec<Vec<f32>>,
    width: usize,
    lanes: usize,
}

impl Image {
    fn empty(channels: usize, [height, width]: [usize; 2], lanes: usize) -> Self {
        let row = vec![f32::NAN; channels.div_ceil(lanes) * width * lanes];
        Self { rows: vec![row; height], width, lanes }
    }

    fn at(&mut self, c: usize, y: usize, x: usize) -> &mut f32 {
        &mut self.rows[y][(c / self.lanes * self.width + x) * self.lanes + c % self.lanes]
    }

    fn noise(channels: usize, [height, width]: [usize; 2], lanes: usize) -> Self {
        let mut image = Self::empty(channels, [height, width], lanes);
        image.rows.iter_mut().for_each(|row| row.fill(0.0));
        let values = noise(7, channels * height * width);
        for (i, value) in values.into_iter().enumerate() {
            *image.at(i / (height * width), i / width % height, i % width) = value;
        }
        image
    }

    fn read(&self) -> Vec<Row<'_>> {
        self.rows.iter().map(|row| Row::new(row, self.width * self.lanes, self.lanes)).collect()
    }

    fn write(&mut self) -> Vec<RowMut<'_>> {
        let (stride, lanes) = (self.width * self.lanes, self.lanes);
        self.rows.iter_mut().map(|row| RowMut::new(row, stride, lanes)).collect()
    }
}

#[test]
fn winograd_agrees_with_the_plain_sum() {
    for isa in simd::available() {
        let lanes = lanes(isa);
        for (inputs, outputs) in [(1, 1), (3, 20), (16, 16), (24, 8), (33, 40)] {
            // Single pixels, tails of tiles, and every remainder of a register tile.
            for pixels in [1usize, 3, 4, 5, 9, 20, 24, 28, 33, 48, 51] {
                for rows in [1, 2, 3, 4, 7, 12] {
                    if rows > TILE && pixels > 28 {
                        continue;
                    }
                    let [tall, wide] = [rows, pixels].map(|size| size.next_multiple_of(TILE) + 2);
                    let mut x = Image::noise(inputs, [tall, wide], lanes);
                    let weight = noise(1, outputs * inputs * 9);
                    let bias = noise(2, outputs);
                    let weights = Weights::new(inputs, &weight, &bias, lanes);
                    let mut y = Image::empty(outputs, [rows, pixels], lanes);
                    let mut scratch = vec![f32::NAN; weights.scratch(tall / TILE * (wide / TILE))];
                    f32::dispatch(
                        isa,
                        Convolve {
                            weights: &weights,
                            rows: &x.read(),
                            pixels,
                            scratch: &mut scratch,
                            sink: Sink { rows: &y.write(), relu: inputs == 3 },
                        },
                    );
                    let size = (inputs * 9) as f64;
                    for (o, row, column) in places(outputs, rows, pixels) {
                        let mut sum = f64::from(bias[o]);
                        for i in 0..inputs * 9 {
                            let (c, ky, kx) = (i / 9, i / 3 % 3, i % 3);
                            let x = f64::from(*x.at(c, row + ky, column + kx));
                            sum += f64::from(weight[o * inputs * 9 + i]) * x;
                        }
                        if inputs == 3 {
                            sum = sum.max(0.0);
                        }
                        let what = format!("{isa}, {inputs} to {outputs}, {rows}×{pixels}");
                        let got = f64::from(*y.at(o, row, column));
                        assert!((got - sum).abs() < 2e-6 * size.sqrt(), "{what}: {got} for {sum}");
                    }
                }
            }
        }
    }
}

#[test]
fn the_gate_agrees_with_the_plain_sum() {
    for isa in simd::available() {
        for k in [1, 3, 5, 7, 9, 11, 13] {
            for (i, (rows, pixels)) in [(1, 1), (2, 5), (3, 7), (8, 13), (12, 6), (13, 10), (26, 9)]
                .into_iter()
                .enumerate()
            {
                // With and without padding, on each side.
                let padding = [i, i + 1, i / 2, i / 2 + 1].map(|i| i % 2 * (k / 2).min(i));
                let channels = if i % 3 == 0 { 20 } else { 5 };
                for filtered in [false, true] {
                    gate(isa, k, [rows, pixels], padding, channels, filtered);
                }
            }
        }
    }
}

fn gate(
    isa: Isa,
    k: usize,
    [rows, pixels]: [usize; 2],
    padding: [usize; 4],
    channels: usize,
    filtered: bool,
) {
    let lanes = lanes(isa);
    let blocks = channels.div_ceil(lanes);
    let list = |seed| noise(seed, blocks * lanes);
    let square = k * k;
    // Sums of about the same size, whatever k.
    let taps: Vec<_> = noise(5, blocks * square * lanes).iter().map(|tap| tap / k as f32).collect();
    let (kind, rectified) = match (rows + channels) % 2 {
        0 => (Gate::Gaussian, true),
        _ => (Gate::Sigmoid, false),
    };
    let maps = Maps { centre: list(2), scale: list(3), shift: list(4) };
    let after = Maps { centre: vec![0.0; blocks * lanes], scale: list(8), shift: list(9) };
    let bias = list(6);
    let weights = GateWeights::new(
        (kind, k),
        taps.clone(),
        bias.clone(),
        rectified.then(|| maps.clone()),
        after.clone(),
        lanes,
    );
    let weights = if filtered { weights.filtered(lanes) } else { weights };
    let [top, bottom, left, right] = padding;
    let extents = [rows + k - 1 - top - bottom, pixels + k - 1 - left - right];
    let mut v = Image::noise(channels, extents, lanes);
    let mut x = Image::noise(channels, [rows, pixels], lanes);
    let mut out = Image::empty(channels, [rows, pixels], lanes);
    let finite = f32::dispatch(
        isa,
        Gated {
            weights: &weights,
            v: &v.read(),
            x: &x.read(),
            padding,
            pixels,
            out: &out.write(),
            scratch: &mut vec![f32::NAN; weights.scratch(rows, pixels, lanes)],
        },
    );
    assert!(finite);
    for (c, row, column) in places(channels, rows, pixels) {
        let mut d = f64::from(bias[c]);
        for tap in 0..square {
            let (y, x_at) = (row + tap / k, column + tap % k);
            if (top..top + extents[0]).contains(&y) && (left..left + extents[1]).contains(&x_at) {
                let mut u = f64::from(*v.at(c, y - top, x_at - left));
                if rectified {
                    let [centre, scale, shift] =
                        [&maps.centre, &maps.scale, &maps.shift].map(|list| f64::from(list[c]));
                    u = (scale * (u - centre) + shift).max(0.0);
                }
                d += f64::from(taps[(c / lanes * square + tap) * lanes + c % lanes]) * u;
            }
        }
        let g = match kind {
            Gate::Gaussian => (-d * d).exp(),
            Gate::Sigmoid => 1.0 / (1.0 + (-d).exp()),
        };
        let gated = f64::from(*x.at(c, row, column)) * g;
        let wanted = f64::from(after.scale[c]) * gated + f64::from(after.shift[c]);
        let got = f64::from(*out.at(c, row, column));
        let what = format!("{isa}, k {k}, {rows}×{pixels}, padding {padding:?}");
        assert!((got - wanted).abs() < 1e-5, "{what}: {got} for {wanted}");
    }
}

fn places(c: usize, h: usize, w: usize) -> impl Iterator<Item = (usize, usize, usize)> {
    (0..c * h * w).map(move |i| (i / (h * w), i / w % h, i % w))
}
