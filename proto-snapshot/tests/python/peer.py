"""A sender written from the .proto file alone: what it sends, what it hears, and what it holds the receiver to."""

import os
import queue
import random
import threading
import time
from dataclasses import dataclass, field, replace

import grpc
from awscrt.checksums import crc64nvme
from google.rpc import error_details_pb2, status_pb2

from stubs import CONTRACT, Request, Response, common, pb, rpc

MIB = 1 << 20
PATIENCE = 20  # seconds for anything that should take none
_HALF_CLOSE = object()


class Refused(Exception):
    """A call that the receiver ended with an error."""

    def __init__(self, call):
        self.code = call.code()
        self.message = call.details() or ""
        self.reason = self.domain = self.retry_seconds = None
        self.metadata, self.fields, details = {}, {}, []
        for key, value in call.trailing_metadata() or ():
            if key == "grpc-status-details-bin":
                status = status_pb2.Status.FromString(value)
                assert status.message == self.message and status.code == self.code.value[0]
                details = status.details
        for detail in details:
            for kind in (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo):
                if not detail.Is(kind.DESCRIPTOR):
                    continue
                message = kind()
                detail.Unpack(message)
                if kind is error_details_pb2.ErrorInfo:
                    self.domain, self.reason, self.metadata = message.domain, message.reason, dict(message.metadata)
                elif kind is error_details_pb2.BadRequest:
                    self.fields = {violation.field: violation.description for violation in message.field_violations}
                else:
                    delay = message.retry_delay
                    self.retry_seconds = delay.seconds + delay.nanos / 1e9
        super().__init__(f"{self.code.name} {self.reason}: {self.message} {self.metadata} {self.fields}")

    def must_be(self, reason, at=None, **metadata):
        """Holds the refusal to the row of the error table; `at` is the path of the field at fault."""
        row = CONTRACT[reason]
        assert (self.reason, self.code) == (reason, row.code), self
        assert self.domain == "node.v1", self
        assert row.metadata <= self.metadata.keys(), f"{sorted(row.metadata)} wanted: {self}"
        for key, value in metadata.items():
            assert self.metadata.get(key) == str(value), self
        assert (self.retry_seconds is not None) == row.retry, f"retry: {self}"
        assert self.retry_seconds is None or 0 < self.retry_seconds <= 60, self
        assert len(self.message) >= 20 and " " in self.message and self.message.isprintable(), f"no sentence: {self}"
        if at is not None:
            assert at in self.fields, f"field {at} wanted: {self}"
            assert len(self.fields[at]) >= 5, self
        return self


@dataclass
class Snapshot:
    """What is sent: files and the fields of the header that say what they are."""

    files: dict
    transfer_id: str = ""
    target_shard: str = ""
    source_shard: str = "shard-1"
    source_node: str = "python"
    target_node: str = ""
    slots: tuple = (8192, 16384)
    index: int = 1000
    term: int = 7
    content_version: str = "v1"
    unknown_sizes: frozenset = frozenset()
    digests: dict = field(default_factory=dict)
    # Extents `(file, offset, length)` that were sent as they should be, and those of which that is not known.
    sent: list = field(default_factory=list)
    maybe_sent: list = field(default_factory=list)

    def __post_init__(self):
        self.transfer_id = self.transfer_id or f"t-{os.urandom(6).hex()}"
        self.target_shard = self.target_shard or f"shard-{os.urandom(6).hex()}"

    @property
    def contents(self):
        return list(self.files.values())

    @property
    def total(self):
        return sum(map(len, self.files.values()))

    def header(self, attempt, session, generation=1, lanes=1, **changes):
        header = Request.Header(
            transfer_id=self.transfer_id,
            source_shard_id=self.source_shard,
            target_shard_id=self.target_shard,
            source_node_id=self.source_node,
            target_node_id=self.target_node,
            slots=common.SlotRange(start=self.slots[0], end=self.slots[1]),
            snapshot_index=self.index,
            snapshot_term=self.term,
            content_version=self.content_version,
            attempt=attempt,
            session=session,
            generation=generation,
            priority=common.PRIORITY_SPLIT,
            file_count=len(self.files),
            name_bytes=sum(len(name.encode()) for name in self.files),
            lanes=lanes,
            required_features=["crc64nvme"],
            supported_features=["crc64nvme", "lanes", "unknown-size"],
        )
        if not self.unknown_sizes:
            header.total_bytes = self.total
        for name, value in changes.items():
            header.ClearField(name)
            if value is not None:
                header.MergeFrom(Request.Header(**{name: value}))
                if isinstance(value, (int, str, bytes)):
                    setattr(header, name, value)  # MergeFrom leaves out zero and empty
        return header

    def entries(self):
        for name, content in self.files.items():
            entry = Request.File(name=name)
            if name not in self.unknown_sizes:
                entry.size = len(content)
            if name in self.digests:
                entry.blake3 = self.digests[name]
            yield entry

    def pages(self, per_page=1000):
        entries = list(self.entries())
        pages = [Request.Manifest(files=entries[at : at + per_page]) for at in range(0, len(entries), per_page)]
        pages = pages or [Request.Manifest()]
        pages[-1].last = True
        return pages

    def chunk(self, file, offset, length, changes=()):
        payload = self.contents[file][offset : offset + length]
        fields = dict(file=file, offset=offset, crc64nvme=crc64nvme(payload), payload=payload)
        return Request.Chunk(**(fields | dict(changes)))

    def totals(self):
        return [
            Request.FileTotal(file=number, size=len(content), crc64nvme=crc64nvme(content))
            for number, content in enumerate(self.contents)
        ]

    def end(self, **changes):
        fields = dict(files=self.totals(), last=True, total_bytes=self.total, file_count=len(self.files))
        return Request.End(**(fields | changes))

    def extents(self):
        """All of it, as a receiver that has nothing lists it."""
        return [(number, 0, len(content)) for number, content in enumerate(self.contents) if content]

    def half(self):
        """The first half of each file."""
        return [(file, 0, length // 2) for file, _, length in self.extents() if length > 1]

    def without(self, extents):
        """The complement of `extents`, in order, runs merged."""
        rest = []
        for file, _, size in self.extents():
            at = 0
            for offset, end in sorted((offset, offset + length) for number, offset, length in extents if number == file):
                if offset > at:
                    rest.append((file, at, offset - at))
                at = max(at, end)
            if at < size:
                rest.append((file, at, size - at))
        return rest

    @staticmethod
    def overlap(some, others):
        """Whether two sets of extents share a byte."""
        return any(
            a[0] == b[0] and a[1] < b[1] + b[2] and b[1] < a[1] + a[2] for a in some for b in others
        )

    def again(self, **changes):
        """The same with other fields; what was sent of it is not known."""
        return replace(self, sent=[], maybe_sent=[], **changes)


def some_snapshot(**fields):
    """A few files: nested, empty, and of sizes that no chunk divides."""
    random_bytes = random.Random(os.urandom(8)).randbytes
    files = {
        "data/000001.sst": random_bytes(100_003),
        "data/deep/er/000002.sst": random_bytes(65_536),
        "CURRENT": b"000001",
        "empty": b"",
    }
    return Snapshot(files, **fields)


class Stream:
    """One call of `TransferSplitSnapshot`. Frames are written from a queue and read by a thread of its own."""

    def __init__(self, channel, read=True, compression=None):
        self._outbox = queue.SimpleQueue()
        method = channel.stream_stream(
            "/node.snapshot.v1.SplitSnapshotService/TransferSplitSnapshot",
            request_serializer=lambda frame: frame if isinstance(frame, bytes) else frame.SerializeToString(),
            response_deserializer=Response.FromString,
        )
        self.call = method(iter(self._outbox.get, _HALF_CLOSE), compression=compression)
        self.changed = threading.Condition()
        self.accepted, self.missing, self.acks = None, [], []
        self.installed, self.error, self.ended = None, None, False
        self.sent_bytes = self.accepted_pages = 0
        if read:
            threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        error = None
        try:
            for response in self.call:
                with self.changed:
                    kind = response.WhichOneof("frame")
                    if kind == "accepted":
                        self.accepted_pages += 1
                        assert self.accepted is None, "Accepted after its last page"
                        self.missing += [
                            (extent.file, extent.offset, extent.length if extent.HasField("length") else None)
                            for extent in response.accepted.missing
                        ]
                        if response.accepted.last:
                            self.accepted = response.accepted
                    elif kind == "ack":
                        self.acks.append((time.monotonic(), response.ack))
                    elif kind == "installed":
                        self.installed = response.installed
                    self.changed.notify_all()
        except grpc.RpcError:
            error = Refused(self.call)
        with self.changed:
            self.error, self.ended = error, True
            self.changed.notify_all()

    def send(self, *frames):
        """Frames are requests, the messages inside of one, or raw bytes."""
        for frame in frames:
            for name in ("header", "lane_header", "manifest", "chunk", "end", "heartbeat"):
                descriptor = Request.DESCRIPTOR.fields_by_name[name]
                if not isinstance(frame, bytes) and frame.DESCRIPTOR is descriptor.message_type:
                    frame = Request(**{name: frame})
                    break
            self._outbox.put(frame)
        return self

    def half_close(self):
        self._outbox.put(_HALF_CLOSE)
        return self

    def cancel(self):
        self.call.cancel()
        self._outbox.put(_HALF_CLOSE)

    def wait_for(self, condition, what, seconds=PATIENCE):
        """Waits until `condition()` holds; a refusal is raised."""
        with self.changed:
            held = self.changed.wait_for(lambda: condition() or self.ended, seconds)
            if condition():
                return self
            if self.error is not None:
                raise self.error
            raise AssertionError(f"{'stream ended' if held else 'timeout'} while waiting for {what}")

    def refusal(self, seconds=PATIENCE):
        """The error that ends the stream."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.ended, seconds), "the stream goes on"
        assert self.error is not None, f"no error; installed: {self.installed}"
        self._outbox.put(_HALF_CLOSE)
        return self.error

    def wait_accepted(self):
        return self.wait_for(lambda: self.accepted is not None, "Accepted")

    def wait_end(self):
        """Waits for OK."""
        self.wait_for(lambda: self.ended and self.error is None, "the end of the stream")
        self._outbox.put(_HALF_CLOSE)
        return self

    @property
    def last_ack(self):
        return self.acks[-1][1] if self.acks else Response.Ack()

    @property
    def credit(self):
        return max([self.accepted.credit_limit, *(ack.credit_limit for _, ack in self.acks)])

    def send_extents(self, snapshot, extents, chunk_bytes=30_000):
        """Sends extents in chunks, within the credit."""
        for file, offset, length in extents:
            end = len(snapshot.contents[file]) if length is None else offset + length
            while offset < end:
                length = min(chunk_bytes, end - offset, self.accepted.max_chunk_bytes)
                self.wait_for(lambda: self.sent_bytes + length <= self.credit, "credit")
                self.send(snapshot.chunk(file, offset, length))
                snapshot.sent.append((file, offset, length))
                self.sent_bytes += length
                offset += length
        return self

    def wait_received(self):
        return self.wait_for(lambda: self.last_ack.received_bytes == self.sent_bytes, "received")

    def wait_durable(self, count):
        return self.wait_for(lambda: self.last_ack.durable_bytes >= count, f"{count} durable bytes")

    def complete(self, snapshot):
        """Sends what is missing and `End`; returns `Installed`."""
        if not self.accepted.already_installed:
            self.send_extents(snapshot, self.missing)
            self.send(snapshot.end())
        self.wait_for(lambda: self.installed is not None, "Installed")
        self.wait_end()
        return self.installed


class Peer:
    """A node that sends."""

    def __init__(self, receiver):
        self.receiver = receiver
        self._channels = []
        self._shared, self._address = None, None

    def channel(self):
        """A connection of its own."""
        channel = grpc.insecure_channel(
            self.receiver.address,
            options=[("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)],
        )
        self._channels.append(channel)
        return channel

    @property
    def shared(self):
        if self._address != self.receiver.address:
            self._address, self._shared = self.receiver.address, self.channel()
        return self._shared

    def close(self):
        for channel in self._channels:
            channel.close()

    # Streams.

    def stream(self, **options):
        return Stream(self.shared, **options)

    def open(self, snapshot, attempt=None, session=None, pages=None, channel=None, **changes):
        """A control stream with header and manifest sent. Claims the next attempt by default."""
        stream = Stream(channel or self.shared)
        stream.attempt = self.next_attempt(snapshot) if attempt is None else attempt
        stream.session = os.urandom(16) if session is None else session
        stream.send(snapshot.header(stream.attempt, stream.session, **changes), *(pages or snapshot.pages()))
        return stream

    def lane(self, snapshot, control, lane, generation=1, channel=None, **changes):
        stream = Stream(channel or self.channel())
        fields = dict(
            transfer_id=snapshot.transfer_id,
            attempt=control.attempt,
            session=control.session,
            lane=lane,
            generation=generation,
        )
        stream.send(Request.LaneHeader(**(fields | changes)))
        return stream

    def send_half(self, snapshot):
        """Sends the first half of each file and hangs up when that has arrived: it is durable before anybody asks."""
        stream = self.open(snapshot).wait_accepted()
        assert stream.missing == snapshot.extents(), "a new transfer lacks everything"
        stream.send_extents(snapshot, snapshot.half()).wait_received()
        stream.half_close().refusal().must_be("STREAM_ENDED_EARLY")

    def finish(self, snapshot):
        """Claims the next attempt, is asked for exactly what is not there yet, sends it, and finds the tree on disk."""
        assert self.receiver.alive()
        stream = self.open(snapshot).wait_accepted()
        missing = sum(length for _, _, length in stream.missing)
        assert stream.accepted.durable_bytes == snapshot.total - missing
        if snapshot.maybe_sent:
            never_sent = snapshot.without(snapshot.sent + snapshot.maybe_sent)
            assert not snapshot.overlap(never_sent, snapshot.without(stream.missing)), "lacks more than it asks for"
            assert not snapshot.overlap(snapshot.sent, stream.missing), "asks again for what it has"
        else:
            assert stream.missing == snapshot.without(snapshot.sent), "is asked for another set than what is left"
        installed = stream.complete(snapshot)
        assert (installed.total_bytes, installed.file_count) == (snapshot.total, len(snapshot.files))
        assert not installed.already_installed
        assert self.receiver.installed(snapshot) == snapshot.files
        assert self.progress(snapshot).phase == pb.TRANSFER_PHASE_INSTALLED
        return installed

    def send_all(self, snapshot):
        return self.finish(snapshot)

    # Unary calls.

    def _call(self, method, request, timeout=PATIENCE):
        try:
            return getattr(rpc.SplitSnapshotServiceStub(self.shared), method)(request, timeout=timeout)
        except grpc.RpcError as error:
            raise Refused(error) from None

    def progress(self, snapshot):
        request = pb.GetTransferProgressRequest(transfer_id=snapshot.transfer_id)
        return self._call("GetTransferProgress", request).transfer

    def next_attempt(self, snapshot):
        try:
            return self.progress(snapshot).attempt + 1
        except Refused as refused:
            refused.must_be("TRANSFER_NOT_FOUND")
            return 1

    def wait_phase(self, snapshot, *phases, seconds=PATIENCE):
        until = time.monotonic() + seconds
        while True:
            transfer = self.progress(snapshot)
            if transfer.phase in phases:
                return transfer
            assert time.monotonic() < until, f"still {pb.TransferPhase.Name(transfer.phase)}"
            time.sleep(0.01)

    def wait_known(self, snapshot):
        until = time.monotonic() + PATIENCE
        while self.next_attempt(snapshot) == 1:
            assert time.monotonic() < until, "never heard of it"

    def watch(self, transfer_id):
        """States, as they come; a refusal is raised."""
        call = rpc.SplitSnapshotServiceStub(self.shared).WatchTransferProgress(
            pb.WatchTransferProgressRequest(transfer_id=transfer_id)
        )
        return Watch(call)

    def list(self, **fields):
        return self._call("ListTransfers", pb.ListTransfersRequest(**fields))

    def cancel(self, snapshot, reason=""):
        request = pb.CancelTransferRequest(transfer_id=snapshot.transfer_id, reason=reason)
        return self._call("CancelTransfer", request).transfer


class Watch:
    """An open `WatchTransferProgress`."""

    def __init__(self, call):
        self.call = call

    def __iter__(self):
        return self

    def __next__(self):
        try:
            return next(self.call).transfer
        except grpc.RpcError:
            raise Refused(self.call) from None

    def close(self):
        self.call.cancel()
