//! Rows and columns for a terminal: as many columns as fit.

use comfy_table::{ContentArrangement, Table, presets};

/// What a cell says that has nothing to say.
pub(crate) const NONE: &str = "-";

/// A table that is no wider than `width`, if it can be: columns of `dispensable` go, the first one first.
pub(crate) fn fit<const N: usize>(
    header: &[&str; N],
    rows: &[[String; N]],
    dispensable: &[&str],
    width: u16,
) -> String {
    let mut lines = columns(header, rows, &[]);
    for dropped in 1..=dispensable.len() {
        if lines.iter().all(|line| line.chars().count() <= usize::from(width)) {
            break;
        }
        lines = columns(header, rows, &dispensable[..dropped]);
    }
    lines.join("\n") + "\n"
}

/// The lines of a table of all columns but those.
fn columns<const N: usize>(header: &[&str; N], rows: &[[String; N]], without: &[&str]) -> Vec<String> {
    let keep = |cells: &[String; N]| -> Vec<String> {
        let kept = header.iter().zip(cells).filter(|(name, _)| !without.contains(name));
        kept.map(|(_, cell)| cell.clone()).collect()
    };
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(keep(&header.map(str::to_owned)));
    table.add_rows(rows.iter().map(keep));
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.lines().map(|line| line.trim_end().to_owned()).collect()
}
