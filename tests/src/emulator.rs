//! The emulated CUDA libraries, built with the host's C++ compiler when a test needs them.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Libraries and what each is linked with.
const LIBRARIES: [(&str, &str, &[&str]); 3] = [
    ("libcuda.so", "driver.cpp", &["-Wl,-soname,libcuda.so", "-ldl", "-lpthread"]),
    ("libnvrtc.so", "nvrtc.cpp", &[]),
    ("libcublasLt.so", "cublaslt.cpp", &["-L.", "-lcuda", "-Wl,-rpath,$ORIGIN"]),
];

/// A folder for `LD_LIBRARY_PATH` with emulated libcuda, libnvrtc and libcublasLt; none, with a visible line, where there is no C++
/// compiler. It is made in `base`. Kernels that the emulated NVRTC compiles may be kept in its folder `kernels`.
///
/// # Panics
/// When the compiler refuses the sources.
pub fn emulator(base: &Path) -> Option<PathBuf> {
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
    if Command::new(&compiler).arg("--version").output().is_err() {
        println!("SKIPPED: emulated CUDA needs a C++ compiler (c++, or CXX)");
        return None;
    }
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("../gpu-bridge/emulator");
    let mut hasher = blake3::Hasher::new();
    let files = ["shim.h", "driver.hpp", "driver.cpp", "nvrtc.cpp", "cublaslt.cpp"];
    for file in files {
        hasher.update(&std::fs::read(sources.join(file)).expect("a source of the emulator"));
    }
    let folder = base.join(format!("cuda-emulator-{}", &hasher.finalize().to_hex()[..16]));
    if folder.exists() {
        return Some(folder);
    }
    // Built beside it and renamed: another test may be doing the same.
    let building = tempfile::tempdir_in(base).expect("a folder to build in");
    for (library, source, with) in LIBRARIES {
        let output = Command::new(&compiler)
            .current_dir(building.path())
            .args(["-std=c++20", "-O2", "-march=native", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall"])
            .arg(sources.join(source))
            .args(["-o", library])
            .args(with)
            .output()
            .expect("the compiler starts");
        assert!(output.status.success(), "{library}: {}", String::from_utf8_lossy(&output.stderr));
    }
    std::fs::copy(sources.join("shim.h"), building.path().join("shim.h")).expect("the shim is copied");
    let built = building.keep();
    if std::fs::rename(&built, &folder).is_err() {
        std::fs::remove_dir_all(&built).expect("the other one was first");
    }
    Some(folder)
}
