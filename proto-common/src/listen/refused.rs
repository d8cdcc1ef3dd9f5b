//! What HTTP/2 refuses by itself, found in what is written: h2 tells nobody but the peer.

use super::block::Block;

/// Length (3 bytes), type, flags, stream (RFC 9113, 4.1).
const HEAD: usize = 9;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;
const CONTINUATION: u8 = 9;

/// Follows the frames that a server writes to one connection.
#[derive(Debug, Default)]
pub(super) struct Refused {
    /// The head of a frame, and the payload up to the error code where there is one.
    head: [u8; HEAD + 8],
    len: usize,
    /// Bytes of the frame that are still to come, and that nobody looks at but `block`.
    skip: usize,
    /// Whether they are of a header block.
    in_block: bool,
    block: Block,
    speaks: Speaks,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Speaks {
    #[default]
    Unknown,
    Http2,
    /// HTTP/1, or TLS that somebody above does.
    Else,
}

impl Refused {
    /// Looks at the next bytes that were written; `refused` gets the name of each refusal that ends in them.
    pub(super) fn written(&mut self, mut bytes: &[u8], mut refused: impl FnMut(&'static str)) {
        while !bytes.is_empty() && self.speaks != Speaks::Else {
            if self.skip > 0 {
                let (skipped, rest) = bytes.split_at(self.skip.min(bytes.len()));
                self.skip -= skipped.len();
                bytes = rest;
                if self.in_block {
                    let too_large = skipped.iter().filter(|byte| self.block.byte(**byte)).count();
                    (0..too_large).for_each(|_| refused("REQUEST_HEADER_FIELDS_TOO_LARGE"));
                }
                continue;
            }
            let taken = (self.wanted() - self.len).min(bytes.len());
            let (now, rest) = bytes.split_at(taken);
            self.head[self.len..self.len + taken].copy_from_slice(now);
            self.len += taken;
            bytes = rest;
            if self.len == self.wanted()
                && let Some(reason) = self.frame()
            {
                refused(reason);
            }
        }
    }

    fn payload(&self) -> usize {
        self.head[..3].iter().fold(0, |len, byte| len << 8 | usize::from(*byte))
    }

    /// How much of this frame has to be seen.
    fn wanted(&self) -> usize {
        if self.len < HEAD {
            return HEAD;
        }
        let code = match self.head[3] {
            RST_STREAM => 4,
            GOAWAY => 8,
            _ => 0,
        };
        HEAD + self.payload().min(code)
    }

    /// A frame of which enough was seen: what it refuses.
    fn frame(&mut self) -> Option<&'static str> {
        let (kind, seen) = (self.head[3], std::mem::take(&mut self.len));
        if self.speaks == Speaks::Unknown {
            // The first frame of either side (RFC 9113, 3.4).
            self.speaks = if kind == SETTINGS { Speaks::Http2 } else { Speaks::Else };
        }
        if self.speaks == Speaks::Else {
            return None;
        }
        self.skip = self.payload() - (seen - HEAD);
        // h2 writes no padding, and no priority.
        self.in_block = matches!(kind, HEADERS | CONTINUATION);
        if kind == HEADERS {
            self.block.begin();
        }
        let code = self.head[HEAD..seen].last_chunk().map(|code| u32::from_be_bytes(*code))?;
        // RFC 9113, 7.
        match (kind, code) {
            (RST_STREAM, 7) => Some("REFUSED_STREAM"),
            (GOAWAY, 6) => Some("FRAME_SIZE_ERROR"),
            (GOAWAY, 11) => Some("ENHANCE_YOUR_CALM"),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        let len = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&len[1..], &[kind, 0, 0, 0, 0, 1], payload].concat()
    }

    /// What is found in `bytes`, which come in pieces of these lengths.
    fn found(bytes: &[u8], pieces: &[usize]) -> Vec<&'static str> {
        let (mut refused, mut found, mut rest) = (Refused::default(), Vec::new(), bytes);
        for len in pieces.iter().cycle() {
            let (piece, after) = rest.split_at((*len).min(rest.len()));
            refused.written(piece, |reason| found.push(reason));
            rest = after;
            if rest.is_empty() {
                break;
            }
        }
        found
    }

    #[test]
    fn what_is_no_http2_is_not_looked_at() {
        let goaway = frame(GOAWAY, &[0, 0, 0, 0, 0, 0, 0, 11]);
        assert_eq!(found(&[frame(SETTINGS, &[]), goaway.clone()].concat(), &[99]), ["ENHANCE_YOUR_CALM"]);
        let tls = [&[0x16, 3, 3, 0, 0, 2, 0, 0, 0][..], &goaway].concat();
        for other in [goaway.clone(), tls, [b"HTTP/1.1 ", &*goaway].concat()] {
            assert!(found(&other, &[99]).is_empty());
        }
        // Frames that are too short for a code, which h2 does not write.
        assert!(
            found(&[frame(SETTINGS, &[]), frame(GOAWAY, &[11]), frame(RST_STREAM, &[])].concat(), &[1])
                .is_empty()
        );
    }

    proptest! {
        #[test]
        fn found_however_the_bytes_are_cut(
            frames in prop::collection::vec((0_u8..10, prop::collection::vec(0_u8..12, 0..40)), 0..20),
            pieces in prop::collection::vec(1_usize..30, 1..10),
        ) {
            let mut bytes = frame(SETTINGS, &[0; 6]);
            let mut expected = Vec::new();
            for (kind, payload) in &frames {
                bytes.extend(frame(*kind, payload));
                let code = |at: usize| {
                    payload.get(at..at + 4).map(|code| u32::from_be_bytes(code.try_into().unwrap()))
                };
                expected.extend(match kind {
                    3 if code(0) == Some(7) => Some("REFUSED_STREAM"),
                    7 if code(4) == Some(6) => Some("FRAME_SIZE_ERROR"),
                    7 if code(4) == Some(11) => Some("ENHANCE_YOUR_CALM"),
                    _ => None,
                });
            }
            // Those that are refused are rare among random ones.
            for (kind, payload, reason) in [
                (3, &[0, 0, 0, 7][..], "REFUSED_STREAM"),
                (7, &[0, 0, 0, 0, 0, 0, 0, 6, b'x', b'y'], "FRAME_SIZE_ERROR"),
                (7, &[0, 0, 0, 9, 0, 0, 0, 11], "ENHANCE_YOUR_CALM"),
            ] {
                bytes.extend(frame(kind, payload));
                expected.push(reason);
            }
            prop_assert_eq!(found(&bytes, &pieces), expected);
        }
    }
}
