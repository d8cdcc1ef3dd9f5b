//! What is made here against what prost makes, for whatever can be on the wire.

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use proptest::prelude::*;
use prost::Message as _;
use prost::encoding::{WireType, encode_key, encode_varint};

use super::*;

#[derive(Clone, PartialEq, prost::Message)]
struct Request {
    #[prost(oneof = "Frame", tags = "1, 4, 9")]
    frame: Option<Frame>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum Frame {
    #[prost(message, tag = "1")]
    Header(Chunk),
    #[prost(message, tag = "4")]
    Chunk(Chunk),
    #[prost(message, tag = "9")]
    Batch(Chunk),
}

#[derive(Clone, PartialEq, prost::Message)]
struct Chunk {
    #[prost(uint32, tag = "1")]
    file: u32,
    #[prost(fixed64, tag = "3")]
    crc: u64,
    #[prost(string, repeated, tag = "5")]
    notes: Vec<String>,
    #[prost(bytes = "bytes", tag = "2047")]
    payload: Bytes,
}

impl BulkMessage for Request {
    const PAYLOADS: &'static [PayloadField] =
        &[PayloadField { frame: 4, payload: 2047 }, PayloadField { frame: 9, payload: 2047 }];

    fn payload_mut(&mut self) -> Option<&mut Bytes> {
        match self.frame.as_mut()? {
            Frame::Chunk(chunk) | Frame::Batch(chunk) => Some(&mut chunk.payload),
            Frame::Header(_) => None,
        }
    }
}

fn prefixed(message: &[u8]) -> Vec<u8> {
    let mut all = vec![0];
    all.put_u32(u32::try_from(message.len()).unwrap());
    all.extend_from_slice(message);
    all
}

/// What a decoder makes of a stream that comes in data frames of these lengths, over and over, and whether it ended between two messages.
fn receive(stream: &[u8], cuts: &[usize], limit: usize) -> (Vec<Received<Request>>, Result<bool, BulkError>) {
    let mut decoder = Decoder::new(limit);
    let mut received = Vec::new();
    let mut rest = Bytes::copy_from_slice(stream);
    for cut in cuts.iter().cycle() {
        loop {
            match decoder.next_message() {
                Ok(Some(message)) => received.push(message),
                Ok(None) => break,
                Err(error) => return (received, Err(error)),
            }
        }
        if rest.is_empty() {
            break;
        }
        decoder.push(rest.split_to(rest.len().min(*cut)));
    }
    (received, Ok(!decoder.is_within_message()))
}

fn whole(received: Received<Request>) -> Request {
    let Received { mut message, payload } = received;
    match message.payload_mut() {
        Some(field) => *field = payload.into_bytes(),
        None => assert!(payload.is_empty(), "a payload without a frame"),
    }
    message
}

fn payloads() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        Just(Vec::new()),
        prop::collection::vec(any::<u8>(), 1..40),
        (0_u8.., 15_000_usize..70_000).prop_map(|(byte, len)| vec![byte; len]),
    ]
}

fn cuts() -> impl Strategy<Value = Vec<usize>> {
    prop::collection::vec(prop_oneof![1_usize..40, 40_usize..20_000, Just(16 << 10), Just(64 << 10)], 1..12)
}

fn messages() -> impl Strategy<Value = Request> {
    let chunk = (any::<u32>(), any::<u64>(), prop::collection::vec(".{0,9}", 0..3), payloads());
    (0..4, chunk).prop_map(|(kind, (file, crc, notes, payload))| {
        let chunk = Chunk { file, crc, notes, payload: payload.into() };
        let frame = match kind {
            0 => None,
            1 => Some(Frame::Header(chunk)),
            2 => Some(Frame::Chunk(chunk)),
            _ => Some(Frame::Batch(chunk)),
        };
        Request { frame }
    })
}

/// One field as no well-behaved encoder writes it: any tag that means something or nothing, any type, and sometimes a wrong length.
fn fields(inner: BoxedStrategy<Vec<u8>>) -> impl Strategy<Value = Vec<u8>> {
    let tag = prop_oneof![Just(1_u32), Just(3), Just(4), Just(5), Just(9), Just(77), Just(2047)];
    let value = prop_oneof![
        2 => any::<u64>().prop_map(|value| {
            let mut field = Vec::new();
            encode_varint(value, &mut field);
            (WireType::Varint, field)
        }),
        2 => any::<[u8; 8]>().prop_map(|value| (WireType::SixtyFourBit, value.to_vec())),
        1 => any::<[u8; 4]>().prop_map(|value| (WireType::ThirtyTwoBit, value.to_vec())),
        9 => (inner, 0..60).prop_map(|(value, wrong)| {
            let mut field = Vec::new();
            encode_varint(value.len() as u64 + u64::from(wrong == 0), &mut field);
            field.extend_from_slice(&value);
            (WireType::LengthDelimited, field)
        }),
        1 => Just((WireType::StartGroup, Vec::new())),
        1 => Just((WireType::EndGroup, Vec::new())),
    ];
    (tag, value).prop_map(|(tag, (wire_type, value))| {
        let mut field = Vec::new();
        encode_key(tag, wire_type, &mut field);
        field.extend_from_slice(&value);
        if wire_type == WireType::StartGroup && tag != 3 {
            // Most groups end.
            encode_key(tag, WireType::EndGroup, &mut field);
        }
        field
    })
}

/// A message of such fields, some of them well formed and nested.
fn wild() -> impl Strategy<Value = Vec<u8>> {
    let of = |inner: BoxedStrategy<Vec<u8>>| {
        prop::collection::vec(fields(inner), 0..5).prop_map(|fields| fields.concat()).boxed()
    };
    let leaf = prop::collection::vec(32_u8..127, 0..30).boxed();
    let frame = prop_oneof![
        of(leaf),
        messages().prop_map(|message| {
            let inner = message.encode_to_vec();
            // Its fields alone: without the key and the length in front.
            let mut rest = inner.as_slice();
            let _ = prost::encoding::decode_key(&mut rest);
            let _ = prost::encoding::decode_varint(&mut rest);
            rest.to_vec()
        }),
    ];
    prop_oneof![
        3 => of(frame.boxed()),
        1 => prop::collection::vec(messages(), 1..4).prop_map(|messages| {
            messages.iter().flat_map(prost::Message::encode_to_vec).collect()
        }),
        1 => prop::collection::vec(any::<u8>(), 0..30),
    ]
}

proptest! {
    #[test]
    fn the_same_bytes_as_prost(message in messages()) {
        let parts = encode(message.clone(), usize::MAX).unwrap();
        let expected = prefixed(&message.encode_to_vec());
        prop_assert_eq!([&parts.head[..], &parts.payload[..]].concat(), expected);
        if let Some(payload) = message.clone().payload_mut() {
            prop_assert_eq!(parts.payload.as_ptr(), payload.as_ptr(), "it was copied");
        }
        let len = message.encoded_len();
        prop_assert!(encode(message.clone(), len).is_ok());
        if len > 0 {
            prop_assert_eq!(encode(message, len - 1), Err(TooLong { len, limit: len - 1 }));
        }
    }

    #[test]
    fn what_was_sent_arrives_however_it_is_cut(
        messages in prop::collection::vec(messages(), 0..5),
        cuts in cuts(),
        lost in 1_usize..100,
    ) {
        let stream: Vec<u8> = messages
            .iter()
            .flat_map(|message| {
                let Parts { head, payload } = encode(message.clone(), usize::MAX).unwrap();
                [head, payload].concat()
            })
            .collect();
        let (received, end) = receive(&stream, &cuts, 1 << 20);
        prop_assert!(end.unwrap(), "it ended within a message");
        prop_assert_eq!(received.into_iter().map(whole).collect::<Vec<_>>(), messages.clone());
        // Not all of the last message arrives.
        let last = messages.last().map_or(0, |message| message.encoded_len() + PREFIX);
        if last > lost {
            let (received, end) = receive(&stream[..stream.len() - lost], &cuts, 1 << 20);
            prop_assert!(!end.unwrap());
            prop_assert_eq!(received.len(), messages.len() - 1);
        }
    }

    #[cfg(feature = "client")]
    #[test]
    fn what_goes_out_in_batches_is_on_the_wire_what_goes_out_alone(
        batches in prop::collection::vec(prop::collection::vec(messages(), 1..5), 0..5),
    ) {
        let (alone, single) = tokio::sync::mpsc::channel(32);
        let (together, batched) = tokio::sync::mpsc::channel(32);
        for batch in &batches {
            for message in batch {
                alone.try_send(message.clone()).unwrap();
            }
            together.try_send(batch.clone()).unwrap();
        }
        drop((alone, together));
        let (alone, _) = sent(Outgoing::new(single, usize::MAX));
        let (together, frames) = sent(Outgoing::of_batches(batched, usize::MAX));
        prop_assert_eq!(alone, together);
        // One data frame for a batch, but for a message that goes alone.
        let most: usize = batches.iter().map(|batch| if batch.len() == 1 { 2 } else { 1 }).sum();
        prop_assert!(frames <= most, "{} frames of {} batches", frames, batches.len());
    }

    #[test]
    fn the_same_verdict_as_prost_on_anything(message in wild(), cuts in cuts()) {
        let (received, end) = receive(&prefixed(&message), &cuts, 1 << 20);
        match Request::decode(&message[..]) {
            Ok(expected) => {
                prop_assert!(end.is_ok(), "{end:?}");
                prop_assert_eq!(received.into_iter().map(whole).collect::<Vec<_>>(), [expected]);
            }
            Err(error) => {
                prop_assert!(matches!(end, Err(BulkError::Malformed(_))), "{error}: {end:?}");
                prop_assert_eq!(received.len(), 0);
            }
        }
    }

    #[test]
    fn no_bytes_panic(stream in prop::collection::vec(any::<u8>(), 0..200), cuts in cuts()) {
        let _ = receive(&stream, &cuts, 100);
    }

    #[test]
    fn a_payload_reads_as_its_bytes(data in payloads(), cuts in cuts(), takes in cuts()) {
        let mut rest = Bytes::from(data.clone());
        let mut payload = Payload::default();
        for cut in cuts.iter().cycle() {
            if rest.is_empty() {
                break;
            }
            payload.push(rest.split_to(rest.len().min(*cut)));
        }
        prop_assert_eq!(payload.len(), data.len());
        prop_assert_eq!(payload.crc64(), crate::checksum::crc64(&data));
        prop_assert_eq!(&payload, &Payload::from(Bytes::from(data.clone())));
        prop_assert_eq!(payload.io_slices().flat_map(|slice| slice.to_vec()).collect::<Vec<_>>(), data.clone());
        let mut reader = payload.clone().reader();
        let mut read = BytesMut::new();
        for (number, take) in takes.iter().cycle().enumerate() {
            let take = reader.remaining().min(*take);
            if take == 0 {
                break;
            }
            if number % 2 == 0 {
                read.extend_from_slice(&reader.copy_to_bytes(take));
            } else {
                let mut some = vec![0; take];
                reader.copy_to_slice(&mut some);
                read.extend_from_slice(&some);
            }
        }
        prop_assert_eq!(&read[..], &data[..]);
        prop_assert_eq!(payload.into_bytes(), data);
    }
}

/// The bytes of a body, and its data frames.
#[cfg(feature = "client")]
fn sent(mut body: Outgoing<Request>) -> (Vec<u8>, usize) {
    use http_body::Body as _;
    let (mut all, mut frames) = (Vec::new(), 0);
    let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
    while let std::task::Poll::Ready(Some(frame)) = std::pin::Pin::new(&mut body).poll_frame(&mut cx) {
        all.extend_from_slice(&frame.unwrap().into_data().unwrap());
        frames += 1;
    }
    (all, frames)
}

fn chunk(payload: usize) -> Request {
    let payload = vec![7; payload].into();
    Request { frame: Some(Frame::Chunk(Chunk { file: 1, crc: 2, notes: Vec::new(), payload })) }
}

#[test]
fn large_data_frames_are_not_copied_and_small_ones_leave_few_pieces() {
    let Parts { head, payload } = encode(chunk(1 << 20), usize::MAX).unwrap();
    let mut decoder = Decoder::<Request>::new(2 << 20);
    decoder.push(head.clone());
    let pieces: Vec<Bytes> = (0..16).map(|at| payload.slice(at << 16..(at + 1) << 16)).collect();
    pieces.iter().for_each(|piece| decoder.push(piece.clone()));
    let received = decoder.next_message().unwrap().unwrap();
    let at = |pieces: &[Bytes]| pieces.iter().map(|piece| piece.as_ptr()).collect::<Vec<_>>();
    assert_eq!(at(received.payload.slices()), at(&pieces));

    let stream = [head, payload].concat();
    let (received, _) = receive(&stream, &[1], 2 << 20);
    let pieces = received[0].payload.slices().len();
    assert!((2..=65).contains(&pieces), "{pieces} pieces");
}

#[test]
fn what_may_not_come_is_refused_before_it_is_read() {
    let mut stream = prefixed(&chunk(1000).encode_to_vec());
    let (received, end) = receive(&stream[..PREFIX], &[1], 1000);
    assert!(received.is_empty() && matches!(end, Err(BulkError::TooLarge { limit: 1000, .. })), "{end:?}");
    stream[0] = 1;
    assert!(matches!(receive(&stream[..PREFIX], &[1], 1 << 20).1, Err(BulkError::Compressed)));
    stream[0] = 2;
    assert!(matches!(receive(&stream[..PREFIX], &[1], 1 << 20).1, Err(BulkError::Flag(2))));
}

/// A message of many empty ones takes a hundred times its length in memory.
#[test]
fn only_a_payload_may_be_long() {
    const MIB: usize = 1 << 20;
    // A payload in a frame that has one; the same length in a field of the frame, and of the message, that is none.
    let notes = |len| Request {
        frame: Some(Frame::Chunk(Chunk {
            file: 1,
            crc: 2,
            notes: vec!["x".repeat(len)],
            payload: Bytes::from_static(b"x"),
        })),
    };
    let skipped = |len: usize| {
        let mut field = Vec::new();
        encode_key(500, WireType::LengthDelimited, &mut field);
        encode_varint(len as u64, &mut field);
        field.resize(field.len() + len, 0);
        field
    };
    let verdict = |message: &[u8]| receive(&prefixed(message), &[64 << 10], 4 * MIB);
    let large = chunk(2 * MIB).encode_to_vec();
    let (received, end) = verdict(&large);
    assert!(received.len() == 1 && end.is_ok(), "{end:?}");
    let chunk = chunk(1).encode_to_vec();
    for (message, fits) in [
        (notes(MIB - 100).encode_to_vec(), true),
        (notes(MIB + 1).encode_to_vec(), false),
        (skipped(MIB - 100), true),
        (skipped(MIB + 1), false),
        ([&chunk[..], &skipped(MIB - 100)].concat(), true),
        ([&chunk[..], &skipped(MIB + 1)].concat(), false),
        ([&skipped(3), &large[..]].concat(), true),
        ([&skipped(MIB + 1), &large[..]].concat(), false),
        // Not even where a group shows its end only to who reads it.
        ([&chunk[..], &[0x7b, 0x7c], &skipped(MIB + 1)].concat(), false),
    ] {
        let (received, end) = verdict(&message);
        assert_eq!(received.len(), usize::from(fits), "{end:?}");
        assert_eq!(matches!(end, Err(BulkError::TooLarge { limit: MIB, .. })), !fits, "{end:?}");
    }
}

#[test]
fn the_last_payload_counts_as_it_does_for_prost() {
    let of = |tag: u32, payloads: &[&[u8]]| {
        let frame: Vec<u8> = payloads
            .iter()
            .flat_map(|payload| {
                let mut field = Vec::new();
                encode_key(2047, WireType::LengthDelimited, &mut field);
                encode_varint(payload.len() as u64, &mut field);
                [field, payload.to_vec()].concat()
            })
            .collect();
        let mut field = Vec::new();
        encode_key(tag, WireType::LengthDelimited, &mut field);
        encode_varint(frame.len() as u64, &mut field);
        [field, frame].concat()
    };
    for (message, expected) in [
        (of(4, &[b"a", b"bc"]), "bc"),
        (of(4, &[b"a", b""]), ""),
        ([of(4, &[b"a"]), of(4, &[])].concat(), "a"),
        ([of(4, &[b"a"]), of(9, &[])].concat(), ""),
        ([of(4, &[b"a"]), of(9, &[b"b"]), of(4, &[])].concat(), ""),
        ([of(4, &[b"a"]), of(1, &[b"b"]), of(9, &[b"c"])].concat(), "c"),
    ] {
        let mut theirs = Request::decode(&message[..]).unwrap();
        let ours = receive(&prefixed(&message), &[3], 1000).0.remove(0);
        assert_eq!(ours.payload, Payload::from(Bytes::from(expected)));
        assert_eq!(theirs.payload_mut().unwrap(), expected);
    }
}
