"""Whether anything grows under a long mixed load with cancels and faults.

Pictures of several sizes, steps, formats, with and without guidance, previews, priorities and deadlines, over gRPC and
HTTP; a third is cancelled, and a rank is killed every minute. Memory, file descriptors and threads of every process,
/dev/shm and temporary files are looked at all the time: the median of the last fifth of the run is held against that of
the fifth behind the warm-up (a quarter). Exit code 1 if something grows by more than 2 %, or a request is lost.
"""

from benchmarks.soak.command import add_arguments, measure

__all__ = ["add_arguments", "measure"]
