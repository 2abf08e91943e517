//! Settings of the tier in the memory of GPUs.

use super::{Config, ConfigError, MIB};
use cairn_core::PolicyKind;
use serde::Deserialize;

/// CUDA shares device memory between processes in granules of so many MiB: a chunk is whole ones, so that nobody gets a neighbour's.
const GRANULE_MIB: u64 = 2;

/// The GPU tier.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GpuConfig {
    /// Memory for blocks on each GPU, taken at start, in chunks as large as those of host memory. 0: no such tier. Workers on the same GPU need
    /// the rest.
    pub capacity_mib: u64,
    /// Which GPUs, as CUDA counts them. Empty: all.
    pub devices: Vec<usize>,
    /// What leaves a GPU when there is no room. Same names as `host.policy`.
    pub policy: String,
    /// Bytes on their way to or from all GPUs at a time, in the background.
    pub in_flight_mib: u64,
}

impl Default for GpuConfig {
    fn default() -> Self {
        Self { capacity_mib: 0, devices: Vec::new(), policy: "lru".into(), in_flight_mib: 64 }
    }
}

impl Config {
    /// Chunks on each GPU.
    ///
    /// # Errors
    /// When a value cannot work.
    pub(crate) fn gpu_chunks(&self) -> Result<u32, ConfigError> {
        let wrong = |text: String| Err(ConfigError::Value(text));
        let (gpu, chunk_mib) = (&self.gpu, self.host.chunk_mib.max(1));
        gpu.policy.parse::<PolicyKind>().map_err(ConfigError::Value)?;
        if gpu.capacity_mib == 0 {
            return Ok(0);
        }
        if !chunk_mib.is_multiple_of(GRANULE_MIB) {
            return wrong(format!(
                "host.chunk_mib is {chunk_mib}; with a GPU tier it must be a multiple of {GRANULE_MIB}, the unit in which CUDA shares memory"
            ));
        }
        if gpu.capacity_mib < chunk_mib {
            return wrong(format!(
                "gpu.capacity_mib ({}) must hold at least one chunk of host.chunk_mib ({chunk_mib}), or be 0",
                gpu.capacity_mib
            ));
        }
        if !(1..=1 << 20).contains(&gpu.in_flight_mib) {
            return wrong(format!("gpu.in_flight_mib is {}; it must be 1 to 1048576", gpu.in_flight_mib));
        }
        for (i, device) in gpu.devices.iter().enumerate() {
            if gpu.devices[..i].contains(device) {
                return wrong(format!("gpu.devices lists {device} twice"));
            }
        }
        match u32::try_from(gpu.capacity_mib / chunk_mib) {
            Ok(chunks) if gpu.capacity_mib <= u64::MAX / MIB => Ok(chunks),
            _ => wrong("gpu.capacity_mib / host.chunk_mib is too large".into()),
        }
    }
}
