//! Times at which requests arrived, from CSV files such as those of Azure's public traces of LLM inference: a heading, and in each line
//! first a time. Other columns are not looked at.

use crate::trace::TraceError;
use std::path::Path;

/// Times in ms since the first, in the order of the file.
///
/// # Errors
/// When the file cannot be read, or a line does not begin with a time or goes back in it.
pub fn read(path: &Path) -> Result<Vec<i64>, TraceError> {
    let text = crate::trace::text(path)?;
    let mut times: Vec<i64> = Vec::new();
    let mut first = None;
    for (number, line) in (1..).zip(text.lines()).skip(1).filter(|(_, line)| !line.trim().is_empty()) {
        let field = line.split(',').next().unwrap_or_default().trim().trim_matches('"');
        let wrong = |what: String| TraceError::Line { path: path.to_owned(), line: number, what };
        let time = time_ms(field)
            .ok_or_else(|| wrong(format!("{field:?} is no time: seconds, or as 2023-11-16 18:15:46.68")))?;
        let since = time - *first.get_or_insert(time);
        if times.last().is_some_and(|last| since < *last) {
            return Err(wrong("it came before the line above".into()));
        }
        times.push(since);
    }
    if times.is_empty() { Err(TraceError::Empty(path.to_owned())) } else { Ok(times) }
}

/// Seconds, or a date and a time of day.
fn time_ms(field: &str) -> Option<i64> {
    if let Ok(seconds) = field.parse::<f64>() {
        return Some((1e3 * seconds) as i64);
    }
    let (date, clock) = field.split_once([' ', 'T'])?;
    let mut date = date.split('-').map(str::parse::<i64>);
    let mut clock = clock.trim_end_matches('Z').split('+').next()?.split(':');
    let (year, month, day) = (date.next()?.ok()?, date.next()?.ok()?, date.next()?.ok()?);
    let hours: i64 = clock.next()?.parse().ok()?;
    let minutes: i64 = clock.next()?.parse().ok()?;
    let seconds: f64 = clock.next()?.parse().ok()?;
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    Some((days(year, month, day) * 86_400 + hours * 3600 + minutes * 60) * 1000 + (1e3 * seconds) as i64)
}

/// Days since 1 March of the year 0 in the Gregorian calendar: years begin in March, so that a leap day is the last.
fn days(year: i64, month: i64, day: i64) -> i64 {
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    365 * year + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day - 1
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn file(text: &str) -> Result<Vec<i64>, TraceError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("arrivals.csv");
        std::fs::write(&path, text).unwrap();
        read(&path)
    }

    #[test]
    fn times_of_both_kinds() {
        let azure = "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-02-28 23:59:59.5000000,374,44\n2024-03-01 00:00:01.25,396,109\n";
        assert_eq!(file(azure).unwrap(), [0, 86_401_750], "2024 has a leap day");
        assert_eq!(file("arrived_at,tokens\n10.5,1\n12,2\n").unwrap(), [0, 1500]);
    }

    #[test]
    fn what_is_no_time_says_where() {
        assert!(file("TIMESTAMP\nsoon\n").unwrap_err().to_string().contains("line 2"));
        assert!(file("TIMESTAMP\n5\n4\n").unwrap_err().to_string().contains("before the line above"));
        assert!(file("TIMESTAMP\n").unwrap_err().to_string().contains("no requests"));
    }
}
