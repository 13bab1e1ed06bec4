//! Torch-free networks: a safetensors file in, a clean image out, band by band.
//!
//! The networks are the xDnCNNs of the xUnit paper (arXiv 1711.06445), a chain of blocks
//! \[BN\] → convolution 3×3 → xUnit, then one convolution whose output is added to the noisy image
//! (2021) or taken from it (2018); and DnCNN (arXiv 1608.03981), whose blocks are convolution 3×3 →
//! ReLU and whose last output is taken from the image.
//!
//! Convolutions but the first and the last are computed by minimal filtering
//! ([`crate::kernels::winograd`]), of which every output of a tile depends on every input: a NaN in the
//! image spreads a little further than the network's halo.

mod layers;
mod load;
mod rings;
mod schedule;
mod stream;

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use crate::kernels::blocked::LastWeights;
use crate::memory;
use crate::parallel::Threads;
use crate::shape::{Batch, ShapeError};
use layers::{Layer, Norm};
use stream::{Band, Job, Spare};

/// Why a network cannot be loaded or an image not denoised.
#[derive(Debug)]
pub enum NetError {
    /// The file cannot be read.
    Io(PathBuf, io::Error),
    /// The file is no network of ours; the message names the key, shape or value.
    File(String),
    /// The image does not fit the network.
    Image(String),
    /// The caller did not want to go on.
    Stopped,
}

impl fmt::Display for NetError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NetError::Io(path, error) => write!(f, "{}: {error}", path.display()),
            NetError::File(reason) | NetError::Image(reason) => f.write_str(reason),
            NetError::Stopped => f.write_str("stopped"),
        }
    }
}

impl std::error::Error for NetError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            NetError::Io(_, error) => Some(error),
            _ => None,
        }
    }
}

impl From<ShapeError> for NetError {
    fn from(error: ShapeError) -> Self {
        NetError::Image(error.0)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Architecture {
    /// Official code of 2018: xUnit units, predicts the noise.
    XDnCnn2018,
    /// Official code of 2021: xUnitS units, predicts what to add.
    XDnCnn2021,
    /// Batch norm merged, as trained by KAIR: predicts the noise.
    DnCnn,
}

impl Architecture {
    const ALL: [Self; 3] = [Self::XDnCnn2018, Self::XDnCnn2021, Self::DnCnn];

    fn name(self) -> &'static str {
        match self {
            Self::XDnCnn2018 => "xdncnn-2018",
            Self::XDnCnn2021 => "xdncnn-2021",
            Self::DnCnn => "dncnn",
        }
    }
}

/// A denoising network in evaluation mode.
#[derive(Debug)]
pub struct Network {
    architecture: Architecture,
    channels: usize,
    metadata: BTreeMap<String, String>,
    /// Ahead of the first convolution: the identity but for 2021.
    before: Norm,
    layers: Vec<Layer>,
    tail: LastWeights,
    /// From one image to the next.
    spare: Mutex<Option<Spare>>,
}

/// The memory that the edges of panels may take, unless the caller says otherwise: an image that is
/// higher than this allows is computed in bands. xDnCNN takes 30 KB for each row.
const MEMORY: usize = 256 << 20;

/// The largest file that is read: a thousand times the published networks.
const MAX_FILE_BYTES: u64 = 1 << 30;

impl Network {
    /// Loads a safetensors file. Errors if it cannot be read or is no network.
    pub fn load(path: &Path) -> Result<Self, NetError> {
        let io = |error| NetError::Io(path.to_owned(), error);
        let file = std::fs::File::open(path).map_err(io)?;
        let kind = file.metadata().map_err(io)?;
        if !kind.is_file() {
            return Err(io(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file")));
        }
        let mut bytes = Vec::new();
        file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(io)?;
        Self::from_bytes(&bytes).map_err(|error| match error {
            NetError::File(reason) => NetError::File(format!("{}: {reason}", path.display())),
            error => error,
        })
    }

    /// The network in the bytes of a safetensors file.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, NetError> {
        if bytes.len() as u64 > MAX_FILE_BYTES {
            return Err(NetError::File(format!("larger than {MAX_FILE_BYTES} bytes")));
        }
        load::network(bytes)
    }

    /// "xdncnn-2018", "xdncnn-2021" or "dncnn".
    pub fn architecture(&self) -> &str {
        self.architecture.name()
    }

    /// Channels of the image.
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// Pixels around a pixel that its result depends on: Σ k // 2 over all convolutions.
    pub fn halo(&self) -> usize {
        self.layers.iter().map(|layer| 1 + layer.unit_halo()).sum::<usize>() + self.tail.k() / 2
    }

    /// What the last output is multiplied by before it is added to the image.
    fn sign(&self) -> f32 {
        match self.architecture {
            Architecture::XDnCnn2018 | Architecture::DnCnn => -1.0,
            Architecture::XDnCnn2021 => 1.0,
        }
    }

    /// The bands of an image so high. They start at whole steps, so that the tiles are the same.
    fn bands(
        &self,
        [height, width]: [usize; 2],
        tile: usize,
    ) -> impl Iterator<Item = Band> + use<> {
        let reach = stream::reach(self);
        let most = match tile {
            0 => {
                let fit = MEMORY.checked_div(stream::bytes_per_row(self, width));
                fit.map_or(height, |rows| rows.saturating_sub(2 * reach).max(reach))
            }
            tile => tile,
        };
        let side = height.div_ceil(height.div_ceil(most)).next_multiple_of(stream::STEP);
        (0..height).step_by(side).map(move |start| {
            let end = (start + side).min(height);
            let region = start.saturating_sub(reach)..end.saturating_add(reach).min(height);
            Band { core: start..end, region }
        })
    }

    /// The file's metadata.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// The clean image of a noisy one, (C, H, W) contiguous, on `threads`.
    ///
    /// Rows stream through the network, in bands of `tile` rows or a few more (0: as many as fit
    /// 256 MB), each computed with what it depends on above and below, which changes no bit of the result.
    /// Errors if `c` is not [`Network::channels`] or a size does not fit.
    pub fn denoise(
        &self,
        image: &[f32],
        c: usize,
        h: usize,
        w: usize,
        tile: usize,
        threads: Threads,
    ) -> Result<Vec<f32>, NetError> {
        let mut clean = memory::filled(image.len(), 0.0);
        self.denoise_into(image, [c, h, w], tile, threads, &mut clean, |_| true)?;
        Ok(clean)
    }

    /// [`Network::denoise`] to `clean`, which tells now and then the share of the work that is done
    /// and asks whether to go on. Errors, too, if not, or if `clean` is not as long as `image`.
    pub fn denoise_into(
        &self,
        image: &[f32],
        [c, h, w]: [usize; 3],
        tile: usize,
        threads: Threads,
        clean: &mut [f32],
        mut goes_on: impl FnMut(f64) -> bool,
    ) -> Result<(), NetError> {
        if c != self.channels {
            return Err(NetError::Image(format!(
                "the network denoises images of {} channels, got an image of {c}",
                self.channels
            )));
        }
        let batch = Batch::new(&[1, c, h, w])?;
        if image.len() != batch.size() || clean.len() != batch.size() {
            return Err(NetError::Image(format!(
                "image must have {} elements for shape {:?}, got {}",
                batch.size(),
                [c, h, w],
                image.len()
            )));
        }
        let mut job = Job { image, shape: [c, h, w], clean, threads };
        for band in self.bands([h, w], tile) {
            let (start, rows) = (band.core.start as f64, band.core.len() as f64);
            job.band(self, &band, |share| goes_on((start + rows * share) / h as f64))?;
        }
        Ok(())
    }
}
