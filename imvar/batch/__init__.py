"""Variations of many images, on one machine or many: `imvar batch`.

A plan fixes what is made. A shard is a pure function of the plan and its number, and a marker, written last, says that
it is done. So processes may be killed, started again, and share the work in any way: the files are equal in every byte.
"""

from .driver import BatchError, drive, run
from .environment import pipeline_of
from .finish import Report
from .planning import Plan, open_plan
from .planning import extend_plan as extend
from .planning import make_plan as plan
from .settings import Settings
from .shard import run_shard

__all__ = [
    "BatchError",
    "Plan",
    "Report",
    "Settings",
    "drive",
    "extend",
    "open_plan",
    "pipeline_of",
    "plan",
    "run",
    "run_shard",
]
