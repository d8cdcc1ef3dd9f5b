"""Streams that were damaged at random: bits, frames left out, repeated, swapped, cut off. Whatever comes of it, the answer
is one of the error table or a snapshot that is what was sent, and the transfer can be completed."""

import random

import pytest

from peer import Refused, some_snapshot
from stubs import CONTRACT, Request, pb

ROUNDS = 25


def frames_of(snapshot, stream):
    """A whole stream from its manifest on, encoded."""
    chunks = [
        snapshot.chunk(file, at, min(20_000, offset + length - at))
        for file, offset, length in snapshot.extents()
        for at in range(offset, offset + length, 20_000)
    ]
    totals = snapshot.totals()
    return [
        Request(header=snapshot.header(stream.attempt, stream.session)),
        *(Request(manifest=page) for page in snapshot.pages(per_page=3)),
        *(Request(chunk=chunk) for chunk in chunks),
        Request(end=Request.End(files=totals[:2])),
        Request(end=snapshot.end(files=totals[2:])),
    ]


def flip(rng, frames):
    at = rng.randrange(1, len(frames))
    frame = bytearray(frames[at])
    # Mostly where the structure is.
    place = rng.randrange(min(len(frame), rng.choice([16, 64, 10**6])))
    frame[place] ^= 1 << rng.randrange(8)
    frames[at] = bytes(frame)


def truncate(rng, frames):
    at = rng.randrange(1, len(frames))
    frames[at] = frames[at][: rng.randrange(len(frames[at]))]


def leave_out(rng, frames):
    del frames[rng.randrange(len(frames))]


def repeat(rng, frames):
    at = rng.randrange(len(frames))
    frames.insert(at, frames[at])


def swap(rng, frames):
    a, b = rng.randrange(len(frames)), rng.randrange(len(frames))
    frames[a], frames[b] = frames[b], frames[a]


def noise(rng, frames):
    frames.insert(rng.randrange(1, len(frames)), rng.randbytes(rng.randrange(200)))


def cut(rng, frames):
    del frames[rng.randrange(1, len(frames)) :]


@pytest.mark.parametrize("damage", [flip, truncate, leave_out, repeat, swap, noise, cut], ids=lambda damage: damage.__name__)
def test_damaged_stream(peer, damage):
    rng = random.Random(damage.__name__)
    for _ in range(ROUNDS):
        snapshot = some_snapshot()
        stream = peer.stream()
        stream.attempt, stream.session = 1, rng.randbytes(16)
        frames = [frame.SerializeToString() for frame in frames_of(snapshot, stream)]
        damage(rng, frames)
        stream.send(*frames).half_close()
        try:
            stream.wait_end()
            installed = peer.receiver.installed(snapshot)
            # Nothing guards the names; a bit of them that flipped makes another good name.
            assert len(installed) == len(snapshot.files) and sorted(installed.values()) == sorted(snapshot.contents)
            continue
        except Refused as refused:
            assert refused.reason in CONTRACT, refused
            refused.must_be(refused.reason)
        finish_whatever_is_staged(peer, snapshot)


def finish_whatever_is_staged(peer, snapshot):
    """A flipped bit may have moved a chunk, which only the checksum of the file finds: then it starts anew."""
    for discard in (False, True):
        stream = peer.open(snapshot, discard_staged=discard)
        try:
            stream.wait_accepted()
            stream.send_extents(snapshot, stream.missing).send(snapshot.end()).wait_end()
            break
        except Refused as refused:
            assert not discard
            assert refused.reason in ("FILE_CHECKSUM_MISMATCH", "SPECIFICATION_MISMATCH"), refused
    assert peer.receiver.installed(snapshot) == snapshot.files
    assert peer.progress(snapshot).phase == pb.TRANSFER_PHASE_INSTALLED
