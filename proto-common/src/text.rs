//! Text of unknown origin, made fit to be shown.

use std::fmt::Write as _;

/// `bytes` in hexadecimal, two lower-case digits each.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut out, byte| {
        // Writing to a `String` cannot fail.
        let _ = write!(out, "{byte:02x}");
        out
    })
}

/// `text` with control characters and text-direction marks escaped, cut to at most `max_bytes` bytes.
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
            let _ = write!(out, "{}", c.escape_debug());
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
        || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
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
