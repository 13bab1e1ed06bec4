//! `xunit_rs._core`: numpy arrays in and out, the GIL released in between.

mod depthwise;
mod network;
mod peak;
mod xunit;

use std::collections::BTreeMap;

use numpy::{
    Element, IntoPyArray, PyArrayDyn, PyArrayMethods, PyReadonlyArrayDyn, PyUntypedArray,
    PyUntypedArrayMethods,
};
use pyo3::exceptions::{PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;

use crate::shape::{Batch, ShapeError};
use crate::simd::Scalar;

/// The compiled core of xunit_rs.
#[pymodule]
mod _core {
    #[pymodule_export]
    use super::depthwise::{depthwise_conv2d, depthwise_conv2d_backward};
    #[pymodule_export]
    use super::network::Network;
    #[pymodule_export]
    use super::peak::{fma_peak, memory_bandwidth};
    #[pymodule_export]
    use super::xunit::{xunit_backward, xunit_forward};
    #[pymodule_export]
    use super::{build_info, default_threads};

    use pyo3::prelude::*;

    /// A misspelt XUNIT_ISA must not pass unnoticed.
    #[pymodule_init]
    fn init(_module: &Bound<'_, PyModule>) -> PyResult<()> {
        crate::simd::requested().map(|_| ()).map_err(pyo3::exceptions::PyValueError::new_err)
    }
}

/// Version, instruction set in use and all that the machine has.
#[pyfunction]
fn build_info() -> BTreeMap<&'static str, String> {
    let isas: Vec<_> = crate::simd::available().iter().map(ToString::to_string).collect();
    BTreeMap::from([
        ("version", env!("CARGO_PKG_VERSION").to_owned()),
        ("isa", crate::simd::selected().to_string()),
        ("isas", isas.join(" ")),
    ])
}

/// Threads used where none are named.
#[pyfunction]
fn default_threads() -> usize {
    crate::parallel::default_threads()
}

impl From<ShapeError> for PyErr {
    fn from(error: ShapeError) -> Self {
        PyValueError::new_err(error.0)
    }
}

/// An array that kernels may read: C-contiguous, aligned, native, of the call's element type.
struct Input<'py, T: Element> {
    array: PyReadonlyArrayDyn<'py, T>,
}

impl<'py, T: Element> Input<'py, T> {
    fn new(name: &str, array: &Bound<'py, PyAny>) -> PyResult<Self> {
        let untyped = array.cast::<PyUntypedArray>().map_err(|_| {
            let kind = array.get_type();
            PyTypeError::new_err(format!("{name} must be a numpy array, got {kind}"))
        })?;
        let typed = untyped.cast::<PyArrayDyn<T>>().map_err(|_| {
            let (got, wanted) = (untyped.dtype(), T::get_dtype(array.py()));
            PyTypeError::new_err(format!("{name} must be of dtype {wanted}, got {got}"))
        })?;
        if !untyped.is_aligned() || !untyped.is_c_contiguous() {
            let strides = untyped.strides();
            return Err(PyValueError::new_err(format!(
                "{name} must be aligned and C-contiguous, got shape {:?} with strides {strides:?}",
                untyped.shape(),
            )));
        }
        let array = typed.try_readonly().map_err(|error| {
            PyRuntimeError::new_err(format!("{name} is being written to: {error}"))
        })?;
        Ok(Self { array })
    }

    fn optional(name: &str, array: Option<&Bound<'py, PyAny>>) -> PyResult<Option<Self>> {
        array.map(|array| Self::new(name, array)).transpose()
    }

    fn shape(&self) -> &[usize] {
        self.array.shape()
    }

    fn slice(&self) -> PyResult<&[T]> {
        Ok(self.array.as_slice()?)
    }

    fn expect_shape(&self, name: &str, wanted: &[usize]) -> PyResult<()> {
        if self.shape() == wanted {
            return Ok(());
        }
        Err(PyValueError::new_err(format!(
            "{name} must have shape {wanted:?}, got {:?}",
            self.shape()
        )))
    }
}

/// The slice of an optional array.
fn slice_of<'a, T: Element>(input: Option<&'a Input<'_, T>>) -> PyResult<Option<&'a [T]>> {
    input.map(Input::slice).transpose()
}

/// A vector as an array of this shape, without a copy.
fn array<'py, T: Element>(
    py: Python<'py>,
    data: Vec<T>,
    shape: &[usize],
) -> PyResult<Bound<'py, PyAny>> {
    Ok(data.into_pyarray(py).reshape(shape)?.into_any())
}

/// The batch shape of an array.
fn batch_of<T: Element>(input: &Input<'_, T>) -> PyResult<Batch> {
    Ok(Batch::new(input.shape())?)
}

/// Whether an array is of the element type `T`.
fn is<T: Element>(array: &Bound<'_, PyAny>) -> bool {
    array.cast::<PyArrayDyn<T>>().is_ok()
}

/// Calls `$f::<f32>` or `$f::<f64>` as `$x` asks; f32's error message for any other type.
macro_rules! by_dtype {
    ($x:expr, $f:ident($($arg:expr),* $(,)?)) => {
        if super::is::<f64>($x) { $f::<f64>($($arg),*) } else { $f::<f32>($($arg),*) }
    };
}
use by_dtype;

/// An element type of both numpy and the kernels.
trait Number: Element + Scalar {}
impl Number for f32 {}
impl Number for f64 {}
