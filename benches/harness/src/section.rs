//! Measurements as tables: what every bench but `hit-rate` ends with. A report holds any number of them, and knows nothing else about the
//! benches.

use serde::{Deserialize, Serialize};
use std::fmt::Write as _;

/// One table, and what to draw of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Section {
    /// Unique in its report: names its files.
    pub name: String,
    /// For people.
    pub title: String,
    /// How it was measured, and what it does not say.
    pub notes: Vec<String>,
    /// What a row has.
    pub columns: Vec<Column>,
    /// A cell for each column.
    pub rows: Vec<Vec<Cell>>,
    /// Drawn in the report.
    pub plots: Vec<Plot>,
}

/// One column.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Column {
    /// With its unit.
    pub name: String,
    /// What its cells are for.
    pub role: Role,
    /// Digits after the point.
    pub decimals: usize,
}

/// What the cells of a column are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// They tell rows apart.
    Key,
    /// More is better.
    Higher,
    /// Less is better.
    Lower,
    /// Neither.
    Fact,
}

/// One cell.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Cell {
    /// The median of some rounds, with the lowest and the highest of them.
    Range {
        /// The median.
        value: f64,
        /// The lowest.
        low: f64,
        /// The highest.
        high: f64,
    },
    /// One value.
    Number(f64),
    /// Words.
    Text(String),
    /// It does not apply.
    Nothing,
}

/// A picture.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Plot {
    /// Curves.
    Lines(Lines),
    /// Bars.
    Bars(Bars),
}

/// Curves over a logarithmic axis.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Lines {
    /// Unique in its section.
    pub name: String,
    /// Above it.
    pub title: String,
    /// Below it.
    pub x: String,
    /// Beside it.
    pub y: String,
    /// The curves.
    pub lines: Vec<Line>,
    /// A level across all of it, such as a ceiling.
    pub level: Option<(String, f64)>,
}

/// One curve.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Line {
    /// In the legend.
    pub name: String,
    /// With positive first coordinates, in order.
    pub points: Vec<(f64, f64)>,
    /// The one to look at.
    pub strong: bool,
    /// What the others are held against.
    pub reference: bool,
}

/// Bars, each in parts.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Bars {
    /// Unique in its section.
    pub name: String,
    /// Above it.
    pub title: String,
    /// Below it.
    pub x: String,
    /// Names of the parts, in the legend.
    pub parts: Vec<String>,
    /// From the top.
    pub bars: Vec<Bar>,
}

/// One bar.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Bar {
    /// Beside it.
    pub name: String,
    /// One after the other.
    pub parts: Vec<f64>,
    /// A mark at what it could be at most.
    pub limit: Option<f64>,
}

impl Column {
    /// A column that tells rows apart.
    pub fn key(name: &str) -> Self {
        Self { name: name.into(), role: Role::Key, decimals: 0 }
    }

    /// A column of numbers.
    pub fn new(name: &str, role: Role, decimals: usize) -> Self {
        Self { name: name.into(), role, decimals }
    }
}

impl Cell {
    /// Words.
    pub fn text(text: impl Into<String>) -> Self {
        Self::Text(text.into())
    }

    /// A number, if it is one.
    pub fn number(value: f64) -> Self {
        if value.is_finite() { Self::Number(value) } else { Self::Nothing }
    }

    /// The median of some rounds and how far they went.
    pub fn rounds(values: &[f64]) -> Self {
        let mut values: Vec<f64> = values.iter().copied().filter(|value| value.is_finite()).collect();
        values.sort_by(f64::total_cmp);
        match values[..] {
            [] => Self::Nothing,
            [one] => Self::Number(one),
            [low, .., high] => Self::Range { value: values[values.len() / 2], low, high },
        }
    }

    /// The number in it.
    pub fn value(&self) -> Option<f64> {
        match self {
            Self::Range { value, .. } | Self::Number(value) => Some(*value),
            Self::Text(_) | Self::Nothing => None,
        }
    }

    /// The lowest and the highest that it was.
    pub fn range(&self) -> Option<(f64, f64)> {
        match self {
            Self::Range { low, high, .. } => Some((*low, *high)),
            Self::Number(value) => Some((*value, *value)),
            Self::Text(_) | Self::Nothing => None,
        }
    }

    /// As people read it.
    pub fn show(&self, decimals: usize) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Nothing => "-".into(),
            Self::Number(value) | Self::Range { value, .. } => format!("{value:.decimals$}"),
        }
    }
}

impl Section {
    /// An empty table.
    pub fn new(name: &str, title: &str, columns: Vec<Column>) -> Self {
        Self { name: name.into(), title: title.into(), columns, ..Self::default() }
    }

    /// What tells this row from the others.
    pub fn key(&self, row: &[Cell]) -> String {
        let keys = self.columns.iter().zip(row).filter(|(column, _)| column.role == Role::Key);
        let words: Vec<String> = keys
            .map(|(column, cell)| match cell {
                Cell::Text(text) => text.clone(),
                cell => format!("{} {}", cell.show(column.decimals), column.name),
            })
            .collect();
        words.join(", ")
    }

    /// One line for each row; ranges have columns of their own.
    pub fn csv(&self) -> String {
        let quoted = |text: &str| match text.contains([',', '"', '\n']) {
            true => format!("\"{}\"", text.replace('"', "\"\"")),
            false => text.to_owned(),
        };
        let ranged: Vec<bool> = (0..self.columns.len())
            .map(|at| self.rows.iter().any(|row| matches!(row.get(at), Some(Cell::Range { .. }))))
            .collect();
        let mut csv = String::new();
        let names = self.columns.iter().zip(&ranged).map(|(column, ranged)| match ranged {
            true => format!("{0},{0} lowest,{0} highest", quoted(&column.name)),
            false => quoted(&column.name),
        });
        // Writing to a string does not fail.
        let _ = writeln!(csv, "{}", names.collect::<Vec<_>>().join(","));
        for row in &self.rows {
            let cells = row.iter().zip(&ranged).map(|(cell, ranged)| {
                let value = match cell {
                    Cell::Text(text) => quoted(text),
                    Cell::Nothing => String::new(),
                    cell => cell.value().map_or(String::new(), digits),
                };
                match (ranged, cell.range()) {
                    (true, Some((low, high))) => format!("{value},{},{}", digits(low), digits(high)),
                    (true, None) => format!("{value},,"),
                    (false, _) => value,
                }
            });
            let _ = writeln!(csv, "{}", cells.collect::<Vec<_>>().join(","));
        }
        csv
    }
}

/// Six digits that count; whole numbers as they are.
fn digits(value: f64) -> String {
    let size = if value == 0.0 { 0.0 } else { value.abs().log10().floor() };
    let decimals = (5.0 - size).clamp(0.0, 12.0) as usize;
    let text = format!("{value:.decimals$}");
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

/// The distribution of some times as a curve: how many percent took at most so long.
pub fn distribution(name: &str, times: &[f64]) -> Line {
    const POINTS: usize = 200;
    let mut sorted: Vec<f64> = times.iter().copied().filter(|time| *time > 0.0).collect();
    sorted.sort_by(f64::total_cmp);
    let at = |i: usize| {
        let share = i as f64 / POINTS as f64;
        (sorted[((sorted.len() - 1) as f64 * share).round() as usize], 100.0 * share)
    };
    let points = if sorted.is_empty() { Vec::new() } else { (0..=POINTS).map(at).collect() };
    Line { name: name.into(), points, ..Line::default() }
}

/// The value that this share of all is not above; 0 of none.
pub fn quantile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = (sorted.len().saturating_sub(1) as f64 * share).round() as usize;
    sorted.get(at).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn cells_survive_json() {
        let cells = [
            Cell::rounds(&[3.0, 1.0, 2.0]),
            Cell::number(4.5),
            Cell::number(f64::NAN),
            Cell::text("shm"),
            Cell::rounds(&[7.0]),
        ];
        let json = serde_json::to_string(&cells).unwrap();
        assert_eq!(json, r#"[{"value":2.0,"low":1.0,"high":3.0},4.5,null,"shm",7.0]"#);
        assert_eq!(serde_json::from_str::<Vec<Cell>>(&json).unwrap(), cells);
    }

    #[test]
    fn csv_has_a_cell_for_every_column() {
        let columns = vec![Column::key("what"), Column::new("GB/s", Role::Higher, 2)];
        let mut section = Section::new("some", "Some", columns);
        section.rows.push(vec![Cell::text("a, b"), Cell::rounds(&[1.0, 3.0, 2.0])]);
        section.rows.push(vec![Cell::text("c"), Cell::Nothing]);
        assert_eq!([12_345_678.0, 0.0, 1.0 / 3.0, 1200.0].map(digits), ["12345678", "0", "0.333333", "1200"]);
        let csv = section.csv();
        assert_eq!(csv, "what,GB/s,GB/s lowest,GB/s highest\n\"a, b\",2,1,3\nc,,,\n");
    }

    #[test]
    fn a_distribution_rises_to_all() {
        let line = distribution("x", &[3.0, 1.0, 2.0]);
        assert_eq!((line.points[0], line.points[200]), ((1.0, 0.0), (3.0, 100.0)));
        assert!(distribution("x", &[]).points.is_empty());
        assert_eq!((quantile(&[3.0, 1.0, 2.0], 0.5), quantile(&[], 0.5)), (2.0, 0.0));
    }
}
