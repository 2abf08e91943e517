//! Text from tokens, piece by piece: never half a character, never past a stop text.

use crate::model::TextTokenizer;

/// Tokens kept as context for the next piece: enough for any character split among tokens.
const CONTEXT_TOKENS: usize = 6;

pub(super) struct TextStream {
    stops: Vec<String>,
    ids: Vec<u32>,
    /// Tokens before this one are settled text.
    settled: usize,
    /// Text that might be the start of a stop text.
    held: String,
    stopped: bool,
}

impl TextStream {
    pub(super) fn new(stops: Vec<String>) -> Self {
        Self { stops, ids: Vec::new(), settled: 0, held: String::new(), stopped: false }
    }

    /// Whether a stop text was reached; what follows it is not wanted.
    pub(super) fn stopped(&self) -> bool {
        self.stopped
    }

    /// Adds a token; gives the text that is certain now.
    pub(super) fn push(&mut self, tokenizer: &TextTokenizer, id: u32) -> String {
        self.ids.push(id);
        let start = self.settled.saturating_sub(CONTEXT_TOKENS);
        let before = tokenizer.decode(&self.ids[start..self.settled]);
        let now = tokenizer.decode(&self.ids[start..]);
        if now.ends_with(char::REPLACEMENT_CHARACTER) && self.ids.len() - self.settled < CONTEXT_TOKENS {
            return String::new();
        }
        self.settled = self.ids.len();
        self.held.push_str(now.strip_prefix(before.as_str()).unwrap_or_default());
        self.release(false)
    }

    /// The rest, at the end.
    pub(super) fn finish(&mut self, tokenizer: &TextTokenizer) -> String {
        let start = self.settled.saturating_sub(CONTEXT_TOKENS);
        let before = tokenizer.decode(&self.ids[start..self.settled]);
        let now = tokenizer.decode(&self.ids[start..]);
        self.settled = self.ids.len();
        self.held.push_str(now.strip_prefix(before.as_str()).unwrap_or_default());
        self.release(true)
    }

    /// What is held, up to a stop text, or up to what may become one.
    fn release(&mut self, last: bool) -> String {
        if self.stopped {
            return String::new();
        }
        let first = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min();
        if let Some(at) = first {
            self.stopped = true;
            self.held.truncate(at);
            return std::mem::take(&mut self.held);
        }
        let may_grow = |stop: &String| {
            let longest = (stop.len() - 1).min(self.held.len());
            (1..=longest).rev().find(|n| stop.is_char_boundary(*n) && self.held.ends_with(&stop[..*n]))
        };
        let kept = if last { 0 } else { self.stops.iter().filter_map(may_grow).max().unwrap_or(0) };
        let rest = self.held.split_off(self.held.len() - kept);
        std::mem::replace(&mut self.held, rest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(text: &str, stops: &[&str]) -> (Vec<String>, bool) {
        let tokenizer = TextTokenizer::bytes().unwrap();
        let mut stream = TextStream::new(stops.iter().map(|stop| (*stop).into()).collect());
        let ids = tokenizer.encode(text).unwrap();
        let mut pieces: Vec<String> = ids.iter().map(|id| stream.push(&tokenizer, *id)).collect();
        pieces.push(stream.finish(&tokenizer));
        (pieces, stream.stopped())
    }

    #[test]
    fn characters_come_whole_and_nothing_is_lost() {
        let (pieces, stopped) = run("aß\u{1F600}b", &[]);
        assert_eq!(pieces.concat(), "aß\u{1F600}b");
        assert!(!stopped && pieces.iter().all(|piece| !piece.contains(char::REPLACEMENT_CHARACTER)));
    }

    #[test]
    fn a_stop_text_ends_the_answer_before_it_even_across_tokens() {
        let (pieces, stopped) = run("one END two", &["END"]);
        assert_eq!((pieces.concat().as_str(), stopped), ("one ", true));
        let (pieces, stopped) = run("one EN", &["END"]);
        assert_eq!((pieces.concat().as_str(), stopped), ("one EN", false));
    }
}
