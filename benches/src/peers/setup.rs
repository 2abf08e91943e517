//! Installing peers by the names of their packages, each into a folder of its own. Nothing outside that folder changes, and nothing needs
//! to be root.

use crate::{BenchError, OrFail};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What can be measured beside Cairn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Redis, or Valkey where that is what the system has.
    Redis,
    /// Mooncake Store: Python package `mooncake-transfer-engine-non-cuda`.
    Mooncake,
    /// LMCache's server: Python package `lmcache`.
    LmCache,
    /// foyer's hybrid cache: built from its crate, with a small driver.
    Foyer,
}

/// Written last into a virtual environment.
const COMPLETE: &str = "cairn-complete";

/// Debian's packages of Redis, and of what it needs that is not on every machine.
const REDIS_PACKAGES: [&str; 6] =
    ["redis-server", "redis-tools", "libjemalloc2", "liblzf1", "liblua5.1-0", "lua-cjson"];

/// The driver of foyer.
const FOYER: [(&str, &str); 3] = [
    ("Cargo.toml", include_str!("../../contenders/foyer/Cargo.toml")),
    ("Cargo.lock", include_str!("../../contenders/foyer/Cargo.lock")),
    ("src/main.rs", include_str!("../../contenders/foyer/src/main.rs")),
];

impl Kind {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Redis, Self::Mooncake, Self::LmCache, Self::Foyer];

    /// As it is typed, and the folder's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Redis => "redis",
            Self::Mooncake => "mooncake",
            Self::LmCache => "lmcache",
            Self::Foyer => "foyer",
        }
    }

    /// The driver.
    pub(super) fn script(self) -> &'static str {
        match self {
            Self::Mooncake => include_str!("../../contenders/mooncake_store.py"),
            Self::LmCache => include_str!("../../contenders/lmcache_server.py"),
            Self::Redis | Self::Foyer => "",
        }
    }
}

impl std::str::FromStr for Kind {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let known = || Self::ALL.map(Self::name).join(", ");
        Self::ALL
            .into_iter()
            .find(|kind| kind.name() == name)
            .ok_or_else(|| format!("unknown peer {name:?}; known: {}", known()))
    }
}

/// The program of an installed peer: a server, a Python, or a driver.
pub(super) fn program(folder: &Path, kind: Kind) -> Option<PathBuf> {
    let own = folder.join(kind.name());
    let inside = match kind {
        Kind::Redis => own.join("usr/bin/redis-server"),
        Kind::Mooncake | Kind::LmCache => own.join("bin/python"),
        Kind::Foyer => own.join("target/release/contender-foyer"),
    };
    let complete = match kind {
        Kind::Mooncake | Kind::LmCache => own.join(COMPLETE).exists(),
        // Moved into place once they are whole.
        Kind::Redis | Kind::Foyer => true,
    };
    if complete && inside.exists() {
        return Some(inside);
    }
    let installed = ["valkey-server", "redis-server"];
    installed.into_iter().find_map(|name| if kind == Kind::Redis { on_path(name) } else { None })
}

/// Libraries that came with Redis.
pub(super) fn libraries(folder: &Path) -> Option<PathBuf> {
    let lib = folder.join("redis/usr/lib");
    let found = std::fs::read_dir(lib).ok()?.flatten().map(|entry| entry.path());
    found.into_iter().find(|path| path.is_dir() && path.to_string_lossy().contains("linux-gnu"))
}

fn on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(name)).find(|program| program.is_file())
}

/// Installs one peer below `folder`. What is there already stays.
///
/// # Errors
/// When the package cannot be had here, with the reason.
pub fn setup(folder: &Path, kind: Kind) -> Result<PathBuf, BenchError> {
    if let Some(program) = program(folder, kind) {
        return Ok(program);
    }
    let own = folder.join(kind.name());
    // Half an installation would look like one.
    let staged = folder.join(format!(".{}-unfinished", kind.name()));
    let _ = std::fs::remove_dir_all(&staged);
    std::fs::create_dir_all(&staged).or_fail(&staged.display().to_string())?;
    let installed = match kind {
        Kind::Redis => redis(&staged),
        Kind::Mooncake => python(&own, "mooncake-transfer-engine-non-cuda"),
        Kind::LmCache => python(&own, "lmcache"),
        Kind::Foyer => foyer(&staged),
    };
    if installed.is_ok() && matches!(kind, Kind::Redis | Kind::Foyer) {
        std::fs::rename(&staged, &own).or_fail(&own.display().to_string())?;
    }
    let _ = std::fs::remove_dir_all(&staged);
    installed?;
    program(folder, kind).or_fail(&format!("{} was installed and cannot be found", kind.name()))
}

fn redis(staged: &Path) -> Result<(), BenchError> {
    let mut apt = Command::new("apt-get");
    quietly(apt.args(["-q", "download"]).args(REDIS_PACKAGES).current_dir(staged), "apt-get download")?;
    let entries = std::fs::read_dir(staged).or_fail("the downloaded packages")?;
    for package in entries.flatten().map(|entry| entry.path()) {
        if package.extension().is_some_and(|extension| extension == "deb") {
            quietly(Command::new("dpkg-deb").arg("-x").arg(&package).arg(staged), "dpkg-deb")?;
            let _ = std::fs::remove_file(&package);
        }
    }
    Ok(())
}

/// A virtual environment knows its own place, so it is made there; without its package it goes again.
fn python(own: &Path, package: &str) -> Result<(), BenchError> {
    let made = quietly(Command::new("python3").args(["-m", "venv"]).arg(own), "python3 -m venv")
        .and_then(|()| quietly(Command::new(own.join("bin/pip")).args(["install", package]), "pip install"));
    if made.is_err() {
        let _ = std::fs::remove_dir_all(own);
        return made;
    }
    std::fs::write(own.join(COMPLETE), package).or_fail("a mark of completion")
}

fn foyer(staged: &Path) -> Result<(), BenchError> {
    std::fs::create_dir_all(staged.join("src")).or_fail("a folder")?;
    for (name, text) in FOYER {
        std::fs::write(staged.join(name), text).or_fail(name)?;
    }
    let mut cargo = Command::new("cargo");
    quietly(cargo.args(["build", "--release", "--locked"]).current_dir(staged), "cargo build")
}

/// Runs it to its end; its last words are the error.
fn quietly(command: &mut Command, what: &str) -> Result<(), BenchError> {
    let output = command.stdin(Stdio::null()).output().or_fail(what)?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    let last = text.lines().rev().find(|line| !line.trim().is_empty());
    Err(BenchError(format!("{what} failed: {}", last.unwrap_or("it said nothing"))))
}
