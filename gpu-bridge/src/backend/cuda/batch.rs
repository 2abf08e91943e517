//! What one pass computes, checked on the host and uploaded in one copy: tokens, positions, the slots of sequences, and how attention
//! cuts the rows into tiles.

use super::memory::CudaMemory;
use super::stream::CudaStream;
use crate::{DeviceError, Slot};
use cairn_kernels::cuda::{HeadShape, SPLIT_KEYS, Tile};
use std::collections::HashSet;
use std::ops::Range;

/// Limits that the indices of a batch are checked against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchLimits {
    /// Tokens of the vocabulary.
    pub vocabulary: usize,
    /// Longest sequence.
    pub positions: usize,
    /// Slots of the pool.
    pub slots: usize,
}

/// One token to compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchRow<'a> {
    /// Its id.
    pub token: u32,
    /// Its place in its sequence.
    pub position: usize,
    /// The slots of its sequence, at least up to its position. Rows that follow each other with the same slice and rising positions are
    /// computed together.
    pub slots: &'a [Slot],
}

/// A checked batch, still on the host.
#[derive(Clone, Debug)]
pub struct Plan {
    shape: HeadShape,
    limits: BatchLimits,
    rows: usize,
    /// All arrays of the batch as one, each from a multiple of sixteen bytes on.
    words: Vec<u32>,
    tokens: Range<usize>,
    positions: Range<usize>,
    starts: Range<usize>,
    tables: Range<usize>,
    chosen: Range<usize>,
    prefill: Range<usize>,
    decode: Range<usize>,
    /// Splits of the longest context of a row that is alone in its tile.
    splits: usize,
    /// Whether each row is a sequence.
    answers: bool,
}

/// So few rows of one sequence are computed each by itself, with its context spread over the device, where that is long: one tile would leave
/// most of the device idle. Beyond that reading the context once for all of them is better.
const SPREAD_ROWS: usize = 8;

/// Rows of all sequences together that are spread so: each takes memory for the parts of its context.
const SPREAD_IN_ALL: usize = 32;

/// The shortest context that is worth it.
const SPREAD_FROM: usize = 4 * SPLIT_KEYS;

const TILE_WORDS: usize = size_of::<Tile>() / 4;

impl Plan {
    /// Checks rows, and the rows whose logits are wanted.
    ///
    /// # Errors
    /// When an index is out of range.
    pub fn new(
        shape: HeadShape,
        limits: BatchLimits,
        rows: &[BatchRow<'_>],
        chosen: &[usize],
    ) -> Result<Self, DeviceError> {
        shape.check().map_err(DeviceError::Failed)?;
        let wrong = |text: String| Err(DeviceError::Failed(text));
        if let Some(row) = chosen.iter().find(|row| **row >= rows.len()) {
            return wrong(format!("row {row} of {}", rows.len()));
        }
        let distinct: HashSet<usize> = chosen.iter().copied().collect();
        if distinct.len() != chosen.len() {
            // The last norm adds to what it reads: once.
            return wrong("a row is chosen twice".into());
        }
        for row in rows {
            if row.token as usize >= limits.vocabulary || row.position >= limits.positions {
                return wrong(format!("token {} at position {} is out of range", row.token, row.position));
            }
            if row.position / shape.block_tokens >= row.slots.len() {
                return wrong(format!("position {} is beyond the slots of its sequence", row.position));
            }
        }
        let mut words = Vec::new();
        let mut section = |values: &mut dyn Iterator<Item = u32>| {
            let start = words.len();
            words.extend(values);
            let range = start..words.len();
            words.resize(words.len().next_multiple_of(4), 0);
            range
        };
        let (mut tables, mut starts) = (Vec::new(), Vec::new());
        // A row alone has too little work for one warp a head: its context is spread.
        let (mut alone, mut together) = (Vec::new(), Vec::new());
        let (mut answers, mut spread) = (true, 0);
        for sequence in sequences(rows) {
            let first = &rows[sequence.start];
            if let Some(slot) = first.slots.iter().find(|slot| slot.0 as usize >= limits.slots) {
                return wrong(format!("slot {} of {}", slot.0, limits.slots));
            }
            answers &= sequence.len() == 1;
            let spreads = sequence.len() == 1 || spreads(sequence.len(), first.position, &mut spread);
            let (tiles, tile_rows) =
                if spreads { (&mut alone, 1) } else { (&mut together, shape.tile_rows()) };
            let start = tables.len() as u32;
            tables.extend(first.slots.iter().map(|slot| slot.0));
            starts.resize(sequence.end, start);
            for first_row in sequence.clone().step_by(tile_rows) {
                let count = tile_rows.min(sequence.end - first_row);
                let first_position = rows[first_row].position as u32;
                tiles.push(Tile { first_row: first_row as u32, rows: count as u32, start, first_position });
            }
        }
        let longest = alone.iter().map(|tile: &Tile| tile.first_position as usize + 1).max().unwrap_or(0);
        let flat = |tiles: &[Tile]| bytemuck::cast_slice::<Tile, u32>(tiles).to_vec();
        Ok(Self {
            shape,
            limits,
            rows: rows.len(),
            tokens: section(&mut rows.iter().map(|row| row.token)),
            positions: section(&mut rows.iter().map(|row| row.position as u32)),
            starts: section(&mut starts.into_iter()),
            chosen: section(&mut chosen.iter().map(|row| *row as u32)),
            prefill: section(&mut flat(&together).into_iter()),
            decode: section(&mut flat(&alone).into_iter()),
            // Last, so that the places of all others follow from the number of rows where each row is a sequence.
            tables: section(&mut tables.into_iter()),
            words,
            splits: longest.div_ceil(SPLIT_KEYS),
            answers,
        })
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    pub(super) fn words(&self) -> usize {
        self.words.len()
    }

    /// Rows whose logits are wanted.
    pub fn chosen(&self) -> usize {
        self.chosen.len()
    }
}

/// Whether the rows of a sequence are computed each by itself, beside so many others.
fn spreads(rows: usize, position: usize, others: &mut usize) -> bool {
    let spreads = rows <= SPREAD_ROWS && position >= SPREAD_FROM && *others + rows <= SPREAD_IN_ALL;
    *others += if spreads { rows } else { 0 };
    spreads
}

/// Runs of rows at rising positions of the same slice of slots.
fn sequences(rows: &[BatchRow<'_>]) -> Vec<Range<usize>> {
    let mut found = Vec::new();
    let mut start = 0;
    for end in 1..=rows.len() {
        let same = |a: &BatchRow<'_>, b: &BatchRow<'_>| {
            std::ptr::eq(a.slots, b.slots) && a.position + 1 == b.position
        };
        if end == rows.len() || !same(&rows[end - 1], &rows[end]) {
            found.push(start..end);
            start = end;
        }
    }
    found
}

/// A batch on the device.
pub struct Batch {
    plan: Plan,
    memory: CudaMemory,
}

/// Tiles of one kind.
pub(super) struct Tiles {
    pub(super) address: u64,
    pub(super) count: u32,
}

impl Batch {
    /// Uploads a plan.
    ///
    /// # Errors
    /// When there is no memory.
    pub fn upload(stream: &CudaStream, plan: Plan) -> Result<Self, DeviceError> {
        Self::with_room(stream, plan, 0)
    }

    /// Uploads a plan into memory of the last one, if it has the room. Work that reads the last one must be of the same stream.
    pub(super) fn reusing(
        stream: &CudaStream,
        plan: Plan,
        last: Option<CudaMemory>,
    ) -> Result<Self, DeviceError> {
        match last.filter(|memory| memory.len() >= 4 * plan.words.len()) {
            None => Self::with_room(stream, plan.clone(), 2 * plan.words.len()),
            Some(memory) => {
                stream.upload(bytemuck::cast_slice(&plan.words), &memory, 0)?;
                Ok(Self { plan, memory })
            }
        }
    }

    /// An uploaded plan with room for more words: see [`Self::refill`].
    pub(super) fn with_room(stream: &CudaStream, plan: Plan, words: usize) -> Result<Self, DeviceError> {
        let memory = CudaMemory::allocate(stream.device().context(), 4 * words.max(plan.words.len()))?;
        stream.upload(bytemuck::cast_slice(&plan.words), &memory, 0)?;
        Ok(Self { plan, memory })
    }

    /// Whether another plan has its arrays at the same places, so that launches that were captured may run with it.
    pub(super) fn takes(&self, plan: &Plan) -> bool {
        let sections = |plan: &Plan| {
            [&plan.tokens, &plan.positions, &plan.starts, &plan.chosen, &plan.prefill, &plan.decode]
                .map(Range::clone)
        };
        plan.rows == self.plan.rows
            && sections(plan) == sections(&self.plan)
            && plan.tables.start == self.plan.tables.start
            && (plan.shape, plan.limits) == (self.plan.shape, self.plan.limits)
            && 4 * plan.words.len() <= self.memory.len()
    }

    /// Another plan at the same addresses.
    ///
    /// # Errors
    /// When it does not fit.
    pub(super) fn refill(&mut self, stream: &CudaStream, plan: Plan) -> Result<(), DeviceError> {
        if !self.takes(&plan) {
            return Err(DeviceError::Failed("a batch of another shape".into()));
        }
        stream.upload(bytemuck::cast_slice(&plan.words), &self.memory, 0)?;
        self.plan = plan;
        Ok(())
    }

    /// What was checked.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    pub(super) fn memory(&self) -> &CudaMemory {
        &self.memory
    }

    fn at(&self, words: &Range<usize>) -> u64 {
        self.memory.address() + 4 * words.start as u64
    }

    pub(super) fn tokens(&self) -> u64 {
        self.at(&self.plan.tokens)
    }

    pub(super) fn positions(&self) -> u64 {
        self.at(&self.plan.positions)
    }

    pub(super) fn starts(&self) -> u64 {
        self.at(&self.plan.starts)
    }

    pub(super) fn tables(&self) -> u64 {
        self.at(&self.plan.tables)
    }

    pub(super) fn chosen(&self) -> u64 {
        self.at(&self.plan.chosen)
    }

    pub(super) fn prefill(&self) -> Tiles {
        Tiles { address: self.at(&self.plan.prefill), count: (self.plan.prefill.len() / TILE_WORDS) as u32 }
    }

    pub(super) fn decode(&self) -> Tiles {
        Tiles { address: self.at(&self.plan.decode), count: (self.plan.decode.len() / TILE_WORDS) as u32 }
    }
}

impl Plan {
    pub(super) fn splits(&self) -> usize {
        self.splits
    }

    /// Grids and partial results for longer contexts than these rows have.
    pub(super) fn with_splits(mut self, splits: usize) -> Self {
        self.splits = self.splits.max(splits);
        self
    }

    /// Whether each row is a sequence.
    pub(super) fn is_decode(&self) -> bool {
        self.answers
    }

    pub(super) fn shape(&self) -> &HeadShape {
        &self.shape
    }

    pub(super) fn limits(&self) -> &BatchLimits {
        &self.limits
    }
}
