//! The compute and copy kernels of the bundled runtime, for CPUs and for CUDA ([`mod@cuda`]), and beside each the same function
//! in plain Rust (the oracle, in [`mod@reference`]).
//!
//! Every kernel here is *batch-invariant*: a row's result is a fixed sequence of roundings that depends on that row
//! alone, never on how many rows are computed with it, how they are cut into chunks, how many threads take part,
//! or which instruction set is found. So the KV bytes of a block are a function of its tokens.

mod attention;
pub mod cuda;
mod elementwise;
mod lanes;
mod matmul;
mod paged;
pub mod reference;

pub use attention::{AttentionShape, KvView, QueryRow, paged_attention};
pub use elementwise::{RopeTable, add, apply_rope, rms_norm, swiglu};
pub use lanes::Isa;
pub use matmul::{PackedMatrix, WeightType, matmul};
pub use paged::{KvType, PagedShape, Slot, gather_block, scatter_block, write_rows};
