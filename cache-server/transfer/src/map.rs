//! Mappings of memory files. What is mapped here may be written by another process at any time, so bytes are reached by
//! pointer, except where a pin says that nobody writes.

use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// A mapping.
pub(crate) struct Map {
    map: Arc<MmapRaw>,
    bytes: u64,
}

impl Map {
    /// For reading. A file that could shrink under the mapping would kill the reader: it must be sealed against that.
    pub(crate) fn read_only(fd: OwnedFd, bytes: u64) -> io::Result<Self> {
        let len = checked(&fd, bytes)?;
        let map = Arc::new(MmapOptions::new().len(len).map_raw_read_only(&File::from(fd))?);
        Ok(Self { map, bytes })
    }

    /// For reading and writing.
    pub(crate) fn writable(fd: OwnedFd, bytes: u64) -> io::Result<Self> {
        let len = checked(&fd, bytes)?;
        let map = Arc::new(MmapOptions::new().len(len).map_raw(&File::from(fd))?);
        Ok(Self { map, bytes })
    }

    /// The mapping itself, for those who let a device read it.
    pub(crate) fn raw(&self) -> &Arc<MmapRaw> {
        &self.map
    }

    /// Its first byte.
    #[cfg(feature = "rdma")]
    pub(crate) fn address(&self) -> usize {
        self.map.as_mut_ptr().expose_provenance()
    }

    /// The first of `len` bytes at `offset`, if they are inside.
    pub(crate) fn at(&self, offset: u64, len: u64) -> Option<*const u8> {
        let end = offset.checked_add(len)?;
        // `wrapping_add` stays inside the mapping, for `end` does.
        (end <= self.bytes).then(|| self.map.as_ptr().wrapping_add(offset as usize))
    }

    /// Stores bytes at a place that must be inside.
    pub(crate) fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let place = self.at(offset, data.len() as u64);
        place.ok_or_else(|| io::Error::other("outside the staging memory"))?;
        // SAFETY: the range is inside a mapping made by `writable` (the only ones that are written to), and no reference covers it.
        unsafe {
            let target = self.map.as_mut_ptr().add(offset as usize);
            std::ptr::copy_nonoverlapping(data.as_ptr(), target, data.len());
        }
        Ok(())
    }
}

fn checked(fd: &OwnedFd, bytes: u64) -> io::Result<usize> {
    let sealed = fcntl_get_seals(fd)?.contains(SealFlags::SHRINK);
    if !sealed || fstat(fd)?.st_size as u64 != bytes {
        return Err(io::Error::other("memory that is not what the server says it is"));
    }
    usize::try_from(bytes).map_err(io::Error::other)
}

/// New memory of a fixed size.
pub(crate) fn memory(name: &std::ffi::CStr, bytes: u64) -> io::Result<OwnedFd> {
    let fd = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&fd, bytes)?;
    fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(fd)
}
