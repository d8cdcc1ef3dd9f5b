//! Finds a private key in text, in whatever way it was written there.

use std::fmt::Write as _;

/// The secret part of a key.
pub(crate) struct Secret {
    /// Each 8 bytes of it, and of its PEM form.
    parts: Vec<Vec<u8>>,
    /// Each 16 characters of its PEM form; the rest of that is the public key, which may be shown.
    pem: Vec<String>,
}

impl Secret {
    /// That of a PKCS#8 key of an elliptic curve with 32 bytes, in PEM form.
    pub(crate) fn of(pem: &str) -> Self {
        let body: String = pem.lines().filter(|line| !line.starts_with('-')).collect();
        let der = base64(&body);
        // Version 1, then an octet string of 32 bytes (RFC 5915).
        let at = 5 + der.windows(5).position(|window| window == [2, 1, 1, 4, 32]).unwrap();
        let of_secret = &body.as_bytes()[at.div_ceil(3) * 4..(at + 32) / 3 * 4];
        let parts = der[at..at + 32].windows(8).chain(of_secret.windows(8)).map(<[u8]>::to_vec).collect();
        let pem = of_secret.windows(16).map(|window| String::from_utf8(window.to_vec()).unwrap()).collect();
        Self { parts, pem }
    }

    /// A part of it that stands in `text`: as PEM, as numbers, in hexadecimal form, or as the characters of a string.
    pub(crate) fn shown_in(&self, text: &str) -> Option<String> {
        let text: String = text.chars().filter(|c| !c.is_whitespace()).collect();
        let lower = text.to_lowercase();
        let forms = self.parts.iter().flat_map(|part| {
            let join = |separator: &str, write: &dyn Fn(&mut String, u8)| {
                let mut joined = String::new();
                for (index, byte) in part.iter().enumerate() {
                    joined.push_str(if index > 0 { separator } else { "" });
                    write(&mut joined, *byte);
                }
                joined
            };
            let number = |to: &mut String, byte: u8| write!(to, "{byte}").unwrap();
            let hex = |to: &mut String, byte: u8| write!(to, "{byte:02x}").unwrap();
            let short = |to: &mut String, byte: u8| write!(to, "{byte:x}").unwrap();
            let prefixed = |to: &mut String, byte: u8| write!(to, "0x{byte:02x}").unwrap();
            [
                join(",", &number),
                join("", &hex),
                join(",", &hex),
                join(":", &hex),
                join(",", &short),
                join(",", &prefixed),
            ]
        });
        let escaped = self.parts.iter().map(|part| part.escape_ascii().to_string().to_lowercase());
        let found = forms.chain(escaped).find(|form| lower.contains(form));
        found.or_else(|| self.pem.iter().find(|form| text.contains(*form)).cloned())
    }

    /// Fails where that is, and where it would not be found.
    pub(crate) fn is_not_in(&self, key_pem: &str, text: &str) {
        let der = base64(&key_pem.lines().filter(|line| !line.starts_with('-')).collect::<String>());
        let hex = der.iter().fold(String::new(), |hex, byte| hex + &format!("{byte:02X}"));
        let string = format!("b\"{}\"", der.escape_ascii());
        let pem = key_pem.as_bytes();
        let numbers = [format!("{der:?}"), format!("{der:#?}"), format!("{pem:?}"), format!("{pem:x?}")];
        let texts = [key_pem.to_owned(), format!("{der:02x?}"), hex, string];
        for way in numbers.into_iter().chain(texts) {
            assert!(self.shown_in(&format!("key: {way}")).is_some(), "it would not be found: {way}");
        }
        let shown = self.shown_in(text);
        assert!(shown.is_none(), "the key is shown as {shown:?}");
    }
}

fn base64(text: &str) -> Vec<u8> {
    let (mut bytes, mut bits, mut count) = (Vec::new(), 0_u32, 0);
    for c in text.bytes().filter(|c| *c != b'=') {
        let value = match c {
            b'A'..=b'Z' => c - b'A',
            b'a'..=b'z' => c - b'a' + 26,
            b'0'..=b'9' => c - b'0' + 52,
            b'+' => 62,
            _ => 63,
        };
        (bits, count) = (bits << 6 | u32::from(value), count + 6);
        if count >= 8 {
            count -= 8;
            bytes.push(u8::try_from(bits >> count & 0xff).unwrap());
        }
    }
    bytes
}
