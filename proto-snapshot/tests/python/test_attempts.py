"""Who may send: attempts, sessions, generations."""

import os
import threading

import pytest

from peer import PATIENCE, some_snapshot
from stubs import pb


def test_a_higher_attempt_takes_over(peer, snapshot):
    first = peer.open(snapshot).wait_accepted()
    first.send_extents(snapshot, snapshot.half()).wait_received()
    second = peer.open(snapshot).wait_accepted()
    assert second.attempt == first.attempt + 1
    first.refusal().must_be("SUPERSEDED", attempt=second.attempt)
    assert second.missing == snapshot.without(snapshot.sent), "what the first one brought counts"
    # It comes back all the same, with what it had.
    again = peer.open(snapshot, attempt=first.attempt, session=first.session, generation=2)
    again.refusal().must_be("SUPERSEDED", attempt=second.attempt)
    second.complete(snapshot)
    assert peer.receiver.installed(snapshot) == snapshot.files


REFUSED = {
    "a lower attempt": dict(attempt=2),
    "the same attempt, another session": dict(attempt=3, session=os.urandom(16), generation=9),
    "the same generation": dict(attempt=3, generation=5),
    "a lower generation": dict(attempt=3, generation=4),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("connected", [True, False], ids=["while connected", "while interrupted"])
def test_superseded(peer, snapshot, case, connected):
    session = os.urandom(16)
    stream = peer.open(snapshot, attempt=3, session=session, generation=5).wait_accepted()
    stream.send_extents(snapshot, snapshot.half()).wait_received()
    if not connected:
        stream.half_close().refusal().must_be("STREAM_ENDED_EARLY")
    peer.open(snapshot, **({"session": session} | REFUSED[case])).refusal().must_be("SUPERSEDED", attempt=3)
    if connected:
        stream.send_extents(snapshot, snapshot.without(snapshot.sent)).send(snapshot.end()).wait_end()
        assert stream.installed, "the refused one did not disturb it"
    else:
        peer.finish(snapshot)


def test_reconnecting_with_the_next_generation(peer, snapshot):
    session = os.urandom(16)
    first = peer.open(snapshot, attempt=1, session=session).wait_accepted()
    first.send_extents(snapshot, snapshot.half()).wait_received()
    second = peer.open(snapshot, attempt=1, session=session, generation=2).wait_accepted()
    first.refusal().must_be("STREAM_ENDED_EARLY")
    assert second.missing == snapshot.without(snapshot.sent)
    second.complete(snapshot)
    assert peer.progress(snapshot).attempt == 1
    assert peer.progress(snapshot).connections == 2


def test_attempts_may_leave_gaps(peer, snapshot):
    peer.send_half(snapshot)
    peer.open(snapshot, attempt=2**64 - 2).wait_accepted()
    assert peer.progress(snapshot).attempt == 2**64 - 2
    stream = peer.open(snapshot).wait_accepted()
    assert stream.attempt == 2**64 - 1
    stream.complete(snapshot)


def test_two_senders_at_once(peer, snapshot):
    """Both read the same attempt and claim the next one: one wins, the other is told why."""
    barrier = threading.Barrier(2)
    results = []

    def sender():
        mine = snapshot.again()
        channel = peer.channel()
        barrier.wait(PATIENCE)
        stream = peer.open(mine, attempt=1, channel=channel)
        try:
            results.append(stream.wait_accepted().complete(mine))
        except Exception as error:
            results.append(error)

    threads = [threading.Thread(target=sender) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    lost = [result for result in results if isinstance(result, Exception)]
    won = [result for result in results if not isinstance(result, Exception)]
    assert len(won) >= 1 and len(results) == 2, results
    for refused in lost:
        refused.must_be("SUPERSEDED", attempt=1)
    assert not lost or not won[0].already_installed
    assert peer.receiver.installed(snapshot) == snapshot.files


def test_many_senders_take_turns(peer, snapshot):
    """Each claims the next attempt and ends the one before; the last one wins."""
    streams = []
    for attempt in range(1, 11):
        streams.append(peer.open(snapshot, attempt=attempt))
    for stream in streams[:-1]:
        stream.refusal().must_be("SUPERSEDED")
    streams[-1].wait_accepted().complete(snapshot)


def test_the_last_ack_of_a_superseded_sender_is_true(peer, snapshot):
    """What a stream was told is received is not asked for again by the next attempt."""
    for n in range(5):
        stream = peer.open(snapshot).wait_accepted()
        extents = [(0, n * 10_000, 5_000)]
        stream.send_extents(snapshot, extents).wait_received()
        peer.open(snapshot).wait_accepted().half_close().refusal().must_be("STREAM_ENDED_EARLY")
        stream.refusal().must_be("SUPERSEDED")
    peer.finish(snapshot)


def test_attempt_is_known_as_soon_as_it_is_claimed(peer, snapshot):
    stream = peer.open(snapshot, attempt=7).wait_accepted()
    transfer = peer.progress(snapshot)
    assert transfer.attempt == 7 and transfer.phase == pb.TRANSFER_PHASE_TRANSFERRING
    stream.complete(snapshot)


def test_reconnecting_while_it_is_installed(start, tmp_path):
    """The connection breaks after `End`: the sender asks again and hears of the same install."""
    hold = tmp_path / "hold"
    hold.touch()
    peer = start(hold_install=hold)
    snapshot = some_snapshot()
    first = peer.open(snapshot).wait_accepted()
    first.send_extents(snapshot, first.missing).send(snapshot.end())
    peer.wait_phase(snapshot, pb.TRANSFER_PHASE_INSTALLING)
    first.cancel()
    second = peer.open(snapshot).wait_accepted()
    assert second.accepted.already_installed
    second.wait_for(lambda: second.acks, "a sign of life")
    assert second.last_ack.phase == pb.TRANSFER_PHASE_INSTALLING
    hold.unlink()
    second.wait_end()
    assert second.installed.total_bytes == snapshot.total
    assert peer.receiver.installed(snapshot) == snapshot.files


def test_the_owner_refuses(start, tmp_path, snapshot):
    refuse = tmp_path / "refuse"
    refuse.touch()
    peer = start(refuse_install=refuse)
    stream = peer.open(snapshot).wait_accepted()
    stream.send_extents(snapshot, stream.missing).send(snapshot.end())
    refused = stream.refusal().must_be("INSTALL_REFUSED")
    assert "this snapshot is not wanted" in refused.message
    transfer = peer.wait_phase(snapshot, pb.TRANSFER_PHASE_FAILED)
    assert transfer.progress.error.reason == "INSTALL_REFUSED"
    assert peer.receiver.installed(snapshot) == {}
