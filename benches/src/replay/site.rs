//! The server of a replay, with tiers of the wanted sizes.

use super::Options;
use crate::limits::Tls;
use crate::{BenchError, OrFail};
use cairn_client::{CacheClient, ClientOptions, WireKind};
use cairn_proto::{Dtype, KeySpace, Layout, SpaceParts, limits};
use cairn_server::{Config, DeviceEntry, Server};
use std::path::PathBuf;
use std::time::Duration;

const MIB: u64 = 1 << 20;

/// Longest that anything may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// Segments of the second tier, about: small ones for small tiers.
const SEGMENTS: u64 = 64;
const MAX_SEGMENT_MIB: u64 = 256;

pub(super) struct Site {
    pub(super) server: Server,
    /// Blocks that host memory holds.
    pub(super) block_slots: u64,
    pub(super) space: KeySpace,
    certs: Tls,
    _folder: Option<tempfile::TempDir>,
}

impl Site {
    pub(super) async fn start(options: Options) -> Result<Self, BenchError> {
        let block_bytes = u64::from(options.block_kib) << 10;
        let layout = Layout::new(options.block_kib / 2, 1, 32, 16).or_fail("a block size in KiB, even")?;
        let space =
            KeySpace::new(SpaceParts::new("replay", [0; 32], Dtype::Bf16, layout)).or_fail("a key space")?;
        let certs = Tls::new()?;
        let mut config = Config::default();
        let any = ([127, 0, 0, 1], 0).into();
        (config.server.listen, config.server.http_listen) = (any, any);
        config.wires.data_listen = Some(any);
        config.tls.cert_file = Some(certs.certs.server.0.clone());
        config.tls.key_file = Some(certs.certs.server.1.clone());
        let slot_bytes = block_bytes.next_multiple_of(limits::SLOT_ALIGN_BYTES);
        let wanted = options.host.blocks(&options.trace, None).map_err(BenchError)?;
        config.host.chunk_mib = slot_bytes.div_ceil(MIB);
        let in_chunk = config.host.chunk_mib * MIB / slot_bytes;
        let chunks = wanted.div_ceil(in_chunk);
        config.host.capacity_mib = chunks * config.host.chunk_mib;
        config.host.policy = options.policies[0].name().into();
        config.host.prefault = false;
        let folder = match options.nvme {
            None => None,
            Some(capacity) => {
                let blocks = capacity.blocks(&options.trace, None).map_err(BenchError)?;
                let folder = tempfile::tempdir_in(&options.folder)
                    .or_fail(&format!("a folder below {}", options.folder.display()))?;
                second_tier(&mut config, (blocks, slot_bytes), folder.path().to_owned());
                config.nvme.policy = options.policies[1].name().into();
                Some(folder)
            }
        };
        let server = Server::start(config).await.or_fail("a server")?;
        Ok(Self { server, block_slots: chunks * in_chunk, space, certs, _folder: folder })
    }

    pub(super) fn client(&self, wire: Option<WireKind>) -> Result<CacheClient, BenchError> {
        let mut options = ClientOptions::new(format!("https://{}", self.server.address()));
        options.security.ca_file = Some(self.certs.certs.ca.clone());
        options.wire = wire;
        // How long things take is measured here, not decided.
        options.lookup_timeout = PATIENCE;
        options.fetch_timeout = PATIENCE;
        options.publish_timeout = PATIENCE;
        options.lease_ttl = 2 * PATIENCE;
        CacheClient::start(options).or_fail("a client")
    }
}

/// At least so many blocks, in segments that suit them.
fn second_tier(config: &mut Config, (blocks, slot_bytes): (u64, u64), path: PathBuf) {
    let record = slot_bytes + limits::SLOT_ALIGN_BYTES;
    let segment_mib = (blocks * record / SEGMENTS).div_ceil(MIB).clamp(1, MAX_SEGMENT_MIB);
    config.nvme.segment_mib = segment_mib.max((2 * record).div_ceil(MIB));
    let in_segment = (config.nvme.segment_mib * MIB - 4 * limits::SLOT_ALIGN_BYTES) / record;
    let kept = f64::from(100 - config.nvme.over_provision_percent) / 100.0;
    // Three are kept free, and what one gives is rounded down.
    let segments = (blocks as f64 / in_segment as f64 / kept).ceil() as u64 + 4;
    let capacity_mib = segments * config.nvme.segment_mib + cairn_server::nvme::METADATA_BYTES.div_ceil(MIB);
    config.nvme.device = vec![DeviceEntry { path, capacity_mib }];
    // Copies leave when there is no room, and for no other reason: as in the model.
    config.nvme.max_write_amplification = 1e6;
    // What is being checked cannot leave just then.
    config.nvme.scrub_mib_per_s = 0;
}
