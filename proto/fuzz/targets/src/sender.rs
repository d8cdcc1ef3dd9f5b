//! A receiver over a directory, and the frames that a sender says to it one by one.

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use proto_common::Error;
use proto_common::checksum::crc64;
use proto_common::ids::NodeId;
use proto_common::slots::SlotRange;
use proto_snapshot::limits::Limits;
use proto_snapshot::receiver::{ReceiverService, SnapshotReceiver};
use proto_snapshot::store::{FileSnapshotStore, FileStoreOptions, StoreError};
use proto_snapshot::v1::split_snapshot_service_client::SplitSnapshotServiceClient;
use proto_snapshot::v1::transfer_split_snapshot_request::{
    Chunk, End, File, FileTotal, Frame, Header, Manifest,
};
use proto_snapshot::v1::transfer_split_snapshot_response::{Accepted, Ack, Extent, Frame as Answer};
use proto_snapshot::v1::{
    GetTransferProgressRequest, TransferSplitSnapshotRequest, TransferSplitSnapshotResponse,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use crate::harness::refusal;

/// Largest payload that the receiver takes, in bytes.
pub(crate) const CHUNK: usize = 64;

type Receiver = SnapshotReceiver<FileSnapshotStore>;
pub(crate) type Client = SplitSnapshotServiceClient<ReceiverService<FileSnapshotStore>>;

pub(crate) fn open(dir: &Path) -> Result<FileSnapshotStore, StoreError> {
    let mut options = FileStoreOptions::default();
    options.min_free_bytes = 0;
    FileSnapshotStore::open(dir, options)
}

pub(crate) async fn receiver(store: FileSnapshotStore) -> Receiver {
    let mut limits = Limits::default();
    limits.chunk_bytes = u32::try_from(CHUNK).unwrap();
    limits.unsynced_time = Duration::from_millis(20);
    SnapshotReceiver::builder(&NodeId::new("n2").unwrap(), store).limits(limits).start().await.unwrap()
}

/// The service in this process: requests reach it as they do behind a connection.
pub(crate) fn client(receiver: &Receiver) -> Client {
    SplitSnapshotServiceClient::new(receiver.clone().into_service())
}

/// What is sent: an ID, a version and contents by name.
#[derive(Debug, Clone)]
pub(crate) struct Snapshot {
    pub(crate) id: &'static str,
    pub(crate) shard: &'static str,
    pub(crate) index: u64,
    pub(crate) files: Vec<(String, Vec<u8>)>,
}

impl Snapshot {
    pub(crate) fn bytes(&self) -> u64 {
        self.files.iter().map(|(_, content)| content.len() as u64).sum()
    }

    pub(crate) fn header(&self, attempt: u64, generation: u64) -> Header {
        Header {
            transfer_id: self.id.to_owned(),
            source_shard_id: "s1".to_owned(),
            target_shard_id: self.shard.to_owned(),
            source_node_id: "n1".to_owned(),
            slots: Some(SlotRange::new(8192, 16384).unwrap().into()),
            snapshot_index: self.index,
            snapshot_term: 1,
            content_version: "v".to_owned(),
            attempt,
            session: vec![u8::try_from(attempt % 256).unwrap(); 16].into(),
            generation,
            file_count: self.files.len() as u64,
            name_bytes: self.files.iter().map(|(name, _)| name.len() as u64).sum(),
            total_bytes: Some(self.bytes()),
            ..Header::default()
        }
    }

    pub(crate) fn manifest(&self) -> Manifest {
        let file = |(name, content): &(String, Vec<u8>)| File {
            name: name.clone(),
            size: Some(content.len() as u64),
            blake3: None,
        };
        Manifest { files: self.files.iter().map(file).collect(), last: true }
    }

    pub(crate) fn chunk(&self, file: u32, offset: u64, len: usize) -> Chunk {
        let start = usize::try_from(offset).unwrap();
        let payload = Bytes::copy_from_slice(&self.files[file as usize].1[start..start + len]);
        Chunk { file, offset, crc64nvme: crc64(&payload), payload }
    }

    pub(crate) fn end(&self) -> End {
        let total = |(file, (_, content)): (u32, &(String, Vec<u8>))| FileTotal {
            file,
            size: content.len() as u64,
            crc64nvme: crc64(content),
        };
        End {
            files: (0..).zip(&self.files).map(total).collect(),
            last: true,
            total_bytes: self.bytes(),
            file_count: self.files.len() as u64,
        }
    }

    /// Whether exactly this lies in the place of what is installed.
    pub(crate) fn is_installed_in(&self, store: &Path) -> bool {
        let dir = store.join("installed").join(self.shard).join(self.id);
        dir.is_dir() && crate::tree::tree(&dir) == self.files.iter().cloned().collect()
    }

    /// Sends what is missing, as a sender that makes no mistake. Gives the reason of a refusal.
    pub(crate) async fn send(&self, client: &Client) -> Result<(), Error> {
        let asked = GetTransferProgressRequest { transfer_id: self.id.to_owned(), ..Default::default() };
        let known = client.clone().get_transfer_progress(asked).await;
        let attempt = known.map_or(0, |known| known.into_inner().transfer.unwrap().attempt);
        let mut stream = Stream::open(client, self.header(attempt + 1, 1)).await;
        stream.say(Frame::Manifest(self.manifest())).await;
        let accepted = stream.accepted().await?;
        // It has not said that it understands runs of files.
        for Extent { file, mut offset, length, more_files: _ } in accepted.missing {
            let end = offset + length.expect("the size is known");
            while offset < end {
                let len = usize::try_from(end - offset).unwrap().min(CHUNK);
                stream.say(Frame::Chunk(self.chunk(file, offset, len))).await;
                offset += len as u64;
            }
        }
        if !accepted.already_installed {
            stream.say(Frame::End(self.end())).await;
        }
        stream.installed().await
    }
}

/// One call, from the sender's side.
pub(crate) struct Stream {
    frames: Option<mpsc::Sender<TransferSplitSnapshotRequest>>,
    answers: Streaming<TransferSplitSnapshotResponse>,
    /// Bytes of chunks, and how many of them have arrived.
    sent: u64,
    received: u64,
}

impl Stream {
    pub(crate) async fn open(client: &Client, header: Header) -> Self {
        Self::open_with(client, Some(Frame::Header(header))).await
    }

    pub(crate) async fn open_with(client: &Client, first: Option<Frame>) -> Self {
        let (frames, requests) = mpsc::channel(1024);
        frames.send(TransferSplitSnapshotRequest { frame: first }).await.unwrap();
        let answers = client.clone().transfer_split_snapshot(ReceiverStream::new(requests)).await.unwrap();
        Self { frames: Some(frames), answers: answers.into_inner(), sent: 0, received: 0 }
    }

    pub(crate) async fn say(&mut self, frame: impl Into<Option<Frame>>) {
        let Some(frames) = &self.frames else { return };
        let frame = frame.into();
        if let Some(Frame::Chunk(chunk)) = &frame {
            self.sent += chunk.payload.len() as u64;
        }
        // One that has ended reads nothing; it says why in its answer.
        let _ = frames.send(TransferSplitSnapshotRequest { frame }).await;
    }

    /// Waits until `bytes` of the transfer are durable.
    pub(crate) async fn durable(&mut self, bytes: u64) {
        while self.ack().await.unwrap().expect("an Ack").durable_bytes < bytes {}
    }

    /// Waits until all that was sent has arrived.
    pub(crate) async fn arrived(&mut self) {
        while self.received < self.sent {
            self.ack().await.unwrap().expect("an Ack");
        }
    }

    /// Reads to the end of a lane, all of whose bytes have to arrive where it ends well.
    pub(crate) async fn ended(&mut self) -> Result<(), Error> {
        while self.ack().await?.is_some() {}
        assert_eq!(self.received, self.sent, "a lane ended without what was sent on it");
        Ok(())
    }

    async fn ack(&mut self) -> Result<Option<Ack>, Error> {
        match self.next().await? {
            Some(Answer::Ack(ack)) => Ok(Some(ack)),
            None => Ok(None),
            other => panic!("{other:?} instead of Ack"),
        }
    }

    pub(crate) fn half_close(&mut self) {
        self.frames = None;
    }

    async fn next(&mut self) -> Result<Option<Answer>, Error> {
        let answer = self.answers.message().await.map_err(refusal)?;
        let answer = answer.map(|answer| answer.frame.expect("a frame"));
        if let Some(Answer::Ack(ack)) = &answer {
            assert!(ack.received_bytes <= self.sent, "{ack:?} of {} bytes", self.sent);
            assert!(ack.received_bytes >= self.received, "{ack:?} after {} bytes", self.received);
            self.received = ack.received_bytes;
        }
        Ok(answer)
    }

    /// All pages of it in one.
    pub(crate) async fn accepted(&mut self) -> Result<Accepted, Error> {
        let mut missing = Vec::new();
        loop {
            match self.next().await? {
                Some(Answer::Accepted(page)) => {
                    missing.extend(page.missing.iter().copied());
                    if page.last {
                        return Ok(Accepted { missing, ..page });
                    }
                }
                other => panic!("{other:?} instead of Accepted"),
            }
        }
    }

    pub(crate) async fn installed(&mut self) -> Result<(), Error> {
        loop {
            match self.next().await? {
                Some(Answer::Installed(_)) => return Ok(()),
                Some(Answer::Ack(_)) => {}
                other => panic!("{other:?} instead of Installed"),
            }
        }
    }
}
