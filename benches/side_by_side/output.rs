//! What is made of the outcomes: Markdown, JSON, and a picture.

use std::fmt::Write;

use serde_json::json;

use super::measure::Outcome;

/// One table: a row for each shape and contestant.
pub fn markdown(outcomes: &[Outcome]) -> String {
    let mut out = String::from(
        "| shape | regrow | peer | its time | regrow by peer (quartiles) |\n| --- | ---: | --- | ---: | ---: |\n",
    );
    for outcome in outcomes {
        let ours = number(outcome.nanoseconds(0).median);
        for (index, name) in outcome.names.iter().enumerate().skip(1) {
            let shape = if index == 1 { outcome.shape.as_str() } else { "" };
            let ours = if index == 1 { ours.as_str() } else { "" };
            let theirs = number(outcome.nanoseconds(index).median);
            let ratio = outcome.ratio(index);
            let (low, median, high) = (ratio.low, ratio.median, ratio.high);
            let _ =
                writeln!(out, "| {shape} | {ours} | {name} | {theirs} | {median:.2} ({low:.2}–{high:.2}) |");
        }
    }
    out
}

pub fn json(outcomes: &[Outcome]) -> serde_json::Value {
    let rows = outcomes.iter().flat_map(|outcome| {
        outcome.names.iter().enumerate().skip(1).map(|(index, peer)| {
            json!({
                "shape": outcome.shape,
                "regrow_ns": outcome.nanoseconds(0).median,
                "peer": peer,
                "peer_ns": outcome.nanoseconds(index).median,
                "ratio": outcome.ratio(index).median,
            })
        })
    });
    rows.collect()
}

/// Three digits.
fn number(nanoseconds: f64) -> String {
    match nanoseconds {
        ns if ns < 10.0 => format!("{ns:.1} ns"),
        ns if ns < 1000.0 => format!("{ns:.0} ns"),
        ns if ns < 10_000.0 => format!("{:.1} µs", ns / 1e3),
        ns => format!("{:.0} µs", ns / 1e3),
    }
}

const WIDTH: f64 = 760.0;
const LABELS: f64 = 210.0;
const BAR: f64 = 15.0;

/// A picture of some of the outcomes: bars on one logarithmic scale, which begins at a nanosecond. Readable on light and on
/// dark.
pub fn picture(outcomes: &[&Outcome], machine: &str) -> String {
    let times = |outcome: &Outcome| -> Vec<f64> {
        (0..outcome.names.len()).map(|index| outcome.nanoseconds(index).median.max(1.1)).collect()
    };
    let most = outcomes.iter().flat_map(|outcome| times(outcome)).fold(10.0, f64::max);
    let mut y = 34.0;
    let mut body = String::new();
    for outcome in outcomes {
        let _ = writeln!(body, r#"<text class="shape" x="0" y="{y}">{}</text>"#, escaped(&outcome.shape));
        y += 8.0;
        for (name, nanoseconds) in outcome.names.iter().zip(times(outcome)) {
            let length = (WIDTH - LABELS - 60.0) * nanoseconds.ln() / most.ln();
            let class = if name.starts_with("regrow") { "ours" } else { "peer" };
            let (middle, end) = (y + BAR - 4.0, LABELS + length + 6.0);
            let _ = writeln!(
                body,
                r#"<text class="name" x="{x}" y="{middle}">{name}</text><rect class="{class}" x="{LABELS}" y="{y}" width="{length:.1}" height="{height}" rx="2"/><text class="number" x="{end:.1}" y="{middle}">{number}</text>"#,
                x = LABELS - 8.0,
                height = BAR - 3.0,
                number = number(nanoseconds),
            );
            y += BAR;
        }
        y += 26.0;
    }
    let machine = escaped(machine);
    format!(
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="-16 0 {width} {height}" font-family="system-ui, sans-serif" font-size="12">
<style>
text {{ fill: #24292f }} .shape {{ font-weight: 600; font-size: 13px }} .name {{ text-anchor: end }}
.ours {{ fill: #1a7f5a }} .peer {{ fill: #b6bec8 }} .note {{ fill: #6e7781; font-size: 10.5px }}
@media (prefers-color-scheme: dark) {{
text {{ fill: #e6edf3 }} .ours {{ fill: #3fb98a }} .peer {{ fill: #545d68 }} .note {{ fill: #8b949e }}
}}
</style>
{body}<text class="note" x="0" y="{foot}">Time of a resume and a suspend (or of a life), on one logarithmic scale from 1 ns; shorter is better. {machine}</text>
</svg>
"#,
        width = WIDTH + 32.0,
        height = y + 6.0,
        foot = y - 6.0,
    )
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}
