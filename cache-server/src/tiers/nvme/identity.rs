//! What a directory says about itself, and who has it: the files beside the segments.

use super::device::DeviceError;
use super::format::{DeviceKey, FORMAT_VERSION};
use cairn_core::PAGE_BYTES;
use rustix::fs::{FlockOperation, OFlags, flock};
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

pub(super) const IDENTITY_FILE: &str = "device.toml";
const LOCK_FILE: &str = "lock";

/// What a directory says about itself.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Identity {
    format: u32,
    pub(super) segment_bytes: u64,
    /// Starts so far; part of every nonce.
    pub(super) epoch: u32,
    /// 32 bytes in hexadecimal: what makes headers valid here and nowhere else.
    pub(super) key: String,
}

pub(super) fn lock(path: &Path) -> Result<File, DeviceError> {
    let open =
        OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path.join(LOCK_FILE));
    let file = open.map_err(|source| DeviceError::Io { path: path.join(LOCK_FILE), source })?;
    flock(&file, FlockOperation::NonBlockingLockExclusive)
        .map_err(|_| DeviceError::Locked { path: path.to_owned() })?;
    Ok(file)
}

pub(super) fn read_identity(path: &Path) -> Result<Option<Identity>, DeviceError> {
    let file = path.join(IDENTITY_FILE);
    let text = match std::fs::read_to_string(&file) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(DeviceError::Io { path: file, source }),
    };
    let table: toml::Table = toml::from_str(&text)
        .map_err(|error| DeviceError::Damaged { path: file.clone(), reason: error.to_string() })?;
    let found = table.get("format").and_then(toml::Value::as_integer).unwrap_or(0) as u32;
    if found != FORMAT_VERSION {
        return Err(DeviceError::Version { path: path.to_owned(), found });
    }
    let identity: Identity = toml::from_str(&text)
        .map_err(|error| DeviceError::Damaged { path: file.clone(), reason: error.to_string() })?;
    let valid = identity.segment_bytes > 0 && identity.segment_bytes.is_multiple_of(PAGE_BYTES);
    if !valid {
        let reason = format!("segments of {} bytes", identity.segment_bytes);
        return Err(DeviceError::Damaged { path: file, reason });
    }
    Ok(Some(identity))
}

/// A directory with anything else in it is not ours, and is not touched.
pub(super) fn check_empty(path: &Path) -> Result<(), DeviceError> {
    let fail = |source| DeviceError::Io { path: path.to_owned(), source };
    for entry in std::fs::read_dir(path).map_err(fail)? {
        let name = entry.map_err(fail)?.file_name();
        // A file system's own folder, and what an interrupted first start leaves.
        if name != LOCK_FILE && name != "lost+found" && name != format!("{IDENTITY_FILE}.new").as_str() {
            return Err(DeviceError::Foreign { path: path.to_owned() });
        }
    }
    Ok(())
}

pub(super) fn new_identity(path: &Path, segment_bytes: u64) -> Result<Identity, DeviceError> {
    let fail = |source| DeviceError::Io { path: path.to_owned(), source };
    let mut key = [0u8; 32];
    fill_random(&mut key).map_err(fail)?;
    let identity = Identity { format: FORMAT_VERSION, segment_bytes, epoch: 0, key: hex::encode(key) };
    write_identity(path, &identity).map_err(fail)?;
    Ok(identity)
}

pub(super) fn fill_random(mut bytes: &mut [u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let filled = rustix::rand::getrandom(&mut *bytes, rustix::rand::GetRandomFlags::empty())?;
        bytes = &mut bytes[filled..];
    }
    Ok(())
}

pub(super) fn parse_key(text: &str) -> Option<DeviceKey> {
    let mut key = [0; 32];
    hex::decode_to_slice(text, &mut key).ok()?;
    Some(DeviceKey(key))
}

pub(super) fn write_identity(path: &Path, identity: &Identity) -> io::Result<()> {
    let text = toml::to_string(identity).map_err(io::Error::other)?;
    replace_file(path, IDENTITY_FILE, text.as_bytes())
}

/// Old content or new content, whenever power is lost.
pub(super) fn replace_file(folder: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    let new = folder.join(format!("{name}.new"));
    let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&new)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&new, folder.join(name))?;
    File::open(folder)?.sync_all()
}

pub(super) fn absent(error: io::Error) -> io::Result<Vec<u8>> {
    if error.kind() == io::ErrorKind::NotFound { Ok(Vec::new()) } else { Err(error) }
}

/// Whether the file system lets files bypass its cache. Tried on the identity, which every device has.
pub(super) fn supports_direct_io(path: &Path) -> bool {
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(OFlags::DIRECT.bits() as i32);
    options.open(path.join(IDENTITY_FILE)).is_ok()
}
