//! Reading a network from the bytes of a safetensors file, which nobody vouches for: every key,
//! type and shape is checked, and nothing is allocated that the file does not hold.

use std::collections::BTreeMap;

use safetensors::{Dtype, SafeTensors, tensor::TensorView};

use super::dense::Dense;
use super::layers::{Block, Norm, Unit};
use super::{Architecture, NetError, Network};
use crate::kernels::activation::Gate;

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
    let [features, channels, ..] = file.extents("blocks.0.conv.weight")?;
    let depth = (0..).take_while(|i| file.has(&format!("blocks.{i}.conv.weight"))).count();
    let (spatial, last) = match architecture {
        Architecture::XDnCnn2018 => (2, 3),
        Architecture::XDnCnn2021 => (0, 1),
    };
    let spatial_key = format!("blocks.0.xunit.features.{spatial}.weight");
    let kernel = file.extents(&spatial_key)?[2];
    if kernel % 2 == 0 || kernel > MAX_KERNEL {
        return Err(file_error!(
            "{spatial_key}: kernel size must be odd and at most {MAX_KERNEL}, got {kernel}"
        ));
    }
    let gate = file.gate(architecture)?;
    file.agrees("channels", channels)?;
    file.agrees("features", features)?;
    file.agrees("depth", depth)?;
    file.agrees("kernel_size", kernel)?;

    let mut blocks = Vec::new();
    for i in 0..depth {
        let inputs = if i == 0 { channels } else { features };
        let unit = format!("blocks.{i}.xunit.features");
        blocks.push(Block {
            norm: match architecture {
                Architecture::XDnCnn2018 if i == 0 => None,
                _ => Some(file.norm(&format!("blocks.{i}.norm"), inputs)?),
            },
            conv: file.conv(&format!("blocks.{i}.conv"), features, inputs, 3)?,
            unit: Unit {
                gate,
                kernel,
                norm1: match architecture {
                    Architecture::XDnCnn2018 => Some(file.norm(&format!("{unit}.0"), features)?),
                    Architecture::XDnCnn2021 => None,
                },
                weight: file
                    .take(&format!("{unit}.{spatial}.weight"), &[features, 1, kernel, kernel])?,
                bias: file.take(&format!("{unit}.{spatial}.bias"), &[features])?,
                norm2: file.norm(&format!("{unit}.{last}"), features)?,
            },
        });
    }
    let k = match architecture {
        Architecture::XDnCnn2018 => 3,
        Architecture::XDnCnn2021 => 5,
    };
    let tail = file.conv("tail", channels, features, k)?;
    if let Some(key) = file.tensors.keys().next() {
        return Err(file_error!("unexpected tensor {key:?} for a {}", architecture.name()));
    }
    Ok(Network { architecture, channels, metadata: file.metadata, blocks, tail })
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
        let shown = match (self.has(early), self.has(late)) {
            (true, false) => Some((Architecture::XDnCnn2018, early)),
            (false, true) => Some((Architecture::XDnCnn2021, late)),
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
            None => Ok(match architecture {
                Architecture::XDnCnn2018 => Gate::Gaussian,
                Architecture::XDnCnn2021 => Gate::Sigmoid,
            }),
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
        Ok(Norm {
            weight: take("weight")?,
            bias: take("bias")?,
            mean: take("running_mean")?.into_iter().map(f64::from).collect(),
            var: take("running_var")?.into_iter().map(f64::from).collect(),
        })
    }

    fn conv(
        &mut self,
        key: &str,
        outputs: usize,
        inputs: usize,
        k: usize,
    ) -> Result<Dense, NetError> {
        let weight = self.take(&format!("{key}.weight"), &[outputs, inputs, k, k])?;
        let bias = self.take(&format!("{key}.bias"), &[outputs])?;
        Ok(Dense::new(outputs, inputs, k, &weight, &bias))
    }
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
