//! Memory that devices reach: protection domains, and what is registered in them.

use super::verbs::{End, check_pointer};
use crate::store::Hold;
use rdma_sys::*;
use std::io;
use std::sync::Arc;

/// A protection domain: keys to memory in it open nothing to queue pairs of another.
pub(super) struct Domain {
    pub(super) raw: *mut ibv_pd,
    /// Keeps the device open.
    _end: Arc<End>,
}

// SAFETY: libibverbs locks what threads share.
unsafe impl Send for Domain {}
// SAFETY: as above.
unsafe impl Sync for Domain {}

impl Domain {
    pub(super) fn new(device: *mut ibv_context, end: Arc<End>) -> io::Result<Self> {
        // SAFETY: the device is open: the end is bound to it.
        let raw = check_pointer(unsafe { ibv_alloc_pd(device) })?;
        Ok(Self { raw, _end: end })
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        // SAFETY: whatever is in it keeps it.
        unsafe { ibv_dealloc_pd(self.raw) };
    }
}

/// What others may do with registered memory.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    /// Only this process, through its queue pairs.
    Local,
    /// Holders of the key read.
    RemoteRead,
    /// Holders of the key read and write.
    RemoteWrite,
}

/// Registered memory; its pages stay while this lives. Device memory is registered in the same way, by its address.
pub(super) struct Region {
    raw: *mut ibv_mr,
    _domain: Arc<Domain>,
    _hold: Hold,
}

// SAFETY: libibverbs locks what threads share.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// Remote addresses in it count from 0, so that nobody learns where it is.
    ///
    /// # Safety
    /// The memory must be mapped, for writing, while `hold` lives, and no reference may cover what others can change.
    pub(super) unsafe fn new(
        domain: &Arc<Domain>,
        (address, bytes): (usize, u64),
        access: Access,
        hold: Hold,
    ) -> io::Result<Self> {
        let flags = match access {
            Access::Local => ibv_access_flags::IBV_ACCESS_LOCAL_WRITE.0,
            Access::RemoteRead => ibv_access_flags::IBV_ACCESS_REMOTE_READ.0,
            Access::RemoteWrite => {
                ibv_access_flags::IBV_ACCESS_LOCAL_WRITE.0
                    | ibv_access_flags::IBV_ACCESS_REMOTE_WRITE.0
                    | ibv_access_flags::IBV_ACCESS_REMOTE_READ.0
            }
        };
        let address = std::ptr::with_exposed_provenance_mut(address);
        // SAFETY: the domain lives, and the caller promises the memory.
        let raw = unsafe { ibv_reg_mr_iova(domain.raw, address, bytes as usize, 0, flags as i32) };
        Ok(Self { raw: check_pointer(raw)?, _domain: domain.clone(), _hold: hold })
    }

    /// For holders of queue pairs in the domain.
    pub(super) fn rkey(&self) -> u32 {
        // SAFETY: the registration lives.
        unsafe { (*self.raw).rkey }
    }

    pub(super) fn lkey(&self) -> u32 {
        // SAFETY: the registration lives.
        unsafe { (*self.raw).lkey }
    }

    pub(super) fn bytes(&self) -> u64 {
        // SAFETY: the registration lives.
        unsafe { (*self.raw).length as u64 }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: made by the library and destroyed once, before its domain and its memory (order of fields).
        unsafe { ibv_dereg_mr(self.raw) };
    }
}
