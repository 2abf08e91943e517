//! The habits that a machine can hold: one direction of dependence, sizes of functions and files, SAFETY notes, words
//! that do not belong here, and sample configs that parse.

#![allow(clippy::unwrap_used)]

use cargo_metadata::{DependencyKind, MetadataCommand};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use syn::spanned::Spanned;
use syn::visit::Visit;

const MAX_FILE_LINES: usize = 600;
const MAX_FUNCTION_LINES: usize = 70;

/// A dependency may only point to a lower level. Development dependencies are free.
const LEVELS: [(&str, u32); 12] = [
    ("cairn-proto", 0),
    ("cairn-kernels", 0),
    ("cairn-core", 1),
    ("cairn-gpu", 1),
    ("cairn-harness", 2),
    ("cairn-transfer", 2),
    ("cairn-server", 3),
    ("cairn-client", 3),
    ("cairn-runtime", 4),
    ("cairn", 5),
    ("cairn-tests", 5),
    ("cairn-bench", 5),
];

/// What a package of the first name may use among ours, where its level alone would allow more.
const NARROWER: [(&str, &[&str]); 2] = [
    ("cairn-core", &["cairn-proto"]),
    ("cairn-runtime", &["cairn-proto", "cairn-gpu", "cairn-kernels", "cairn-client"]),
];

/// Only these may contain `unsafe`.
const UNSAFE_ALLOWED: [&str; 12] = [
    "gpu-bridge/kernels/src/",
    "gpu-bridge/src/backend/cuda/",
    "cache-server/src/tiers/host.rs",
    "cache-server/src/tiers/nvme/io.rs",
    "cache-server/src/tiers/nvme/uring.rs",
    "cache-server/transfer/src/arrivals.rs",
    "cache-server/transfer/src/copy.rs",
    "cache-server/transfer/src/located.rs",
    "cache-server/transfer/src/map.rs",
    "cache-server/transfer/src/rdma/",
    "cache-server/transfer/src/shm/",
    "benches/src/raw_disk.rs",
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

fn files(extensions: &[&str]) -> Vec<(String, String)> {
    let mut found = Vec::new();
    walk(&root(), &root(), extensions, &mut found);
    assert!(found.len() > 10 || extensions != ["rs"], "the walk finds the sources");
    found
}

fn walk(root: &Path, folder: &Path, extensions: &[&str], found: &mut Vec<(String, String)>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() {
            if !["target", ".git", ".venv", "__pycache__"].contains(&name.as_str()) {
                walk(root, &path, extensions, found);
            }
        } else if path.extension().is_some_and(|e| extensions.iter().any(|x| e == *x)) {
            let shown = path.strip_prefix(root).unwrap().display().to_string();
            found.push((shown, std::fs::read_to_string(&path).unwrap()));
        }
    }
}

fn is_test(path: &str) -> bool {
    path.contains("/tests/") || path.starts_with("tests/")
}

#[test]
fn dependencies_point_one_way() {
    let metadata = MetadataCommand::new().manifest_path(root().join("Cargo.toml")).no_deps().exec().unwrap();
    let levels: BTreeMap<&str, u32> = LEVELS.into_iter().collect();
    assert_eq!(metadata.packages.len(), levels.len(), "every package has a level");
    for package in &metadata.packages {
        let level = levels[package.name.as_str()];
        let ours = package.dependencies.iter().filter(|d| d.kind == DependencyKind::Normal);
        for dependency in ours.filter(|d| levels.contains_key(d.name.as_str())) {
            let (from, to) = (package.name.as_str(), dependency.name.as_str());
            assert!(levels[to] < level || level == 5, "{from} must not depend on {to}");
            let narrower = NARROWER.iter().find(|(name, _)| *name == from);
            assert!(
                narrower.is_none_or(|(_, allowed)| allowed.contains(&to)),
                "{from} must not depend on {to}"
            );
        }
    }
}

#[derive(Default)]
struct Functions {
    long: Vec<(String, usize)>,
}

impl Functions {
    fn check(&mut self, signature: &syn::Signature, span: proc_macro2::Span) {
        let lines = span.end().line - span.start().line + 1;
        if lines > MAX_FUNCTION_LINES {
            self.long.push((signature.ident.to_string(), lines));
        }
    }
}

impl<'ast> Visit<'ast> for Functions {
    fn visit_item_fn(&mut self, item: &'ast syn::ItemFn) {
        self.check(&item.sig, item.block.span());
        syn::visit::visit_item_fn(self, item);
    }

    fn visit_impl_item_fn(&mut self, item: &'ast syn::ImplItemFn) {
        self.check(&item.sig, item.block.span());
        syn::visit::visit_impl_item_fn(self, item);
    }
}

#[test]
fn files_and_functions_stay_readable() {
    for (path, text) in files(&["rs"]) {
        let code = text.lines().take_while(|line| !line.contains("#[cfg(test)]")).count();
        assert!(code <= MAX_FILE_LINES || is_test(&path), "{path} has {code} lines of code");
        assert!(text.starts_with("//!"), "{path} does not open with what it owns");
        if is_test(&path) {
            continue;
        }
        let mut functions = Functions::default();
        functions.visit_file(&syn::parse_file(&text).unwrap());
        assert!(functions.long.is_empty(), "{path}: too long: {:?}", functions.long);
    }
}

#[test]
fn unsafe_is_fenced_and_explained() {
    for (path, text) in files(&["rs"]) {
        let code = |line: &str| line.split("//").next().unwrap_or_default().to_owned();
        let uses =
            |line: &str| code(line).split(|c: char| !c.is_alphanumeric() && c != '_').any(|w| w == "unsafe");
        if !text.lines().any(uses) || path == "tests/tests/tidy.rs" {
            continue;
        }
        assert!(
            UNSAFE_ALLOWED.iter().any(|allowed| path.starts_with(allowed)),
            "{path} contains unsafe code"
        );
        assert!(text.contains("SAFETY:"), "{path} explains none of its unsafe code");
    }
    for (path, text) in files(&["rs"]) {
        let library = path.ends_with("/src/lib.rs")
            && !UNSAFE_ALLOWED.iter().any(|a| a.starts_with(&path[..path.len() - 6]));
        assert!(!library || text.contains("#![forbid(unsafe_code)]"), "{path} does not forbid unsafe code");
    }
}

#[test]
fn the_core_has_no_clock_randomness_io_or_threads() {
    let outside = [
        "Instant",
        "SystemTime",
        "std::fs",
        "std::net",
        "std::thread",
        "std::env",
        "RandomState",
        "rand::",
        "tokio",
    ];
    for (path, text) in files(&["rs"]) {
        if path.starts_with("cache-server/core/src/") {
            for name in outside {
                assert!(!text.contains(name), "{path} uses {name}");
            }
        }
    }
}

#[test]
fn words_that_do_not_belong_here_are_absent() {
    // Spelled in pieces, so that this file does not contain them.
    let banned: Vec<String> = [
        ("to", "do!("),
        ("unimple", "mented!("),
        ("FIX", "ME"),
        ("XX", "X"),
        ("db", "g!("),
        ("/wo", "rk/"),
        ("../sha", "red"),
        ("crates", ".io/"),
        ("pypi", ".org"),
        ("assert!(tr", "ue)"),
        ("#[ig", "nore"),
    ]
    .iter()
    .map(|(a, b)| format!("{a}{b}"))
    .collect();
    for (path, text) in files(&["rs", "py", "md", "toml", "proto", "sh"]) {
        for word in &banned {
            assert!(!text.contains(word.as_str()), "{path} contains {word:?}");
        }
    }
}

#[test]
fn the_sample_config_parses_and_shows_the_defaults() {
    let config = cairn_server::Config::from_file(&root().join("deploy/cairn.toml")).unwrap();
    config.core([0, 0]).unwrap();
    let defaults = cairn_server::Config::default();
    assert_eq!(format!("{:?}", config.server), format!("{:?}", defaults.server));
    assert_eq!(format!("{:?}", config.host), format!("{:?}", defaults.host));
    assert_eq!(format!("{:?}", config.limits), format!("{:?}", defaults.limits));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bad.toml");
    std::fs::write(&path, "[host]\ncapacity_gib = 3\n").unwrap();
    let error = cairn_server::Config::from_file(&path).unwrap_err().to_string();
    assert!(error.contains("capacity_gib") && error.contains("bad.toml"), "{error}");
}

#[test]
fn documents_that_every_reader_expects_exist() {
    for name in ["README.md", "ARCHITECTURE.md", "DECISIONS.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE"]
    {
        assert!(root().join(name).exists(), "{name} is missing");
    }
}
