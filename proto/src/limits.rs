//! Every bound on what may cross the wire, with its reason. Both ends enforce them.

/// Version of the API spoken by this build; a session that asks for another one is refused.
pub const API_VERSION: u32 = 1;

/// Blocks in one request: 16,384 blocks of 16 tokens cover a 262,144-token prompt.
pub const MAX_BLOCKS_PER_REQUEST: usize = 16_384;

/// Bytes of one block: room for 512 tokens of a 70B-class model in bf16, with margin.
pub const MAX_BLOCK_BYTES: u64 = 256 << 20;

/// Bytes of one gRPC message, either way: a chunk plus its framing, far below what could exhaust a server.
pub const MAX_MESSAGE_BYTES: usize = 4 << 20;

/// Block bytes packed into one streamed message: measured best between 256 KiB and 2 MiB on loopback.
pub const CHUNK_BYTES: usize = 1 << 20;

/// Slots of host memory start at multiples of this: pages, so that devices can read and write them directly.
pub const SLOT_ALIGN_BYTES: u64 = 4096;

/// Bytes of any name (tenant, client, LoRA adapter).
pub const MAX_NAME_BYTES: usize = 256;

/// Bytes of one extra key of a block (a multimodal content hash, say).
pub const MAX_EXTRA_KEY_BYTES: usize = 4096;

/// Longest lease or reservation that a client may ask for: an abandoned one must not pin memory for long.
pub const MAX_TTL_MS: u32 = 120_000;

/// Lease time when the client asks for none.
pub const DEFAULT_TTL_MS: u32 = 30_000;

/// Tokens in one block: larger blocks make reuse too coarse to be useful.
pub const MAX_BLOCK_TOKENS: u32 = 4096;

/// Layers, KV heads and head elements: above every published model, small enough that sizes cannot overflow.
pub const MAX_LAYOUT_AXIS: u32 = 65_536;

/// Tokens in one prefill request between workers.
pub const MAX_PREFILL_TOKENS: usize = 1 << 20;
