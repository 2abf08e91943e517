//! Two reports side by side: what became better or worse by more than a bound.

use crate::hit_rate::Row;
use crate::report::{Report, share};

/// One replay in both reports.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// Trace, policy and capacity.
    pub what: String,
    /// Token hit rate before.
    pub before: f64,
    /// After.
    pub after: f64,
}

impl Change {
    /// Points of a hundred by which it grew.
    pub fn points(&self) -> f64 {
        100.0 * (self.after - self.before)
    }
}

/// What two reports have in common, and how many replays only one of them has.
pub fn compare(before: &Report, after: &Report) -> (Vec<Change>, usize) {
    let rows = |report: &Report| -> Vec<Row> {
        report.outcomes.iter().flat_map(|outcome| outcome.rows.clone()).collect()
    };
    let (old, mut new) = (rows(before), rows(after));
    let same = |a: &Row, b: &Row| {
        let below = |row: &Row| {
            row.below.as_ref().map(|below| (below.kind.clone(), below.admit, below.capacity_blocks))
        };
        (&a.trace, &a.policy, a.capacity_blocks, below(a), a.hits.tokens)
            == (&b.trace, &b.policy, b.capacity_blocks, below(b), b.hits.tokens)
    };
    let rate = |row: &Row| share(row.hits.hit_tokens, row.hits.tokens);
    let (mut changes, mut alone) = (Vec::new(), 0);
    for row in &old {
        // Each is compared once, even if a report has it twice.
        let Some(at) = new.iter().position(|other| same(row, other)) else {
            alone += 1;
            continue;
        };
        let other = new.swap_remove(at);
        let what = format!("{} {} {}", row.trace, row.policy, row.capacity_blocks);
        changes.push(Change { what, before: rate(row), after: rate(&other) });
    }
    alone += new.len();
    (changes, alone)
}
