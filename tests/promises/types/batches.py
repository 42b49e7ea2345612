"""The types of `imvar.batch`: checked by mypy and pyright, not run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, assert_type

from imvar import batch
from imvar.batch.bucket import BucketPath


def calls(photos: list[str | Path], out: Path, shown: list[batch.Report]) -> None:
    report = batch.run(photos, out, "imvar-emoji", n=2, jobs=2, gpus=[0, 1], part="0/2", progress=shown.append)
    assert_type(report, batch.Report)
    assert_type((report.made, report.manifest), tuple[int, Path | BucketPath])
    assert_type(batch.run("photos", "out", Path("checkpoint"), shared={"negative": "cake.png"}), batch.Report)
    plan = batch.plan(["photos", Path("more")], "out", batch=4, guidance=3)
    assert_type(plan, batch.Plan)
    assert_type(batch.open_plan(out), batch.Plan)
    assert_type(batch.extend(out, "more"), batch.Plan)
    assert_type(batch.drive(out, jobs=1), batch.Report)
    assert_type(plan.shard(0), list[dict[str, Any]])
    assert_type(plan.settings, batch.Settings)
    pipe = batch.pipeline_of(plan)
    for number in range(len(plan)):
        assert_type(batch.run_shard(out, plan, number, pipe).made, int)


def failures(error: batch.BatchError) -> int:
    assert_type(error.status, int)
    return error.status
