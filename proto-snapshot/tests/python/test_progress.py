"""Get, Watch, List and Cancel."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from peer import PATIENCE, Refused, Snapshot, some_snapshot
from stubs import common, pb


# ---- Get and Watch.


BAD_IDS = {"empty": "", "leading dot": ".x", "129 bytes": "x" * 129, "slash": "a/b", "escape": "\x1b[2J"}


def call(peer, method, transfer_id, **fields):
    """One unary or streamed call with just an ID."""
    if method == "Watch":
        return next(peer.watch(transfer_id))
    request = {"Get": pb.GetTransferProgressRequest, "Cancel": pb.CancelTransferRequest}[method]
    name = {"Get": "GetTransferProgress", "Cancel": "CancelTransfer"}[method]
    return peer._call(name, request(transfer_id=transfer_id, **fields))


@pytest.mark.parametrize("method", ["Get", "Watch", "Cancel"])
@pytest.mark.parametrize("bad", BAD_IDS)
def test_bad_id(peer, method, bad):
    with pytest.raises(Refused) as refused:
        call(peer, method, BAD_IDS[bad])
    refused.value.must_be("INVALID_ID", "transfer_id")


@pytest.mark.parametrize("method", ["Get", "Watch", "Cancel"])
def test_unknown_id(peer, method):
    with pytest.raises(Refused) as refused:
        call(peer, method, "t-never-seen")
    refused.value.must_be("TRANSFER_NOT_FOUND")
    assert "t-never-seen" in refused.value.message


@pytest.mark.parametrize("method", ["Get", "Cancel"])
def test_direction(peer, snapshot, method):
    peer.send_half(snapshot)
    with pytest.raises(Refused) as refused:
        call(peer, method, snapshot.transfer_id, direction=common.DIRECTION_OUT)
    refused.value.must_be("TRANSFER_NOT_FOUND")
    with pytest.raises(Refused) as refused:
        call(peer, method, snapshot.transfer_id, direction=7)
    refused.value.must_be("INVALID_FIELD", "direction")
    assert call(peer, method, snapshot.transfer_id, direction=common.DIRECTION_IN)


@pytest.mark.parametrize("method", ["GetTransferProgress", "WatchTransferProgress", "ListTransfers", "CancelTransfer"])
def test_requests_that_are_refused_before_they_are_read(peer, method):
    """The transport ends these by itself; they have details all the same."""
    path = f"/node.snapshot.v1.SplitSnapshotService/{method}"
    streamed = method == "WatchTransferProgress"
    send = (peer.shared.unary_stream if streamed else peer.shared.unary_unary)(path)

    def refused(data, **options):
        with pytest.raises(grpc.RpcError) as raised:
            answer = send(data, timeout=PATIENCE, **options)
            next(answer) if streamed else answer
        return Refused(raised.value)

    # An unknown field, so that nothing but the size is wrong.
    large = b"\xfa\x01" + bytes([0x80, 0x80, 0x80, 0x04]) + bytes(8 << 20)
    refused(large).must_be("CHUNK_TOO_LARGE", max_message_bytes=4 << 20)
    compressed = refused(b"\x0a\x01t", compression=grpc.Compression.Gzip)
    compressed.must_be("UNSUPPORTED_COMPRESSION", encoding="gzip")
    refused(b"\xff" * 20).must_be("UNKNOWN_FRAME")


def test_watch_from_beginning_to_end(peer, snapshot):
    stream = peer.open(snapshot).wait_accepted()
    watch = peer.watch(snapshot.transfer_id)
    assert next(watch).phase == pb.TRANSFER_PHASE_TRANSFERRING, "the current state at once"
    stream.complete(snapshot)
    states = list(watch)
    assert states[-1] == peer.progress(snapshot), "the last state is always delivered, then the watch ends"
    assert states[-1].phase == pb.TRANSFER_PHASE_INSTALLED
    done = [state.progress.bytes_done for state in states]
    assert done == sorted(done)


def test_watch_is_paced(peer):
    """Attempts come faster than states may."""
    snapshot = Snapshot({"f": bytes(100_000)})
    peer.open(snapshot).wait_accepted()
    watch = peer.watch(snapshot.transfer_id)
    next(watch)
    began = time.monotonic()
    for _ in range(100):
        stream = peer.open(snapshot).wait_accepted()
    stream.complete(snapshot)
    seconds = time.monotonic() - began
    states = list(watch)
    assert len(states) <= seconds / 0.1 + 3, f"{len(states)} states in {seconds:.1f} s"
    assert (states[-1].phase, states[-1].attempt) == (pb.TRANSFER_PHASE_INSTALLED, stream.attempt)


@pytest.mark.parametrize("end", ["installed", "cancelled"])
def test_watch_of_what_has_ended(peer, snapshot, end):
    if end == "installed":
        peer.send_all(snapshot)
    else:
        peer.send_half(snapshot)
        peer.cancel(snapshot)
    states = list(peer.watch(snapshot.transfer_id))
    assert [state.phase for state in states] == [pb.TransferPhase.Value(f"TRANSFER_PHASE_{end.upper()}")]


def test_watch_ends_with_a_cancel(peer, snapshot):
    peer.send_half(snapshot)
    watch = peer.watch(snapshot.transfer_id)
    assert next(watch).phase == pb.TRANSFER_PHASE_INTERRUPTED
    peer.cancel(snapshot, reason="enough")
    last = list(watch)[-1]
    assert last.phase == pb.TRANSFER_PHASE_CANCELLED and "enough" in last.progress.error.message


def test_watch_goes_on_over_an_interruption(peer, snapshot):
    stream = peer.open(snapshot).wait_accepted()
    watch = peer.watch(snapshot.transfer_id)
    next(watch)
    stream.half_close().refusal()
    assert next(state for state in watch if state.phase == pb.TRANSFER_PHASE_INTERRUPTED).HasField("expires_unix_ms")
    peer.finish(snapshot)
    assert list(watch)[-1].phase == pb.TRANSFER_PHASE_INSTALLED


# ---- List.


def test_list(start):
    peer = start()
    ended = [some_snapshot() for _ in range(3)]
    for snapshot in ended:
        peer.send_all(snapshot)
    active = [some_snapshot() for _ in range(4)]
    for snapshot in active:
        peer.send_half(snapshot)
    expected = [snapshot.transfer_id for snapshot in active + ended[::-1]]

    assert [transfer.transfer_id for transfer in peer.list().transfers] == expected
    assert [transfer.transfer_id for transfer in peer.list(active_only=True).transfers] == expected[:4]
    assert len(peer.list(direction=common.DIRECTION_IN).transfers) == 7
    assert len(peer.list(direction=common.DIRECTION_OUT).transfers) == 0
    assert len(peer.list(page_size=2**32 - 1).transfers) == 7
    for size in (1, 2, 3, 7, 8):
        seen, token = [], ""
        for _ in range(10):
            page = peer.list(page_size=size, page_token=token)
            assert len(page.transfers) <= size
            seen += [transfer.transfer_id for transfer in page.transfers]
            token = page.next_page_token
            if not token:
                break
        assert seen == expected


BAD_TOKENS = ["x", "0", "0.0.0.0", "-1", "1.2.3.4.5", "\x1b", "ü" * 1000, "f" * 5000]


@pytest.mark.parametrize("token", BAD_TOKENS, ids=range(len(BAD_TOKENS)))
def test_bad_page_token(peer, token):
    with pytest.raises(Refused) as refused:
        peer.list(page_token=token)
    refused.value.must_be("INVALID_FIELD", "page_token")


def test_page_token_of_an_earlier_process(start):
    peer = start()
    for _ in range(2):
        peer.send_half(some_snapshot())
    token = peer.list(page_size=1).next_page_token
    peer.receiver.restart()
    with pytest.raises(Refused) as refused:
        peer.list(page_token=token)
    refused.value.must_be("INVALID_FIELD", "page_token")


def test_bad_direction_of_a_list(peer):
    with pytest.raises(Refused) as refused:
        peer.list(direction=9)
    refused.value.must_be("INVALID_FIELD", "direction")


# ---- Cancel.


def nothing_is_left(peer, snapshot):
    """Removal may go on in the background, but not for long."""
    until = time.monotonic() + PATIENCE
    while left := peer.receiver.files_of(snapshot):
        assert time.monotonic() < until, left
        time.sleep(0.02)


def cancel_and_check(peer, snapshot):
    transfer = peer.cancel(snapshot, reason="no longer needed\x1b[2J" + "!" * 1000)
    assert transfer.phase == pb.TRANSFER_PHASE_CANCELLED
    assert transfer.progress.HasField("finished_unix_ms") and not transfer.HasField("expires_unix_ms")
    error = transfer.progress.error
    assert error.reason == "TRANSFER_CANCELLED" and error.code == 1
    assert "no longer needed" in error.message and error.message.isprintable() and len(error.message) < 320
    assert peer.progress(snapshot) == transfer
    assert peer.cancel(snapshot) == transfer, "cancelling a cancelled transfer succeeds"
    nothing_is_left(peer, snapshot)
    peer.open(snapshot).refusal().must_be("TRANSFER_CANCELLED")
    peer.open(snapshot, discard_staged=True).refusal().must_be("TRANSFER_CANCELLED")
    assert peer.receiver.installed(snapshot) == {}


def test_cancel_while_the_manifest_comes(peer, snapshot):
    """Nothing is known of it yet, and it goes on."""
    stream = peer.open(snapshot, pages=[snapshot.pages(per_page=2)[0]])
    with pytest.raises(Refused) as refused:
        peer.cancel(snapshot)
    refused.value.must_be("TRANSFER_NOT_FOUND")
    stream.send(snapshot.pages(per_page=2)[1]).wait_accepted().complete(snapshot)


def test_cancel_while_transferring(peer, snapshot):
    stream = peer.open(snapshot).wait_accepted()
    stream.send_extents(snapshot, snapshot.half()).wait_received()
    cancel_and_check(peer, snapshot)
    stream.refusal().must_be("TRANSFER_CANCELLED")


def test_cancel_while_chunks_flow(peer):
    snapshot = Snapshot({"f": bytes(30_000_000)})
    stream = peer.open(snapshot).wait_accepted()
    with pytest.raises(Refused) as refused:
        stream.send_extents(snapshot, [(0, 0, 1_000_000)], chunk_bytes=10_000)
        peer.cancel(snapshot)
        stream.send_extents(snapshot, [(0, 1_000_000, 29_000_000)])
        stream.wait_end()
    refused.value.must_be("TRANSFER_CANCELLED")
    cancel = peer.progress(snapshot)
    assert cancel.phase == pb.TRANSFER_PHASE_CANCELLED
    nothing_is_left(peer, snapshot)


def test_cancel_while_interrupted(peer, snapshot):
    peer.send_half(snapshot)
    assert peer.progress(snapshot).phase == pb.TRANSFER_PHASE_INTERRUPTED
    cancel_and_check(peer, snapshot)


def test_many_cancel_at_once(peer):
    """All of them hear that it is cancelled, when it is."""
    snapshot = Snapshot({f"d{n}/f": os.urandom(2000) for n in range(200)})
    stream = peer.open(snapshot).wait_accepted()
    stream.send_extents(snapshot, snapshot.half())
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: peer.cancel(snapshot), range(16)))
    assert {answer.phase for answer in answers} == {pb.TRANSFER_PHASE_CANCELLED}
    stream.refusal().must_be("TRANSFER_CANCELLED")
    nothing_is_left(peer, snapshot)


def test_cancel_after_a_failure(peer, snapshot):
    stream = peer.open(snapshot).wait_accepted()
    stream.send(snapshot.end()).refusal().must_be("MISSING_EXTENTS")
    assert peer.progress(snapshot).phase == pb.TRANSFER_PHASE_FAILED
    cancel_and_check(peer, snapshot)


def test_cancel_after_a_crash(start, snapshot):
    peer = start()
    peer.send_half(snapshot)
    peer.receiver.restart()
    cancel_and_check(peer, snapshot)
    peer.receiver.restart()
    peer.open(snapshot).refusal().must_be("TRANSFER_CANCELLED")


def test_cancel_while_installing(start, tmp_path, snapshot):
    hold = tmp_path / "hold"
    hold.touch()
    peer = start(hold_install=hold)
    stream = peer.open(snapshot).wait_accepted()
    stream.send_extents(snapshot, stream.missing).send(snapshot.end())
    peer.wait_phase(snapshot, pb.TRANSFER_PHASE_INSTALLING)
    for _ in range(2):
        with pytest.raises(Refused) as refused:
            peer.cancel(snapshot)
        refused.value.must_be("TOO_LATE_TO_CANCEL", phase="TRANSFER_PHASE_INSTALLING")
        peer.receiver.restart()
        peer.wait_phase(snapshot, pb.TRANSFER_PHASE_INSTALLING)
    hold.unlink()
    peer.wait_phase(snapshot, pb.TRANSFER_PHASE_INSTALLED)
    assert peer.receiver.installed(snapshot) == snapshot.files


@pytest.mark.parametrize("crash", [False, True], ids=["", "after a restart"])
def test_cancel_when_installed(start, snapshot, crash):
    peer = start()
    peer.send_all(snapshot)
    if crash:
        peer.receiver.restart()
    with pytest.raises(Refused) as refused:
        peer.cancel(snapshot)
    refused.value.must_be("TOO_LATE_TO_CANCEL", phase="TRANSFER_PHASE_INSTALLED")
    assert peer.receiver.installed(snapshot) == snapshot.files


def test_cancel_races_with_the_end(peer):
    """Whoever wins, all agree: installed and refused, or cancelled and gone."""
    outcomes = set()
    for _ in range(20):
        snapshot = some_snapshot()
        stream = peer.open(snapshot).wait_accepted()
        stream.send_extents(snapshot, stream.missing).send(snapshot.end())
        try:
            cancelled = peer.cancel(snapshot)
            assert cancelled.phase == pb.TRANSFER_PHASE_CANCELLED
            stream.refusal().must_be("TRANSFER_CANCELLED")
            nothing_is_left(peer, snapshot)
            outcomes.add("cancelled")
        except Refused as refused:
            refused.must_be("TOO_LATE_TO_CANCEL")
            stream.wait_end()
            assert stream.installed and peer.receiver.installed(snapshot) == snapshot.files
            outcomes.add("installed")
    assert outcomes
