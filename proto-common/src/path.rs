//! Names of files in a snapshot: relative paths that are safe to create below a directory.

use std::cmp::Ordering;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use thiserror::Error;

use crate::error::{CommonReason, Error};
use crate::text::printable;

/// Longest name, in bytes, separators included. Well below `PATH_MAX` (4096 on Linux), so that it also fits
/// behind the path of any sensible store.
pub const MAX_FILE_NAME_LEN: usize = 1024;

/// Longest component, in bytes: `NAME_MAX` of all common file systems.
pub const MAX_COMPONENT_LEN: usize = 255;

/// Most components of a name, the file's own included. Each is a directory that somebody has to make, keep in mind and delete, and whoever
/// walks such a tree holds one open for each; what is kept in files has a few levels.
pub const MAX_COMPONENTS: usize = 32;

/// How much of a name is shown, in bytes.
const SHOWN_LEN: usize = 128;

/// A relative, `/`-separated name: at most [`MAX_FILE_NAME_LEN`] bytes of UTF-8, at most [`MAX_COMPONENTS`] components, every one of 1 to
/// [`MAX_COMPONENT_LEN`] bytes without control characters and backslash, and not `.` or `..`.
///
/// Names are compared by bytes. A file system that folds case or normalizes Unicode may still take two different
/// names for one file; a store on such a system has to refuse that itself.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct FileName(Arc<str>);

/// Why a text is not a [`FileName`], or why names do not form a tree.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("the file name \"{shown}\" {problem}")]
pub struct FileNameError {
    problem: FileNameProblem,
    shown: String,
}

/// What is wrong with a file name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum FileNameProblem {
    /// No bytes at all.
    #[error("is empty")]
    Empty,
    /// More than [`MAX_FILE_NAME_LEN`] bytes.
    #[error("has {0} bytes, the limit is {MAX_FILE_NAME_LEN}")]
    TooLong(usize),
    /// It starts with a slash.
    #[error("is absolute; names are relative to the snapshot")]
    Absolute,
    /// Two slashes in a row, or one at the end.
    #[error("has an empty component")]
    EmptyComponent,
    /// A component is `.` or `..`.
    #[error("has a component \".\" or \"..\"")]
    Dots,
    /// A component is longer than [`MAX_COMPONENT_LEN`] bytes.
    #[error("has a component of {0} bytes, the limit is {MAX_COMPONENT_LEN}")]
    ComponentTooLong(usize),
    /// More than [`MAX_COMPONENTS`] components.
    #[error("has {0} components, the limit is {MAX_COMPONENTS}")]
    TooDeep(usize),
    /// A control character or a backslash, at this byte.
    #[error("has a control character or a backslash at byte {0}")]
    Character(usize),
    /// The same name occurs twice.
    #[error("occurs twice")]
    Duplicate,
    /// Another name lies below this one, as if it were a directory.
    #[error("is a file, and another file lies below it as if it were a directory")]
    AlsoDirectory,
}

impl FileNameError {
    fn new(problem: FileNameProblem, name: &str) -> Self {
        Self { problem, shown: printable(name, SHOWN_LEN) }
    }

    /// What is wrong.
    #[must_use]
    pub fn problem(&self) -> FileNameProblem {
        self.problem
    }

    /// The error for a caller that sent it in `field` (a path such as `manifest.files[3].name`).
    #[must_use]
    pub fn at(self, field: impl Into<String>) -> Error {
        Error::from(self.clone()).violation(field, self.to_string())
    }
}

impl From<FileNameError> for Error {
    fn from(error: FileNameError) -> Self {
        Self::new(CommonReason::InvalidFileName, error.to_string())
    }
}

impl FileName {
    /// Validates `name`.
    ///
    /// # Errors
    ///
    /// [`FileNameError`] if it breaks the rule of the type.
    pub fn new(name: &str) -> Result<Self, FileNameError> {
        check(name).map_err(|problem| FileNameError::new(problem, name))?;
        Ok(Self(Arc::from(name)))
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Its components from the outermost directory to the file; at least one.
    pub fn components(&self) -> impl DoubleEndedIterator<Item = &str> {
        self.0.split('/')
    }
}

/// Whether a name comes after another one, and is no name below that. They begin with `at` bytes alike.
fn comes_after(own: &[u8], others: &[u8], at: usize) -> bool {
    if at == others.len() {
        // One that goes on where the other ends comes after it; below it, if with a separator.
        return own.get(at).is_some_and(|next| *next != b'/');
    }
    own.get(at).zip(others.get(at)).is_some_and(|(own, other)| rank(*own) > rank(*other))
}

/// How many bytes two names begin with alike.
fn common(a: &[u8], b: &[u8]) -> usize {
    const WORD: usize = 8;
    let words = a.chunks_exact(WORD).zip(b.chunks_exact(WORD)).take_while(|(a, b)| a == b).count();
    let at = words * WORD;
    at + a[at..].iter().zip(&b[at..]).take_while(|(a, b)| a == b).count()
}

/// Where a byte of a name stands in the order of names, which is that of their components: a separator ends a component, so it comes before
/// whatever may stand in one, and no name contains a zero.
fn rank(byte: u8) -> u8 {
    if byte == b'/' { 0 } else { byte }
}

fn check(name: &str) -> Result<(), FileNameProblem> {
    use FileNameProblem as P;
    if name.is_empty() {
        return Err(P::Empty);
    }
    if name.len() > MAX_FILE_NAME_LEN {
        return Err(P::TooLong(name.len()));
    }
    if name.starts_with('/') {
        return Err(P::Absolute);
    }
    // Nearly all names are plain, and there may be very many.
    let plain = name.bytes().all(|byte| byte.is_ascii() && !byte.is_ascii_control() && byte != b'\\');
    if !plain && let Some(at) = name.find(|c: char| c.is_control() || c == '\\') {
        return Err(P::Character(at));
    }
    for (number, component) in name.split('/').enumerate() {
        match component {
            _ if number >= MAX_COMPONENTS => return Err(P::TooDeep(name.split('/').count())),
            "" => return Err(P::EmptyComponent),
            "." | ".." => return Err(P::Dots),
            _ if component.len() > MAX_COMPONENT_LEN => return Err(P::ComponentTooLong(component.len())),
            _ => {}
        }
    }
    Ok(())
}

/// The directories that the files of a tree lie in, each counted once; not the one that the tree is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Directories {
    /// How many there are.
    pub count: u64,
    /// Their names from the tree on, in bytes.
    pub name_bytes: u64,
}

impl Directories {
    /// Adds those of a name that has `at` bytes in common with the one before it in order: of which all are counted.
    fn add(&mut self, name: &[u8], at: usize) {
        for (end, _) in name.iter().enumerate().skip(at).filter(|(_, byte)| **byte == b'/') {
            self.count += 1;
            self.name_bytes += end as u64;
        }
    }

    /// Those of names in order; `None` where they are not, or do not form a tree.
    fn of(names: &[&FileName]) -> Option<Self> {
        let mut directories = Self::default();
        let mut before: &[u8] = &[];
        for name in names {
            let own = name.0.as_bytes();
            let at = common(own, before);
            if !comes_after(own, before, at) {
                return None;
            }
            directories.add(own, at);
            before = own;
        }
        Some(directories)
    }
}

/// Checks that `names` can all be files of one directory: none occurs twice, and none is also the directory of another. Returns which directories they need
/// below that.
///
/// Takes O(n log n) time and one reference per name of memory.
///
/// # Errors
///
/// [`FileNameError`] with [`FileNameProblem::Duplicate`] or [`FileNameProblem::AlsoDirectory`], for the first such name in order.
pub fn check_tree<'a>(names: impl IntoIterator<Item = &'a FileName>) -> Result<Directories, FileNameError> {
    let mut names: Vec<&FileName> = names.into_iter().collect();
    // Most often they are in order, and what has to be looked at twice is out of the cache by then.
    if let Some(directories) = Directories::of(&names) {
        return Ok(directories);
    }
    names.sort_unstable();
    for pair in names.windows(2) {
        let [first, second] = pair else { continue };
        // Ordered by components, all that lies below a name follows it at once.
        match second.0.strip_prefix(&*first.0) {
            Some("") => return Err(FileNameError::new(FileNameProblem::Duplicate, first.as_str())),
            Some(below) if below.starts_with('/') => {
                return Err(FileNameError::new(FileNameProblem::AlsoDirectory, first.as_str()));
            }
            _ => {}
        }
    }
    // In order, and each comes after the one before it, so there are some.
    Ok(Directories::of(&names).unwrap_or_default())
}

/// By components, so that a directory's files are neighbours: `a/b` comes before `a-b`, although `-` sorts before `/`.
impl Ord for FileName {
    fn cmp(&self, other: &Self) -> Ordering {
        let (own, others) = (self.0.as_bytes(), other.0.as_bytes());
        let at = common(own, others);
        match (own.get(at), others.get(at)) {
            (Some(own), Some(other)) => rank(*own).cmp(&rank(*other)),
            _ => own.len().cmp(&others.len()),
        }
    }
}

impl PartialOrd for FileName {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// For errors and logs, as [`printable`] makes it: a peer may have chosen the name. Paths and keys are made of [`FileName::as_str`].
impl fmt::Display for FileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&printable(&self.0, SHOWN_LEN))
    }
}

impl fmt::Debug for FileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FileName({:?})", &*self.0)
    }
}

impl AsRef<str> for FileName {
    fn as_ref(&self) -> &str {
        self.as_str()
    }
}

impl FromStr for FileName {
    type Err = FileNameError;

    fn from_str(name: &str) -> Result<Self, FileNameError> {
        Self::new(name)
    }
}

impl TryFrom<String> for FileName {
    type Error = FileNameError;

    fn try_from(name: String) -> Result<Self, FileNameError> {
        Self::new(&name)
    }
}

impl From<FileName> for String {
    fn from(name: FileName) -> Self {
        name.as_str().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Component, Path};

    use proptest::prelude::*;

    use super::*;

    fn problem(name: &str) -> FileNameProblem {
        FileName::new(name).unwrap_err().problem()
    }

    fn tree(names: &[&str]) -> Result<(), FileNameProblem> {
        let names: Vec<_> = names.iter().map(|name| FileName::new(name).unwrap()).collect();
        check_tree(&names).map(|_| ()).map_err(|error| error.problem())
    }

    #[test]
    fn accepts_ordinary_names() {
        for name in ["a", "a/b", "dir.d/000012.sst", ".hidden", "...", "caf\u{e9}/\u{1f980}", "a b", "C:"] {
            assert_eq!(FileName::new(name).unwrap().as_str(), name);
        }
        assert!(FileName::new(&["x".repeat(255), "y".repeat(255)].join("/")).is_ok());
    }

    #[test]
    fn what_is_shown_of_a_name_is_short_and_has_nothing_that_deceives() {
        let shown = |name: &str| FileName::new(name).unwrap().to_string();
        assert_eq!(shown("caf\u{e9}/x"), "caf\u{e9}/x");
        assert_eq!(shown("a\u{202e}b\u{2028}c"), "a\\u{202e}b\\u{2028}c");
        let long = ["xxxxxxxxxxxxxxx"; 32].join("/");
        assert_eq!(shown(&long), format!("{}…", &long[..SHOWN_LEN - "…".len()]));
        assert_eq!(FileName::new(&long).unwrap().as_str(), long);
        assert_eq!(
            format!("{:>4}|{:<4}|", FileName::new("ab").unwrap(), FileName::new("ab").unwrap()),
            "  ab|ab  |"
        );
    }

    #[test]
    fn refuses_what_leaves_the_directory_or_cannot_be_created() {
        use FileNameProblem as P;
        assert_eq!(problem(""), P::Empty);
        assert_eq!(problem("/x"), P::Absolute);
        assert_eq!(problem("../x"), P::Dots);
        assert_eq!(problem("a/../x"), P::Dots);
        assert_eq!(problem("a/."), P::Dots);
        assert_eq!(problem("a//b"), P::EmptyComponent);
        assert_eq!(problem("a/"), P::EmptyComponent);
        assert_eq!(problem("a\\b"), P::Character(1));
        assert_eq!(problem("a\0"), P::Character(1));
        assert_eq!(problem("a\u{85}"), P::Character(1));
        assert_eq!(problem(&"x".repeat(256)), P::ComponentTooLong(256));
        assert!(FileName::new(&["x"; MAX_COMPONENTS].join("/")).is_ok());
        assert_eq!(problem(&["x"; MAX_COMPONENTS + 1].join("/")), P::TooDeep(33));
        assert_eq!(problem(&["x"; 512].join("/")), P::TooDeep(512));
        assert_eq!(problem(&"x".repeat(10_240)), P::TooLong(10_240));
        assert!(FileName::new(&"x".repeat(10_240)).unwrap_err().to_string().len() < 250);
    }

    #[test]
    fn a_tree_has_no_duplicates_and_no_file_that_is_a_directory() {
        assert_eq!(tree(&["a", "b/c", "b/d", "a-b"]), Ok(()));
        assert_eq!(tree(&["a", "b", "a"]), Err(FileNameProblem::Duplicate));
        assert_eq!(tree(&["a/b", "a-b", "a.b", "a"]), Err(FileNameProblem::AlsoDirectory));
        assert_eq!(tree(&["a/b/c/d", "x", "a/b"]), Err(FileNameProblem::AlsoDirectory));
    }

    proptest! {
        #[test]
        fn the_order_is_that_of_the_components(a in "[a-c.\\-! ]{1,3}(/[a-c.\\-! ]{1,3}){0,3}", b in "[a-c.\\-! ]{1,3}(/[a-c.\\-! ]{1,3}){0,3}") {
            if let (Ok(a), Ok(b)) = (FileName::new(&a), FileName::new(&b)) {
                prop_assert_eq!(a.cmp(&b), a.components().cmp(b.components()), "{} and {}", a, b);
            }
        }

        #[test]
        fn a_valid_name_stays_below_the_directory(name in "[a./\\\\x\u{0}]{0,12}|\\PC{0,20}") {
            if let Ok(name) = FileName::new(&name) {
                let path = Path::new(name.as_str());
                prop_assert!(path.components().all(|c| matches!(c, Component::Normal(_))));
                prop_assert_eq!(path.components().count(), name.components().count());
            }
        }

        #[test]
        fn the_tree_check_agrees_with_comparing_all_pairs(names in prop::collection::vec("[a-](/[a-]){0,2}", 0..8)) {
            let mut names: Vec<_> = names.iter().map(|name| FileName::new(name).unwrap()).collect();
            let clash = names.iter().enumerate().any(|(i, a)| {
                names.iter().enumerate().any(|(j, b)| i != j && (a == b || b.as_str().starts_with(&format!("{}/", a.as_str()))))
            });
            let found = check_tree(&names);
            prop_assert_eq!(found.is_err(), clash);
            names.sort_unstable();
            prop_assert_eq!(check_tree(&names).is_err(), clash, "in order");
            if let Ok(found) = found {
                let above = |name: &FileName| {
                    let ends = name.as_str().match_indices('/').map(|(end, _)| name.as_str()[..end].to_owned());
                    ends.collect::<Vec<_>>()
                };
                let all: std::collections::BTreeSet<_> = names.iter().flat_map(above).collect();
                let name_bytes = all.iter().map(|name| name.len() as u64).sum();
                prop_assert_eq!(found, Directories { count: all.len() as u64, name_bytes });
                prop_assert_eq!(check_tree(&names), Ok(found), "in order");
            }
        }
    }
}
