//! Which fields of frames are large: the payloads of rows and changes, which both sides handle without a copy.

use bytes::Bytes;
use proto_common::bulk::{BulkMessage, PayloadField};

use crate::v1::TransferMigrationDataRequest;
use crate::v1::transfer_migration_data_request::Frame;

impl BulkMessage for TransferMigrationDataRequest {
    const PAYLOADS: &'static [PayloadField] =
        &[PayloadField { frame: 2, payload: 2047 }, PayloadField { frame: 3, payload: 2047 }];

    fn payload_mut(&mut self) -> Option<&mut Bytes> {
        match self.frame.as_mut()? {
            Frame::Bulk(bulk) => Some(&mut bulk.payload),
            Frame::Delta(delta) => Some(&mut delta.payload),
            Frame::Header(_)
            | Frame::Prepare(_)
            | Frame::Release(_)
            | Frame::Commit(_)
            | Frame::Discard(_)
            | Frame::Forget(_)
            | Frame::Heartbeat(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;
    use proto_common::bulk::{Decoder, encode};

    use super::*;
    use crate::v1::transfer_migration_data_request::{
        Bulk, Commit, Delta, Discard, Forget, Header, Heartbeat, Prepare, Release,
    };

    #[test]
    fn each_frame_is_on_the_wire_what_prost_makes_of_it() {
        let payload = Bytes::from(vec![1; 100_000]);
        let cursor = Bytes::from_static(b"cursor");
        for (frame, is_batch) in [
            (Frame::Header(Header { attempt: 1, session: cursor.clone(), ..Header::default() }), false),
            (Frame::Bulk(Bulk { number: 1, cursor, payload: payload.clone(), ..Bulk::default() }), true),
            (Frame::Bulk(Bulk { number: 1, last: true, ..Bulk::default() }), false),
            (Frame::Delta(Delta { number: 2, crc64nvme: 3, payload, ..Delta::default() }), true),
            (Frame::Prepare(Prepare::default()), false),
            (Frame::Release(Release::default()), false),
            (Frame::Commit(Commit::default()), false),
            (Frame::Discard(Discard::default()), false),
            (Frame::Forget(Forget {}), false),
            (Frame::Heartbeat(Heartbeat::default()), false),
        ] {
            let message = TransferMigrationDataRequest { frame: Some(frame) };
            let parts = encode(message.clone(), usize::MAX).unwrap();
            let wire = [&parts.head[..], &parts.payload[..]].concat();
            assert_eq!(wire[5..], message.encode_to_vec(), "{message:?}");
            assert_eq!(parts.payload.is_empty(), !is_batch, "the payload is a part of its own");

            let mut decoder = Decoder::<TransferMigrationDataRequest>::new(1 << 20);
            decoder.push(wire.into());
            let mut received = decoder.next_message().unwrap().unwrap();
            assert_eq!(received.payload.is_empty(), !is_batch);
            if let Some(field) = received.message.payload_mut() {
                *field = received.payload.into_bytes();
            }
            assert_eq!(received.message, message);
        }
    }
}
