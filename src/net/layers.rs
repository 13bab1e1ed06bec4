//! The layers of a network in evaluation mode, every constant folded that can be.

use crate::kernels::activation::Gate;
use crate::kernels::blocked::{FirstWeights, GateWeights, padded};
use crate::kernels::channelwise::Maps;
use crate::kernels::winograd;
use crate::simd;

/// Batch norm's ε, as in `torch.nn.BatchNorm2d`.
const EPS: f64 = 1e-5;

/// A batch norm with its running statistics, as the map that it is.
#[derive(Debug)]
pub(super) struct Norm {
    scale: Vec<f64>,
    shift: Vec<f64>,
}

impl Norm {
    pub(super) fn new(weight: &[f32], bias: &[f32], mean: &[f32], var: &[f32]) -> Self {
        let scale: Vec<_> = weight
            .iter()
            .zip(var)
            .map(|(&weight, &var)| f64::from(weight) / (f64::from(var) + EPS).sqrt())
            .collect();
        let terms = bias.iter().zip(mean).zip(&scale);
        let shift =
            terms.map(|((&bias, &mean), s)| f64::from(bias) - f64::from(mean) * s).collect();
        Self { scale, shift }
    }

    /// The map that changes no value.
    pub(super) fn identity(channels: usize) -> Self {
        Self { scale: vec![1.0; channels], shift: vec![0.0; channels] }
    }

    /// In whole blocks; what lies beyond the last channel becomes zero.
    pub(super) fn maps(&self, lanes: usize) -> Maps {
        let list =
            |values: &[f64]| padded(&values.iter().map(|&v| v as f32).collect::<Vec<_>>(), lanes);
        let centre = padded(&vec![0.0; self.scale.len()], lanes);
        Maps { centre, scale: list(&self.scale), shift: list(&self.shift) }
    }

    /// The scale and shift of a channel.
    pub(super) fn of(&self, channel: usize) -> (f32, f32) {
        (self.scale[channel] as f32, self.shift[channel] as f32)
    }
}

/// The convolution of a layer: 3 × 3, zero padding 1.
#[derive(Debug)]
pub(super) enum Conv {
    /// From the image.
    First(FirstWeights),
    /// From the layer before.
    Dense(winograd::Weights),
}

impl Conv {
    /// Channels of its output, whole blocks.
    pub(super) fn outputs(&self) -> usize {
        match self {
            Conv::First(weights) => weights.outputs(),
            Conv::Dense(weights) => weights.outputs(),
        }
    }
}

/// What a unit is made of.
pub(super) struct UnitParts {
    pub(super) gate: Gate,
    pub(super) k: usize,
    /// Ahead of the ReLU, in an xUnit.
    pub(super) norm1: Option<Norm>,
    /// (channels, k, k) and (channels).
    pub(super) weight: Vec<f32>,
    pub(super) bias: Vec<f32>,
    pub(super) norm2: Norm,
}

impl UnitParts {
    /// Folds `norm2` into the taps, which it follows: padding is met before it. `after` is the batch
    /// norm of the next block, which padding follows, so that it is not folded further.
    pub(super) fn fold(&self, after: &Norm, lanes: usize) -> GateWeights {
        let square = self.k * self.k;
        let channels = self.bias.len();
        let mut taps = vec![0.0; channels.next_multiple_of(lanes) * square];
        for (at, &tap) in self.weight.iter().enumerate() {
            let (c, tap_at) = (at / square, at % square);
            taps[(c / lanes * square + tap_at) * lanes + c % lanes] =
                (f64::from(tap) * self.norm2.scale[c]) as f32;
        }
        let bias = (0..channels)
            .map(|c| (f64::from(self.bias[c]) * self.norm2.scale[c] + self.norm2.shift[c]) as f32);
        let bias = padded(&bias.collect::<Vec<_>>(), lanes);
        let rectifier = self.norm1.as_ref().map(|norm| norm.maps(lanes));
        let after = after.maps(lanes);
        let weights = GateWeights::new((self.gate, self.k), taps, bias, rectifier, after, lanes);
        // Plain sums that read the rows in place, where two units multiply and add 16 lanes each, as they do
        // where such caches are: the network of 2021 takes 0.955 times as long (an Intel Xeon).
        let plain = self.k == 7 && weights.keeps_zeros() && simd::has_large_second_level_cache();
        if plain { weights } else { weights.filtered(lanes) }
    }
}

/// Convolution and activation: a unit, or a ReLU.
#[derive(Debug)]
pub(super) struct Layer {
    pub(super) conv: Conv,
    /// The gate of an xUnit or xUnitS.
    pub(super) unit: Option<GateWeights>,
}

impl Layer {
    /// Rows and columns around an output of the activation that it depends on.
    pub(super) fn unit_halo(&self) -> usize {
        self.unit.as_ref().map_or(0, |unit| unit.k() / 2)
    }
}
