//! Two reports side by side: what became better or worse. Replays are exact, so any difference of a hit rate counts beyond a bound;
//! measurements count when the ranges of their rounds do not overlap.

use crate::hit_rate::Row;
use crate::report::{Report, share};
use crate::section::{Cell, Column, Role, Section};

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

/// One measurement in both reports.
#[derive(Clone, Debug, PartialEq)]
pub struct Moved {
    /// Section, row and column.
    pub what: String,
    /// Its median before.
    pub before: f64,
    /// After.
    pub after: f64,
    /// Share by which it became better; below 0: worse.
    pub better: f64,
    /// All rounds after were on one side of all rounds before.
    pub beyond_noise: bool,
}

/// What two reports of hit rates have in common, and how many replays only one of them has.
pub fn compare(before: &Report, after: &Report) -> (Vec<Change>, usize) {
    let rows = |report: &Report| -> Vec<Row> {
        report.outcomes.iter().flat_map(|outcome| outcome.rows.clone()).collect()
    };
    let (old, mut new) = (rows(before), rows(after));
    let same = |a: &Row, b: &Row| {
        let below = |row: &Row| {
            row.below
                .as_ref()
                .map(|below| (below.kind.clone(), below.policy.clone(), below.admit, below.capacity_blocks))
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

/// What two reports of measurements have in common.
pub fn measurements(before: &Report, after: &Report) -> Vec<Moved> {
    let mut moved = Vec::new();
    for old in &before.sections {
        let Some(new) = after.sections.iter().find(|new| new.name == old.name) else { continue };
        for row in &old.rows {
            let other = new.rows.iter().find(|other| new.key(other) == old.key(row));
            if let Some(other) = other {
                moved.extend(cells(old, row, (new, other)));
            }
        }
    }
    moved
}

fn cells<'a>(
    section: &'a Section,
    row: &'a [Cell],
    (new, other): (&'a Section, &'a [Cell]),
) -> impl Iterator<Item = Moved> + 'a {
    section.columns.iter().zip(row).filter_map(move |(column, cell)| {
        let sign = match column.role {
            Role::Higher => 1.0,
            Role::Lower => -1.0,
            Role::Key | Role::Fact => return None,
        };
        let at = new.columns.iter().position(|other: &Column| other.name == column.name)?;
        let cell_after = other.get(at)?;
        let (before, after) = (cell.value()?, cell_after.value()?);
        let ((low, high), (low_after, high_after)) = (cell.range()?, cell_after.range()?);
        Some(Moved {
            what: format!("{}: {}: {}", section.name, section.key(row), column.name),
            before,
            after,
            // Beyond nothing, anything counts in full.
            better: match before == 0.0 {
                true if after == before => 0.0,
                true => sign * (after - before).signum(),
                false => sign * (after - before) / before.abs(),
            },
            beyond_noise: low_after > high || high_after < low,
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Made;

    fn report(rates: &[f64], late: f64) -> Report {
        let columns = vec![
            Column::key("wire"),
            Column::new("GB/s", Role::Higher, 2),
            Column::new("p50 us", Role::Lower, 0),
            Column::new("blocks", Role::Fact, 0),
        ];
        let mut section = Section::new("transfer", "Wires", columns);
        let cells = [Cell::rounds(rates), Cell::number(late), Cell::number(7.0)];
        section.rows.push([vec![Cell::text("shm")], cells.to_vec()].concat());
        Report::measured("transfer", Made::here("0", Vec::new()), vec![section], true)
    }

    #[test]
    fn ranges_that_overlap_are_noise() {
        let (before, near) = (report(&[10.0, 11.0, 12.0], 5.0), report(&[8.0, 9.0, 10.5], 5.0));
        let moved = measurements(&before, &near);
        assert_eq!(moved.len(), 2, "neither keys nor facts: {moved:?}");
        assert!(moved[0].better < 0.0 && !moved[0].beyond_noise && moved[1].better == 0.0);
        let moved = measurements(&before, &report(&[5.0, 5.5, 6.0], 4.0));
        assert!(moved[0].beyond_noise && (moved[0].better + 0.5).abs() < 1e-9, "{moved:?}");
        assert!(moved[1].beyond_noise && moved[1].better > 0.0, "less time is better: {moved:?}");
    }
}
