//! `xunit_rs._core`: numpy arrays or torch tensors in and out, the GIL released in between.

mod block;
mod depthwise;
mod network;
mod peak;
mod tensor;
mod xunit;

use std::collections::BTreeMap;

use numpy::{Element, IntoPyArray, PyArrayMethods};
use pyo3::exceptions::{PyMemoryError, PyValueError};
use pyo3::prelude::*;
use tensor::{View, disjoint};

use crate::memory::{self, NoMemory};
use crate::shape::ShapeError;
use crate::simd::Scalar;

/// The compiled core of xunit_rs.
#[pymodule]
mod _core {
    #[pymodule_export]
    use super::block::{empty, empty_cache};
    #[pymodule_export]
    use super::depthwise::{depthwise_conv2d, depthwise_conv2d_backward};
    #[pymodule_export]
    use super::network::Network;
    #[pymodule_export]
    use super::peak::{fma_peak, memory_bandwidth};
    #[pymodule_export]
    use super::tensor::{is_plain, use_torch};
    #[pymodule_export]
    use super::xunit::{
        xunit_backward, xunit_evaluate, xunit_evaluate_channels_last, xunit_forward,
    };
    #[pymodule_export]
    use super::{build_info, default_threads};

    use pyo3::prelude::*;

    /// A misspelt XUNIT_ISA, XUNIT_NUM_THREADS or XUNIT_CACHE_MB must not pass unnoticed.
    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        use pyo3::exceptions::PyValueError;
        crate::simd::requested().map_err(PyValueError::new_err)?;
        crate::parallel::requested_threads().map_err(PyValueError::new_err)?;
        crate::caching_allocator::requested_limit().map_err(PyValueError::new_err)?;
        // What is made once a process is made now: a child that is forked while another thread is at
        // it would wait for ever.
        let array = super::array(module.py(), vec![0.0f32], &[1])?;
        let _ = array.cast::<numpy::PyArrayDyn<f64>>().is_ok();
        crate::parallel::warm_up();
        crate::caching_allocator::empty_cache();
        Ok(())
    }
}

/// Version, instruction set in use, all that the machine has, and float32 lanes of a vector.
#[pyfunction]
fn build_info() -> BTreeMap<&'static str, String> {
    let isas: Vec<_> = crate::simd::available().iter().map(ToString::to_string).collect();
    BTreeMap::from([
        ("version", env!("CARGO_PKG_VERSION").to_owned()),
        ("isa", crate::simd::selected().to_string()),
        ("isas", isas.join(" ")),
        ("lanes", crate::simd::selected_lanes::<f32>().to_string()),
    ])
}

/// Threads used where none are named.
#[pyfunction]
fn default_threads() -> usize {
    crate::parallel::default_threads()
}

/// Runs `f` without the GIL; MemoryError where it finds too little memory.
fn detached<R: Send>(py: Python<'_>, f: impl FnOnce() -> R + Send) -> PyResult<R> {
    py.detach(|| memory::enough(f)).map_err(|NoMemory(bytes)| {
        PyMemoryError::new_err(format!("there is no memory for {bytes} bytes"))
    })
}

impl From<ShapeError> for PyErr {
    fn from(error: ShapeError) -> Self {
        PyValueError::new_err(error.0)
    }
}

/// A vector as an array of this shape, without a copy.
fn array<'py, T: Element>(
    py: Python<'py>,
    data: Vec<T>,
    shape: &[usize],
) -> PyResult<Bound<'py, PyAny>> {
    Ok(data.into_pyarray(py).reshape(shape)?.into_any())
}

/// Calls `$f::<f32>` or `$f::<f64>` as `$x` asks; f32's error message for any other type.
macro_rules! by_dtype {
    ($x:expr, $f:ident($($arg:expr),* $(,)?)) => {
        if super::View::<f64>::fits($x) {
            $f::<f64>($($arg),*)
        } else {
            $f::<f32>($($arg),*)
        }
    };
}
use by_dtype;

/// An element type of both numpy and the kernels.
trait Number: Element + Scalar {}
impl Number for f32 {}
impl Number for f64 {}
