"ddpm_ablate: stopped and killed at any moment it goes on to the same table, on one process and on two; whatever goes wrong is one line."
import csv
import json
import math
import os
import signal
import time
from functools import partial

import pytest
import torch
from conftest import Python

import ddpm_nbdev.ablation as ablation
from ddpm_nbdev.ablate_cli import ddpm_ablate
from ddpm_nbdev.ablation import TABLES, _Budget, ablate, _choose_cells, plot_cells, _read_rows
from ddpm_nbdev.commands import _make_parser
from ddpm_nbdev.files import read_log
from ddpm_nbdev.train import preset

torch.set_num_threads(1)
TINY = dict(steps=3, T=4, samples=4)
SMALL = ["--steps", 3, "--T", 4, "--samples", 4]
TWO = ["eps-vlb-beta", "x0-simple-beta"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder): return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def same(a, b):
    "Rows are equal but for rounding, the time they took, and spikes: a training that is stopped logs one line more."
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert x.keys() == y.keys()
        for k in x.keys() - {"seconds", "spikes"}: assert x[k] == (pytest.approx(y[k], rel=1e-3, abs=1e-6) if isinstance(y[k], float) else y[k]), k


def until(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(.02)


def command(*args): return Python("-m", "ddpm_nbdev.ablate_cli", "digits", *args, env=dict(os.environ, OMP_NUM_THREADS="1"))


def training(run):
    "Is somebody in the middle of it?"
    return (run/"log.jsonl.new").exists() and (run/".ddpm_writer").exists()


# ---- stopped

STOPPED = ["--only", *TWO, "--seeds", 1, "--steps", 40, "--T", 4, "--samples", 4]


@pytest.fixture(scope="module")
def whole(once):
    "The rows of the same table, never stopped."
    return once("ablation", lambda folder: ablate("digits", folder/"table", steps=40, T=4, samples=4, seeds=1, cells=TWO))


@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_and_on(processes, here, whole):
    args = [*STOPPED, "--processes", processes]
    runs = [here/"ablation"/f"{name}-seed0" for name in TWO][:processes]
    p = command(*args)
    until(lambda: p.poll() is not None or all(map(training, runs)))
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(60)
    assert p.returncode == 130 and err.strip() == "ddpm_ablate: stopped; the same call goes on with ablation", (out, err)
    assert all((run/"checkpoint.safetensors").exists() and not list(run.glob("row-*")) for run in runs)     # saved where it was
    reached = [read_log(run)[-1]["step"] for run in runs]
    assert all(0 < step < 40 for step in reached)
    p = command(*args)
    out, err = p.communicate(120)
    assert (p.returncode, err) == (0, ""), err
    for run, step in zip(runs, reached): assert step in [row["step"] for row in read_log(run)]             # went on, did not begin anew
    same(_read_rows("ablation"), whole)


def test_killed_and_on(here, whole):
    "Nothing can be saved by the one that is killed; its two trainings notice, save, and end."
    args = [*STOPPED, "--processes", 2]
    runs = [here/"ablation"/f"{name}-seed0" for name in TWO]
    p = command(*args)
    until(lambda: p.poll() is not None or all(map(training, runs)))
    p.kill()
    p.wait(10)
    until(lambda: all((run/"checkpoint.safetensors").exists() and not (run/".ddpm_writer").exists() for run in runs))
    assert not list(here.glob("ablation/*/row-*")) and not list(here.glob("ablation/objectives*"))
    p = command(*args)
    out, err = p.communicate(120)
    assert (p.returncode, err) == (0, ""), err
    same(_read_rows("ablation"), whole)


def test_stopped_between_training_and_measuring(here, monkeypatch):
    "What is trained is not trained again, what is measured not measured again."
    whole = ablate("digits", "whole", cells=["eps-simple-beta", "eps-simple-beta_tilde"], seeds=1, **TINY)
    measure, calls = ablation._measure_row, []
    def stops(*args):
        calls.append(args)
        if len(calls) == 2: raise KeyboardInterrupt
        return measure(*args)
    go = partial(ablate, "digits", "part", cells=["eps-simple-beta", "eps-simple-beta_tilde"], seeds=1, **TINY)
    with monkeypatch.context() as m:
        m.setattr(ablation, "_measure_row", stops)
        with pytest.raises(KeyboardInterrupt, match="the same call goes on with part"): go()
    assert [r["cell"] for r in _read_rows("part")] == ["eps-simple-beta"] and not os.path.exists("part/objectives.md")
    before = contents(here/"part")
    same(go(), whole)
    assert {k: v for k, v in contents(here/"part").items() if k in before and v != before[k]} == {}
    assert set(contents(here/"part")) - set(before) == {f"objectives.{e}" for e in ("md", "csv", "json", "png")} | {f"eps-simple-beta-seed0/row-beta_tilde.{e}" for e in ("json", "png")}


# ---- several processes

def test_an_error_of_a_process_is_one_line(call, here):
    "It stops the others, and what they have is kept."
    assert call(ddpm_ablate, "digits", *SMALL, "--only", "mu-vlb-beta", "--seeds", 1, "--quiet") == (0, "", "")
    run = here/"ablation"/"mu-vlb-beta-seed0"
    (run/"row-beta.json").unlink()
    (run/"checkpoint.safetensors").write_bytes(b"not a checkpoint")
    status, out, err = call(ddpm_ablate, "digits", *SMALL, "--only", "mu-vlb-beta", "--processes", 2)
    assert status == 1 and len(err.splitlines()) == 1 and "mu-vlb-beta-seed0/checkpoint.safetensors" in err, err


def test_a_process_that_is_killed(here):
    with pytest.raises(ValueError, match="ended with status -9"):
        process, pipe = ablation._start((here/"x", _choose_cells(only=["mu-vlb-beta"]), 0, _Budget(steps=600)))
        until(lambda: training(here/"x"/"mu-vlb-beta-seed0"))
        process.kill()
        ablation._ended(process, pipe)


# ---- the table

def test_all_cells(here):
    "Each of them trains, is measured, and is in every file."
    rows = ablate("digits", "all", seeds=1, **TINY)
    assert [r["cell"] for r in rows] == [c.name for c in TABLES["objectives"]]
    assert not any(r["failed"] for r in rows)
    assert len(list(here.glob("all/*-seed0"))) == 12
    lines = list(csv.DictReader(open("all/objectives.csv")))
    assert [float(r["total"]) for r in lines] == [r["total"] for r in rows]
    text = open("all/objectives.md").read().splitlines()
    assert text[:2] == ["digits: 3 updates, T = 4", ""] and len(text) == 2+2+15 and {line.count("|") for line in text[2:]} == {11}
    assert len(json.load(open("all/objectives.json"))["cells"]) == 15
    assert sum(len(ax.images) for ax in plot_cells("all").axes) == 15
    for table in TABLES: assert len(_read_rows("all", table)) == (15 if table == "objectives" else 2)       # the linear cells are shared
    assert len(ablate("digits", "all", seeds=1, table="schedules", **TINY)) == 6


def test_what_diverges_is_a_row(here, monkeypatch):
    monkeypatch.setattr(ablation, "preset", lambda *a, **kw: preset(*a, **kw | (dict(lr=1e30, warmup=0) if kw.get("mean") == "mu" else {})))
    rows = ablate("digits", "out", cells=["mu-vlb-beta", "eps-vlb-beta"], seeds=1, steps=30, T=4, samples=4)
    assert rows[0]["failed"].startswith("diverged at step") and rows[1]["failed"] is None and "total" not in rows[0]
    assert "| mu-vlb-beta | – |" in open("out/objectives.md").read() and "diverged at step" in open("out/objectives.csv").read()
    before = contents(here/"out")
    assert ablate("digits", "out", cells=["mu-vlb-beta", "eps-vlb-beta"], seeds=1, steps=30, T=4, samples=4) == rows
    assert {k: v for k, v in contents(here/"out").items() if not k.endswith(".png")} == {k: v for k, v in before.items() if not k.endswith(".png")}


def test_a_network_that_gives_nan_is_a_row(here, monkeypatch):
    def nan(*args): raise ValueError("the network gives values that are not finite")
    monkeypatch.setattr(ablation, "_judged", nan)
    assert ablate("digits", "out", cells=["mu-vlb-beta"], seeds=1, **TINY)[0]["failed"] == "its network gives what is not finite"
    def other(*args): raise ValueError("something else")
    monkeypatch.setattr(ablation, "_judged", other)
    with pytest.raises(ValueError, match="something else"): ablate("digits", "out", cells=["eps-vlb-beta"], seeds=1, **TINY)


def test_overwrite_removes_what_is_ours(here):
    ablate("digits", "out", cells=TWO, seeds=1, **TINY)
    (here/"out"/"notes.txt").write_text("mine")
    (here/"out"/"my-run-seed0").mkdir()
    with pytest.raises(ValueError, match="T was 4, is now 5"): ablate("digits", "out", cells=TWO, **TINY | dict(T=5))
    rows = ablate("digits", "out", cells=TWO[:1], seeds=[3], overwrite=True, **TINY | dict(T=5))
    assert [(r["cell"], r["seed"]) for r in rows] == [(TWO[0], 3)]
    assert {p.name for p in (here/"out").iterdir() if p.is_dir()} == {"my-run-seed0", f"{TWO[0]}-seed3"}
    assert (here/"out"/"notes.txt").read_text() == "mine"


# ---- what goes wrong

WRONG = [
    ([], 2, "DATASET"), (["cifar10"], 2, "no judge for 'cifar10'; there is one for: digits, fashion_mnist"), (["digits", "--only"], 2, "--only"),
    (["digits", "--only", "eps-simple-beta", "eps"], 2, "unknown cell 'eps'; known: mu-vlb-learned, "), (["digits", "--table", "x"], 2, "unknown table 'x'; known: objectives, schedules"),
    (["digits", "--table", "schedules", "--only", "mu-vlb-beta"], 2, "known: eps-simple-beta, "), (["digits", "--steps", 0], 2, "steps must be at least 1"),
    (["digits", "--seeds", 0], 2, "seeds must be at least 1"), (["digits", "--seeds", "x"], 2, "invalid int value"), (["digits", "--T", 0], 2, "T must be at least 1"),
    (["digits", "--samples", 1], 2, "samples must be a whole number, at least 2"), (["digits", "--processes", 0], 2, "processes must be at least 1"),
    (["digits", "--out", "there"], 1, "there is a file, not a folder: choose another --out"), (["digits", "--out", "mine"], 1, "mine holds something else than a table"),
    (["digits", "--out", "mine", "--overwrite"], 1, "mine holds something else than a table"), (["digits", "--out", "broken"], 1, "not JSON"),
    (["digits", "--out", "other"], 1, "the table in other has other settings: dataset was fashion_mnist, is now digits; steps was 9, is now 900")]


@pytest.mark.parametrize("args, status, said", WRONG, ids=lambda v: " ".join(map(str, v)) if isinstance(v, list) else None)
def test_refuses(args, status, said, call, here):
    (here/"there").write_text("a file")
    for name, file, text in (("mine", "thesis.txt", "all"), ("broken", "ablation.json", "{"),
                             ("other", "ablation.json", json.dumps(dict(dataset="fashion_mnist", steps=9, T=1000, samples=256)))):
        (here/name).mkdir()
        (here/name/file).write_text(text)
    before = contents(here)
    code, out, err = call(ddpm_ablate, *args)
    assert code == status and not out and len(err.strip().splitlines()) == 1 and said in err and err.startswith("ddpm_ablate: "), err
    assert contents(here) == before


def test_it_says_what_the_numbers_are_worth(call, here):
    "Few samples, a short chain, a model that is worse than none; then that nothing was left to train, and how to go on with a table of other settings."
    args = ["digits", "--only", "eps-vlb-learned", "--seeds", 1, "--steps", 4, "--samples", 16]
    status, out, err = call(ddpm_ablate, *args, "--T", 30)
    lines = out.splitlines()
    assert (status, err) == (0, "") and lines[0].startswith("note: with 16 samples FID is large and says little") and lines[1].startswith("note: with T=30 the linear schedule")
    assert lines[2].startswith("digits, 1 cell, seed 0: 1 training of 4 updates, about ")
    row, = _read_rows("ablation")
    note, = (o for o in lines if "as they are" in o)
    assert row["total"] > math.log2(17) and note.startswith(f"note: as they are, these images take {math.log2(17):.2f} bits/dim; more is needed by eps-vlb-learned ({row['total']:.1f})")
    before = contents(here/"ablation"/"eps-vlb-learned-seed0")
    status, out, err = call(ddpm_ablate, *args, "--T", 30)
    assert (status, err) == (0, "") and "all of it is there already, so nothing is trained; in ablation" in out and contents(here/"ablation"/"eps-vlb-learned-seed0") == before
    status, out, err = call(ddpm_ablate, "digits", "--steps", 9)
    assert (status, out) == (1, "") and "go on with it by --steps 4 --T 30 --samples 16, choose another --out, or --overwrite it" in err
    assert call(ddpm_ablate, *args, "--T", 30, "--quiet") == (0, "", "")


def test_a_table_of_good_rows_has_no_such_note():
    from ddpm_nbdev.ablate_cli import _notes, _worse_than_none
    rows = [dict(cell="a", total=2.), dict(cell="a", total=4.), dict(cell="b", total=None), dict(cell="c")]
    assert not _worse_than_none(rows, 17) and "more is needed by a (4.0), whatever" in _worse_than_none(rows, 8)
    assert not list(_notes(256, 1000)) and len(list(_notes(99, 499))) == 2


def test_somebody_else_writes_there(call, here):
    with ablation.only_writer("ablation"):
        before = contents(here)
        ablation_held = partial(command, *SMALL, "--only", "eps-vlb-beta")
        out, err = (p := ablation_held()).communicate(60)
        assert p.returncode == 1 and "another run writes there" in err and len(err.splitlines()) == 1
        assert contents(here) == before


def test_help(call):
    for action in _make_parser(ddpm_ablate.__wrapped__)._actions: assert action.help and not any("_" in s for s in action.option_strings)
    status, out, _ = call(ddpm_ablate, "--help")
    assert status == 0 and "--only CELL [CELL ...]" in out


def test_only_given_twice_is_two_cells():
    options = _make_parser(ddpm_ablate.__wrapped__).parse_args(["digits", "--only", "mu-vlb-beta", "--only", "eps-vlb-beta", "x0-vlb-beta"])
    assert options.only == ["mu-vlb-beta", "eps-vlb-beta", "x0-vlb-beta"]
