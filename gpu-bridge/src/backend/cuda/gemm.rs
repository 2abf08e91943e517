//! Matrix products by cuBLASLt whose rows do not depend on each other.
//!
//! cuBLASLt chooses an algorithm by the number of rows, and some split the sum; then a row's bits would depend on what is computed beside it,
//! and a cached prefix would not equal a computed one. Here one algorithm without a split sum is chosen for each matrix, at a fixed number of
//! rows, and used for every number: an element is then one sum in one order.

use super::memory::{CudaMemory, Part};
use super::stream::CudaStream;
use crate::DeviceError;
use cairn_kernels::cuda::ActType;
use cudarc::cublaslt::sys;
use std::ffi::c_void;
use std::sync::Arc;

/// Rows for which algorithms are chosen: enough to fill tensor cores, few enough that an answer's single rows are not all padding.
const CHOSEN_AT_ROWS: u64 = 64;

/// Memory that an algorithm may use beside its operands.
const WORKSPACE_BYTES: usize = 32 << 20;

/// What operands are aligned to: see [`Part`].
const ALIGNMENT: u32 = 16;

/// Algorithms that are looked at for each matrix.
const CANDIDATES: usize = 16;

fn check(operation: &'static str, status: sys::cublasStatus_t) -> Result<(), DeviceError> {
    if status == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS {
        return Ok(());
    }
    let text = format!("{operation}: {status:?}");
    // After this one the context is of no use, as with a kernel of ours that fails.
    if status == sys::cublasStatus_t::CUBLAS_STATUS_EXECUTION_FAILED {
        return Err(DeviceError::Lost(text));
    }
    Err(DeviceError::Failed(text))
}

const fn data_type(act: ActType) -> sys::cudaDataType {
    match act {
        ActType::F32 => sys::cudaDataType::CUDA_R_32F,
        ActType::Bf16 => sys::cudaDataType::CUDA_R_16BF,
        ActType::F16 => sys::cudaDataType::CUDA_R_16F,
    }
}

struct Handle(sys::cublasLtHandle_t);

// SAFETY: the library lets any thread use a handle.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: made in `Gemm::new`.
        let _ = unsafe { sys::cublasLtDestroy(self.0) };
    }
}

struct Layout(sys::cublasLtMatrixLayout_t);

impl Layout {
    /// `rows` of `width` consecutive elements: columns, in the library's words.
    fn new(kind: sys::cudaDataType, width: u64, rows: u64) -> Result<Self, DeviceError> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: the layout is written.
        let status = unsafe { sys::cublasLtMatrixLayoutCreate(&mut raw, kind, width, rows, width as i64) };
        check("cublasLtMatrixLayoutCreate", status)?;
        Ok(Self(raw))
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: made in `new`.
        let _ = unsafe { sys::cublasLtMatrixLayoutDestroy(self.0) };
    }
}

struct Operation(sys::cublasLtMatmulDesc_t);

// SAFETY: a description is only read after it was made.
unsafe impl Send for Operation {}
// SAFETY: as above.
unsafe impl Sync for Operation {}

impl Operation {
    fn new() -> Result<Self, DeviceError> {
        use sys::cublasLtMatmulDescAttributes_t::{CUBLASLT_MATMUL_DESC_TRANSA, CUBLASLT_MATMUL_DESC_TRANSB};
        let mut raw = std::ptr::null_mut();
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        // SAFETY: the description is written.
        check("cublasLtMatmulDescCreate", unsafe {
            sys::cublasLtMatmulDescCreate(&mut raw, compute, sys::cudaDataType::CUDA_R_32F)
        })?;
        let made = Self(raw);
        // CUBLAS_OP_T and CUBLAS_OP_N.
        let (transposed, plain) = (1i32, 0i32);
        for (attribute, value) in
            [(CUBLASLT_MATMUL_DESC_TRANSA, transposed), (CUBLASLT_MATMUL_DESC_TRANSB, plain)]
        {
            let at: *const c_void = std::ptr::from_ref(&value).cast();
            // SAFETY: one value of this attribute's type.
            check("cublasLtMatmulDescSetAttribute", unsafe {
                sys::cublasLtMatmulDescSetAttribute(made.0, attribute, at, size_of_val(&value))
            })?;
        }
        Ok(made)
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        // SAFETY: made in `new`.
        let _ = unsafe { sys::cublasLtMatmulDescDestroy(self.0) };
    }
}

struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    /// So much workspace, and no split sums.
    fn new() -> Result<Self, DeviceError> {
        use sys::cublasLtMatmulPreferenceAttributes_t::*;
        let mut raw = std::ptr::null_mut();
        // SAFETY: the preference is written.
        check("cublasLtMatmulPreferenceCreate", unsafe { sys::cublasLtMatmulPreferenceCreate(&mut raw) })?;
        let made = Self(raw);
        let (workspace, schemes, alignment) = (WORKSPACE_BYTES, 0u32, ALIGNMENT);
        let aligned: *const c_void = std::ptr::from_ref(&alignment).cast();
        let values: [(_, *const c_void, usize); 6] = [
            (CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, aligned, size_of::<u32>()),
            (CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, aligned, size_of::<u32>()),
            (CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, aligned, size_of::<u32>()),
            (CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, aligned, size_of::<u32>()),
            (
                CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                std::ptr::from_ref(&workspace).cast(),
                size_of::<usize>(),
            ),
            (
                CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                std::ptr::from_ref(&schemes).cast(),
                size_of::<u32>(),
            ),
        ];
        for (attribute, at, bytes) in values {
            // SAFETY: one value of this attribute's type.
            check("cublasLtMatmulPreferenceSetAttribute", unsafe {
                sys::cublasLtMatmulPreferenceSetAttribute(made.0, attribute, at, bytes)
            })?;
        }
        Ok(made)
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: made in `new`.
        let _ = unsafe { sys::cublasLtMatmulPreferenceDestroy(self.0) };
    }
}

/// Products on one stream, which share a workspace.
pub struct Gemm {
    stream: Arc<CudaStream>,
    handle: Handle,
    operation: Operation,
    workspace: CudaMemory,
    act: ActType,
}

/// A weight matrix on the device: `outputs` rows of `inputs` elements, and the algorithm that is used for it.
pub struct Weight {
    memory: CudaMemory,
    outputs: usize,
    inputs: usize,
    algorithm: sys::cublasLtMatmulAlgo_t,
    act: ActType,
}

impl Weight {
    /// Rows.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Elements of a row.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Its elements.
    pub fn memory(&self) -> &CudaMemory {
        &self.memory
    }
}

/// Whether an algorithm cuts the sum in parts that are added in an order of their own.
fn splits(algorithm: &sys::cublasLtMatmulAlgo_t) -> Result<bool, DeviceError> {
    use sys::cublasLtMatmulAlgoConfigAttributes_t::{
        CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME, CUBLASLT_ALGO_CONFIG_SPLITK_NUM,
    };
    let mut found = [0u32; 2];
    for (value, attribute) in
        found.iter_mut().zip([CUBLASLT_ALGO_CONFIG_SPLITK_NUM, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME])
    {
        let (at, mut written) = (std::ptr::from_mut(value).cast(), 0);
        // SAFETY: one number of four bytes is written.
        check("cublasLtMatmulAlgoConfigGetAttribute", unsafe {
            sys::cublasLtMatmulAlgoConfigGetAttribute(
                algorithm,
                attribute,
                at,
                size_of::<u32>(),
                &mut written,
            )
        })?;
    }
    Ok(found[0] > 1 || found[1] != 0)
}

/// Whether libcublasLt is on this host.
pub fn cublaslt_is_here() -> bool {
    // SAFETY: loads a library by name, as a process linked with it would.
    unsafe { sys::is_culib_present() }
}

impl Gemm {
    /// # Errors
    /// When the library is missing or refuses.
    pub fn new(stream: Arc<CudaStream>, act: ActType) -> Result<Arc<Self>, DeviceError> {
        if !cublaslt_is_here() {
            let text = "libcublasLt is not here: install CUDA's cuBLAS (Python package nvidia-cublas) and put its folder on LD_LIBRARY_PATH";
            return Err(DeviceError::Failed(text.into()));
        }
        stream.enter()?;
        let context = stream.device().context();
        let mut raw = std::ptr::null_mut();
        // SAFETY: the handle is written.
        check("cublasLtCreate", unsafe { sys::cublasLtCreate(&mut raw) })?;
        let handle = Handle(raw);
        let workspace = CudaMemory::allocate(context, WORKSPACE_BYTES)?;
        Ok(Arc::new(Self { stream, handle, operation: Operation::new()?, workspace, act }))
    }

    /// Takes a matrix that is on the device already, and chooses how it is multiplied.
    ///
    /// # Errors
    /// When it is too small or no algorithm will do.
    pub fn weight(&self, memory: CudaMemory, outputs: usize, inputs: usize) -> Result<Weight, DeviceError> {
        if !memory.is_of(self.stream.device().context()) {
            return Err(DeviceError::Failed("a matrix of another device".into()));
        }
        memory.all().holding(outputs * inputs * self.act.bytes())?;
        self.stream.enter()?;
        let algorithm = self.choose(outputs as u64, inputs as u64, CHOSEN_AT_ROWS)?;
        Ok(Weight { memory, outputs, inputs, algorithm, act: self.act })
    }

    fn layouts(&self, outputs: u64, inputs: u64, rows: u64) -> Result<[Layout; 3], DeviceError> {
        let kind = data_type(self.act);
        let of_result = Layout::new(sys::cudaDataType::CUDA_R_32F, outputs, rows)?;
        Ok([Layout::new(kind, inputs, outputs)?, Layout::new(kind, inputs, rows)?, of_result])
    }

    fn choose(&self, outputs: u64, inputs: u64, rows: u64) -> Result<sys::cublasLtMatmulAlgo_t, DeviceError> {
        let [a, b, d] = self.layouts(outputs, inputs, rows)?;
        let preference = Preference::new()?;
        // SAFETY: plain numbers, for which zeros are valid (a status of 0 is success).
        let mut found: [sys::cublasLtMatmulHeuristicResult_t; CANDIDATES] = unsafe { std::mem::zeroed() };
        let mut count = 0;
        // SAFETY: at most so many results are written.
        check("cublasLtMatmulAlgoGetHeuristic", unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle.0,
                self.operation.0,
                a.0,
                b.0,
                d.0,
                d.0,
                preference.0,
                CANDIDATES as i32,
                found.as_mut_ptr(),
                &mut count,
            )
        })?;
        // It must also do for a single row and for many.
        for candidate in &found[..count.unsigned_abs() as usize] {
            if !splits(&candidate.algo)?
                && self.does(&candidate.algo, outputs, inputs, 1)?
                && self.does(&candidate.algo, outputs, inputs, 4096)?
            {
                return Ok(candidate.algo);
            }
        }
        Err(DeviceError::Failed(format!(
            "no algorithm multiplies {outputs} x {inputs} for every number of rows"
        )))
    }

    fn does(
        &self,
        algorithm: &sys::cublasLtMatmulAlgo_t,
        outputs: u64,
        inputs: u64,
        rows: u64,
    ) -> Result<bool, DeviceError> {
        let [a, b, d] = self.layouts(outputs, inputs, rows)?;
        // SAFETY: plain numbers, for which zeros are valid.
        let mut result: sys::cublasLtMatmulHeuristicResult_t = unsafe { std::mem::zeroed() };
        // SAFETY: one result is written.
        let status = unsafe {
            sys::cublasLtMatmulAlgoCheck(
                self.handle.0,
                self.operation.0,
                a.0,
                b.0,
                d.0,
                d.0,
                algorithm,
                &mut result,
            )
        };
        let good = status == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS;
        Ok(good && result.workspaceSize <= WORKSPACE_BYTES)
    }

    /// `y = x . weightT`: `rows` of `inputs` elements in the format of products give `rows` of `outputs` in single precision.
    ///
    /// # Errors
    /// When a buffer is too small or the device refuses.
    pub fn multiply(
        &self,
        weight: &Weight,
        x: &Part<'_>,
        rows: usize,
        y: &Part<'_>,
    ) -> Result<(), DeviceError> {
        let (outputs, inputs, stream) = (weight.outputs, weight.inputs, &self.stream);
        if weight.act != self.act || !weight.memory.is_of(stream.device().context()) {
            return Err(DeviceError::Failed("a matrix of another format or device".into()));
        }
        let from = x.holding(rows * inputs * self.act.bytes())?;
        let to = y.holding(rows * outputs * 4)?;
        if rows == 0 {
            return Ok(());
        }
        let [a, b, d] = self.layouts(outputs as u64, inputs as u64, rows as u64)?;
        let (one, none) = (1f32, 0f32);
        stream.enter()?;
        // SAFETY: the operands hold what their layouts say, the workspace as much as was promised; all of it is kept.
        let multiplied = check("cublasLtMatmul", unsafe {
            sys::cublasLtMatmul(
                self.handle.0,
                self.operation.0,
                std::ptr::from_ref(&one).cast(),
                weight.memory.all().holding(0)? as *const c_void,
                a.0,
                from as *const c_void,
                b.0,
                std::ptr::from_ref(&none).cast(),
                to as *const c_void,
                d.0,
                to as *mut c_void,
                d.0,
                &weight.algorithm,
                self.workspace.all().holding(0)? as *mut c_void,
                WORKSPACE_BYTES,
                stream.raw().cast(),
            )
        });
        stream.keep((weight.memory.clone(), x.memory.clone(), y.memory.clone(), self.workspace.clone()))?;
        multiplied
    }
}
