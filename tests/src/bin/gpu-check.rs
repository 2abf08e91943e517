//! Checks this host's CUDA device, or the emulator where that is loaded instead. Ends with 0 when all holds, 3 when there is no device.

use cairn_gpu::backend::cuda::{Absence, CudaDevice, KernelFolders, probe};
use cairn_gpu::{HostDevice, conformance};
use cairn_runtime::ComputeDevice;
use cairn_tests::gpu::speed::{self, Figure};
use cairn_tests::gpu::{Bench, first_token, remote, sharing, tier, tokens};
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
    /// The cache server's tier in the device's memory.
    Tier,
    /// What the device does in a second, beside its limits. Not on the emulator.
    Speed,
    /// What needs no device: the host device, and the runtime on the CPU; only by name.
    Host,
    /// A device that is lost in the middle: only with the emulator, and only by name.
    Lost,
    /// A worker whose device has no memory left, likewise.
    Full,
    /// A worker whose device is lost, likewise.
    LostWorker,
    /// A cache server whose device is lost, likewise: after so many operations as `--lose-after` says.
    LostTier,
    /// Whether the first token's times can be taken, with a small model; only by name.
    FirstToken,
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
    /// Leave out cuBLASLt's products, whose kernels are not ours to sanitize.
    #[arg(long)]
    without_products: bool,
    /// Folder that keeps compiled kernels.
    #[arg(long)]
    kernel_cache: Option<PathBuf>,
    /// File for the figures of `speed`, as JSON.
    #[arg(long)]
    report: Option<PathBuf>,
    /// What the second process of `sharing` is given.
    #[arg(long, hide = true)]
    opens: Option<String>,
    /// What the second process of `tier` and others serves.
    #[arg(long, hide = true)]
    serve: Option<PathBuf>,
    /// Folder on the disk that stands for NVMe.
    #[arg(long, default_value = ".")]
    disk: PathBuf,
    /// For `lost-tier`.
    #[arg(long, default_value = "100")]
    lose_after: String,
    /// Folder of kernels that were compiled ahead of time.
    #[arg(long)]
    kernels: Option<PathBuf>,
}

fn main() -> ExitCode {
    let options = Options::parse();
    if options.checks == [Check::Host] {
        conformance::run(&HostDevice);
        tokens::identical_through_the_cache(&ComputeDevice::Cpu, options.seed);
        tokens::identical_in_a_crowd(&ComputeDevice::Cpu, options.seed);
        println!(
            "host: the host device conforms, and the CPU's runtime gives the same tokens through a cache"
        );
        return ExitCode::SUCCESS;
    }
    if let Some(config) = &options.serve {
        remote::serve(config);
        return ExitCode::SUCCESS;
    }
    let devices = match probe() {
        Ok(devices) => devices,
        Err(absence) => {
            println!("no CUDA: {absence}");
            // A card whose driver does not work is no reason to say that all is well.
            let absent = matches!(absence, Absence::NoLibrary | Absence::NoDevice);
            return if absent { ExitCode::from(ABSENT) } else { ExitCode::FAILURE };
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
        return ExitCode::from(sharing::other_process(&device, handle));
    }
    if named(Check::Lost) {
        sharing::lost(&device);
        return ExitCode::SUCCESS;
    }
    if named(Check::Full) {
        tokens::identical_without_room(&device, &ComputeDevice::Cuda { ordinal: options.device, folders });
        return ExitCode::SUCCESS;
    }
    if named(Check::LostWorker) {
        tokens::answers_end_with_the_device(&ComputeDevice::Cuda { ordinal: options.device, folders });
        return ExitCode::SUCCESS;
    }
    if named(Check::FirstToken) {
        let compute = ComputeDevice::Cuda { ordinal: options.device, folders };
        let size = first_token::Size::small();
        for Figure { what, value, unit, .. } in
            first_token::figures(&compute, &size, &options.disk, &["--serve"])
        {
            println!("{what}: {value:.1} {unit}");
        }
        return ExitCode::SUCCESS;
    }
    if named(Check::LostTier) {
        let compute = ComputeDevice::Cuda { ordinal: options.device, folders };
        tier::lost(&compute, &["--serve"], &options.lose_after);
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
        Bench::new(device.clone(), options.seed, options.cases).kernels(!options.without_products);
        println!("kernels: all agree, seed {}", options.seed);
    }
    if wants(Check::Tokens) {
        let device = ComputeDevice::Cuda { ordinal: options.device, folders: folders.clone() };
        tokens::agree_with_the_cpu(&device, options.seed);
        tokens::identical_through_the_cache(&device, options.seed);
        tokens::identical_in_a_crowd(&device, options.seed);
    }
    if wants(Check::Tier) {
        let compute = ComputeDevice::Cuda { ordinal: options.device, folders: folders.clone() };
        tier::check(&device, &compute, &["--serve"], options.seed);
    }
    if wants(Check::Speed) {
        if Bench::new(device.clone(), 0, 0).is_emulated() {
            println!("SKIPPED: speed: the emulator has none");
        } else {
            measure(&device, &ComputeDevice::Cuda { ordinal: options.device, folders }, &options);
        }
    }
    ExitCode::SUCCESS
}

fn measure(device: &CudaDevice, compute: &ComputeDevice, options: &Options) {
    let mut bench = Bench::new(device.clone(), options.seed, 0);
    let mut figures = speed::copies(&bench);
    figures.extend(speed::moves(&bench));
    figures.push(speed::decode(&mut bench));
    figures.extend(speed::prefill(&mut bench));
    let size = first_token::Size::large();
    figures.extend(first_token::figures(compute, &size, &options.disk, &["--serve"]));
    if let Some(path) = &options.report {
        let figures: Vec<_> = figures.iter().map(Figure::json).collect();
        let report = serde_json::json!({"card": device.info().name, "version": env!("CARGO_PKG_VERSION"), "figures": figures});
        if let Err(error) = std::fs::write(path, report.to_string()) {
            println!("cannot write {}: {error}", path.display());
        }
    }
    println!("{}", device.info().name);
    for figure in figures {
        let verdict = match figure.goal {
            Some(goal) if (figure.unit == "ms") == (figure.ratio() <= goal) => "reached",
            Some(_) => "MISSED",
            None => "",
        };
        let goal = figure.goal.map(|goal| format!("goal {goal}")).unwrap_or_default();
        let Figure { what, value, unit, limit: (limit, name), .. } = &figure;
        println!(
            "{what:<50} {value:>9.2} {unit:<7} {:>6.3} of {limit:.2} ({name})  {goal} {verdict}",
            figure.ratio()
        );
    }
}
