//! Matrix products by cuBLASLt whose rows do not depend on each other.
//!
//! cuBLASLt chooses an algorithm by the number of rows, and some split the sum; then a row's bits would depend on what is computed beside it,
//! and a cached prefix would not equal a computed one. Here one algorithm without a split sum is chosen for each shape of matrix, at a fixed
//! number of rows, and used for every number: an element is then one sum in one order. Many rows get a second one, with larger tiles, if
//! there is one that adds in the same order: random numbers multiplied by both show it, bit by bit.

use super::memory::{CudaMemory, Part};
use super::stream::CudaStream;
use crate::DeviceError;
use cairn_kernels::cuda::ActType;
use cudarc::cublaslt::sys;
use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Rows for which algorithms are chosen: enough to fill tensor cores, few enough that an answer's single rows are not all padding. The
/// later ones are for matrices to which none of the first's candidates will do.
const CHOSEN_AT_ROWS: [u64; 4] = [64, 16, 128, 256];

/// An algorithm must do for all of these.
const ROWS: [u64; 3] = [1, 64, 4096];

/// Rows from which a second algorithm is used, those that it is chosen for, and those that it must do for.
const MANY_ROWS: usize = 256;
const CHOSEN_AT_MANY: u64 = 2048;
const MANY: [u64; 3] = [MANY_ROWS as u64, CHOSEN_AT_MANY, 4096];

/// Outputs of the product that compares two algorithms.
const PROBED_OUTPUTS: usize = 512;

/// Memory that an algorithm may use beside its operands.
const WORKSPACE_BYTES: usize = 32 << 20;

/// What operands are aligned to: see [`Part`].
const ALIGNMENT: u32 = 16;

/// Algorithms that are looked at for each matrix.
const CANDIDATES: usize = 32;

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

type Algorithm = sys::cublasLtMatmulAlgo_t;

/// How matrices of one shape are multiplied: few rows, and many.
#[derive(Clone, Copy)]
struct Algorithms {
    few: Algorithm,
    many: Algorithm,
}

struct Handle(sys::cublasLtHandle_t);

// SAFETY: the library lets any thread use a handle.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

/// The library's own end is for the device that is current then: it must be this one.
impl Drop for Gemm {
    fn drop(&mut self) {
        if self.stream.enter().is_ok() {
            // SAFETY: made in `Gemm::new`, and used by nothing else.
            let _ = unsafe { sys::cublasLtDestroy(self.handle.0) };
        }
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
    /// By outputs and inputs.
    chosen: Mutex<HashMap<(usize, usize), Algorithms>>,
}

/// A weight matrix on the device: `outputs` rows of `inputs` elements, and the algorithms that are used for it.
pub struct Weight {
    memory: CudaMemory,
    outputs: usize,
    inputs: usize,
    algorithms: Algorithms,
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

    /// Whether many rows are multiplied by another algorithm than few.
    pub fn has_two(&self) -> bool {
        self.algorithms.few.data != self.algorithms.many.data
    }

    /// Its elements.
    pub fn memory(&self) -> &CudaMemory {
        &self.memory
    }
}

/// Whether an algorithm cuts the sum in parts that are added in an order of their own.
fn splits(algorithm: &Algorithm) -> Result<bool, DeviceError> {
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

/// Numbers below one, of either sign, in the format of products. Their magnitudes are so far apart that sums of their products must round,
/// or the order of the sums would not show.
fn random(act: ActType, seed: u64, count: usize) -> Vec<u8> {
    let mut state = seed;
    // SplitMix64 (Steele, Lea and Flood 2014).
    let mut next = move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    };
    // Sign, exponents of 1/2 down to 1/4096, and a mantissa.
    let mut number = |one: u32, mantissa_bits: u32| {
        let bits = next();
        let (sign, below) = ((bits >> 63) as u32, 1 + (bits >> 32) as u32 % 12);
        (sign, one - (below << mantissa_bits) + (bits as u32 & ((1 << mantissa_bits) - 1)))
    };
    let mut bytes = Vec::with_capacity(count * act.bytes());
    for _ in 0..count {
        match act {
            ActType::F32 => {
                let (sign, rest) = number(0x3f80_0000, 23);
                bytes.extend((sign << 31 | rest).to_le_bytes());
            }
            ActType::Bf16 => {
                let (sign, rest) = number(0x3f80, 7);
                bytes.extend(((sign << 15 | rest) as u16).to_le_bytes());
            }
            ActType::F16 => {
                let (sign, rest) = number(0x3c00, 10);
                bytes.extend(((sign << 15 | rest) as u16).to_le_bytes());
            }
        }
    }
    bytes
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
        let workspace = CudaMemory::allocate(context, WORKSPACE_BYTES)?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: the handle is written.
        check("cublasLtCreate", unsafe { sys::cublasLtCreate(&mut raw) })?;
        let operation = Operation::new().inspect_err(|_| {
            // SAFETY: just made, and nobody has it.
            let _ = unsafe { sys::cublasLtDestroy(raw) };
        })?;
        let chosen = Mutex::default();
        Ok(Arc::new(Self { stream, handle: Handle(raw), operation, workspace, act, chosen }))
    }

    /// Takes a matrix that is on the device already, and chooses how it is multiplied.
    ///
    /// # Errors
    /// When it is too small or no algorithm will do.
    pub fn weight(&self, memory: CudaMemory, outputs: usize, inputs: usize) -> Result<Weight, DeviceError> {
        self.stream.enter()?;
        let known = self.chosen().get(&(outputs, inputs)).copied();
        let algorithms = match known {
            Some(algorithms) => algorithms,
            None => {
                let few = self.choose(outputs as u64, inputs as u64)?;
                let many = match self.choose_for_many(&few, outputs, inputs) {
                    Ok(many) => many.unwrap_or(few),
                    Err(error @ DeviceError::Lost(_)) => return Err(error),
                    Err(error) => {
                        tracing::debug!(%error, outputs, inputs, "no second algorithm for many rows");
                        few
                    }
                };
                *self.chosen().entry((outputs, inputs)).or_insert(Algorithms { few, many })
            }
        };
        self.weight_by(memory, (outputs, inputs), algorithms)
    }

    /// As [`Self::weight`], by whatever the library thinks best for so many rows: a row's bits then depend on what it is told. For
    /// comparison.
    ///
    /// # Errors
    /// As there.
    pub fn weight_for(
        &self,
        memory: CudaMemory,
        outputs: usize,
        inputs: usize,
        rows: usize,
    ) -> Result<Weight, DeviceError> {
        self.stream.enter()?;
        let best = self.candidates(outputs as u64, inputs as u64, rows as u64)?.first().copied();
        let best = best.ok_or_else(|| DeviceError::Failed(format!("no algorithm for {rows} rows")))?;
        self.weight_by(memory, (outputs, inputs), Algorithms { few: best, many: best })
    }

    fn weight_by(
        &self,
        memory: CudaMemory,
        (outputs, inputs): (usize, usize),
        algorithms: Algorithms,
    ) -> Result<Weight, DeviceError> {
        if !memory.is_of(self.stream.device().context()) {
            return Err(DeviceError::Failed("a matrix of another device".into()));
        }
        memory.all().holding(outputs * inputs * self.act.bytes())?;
        Ok(Weight { memory, outputs, inputs, algorithms, act: self.act })
    }

    /// An insertion is whole even if something else panicked.
    fn chosen(&self) -> MutexGuard<'_, HashMap<(usize, usize), Algorithms>> {
        self.chosen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn layouts(&self, outputs: u64, inputs: u64, rows: u64) -> Result<[Layout; 3], DeviceError> {
        let kind = data_type(self.act);
        let of_result = Layout::new(sys::cudaDataType::CUDA_R_32F, outputs, rows)?;
        Ok([Layout::new(kind, inputs, outputs)?, Layout::new(kind, inputs, rows)?, of_result])
    }

    fn choose(&self, outputs: u64, inputs: u64) -> Result<Algorithm, DeviceError> {
        let mut refused = Vec::new();
        for rows in CHOSEN_AT_ROWS {
            for candidate in self.candidates(outputs, inputs, rows)? {
                // One that cannot say how it adds is none to rely on.
                if splits(&candidate).unwrap_or(true) {
                    continue;
                }
                let does = ROWS.map(|rows| self.does(&candidate, outputs, inputs, rows));
                match does.iter().zip(ROWS).find(|(does, _)| does.is_err()) {
                    None => return Ok(candidate),
                    Some((Err(error), rows)) => refused.push(format!("{rows} rows: {error}")),
                    Some(_) => {}
                }
            }
        }
        let first = refused.first().cloned().unwrap_or_else(|| "all of them split sums".into());
        Err(DeviceError::Failed(format!(
            "no algorithm multiplies {outputs} x {inputs} for every number of rows ({} looked at; {first})",
            refused.len()
        )))
    }

    /// The best for many rows whose bits are those of `few`.
    fn choose_for_many(
        &self,
        few: &Algorithm,
        outputs: usize,
        inputs: usize,
    ) -> Result<Option<Algorithm>, DeviceError> {
        let context = self.stream.device().context();
        let outputs_probed = outputs.min(PROBED_OUTPUTS);
        let put = |seed, rows: usize| {
            let bytes = random(self.act, seed, rows * inputs);
            let memory = CudaMemory::allocate(context, bytes.len())?;
            self.stream.upload(&bytes, &memory, 0)?;
            Ok::<_, DeviceError>(memory)
        };
        let (w, x) = (put(1, outputs_probed)?, put(2, MANY_ROWS)?);
        let bytes = MANY_ROWS * outputs_probed * 4;
        let product = |algorithm: &Algorithm| {
            let y = CudaMemory::allocate(context, bytes)?;
            self.run(algorithm, (outputs_probed, inputs, MANY_ROWS), (&w.all(), &x.all(), &y.all()))?;
            self.stream.download(&y, bytes)
        };
        let expected = product(few)?;
        for candidate in self.candidates(outputs as u64, inputs as u64, CHOSEN_AT_MANY)? {
            let does =
                MANY.iter().all(|rows| self.does(&candidate, outputs as u64, inputs as u64, *rows).is_ok());
            let probed =
                self.does(&candidate, outputs_probed as u64, inputs as u64, MANY_ROWS as u64).is_ok();
            if splits(&candidate).unwrap_or(true) || !does || !probed {
                continue;
            }
            match product(&candidate) {
                Ok(found) if found == expected => return Ok(Some(candidate)),
                Ok(_) | Err(DeviceError::Failed(_)) => {}
                Err(error) => return Err(error),
            }
        }
        tracing::debug!(outputs, inputs, "no algorithm for many rows adds in the order of that for few");
        Ok(None)
    }

    /// What the library would take for so many rows, the best first.
    fn candidates(&self, outputs: u64, inputs: u64, rows: u64) -> Result<Vec<Algorithm>, DeviceError> {
        let [a, b, d] = self.layouts(outputs, inputs, rows)?;
        let preference = Preference::new()?;
        // SAFETY: plain numbers, for which zeros are valid (a status of 0 is success).
        let mut found: [sys::cublasLtMatmulHeuristicResult_t; CANDIDATES] = unsafe { std::mem::zeroed() };
        let mut count = 0;
        // SAFETY: at most so many results are written.
        let status = unsafe {
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
        };
        if status == sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED {
            return Ok(Vec::new());
        }
        check("cublasLtMatmulAlgoGetHeuristic", status)?;
        let found = found[..count.unsigned_abs() as usize].iter();
        let good = found.filter(|result| result.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS);
        Ok(good.map(|result| result.algo).collect())
    }

    fn does(&self, algorithm: &Algorithm, outputs: u64, inputs: u64, rows: u64) -> Result<(), DeviceError> {
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
        check("cublasLtMatmulAlgoCheck", status)?;
        match result.workspaceSize {
            0..=WORKSPACE_BYTES => Ok(()),
            bytes => Err(DeviceError::OutOfMemory { bytes }),
        }
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
        if weight.act != self.act || !weight.memory.is_of(self.stream.device().context()) {
            return Err(DeviceError::Failed("a matrix of another format or device".into()));
        }
        let Algorithms { few, many } = &weight.algorithms;
        let algorithm = if rows < MANY_ROWS { few } else { many };
        self.run(algorithm, (weight.outputs, weight.inputs, rows), (&weight.memory.all(), x, y))
    }

    fn run(
        &self,
        algorithm: &Algorithm,
        (outputs, inputs, rows): (usize, usize, usize),
        (w, x, y): (&Part<'_>, &Part<'_>, &Part<'_>),
    ) -> Result<(), DeviceError> {
        let stream = &self.stream;
        let weight = w.holding(outputs * inputs * self.act.bytes())?;
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
                weight as *const c_void,
                a.0,
                from as *const c_void,
                b.0,
                std::ptr::from_ref(&none).cast(),
                to as *const c_void,
                d.0,
                to as *mut c_void,
                d.0,
                algorithm,
                self.workspace.all().holding(0)? as *mut c_void,
                WORKSPACE_BYTES,
                stream.raw().cast(),
            )
        });
        stream.keep((w.memory.clone(), x.memory.clone(), y.memory.clone(), self.workspace.clone()))?;
        multiplied
    }
}
