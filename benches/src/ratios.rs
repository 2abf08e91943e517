//! Cairn's rates over those of other stores, out of a table of both.

use cairn_harness::section::{Cell, Column, Role, Section};

/// Which of ours is held against which of theirs: the same distance, as far as there is one.
const PAIRS: [(&str, &str, &str); 7] = [
    ("shm get", "redis get", "one host; theirs over loopback TCP"),
    ("tls get", "redis get", "over TCP; ours encrypted, theirs not"),
    ("shm fetch", "mooncake local get", "one host; theirs within one process"),
    ("shm get", "mooncake local get", "one host, with the lookup"),
    ("tls fetch", "mooncake tcp get", "over TCP; ours encrypted, theirs not"),
    ("quic fetch", "mooncake tcp get", "over a network; ours encrypted, theirs not"),
    ("tls get", "lmcache get", "over TCP; ours encrypted, theirs not"),
];

/// One row for each size and pair that the table has.
pub fn of(table: &Section) -> Section {
    let columns = vec![
        Column::key("block KiB"),
        Column::key("batch"),
        Column::key("clients"),
        Column::key("ours"),
        Column::key("theirs"),
        Column::new("ours GB/s", Role::Fact, 2),
        Column::new("theirs GB/s", Role::Fact, 2),
        Column::new("rate, times theirs", Role::Higher, 2),
        Column::new("p50, times theirs", Role::Lower, 2),
        Column::key("what it compares"),
    ];
    let mut ratios = Section::new("ratios", "Beside other stores", columns);
    ratios.notes.push("Ours verified every block. Medians of the table below.".into());
    let at = |name: &str| table.columns.iter().position(|column| column.name == name);
    let (Some(what), Some(rate), Some(p50)) = (at("what"), at("GB/s"), at("p50 us")) else { return ratios };
    let is = |row: &[Cell], name: &str| row[what] == Cell::text(name);
    for own in &table.rows {
        for (ours, theirs, note) in PAIRS.iter().filter(|(ours, ..)| is(own, ours)) {
            let same = |row: &&Vec<Cell>| row[..what] == own[..what] && is(row, theirs);
            let Some(other) = table.rows.iter().find(same) else { continue };
            let ratio = |column: usize| match (own[column].value(), other[column].value()) {
                (Some(own), Some(other)) => Cell::number(own / other),
                _ => Cell::Nothing,
            };
            let mut row = own[..what].to_vec();
            row.extend([Cell::text(*ours), Cell::text(*theirs)]);
            row.extend(
                [&own[rate], &other[rate]].map(|cell| cell.value().map_or(Cell::Nothing, Cell::number)),
            );
            row.extend([ratio(rate), ratio(p50), Cell::text(*note)]);
            ratios.rows.push(row);
        }
    }
    ratios
}
