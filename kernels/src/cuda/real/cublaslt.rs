//! cuBLASLt: one pinned algorithm for each shape of matrix product (DET-2).
//!
//! The algorithm is the first that the library's heuristic offers under fixed limits: 16-byte alignment, one size of
//! workspace, and where a long sum is cut between blocks of threads, its parts are kept apart in the workspace, in f32, and added
//! in a step of their own (`CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE`; NVIDIA's cuBLAS manual, `cublasLtReductionScheme_t`): the
//! algorithm decides each sum's order, and no block's haste does, which `gpu-check` looks at. Schemes that add in place are not
//! taken. The heuristic is a function of library version, device and shape; the first two are part of the device's type.

use super::handle;
use crate::cuda::driver::{
    Absence, Address, DriverError, GEMM_ALIGNMENT_BYTES, GEMM_WORKSPACE_BYTES, GemmKey, GemmPlan, PlanId, Severity,
    StreamId,
};
use crate::cuda::gemm::{ColumnMajor, column_major};
use crate::cuda::table::Element;
use cudarc::cublaslt::sys::{self, cublasStatus_t};
use std::ffi::c_void;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// How many of the heuristic's offers are looked at.
const OFFERS_MAX: usize = 16;
/// `CUBLAS_OP_N` and `CUBLAS_OP_T`.
const OPERATIONS: [i32; 2] = [0, 1];

fn severity(status: cublasStatus_t) -> Severity {
    match status {
        cublasStatus_t::CUBLAS_STATUS_ALLOC_FAILED => Severity::OutOfMemory,
        cublasStatus_t::CUBLAS_STATUS_INVALID_VALUE
        | cublasStatus_t::CUBLAS_STATUS_ARCH_MISMATCH
        | cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED => Severity::Refused,
        // Not initialised, mapping, execution, internal, and whatever a later version adds: work may be half done.
        _ => Severity::Sticky,
    }
}

fn check(call: &'static str, status: cublasStatus_t) -> Result<(), DriverError> {
    if status == cublasStatus_t::CUBLAS_STATUS_SUCCESS {
        return Ok(());
    }
    Err(DriverError {
        call,
        severity: severity(status),
        name: format!("{status:?}"),
        detail: String::new(),
    })
}

const fn data_type(element: Element) -> Option<sys::cudaDataType> {
    match element {
        Element::Bf16 => Some(sys::cudaDataType::CUDA_R_16BF),
        Element::F32 => Some(sys::cudaDataType::CUDA_R_32F),
        _ => None,
    }
}

macro_rules! owned {
    ($(#[$doc:meta])* $name:ident($kind:ty) by $destroy:path) => {
        $(#[$doc])*
        struct $name($kind);

        impl Drop for $name {
            fn drop(&mut self) {
                // SAFETY: it was made by the library and is destroyed here alone.
                let _ = unsafe { $destroy(self.0) };
            }
        }
    };
}

owned!(
    /// What is computed.
    Operation(sys::cublasLtMatmulDesc_t) by sys::cublasLtMatmulDescDestroy
);
owned!(
    /// How an operand lies.
    Layout(sys::cublasLtMatrixLayout_t) by sys::cublasLtMatrixLayoutDestroy
);
owned!(
    /// The limits of a search.
    Limits(sys::cublasLtMatmulPreference_t) by sys::cublasLtMatmulPreferenceDestroy
);

impl Operation {
    fn new(first: &ColumnMajor, second: &ColumnMajor) -> Result<Self, DriverError> {
        let (compute, scale) = (
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            sys::cudaDataType::CUDA_R_32F,
        );
        let mut made = std::ptr::null_mut();
        // SAFETY: the target is valid for the write of a pointer.
        check("cublasLtMatmulDescCreate", unsafe {
            sys::cublasLtMatmulDescCreate(&raw mut made, compute, scale)
        })?;
        let made = Self(made);
        let attributes = [
            (sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA, first),
            (sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSB, second),
        ];
        for (attribute, matrix) in attributes {
            let value = OPERATIONS[usize::from(matrix.transposed)];
            // SAFETY: the descriptor is live, and the value is an int, as this attribute's is.
            check("cublasLtMatmulDescSetAttribute", unsafe {
                sys::cublasLtMatmulDescSetAttribute(made.0, attribute, (&raw const value).cast(), size_of::<i32>())
            })?;
        }
        Ok(made)
    }
}

impl Layout {
    fn new(matrix: &ColumnMajor, element: Element) -> Result<Self, DriverError> {
        let Some(kind) = data_type(element) else {
            return Err(refused(format!("a matrix of {element:?}")));
        };
        let mut made = std::ptr::null_mut();
        let (rows, columns) = (matrix.rows as u64, matrix.columns as u64);
        // SAFETY: the target is valid for the write of a pointer.
        check("cublasLtMatrixLayoutCreate", unsafe {
            sys::cublasLtMatrixLayoutCreate(&raw mut made, kind, rows, columns, matrix.leading as i64)
        })?;
        Ok(Self(made))
    }
}

impl Limits {
    fn new() -> Result<Self, DriverError> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let mut made = std::ptr::null_mut();
        // SAFETY: the target is valid for the write of a pointer.
        check("cublasLtMatmulPreferenceCreate", unsafe {
            sys::cublasLtMatmulPreferenceCreate(&raw mut made)
        })?;
        let made = Self(made);
        let set = |attribute, value: *const c_void, bytes| {
            // SAFETY: the preference is live, and the value has the attribute's type and lives until the call returns.
            check("cublasLtMatmulPreferenceSetAttribute", unsafe {
                sys::cublasLtMatmulPreferenceSetAttribute(made.0, attribute, value, bytes)
            })
        };
        let workspace = GEMM_WORKSPACE_BYTES as u64;
        set(
            Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
            (&raw const workspace).cast(),
            size_of::<u64>(),
        )?;
        // A mask of allowed schemes, besides none.
        let schemes = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
        set(
            Attribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
            (&raw const schemes).cast(),
            size_of::<u32>(),
        )?;
        let alignment = GEMM_ALIGNMENT_BYTES as u32;
        for attribute in [
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        ] {
            set(attribute, (&raw const alignment).cast(), size_of::<u32>())?;
        }
        Ok(made)
    }
}

fn refused(detail: String) -> DriverError {
    DriverError {
        call: "cublasLtMatmulAlgoGetHeuristic",
        severity: Severity::Refused,
        name: "CUBLAS_STATUS_NOT_SUPPORTED".to_owned(),
        detail,
    }
}

/// One planned product.
struct Plan {
    operation: Operation,
    layouts: [Layout; 3],
    algorithm: sys::cublasLtMatmulAlgo_t,
    workspace_bytes: usize,
    /// 1 to add to C, else 0.
    beta: f32,
}

// SAFETY: a plan does not change once it is made; the library only reads its descriptors.
unsafe impl Send for Plan {}
// SAFETY: as above.
unsafe impl Sync for Plan {}

/// The library with its plans.
pub(super) struct CublasLt {
    handle: sys::cublasLtHandle_t,
    plans: Mutex<Vec<Arc<Plan>>>,
}

// SAFETY: NVIDIA's manual (cuBLAS, thread safety) allows one handle in many threads, and the list of plans is locked.
unsafe impl Send for CublasLt {}
// SAFETY: as above.
unsafe impl Sync for CublasLt {}

impl Drop for CublasLt {
    fn drop(&mut self) {
        self.lock().clear();
        // SAFETY: the handle was made by the library and is destroyed here alone, after all that was made with it.
        let _ = unsafe { sys::cublasLtDestroy(self.handle) };
    }
}

/// The library's version, e.g. `130002`, if it is there.
pub(super) fn version() -> Result<String, Absence> {
    // SAFETY: it tries to open a library by its names; that runs the library's initialisers, as any use of it does.
    if !unsafe { sys::is_culib_present() } {
        let library = "libcublasLt.so";
        return Err(Absence::Library { library });
    }
    // SAFETY: the library is there; the call takes nothing and returns a number.
    Ok(unsafe { sys::cublasLtGetVersion() }.to_string())
}

impl CublasLt {
    /// Opens the library, which is there, for the device whose context is current.
    pub fn open() -> Result<Self, DriverError> {
        let mut made = std::ptr::null_mut();
        // SAFETY: the target is valid for the write of a pointer, and a context is current.
        check("cublasLtCreate", unsafe { sys::cublasLtCreate(&raw mut made) })?;
        Ok(Self {
            handle: made,
            plans: Mutex::default(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Plan>>> {
        self.plans.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Chooses an algorithm and keeps it.
    pub fn plan(&self, key: &GemmKey) -> Result<GemmPlan, DriverError> {
        let [first, second, result] = column_major(key);
        let operation = Operation::new(&first, &second)?;
        let layouts = [
            Layout::new(&first, key.input)?,
            Layout::new(&second, key.input)?,
            Layout::new(&result, key.output)?,
        ];
        let limits = Limits::new()?;
        let (algorithm, workspace_bytes, text) = self.choose(&operation, &layouts, &limits)?;
        let beta = if key.accumulate { 1.0 } else { 0.0 };
        let plan = Plan {
            operation,
            layouts,
            algorithm,
            workspace_bytes,
            beta,
        };
        let mut plans = self.lock();
        plans.push(Arc::new(plan));
        Ok(GemmPlan {
            id: PlanId(plans.len() as u64 - 1),
            algorithm: text,
            workspace_bytes,
        })
    }

    /// The first offer that keeps to the limits, with its workspace and its attributes as text.
    fn choose(
        &self,
        operation: &Operation,
        [first, second, result]: &[Layout; 3],
        limits: &Limits,
    ) -> Result<(sys::cublasLtMatmulAlgo_t, usize, String), DriverError> {
        let nothing = sys::cublasLtMatmulHeuristicResult_t {
            algo: sys::cublasLtMatmulAlgo_t { data: [0; 8] },
            workspaceSize: 0,
            state: cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED,
            wavesCount: 0.0,
            reserved: [0; 4],
        };
        let mut offers = [nothing; OFFERS_MAX];
        let mut count = 0;
        // SAFETY: all descriptors are live, and the array has as many entries as is said.
        check("cublasLtMatmulAlgoGetHeuristic", unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                operation.0,
                first.0,
                second.0,
                result.0,
                result.0,
                limits.0,
                OFFERS_MAX as i32,
                offers.as_mut_ptr(),
                &raw mut count,
            )
        })?;
        let count = usize::try_from(count).unwrap_or(0).min(OFFERS_MAX);
        for offer in &offers[..count] {
            let attributes = Attributes::read(&offer.algo)?;
            if offer.state == cublasStatus_t::CUBLAS_STATUS_SUCCESS
                && offer.workspaceSize <= GEMM_WORKSPACE_BYTES
                && attributes.has_one_order()
            {
                return Ok((offer.algo, offer.workspaceSize, format!("{attributes:?}")));
            }
        }
        Err(refused(format!("{count} offers, none whose sums have one order")))
    }

    /// Runs a planned product.
    ///
    /// # Safety
    /// As [`crate::cuda::driver::Driver::gemm`].
    pub unsafe fn run(
        &self,
        stream: StreamId,
        plan: &GemmPlan,
        alpha: f32,
        [a, b, c]: [Address; 3],
        workspace: Address,
    ) -> Result<(), DriverError> {
        let found = usize::try_from(plan.id.0)
            .ok()
            .and_then(|id| self.lock().get(id).cloned());
        let Some(plan) = found else {
            return Err(refused("a plan of another driver".to_owned()));
        };
        let [first, second, result] = &plan.layouts;
        let c = handle::<c_void>(c.0);
        // SAFETY: descriptors are live; the factors are f32, as the scale type says, and are read before the call returns
        // (host pointer mode); addresses and workspace are the caller's promise. C is both input and output, as the
        // library allows for one layout.
        check("cublasLtMatmul", unsafe {
            sys::cublasLtMatmul(
                self.handle,
                plan.operation.0,
                (&raw const alpha).cast(),
                handle(b.0),
                first.0,
                handle(a.0),
                second.0,
                (&raw const plan.beta).cast(),
                c,
                result.0,
                c,
                result.0,
                &raw const plan.algorithm,
                handle(workspace.0),
                plan.workspace_bytes,
                handle(stream.0),
            )
        })
    }
}

/// What decides an algorithm's order of operations. Its debug text is what reports compare.
#[derive(Debug)]
#[allow(dead_code, reason = "most are only printed")]
struct Attributes {
    id: u64,
    tile: u64,
    stages: u64,
    split_k: u64,
    reduction: u64,
    swizzling: u64,
    custom: u64,
    inner_shape: u64,
    cluster_shape: u64,
}

impl Attributes {
    fn read(algorithm: &sys::cublasLtMatmulAlgo_t) -> Result<Self, DriverError> {
        use sys::cublasLtMatmulAlgoConfigAttributes_t as Attribute;
        let get = |attribute, bytes: usize| {
            let mut value = [0_u8; size_of::<u64>()];
            let mut written = 0;
            // SAFETY: the algorithm is the library's own, and the target has the attribute's size.
            check("cublasLtMatmulAlgoConfigGetAttribute", unsafe {
                sys::cublasLtMatmulAlgoConfigGetAttribute(
                    algorithm,
                    attribute,
                    value.as_mut_ptr().cast(),
                    bytes,
                    &raw mut written,
                )
            })?;
            Ok(u64::from_le_bytes(value))
        };
        let (short, word) = (size_of::<u16>(), size_of::<u32>());
        Ok(Self {
            id: get(Attribute::CUBLASLT_ALGO_CONFIG_ID, word)?,
            tile: get(Attribute::CUBLASLT_ALGO_CONFIG_TILE_ID, word)?,
            stages: get(Attribute::CUBLASLT_ALGO_CONFIG_STAGES_ID, word)?,
            split_k: get(Attribute::CUBLASLT_ALGO_CONFIG_SPLITK_NUM, word)?,
            reduction: get(Attribute::CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME, word)?,
            swizzling: get(Attribute::CUBLASLT_ALGO_CONFIG_CTA_SWIZZLING, word)?,
            custom: get(Attribute::CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION, word)?,
            inner_shape: get(Attribute::CUBLASLT_ALGO_CONFIG_INNER_SHAPE_ID, short)?,
            cluster_shape: get(Attribute::CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID, short)?,
        })
    }

    /// No sum is cut between blocks of threads, or its parts are added in a step of their own.
    const fn has_one_order(&self) -> bool {
        use sys::cublasLtReductionScheme_t as Scheme;
        let whole = self.reduction == Scheme::CUBLASLT_REDUCTION_SCHEME_NONE as u64 && self.split_k <= 1;
        whole || self.reduction == Scheme::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u64
    }
}
