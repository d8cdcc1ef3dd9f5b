"""Limits, one by one, and peers that are slow, silent or many."""

import contextlib
import os
import threading
import time

import pytest

from peer import MIB, PATIENCE, Refused, Snapshot, some_snapshot
from stubs import Request, pb


# ---- Silence.


def test_idle_sender(start, snapshot):
    peer = start(idle_ms=600)
    stream = peer.open(snapshot).wait_accepted()
    assert stream.accepted.idle_timeout_ms == 600
    stream.send_extents(snapshot, snapshot.half()).wait_received()
    began = time.monotonic()
    stream.refusal().must_be("IDLE_TIMEOUT")
    assert 0.4 < time.monotonic() - began < 5
    assert peer.progress(snapshot).phase == pb.TRANSFER_PHASE_INTERRUPTED
    peer.finish(snapshot)


def test_heartbeats_keep_it_alive(start, snapshot):
    """The sender has nothing to say for long, the receiver repeats its Ack: at least every third of the timeout."""
    peer = start(idle_ms=900)
    stream = peer.open(snapshot).wait_accepted()
    began = time.monotonic()
    while time.monotonic() - began < 2.5:
        stream.send(Request.Heartbeat())
        time.sleep(0.2)
    times = [began, *(at for at, _ in stream.acks)]
    assert max(later - earlier for earlier, later in zip(times, times[1:])) < 0.6
    stream.complete(snapshot)


def test_idle_lane(start, snapshot):
    peer = start(idle_ms=600)
    control = peer.open(snapshot, lanes=2).wait_accepted()
    lane = peer.lane(snapshot, control, 1).wait_accepted()
    stop = threading.Event()

    def beat():
        while not stop.wait(0.1):
            control.send(Request.Heartbeat())

    beating = threading.Thread(target=beat)
    beating.start()
    lane.refusal().must_be("IDLE_TIMEOUT")
    stop.set()
    beating.join()
    control.complete(snapshot)


@pytest.mark.parametrize("sent", [0, 1, 2], ids=["nothing", "a header", "a page of the manifest"])
def test_silence_before_accepted(start, snapshot, sent):
    peer = start(first_frame_ms=300)
    stream = peer.stream()
    stream.send(*[snapshot.header(1, os.urandom(16)), snapshot.pages(per_page=2)[0]][:sent])
    stream.refusal(seconds=5).must_be("IDLE_TIMEOUT")
    peer.finish(snapshot)


def test_sender_that_never_reads(peer):
    """It sends what the first credit allows, then the end, and looks at no answer."""
    snapshot = some_snapshot()
    stream = peer.stream(read=False)
    stream.send(snapshot.header(1, os.urandom(16)), *snapshot.pages())
    peer.wait_known(snapshot)
    for extent in snapshot.extents():
        stream.send(snapshot.chunk(*extent))
    others = some_snapshot()
    peer.send_all(others)
    stream.send(snapshot.end())
    peer.wait_phase(snapshot, pb.TRANSFER_PHASE_INSTALLED)
    assert peer.receiver.installed(snapshot) == snapshot.files
    stream.cancel()


def test_sender_that_never_reads_gives_its_place_back(start):
    """One place: a peer that reads nothing and says nothing more cannot keep it."""
    peer = start(transfers=1, idle_ms=600)
    snapshot = some_snapshot()
    stream = peer.stream(read=False)
    stream.send(snapshot.header(1, os.urandom(16)), *snapshot.pages())
    peer.wait_known(snapshot)
    peer.wait_phase(snapshot, pb.TRANSFER_PHASE_INTERRUPTED)
    peer.send_all(some_snapshot())
    peer.finish(snapshot)
    stream.cancel()


# ---- Credit and chunks.


def test_credit_exceeded(start):
    """The store syncs after each chunk, so credit comes slower than a sender that does not ask for it."""
    peer = start(chunk_bytes=65536, stream_credit_bytes=65536, unsynced_bytes=65536)
    snapshot = Snapshot({"f": os.urandom(8 * MIB)})
    stream = peer.open(snapshot).wait_accepted()
    assert stream.accepted.credit_limit == 65536
    extents = [(0, at, 65536) for at in range(0, 8 * MIB, 65536)]
    snapshot.maybe_sent += extents
    stream.send(*[snapshot.chunk(*extent) for extent in extents])
    stream.refusal().must_be("CREDIT_EXCEEDED", "chunk.payload")
    peer.finish(snapshot)


def test_chunk_limit_is_what_accepted_says(start, snapshot):
    peer = start(chunk_bytes=4096)
    stream = peer.open(snapshot).wait_accepted()
    assert stream.accepted.max_chunk_bytes == 4096
    stream.send_extents(snapshot, [(0, 0, 4096)], chunk_bytes=4096)
    stream.send(snapshot.chunk(0, 4096, 4097))
    stream.refusal().must_be("CHUNK_TOO_LARGE", "chunk.payload")
    peer.finish(snapshot)


def test_too_many_pieces(start):
    peer = start(extents=100)
    snapshot = Snapshot({"f": os.urandom(1000)})
    stream = peer.open(snapshot).wait_accepted()
    pieces = [(0, at, 1) for at in range(0, 1000, 2)]
    snapshot.maybe_sent += pieces
    stream.send(*[snapshot.chunk(*piece) for piece in pieces])
    stream.refusal().must_be("TOO_FRAGMENTED")
    peer.finish(snapshot)


# ---- Places, space, watchers.


def test_300_transfers_at_once(start):
    """More than there are places: the rest is told to come back, does, and all arrive."""
    peer = start(transfers=40)
    count = 300
    snapshots = [Snapshot({"f": os.urandom(200), "d/g": b"g"}) for _ in range(count)]
    channels = [peer.channel() for _ in range(4)]
    refusals, failures = [], []
    started = threading.Barrier(count)

    def send(number):
        snapshot = snapshots[number]
        started.wait(PATIENCE)
        for _ in range(200):
            stream = peer.open(snapshot, attempt=1, session=bytes(16), channel=channels[number % 4], generation=1)
            try:
                stream.wait_accepted()
                time.sleep(0.05)
                stream.complete(snapshot)
                return
            except Refused as refused:
                try:
                    refused.must_be("TOO_MANY_TRANSFERS")
                except AssertionError as wrong:
                    failures.append(wrong)
                    return
                refusals.append(refused)
                time.sleep(refused.retry_seconds)
        failures.append(AssertionError("never got a place"))

    threads = [threading.Thread(target=send, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(50)
    assert not failures, failures[0]
    assert refusals, "the limit was reached"
    for snapshot in snapshots:
        assert peer.receiver.installed(snapshot) == snapshot.files


def test_too_many_transfers(start):
    peer = start(transfers=2)
    streams = [(snapshot, peer.open(snapshot).wait_accepted()) for snapshot in (some_snapshot(), some_snapshot())]
    third = some_snapshot()
    peer.open(third).refusal().must_be("TOO_MANY_TRANSFERS")
    with pytest.raises(Refused) as refused:
        peer.progress(third)
    refused.value.must_be("TRANSFER_NOT_FOUND")
    for snapshot, stream in streams:
        stream.complete(snapshot)
    peer.send_all(third)


def test_a_place_is_kept_over_a_reconnection(start, snapshot):
    """Whoever takes over the stream takes over its place: the limit holds."""
    peer = start(transfers=1)
    first = peer.open(snapshot).wait_accepted()
    second = peer.open(snapshot).wait_accepted()
    first.refusal().must_be("SUPERSEDED")
    other = some_snapshot()
    peer.open(other).refusal().must_be("TOO_MANY_TRANSFERS")
    second.complete(snapshot)
    peer.send_all(other)


def test_too_many_staged(start):
    peer = start(staged=2)
    staged = [some_snapshot(), some_snapshot()]
    for snapshot in staged:
        peer.send_half(snapshot)
    third = some_snapshot()
    peer.open(third).refusal().must_be("TOO_MANY_TRANSFERS")
    peer.finish(staged[0])
    peer.send_all(third)
    peer.finish(staged[1])


def test_no_room_on_the_disk(start):
    """Refused before any data moves, with what is needed and what there is."""
    peer = start(capacity_bytes=MIB)
    huge = Snapshot({"f": bytes(2 * MIB)})
    refused = peer.open(huge).refusal().must_be("INSUFFICIENT_DISK")
    assert int(refused.metadata["needed_bytes"]) > int(refused.metadata["available_bytes"])
    with pytest.raises(Refused) as unknown:
        peer.progress(huge)
    unknown.value.must_be("TRANSFER_NOT_FOUND")
    peer.send_all(some_snapshot())


def test_space_is_reserved(start):
    """Two that fit one by one, but not together."""
    peer = start(capacity_bytes=3 * MIB)
    first, second = (Snapshot({"f": os.urandom(2 * MIB - 100_000)}) for _ in range(2))
    stream = peer.open(first).wait_accepted()
    peer.open(second).refusal().must_be("INSUFFICIENT_DISK")
    stream.half_close().refusal()
    peer.cancel(first)
    send_when_there_is_room(peer, second)


def send_when_there_is_room(peer, snapshot):
    until = time.monotonic() + PATIENCE
    while True:
        try:
            return peer.send_all(snapshot)
        except Refused as refused:
            refused.must_be("INSUFFICIENT_DISK")
            assert time.monotonic() < until
            time.sleep(0.05)


def test_unknown_size_outgrows_the_disk(start):
    """Fails cleanly midway, keeps what it has, and says what to do."""
    peer = start(capacity_bytes=2 * MIB)
    snapshot = Snapshot({"f": os.urandom(4 * MIB)}, unknown_sizes={"f"})
    stream = peer.open(snapshot).wait_accepted()
    # What is sent may all be on its way before the receiver has no more room.
    with contextlib.suppress(Refused):
        stream.send_extents(snapshot, stream.missing, 65536)
    stream.refusal().must_be("INSUFFICIENT_DISK")
    transfer = peer.progress(snapshot)
    assert transfer.progress.error.reason == "INSUFFICIENT_DISK"
    kept = transfer.progress.bytes_done
    stream = peer.open(snapshot).wait_accepted()
    assert stream.missing == [(0, kept, None)]
    stream.half_close().refusal()
    peer.cancel(snapshot)
    send_when_there_is_room(peer, some_snapshot())


def test_too_many_watchers(start, snapshot):
    peer = start(watchers=2)
    peer.send_half(snapshot)
    watches = [peer.watch(snapshot.transfer_id) for _ in range(2)]
    for watch in watches:
        next(watch)
    with pytest.raises(Refused) as refused:
        next(peer.watch(snapshot.transfer_id))
    refused.value.must_be("TOO_MANY_WATCHERS")
    watches[0].close()
    until = time.monotonic() + PATIENCE
    while True:
        try:
            next(peer.watch(snapshot.transfer_id))
            break
        except Refused as refused:
            refused.must_be("TOO_MANY_WATCHERS")
            assert time.monotonic() < until, "the place of a watcher that hung up is given back"
    peer.finish(snapshot)


def test_history_is_bounded(start):
    peer = start(history=3)
    snapshots = [some_snapshot() for _ in range(5)]
    for snapshot in snapshots:
        peer.send_all(snapshot)
    for _ in range(2):
        listed = [transfer.transfer_id for transfer in peer.list().transfers]
        assert listed == [snapshot.transfer_id for snapshot in snapshots[:1:-1]]
        with pytest.raises(Refused) as refused:
            peer.progress(snapshots[0])
        refused.value.must_be("TRANSFER_NOT_FOUND")
        # Forgotten by the history, but not by the shard.
        stream = peer.open(snapshots[0]).wait_accepted()
        assert stream.accepted.already_installed and stream.complete(snapshots[0]).already_installed
        peer.receiver.restart()


def test_stale_staging_is_collected(start, snapshot):
    peer = start(stale_ms=500)
    peer.send_half(snapshot)
    transfer = peer.progress(snapshot)
    assert transfer.expires_unix_ms > transfer.progress.last_activity_unix_ms
    expired = peer.wait_phase(snapshot, pb.TRANSFER_PHASE_EXPIRED)
    assert expired.progress.HasField("finished_unix_ms")
    until = time.monotonic() + PATIENCE
    while peer.receiver.files_of(snapshot):
        assert time.monotonic() < until
    stream = peer.open(snapshot).wait_accepted()
    assert stream.attempt == expired.attempt + 1 and stream.missing == snapshot.extents()
    stream.complete(snapshot)


def test_stale_staging_is_collected_on_start(start, snapshot):
    peer = start(stale_ms=500)
    peer.send_half(snapshot)
    peer.receiver.kill()
    time.sleep(0.6)
    peer.receiver.start()
    peer.wait_phase(snapshot, pb.TRANSFER_PHASE_EXPIRED)


def test_a_connected_transfer_is_never_stale(start, snapshot):
    peer = start(stale_ms=300)
    stream = peer.open(snapshot).wait_accepted()
    stream.send_extents(snapshot, snapshot.half())
    time.sleep(1)
    stream.send_extents(snapshot, snapshot.without(snapshot.sent)).send(snapshot.end()).wait_end()
    assert stream.installed
