//! The CUDA sources, what they are specialised by, and the parameters of their kernels. Nothing here needs CUDA: compiling and
//! launching is `cairn-gpu`'s.
//!
//! A [`Program`] is one source file with its definitions: a model's shape is known when its kernels are compiled, so loops are
//! unrolled for it. Every kernel takes one struct by value; the structs here have the same layout as those in the sources (a
//! launcher checks their sizes against the compiled kernel).

use crate::KvType;
use bytemuck::{Pod, Zeroable};

const COMMON: &str = include_str!("../cuda/common.cuh");

/// Compute capabilities that the kernels are held to compile for, as `90` for 9.0.
pub const ARCHITECTURES: [u32; 4] = [80, 90, 100, 120];

/// The oldest that can run them: bf16 and its tensor-core products begin there.
pub const LEAST_ARCHITECTURE: u32 = 80;

/// Number format of blocks on tiers and wires.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WireType {
    /// As in the pool or another of the same kind.
    Kv(KvType),
    /// Eight bits with a scale for each layer, side and head, behind the block's numbers.
    E4m3,
}

/// Number format of what goes into matrix products.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ActType {
    /// Exact, slow.
    F32,
    /// Full range.
    Bf16,
    /// Finer.
    F16,
}

impl ActType {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }

    const fn tag(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::Bf16 => "Bf16",
            Self::F16 => "F16",
        }
    }
}

impl WireType {
    const fn tag(self) -> &'static str {
        match self {
            Self::Kv(kv_type) => tag(kv_type),
            Self::E4m3 => "E4m3",
        }
    }
}

const fn tag(kv_type: KvType) -> &'static str {
    match kv_type {
        KvType::F32 => "F32",
        KvType::F16 => "F16",
        KvType::Bf16 => "Bf16",
    }
}

/// Shape of heads and blocks, as kernels are specialised by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HeadShape {
    /// KV heads.
    pub kv_heads: usize,
    /// Query heads of each KV head: at most 16.
    pub group: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Tokens of a block.
    pub block_tokens: usize,
}

impl HeadShape {
    /// # Errors
    /// What the attention kernels cannot do, in words.
    pub fn check(&self) -> Result<(), String> {
        let Self { kv_heads, group, head_dim, block_tokens } = *self;
        if ![64, 128].contains(&head_dim) {
            return Err(format!("heads of {head_dim} elements; the CUDA kernels are for 64 and 128"));
        }
        if !(1..=16).contains(&group) || kv_heads == 0 {
            return Err(format!("{group} query heads for each KV head; the CUDA kernels take 1 to 16"));
        }
        if block_tokens == 0 || !block_tokens.is_multiple_of(16) {
            return Err(format!("blocks of {block_tokens} tokens; multiples of 16 only"));
        }
        Ok(())
    }

    /// Query rows of one [`Tile`], at most.
    pub const fn tile_rows(&self) -> usize {
        16 / self.group
    }
}

/// Keys of one split of the context: partial softmaxes are merged at these places, whoever computes.
pub const SPLIT_KEYS: usize = 256;

/// Threads of a block, and warps, of the attention kernels.
pub const ATTENTION_THREADS: u32 = 128;

/// Threads of a block of `sample`.
pub const SAMPLE_THREADS: u32 = 512;

/// One source file with its definitions.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Program {
    /// Of the file, without its ending.
    pub name: &'static str,
    /// `NAME=VALUE` or `NAME`.
    pub definitions: Vec<String>,
    /// Entry points.
    pub kernels: &'static [&'static str],
}

impl Program {
    /// Copies between canonical blocks and a pool; [`PagedShape`](crate::PagedShape)'s heads and blocks.
    pub fn paged(
        wire: WireType,
        kv_type: KvType,
        kv_heads: usize,
        head_dim: usize,
        block_tokens: usize,
    ) -> Self {
        let definitions = vec![
            format!("WIRE={}", wire.tag()),
            format!("KV={}", tag(kv_type)),
            format!("KV_HEADS={kv_heads}"),
            format!("HEAD_DIM={head_dim}"),
            format!("BLOCK_TOKENS={block_tokens}"),
        ];
        Self { name: "paged", definitions, kernels: &["scatter", "gather"] }
    }

    /// Everything of a layer but products and attention.
    pub fn layers(act: ActType, kv_type: KvType, shape: &HeadShape) -> Self {
        let definitions = vec![
            format!("ACT={}", act.tag()),
            format!("KV={}", tag(kv_type)),
            format!("HEAD_DIM={}", shape.head_dim),
            format!("BLOCK_TOKENS={}", shape.block_tokens),
        ];
        Self { name: "layers", definitions, kernels: &["embed", "rms_norm", "rotate", "gate"] }
    }

    /// Attention; `plain` does without tensor cores, as pools in single precision always do.
    pub fn attention(act: ActType, kv_type: KvType, shape: &HeadShape, plain: bool) -> Self {
        let mut definitions = vec![
            format!("ACT={}", act.tag()),
            format!("KV={}", tag(kv_type)),
            format!("HEAD_DIM={}", shape.head_dim),
            format!("KV_HEADS={}", shape.kv_heads),
            format!("GROUP={}", shape.group),
            format!("BLOCK_TOKENS={}", shape.block_tokens),
        ];
        if plain || kv_type == KvType::F32 {
            definitions.push("PLAIN".into());
        }
        Self { name: "attention", definitions, kernels: &["prefill", "decode", "merge"] }
    }

    /// From logits to tokens.
    pub fn sampling() -> Self {
        Self { name: "sampling", definitions: Vec::new(), kernels: &["sample"] }
    }

    /// Checksums of blocks.
    pub fn checksum() -> Self {
        Self { name: "checksum", definitions: Vec::new(), kernels: &["checksum_sums", "checksum_chain"] }
    }

    /// Registers that a thread of a kernel may use. Two blocks of attention must fit beside each other on a multiprocessor, and at least three of
    /// what moves memory, or too few loads are in flight; of what moves eight or 32 bits a number less is enough. The attention
    /// without tensor cores is for comparing, not for speed.
    pub fn register_budget(&self, kernel: &str) -> u32 {
        let has = |name: &str| self.definitions.iter().any(|definition| definition == name);
        match kernel {
            "prefill" | "decode" if has("PLAIN") => 255,
            "prefill" | "decode" => 240,
            "scatter" | "gather" if has("WIRE=E4m3") => 168,
            "scatter" | "gather" if has("WIRE=F32") => 112,
            "scatter" | "gather" => 84,
            // One warp for each block: what counts is how many of its sums are on their way.
            "checksum_chain" => 96,
            _ => 64,
        }
    }

    /// The whole source.
    pub fn source(&self) -> String {
        let file = match self.name {
            "paged" => include_str!("../cuda/paged.cu"),
            "layers" => include_str!("../cuda/layers.cu"),
            "attention" => include_str!("../cuda/attention.cu"),
            "checksum" => include_str!("../cuda/checksum.cu"),
            _ => include_str!("../cuda/sampling.cu"),
        };
        [COMMON, file].concat()
    }

    /// Every program that a check must compile: each source in the shapes and formats of the models that are served.
    pub fn all() -> Vec<Self> {
        let bf16 = KvType::Bf16;
        let mut all = vec![Self::sampling(), Self::checksum()];
        for (kv_heads, group, head_dim) in [(3, 3, 64), (8, 4, 64), (8, 4, 128), (8, 8, 128), (2, 7, 64)] {
            let shape = HeadShape { kv_heads, group, head_dim, block_tokens: 16 };
            all.push(Self::attention(ActType::Bf16, bf16, &shape, false));
        }
        let shape = HeadShape { kv_heads: 8, group: 4, head_dim: 128, block_tokens: 32 };
        all.push(Self::attention(ActType::F16, KvType::F16, &shape, false));
        all.push(Self::attention(ActType::Bf16, bf16, &shape, true));
        all.push(Self::attention(ActType::F32, KvType::F32, &shape, true));
        for (act, kv_type) in
            [(ActType::Bf16, bf16), (ActType::F16, KvType::F16), (ActType::F32, KvType::F32)]
        {
            all.push(Self::layers(act, kv_type, &shape));
        }
        for kv_type in [KvType::F32, KvType::F16, bf16] {
            for wire in
                [WireType::Kv(KvType::F32), WireType::Kv(KvType::F16), WireType::Kv(bf16), WireType::E4m3]
            {
                all.push(Self::paged(wire, kv_type, 8, 128, 16));
            }
        }
        all
    }
}

/// The parameter of a kernel.
pub trait Params: Pod {}

macro_rules! params {
    ($($(#[$note:meta])* $name:ident { $($(#[$field_note:meta])* $field:ident: $type:ty,)* })*) => {$(
        $(#[$note])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Pod, Zeroable)]
        #[allow(missing_docs)] // The fields are explained in the source of the kernel.
        pub struct $name {
            $($(#[$field_note])* pub $field: $type,)*
        }
    )*};
}

params! {
    /// One block: where it is in the staging memory, and its slot.
    MoveEntry { staging_offset: u64, slot: u64, }
    /// `scatter`, `gather`.
    MoveParams {
        staging: u64, pool: u64, moves: u64, count: u32, slots: u32, first_layer: u32, layers: u32, all_layers: u32,
        padding: u32,
    }
    /// `embed`.
    EmbedParams { table: u64, tokens: u64, out: u64, rows: u32, width: u32, }
    /// `rms_norm`.
    NormParams { x: u64, delta: u64, weight: u64, chosen: u64, out: u64, width: u32, epsilon: f32, }
    /// `rotate`.
    RotateParams {
        qkv: u64, bias: u64, query_norm: u64, key_norm: u64, rope: u64, positions: u64, tables: u64, starts: u64, queries: u64,
        pool: u64, rows: u32, heads: u32, kv_heads: u32, layer: u32, slots: u32, epsilon: f32,
    }
    /// `gate`.
    GateParams { gate_up: u64, out: u64, rows: u32, width: u32, }
    /// Consecutive rows of one sequence.
    Tile { first_row: u32, rows: u32, start: u32, first_position: u32, }
    /// `prefill`, `decode`, `merge`.
    AttentionParams {
        queries: u64, out: u64, pool: u64, tables: u64, tiles: u64, partial: u64, partial_ml: u64, count: u32, splits: u32,
        layer: u32, slots: u32, scale: f32, padding: u32,
    }
    /// One block: where its first byte is, and the seed of its checksum.
    ChecksumBlock { offset: u64, seed: u64, }
    /// `checksum_sums`, `checksum_chain`.
    ChecksumParams { data: u64, blocks: u64, sums: u64, out: u64, bytes: u64, count: u32, chunks: u32, }
    /// `sample`.
    SampleParams { logits: u64, settings: u64, out: u64, width: u32, padding: u32, }
    /// How the token of a row is chosen: greedily where the temperature is 0; `uniform` is in `0..1`.
    SampleSetting { temperature: f32, top_p: f32, uniform: f32, }
}

impl Params for MoveParams {}
impl Params for EmbedParams {}
impl Params for NormParams {}
impl Params for RotateParams {}
impl Params for GateParams {}
impl Params for AttentionParams {}
impl Params for SampleParams {}
impl Params for ChecksumParams {}
