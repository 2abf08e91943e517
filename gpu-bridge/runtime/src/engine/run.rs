//! The engine's thread: admit, load, compute a pass, hand out tokens, publish what became complete.

use super::costs::Costs;
use super::{Command, EngineOptions, Finish, Sequence, Update, Work};
use crate::compute::{Compute, LoadedBlocks, Pass};
use crate::forward::Row;
use crate::model::Model;
use crate::share::{LoadJob, Loaded, PublishBatch, Share};
use cairn_gpu::{BlockPool, DeviceError, PagedShape, Slot};
use cairn_kernels::cuda::SampleSetting;
use cairn_proto::{BlockHasher, SpaceId};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// Blocks gathered and published in one batch: bounds the memory of one message between the engine and the publisher.
const PUBLISH_BATCH: usize = 64;

/// Tokens that are computed once at the start.
const CALIBRATION_TOKENS: usize = 64;

/// So many times, but no longer than this beyond the second.
const CALIBRATION_PASSES: usize = 5;
const CALIBRATION_TIME: Duration = Duration::from_millis(500);

pub(super) struct Loop {
    model: Arc<Model>,
    options: EngineOptions,
    shape: PagedShape,
    compute: Compute,
    blocks: BlockPool,
    hasher: BlockHasher,
    space: SpaceId,
    share: Option<Share>,
    /// To be told of finished loads; weak, so that the engine ends when its last user is gone.
    loads: mpsc::WeakSender<Command>,
    waiting: VecDeque<Sequence>,
    loading: BTreeMap<u64, Sequence>,
    running: Vec<Sequence>,
    costs: Costs,
    next_id: u64,
    /// Set when a sequence had to give its slots up: nobody is admitted until another one ends, or the room would go
    /// back and forth for ever.
    crowded: bool,
}

/// A part of a sequence that the next pass computes.
struct Part {
    sequence: usize,
    count: usize,
    /// It ends with the last known token, so its logits give the next.
    ends: bool,
}

impl Loop {
    pub(super) fn new(
        model: Arc<Model>,
        options: EngineOptions,
        shape: PagedShape,
        compute: Compute,
        share: Option<Share>,
        loads: mpsc::WeakSender<Command>,
    ) -> Self {
        // Without a cache the chain only names blocks inside this worker.
        let space = share.as_ref().map_or(SpaceId(model.fingerprint), |share| share.space().id());
        Self {
            blocks: BlockPool::new(shape.slots as u32),
            model,
            options,
            shape,
            compute,
            hasher: BlockHasher::default(),
            space,
            share,
            loads,
            waiting: VecDeque::new(),
            loading: BTreeMap::new(),
            running: Vec::new(),
            costs: Costs::default(),
            next_id: 0,
            crowded: false,
        }
    }

    pub(super) fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        loop {
            while let Ok(command) = commands.try_recv() {
                self.command(command);
            }
            self.drop_cancelled();
            self.admit();
            let progress = match self.step() {
                Ok(progress) => progress,
                Err(error) => {
                    // Nothing can be computed any more. Whoever waits for an answer sees it end.
                    tracing::error!(%error, "the device failed; this worker computes nothing any more");
                    return;
                }
            };
            if !progress {
                match commands.blocking_recv() {
                    Some(command) => self.command(command),
                    None => return,
                }
            }
        }
    }

    /// Computes some tokens of no request, to know what a token costs before the first choice between loading and computing.
    pub(super) fn calibrate(&mut self) -> Result<(), DeviceError> {
        if self.share.is_none() || self.options.always_load {
            return Ok(());
        }
        let block_tokens = self.shape.block_tokens;
        let wanted = CALIBRATION_TOKENS.min(self.options.chunk_tokens).min(self.model.config.max_positions);
        let slots: Vec<Slot> = (0..wanted.div_ceil(block_tokens)).map_while(|_| self.blocks.take()).collect();
        let tokens = wanted.min(slots.len() * block_tokens);
        let began = Instant::now();
        // The first time, memory is touched that was not before; others may be disturbed, so the best counts.
        let mut best: Option<Duration> = None;
        for pass in 0..CALIBRATION_PASSES {
            let rows: Vec<Row> =
                (0..tokens).map(|position| Row { token: 0, position, slots: &slots }).collect();
            let pass_began = Instant::now();
            self.compute.pass(&Pass { rows: &rows, wanted: &[], completes: &[], answers: false })?;
            let took = pass_began.elapsed();
            best = if pass == 0 { None } else { Some(best.map_or(took, |best| best.min(took))) };
            if pass > 0 && began.elapsed() > CALIBRATION_TIME {
                break;
            }
        }
        if let Some(best) = best {
            tracing::debug!(tokens, ms = 1e3 * best.as_secs_f64(), "calibrated");
            self.costs.computed(tokens, best);
        }
        self.blocks.release(&slots);
        Ok(())
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Submit(sequence) => self.waiting.push_back(*sequence),
            Command::Loaded(loaded) => self.loaded(loaded),
        }
    }

    fn drop_cancelled(&mut self) {
        self.waiting.retain(|sequence| !sequence.cancelled());
        let mut kept = Vec::with_capacity(self.running.len());
        for sequence in std::mem::take(&mut self.running) {
            if sequence.cancelled() {
                self.let_go(&sequence);
                self.crowded = false;
            } else {
                kept.push(sequence);
            }
        }
        self.running = kept;
    }

    fn admit(&mut self) {
        self.crowded &= !self.running.is_empty();
        while !self.crowded && self.running.len() + self.loading.len() < self.options.max_sequences {
            let Some(next) = self.waiting.front() else { return };
            // One alone always fits; beside others it waits until the pool can hold all that is known of it.
            let alone = self.running.is_empty() && self.loading.is_empty();
            if !alone && next.tokens.len().div_ceil(self.shape.block_tokens) > self.blocks.available() {
                return;
            }
            if let Some(sequence) = self.waiting.pop_front() {
                self.start(sequence);
            }
        }
    }

    /// Gives the slots of an ended sequence back.
    fn let_go(&mut self, sequence: &Sequence) {
        self.blocks.release(&sequence.slots);
        if !self.options.local_reuse {
            self.blocks.clear();
        }
    }

    /// Takes what the pool still has, and asks the cache for more.
    fn start(&mut self, mut sequence: Sequence) {
        let block_tokens = self.shape.block_tokens;
        sequence.extend_hashes(&self.hasher, &self.space, block_tokens);
        if !sequence.use_cache {
            return self.running.push(sequence);
        }
        let reusable = sequence.reusable_blocks(block_tokens);
        sequence.slots = self.blocks.share(&sequence.hashes[..reusable]);
        let local = sequence.slots.len();
        sequence.named = local;
        sequence.computed = local * block_tokens;
        sequence.summary.local_tokens = sequence.computed.min(sequence.prompt);
        sequence.shared = self.share.as_ref().map(|_| local);
        // A prefill must know what the cache has; a generation only if the pool lacks something.
        let ask = reusable > 0 && (local < reusable || sequence.work == Work::Prefill);
        let ask = ask && !self.recomputes(&mut sequence, reusable - local);
        match (&self.share, self.loads.upgrade()) {
            (Some(share), Some(loads)) if ask => {
                let id = self.next_id;
                self.next_id += 1;
                // Room first: what is fetched has a place, so memory for fetches is bounded by the pool.
                sequence.slots.extend((local..reusable).map_while(|_| self.blocks.take()));
                let job = LoadJob {
                    id,
                    room: sequence.slots.len() - local,
                    hashes: sequence.hashes[..reusable].to_vec(),
                    tokens: sequence.tokens[..reusable * block_tokens].to_vec(),
                    prompt: sequence.tokens.len(),
                    first: local,
                    may_delegate: sequence.work != Work::Prefill,
                    stager: self.compute.stager(),
                };
                share.load(job, loads);
                self.loading.insert(id, sequence);
            }
            _ => self.running.push(sequence),
        }
    }

    /// Whether so many missing blocks are computed without asking the cache, because loading them seems slower.
    fn recomputes(&mut self, sequence: &mut Sequence, missing: usize) -> bool {
        if self.options.always_load || self.share.is_none() || sequence.work == Work::Prefill {
            return false;
        }
        let bytes = (missing * self.shape.block_bytes()) as u64;
        let Some(forecast) = self.costs.forecast(missing * self.shape.block_tokens, bytes) else {
            return false;
        };
        let (load_ms, compute_ms) = (1e3 * forecast.load_s, 1e3 * forecast.compute_s);
        tracing::debug!(load_ms, compute_ms, load = forecast.load, "cached blocks: load or compute");
        sequence.summary.forecast_ms = Some([load_ms, compute_ms]);
        sequence.summary.recomputed = !forecast.load;
        !forecast.load
    }

    /// Puts loaded blocks into the pool and lets the sequence run.
    fn loaded(&mut self, loaded: Loaded) {
        let Some(mut sequence) = self.loading.remove(&loaded.id) else {
            return;
        };
        sequence.shared = loaded.resident;
        sequence.stored.store(loaded.resident.unwrap_or(0), Ordering::Relaxed);
        sequence.summary.load_ms = loaded.elapsed.as_secs_f64() * 1e3;
        sequence.summary.remote_prefill = loaded.delegated;
        sequence.summary.wire = loaded.wire;
        let count = loaded.blocks;
        if count > 0 && !loaded.delegated {
            self.costs.loaded((count * self.shape.block_bytes()) as u64, loaded.elapsed);
        }
        match loaded.arrived.map(|arrived| self.scatter(&mut sequence, arrived, count)) {
            Some(Ok(())) => {
                let tokens =
                    |blocks: usize| (blocks * self.shape.block_tokens).min(sequence.summary.loaded_tokens);
                let (copied, from_gpu) = loaded.near;
                let (copied, from_gpu) = (tokens(copied), tokens(from_gpu));
                sequence.summary.device_verified_tokens = copied;
                sequence.summary.gpu_tokens = from_gpu;
            }
            Some(Err(error)) => {
                tracing::error!(%error, "loaded blocks could not be placed; they are computed instead");
            }
            None => {}
        }
        self.running.push(sequence);
    }

    fn scatter(
        &mut self,
        sequence: &mut Sequence,
        arrived: LoadedBlocks,
        count: usize,
    ) -> Result<(), DeviceError> {
        let first = sequence.named;
        let slots = &sequence.slots[first..first + count];
        let bytes = self.shape.block_bytes();
        self.compute.place(arrived, slots)?;
        for (slot, hash) in slots.iter().zip(&sequence.hashes[first..]) {
            self.blocks.name(*slot, *hash);
        }
        sequence.computed += count * self.shape.block_tokens;
        sequence.named += count;
        sequence.summary.loaded_tokens =
            sequence.computed.min(sequence.prompt) - sequence.summary.local_tokens;
        sequence.summary.loaded_bytes += (count * bytes) as u64;
        Ok(())
    }

    /// One pass. Says whether there was anything to do.
    fn step(&mut self) -> Result<bool, DeviceError> {
        let mut running = std::mem::take(&mut self.running);
        let parts = self.plan(&mut running);
        let (began, waits) = (Instant::now(), self.compute.is_loading());
        let tokens = match self.compute(&mut running, &parts) {
            Ok(tokens) => tokens,
            Err(error @ DeviceError::Lost(_)) => return Err(error),
            Err(error) => {
                // Memory, most likely: what is waiting may need less.
                tracing::error!(%error, requests = running.len(), "a pass failed; its requests end with an error");
                running.iter().for_each(|sequence| self.let_go(sequence));
                return Ok(true);
            }
        };
        if !waits {
            self.took(&running, &parts, began.elapsed());
        }
        let mut tokens = tokens.into_iter();
        for part in &parts {
            let sequence = &mut running[part.sequence];
            sequence.computed += part.count;
            self.share_complete(sequence)?;
            if part.ends
                && let Some(token) = tokens.next()
            {
                self.advance(sequence, token);
            }
        }
        let before = running.len();
        let mut kept = Vec::with_capacity(before);
        for mut sequence in running {
            if !self.retire(&mut sequence)? {
                kept.push(sequence);
            }
        }
        let mut running = kept;
        self.crowded &= running.len() == before;
        let progress = !parts.is_empty() || running.len() < before;
        if !progress && let Some(youngest) = running.pop() {
            self.preempt(youngest);
        }
        self.running = running;
        Ok(progress || !self.running.is_empty() || (!self.waiting.is_empty() && self.loading.is_empty()))
    }

    /// What the next pass computes: one token of every answer first, then prompts in order, up to the budget.
    fn plan(&mut self, running: &mut [Sequence]) -> Vec<Part> {
        let block_tokens = self.shape.block_tokens;
        let mut budget = self.options.chunk_tokens;
        let mut parts = Vec::new();
        let is_answer = |sequence: &Sequence| sequence.remaining(block_tokens) == 1;
        let (answers, prompts): (Vec<usize>, Vec<usize>) =
            (0..running.len()).partition(|i| is_answer(&running[*i]));
        for index in answers.into_iter().chain(prompts) {
            let sequence = &mut running[index];
            let wanted = sequence.remaining(block_tokens).min(budget);
            let count = self.room_for(sequence, wanted);
            if count == 0 {
                continue;
            }
            budget -= count;
            let generates = sequence.work != Work::Prefill;
            let ends = generates && sequence.computed + count == sequence.tokens.len();
            parts.push(Part { sequence: index, count, ends });
        }
        parts
    }

    /// Takes slots for up to `wanted` more tokens; says how many fit.
    fn room_for(&mut self, sequence: &mut Sequence, wanted: usize) -> usize {
        let block_tokens = self.shape.block_tokens;
        let needed = (sequence.computed + wanted).div_ceil(block_tokens);
        while sequence.slots.len() < needed {
            match self.blocks.take() {
                Some(slot) => sequence.slots.push(slot),
                None => break,
            }
        }
        wanted.min(sequence.slots.len() * block_tokens - sequence.computed)
    }

    /// Remembers what a pass took, if it was about prompts.
    fn took(&mut self, running: &[Sequence], parts: &[Part], time: Duration) {
        let of_prompt = |part: &&Part| running[part.sequence].computed < running[part.sequence].prompt;
        let tokens: usize = parts.iter().filter(of_prompt).map(|part| part.count).sum();
        let others: usize = parts.iter().map(|part| part.count).sum::<usize>() - tokens;
        // Beside answers in progress a prompt pays for them too: a pass with few of them is a fair measure.
        if others * 4 <= tokens {
            self.costs.computed(tokens, time);
        }
    }

    /// Runs the model; the next token of each part that ends, in order.
    fn compute(&mut self, running: &mut [Sequence], parts: &[Part]) -> Result<Vec<u32>, DeviceError> {
        let completes = self.completes(running, parts);
        let settings: Vec<Option<SampleSetting>> =
            parts.iter().map(|part| part.ends.then(|| running[part.sequence].sampler.draw())).collect();
        let mut rows = Vec::new();
        let mut wanted = Vec::new();
        for (part, setting) in parts.iter().zip(settings) {
            let sequence = &running[part.sequence];
            let positions = sequence.computed..sequence.computed + part.count;
            rows.extend(positions.map(|position| Row {
                token: sequence.tokens[position],
                position,
                slots: &sequence.slots,
            }));
            wanted.extend(setting.map(|setting| (rows.len() - 1, setting)));
        }
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        let answers = parts.iter().all(|part| part.count == 1 && part.ends);
        self.compute.pass(&Pass { rows: &rows, wanted: &wanted, completes: &completes, answers })
    }

    /// Slots of the blocks that a pass completes and that are offered to the cache right after it, as [`Self::offer`] will.
    fn completes(&self, running: &[Sequence], parts: &[Part]) -> Vec<Vec<Slot>> {
        let mut completes = Vec::new();
        for part in parts {
            let sequence = &running[part.sequence];
            let full = (sequence.computed + part.count) / self.shape.block_tokens;
            if let (true, Some(shared), Some(_)) = (sequence.use_cache, sequence.shared, &self.share) {
                let mut starts = (shared..full).step_by(PUBLISH_BATCH);
                completes.extend(
                    starts
                        .next()
                        .map(|start| sequence.slots[start..full.min(start + PUBLISH_BATCH)].to_vec()),
                );
            }
        }
        completes
    }

    /// Names the blocks that became full, and offers them to the cache.
    fn share_complete(&mut self, sequence: &mut Sequence) -> Result<(), DeviceError> {
        if !sequence.use_cache {
            return Ok(());
        }
        let full = sequence.computed / self.shape.block_tokens;
        for block in sequence.named..full {
            self.blocks.name(sequence.slots[block], sequence.hashes[block]);
        }
        sequence.named = sequence.named.max(full);
        self.offer(sequence, full)
    }

    fn offer(&mut self, sequence: &mut Sequence, full: usize) -> Result<(), DeviceError> {
        let (Some(share), Some(mut shared)) = (&self.share, sequence.shared) else {
            return Ok(());
        };
        while shared < full {
            let end = full.min(shared + PUBLISH_BATCH);
            let gathered = match self.compute.gather(&sequence.slots[shared..end]) {
                Ok(gathered) => Some(gathered),
                Err(error @ DeviceError::Lost(_)) => return Err(error),
                Err(error) => {
                    tracing::warn!(%error, "blocks cannot leave the device; the rest of this sequence is not offered to the cache");
                    sequence.shared = None;
                    return Ok(());
                }
            };
            let hashes = sequence.hashes[shared..end].to_vec();
            let parent = shared.checked_sub(1).map(|block| sequence.hashes[block]);
            let stored = sequence.stored.clone();
            if !share.publish(PublishBatch { parent, hashes, gathered, stored, finish: None }) {
                tracing::warn!(
                    "publishing falls behind; the rest of this sequence is not offered to the cache"
                );
                sequence.shared = None;
                return Ok(());
            }
            shared = end;
        }
        sequence.shared = Some(shared);
        Ok(())
    }

    /// Adds the next token to an answer.
    fn advance(&mut self, sequence: &mut Sequence, token: u32) {
        let Work::Generate { max_tokens, ignore_end } = sequence.work else {
            return;
        };
        let summary = &mut sequence.summary;
        if summary.generated_tokens == 0 {
            summary.first_token_ms = sequence.submitted.elapsed().as_secs_f64() * 1e3;
        }
        if sequence.stop.load(Ordering::Relaxed) {
            sequence.ended = Some(Finish::Stop);
            return;
        }
        sequence.ended = if !ignore_end && self.model.tokenizer.is_end(token) {
            Some(Finish::Stop)
        } else {
            sequence.tokens.push(token);
            sequence.summary.generated_tokens += 1;
            // A reader that is gone is noticed before the next pass; the queue has room for every token.
            let _ = sequence.updates.try_send(Update::Token(token));
            (sequence.summary.generated_tokens >= max_tokens).then_some(Finish::Length)
        };
        sequence.extend_hashes(&self.hasher, &self.space, self.shape.block_tokens);
    }

    /// Ends a sequence that is done or cancelled; says whether it was.
    fn retire(&mut self, sequence: &mut Sequence) -> Result<bool, DeviceError> {
        let block_tokens = self.shape.block_tokens;
        if sequence.work == Work::Prefill && sequence.remaining(block_tokens) == 0 {
            self.offer(sequence, sequence.hashes.len())?;
            sequence.ended = Some(Finish::Stop);
        }
        let Some(finish) = sequence.ended else {
            return Ok(false);
        };
        self.let_go(sequence);
        let full = sequence.prompt / block_tokens;
        sequence.summary.finish = finish;
        sequence.summary.computed_blocks =
            full.saturating_sub(sequence.summary.cached_tokens() / block_tokens);
        let (summary, updates) = (sequence.summary.clone(), sequence.updates.clone());
        let stored = sequence.stored.clone();
        let last = PublishBatch {
            parent: None,
            hashes: Vec::new(),
            gathered: None,
            stored,
            finish: Some((summary.clone(), updates)),
        };
        // A prefill ends when its blocks are in the cache; an answer does not wait for that.
        let waits = sequence.work == Work::Prefill && sequence.shared.is_some();
        match &self.share {
            Some(share) if waits && share.publish(last) => {}
            _ => {
                let _ = sequence.updates.try_send(Update::Finished(summary));
            }
        }
        Ok(true)
    }

    /// Nothing fits: the youngest sequence gives its slots up and starts again later.
    fn preempt(&mut self, mut sequence: Sequence) {
        tracing::debug!("the pool is full: a sequence is put back");
        self.let_go(&sequence);
        sequence.slots.clear();
        sequence.computed = 0;
        sequence.named = 0;
        sequence.summary.local_tokens = 0;
        sequence.summary.loaded_tokens = 0;
        sequence.summary.gpu_tokens = 0;
        sequence.summary.device_verified_tokens = 0;
        self.crowded = true;
        self.waiting.push_front(sequence);
    }
}
