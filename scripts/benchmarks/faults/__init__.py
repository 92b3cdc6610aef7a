"""Whether anything is lost while ranks are killed and stopped under load, and how soon their groups are back.

16 clients wait for their pictures, first undisturbed, then while every 10 seconds a random rank of a random stage gets
SIGKILL or SIGSTOP. Denoising has 2 replicas of 2 ranks, the other stages have 2 replicas of 1. Every picture is
compared with the one that the undisturbed server drew of the same request. Exit code 1 if a request is lost, a picture
is wrong or a group does not come back.
"""

from benchmarks.faults.command import add_arguments, measure

__all__ = ["add_arguments", "measure"]
