//! Compiles the API definition with a pure-Rust protobuf compiler, so that no system package is needed.

use std::path::Path;

const FILES: [&str; 5] = [
    "cairn/v1/types.proto",
    "cairn/v1/cache.proto",
    "cairn/v1/data.proto",
    "cairn/v1/admin.proto",
    "cairn/v1/worker.proto",
];

fn main() {
    for file in FILES {
        println!("cargo:rerun-if-changed={file}");
    }
    // Cargo runs this in the package's folder, wherever it was built.
    let descriptors =
        protox::compile(FILES, [Path::new(".")]).expect("the .proto files of this package compile");
    tonic_prost_build::configure()
        .bytes(".")
        .compile_fds(descriptors)
        .expect("code generation from valid descriptors succeeds");
}
