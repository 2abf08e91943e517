//! Made-up requests with the shapes of real ones. Words are drawn at random, so that nothing is shared but what is meant to be.

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

/// A shape of traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Conversations: each turn sends all that was said before. All begin with one system prompt.
    Chat,
    /// Questions about long documents: each request is a document and one question.
    DocQa,
    /// Agents: one long description of tools, and turns that add what a tool returned.
    Agent,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Chat, Self::DocQa, Self::Agent];

    /// As it is typed.
    pub fn name(self) -> &'static str {
        match self {
            Self::Chat => "chat",
            Self::DocQa => "doc-qa",
            Self::Agent => "agent",
        }
    }
}

impl std::str::FromStr for Kind {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let known = || Self::ALL.map(Self::name).join(", ");
        let found = Self::ALL.into_iter().find(|kind| kind.name() == name);
        found.ok_or_else(|| format!("unknown traffic {name:?}; known: {}", known()))
    }
}

/// What one user does.
#[derive(Clone, Debug, PartialEq)]
pub struct Session {
    /// Before everything else.
    pub system: String,
    /// In order.
    pub turns: Vec<String>,
    /// Each turn sends all turns and answers before it.
    pub history: bool,
}

/// How much of what.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Users, or documents.
    pub sessions: usize,
    /// Requests of each.
    pub turns: usize,
    /// Words of a document; a system prompt and a turn have fixed shares of it.
    pub words: usize,
    /// Which of its kind.
    pub seed: u64,
}

/// Common words, each one token or two for most tokenizers.
const WORDS: [&str; 64] = [
    "time", "river", "house", "light", "paper", "stone", "music", "green", "market", "window", "garden",
    "letter", "summer", "winter", "morning", "evening", "teacher", "doctor", "farmer", "sailor", "number",
    "answer", "question", "history", "city", "village", "mountain", "island", "bridge", "street", "train",
    "engine", "water", "fire", "earth", "metal", "wood", "glass", "silver", "copper", "apple", "bread",
    "honey", "salt", "butter", "coffee", "horse", "bird", "fish", "tree", "flower", "grass", "cloud",
    "storm", "wind", "snow", "quick", "quiet", "heavy", "simple", "early", "open", "deep", "warm",
];

/// So many random words.
pub(super) fn words(random: &mut StdRng, count: usize) -> String {
    let mut text = String::new();
    for i in 0..count {
        if i > 0 {
            text.push(' ');
        }
        text.push_str(WORDS.choose(random).unwrap_or(&WORDS[0]));
    }
    text
}

/// The same for the same shape.
pub fn traffic(kind: Kind, shape: Shape) -> Vec<Session> {
    let mut random = StdRng::seed_from_u64(shape.seed);
    let random = &mut random;
    let shared = match kind {
        Kind::Chat => format!("You are a helpful assistant. {}.", words(random, shape.words / 4)),
        Kind::Agent => format!("You may call these tools: {}.", words(random, shape.words / 2)),
        Kind::DocQa => String::new(),
    };
    let session = |_| {
        let (system, history) = match kind {
            Kind::Chat | Kind::Agent => (shared.clone(), true),
            Kind::DocQa => (format!("Answer from this document: {}.", words(random, shape.words)), false),
        };
        let turn = |_| match kind {
            Kind::Chat => {
                let count = (shape.words / 20).max(4) + random.random_range(0..8);
                format!("{}?", words(random, count))
            }
            Kind::DocQa => format!("What does it say about {}?", words(random, 3)),
            Kind::Agent => format!("Result of the tool: {}.", words(random, (shape.words / 8).max(8))),
        };
        Session { system, turns: (0..shape.turns).map(turn).collect(), history }
    };
    (0..shape.sessions).map(session).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_share_what_they_are_to_share() {
        let shape = Shape { sessions: 3, turns: 2, words: 200, seed: 9 };
        for kind in Kind::ALL {
            let sessions = traffic(kind, shape);
            assert_eq!(sessions, traffic(kind, shape), "the same for the same seed");
            assert!(sessions.len() == 3 && sessions.iter().all(|session| session.turns.len() == 2));
            assert_eq!(sessions[0].system == sessions[1].system, kind != Kind::DocQa, "{kind:?}");
            assert_ne!(sessions[0].turns, sessions[1].turns);
        }
    }
}
