//! Checks this host's CUDA device, or the emulator where that is loaded instead. Ends with 0 when all holds, 3 when there is no device.

use cairn_gpu::backend::cuda::{CudaDevice, KernelFolders, probe};
use cairn_gpu::conformance;
use cairn_runtime::ComputeDevice;
use cairn_tests::gpu::{Bench, sharing, tokens};
use clap::{Parser, ValueEnum};
use std::path::PathBuf;
use std::process::ExitCode;

/// There is no device.
const ABSENT: u8 = 3;

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Check {
    /// What the host is found to have.
    Probe,
    /// What every device must do.
    Conformance,
    /// Every kernel against its reference.
    Kernels,
    /// Memory that is shared with processes, mappings and other cards.
    Sharing,
    /// The runtime against the CPU's, and through a cache.
    Tokens,
    /// A device that is lost in the middle: only with the emulator, and only by name.
    Lost,
    /// A worker whose device is lost, likewise.
    LostWorker,
}

#[derive(Parser)]
struct Options {
    /// What to check; all if none is named.
    checks: Vec<Check>,
    /// Which device.
    #[arg(long, default_value_t = 0)]
    device: usize,
    /// Of random inputs.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Random cases of each kernel.
    #[arg(long, default_value_t = 24)]
    cases: usize,
    /// Folder that keeps compiled kernels.
    #[arg(long)]
    kernel_cache: Option<PathBuf>,
    /// What the second process of `sharing` is given.
    #[arg(long, hide = true)]
    opens: Option<String>,
    /// Folder of kernels that were compiled ahead of time.
    #[arg(long)]
    kernels: Option<PathBuf>,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let devices = match probe() {
        Ok(devices) => devices,
        Err(absence) => {
            println!("no CUDA: {absence}");
            return ExitCode::from(ABSENT);
        }
    };
    for device in devices {
        println!("{device:?}");
    }
    let named = |check| options.checks.contains(&check);
    let wants = |check| options.checks.is_empty() || named(check);
    let folders = KernelFolders { cache: options.kernel_cache.clone(), ahead: options.kernels.clone() };
    let device = match CudaDevice::open(options.device, folders.clone()) {
        Ok(device) => device,
        Err(error) => {
            println!("device {} cannot be used: {error}", options.device);
            return ExitCode::FAILURE;
        }
    };
    if let Some(handle) = &options.opens {
        sharing::other_process(&device, handle);
        return ExitCode::SUCCESS;
    }
    if named(Check::Lost) {
        sharing::lost(&device);
        return ExitCode::SUCCESS;
    }
    if named(Check::LostWorker) {
        tokens::answers_end_with_the_device(&ComputeDevice::Cuda { ordinal: options.device, folders });
        return ExitCode::SUCCESS;
    }
    if wants(Check::Sharing) {
        let bench = Bench::new(device.clone(), options.seed, 0);
        sharing::mappings(&bench);
        sharing::between_cards(&bench, &folders);
        sharing::between_processes(&bench, &["--opens"]);
    }
    if wants(Check::Conformance) {
        conformance::run(&device);
        println!("conformance: holds");
    }
    if wants(Check::Kernels) {
        Bench::new(device, options.seed, options.cases).kernels();
        println!("kernels: all agree, seed {}", options.seed);
    }
    if wants(Check::Tokens) {
        let device = ComputeDevice::Cuda { ordinal: options.device, folders };
        tokens::agree_with_the_cpu(&device, options.seed);
        tokens::identical_through_the_cache(&device, options.seed);
    }
    ExitCode::SUCCESS
}
