//! The cache server's host memory, registered with the device so that copies go straight out of it.

use super::lock;
use cairn_gpu::backend::cuda::{CudaDevice, CudaShared};
use memmap2::MmapRaw;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

/// Mappings that are registered at a time, but for those in use: they keep memory that the server has given up from being freed.
const REGISTERED: usize = 256;

/// Where blocks must begin for the kernels to read them.
const ALIGNMENT: u64 = 16;

/// A mapping that the driver would not take is tried again after this long.
const REGISTER_AGAIN: Duration = Duration::from_secs(60);

/// Mappings of a device.
pub(super) struct Registered {
    device: CudaDevice,
    /// By their address.
    known: Mutex<HashMap<usize, Registration>>,
    /// One registers at a time, and nobody who looks for what is registered waits for that.
    registering: Mutex<()>,
}

/// What the driver said to a mapping.
enum Registration {
    Shared(CudaShared),
    Refused(Weak<MmapRaw>, Instant),
}

impl Registered {
    pub(super) fn new(device: &CudaDevice) -> Self {
        Self { device: device.clone(), known: Mutex::default(), registering: Mutex::default() }
    }

    /// The memory of a mapping in which a block begins at `offset`; none if the device cannot read the block there. The first time for a mapping
    /// takes as long as the driver needs to pin it.
    pub(super) fn memory(&self, map: &Arc<MmapRaw>, offset: u64) -> Option<CudaShared> {
        if !self.device.registers_read_only() || !offset.is_multiple_of(ALIGNMENT) {
            return None;
        }
        if let Some(found) = self.find(map) {
            return found;
        }
        let _alone = lock(&self.registering);
        // Another may have done it meanwhile.
        if let Some(found) = self.find(map) {
            return found;
        }
        drop(self.make_room());
        let registration = match self.device.register(map.clone(), false) {
            Ok(memory) => Registration::Shared(memory),
            Err(error) => {
                tracing::warn!(%error, "the cache server's memory cannot be registered with the device; blocks are copied once more");
                // Asking again for every block would take long.
                Registration::Refused(Arc::downgrade(map), Instant::now())
            }
        };
        lock(&self.known).insert(map.as_ptr().addr(), registration);
        self.find(map).flatten()
    }

    /// What is known of a mapping: its memory, or that there is none.
    fn find(&self, map: &Arc<MmapRaw>) -> Option<Option<CudaShared>> {
        match lock(&self.known).get(&map.as_ptr().addr())? {
            Registration::Shared(memory) => Some(Some(memory.clone())),
            Registration::Refused(refused, at)
                if refused.as_ptr() == Arc::as_ptr(map) && at.elapsed() < REGISTER_AGAIN =>
            {
                Some(None)
            }
            Registration::Refused(..) => None,
        }
    }

    /// Forgets a mapping that no copy uses, if there are too many; it is let go outside the lock, as the driver may wait for the device.
    fn make_room(&self) -> Option<Registration> {
        let mut known = lock(&self.known);
        if known.len() < REGISTERED {
            return None;
        }
        let unused = |registration: &Registration| match registration {
            Registration::Shared(memory) => memory.is_alone(),
            Registration::Refused(..) => true,
        };
        // One that is in use stays registered anyway, and could not be registered again.
        let any = known.iter().find(|(_, registration)| unused(registration)).map(|(address, _)| *address)?;
        known.remove(&any)
    }
}
