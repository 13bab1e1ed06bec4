//! The handover: numpy arrays and torch tensors as slices, without a copy.
//!
//! Whoever calls must not let another thread write what is read here, or read or write what is
//! written, while the call lasts: the GIL is released meanwhile. torch asks the same of its users.

use std::ffi::c_void;
use std::marker::PhantomData;
use std::ops::Range;

use numpy::{PyArrayDyn, PyArrayMethods, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyCapsule, PyCapsuleMethods, PyTuple, PyType};

use super::Number;
use crate::memory;
use crate::parallel::{self, ParallelFor};

/// The head of DLPack's `DLTensor`, version 1.
#[repr(C)]
pub(super) struct DlTensor {
    pub(super) data: *mut c_void,
    pub(super) device_type: i32,
    pub(super) device_id: i32,
    pub(super) ndim: i32,
    pub(super) code: u8,
    pub(super) bits: u8,
    pub(super) lanes: u16,
    pub(super) shape: *const i64,
    pub(super) strides: *const i64,
    pub(super) byte_offset: u64,
}

pub(super) const DL_CPU: i32 = 1;
pub(super) const DL_FLOAT: u8 = 2;

type FromPyObject = unsafe extern "C" fn(*mut c_void, *mut DlTensor) -> i32;

/// DLPack's `DLPackExchangeAPI`, version 1.
#[repr(C)]
struct ExchangeApi {
    major: u32,
    minor: u32,
    previous: *const c_void,
    /// Three functions that make or take managed tensors.
    managed: [*const c_void; 3],
    view_of: Option<FromPyObject>,
    current_work_stream: *const c_void,
}

/// torch's tensor type, and its function that looks into a tensor.
static TORCH: PyOnceLock<(Py<PyType>, FromPyObject)> = PyOnceLock::new();

/// Lets the functions of this module take torch tensors and run on torch's threads.
///
/// tensor: `torch.Tensor`; exchange_api: its `__dlpack_c_exchange_api__`; parallel_for: the address
/// of `torch_parallel_for`, or None. True if tensors are taken from now on.
#[pyfunction]
#[pyo3(signature = (tensor, exchange_api, parallel_for))]
pub fn use_torch(
    tensor: Bound<'_, PyType>,
    exchange_api: Option<Bound<'_, PyCapsule>>,
    parallel_for: Option<usize>,
) -> PyResult<bool> {
    if let Some(address) = parallel_for.filter(|&address| address != 0) {
        // SAFETY: the caller vouches for the address; torch is never unloaded.
        unsafe { parallel::lend(std::mem::transmute::<usize, ParallelFor>(address)) };
    }
    let Some(capsule) = exchange_api else {
        return Ok(TORCH.get(tensor.py()).is_some());
    };
    let api = capsule.pointer_checked(Some(c"dlpack_exchange_api"))?.cast::<ExchangeApi>();
    // SAFETY: a capsule of this name holds such a table, for the life of the process; the first
    // two fields are there in every version.
    let (major, view_of) = unsafe {
        let api = api.as_ptr();
        ((*api).major, if (*api).major == 1 { (*api).view_of } else { None })
    };
    if let (1, Some(view_of)) = (major, view_of) {
        let py = tensor.py();
        TORCH.get_or_init(py, || (tensor.unbind(), view_of));
    }
    Ok(TORCH.get(capsule.py()).is_some())
}

/// What a tensor's memory looks like, or None where torch cannot tell: of a tensor without any, say.
fn look(object: &Bound<'_, PyAny>, view_of: FromPyObject) -> PyResult<DlTensor> {
    let mut found = std::mem::MaybeUninit::<DlTensor>::zeroed();
    // SAFETY: callers hand in a torch tensor, as the function asks; all zeros are a valid value.
    unsafe {
        if view_of(object.as_ptr().cast(), found.as_mut_ptr()) != 0 {
            return Err(PyErr::fetch(object.py()));
        }
        Ok(found.assume_init())
    }
}

/// Whether the kernels may run on these tensors and Nones as they are: exactly of type torch.Tensor
/// or `parameter`, on the CPU, aligned, all contiguous but the first, all float32 or all float64,
/// none a lazy negation. Quicker than to ask torch, but False says not why.
#[pyfunction]
#[pyo3(signature = (tensors, parameter))]
pub fn is_plain(tensors: &Bound<'_, PyTuple>, parameter: &Bound<'_, PyType>) -> bool {
    are_plain(tensors.iter(), parameter)
}

/// [`is_plain`]
pub(super) fn are_plain<'py>(
    tensors: impl Iterator<Item = Bound<'py, PyAny>>,
    parameter: &Bound<'py, PyType>,
) -> bool {
    let py = parameter.py();
    let Some((kind, view_of)) = TORCH.get(py) else {
        return false;
    };
    let mut bits = 0;
    for (i, tensor) in tensors.enumerate() {
        if tensor.is_none() {
            continue;
        }
        let ty = tensor.get_type();
        if !ty.is(kind) && !ty.is(parameter) {
            return false;
        }
        let Ok(found) = look(&tensor, *view_of) else {
            return false;
        };
        let plain = found.device_type == DL_CPU
            && (found.code, found.lanes) == (DL_FLOAT, 1)
            && [32, 64].contains(&found.bits)
            && (bits == 0 || found.bits == bits)
            && found.data.addr().is_multiple_of(usize::from(found.bits / 8))
            && (!found.data.is_null() || found.len() == 0)
            && (i == 0 || found.is_contiguous());
        bits = found.bits;
        let negated = || tensor.call_method0(intern!(py, "is_neg")).and_then(|n| n.is_truthy());
        if !plain || !matches!(negated(), Ok(false)) {
            return false;
        }
    }
    true
}

impl DlTensor {
    fn extents(&self) -> impl DoubleEndedIterator<Item = (i64, Option<i64>)> + '_ {
        (0..usize::try_from(self.ndim).unwrap_or(0)).map(|i| {
            // SAFETY: both arrays have `ndim` elements; strides may be absent where contiguous.
            unsafe {
                let stride = (!self.strides.is_null()).then(|| *self.strides.add(i));
                (*self.shape.add(i), stride)
            }
        })
    }

    fn len(&self) -> i64 {
        self.extents().map(|(extent, _)| extent).product()
    }

    fn is_contiguous(&self) -> bool {
        let mut expected = 1;
        self.len() == 0
            || self.extents().rev().all(|(extent, stride)| {
                let fits = extent == 1 || stride.is_none_or(|stride| stride == expected);
                expected *= extent;
                fits
            })
    }
}

/// Bytes from which on an output's memory is worth the advice, as numpy has it for its arrays.
const ADVISED: usize = 4 << 20;

/// The most dimensions that any argument has.
pub(super) const MAX_DIMS: usize = 4;

/// An array or tensor: contiguous, aligned, native, of the element type `T`. Its memory lives as
/// long as the object, which `'py` keeps alive.
pub(super) struct View<'py, T> {
    data: *mut T,
    shape: [usize; MAX_DIMS],
    dims: usize,
    object: PhantomData<&'py T>,
}

impl<'py, T: Number> View<'py, T> {
    /// What may be read.
    pub(super) fn input(name: &str, object: &Bound<'py, PyAny>) -> PyResult<Self> {
        Self::new(name, object, false)
    }

    /// What may be written; see [`disjoint`].
    pub(super) fn output(name: &str, object: &Bound<'py, PyAny>) -> PyResult<Self> {
        Self::new(name, object, true)
    }

    /// Whether this is an array or a tensor of `T`s.
    pub(super) fn fits(object: &Bound<'py, PyAny>) -> bool {
        match TORCH.get(object.py()) {
            Some((kind, view_of))
                if object.is_instance(kind.bind(object.py())).unwrap_or(false) =>
            {
                let bits = 8 * size_of::<T>();
                look(object, *view_of).is_ok_and(|found| usize::from(found.bits) == bits)
            }
            _ => object.cast::<PyArrayDyn<T>>().is_ok(),
        }
    }

    /// What may be read, if it is given.
    pub(super) fn read(name: &str, object: Option<&Bound<'py, PyAny>>) -> PyResult<Option<Self>> {
        object.map(|object| Self::input(name, object)).transpose()
    }

    /// What may be written, of this shape, if it is given.
    pub(super) fn written(
        name: &str,
        object: Option<&Bound<'py, PyAny>>,
        shape: &[usize],
    ) -> PyResult<Option<Self>> {
        let view = object.map(|object| Self::output(name, object)).transpose()?;
        if let Some(view) = &view {
            view.expect_shape(name, shape)?;
            let bytes = view.len() * size_of::<T>();
            if bytes >= ADVISED {
                // Fresh, as a rule; where it is not, the advice changes nothing.
                memory::huge_pages(view.data.cast(), bytes);
            }
        }
        Ok(view)
    }

    fn new(name: &str, object: &Bound<'py, PyAny>, write: bool) -> PyResult<Self> {
        if let Some((kind, view_of)) = TORCH.get(object.py())
            && object.is_instance(kind.bind(object.py()))?
        {
            return Self::of_tensor(name, object, *view_of);
        }
        Self::of_array(name, object, write)
    }

    fn of_tensor(name: &str, object: &Bound<'py, PyAny>, view_of: FromPyObject) -> PyResult<Self> {
        let found = look(object, view_of)?;
        let bits = 8 * size_of::<T>();
        if (found.code, usize::from(found.bits), found.lanes) != (DL_FLOAT, bits, 1) {
            return Err(PyTypeError::new_err(format!(
                "{name} must be of dtype float{bits}, got DLPack type ({}, {}, {})",
                found.code, found.bits, found.lanes
            )));
        }
        if found.device_type != DL_CPU {
            return Err(PyValueError::new_err(format!(
                "{name} must be on the CPU, got DLPack device type {}",
                found.device_type
            )));
        }
        let dims = found.extents().count();
        if dims > MAX_DIMS {
            return Err(PyValueError::new_err(format!("{name} has {dims} dimensions")));
        }
        let mut shape = [1; MAX_DIMS];
        for (to, (extent, _)) in shape.iter_mut().zip(found.extents()) {
            *to = extent as usize;
        }
        let data = found.data.wrapping_byte_add(found.byte_offset as usize).cast::<T>();
        let there = found.len() == 0 || (!data.is_null() && data.is_aligned());
        if !there || !found.is_contiguous() {
            let strides: Vec<_> = found.extents().filter_map(|(_, stride)| stride).collect();
            return Err(layout_error(name, &shape[..dims], &strides));
        }
        Ok(Self { data, shape, dims, object: PhantomData })
    }

    fn of_array(name: &str, object: &Bound<'py, PyAny>, write: bool) -> PyResult<Self> {
        let array = object.cast::<PyUntypedArray>().map_err(|_| {
            let kind = object.get_type();
            PyTypeError::new_err(format!("{name} must be a numpy array, got {kind}"))
        })?;
        let typed = array.cast::<PyArrayDyn<T>>().map_err(|_| {
            let (got, wanted) = (array.dtype(), T::get_dtype(object.py()));
            PyTypeError::new_err(format!("{name} must be of dtype {wanted}, got {got}"))
        })?;
        if !array.is_aligned() || !array.is_c_contiguous() {
            return Err(layout_error(name, array.shape(), &array.strides()));
        }
        if write && !array.getattr("flags")?.getattr("writeable")?.is_truthy()? {
            return Err(PyValueError::new_err(format!("{name} is read-only")));
        }
        let dims = array.ndim();
        if dims > MAX_DIMS {
            return Err(PyValueError::new_err(format!("{name} has shape {:?}", array.shape())));
        }
        let mut shape = [1; MAX_DIMS];
        shape[..dims].copy_from_slice(array.shape());
        Ok(Self { data: typed.data(), shape, dims, object: PhantomData })
    }

    pub(super) fn shape(&self) -> &[usize] {
        &self.shape[..self.dims]
    }

    fn len(&self) -> usize {
        self.shape().iter().product()
    }

    pub(super) fn expect_shape(&self, name: &str, wanted: &[usize]) -> PyResult<()> {
        if self.shape() == wanted {
            return Ok(());
        }
        Err(PyValueError::new_err(format!(
            "{name} must have shape {wanted:?}, got {:?}",
            self.shape()
        )))
    }

    /// The elements, for reading.
    pub(super) fn slice(&self) -> &'py [T] {
        if self.len() == 0 {
            return &[];
        }
        // SAFETY: `new` checks type, alignment and contiguity of a live object's memory; nobody
        // writes it meanwhile, as the head of this file says and `disjoint` checks of this call.
        unsafe { std::slice::from_raw_parts(self.data, self.len()) }
    }

    /// The elements, for writing.
    ///
    /// # Safety
    /// Once a view, of views that are [`disjoint`].
    pub(super) unsafe fn slice_mut(&self) -> &'py mut [T] {
        if self.len() == 0 {
            return &mut [];
        }
        // SAFETY: as in `slice`; whoever calls vouches that no other slice overlaps. Memory that
        // nobody has written holds some number or other: torch and numpy hand it out as such.
        unsafe { std::slice::from_raw_parts_mut(self.data, self.len()) }
    }

    /// The addresses of the elements, for [`disjoint`].
    pub(super) fn range(&self) -> Range<usize> {
        let start = self.data.addr();
        start..start + self.len() * size_of::<T>()
    }
}

fn layout_error(name: &str, shape: &[usize], strides: &dyn std::fmt::Debug) -> PyErr {
    PyValueError::new_err(format!(
        "{name} must be aligned and C-contiguous, got shape {shape:?} with strides {strides:?}"
    ))
}

/// Checks that no output overlaps an input or another output.
pub(super) fn disjoint(
    inputs: impl IntoIterator<Item = Range<usize>>,
    outputs: impl IntoIterator<Item = Range<usize>>,
) -> PyResult<()> {
    let mut seen: Vec<_> = inputs.into_iter().collect();
    for output in outputs {
        if seen.iter().any(|other| output.start < other.end && other.start < output.end) {
            return Err(PyValueError::new_err("an output shares memory with another argument"));
        }
        seen.push(output);
    }
    Ok(())
}
