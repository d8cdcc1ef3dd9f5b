//! Replies, encoded by the `redis-protocol` crate as RESP2 or RESP3.

use std::borrow::Cow;

use bytes::{Bytes, BytesMut};
use redis_protocol::{resp2, resp3};

/// The version of the protocol that a client has chosen with HELLO.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Version {
    Resp2,
    Resp3,
}

/// A reply, independent of the protocol's version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Reply {
    /// A short status.
    Simple(&'static str),
    Bulk(Bytes),
    Integer(i64),
    Null,
    Array(Vec<Reply>),
    /// A map in RESP3, a flat array in RESP2.
    Map(Vec<(Reply, Reply)>),
    /// A set in RESP3, an array in RESP2.
    Set(Vec<Reply>),
    /// Starts with its code in capitals, as in `ERR syntax error`.
    Error(Cow<'static, str>),
}

/// What each reply in a list takes beside the bytes of its value, until it is encoded: as what it is and as a frame, which are there at the same time, where its value
/// is allocated, and its length and line ends.
pub(super) const ITEM_BYTES: usize = size_of::<Reply>() + size_of::<resp3::types::BytesFrame>() + 64;

pub(super) const OK: Reply = Reply::Simple("OK");

impl Reply {
    pub(super) fn text(text: impl Into<String>) -> Self {
        Self::Bulk(Bytes::from(text.into()))
    }

    pub(super) fn error(text: impl Into<Cow<'static, str>>) -> Self {
        Self::Error(text.into())
    }

    pub(super) fn integer(number: impl TryInto<i64>) -> Self {
        Self::Integer(number.try_into().unwrap_or(i64::MAX))
    }

    pub(super) fn bulk_or_null(value: Option<Bytes>) -> Self {
        value.map_or(Self::Null, Self::Bulk)
    }

    /// Bytes of the values in it.
    pub(super) fn value_bytes(&self) -> usize {
        match self {
            Self::Bulk(value) => value.len(),
            Self::Array(items) => items.iter().map(Self::value_bytes).sum(),
            _ => 0,
        }
    }

    /// Replies in it.
    pub(super) fn items(&self) -> usize {
        let of = |items: &[Self]| items.len() + items.iter().map(Self::items).sum::<usize>();
        match self {
            Self::Array(items) | Self::Set(items) => of(items),
            Self::Map(pairs) => pairs.iter().map(|(key, value)| 2 + key.items() + value.items()).sum(),
            _ => 0,
        }
    }

    /// Appends the encoded reply.
    pub(super) fn encode(self, version: Version, out: &mut BytesMut) {
        let encoded = match version {
            Version::Resp2 => resp2::encode::extend_encode(out, &self.into_resp2(), false),
            Version::Resp3 => resp3::encode::complete::extend_encode(out, &self.into_resp3(), false),
        };
        if let Err(error) = encoded {
            // The buffer grows as needed, so nothing that we know of gets here.
            tracing::error!(%error, "a reply could not be encoded");
            out.extend_from_slice(b"-ERR the reply could not be encoded\r\n");
        }
    }

    fn into_resp2(self) -> resp2::types::BytesFrame {
        use resp2::types::BytesFrame as Frame;
        match self {
            Self::Simple(text) => Frame::SimpleString(Bytes::from_static(text.as_bytes())),
            Self::Bulk(value) => Frame::BulkString(value),
            Self::Integer(number) => Frame::Integer(number),
            Self::Null => Frame::Null,
            Self::Array(items) | Self::Set(items) => {
                Frame::Array(items.into_iter().map(Self::into_resp2).collect())
            }
            Self::Map(pairs) => Frame::Array(
                pairs.into_iter().flat_map(|(key, value)| [key.into_resp2(), value.into_resp2()]).collect(),
            ),
            Self::Error(text) => Frame::Error(one_line(&text).into()),
        }
    }

    fn into_resp3(self) -> resp3::types::BytesFrame {
        use resp3::types::BytesFrame as Frame;
        let attributes = None;
        match self {
            Self::Simple(text) => {
                Frame::SimpleString { data: Bytes::from_static(text.as_bytes()), attributes }
            }
            Self::Bulk(data) => Frame::BlobString { data, attributes },
            Self::Integer(data) => Frame::Number { data, attributes },
            Self::Null => Frame::Null,
            Self::Array(items) => {
                Frame::Array { data: items.into_iter().map(Self::into_resp3).collect(), attributes }
            }
            Self::Set(items) => {
                Frame::Set { data: items.into_iter().map(Self::into_resp3).collect(), attributes }
            }
            Self::Map(pairs) => Frame::Map {
                data: pairs.into_iter().map(|(key, value)| (key.into_resp3(), value.into_resp3())).collect(),
                attributes,
            },
            Self::Error(text) => Frame::SimpleError { data: one_line(&text).into(), attributes },
        }
    }
}

/// An error is a line of text: what clients send must not end it.
fn one_line(text: &str) -> String {
    text.replace(['\r', '\n'], " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(reply: Reply, version: Version) -> String {
        let mut out = BytesMut::from("+before\r\n");
        reply.encode(version, &mut out);
        String::from_utf8(out.to_vec()).unwrap().strip_prefix("+before\r\n").unwrap().into()
    }

    #[test]
    fn what_a_list_takes_is_counted_for_all_that_is_in_it() {
        let (reply, frame) = (size_of::<Reply>(), size_of::<resp2::types::BytesFrame>());
        assert!(frame <= size_of::<resp3::types::BytesFrame>() && ITEM_BYTES > reply + frame);
        let pair = (Reply::text("a"), Reply::Array(vec![Reply::Null; 3]));
        assert_eq!(Reply::Map(vec![pair]).items(), 5);
        assert_eq!(Reply::Array(vec![Reply::Set(vec![OK, OK]), OK]).items(), 4);
        assert_eq!(Reply::text("a").items(), 0);
    }

    #[test]
    fn each_kind_in_both_versions() {
        let map = || Reply::Map(vec![(Reply::text("a"), Reply::Integer(1)), (Reply::text("b"), Reply::Null)]);
        let cases = [
            (OK, "+OK\r\n", "+OK\r\n"),
            (Reply::text("a b"), "$3\r\na b\r\n", "$3\r\na b\r\n"),
            (Reply::Integer(-7), ":-7\r\n", ":-7\r\n"),
            (Reply::Null, "$-1\r\n", "_\r\n"),
            (Reply::Array(vec![]), "*0\r\n", "*0\r\n"),
            (Reply::Set(vec![OK]), "*1\r\n+OK\r\n", "~1\r\n+OK\r\n"),
            (map(), "*4\r\n$1\r\na\r\n:1\r\n$1\r\nb\r\n$-1\r\n", "%2\r\n$1\r\na\r\n:1\r\n$1\r\nb\r\n_\r\n"),
            (Reply::error("ERR a\r\nb"), "-ERR a  b\r\n", "-ERR a  b\r\n"),
        ];
        for (reply, resp2, resp3) in cases {
            assert_eq!(encoded(reply.clone(), Version::Resp2), resp2);
            assert_eq!(encoded(reply, Version::Resp3), resp3);
        }
    }
}
