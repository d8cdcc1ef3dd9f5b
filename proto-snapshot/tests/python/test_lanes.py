"""Lanes: further streams of an attempt, each on its own connection."""

import os

import pytest

from peer import MIB, Snapshot, some_snapshot
from stubs import Request, pb


@pytest.fixture
def big():
    return Snapshot({"a": os.urandom(3 * MIB), "b/c": os.urandom(2 * MIB + 17), "empty": b""})


def test_two_lanes_of_which_one_breaks(peer, big):
    control = peer.open(big, lanes=3).wait_accepted()
    assert control.accepted.max_lanes == 3
    lanes = [peer.lane(big, control, lane).wait_accepted() for lane in (1, 2)]
    assert all(lane.missing == control.missing for lane in lanes), "every stream hears what is missing in the whole"
    assert peer.progress(big).lanes == 3
    # Who sends what is the sender's affair.
    shares = {
        control: [(0, 0, MIB), (1, 2 * MIB, 17)],
        lanes[0]: [(0, MIB, 2 * MIB)],
        lanes[1]: [(1, 0, 2 * MIB)],
    }
    control.send_extents(big, shares[control])
    lanes[1].send_extents(big, shares[lanes[1]], chunk_bytes=100_000)
    lanes[0].send_extents(big, [(0, MIB, MIB // 2)], chunk_bytes=50_000).wait_received()
    lanes[0].cancel()

    again = peer.lane(big, control, 1, generation=2).wait_accepted()
    own = [extent for extent in again.missing if extent[0] == 0 and extent[1] >= MIB]
    assert own == [(0, MIB + MIB // 2, MIB + MIB // 2)], "what the broken lane had brought is there"
    again.send_extents(big, own).wait_received()
    lanes[1].wait_received()
    for lane in (again, lanes[1]):
        lane.half_close().wait_end()
        assert lane.last_ack.received_bytes == lane.sent_bytes, "the last Ack tells of everything"
    control.wait_received().send(big.end()).wait_end()
    assert control.installed.total_bytes == big.total
    assert peer.receiver.installed(big) == big.files
    assert peer.progress(big).wire_bytes == big.total, "no byte was sent twice"


def test_resume_after_lanes(start, big):
    peer = start()
    control = peer.open(big, lanes=2).wait_accepted()
    lane = peer.lane(big, control, 1).wait_accepted()
    control.send_extents(big, [(0, 0, 400_000)])
    lane.send_extents(big, [(1, 500_000, 300_000)])
    control.wait_durable(700_000)
    peer.receiver.restart()
    peer.finish(big)


def test_control_ends_its_lanes(peer, big):
    control = peer.open(big, lanes=2).wait_accepted()
    lane = peer.lane(big, control, 1).wait_accepted()
    lane.send_extents(big, [(0, 0, MIB)]).wait_received()
    control.half_close().refusal().must_be("STREAM_ENDED_EARLY")
    lane.refusal().must_be("STREAM_ENDED_EARLY")
    peer.finish(big)


def test_a_new_attempt_ends_the_lanes(peer, big):
    control = peer.open(big, lanes=2).wait_accepted()
    lane = peer.lane(big, control, 1).wait_accepted()
    lane.send_extents(big, [(0, 0, MIB)]).wait_received()
    second = peer.open(big).wait_accepted()
    lane.refusal().must_be("SUPERSEDED", attempt=second.attempt)
    control.refusal().must_be("SUPERSEDED", attempt=second.attempt)
    assert second.missing == big.without(big.sent)
    second.complete(big)


def test_an_error_of_a_lane_is_its_own(peer, big):
    control = peer.open(big, lanes=2).wait_accepted()
    lane = peer.lane(big, control, 1).wait_accepted()
    lane.send(big.chunk(0, 0, 1000, dict(crc64nvme=1)))
    lane.refusal().must_be("CHUNK_CHECKSUM_MISMATCH", "chunk.crc64nvme")
    control.complete(big)
    assert peer.receiver.installed(big) == big.files


def test_no_byte_on_two_streams(peer, big):
    control = peer.open(big, lanes=2).wait_accepted()
    lane = peer.lane(big, control, 1).wait_accepted()
    control.send_extents(big, [(0, 0, MIB)]).wait_received()
    lane.send(big.chunk(0, MIB - 1, 10))
    lane.refusal().must_be("OVERLAPPING_EXTENT", "chunk.offset")
    control.send_extents(big, big.without(big.sent)).send(big.end()).wait_end()
    assert control.installed


REFUSED = {
    "another attempt": ("NO_SUCH_ATTEMPT", None, dict(attempt=8)),
    "an older attempt": ("SUPERSEDED", None, dict(attempt=6)),
    "another session": ("SUPERSEDED", None, dict(session=b"s" * 16)),
    "unknown transfer": ("NO_SUCH_ATTEMPT", None, dict(transfer_id="t-never-seen")),
    "bad ID": ("INVALID_ID", "lane_header.transfer_id", dict(transfer_id="../x")),
    "attempt 0": ("INVALID_FIELD", "lane_header.attempt", dict(attempt=0)),
    "session of 15 bytes": ("INVALID_FIELD", "lane_header.session", dict(session=b"s" * 15)),
    "generation 0": ("INVALID_FIELD", "lane_header.generation", dict(generation=0)),
    "lane 0": ("INVALID_FIELD", "lane_header.lane", dict(lane=0)),
    "as many lanes as streams": ("INVALID_FIELD", "lane_header.lane", dict(lane=3)),
    "lane 99": ("INVALID_FIELD", "lane_header.lane", dict(lane=99)),
    "lane 2^32 - 1": ("INVALID_FIELD", "lane_header.lane", dict(lane=2**32 - 1)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_lane_header(peer, snapshot, case):
    reason, field, changes = REFUSED[case]
    control = peer.open(snapshot, attempt=7, lanes=3).wait_accepted()
    lane = peer.lane(snapshot, control, **({"lane": 1} | changes))
    lane.refusal().must_be(reason, field)
    control.complete(snapshot)
    assert peer.receiver.installed(snapshot) == snapshot.files


def test_generation_of_a_lane(peer, snapshot):
    control = peer.open(snapshot, lanes=2).wait_accepted()
    lane = peer.lane(snapshot, control, 1, generation=5).wait_accepted()
    for generation in (5, 4):
        peer.lane(snapshot, control, 1, generation=generation).refusal().must_be("SUPERSEDED")
    newer = peer.lane(snapshot, control, 1, generation=6).wait_accepted()
    lane.refusal().must_be("STREAM_ENDED_EARLY")
    newer.send_extents(snapshot, newer.missing).wait_received()
    control.send(snapshot.end()).wait_end()
    assert control.installed


FRAMES = {
    "header": ("UNEXPECTED_FRAME", lambda s: [s.header(1, b"s" * 16)]),
    "lane header": ("UNEXPECTED_FRAME", lambda s: [Request.LaneHeader()]),
    "manifest": ("UNEXPECTED_FRAME", lambda s: s.pages()),
    "end": ("UNEXPECTED_FRAME", lambda s: [s.end()]),
    "unknown": ("UNKNOWN_FRAME", lambda s: [b"\x7a\x00"]),
    "beyond the file": ("EXTENT_OUT_OF_BOUNDS", lambda s: [s.chunk(0, 0, 10, dict(offset=10**7))]),
}


@pytest.mark.parametrize("case", FRAMES)
def test_frame_on_a_lane(peer, snapshot, case):
    reason, frames = FRAMES[case]
    control = peer.open(snapshot, lanes=2).wait_accepted()
    lane = peer.lane(snapshot, control, 1).wait_accepted()
    lane.send(*frames(snapshot)).refusal().must_be(reason)
    control.complete(snapshot)
    assert peer.receiver.installed(snapshot) == snapshot.files


def test_lane_without_control_stream(peer, snapshot):
    peer.send_half(snapshot)
    attempt = peer.progress(snapshot).attempt
    stream = peer.stream()
    stream.attempt, stream.session = attempt, os.urandom(16)
    refused = peer.lane(snapshot, stream, 1).refusal()
    assert refused.reason in ("NO_SUCH_ATTEMPT", "SUPERSEDED")
    refused.must_be(refused.reason)
    stream.attempt += 1
    peer.lane(snapshot, stream, 1).refusal().must_be("NO_SUCH_ATTEMPT")
    stream.half_close()
    peer.finish(snapshot)


def test_lane_of_an_interrupted_attempt(peer, snapshot):
    control = peer.open(snapshot, lanes=2).wait_accepted()
    control.half_close().refusal().must_be("STREAM_ENDED_EARLY")
    peer.lane(snapshot, control, 1).refusal().must_be("NO_SUCH_ATTEMPT")
    peer.finish(snapshot)


def test_no_lanes_where_a_size_is_unknown(peer):
    snapshot = some_snapshot(unknown_sizes={"CURRENT"})
    control = peer.open(snapshot, lanes=8).wait_accepted()
    assert control.accepted.max_lanes == 1
    peer.lane(snapshot, control, 1).refusal().must_be("INVALID_FIELD", "lane_header.lane")
    control.complete(snapshot)


def test_end_before_the_lanes_are_through(peer, big):
    """`End` while a lane still has something to bring: the transfer is not complete, and says so."""
    control = peer.open(big, lanes=2).wait_accepted()
    lane = peer.lane(big, control, 1).wait_accepted()
    control.send_extents(big, [(0, 0, MIB)])
    lane.send_extents(big, [(1, 0, MIB)]).wait_received()
    control.send(big.end())
    control.refusal().must_be("MISSING_EXTENTS")
    assert lane.refusal().code.name == "ABORTED"
    peer.finish(big)


def test_cancel_ends_the_lanes(peer, big):
    control = peer.open(big, lanes=2).wait_accepted()
    lane = peer.lane(big, control, 1).wait_accepted()
    assert peer.cancel(big).phase == pb.TRANSFER_PHASE_CANCELLED
    control.refusal().must_be("TRANSFER_CANCELLED")
    lane.refusal().must_be("TRANSFER_CANCELLED")
