"""Whole transfers: what was sent is what lies on the disk."""

import os
import random
import time

import blake3
import grpc
import pytest
from awscrt.checksums import crc64nvme

from peer import MIB, Snapshot, some_snapshot
from stubs import Request, common, pb


def test_checksum_is_that_of_the_contract():
    assert crc64nvme(b"123456789") == 0xAE8B14860A799888
    assert crc64nvme(b"") == 0


def test_transfer(peer, snapshot):
    before = int(time.time() * 1000)
    stream = peer.open(snapshot).wait_accepted()
    terms = stream.accepted
    assert stream.missing == snapshot.extents()
    assert terms.last and not terms.already_installed
    assert terms.max_chunk_bytes == MIB and terms.credit_limit >= MIB and terms.max_lanes >= 1
    assert (terms.durable_bytes, terms.reused_bytes) == (0, 0)
    assert terms.idle_timeout_ms == 30_000
    assert terms.receiver.node_id == "receiver"
    assert {"lanes", "reuse", "unknown-size", "crc64nvme"} <= set(terms.supported_features)
    installed = stream.complete(snapshot)
    assert (installed.total_bytes, installed.file_count) == (snapshot.total, len(snapshot.files))
    assert not installed.already_installed and installed.reused_bytes == 0
    assert before <= installed.installed_unix_ms <= time.time() * 1000 + 1
    assert peer.receiver.installed(snapshot) == snapshot.files

    transfer = peer.progress(snapshot)
    assert transfer.phase == pb.TRANSFER_PHASE_INSTALLED
    assert transfer.transfer_id == snapshot.transfer_id
    assert (transfer.source_shard_id, transfer.target_shard_id) == (snapshot.source_shard, snapshot.target_shard)
    assert (transfer.source_node_id, transfer.target_node_id) == ("python", "receiver")
    assert (transfer.slots.start, transfer.slots.end) == snapshot.slots
    assert (transfer.snapshot_index, transfer.snapshot_term) == (snapshot.index, snapshot.term)
    assert (transfer.attempt, transfer.connections, transfer.wire_bytes) == (1, 1, snapshot.total)
    assert transfer.priority == common.PRIORITY_SPLIT
    progress = transfer.progress
    assert progress.direction == common.DIRECTION_IN
    assert progress.bytes_done == progress.bytes_total == snapshot.total
    assert progress.items_done == progress.items_total == len(snapshot.files)
    assert before <= progress.started_unix_ms <= progress.finished_unix_ms
    assert not progress.HasField("error")
    phases = [start.phase for start in transfer.phases]
    assert phases == sorted(phases) and phases[-1] == pb.TRANSFER_PHASE_INSTALLED
    times = [start.started_unix_ms for start in transfer.phases]
    assert times == sorted(times)


def test_acknowledged_bytes_are_durable_within_a_second(peer, snapshot):
    stream = peer.open(snapshot).wait_accepted()
    stream.send_extents(snapshot, snapshot.half())
    began = time.monotonic()
    stream.wait_durable(stream.sent_bytes)
    assert time.monotonic() - began < 2
    counts = [(ack.received_bytes, ack.durable_bytes, ack.credit_limit) for _, ack in stream.acks]
    for column in zip(*counts):
        assert list(column) == sorted(column), "no count of an Ack goes down"
    stream.half_close().refusal().must_be("STREAM_ENDED_EARLY")
    peer.finish(snapshot)


def test_chunks_in_any_order_and_size(peer, snapshot):
    stream = peer.open(snapshot).wait_accepted()
    chunks = [
        (file, at, min(7_001, offset + length - at))
        for file, offset, length in stream.missing
        for at in range(offset, offset + length, 7_001)
    ]
    random.shuffle(chunks)
    stream.send_extents(snapshot, chunks).send(snapshot.end()).wait_end()
    assert stream.installed and peer.receiver.installed(snapshot) == snapshot.files


def test_fields_of_a_chunk_in_any_order(peer, snapshot):
    stream = peer.open(snapshot).wait_accepted()
    for file, offset, length in stream.missing:
        chunk = snapshot.chunk(file, offset, length)
        rest = Request.Chunk(file=file, offset=offset, crc64nvme=chunk.crc64nvme).SerializeToString()
        unknown = b"\xa2\x06\x03new"  # field 100 of a later version
        encoded = Request.Chunk(payload=chunk.payload).SerializeToString() + unknown + rest
        frame = Request.FromString(b"\x22" + varint(len(encoded)) + encoded)
        assert frame.chunk.payload == chunk.payload and frame.chunk.file == file
        stream.send(b"\x22" + varint(len(encoded)) + encoded)
    stream.send(snapshot.end()).wait_end()
    assert stream.installed and peer.receiver.installed(snapshot) == snapshot.files


def varint(value):
    out = b""
    while value > 0x7F:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def test_more_than_the_credit_arrives(peer):
    snapshot = Snapshot({"big": os.urandom(24 * MIB), "small": b"x"})
    stream = peer.open(snapshot).wait_accepted()
    assert stream.accepted.credit_limit < snapshot.total, "the credit has to be raised on the way"
    stream.send_extents(snapshot, stream.missing, chunk_bytes=MIB)
    stream.send(snapshot.end()).wait_end()
    assert stream.installed and peer.receiver.installed(snapshot) == snapshot.files


def test_only_empty_files(peer):
    snapshot = Snapshot({"a": b"", "b/c": b""})
    stream = peer.open(snapshot).wait_accepted()
    assert stream.missing == []
    stream.send(snapshot.end()).wait_end()
    assert stream.installed and peer.receiver.installed(snapshot) == snapshot.files


def test_many_files_in_pages(peer):
    snapshot = Snapshot({f"dir-{n % 7}/{n:05}": str(n).encode() for n in range(2000)})
    stream = peer.open(snapshot, pages=snapshot.pages(per_page=300)).wait_accepted()
    stream.send_extents(snapshot, stream.missing)
    totals = snapshot.totals()
    stream.send(Request.End(files=totals[:700]), Request.End(files=totals[700:701]))
    stream.send(snapshot.end(files=totals[701:])).wait_end()
    assert stream.installed and peer.receiver.installed(snapshot) == snapshot.files


def test_names_at_the_limit(peer):
    deep = "/".join(["d" * 255] * 3 + ["e" * 254, "f"])
    assert len(deep) == 1024
    names = [deep, "x" * 255, "ü/日本語/🦀", "...", ".hidden", "a b", "-rf", "CON", "~", "a\u202eb", "e\u0301"]
    snapshot = Snapshot({name: name.encode() for name in names})
    stream = peer.open(snapshot).wait_accepted()
    stream.complete(snapshot)
    assert peer.receiver.installed(snapshot) == snapshot.files


def test_unknown_size(peer):
    snapshot = Snapshot({"log": os.urandom(70_000), "known": b"known", "none": b""}, unknown_sizes={"log", "none"})
    stream = peer.open(snapshot, lanes=4).wait_accepted()
    assert stream.accepted.max_lanes == 1
    assert stream.missing == [(0, 0, None), (1, 0, 5), (2, 0, None)]
    stream.send_extents(snapshot, [(0, 0, 50_000)]).wait_durable(50_000)
    assert not peer.progress(snapshot).progress.HasField("bytes_total"), "unknown is not 0"
    stream.half_close().refusal().must_be("STREAM_ENDED_EARLY")

    stream = peer.open(snapshot).wait_accepted()
    assert stream.missing == [(0, 50_000, None), (1, 0, 5), (2, 0, None)]
    installed = stream.complete(snapshot)
    assert installed.total_bytes == snapshot.total
    assert peer.receiver.installed(snapshot) == snapshot.files
    assert peer.progress(snapshot).progress.bytes_total == snapshot.total, "known in the end"


def test_installing_twice_is_one_install(peer, snapshot):
    peer.send_all(snapshot)
    stream = peer.open(snapshot).wait_accepted()
    assert stream.accepted.already_installed and stream.missing == []
    installed = stream.complete(snapshot)
    assert installed.already_installed
    assert (installed.total_bytes, installed.file_count) == (snapshot.total, len(snapshot.files))
    assert peer.receiver.installed(snapshot) == snapshot.files


def test_newer_snapshot_of_the_same_shard(peer, snapshot):
    peer.send_all(snapshot)
    newer = some_snapshot(target_shard=snapshot.target_shard, index=snapshot.index + 1)
    peer.send_all(newer)


def test_reuse_by_digest(peer, snapshot):
    peer.send_all(snapshot)
    name = "data/000001.sst"
    newer = some_snapshot(target_shard=snapshot.target_shard, index=snapshot.index + 1)
    newer.files["moved"] = snapshot.files[name]
    newer.digests = {name: blake3.blake3(content).digest() for name, content in newer.files.items()}
    stream = peer.open(newer).wait_accepted()
    reused = len(newer.files["moved"]) + len(newer.files["CURRENT"])
    assert {file for file, _, _ in stream.missing} == {0, 1}, "files that are there are not asked for"
    assert stream.accepted.reused_bytes == stream.accepted.durable_bytes == reused
    installed = stream.complete(newer)
    assert installed.reused_bytes == reused
    assert peer.receiver.installed(newer) == newer.files
    transfer = peer.progress(newer)
    assert transfer.reused_bytes == reused and transfer.wire_bytes == newer.total - reused
    again = peer.open(newer).wait_accepted().complete(newer)
    assert again.already_installed and again.reused_bytes == reused


def test_reuse_of_a_file_that_was_changed(peer, snapshot):
    """Somebody wrote into an installed file: its digest no longer holds, so its bytes are asked for."""
    peer.send_all(snapshot)
    name = "data/000001.sst"
    path = peer.receiver.dir / "installed" / snapshot.target_shard / snapshot.transfer_id / name
    content = bytearray(path.read_bytes())
    content[50_000] ^= 1
    path.write_bytes(content)
    newer = Snapshot(dict(snapshot.files), target_shard=snapshot.target_shard, index=snapshot.index + 1)
    newer.digests = {name: blake3.blake3(content).digest() for name, content in newer.files.items()}
    stream = peer.open(newer).wait_accepted()
    assert stream.missing == [(0, 0, 100_003)]
    stream.complete(newer)
    assert peer.receiver.installed(newer) == newer.files


def test_digest_of_other_bytes(peer, snapshot):
    """A digest that is wrong finds nothing, or the wrong file: the checksum of the whole file finds that."""
    peer.send_all(snapshot)
    newer = some_snapshot(target_shard=snapshot.target_shard, index=snapshot.index + 1)
    newer.digests = {"data/000001.sst": blake3.blake3(snapshot.files["data/000001.sst"]).digest()}
    stream = peer.open(newer).wait_accepted()
    stream.send_extents(newer, stream.missing).send(newer.end())
    stream.refusal().must_be("FILE_CHECKSUM_MISMATCH", file=0)
    newer.digests = {}
    stream = peer.open(newer, discard_staged=True).wait_accepted()
    assert stream.missing == newer.extents()
    stream.complete(newer)
    assert peer.receiver.installed(newer) == newer.files


def test_frames_after_the_end_change_nothing(peer, snapshot):
    stream = peer.open(snapshot).wait_accepted()
    stream.send_extents(snapshot, stream.missing)
    stream.send(snapshot.end(), snapshot.chunk(0, 0, 100, dict(payload=bytes(100))), snapshot.end(), b"\x7a\x00").wait_end()
    assert stream.installed and peer.receiver.installed(snapshot) == snapshot.files


@pytest.mark.parametrize("lanes", [0, 1, 3, 4_000_000_000])
def test_wish_for_lanes(peer, snapshot, lanes):
    stream = peer.open(snapshot, lanes=lanes).wait_accepted()
    assert stream.accepted.max_lanes == min(max(lanes, 1), 8)
    stream.complete(snapshot)


def test_without_required_features(peer, snapshot):
    stream = peer.open(snapshot, required_features=[], supported_features=["time-travel"], target_node_id="receiver")
    stream.wait_accepted().complete(snapshot)
    assert peer.receiver.installed(snapshot) == snapshot.files


def test_heartbeats_everywhere(peer, snapshot):
    stream = peer.stream()
    stream.attempt, stream.session = 1, os.urandom(16)
    stream.send(snapshot.header(1, stream.session), Request.Heartbeat(), *snapshot.pages(), Request.Heartbeat())
    stream.wait_accepted().send_extents(snapshot, stream.missing).send(Request.Heartbeat())
    totals = snapshot.totals()
    stream.send(Request.End(files=totals[:1]), Request.Heartbeat(), snapshot.end(files=totals[1:]), Request.Heartbeat())
    stream.half_close().wait_end()
    assert stream.installed and peer.receiver.installed(snapshot) == snapshot.files


def test_memory_stays_bounded(start):
    """32 streams that send all that their credit allows, and more as it is raised."""
    peer = start()
    peer.send_all(some_snapshot())
    before = peer.receiver.resident_bytes()
    payload = os.urandom(8 * MIB)
    streams = []
    for _ in range(32):
        snapshot = Snapshot({"f": payload})
        stream = peer.open(snapshot, channel=peer.channel())
        streams.append((snapshot, stream))
    for snapshot, stream in streams:
        stream.wait_accepted().send_extents(snapshot, stream.missing, chunk_bytes=MIB)
    peak = peer.receiver.resident_bytes()
    for snapshot, stream in streams:
        stream.send(snapshot.end()).wait_end()
        peak = max(peak, peer.receiver.resident_bytes())
        assert stream.installed
    assert peak - before < 192 * MIB, f"{(peak - before) / MIB:.0f} MiB more than before"


def test_compressed_frames_are_refused_by_name(peer, snapshot):
    stream = peer.stream(compression=grpc.Compression.Gzip)
    stream.send(snapshot.header(1, os.urandom(16)), *snapshot.pages())
    refused = stream.refusal()
    assert refused.code == grpc.StatusCode.UNIMPLEMENTED and "gzip" in refused.message
    assert refused.reason == "UNSUPPORTED_COMPRESSION" and refused.metadata["encoding"] == "gzip"
    peer.finish(snapshot)
