"""Snakemake with the arguments of this script; it ends, with all its workers, when the process that started it is gone.

`ddkit reproduce` starts it as the first of a process group of its own, with the head's process id in DDKIT_HEAD.
"""

import os
import shutil
import signal
import sys
import tempfile
import threading
import time

from snakemake.cli import main


def watch(head: int) -> None:
    "End the process group when the head no longer is this process's parent."
    while os.getppid() == head: time.sleep(0.5)
    shutil.rmtree(tempfile.tempdir, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    tempfile.tempdir = tempfile.mkdtemp(prefix="ddkit-")  # Snakemake's and its workers': the killed cannot tidy up
    threading.Thread(target=watch, args=[int(os.environ["DDKIT_HEAD"])], daemon=True).start()
    try: main(sys.argv[1:])
    finally: shutil.rmtree(tempfile.tempdir, ignore_errors=True)
