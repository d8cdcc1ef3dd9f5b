"""Resuming: what was acknowledged as durable is never asked for again, whatever crashes."""

import os
import random
import threading
import time

import pytest

from peer import MIB, Refused, Snapshot, some_snapshot
from stubs import pb


def test_the_receiver_is_killed(start, snapshot):
    peer = start()
    stream = peer.open(snapshot).wait_accepted()
    stream.send_extents(snapshot, snapshot.half()).wait_durable(stream.sent_bytes)
    peer.receiver.restart()
    transfer = peer.progress(snapshot)
    assert transfer.phase == pb.TRANSFER_PHASE_INTERRUPTED
    assert transfer.attempt == stream.attempt
    assert transfer.progress.bytes_done == stream.sent_bytes
    assert transfer.HasField("expires_unix_ms")
    peer.finish(snapshot)
    assert peer.progress(snapshot).attempt == stream.attempt + 1


def test_the_same_attempt_goes_on_after_a_crash(start, snapshot):
    """A sender that only lost its connection keeps attempt and session and raises the generation."""
    peer = start()
    stream = peer.open(snapshot).wait_accepted()
    stream.send_extents(snapshot, snapshot.half()).wait_durable(stream.sent_bytes)
    peer.receiver.restart()
    other = peer.open(snapshot, attempt=stream.attempt, session=os.urandom(16), generation=2)
    other.refusal().must_be("SUPERSEDED", attempt=stream.attempt)
    again = peer.open(snapshot, attempt=stream.attempt, session=stream.session, generation=2).wait_accepted()
    assert again.missing == snapshot.without(snapshot.sent)
    again.complete(snapshot)
    assert peer.receiver.installed(snapshot) == snapshot.files


def test_a_claim_is_durable_when_it_is_accepted(start, snapshot):
    """Otherwise two senders could both believe to hold the same attempt."""
    peer = start()
    stream = peer.open(snapshot, attempt=5).wait_accepted()
    peer.receiver.restart()
    assert peer.progress(snapshot).attempt == 5
    peer.open(snapshot, attempt=5).refusal().must_be("SUPERSEDED", attempt=5)
    again = peer.open(snapshot, attempt=5, session=stream.session, generation=2).wait_accepted()
    again.complete(snapshot)


def test_killed_again_and_again(start):
    """Kills at random moments: acknowledged extents stay, and the sum of what is missing is always right."""
    peer = start()
    rng = random.Random(11)
    snapshot = Snapshot({f"f{n}": os.urandom(rng.choice([0, 1, 5000, MIB, 3 * MIB + 1])) for n in range(12)})
    sent_in_all, durable = 0, 0
    for _ in range(8):
        stream = peer.open(snapshot).wait_accepted()
        missing = sum(length for _, _, length in stream.missing)
        assert missing <= snapshot.total - durable, "acknowledged bytes are asked for again"
        assert stream.accepted.durable_bytes == snapshot.total - missing
        assert peer.progress(snapshot).progress.bytes_done == snapshot.total - missing
        budget = rng.randrange(1, 3 * MIB)
        for file, offset, length in stream.missing:
            length = min(length, budget - stream.sent_bytes)
            if length > 0:
                stream.send_extents(snapshot, [(file, offset, length)], chunk_bytes=100_000)
        if rng.random() < 0.5:
            stream.wait_received()
        sent_in_all += stream.sent_bytes
        durable = max(durable, stream.last_ack.durable_bytes)
        peer.receiver.restart()
    stream = peer.open(snapshot).wait_accepted()
    assert sum(length for _, _, length in stream.missing) <= snapshot.total - durable
    stream.complete(snapshot)
    assert peer.receiver.installed(snapshot) == snapshot.files


def test_missing_extents_in_pages(start):
    """The second half of each file: more runs than fit into one page of `Accepted`, also after a crash."""
    peer = start()
    files = 21_000
    snapshot = Snapshot({f"{number:05}": os.urandom(2) for number in range(files)})
    stream = peer.open(snapshot).wait_accepted()
    stream.send_extents(snapshot, [(number, 0, 1) for number in range(files)]).wait_durable(files)
    peer.receiver.restart()
    stream = peer.open(snapshot).wait_accepted()
    assert stream.missing == [(number, 1, 1) for number in range(files)]
    assert stream.accepted_pages > 1
    peer.cancel(snapshot)


def test_received_bytes_are_kept_when_the_connection_breaks(peer, snapshot):
    """Not acknowledged as durable yet, but received: made durable before it is asked for again."""
    channel = peer.channel()
    stream = peer.open(snapshot, channel=channel).wait_accepted()
    stream.send_extents(snapshot, snapshot.half()).wait_received()
    channel.close()
    peer.finish(snapshot)


def test_cancelled_call(peer, snapshot):
    stream = peer.open(snapshot).wait_accepted()
    stream.send_extents(snapshot, snapshot.half()).wait_received()
    stream.cancel()
    assert peer.wait_phase(snapshot, pb.TRANSFER_PHASE_INTERRUPTED).lanes == 0
    peer.finish(snapshot)


def test_sigterm_tells_the_sender(start, snapshot):
    peer = start()
    stream = peer.open(snapshot).wait_accepted()
    stream.send_extents(snapshot, snapshot.half()).wait_received()
    watch = peer.watch(snapshot.transfer_id)
    next(watch)
    assert peer.receiver.terminate() == 0
    stream.refusal().must_be("SHUTTING_DOWN")
    with pytest.raises(Refused) as refused:
        list(watch)
    refused.value.must_be("SHUTTING_DOWN")
    peer.receiver.start()
    peer.finish(snapshot)


def test_end_comes_with_the_kill(start, tmp_path):
    """A crash while installing: the install goes on by itself, and the sender learns of it by asking again."""
    hold = tmp_path / "hold"
    hold.touch()
    peer = start(hold_install=hold)
    snapshot = some_snapshot()
    stream = peer.open(snapshot).wait_accepted()
    stream.send_extents(snapshot, stream.missing).send(snapshot.end())
    peer.wait_phase(snapshot, pb.TRANSFER_PHASE_INSTALLING)
    peer.receiver.restart()
    peer.wait_phase(snapshot, pb.TRANSFER_PHASE_INSTALLING)
    stream = peer.open(snapshot).wait_accepted()
    assert stream.accepted.already_installed and not stream.installed
    hold.unlink()
    stream.wait_end()
    assert stream.installed.total_bytes == snapshot.total
    assert peer.receiver.installed(snapshot) == snapshot.files


def test_history_survives(start, snapshot):
    peer = start()
    peer.send_all(snapshot)
    cancelled = some_snapshot()
    peer.send_half(cancelled)
    peer.cancel(cancelled, reason="not needed")
    before = peer.progress(snapshot), peer.progress(cancelled)
    peer.receiver.restart()
    assert (peer.progress(snapshot), peer.progress(cancelled)) == before
    assert len(peer.list().transfers) == 2
    stream = peer.open(snapshot).wait_accepted()
    assert stream.complete(snapshot).already_installed
    peer.open(cancelled).refusal().must_be("TRANSFER_CANCELLED")


@pytest.mark.parametrize("crash", [False, True], ids=["", "after a restart"])
def test_start_anew(start, snapshot, crash):
    """`discard_staged` drops what is staged; content version and manifest may then differ."""
    peer = start()
    peer.send_half(snapshot)
    if crash:
        peer.receiver.restart()
    other = some_snapshot(
        transfer_id=snapshot.transfer_id, target_shard=snapshot.target_shard, content_version="v2"
    )
    stream = peer.open(other, discard_staged=True).wait_accepted()
    assert stream.missing == other.extents()
    stream.complete(other)
    assert peer.receiver.installed(other) == other.files


def test_damaged_staging_is_found_and_asked_for_again(start, snapshot):
    """Bits that flip on the disk after they were acknowledged: found before the install, and only they are sent again."""
    peer = start()
    peer.send_half(snapshot)
    peer.receiver.kill()
    staged = [path for path in peer.receiver.files_of(snapshot) if path.name == "000001.sst"]
    assert len(staged) == 1
    with open(staged[0], "r+b") as file:
        file.seek(100)
        byte = file.read(1)
        file.seek(100)
        file.write(bytes([byte[0] ^ 1]))
    peer.receiver.start()
    stream = peer.open(snapshot).wait_accepted()
    if stream.missing == snapshot.without(snapshot.sent):
        stream.send_extents(snapshot, stream.missing).send(snapshot.end())
        stream.refusal().must_be("STAGED_DATA_DAMAGED")
        stream = peer.open(snapshot).wait_accepted()
    assert stream.missing and {file for file, _, _ in stream.missing} == {0}
    stream.complete(snapshot)
    assert peer.receiver.installed(snapshot) == snapshot.files


def test_many_senders_over_many_kills(start):
    """Eight senders that reconnect by themselves, a receiver that is killed five times: everything arrives, and no byte that was
    acknowledged as durable is ever asked for again."""
    peer = start()
    done, failures, broken = [], [], []
    under_way, no_more_kills = set(), threading.Event()

    def sender(number):
        rng = random.Random(number)
        snapshot = Snapshot({"a": rng.randbytes(2 * MIB), "b/c": rng.randbytes(rng.randrange(MIB)), "empty": b""})
        session, durable = rng.randbytes(16), 0
        for generation in range(1, 500):
            stream = None
            try:
                stream = peer.open(snapshot, attempt=1, session=session, generation=generation).wait_accepted()
                missing = sum(length for _, _, length in stream.missing)
                assert missing <= snapshot.total - durable, "acknowledged bytes are asked for again"
                under_way.add(number)
                if not stream.accepted.already_installed:
                    for extent in stream.missing:
                        stream.send_extents(snapshot, [extent], chunk_bytes=rng.choice([10_000, 100_000, MIB]))
                    # So that each kill finds transfers under way, however fast the machine is.
                    while not no_more_kills.wait(0.01):
                        stream.wait_for(lambda: not stream.ended, "the kills")
                    stream.send(snapshot.end())
                stream.wait_end()
                assert peer.receiver.installed(snapshot) == snapshot.files
                done.append(number)
                return
            except Refused as refused:
                if refused.reason is None:
                    broken.append(number)
                    assert refused.code.name in ("UNAVAILABLE", "CANCELLED", "INTERNAL"), refused
                else:
                    refused.must_be(refused.reason)
                    assert refused.retry_seconds is not None, refused
                time.sleep(0.05)
            finally:
                under_way.discard(number)
                if stream is not None:
                    durable = max([durable, *(ack.durable_bytes for _, ack in stream.acks)])
                    stream.half_close()

    def guarded(number):
        try:
            sender(number)
        except BaseException as error:
            failures.append(error)

    def wait(condition, what):
        until = time.monotonic() + 20
        while not condition() and not failures:
            assert time.monotonic() < until, what
            time.sleep(0.01)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    rng = random.Random(5)
    for _ in range(5):
        wait(lambda: under_way, "nobody is accepted")
        time.sleep(rng.uniform(0, 0.2))
        before = len(broken)
        peer.receiver.restart()
        wait(lambda: len(broken) > before, "the kill broke no stream")
    no_more_kills.set()
    for thread in threads:
        thread.join(40)
    assert not failures, failures[0]
    assert len(done) == 8
