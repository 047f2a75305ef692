//! Draws the frames of a stack as an SVG picture: the base on top, as the stack lies in memory.
//!
//! ```text
//!   depth │ words, 16 a row    │ function
//!         │ ■ ■ ■ ■ ■ ■ ■ ■ .. │ bytes, file
//! ```

use std::fmt::Write;

use regrow::Frames;
use regrow::frames::{Cell, Frame};
use regrow::map::{End, Verdict, Word};

/// Words in a row.
const ROW: usize = 16;
/// A cell and the gap after it, in pixels.
const PITCH: usize = 14;
const CELL: usize = 11;
/// The most rows that are drawn of a frame; of a larger one its first and last.
const MOST_ROWS: usize = 9;

const WIDTH: usize = 940;
const MARGIN: usize = 24;
const BAR: usize = 88;
const BAR_WIDTH: usize = ROW * PITCH + 13;
const TEXT: usize = BAR + BAR_WIDTH + 18;
/// Characters of a function's name that fit beside its bar.
const NAME: usize = 76;
const LEAST_HEIGHT: usize = 40;
const GAP: usize = 4;

/// The colours, for light pages and dark ones, and the fonts.
const STYLE: &str = "
  text { font-family: ui-sans-serif, system-ui, 'DejaVu Sans', sans-serif; font-size: 12px; fill: #1f2328 }
  .code { font-family: ui-monospace, 'DejaVu Sans Mono', monospace }
  .title { font-size: 18px; font-weight: 600 }
  .quiet { fill: #59636e; font-size: 11px }
  .page { fill: #ffffff; stroke: #d1d9e0 }
  .frame { fill: #f6f8fa; stroke: #d1d9e0 }
  .free { fill: none; stroke: #8c959f; stroke-dasharray: 3 3 }
  .guard { fill: #cf222e; fill-opacity: .16; stroke: #cf222e }
  .pointer { fill: #1f75e0 } .data { fill: #a9b3bd } .ambiguous { fill: #f2cf6b }
  .saved { fill: #9a6ae0 } .return { fill: #e5534b }
  .inside { fill: #ffffff; stroke: #1f2328; stroke-width: 1.2 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .quiet { fill: #9198a1 }
    .page { fill: #0d1117; stroke: #3d444d } .frame { fill: #161b22; stroke: #3d444d }
    .data { fill: #6e7681 } .ambiguous { fill: #d1ad4a }
  }
";

/// The kinds of words, as they are in the legend.
const KINDS: [(&str, &str); 5] = [
    ("pointer", "pointer"),
    ("data", "data"),
    ("ambiguous", "ambiguous"),
    ("saved", "saved register"),
    ("return", "return address"),
];

/// The picture.
pub fn draw(frames: &Frames) -> String {
    let mut body = String::new();
    header(frames, &mut body);
    let mut y = 112;
    let _ = writeln!(
        body,
        r#"<text class="quiet" x="{}" y="{}" text-anchor="end">depth</text>"#,
        BAR - 10,
        y - 8
    );
    let _ = writeln!(body, r#"<text class="quiet" x="{BAR}" y="{}">base</text>"#, y - 8);
    if let End::Stuck { why, .. } = frames.end {
        let name =
            frames.stuck_in.last().map_or("a function without a name", |function| function.name.as_str());
        let text = format!("not walked: {}: {why}", short(name));
        y += strip("free", hidden(frames), &text, y, &mut body);
    }
    for frame in frames.frames.iter().rev() {
        y += draw_frame(frame, y, &mut body) + GAP;
    }
    let _ = writeln!(
        body,
        r#"<text class="quiet" x="{}" y="{}" text-anchor="end">{}</text>"#,
        BAR - 10,
        y + 4,
        frames.used
    );
    y += strip("free", frames.size.saturating_sub(frames.used), "free", y, &mut body);
    y += strip("guard", 0, "guard: the stack grows when this is touched", y, &mut body);
    let height = y + MARGIN - GAP;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" viewBox=\"0 0 {WIDTH} {height}\">\n\
         <style>{STYLE}</style>\n\
         <rect class=\"page\" x=\".5\" y=\".5\" width=\"{}\" height=\"{}\" rx=\"8\"/>\n{body}</svg>\n",
        WIDTH - 1,
        height - 1
    )
}

/// Bytes between the last frame that was walked and the base.
fn hidden(frames: &Frames) -> usize {
    frames.frames.last().map_or(frames.used, |frame| frame.depth - frame.size)
}

/// The title, and what the colours mean.
fn header(frames: &Frames, out: &mut String) {
    let name = frames.name.as_deref().unwrap_or("a coroutine");
    let _ =
        writeln!(out, r#"<text class="title" x="{MARGIN}" y="38">The stack of “{}”</text>"#, escaped(name));
    let _ = writeln!(
        out,
        r#"<text class="quiet" x="{}" y="38" text-anchor="end">{} frames, {} of {} bytes used</text>"#,
        WIDTH - MARGIN,
        frames.frames.len(),
        frames.used,
        frames.size
    );
    let words = frames.words();
    let counts = [words.pointers, words.data, words.ambiguous, words.saved, words.return_addresses];
    let mut x = MARGIN;
    for ((class, title), count) in KINDS.iter().zip(counts) {
        let _ =
            writeln!(out, r#"<rect class="{class}" x="{x}" y="58" width="{CELL}" height="{CELL}" rx="2"/>"#);
        let _ = writeln!(
            out,
            r#"<text x="{}" y="68">{title} <tspan class="quiet">{count}</tspan></text>"#,
            x + 17
        );
        x += 36 + 7 * (title.len() + count.to_string().len() + 1);
    }
    let (dot, text) = (x + 5, x + 17);
    let _ = writeln!(out, r#"<circle class="inside" cx="{dot}" cy="63.5" r="2.6"/>"#);
    let _ = writeln!(
        out,
        r#"<text x="{text}" y="68">value lies in this stack <tspan class="quiet">{}</tspan></text>"#,
        words.inside
    );
}

/// A frame at `y`; returns its height.
fn draw_frame(frame: &Frame, y: usize, out: &mut String) -> usize {
    // From the highest word down, as memory is drawn: the return address comes first.
    let cells: Vec<Cell> = frame.cells.iter().rev().copied().collect();
    let rows: Vec<&[Cell]> = cells.chunks(ROW).collect();
    let (first, last) = if rows.len() > MOST_ROWS { (MOST_ROWS / 2, MOST_ROWS / 2) } else { (rows.len(), 0) };
    let shown = first + last + usize::from(last > 0);
    let height = (shown * PITCH + 11).max(LEAST_HEIGHT);
    let name = frame.function().map_or("?", |function| function.name.as_str());
    let _ = writeln!(out, "<g><title>{} at {:#x}</title>", escaped(name), frame.pc);
    let _ = writeln!(
        out,
        r#"<rect class="frame" x="{BAR}" y="{y}" width="{BAR_WIDTH}" height="{height}" rx="4"/>"#
    );
    let _ = writeln!(
        out,
        r#"<text class="quiet" x="{}" y="{}" text-anchor="end">{}</text>"#,
        BAR - 10,
        y + 12,
        frame.depth - frame.size
    );
    let top = y + 7;
    for (index, row) in rows[..first].iter().enumerate() {
        draw_row(row, top + index * PITCH, out);
    }
    if last > 0 {
        let words: usize = rows[first..rows.len() - last].iter().map(|row| row.len()).sum();
        let middle = top + first * PITCH + 10;
        let _ = writeln!(
            out,
            r#"<text class="quiet" x="{}" y="{middle}" text-anchor="middle">⋯ {words} more words ⋯</text>"#,
            BAR + BAR_WIDTH / 2
        );
        for (index, row) in rows[rows.len() - last..].iter().enumerate() {
            draw_row(row, top + (first + 1 + index) * PITCH, out);
        }
    }
    caption(frame, y, out);
    out.push_str("</g>\n");
    height
}

/// What is said about a frame, beside it.
fn caption(frame: &Frame, y: usize, out: &mut String) {
    let name = frame.function().map_or_else(|| "?".to_owned(), |function| short(&function.name));
    let _ = writeln!(out, r#"<text class="code" x="{TEXT}" y="{}">{}</text>"#, y + 16, escaped(&name));
    let mut text = format!("{} bytes, {}", frame.size, frame.source);
    if let Some(function) = frame.function()
        && let (Some(file), Some(line)) = (&function.file, function.line)
    {
        let file = file.file_name().unwrap_or_default().to_string_lossy();
        let _ = write!(text, ", {file}:{line}");
    }
    match frame.functions.len().saturating_sub(1) {
        0 => {}
        1 => text += ", with a function inlined",
        inlined => {
            let _ = write!(text, ", with {inlined} functions inlined");
        }
    }
    let _ = writeln!(out, r#"<text class="quiet" x="{TEXT}" y="{}">{}</text>"#, y + 32, escaped(&text));
}

fn draw_row(cells: &[Cell], y: usize, out: &mut String) {
    for (column, cell) in cells.iter().enumerate() {
        let x = BAR + 8 + column * PITCH;
        let class = match cell.word {
            Word::ReturnAddress => "return",
            Word::Saved(_) => "saved",
            Word::Own(Verdict::Pointer) => "pointer",
            Word::Own(Verdict::Data) => "data",
            Word::Own(Verdict::Ambiguous) => "ambiguous",
        };
        let _ =
            write!(out, r#"<rect class="{class}" x="{x}" y="{y}" width="{CELL}" height="{CELL}" rx="2"/>"#);
        if cell.inside {
            let (cx, cy) = (x as f32 + CELL as f32 / 2.0, y as f32 + CELL as f32 / 2.0);
            let _ = write!(out, r#"<circle class="inside" cx="{cx}" cy="{cy}" r="2.6"/>"#);
        }
    }
    out.push('\n');
}

/// A part of the stack that has no frames; returns its height, the gap included.
fn strip(class: &str, bytes: usize, text: &str, y: usize, out: &mut String) -> usize {
    const HEIGHT: usize = 26;
    let _ = writeln!(
        out,
        r#"<rect class="{class}" x="{BAR}" y="{y}" width="{BAR_WIDTH}" height="{HEIGHT}" rx="4"/>"#
    );
    let bytes = if bytes > 0 { format!("{bytes} bytes ") } else { String::new() };
    let _ = writeln!(out, r#"<text class="quiet" x="{TEXT}" y="{}">{bytes}{}</text>"#, y + 17, escaped(text));
    HEIGHT + GAP
}

/// A name without the paths that most of it is: of the outermost path the last two parts, of those in brackets the last.
fn short(name: &str) -> String {
    let mut parts = vec![String::new()];
    let mut depth = 0;
    let mut rest = name;
    while let Some(character) = rest.chars().next() {
        if let Some(after) = rest.strip_prefix("::") {
            rest = after;
            if depth == 0 {
                parts.push(String::new());
            } else if let Some(part) = parts.last_mut() {
                let kept = part.trim_end_matches(|c: char| c.is_alphanumeric() || c == '_').len();
                part.truncate(kept);
            }
            continue;
        }
        match character {
            '<' | '(' | '[' | '{' => depth += 1,
            '>' | ')' | ']' | '}' => depth -= 1,
            _ => {}
        }
        if let Some(part) = parts.last_mut() {
            part.push(character);
        }
        rest = &rest[character.len_utf8()..];
    }
    let is_closure = parts.last().is_some_and(|part| part.starts_with('{'));
    let kept = parts.len().saturating_sub(if is_closure { 3 } else { 2 });
    let name = parts[kept..].join("::");
    match name.char_indices().nth(NAME) {
        Some((end, _)) => format!("{}…", &name[..end]),
        None => name,
    }
}

/// For use in XML.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
