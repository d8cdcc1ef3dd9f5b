"""The other direction: our sender, to a server that grpcio and the .proto file make."""

import random
import subprocess
from concurrent import futures

import grpc
import pytest
from awscrt.checksums import crc64nvme
from google.rpc import error_details_pb2, status_pb2

from receiver import EXAMPLES
from stubs import Response, common, pb, rpc

KIB = 1 << 10
MIB = 1 << 20
PATIENCE = 20  # seconds for anything that should take none


def refuse(context, code, reason, message):
    """Ends a call as the contract says: with the reason in the details."""
    status = status_pb2.Status(code=code.value[0], message=message)
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain="node.v1"))
    context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
    context.abort(code, message)


class Server(rpc.SplitSnapshotServiceServicer):
    """Keeps in memory what it is sent, and holds the sender to the contract."""

    def __init__(self, chunk_bytes=MIB, credit=4 * MIB, break_after=None):
        self.chunk_bytes, self.credit = chunk_bytes, credit
        # Ends the first stream when it has so many bytes.
        self.break_after = break_after
        self.files, self.have, self.headers, self.chunks = {}, {}, [], []
        self.wrong = None
        self._server = grpc.server(futures.ThreadPoolExecutor(4))
        rpc.add_SplitSnapshotServiceServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def stop(self):
        self._server.stop(None).wait(PATIENCE)

    def GetTransferProgress(self, request, context):
        refuse(context, grpc.StatusCode.NOT_FOUND, "TRANSFER_NOT_FOUND", "no such transfer is known here")

    def TransferSplitSnapshot(self, frames, context):
        try:
            yield from self._transfer(frames, context)
        except AssertionError as wrong:
            self.wrong = wrong
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"not as in the contract: {wrong}")

    def _transfer(self, frames, context):
        header = next(frames).header
        self.headers.append(header)
        manifest, last = [], False
        while not last:
            page = next(frames).manifest
            manifest += page.files
            last = page.last
        assert len(manifest) == header.file_count
        assert sum(len(file.name.encode()) for file in manifest) == header.name_bytes
        have = [self.have.setdefault(file.name, 0) for file in manifest]
        for file in manifest:
            self.files.setdefault(file.name, bytearray(file.size))
        durable = sum(have)
        yield Response(
            accepted=Response.Accepted(
                missing=[
                    Response.Extent(file=number, offset=at, length=file.size - at)
                    for number, (file, at) in enumerate(zip(manifest, have))
                    if file.size > at
                ],
                last=True,
                max_chunk_bytes=self.chunk_bytes,
                credit_limit=self.credit,
                idle_timeout_ms=30_000,
                max_lanes=1,
                durable_bytes=durable,
                receiver=common.NodeIdentity(node_id="python"),
                supported_features=["crc64nvme"],
            )
        )
        received, granted, totals = 0, self.credit, []
        for frame in frames:
            kind = frame.WhichOneof("frame")
            if kind == "heartbeat":
                continue
            if kind == "end":
                totals += frame.end.files
                if not frame.end.last:
                    continue
                assert frame.end.file_count == len(manifest)
                assert frame.end.total_bytes == sum(file.size for file in manifest)
                break
            assert kind == "chunk", kind
            chunk = frame.chunk
            assert crc64nvme(chunk.payload) == chunk.crc64nvme, "the checksum of a chunk"
            assert 0 < len(chunk.payload) <= self.chunk_bytes, "the limit of Accepted"
            received += len(chunk.payload)
            assert received <= granted, "the credit"
            file = manifest[chunk.file]
            assert self.have[file.name] == chunk.offset, "what is missing, in order"
            self.files[file.name][chunk.offset : chunk.offset + len(chunk.payload)] = chunk.payload
            self.have[file.name] += len(chunk.payload)
            self.chunks.append(len(chunk.payload))
            if self.break_after is not None and received >= self.break_after:
                self.break_after = None
                context.abort(grpc.StatusCode.UNAVAILABLE, "the server goes away for a moment")
            if granted - received >= self.chunk_bytes:
                continue
            granted = received + self.credit
            yield Response(
                ack=Response.Ack(
                    received_bytes=received,
                    durable_bytes=durable + received,
                    credit_limit=granted,
                    phase=pb.TRANSFER_PHASE_TRANSFERRING,
                )
            )
        for number, (total, file) in enumerate(zip(totals, manifest, strict=True)):
            content = self.files[file.name]
            assert (total.file, total.size) == (number, len(content))
            assert total.crc64nvme == crc64nvme(bytes(content)), "the checksum of a file"
        yield Response(
            installed=Response.Installed(
                total_bytes=sum(file.size for file in manifest), file_count=len(manifest), installed_unix_ms=1
            )
        )

    @property
    def contents(self):
        return {name: bytes(content) for name, content in self.files.items()}


@pytest.fixture
def serve():
    servers = []

    def serve(**options):
        servers.append(Server(**options))
        return servers[-1]

    yield serve
    for server in servers:
        server.stop()
        assert server.wrong is None, server.wrong


def send(path, server, *options):
    sender = [EXAMPLES / "sender", path, server.address, "--give-up-ms", "10000", *options]
    done = subprocess.run(sender, capture_output=True, text=True, timeout=2 * PATIENCE)
    assert done.returncode == 0, done.stderr
    return done.stdout


def write(directory, sizes):
    contents = {}
    for name, size in sizes.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        contents[name] = random.Random(size).randbytes(size)
        path.write_bytes(contents[name])
    return contents


@pytest.mark.parametrize("chunk_bytes", [MIB, 100_003, KIB])
def test_a_standard_server_gets_every_byte(serve, tmp_path, chunk_bytes):
    server = serve(chunk_bytes=chunk_bytes, credit=max(4 * chunk_bytes, 64 * KIB))
    largest = 10 * MIB + 11 if chunk_bytes > KIB else 5_000
    contents = write(tmp_path, {"a/1.sst": largest, "a/2.sst": 65_536, "b": 1, "empty": 0})
    said = send(tmp_path, server)
    assert said == f"installed {sum(map(len, contents.values()))} bytes in 4 files\n"
    assert server.contents == contents
    assert server.headers[0].source_node_id == "sender"


def test_a_sender_goes_on_where_a_standard_server_broke_off(serve, tmp_path):
    server = serve(break_after=3 * MIB)
    contents = write(tmp_path, {"one": 8 * MIB + 1})
    send(tmp_path, server)
    assert server.contents == contents
    assert len(server.headers) == 2, "it broke off once"
    assert sum(server.chunks) == 8 * MIB + 1, "no byte was sent twice"
