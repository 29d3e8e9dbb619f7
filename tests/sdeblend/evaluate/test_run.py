"""The results folder: killed, resumed, damaged, shared by processes, and told again from its rows alone."""

import errno
import gzip
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sdeblend.evaluate.command import main
from sdeblend.evaluate.compare import main as compare
from sdeblend.evaluate.plan import load_plan
from sdeblend.evaluate.results import Estimate
from sdeblend.evaluate.run import evaluate, manifest
from sdeblend.evaluate.store import Folder, load
from sdeblend.evaluate.summary import summarise
from sdeblend.evaluate.tables import markdown
from sdeblend.reward import Reward
from sdeblend.shell import registry
from sdeblend.shell.cli import main as cli
from sdeblend.shell.processes import Processes
from stablediffusion.rewards import REWARDS
from tests.support.strategies import refuses

ROOT = Path(__file__).resolve().parents[3]
CONFIG = """
[backend]
kind = "mixture"
problems = ["ring8"]
steps = {steps}
[grid]
methods = {methods}
preferences = ["equal", [0.2, 0.8]]
strengths = [1.0, 1.5]
seeds = 60
block = 30
[methods.code]
candidates = 2
[report]
resamples = 100
reference = "mpa"
"""
METHODS = ["mpa", "mpa-corrected", "ls-systematic", "code"]


def config(folder, steps=6, methods=METHODS, **replaced):
    text = CONFIG.format(steps=steps, methods=json.dumps(methods))
    if "code" not in methods:
        text = text.replace("[methods.code]\ncandidates = 2\n", "")
    for old, new in replaced.items():
        text = text.replace(old, new)
    file = folder / f"config-{abs(hash(text))}.toml"
    file.write_text(text)
    return file


def run(file, out, **options):
    return evaluate(load_plan(file), Folder(out), world=options.pop("world", Processes()), **options)


def content(out):
    """Return every file of rows as bytes, and every cell without the seconds it took."""
    rows = {file.name: file.read_bytes() for file in (out / "rows").iterdir()}
    cells = {file.name: json.loads(file.read_text()) for file in (out / "cells").iterdir()}
    for cell in cells.values():
        cell.pop("seconds", None)
    return rows, cells


def told(*folders):
    """Return the summary and the tables of results, without figures, which cost most."""
    (stored,) = load([Folder(folder) for folder in folders])
    summary = summarise(stored)
    return summary, markdown(summary)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return a finished run and its configuration."""
    folder = tmp_path_factory.mktemp("whole")
    file = config(folder)
    assert run(file, folder / "out") == []
    return file, folder / "out"


def test_one_row_a_sample_with_all_that_it_is_of(whole):
    _, out = whole
    cells = [Folder(out).read(key) for key in Folder(out).stored()]
    # Four methods, two preferences, two strengths, two blocks; one member a step needs probabilities.
    assert len(cells) == 4 * 2 * 2 * 2
    left_out = [cell.record for cell in cells if cell.record.left_out]
    assert {(record.method, record.strength) for record in left_out} == {("ls-systematic", 1.5)} and len(left_out) == 4
    rows = [row for cell in cells for row in cell.rows]
    assert len(rows) == (4 * 2 * 2 - 2) * 60
    assert len({(r.method, r.strength, *r.preference.values(), r.seed) for r in rows}) == len(rows)
    for row in rows:
        weighted = sum(w * row.rewards[name] for name, w in row.preference.items())
        assert row.weighted == pytest.approx(weighted, rel=1e-6)
        assert row.model_calls > 0 and len(row.x) == 2
    plain = [row for row in rows if row.method == "mpa"]
    assert all(row.log_weight == 0 and row.ancestor == row.seed for row in plain)
    assert any(row.log_weight for row in rows if row.method == "mpa-corrected")


def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(tmp_path):
    file = config(tmp_path, steps=40)
    program = [sys.executable, "-m", "sdeblend.evaluate", str(file), "--out", str(tmp_path / "killed")]
    process = subprocess.Popen(program, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 400
    while len(list((tmp_path / "killed" / "cells").glob("*.json"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(Folder(tmp_path / "killed").stored())
    assert 3 <= done < 32
    # What a kill between the two files of a cell leaves: rows that nothing speaks for.
    (tmp_path / "killed" / "rows" / "0123.jsonl.gz").write_bytes(b"half a file")
    refuses(lambda: run(file, tmp_path / "killed"), "say --resume")
    assert run(file, tmp_path / "killed", resume=True) == []
    (tmp_path / "killed" / "rows" / "0123.jsonl.gz").unlink()
    run(file, tmp_path / "whole")
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_two_processes_give_the_rows_of_one(whole, tmp_path):
    file, out = whole
    for rank in (0, 1):
        run(file, tmp_path / "two", world=Processes(rank, 2))
        if rank == 0:
            assert 0 < len(Folder(tmp_path / "two").stored()) < 32
    assert content(tmp_path / "two")[0] == content(out)[0]


@pytest.mark.slow
def test_accelerate_launch_gives_the_rows_of_one(whole, tmp_path):
    file, out = whole
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launch, "-m", "sdeblend.evaluate", str(file), "--out", str(tmp_path / "two")],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert content(tmp_path / "two") == content(out)
    assert (tmp_path / "two" / "tables.md").exists()


@pytest.mark.parametrize("how", ["truncated rows", "lost rows", "other rows", "truncated cell"])
def test_what_is_damaged_is_noticed_and_computed_again(whole, tmp_path, how):
    file, out = whole
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(out), str(copy)], check=True)
    folder = Folder(copy)
    key = next(k for k in folder.stored() if folder.read(k)[1])
    rows, cell = copy / "rows" / f"{key}.jsonl.gz", copy / "cells" / f"{key}.json"
    if how == "truncated rows":
        rows.write_bytes(rows.read_bytes()[:-100])
    elif how == "lost rows":
        rows.unlink()
    elif how == "other rows":
        text = gzip.decompress(rows.read_bytes()).splitlines(keepends=True)
        rows.write_bytes(gzip.compress(b"".join(text[1:])))
    else:
        cell.write_text(cell.read_text()[:40])
    refuses(lambda: compare([str(copy)]), key, "truncated or damaged", "--resume")
    (note,) = run(file, copy, resume=True)
    assert key in note and "computed again" in note
    assert content(copy) == content(out)


def test_another_configuration_is_refused(whole, tmp_path):
    file, out = whole
    other = config(tmp_path, steps=7)
    refuses(lambda: run(other, out, resume=True), "another configuration", "backend.steps was 6, now 7")
    fewer = config(tmp_path, methods=METHODS[:2])
    refuses(lambda: run(fewer, out, resume=True), "another configuration", "methods")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary.txt").write_text("mine")
    refuses(lambda: run(file, tmp_path / "full"), "empty or a results folder")
    (tmp_path / "full" / "manifest.json").write_text("{")
    refuses(lambda: run(file, tmp_path / "full"), "not a manifest")
    refuses(lambda: compare([str(tmp_path)]), "holds no results")
    # How results are told may change.
    told = config(tmp_path, **{'reference = "mpa"': 'reference = "code"'})
    assert run(told, out, resume=True) == [] and Folder(out).manifest().report.reference == "code"
    assert run(file, out, resume=True) == []


def test_what_a_kill_leaves_of_a_manifest_is_no_other_file(tmp_path):
    file, out = config(tmp_path, methods=["mpa"]), tmp_path / "out"
    out.mkdir()
    (out / ".0123456789abcdef.part").write_text('{"form')
    assert run(file, out) == [] and run(file, out, resume=True) == []
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".hidden").write_text("mine")
    refuses(lambda: run(file, tmp_path / "other"), "empty or a results folder")


@pytest.mark.parametrize("when", [8, 9])
def test_a_full_disk_costs_the_cell_in_progress_alone(tmp_path, monkeypatch, capsys, when):
    file, out, sync, seen = config(tmp_path, methods=["mpa"]), tmp_path / "out", os.fsync, []

    def full(number):
        # The manifest, then rows and head of each cell; the disk is full on rows or on a head.
        seen.append(number)
        if len(seen) >= when:
            os.ftruncate(number, 10)
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(number)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert cli(["evaluate", str(file), "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(out) in line and "No space left on device; finished cells are stored" in line and "--resume" in line
    folder = Folder(out)
    assert len(folder.stored()) == 3 and all(folder.damage(key) is None for key in folder.stored())
    assert not list(out.rglob("*.part"))
    assert run(file, out, resume=True) == []
    run(file, tmp_path / "whole")
    assert content(out) == content(tmp_path / "whole")


def test_versions_are_pinned(whole, tmp_path, monkeypatch):
    file, out = whole
    version = importlib.metadata.version
    pinned = Folder(out).manifest().fixed
    for name in ("sdeblend", "torch", "diffusers", "transformers", "peft", "numpy", "scipy", "pillow", "moocore"):
        assert pinned[f"version.{name}"] == version(name)
        monkeypatch.setattr(registry, "version", lambda n, name=name: "0" if n == name else version(n))
        refuses(lambda: run(file, out, resume=True), f"version.{name} was", "now \"0\"")

    def lacking(name):
        if name == "peft":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(registry, "version", lacking)
    plan = load_plan(file)
    assert "version.peft" not in manifest(plan, plan.backend()).fixed


PIPELINE = """
[backend]
kind = "pipeline"
prompts = "{prompts}"
report = ["align", "learned"]
steps = 2
[backend.members]
compress = "compress"
vivid = "vivid"
[backend.scales]
vivid = 0.5
[grid]
methods = ["mpa"]
seeds = 2
"""


class Learned:
    """A reward with weights."""

    def __init__(self, weight):
        self.top = torch.nn.Linear(1, 1)
        torch.nn.init.constant_(self.top.weight, weight)
        torch.nn.init.zeros_(self.top.bias)

    def __call__(self, images, condition):
        return self.top(images.mean((1, 2, 3))[:, None])[:, 0]


def test_a_pipeline_is_pinned_to_its_prompts_networks_and_scales(tmp_path, monkeypatch):
    prompts, file = tmp_path / "prompts.txt", tmp_path / "c.toml"
    prompts.write_text("a ring\n")
    file.write_text(PIPELINE.format(prompts=prompts))
    plan = load_plan(file)

    def pinned(weight=1.0, change=""):
        monkeypatch.setitem(REWARDS, "learned", Reward("learned", Learned(weight), True, "none"))
        backend = plan.backend()
        if change:
            part = next(backend.pipe.components[change].parameters())
            part.data.mul_(1.01)
        return manifest(plan, backend)

    first = pinned()
    folder = Folder(tmp_path / "out")
    folder.open(first, resume=False)
    folder.open(pinned(), resume=True)
    # Another base is refused by the members, which were not tuned on it.
    for key, changes in {
        "vae": {"change": "vae"}, "text_encoder": {"change": "text_encoder"}, "learned top": {"weight": 1.01},
    }.items():  # fmt: skip
        other = pinned(**changes)
        changed = [name for name, value in other.fixed.items() if first.fixed[name] != value]
        assert changed == [f"identity.networks.{key}"]
        refuses(lambda other=other: folder.open(other, resume=True), f"identity.networks.{key} was")
    assert {"identity.networks.unet", "identity.networks.scorer"} <= set(first.fixed)
    assert {(reward.name, round(reward.scale, 3), reward.unit) for reward in first.rewards} == {
        ("compress", 0.134, "kB of JPEG saved"), ("vivid", 0.5, "colourfulness, pixels in [0, 1]"),
        ("align", 1.0, "nats, of the bundled model's captions"), ("learned", 1.0, "none"),
    }  # fmt: skip
    assert {variant for reward in first.rewards for variant in reward.variants} == {"guidance 1.5"}
    # The file of prompts has the same name and says something else.
    prompts.write_text("a square\n")
    refuses(lambda: folder.open(pinned(), resume=True), "prompts was [\"a ring\"], now [\"a square\"]")


def test_tables_come_back_from_rows_alone(whole, tmp_path, monkeypatch, capsys):
    file, _ = whole
    out = tmp_path / "out"
    assert main([str(file), "--out", str(out)]) == 0
    names = ["tables.md", "tables.tex", "summary.json", "figures/pareto.png"]
    before = {name: (out / name).read_bytes() for name in names}
    monkeypatch.setattr("sdeblend.evaluate.plan.Plan.backend", None)  # nothing samples
    assert compare([str(out), "--out", str(tmp_path / "again")]) == 0
    assert {name: (tmp_path / "again" / name).read_bytes() for name in names} == before
    text = before["tables.md"].decode()
    assert "(exact target)" in text and json.loads(before["summary.json"])["fronts"][0]["target"]
    assert "n = 60 samples a method in 2 block(s)" in text and "probabilities" in text and "model calls" in text
    assert capsys.readouterr().out.count("tables.md") == 2


def test_methods_that_ran_apart_are_told_together(whole, tmp_path):
    _, out = whole
    for name in METHODS:
        run(config(tmp_path, methods=[name], **{'reference = "mpa"': ""}), tmp_path / name)
    (together, _), (one, _) = told(*(tmp_path / name for name in METHODS)), told(out)
    for group, other in zip(together.groups, one.groups, strict=True):
        for name, method in group.methods.items():
            assert method.weighted == other.methods[name].weighted
            assert method.win_rate == other.methods[name].win_rate


def test_marks_say_what_is_not_known(whole):
    summary, _ = told(whole[1])

    group = summary.groups[0]
    method, distance = group.methods["mpa-corrected"], group.methods["mpa-corrected"].distances["mode TV"]

    def told_with(**changes):
        methods = group.methods | {"mpa-corrected": method.model_copy(update=changes)}
        groups = [group.model_copy(update={"methods": methods}), *summary.groups[1:]]
        return markdown(summary.model_copy(update={"groups": groups}))

    for above, share, mark in ((True, 1.0, ""), (False, 1.0, "*"), (False, 0.05, "?")):
        seven = distance.model_copy(update={"value": 7.0, "low": 6.0, "high": 8.0, "above_floor": above})
        assert f"| 7 ± 1{mark} " in told_with(distances={"mode TV": seven}, effective_share=share)
    for significant, mark in ((True, ""), (False, "~")):
        three = Estimate(value=3.0, low=1.0, high=5.0, significant=significant)
        assert f"| +3 ± 2{mark} |" in told_with(difference=three)


def test_a_method_that_diverges_is_told_and_the_rest_goes_on(tmp_path):
    text = "[methods.guidance]\nscale = 1e39\n[report]"
    file = config(tmp_path, methods=["mpa", "guidance"], **{"[report]": text})
    notes = run(file, tmp_path / "out")
    assert len(notes) == 8 and all("guidance on ring8" in note and "finite" in note for note in notes)
    assert "failed: the state must stay finite" in told(tmp_path / "out")[1]


def test_a_run_that_is_not_finished_is_told_as_far_as_it_pairs(tmp_path):
    file = config(tmp_path, methods=["mpa", "mpa-corrected"])
    run(file, tmp_path / "out")
    folder = Folder(tmp_path / "out")
    last = max(folder.stored(), key=lambda key: folder.read(key).record.index)
    (tmp_path / "out" / "cells" / f"{last}.json").unlink()
    summary, tables = told(tmp_path / "out")
    assert [(g.n, g.incomplete) for g in summary.groups] == [(60, False)] * 3 + [(30, True)]
    assert "not finished" in tables


def test_a_claimed_order_is_checked_pair_by_pair(whole, tmp_path):
    file, out = whole
    claim = config(tmp_path, **{'reference = "mpa"': 'reference = "mpa"\norder = ["mpa-corrected", "mpa", "code"]'})
    assert run(claim, out, resume=True) == []
    summary, tables = told(out)
    for group in summary.groups:
        first, second = group.order
        assert (first.low, first.high) == ("mpa-corrected", "mpa")
        # The pair with the reference says the same as the table of differences, the other way round.
        assert first.difference.value == pytest.approx(-group.methods["mpa-corrected"].difference.value)
        assert second.difference.value == pytest.approx(group.methods["code"].difference.value)
    told_pairs = [line for line in tables.splitlines() if line.startswith("| DB-MPA < CoDe")]
    assert len(told_pairs) == 1 and told_pairs[0].count("|") == 2 + len(summary.groups)
    verdicts = {True: "holds", False: "contradicted"}
    for found in (claim.difference for group in summary.groups for claim in group.order):
        shown = verdicts[found.value > 0] if found.significant else "open"
        assert shown in tables
    assert run(file, out, resume=True) == []
