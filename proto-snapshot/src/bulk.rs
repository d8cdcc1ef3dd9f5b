//! Which field of a frame is large: the payload of a chunk, which both sides handle without a copy.

use bytes::Bytes;
use proto_common::bulk::{BulkMessage, PayloadField};

use crate::v1::TransferSplitSnapshotRequest;
use crate::v1::transfer_split_snapshot_request::Frame;

impl BulkMessage for TransferSplitSnapshotRequest {
    const PAYLOADS: &'static [PayloadField] = &[PayloadField { frame: 4, payload: 2047 }];

    fn payload_mut(&mut self) -> Option<&mut Bytes> {
        match self.frame.as_mut()? {
            Frame::Chunk(chunk) => Some(&mut chunk.payload),
            Frame::Header(_)
            | Frame::LaneHeader(_)
            | Frame::Manifest(_)
            | Frame::End(_)
            | Frame::Heartbeat(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;
    use proto_common::bulk::{Decoder, encode};

    use super::*;
    use crate::limits::MAX_MESSAGE_BYTES;
    use crate::v1::transfer_split_snapshot_request::{
        Chunk, End, FileTotal, Header, Heartbeat, LaneHeader, Manifest,
    };

    #[test]
    fn each_frame_is_on_the_wire_what_prost_makes_of_it() {
        let payload = Bytes::from(vec![1; 100_000]);
        let files = vec![FileTotal { file: 1, size: 2, crc64nvme: 3 }];
        for frame in [
            Frame::Header(Header { transfer_id: "t".into(), session: payload.clone(), ..Header::default() }),
            Frame::LaneHeader(LaneHeader { lane: 3, ..LaneHeader::default() }),
            Frame::Manifest(Manifest { last: true, ..Manifest::default() }),
            Frame::Chunk(Chunk { file: 1, offset: 1 << 40, crc64nvme: 5, payload: payload.clone() }),
            Frame::Chunk(Chunk::default()),
            Frame::End(End { files, last: true, total_bytes: 2, file_count: 1 }),
            Frame::Heartbeat(Heartbeat {}),
        ] {
            let message = TransferSplitSnapshotRequest { frame: Some(frame) };
            let parts = encode(message.clone(), MAX_MESSAGE_BYTES).unwrap();
            let wire = [&parts.head[..], &parts.payload[..]].concat();
            assert_eq!(wire[5..], message.encode_to_vec(), "{message:?}");
            let is_chunk = matches!(&message.frame, Some(Frame::Chunk(chunk)) if !chunk.payload.is_empty());
            assert_eq!(parts.payload.is_empty(), !is_chunk, "the payload is a part of its own");

            let mut decoder = Decoder::<TransferSplitSnapshotRequest>::new(MAX_MESSAGE_BYTES);
            decoder.push(wire.into());
            let mut received = decoder.next_message().unwrap().unwrap();
            if let Some(field) = received.message.payload_mut() {
                assert!(field.is_empty());
                *field = received.payload.into_bytes();
            }
            assert_eq!(received.message, message);
        }
    }
}
