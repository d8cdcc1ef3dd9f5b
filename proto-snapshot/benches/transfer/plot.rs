//! The sweeps of a run as one picture.

use crate::table::{Report, Row};

const WIDTH: f64 = 280.0;
const HEIGHT: f64 = 220.0;
const LEFT: f64 = 50.0;
const TOP: f64 = 40.0;

/// What stands below a point.
type Label = fn(&Row) -> String;

/// Rate against chunk size, files and lanes, side by side on one scale.
pub fn svg(report: &Report) -> String {
    let sweeps: [(&str, &str, Label); 3] = [
        ("sweep of the chunk size", "chunk, KiB", |row| (row.chunk >> 10).to_string()),
        ("sweep of the files", "files", |row| row.files.to_string()),
        ("sweep of the lanes", "lanes", |row| row.lanes.to_string()),
    ];
    let rates = report.rows.iter().filter(|row| row.case.starts_with("sweep")).filter_map(Row::rate);
    let top = rates.fold(0.5, f64::max).ceil();
    let (width, height) = (LEFT + 3.0 * WIDTH, TOP + HEIGHT + 60.0);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{width}\" height=\"{height}\" fill=\"white\"/>\n\
         <text x=\"{LEFT}\" y=\"20\">GiB/s, memory to memory, verified; {}</text>\n",
        report.machine.replace('&', "&amp;").replace('<', "&lt;")
    );
    for (number, (case, axis, label)) in (0_u8..).zip(sweeps) {
        let left = LEFT + f64::from(number) * WIDTH;
        let rows: Vec<&Row> = report.rows.iter().filter(|row| row.case == case).collect();
        svg += &panel(left, axis, top, &rows, label);
    }
    svg + "</svg>\n"
}

fn panel(left: f64, axis: &str, top: f64, rows: &[&Row], label: Label) -> String {
    let (right, bottom) = (left + WIDTH - 40.0, TOP + HEIGHT);
    let mut svg = String::new();
    let mut tick = 0.0;
    while tick <= top {
        let y = bottom - tick / top * HEIGHT;
        svg += &format!("<line x1=\"{left}\" y1=\"{y:.1}\" x2=\"{right}\" y2=\"{y:.1}\" stroke=\"#ddd\"/>\n");
        svg +=
            &format!("<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{tick}</text>\n", left - 6.0, y + 4.0);
        tick += 0.5;
    }
    let step = (right - left) / rows.len().max(1) as f64;
    let mut line = String::new();
    for (number, row) in rows.iter().enumerate() {
        let Some(rate) = row.rate() else { continue };
        let (x, y) = (left + (number as f64 + 0.5) * step, bottom - rate / top * HEIGHT);
        line += &format!("{x:.1},{y:.1} ");
        svg += &format!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"#1f77b4\"/>\n");
        svg += &format!(
            "<text x=\"{x:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>\n",
            bottom + 16.0,
            label(row)
        );
    }
    svg += &format!(
        "<polyline points=\"{}\" fill=\"none\" stroke=\"#1f77b4\" stroke-width=\"1.5\"/>\n",
        line.trim_end()
    );
    let middle = (left + right) / 2.0;
    svg + &format!("<text x=\"{middle}\" y=\"{}\" text-anchor=\"middle\">{axis}</text>\n", bottom + 36.0)
}
