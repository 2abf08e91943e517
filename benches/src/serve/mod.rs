//! What a cache does to a serving endpoint: multi-turn chats, questions about long documents, agents; with the cache off, cold and warm.

mod client;
pub mod crossover;
mod link;
mod tables;
mod traffic;

pub use client::{Answer, Endpoint};
pub use link::Link;
pub use tables::{Slo, tables};
pub use traffic::{Kind, Session, Shape, traffic};

use crate::{BenchError, Watch};
use client::Message;
use futures::{StreamExt, TryStreamExt, stream};
use std::time::Instant;

/// One turn of one session.
#[derive(Clone, Debug)]
pub struct Turn {
    /// Which session.
    pub session: usize,
    /// Which of its turns, from 0.
    pub turn: usize,
    /// What came of it.
    pub answer: Answer,
}

/// All sessions once.
#[derive(Clone, Debug)]
pub struct Pass {
    /// `off`, `cold` or `warm`.
    pub name: String,
    /// In order of sessions and turns.
    pub turns: Vec<Turn>,
    /// From the first request to the last answer.
    pub wall_s: f64,
    /// Blocks found by the cache server meanwhile, by tier, where it is known.
    pub tiers: Vec<(String, u64)>,
    /// It was not ended early.
    pub complete: bool,
}

/// How sessions are sent.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Sessions at a time; each waits for its answers.
    pub concurrency: usize,
    /// Tokens of an answer.
    pub answer_tokens: u32,
    /// Not for the cache.
    pub use_cache: bool,
}

/// Sends all sessions to an endpoint.
///
/// # Errors
/// When a request fails.
pub async fn pass(
    name: &str,
    endpoint: &Endpoint,
    (sessions, load): (&[Session], Load),
    watch: &dyn Watch,
) -> Result<Pass, BenchError> {
    let started = Instant::now();
    let one = |(number, session)| play(endpoint, (number, session), load, (name, watch));
    let played: Vec<Vec<Turn>> =
        stream::iter(sessions.iter().enumerate().map(one)).buffered(load.concurrency).try_collect().await?;
    let turns: Vec<Turn> = played.into_iter().flatten().collect();
    let complete = turns.len() == sessions.iter().map(|session| session.turns.len()).sum::<usize>();
    let wall_s = started.elapsed().as_secs_f64();
    Ok(Pass { name: name.into(), turns, wall_s, tiers: Vec::new(), complete })
}

async fn play(
    endpoint: &Endpoint,
    (number, session): (usize, &Session),
    load: Load,
    (name, watch): (&str, &dyn Watch),
) -> Result<Vec<Turn>, BenchError> {
    let system: Message = ("system", session.system.clone());
    let mut messages = vec![system];
    let mut turns = Vec::new();
    for (turn, text) in session.turns.iter().enumerate() {
        if watch.stopped() {
            break;
        }
        if !session.history {
            messages.truncate(1);
        }
        messages.push(("user", text.clone()));
        let answer = endpoint.ask(&messages, load.answer_tokens, load.use_cache).await?;
        watch.step(&format!("cache {name}"));
        messages.push(("assistant", answer.text.clone()));
        turns.push(Turn { session: number, turn, answer });
    }
    Ok(turns)
}

/// Whether two passes got the same answers, as far as both went.
pub fn same_answers(one: &Pass, other: &Pass) -> bool {
    let pairs = one.turns.iter().filter_map(|turn| {
        let at = |that: &&Turn| (that.session, that.turn) == (turn.session, turn.turn);
        Some((turn, other.turns.iter().find(at)?))
    });
    pairs.into_iter().all(|(one, other)| one.answer.text == other.answer.text)
}
