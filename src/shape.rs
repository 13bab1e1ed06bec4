//! Validated shapes and convolution geometry. Padding is resolved here, before any loop; every
//! `unsafe` in `kernels` and `ops` rests on a fact proven here.

use std::fmt;

/// A shape that cannot be computed on, with the reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShapeError(pub String);

impl fmt::Display for ShapeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ShapeError {}

/// Builds a [`ShapeError`] as `format!` would.
macro_rules! shape_error {
    ($($arg:tt)*) => { $crate::shape::ShapeError(format!($($arg)*)) };
}
pub(crate) use shape_error;

/// A batch of planes: (N, C, H, W), every extent at least 1 and the element count at most
/// `isize::MAX / 8`, so that no offset into it overflows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batch {
    pub n: usize,
    pub c: usize,
    pub h: usize,
    pub w: usize,
}

impl Batch {
    /// The checked shape of a four-dimensional tensor.
    pub fn new(shape: &[usize]) -> Result<Self, ShapeError> {
        let &[n, c, h, w] = shape else {
            return Err(shape_error!("expected a shape (N, C, H, W), got {shape:?}"));
        };
        if shape.contains(&0) {
            return Err(shape_error!("every extent must be positive, got shape {shape:?}"));
        }
        shape
            .iter()
            .try_fold(1usize, |size, &extent| size.checked_mul(extent))
            .filter(|&size| size <= isize::MAX as usize / 8)
            .ok_or_else(|| shape_error!("shape {shape:?} is too large"))?;
        Ok(Self { n, c, h, w })
    }

    /// Elements of one plane.
    pub fn plane(&self) -> usize {
        self.h * self.w
    }

    /// Elements of the whole batch.
    pub fn size(&self) -> usize {
        self.n * self.c * self.plane()
    }

    /// The same extents as an array.
    pub fn dims(&self) -> [usize; 4] {
        [self.n, self.c, self.h, self.w]
    }
}

/// Kernel extents, stride, padding and dilation of a depthwise convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conv {
    pub kh: usize,
    pub kw: usize,
    pub stride: [usize; 2],
    /// Zeros added at the top, bottom, left and right.
    pub padding: [usize; 4],
    pub dilation: [usize; 2],
}

impl Conv {
    /// Stride 1, dilation 1, output of the input's size: k odd.
    pub fn same(k: usize) -> Result<Self, ShapeError> {
        if k.is_multiple_of(2) {
            return Err(shape_error!(
                "kernel size must be odd for an output of the same size, got {k}"
            ));
        }
        Ok(Self { kh: k, kw: k, stride: [1, 1], padding: [k / 2; 4], dilation: [1, 1] })
    }
}

/// A depthwise convolution of a batch: input, output and the zero-padded plane between them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    pub conv: Conv,
    pub input: Batch,
    /// Output height and width.
    pub oh: usize,
    pub ow: usize,
    /// Padded height and width: every tap of every output pixel lies inside them.
    pub ph: usize,
    pub pw: usize,
}

/// The largest stride, dilation, padding or kernel extent: far above any use, far below overflow.
const LIMIT: usize = 1 << 24;

impl Geometry {
    /// Resolves `conv` on `input`.
    pub fn new(input: Batch, conv: Conv) -> Result<Self, ShapeError> {
        let Conv { kh, kw, stride, padding, dilation } = conv;
        if kh == 0 || kw == 0 {
            return Err(shape_error!("kernel size must be positive, got {kh}×{kw}"));
        }
        if stride.contains(&0) || dilation.contains(&0) {
            return Err(shape_error!(
                "stride and dilation must be positive, got {stride:?} and {dilation:?}"
            ));
        }
        let extents = [kh, kw].into_iter().chain(stride).chain(padding).chain(dilation);
        if extents.into_iter().any(|extent| extent > LIMIT) {
            return Err(shape_error!("{conv:?} is too large"));
        }
        let (ph, pw) = (input.h + padding[0] + padding[1], input.w + padding[2] + padding[3]);
        let (eh, ew) = (dilation[0] * (kh - 1) + 1, dilation[1] * (kw - 1) + 1);
        if eh > ph || ew > pw {
            return Err(shape_error!(
                "kernel of extent {eh}×{ew} is larger than the padded input of {ph}×{pw}"
            ));
        }
        let (oh, ow) = ((ph - eh) / stride[0] + 1, (pw - ew) / stride[1] + 1);
        // Bounds the output, and the padded planes with the slack of a window's rows.
        Batch::new(&[input.n, input.c, oh, ow])?;
        Batch::new(&[1, 1, ph + 64, pw + 1024])?;
        Ok(Self { conv, input, oh, ow, ph, pw })
    }

    /// The output's shape.
    pub fn output(&self) -> Batch {
        Batch { n: self.input.n, c: self.input.c, h: self.oh, w: self.ow }
    }

    /// Whether the register-tiled kernels apply: stride and dilation 1.
    pub fn is_dense(&self) -> bool {
        self.conv.stride == [1, 1] && self.conv.dilation == [1, 1]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_shapes_are_named() {
        let message = |shape: &[usize]| Batch::new(shape).unwrap_err().to_string();
        assert!(message(&[1, 2, 3]).contains("[1, 2, 3]"));
        assert!(message(&[1, 2, 0, 3]).contains("[1, 2, 0, 3]"));
        assert!(message(&[usize::MAX, 2, 1, 3]).contains("too large"));
    }

    #[test]
    fn a_kernel_larger_than_its_input_is_refused() {
        let input = Batch::new(&[1, 1, 4, 4]).unwrap();
        let conv = Conv { kh: 5, kw: 5, stride: [1, 1], padding: [0; 4], dilation: [1, 1] };
        let message = Geometry::new(input, conv).unwrap_err().to_string();
        assert!(message.contains("5×5") && message.contains("4×4"), "{message}");
    }

    #[test]
    fn output_extents_follow_the_formula_of_conv2d() {
        let input = Batch::new(&[1, 1, 11, 14]).unwrap();
        let conv = Conv { kh: 3, kw: 4, stride: [2, 3], padding: [1, 0, 2, 1], dilation: [2, 1] };
        let geometry = Geometry::new(input, conv).unwrap();
        assert_eq!((geometry.oh, geometry.ow), (4, 5));
    }
}
