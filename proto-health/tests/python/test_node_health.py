"""Our own protocol from another language."""

import grpc
import pytest

from process import PATIENCE, ours


def reason(error):
    """The reason in the `google.rpc` details."""
    from google.rpc import error_details_pb2, status_pb2

    trailers = dict(error.trailing_metadata())
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info) and info.domain == "node.v1"
    return info.reason


def test_heartbeats_then_the_last_frame(node):
    node.tell("running", "add raft critical")
    request = ours.WatchHealthRequest()
    setattr(request, "from", "n2")
    request.heartbeat_ms = 100
    watch = node.health.WatchHealth(request, timeout=3 * PATIENCE)
    first = next(watch)
    assert first.health.status == ours.HEALTH_STATUS_HEALTHY
    assert first.origin.identity.node_id == "n1" and first.origin.state == ours.NODE_STATE_RUNNING
    beats = [next(watch) for _ in range(3)]
    assert all(not beat.HasField("health") for beat in beats)
    sequences = [frame.origin.sequence for frame in [first, *beats]]
    assert sequences == sorted(set(sequences))
    node.terminate()
    frames = list(watch)
    assert frames[-1].last_frame and frames[-1].origin.state == ours.NODE_STATE_SHUTTING_DOWN
    assert ours.NODE_STATE_DRAINING in [frame.origin.state for frame in frames]
    assert watch.code() == grpc.StatusCode.OK
    assert node.wait() == 0


def test_status(node):
    node.tell("running")
    answer = node.health.GetNodeStatus(ours.GetNodeStatusRequest(), timeout=PATIENCE)
    assert answer.origin.identity.version and answer.status.state == ours.NODE_STATE_RUNNING
    assert answer.status.safe_to_remove and not answer.status.removal_blockers
    assert answer.next_page_token == ""


@pytest.mark.parametrize(
    "call, expected",
    [
        (lambda node: node.report("nobody"), "UNKNOWN_SERVICE"),
        (lambda node: next(node.health.WatchHealth(ours.WatchHealthRequest(heartbeat_ms=1))), "INVALID_FIELD"),
        (lambda node: node.health.GetNodeStatus(ours.GetNodeStatusRequest(page_token="x")), "INVALID_FIELD"),
    ],
)
def test_refusals_have_a_reason(node, call, expected):
    with pytest.raises(grpc.RpcError) as refused:
        call(node)
    assert reason(refused.value) == expected


def test_compressed_requests_are_refused_by_name(node):
    with grpc.insecure_channel(node.address, compression=grpc.Compression.Gzip) as channel:
        call = channel.unary_unary("/node.health.v1.HealthService/HealthCheck")
        with pytest.raises(grpc.RpcError) as refused:
            call(ours.HealthCheckRequest(service="x" * 1000).SerializeToString(), timeout=PATIENCE)
    assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED
    assert reason(refused.value) == "UNSUPPORTED_COMPRESSION"
