"""Code for the .proto files, generated anew in every run, and the contract that their comments hold."""

import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parents[3]
SNAPSHOT_PROTO = "node/snapshot/v1/snapshot.proto"
COMMON_PROTO = "node/common/v1/common.proto"
_INCLUDES = [ROOT / "proto-snapshot/proto", ROOT / "proto-common/proto"]

_out = tempfile.TemporaryDirectory(prefix="stubs-")
_args = [f"-I{path}" for path in _INCLUDES] + [f"--python_out={_out.name}", f"--grpc_python_out={_out.name}"]
if protoc.main(["protoc", *_args, COMMON_PROTO, SNAPSHOT_PROTO]) != 0:
    raise SystemExit("the .proto files do not compile")
sys.path.insert(0, _out.name)

from node.common.v1 import common_pb2 as common  # noqa: E402, F401
from node.snapshot.v1 import snapshot_pb2 as pb  # noqa: E402, F401
from node.snapshot.v1 import snapshot_pb2_grpc as rpc  # noqa: E402, F401

Request = pb.TransferSplitSnapshotRequest
Response = pb.TransferSplitSnapshotResponse


@dataclass(frozen=True)
class Row:
    """One row of the error table: what a refusal for this reason must look like."""

    code: grpc.StatusCode
    retry: bool
    metadata: frozenset


def _read_table():
    rows = {}
    for line in (_INCLUDES[0] / SNAPSHOT_PROTO).read_text().splitlines():
        found = re.fullmatch(r"// \| (.+) \| ([A-Z_]+)(, retry)? \| ([A-Z_]+) \|", line)
        if found:
            violation, code, retry, reason = found.groups()
            _, _, after = violation.partition("metadata ")
            keys = frozenset(re.findall(r"`(\w+)`", after))
            rows[reason] = Row(grpc.StatusCode[code], retry is not None, keys)
    assert len(rows) > 30, "the error table of the .proto file"
    return rows


CONTRACT = _read_table()
