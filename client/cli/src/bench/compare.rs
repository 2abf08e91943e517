//! `cairn bench compare`, and `cairn bench peers` that installs what it measures.

use super::measured::{OutputArguments, measure};
use super::transfer::{DiskSizes, SizeArguments};
use crate::CliError;
use cairn_bench::peers::{self, Kind};
use cairn_bench::{disk, ratios, transfer};
use clap::{Args, Subcommand};
use std::path::PathBuf;

#[derive(Args)]
pub(crate) struct CompareArguments {
    /// Peers, separated by commas: redis, mooncake, lmcache, foyer.
    #[arg(long, value_delimiter = ',', default_value = "redis,mooncake,lmcache,foyer")]
    peers: Vec<Kind>,
    #[command(flatten)]
    folder: FolderArguments,
    #[command(flatten)]
    sizes: SizeArguments,
    #[command(flatten)]
    disk: DiskSizes,
    #[command(flatten)]
    output: OutputArguments,
}

#[derive(Args)]
pub(crate) struct FolderArguments {
    /// Where peers are installed [default: cairn/peers in the user's cache folder].
    #[arg(long, value_name = "DIR")]
    peers_dir: Option<PathBuf>,
}

#[derive(Subcommand)]
pub(crate) enum PeersCommand {
    /// Install peers into a private folder: needs apt-get (redis), python3 with venv (mooncake, lmcache) or cargo (foyer).
    Setup {
        /// Which [default: all]; lmcache brings PyTorch, several GB.
        peers: Vec<Kind>,
        #[command(flatten)]
        folder: FolderArguments,
    },
}

impl FolderArguments {
    fn folder(&self) -> Result<PathBuf, CliError> {
        match &self.peers_dir {
            Some(folder) => Ok(folder.clone()),
            None => Ok(crate::model::cache_folder()?.join("peers")),
        }
    }
}

pub(super) fn peers(command: PeersCommand) -> Result<(), CliError> {
    let PeersCommand::Setup { peers, folder } = command;
    let wanted = if peers.is_empty() { Kind::ALL.to_vec() } else { peers };
    let folder = folder.folder()?;
    std::fs::create_dir_all(&folder)
        .map_err(|error| CliError::Failed(format!("{}: {error}", folder.display())))?;
    let mut failed = Vec::new();
    for kind in wanted {
        let spinner = indicatif::ProgressBar::new_spinner();
        spinner.set_message(format!("installing {}", kind.name()));
        spinner.enable_steady_tick(std::time::Duration::from_millis(120));
        let installed = peers::setup(&folder, kind);
        spinner.finish_and_clear();
        match installed {
            Ok(program) => println!("{}: {}", kind.name(), program.display()),
            Err(error) => failed.push(format!("{}: {error}", kind.name())),
        }
    }
    if failed.is_empty() { Ok(()) } else { Err(CliError::Failed(failed.join("; "))) }
}

pub(super) fn run(arguments: &CompareArguments) -> Result<(), CliError> {
    arguments.output.prepare()?;
    let mut options = arguments.sizes.options()?;
    let folder = arguments.folder.folder()?;
    let (wanted, disk) = (arguments.peers.clone(), &arguments.disk);
    let ((sections, complete), _) = measure(|servers, seen| async move {
        let found = peers::find(&folder, &wanted).await?;
        found.skipped.iter().for_each(|why| eprintln!("skipped: {why}"));
        options.peers = found.peers.clone();
        let (mut table, mut complete) = transfer::run(&options, &servers, &*seen).await?;
        table.notes.extend(found.skipped.iter().map(|why| format!("Skipped: {why}.")));
        let ratios = ratios::of(&table);
        let mut sections = vec![ratios, table];
        if complete && found.foyer.is_some() {
            let (tables, all) = disk::run(&disk.options(found.foyer.clone()), &*seen).await?;
            sections.extend(tables);
            complete = all;
        }
        Ok((sections, complete))
    })?;
    arguments.output.finish("compare", sections, complete)
}
