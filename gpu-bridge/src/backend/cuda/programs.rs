//! Kernels: compiled by NVRTC when they are first needed, kept on disk, loaded into a device.
//!
//! A file in the cache is named by a hash of the source, the options, the architecture, and the versions of NVRTC and of the driver; one
//! that was compiled ahead of time by the first three. Files carry a checksum, so one that was cut short is compiled anew.

use super::context::{Context, check, driver_version};
use crate::{DeviceError, PagedShape};
use cairn_kernels::KvType;
use cairn_kernels::cuda::{LEAST_ARCHITECTURE, MoveParams, Params, Program, WireType};
use cudarc::driver::sys;
use cudarc::nvrtc::sys as nvrtc;
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_int};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// Domain of the names of cache files. Changes with the format of the files.
const NAME_CONTEXT: &str = "cairn 2026-11 compiled kernel v1";

/// Bytes of the checksum at the end of a file.
const CHECKSUM: usize = 32;

/// A program of one architecture, compiled.
pub struct Compiled {
    /// For `cuModuleLoadData`.
    pub image: Vec<u8>,
    /// What the compiler said: with `verbose`, each kernel's use of registers and memory.
    pub log: String,
}

/// What the compiler says of one kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Its name.
    pub kernel: String,
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes of registers that went to memory and back.
    pub spills: u32,
    /// Bytes of a thread's stack: arrays that are indexed at run time.
    pub stack: u32,
    /// Bytes of shared memory of a block.
    pub shared: u32,
}

/// Version of NVRTC.
///
/// # Errors
/// When the library is not there.
pub fn nvrtc_version() -> Result<(u32, u32), DeviceError> {
    // SAFETY: loads a library by name, as a process linked with it would.
    if !unsafe { nvrtc::is_culib_present() } {
        let text = "libnvrtc is not here: install NVIDIA's NVRTC (Python package nvidia-cuda-nvrtc) and put its folder on LD_LIBRARY_PATH, or bring kernels that were compiled ahead of time";
        return Err(DeviceError::Failed(text.into()));
    }
    let (mut major, mut minor): (c_int, c_int) = (0, 0);
    // SAFETY: the library is there; two numbers are written.
    compiled("nvrtcVersion", unsafe { nvrtc::nvrtcVersion(&mut major, &mut minor) })?;
    Ok((major.unsigned_abs(), minor.unsigned_abs()))
}

fn compiled(operation: &str, code: nvrtc::nvrtcResult) -> Result<(), DeviceError> {
    if code == nvrtc::nvrtcResult::NVRTC_SUCCESS {
        return Ok(());
    }
    // SAFETY: gives a static string for every code.
    let text = unsafe { CStr::from_ptr(nvrtc::nvrtcGetErrorString(code)) };
    Err(DeviceError::Failed(format!("{operation}: {}", text.to_string_lossy())))
}

/// Options of the compiler, for a program and an architecture.
fn options(program: &Program, architecture: u32) -> Vec<String> {
    let mut options = vec![format!("--gpu-architecture=sm_{architecture}"), "--std=c++17".into()];
    options.extend(program.definitions.iter().map(|definition| format!("-D{definition}")));
    options
}

struct Handle(nvrtc::nvrtcProgram);

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: made by `nvrtcCreateProgram` and destroyed once.
        let _ = unsafe { nvrtc::nvrtcDestroyProgram(&mut self.0) };
    }
}

fn c_string(text: &str) -> Result<CString, DeviceError> {
    CString::new(text).map_err(|_| DeviceError::Failed("a zero byte in a kernel source or option".into()))
}

/// Compiles a program for an architecture. Needs NVRTC, no device.
///
/// # Errors
/// When NVRTC is missing or refuses; the message has its log.
pub fn compile(program: &Program, architecture: u32, verbose: bool) -> Result<Compiled, DeviceError> {
    nvrtc_version()?;
    let (source, name) = (c_string(&program.source())?, c_string(&format!("{}.cu", program.name))?);
    let mut options = options(program, architecture);
    if verbose {
        options.push("--ptxas-options=-v".into());
    }
    let options: Vec<CString> = options.iter().map(|option| c_string(option)).collect::<Result<_, _>>()?;
    let pointers: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
    let mut raw = std::ptr::null_mut();
    // SAFETY: two strings that end with zero, and no headers; the program is written.
    compiled("nvrtcCreateProgram", unsafe {
        nvrtc::nvrtcCreateProgram(
            &mut raw,
            source.as_ptr(),
            name.as_ptr(),
            0,
            std::ptr::null(),
            std::ptr::null(),
        )
    })?;
    let handle = Handle(raw);
    // SAFETY: so many strings.
    let code = unsafe { nvrtc::nvrtcCompileProgram(handle.0, pointers.len() as c_int, pointers.as_ptr()) };
    let mut size = 0;
    // SAFETY: one number is written; then as many bytes as it says.
    let log = unsafe {
        compiled("nvrtcGetProgramLogSize", nvrtc::nvrtcGetProgramLogSize(handle.0, &mut size))?;
        let mut log = vec![0u8; size];
        compiled("nvrtcGetProgramLog", nvrtc::nvrtcGetProgramLog(handle.0, log.as_mut_ptr().cast()))?;
        String::from_utf8_lossy(&log).trim_end_matches('\0').to_owned()
    };
    compiled("nvrtcCompileProgram", code).map_err(|error| {
        DeviceError::Failed(format!("{} {:?}: {error}\n{log}", program.name, program.definitions))
    })?;
    // SAFETY: as for the log.
    let image = unsafe {
        compiled("nvrtcGetCUBINSize", nvrtc::nvrtcGetCUBINSize(handle.0, &mut size))?;
        let mut image = vec![0u8; size];
        compiled("nvrtcGetCUBIN", nvrtc::nvrtcGetCUBIN(handle.0, image.as_mut_ptr().cast()))?;
        image
    };
    Ok(Compiled { image, log })
}

/// Reads the use of registers and memory out of a verbose log.
pub fn usage(log: &str) -> Vec<Usage> {
    let number_before = |line: &str, words: &str| -> u32 {
        let before = line.split(words).next().filter(|before| before.len() < line.len());
        before.and_then(|before| before.split_whitespace().last()?.parse().ok()).unwrap_or(0)
    };
    let mut found: Vec<Usage> = Vec::new();
    for line in log.lines() {
        if let Some(rest) = line.split("Compiling entry function '").nth(1) {
            let kernel = rest.split('\'').next().unwrap_or_default().to_owned();
            found.push(Usage { kernel, registers: 0, spills: 0, stack: 0, shared: 0 });
        }
        let Some(last) = found.last_mut() else { continue };
        if line.contains("bytes stack frame") {
            last.stack = number_before(line, " bytes stack frame");
            last.spills =
                number_before(line, " bytes spill stores") + number_before(line, " bytes spill loads");
        }
        if line.contains(" registers") {
            last.registers = number_before(line, " registers");
            last.shared = number_before(line, " bytes smem");
        }
    }
    found
}

/// Where compiled kernels are looked for and kept.
#[derive(Clone, Debug, Default)]
pub struct KernelFolders {
    /// What was compiled here before; made when it is needed. None: compile each time.
    pub cache: Option<PathBuf>,
    /// What was compiled ahead of time; read only.
    pub ahead: Option<PathBuf>,
}

fn file_name(program: &Program, architecture: u32, versions: Option<[u32; 3]>) -> String {
    let mut hasher = blake3::Hasher::new_derive_key(NAME_CONTEXT);
    let mut part = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    };
    part(program.source().as_bytes());
    options(program, architecture).iter().for_each(|option| part(option.as_bytes()));
    for version in versions.into_iter().flatten() {
        part(&version.to_le_bytes());
    }
    format!("{}-sm_{architecture}-{}.cubin", program.name, &hasher.finalize().to_hex()[..32])
}

fn read(path: &Path) -> Option<Vec<u8>> {
    let mut image = std::fs::read(path).ok()?;
    let body = image.len().checked_sub(CHECKSUM)?;
    if blake3::hash(&image[..body]).as_bytes() != &image[body..] {
        return None;
    }
    image.truncate(body);
    Some(image)
}

/// Under another name first, so that nobody reads half of it.
fn write(path: &Path, image: &[u8]) -> std::io::Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let unfinished = path.with_extension(format!("{}.tmp", std::process::id()));
    let mut bytes = image.to_vec();
    bytes.extend(blake3::hash(image).as_bytes());
    std::fs::write(&unfinished, bytes)?;
    std::fs::rename(&unfinished, path)
}

/// Compiles a program into a folder for ahead-of-time use; says which file it became.
///
/// # Errors
/// When it does not compile or cannot be written.
pub fn compile_ahead(program: &Program, architecture: u32, folder: &Path) -> Result<PathBuf, DeviceError> {
    let path = folder.join(file_name(program, architecture, None));
    if read(&path).is_none() {
        let image = compile(program, architecture, false)?.image;
        write(&path, &image)
            .map_err(|error| DeviceError::Failed(format!("cannot write {}: {error}", path.display())))?;
    }
    Ok(path)
}

fn image(program: &Program, architecture: u32, folders: &KernelFolders) -> Result<Vec<u8>, DeviceError> {
    let ahead = folders.ahead.as_ref().map(|folder| folder.join(file_name(program, architecture, None)));
    if let Some(image) = ahead.as_deref().and_then(read) {
        return Ok(image);
    }
    let (major, minor) = nvrtc_version()?;
    let versions = Some([major, minor, driver_version()]);
    let cached = folders.cache.as_ref().map(|folder| folder.join(file_name(program, architecture, versions)));
    if let Some(image) = cached.as_deref().and_then(read) {
        return Ok(image);
    }
    let image = compile(program, architecture, false)?.image;
    if let Some(path) = cached
        && let Err(error) = write(&path, &image)
    {
        // The next start compiles again; nothing else is lost.
        tracing::warn!(path = %path.display(), %error, "a compiled kernel cannot be kept");
    }
    Ok(image)
}

/// A kernel with the type of its parameter. It keeps the context that its module is loaded in.
pub(super) struct Kernel<P> {
    raw: sys::CUfunction,
    context: Arc<Context>,
    params: PhantomData<fn(&P)>,
}

// SAFETY: a function is a plain handle of a module that stays loaded as long as the context.
unsafe impl<P> Send for Kernel<P> {}
// SAFETY: as above.
unsafe impl<P> Sync for Kernel<P> {}

impl<P> Kernel<P> {
    pub(super) fn raw(&self) -> sys::CUfunction {
        self.raw
    }

    pub(super) fn is_of(&self, context: &Arc<Context>) -> bool {
        Arc::ptr_eq(&self.context, context)
    }
}

struct Module(sys::CUmodule);

// SAFETY: a module is a plain handle.
unsafe impl Send for Module {}

/// The programs of a device. Modules stay loaded as long as the process has the context: there are few.
#[derive(Default)]
pub(super) struct Programs {
    pub(super) folders: KernelFolders,
    loaded: Mutex<HashMap<Program, Module>>,
    moves: Mutex<HashMap<(PagedShape, WireType), Arc<MoveKernels>>>,
}

impl Programs {
    pub(super) fn new(folders: KernelFolders) -> Self {
        Self { folders, ..Self::default() }
    }

    fn module(&self, context: &Context, program: &Program) -> Result<sys::CUmodule, DeviceError> {
        let architecture = context.info.architecture;
        if architecture < LEAST_ARCHITECTURE {
            let text =
                format!("compute capability {architecture}; the kernels need {LEAST_ARCHITECTURE} or later");
            return Err(DeviceError::Failed(text));
        }
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(module) = loaded.get(program) {
            return Ok(module.0);
        }
        let image = image(program, architecture, &self.folders)?;
        context.enter()?;
        let mut module = std::ptr::null_mut();
        // SAFETY: an image as the compiler made it, whole (it has a checksum); the module is written.
        check("cuModuleLoadData", unsafe { sys::cuModuleLoadData(&mut module, image.as_ptr().cast()) })?;
        loaded.insert(program.clone(), Module(module));
        Ok(module)
    }

    /// A kernel of a program, once its parameter is known to have the size of `P`.
    pub(super) fn kernel<P: Params>(
        &self,
        context: &Arc<Context>,
        program: &Program,
        name: &'static CStr,
    ) -> Result<Kernel<P>, DeviceError> {
        let module = self.module(context, program)?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: the module is loaded; the function is written.
        check("cuModuleGetFunction", unsafe { sys::cuModuleGetFunction(&mut raw, module, name.as_ptr()) })?;
        if super::context::has_call(b"cuFuncGetParamInfo\0") {
            let (mut offset, mut size) = (0, 0);
            // SAFETY: two numbers are written.
            check("cuFuncGetParamInfo", unsafe { sys::cuFuncGetParamInfo(raw, 0, &mut offset, &mut size) })?;
            if size != size_of::<P>() {
                let text = format!("kernel {name:?} takes {size} bytes, not {}", size_of::<P>());
                return Err(DeviceError::Failed(text));
            }
        }
        Ok(Kernel { raw, context: context.clone(), params: PhantomData })
    }

    pub(super) fn moves(
        &self,
        context: &Arc<Context>,
        shape: PagedShape,
        wire: WireType,
    ) -> Result<Arc<MoveKernels>, DeviceError> {
        let mut moves = self.moves.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernels) = moves.get(&(shape, wire)) {
            return Ok(kernels.clone());
        }
        let fits = [shape.slots, shape.layers, shape.kv_heads].iter().all(|n| u32::try_from(*n).is_ok());
        if !fits || shape.checked_pool_bytes().is_none() {
            return Err(DeviceError::Failed("a pool of that shape is too large".into()));
        }
        if !shape.head_dim.is_multiple_of(8) {
            return Err(DeviceError::Failed(format!(
                "heads of {} elements; multiples of 8 only",
                shape.head_dim
            )));
        }
        let program = Program::paged(wire, shape.kv_type, shape.kv_heads, shape.head_dim, shape.block_tokens);
        let kernels = Arc::new(MoveKernels {
            scatter: self.kernel(context, &program, c"scatter")?,
            gather: self.kernel(context, &program, c"gather")?,
            shape,
            wire,
        });
        moves.insert((shape, wire), kernels.clone());
        Ok(kernels)
    }
}

/// The copies between canonical blocks in one number format and a pool of one shape.
pub struct MoveKernels {
    pub(super) scatter: Kernel<MoveParams>,
    pub(super) gather: Kernel<MoveParams>,
    pub(super) shape: PagedShape,
    wire: WireType,
}

impl MoveKernels {
    /// Bytes of one canonical block.
    pub fn wire_block_bytes(&self) -> usize {
        let elements = self.shape.block();
        match self.wire {
            WireType::Kv(KvType::F32) => elements * 4,
            WireType::Kv(KvType::F16 | KvType::Bf16) => elements * 2,
            WireType::E4m3 => elements + 2 * self.shape.layers * self.shape.kv_heads * size_of::<f32>(),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn usage_is_read_from_the_log() {
        let log = "ptxas info    : 1 bytes gmem\n\
            ptxas info    : Compiling entry function 'gather' for 'sm_90'\n\
            ptxas info    : Function properties for gather\n\
            ptxas         .     16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads\n\
            ptxas info    : Used 40 registers, used 0 barriers, 32 bytes smem\n";
        let expected = Usage { kernel: "gather".into(), registers: 40, spills: 12, stack: 16, shared: 32 };
        assert_eq!(usage(log), [expected]);
    }

    #[test]
    fn files_that_were_cut_short_are_not_used() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/b.cubin");
        write(&path, b"an image").unwrap();
        assert_eq!(read(&path).unwrap(), b"an image");
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        assert_eq!(read(&path), None);
        assert_eq!(read(&folder.path().join("none")), None);
    }

    #[test]
    fn names_follow_source_definitions_architecture_and_versions() {
        let program = |heads| Program::paged(WireType::E4m3, KvType::Bf16, heads, 64, 16);
        let names = [
            file_name(&program(8), 90, None),
            file_name(&program(4), 90, None),
            file_name(&program(8), 80, None),
            file_name(&program(8), 90, Some([13, 0, 13000])),
            file_name(&program(8), 90, Some([13, 0, 13010])),
        ];
        let distinct: std::collections::BTreeSet<_> = names.iter().collect();
        assert_eq!(distinct.len(), names.len());
    }
}
