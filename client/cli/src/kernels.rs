//! `cairn kernels`: compile the CUDA kernels ahead of time, or hold them to their limits, on a machine with NVRTC and no GPU.

use crate::CliError;
use crate::worker::ModelArguments;
use cairn_gpu::backend::cuda::{compile, compile_ahead, nvrtc_version, usage};
use cairn_kernels::cuda::{ARCHITECTURES, LEAST_ARCHITECTURE, Program};
use cairn_runtime::{Model, kernel_programs};
use clap::{Args, Subcommand};
use comfy_table::{Table, presets};
use std::path::PathBuf;

/// Subcommands.
#[derive(Subcommand)]
pub enum KernelsCommand {
    /// Compile every kernel and fail if one spills registers or uses too many.
    Check(CheckOptions),
    /// Compile a model's kernels into a folder, for hosts without NVRTC.
    Build(BuildOptions),
}

/// Which architectures.
#[derive(Args)]
pub struct Architectures {
    /// Compute capability without its dot, 90 for example; all that are supported if none is named.
    #[arg(long = "arch", value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(i64::from(LEAST_ARCHITECTURE)..))]
    architectures: Vec<u32>,
}

impl Architectures {
    fn list(&self) -> &[u32] {
        if self.architectures.is_empty() { &ARCHITECTURES } else { &self.architectures }
    }
}

/// Options of `check`.
#[derive(Args)]
pub struct CheckOptions {
    #[command(flatten)]
    architectures: Architectures,
}

/// Options of `build`.
#[derive(Args)]
pub struct BuildOptions {
    /// Folder that they go to; name it to a worker with --kernels.
    #[arg(long, value_name = "FOLDER")]
    out: PathBuf,
    #[command(flatten)]
    architectures: Architectures,
    #[command(flatten)]
    model: ModelArguments,
}

pub fn run(command: KernelsCommand) -> Result<(), CliError> {
    let (major, minor) = nvrtc_version().map_err(CliError::failed)?;
    println!("NVRTC {major}.{minor}");
    match command {
        KernelsCommand::Check(options) => check(options.architectures.list()),
        KernelsCommand::Build(options) => build(&options),
    }
}

fn check(architectures: &[u32]) -> Result<(), CliError> {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_HORIZONTAL_ONLY);
    table.set_header(["sm", "program", "kernel", "registers", "spilled", "stack", "shared"]);
    let mut over = Vec::new();
    for architecture in architectures {
        for program in Program::all() {
            let compiled = compile(&program, *architecture, true).map_err(CliError::failed)?;
            let found = usage(&compiled.log);
            let named = |name: &&str| found.iter().any(|usage| usage.kernel == **name && usage.registers > 0);
            if let Some(missing) = program.kernels.iter().find(|name| !named(name)) {
                let text = format!("the compiler says nothing of kernel {missing} of {}", program.name);
                return Err(CliError::Failed(text));
            }
            let title = [&[program.name.to_owned()], program.definitions.as_slice()].concat().join(" ");
            for usage in found {
                let budget = program.register_budget(&usage.kernel);
                if usage.registers > budget || usage.spills > 0 {
                    let text = format!("{} of {title} for sm_{architecture}, budget {budget}", usage.kernel);
                    over.push(text);
                }
                let numbers =
                    [usage.registers, usage.spills, usage.stack, usage.shared].map(|n| n.to_string());
                let mut row = vec![architecture.to_string(), title.clone(), usage.kernel];
                row.extend(numbers);
                table.add_row(row);
            }
        }
    }
    println!("{table}");
    if over.is_empty() {
        println!("no kernel spills, and none uses more registers than its budget");
        return Ok(());
    }
    Err(CliError::Failed(format!("more registers than the budget, or spilling:\n  {}", over.join("\n  "))))
}

fn build(options: &BuildOptions) -> Result<(), CliError> {
    let worker = options.model.options();
    let model = Model::load(&worker.model, worker.weight_type).map_err(CliError::failed)?;
    let programs = kernel_programs(&model, worker.engine.kv_type, worker.engine.block_tokens);
    let programs = programs.map_err(CliError::Failed)?;
    for architecture in options.architectures.list() {
        for program in &programs {
            let path = compile_ahead(program, *architecture, &options.out).map_err(CliError::failed)?;
            println!("{}", path.display());
        }
    }
    Ok(())
}
