//! One directory of the tier: its identity, its segment files, and whole records in and out of them.

use super::cipher::{Ciphers, KEY_BYTES};
use super::format::SALT_BYTES;
use super::format::{DeviceKey, FORMAT_VERSION, Header, Position, TOMBSTONE_BYTES};
use super::identity::{
    IDENTITY_FILE, absent, check_empty, fill_random, lock, new_identity, parse_key, read_identity,
    replace_file, supports_direct_io, write_identity,
};
use super::io::{Engine, Memory, Operation, Pages, Request, perform};
use cairn_core::{DiskPlace, HEADER_PAGES, PAGE_BYTES, Record};
use cairn_proto::{Checksum, SpaceId};
use rustix::fs::OFlags;
use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use thiserror::Error;
use tokio::sync::Semaphore;

const TOMBSTONE_FILE: &str = "forgotten";
const SEGMENT_FOLDER: &str = "segments";

/// Segments of a device: one open, one for reclaiming to go on, and something to reclaim.
pub(crate) const MIN_SEGMENTS: u32 = 4;

/// Room that everything but segments may take.
pub const METADATA_BYTES: u64 = 1 << 20;

/// Tombstones beyond this are merged at the next start.
const MAX_TOMBSTONES: usize = 1024;

/// Foreground reads in progress on one device.
const READS_IN_FLIGHT: usize = 64;

/// Why a directory cannot be used.
#[derive(Debug, Error)]
pub enum DeviceError {
    /// It is not there.
    #[error("{path} is not a directory: create it, or mount its device, first")]
    NoDirectory {
        /// Where.
        path: PathBuf,
    },
    /// There is no device in it.
    #[error("{path} has no {IDENTITY_FILE}: it is no directory of Cairn's NVMe tier")]
    NotADevice {
        /// Where.
        path: PathBuf,
    },
    /// It holds something else.
    #[error("{path} holds files that are not Cairn's: use an empty directory")]
    Foreign {
        /// Where.
        path: PathBuf,
    },
    /// It is no place that the server was told of.
    #[error("{path} is not among the server's nvme.device entries")]
    NotConfigured {
        /// Where.
        path: PathBuf,
    },
    /// There is nothing to attach.
    #[error("{path} is in service already")]
    InService {
        /// Where.
        path: PathBuf,
    },
    /// There is nothing to detach.
    #[error("{path} is not in service")]
    NotInService {
        /// Where.
        path: PathBuf,
    },
    /// It would have too few segments.
    #[error(
        "{path} has segments of {segment_mib} MiB, and its capacity must hold at least {MIN_SEGMENTS} of them and 1 MiB more; \
         nothing was changed"
    )]
    TooSmall {
        /// Where.
        path: PathBuf,
        /// Size of its segments.
        segment_mib: u64,
    },
    /// Another process has it.
    #[error("{path} is in use by another process, or its last work is not yet over")]
    Locked {
        /// Where.
        path: PathBuf,
    },
    /// Another release wrote it.
    #[error(
        "{path} has format version {found}; this release reads version {FORMAT_VERSION} only: empty the directory to start anew"
    )]
    Version {
        /// Where.
        path: PathBuf,
        /// The version found.
        found: u32,
    },
    /// Its description cannot be read.
    #[error("{path} is damaged: {reason}")]
    Damaged {
        /// Where.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The system refused.
    #[error("{path}: {source}")]
    Io {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// How a directory is to be used.
#[derive(Clone, Debug)]
pub struct DeviceOptions {
    /// The directory.
    pub path: PathBuf,
    /// All that it may hold.
    pub capacity_bytes: u64,
    /// Size of its segments, if it is new.
    pub segment_bytes: u64,
    /// Keys of tenants whose blocks are to be encrypted.
    pub keys: HashMap<String, [u8; KEY_BYTES]>,
    /// Only look: take no lock, change nothing.
    pub read_only: bool,
}

/// Why a record could not be read.
#[derive(Debug)]
pub(crate) enum ReadError {
    /// The bytes are not those that were written.
    Corrupt,
    /// The device says no.
    Io(io::Error),
}

/// See the head of this file.
pub(crate) struct Device {
    path: PathBuf,
    pub(crate) key: DeviceKey,
    epoch: u32,
    /// Of this start: keys derived with it are used by no other, not even of a copy of the directory.
    salt: [u8; SALT_BYTES],
    segment_bytes: u64,
    segments: u32,
    engine: Arc<dyn Engine>,
    ciphers: Ciphers,
    files: Mutex<HashMap<u32, Arc<File>>>,
    tombstones: Mutex<HashMap<SpaceId, u64>>,
    reads: Semaphore,
    direct: bool,
    read_only: bool,
    _lock: Option<File>,
}

impl Device {
    /// Opens a directory that is a device already.
    ///
    /// # Errors
    /// When it is not, or not usable; nothing was changed then.
    pub(crate) fn open_existing(
        options: &DeviceOptions,
        engine: Arc<dyn Engine>,
    ) -> Result<Self, DeviceError> {
        let path = options.path.clone();
        if path.is_dir() && read_identity(&path)?.is_none() {
            return Err(DeviceError::NotADevice { path });
        }
        Self::open(options, engine)
    }

    /// Opens a directory, or makes it a device if it is empty.
    ///
    /// # Errors
    /// When it is not usable; nothing was changed then.
    pub(crate) fn open(options: &DeviceOptions, engine: Arc<dyn Engine>) -> Result<Self, DeviceError> {
        let path = options.path.clone();
        if !path.is_dir() {
            return Err(DeviceError::NoDirectory { path });
        }
        let fail = |source| DeviceError::Io { path: path.clone(), source };
        let found = read_identity(&path)?;
        if found.is_none() && !options.read_only {
            check_empty(&path)?;
        }
        let segment_bytes = found.as_ref().map_or(options.segment_bytes, |identity| identity.segment_bytes);
        let room = options.capacity_bytes.saturating_sub(METADATA_BYTES);
        let segments = u32::try_from(room / segment_bytes.max(1)).unwrap_or(u32::MAX);
        if segments < MIN_SEGMENTS {
            return Err(DeviceError::TooSmall { path, segment_mib: segment_bytes >> 20 });
        }
        let lock = if options.read_only { None } else { Some(lock(&path)?) };
        let mut identity = match found {
            Some(identity) => identity,
            None if options.read_only => {
                return Err(DeviceError::NotADevice { path });
            }
            None => new_identity(&path, options.segment_bytes)?,
        };
        let key = parse_key(&identity.key).ok_or_else(|| DeviceError::Damaged {
            path: path.join(IDENTITY_FILE),
            reason: "its key is not 32 bytes in hexadecimal".into(),
        })?;
        if !options.read_only {
            identity.epoch += 1;
            write_identity(&path, &identity).map_err(fail)?;
        }
        let mut salt = [0; SALT_BYTES];
        fill_random(&mut salt).map_err(fail)?;
        let tombstones = std::fs::read(path.join(TOMBSTONE_FILE)).or_else(absent).map_err(fail)?;
        let mut latest: HashMap<SpaceId, u64> = HashMap::new();
        for (space, sequence) in key.read_tombstones(&tombstones) {
            let entry = latest.entry(space).or_default();
            *entry = sequence.max(*entry);
        }
        let device = Self {
            ciphers: Ciphers::new(&options.keys, &key),
            key,
            epoch: identity.epoch,
            salt,
            segment_bytes: identity.segment_bytes,
            segments,
            engine,
            files: Mutex::default(),
            tombstones: Mutex::new(latest),
            reads: Semaphore::new(READS_IN_FLIGHT),
            direct: supports_direct_io(&path),
            read_only: options.read_only,
            _lock: lock,
            path: path.clone(),
        };
        if !options.read_only {
            std::fs::create_dir_all(path.join(SEGMENT_FOLDER)).map_err(fail)?;
            device.remove_excess().map_err(fail)?;
            if tombstones.len() > MAX_TOMBSTONES * TOMBSTONE_BYTES {
                device.merge_tombstones().map_err(fail)?;
            }
        }
        Ok(device)
    }

    /// The same whenever this directory is opened.
    pub(crate) fn identity(&self) -> u64 {
        let mut first = [0; 8];
        first.copy_from_slice(&blake3::hash(&self.key.0).as_bytes()[..8]);
        u64::from_le_bytes(first)
    }

    /// Higher than any generation of an earlier start.
    pub(crate) fn first_generation(&self) -> u64 {
        u64::from(self.epoch) << 32
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn segment_bytes(&self) -> u64 {
        self.segment_bytes
    }

    pub(crate) fn segments(&self) -> u32 {
        self.segments
    }

    pub(crate) fn segment_pages(&self) -> u32 {
        (self.segment_bytes / PAGE_BYTES) as u32
    }

    pub(crate) fn ciphers(&self) -> &Ciphers {
        &self.ciphers
    }

    /// How bytes are moved, for people.
    pub(crate) fn engine_name(&self) -> String {
        let direct = if self.direct { "direct" } else { "buffered" };
        format!("{}, {direct}", self.engine.name())
    }

    /// Whether an administrator emptied the record's space after it was written.
    pub(crate) fn is_forgotten(&self, record: &Record) -> bool {
        let tombstones = self.tombstones.lock().unwrap_or_else(PoisonError::into_inner);
        tombstones.get(&record.space).is_some_and(|last| record.sequence <= *last)
    }

    /// The highest number that a tombstone names.
    pub(crate) fn last_forgotten(&self) -> u64 {
        let tombstones = self.tombstones.lock().unwrap_or_else(PoisonError::into_inner);
        tombstones.values().copied().max().unwrap_or(0)
    }

    fn segment_path(&self, segment: u32) -> PathBuf {
        self.path.join(SEGMENT_FOLDER).join(format!("{segment:06}.seg"))
    }

    /// Segments beyond the configured capacity go: the device is never larger than it may be.
    fn remove_excess(&self) -> io::Result<()> {
        for entry in std::fs::read_dir(self.path.join(SEGMENT_FOLDER))? {
            let entry = entry?;
            let name = entry.file_name();
            let number = name.to_str().and_then(|name| name.strip_suffix(".seg")?.parse::<u32>().ok());
            if number.is_some_and(|number| number >= self.segments) {
                tracing::warn!(path = %entry.path().display(), "a segment beyond the configured capacity is removed");
                std::fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }

    /// Rewrites the list of tombstones with one line for each space.
    fn merge_tombstones(&self) -> io::Result<()> {
        let tombstones = self.tombstones.lock().unwrap_or_else(PoisonError::into_inner);
        let lines =
            tombstones.iter().flat_map(|(space, sequence)| self.key.write_tombstone(space, *sequence));
        let bytes: Vec<u8> = lines.collect();
        replace_file(&self.path, TOMBSTONE_FILE, &bytes)
    }

    /// The file of a segment, opened once; `None` if it is not there.
    pub(crate) fn existing(&self, segment: u32) -> io::Result<Option<Arc<File>>> {
        match self.file(segment, false) {
            Ok(file) => Ok(Some(file)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn file(&self, segment: u32, create: bool) -> io::Result<Arc<File>> {
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = files.get(&segment) {
            return Ok(file.clone());
        }
        let flags = if self.direct { OFlags::DIRECT.bits() as i32 } else { 0 };
        let mut options = OpenOptions::new();
        options.read(true).write(!self.read_only).create(create && !self.read_only).custom_flags(flags);
        let file = Arc::new(options.mode(0o600).open(self.segment_path(segment))?);
        files.insert(segment, file.clone());
        Ok(file)
    }

    async fn request(
        &self,
        operation: Operation,
        file: Arc<File>,
        page: u32,
        memory: Memory,
    ) -> io::Result<Memory> {
        let offset = u64::from(page) * PAGE_BYTES;
        let (memory, result) = perform(&*self.engine, Request { operation, file, offset, memory }).await;
        result?;
        memory.ok_or_else(|| io::Error::other("the IO engine lost a buffer"))
    }

    /// Reads whole pages.
    pub(crate) async fn read_pages(&self, file: &Arc<File>, page: u32, count: usize) -> io::Result<Pages> {
        let memory = Memory::Pages(Pages::new(count));
        match self.request(Operation::Read, file.clone(), page, memory).await? {
            Memory::Pages(pages) => Ok(pages),
            _ => Err(io::Error::other("the IO engine changed a buffer")),
        }
    }

    /// Begins a segment: takes its room, and names its generation.
    pub(crate) async fn open_segment(&self, segment: u32, generation: u64) -> io::Result<()> {
        let new = self.existing(segment)?.is_none();
        let file = self.file(segment, true)?;
        if new {
            // Or the file itself is gone after a loss of power, whatever is durable in it.
            let folder = self.path.join(SEGMENT_FOLDER);
            let synced = tokio::task::spawn_blocking(move || File::open(folder)?.sync_all()).await;
            synced.map_err(io::Error::other)??;
        }
        let nothing = || Memory::Pages(Pages::new(0));
        self.request(Operation::Allocate(self.segment_bytes), file.clone(), 0, nothing()).await?;
        let mut page = Pages::new(1);
        self.key.write_segment(page.as_mut(), Position { segment, generation, page: 0 });
        self.request(Operation::Write, file, 0, Memory::Pages(page)).await?;
        // Before anything is written behind it: the old generation must not pass for the present one.
        self.sync(segment).await
    }

    /// Writes one record. `payload` is padded to whole pages.
    pub(crate) async fn write_record(
        &self,
        mut record: Record,
        payload: Memory,
        to: DiskPlace,
    ) -> io::Result<()> {
        let file = self.file(to.segment, false)?;
        let (payload, seal) = if self.ciphers.encrypts(&record.tenant) {
            let mut copy = Pages::from_bytes(&payload.bytes()[..record.block_bytes as usize]);
            let text = &mut copy.as_mut()[..record.block_bytes as usize];
            let seal = self.ciphers.seal(&mut record, (self.epoch, self.salt), text);
            (Memory::Pages(copy), Some(seal.ok_or_else(|| io::Error::other("a block cannot be encrypted"))?))
        } else {
            (payload, None)
        };
        let mut header = Pages::new(HEADER_PAGES as usize);
        self.key.write_record(header.as_mut(), &Header { record, seal }, position(to));
        let first = self.request(Operation::Write, file.clone(), to.page, Memory::Pages(header));
        let second = self.request(Operation::Write, file, to.page + HEADER_PAGES, payload);
        // Both must have ended before anybody may use the memory or the segment for something else.
        let (first, second) = futures::join!(first, second);
        first.and(second).map(|_| ())
    }

    /// Reads the payload of a record into `memory`, and verifies it.
    pub(crate) async fn read_record(
        &self,
        record: &Record,
        from: DiskPlace,
        memory: Memory,
    ) -> Result<Memory, ReadError> {
        let _permit = self.reads.acquire().await;
        let file = self.file(from.segment, false).map_err(ReadError::Io)?;
        let payload = self.request(Operation::Read, file.clone(), from.page + HEADER_PAGES, memory);
        let mut memory;
        if self.ciphers.encrypts(&record.tenant) {
            let header = self.read_pages(&file, from.page, HEADER_PAGES as usize);
            // Both must have ended before anybody may use the memory for something else.
            let (read, header) = futures::join!(payload, header);
            memory = read.map_err(ReadError::Io)?;
            let header = header.map_err(ReadError::Io)?;
            let header = self.key.read_record(header.as_ref(), position(from));
            let header = header.map_err(|_| ReadError::Corrupt)?;
            if let Some(seal) = header.seal {
                let bytes = memory.bytes_mut().ok_or(ReadError::Corrupt)?;
                let text = &mut bytes[..record.block_bytes as usize];
                self.ciphers.open_payload(&header.record, &seal, text).map_err(|_| ReadError::Corrupt)?;
            }
        } else {
            memory = payload.await.map_err(ReadError::Io)?;
        }
        let bytes = &memory.bytes()[..record.block_bytes as usize];
        if Checksum::of(&record.space, &record.hash, bytes) != record.checksum {
            return Err(ReadError::Corrupt);
        }
        Ok(memory)
    }

    /// Writes the summary of a full segment, from the headers that are on the device. Everything in it is durable after that.
    pub(crate) async fn seal_segment(
        &self,
        segment: u32,
        generation: u64,
        pages: Vec<u32>,
    ) -> io::Result<()> {
        let file = self.file(segment, false)?;
        self.sync(segment).await?;
        let mut headers = Vec::with_capacity(pages.len());
        for page in pages {
            let header = self.read_pages(&file, page, HEADER_PAGES as usize).await?;
            // One that is not valid any more has been erased, or is lost.
            if let Ok(header) = self.key.read_record(header.as_ref(), Position { segment, generation, page })
            {
                headers.push((page, header));
            }
        }
        let summary = Pages::from_bytes(&self.key.write_summary(&headers, (segment, generation)));
        let first = self.segment_pages() - (summary.as_ref().len() as u64 / PAGE_BYTES) as u32;
        self.request(Operation::Write, file, first, Memory::Pages(summary)).await?;
        self.sync(segment).await
    }

    /// Makes what was written to a segment durable.
    pub(crate) async fn sync(&self, segment: u32) -> io::Result<()> {
        let file = self.file(segment, false)?;
        self.request(Operation::Sync, file, 0, Memory::Pages(Pages::new(0))).await?;
        Ok(())
    }

    /// Gives a segment's room back to the file system.
    pub(crate) async fn free_segment(&self, segment: u32) -> io::Result<()> {
        let file = self.file(segment, false)?;
        self.request(Operation::Punch(self.segment_bytes), file, 0, Memory::Pages(Pages::new(0))).await?;
        Ok(())
    }

    /// Makes a record's header invalid for good.
    pub(crate) async fn erase(&self, place: DiskPlace) -> io::Result<()> {
        let file = self.file(place.segment, false)?;
        self.request(Operation::Write, file, place.page, Memory::Pages(Pages::new(1))).await?;
        self.sync(place.segment).await
    }

    /// Remembers for good that a space's records up to a number are dead. Blocks; rare.
    pub(crate) fn forget(&self, space: SpaceId, sequence: u64) -> io::Result<()> {
        let mut tombstones = self.tombstones.lock().unwrap_or_else(PoisonError::into_inner);
        let mut file =
            OpenOptions::new().append(true).create(true).mode(0o600).open(self.path.join(TOMBSTONE_FILE))?;
        // A torn line from a crash would shift all that follow.
        let torn = file.metadata()?.len() % TOMBSTONE_BYTES as u64;
        if torn != 0 {
            file.write_all(&vec![0; TOMBSTONE_BYTES - torn as usize])?;
        }
        file.write_all(&self.key.write_tombstone(&space, sequence))?;
        file.sync_data()?;
        File::open(&self.path)?.sync_all()?;
        let last = tombstones.entry(space).or_default();
        *last = sequence.max(*last);
        Ok(())
    }
}

pub(crate) fn position(place: DiskPlace) -> Position {
    Position { segment: place.segment, generation: place.generation, page: place.page }
}
