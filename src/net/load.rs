//! Reading a network from the bytes of a safetensors file, which nobody vouches for: every key,
//! type and shape is checked, and nothing is allocated that the file does not hold.

use std::collections::BTreeMap;
use std::sync::Mutex;

use safetensors::{Dtype, SafeTensors, tensor::TensorView};

use super::layers::{Conv, Layer, Norm, UnitParts};
use super::{Architecture, NetError, Network};
use crate::kernels::activation::Gate;
use crate::kernels::blocked::{FirstWeights, LastWeights};
use crate::kernels::winograd;
use crate::simd;

/// Builds a [`NetError::File`] as `format!` would.
macro_rules! file_error {
    ($($arg:tt)*) => { NetError::File(format!($($arg)*)) };
}

/// The largest depthwise kernel extent: far above any use, and its padding stays small.
const MAX_KERNEL: usize = 255;

/// The network in a file.
pub(super) fn network(bytes: &[u8]) -> Result<Network, NetError> {
    let mut file = File::new(bytes)?;
    let architecture = file.architecture()?;
    let first = match architecture {
        Architecture::DnCnn => "head",
        _ => "blocks.0.conv",
    };
    let [features, channels, ..] = file.extents(&format!("{first}.weight"))?;
    let depth = (0..).take_while(|i| file.has(&format!("blocks.{i}.conv.weight"))).count();
    file.agrees("channels", channels)?;
    file.agrees("features", features)?;
    file.agrees("depth", depth)?;
    let sizes = [features, channels, depth];
    let (before, mut layers) = match architecture {
        Architecture::DnCnn => (Norm::identity(channels), file.dncnn(sizes)?),
        _ => file.xdncnn(architecture, sizes)?,
    };
    let k = match architecture {
        Architecture::XDnCnn2018 | Architecture::DnCnn => 3,
        Architecture::XDnCnn2021 => 5,
    };
    let (weight, bias) = file.conv("tail", channels, features, k)?;
    let tail = LastWeights::new(features, k, &weight, &bias, simd::selected_lanes::<f32>());
    if let Some(key) = file.tensors.keys().next() {
        return Err(file_error!("unexpected tensor {key:?} for a {}", architecture.name()));
    }
    winograd::Weights::gather(layers.iter_mut().filter_map(|layer| match &mut layer.conv {
        Conv::Dense(weights) => Some(weights),
        Conv::First(_) => None,
    }));
    Ok(Network {
        architecture,
        channels,
        metadata: file.metadata,
        before,
        layers,
        tail,
        spare: Mutex::default(),
    })
}

/// A parsed file; tensors leave it as they are used.
struct File<'a> {
    tensors: BTreeMap<String, TensorView<'a>>,
    metadata: BTreeMap<String, String>,
}

impl<'a> File<'a> {
    fn new(bytes: &'a [u8]) -> Result<Self, NetError> {
        check_numbers(bytes)?;
        let bad = |error| file_error!("not a safetensors file: {error}");
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(bad)?;
        let metadata = header.metadata().clone().unwrap_or_default().into_iter().collect();
        let tensors = SafeTensors::deserialize(bytes).map_err(bad)?.tensors();
        Ok(Self { tensors: tensors.into_iter().collect(), metadata })
    }

    fn has(&self, key: &str) -> bool {
        self.tensors.contains_key(key)
    }

    /// What the metadata say and the keys confirm; what the keys show where there are no metadata.
    fn architecture(&self) -> Result<Architecture, NetError> {
        // "pt" is what the safetensors library itself writes for torch.
        let format = self.metadata.get("format").map(String::as_str);
        if let Some(other) = format.filter(|format| !["xunit-rs", "pt"].contains(format)) {
            return Err(file_error!("metadata: format must be \"xunit-rs\", got {other:?}"));
        }
        let (early, late) = ("blocks.0.xunit.features.3.weight", "blocks.0.norm.weight");
        let shown = match (self.has(early), self.has(late), self.has("head.weight")) {
            (true, false, false) => Some((Architecture::XDnCnn2018, early)),
            (false, true, false) => Some((Architecture::XDnCnn2021, late)),
            (false, false, true) => Some((Architecture::DnCnn, "head.weight")),
            _ => None,
        };
        let Some(said) = self.metadata.get("architecture") else {
            return shown.map(|(architecture, _)| architecture).ok_or_else(|| {
                file_error!("no metadata name an architecture, and the keys fit no or several")
            });
        };
        let architecture = Architecture::ALL
            .into_iter()
            .find(|architecture| architecture.name() == said)
            .ok_or_else(|| file_error!("metadata: unknown architecture {said:?}"))?;
        match shown {
            Some((other, key)) if other != architecture => Err(file_error!(
                "metadata: architecture is {said:?}, but tensor {key:?} is of {:?}",
                other.name()
            )),
            _ => Ok(architecture),
        }
    }

    /// The gate that the metadata name, else the architecture's own.
    fn gate(&self, architecture: Architecture) -> Result<Gate, NetError> {
        match self.metadata.get("gate").map(String::as_str) {
            Some("gaussian") => Ok(Gate::Gaussian),
            Some("sigmoid") => Ok(Gate::Sigmoid),
            Some(other) => Err(file_error!("metadata: unknown gate {other:?}")),
            None if architecture == Architecture::XDnCnn2018 => Ok(Gate::Gaussian),
            None => Ok(Gate::Sigmoid),
        }
    }

    /// Errors if the metadata name another value than the shapes.
    fn agrees(&self, name: &str, value: usize) -> Result<(), NetError> {
        match self.metadata.get(name) {
            Some(said) if said.trim().parse() != Ok(value) => Err(file_error!(
                "metadata: {name} is {said:?}, but the shapes of the tensors say {value}"
            )),
            _ => Ok(()),
        }
    }

    fn view(&self, key: &str) -> Result<&TensorView<'a>, NetError> {
        self.tensors.get(key).ok_or_else(|| file_error!("missing tensor {key:?}"))
    }

    /// The shape of a convolution's weight, every extent positive.
    fn extents(&self, key: &str) -> Result<[usize; 4], NetError> {
        let shape = self.view(key)?.shape();
        match shape.try_into() {
            Ok(extents) if !shape.contains(&0) => Ok(extents),
            _ => Err(file_error!("{key}: expected four positive extents, got shape {shape:?}")),
        }
    }

    /// The values of a tensor of this very shape.
    fn take(&mut self, key: &str, shape: &[usize]) -> Result<Vec<f32>, NetError> {
        let view = self.view(key)?;
        if view.shape() != shape {
            return Err(file_error!("{key}: expected shape {shape:?}, got {:?}", view.shape()));
        }
        let values = match view.dtype() {
            Dtype::F32 => {
                let (values, _) = view.data().as_chunks();
                values.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
            }
            Dtype::F64 => {
                let (values, _) = view.data().as_chunks();
                values.iter().map(|&bytes| f64::from_le_bytes(bytes) as f32).collect()
            }
            other => return Err(file_error!("{key}: expected type F32 or F64, got {other}")),
        };
        self.tensors.remove(key);
        Ok(values)
    }

    fn norm(&mut self, key: &str, channels: usize) -> Result<Norm, NetError> {
        self.tensors.remove(&format!("{key}.num_batches_tracked"));
        let mut take = |name: &str| self.take(&format!("{key}.{name}"), &[channels]);
        let (weight, bias) = (take("weight")?, take("bias")?);
        Ok(Norm::new(&weight, &bias, &take("running_mean")?, &take("running_var")?))
    }

    /// Weight and bias.
    fn conv(
        &mut self,
        key: &str,
        outputs: usize,
        inputs: usize,
        k: usize,
    ) -> Result<(Vec<f32>, Vec<f32>), NetError> {
        let weight = self.take(&format!("{key}.weight"), &[outputs, inputs, k, k])?;
        Ok((weight, self.take(&format!("{key}.bias"), &[outputs])?))
    }

    /// The 3 × 3 convolution of a layer.
    fn layer(&mut self, key: &str, outputs: usize, from: From) -> Result<Conv, NetError> {
        let lanes = simd::selected_lanes::<f32>();
        Ok(match from {
            From::Image(channels) => {
                let (weight, bias) = self.conv(key, outputs, channels, 3)?;
                Conv::First(FirstWeights::new(channels, 3, &weight, &bias, lanes))
            }
            From::Features => {
                let (weight, bias) = self.conv(key, outputs, outputs, 3)?;
                Conv::Dense(winograd::Weights::new(outputs, &weight, &bias, lanes))
            }
        })
    }

    /// The batch norm ahead of the first convolution, and the blocks.
    fn xdncnn(
        &mut self,
        architecture: Architecture,
        [features, channels, depth]: [usize; 3],
    ) -> Result<(Norm, Vec<Layer>), NetError> {
        let old = architecture == Architecture::XDnCnn2018;
        let (spatial, last) = if old { (2, 3) } else { (0, 1) };
        let key = format!("blocks.0.xunit.features.{spatial}.weight");
        let k = self.extents(&key)?[2];
        if k % 2 == 0 || k > MAX_KERNEL {
            return Err(file_error!(
                "{key}: kernel size must be odd and at most {MAX_KERNEL}, got {k}"
            ));
        }
        self.agrees("kernel_size", k)?;
        let gate = self.gate(architecture)?;
        let mut norms = Vec::new();
        let mut parts = Vec::new();
        for i in 0..depth {
            let from = if i == 0 { From::Image(channels) } else { From::Features };
            let inputs = if i == 0 { channels } else { features };
            norms.push(if old && i == 0 {
                Norm::identity(channels)
            } else {
                self.norm(&format!("blocks.{i}.norm"), inputs)?
            });
            let conv = self.layer(&format!("blocks.{i}.conv"), features, from)?;
            let unit = format!("blocks.{i}.xunit.features");
            let norm1 = if old { Some(self.norm(&format!("{unit}.0"), features)?) } else { None };
            let weight = self.take(&format!("{unit}.{spatial}.weight"), &[features, 1, k, k])?;
            let bias = self.take(&format!("{unit}.{spatial}.bias"), &[features])?;
            let norm2 = self.norm(&format!("{unit}.{last}"), features)?;
            parts.push((conv, UnitParts { gate, k, norm1, weight, bias, norm2 }));
        }
        norms.push(Norm::identity(features));
        let mut norms = norms.into_iter();
        let before = norms.next().expect("one norm and one for each block");
        let lanes = simd::selected_lanes::<f32>();
        let layers = parts.into_iter().zip(norms);
        let layers = layers
            .map(|((conv, unit), after)| Layer { conv, unit: Some(unit.fold(&after, lanes)) });
        Ok((before, layers.collect()))
    }

    /// The head and the blocks.
    fn dncnn(&mut self, [features, channels, depth]: [usize; 3]) -> Result<Vec<Layer>, NetError> {
        let mut layers =
            vec![Layer { conv: self.layer("head", features, From::Image(channels))?, unit: None }];
        for i in 0..depth {
            let conv = self.layer(&format!("blocks.{i}.conv"), features, From::Features)?;
            layers.push(Layer { conv, unit: None });
        }
        Ok(layers)
    }
}

/// What a layer's convolution reads.
enum From {
    /// So many channels.
    Image(usize),
    /// As many channels as it has outputs.
    Features,
}

/// Refuses a header with a number of more than 15 digits: no file is that large, and the sums of
/// offsets in the safetensors crate could overflow.
fn check_numbers(bytes: &[u8]) -> Result<(), NetError> {
    let Some((size, rest)) = bytes.split_first_chunk() else {
        return Err(file_error!("not a safetensors file: {} bytes", bytes.len()));
    };
    let size = usize::try_from(u64::from_le_bytes(*size)).unwrap_or(usize::MAX);
    let (mut text, mut escaped, mut digits) = (false, false, 0);
    for &byte in &rest[..size.min(rest.len())] {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if text => escaped = true,
            b'"' => text = !text,
            b'0'..=b'9' if !text => digits += 1,
            _ => digits = 0,
        }
        if digits > 15 {
            return Err(file_error!("not a safetensors file: a number of more than 15 digits"));
        }
    }
    Ok(())
}
