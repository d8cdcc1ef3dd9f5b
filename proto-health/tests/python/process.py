"""The example node as a process, and clients of it: the standard one, and one made of our `.proto` files."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parents[3]
BINARY = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "debug/examples/node"
# A call that is answered at all is answered in milliseconds.
PATIENCE = 20

_out = tempfile.TemporaryDirectory(prefix="stubs-")
_args = [f"-I{ROOT / crate / 'proto'}" for crate in ("proto-common", "proto-health")]
_args += [f"--python_out={_out.name}", f"--grpc_python_out={_out.name}"]
if protoc.main(["protoc", *_args, "node/common/v1/common.proto", "node/health/v1/health.proto"]) != 0:
    raise SystemExit("the .proto files do not compile")
sys.path.insert(0, _out.name)

from node.health.v1 import health_pb2 as ours  # noqa: E402
from node.health.v1 import health_pb2_grpc as our_rpc  # noqa: E402

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Node:
    """A node in the state STARTING, on a free port."""

    def start(self):
        self.process = subprocess.Popen([BINARY, "127.0.0.1:0", "n1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        line = self._line()
        assert line.startswith("listening on "), f"the node did not start: {line!r}"
        self.address = line.removeprefix("listening on ").strip()
        self.channel = grpc.insecure_channel(self.address)
        self.standard = health_pb2_grpc.HealthStub(self.channel)
        self.health = our_rpc.HealthServiceStub(self.channel)
        return self

    def _line(self):
        watchdog = threading.Timer(PATIENCE, self.process.kill)
        watchdog.start()
        line = self.process.stdout.readline()
        watchdog.cancel()
        return line

    def tell(self, *commands):
        """Changes something about it; returns when it is done."""
        for command in commands:
            self.process.stdin.write(command + "\n")
            self.process.stdin.flush()
            assert self._line() == "ok\n", command

    def check(self, service=""):
        return self.standard.Check(health_pb2.HealthCheckRequest(service=service), timeout=PATIENCE).status

    def list(self):
        statuses = self.standard.List(health_pb2.HealthListRequest(), timeout=PATIENCE).statuses
        return {name: answer.status for name, answer in statuses.items()}

    def watch(self, service=""):
        return self.standard.Watch(health_pb2.HealthCheckRequest(service=service), timeout=3 * PATIENCE)

    def report(self, service=""):
        request = ours.HealthCheckRequest(service=service)
        return self.health.HealthCheck(request, timeout=PATIENCE).health

    def probe(self, service):
        """As Kubernetes does it: a new connection, one call, a second of patience. Whether it passes."""
        with grpc.insecure_channel(self.address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            try:
                return stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=1).status == SERVING
            except grpc.RpcError:
                return False

    def terminate(self):
        self.process.send_signal(signal.SIGTERM)

    def wait(self):
        return self.process.wait(PATIENCE)

    def stop(self):
        self.channel.close()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(PATIENCE)
        self.process.stdin.close()
        self.process.stdout.close()
