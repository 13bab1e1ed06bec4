//! Memory of the [`caching_allocator`] for torch's tensors, handed over as DLPack has it.

use std::ffi::{CStr, c_void};

use pyo3::exceptions::PyValueError;
use pyo3::ffi;
use pyo3::prelude::*;

use super::tensor::{DL_CPU, DL_FLOAT, DlTensor, MAX_DIMS};
use crate::caching_allocator::{self, Block, Purpose};

/// The name of a capsule whose tensor nobody has taken.
const UNTAKEN: &CStr = c"dltensor";

/// DLPack's `DLManagedTensor`, and what it points to.
#[repr(C)]
struct Managed {
    tensor: DlTensor,
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Managed)>,
    extents: [i64; MAX_DIMS],
    strides: [i64; MAX_DIMS],
    block: Block,
}

/// # Safety
/// `managed` must be of [`empty`], and nobody may use it again.
unsafe extern "C" fn delete(managed: *mut Managed) {
    // SAFETY: `empty` makes it from a box; the caller vouches for the rest. No Python, so that any thread may.
    drop(unsafe { Box::from_raw(managed) });
}

/// # Safety
/// Python calls it with the capsule, as it goes.
unsafe extern "C" fn delete_untaken(capsule: *mut ffi::PyObject) {
    // SAFETY: who takes the tensor renames the capsule, and calls its deleter.
    unsafe {
        if ffi::PyCapsule_IsValid(capsule, UNTAKEN.as_ptr()) != 0 {
            delete(ffi::PyCapsule_GetPointer(capsule, UNTAKEN.as_ptr()).cast());
        }
    }
}

/// A "dltensor" capsule with a tensor of this shape, of any content, float32 or `double`, contiguous or, with
/// `channels_last`, with its second dimension innermost; a [`Purpose::Result`] or `saved`. None where the
/// allocator has no block for it: below 8 MiB, say. ValueError for more dimensions than four, or fewer than two in
/// channels_last.
#[pyfunction]
pub fn empty(
    py: Python<'_>,
    shape: Vec<usize>,
    double: bool,
    channels_last: bool,
    saved: bool,
) -> PyResult<Option<Bound<'_, PyAny>>> {
    let dims = shape.len();
    if dims > MAX_DIMS || channels_last && dims < 2 {
        return Err(PyValueError::new_err(format!("shape has {dims} dimensions: {shape:?}")));
    }
    let purpose = if saved { Purpose::Saved } else { Purpose::Result };
    let bits: u8 = if double { 64 } else { 32 };
    let bytes = shape.iter().try_fold(usize::from(bits / 8), |bytes, &n| bytes.checked_mul(n));
    let Some(block) = bytes.and_then(|bytes| Block::new(bytes, purpose)) else {
        return Ok(None);
    };
    let (mut extents, mut strides) = ([1; MAX_DIMS], [1; MAX_DIMS]);
    let mut inner: Vec<_> = (0..dims).rev().collect();
    if channels_last {
        // Of (N, C, H, W): C, W, H, N.
        inner.retain(|&dim| dim != 1);
        inner.insert(0, 1);
    }
    let mut stride = 1;
    for dim in inner {
        (extents[dim], strides[dim]) = (shape[dim] as i64, stride);
        stride *= extents[dim];
    }
    let tensor = DlTensor {
        data: block.as_ptr().cast(),
        device_type: DL_CPU,
        device_id: 0,
        ndim: dims as i32,
        code: DL_FLOAT,
        bits,
        lanes: 1,
        shape: std::ptr::null(),
        strides: std::ptr::null(),
        byte_offset: 0,
    };
    let deleter = Some(delete as unsafe extern "C" fn(_));
    let context = std::ptr::null_mut();
    let managed = Managed { tensor, context, deleter, extents, strides, block };
    let managed = Box::into_raw(Box::new(managed));
    // SAFETY: the tensor stays where it is until its deleter is called: by who takes it, or by the capsule.
    unsafe {
        (*managed).tensor.shape = (&raw const (*managed).extents).cast();
        (*managed).tensor.strides = (&raw const (*managed).strides).cast();
        let capsule = ffi::PyCapsule_New(managed.cast(), UNTAKEN.as_ptr(), Some(delete_untaken));
        if capsule.is_null() {
            delete(managed);
        }
        Bound::from_owned_ptr_or_err(py, capsule).map(Some)
    }
}

/// Gives to the system the memory that is kept for tensors to come, and returns how many bytes that were.
#[pyfunction]
pub fn empty_cache(py: Python<'_>) -> usize {
    py.detach(caching_allocator::empty_cache)
}
