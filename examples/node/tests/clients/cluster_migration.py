#!/usr/bin/env python3
"""Standard Redis Cluster clients write while slots move there and back: redis-py while nodes are killed, and redis-benchmark.

Usage: cluster_migration.py PATH-OF-NODE [ROUNDS]

redis-py's RedisCluster, unmodified, with its own retries. Several threads count their keys up; in each round half of the slots moves
to the other node, and one of the two is killed at a random moment and comes back within two seconds. In the end every
acknowledged write is there, no value ever went back, and no operation failed for longer than five seconds.

redis-benchmark --cluster runs to its end while slots move; it stops at the first error that is no redirection. SKIP_CLIENTS=redis-benchmark
leaves it out.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import grpc
import redis
from grpc_tools import protoc
from redis.backoff import ConstantBackoff
from redis.retry import Retry

ROOT = Path(__file__).resolve().parents[4]
PROTOS = ["node/common/v1/common.proto", "node/migration/v1/migration.proto"]
OUT = tempfile.TemporaryDirectory(prefix="stubs-")
INCLUDES = [f"-I{ROOT / crate / 'proto'}" for crate in ("proto-migration", "proto-common")]
if protoc.main(["protoc", *INCLUDES, f"--python_out={OUT.name}", f"--grpc_python_out={OUT.name}", *PROTOS]) != 0:
    raise SystemExit("the .proto files do not compile")
sys.path.insert(0, OUT.name)
from node.migration.v1 import migration_pb2 as pb  # noqa: E402
from node.migration.v1 import migration_pb2_grpc as rpc  # noqa: E402

THREADS, KEYS, PATIENCE = 4, 50, 120
MOVING = (0, 8192)


class Node:
    """A node that can be killed and comes back on its ports."""

    def __init__(self, program, directory, name, slots):
        self.program, self.directory, self.name, self.slots = program, directory, name, slots
        self.grpc, self.resp, self.peer = "127.0.0.1:0", "127.0.0.1:0", None

    def start(self):
        peer = ["--peer", f"{self.peer.name}={self.peer.grpc},{self.peer.resp}"] if self.peer else []
        log = open(Path(self.directory) / f"{self.name}.log", "ab")
        self.process = subprocess.Popen(
            [self.program, "serve", "--id", self.name, "--data", Path(self.directory) / self.name,
             "--grpc", self.grpc, "--resp", self.resp, "--slots", self.slots, *peer],
            stdout=subprocess.PIPE, stderr=log, text=True)
        line = self.process.stdout.readline()
        words = dict(word.split("=", 1) for word in line.split()[1:])
        assert words, f"{self.name} did not start; see {log.name}"
        self.grpc, self.resp = words["grpc"], words["resp"]
        return self

    @property
    def port(self):
        return int(self.resp.rsplit(":", 1)[1])

    def kill(self):
        self.process.kill()
        self.process.wait(10)

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(timeout=30) == 0, f"{self.name} did not stop cleanly"

    def stub(self):
        return rpc.MigrationServiceStub(grpc.insecure_channel(self.grpc, [("grpc.use_local_subchannel_pool", 1)]))

    def state(self, migration, direction):
        request = pb.GetMigrationProgressRequest(migration_id=migration, direction=direction)
        try:
            progress = self.stub().GetMigrationProgress(request, timeout=5).migration
        except grpc.RpcError:
            return None, None
        return pb.MigrationState.Name(progress.state).removeprefix("MIGRATION_STATE_"), progress


class Writers:
    """Threads that count their keys up, each key by one thread."""

    def __init__(self, nodes):
        self.stop, self.failures, self.longest = threading.Event(), [], 0.0
        self.acknowledged, self.tried, self.operations = {}, {}, 0
        self.nodes = nodes
        self.clusters = [self.client() for _ in range(THREADS)]
        self.threads = [threading.Thread(target=self.guarded, args=(number,)) for number in range(THREADS)]
        for thread in self.threads:
            thread.start()

    def client(self):
        startup = [redis.cluster.ClusterNode("127.0.0.1", node.port) for node in self.nodes]
        return redis.RedisCluster(
            startup_nodes=startup, protocol=2, socket_timeout=10, retry=Retry(ConstantBackoff(0.1), 100))

    def guarded(self, number):
        try:
            self.run(number)
        except BaseException as error:  # noqa: BLE001
            self.failures.append(error)

    def run(self, number):
        rng, cluster = random.Random(number), self.clusters[number]
        keys = [f"w{number}:{key}" for key in range(KEYS)]
        seen = {}
        while not self.stop.is_set():
            key = rng.choice(keys)
            value = self.tried.get(key, 0) + 1
            self.tried[key] = value
            self.attempt(lambda: cluster.set(key, value))
            self.acknowledged[key] = value
            found = int(self.attempt(lambda: cluster.get(key)) or 0)
            assert found >= max(value, seen.get(key, 0)), f"{key} went back from {value} to {found}"
            seen[key] = found
            self.operations += 2

    def attempt(self, operation):
        """Repeats an operation that failed with the client's own retries used up."""
        began = time.monotonic()
        while True:
            try:
                result = operation()
                self.longest = max(self.longest, time.monotonic() - began)
                return result
            except (redis.RedisError, redis.exceptions.RedisClusterException) as error:
                assert time.monotonic() - began < 60, f"fails for a minute: {error!r}"
                time.sleep(0.05)

    def finish(self):
        self.stop.set()
        for thread in self.threads:
            thread.join(90)
        assert not self.failures, self.failures[0]


def begin(migration, source, target, slots):
    spec = pb.MigrationSpec(
        source_shard_id="s1", target_shard_id="s2", target_node_id=target.name, auto_complete=True)
    spec.slots.start, spec.slots.end = slots
    request = pb.StartMigrationRequest(migration_id=migration, spec=spec, target_address=target.grpc)
    source.stub().StartMigration(request, timeout=10)


def end(migration, source, target):
    """Waits until it is completed at both ends; returns what the source shows."""
    until = time.monotonic() + PATIENCE
    while True:
        ends = source.state(migration, 2), target.state(migration, 1)
        if [end[0] for end in ends] == ["COMPLETED"] * 2:
            return ends[0][1]
        assert time.monotonic() < until, f"{migration} does not end: {ends}"
        assert not {"FAILED", "CANCELLED", "NEEDS_OPERATOR"} & {end[0] for end in ends}, ends
        time.sleep(0.05)


def move(number, source, target, rng):
    migration = f"m{number}"
    begin(migration, source, target, MOVING)
    time.sleep(rng.uniform(0, 0.2))
    victim = rng.choice([source, target])
    states = source.state(migration, 2)[0], target.state(migration, 1)[0]
    victim.kill()
    time.sleep(rng.uniform(0, 1))
    victim.start()
    progress = end(migration, source, target)
    print(f"{migration}: {source.name} -> {target.name}, {victim.name} killed in {states}, "
          f"{progress.attempt} streams, longest freeze {progress.max_freeze_ms} ms", flush=True)


def unread(ports):
    """Bytes that servers on these ports have sent and their clients have not read."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    fields = [line.split() for line in lines]
    return sum(int(queues.split(":")[1], 16) for _, _, remote, _, queues, *_ in fields if int(remote.split(":")[1], 16) in ports)


def benchmark(program):
    """redis-benchmark takes no cluster of one node, so each node keeps some slots. False if it hangs with replies that it does not read, as
    redis-benchmark 7.0 has done: it has issued its last request then, turns round connections that it may write to, and listens to none."""
    with tempfile.TemporaryDirectory() as directory:
        two = Node(program, directory, "n2", "8192-16383").start()
        one = Node(program, directory, "n1", "0-8191")
        one.peer = two
        one.start()
        two.stop()
        two.peer = one
        two.start()
        running = None
        try:
            cluster = redis.RedisCluster("127.0.0.1", one.port)
            until = time.monotonic() + 30
            while {node.port for node in cluster.get_primaries()} != {one.port, two.port}:
                assert time.monotonic() < until, "the nodes do not know each other's slots"
                cluster.nodes_manager.initialize()
            command = ["redis-benchmark", "-p", str(one.port), "--cluster", "-t", "set", "-r", "20000", "-c", "8",
                       "-n", "100000", "-q"]
            running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            nodes, moves = [one, two], 0
            while moves < 4 or running.poll() is None and moves < 20:
                begin(f"b{moves}", *nodes, (0, 4096))
                end(f"b{moves}", *nodes)
                during = running.poll() is None
                nodes.reverse()
                moves += 1
                if moves == 4:
                    assert during, "the benchmark ended before the slots had moved four times"
            try:
                out, _ = running.communicate(timeout=120)
            except subprocess.TimeoutExpired:
                left = unread({one.port, two.port})
                assert left > 0, "redis-benchmark waits for a reply that no node gives"
                print(f"redis-benchmark does not read {left} bytes of replies, and never ends", flush=True)
                return False
        finally:
            if running:
                running.kill()
                running.wait()
            for node in (one, two):
                node.stop()
        assert running.returncode == 0 and "requests per second" in out and "rror" not in out, out
        assert "slots configuration changed" in out, f"it was redirected: {out}"
        print(f"redis-benchmark ran through {moves} migrations", flush=True)
        return True


def main():
    program, rounds = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 6
    if "redis-benchmark" in os.environ.get("SKIP_CLIENTS", "").split(","):
        print("SKIPPED benchmark: SKIP_CLIENTS names redis-benchmark", flush=True)
    else:
        assert any(benchmark(program) for _ in range(3)), "redis-benchmark hung three times"
    rng = random.Random(os.environ.get("SEED") or time.time())
    with tempfile.TemporaryDirectory() as directory:
        one = Node(program, directory, "n1", "0-16383").start()
        two = Node(program, directory, "n2", "none")
        two.peer = one
        two.start()
        one.peer = two
        writers = Writers([one, two])
        try:
            nodes = [one, two]
            for number in range(rounds):
                move(number, *nodes, rng)
                nodes.reverse()
                assert not writers.failures, writers.failures[0]
            writers.finish()
            for key, value in writers.acknowledged.items():
                found = int(writers.clusters[0].get(key) or 0)
                assert value <= found <= writers.tried[key], f"{key}: {value} <= {found} <= {writers.tried[key]}"
        finally:
            writers.stop.set()
            for node in (one, two):
                if node.process.poll() is None:
                    node.stop()
        assert writers.longest < 5, f"an operation took {writers.longest:.1f} s"
        print(f"{writers.operations} operations, {len(writers.acknowledged)} keys, none lost; "
              f"the longest took {writers.longest:.2f} s")


if __name__ == "__main__":
    main()
