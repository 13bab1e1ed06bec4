//! The machine's limits.

use std::collections::BTreeMap;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::machine;

/// The most threads and mebibytes that are measured: beyond, it is a mistake.
const MOST: usize = 1 << 16;

fn check(threads: usize, seconds: f64) -> PyResult<()> {
    if threads > MOST {
        return Err(PyValueError::new_err(format!(
            "threads must be at most {MOST}, not {threads}"
        )));
    }
    if !seconds.is_finite() || seconds < 0.0 {
        return Err(PyValueError::new_err(format!("seconds must be at least 0, not {seconds}")));
    }
    Ok(())
}

/// Float32 operations per second of fused multiply-adds on registers, the best in `seconds`.
///
/// On `threads` threads (0: the default) of the instruction set in use. Raises ValueError for a
/// negative or infinite time.
#[pyfunction]
pub fn fma_peak(py: Python<'_>, threads: usize, seconds: f64) -> PyResult<f64> {
    check(threads, seconds)?;
    Ok(py.detach(|| machine::fma_peak(threads, seconds)))
}

/// Bytes per second to and from memory, the best in `seconds`: {"read": …, "copy": …}.
///
/// `threads` threads (0: the default) go together over two buffers of `mib` mebibytes each; a copy
/// counts what it reads and what it writes. Raises ValueError for a negative or infinite time and
/// for sizes out of range.
#[pyfunction]
pub fn memory_bandwidth(
    py: Python<'_>,
    threads: usize,
    seconds: f64,
    mib: usize,
) -> PyResult<BTreeMap<&'static str, f64>> {
    check(threads, seconds)?;
    if !(1..=MOST).contains(&mib) {
        return Err(PyValueError::new_err(format!("mib must be from 1 to {MOST}, not {mib}")));
    }
    let found = py.detach(|| machine::bandwidth(threads, seconds, mib));
    Ok(BTreeMap::from([("read", found.read), ("copy", found.copy)]))
}
