"""What the standard client gets in each state."""

import time

import grpc
import pytest

from process import NOT_SERVING, PATIENCE, SERVICE_UNKNOWN, SERVING, ours

PROBES = ["", "liveness", "readiness", "startup"]
GRPC_SERVICE = "node.snapshot.v1.SplitSnapshotService"


def answers(node):
    return [node.check(service) for service in PROBES]


def until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_starting(node):
    assert answers(node) == [NOT_SERVING, SERVING, NOT_SERVING, NOT_SERVING]
    node.tell("add raft critical")
    assert node.check("raft") == NOT_SERVING, "whatever it says"
    watch = node.watch()
    assert next(watch).status == NOT_SERVING, "the current state at once"
    node.tell("running")
    assert next(watch).status == SERVING
    assert answers(node) == [SERVING] * 4


def test_healthy_degraded_unhealthy_undecided(node):
    node.tell("running", f"service {GRPC_SERVICE}", "add raft critical", "add cache")
    watch = node.watch(GRPC_SERVICE)
    assert next(watch).status == SERVING
    for status, expected in [("degraded", SERVING), ("unhealthy", NOT_SERVING), ("undecided", SERVING), ("healthy", SERVING)]:
        node.tell(f"set raft {status} for a reason")
        assert node.check("raft") == expected, status
        assert answers(node) == [expected, SERVING, expected, SERVING], status
        assert node.check(GRPC_SERVICE) == expected, status
    # One that is not critical makes the node DEGRADED, which is SERVING.
    node.tell("set cache unhealthy")
    assert node.check("cache") == NOT_SERVING
    assert answers(node) == [SERVING] * 4
    assert node.report().status == ours.HEALTH_STATUS_DEGRADED


def test_watch_tells_each_change_of_the_status_and_nothing_else(node):
    node.tell("running", "add raft critical")
    watch = node.watch()
    assert next(watch).status == SERVING
    for status in ["degraded", "healthy", "degraded", "unhealthy"]:
        node.tell(f"set raft {status}")
    assert next(watch).status == NOT_SERVING
    node.tell("set raft healthy")
    assert next(watch).status == SERVING


def test_maintenance(node):
    node.tell("running", "maintenance")
    assert answers(node) == [NOT_SERVING, SERVING, NOT_SERVING, SERVING]
    node.tell("running")
    assert answers(node) == [SERVING] * 4


def test_unknown_service(node):
    node.tell("running")
    with pytest.raises(grpc.RpcError) as refused:
        node.check("nobody")
    assert refused.value.code() == grpc.StatusCode.NOT_FOUND
    watch = node.watch("nobody")
    assert next(watch).status == SERVICE_UNKNOWN
    assert watch.is_active(), "the call stays open"


def test_service_that_appears_later(node):
    node.tell("running")
    by_name, component = node.watch(GRPC_SERVICE), node.watch("raft")
    assert [next(by_name).status, next(component).status] == [SERVICE_UNKNOWN] * 2
    node.tell(f"service {GRPC_SERVICE}", "add raft")
    assert [next(by_name).status, next(component).status] == [SERVING] * 2
    node.tell("remove raft")
    assert next(component).status == SERVICE_UNKNOWN


def test_list(node):
    node.tell("add raft critical", f"service {GRPC_SERVICE}")
    assert node.list() == {
        "": NOT_SERVING,
        "liveness": SERVING,
        "readiness": NOT_SERVING,
        "startup": NOT_SERVING,
        "raft": NOT_SERVING,
        GRPC_SERVICE: NOT_SERVING,
    }
    node.tell("running")
    assert set(node.list().values()) == {SERVING}


def test_draining_and_the_end(node):
    node.tell("running", "add raft critical")
    watches = [node.watch(service) for service in PROBES + ["raft", "nobody"]]
    first = [next(watch).status for watch in watches]
    assert first == [SERVING] * 5 + [SERVICE_UNKNOWN]
    node.terminate()
    until(lambda: node.check() == NOT_SERVING)
    assert answers(node) == [NOT_SERVING, SERVING, NOT_SERVING, SERVING], "it still answers, and lives"
    assert node.check("raft") == NOT_SERVING
    # Each gets the last state, then its stream ends with OK, and the process with 0.
    rest = [[answer.status for answer in watch] for watch in watches]
    assert rest == [[NOT_SERVING], [], [NOT_SERVING], [], [NOT_SERVING], []]
    assert [watch.code() for watch in watches] == [grpc.StatusCode.OK] * len(watches)
    assert node.wait() == 0


def test_an_open_watch_that_nobody_reads_does_not_hold_up_the_end(node):
    node.tell("running")
    watches = [node.watch() for _ in range(50)]
    began = time.monotonic()
    node.terminate()
    assert node.wait() == 0
    assert time.monotonic() - began < 5
    del watches


def test_kubernetes_probe(node):
    passes = lambda: [node.probe(service) for service in ["startup", "liveness", "readiness"]]  # noqa: E731
    assert passes() == [False, True, False]
    node.tell("running", "add raft critical")
    assert passes() == [True, True, True]
    node.tell("set raft unhealthy")
    assert passes() == [True, True, False], "out of the load balancer, but not restarted"
    node.tell("set raft healthy")
    node.terminate()
    until(lambda: not node.probe("readiness"))
    assert node.probe("liveness") or node.process.poll() is not None
    assert node.wait() == 0
    assert passes() == [False, False, False]


def test_checks_that_misbehave_are_seen_and_stop_nobody(node):
    node.tell("running", "check hangs hangs", "check panics panics", "check flaps flaps", "check well well")
    until(lambda: node.check("hangs") == NOT_SERVING and node.check("panics") == NOT_SERVING)
    slowest = 0
    for _ in range(100):
        began = time.monotonic()
        assert node.check() == SERVING, "they are not critical"
        assert node.check("flaps") == SERVING, "below its threshold"
        slowest = max(slowest, time.monotonic() - began)
    assert slowest < 1
    by_name = {component.name: component for component in node.report().components}
    assert by_name["hangs"].timed_out and by_name["hangs"].took_ms >= 50
    assert by_name["hangs"].consecutive_failures >= by_name["hangs"].failure_threshold == 3
    assert by_name["hangs"].last_error.reason == "CHECK_TIMED_OUT"
    assert by_name["panics"].panicked and "as it was told" in by_name["panics"].message
    assert by_name["flaps"].status == ours.HEALTH_STATUS_HEALTHY and by_name["flaps"].HasField("last_error")
    assert by_name["well"].age_ms < 3000 and not by_name["well"].stale


def test_malformed_requests_do_no_harm(node):
    node.tell("running")
    call = node.channel.unary_unary("/grpc.health.v1.Health/Check")
    for bad in [b"\xff", b"\x0a\xff\xff\xff\xff\x7f", b"\x0a\x02\xc3\x28", b"\x0a\x7f" + b"x", bytes(100_000)]:
        with pytest.raises(grpc.RpcError) as refused:
            call(bad, timeout=PATIENCE)
        assert refused.value.code() not in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE), bad[:8]
    assert node.check() == SERVING
