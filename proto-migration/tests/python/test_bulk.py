"""Rows from a source in Python to a node, and from a node to a target in Python, by grpcio and the `.proto` files alone."""

import binascii
import concurrent.futures
import os
import queue
import threading
from collections import defaultdict

import grpc
from awscrt.checksums import crc64nvme
from blake3 import blake3

from process import PATIENCE, common, nodectl, pb, rpc

Request, Response = pb.TransferMigrationDataRequest, pb.TransferMigrationDataResponse
ROWS = {b"key:%d" % number: os.urandom(1 + number * 7 % 3000) for number in range(5000)}
# Larger than a batch of the others, and than an HTTP/2 frame of every peer.
ROWS[b"large"] = os.urandom(300_000)


def slot_of(key):
    return binascii.crc_hqx(key, 0) % 16384


def digests(rows):
    """Of each slot the number of keys, and the sum of their hashes."""
    slots = defaultdict(lambda: [0, 0])
    for key, value in rows.items():
        head = len(key).to_bytes(8, "little") + bytes(8)
        slots[slot_of(key)][0] += 1
        slots[slot_of(key)][1] += int.from_bytes(blake3(head + key + value).digest()[:16], "little")
    numbers = sorted(slots)
    sums = b"".join((slots[slot][1] % 2**128).to_bytes(16, "little") for slot in numbers)
    return pb.SlotDigests(slots=numbers, keys=[slots[slot][0] for slot in numbers], sums=sums)


def batches(rows, size):
    """Bulk frames of about `size` bytes."""
    entries, held, number = [], 0, 0
    rest = list(rows.items())
    for index, (key, value) in enumerate(rest):
        entries.append(Request.Entry(seq=1, key=key, value=value))
        held += len(key) + len(value)
        last = index + 1 == len(rest)
        if held >= size or last:
            number += 1
            payload = Request.Entries(entries=entries).SerializeToString()
            yield Request.Bulk(
                number=number,
                entry_count=len(entries),
                cursor=b"%d" % index,
                last=last,
                crc64nvme=crc64nvme(payload),
                payload=payload,
            )
            entries, held = [], 0


class Source:
    """One stream to a target."""

    def __init__(self, address):
        self.channel = grpc.insecure_channel(address, options=[("grpc.max_receive_message_length", -1)])
        self.frames = queue.Queue()
        call = rpc.MigrationServiceStub(self.channel).TransferMigrationData
        self.answers = call(iter(self.frames.get, None), timeout=PATIENCE)

    def send(self, **frame):
        self.frames.put(Request(**frame))

    def hear(self, kind):
        """The next answer of this kind; acknowledgements come at any time."""
        for answer in self.answers:
            if answer.WhichOneof("frame") == kind:
                return getattr(answer, kind)
            assert answer.WhichOneof("frame") == "ack", answer
        raise AssertionError(f"the stream ended before {kind}")

    def close(self):
        self.frames.put(None)
        self.channel.close()


def test_a_source_in_python_hands_slots_over(start):
    node = start("n2", "none")
    source = Source(node.grpc)
    source.send(
        header=Request.Header(
            migration_id="m1",
            spec=pb.MigrationSpec(
                slots=common.SlotRange(start=0, end=16384),
                source_shard_id="slots-0-16383",
                target_shard_id="slots-0-16383",
                source_node_id="python",
                target_node_id="n2",
            ),
            purpose=Request.PURPOSE_TRANSFER,
            source=common.NodeIdentity(node_id="python", incarnation=1, store_id=bytes(range(16))),
            attempt=1,
            session=os.urandom(16),
            copy=1,
            base_seq=1,
            sent_unix_ms=1,
            supported_features=["crc64nvme"],
        )
    )
    accepted = source.hear("accepted")
    assert (accepted.decision, accepted.known) == (pb.MIGRATION_DECISION_UNDECIDED, False)
    sent, credit, last = 0, accepted.credit_limit, 0
    for batch in batches(ROWS, 400_000):
        assert len(batch.payload) <= accepted.max_batch_bytes
        sent += len(batch.payload)
        while sent > credit:
            credit = source.hear("ack").credit_limit
        source.send(bulk=batch)
        last = batch.number
    while (ack := source.hear("ack")).durable_number < last:
        pass
    assert ack.staged_keys == len(ROWS) and last > 10
    assert node.client().call("GET", "large").startswith("CLUSTERDOWN"), "what is staged is invisible"

    epoch = 2
    source.send(
        prepare=Request.Prepare(freeze=1, final_seq=1, new_slot_epoch=epoch, keys=len(ROWS), digests=digests(ROWS))
    )
    assert source.hear("prepared").freeze == 1
    source.send(commit=Request.Commit(freeze=1, new_slot_epoch=epoch))
    assert source.hear("committed").slot_epoch == epoch
    source.send(forget=Request.Forget())
    source.hear("forgotten")
    source.close()

    client = node.client()
    for key in ROWS:
        client.send("GET", key)
    for value in ROWS.values():
        assert client.reply() == value


class Target(rpc.MigrationServiceServicer):
    """Takes rows until it is told to discard them."""

    def __init__(self):
        self.rows = {}
        self.batches = 0
        self.discarded = threading.Event()

    def TransferMigrationData(self, requests, context):
        header = next(requests).header
        resume = Response.Resume(copy=header.copy, through_seq=header.base_seq)
        accepted = Response.Accepted(
            decision=pb.MIGRATION_DECISION_UNDECIDED,
            known=header.attempt > 1,
            resume=resume if header.purpose == Request.PURPOSE_TRANSFER else None,
            target=common.NodeIdentity(node_id="python", incarnation=1, store_id=bytes(range(16))),
            max_batch_bytes=1 << 20,
            credit_limit=4 << 20,
            idle_timeout_ms=10_000,
            sent_unix_ms=1,
            supported_features=["crc64nvme"],
        )
        yield Response(accepted=accepted)
        number, received, through = 0, 0, header.base_seq
        for request in requests:
            kind = request.WhichOneof("frame")
            if kind == "discard":
                yield Response(discarded=Response.Discarded(staged_bytes=1))
                self.discarded.set()
                return
            if kind in ("bulk", "delta"):
                batch = getattr(request, kind)
                assert crc64nvme(batch.payload) == batch.crc64nvme, "the checksum of a batch"
                entries = Request.Entries.FromString(batch.payload).entries
                assert len(entries) == batch.entry_count
                self.rows.update({entry.key: entry.value for entry in entries})
                assert batch.number == number + 1
                number, received = batch.number, received + len(batch.payload)
                self.batches += kind == "bulk"
                through = batch.through_seq if kind == "delta" else through
            yield Response(
                ack=Response.Ack(
                    received_number=number,
                    durable_number=number,
                    durable_seq=through,
                    credit_limit=received + (4 << 20),
                    staged_keys=len(self.rows),
                    state=pb.MIGRATION_STATE_RECEIVING,
                )
            )


def test_a_target_in_python_takes_what_a_node_has(start):
    node = start("n1", "0-16383")
    client = node.client()
    for key, value in ROWS.items():
        client.send("SET", key, value)
    assert all(client.reply() == "OK" for _ in ROWS)

    target = Target()
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(), options=[("grpc.max_receive_message_length", -1)])
    rpc.add_MigrationServiceServicer_to_server(target, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        to = f"python=127.0.0.1:{port}"
        nodectl("migrate", "start", "--from", node.grpc, "--to", to, "--slots", "0-16383", "--id", "m1", "--manual")
        migrations = rpc.MigrationServiceStub(grpc.insecure_channel(node.grpc))
        watched = migrations.WatchMigrationProgress(pb.WatchMigrationProgressRequest(migration_id="m1"), timeout=PATIENCE)
        for told in watched:
            assert told.migration.state != pb.MIGRATION_STATE_FAILED, told
            if told.migration.state == pb.MIGRATION_STATE_READY:
                break
        assert target.rows == ROWS and target.batches > 10
        nodectl("migrate", "cancel", "--at", node.grpc, "m1")
        assert target.discarded.wait(PATIENCE)
    finally:
        server.stop(None).wait()
    assert client.call("GET", "large") == ROWS[b"large"], "the source has the slots"
