//! Curves of hit rates as SVG.

use crate::hit_rate::Outcome;
use crate::report::share;
use plotters::prelude::*;
use std::collections::BTreeMap;

const SIZE: (u32, u32) = (960, 540);

/// Colours that can be told apart in print and by most eyes (Okabe and Ito's, and two greys).
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

/// Every plot of an outcome, by name.
pub(crate) fn all(outcome: &Outcome) -> Result<Vec<(&'static str, String)>, String> {
    if outcome.rows.is_empty() {
        return Ok(Vec::new());
    }
    let mut plots = vec![("hit-rate", curves(outcome).map_err(|error| error.to_string())?)];
    if outcome.rows.iter().any(|row| row.below.is_some()) {
        plots.push(("tiers", tiers(outcome).map_err(|error| error.to_string())?));
    }
    Ok(plots)
}

/// Token hit rate over capacity, a line for each policy, with the optimum and the ceiling.
fn curves(outcome: &Outcome) -> Result<String, Box<dyn std::error::Error>> {
    let mut lines: BTreeMap<&str, Vec<(f64, f64)>> = BTreeMap::new();
    for row in &outcome.rows {
        let hit = 100.0 * share(row.hits.hit_tokens, row.hits.tokens);
        lines.entry(&row.policy).or_default().push((100.0 * row.capacity_share, hit));
    }
    let points = || lines.values().flatten();
    let left = points().map(|point| point.0).fold(f64::MAX, f64::min);
    let right = points().map(|point| point.0).fold(0.0, f64::max);
    let ceiling = 100.0 * share(outcome.ceiling.hit_tokens, outcome.ceiling.tokens);
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        area.fill(&WHITE)?;
        // A single capacity has no width of its own.
        let range = (left * 0.9..(right * 1.1).max(left * 1.01)).log_scale();
        let mut chart = ChartBuilder::on(&area)
            .caption(format!("{}: token hit rate", outcome.trace), ("sans-serif", 22))
            .margin(16)
            .x_label_area_size(48)
            .y_label_area_size(64)
            .build_cartesian_2d(range, 0.0..(ceiling * 1.12).max(1.0))?;
        chart
            .configure_mesh()
            .x_desc("capacity, % of the different blocks (log)")
            .y_desc("hit tokens, % of all")
            .x_label_formatter(&|x| format!("{x:.2}"))
            .y_label_formatter(&|y| format!("{y:.0}"))
            .label_style(("sans-serif", 15))
            .max_light_lines(0)
            .bold_line_style(RGBColor(228, 230, 233))
            .draw()?;
        let dotted = ShapeStyle::from(&BLACK.mix(0.6)).stroke_width(1);
        chart
            .draw_series(DashedLineSeries::new(
                [(left * 0.9, ceiling), (right * 1.1, ceiling)],
                6,
                4,
                dotted,
            ))?
            .label("ceiling")
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 24, y)], dotted));
        for (i, (policy, line)) in lines.iter().enumerate() {
            let width = if ["opt", "cairn"].contains(policy) { 3 } else { 2 };
            let colour = if *policy == "opt" { BLACK } else { COLOURS[i % COLOURS.len()] };
            let style = ShapeStyle::from(&colour).stroke_width(width);
            chart
                .draw_series(LineSeries::new(line.iter().copied(), style).point_size(3))?
                .label(*policy)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 24, y)], style));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::LowerRight)
            .background_style(WHITE.mix(0.85))
            .border_style(RGBColor(216, 222, 228))
            .label_font(("sans-serif", 15))
            .draw()?;
        area.present()?;
    }
    Ok(svg)
}

/// What each tier brings, a bar for each replay.
fn tiers(outcome: &Outcome) -> Result<String, Box<dyn std::error::Error>> {
    let bars: Vec<(String, f64, f64)> = outcome
        .rows
        .iter()
        .filter_map(|row| {
            let below = row.below.as_ref()?;
            let first = 100.0 * share(row.hits.hit_tokens - below.hit_tokens, row.hits.tokens);
            let second = 100.0 * share(below.hit_tokens, row.hits.tokens);
            Some((format!("{} {:.1}%", row.policy, 100.0 * row.capacity_share), first, second))
        })
        .collect();
    let ceiling = 100.0 * share(outcome.ceiling.hit_tokens, outcome.ceiling.tokens);
    let mut svg = String::new();
    {
        let area =
            SVGBackend::with_string(&mut svg, (SIZE.0, 110 + 26 * bars.len() as u32)).into_drawing_area();
        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&area)
            .caption(format!("{}: where hit tokens are", outcome.trace), ("sans-serif", 22))
            .margin(16)
            .x_label_area_size(40)
            .y_label_area_size(140)
            .build_cartesian_2d(0.0..(ceiling * 1.1).max(1.0), 0.0..bars.len() as f64)?;
        let name = |y: &f64| {
            let at = (bars.len() as f64 - y - 0.5).round();
            let middle = (y.fract() - 0.5).abs() < 0.01;
            bars.get(at as usize).filter(|_| middle).map_or(String::new(), |(name, ..)| name.clone())
        };
        chart
            .configure_mesh()
            .disable_y_mesh()
            .max_light_lines(0)
            .bold_line_style(RGBColor(228, 230, 233))
            .y_labels(2 * bars.len() + 1)
            .y_label_formatter(&name)
            .x_desc("hit tokens, % of all")
            .label_style(("sans-serif", 14))
            .draw()?;
        let bar = |at: usize, from: f64, to: f64, colour: RGBColor| {
            let y = (bars.len() - 1 - at) as f64;
            Rectangle::new([(from, y + 0.18), (to, y + 0.82)], colour.filled())
        };
        let host = bars.iter().enumerate().map(|(at, (_, first, _))| bar(at, 0.0, *first, COLOURS[1]));
        chart.draw_series(host)?.label("host").legend(|(x, y)| key(x, y, COLOURS[1]));
        let nvme = bars
            .iter()
            .enumerate()
            .map(|(at, (_, first, second))| bar(at, *first, first + second, COLOURS[5]));
        chart.draw_series(nvme)?.label("nvme").legend(|(x, y)| key(x, y, COLOURS[5]));
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::LowerRight)
            .background_style(WHITE)
            .border_style(RGBColor(216, 222, 228))
            .draw()?;
        area.present()?;
    }
    Ok(svg)
}

fn key(x: i32, y: i32, colour: RGBColor) -> Rectangle<(i32, i32)> {
    Rectangle::new([(x, y - 5), (x + 14, y + 5)], colour.filled())
}
