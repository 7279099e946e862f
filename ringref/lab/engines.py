"""IPython engines as ranks: started together, and gone together with the kernel that started them.

An engine is a Python process that runs what a notebook's `%%px` cell sends it. A guard waits at the end of a pipe that
closes when the starting process is gone, however it went, so no engine outlives its notebook.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time

GUARD = """if True:
    import psutil, shutil, sys
    sys.stdin.read()
    for process in psutil.process_iter(["cmdline"]):
        if f"--profile-dir={sys.argv[1]}" in (process.info["cmdline"] or []):
            process.kill()
    shutil.rmtree(sys.argv[1], ignore_errors=True)"""


class Engines:
    """p engines: `with Engines(2) as ranks:`, or `ranks = Engines(2).start()` in one cell, `ranks.stop()` in the last.

    `view` sends to all of them and blocks; `client[i]` to one. Every engine knows `me`, its number, `p`, and `store`,
    the `file://` address of a meeting point for `init_process_group`: a file, so that no port can be taken.
    """

    def __init__(self, p: int):
        if not isinstance(p, int) or isinstance(p, bool) or p < 1:
            raise ValueError(f"p must be a number of engines, at least 1, got {p!r}")
        self.p, self.client, self.view = p, None, None

    def start(self, timeout: float = 120) -> Engines:
        """Start the engines and wait until all of them answer."""
        import ipyparallel

        self.folder = tempfile.mkdtemp(prefix="ringref_ranks_")  # named in the command line of each of its processes
        command = [sys.executable, "-c", GUARD, self.folder]
        self.guard = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        try:
            self.cluster = ipyparallel.Cluster(n=self.p, profile_dir=self.folder, log_level=40)
            self.cluster.start_cluster_sync()
            self.client = self.cluster.connect_client_sync()
            self.client.wait_for_engines(self.p, timeout=timeout, interactive=False)
            self.view = self.client[:]
            self.view.block = True
            self._greet({"p": self.p, "store": f"file://{self.folder}/store"}, time.monotonic() + timeout)
        except BaseException:
            self._release()
            raise
        return self

    def _greet(self, facts: dict, end: float, patience: float = 10) -> None:
        """Tell every engine the facts, and its number, until it answers: a message to one that has just registered was
        seen to be lost.
        """
        late = list(range(self.p))
        while late:
            sent = {i: self.client[i].push({**facts, "me": i}, block=False) for i in late}
            late = [i for i, answer in sent.items() if not answer.wait(patience)]
            if late and time.monotonic() > end:
                raise TimeoutError(f"engines {late} of {self.p} have started and do not answer")

    def stop(self) -> list[int]:
        """End every process of this cluster; returns the ids of those that are left, which should be none."""
        import psutil

        self.client.close()
        self.cluster.stop_cluster_sync()
        self._release()
        found = psutil.process_iter(["cmdline", "status"])
        alive = [x for x in found if x.info["status"] != psutil.STATUS_ZOMBIE]
        return [x.pid for x in alive if self.folder in " ".join(x.info["cmdline"] or [])]

    def _release(self) -> None:
        self.guard.stdin.close()  # the guard kills who is left, and removes the folder
        self.guard.wait(timeout=30)
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Engines:
        return self.start()

    def __exit__(self, *_) -> None:
        self.stop()
