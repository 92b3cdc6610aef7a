"""Ends a server whose owner died without a chance to end it (SIGKILL, a crash, the out-of-memory killer).

A program of its own, started by server.py beside every server and killed by it when the server has ended. It
only looks whether its parent still lives. PR_SET_PDEATHSIG would do that without a process, but it fires when
the *thread* that started the server ends, it cannot kill a server that hangs on its way out, and it leaves
the shared memory of what was killed.

    python -I -S _server_guard.py OWNER_PID SERVER_PID GRACE_S SHARED_MEMORY_PREFIX FOLDER...
"""

import contextlib
import glob
import os
import shutil
import signal
import sys
import time


def main() -> None:
    """Wait for the owner's death, then end the server's process group and remove what is left of it."""
    owner, server, grace_s = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    shared_memory_prefix, folders = sys.argv[4], sys.argv[5:]
    while os.getppid() == owner:
        time.sleep(0.5)
    with contextlib.suppress(ProcessLookupError):
        os.kill(server, signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        while time.monotonic() < deadline:
            os.killpg(server, 0)
            time.sleep(0.1)
        os.killpg(server, signal.SIGKILL)
        time.sleep(0.5)
    for segment in glob.glob(f"{glob.escape(shared_memory_prefix)}*"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(segment)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
