//! The torch-free network.

use std::collections::BTreeMap;
use std::path::PathBuf;

use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;

use super::{View, array, detached};
use crate::memory;
use crate::net;
use crate::parallel::Threads;

/// A denoising network in evaluation mode, without torch.
#[pyclass(frozen, module = "xunit_rs._core")]
pub struct Network {
    network: net::Network,
}

/// OSError for a file that cannot be read, ValueError for one that is no network.
fn error(error: net::NetError) -> PyErr {
    match error {
        net::NetError::Io(..) => PyOSError::new_err(error.to_string()),
        _ => PyValueError::new_err(error.to_string()),
    }
}

#[pymethods]
impl Network {
    /// Loads a safetensors file.
    #[staticmethod]
    fn load(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        let network = py.detach(|| net::Network::load(&path)).map_err(error)?;
        Ok(Self { network })
    }

    /// "xdncnn-2018" or "xdncnn-2021".
    #[getter]
    fn architecture(&self) -> String {
        self.network.architecture().to_string()
    }

    /// Channels of the image.
    #[getter]
    fn channels(&self) -> usize {
        self.network.channels()
    }

    /// Pixels around a tile that its result depends on.
    #[getter]
    fn halo(&self) -> usize {
        self.network.halo()
    }

    /// The file's metadata.
    #[getter]
    fn metadata(&self) -> BTreeMap<String, String> {
        self.network.metadata().clone()
    }

    /// The clean image (C, H, W) of a noisy one, float32, in bands of `tile` rows (0: as many as
    /// fit 256 MB). Now and then `progress` is told the share that is done, and Ctrl-C is heard.
    #[pyo3(signature = (image, tile, threads, progress=None))]
    fn denoise<'py>(
        &self,
        image: &Bound<'py, PyAny>,
        tile: usize,
        threads: usize,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = image.py();
        let image = View::<f32>::input("image", image)?;
        let &[c, h, w] = image.shape() else {
            return Err(PyValueError::new_err(format!(
                "image must have shape (C, H, W), got {:?}",
                image.shape()
            )));
        };
        let (data, threads) = (image.slice(), Threads::Own(threads));
        let mut interrupted = None;
        let tell = |share: f64| {
            Python::attach(|py| {
                py.check_signals()?;
                progress.as_ref().map_or(Ok(()), |progress| progress.call1(py, (share,)).map(drop))
            })
        };
        let goes_on = |share| tell(share).map_err(|error| interrupted = Some(error)).is_ok();
        let clean = detached(py, || {
            let mut clean = memory::filled(data.len(), 0.0);
            let done =
                self.network.denoise_into(data, [c, h, w], tile, threads, &mut clean, goes_on);
            done.map(|()| clean)
        })?;
        if let Some(error) = interrupted {
            return Err(error);
        }
        array(py, clean.map_err(error)?, image.shape())
    }
}
