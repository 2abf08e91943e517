//! Request traces, as published: JSON lines, gzipped, with the ids of each request's chain of blocks as a list or as
//! runs. The files are not part of this project; `CAIRN_TRACES` names a folder that has them.

use flate2::read::GzDecoder;
use serde::Deserialize;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

/// The folder with traces, if this run has one.
pub fn folder() -> Option<PathBuf> {
    std::env::var_os("CAIRN_TRACES").map(PathBuf::from)
}

/// One request.
pub struct Request {
    /// Tokens of its prompt.
    pub input_tokens: u64,
    /// Its blocks, first block first. An id names the whole prefix up to its block.
    pub chain: Vec<u64>,
}

#[derive(Deserialize)]
struct Line {
    input_length: u64,
    #[serde(default)]
    hash_ids: Vec<u64>,
    #[serde(default)]
    runs: Vec<(u64, u64)>,
}

/// Reads a trace.
///
/// # Panics
/// When the file is not there or not such a trace.
pub fn read(path: &Path) -> Vec<Request> {
    let file = File::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let lines = BufReader::new(GzDecoder::new(file)).lines().map(|line| line.expect("a gzipped text"));
    let lines = lines.filter(|line| !line.trim().is_empty());
    lines.map(|line| serde_json::from_str::<Line>(&line).expect("a request").into()).collect()
}

impl From<Line> for Request {
    fn from(line: Line) -> Self {
        let runs = line.runs.iter().flat_map(|(first, count)| *first..first + count);
        Self { input_tokens: line.input_length, chain: line.hash_ids.iter().copied().chain(runs).collect() }
    }
}
