"""Everything that a sender can do wrong. Each case starts from a transfer whose first half is staged and durable, does
it, gets the error that the table in the .proto file promises, and then finishes the same transfer: the receiver is alive,
and asks for exactly what it did not get."""

import os
from dataclasses import dataclass
from typing import Callable, Optional

import pytest

from peer import MIB, Snapshot, some_snapshot
from stubs import Request, common, pb

SESSION = os.urandom(16)


@dataclass
class Case:
    name: str
    reason: str
    do: Callable
    field: Optional[str] = None


def ids(case):
    return case.name


def parametrize(*cases):
    return pytest.mark.parametrize("case", cases, ids=ids)


# ---- The header.


def header(name, reason, field=None, **changes):
    return Case(name, reason, changes, field)


@parametrize(
    header("no transfer ID", "INVALID_ID", "header.transfer_id", transfer_id=""),
    header("ID with a leading dot", "INVALID_ID", "header.transfer_id", transfer_id=".t"),
    header("ID of 129 bytes", "INVALID_ID", "header.transfer_id", transfer_id="t" * 129),
    header("ID with a slash", "INVALID_ID", "header.transfer_id", transfer_id="a/b"),
    header("ID that climbs", "INVALID_ID", "header.transfer_id", transfer_id="../../etc"),
    header("ID with a space", "INVALID_ID", "header.transfer_id", transfer_id="a b"),
    header("ID with a newline", "INVALID_ID", "header.transfer_id", transfer_id="a\n"),
    header("ID that is not ASCII", "INVALID_ID", "header.transfer_id", transfer_id="tränsfer"),
    header("ID with a NUL", "INVALID_ID", "header.transfer_id", transfer_id="a\0b"),
    header("ID of 16000 bytes", "INVALID_ID", "header.transfer_id", transfer_id="t" * 16_000),
    header("ID of 100 KiB", "CHUNK_TOO_LARGE", None, transfer_id="t" * 102_400),
    header("no source shard", "INVALID_ID", "header.source_shard_id", source_shard_id=""),
    header("bad target shard", "INVALID_ID", "header.target_shard_id", target_shard_id=".."),
    header("bad source node", "INVALID_ID", "header.source_node_id", source_node_id="n/1"),
    header("bad target node", "INVALID_ID", "header.target_node_id", target_node_id="n 1"),
    header("another target node", "WRONG_NODE", "header.target_node_id", target_node_id="other"),
    header("no slots", "INVALID_SLOT_RANGE", "header.slots", slots=None),
    header("no slot", "INVALID_SLOT_RANGE", "header.slots", slots=common.SlotRange(start=5, end=5)),
    header("slots backwards", "INVALID_SLOT_RANGE", "header.slots", slots=common.SlotRange(start=9, end=5)),
    header("slot 16384", "INVALID_SLOT_RANGE", "header.slots", slots=common.SlotRange(start=0, end=16385)),
    header("slot 2^32", "INVALID_SLOT_RANGE", "header.slots", slots=common.SlotRange(start=2**32 - 2, end=2**32 - 1)),
    header("slots that wrap at 2^16", "INVALID_SLOT_RANGE", "header.slots", slots=common.SlotRange(start=65536, end=65537)),
    header("long content version", "INVALID_FIELD", "header.content_version", content_version="v" * 1025),
    header("attempt 0", "INVALID_FIELD", "header.attempt", attempt=0),
    header("no session", "INVALID_FIELD", "header.session", session=b""),
    header("session of 15 bytes", "INVALID_FIELD", "header.session", session=b"s" * 15),
    header("session of 17 bytes", "INVALID_FIELD", "header.session", session=b"s" * 17),
    header("generation 0", "INVALID_FIELD", "header.generation", generation=0),
    header("unknown priority", "INVALID_FIELD", "header.priority", priority=99),
    header("discard in a later generation", "INVALID_FIELD", "header.discard_staged", discard_staged=True, generation=2),
    header("no files", "INVALID_FIELD", "header.file_count", file_count=0),
    header("131073 files", "MANIFEST_TOO_LARGE", "header.file_count", file_count=131_073),
    header("200000 files", "MANIFEST_TOO_LARGE", "header.file_count", file_count=200_000),
    header("2^64 - 1 files", "MANIFEST_TOO_LARGE", "header.file_count", file_count=2**64 - 1),
    header("names of 64 MiB + 1", "MANIFEST_TOO_LARGE", "header.name_bytes", name_bytes=(64 << 20) + 1),
    header("2^63 bytes", "SNAPSHOT_TOO_LARGE", "header.total_bytes", total_bytes=2**63),
    header("2^64 - 1 bytes", "SNAPSHOT_TOO_LARGE", "header.total_bytes", total_bytes=2**64 - 1),
    header("unknown feature", "UNSUPPORTED_FEATURE", "header.required_features", required_features=["lanes", "time-travel"]),
    header("unprintable feature", "UNSUPPORTED_FEATURE", "header.required_features", required_features=["\x1b[31m" * 1000]),
    header("1000 features", "INVALID_FIELD", "header.required_features", required_features=["lanes"] * 1000),
    header("1000 known features", "INVALID_FIELD", "header.supported_features", supported_features=["x"] * 1000),
)
def test_header(peer, snapshot, case):
    peer.send_half(snapshot)
    stream = peer.open(snapshot, **case.do)
    stream.refusal().must_be(case.reason, case.field)
    peer.finish(snapshot)


def test_header_names_what_it_is_about(peer, snapshot):
    refused = peer.open(snapshot, required_features=["time-travel"]).refusal()
    refused.must_be("UNSUPPORTED_FEATURE", feature="time-travel")
    assert "time-travel" in refused.message and "crc64nvme" in refused.message


# ---- The manifest. Files replace those of a snapshot that was never staged, under an ID of its own; header counts fit.


def names(*wanted):
    return lambda: [Request.File(name=name, size=1) for name in wanted]


def sizes(*wanted):
    return lambda: [Request.File(name=f"f{number}", size=size) for number, size in enumerate(wanted)]


def manifest(name, reason, files, field="manifest.files"):
    return Case(name, reason, files, field)


@parametrize(
    manifest("../x", "INVALID_FILE_NAME", names("ok", "../x"), "manifest.files[1].name"),
    manifest("/x", "INVALID_FILE_NAME", names("/x"), "manifest.files[0].name"),
    manifest("a//b", "INVALID_FILE_NAME", names("a//b"), "manifest.files[0].name"),
    manifest("a/", "INVALID_FILE_NAME", names("a/"), "manifest.files[0].name"),
    manifest("empty name", "INVALID_FILE_NAME", names(""), "manifest.files[0].name"),
    manifest(".", "INVALID_FILE_NAME", names("."), "manifest.files[0].name"),
    manifest("..", "INVALID_FILE_NAME", names(".."), "manifest.files[0].name"),
    manifest("a/./b", "INVALID_FILE_NAME", names("a/./b"), "manifest.files[0].name"),
    manifest("a/../../b", "INVALID_FILE_NAME", names("a/../../b"), "manifest.files[0].name"),
    manifest("name of 10 KiB", "INVALID_FILE_NAME", names("n" * 10_240), "manifest.files[0].name"),
    manifest("name of 1025 bytes", "INVALID_FILE_NAME", names("/".join(["d" * 204] * 5) + "/"), "manifest.files[0].name"),
    manifest("component of 256 bytes", "INVALID_FILE_NAME", names("d/" + "n" * 256), "manifest.files[0].name"),
    manifest("newline", "INVALID_FILE_NAME", names("a\nb"), "manifest.files[0].name"),
    manifest("NUL", "INVALID_FILE_NAME", names("a\0b"), "manifest.files[0].name"),
    manifest("DEL", "INVALID_FILE_NAME", names("a\x7fb"), "manifest.files[0].name"),
    manifest("C1 control", "INVALID_FILE_NAME", names("a\x85b"), "manifest.files[0].name"),
    manifest("backslash", "INVALID_FILE_NAME", names("a\\b"), "manifest.files[0].name"),
    manifest("the hundredth", "INVALID_FILE_NAME", names(*map(str, range(99)), "..", "z"), "manifest.files[99].name"),
    manifest("a file that is a directory", "CONFLICTING_FILE_NAMES", names("a/b", "z", "a")),
    manifest("a directory that is a file", "CONFLICTING_FILE_NAMES", names("a", "a-", "a/b/c")),
    manifest("the same name twice", "CONFLICTING_FILE_NAMES", names("a", "b", "a")),
    manifest("size 2^63", "SNAPSHOT_TOO_LARGE", sizes(1, 2**63), "manifest.files[1].size"),
    manifest("size 2^64 - 1", "SNAPSHOT_TOO_LARGE", sizes(2**64 - 1), "manifest.files[0].size"),
    manifest("sum is 2^63", "SNAPSHOT_TOO_LARGE", sizes(2**62, 2**62), "manifest.files[1].size"),
    manifest("sum wraps at 2^64", "SNAPSHOT_TOO_LARGE", sizes(*[2**62] * 4, 5), "manifest.files[1].size"),
    manifest("sum beside an unknown size", "SNAPSHOT_TOO_LARGE", lambda: [Request.File(name="u"), *sizes(2**62, 2**62)()], "manifest.files[2].size"),
    manifest("short digest", "INVALID_FIELD", lambda: [Request.File(name="a", size=1, blake3=b"x" * 31)], "manifest.files[0].blake3"),
)
def test_manifest(peer, snapshot, case):
    peer.send_half(snapshot)
    files = case.do()
    total = sum(file.size for file in files)
    stream = peer.open(
        snapshot,
        pages=[Request.Manifest(files=files, last=True)],
        file_count=len(files),
        name_bytes=sum(len(file.name.encode()) for file in files),
        total_bytes=min(total, 2**63 - 1) if all(file.HasField("size") for file in files) else None,
    )
    refused = stream.refusal().must_be(case.reason)
    assert any(field.startswith(case.field) for field in refused.fields), refused
    peer.finish(snapshot)


@parametrize(
    Case("more files than declared", "MANIFEST_MISMATCH", dict(file_count=3), "manifest.files"),
    Case("fewer files than declared", "MANIFEST_MISMATCH", dict(file_count=5), "manifest.files"),
    Case("more bytes of names", "MANIFEST_MISMATCH", dict(name_bytes=10), "manifest.files"),
    Case("fewer bytes of names", "MANIFEST_MISMATCH", dict(name_bytes=10_000), "manifest.files"),
    Case("other sum of sizes", "MANIFEST_MISMATCH", dict(total_bytes=1), "header.total_bytes"),
    Case("no sum of sizes", "MANIFEST_MISMATCH", dict(total_bytes=None), "header.total_bytes"),
    Case("an empty page", "MANIFEST_MISMATCH", dict(pages=[Request.Manifest()]), "manifest.files"),
    Case("no files", "MANIFEST_MISMATCH", dict(pages=[Request.Manifest(last=True)]), "manifest.files"),
)
def test_manifest_against_the_header(peer, snapshot, case):
    peer.send_half(snapshot)
    peer.open(snapshot, **case.do).refusal().must_be(case.reason, case.field)
    peer.finish(snapshot)


# ---- Frames at the wrong time, and what is no frame at all.


FUTURE_FRAME = b"\x7a\x05hello"  # field 15 of a later version's oneof


@parametrize(
    Case("chunk", "UNEXPECTED_FRAME", lambda s: [s.chunk(0, 0, 10)], "chunk"),
    Case("manifest", "UNEXPECTED_FRAME", lambda s: s.pages(), "manifest"),
    Case("end", "UNEXPECTED_FRAME", lambda s: [s.end()], "end"),
    Case("heartbeat", "UNEXPECTED_FRAME", lambda s: [Request.Heartbeat()], "heartbeat"),
    Case("unknown frame", "UNKNOWN_FRAME", lambda s: [FUTURE_FRAME], "frame"),
    Case("empty message", "UNKNOWN_FRAME", lambda s: [b""], "frame"),
    Case("garbage", "UNKNOWN_FRAME", lambda s: [b"\xff" * 100]),
    Case("truncated header", "UNKNOWN_FRAME", lambda s: [Request(header=s.header(1, SESSION)).SerializeToString()[:-1]]),
    Case("header that is not UTF-8", "UNKNOWN_FRAME", lambda s: [b"\x0a\x04\x0a\x02\xff\xfe"]),
    Case("message of 5 MiB", "CHUNK_TOO_LARGE", lambda s: [bytes(5 * MIB)]),
    Case("nothing", "STREAM_ENDED_EARLY", lambda s: []),
)
def test_first_frame(peer, snapshot, case):
    peer.send_half(snapshot)
    stream = peer.stream().send(*case.do(snapshot)).half_close()
    stream.refusal().must_be(case.reason, case.field)
    peer.finish(snapshot)


@parametrize(
    Case("second header", "UNEXPECTED_FRAME", lambda s: [s.header(2, SESSION)], "header"),
    Case("lane header", "UNEXPECTED_FRAME", lambda s: [Request.LaneHeader()], "lane_header"),
    Case("chunk", "UNEXPECTED_FRAME", lambda s: [s.chunk(0, 0, 10)], "chunk"),
    Case("end", "UNEXPECTED_FRAME", lambda s: [s.end()], "end"),
    Case("unknown frame", "UNKNOWN_FRAME", lambda s: [FUTURE_FRAME], "frame"),
    Case("garbage", "UNKNOWN_FRAME", lambda s: [b"\xff" * 100]),
    Case("page of 1 MiB + 1", "CHUNK_TOO_LARGE", lambda s: [bytes(MIB + 1)]),
    Case("end of the stream", "STREAM_ENDED_EARLY", lambda s: []),
)
def test_frame_before_the_manifest_is_complete(peer, snapshot, case):
    peer.send_half(snapshot)
    first_page = Request.Manifest(files=list(snapshot.entries())[:2])
    stream = peer.open(snapshot, pages=[first_page, *case.do(snapshot)]).half_close()
    stream.refusal().must_be(case.reason, case.field)
    peer.finish(snapshot)


def test_chunks_before_accepted(peer, snapshot):
    """Against the rule, but a receiver cannot tell: they cross `Accepted` on the wire. What fits is taken, the rest is refused as ever."""
    peer.send_half(snapshot)
    file, offset, length = snapshot.without(snapshot.sent)[0]
    stream = peer.open(snapshot, pages=[*snapshot.pages(), snapshot.chunk(file, offset, 100), snapshot.chunk(file, 0, 100)])
    snapshot.sent.append((file, offset, 100))
    stream.refusal().must_be("OVERLAPPING_EXTENT", "chunk.offset")
    peer.finish(snapshot)


# ---- Chunks and the end, where they belong. `half` is the length of the staged half of file 0.


def half(snapshot):
    return len(snapshot.contents[0]) // 2


def bad_chunk(**changes):
    return lambda s: [s.chunk(0, half(s), 1000, changes)]


def good_then(frames):
    """A good chunk before it, which counts."""

    def do(snapshot):
        start = half(snapshot) + 2000
        snapshot.sent.append((0, start, 1000))
        return [snapshot.chunk(0, start, 1000), *frames(snapshot)]

    return do


def payload_of(count):
    from awscrt.checksums import crc64nvme

    payload = bytes(count)
    return dict(payload=payload, crc64nvme=crc64nvme(payload))


DATA_CASES = [
    Case("wrong checksum", "CHUNK_CHECKSUM_MISMATCH", bad_chunk(crc64nvme=1), "chunk.crc64nvme"),
    Case("no checksum", "CHUNK_CHECKSUM_MISMATCH", bad_chunk(crc64nvme=0), "chunk.crc64nvme"),
    Case("flipped bit", "CHUNK_CHECKSUM_MISMATCH", bad_chunk(payload=bytes(1000)), "chunk.crc64nvme"),
    Case("offset beyond the file", "EXTENT_OUT_OF_BOUNDS", bad_chunk(offset=10**9), "chunk.offset"),
    Case("offset at the end", "EXTENT_OUT_OF_BOUNDS", bad_chunk(offset=100_003), "chunk.offset"),
    Case("reaches beyond the end", "EXTENT_OUT_OF_BOUNDS", bad_chunk(offset=100_003 - 999), "chunk.offset"),
    Case("offset 2^63", "EXTENT_OUT_OF_BOUNDS", bad_chunk(offset=2**63), "chunk.offset"),
    Case("offset 2^64 - 1", "EXTENT_OUT_OF_BOUNDS", bad_chunk(offset=2**64 - 1), "chunk.offset"),
    Case("bytes of an empty file", "EXTENT_OUT_OF_BOUNDS", bad_chunk(file=3, offset=0), "chunk.offset"),
    Case("file 4 of 4", "EXTENT_OUT_OF_BOUNDS", bad_chunk(file=4), "chunk.file"),
    Case("file 2^32 - 1", "EXTENT_OUT_OF_BOUNDS", bad_chunk(file=2**32 - 1), "chunk.file"),
    Case("durable bytes again", "OVERLAPPING_EXTENT", lambda s: [s.chunk(0, 0, 1000)], "chunk.offset"),
    Case("one durable byte again", "OVERLAPPING_EXTENT", lambda s: [s.chunk(0, half(s) - 1, 1000)], "chunk.offset"),
    Case("the same chunk twice", "OVERLAPPING_EXTENT", good_then(lambda s: [s.chunk(0, half(s) + 2000, 1000)]), "chunk.offset"),
    Case("overlap at the front", "OVERLAPPING_EXTENT", good_then(lambda s: [s.chunk(0, half(s) + 1001, 1000)]), "chunk.offset"),
    Case("overlap at the back", "OVERLAPPING_EXTENT", good_then(lambda s: [s.chunk(0, half(s) + 2999, 1000)]), "chunk.offset"),
    Case("overlap around", "OVERLAPPING_EXTENT", good_then(lambda s: [s.chunk(0, half(s) + 1500, 2000)]), "chunk.offset"),
    Case("overlap inside", "OVERLAPPING_EXTENT", good_then(lambda s: [s.chunk(0, half(s) + 2500, 1)]), "chunk.offset"),
    Case("chunk of 1 MiB + 1", "CHUNK_TOO_LARGE", bad_chunk(**payload_of(MIB + 1)), "chunk.payload"),
    Case("chunk of 2 MiB", "CHUNK_TOO_LARGE", bad_chunk(**payload_of(2 * MIB))),
    Case("chunk of 8 MiB", "CHUNK_TOO_LARGE", bad_chunk(**payload_of(8 * MIB))),
    Case("chunk without payload", "EMPTY_CHUNK", bad_chunk(**payload_of(0)), "chunk.payload"),
    Case("second header", "UNEXPECTED_FRAME", lambda s: [s.header(2, SESSION)], "header"),
    Case("lane header", "UNEXPECTED_FRAME", lambda s: [Request.LaneHeader()], "lane_header"),
    Case("manifest again", "UNEXPECTED_FRAME", lambda s: s.pages(), "manifest"),
    Case("unknown frame", "UNKNOWN_FRAME", good_then(lambda s: [FUTURE_FRAME]), "frame"),
    Case("empty message", "UNKNOWN_FRAME", good_then(lambda s: [b""]), "frame"),
    Case("garbage", "UNKNOWN_FRAME", good_then(lambda s: [b"\xff" * 1000])),
    Case("truncated chunk", "UNKNOWN_FRAME", lambda s: [Request(chunk=s.chunk(0, half(s), 1000)).SerializeToString()[:-1]]),
    Case("closed without end", "STREAM_ENDED_EARLY", good_then(lambda s: [])),
    Case("end, much is missing", "MISSING_EXTENTS", good_then(lambda s: [s.end()])),
    Case("end, other total", "TOTALS_MISMATCH", lambda s: [s.end(total_bytes=s.total + 1)], "end"),
    Case("end, other count", "TOTALS_MISMATCH", lambda s: [s.end(file_count=5)], "end"),
    Case("end, no files", "TOTALS_MISMATCH", lambda s: [s.end(files=[])], "end"),
    Case("end, a file too few", "TOTALS_MISMATCH", lambda s: [s.end(files=s.totals()[:-1])], "end"),
    Case("end, a file twice", "TOTALS_MISMATCH", lambda s: [s.end(files=s.totals()[:1] * 4)], "end.files"),
    Case("end, a file too many", "TOTALS_MISMATCH", lambda s: [s.end(files=[*s.totals(), Request.FileTotal(file=4)])], "end.files"),
    Case("end, files backwards", "TOTALS_MISMATCH", lambda s: [s.end(files=s.totals()[::-1])], "end.files"),
    Case("end, an empty page", "TOTALS_MISMATCH", lambda s: [Request.End()], "end.files"),
    Case("a chunk between pages of the end", "UNEXPECTED_FRAME", lambda s: [Request.End(files=s.totals()[:1]), s.chunk(0, half(s), 9)], "chunk"),
    Case("closed between pages of the end", "STREAM_ENDED_EARLY", lambda s: [Request.End(files=s.totals()[:1])]),
]


@parametrize(*DATA_CASES)
def test_data(peer, snapshot, case):
    peer.send_half(snapshot)
    stream = peer.open(snapshot).wait_accepted()
    stream.send(*case.do(snapshot)).half_close()
    refused = stream.refusal().must_be(case.reason, case.field)
    transfer = peer.wait_phase(snapshot, pb.TRANSFER_PHASE_INTERRUPTED, pb.TRANSFER_PHASE_FAILED)
    assert transfer.progress.error.reason == case.reason, "the progress keeps the error"
    assert transfer.progress.error.message == refused.message
    assert transfer.progress.error.metadata == refused.metadata
    assert transfer.progress.error.HasField("retry_after_ms") == (refused.retry_seconds is not None)
    assert transfer.HasField("expires_unix_ms") and transfer.lanes == 0
    peer.finish(snapshot)


def changed_total(number, **changes):
    def end(snapshot):
        totals = snapshot.totals()
        for name, value in changes.items():
            setattr(totals[number], name, value)
        return snapshot.end(files=totals, total_bytes=sum(total.size for total in totals))

    return end


@parametrize(
    Case("wrong checksum of a file", "FILE_CHECKSUM_MISMATCH", changed_total(0, crc64nvme=1)),
    Case("checksum of an empty file", "FILE_CHECKSUM_MISMATCH", changed_total(3, crc64nvme=1)),
    Case("a file is longer", "TOTALS_MISMATCH", changed_total(1, size=65_537)),
    Case("a file is shorter", "TOTALS_MISMATCH", changed_total(1, size=65_535)),
    Case("an empty file is not", "TOTALS_MISMATCH", changed_total(3, size=1)),
    Case("sizes wrap at 2^64", "TOTALS_MISMATCH", lambda s: s.end(files=[*s.totals()[:3], Request.FileTotal(file=3, size=2**64 - s.total)], total_bytes=0)),
)
def test_end_when_everything_has_arrived(peer, snapshot, case):
    stream = peer.open(snapshot).wait_accepted()
    stream.send_extents(snapshot, stream.missing)
    stream.send(case.do(snapshot))
    stream.refusal().must_be(case.reason)
    transfer = peer.progress(snapshot)
    assert transfer.phase == pb.TRANSFER_PHASE_FAILED and transfer.progress.bytes_done == snapshot.total
    peer.finish(snapshot)


def test_missing_extents_are_named(peer, snapshot):
    stream = peer.open(snapshot).wait_accepted()
    stream.send_extents(snapshot, [(0, 0, 100_003), (1, 0, 40_000), (1, 40_001, 25_535)]).send(snapshot.end())
    stream.refusal().must_be("MISSING_EXTENTS", file=1, offset=40_000)
    peer.finish(snapshot)


def test_chunk_errors_say_where(peer, snapshot):
    stream = peer.open(snapshot).wait_accepted()
    stream.send(snapshot.chunk(1, 500, 1000, dict(crc64nvme=1)))
    stream.refusal().must_be("CHUNK_CHECKSUM_MISMATCH", "chunk.crc64nvme", file=1, offset=500)
    peer.finish(snapshot)


def test_unknown_size_with_a_hole(peer):
    snapshot = Snapshot({"log": os.urandom(1000)}, unknown_sizes={"log"})
    stream = peer.open(snapshot).wait_accepted()
    stream.send_extents(snapshot, [(0, 0, 100), (0, 200, 800)]).send(snapshot.end())
    stream.refusal().must_be("MISSING_EXTENTS", file=0, offset=100)
    stream = peer.open(snapshot).wait_accepted()
    assert stream.missing == [(0, 100, 100), (0, 1000, None)]
    stream.complete(snapshot)
    assert peer.receiver.installed(snapshot) == snapshot.files


def test_unknown_size_beyond_2_63(peer):
    snapshot = Snapshot({"log": b"x" * 1000}, unknown_sizes={"log"})
    stream = peer.open(snapshot).wait_accepted()
    stream.send(snapshot.chunk(0, 0, 1000, dict(offset=2**63 - 999)))
    stream.refusal().must_be("EXTENT_OUT_OF_BOUNDS", "chunk.offset")
    stream = peer.open(snapshot).wait_accepted()
    assert stream.missing == [(0, 0, None)]
    stream.complete(snapshot)


# ---- Another specification under the same ID.

OTHER_SPECIFICATIONS = {
    "source_shard_id": dict(source_shard="shard-2"),
    "target_shard_id": dict(target_shard="shard-of-somebody-else"),
    "source_node_id": dict(source_node="ruby"),
    "slots": dict(slots=(8191, 16384)),
    "snapshot_index": dict(index=1001),
    "snapshot_term": dict(term=8),
    "content_version": dict(content_version="v2"),
    "a file more": dict(files={**some_snapshot().files, "more": b""}),
    "another name": dict(files={"x" if name == "CURRENT" else name: bytes(len(content)) for name, content in some_snapshot().files.items()}),
    "another size": dict(files={**some_snapshot().files, "CURRENT": b"1"}),
    "another order": dict(files=dict(reversed(some_snapshot().files.items()))),
    "a size unknown": dict(files=some_snapshot().files, unknown_sizes={"CURRENT"}),
}


@pytest.mark.parametrize("field", OTHER_SPECIFICATIONS)
@pytest.mark.parametrize("when", ["staged", "installed", "installed before a restart"])
def test_other_specification(peer, start, snapshot, when, field):
    if "restart" in when:
        peer = start()
    if when == "staged":
        peer.send_half(snapshot)
    else:
        peer.send_all(snapshot)
    if "restart" in when:
        peer.receiver.restart()
    refused = peer.open(snapshot.again(**OTHER_SPECIFICATIONS[field])).refusal().must_be("SPECIFICATION_MISMATCH")
    if "_" in field or field == "slots":
        assert refused.metadata["field"] == f"header.{field}" and f"header.{field}" in refused.fields, refused
    if when == "staged":
        peer.finish(snapshot)
    else:
        assert peer.open(snapshot).wait_accepted().complete(snapshot).already_installed
        assert peer.receiver.installed(snapshot) == snapshot.files


def test_another_target_cannot_be_discarded_into(peer, snapshot):
    """`discard_staged` allows other content, not another place."""
    peer.send_half(snapshot)
    other = snapshot.again(target_shard="shard-of-somebody-else")
    peer.open(other, discard_staged=True).refusal().must_be("SPECIFICATION_MISMATCH", field="header.target_shard_id")
    peer.finish(snapshot)


def test_starting_anew_what_is_installed(peer, snapshot):
    """A sender that cannot read its source twice, and missed that it was done: it is told."""
    peer.send_all(snapshot)
    other = snapshot.again(content_version="v2", files={"another": b"file"})
    stream = peer.open(other, discard_staged=True).wait_accepted()
    assert stream.accepted.already_installed and stream.complete(other).already_installed
    assert peer.receiver.installed(snapshot) == snapshot.files


def test_other_digest(peer, snapshot):
    name = "data/000001.sst"
    snapshot.digests = {name: bytes(32)}
    peer.send_half(snapshot)
    peer.open(snapshot.again(digests={name: b"x" * 32})).refusal().must_be("SPECIFICATION_MISMATCH")
    snapshot.digests = {}
    peer.finish(snapshot)


# ---- Fences and stale snapshots.


def test_stale_fence(peer, snapshot):
    fence = common.Fence(epoch=5, term=3)
    stream = peer.open(snapshot, fence=fence).wait_accepted()
    stream.send_extents(snapshot, snapshot.half()).wait_durable(stream.sent_bytes)
    for epoch, term in [(5, 2), (4, 9), (0, 0)]:
        stale = peer.open(snapshot, fence=common.Fence(epoch=epoch, term=term))
        stale.refusal().must_be("STALE_FENCE", current_epoch=5, current_term=3)
    # The stream that was open all the time was not disturbed; an operator's call without a fence is taken.
    stream.send_extents(snapshot, snapshot.without(snapshot.sent)).send(snapshot.end()).wait_end()
    assert stream.installed
    other = some_snapshot(target_shard=snapshot.target_shard, index=snapshot.index + 1)
    peer.open(other, fence=common.Fence(epoch=5, term=2)).refusal().must_be("STALE_FENCE", current_epoch=5, current_term=3)
    peer.open(other, fence=common.Fence(epoch=6, term=0)).wait_accepted().complete(other)


def test_stale_fence_after_a_restart(start, snapshot):
    peer = start()
    peer.open(snapshot, fence=common.Fence(epoch=5, term=3)).wait_accepted()
    peer.receiver.restart()
    stale = peer.open(snapshot, fence=common.Fence(epoch=5, term=2))
    stale.refusal().must_be("STALE_FENCE", current_epoch=5, current_term=3)
    peer.finish(snapshot)


@pytest.mark.parametrize("older", [dict(index=999), dict(term=6, index=5000)], ids=["index", "term"])
@pytest.mark.parametrize("crash", [False, True], ids=["", "after a restart"])
def test_stale_snapshot(peer, start, snapshot, older, crash):
    if crash:
        peer = start()
    peer.send_all(snapshot)
    if crash:
        peer.receiver.restart()
    stale = some_snapshot(target_shard=snapshot.target_shard, **older)
    refused = peer.open(stale).refusal()
    refused.must_be("STALE_SNAPSHOT", installed_term=snapshot.term, installed_index=snapshot.index)
    assert peer.receiver.installed(snapshot) == snapshot.files


def test_the_same_point_is_not_stale(peer, snapshot):
    peer.send_all(snapshot)
    peer.send_all(some_snapshot(target_shard=snapshot.target_shard))


def test_overtaken_by_a_newer_snapshot(peer, snapshot):
    """Staged while an older one was installed, complete after a newer one is: refused at the install."""
    peer.send_half(snapshot)
    newer = some_snapshot(target_shard=snapshot.target_shard, index=snapshot.index + 1)
    stream = peer.open(snapshot).wait_accepted()
    stream.send_extents(snapshot, stream.missing)
    peer.send_all(newer)
    stream.send(snapshot.end())
    stream.refusal().must_be("STALE_SNAPSHOT", installed_term=newer.term, installed_index=newer.index)
    assert peer.receiver.installed(newer) == newer.files
    transfer = peer.wait_phase(snapshot, pb.TRANSFER_PHASE_FAILED)
    assert transfer.progress.error.reason == "STALE_SNAPSHOT"
