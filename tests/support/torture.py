"""A job on two processes is killed, damaged, poisoned and interrupted, and must end as if nothing had happened.

    python -m tests.support.torture --out bench/results/torture.json  # every case; tests/test_torture.py: some of each

Every case is one row: what was done, whether the job did what it should, and what it said.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import clora.distill.step as distill
import clora.distill.workspace as workspace
import clora.io.safetensors as safetensors_io
import clora.training.checkpoint as checkpoint
from clora.training import distributed
from clora.training.checkpoint import list_checkpoints, open_latest
from clora.training.tracker import read_log
from tests.support import processes
from tests.support.small_job import NAMES, write_config, write_dataset

WORLD, STEPS, SAVE_EVERY = 2, 10, 2
GRACE_S, STOP_S = 30.0, 10.0  # torchrun's grace period after SIGTERM; the longest time to stop at a value not finite
Row = dict[str, Any]


@dataclass
class Job:
    """Data, teachers and a base in one folder; `reference` is what an uninterrupted run ends with."""

    folder: Path
    base: Path
    reference: Row

    def command(self, out: str, *more: str) -> list[str]:
        """The arguments of `clora`; encodings and targets, which are no part of what is tested, are there already."""
        config = write_config(self.folder / f"{out}.yaml", self.base, self.folder / "data", self.folder / out)
        teachers = self.folder / "taught" / "teachers"
        lora = [f"effects.{i}.lora={teachers / name}.safetensors" for i, name in enumerate(NAMES)]
        length = [f"train.max_train_steps={STEPS}", f"train.checkpointing_steps={SAVE_EVERY}", "train.sample_steps=0"]
        kept = ["train.checkpoints_total_limit=3", "train.batch_size=1", "train.anchor_batch_size=2"]
        if self.reference and not (self.folder / out).exists():
            shutil.copytree(self.folder / "reference" / "cache", self.folder / out / "cache")
        return ["train", str(config), *lora, *length, *kept, *more]

    def start(
        self, out: str, *more: str, prepare: Callable[..., None] | None = None, given: Sequence[Any] = ()
    ) -> list[processes.Process]:
        return processes.start(WORLD, self.command(out, *more), self.folder / f"{out}-output", prepare, given)

    def finish(self, out: str, *more: str) -> Row:
        """Resume and run to the end; returns what it ended with."""
        started = self.start(out, "--resume", "latest", *more)
        codes = processes.finish(started)
        assert codes == [0] * WORLD, f"resume of {out}: {codes}\n{started[0].text}\n{started[1].text}"
        return self.end_of(out)

    def end_of(self, out: str) -> Row:
        """Log, hashes of the shards (student, critic, average, both optimizers), schedules, and the product."""
        train = self.folder / out / "train"
        last = train / f"checkpoint-{STEPS:08d}"
        state = json.loads((last / "manifest.json").read_text())["state"]
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in read_log(train)]
        return {
            "log": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
            "rows": len(rows),
            "shards": {p.name: _sha256(p) for p in sorted(last.glob("shard-*"))},
            "state": {key: state[key] for key in ("updates", "steps", "sums", "fingerprint", "identity")},
            "collection": _sha256(self.folder / out / "collection.safetensors"),
        }

    def remove(self, out: str) -> None:
        for name in (out, f"{out}-output"):
            shutil.rmtree(self.folder / name, ignore_errors=True)


def make_job(folder: Path, base: Path) -> Job:
    write_dataset(folder / "data")
    config = write_config(folder / "taught.yaml", base, folder / "data", folder / "taught")
    processes.run(1, ["teach", str(config)], folder / "taught-output")
    job = Job(folder, base, {})
    assert processes.finish(job.start("reference")) == [0] * WORLD
    job.reference = job.end_of("reference")
    assert job.reference["rows"] == STEPS
    return job


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _wait_until(ready: Callable[[], bool], running: Sequence[processes.Process], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not ready():
        codes = [p.code for p in running]
        texts = "\n".join(p.text for p in running)
        assert None in codes and time.monotonic() < end, f"it did not come so far: {codes}\n{texts}"
        time.sleep(0.005)


# SIGKILL at a random moment of a random step, and inside a save.


def kill_at_step(job: Job, seed: int) -> Row:
    """Kill one process at a random step, or both at once; the one left must stop by itself, with one clear error."""
    draw = random.Random(seed)
    step, delay, victim = draw.randrange(1, STEPS), draw.random() * 0.2, draw.choice([0, 1, None])
    out = f"kill-{seed}"
    running = job.start(out)
    log = job.folder / out / "train" / "log.jsonl"
    _wait_until(lambda: log.exists() and log.read_bytes().count(b"\n") >= step, running)
    time.sleep(delay)
    row: Row = {"step": step, "victim": "both" if victim is None else victim}
    if victim is None:
        processes.kill(running)
    else:
        running[victim].signal(signal.SIGKILL)
        started = time.monotonic()
        row["codes"] = processes.finish(running)
        row["other_stopped_s"] = round(time.monotonic() - started, 1)
        row["said"] = _last_error(running[1 - victim])
        clear = "another process died or hangs" in row["said"] and row["codes"][1 - victim] == 1
        done = row["codes"][1 - victim] == 0  # it was killed after its last exchange
        row["told"] = clear or done
    row["ok"] = job.finish(out) == job.reference and row.get("told", True)
    job.remove(out)
    return row


SAVE_STAGES = ("shard", "shard rename", "manifest", "folder rename", "pointer", "removal")


def hold_in_save(stage: str, number: int, rank: int, marker: Path) -> None:
    """Let the `number`-th save of a process stop at a stage, and say so by a file."""
    if distributed.rank() != rank:
        return
    seen = {"saves": 0}

    def hold(module: Any, name: str, when: Callable[..., bool] = lambda *_: True, counts: bool = True) -> None:
        real = getattr(module, name)

        def held(*arguments: Any, **more: Any) -> Any:
            if when(*arguments):
                seen["saves"] += 1
                if seen["saves"] == number:
                    marker.write_text("here")
                    time.sleep(600)
            return real(*arguments, **more)

        setattr(module, name, held)

    if stage == "shard":
        hold(checkpoint, "write_tensors")
    elif stage == "shard rename":
        # `os` of that module alone: the file is written and has its temporary name.
        safetensors_io.os = _OsWithReplace(lambda p: ".writing" in str(p), number, marker)  # type: ignore[attr-defined]
    elif stage == "folder rename":
        hold(checkpoint, "_replace_folder")
    elif stage == "removal":
        hold(checkpoint.CheckpointWriter, "_remove_old")
    else:
        what = {"manifest": "manifest.json", "pointer": "latest"}[stage]
        hold(checkpoint, "write_text", lambda path, _: path.name == what)


class _OsWithReplace:
    """`os` whose `replace` of shards stops at the `number`-th."""

    def __init__(self, concerns: Callable[[Path], bool], number: int, marker: Path) -> None:
        self._concerns, self._number, self._marker = concerns, number, marker

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def replace(self, source: Path, target: Path) -> None:
        if self._concerns(Path(target)) and Path(target).name.startswith("shard"):
            self._number -= 1
            if self._number == 0:
                self._marker.write_text("here")
                time.sleep(600)
        os.replace(source, target)


def kill_in_save(job: Job, stage: str, number: int, rank: int) -> Row:
    """Kill both processes while one of them is at `stage` of the run's `number`-th save."""
    out = f"save-{stage.replace(' ', '-')}-{number}-{rank}"
    marker = job.folder / f"{out}.marker"
    running = job.start(out, prepare=hold_in_save, given=(stage, number, rank, marker))
    _wait_until(marker.exists, running)
    processes.kill(running)
    found, faults = open_latest(job.folder / out / "train")
    row: Row = {"stage": stage, "save": number, "process": rank, "newest_after": found.step if found else None}
    # From the pointer on the new checkpoint is there; before, the one before it.
    complete = SAVE_STAGES.index(stage) >= SAVE_STAGES.index("pointer")
    row["expected_after"] = (number if complete else number - 1) * SAVE_EVERY or None
    row["ok"] = row["newest_after"] == row["expected_after"] and not faults and job.finish(out) == job.reference
    job.remove(out)
    return row


def kill_in_save_cases() -> list[tuple[str, int, int]]:
    """20 of them: every stage of four saves; the second process has shards only."""
    main = [(stage, number, 0) for stage in SAVE_STAGES for number in (1, 2, 4)]
    return [*main, ("shard", 3, 1), ("shard rename", 3, 1)]


# Damage to the newest checkpoint, and a disk that is full.


def _flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(bytes(content))


def _truncate(path: Path, share: float) -> None:
    os.truncate(path, int(path.stat().st_size * share))


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


_SHARDS = ("shard-0-of-2.safetensors", "shard-1-of-2.safetensors")
DAMAGES: dict[str, Callable[[Path], object]] = {
    **{f"{s[:7]} cut in half": lambda c, s=s: _truncate(c / s, 0.5) for s in _SHARDS},
    **{f"{s[:7]} empty": lambda c, s=s: _truncate(c / s, 0.0) for s in _SHARDS},
    **{f"{s[:7]} missing": lambda c, s=s: (c / s).unlink() for s in _SHARDS},
    **{f"{s[:7]} header bit flipped": lambda c, s=s: _flip(c / s, 12) for s in _SHARDS},
    **{f"{s[:7]} last bit flipped": lambda c, s=s: _flip(c / s, -1) for s in _SHARDS},
    "shards exchanged": lambda c: _exchange(*(c / s for s in _SHARDS)),
    "shard of an older step": lambda c: shutil.copy(list_checkpoints(c.parent)[0] / _SHARDS[0], c / _SHARDS[0]),
    "manifest missing": lambda c: (c / "manifest.json").unlink(),
    "manifest cut in half": lambda c: _truncate(c / "manifest.json", 0.5),
    "manifest step changed": lambda c: _edit(c / "manifest.json", step=3),
    "manifest state changed": lambda c: _edit(c / "manifest.json", state={}),
    "folder missing, pointer stale": lambda c: shutil.rmtree(c),
    "pointer to nothing, shard missing": lambda c: (
        (c.parent / "latest").write_text("checkpoint-99999999"),
        (c / _SHARDS[1]).unlink(),
    ),
}


def _exchange(first: Path, second: Path) -> None:
    aside = first.with_suffix(".aside")
    first.rename(aside)
    second.rename(first)
    aside.rename(second)


def damage_newest(job: Job, name: str) -> Row:
    """Stop after six steps with three checkpoints, damage the newest, resume."""
    out = f"damage-{name.replace(' ', '-').replace(',', '')}"
    shutil.copytree(job.folder / "reference", job.folder / out)
    train = job.folder / out / "train"
    newest = list_checkpoints(train)[-1]
    assert newest.name.endswith(f"{STEPS:08d}")
    DAMAGES[name](newest)
    found, faults = open_latest(train)
    row: Row = {
        "damage": name,
        "fell_back_to": found.step if found else None,
        "said": [fault.replace(f"{job.folder}/", "") for fault in faults[:1]],
    }
    row["ok"] = row["fell_back_to"] == STEPS - SAVE_EVERY and bool(faults) and job.finish(out) == job.reference
    job.remove(out)
    return row


FULL_AT = ("shard-0", "shard-1", "manifest", "folder rename", "pointer", "log")


def fill_disk(what: str, refuse: int) -> None:
    """Let the disk refuse the `refuse`-th write of one kind: half of it arrives, then ENOSPC."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    seen = {"writes": 0}

    def refuses() -> bool:
        seen["writes"] += 1
        return seen["writes"] == refuse

    def wrap(module: Any, name: str, concerns: Callable[[Path], bool], half: bool) -> None:
        real = getattr(module, name)

        def wrapped(path: Path, *more: Any) -> Any:
            if concerns(Path(path)) and refuses():
                if half:
                    real(path, *more)
                    _truncate(Path(path), 0.5)
                raise full
            return real(path, *more)

        setattr(module, name, wrapped)

    if what.startswith("shard"):
        wrap(checkpoint, "write_tensors", lambda p: p.name.startswith(what), half=True)
    elif what == "manifest":
        wrap(checkpoint, "write_text", lambda p: p.name == "manifest.json", half=True)
    elif what == "pointer":
        wrap(checkpoint, "write_text", lambda p: p.name == "latest", half=False)
    elif what == "folder rename":
        wrap(checkpoint, "_replace_folder", lambda p: True, half=False)
    elif distributed.is_main():
        import clora.training.tracker as tracker

        real_open = Path.open

        def open_or_refuse(path: Path, mode: str = "r", *more: Any, **named: Any) -> Any:
            if path.name == "log.jsonl" and mode == "a" and refuses():
                with real_open(path, "a") as file:
                    file.write('{"step": ')  # a torn line
                raise full
            return real_open(path, mode, *more, **named)

        tracker.Path.open = open_or_refuse  # type: ignore[method-assign, assignment]


def disk_full(job: Job, what: str) -> Row:
    """The disk refuses one write of a run: it is named and counted, the run goes on and ends with the same weights."""
    out = f"full-{what.replace(' ', '-')}"
    running = job.start(out, prepare=fill_disk, given=(what, 2))
    codes = processes.finish(running)
    said = " ".join(running[0].text.split())
    row: Row = {"full_at": what, "codes": codes, "named": "No space left on device" in said}
    end = job.end_of(out)
    found, faults = open_latest(job.folder / out / "train")
    counted = [r.get("failed_checkpoints") for r in read_log(job.folder / out / "train")]
    row["counted"] = max((c for c in counted if c), default=0)
    same = {key: end[key] == job.reference[key] for key in ("shards", "collection", "rows")}
    row["ok"] = codes == [0, 0] and row["named"] and all(same.values()) and found is not None and not faults
    row["ok"] = row["ok"] and row["counted"] == (0 if what == "log" else 1)
    job.remove(out)
    return row


# Values that are not finite.

NOT_FINITE = [(v, where, rank) for v in ("nan", "inf") for where in ("loss", "gradient", "teacher") for rank in (0, 1)]
POISONED_STEP = 6  # of the effect stream


def poison(value: str, where: str, rank: int, report: Path) -> None:
    """Make one process's loss, gradient or teacher not finite at one step, and note whether anything was updated."""
    bad = float(value)
    terms, networks, update = distill.total_loss_terms, distill.networks_at, distill.student_update

    def poisoned_terms(nets: Any, batch: Any, *more: Any) -> Any:
        mine = distributed.rank() == rank and batch.step == POISONED_STEP and where != "teacher"
        for loss, figures in terms(nets, batch, *more):
            if mine:
                report.with_suffix(".time").write_text(str(time.time()))
            if mine and where == "gradient":
                loss.register_hook(lambda grad: grad * bad)
            yield loss * bad if mine and where == "loss" else loss, figures

    def poisoned_networks(d: Any, step: int) -> Any:
        nets = networks(d, step)
        if distributed.rank() != rank or step != POISONED_STEP or where != "teacher":
            return nets
        report.with_suffix(".time").write_text(str(time.time()))
        return distill.Networks(nets.student, nets.critic, lambda *a: nets.teacher(*a) * bad, nets.cat_conds)

    def watched_update(d: Any, *more: Any) -> Any:
        before = _state_of(d.student)
        try:
            return update(d, *more)
        except ArithmeticError:
            path = report.with_name(f"{report.name}-{distributed.rank()}")
            path.write_text(json.dumps({"unchanged": before == _state_of(d.student)}))
            raise

    distill.total_loss_terms = poisoned_terms
    distill.networks_at = poisoned_networks
    distill.student_update = watched_update


def _state_of(group: Any) -> str:
    digest = hashlib.sha256(repr((group.updates, group.steps)).encode())
    for tensor in (*group.snapshot().values(), *group.parameters.values()):
        digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def not_finite(job: Job, value: str, where: str, rank: int) -> Row:
    out = f"{value}-{where}-{rank}"
    report = job.folder / f"{out}.report"
    running = job.start(out, prepare=poison, given=(value, where, rank, report))
    codes = processes.finish(running)
    seconds = time.time() - float(report.with_suffix(".time").read_text())
    said = _last_error(running[0])
    unchanged = [json.loads(report.with_name(f"{report.name}-{r}").read_text())["unchanged"] for r in range(WORLD)]
    effect = any(f"{name} on " in said for name in NAMES)
    names = [f"step {POISONED_STEP} (student, effect stream", ".png", f"on process {rank} of 2", "nothing was updated"]
    row: Row = {"value": value, "where": where, "process": rank, "codes": codes, "stopped_s": round(seconds, 1)}
    row |= {"unchanged": unchanged, "said": said}
    steps = [r["step"] for r in read_log(job.folder / out / "train")]
    row["ok"] = codes == [1, 1] and seconds < STOP_S and all(unchanged)
    row["ok"] = (
        row["ok"] and effect and all(name in said for name in names) and steps == list(range(1, POISONED_STEP + 1))
    )
    row["ok"] = row["ok"] and job.finish(out) == job.reference
    job.remove(out)
    return row


# SIGTERM, as torchrun or a scheduler sends it.

TERM_PHASES = ("preparation", "coarse step", "critic update", "student update", "save", "last save")


def mark_phase(phase: str, marker: Path) -> None:
    """Say by a file when a phase is reached, and stay in it for half a second."""

    def mark(module: Any, name: str, when: Callable[..., bool] = lambda *_: True) -> None:
        real = getattr(module, name)

        def marked(*arguments: Any, **more: Any) -> Any:
            if when(*arguments) and not marker.exists():
                marker.write_text("here")
                time.sleep(0.5)
            return real(*arguments, **more)

        setattr(module, name, marked)

    if phase == "preparation":
        mark(workspace, "_encode_all")
    elif phase == "coarse step":
        mark(distill, "ta_fm_loss", lambda nets, batch, *_: batch.step == 1)
    elif phase == "critic update":
        mark(distill, "critic_loss", lambda nets, batch, *_: batch.step == 4)
    elif phase == "student update":
        mark(distill, "total_loss", lambda nets, batch, *_: batch.step == 6)
    else:
        step = STEPS if phase == "last save" else 4
        mark(checkpoint, "write_tensors", lambda path, *_: f"{step:08d}" in str(path))


def terminate(job: Job, phase: str, ranks: Sequence[int] = (0, 1)) -> Row:
    """SIGTERM to the processes in a phase. Ended by 143 with the step in flight saved; in the preparation, where there
    is nothing to save, by the signal itself (which a shell shows as 143 as well)."""
    out = f"term-{phase.replace(' ', '-')}-{len(ranks)}"
    marker = job.folder / f"{out}.marker"
    running = job.start(out, prepare=mark_phase, given=(phase, marker))
    _wait_until(marker.exists, running)
    for rank in ranks:
        running[rank].signal(signal.SIGTERM)
    started = time.monotonic()
    codes = processes.finish(running)
    row: Row = {"phase": phase, "processes": list(ranks), "codes": codes, "s": round(time.monotonic() - started, 1)}
    found, faults = open_latest(job.folder / out / "train")
    row["saved_step"] = found.step if found else None
    if phase == "preparation":
        row["ok"] = set(codes) <= {-signal.SIGTERM, 1} and -signal.SIGTERM in codes and found is None
    else:
        rows = [r["step"] for r in read_log(job.folder / out / "train")]
        row["ok"] = codes == [143, 143] and not faults and row["saved_step"] == rows[-1]
        row["ok"] = row["ok"] and "--resume latest" in _last_error(running[0])
    row["ok"] = row["ok"] and row["s"] < GRACE_S and job.finish(out) == job.reference
    job.remove(out)
    return row


def terminate_torchrun(job: Job) -> Row:
    """SIGTERM to torchrun, which passes it on, and itself ends by 1 whatever its processes do."""
    out = "term-torchrun"
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--nproc_per_node", str(WORLD), "-m", "clora"]
    command = job.command(out, "train.max_train_steps=1000")
    said = job.folder / "torchrun.txt"
    log = job.folder / out / "train" / "log.jsonl"
    with said.open("wb") as file:
        popen = subprocess.Popen([*torchrun, *command], stdout=file, stderr=subprocess.STDOUT)
    end = time.monotonic() + 120
    while not (log.exists() and log.read_bytes().count(b"\n") >= 3):
        assert popen.poll() is None and time.monotonic() < end, said.read_text()
        time.sleep(0.005)
    popen.send_signal(signal.SIGTERM)
    started = time.monotonic()
    row: Row = {"phase": "torchrun", "codes": [popen.wait(60)], "s": round(time.monotonic() - started, 1)}
    found, faults = open_latest(log.parent)
    row["saved_step"] = found.step if found else None
    row["ok"] = not faults and row["saved_step"] == [r["step"] for r in read_log(log.parent)][-1]
    row["ok"] = row["ok"] and row["s"] < GRACE_S and "stopped by SIGTERM; saved" in said.read_text()
    job.remove(out)
    return row


# A process that hangs.


def hang(job: Job, rank: int) -> Row:
    """One process is stopped; the other must give up after `train.timeout_seconds`, with one clear error."""
    out = f"hang-{rank}"
    running = job.start(out, "train.timeout_seconds=4")
    log = job.folder / out / "train" / "log.jsonl"
    _wait_until(lambda: log.exists() and log.read_bytes().count(b"\n") >= 3, running)
    running[rank].signal(signal.SIGSTOP)
    started = time.monotonic()
    _wait_until(lambda: running[1 - rank].code is not None, [*running, running[rank]])
    seconds = time.monotonic() - started
    processes.kill(running)
    said = _last_error(running[1 - rank])
    row: Row = {"process": rank, "code": running[1 - rank].code, "stopped_s": round(seconds, 1), "said": said}
    row["ok"] = row["code"] == 1 and seconds < 4 + STOP_S and "another process died or hangs" in said
    row["ok"] = row["ok"] and job.finish(out) == job.reference
    job.remove(out)
    return row


def _last_error(process: processes.Process) -> str:
    """The last line that begins with `error`, and what a console of 80 columns made of it."""
    text = "\n" + process.text
    at = text.rfind("\nerror")
    return " ".join(text[at:].split())[:600] if at >= 0 else ""


def all_cases(job: Job) -> dict[str, list[tuple[Callable[..., Row], tuple[Any, ...]]]]:
    """Every table, case by case."""
    return {
        "kill_at_step": [(kill_at_step, (job, seed)) for seed in range(10)],
        "kill_in_save": [(kill_in_save, (job, *case)) for case in kill_in_save_cases()],
        "damage": [(damage_newest, (job, name)) for name in DAMAGES],
        "disk_full": [(disk_full, (job, what)) for what in FULL_AT],
        "not_finite": [(not_finite, (job, *case)) for case in NOT_FINITE],
        "sigterm": [
            *((terminate, (job, phase)) for phase in TERM_PHASES),
            (terminate, (job, "student update", (1,))),
            (terminate_torchrun, (job,)),
        ],
        "hang": [(hang, (job, rank)) for rank in (0, 1)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    parser.add_argument("--only", nargs="*", help="names of tables")
    arguments = parser.parse_args()
    from tests.support.random_base import write_random_base

    with tempfile.TemporaryDirectory() as folder:
        base = write_random_base(Path(folder) / "base")
        tables: dict[str, list[Row]] = {}
        started = time.monotonic()
        for name, cases in all_cases(make_job(Path(folder) / "job", base)).items():
            if arguments.only and name not in arguments.only:
                continue
            rows = tables[name] = []
            for case, given in cases:
                try:
                    rows.append(case(*given))
                except AssertionError as error:
                    rows.append({"case": repr(given[1:]), "ok": False, "error": str(error)})
                print(f"{name} {len(rows)}/{len(cases)}: {'ok' if rows[-1]['ok'] else rows[-1]}", flush=True)
        passed = {name: f"{sum(row['ok'] for row in rows)}/{len(rows)}" for name, rows in tables.items()}
        print(json.dumps(passed))
        if arguments.out:
            result = {
                "command": "python -m tests.support.torture",
                "what": f"`clora train` on {WORLD} gloo processes, a random base of 2 blocks, {STEPS} steps",
                "seconds": round(time.monotonic() - started),
                "torch": torch.__version__,
                "passed": passed,
                "tables": tables,
            }
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    if any(not row["ok"] for rows in tables.values() for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
