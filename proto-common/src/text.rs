//! Text of unknown origin, made fit to be shown.

use std::fmt::Write as _;

/// How much of the text of a peer's error is kept, in bytes.
pub(crate) const RECEIVED_LEN: usize = 4 * 1024;

/// `bytes` in hexadecimal, two lower-case digits each.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut out, byte| {
        // Writing to a `String` cannot fail.
        let _ = write!(out, "{byte:02x}");
        out
    })
}

/// A part of a peer's error as it is kept.
pub(crate) fn received(text: &str) -> String {
    printable(text, RECEIVED_LEN)
}

/// `text` with control characters, text-direction marks and characters that take no room escaped, cut to at most `max_bytes` bytes.
///
/// What is longer ends in `…` (which counts). Use it for everything that a peer or a file system
/// said before it goes to a log, a terminal or an error message: an escape sequence could rewrite
/// the screen, and a long name could hide what follows.
#[must_use]
pub fn printable(text: &str, max_bytes: usize) -> String {
    const CUT: &str = "…";
    let mut out = String::with_capacity(text.len().min(max_bytes));
    // The longest prefix after which the mark of a cut still fits.
    let mut cut_at = 0;
    for c in text.chars() {
        let start = out.len();
        if is_unsafe(c) {
            // Writing to a `String` cannot fail.
            let _ = match c {
                '\n' | '\r' | '\t' | '\0' => write!(out, "{}", c.escape_debug()),
                _ => write!(out, "{}", c.escape_unicode()),
            };
        } else {
            out.push(c);
        }
        if out.len() > max_bytes {
            out.truncate(cut_at);
            if CUT.len() <= max_bytes {
                out.push_str(CUT);
            }
            return out;
        }
        if start + CUT.len() <= max_bytes {
            cut_at = start;
        }
        if out.len() + CUT.len() <= max_bytes {
            cut_at = out.len();
        }
    }
    out
}

fn is_unsafe(c: char) -> bool {
    c.is_control()
        || matches!(
            c,
            // Unicode's Bidi_Control and separators of lines, and what is not seen (Default_Ignorable_Code_Point, without the selectors of
            // variants, which only change the look of what stands before them): two names that differ would look the same.
            '\u{ad}'
                | '\u{34f}'
                | '\u{61c}'
                | '\u{115f}'..='\u{1160}'
                | '\u{17b4}'..='\u{17b5}'
                | '\u{180e}'
                | '\u{200b}'..='\u{200f}'
                | '\u{2028}'..='\u{202e}'
                | '\u{2060}'..='\u{206f}'
                | '\u{3164}'
                | '\u{feff}'
                | '\u{ffa0}'
                | '\u{fff0}'..='\u{fffb}'
                | '\u{1bca0}'..='\u{1bca3}'
                | '\u{1d173}'..='\u{1d17a}'
                | '\u{e0000}'..='\u{e00ff}'
                | '\u{e01f0}'..='\u{e0fff}'
        )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn hexadecimal_keeps_leading_zeros() {
        assert_eq!(hex(&[0, 0x0a, 0xff]), "000aff");
        assert_eq!(hex(&[]), "");
    }

    #[test]
    fn escapes_what_could_rewrite_a_terminal() {
        assert_eq!(printable("a\x1b[2Jb\nc", 100), "a\\u{1b}[2Jb\\nc");
        assert_eq!(printable("gro\u{df}e t\u{fc}r", 100), "gro\u{df}e t\u{fc}r");
        assert_eq!(printable("x\u{202e}y", 100), "x\\u{202e}y");
        assert_eq!(printable("x\u{61c}y", 100), "x\\u{61c}y");
        assert_eq!(printable("\u{9b}2J", 100), "\\u{9b}2J");
        for c in ['\u{ad}', '\u{200b}', '\u{200d}', '\u{2060}', '\u{3164}', '\u{feff}', '\u{e0041}'] {
            let shown = printable(&format!("n{c}1"), 100);
            assert!(shown.is_ascii() && shown != "n1", "{c:?} as {shown}");
        }
    }

    #[test]
    fn cuts_and_says_so() {
        assert_eq!(printable("abcdefgh", 8), "abcdefgh");
        assert_eq!(printable("abcdefghi", 8), "abcde…");
        assert_eq!(printable("abc", 2), "");
    }

    proptest! {
        #[test]
        fn never_longer_than_asked_and_never_a_control_character(text in any::<String>(), max in 0_usize..64) {
            let shown = printable(&text, max);
            prop_assert!(shown.len() <= max);
            prop_assert!(!shown.chars().any(char::is_control));
        }
    }
}
