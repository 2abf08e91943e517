//! One pass of a batch of tokens through the model. Rows may belong to any sequences at any positions: because every
//! kernel is batch-invariant, a row's result depends on its sequence alone.

use crate::model::{LayerWeights, Model};
use cairn_kernels::{
    AttentionShape, KvView, PackedMatrix, PagedShape, QueryRow, Slot, add, apply_rope, matmul,
    paged_attention, rms_norm, swiglu, write_rows,
};
use rayon::prelude::*;

/// Rows that one thread normalises or gates at a time.
const ROWS_PER_TASK: usize = 16;

/// One token to compute.
#[derive(Clone, Copy, Debug)]
pub struct Row<'a> {
    /// Its id; below the vocabulary size.
    pub token: u32,
    /// Its place in its sequence.
    pub position: usize,
    /// The slots of its sequence, at least up to its position. Rows of one sequence must follow each other in order.
    pub slots: &'a [Slot],
}

/// Buffers kept between passes.
#[derive(Default)]
pub struct Scratch {
    hidden: Vec<f32>,
    normed: Vec<f32>,
    qkv: Vec<f32>,
    queries: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
    attended: Vec<f32>,
    gate_up: Vec<f32>,
    gated: Vec<f32>,
    delta: Vec<f32>,
}

impl Model {
    /// Computes `rows`, stores their keys and values in `pool`, and returns the logits of the rows in `logits_for`:
    /// `logits_for.len() × vocabulary`.
    ///
    /// # Panics
    /// When a token, position or slot is out of range, or the pool does not fit its shape.
    pub fn forward(
        &self,
        shape: &PagedShape,
        pool: &mut [u8],
        rows: &[Row<'_>],
        logits_for: &[usize],
        scratch: &mut Scratch,
    ) -> Vec<f32> {
        let config = &self.config;
        let hidden = config.hidden;
        let places: Vec<(Slot, usize)> = rows
            .iter()
            .map(|row| (row.slots[row.position / shape.block_tokens], row.position % shape.block_tokens))
            .collect();
        scratch.resize(self, rows.len());
        for (row, out) in rows.iter().zip(scratch.hidden.chunks_exact_mut(hidden)) {
            self.weights.embedding.row(row.token as usize, out);
        }
        for (index, layer) in self.weights.layers.iter().enumerate() {
            norm_rows(&scratch.hidden, &layer.input_norm, config.rms_epsilon, &mut scratch.normed);
            self.attend(shape, pool, (index, layer), rows, &places, scratch);
            add(&mut scratch.hidden, &scratch.delta);
            norm_rows(&scratch.hidden, &layer.post_norm, config.rms_epsilon, &mut scratch.normed);
            matmul(&scratch.normed, &layer.gate_up, &mut scratch.gate_up);
            gate_rows(&scratch.gate_up, config.intermediate, &mut scratch.gated);
            matmul(&scratch.gated, &layer.down, &mut scratch.delta);
            add(&mut scratch.hidden, &scratch.delta);
        }
        self.logits(&scratch.hidden, logits_for)
    }

    fn attend(
        &self,
        shape: &PagedShape,
        pool: &mut [u8],
        (index, layer): (usize, &LayerWeights),
        rows: &[Row<'_>],
        places: &[(Slot, usize)],
        scratch: &mut Scratch,
    ) {
        let config = &self.config;
        matmul(&scratch.normed, &layer.qkv, &mut scratch.qkv);
        self.split_and_rotate(layer, rows, scratch);
        write_rows(shape, pool, index, places, &scratch.keys, &scratch.values);
        let scale = 1.0 / (config.head_dim as f32).sqrt();
        let heads = AttentionShape { heads: config.heads, scale };
        let query = |row: &Row<'_>| -> usize { row.position + 1 };
        let queries: Vec<QueryRow<'_>> =
            rows.iter().map(|row| QueryRow { slots: row.slots, context: query(row) }).collect();
        let kv = KvView { shape, pool, layer: index };
        paged_attention(heads, kv, &queries, &scratch.queries, &mut scratch.attended);
        matmul(&scratch.attended, &layer.attention_output, &mut scratch.delta);
    }

    /// From rows of queries, keys and values to three buffers: biased, normed and rotated to their positions.
    fn split_and_rotate(&self, layer: &LayerWeights, rows: &[Row<'_>], scratch: &mut Scratch) {
        let config = &self.config;
        let (q, k) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let Scratch { qkv, queries, keys, values, .. } = scratch;
        let inputs = qkv.par_chunks_exact_mut(q + 2 * k).with_min_len(ROWS_PER_TASK).zip(rows);
        let outputs = queries.par_chunks_exact_mut(q).zip(keys.par_chunks_exact_mut(k));
        let outputs = outputs.zip(values.par_chunks_exact_mut(k));
        inputs.zip(outputs).for_each(|((input, row), ((queries, keys), values))| {
            if let Some(bias) = &layer.qkv_bias {
                add(input, bias);
            }
            queries.copy_from_slice(&input[..q]);
            keys.copy_from_slice(&input[q..q + k]);
            values.copy_from_slice(&input[q + k..]);
            if let Some((query_norm, key_norm)) = &layer.qk_norm {
                rms_norm(&input[..q], query_norm, config.rms_epsilon, queries);
                rms_norm(&input[q..q + k], key_norm, config.rms_epsilon, keys);
            }
            apply_rope(&self.rope, row.position, queries);
            apply_rope(&self.rope, row.position, keys);
        });
    }

    fn logits(&self, hidden: &[f32], logits_for: &[usize]) -> Vec<f32> {
        let (width, output): (usize, &PackedMatrix) = (self.config.hidden, self.weights.output());
        let chosen: Vec<f32> =
            logits_for.iter().flat_map(|row| hidden[row * width..][..width].iter().copied()).collect();
        let mut normed = vec![0.0; chosen.len()];
        norm_rows(&chosen, &self.weights.final_norm, self.config.rms_epsilon, &mut normed);
        let mut logits = vec![0.0; logits_for.len() * output.outputs()];
        matmul(&normed, output, &mut logits);
        logits
    }
}

impl Scratch {
    fn resize(&mut self, model: &Model, rows: usize) {
        let config = &model.config;
        let (q, k) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let sizes = [
            (&mut self.hidden, config.hidden),
            (&mut self.normed, config.hidden),
            (&mut self.qkv, q + 2 * k),
            (&mut self.queries, q),
            (&mut self.keys, k),
            (&mut self.values, k),
            (&mut self.attended, q),
            (&mut self.gate_up, 2 * config.intermediate),
            (&mut self.gated, config.intermediate),
            (&mut self.delta, config.hidden),
        ];
        for (buffer, width) in sizes {
            buffer.resize(rows * width, 0.0);
        }
    }
}

fn norm_rows(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
    let part = ROWS_PER_TASK * weight.len();
    if x.len() <= part {
        return rms_norm(x, weight, epsilon, out);
    }
    x.par_chunks(part).zip(out.par_chunks_mut(part)).for_each(|(x, out)| rms_norm(x, weight, epsilon, out));
}

fn gate_rows(gate_up: &[f32], width: usize, out: &mut [f32]) {
    let part = ROWS_PER_TASK * width;
    if out.len() <= part {
        return swiglu(gate_up, width, out);
    }
    gate_up
        .par_chunks(2 * part)
        .zip(out.par_chunks_mut(part))
        .for_each(|(gate_up, out)| swiglu(gate_up, width, out));
}
