//! The cache server's host memory, registered with the device so that copies go straight out of it.

use cairn_gpu::backend::cuda::{CudaDevice, CudaShared};
use memmap2::MmapRaw;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

/// Mappings that are registered at a time: they keep memory that the server has given up from being freed.
const REGISTERED: usize = 256;

/// Where blocks must begin for the kernels to read them.
const ALIGNMENT: u64 = 16;

/// A mapping that the driver would not take is tried again after this long.
const REGISTER_AGAIN: Duration = Duration::from_secs(60);

/// Mappings of a device, by their address.
pub(super) struct Registered {
    device: CudaDevice,
    known: Mutex<HashMap<usize, Registration>>,
}

/// What the driver said to a mapping.
enum Registration {
    Shared(CudaShared),
    Refused(Weak<MmapRaw>, Instant),
}

impl Registered {
    pub(super) fn new(device: &CudaDevice) -> Self {
        Self { device: device.clone(), known: Mutex::default() }
    }

    /// The memory of a mapping in which a block begins at `offset`; none if the device cannot read the block there. The first time for a mapping
    /// takes as long as the driver needs to pin it.
    pub(super) fn memory(&self, map: &Arc<MmapRaw>, offset: u64) -> Option<CudaShared> {
        if !self.device.registers_read_only() || !offset.is_multiple_of(ALIGNMENT) {
            return None;
        }
        let address = map.as_ptr().addr();
        // Every change is a single insertion or removal, so a panic elsewhere leaves the whole.
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        match known.get(&address) {
            Some(Registration::Shared(memory)) => return Some(memory.clone()),
            Some(Registration::Refused(refused, at))
                if refused.as_ptr() == Arc::as_ptr(map) && at.elapsed() < REGISTER_AGAIN =>
            {
                return None;
            }
            _ => {}
        }
        if known.len() >= REGISTERED
            && let Some(any) = known.keys().next().copied()
        {
            known.remove(&any);
        }
        match self.device.register(map.clone(), false) {
            Ok(memory) => {
                known.insert(address, Registration::Shared(memory.clone()));
                Some(memory)
            }
            Err(error) => {
                tracing::warn!(%error, "the cache server's memory cannot be registered with the device; blocks are copied once more");
                // Asking again for every block would take long.
                known.insert(address, Registration::Refused(Arc::downgrade(map), Instant::now()));
                None
            }
        }
    }
}
