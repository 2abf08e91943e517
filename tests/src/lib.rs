//! What the whole-system tests share: servers on free loopback ports, small key spaces, and blocks with known bytes.

#![forbid(unsafe_code)]

mod checkpoints;
pub mod devices;
pub mod emulator;
pub mod fuzz;
pub mod gpu;
mod memory;
pub mod traces;
pub mod wires;

pub use checkpoints::{tiny_config, write_checkpoint};
pub use memory::corrupt_in_memory;

use cairn_client::{Block, CacheClient, ClientOptions};
use cairn_proto::{BlockHash, Checksum, Dtype, KeySpace, Layout, SpaceParts, chain};
use cairn_server::{Config, Server};
use std::time::Duration;

/// A small server configuration on free loopback ports: `slots` blocks of [`space`].
pub fn config(slots: u64) -> Config {
    let mut config = Config::default();
    config.server.listen = ([127, 0, 0, 1], 0).into();
    config.server.http_listen = ([127, 0, 0, 1], 0).into();
    config.server.shutdown_grace_ms = 2000;
    // Blocks of `space` are 256 KiB: four to a chunk of 1 MiB.
    config.host.chunk_mib = 1;
    config.host.capacity_mib = slots.div_ceil(4);
    config
}

/// A started server and a client of it.
pub async fn server_and_client(config: Config) -> (Server, CacheClient) {
    let server = Server::start(config).await.expect("a server starts on free ports");
    let client = client(&server);
    (server, client)
}

/// A client with short deadlines.
pub fn client(server: &Server) -> CacheClient {
    client_at(&format!("http://{}", server.address()))
}

/// A client with short deadlines.
pub fn client_at(endpoint: &str) -> CacheClient {
    let mut options = ClientOptions::new(endpoint);
    options.lookup_timeout = Duration::from_secs(5);
    CacheClient::start(options).expect("the endpoint is valid")
}

/// A key space with blocks of 256 KiB and 16 tokens.
pub fn space(tenant: &str) -> KeySpace {
    space_with(tenant, Layout::new(8, 4, 128, 16).expect("a valid layout"))
}

/// A key space of this layout, in bf16.
pub fn space_with(tenant: &str, layout: Layout) -> KeySpace {
    KeySpace::new(SpaceParts::new(tenant, [1; 32], Dtype::Bf16, layout)).expect("a valid key space")
}

/// The chain of a made-up prompt: `seed` decides its tokens.
pub fn hashes(space: &KeySpace, seed: u32, blocks: usize) -> Vec<BlockHash> {
    let tokens: Vec<u32> =
        (0..(blocks * space.layout().block_tokens()) as u32).map(|i| i ^ (seed << 20)).collect();
    chain(space, &tokens, |_| &[])
}

/// The bytes that tests store under a hash: any two blocks differ everywhere.
pub fn payload(space: &KeySpace, hash: &BlockHash) -> Vec<u8> {
    let len = space.block_bytes() as usize;
    (0..len).map(|i| hash.0[i % 32] ^ (i / 32) as u8).collect()
}

/// Ready to publish.
pub fn blocks(space: &KeySpace, hashes: &[BlockHash]) -> Vec<Block> {
    let block = |hash: &BlockHash| {
        let bytes = payload(space, hash);
        Block { hash: *hash, checksum: Checksum::of(&space.id(), hash, &bytes), bytes: bytes.into() }
    };
    hashes.iter().map(block).collect()
}

/// Looks a chain up, fetches what is resident, checks every byte, and returns how many blocks that were.
pub async fn fetch_verified(client: &CacheClient, space: &KeySpace, hashes: &[BlockHash]) -> usize {
    let lookup = client.lookup(space, hashes).await;
    let Some(run) = lookup.run else { return 0 };
    let mut targets = vec![vec![0u8; space.block_bytes() as usize]; run.len()];
    let outcomes = client.fetch(&run, 0, &mut targets).await;
    let mut verified = 0;
    for ((outcome, target), hash) in outcomes.iter().zip(&targets).zip(hashes) {
        if outcome.is_hit() {
            assert!(*target == payload(space, hash), "a hit with wrong bytes");
            verified += 1;
        }
    }
    verified
}

/// Rounds of ten milliseconds that tests wait for something: half a minute, because machines may be slow.
pub const PATIENCE: usize = 3000;

/// Waits until `condition` holds.
///
/// # Panics
/// When it does not in half a minute.
pub async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    for _ in 0..PATIENCE {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("still not after half a minute: {what}");
}
