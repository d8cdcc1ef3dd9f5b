#!/usr/bin/env python3
"""Ordinary Redis clients against a node: redis-cli, redis-benchmark, redis-py, also in cluster mode.

Usage: redis_clients.py PATH-OF-NODE

Needs redis-cli and redis-benchmark (Debian: redis-tools) and the Python package redis. Exits with 1 and says
what is wrong; a tool that is missing is wrong too, unless its name is in SKIP_CLIENTS (separated by commas).
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

SKIP = set(filter(None, os.environ.get("SKIP_CLIENTS", "").split(",")))


class Node:
    """One node on free ports; `with` starts and stops it."""

    def __init__(self, program, directory, name, slots):
        self.command = [program, "serve", "--id", name, "--data", os.path.join(directory, name),
                        "--grpc", "127.0.0.1:0", "--resp", "127.0.0.1:0", "--slots", slots]

    def __enter__(self):
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        words = dict(word.split("=", 1) for word in self.process.stdout.readline().split()[1:])
        self.grpc, self.resp = words["grpc"], words["resp"]
        self.port = int(self.resp.rsplit(":", 1)[1])
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(timeout=30) == 0, "the node did not stop cleanly"


def equal(found, expected):
    assert found == expected, f"{found!r} is not {expected!r}"


def run(*command, **more):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=120, **more)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


def split(node, other):
    """Hands the upper half of the slots over."""
    import redis
    client = redis.Redis(port=node.port, protocol=2, decode_responses=True)
    client.execute_command("SPLIT", 8192, "n2", other.grpc, other.resp)
    until = time.monotonic() + 30
    while "done" not in client.execute_command("SPLIT", "LIST")[0]:
        assert time.monotonic() < until, "the split is not done"
        time.sleep(0.05)


def redis_cli(node, other):
    cli = ["redis-cli", "-p", node.port]
    equal(run(*cli, "ping"), "PONG")
    equal(run(*cli, "set", "greeting", "hello"), "OK")
    equal(run(*cli, "get", "greeting"), "hello")
    equal(run(*cli, "-3", "get", "greeting"), "hello")
    equal(run(*cli, "--scan", "--pattern", "greet*"), "greeting")
    pipe = "".join(f"*3\r\n$3\r\nSET\r\n${len(k)}\r\n{k}\r\n$1\r\nv\r\n" for k in (f"pipe:{n}" for n in range(1000)))
    assert "errors: 0, replies: 1000" in run(*cli, "--pipe", input=pipe), "redis-cli --pipe"
    equal(run(*cli, "dbsize"), "1001")
    run(*cli, "--bigkeys")


def redis_benchmark(node, other):
    base = ["redis-benchmark", "-p", node.port, "-q"]
    for options in (["-n", 2000, "-t", "ping,set,get,incr"],
                    ["-n", 20000, "-P", 100, "-r", 10000, "-t", "set,get"],
                    ["-n", 2000, "-3", "-t", "set,get"],
                    ["-n", 2000, "--cluster", "-t", "set,get,mset"]):
        if "--cluster" in options:
            # It takes no cluster of one node.
            split(node, other)
        out = run(*base, *options)
        assert "requests per second" in out and "rror" not in out, out


def redis_py(node, other):
    import redis
    for protocol in (2, 3):
        client = redis.Redis(port=node.port, protocol=protocol, decode_responses=True)
        client.delete("a"), client.delete("n"), client.delete("t")
        assert client.set("a", "1", nx=True) and not client.set("a", "2", nx=True)
        equal(client.set("a", "3", get=True), "1")
        equal(client.getdel("a"), "3")
        assert client.set("t", "v", px=100000) and 99 <= client.ttl("t") <= 100
        assert client.expire("t", 50, gt=True) == 0 and client.persist("t") == 1 and client.ttl("t") == -1
        equal([client.incr("n"), client.incrby("n", 9), client.decr("n")], [1, 10, 9])
        pipeline = client.pipeline(transaction=False)
        for n in range(5000):
            pipeline.set(f"py:{n}", n)
        assert all(pipeline.execute())
        equal(len(set(client.scan_iter("py:*", count=500))), 5000)
        equal(client.info("cluster")["cluster_enabled"], 1)
        assert client.command_count() == len(client.command())
        for wrong, text in ((("GET",), "wrong number of arguments"), (("NOPE",), "unknown command"),
                            (("MGET", "a", "b"), "hash to the same slot")):
            try:
                client.execute_command(*wrong)
                raise AssertionError(f"{wrong} was taken")
            except redis.ResponseError as error:
                # redis-py knows CROSSSLOT by a class of its own.
                assert text in str(error), error


def redis_py_cluster(node, other):
    from redis.cluster import RedisCluster
    cluster = RedisCluster(host="127.0.0.1", port=node.port, decode_responses=True)
    for n in range(1000):
        cluster.set(f"cl:{n}", n)
    # The slots have moved without a word to the client: it follows by MOVED.
    split(node, other)
    for n in range(1000):
        cluster.set(f"cl:{n}", n + 1)
    equal([cluster.get(f"cl:{n}") for n in range(1000)], [str(n + 1) for n in range(1000)])
    cluster.mset_nonatomic({f"cl:{n}": "x" for n in range(100)})
    equal(cluster.mget_nonatomic([f"cl:{n}" for n in range(100)]), ["x"] * 100)
    fresh = RedisCluster(host="127.0.0.1", port=other.port, decode_responses=True)
    equal(len(fresh.get_primaries()), 2)
    equal(len(set(fresh.scan_iter("cl:*", count=1000))), 1000)


def main():
    program = sys.argv[1]
    tests = [("redis-cli", redis_cli), ("redis-benchmark", redis_benchmark),
             ("redis-py", redis_py), ("redis-py", redis_py_cluster)]
    for tool, test in tests:
        if tool in SKIP:
            print(f"SKIPPED {test.__name__}: SKIP_CLIENTS names {tool}", flush=True)
            continue
        if tool != "redis-py":
            assert shutil.which(tool), f"{tool} is not installed (Debian: redis-tools); SKIP_CLIENTS={tool} leaves it out"
        with tempfile.TemporaryDirectory() as directory:
            with Node(program, directory, "n1", "0-16383") as node, Node(program, directory, "n2", "none") as other:
                test(node, other)
        print(f"ok {test.__name__}", flush=True)


if __name__ == "__main__":
    main()
