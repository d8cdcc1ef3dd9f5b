"""The example receiver as a process."""

import os
import signal
import subprocess
import threading
from pathlib import Path

from stubs import ROOT

EXAMPLES = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "debug/examples"
BINARY = EXAMPLES / "receiver"


class Receiver:
    """A node that takes snapshots into `dir`. Options are those of `examples/receiver.rs`, with `_` for `-`."""

    def __init__(self, dir, **options):
        self.dir = Path(dir)
        self.options = options
        self.process = None
        self.address = None

    def start(self):
        options = [text for name, value in self.options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
        self.process = subprocess.Popen([BINARY, self.dir, "127.0.0.1:0", *options], stdout=subprocess.PIPE, text=True)
        watchdog = threading.Timer(20, self.process.kill)
        watchdog.start()
        line = self.process.stdout.readline()
        watchdog.cancel()
        assert line.startswith("listening on "), f"the receiver did not start: {line!r}"
        self.address = line.removeprefix("listening on ").strip()
        return self

    def alive(self):
        return self.process is not None and self.process.poll() is None

    def kill(self):
        """SIGKILL: nothing is flushed, nobody is told."""
        self.process.kill()
        self.process.wait(10)
        self.process.stdout.close()

    def terminate(self):
        """SIGTERM; returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(20)
        finally:
            self.process.stdout.close()

    def restart(self):
        self.kill()
        return self.start()

    def stop(self):
        if self.alive():
            self.kill()

    def installed(self, snapshot):
        """The installed files of a snapshot, as `{name: bytes}`."""
        root = self.dir / "installed" / snapshot.target_shard / snapshot.transfer_id
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}

    def files_of(self, snapshot):
        """Every file of the store that is named after the transfer or lies below a directory that is."""
        name = snapshot.transfer_id
        return [path for path in self.dir.rglob("*") if path.is_file() and any(name in part for part in path.parts)]

    def resident_bytes(self):
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("no VmRSS")
