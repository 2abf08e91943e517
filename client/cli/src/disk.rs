//! `cairn disk`: directories of the NVMe tier, with and without a server. Nothing is changed unless asked for by name.

use crate::inspect::ServerOptions;
use crate::{CliError, block_on};
use cairn_server::nvme::{Depth, KEY_BYTES, Survey, survey};
use clap::{Args, Subcommand};
use comfy_table::{Table, presets};
use serde_json::json;
use std::collections::HashMap;
use std::path::PathBuf;

#[derive(Subcommand)]
pub(crate) enum DiskCommand {
    /// Show what a directory holds, from its headers. Changes nothing.
    Inspect(DirectoryOptions),
    /// Read and verify every block of a directory. Changes nothing.
    Verify(DirectoryOptions),
    /// Erase bad blocks and write missing summaries, so that the next start is quick. No server may use the directory.
    Rebuild(RebuildOptions),
    /// Tell a server to take one of its configured directories into service (again).
    Attach(ServiceOptions),
    /// Tell a server to take a directory out of service.
    Detach(ServiceOptions),
}

#[derive(Args)]
pub(crate) struct DirectoryOptions {
    /// The directory.
    path: PathBuf,
    /// Key of an encrypted tenant: its name and a file with 32 bytes in hexadecimal. May be repeated.
    #[arg(long, value_name = "TENANT=FILE")]
    key: Vec<String>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
pub(crate) struct RebuildOptions {
    #[command(flatten)]
    directory: DirectoryOptions,
    /// Really change the directory; without this, only say what would be done.
    #[arg(long)]
    write: bool,
}

#[derive(Args)]
pub(crate) struct ServiceOptions {
    /// The directory, as configured.
    path: String,
    #[command(flatten)]
    server: ServerOptions,
}

pub(crate) fn run(command: DiskCommand) -> Result<(), CliError> {
    match command {
        DiskCommand::Inspect(options) => look(&options, Depth::Headers).map(|_| ()),
        DiskCommand::Verify(options) => {
            let survey = look(&options, Depth::Payloads)?;
            match survey.corrupt {
                0 => Ok(()),
                n => Err(CliError::Failed(format!(
                    "{n} blocks are not what was written; a server will not serve them"
                ))),
            }
        }
        DiskCommand::Rebuild(options) => {
            let depth = if options.write { Depth::Repair } else { Depth::Payloads };
            let survey = look(&options.directory, depth)?;
            if !options.write && !options.directory.json {
                let unsealed = survey.used_segments - survey.sealed_segments;
                println!(
                    "would erase {} blocks and write up to {unsealed} summaries; nothing was changed (use --write)",
                    survey.corrupt
                );
            }
            Ok(())
        }
        DiskCommand::Attach(options) => block_on(async move {
            let client = options.server.client()?;
            client.attach_device(&options.path).await.map_err(CliError::failed)
        }),
        DiskCommand::Detach(options) => block_on(async move {
            let client = options.server.client()?;
            client.detach_device(&options.path).await.map_err(CliError::failed)
        }),
    }
}

impl DirectoryOptions {
    fn keys(&self) -> Result<HashMap<String, [u8; KEY_BYTES]>, CliError> {
        let parse = |text: &String| {
            let (tenant, file) = text
                .split_once('=')
                .ok_or_else(|| CliError::Usage(format!("--key {text:?} is not TENANT=FILE")))?;
            let hex_key = std::fs::read_to_string(file)
                .map_err(|error| CliError::Failed(format!("cannot read {file}: {error}")))?;
            let mut key = [0; KEY_BYTES];
            hex::decode_to_slice(hex_key.trim(), &mut key).map_err(|_| {
                CliError::Failed(format!("{file} must hold {KEY_BYTES} bytes in hexadecimal"))
            })?;
            Ok((tenant.to_owned(), key))
        };
        self.key.iter().map(parse).collect()
    }
}

fn look(options: &DirectoryOptions, depth: Depth) -> Result<Survey, CliError> {
    let keys = options.keys()?;
    let path = options.path.clone();
    let survey = block_on(async move { survey(&path, keys, depth).await.map_err(CliError::failed) })?;
    if options.json {
        println!("{}", json(&survey));
    } else {
        print(&survey, depth);
    }
    Ok(survey)
}

fn json(survey: &Survey) -> serde_json::Value {
    let spaces = survey.spaces.iter().map(|(id, space)| {
        json!({"space": id.to_string(), "tenant": space.tenant, "blocks": space.blocks, "bytes": space.bytes})
    });
    json!({"path": survey.path, "segment_bytes": survey.segment_bytes, "segments": survey.segments,
        "used_segments": survey.used_segments, "sealed_segments": survey.sealed_segments,
        "torn": survey.dropped.torn, "forgotten": survey.dropped.forgotten, "unreadable": survey.dropped.unreadable,
        "verified": survey.verified, "corrupt": survey.corrupt, "repaired": survey.repaired,
        "spaces": spaces.collect::<Vec<_>>()})
}

fn print(survey: &Survey, depth: Depth) {
    let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
    println!(
        "{}: {} segments of {}; {} hold records, {} of these have a summary",
        survey.path.display(),
        survey.segments,
        mib(survey.segment_bytes),
        survey.used_segments,
        survey.sealed_segments
    );
    if !survey.spaces.is_empty() {
        let mut table = Table::new();
        table.load_preset(presets::NOTHING).set_header(["space", "tenant", "blocks", "bytes"]);
        for (id, space) in &survey.spaces {
            table.add_row([id.to_string(), space.tenant.clone(), space.blocks.to_string(), mib(space.bytes)]);
        }
        println!("{table}");
    }
    let dropped = &survey.dropped;
    println!(
        "not used: {} torn, {} emptied by an administrator, {} without the right key",
        dropped.torn, dropped.forgotten, dropped.unreadable
    );
    if depth != Depth::Headers {
        println!(
            "payloads: {} verified, {} corrupt; {} repaired",
            survey.verified, survey.corrupt, survey.repaired
        );
    }
}
