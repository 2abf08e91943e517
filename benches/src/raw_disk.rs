//! The limit of a disk: a bare io_uring loop over one preallocated file, with direct IO and registered buffers, and nothing else.

use io_uring::{IoUring, opcode, types};
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

const ALIGN: usize = 4096;

/// A file and a ring.
pub struct RawDisk {
    ring: IoUring,
    file: File,
    buffers: Vec<*mut u8>,
    layout: Layout,
}

impl RawDisk {
    /// A file of `blocks` blocks, `depth` requests at a time.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn create(path: &Path, block_bytes: usize, blocks: u64, depth: usize) -> io::Result<Self> {
        let direct = rustix::fs::OFlags::DIRECT.bits() as i32;
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .custom_flags(direct)
            .open(path)?;
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, blocks * block_bytes as u64)?;
        let ring = IoUring::new(depth as u32)?;
        let layout = Layout::from_size_align(block_bytes, ALIGN).map_err(io::Error::other)?;
        // SAFETY: the layout has a size; the memory is freed in `drop`, after the ring stopped using it (every request is waited
        // for before `transfer` returns).
        let buffers: Vec<*mut u8> = (0..depth).map(|_| unsafe { alloc_zeroed(layout) }).collect();
        let ranges: Vec<_> = buffers
            .iter()
            .map(|buffer| libc::iovec { iov_base: buffer.cast(), iov_len: block_bytes })
            .collect();
        // SAFETY: the ranges are allocations of that size, which live as long as the ring.
        unsafe { ring.submitter().register_buffers(&ranges) }.map_err(|error| {
            io::Error::other(format!(
                "buffers cannot be registered ({error}); is the limit on locked memory, ulimit -l, too low?"
            ))
        })?;
        Ok(Self { ring, file, buffers, layout })
    }

    /// Reads or writes the blocks of `order`, each once.
    ///
    /// # Errors
    /// When the disk returns one.
    pub fn transfer(&mut self, order: &[u32], write: bool) -> io::Result<()> {
        let bytes = self.layout.size() as u32;
        let mut free: Vec<usize> = (0..self.buffers.len()).collect();
        let mut next = order.iter();
        let mut going = 0;
        let mut failed = None;
        loop {
            while failed.is_none()
                && let Some(buffer) = free.last().copied()
                && let Some(block) = next.next()
            {
                free.pop();
                let fd = types::Fd(self.file.as_raw_fd());
                let offset = u64::from(*block) * u64::from(bytes);
                let (pointer, index) = (self.buffers[buffer], buffer as u16);
                let entry = if write {
                    opcode::WriteFixed::new(fd, pointer, bytes, index).offset(offset).build()
                } else {
                    opcode::ReadFixed::new(fd, pointer, bytes, index).offset(offset).build()
                };
                // SAFETY: the buffer is used by this request alone until its completion.
                let pushed = unsafe { self.ring.submission().push(&entry.user_data(buffer as u64)) };
                pushed.map_err(io::Error::other)?;
                going += 1;
            }
            if going == 0 {
                return failed.map_or(Ok(()), Err);
            }
            self.ring.submit_and_wait(1)?;
            for done in self.ring.completion() {
                if done.result() != bytes as i32 {
                    // The others use their buffers still: they are waited for.
                    failed = Some(io::Error::other(format!("a request ended with {}", done.result())));
                }
                free.push(done.user_data() as usize);
                going -= 1;
            }
        }
    }

    /// Makes what was written durable.
    ///
    /// # Errors
    /// When the disk returns one.
    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

impl Drop for RawDisk {
    fn drop(&mut self) {
        let _ = self.ring.submitter().unregister_buffers();
        for buffer in &self.buffers {
            // SAFETY: allocated in `create` with this layout; no request is in progress.
            unsafe { dealloc(*buffer, self.layout) };
        }
    }
}
