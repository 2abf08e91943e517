//! Pictures as SVG.

use crate::hit_rate::Outcome;
use crate::report::share;
use crate::section::{Bar, Bars, Line, Lines, Plot};
use plotters::prelude::*;
use std::collections::BTreeMap;

const SIZE: (u32, u32) = (960, 540);

/// Colours that can be told apart in print and by most eyes (Okabe and Ito's, and some more).
const COLOURS: [RGBColor; 9] = [
    RGBColor(213, 94, 0),
    RGBColor(0, 114, 178),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
    RGBColor(120, 120, 120),
    RGBColor(148, 103, 189),
    RGBColor(140, 86, 75),
];

const GRID: RGBColor = RGBColor(228, 230, 233);
const FRAME: RGBColor = RGBColor(216, 222, 228);

/// Bars are so high, and names beside them have so much room for each character.
const BAR_HEIGHT: u32 = 26;
const NAME_WIDTH: u32 = 8;

type Drawn = Result<String, Box<dyn std::error::Error>>;

/// Every plot of an outcome.
pub(crate) fn of_hit_rates(outcome: &Outcome) -> Vec<Plot> {
    if outcome.rows.is_empty() {
        return Vec::new();
    }
    let mut plots = vec![Plot::Lines(curves(outcome))];
    if outcome.rows.iter().any(|row| row.below.is_some()) {
        plots.push(Plot::Bars(tiers(outcome)));
    }
    plots
}

/// Token hit rate over capacity, a line for each policy, with the optimum and the ceiling.
fn curves(outcome: &Outcome) -> Lines {
    let mut policies: BTreeMap<&str, Vec<(f64, f64)>> = BTreeMap::new();
    for row in &outcome.rows {
        let hit = 100.0 * share(row.hits.hit_tokens, row.hits.tokens);
        policies.entry(&row.policy).or_default().push((100.0 * row.capacity_share, hit));
    }
    let line = |(policy, points): (&str, Vec<(f64, f64)>)| {
        let reference = policy == "opt";
        Line { name: policy.into(), points, strong: reference || policy == "cairn", reference }
    };
    Lines {
        name: "hit-rate".into(),
        title: format!("{}: token hit rate", outcome.trace),
        x: "capacity, % of the different blocks (log)".into(),
        y: "hit tokens, % of all".into(),
        lines: policies.into_iter().map(line).collect(),
        level: Some(("ceiling".into(), 100.0 * share(outcome.ceiling.hit_tokens, outcome.ceiling.tokens))),
    }
}

/// What each tier brings, a bar for each replay.
fn tiers(outcome: &Outcome) -> Bars {
    let bar = |row: &crate::hit_rate::Row| {
        let below = row.below.as_ref()?;
        let first = 100.0 * share(row.hits.hit_tokens - below.hit_tokens, row.hits.tokens);
        let second = 100.0 * share(below.hit_tokens, row.hits.tokens);
        let name = format!("{} {:.1}%", row.policy, 100.0 * row.capacity_share);
        Some(Bar { name, parts: vec![first, second], limit: None })
    };
    Bars {
        name: "tiers".into(),
        title: format!("{}: where hit tokens are", outcome.trace),
        x: "hit tokens, % of all".into(),
        parts: vec!["host".into(), "nvme".into()],
        bars: outcome.rows.iter().filter_map(bar).collect(),
    }
}

/// A name for its file, and the picture; `None` when there is nothing to see.
pub(crate) fn draw(plot: &Plot) -> Result<Option<(String, String)>, String> {
    let (name, empty) = match plot {
        Plot::Lines(lines) => (&lines.name, lines.lines.iter().all(|line| line.points.is_empty())),
        Plot::Bars(bars) => (&bars.name, bars.bars.is_empty()),
    };
    if empty {
        return Ok(None);
    }
    let svg = match plot {
        Plot::Lines(plot) => lines(plot),
        Plot::Bars(plot) => bars(plot),
    };
    svg.map(|svg| Some((name.clone(), svg))).map_err(|error| error.to_string())
}

fn lines(plot: &Lines) -> Drawn {
    let points = || plot.lines.iter().flat_map(|line| &line.points);
    let left = points().map(|point| point.0).fold(f64::MAX, f64::min);
    let right = points().map(|point| point.0).fold(0.0, f64::max);
    let level = plot.level.as_ref().map_or(0.0, |(_, level)| *level);
    let top = points().map(|point| point.1).fold(level, f64::max) * 1.12;
    let top = if top > 0.0 { top } else { 1.0 };
    // A single place has no width of its own.
    let (from, to) = (left * 0.9, (right * 1.1).max(left * 1.01));
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&area)
            .caption(&plot.title, ("sans-serif", 22))
            .margin(16)
            .x_label_area_size(48)
            .y_label_area_size(64)
            .build_cartesian_2d((from..to).log_scale(), 0.0..top)?;
        chart
            .configure_mesh()
            .x_desc(&plot.x)
            .y_desc(&plot.y)
            .x_label_formatter(&|x| short(*x))
            .y_label_formatter(&|y| short(*y))
            .label_style(("sans-serif", 15))
            .max_light_lines(0)
            .bold_line_style(GRID)
            .draw()?;
        if let Some((name, level)) = &plot.level {
            let dotted = ShapeStyle::from(&BLACK.mix(0.6)).stroke_width(1);
            chart
                .draw_series(DashedLineSeries::new([(from, *level), (to, *level)], 6, 4, dotted))?
                .label(name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 24, y)], dotted));
        }
        for (i, line) in plot.lines.iter().enumerate() {
            let colour = if line.reference { BLACK } else { COLOURS[i % COLOURS.len()] };
            let style = ShapeStyle::from(&colour).stroke_width(if line.strong { 3 } else { 2 });
            // Of a few points each is shown.
            let dots = if line.points.len() > 40 { 0 } else { 3 };
            chart
                .draw_series(LineSeries::new(line.points.iter().copied(), style).point_size(dots))?
                .label(&line.name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 24, y)], style));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::LowerRight)
            .background_style(WHITE.mix(0.85))
            .border_style(FRAME)
            .label_font(("sans-serif", 15))
            .draw()?;
        area.present()?;
    }
    Ok(svg)
}

fn bars(plot: &Bars) -> Drawn {
    let count = plot.bars.len();
    let most = room(plot);
    let longest = plot.bars.iter().map(|bar| bar.name.chars().count()).max().unwrap_or(0) as u32;
    let mut svg = String::new();
    {
        let size = (SIZE.0, 110 + BAR_HEIGHT * count as u32);
        let area = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&area)
            .caption(&plot.title, ("sans-serif", 22))
            .margin(16)
            .x_label_area_size(40)
            .y_label_area_size((NAME_WIDTH * longest + 20).clamp(60, SIZE.0 / 2))
            .build_cartesian_2d(0.0..most, 0.0..count as f64)?;
        let name = |y: &f64| {
            let at = (count as f64 - y - 0.5).round();
            let middle = (y.fract() - 0.5).abs() < 0.01;
            plot.bars.get(at as usize).filter(|_| middle).map_or(String::new(), |bar| bar.name.clone())
        };
        chart
            .configure_mesh()
            .disable_y_mesh()
            .max_light_lines(0)
            .bold_line_style(GRID)
            .y_labels(2 * count + 1)
            .y_label_formatter(&name)
            .x_label_formatter(&|x| short(*x))
            .x_desc(&plot.x)
            .label_style(("sans-serif", 14))
            .draw()?;
        for (part, label) in plot.parts.iter().enumerate() {
            // Neighbours in the list are not neighbours on the wheel.
            let colour = COLOURS[(1 + 4 * part) % COLOURS.len()];
            let rectangles = plot.bars.iter().enumerate().map(|(at, bar)| {
                let from: f64 = bar.parts.iter().take(part).sum();
                let to = from + bar.parts.get(part).copied().unwrap_or(0.0);
                let y = (count - 1 - at) as f64;
                Rectangle::new([(from, y + 0.18), (to, y + 0.82)], colour.filled())
            });
            let series = chart.draw_series(rectangles)?;
            series
                .label(label)
                .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 14, y + 5)], colour.filled()));
        }
        let limits = plot.bars.iter().enumerate().filter_map(|(at, bar)| Some((at, bar.limit?)));
        let marks: Vec<_> = limits
            .map(|(at, limit)| {
                let y = (count - 1 - at) as f64;
                PathElement::new([(limit, y + 0.05), (limit, y + 0.95)], BLACK.stroke_width(2))
            })
            .collect();
        if !marks.is_empty() {
            let series = chart.draw_series(marks)?;
            series
                .label("limit")
                .legend(|(x, y)| PathElement::new([(x + 7, y - 6), (x + 7, y + 6)], BLACK.stroke_width(2)));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::LowerRight)
            .background_style(WHITE.mix(0.85))
            .border_style(FRAME)
            .draw()?;
        area.present()?;
    }
    Ok(svg)
}

/// How far the axis goes.
fn room(plot: &Bars) -> f64 {
    let ends = plot.bars.iter().map(|bar| bar.parts.iter().sum::<f64>().max(bar.limit.unwrap_or(0.0)));
    let most = ends.fold(0.0, f64::max);
    // A legend of several parts needs a place of its own.
    if most > 0.0 { most * if plot.parts.len() > 1 { 1.35 } else { 1.1 } } else { 1.0 }
}

/// Three digits, more or less.
fn short(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 || value.fract() == 0.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}
