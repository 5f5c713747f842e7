//! Matrix products: which memory a call touches, how a library of column-major matrices sees it, and the way through
//! aligned scratch.
//!
//! **DET-2** An algorithm is chosen by shape and device type alone. A library would also look at the alignment of each
//! address; so operands that are not aligned are copied to scratch that is, and every product of one shape runs the same
//! algorithm wherever its operands lie. Tensors of a model lie aligned, and no copy is made.

use super::driver::{Address, Driver, GEMM_ALIGNMENT_BYTES, GemmKey};
use super::memory::CudaBuffer;
use super::stream::{CudaStream, Scratch};
use super::table::Element;
use crate::device::{DeviceError, Gemm, View};

/// A matrix as it is stored: rows of `columns` elements, `stride` apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Stored {
    pub rows: usize,
    pub columns: usize,
    pub stride: usize,
}

impl Stored {
    /// Elements from its first to behind its last.
    ///
    /// # Panics
    /// If rows overlap.
    pub fn span(&self) -> usize {
        if self.rows == 0 || self.columns == 0 {
            return 0;
        }
        assert!(self.stride >= self.columns, "rows of a matrix overlap: {self:?}");
        (self.rows - 1) * self.stride + self.columns
    }
}

/// A, B and C of a product, as they are stored.
pub(super) fn stored(call: &Gemm) -> [Stored; 3] {
    let matrix = |rows, columns, stride| Stored { rows, columns, stride };
    [
        if call.a_transposed {
            matrix(call.k, call.m, call.a_stride)
        } else {
            matrix(call.m, call.k, call.a_stride)
        },
        if call.b_transposed {
            matrix(call.n, call.k, call.b_stride)
        } else {
            matrix(call.k, call.n, call.b_stride)
        },
        matrix(call.m, call.n, call.c_stride),
    ]
}

/// One operand as a library of column-major matrices takes it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ColumnMajor {
    /// Rows as stored: consecutive elements.
    pub rows: usize,
    /// Columns as stored.
    pub columns: usize,
    /// Elements between columns.
    pub leading: usize,
    /// Whether the product reads its transpose.
    pub transposed: bool,
}

/// The same product in column-major terms: `Cᵀ = op(B)ᵀ · op(A)ᵀ`. A row-major matrix *is* its transpose in column-major
/// order, so B goes first and nothing moves. Returns the first operand (B), the second (A), and the result (C).
#[must_use]
pub fn column_major(key: &GemmKey) -> [ColumnMajor; 3] {
    let first = if key.b_transposed {
        [key.k, key.n]
    } else {
        [key.n, key.k]
    };
    let second = if key.a_transposed {
        [key.m, key.k]
    } else {
        [key.k, key.m]
    };
    let matrix = |[rows, columns]: [usize; 2], leading, transposed| ColumnMajor {
        rows,
        columns,
        leading,
        transposed,
    };
    [
        matrix(first, key.b_stride, key.b_transposed),
        matrix(second, key.a_stride, key.a_transposed),
        matrix([key.n, key.m], key.c_stride, false),
    ]
}

/// All that a product's algorithm is chosen by.
pub(super) const fn key(call: &Gemm, input: Element, output: Element) -> GemmKey {
    GemmKey {
        m: call.m,
        n: call.n,
        k: call.k,
        a_transposed: call.a_transposed,
        b_transposed: call.b_transposed,
        a_stride: call.a_stride,
        b_stride: call.b_stride,
        c_stride: call.c_stride,
        accumulate: call.accumulate,
        input,
        output,
    }
}

/// `C = alpha · op(A) · op(B)` or `C += …` on a stream.
///
/// # Errors
/// [`DeviceError::Unsupported`] for inputs of two precisions or a shape without an algorithm; memory and device errors.
pub(super) fn product<D: Driver>(
    stream: &mut CudaStream<D>,
    call: &Gemm,
    a: View<'_, CudaBuffer<D>>,
    b: View<'_, CudaBuffer<D>>,
    c: View<'_, CudaBuffer<D>>,
) -> Result<(), DeviceError> {
    let [a_stored, b_stored, c_stored] = stored(call);
    let spans = [a_stored.span(), b_stored.span(), c_stored.span()];
    let inputs = [a.buffer.element, b.buffer.element];
    if inputs[0] != inputs[1] {
        return Err(DeviceError::Unsupported {
            operation: "gemm",
            cause: format!("inputs of two precisions, {inputs:?}"),
        });
    }
    let addresses = [
        a.within(stream, spans[0]),
        b.within(stream, spans[1]),
        c.within(stream, spans[2]),
    ];
    if spans[2] == 0 {
        return stream.context().check("gemm");
    }
    if call.k == 0 {
        return no_terms(stream, call, addresses[2], c.buffer.element);
    }
    let key = key(call, inputs[0], c.buffer.element);
    let plan = stream.context().plan(&key)?;
    let bytes = [
        spans[0] * key.input.bytes(),
        spans[1] * key.input.bytes(),
        spans[2] * key.output.bytes(),
    ];
    // What lies between C's rows is kept as it is, so it comes along.
    let reads_c = call.accumulate || call.c_stride != call.n;
    let operands = [
        aligned(stream, Scratch::GemmA, addresses[0], bytes[0], true)?,
        aligned(stream, Scratch::GemmB, addresses[1], bytes[1], true)?,
        aligned(stream, Scratch::GemmC, addresses[2], bytes[2], reads_c)?,
    ];
    // SAFETY: the plan is this driver's; each operand was checked to lie within its buffer, or lies in scratch of its size,
    // and is aligned; buffers wait for the device before they are freed, and C is borrowed exclusively.
    unsafe { stream.product(&plan, &key, call.alpha, operands) }?;
    if operands[2] == addresses[2] {
        return Ok(());
    }
    // SAFETY: as above; scratch and buffers do not overlap.
    unsafe { stream.copy(addresses[2], operands[2], bytes[2]) }
}

/// The operand itself, or scratch with its contents.
fn aligned<D: Driver>(
    stream: &mut CudaStream<D>,
    kind: Scratch,
    address: Address,
    bytes: usize,
    with_contents: bool,
) -> Result<Address, DeviceError> {
    if address.is_aligned(GEMM_ALIGNMENT_BYTES) {
        return Ok(address);
    }
    let scratch = stream.scratch(kind, bytes)?;
    if with_contents {
        // SAFETY: the caller checked that the operand lies within its buffer; the scratch is as long and apart from it, and
        // is freed, like any buffer, when the device is done.
        unsafe { stream.copy(scratch, address, bytes) }?;
    }
    Ok(scratch)
}

/// Sums without terms are zero.
fn no_terms<D: Driver>(
    stream: &mut CudaStream<D>,
    call: &Gemm,
    c: Address,
    element: Element,
) -> Result<(), DeviceError> {
    if call.accumulate {
        return stream.context().check("gemm");
    }
    for row in 0..call.m {
        let at = c.further(row * call.c_stride * element.bytes());
        // SAFETY: C was checked to lie within its buffer, which is freed when the device is done.
        unsafe { stream.zero(at, call.n * element.bytes()) }?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The element `(row, column)` of `op(matrix)` in column-major order.
    fn at(matrix: &ColumnMajor, values: &[f64], row: usize, column: usize) -> f64 {
        let (row, column) = if matrix.transposed {
            (column, row)
        } else {
            (row, column)
        };
        assert!(row < matrix.rows && column < matrix.columns, "inside of {matrix:?}");
        values[column * matrix.leading + row]
    }

    fn numbers(len: usize, salt: usize) -> Vec<f64> {
        (0..len).map(|i| ((i * 7 + salt * 13) % 17) as f64 - 8.0).collect()
    }

    proptest! {
        /// The column-major reading of a row-major product is that product.
        #[test]
        fn nothing_moves(
            (m, n, k) in (1_usize..9, 1_usize..9, 1_usize..9),
            (a_transposed, b_transposed) in (any::<bool>(), any::<bool>()),
            gaps in [0_usize..3, 0_usize..3, 0_usize..3],
        ) {
            let call = Gemm {
                a_transposed,
                b_transposed,
                a_stride: if a_transposed { m } else { k } + gaps[0],
                b_stride: if b_transposed { k } else { n } + gaps[1],
                c_stride: n + gaps[2],
                ..Gemm::forward(m, n, k)
            };
            let [a_span, b_span, c_span] = stored(&call).map(|matrix| matrix.span());
            let (a, b, before) = (numbers(a_span, 1), numbers(b_span, 2), numbers(m * call.c_stride, 3));
            let (expected, _) = crate::conformance::reference::gemm(&call, &a, &b, &before);

            let key = GemmKey {
                m, n, k, a_transposed, b_transposed,
                a_stride: call.a_stride, b_stride: call.b_stride, c_stride: call.c_stride,
                accumulate: false, input: Element::Bf16, output: Element::F32,
            };
            let [first, second, result] = column_major(&key);
            prop_assert_eq!((result.rows, result.columns), (n, m));
            for row in 0..m {
                for column in 0..n {
                    let sum: f64 = (0..k).map(|i| at(&first, &b, column, i) * at(&second, &a, i, row)).sum();
                    prop_assert!(row * result.leading + column < c_span);
                    prop_assert_eq!(sum, expected[row * n + column]);
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "overlap")]
    fn overlapping_rows_are_a_mistake() {
        let _ = Stored {
            rows: 2,
            columns: 3,
            stride: 2,
        }
        .span();
    }

    #[test]
    fn an_empty_matrix_touches_nothing() {
        assert_eq!(
            Stored {
                rows: 0,
                columns: 3,
                stride: 0
            }
            .span(),
            0
        );
        assert_eq!(
            Stored {
                rows: 3,
                columns: 0,
                stride: 0
            }
            .span(),
            0
        );
    }
}
