//! The command that goes on with a push, as a shell takes it.

use std::fmt::Write as _;

/// The command line of this process, with `--transfer-id id` in it.
pub(crate) fn command(id: &str) -> String {
    with_id(&args(), id)
}

/// The command line of this process.
pub(crate) fn again() -> String {
    args().iter().map(|arg| quoted(arg)).collect::<Vec<_>>().join(" ")
}

/// The name that this program was called by.
pub(crate) fn program() -> String {
    args().first().map_or_else(|| "nodectl".to_owned(), |arg| quoted(arg))
}

fn args() -> Vec<String> {
    std::env::args_os().map(|arg| arg.to_string_lossy().into_owned()).collect()
}

fn with_id(args: &[String], id: &str) -> String {
    let given = args.iter().any(|arg| arg == "--transfer-id" || arg.starts_with("--transfer-id="));
    let mut words: Vec<String> = args.iter().map(|arg| quoted(arg)).collect();
    if words.is_empty() {
        words.push("nodectl".to_owned());
    }
    if !given {
        words.push("--transfer-id".to_owned());
        words.push(quoted(id));
    }
    words.join(" ")
}

/// `word`, so that a shell reads it as one word, and a terminal shows it as it is.
pub(crate) fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    if !word.chars().any(char::is_control) {
        return format!("'{}'", word.replace('\'', "'\\''"));
    }
    let mut out = "$'".to_owned();
    for c in word.chars() {
        match c {
            '\'' | '\\' => {
                out.push('\\');
                out.push(c);
            }
            c if c.is_control() => {
                // Writing to a `String` cannot fail.
                let _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push('\'');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &[&str]) -> Vec<String> {
        line.iter().map(|word| (*word).to_owned()).collect()
    }

    #[test]
    fn adds_the_id_once() {
        assert_eq!(with_id(&words(&["nodectl", "push", "dir"]), "t1"), "nodectl push dir --transfer-id t1");
        let given = ["nodectl", "push", "dir", "--transfer-id", "t1"];
        assert_eq!(with_id(&words(&given), "t1"), given.join(" "));
        let given = ["nodectl", "push", "dir", "--transfer-id=t1"];
        assert_eq!(with_id(&words(&given), "t1"), given.join(" "));
    }

    #[test]
    fn quotes_for_a_shell() {
        for (word, shown) in [
            ("./a-b_c.d", "./a-b_c.d"),
            ("", "''"),
            ("two words", "'two words'"),
            ("it's", "'it'\\''s'"),
            ("$HOME;rm", "'$HOME;rm'"),
            ("a\x1b[2J", "$'a\\u001b[2J'"),
            ("gr\u{fc}n", "'gr\u{fc}n'"),
        ] {
            assert_eq!(quoted(word), shown);
        }
    }
}
