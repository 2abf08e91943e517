//! Request traces, as published. The files are not part of this project; `CAIRN_TRACES` names a folder that has them.

use cairn_harness::trace::Trace;
use std::path::{Path, PathBuf};

/// The folder with traces, if this run has one.
pub fn folder() -> Option<PathBuf> {
    std::env::var_os("CAIRN_TRACES").map(PathBuf::from)
}

/// Reads a trace.
///
/// # Panics
/// When the file is not there or not such a trace.
pub fn read(path: &Path) -> Trace {
    Trace::read(path, None).unwrap_or_else(|error| panic!("{error}"))
}
