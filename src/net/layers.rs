//! The layers of a network in evaluation mode, on one image.

use super::NetError;
use super::dense::Dense;
use crate::kernels::activation::{Affine, Gate};
use crate::memory;
use crate::ops::{self, Variant, XUnit, XUnitOutput};
use crate::parallel::Threads;
use crate::shape::Batch;

/// Batch norm's ε, as in `torch.nn.BatchNorm2d`.
const EPS: f64 = 1e-5;

/// The activations: every layer reads `x` and leaves its output there, by way of `y`.
#[derive(Default)]
pub(super) struct Buffers {
    pub(super) x: Vec<f32>,
    pub(super) y: Vec<f32>,
}

/// A batch norm with its running statistics.
#[derive(Debug)]
pub(super) struct Norm {
    pub(super) weight: Vec<f32>,
    pub(super) bias: Vec<f32>,
    pub(super) mean: Vec<f64>,
    pub(super) var: Vec<f64>,
}

impl Norm {
    fn view(&self) -> ops::Norm<'_, f32> {
        ops::Norm {
            weight: &self.weight,
            bias: &self.bias,
            stats: Some((&self.mean, &self.var)),
            eps: EPS,
            training: false,
        }
    }

    /// The affine map of channel `c`.
    pub(super) fn affine(&self, c: usize) -> Affine<f32> {
        let scale = f64::from(self.weight[c]) / (self.var[c] + EPS).sqrt();
        Affine { centre: self.mean[c] as f32, scale: scale as f32, shift: self.bias[c] }
    }
}

/// The output of `conv` on norm(x), from `buffers.x` to `buffers.y`.
pub(super) fn convolve(
    conv: &Dense,
    norm: Option<&Norm>,
    buffers: &mut Buffers,
    h: usize,
    w: usize,
    threads: Threads,
) -> Result<(), NetError> {
    let output = Batch::new(&[1, conv.outputs(), h, w])?;
    let affine = norm.map(|norm| (0..conv.inputs()).map(|c| norm.affine(c)).collect::<Vec<_>>());
    memory::resize(&mut buffers.y, output.size(), 0.0);
    conv.forward(affine.as_deref(), &buffers.x, &mut buffers.y, w, threads);
    Ok(())
}

/// An xUnit (with `norm1`) or xUnitS (without).
#[derive(Debug)]
pub(super) struct Unit {
    pub(super) gate: Gate,
    pub(super) kernel: usize,
    pub(super) norm1: Option<Norm>,
    pub(super) weight: Vec<f32>,
    pub(super) bias: Vec<f32>,
    pub(super) norm2: Norm,
}

impl Unit {
    fn view(&self) -> XUnit<'_, f32> {
        XUnit {
            variant: if self.norm1.is_some() { Variant::Full } else { Variant::Slim },
            gate: self.gate,
            kernel: self.kernel,
            pointwise: None,
            weight: &self.weight,
            bias: Some(&self.bias),
            norm1: self.norm1.as_ref().map(Norm::view),
            norm2: Some(self.norm2.view()),
        }
    }
}

/// \[BN\] → convolution → xUnit.
#[derive(Debug)]
pub(super) struct Block {
    pub(super) norm: Option<Norm>,
    pub(super) conv: Dense,
    pub(super) unit: Unit,
}

impl Block {
    pub(super) fn halo(&self) -> usize {
        self.conv.halo() + self.unit.kernel / 2
    }

    /// Replaces x by the block's output.
    pub(super) fn forward(
        &self,
        buffers: &mut Buffers,
        h: usize,
        w: usize,
        threads: Threads,
    ) -> Result<(), NetError> {
        convolve(&self.conv, self.norm.as_ref(), buffers, h, w, threads)?;
        let batch = Batch::new(&[1, self.conv.outputs(), h, w])?;
        memory::resize(&mut buffers.x, batch.size(), 0.0);
        let out = &mut buffers.x[..];
        let output = XUnitOutput { out, d: None, p: None, stats1: None, stats2: None };
        ops::xunit_forward(&self.unit.view(), batch, &buffers.y, output, threads)?;
        Ok(())
    }
}
