//! The torch-free networks against a naive float64 twin, across tiles and threads, and against
//! files that mean harm.

use std::collections::{BTreeMap, HashMap};

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use xunit_rs::net::{NetError, Network};
use xunit_rs::parallel::Threads;

const FEATURES: usize = 8;
const DEPTH: usize = 3;
const KERNEL: usize = 5;
const ARCHITECTURES: [&str; 3] = ["xdncnn-2018", "xdncnn-2021", "dncnn"];

/// Numbers in [-1, 1) without a pattern.
struct Noise(u64);

impl Noise {
    fn integer(&mut self) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963);
        (self.0 >> 33) as usize
    }

    fn next(&mut self) -> f32 {
        self.integer() as f32 / (1u64 << 30) as f32 - 1.0
    }

    fn image(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.next() * 0.5 + 0.5).collect()
    }
}

#[derive(Clone)]
struct Tensor {
    shape: Vec<usize>,
    data: Vec<f32>,
}

#[derive(Clone)]
struct Model {
    tensors: BTreeMap<String, Tensor>,
    metadata: HashMap<String, String>,
}

impl Model {
    fn new(architecture: &str, channels: usize) -> Self {
        Self::with_kernel(architecture, channels, KERNEL)
    }

    fn with_kernel(architecture: &str, channels: usize, kernel: usize) -> Self {
        let mut noise = Noise(channels as u64 + 17);
        let metadata = [
            ("format", "xunit-rs"),
            ("architecture", architecture),
            ("channels", &channels.to_string()),
            ("features", &FEATURES.to_string()),
            ("depth", &DEPTH.to_string()),
            ("kernel_size", &kernel.to_string()),
            ("psnr", "29.22812736182361234567"),
        ];
        let mut model = Self {
            tensors: BTreeMap::new(),
            metadata: metadata.map(|(key, value)| (key.to_owned(), value.to_owned())).into(),
        };
        if architecture == "dncnn" {
            model.metadata.remove("kernel_size");
            model.conv("head", FEATURES, channels, 3, &mut noise);
            for i in 0..DEPTH {
                model.conv(&format!("blocks.{i}.conv"), FEATURES, FEATURES, 3, &mut noise);
            }
            model.conv("tail", channels, FEATURES, 3, &mut noise);
            return model;
        }
        let old = architecture == "xdncnn-2018";
        for i in 0..DEPTH {
            let inputs = if i == 0 { channels } else { FEATURES };
            if i > 0 || !old {
                model.norm(&format!("blocks.{i}.norm"), inputs, &mut noise);
            }
            model.conv(&format!("blocks.{i}.conv"), FEATURES, inputs, 3, &mut noise);
            let unit = format!("blocks.{i}.xunit.features");
            if old {
                model.norm(&format!("{unit}.0"), FEATURES, &mut noise);
            }
            let (at, last) = if old { (2, 3) } else { (0, 1) };
            model.conv(&format!("{unit}.{at}"), FEATURES, 1, kernel, &mut noise);
            model.norm(&format!("{unit}.{last}"), FEATURES, &mut noise);
        }
        model.conv("tail", channels, FEATURES, if old { 3 } else { 5 }, &mut noise);
        model
    }

    fn add(&mut self, key: String, shape: &[usize], value: impl FnMut() -> f32) {
        let data = std::iter::repeat_with(value).take(shape.iter().product()).collect();
        self.tensors.insert(key, Tensor { shape: shape.to_vec(), data });
    }

    fn norm(&mut self, key: &str, c: usize, noise: &mut Noise) {
        self.add(format!("{key}.weight"), &[c], || 1.0 + 0.4 * noise.next());
        self.add(format!("{key}.bias"), &[c], || 0.5 * noise.next());
        self.add(format!("{key}.running_mean"), &[c], || 0.5 * noise.next());
        self.add(format!("{key}.running_var"), &[c], || 1.0 + 0.5 * noise.next());
        self.add(format!("{key}.num_batches_tracked"), &[], || 3.0);
    }

    fn conv(&mut self, key: &str, o: usize, i: usize, k: usize, noise: &mut Noise) {
        let scale = 1.5 / ((i * k * k) as f32).sqrt();
        self.add(format!("{key}.weight"), &[o, i, k, k], || scale * noise.next());
        self.add(format!("{key}.bias"), &[o], || 0.3 * noise.next());
    }

    fn bytes(&self) -> Vec<u8> {
        self.bytes_as(Dtype::F32)
    }

    /// The file, its values of type F32 or F64.
    fn bytes_as(&self, dtype: Dtype) -> Vec<u8> {
        let encoded: Vec<(&str, Dtype, Vec<u8>)> = self
            .tensors
            .iter()
            .map(|(key, tensor)| {
                let values = tensor.data.iter();
                if key.ends_with("num_batches_tracked") {
                    let bytes = values.flat_map(|&x| (x as i64).to_le_bytes()).collect();
                    (key.as_str(), Dtype::I64, bytes)
                } else if dtype == Dtype::F64 {
                    let bytes = values.flat_map(|&x| f64::from(x).to_le_bytes()).collect();
                    (key.as_str(), dtype, bytes)
                } else {
                    (key.as_str(), dtype, values.flat_map(|x| x.to_le_bytes()).collect())
                }
            })
            .collect();
        let views = encoded.iter().map(|(key, dtype, bytes)| {
            (*key, TensorView::new(*dtype, self.tensors[*key].shape.clone(), bytes).unwrap())
        });
        safetensors::serialize(views, Some(self.metadata.clone())).unwrap()
    }

    fn network(&self) -> Network {
        Network::from_bytes(&self.bytes()).unwrap()
    }

    fn get(&self, key: &str) -> &Tensor {
        &self.tensors[key]
    }

    // The naive twin.

    fn twin_conv(&self, key: &str, x: &[f64], h: usize, w: usize) -> Vec<f64> {
        let (weight, bias) = (self.get(&format!("{key}.weight")), self.get(&format!("{key}.bias")));
        let &[outputs, inputs, k, _] = &weight.shape[..] else { panic!() };
        let depthwise = inputs == 1 && x.len() == outputs * h * w && outputs > 1;
        let mut out = Vec::new();
        for o in 0..outputs {
            for y in 0..h {
                for x0 in 0..w {
                    let mut sum = f64::from(bias.data[o]);
                    for i in 0..inputs {
                        for (tap, &weight) in
                            weight.data[(o * inputs + i) * k * k..][..k * k].iter().enumerate()
                        {
                            let (y, x0) = (y + tap / k, x0 + tap % k);
                            if (k / 2..h + k / 2).contains(&y) && (k / 2..w + k / 2).contains(&x0) {
                                let channel = if depthwise { o } else { i };
                                sum += f64::from(weight)
                                    * x[(channel * h + y - k / 2) * w + x0 - k / 2];
                            }
                        }
                    }
                    out.push(sum);
                }
            }
        }
        out
    }

    fn twin_norm(&self, key: &str, x: &[f64], hw: usize) -> Vec<f64> {
        let of = |name: &str, c: usize| f64::from(self.get(&format!("{key}.{name}")).data[c]);
        x.iter()
            .enumerate()
            .map(|(i, x)| {
                let c = i / hw;
                let inv_std = 1.0 / (of("running_var", c) + 1e-5).sqrt();
                (x - of("running_mean", c)) * inv_std * of("weight", c) + of("bias", c)
            })
            .collect()
    }

    fn twin(&self, image: &[f32], h: usize, w: usize) -> Vec<f64> {
        let (old, plain) = match &self.metadata["architecture"][..] {
            "dncnn" => (true, true),
            architecture => (architecture == "xdncnn-2018", false),
        };
        let image: Vec<f64> = image.iter().map(|&x| f64::from(x)).collect();
        let mut x = image.clone();
        if plain {
            x = self.twin_conv("head", &x, h, w);
            x.iter_mut().for_each(|x| *x = x.max(0.0));
        }
        for i in 0..DEPTH {
            if plain {
                x = self.twin_conv(&format!("blocks.{i}.conv"), &x, h, w);
                x.iter_mut().for_each(|x| *x = x.max(0.0));
                continue;
            }
            if self.tensors.contains_key(&format!("blocks.{i}.norm.weight")) {
                x = self.twin_norm(&format!("blocks.{i}.norm"), &x, h * w);
            }
            x = self.twin_conv(&format!("blocks.{i}.conv"), &x, h, w);
            let unit = format!("blocks.{i}.xunit.features");
            let gates: Vec<f64> = if old {
                let u = self.twin_norm(&format!("{unit}.0"), &x, h * w);
                let u: Vec<f64> = u.iter().map(|u| u.max(0.0)).collect();
                let d = self.twin_conv(&format!("{unit}.2"), &u, h, w);
                let d = self.twin_norm(&format!("{unit}.3"), &d, h * w);
                d.iter().map(|d| (-d * d).exp()).collect()
            } else {
                let d = self.twin_conv(&format!("{unit}.0"), &x, h, w);
                let d = self.twin_norm(&format!("{unit}.1"), &d, h * w);
                d.iter().map(|d| 1.0 / (1.0 + (-d).exp())).collect()
            };
            x.iter_mut().zip(gates).for_each(|(x, gate)| *x *= gate);
        }
        let tail = self.twin_conv("tail", &x, h, w);
        let sign = if old { -1.0 } else { 1.0 };
        image.iter().zip(tail).map(|(x, tail)| x + sign * tail).collect()
    }
}

fn refused(bytes: &[u8]) -> String {
    match Network::from_bytes(bytes) {
        Err(error @ NetError::File(_)) => error.to_string(),
        Err(error) => panic!("the wrong error: {error:?}"),
        Ok(_) => panic!("loaded"),
    }
}

/// What is said of the model after a change.
fn refused_with(architecture: &str, change: impl FnOnce(&mut Model)) -> String {
    let mut model = Model::new(architecture, 1);
    change(&mut model);
    refused(&model.bytes())
}

/// A file of this header and as many bytes of data.
fn file(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

#[test]
fn networks_agree_with_the_naive_twin() {
    // One pixel and single rows and columns; tails of tiles, several steps and panels.
    let sizes = [(1, 1), (1, 40), (40, 1), (2, 3), (11, 13), (17, 33), (9, 210), (130, 5)];
    for architecture in ARCHITECTURES {
        for (channels, kernel) in [(1, 5), (3, 9), (5, 7), (1, 11), (2, 35)] {
            let model = Model::with_kernel(architecture, channels, kernel);
            let network = model.network();
            for (h, w) in sizes {
                let image = Noise(7).image(channels * h * w);
                let clean = network.denoise(&image, channels, h, w, 0, Threads::Own(1)).unwrap();
                let twin = model.twin(&image, h, w);
                assert_eq!(clean.len(), twin.len());
                for (i, (&clean, &twin)) in clean.iter().zip(&twin).enumerate() {
                    assert!(
                        (f64::from(clean) - twin).abs() < 2e-5,
                        "{architecture}, k = {kernel}, {channels}×{h}×{w}: {clean} for {twin} at {i}"
                    );
                }
            }
        }
    }
}

#[test]
fn tiles_change_no_bit() {
    let of = |architecture| [5, 7, 9, 11].map(|kernel| (architecture, kernel));
    for (architecture, kernel) in ARCHITECTURES.into_iter().flat_map(of) {
        let network = Model::with_kernel(architecture, 2, kernel).network();
        // Some bands are lower than the rows that they depend on, which the highest image exceeds.
        for (h, w) in [(37, 131), (250, 140), (1, 50), (50, 1)] {
            let image = Noise(3).image(2 * h * w);
            let whole = network.denoise(&image, 2, h, w, 0, Threads::Own(1)).unwrap();
            for tile in [4, 7, 16, 36, 1000, usize::MAX] {
                let tiled = network.denoise(&image, 2, h, w, tile, Threads::Own(1)).unwrap();
                assert!(tiled == whole, "{architecture}, k = {kernel}, {h}×{w}, tile {tile}");
            }
        }
    }
}

#[test]
fn threads_change_no_bit() {
    for architecture in ARCHITECTURES {
        let network = Model::with_kernel(architecture, 1, 9).network();
        let (h, w) = (100, 167);
        let image = Noise(5).image(h * w);
        for tile in [0, 20] {
            let one = network.denoise(&image, 1, h, w, tile, Threads::Own(1)).unwrap();
            for threads in [0, 2, 3, 7] {
                let many = network.denoise(&image, 1, h, w, tile, Threads::Own(threads)).unwrap();
                assert!(many == one, "{architecture}, tile {tile}, {threads} threads");
            }
        }
    }
}

#[test]
fn an_image_leaves_nothing_to_the_next() {
    for architecture in ARCHITECTURES {
        let network = Model::new(architecture, 1).network();
        let denoise = |network: &Network, (h, w): (usize, usize), image: &[f32]| {
            network.denoise(image, 1, h, w, 0, Threads::Own(2)).unwrap()
        };
        for (h, w) in [(70, 61), (20, 61), (70, 30)] {
            let image = Noise(7).image(h * w);
            let fresh = denoise(&Model::new(architecture, 1).network(), (h, w), &image);
            for before in [f32::NAN, f32::INFINITY, -1e30] {
                denoise(&network, (h, w), &vec![before; h * w]);
                assert!(denoise(&network, (h, w), &image) == fresh, "{architecture}, {before}");
            }
        }
    }
}

#[test]
fn a_nan_stays_within_the_halo() {
    let network = Model::new("xdncnn-2018", 1).network();
    let (h, w) = (40, 40);
    let mut image = Noise(9).image(h * w);
    image[0] = f32::NAN;
    for tile in [0, 8] {
        let clean = network.denoise(&image, 1, h, w, tile, Threads::Own(1)).unwrap();
        for (i, clean) in clean.iter().enumerate() {
            // A tile of a Winograd convolution passes it on to three pixels more.
            let reach = network.halo() + 3 * (DEPTH - 1);
            let inside = i / w <= reach && i % w <= reach;
            assert!(inside || clean.is_finite(), "tile {tile}, pixel {i}");
        }
        assert!(clean[0].is_nan());
    }
}

#[test]
fn a_network_tells_about_itself() {
    let halos = [3 * (1 + 2) + 1, 3 * (1 + 2) + 2, 1 + 3 + 1];
    for (architecture, halo) in ARCHITECTURES.into_iter().zip(halos) {
        let network = Model::new(architecture, 3).network();
        assert_eq!(network.architecture(), architecture);
        assert_eq!(network.channels(), 3);
        assert_eq!(network.halo(), halo);
        assert_eq!(network.metadata()["format"], "xunit-rs");
    }
}

#[test]
fn float64_files_and_files_without_metadata_load() {
    let image = Noise(1).image(12 * 12);
    for architecture in ARCHITECTURES {
        let mut model = Model::new(architecture, 1);
        let denoise = |bytes: &[u8]| {
            Network::from_bytes(bytes)
                .unwrap()
                .denoise(&image, 1, 12, 12, 0, Threads::Own(1))
                .unwrap()
        };
        let wanted = denoise(&model.bytes());
        assert!(denoise(&model.bytes_as(Dtype::F64)) == wanted);
        model.metadata.clear();
        assert!(denoise(&model.bytes()) == wanted);
        model.tensors.retain(|key, _| !key.ends_with("num_batches_tracked"));
        assert!(denoise(&model.bytes()) == wanted);
    }
}

#[test]
fn the_metadata_choose_the_gate() {
    let mut model = Model::new("xdncnn-2018", 1);
    let image = Noise(1).image(12 * 12);
    let denoise =
        |model: &Model| model.network().denoise(&image, 1, 12, 12, 0, Threads::Own(1)).unwrap();
    let own = denoise(&model);
    model.metadata.insert("gate".to_owned(), "gaussian".to_owned());
    assert!(denoise(&model) == own);
    model.metadata.insert("gate".to_owned(), "sigmoid".to_owned());
    assert!(denoise(&model) != own);
}

#[test]
fn images_that_do_not_fit_are_refused() {
    let network = Model::new("xdncnn-2018", 3).network();
    let refused = |len: usize, c: usize, h: usize, w: usize| match network.denoise(
        &vec![0.0; len],
        c,
        h,
        w,
        0,
        Threads::Own(1),
    ) {
        Err(error @ NetError::Image(_)) => error.to_string(),
        other => panic!("{other:?}"),
    };
    let message = refused(4, 1, 2, 2);
    assert!(message.contains("3 channels") && message.contains("of 1"), "{message}");
    assert!(refused(0, 3, 0, 2).contains("[1, 3, 0, 2]"));
    assert!(refused(0, 3, 2, 0).contains("[1, 3, 2, 0]"));
    assert!(refused(11, 3, 2, 2).contains("12 elements"));
    assert!(refused(4, 3, usize::MAX, 2).contains("too large"));
}

#[test]
fn files_that_cannot_be_read_are_io_errors() {
    let folder = std::env::temp_dir();
    let missing = folder.join("xunit-rs-no-such-file.safetensors");
    for path in [&missing, &folder] {
        match Network::load(path) {
            Err(error @ NetError::Io(..)) => {
                assert!(error.to_string().contains(&*path.to_string_lossy()), "{error}");
            }
            other => panic!("{other:?}"),
        }
    }
    let path = folder.join(format!("xunit-rs-{}.safetensors", std::process::id()));
    std::fs::write(&path, Model::new("xdncnn-2021", 1).bytes()).unwrap();
    let loaded = Network::load(&path);
    std::fs::write(&path, "no network").unwrap();
    let bad = Network::load(&path);
    std::fs::remove_file(&path).unwrap();
    assert_eq!(loaded.unwrap().architecture(), "xdncnn-2021");
    assert!(matches!(bad, Err(NetError::File(reason)) if reason.contains("xunit-rs-")));
}

#[test]
fn wrong_keys_shapes_and_values_are_named() {
    for architecture in ARCHITECTURES {
        for key in Model::new(architecture, 1).tensors.keys() {
            if key.ends_with("num_batches_tracked") {
                continue;
            }
            let rename = |model: &mut Model| {
                let tensor = model.tensors.remove(key).unwrap();
                model.tensors.insert(format!("{key}_"), tensor);
            };
            refused_with(architecture, rename);
            refused_with(architecture, |model| drop(model.tensors.remove(key)));
            // A batch or channel more than there should be.
            let message = refused_with(architecture, |model| {
                let tensor = model.tensors.get_mut(key).unwrap();
                tensor.shape.push(2);
                tensor.data.extend(tensor.data.clone());
            });
            assert!(message.contains(key.as_str()), "{key}: {message}");
            let message = refused_with(architecture, |model| {
                *model.tensors.get_mut(key).unwrap() = Tensor { shape: vec![0], data: vec![] };
            });
            assert!(message.contains(key.as_str()), "{key}: {message}");
        }
    }
    let old = "xdncnn-2018";
    let message = refused_with(old, |model| {
        model.add("extra".to_owned(), &[1], || 0.0);
    });
    assert!(message.contains("extra"), "{message}");
    let message = refused_with(old, |model| {
        model.add("blocks.3.xunit.features.2.bias".to_owned(), &[8], || 0.0);
    });
    assert!(message.contains("blocks.3"), "{message}");
    for (key, value) in [
        ("format", "onnx"),
        ("architecture", "resnet"),
        ("architecture", "xdncnn-2021"),
        ("channels", "3"),
        ("features", "-8"),
        ("depth", "99999999999999999999999"),
        ("kernel_size", "9"),
        ("gate", "relu"),
    ] {
        let message = refused_with(old, |model| {
            model.metadata.insert(key.to_owned(), value.to_owned());
        });
        assert!(message.contains(key) && message.contains(value), "{key}={value}: {message}");
    }
    for kernel in [2, 257] {
        let message = refused_with(old, |model| {
            let key = "blocks.0.xunit.features.2.weight".to_owned();
            model.add(key, &[FEATURES, 1, kernel, kernel], || 0.0);
        });
        assert!(message.contains("odd"), "{message}");
    }
    let no_clue = refused_with(old, |model| {
        model.metadata.clear();
        model.tensors.remove("blocks.0.xunit.features.3.weight");
    });
    assert!(no_clue.contains("architecture"), "{no_clue}");
}

#[test]
fn hostile_headers_are_refused() {
    for bytes in [&[][..], &[0; 7], &[0; 8], &[0xff; 8], &[0xff; 100]] {
        refused(bytes);
    }
    let entry = |shape: &str, start: u64, end: u64| {
        format!(r#"{{"dtype":"F32","shape":{shape},"data_offsets":[{start},{end}]}}"#)
    };
    let key = "blocks.0.conv.weight";
    for (shape, start, end) in [
        ("[1,1,3,3]", 0, 36),
        ("[1,1,3,3]", 0, 40),
        ("[1,1,3,3]", 4, 40),
        ("[1,1,3,3]", 36, 0),
        ("[0,1,3,3]", 0, 0),
        ("[-1,1,3,3]", 0, 36),
        ("[4294967296,4294967296,1,1]", 0, 36),
        ("[18446744073709551615,1,3,3]", 0, 36),
        ("[1.5,1,3,3]", 0, 36),
        ("[1e99,1,3,3]", 0, 36),
        ("[]", 0, 4),
        ("null", 0, 36),
    ] {
        for size in [0, 36] {
            refused(&file(&format!(r#"{{"{key}":{}}}"#, entry(shape, start, end)), size));
        }
    }
    // Overlapping tensors.
    let (a, b) = (entry("[1,1,3,3]", 0, 36), entry("[1]", 32, 36));
    refused(&file(&format!(r#"{{"{key}":{a},"blocks.0.conv.bias":{b}}}"#), 36));
    // Sizes whose sum wraps around to the file's.
    let size = (1u64 << 61) - 1;
    let wrapping: Vec<_> = (0..9u64)
        .map(|i| {
            let end = (i + 1).wrapping_mul(size);
            let start = i.wrapping_mul(size);
            format!(r#""{i}":{{"dtype":"U8","shape":[{size}],"data_offsets":[{start},{end}]}}"#)
        })
        .collect();
    for count in 1..=wrapping.len() {
        refused(&file(&format!("{{{}}}", wrapping[..count].join(",")), 36));
    }
    refused(&file(&"[".repeat(100_000), 0));
    refused(&file(&r#"{"a":"#.repeat(100_000), 0));
    refused(&file(r#"{"__metadata__":{"architecture":"xdncnn-2018"}}"#, 0));
    refused(&file(r#"{"__metadata__":{"architecture":2018}}"#, 0));
    refused(&file("{}", 0));
    // A header that says it is longer than the file, or longer than any.
    for size in [1 << 20, 1 << 40, u64::MAX - 7, u64::MAX] {
        let mut bytes = file("{}", 100);
        bytes[..8].copy_from_slice(&size.to_le_bytes());
        refused(&bytes);
    }
}

#[test]
fn damaged_files_never_panic() {
    let bytes = Model::new("xdncnn-2018", 1).bytes();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    for len in (0..header).step_by(7).chain((header..bytes.len()).step_by(211)) {
        refused(&bytes[..len]);
    }
    let image = [0.5; 9];
    let mut noise = Noise(99);
    let mut loaded = 0;
    for round in 0..3000 {
        let mut bytes = bytes.clone();
        for _ in 0..1 + round % 3 {
            // Most of them where they can do most harm.
            let end = if round % 8 == 0 { bytes.len() } else { header };
            let at = noise.integer() % end;
            bytes[at] = if round % 2 == 0 {
                bytes[at] ^ (1 << (noise.integer() % 8))
            } else {
                b"0123456789[]{},:\"\\-e.\0\xff"[noise.integer() % 23]
            };
        }
        if let Ok(network) = Network::from_bytes(&bytes) {
            loaded += 1;
            network.denoise(&image, network.channels(), 3, 3, 2, Threads::Own(1)).unwrap();
        }
    }
    // Flipped weights are still weights.
    assert!(loaded > 0);
}
