//! Reads the error table in the comments of a `.proto` file, for the tests that compare it with code.

use std::collections::BTreeMap;

/// One row: the code's name, and whether `RetryInfo` is attached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) code: String,
    pub(crate) retry: bool,
}

/// The rows below `// | violation | code | reason |`, by reason.
///
/// Panics on a row of another shape, so that a typing error in the table cannot hide a row.
pub(crate) fn parse(proto: &str) -> BTreeMap<String, Row> {
    let mut rows = BTreeMap::new();
    let mut lines = proto.lines().skip_while(|line| *line != "// | violation | code | reason |").skip(1);
    assert_eq!(lines.next(), Some("// |---|---|---|"), "the error table and its header");
    for line in lines.take_while(|line| line.starts_with("// |")) {
        let cells: Vec<&str> = line["// |".len()..].split('|').map(str::trim).collect();
        let [violation, code, reason, ""] = cells[..] else { panic!("not three cells: {line}") };
        assert!(!violation.is_empty(), "{line}");
        let (code, retry) = match code.strip_suffix(", retry") {
            Some(code) => (code, true),
            None => (code, false),
        };
        let row = Row { code: code.to_owned(), retry };
        assert!(rows.insert(reason.to_owned(), row).is_none(), "{reason} stands there twice");
    }
    assert!(!rows.is_empty(), "an error table");
    rows
}
