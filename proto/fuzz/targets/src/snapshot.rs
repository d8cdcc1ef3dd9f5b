//! Sequences of frames to a snapshot's receiver, against a model that knows for each frame whether it must be taken or refused, which bytes
//! are there afterwards, and what lies on the disk in the end.
//!
//! Whatever was sent before, a sender that makes no mistake gets its snapshot installed, bit for bit, unless it was cancelled or wrong bytes
//! were sent under its name.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use arbitrary::Unstructured;
use bytes::Bytes;
use proto_common::Error;
use proto_common::checksum::crc64;
use proto_common::v1::Fence;
use proto_snapshot::v1::CancelTransferRequest;
use proto_snapshot::v1::transfer_split_snapshot_request::{
    Chunk, End, Frame, Header, Heartbeat, LaneHeader, Manifest,
};

use crate::harness::{block_on, directory};
use crate::sender::{CHUNK, Client, Snapshot, Stream, client, open, receiver};

/// Control streams of one input, and frames of one of them, its lanes' included.
const STREAMS: usize = 8;
const FRAMES: usize = 32;
/// Most streams of one attempt.
const LANES: u32 = 8;

/// A byte: its file and its offset.
type Byte = (u32, u64);

struct Model {
    snapshot: Snapshot,
    missing: BTreeSet<Byte>,
    /// Bytes that are not the snapshot's, and were taken as if they were.
    poisoned: BTreeSet<Byte>,
    /// What is missing is not known: ask.
    unsure: bool,
    attempt: u64,
    generation: u64,
    /// The last one that this process of the receiver has seen: a restart forgets them.
    seen: u64,
    /// A term of the fence that nothing lower than is taken.
    fence: u64,
    /// The present attempt may have been given up for good.
    ended: bool,
    installed: bool,
    cancelled: bool,
    /// Streams that the present one may have, itself included.
    max_lanes: u32,
    lanes: BTreeMap<u32, Stream>,
    /// The last one of each lane of the attempt.
    generations: BTreeMap<u32, u64>,
    /// What was sent on each stream, 0 is the control stream, and need not have arrived.
    on_the_way: BTreeMap<u32, BTreeSet<Byte>>,
}

/// How a stream ended.
enum Ending {
    Refused(&'static [&'static str]),
    Installed,
    Dropped,
}

/// Plays the frames that `data` says.
pub fn run(data: &[u8]) {
    let dir = directory();
    let store = dir.path().join("store");
    block_on(async {
        let mut data = Unstructured::new(data);
        let Ok(snapshot) = snapshot(&mut data) else { return };
        let mut model = Model {
            missing: all(&snapshot),
            snapshot,
            poisoned: BTreeSet::new(),
            unsure: false,
            attempt: 0,
            generation: 0,
            seen: 0,
            fence: 0,
            ended: false,
            installed: false,
            cancelled: false,
            max_lanes: 1,
            lanes: BTreeMap::new(),
            generations: BTreeMap::new(),
            on_the_way: BTreeMap::new(),
        };
        let mut node = receiver(open(&store).unwrap()).await;
        for _ in 0..STREAMS {
            if data.is_empty() {
                break;
            }
            if matches!(data.ratio(1_u8, 4), Ok(true)) {
                node.shutdown().await;
                drop(node);
                node = receiver(open(&store).unwrap()).await;
                model.seen = 0;
            }
            // An input that ends in the middle ends the stream.
            model.stream(&mut data, &client(&node)).await;
            model.check_disk(&store);
        }
        let connection = client(&node);
        model.finish(&connection, &store).await;
        drop(connection);
        node.shutdown().await;
    });
    let beside: Vec<_> =
        std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(beside, ["store"], "something was written beside the store");
}

fn snapshot(data: &mut Unstructured<'_>) -> arbitrary::Result<Snapshot> {
    let names = ["a", "d/b", "d/e/c"];
    let mut files = Vec::new();
    for (seed, name) in names.iter().take(data.int_in_range(1..=3)?).enumerate() {
        let len = data.int_in_range(0..=200_usize)?;
        let content =
            (0..len).map(|at| u8::try_from((at * 31 + seed * 7 + at / 13) % 251).unwrap()).collect();
        files.push(((*name).to_owned(), content));
    }
    Ok(Snapshot { id: "t", shard: "s2", index: 1, files })
}

fn all(snapshot: &Snapshot) -> BTreeSet<Byte> {
    (0..)
        .zip(&snapshot.files)
        .flat_map(|(file, (_, content))| (0..content.len() as u64).map(move |at| (file, at)))
        .collect()
}

impl Model {
    async fn stream(&mut self, data: &mut Unstructured<'_>, client: &Client) {
        let mut stream = match self.opened(data, client).await {
            Ok(Some(stream)) => stream,
            Ok(None) | Err(_) => return,
        };
        let end = match self.frames(data, client, &mut stream).await {
            Ok(end) => end,
            Err(_) => {
                stream.half_close();
                Ending::Refused(&["STREAM_ENDED_EARLY"])
            }
        };
        // What is on the way of a lane need not be taken.
        self.unsure |= self.on_the_way.iter().any(|(lane, bytes)| *lane > 0 && !bytes.is_empty());
        self.on_the_way.clear();
        match end {
            Ending::Dropped => {
                drop(stream);
                self.unsure = true;
            }
            Ending::Installed => {
                stream.installed().await.unwrap();
                self.installed = true;
            }
            Ending::Refused(reasons) => {
                // Where it was taken instead, there is an answer, too.
                stream.half_close();
                let error = stream.installed().await.unwrap_err();
                assert!(reasons.contains(&error.reason()), "{error:?} instead of {reasons:?}");
                self.refused(&error);
            }
        }
        for (lane, mut stream) in std::mem::take(&mut self.lanes) {
            let error = stream.ended().await.unwrap_err();
            let cancelled = self.cancelled && error.reason() == "TRANSFER_CANCELLED";
            assert!(cancelled || error.reason() == "STREAM_ENDED_EARLY", "lane {lane}: {error:?}");
        }
    }

    fn refused(&mut self, error: &Error) {
        self.ended |= !error.is_retryable();
    }

    /// Sends header and manifest, good ones or bad ones; gives the stream if it was accepted.
    async fn opened(
        &mut self,
        data: &mut Unstructured<'_>,
        client: &Client,
    ) -> arbitrary::Result<Option<Stream>> {
        let next = self.attempt == 0 || data.ratio(1_u8, 2)?;
        let (attempt, generation) =
            if next { (self.attempt + 1, 1) } else { (self.attempt, self.generation + 1) };
        let mut header = self.snapshot.header(attempt, generation);
        let mut manifest = self.snapshot.manifest();
        header.lanes = *data.choose(&[0, 2, 3, LANES + 1])?;
        let misfit = self.misfit(data, &mut header)?;
        let expected = match misfit {
            None => spoil(data, &mut header, &mut manifest)?,
            expected => expected,
        };
        // Higher than any before: one that is refused for something else may have been remembered.
        let fence = if expected.is_none() && data.ratio(1_u8, 4)? { Some(self.fence + 1) } else { None };
        if let Some(term) = fence {
            header.fence = Some(Fence { epoch: 1, term });
        }
        if misfit.is_none() && data.ratio(1_u8, 16)? {
            let lane = LaneHeader {
                transfer_id: "t".into(),
                attempt: attempt.max(1),
                session: header.session.clone(),
                lane: data.int_in_range(0..=9)?,
                generation: 1,
            };
            let mut stream = Stream::open_with(client, Some(Frame::LaneHeader(lane))).await;
            stream.half_close();
            // It need not be known yet that the control stream is gone.
            let reasons: &[_] = if self.unsure {
                &["NO_SUCH_ATTEMPT", "INVALID_FIELD", "SUPERSEDED"]
            } else {
                &["NO_SUCH_ATTEMPT", "INVALID_FIELD"]
            };
            match stream.accepted().await {
                Ok(_) => assert!(self.unsure, "a lane of nothing"),
                Err(error) => assert!(reasons.contains(&error.reason()), "{error:?}"),
            }
            return Ok(None);
        }
        let max_lanes = header.lanes.clamp(1, LANES);
        let mut stream = Stream::open(client, header).await;
        stream.say(Frame::Manifest(manifest)).await;
        let accepted = stream.accepted().await;
        if let Some(expected) = expected {
            let error = accepted.unwrap_err();
            let also = [self.cancelled.then_some("TRANSFER_CANCELLED"), self.ended.then_some("SUPERSEDED")];
            let fits = expected.contains(&error.reason()) || also.contains(&Some(error.reason()));
            assert!(fits, "{error:?} instead of {expected:?}");
            return Ok(None);
        }
        let accepted = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                let stale = !next && self.ended && error.reason() == "SUPERSEDED";
                let cancelled = self.cancelled && error.reason() == "TRANSFER_CANCELLED";
                assert!(stale || cancelled, "{error:?} to a header without fault");
                return Ok(None);
            }
        };
        assert!(!self.cancelled, "accepted after it was cancelled");
        if accepted.already_installed {
            assert!(self.installed);
            stream.installed().await.unwrap();
            return Ok(None);
        }
        self.fence = fence.unwrap_or(self.fence);
        assert!(!self.installed, "installed, and asked for again");
        (self.attempt, self.generation, self.seen) = (attempt, generation, generation);
        self.ended &= !next;
        assert_eq!(accepted.max_lanes, max_lanes);
        self.max_lanes = max_lanes;
        self.generations.clear();
        let missing = missing(&accepted.missing);
        if self.unsure {
            self.unsure = false;
            assert!(missing.is_superset(&self.missing), "bytes are there that were never sent");
        } else {
            assert_eq!(missing, self.missing, "other bytes are there than were taken");
        }
        self.poisoned.retain(|byte| !missing.contains(byte));
        self.missing = missing;
        Ok(Some(stream))
    }

    /// A header that is good by itself, and does not fit what is known here; what it has to be refused with.
    fn misfit(
        &self,
        data: &mut Unstructured<'_>,
        header: &mut Header,
    ) -> arbitrary::Result<Option<&'static [&'static str]>> {
        if self.attempt == 0 {
            return Ok(None);
        }
        Ok(Some(match data.int_in_range(0..=23_u8)? {
            // Of what is installed, whoever asks hears the same.
            0 if self.attempt > 1 && !self.installed => {
                header.attempt = data.int_in_range(1..=self.attempt - 1)?;
                header.session = vec![u8::try_from(header.attempt % 256).unwrap(); 16].into();
                &["SUPERSEDED"]
            }
            1 if !self.installed => {
                header.attempt = self.attempt;
                header.session = vec![0xee; 16].into();
                &["SUPERSEDED"]
            }
            2 if !self.installed && self.seen > 0 => {
                (header.attempt, header.generation) = (self.attempt, data.int_in_range(1..=self.seen)?);
                header.session = vec![u8::try_from(self.attempt % 256).unwrap(); 16].into();
                &["SUPERSEDED"]
            }
            3 => {
                "s9".clone_into(&mut header.source_shard_id);
                &["SPECIFICATION_MISMATCH"]
            }
            4 => {
                "n9".clone_into(&mut header.source_node_id);
                &["SPECIFICATION_MISMATCH"]
            }
            5 => {
                header.snapshot_index += 1;
                &["SPECIFICATION_MISMATCH"]
            }
            6 => {
                "w".clone_into(&mut header.content_version);
                &["SPECIFICATION_MISMATCH"]
            }
            7 if self.fence > 0 => {
                header.fence = Some(Fence { epoch: data.int_in_range(0..=1)?, term: self.fence - 1 });
                &["STALE_FENCE"]
            }
            _ => return Ok(None),
        }))
    }

    async fn frames(
        &mut self,
        data: &mut Unstructured<'_>,
        client: &Client,
        stream: &mut Stream,
    ) -> arbitrary::Result<Ending> {
        const UNEXPECTED: &[&str] = &["UNEXPECTED_FRAME"];
        for _ in 0..FRAMES {
            let kind = data.int_in_range(0..=31_u8)?;
            if let 14 | 17..=19 = kind {
                // Of two streams, either may be first.
                self.arrived(stream).await;
            }
            let refused: &'static [&'static str] = match kind {
                0..=8 => {
                    if let Some((file, offset, len)) = self.some_missing(data)? {
                        let chunk = self.snapshot.chunk(file, offset, len);
                        self.take(0, &chunk);
                        stream.say(Frame::Chunk(chunk)).await;
                    }
                    continue;
                }
                9 => {
                    stream.say(Frame::Heartbeat(Heartbeat {})).await;
                    continue;
                }
                10 => {
                    let Some((file, offset, len)) = self.some_missing(data)? else { continue };
                    let mut chunk = self.snapshot.chunk(file, offset, len);
                    chunk.crc64nvme ^= 1 << data.int_in_range(0..=63)?;
                    stream.say(Frame::Chunk(chunk)).await;
                    &["CHUNK_CHECKSUM_MISMATCH"]
                }
                11 => {
                    stream.say(Frame::Chunk(bad_chunk(data.arbitrary()?, data.arbitrary()?, 0))).await;
                    &["EMPTY_CHUNK"]
                }
                12 => {
                    stream.say(Frame::Chunk(bad_chunk(0, 0, CHUNK + 1))).await;
                    &["CHUNK_TOO_LARGE"]
                }
                13 => {
                    let files = u32::try_from(self.snapshot.files.len()).unwrap();
                    let file = data.int_in_range(0..=files)?;
                    let size =
                        self.snapshot.files.get(file as usize).map_or(0, |(_, content)| content.len() as u64);
                    let offset =
                        if data.arbitrary()? { size } else { u64::MAX - u64::from(data.arbitrary::<u8>()?) };
                    stream.say(Frame::Chunk(bad_chunk(file, offset, 1))).await;
                    &["EXTENT_OUT_OF_BOUNDS"]
                }
                14 => {
                    let Some(chunk) = self.there(data)? else { continue };
                    stream.say(Frame::Chunk(chunk)).await;
                    &["OVERLAPPING_EXTENT"]
                }
                15 => {
                    stream.say(None).await;
                    &["UNKNOWN_FRAME"]
                }
                16 => {
                    let frame = match data.int_in_range(0..=2_u8)? {
                        0 => Frame::Header(self.snapshot.header(self.attempt, self.generation)),
                        1 => Frame::Manifest(self.snapshot.manifest()),
                        _ => Frame::LaneHeader(LaneHeader::default()),
                    };
                    stream.say(frame).await;
                    UNEXPECTED
                }
                17 | 18 => {
                    stream.say(Frame::End(self.snapshot.end())).await;
                    match self.lacks() {
                        None => return Ok(Ending::Installed),
                        Some(lacks) => lacks,
                    }
                }
                19 => {
                    let mut end = self.snapshot.end();
                    let wrong = self.wrong_totals(data, &mut end)?;
                    stream.say(Frame::End(end)).await;
                    wrong
                }
                20 => {
                    let Some(chunk) = self.poison(data, 0)? else { continue };
                    stream.say(Frame::Chunk(chunk)).await;
                    continue;
                }
                21 => {
                    stream.half_close();
                    &["STREAM_ENDED_EARLY"]
                }
                22 => return Ok(Ending::Dropped),
                24.. => {
                    self.lane(data, client, stream).await?;
                    continue;
                }
                _ => {
                    if !data.ratio(1_u8, 3)? {
                        continue;
                    }
                    let request = CancelTransferRequest { transfer_id: "t".into(), ..Default::default() };
                    client.clone().cancel_transfer(request).await.unwrap();
                    self.cancelled = true;
                    &["TRANSFER_CANCELLED"]
                }
            };
            return Ok(Ending::Refused(refused));
        }
        stream.half_close();
        Ok(Ending::Refused(&["STREAM_ENDED_EARLY"]))
    }

    /// A piece of what is missing.
    fn some_missing(&self, data: &mut Unstructured<'_>) -> arbitrary::Result<Option<(u32, u64, usize)>> {
        let Some(last) = self.missing.len().checked_sub(1) else { return Ok(None) };
        let at = usize::from(data.arbitrary::<u16>()?) % (last + 1);
        let &(file, offset) = self.missing.iter().nth(at).unwrap();
        let run = (offset..).take_while(|at| self.missing.contains(&(file, *at))).take(CHUNK).count();
        Ok(Some((file, offset, if data.ratio(3_u8, 4)? { run } else { data.int_in_range(1..=run)? })))
    }

    /// Bytes that are not the snapshot's, with a checksum that is theirs, on their way on `lane`.
    fn poison(&mut self, data: &mut Unstructured<'_>, lane: u32) -> arbitrary::Result<Option<Chunk>> {
        let Some((file, offset, len)) = self.some_missing(data)? else { return Ok(None) };
        let mut chunk = self.snapshot.chunk(file, offset, len);
        let mut payload = chunk.payload.to_vec();
        payload[0] ^= 0xff;
        chunk.crc64nvme = crc64(&payload);
        chunk.payload = payload.into();
        self.take(lane, &chunk);
        self.poisoned.insert((file, offset));
        Ok(Some(chunk))
    }

    /// A byte that need not be sent.
    fn there(&self, data: &mut Unstructured<'_>) -> arbitrary::Result<Option<Chunk>> {
        let there: Vec<Byte> = all(&self.snapshot).difference(&self.missing).copied().collect();
        if there.is_empty() {
            return Ok(None);
        }
        let (file, offset) = *data.choose(&there)?;
        Ok(Some(self.snapshot.chunk(file, offset, 1)))
    }

    fn take(&mut self, lane: u32, chunk: &Chunk) {
        for at in chunk.offset..chunk.offset + chunk.payload.len() as u64 {
            assert!(self.missing.remove(&(chunk.file, at)));
            self.on_the_way.entry(lane).or_default().insert((chunk.file, at));
        }
    }

    /// Why an `End` without fault has to be refused, if it has to: of the first file that is not as it should be.
    fn lacks(&self) -> Option<&'static [&'static str]> {
        let files = 0..u32::try_from(self.snapshot.files.len()).unwrap();
        let of = |bytes: &BTreeSet<Byte>, file| bytes.iter().any(|byte| byte.0 == file);
        files.into_iter().find_map(|file| {
            if of(&self.missing, file) {
                Some(&["MISSING_EXTENTS"][..])
            } else if of(&self.poisoned, file) {
                Some(&["FILE_CHECKSUM_MISMATCH"][..])
            } else {
                None
            }
        })
    }

    /// Makes totals wrong; what they have to be refused with.
    fn wrong_totals(
        &self,
        data: &mut Unstructured<'_>,
        end: &mut End,
    ) -> arbitrary::Result<&'static [&'static str]> {
        match data.int_in_range(0..=3_u8)? {
            0 => end.total_bytes = end.total_bytes.wrapping_add(1),
            1 => end.file_count += 1,
            2 => drop(end.files.pop()),
            _ => {
                end.files[0].crc64nvme ^= 1;
                let missing = self.missing.iter().any(|(file, _)| *file == 0);
                return Ok(if missing { &["MISSING_EXTENTS"] } else { &["FILE_CHECKSUM_MISMATCH"] });
            }
        }
        Ok(&["TOTALS_MISMATCH"])
    }

    /// Waits until nothing is on its way.
    async fn arrived(&mut self, control: &mut Stream) {
        control.arrived().await;
        for stream in self.lanes.values_mut() {
            stream.arrived().await;
        }
        self.on_the_way.clear();
    }

    /// Something that a lane may do.
    async fn lane(
        &mut self,
        data: &mut Unstructured<'_>,
        client: &Client,
        control: &mut Stream,
    ) -> arbitrary::Result<()> {
        let kind = data.int_in_range(0..=9_u8)?;
        if kind == 0 || self.max_lanes == 1 {
            return self.bad_lane(data, client).await;
        }
        let lane = data.int_in_range(1..=self.max_lanes - 1)?;
        if kind == 1 && self.lanes.contains_key(&lane) {
            return self.replace_lane(data, client, control, lane).await;
        }
        if !self.lanes.contains_key(&lane) {
            let (stream, missing) = self.join(data, client, lane).await?;
            let on_the_way: BTreeSet<Byte> = self.on_the_way.values().flatten().copied().collect();
            assert!(missing.is_superset(&self.missing), "bytes are there that were never sent");
            assert!(
                missing.is_subset(&(&self.missing | &on_the_way)),
                "other bytes are there than were taken"
            );
            self.lanes.insert(lane, stream);
        }
        match kind {
            2 => {
                let mut stream = self.lanes.remove(&lane).unwrap();
                stream.half_close();
                stream.ended().await.unwrap();
                self.on_the_way.remove(&lane);
            }
            3 => {
                // Of two streams, either may be first.
                self.arrived(control).await;
                let (frame, reason) = self.bad_frame(data)?;
                let mut stream = self.lanes.remove(&lane).unwrap();
                stream.say(frame).await;
                stream.half_close();
                let error = stream.ended().await.unwrap_err();
                assert_eq!(error.reason(), reason, "{error:?}");
            }
            4 => {
                if let Some(chunk) = self.poison(data, lane)? {
                    self.say(lane, chunk).await;
                }
            }
            _ => {
                if let Some((file, offset, len)) = self.some_missing(data)? {
                    let chunk = self.snapshot.chunk(file, offset, len);
                    self.take(lane, &chunk);
                    self.say(lane, chunk).await;
                }
            }
        }
        Ok(())
    }

    async fn say(&mut self, lane: u32, chunk: Chunk) {
        self.lanes.get_mut(&lane).unwrap().say(Frame::Chunk(chunk)).await;
    }

    fn lane_header(&self, lane: u32, generation: u64) -> LaneHeader {
        let Header { transfer_id, attempt, session, .. } = self.snapshot.header(self.attempt, 1);
        LaneHeader { transfer_id, attempt, session, lane, generation }
    }

    /// Opens a lane; what it is told to be missing.
    async fn join(
        &mut self,
        data: &mut Unstructured<'_>,
        client: &Client,
        lane: u32,
    ) -> arbitrary::Result<(Stream, BTreeSet<Byte>)> {
        let generation = self.generations.entry(lane).or_default();
        *generation += data.int_in_range(1..=3)?;
        let header = self.lane_header(lane, self.generations[&lane]);
        let mut stream = Stream::open_with(client, Some(Frame::LaneHeader(header))).await;
        let accepted = stream.accepted().await.unwrap();
        assert_eq!(accepted.max_lanes, self.max_lanes);
        Ok((stream, missing(&accepted.missing)))
    }

    /// A lane comes once more: what of it did not arrive is missing, and nothing else.
    async fn replace_lane(
        &mut self,
        data: &mut Unstructured<'_>,
        client: &Client,
        control: &mut Stream,
        lane: u32,
    ) -> arbitrary::Result<()> {
        let mut old = self.lanes.remove(&lane);
        let own = self.on_the_way.remove(&lane).unwrap_or_default();
        self.arrived(control).await;
        if data.arbitrary()? {
            old = None;
        }
        let (stream, missing) = self.join(data, client, lane).await?;
        assert!(missing.is_superset(&self.missing), "bytes are there that were never sent");
        assert!(missing.is_subset(&(&self.missing | &own)), "bytes of another stream are lost");
        self.poisoned.retain(|byte| !missing.contains(byte));
        self.missing = missing;
        self.lanes.insert(lane, stream);
        if let Some(mut old) = old {
            let error = old.ended().await.unwrap_err();
            assert_eq!(error.reason(), "STREAM_ENDED_EARLY", "{error:?}");
        }
        Ok(())
    }

    /// A lane that does not fit.
    async fn bad_lane(&mut self, data: &mut Unstructured<'_>, client: &Client) -> arbitrary::Result<()> {
        let lane = data.int_in_range(1..=LANES)?;
        let seen = self.generations.get(&lane).copied().unwrap_or(0);
        let mut header = self.lane_header(lane, seen + 1);
        let expected = match data.int_in_range(0..=4_u8)? {
            0 => {
                header.session = vec![0xee; 16].into();
                "SUPERSEDED"
            }
            1 => {
                header.attempt += 1;
                "NO_SUCH_ATTEMPT"
            }
            2 if header.attempt > 1 => {
                header.attempt -= 1;
                "SUPERSEDED"
            }
            3 if seen > 0 => {
                header.generation = data.int_in_range(1..=seen)?;
                "SUPERSEDED"
            }
            _ => {
                header.lane = *data.choose(&[0, self.max_lanes, u32::MAX])?;
                "INVALID_FIELD"
            }
        };
        let mut stream = Stream::open_with(client, Some(Frame::LaneHeader(header))).await;
        stream.half_close();
        let error = stream.accepted().await.unwrap_err();
        assert_eq!(error.reason(), expected, "{error:?}");
        Ok(())
    }

    /// A frame that no lane takes, and what it has to be refused with. It ends the lane, and nothing else.
    fn bad_frame(&self, data: &mut Unstructured<'_>) -> arbitrary::Result<(Option<Frame>, &'static str)> {
        Ok(match data.int_in_range(0..=6_u8)? {
            0 => (None, "UNKNOWN_FRAME"),
            1 => (Some(Frame::End(self.snapshot.end())), "UNEXPECTED_FRAME"),
            2 => (Some(Frame::Manifest(self.snapshot.manifest())), "UNEXPECTED_FRAME"),
            3 => (Some(Frame::LaneHeader(LaneHeader::default())), "UNEXPECTED_FRAME"),
            4 => (Some(Frame::Chunk(bad_chunk(0, u64::MAX, 1))), "EXTENT_OUT_OF_BOUNDS"),
            5 => match self.there(data)? {
                Some(chunk) => (Some(Frame::Chunk(chunk)), "OVERLAPPING_EXTENT"),
                None => (Some(Frame::Header(Header::default())), "UNEXPECTED_FRAME"),
            },
            _ => (Some(Frame::Chunk(bad_chunk(0, 0, 0))), "EMPTY_CHUNK"),
        })
    }

    fn check_disk(&self, store: &Path) {
        let current = store.join("installed/s2/t");
        assert_eq!(
            current.exists(),
            self.installed,
            "in place without being installed, or the other way round"
        );
        if self.installed {
            assert!(self.snapshot.is_installed_in(store));
        }
        if self.installed || self.cancelled {
            let staged = crate::tree::tree(&store.join("staging"));
            assert!(staged.is_empty(), "left in staging: {:?}", staged.keys());
        }
    }

    /// A sender that makes no mistake.
    async fn finish(&mut self, client: &Client, store: &Path) {
        let sent = self.snapshot.send(client).await;
        if let Err(error) = &sent
            && !self.poisoned.is_empty()
            && !self.cancelled
        {
            // Which of the bytes are wrong nobody can tell: the way out is what the message says.
            assert_eq!(error.reason(), "FILE_CHECKSUM_MISMATCH");
            let request = CancelTransferRequest { transfer_id: "t".into(), ..Default::default() };
            client.clone().cancel_transfer(request).await.unwrap();
            self.cancelled = true;
            return self.check_disk(store);
        }
        match sent {
            Ok(()) => {
                assert!(!self.cancelled, "a cancelled one was installed");
                self.installed = true;
            }
            Err(error) => assert!(self.cancelled && error.reason() == "TRANSFER_CANCELLED", "{error:?}"),
        }
        self.check_disk(store);
    }
}

fn missing(extents: &[proto_snapshot::v1::transfer_split_snapshot_response::Extent]) -> BTreeSet<Byte> {
    let bytes = extents.iter().flat_map(|extent| {
        (extent.offset..extent.offset + extent.length.expect("the size is known")).map(|at| (extent.file, at))
    });
    bytes.collect()
}

fn bad_chunk(file: u32, offset: u64, len: usize) -> Chunk {
    let payload = Bytes::from(vec![0; len]);
    Chunk { file, offset, crc64nvme: crc64(&payload), payload }
}

/// Makes header or manifest wrong, or not; what they have to be refused with.
fn spoil(
    data: &mut Unstructured<'_>,
    header: &mut Header,
    manifest: &mut Manifest,
) -> arbitrary::Result<Option<&'static [&'static str]>> {
    const INVALID: &[&str] = &["INVALID_FIELD"];
    const MISMATCH: &[&str] = &["MANIFEST_MISMATCH"];
    let expected: &[&str] = match data.int_in_range(0..=39_u8)? {
        0 => {
            (*data.choose(&["../t", "t/..", ".t", "", "t\0", "/t"])?).clone_into(&mut header.transfer_id);
            &["INVALID_ID"]
        }
        1 => {
            "..".clone_into(&mut header.target_shard_id);
            &["INVALID_ID"]
        }
        2 => {
            header.attempt = 0;
            INVALID
        }
        3 => {
            header.session = vec![1; data.int_in_range(0..=15)?].into();
            INVALID
        }
        4 => {
            header.generation = 0;
            INVALID
        }
        5 => {
            header.priority = 99;
            INVALID
        }
        6 => {
            "n9".clone_into(&mut header.target_node_id);
            &["WRONG_NODE"]
        }
        7 => {
            header.required_features.push("x\x1b[2J".to_owned());
            &["UNSUPPORTED_FEATURE"]
        }
        8 => {
            header.file_count = u64::MAX;
            &["MANIFEST_TOO_LARGE"]
        }
        9 => {
            header.file_count += 1;
            MISMATCH
        }
        10 => {
            header.total_bytes = header.total_bytes.map(|total| total + 1);
            MISMATCH
        }
        11 => {
            let name = *data.choose(&["../x", "/etc/x", "a/../b", "a//b", "a\\b", "a\0b", "", ".", "a/"])?;
            let files = &mut manifest.files;
            name.clone_into(&mut files[0].name);
            &["INVALID_FILE_NAME"]
        }
        12 => {
            header.slots = None;
            &["INVALID_SLOT_RANGE"]
        }
        13 => {
            manifest.last = false;
            manifest.files.clear();
            MISMATCH
        }
        14 => {
            header.content_version = "w".repeat(1025);
            INVALID
        }
        15 => {
            header.discard_staged = true;
            header.generation = 2;
            INVALID
        }
        _ => return Ok(None),
    };
    Ok(Some(expected))
}
