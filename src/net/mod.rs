//! Torch-free networks: a safetensors file in, a clean image out, tile by tile.
//!
//! The two networks are the xDnCNNs of the xUnit paper (arXiv 1711.06445): a chain of blocks
//! \[BN\] → convolution 3×3 → xUnit, then one convolution whose output is added to the noisy image
//! (2021) or taken from it (2018).

mod dense;
mod layers;
mod load;
mod tile;

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::memory;
use crate::parallel::Threads;
use crate::shape::{Batch, ShapeError};
use dense::Dense;
use layers::{Block, Buffers};

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
}

impl Architecture {
    const ALL: [Self; 2] = [Self::XDnCnn2018, Self::XDnCnn2021];

    fn name(self) -> &'static str {
        match self {
            Self::XDnCnn2018 => "xdncnn-2018",
            Self::XDnCnn2021 => "xdncnn-2021",
        }
    }
}

/// A denoising network in evaluation mode.
#[derive(Debug)]
pub struct Network {
    architecture: Architecture,
    channels: usize,
    metadata: BTreeMap<String, String>,
    blocks: Vec<Block>,
    tail: Dense,
}

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

    /// "xdncnn-2018" or "xdncnn-2021".
    pub fn architecture(&self) -> &str {
        self.architecture.name()
    }

    /// Channels of the image.
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// Pixels around a pixel that its result depends on: Σ k // 2 over all convolutions.
    pub fn halo(&self) -> usize {
        self.blocks.iter().map(Block::halo).sum::<usize>() + self.tail.halo()
    }

    /// The file's metadata.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// The clean image of a noisy one, (C, H, W) contiguous, on `threads`.
    ///
    /// With `tile` > 0 the image is computed in tiles of that side, each cut with its halo, which
    /// bounds the memory and changes no bit of the result; 0 takes the whole image at once. Errors
    /// if `c` is not [`Network::channels`] or a size does not fit.
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
        self.denoise_into(image, [c, h, w], tile, threads, &mut clean, || true)?;
        Ok(clean)
    }

    /// [`Network::denoise`] to `clean`, which asks before each tile whether to go on. Errors, too, if
    /// not, or if `clean` is not as long as `image`.
    pub fn denoise_into(
        &self,
        image: &[f32],
        [c, h, w]: [usize; 3],
        tile: usize,
        threads: Threads,
        clean: &mut [f32],
        mut goes_on: impl FnMut() -> bool,
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
        clean.copy_from_slice(image);
        let mut buffers = Buffers::default();
        for tile in tile::tiles(h, w, tile, self.halo()) {
            if !goes_on() {
                return Err(NetError::Stopped);
            }
            tile.cut(image, batch, &mut buffers.x);
            for block in &self.blocks {
                block.forward(&mut buffers, tile.height(), tile.width(), threads)?;
            }
            layers::convolve(&self.tail, None, &mut buffers, tile.height(), tile.width(), threads)?;
            match self.architecture {
                Architecture::XDnCnn2018 => {
                    tile.paste(&buffers.y, batch, clean, |x, noise| x - noise);
                }
                Architecture::XDnCnn2021 => {
                    tile.paste(&buffers.y, batch, clean, |x, correction| x + correction);
                }
            }
        }
        Ok(())
    }
}
