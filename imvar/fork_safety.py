"""Forked processes compute with one thread.

A child that is forked after a parallel computation inherits OpenMP's state but not its threads, and waits for them for
ever. This is the only setting of the whole process that importing imvar makes; the child may raise the number of
threads again before its first computation if the parent has not computed yet.
"""

from __future__ import annotations

import os
import sys


def use_one_thread() -> None:
    """Compute with one thread in this process if it has torch: without torch there is no state to inherit."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=use_one_thread)
