"`ddpm_runs`: what it says of real runs, that damage is one line and hides no other run, and that it needs no PyTorch."
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from conftest import failed

from ddpm_nbdev import quality
from ddpm_nbdev.cli import ddpm_train
from ddpm_nbdev.files import read_log
from ddpm_nbdev.run import _resume_command, only_writer
from ddpm_nbdev.runs_cli import _again, ddpm_runs
from ddpm_nbdev.saved import checkpoint_header

torch.set_num_threads(1)
TINY = dict(T=4, batch_size=4, samples=0, quiet=True, log_every=1)


@pytest.fixture(scope="module")
def made(once):
    "A finished run, one that was stopped, one that was stopped before its first checkpoint."
    def make(folder):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(quality, "_EVALUATION_PIXELS", 20_000)
            patch.chdir(folder)
            ddpm_train("digits", steps=12, out="runs/done", **TINY)
            ddpm_train("digits", steps=4, out="runs/half way", **TINY)
        file = folder/"runs/half way/checkpoint.safetensors"
        raw = file.read_bytes()
        assert raw.count(b'\\"steps\\": 4,') == 1
        file.write_bytes(raw.replace(b'\\"steps\\": 4,', b'\\"steps\\": 9,'))
        (folder/"runs/begun").mkdir()
        (folder/"runs/begun/log.jsonl.new").write_text("")
        for i, name in enumerate(("half way", "begun", "done")):
            for p in (folder/"runs"/name).iterdir(): os.utime(p, (10**9-i, 10**9-i))
        return folder/"runs"
    return once("runs_cli", make)


@pytest.fixture
def runs(made, tmp_path, monkeypatch):
    "Copies that a test may damage, in the current folder."
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(made, tmp_path/"runs")


def listed(call, *args):
    status, out, err = call(ddpm_runs, *args, "--json")
    assert (status, err) == (0, "")
    return {r["run"]: r for r in json.loads(out)}


def test_what_is_said_of_runs(runs, call):
    found = listed(call)
    assert list(found) == ["runs/half way", "runs/begun", "runs/done"]        # the latest change first
    done, half, begun = (found[f"runs/{n}"] for n in ("done", "half way", "begun"))
    metrics = json.loads((runs/"done/metrics.json").read_text())
    assert (done["state"], done["dataset"], done["step"], done["steps"]) == ("finished", "digits", 12, 12)
    assert done["bits_per_dim"] == metrics["bits_per_dim"]["test"]["total"] and "again" not in done
    losses = [r["loss"] for r in read_log(runs/"done")]
    assert len(losses) == 12 and abs(done["loss"] - sum(losses[2:])/10) < 1e-12
    assert done["bytes"] == sum(p.stat().st_size for p in (runs/"done").iterdir())
    assert (half["state"], half["step"], half["steps"], begun["state"]) == ("stopped", 4, 9, "begun")
    assert half["bits_per_dim"] is None or half["step"] == 4
    assert half["again"] == "ddpm_train digits --out 'runs/half way' --resume" == _resume_command("digits", "runs/half way")
    assert half["again"] == _again(runs.relative_to(runs.parent)/"half way", checkpoint_header(runs/"half way/checkpoint.safetensors"))
    status, out, err = call(ddpm_runs)
    lines = out.splitlines()
    assert (status, err, len(lines)) == (0, "", 6) and lines[-1] == f"to go on: {half['again']}"
    assert lines[-2] == "runs/begun stopped before its first checkpoint: it can only be started again, by the command that began it"
    assert [line.split("  ")[0] for line in lines] == ["run", "runs/half way", "runs/begun", "runs/done", *lines[-2:]]
    assert f"12 of 12  {done['loss']:.3f}  {done['bits_per_dim']:8.3f}  finished" in lines[3]
    assert list(listed(call, "runs/done")) == ["runs/done"]                   # a single run


def test_an_evaluation_goes_before_the_quick_look(runs, call):
    file = runs/"done/metrics.json"
    metrics = json.loads(file.read_text())
    file.write_text(json.dumps(metrics | {"evaluation": {"test": {"total": 1.25}}}))
    assert listed(call)["runs/done"]["bits_per_dim"] == 1.25
    file.write_text(json.dumps(metrics | {"config": metrics["config"] | {"steps": 6}}))
    assert listed(call)["runs/done"]["bits_per_dim"] is None                  # they were of other weights


def test_who_trains_there(runs, call):
    with only_writer(runs/"half way"):
        now = listed(call)["runs/half way"]
        assert now["state"] == "training" and now["writer"].startswith(f"process {os.getpid()}, since 20") and "again" not in now
        with pytest.raises(ValueError, match="another run writes there"):     # the question did not take the lock away
            import threading
            caught = []
            def other():
                try:
                    with only_writer(runs/"half way"): pass
                except ValueError as e: caught.append(e)
            t = threading.Thread(target=other); t.start(); t.join()
            raise caught[0]
        out = call(ddpm_runs)[1]
        assert f"training runs/half way: process {os.getpid()}, since 20" in out
    assert listed(call)["runs/half way"]["state"] == "stopped"
    (runs/"half way/.ddpm_lock").touch()                                      # what a killed process leaves
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (runs/"half way/.ddpm_writer").write_text(f"process {dead.pid} on {socket.gethostname()}, since 2020-02-02 12:00:00")
    assert listed(call)["runs/half way"]["state"] == "stopped"
    (runs/"half way/.ddpm_writer").write_text(f"process {os.getpid()} on {socket.gethostname()}, since 2020-02-02 12:00:00")
    assert listed(call)["runs/half way"]["state"] == "stopped"                # the number is another process's by now
    (runs/"half way/.ddpm_writer").write_text("process 1 on another-machine, since 2020-02-02 12:00:00")
    assert listed(call)["runs/half way"]["writer"] == "process 1 on another-machine, since 2020-02-02 12:00:00"


def test_a_damaged_run_is_one_line(runs, call):
    "Whatever bytes the files of one run have, the others are listed, and nobody sees a traceback."
    r, files, wrong = random.Random(0), ("checkpoint.safetensors", "model.safetensors", "log.jsonl", "metrics.json", "config.json"), 0
    for i in range(60):
        file = runs/"done"/files[i % len(files)]
        raw = file.read_bytes()
        damaged = bytearray(raw)
        for _ in range(r.choice((1, 3, 20))): damaged[r.randrange(min(len(raw), 2000))] = r.randrange(256)
        file.write_bytes(damaged[:r.choice((len(raw), len(raw), r.randrange(len(raw))))])
        found = listed(call)
        assert len(found) == 3 and found["runs/half way"]["state"] == "stopped"
        if found["runs/done"]["state"] == "damaged":
            wrong += 1
            status, out, err = call(ddpm_runs)
            line, = (o for o in out.splitlines() if o.startswith("runs/done"))
            assert status == 0 and not err and len(out.splitlines()) == 6 and "damaged: " in line and line.endswith(found["runs/done"]["error"])
        file.write_bytes(raw)
    assert wrong > 20 and listed(call)["runs/done"]["state"] == "finished"


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="permissions do not stop this user")
def test_a_file_that_may_not_be_read(runs, call):
    (runs/"done/log.jsonl").chmod(0)
    assert "Permission denied" in listed(call)["runs/done"]["error"]


def test_what_is_there_in_place_of_files(runs, call):
    (runs/"done/metrics.json").unlink()
    (runs/"done/metrics.json").mkdir()
    (runs/"begun/checkpoint.safetensors").mkdir()
    (runs/"a\nname").mkdir()
    (runs/"a\nname/log.jsonl").write_text("")
    found = listed(call)
    assert found["runs/done"]["state"] == found["runs/begun"]["state"] == "damaged" and "runs/a\nname" in found
    assert len(call(ddpm_runs)[1].splitlines()) == 7


def test_a_run_without_a_checkpoint_says_how_far_it_is(runs, call):
    rows = [dict(step=s, loss=1/s, grad_norm=1., lr=.1, seconds=1.*s) for s in (5, 10)]
    (runs/"begun/log.jsonl.new").write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = listed(call)["runs/begun"]
    assert found["step"] == 10 and abs(found["loss"] - .15) < 1e-12 and "steps" not in found
    lines = [line for line in call(ddpm_runs)[1].splitlines() if line.startswith("runs/begun ")]
    assert len(lines) == 2 and re.search(r" 10 +0\.150 +begun", lines[0]) and "before its first checkpoint" in lines[1]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes")
def test_nothing_strange_hides_a_run_or_waits(runs, call):
    "A pipe, loops of links, a number of 5,000 digits, a log of a gigabyte, a day that no calendar has."
    log = runs/"done/log.jsonl"
    text = log.read_text()
    def states(): return {k: v["state"] for k, v in listed(call).items()}
    def damaged(said):
        found = listed(call)
        assert found["runs/done"]["state"] == "damaged" and said in found["runs/done"]["error"] and found["runs/half way"]["state"] == "stopped"
    log.unlink()
    os.mkfifo(log)
    damaged("not a file")
    log.unlink()
    log.symlink_to("log.jsonl")
    damaged("not a file")
    log.unlink()
    with open(log, "wb") as f: f.truncate(2**30)
    damaged("too many for a log")
    log.write_text(text)
    (runs/"loop").symlink_to("loop")
    (runs/"done/.ddpm_lock").touch()
    (runs/"done/.ddpm_writer").write_text(f"process {'9'*5000} on {socket.gethostname()}, since 2020-01-01 00:00:00")
    assert states()["runs/done"] == "finished"
    (runs/"done/.ddpm_writer").unlink()
    os.mkfifo(runs/"done/.ddpm_writer")
    assert states()["runs/done"] == "finished" and "runs/loop" not in states()


def test_no_runs(runs, call, tmp_path):
    (tmp_path/"empty").mkdir()
    assert call(ddpm_runs, "empty") == (0, "no runs in empty\n", "")
    assert call(ddpm_runs, "empty", "--json") == (0, "[]\n", "")
    failed(call(ddpm_runs, "none"), 1, "none: no such folder")
    failed(call(ddpm_runs, runs/"done/log.jsonl"), 1, "log.jsonl: is a file: name its folder")
    failed(call(ddpm_runs, "a", "b"), 2, "unrecognized arguments: b")


def test_it_needs_no_torch(runs):
    code = "import sys; from ddpm_nbdev.start import ddpm_runs\ntry: ddpm_runs()\nfinally: print('torch' in sys.modules)"
    p = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert p.returncode == 0 and p.stdout.splitlines()[-1] == "False" and "runs/done" in p.stdout and not p.stderr
