"""One receiver with default limits for most tests, and others on demand."""

import pytest

import stubs  # noqa: F401  (first: it makes the generated code importable)
from peer import Peer, some_snapshot
from receiver import Receiver


@pytest.fixture(scope="session")
def shared_receiver(tmp_path_factory):
    receiver = Receiver(tmp_path_factory.mktemp("receiver"), node_id="receiver").start()
    yield receiver
    assert receiver.alive(), "the receiver died on the way"
    assert receiver.terminate() == 0, "SIGTERM ends it cleanly"


@pytest.fixture
def peer(shared_receiver):
    """A sender to the shared receiver; transfers and shards have names of their own in each test."""
    peer = Peer(shared_receiver)
    yield peer
    peer.close()


@pytest.fixture
def start(tmp_path):
    """Starts a receiver with options of its own; returns a sender to it."""
    peers = []

    def start(**options):
        peers.append(Peer(Receiver(tmp_path / f"receiver-{len(peers)}", **options).start()))
        return peers[-1]

    yield start
    for peer in peers:
        peer.close()
        peer.receiver.stop()


@pytest.fixture
def snapshot():
    return some_snapshot()
