"""The example node and `nodectl` as processes, and the code for the `.proto` files, generated anew in every run."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parents[3]
BINARIES = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "debug"
PATIENCE = 20  # seconds for anything that should take none

_out = tempfile.TemporaryDirectory(prefix="stubs-")
_args = [f"-I{ROOT / crate / 'proto'}" for crate in ("proto-common", "proto-migration")]
_args += [f"--python_out={_out.name}", f"--grpc_python_out={_out.name}"]
if protoc.main(["protoc", *_args, "node/common/v1/common.proto", "node/migration/v1/migration.proto"]) != 0:
    raise SystemExit("the .proto files do not compile")
sys.path.insert(0, _out.name)

from node.common.v1 import common_pb2 as common  # noqa: E402, F401
from node.migration.v1 import migration_pb2 as pb  # noqa: E402, F401
from node.migration.v1 import migration_pb2_grpc as rpc  # noqa: E402, F401


class Node:
    def __init__(self, directory, name, slots):
        words = [BINARIES / "node", "serve", "--id", name, "--slots", slots, "--data", directory]
        words += ["--grpc", "127.0.0.1:0", "--resp", "127.0.0.1:0"]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        watchdog = threading.Timer(PATIENCE, self.process.kill)
        watchdog.start()
        line = self.process.stdout.readline()
        watchdog.cancel()
        told = dict(word.split("=", 1) for word in line.split() if "=" in word)
        assert "grpc" in told, f"the node did not start: {line!r}"
        self.grpc, self.resp = told["grpc"], told["resp"]

    def stop(self):
        self.process.kill()
        self.process.wait(10)
        self.process.stdout.close()

    def client(self):
        return Redis(self.resp)


class Redis:
    """As much of a Redis client as is needed here."""

    def __init__(self, address):
        host, port = address.rsplit(":", 1)
        self.socket = socket.create_connection((host, int(port)), PATIENCE)
        self.file = self.socket.makefile("rb")

    def call(self, *words):
        """The reply, an error as text."""
        self.send(*words)
        return self.reply()

    def send(self, *words):
        words = [word if isinstance(word, bytes) else str(word).encode() for word in words]
        request = b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)
        self.socket.sendall(b"*%d\r\n%s" % (len(words), request))

    def reply(self):
        line = self.file.readline().rstrip(b"\r\n")
        kind, rest = line[:1], line[1:]
        if kind != b"$":
            return rest.decode()
        if rest == b"-1":
            return None
        value = self.file.read(int(rest))
        self.file.read(2)
        return value


def nodectl(*words):
    """What `nodectl --json` prints."""
    words = [BINARIES / "nodectl", *(str(word) for word in words), "--json"]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
