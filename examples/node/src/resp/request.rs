//! Requests, as arrays of bulk strings or as inline commands.
//!
//! Replies are encoded, and in clients decoded, by the `redis-protocol` crate. Requests are not: its decoder
//! starts over with every piece that arrives, recurses into nested arrays as deep as a peer likes, knows no
//! inline commands, and its errors are not those that clients of Redis know. A request is a flat array, so this is short.

use std::ops::Range;

use bytes::{Bytes, BytesMut};

/// What a client may send.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes of one request, its framing included. Memory grows with what arrives, not with what is announced.
    pub request_bytes: usize,
    /// Arguments of one request; Redis' own limit is 1048576.
    pub arguments: usize,
    /// Bytes of an inline command, and of a line that announces a length; as in Redis.
    pub line_bytes: usize,
    /// Bytes of all requests that are not done and of all replies that are not taken, of all clients together, with what each argument and each
    /// value of a list takes beside its own bytes. One that is alone may have half of it, others less.
    pub memory_bytes: usize,
}

impl Default for Limits {
    /// 64 MiB, 1048576 arguments, lines of 64 KiB, 1 GiB in all: a reply to MGET has at most 128 MiB, twice while it is encoded.
    fn default() -> Self {
        Self { request_bytes: 64 << 20, arguments: 1 << 20, line_bytes: 64 << 10, memory_bytes: 1 << 30 }
    }
}

/// What an argument may take beside its bytes, from where it is found to be until its command is done: 16 where it lies in the buffer, twice that while there
/// is more room than needed; 32 itself, and as much again in the list of keys, or of pairs, that the command makes of it. It has 6 bytes or more in the
/// request.
pub(super) const ARGUMENT_BYTES: usize = 128;

/// Room for arguments that is kept for the next request.
const KEPT_ARGUMENTS: usize = 1024;

/// The connection sent what is no request; it has to be closed. Displays as Redis words it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("Protocol error: {0}")]
pub struct ProtocolError(String);

fn error<T>(text: impl Into<String>) -> Result<T, ProtocolError> {
    Err(ProtocolError(text.into()))
}

/// Takes requests out of a buffer. Goes on where it was when more has arrived.
#[derive(Debug)]
pub struct RequestDecoder {
    limits: Limits,
    /// Bytes of the buffer that were understood.
    at: usize,
    /// Bytes from `at` on that hold no line end.
    searched: usize,
    state: State,
    arguments: Vec<Range<usize>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Start,
    Length { missing: usize },
    Bulk { missing: usize, len: usize },
}

impl RequestDecoder {
    /// A decoder at the start of a connection.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self { limits, at: 0, searched: 0, state: State::Start, arguments: Vec::new() }
    }

    /// Bytes that are held of a request that is not all there, beside those in the buffer, or will be when it is.
    #[must_use]
    pub fn held_bytes(&self) -> usize {
        self.arguments.len() * ARGUMENT_BYTES
    }

    /// The next whole request, taken from the front of `buffer`; `None` when more bytes are needed. Empty requests are
    /// skipped, as Redis does.
    ///
    /// # Errors
    ///
    /// What arrived is no request, or too large. The connection is of no use any more.
    pub fn decode(&mut self, buffer: &mut BytesMut) -> Result<Option<Vec<Bytes>>, ProtocolError> {
        loop {
            match self.state {
                State::Start => match buffer.first() {
                    None => return Ok(None),
                    Some(b'*') => {
                        let Some(line) = self.line(buffer, "too big mbulk count string")? else {
                            return Ok(None);
                        };
                        let count = number(&buffer[line.start + 1..line.end]);
                        match count {
                            Some(count) if count > 0 => {
                                let missing = usize::try_from(count).unwrap_or(usize::MAX);
                                if missing > self.limits.arguments {
                                    return error("invalid multibulk length");
                                }
                                self.state = State::Length { missing };
                            }
                            // Nothing was asked for.
                            Some(_) => self.skip(buffer),
                            None => return error("invalid multibulk length"),
                        }
                    }
                    Some(_) => {
                        let Some(line) = self.line(buffer, "too big inline request")? else {
                            return Ok(None);
                        };
                        let Some(arguments) = split_inline(&buffer[line]) else {
                            return error("unbalanced quotes in request");
                        };
                        self.skip(buffer);
                        if !arguments.is_empty() {
                            return Ok(Some(arguments));
                        }
                    }
                },
                State::Length { missing: 0 } => {
                    let request = buffer.split_to(self.at).freeze();
                    let arguments = self.arguments.drain(..).map(|range| request.slice(range)).collect();
                    // The room for very many is not kept for the connection's life.
                    if self.arguments.capacity() > KEPT_ARGUMENTS {
                        self.arguments = Vec::new();
                    }
                    self.at = 0;
                    self.state = State::Start;
                    return Ok(Some(arguments));
                }
                State::Length { missing } => {
                    match buffer.get(self.at) {
                        None => return Ok(None),
                        Some(b'$') => {}
                        Some(&other) => {
                            return error(format!(
                                "expected '$', got '{}'",
                                char::from(other).escape_default()
                            ));
                        }
                    }
                    let Some(line) = self.line(buffer, "too big bulk count string")? else { return Ok(None) };
                    let len =
                        number(&buffer[line.start + 1..line.end]).and_then(|len| usize::try_from(len).ok());
                    let Some(len) =
                        len.filter(|&len| self.at.saturating_add(len) <= self.limits.request_bytes)
                    else {
                        return error("invalid bulk length");
                    };
                    self.state = State::Bulk { missing, len };
                }
                State::Bulk { missing, len } => {
                    let end = self.at + len;
                    if buffer.len() < end + 2 {
                        return Ok(None);
                    }
                    // As Redis, the two bytes that end a bulk are not looked at.
                    self.arguments.push(self.at..end);
                    self.at = end + 2;
                    self.state = State::Length { missing: missing - 1 };
                }
            }
        }
    }

    /// The line from where the decoder is, without its end, which is a line feed with or without a carriage return.
    fn line(&mut self, buffer: &BytesMut, too_long: &str) -> Result<Option<Range<usize>>, ProtocolError> {
        let rest = &buffer[self.at..];
        let Some(feed) = rest[self.searched..].iter().position(|&b| b == b'\n').map(|n| n + self.searched)
        else {
            self.searched = rest.len();
            return if rest.len() > self.limits.line_bytes { error(too_long) } else { Ok(None) };
        };
        if feed > self.limits.line_bytes {
            return error(too_long);
        }
        self.searched = 0;
        let start = self.at;
        self.at += feed + 1;
        let end = start + feed;
        Ok(Some(start..if buffer[start..end].ends_with(b"\r") { end - 1 } else { end }))
    }

    fn skip(&mut self, buffer: &mut BytesMut) {
        let _ = buffer.split_to(self.at);
        self.at = 0;
        self.state = State::Start;
    }
}

fn number(text: &[u8]) -> Option<i64> {
    crate::store::parse_integer(text)
}

/// Splits a line into arguments as Redis does: quotes of both kinds, escapes in double ones. `None` if a quote is not closed.
fn split_inline(line: &[u8]) -> Option<Vec<Bytes>> {
    let mut arguments = Vec::new();
    let mut rest = line.iter().copied().peekable();
    loop {
        while rest.next_if(u8::is_ascii_whitespace).is_some() {}
        let Some(&first) = rest.peek() else { return Some(arguments) };
        let mut argument = Vec::new();
        let mut next = Some(first);
        while let Some(byte) = next {
            if byte.is_ascii_whitespace() {
                break;
            }
            rest.next();
            match byte {
                b'"' | b'\'' => {
                    quoted(&mut rest, byte, &mut argument)?;
                    // A closing quote ends the argument.
                    if rest.peek().is_some_and(|b| !b.is_ascii_whitespace()) {
                        return None;
                    }
                }
                other => argument.push(other),
            }
            next = rest.peek().copied();
        }
        arguments.push(Bytes::from(argument));
    }
}

fn quoted(
    rest: &mut std::iter::Peekable<impl Iterator<Item = u8> + Clone>,
    quote: u8,
    argument: &mut Vec<u8>,
) -> Option<()> {
    loop {
        let byte = rest.next()?;
        if byte == quote {
            return Some(());
        }
        if byte != b'\\' {
            argument.push(byte);
            continue;
        }
        if quote == b'\'' {
            argument.push(if rest.next_if_eq(&b'\'').is_some() { b'\'' } else { b'\\' });
            continue;
        }
        match rest.next()? {
            b'n' => argument.push(b'\n'),
            b'r' => argument.push(b'\r'),
            b't' => argument.push(b'\t'),
            b'b' => argument.push(8),
            b'a' => argument.push(7),
            b'x' => {
                let mut ahead = rest.clone();
                let digit = |b: Option<u8>| b.and_then(|b| char::from(b).to_digit(16));
                match (digit(ahead.next()), digit(ahead.next())) {
                    (Some(high), Some(low)) => {
                        rest.nth(1);
                        argument.push(u8::try_from(high * 16 + low).unwrap_or_default());
                    }
                    _ => argument.push(b'x'),
                }
            }
            other => argument.push(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> Limits {
        Limits { request_bytes: 1000, arguments: 10, line_bytes: 100, memory_bytes: 1 << 20 }
    }

    /// All requests of `input`, given to the decoder in pieces of `piece` bytes.
    fn decode(input: &[u8], piece: usize) -> Result<Vec<Vec<Bytes>>, ProtocolError> {
        let mut decoder = RequestDecoder::new(limits());
        let mut buffer = BytesMut::new();
        let mut requests = Vec::new();
        for piece in input.chunks(piece) {
            buffer.extend_from_slice(piece);
            while let Some(request) = decoder.decode(&mut buffer)? {
                requests.push(request);
            }
        }
        Ok(requests)
    }

    fn is(input: &[u8], expected: &[&[&[u8]]]) {
        for piece in 1..=input.len() {
            let found = decode(input, piece)
                .unwrap_or_else(|error| panic!("{input:?} in pieces of {piece}: {error}"));
            let found: Vec<Vec<&[u8]>> =
                found.iter().map(|request| request.iter().map(|a| &a[..]).collect()).collect();
            assert_eq!(found, expected, "{input:?} in pieces of {piece}");
        }
    }

    fn fails(input: &[u8], text: &str) {
        for piece in [1, 3, input.len()] {
            let found = decode(input, piece);
            assert_eq!(found, Err(ProtocolError(text.into())), "{:?}", String::from_utf8_lossy(input));
        }
    }

    #[test]
    fn arrays_of_bulks_in_any_pieces() {
        is(b"*1\r\n$4\r\nPING\r\n", &[&[b"PING"]]);
        is(b"*2\r\n$3\r\nGET\r\n$0\r\n\r\n*1\r\n$1\r\n\n\r\n", &[&[b"GET", b""], &[b"\n"]]);
        is(b"*2\r\n$3\r\nGET\r\n$4\r\n\r\n$1\r\n", &[&[b"GET", b"\r\n$1"]]);
    }

    #[test]
    fn empty_requests_are_skipped() {
        is(b"*0\r\n*-1\r\n\r\n  \r\nPING\r\n", &[&[b"PING"]]);
    }

    #[test]
    fn inline_commands() {
        is(b"PING\n", &[&[b"PING"]]);
        is(b"  set  key 'a b' \r\n", &[&[b"set", b"key", b"a b"]]);
        is(b"set \"a\\x41\\n\\\"\" ''\r\nget k\r\n", &[&[b"set", b"aA\n\"", b""], &[b"get", b"k"]]);
        is(b"echo 'it\\'s' \"\\xzz\"\r\n", &[&[b"echo", b"it's", b"xzz"]]);
    }

    #[test]
    fn what_is_no_request() {
        fails(b"*x\r\n", "invalid multibulk length");
        fails(b"*11\r\n", "invalid multibulk length");
        fails(b"*99999999999999999999\r\n", "invalid multibulk length");
        fails(b"*1\r\n:5\r\n", "expected '$', got ':'");
        fails(b"*1\r\n\x01", "expected '$', got '\\u{1}'");
        fails(b"*1\r\n$-1\r\n", "invalid bulk length");
        fails(b"*1\r\n$-5\r\n", "invalid bulk length");
        fails(b"*1\r\n$x\r\n", "invalid bulk length");
        fails(b"*1\r\n$9223372036854775807\r\n", "invalid bulk length");
        fails(b"*1\r\n$1001\r\n", "invalid bulk length");
        fails(b"get 'a\r\n", "unbalanced quotes in request");
        fails(b"get \"a\"b\r\n", "unbalanced quotes in request");
        fails(&[b'a'; 102], "too big inline request");
        fails(&[b"*".as_slice(), &[b'1'; 102]].concat(), "too big mbulk count string");
        fails(&[b"*1\r\n$".as_slice(), &[b'1'; 102]].concat(), "too big bulk count string");
    }

    #[test]
    fn the_limit_counts_all_arguments_together() {
        let bulk = [b"$400\r\n".as_slice(), &[b'a'; 400], b"\r\n"].concat();
        let two = [b"*2\r\n".as_slice(), &bulk, &bulk].concat();
        assert_eq!(decode(&two, 7).unwrap().len(), 1);
        let three = [b"*3\r\n".as_slice(), &bulk, &bulk, &bulk].concat();
        fails(&three, "invalid bulk length");
    }

    #[test]
    fn a_giant_announcement_takes_no_memory() {
        let mut decoder = RequestDecoder::new(Limits::default());
        let mut buffer = BytesMut::from(&b"*1048576\r\n$67000000\r\nx"[..]);
        assert_eq!(decoder.decode(&mut buffer), Ok(None));
        assert!(buffer.capacity() < 1024 && decoder.arguments.capacity() < 1024);
    }

    #[test]
    fn an_argument_is_counted_with_all_that_it_takes() {
        let lists = size_of::<Bytes>() + size_of::<(Bytes, Bytes)>() / 2;
        assert!(ARGUMENT_BYTES >= 2 * size_of::<Range<usize>>() + lists);
        let mut decoder = RequestDecoder::new(Limits::default());
        let mut buffer = BytesMut::from(&b"*100001\r\n"[..]);
        buffer.extend_from_slice(&b"$0\r\n\r\n".repeat(100_000));
        assert_eq!(decoder.decode(&mut buffer), Ok(None));
        assert_eq!(decoder.held_bytes(), 100_000 * ARGUMENT_BYTES);
        assert!(decoder.held_bytes() >= decoder.arguments.capacity() * size_of::<Range<usize>>());
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_survived(input in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200), piece in 1usize..50) {
            let whole = decode(&input, input.len().max(1));
            proptest::prop_assert_eq!(decode(&input, piece), whole);
        }

        #[test]
        fn any_arguments_come_back(requests in proptest::collection::vec(proptest::collection::vec(proptest::collection::vec(proptest::prelude::any::<u8>(), 0..60), 1..8), 0..5), piece in 1usize..100) {
            let mut input = Vec::new();
            for request in &requests {
                input.extend(format!("*{}\r\n", request.len()).bytes());
                for argument in request {
                    input.extend(format!("${}\r\n", argument.len()).bytes());
                    input.extend(argument);
                    input.extend(b"\r\n");
                }
            }
            let found = decode(&input, piece).unwrap();
            let found: Vec<Vec<Vec<u8>>> = found.iter().map(|r| r.iter().map(|a| a.to_vec()).collect()).collect();
            proptest::prop_assert_eq!(found, requests);
        }
    }
}
