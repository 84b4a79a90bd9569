"Several processes under torchrun (gloo): they compute what one process computes, and survive the loss of one of them."
import json
import os
import re
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Python
from safetensors.torch import load_file

from ddpm_nbdev.data import load_dataset
from ddpm_nbdev.ddpm import draw_samples
from ddpm_nbdev.files import read_log
from ddpm_nbdev.likelihood import evaluate_bits_per_dim
from ddpm_nbdev.machines import join_processes, leave_processes, rank  # noqa: F401, for SCRIPTS
from ddpm_nbdev.quality import report
from ddpm_nbdev.run import train
from ddpm_nbdev.saved import read_checkpoint
from ddpm_nbdev.train import TrainConfig, load_checkpoint

torch.set_num_threads(1)
MODEL = dict(ch=8, ch_mult=[1, 2], num_res_blocks=1, attn_resolutions=[4], groups=4)
TINY = TrainConfig("digits", T=10, model_args=MODEL, dropout=.2, flip=True, steps=12, batch_size=8, lr=2e-3, warmup=5, ema_decay=.9,
                   ema_warmup=True, log_every=4, checkpoint_every=4, sample_every=0, shards=2)
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{ROOT}", "PYTHONFAULTHANDLER": "1"}


def torchrun(*args, cwd=None, processes=2, options=()):
    "Start torchrun; its output goes to a pipe."
    return Python("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *options, *args, cwd=cwd, env=ENV, stderr=subprocess.STDOUT)


def by_itself(*args, cwd):
    "The same without torchrun."
    p = Python(*args, cwd=cwd, env=ENV)
    out, err = p.communicate()
    assert p.returncode == 0, err


def finish(process, status=0):
    try: out, _ = process.communicate(timeout=240)
    finally:
        try: os.killpg(process.pid, signal.SIGKILL)                    # whatever hangs does not outlive the test
        except ProcessLookupError: pass
    assert (process.returncode == 0) == (status == 0), out
    return out


def script(tmp_path, code):
    "A file that torchrun can start; `out` is a folder."
    head = f"""
import torch; torch.set_num_threads(1)
from dataclasses import replace
from pathlib import Path
from test_distributed import TINY

from ddpm_nbdev.run import train
out = Path({str(tmp_path)!r})
"""
    (tmp_path/"script.py").write_text(head + code)
    return tmp_path/"script.py"


def bits_of_one(ddpm):
    "What a run reports of a single test image."
    digits = load_dataset("digits")
    one = replace(digits, train=digits.train[:1], test=digits.test[:1])
    return report(ddpm, one, torch.zeros(0, 1, 8, 8))["bits_per_dim"]["test"]


# What two processes do in the tests below, each script with a folder `out` of its own and the names of this file.
ONE_OF_TWO = """
train(replace(TINY, clip=CLIP, sample_every=8, sample_n=3), out/'two', progress=False)
x = draw_samples(load_checkpoint(out/'two'), 5, seed=3)
if rank() == 1: torch.save(x, out/'x.pt')      # the last process has them all, too
del x
leave_processes()
print('left', threads())
"""
SCRIPTS = {
    "batch": ONE_OF_TWO.replace("CLIP", "'batch'"), "shard": ONE_OF_TWO.replace("CLIP", "'shard'"),
    "big batch": "train(replace(TINY, dropout=0., shards=4), out/'two', progress=False)",
    "resume": "train(replace(TINY, steps=6), out/'run', progress=False)",
    "fewer images": """
join_processes()
r = bits_of_one(load_checkpoint(out/'run'))
(out/f'{rank()}.json').write_text(json.dumps(r))
""",
    "evaluation": """
join_processes()
for k in (None, 3):
    r = evaluate_bits_per_dim(load_checkpoint(out/'run'), load_dataset('digits').test[:7], torch.Generator().manual_seed(2), k)
    (out/f'{k}.{rank()}.json').write_text(json.dumps(r.to_dict()))
"""}


def run_scripts(folder):
    "In each process that torchrun starts: every script in a fork, which begins with what was imported and nothing done."
    for i, (name, code) in enumerate(SCRIPTS.items()):
        pid = os.fork()
        if not pid:
            os.environ["TORCHELASTIC_RESTART_COUNT"] = str(i)      # so they do not find in torchrun's store what others left there
            with open(folder/name/f"{os.environ['RANK']}.txt", "w") as said:
                for fd in (1, 2): os.dup2(said.fileno(), fd)
            exec(code, {**globals(), "out": folder/name})
            return                                                 # and ends as any script does
        status = os.waitpid(pid, 0)[1]
        (folder/name/f"{os.environ['RANK']}.status").write_text(str(status))


@pytest.fixture(scope="module")
def two(once):
    "`two(name)`: the folder of a script that ran on two processes, and what they said. One torchrun runs all of them."
    def make(folder):
        for name in SCRIPTS: (folder/name).mkdir()
        for name in ("fewer images", "evaluation"): train(replace(TINY, steps=4), folder/name/"run", progress=False)
        (folder/"script.py").write_text(f"from pathlib import Path\nfrom test_distributed import run_scripts\nrun_scripts(Path({str(folder)!r}))\n")
        finish(torchrun(folder/"script.py"))
        return folder
    folder = once("two", make)
    def get(name):
        said = "".join((folder/name/f"{rank}.txt").read_text() for rank in range(2))
        assert [(folder/name/f"{rank}.status").read_text() for rank in range(2)] == ["0", "0"], said
        return folder/name, said
    return get


def threads():
    "Names of this process's threads (Linux tells them)."
    return [comm.read_text().strip() for comm in Path("/proc/self/task").glob("*/comm")]


def same(a, b, tol):
    a, b = load_file(a/"model.safetensors"), load_file(b/"model.safetensors")
    assert a.keys() == b.keys()
    return max((a[k]-b[k]).abs().max().item() for k in a) <= tol


@pytest.mark.parametrize("clip", ["batch", "shard"])
def test_two_processes_are_one(clip, two):
    "Dropout, flips, log, checkpoint and samples included."
    cfg = replace(TINY, clip=clip, sample_every=8, sample_n=3)
    tmp_path, out = two(clip)
    assert out.count("left") == 2 and "gloo" not in out        # a thread of gloo's that outlives Python's end may abort the process
    train(cfg, tmp_path/"one", progress=False)
    assert same(tmp_path/"one", tmp_path/"two", 1e-6), out
    for a, b in zip(read_log(tmp_path/"one"), read_log(tmp_path/"two"), strict=True):
        assert a["step"] == b["step"] and a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    assert read_checkpoint(tmp_path/"one/checkpoint.safetensors")[1]["step"] == read_checkpoint(tmp_path/"two/checkpoint.safetensors")[1]["step"] == 12
    assert (tmp_path/"one/samples/000008.png").read_bytes() == (tmp_path/"two/samples/000008.png").read_bytes()
    x = torch.load(tmp_path/"x.pt", weights_only=True)
    assert (x.int()-draw_samples(load_checkpoint(tmp_path/"one"), 5, seed=3).int()).abs().max() <= 1


def test_two_processes_are_one_big_batch(two):
    "Without dropout not even the number of shards matters."
    tmp_path, _ = two("big batch")
    train(replace(TINY, dropout=0., shards=1), tmp_path/"one", progress=False)
    assert same(tmp_path/"one", tmp_path/"two", 2e-5)          # rounding, after 12 steps of Adam


def test_resume_on_fewer_processes(two):
    tmp_path, _ = two("resume")
    train(TINY, tmp_path/"run", resume=True, progress=False)
    train(TINY, tmp_path/"one", progress=False)
    assert same(tmp_path/"one", tmp_path/"run", 1e-6)


def test_processes_must_divide_the_shards(tmp_path):
    out = finish(torchrun(script(tmp_path, "train(replace(TINY, shards=1), out/'run', progress=False)")), status=1)
    assert "2 processes cannot share 1 shards evenly" in out and not (tmp_path/"run").exists()


def test_fewer_images_than_processes(two):
    tmp_path, _ = two("fewer images")
    want = bits_of_one(load_checkpoint(tmp_path/"run"))
    for rank in range(2):
        got = json.loads((tmp_path/f"{rank}.json").read_text())
        assert got.pop("standard_error") is None and got == pytest.approx({k: v for k, v in want.items() if v is not None}, rel=1e-5)


def test_evaluation_is_shared(two):
    tmp_path, _ = two("evaluation")
    for k in (None, 3):
        r = evaluate_bits_per_dim(load_checkpoint(tmp_path/"run"), load_dataset("digits").test[:7], torch.Generator().manual_seed(2), k).to_dict()
        for rank in range(2):
            got = json.loads((tmp_path/f"{k}.{rank}.json").read_text())
            assert got.keys() == r.keys() and got["n"] == 7 and got["counts"] == r["counts"]
            for name, v in r.items():
                for a, b in zip(*([v, got[name]] if isinstance(v, list) else [[v], [got[name]]]), strict=True):
                    assert a == b if a is None else b == pytest.approx(a, rel=1e-5, abs=1e-7), name


# ---- losing a process

TRAIN = ["-m", "ddpm_nbdev.cli", "train", "digits", "--T", "10", "--batch-size", "8", "--checkpoint-every", "20", "--log-every", "10"]
STEPS = 120


def workers(process):
    "The process ids of torchrun's workers, with their ranks."
    found = {}
    for p in Path("/proc").glob("[0-9]*"):
        try:
            if int(re.search(r"PPid:\s+(\d+)", (p/"status").read_text())[1]) == process.pid:
                env = dict(v.split("=", 1) for v in (p/"environ").read_text().split("\0") if "=" in v)
                if "RANK" in env: found[int(env["RANK"])] = int(p.name)
        except (OSError, TypeError): pass
    return found


def wait_for(condition, process, seconds=120):
    for _ in range(seconds*20):
        if condition(): return
        if process.poll() is not None: raise AssertionError(process.communicate()[0])
        time.sleep(.05)
    raise AssertionError("too slow")


@pytest.fixture(scope="module")
def alone(once):
    "The run that nobody disturbs, of one process."
    def make(folder):
        by_itself(*TRAIN, "--steps", STEPS, "--out", "alone", "--shards", "2", "--samples", 0, cwd=folder)
        return folder/"alone"
    return once("alone", make)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the workers through /proc, which is not there")
@pytest.mark.parametrize("when", ["after a checkpoint", "before the first"])
def test_a_killed_worker_does_not_change_the_result(when, tmp_path, alone):
    "kill -9: torchrun starts all again, and the run ends with the weights of one that nobody disturbed."
    steps = STEPS
    samples = 2 if when.startswith("after") else 0      # the end of a run, with the classifier of digits that it trains, once
    p = torchrun(*TRAIN, "--steps", steps, "--out", "run", "--samples", samples, cwd=tmp_path, options=["--max-restarts=2", "--shutdown-timeout=5"])
    mark = tmp_path/"run"/("log.jsonl" if when.startswith("after") else "log.jsonl.new")
    wait_for(lambda: mark.exists() and len(workers(p)) == 2, p)
    os.kill(workers(p)[1], signal.SIGKILL)
    out = finish(p)
    assert out.count("steps on cpu") == 2, out                                            # it was started twice
    assert same(tmp_path/"run", alone, 1e-6)
    assert [r["step"] for r in read_log(tmp_path/"run")] == list(range(10, steps+1, 10))
    assert not (tmp_path/"run/.torchrun").exists()


def test_a_restart_does_not_touch_an_older_run(tmp_path):
    "The first start refuses the folder; the second must not take it for its own."
    train(replace(TINY, steps=4), tmp_path/"run", progress=False)
    before = {f.name: f.read_bytes() for f in (tmp_path/"run").iterdir()}
    out = finish(torchrun(*TRAIN, "--steps", "8", "--out", "run", cwd=tmp_path, options=["--max-restarts=1"]), status=1)
    assert "already holds a run" in out
    assert {f.name: f.read_bytes() for f in (tmp_path/"run").iterdir()} == before


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the workers through /proc, which is not there")
def test_a_signal_to_one_process_stops_all_of_them_saved(tmp_path):
    p = torchrun(*TRAIN, "--steps", "100000", "--out", "run", cwd=tmp_path)
    wait_for(lambda: (tmp_path/"run/log.jsonl").exists() and len(workers(p)) == 2, p)
    os.kill(workers(p)[1], signal.SIGTERM)
    out = finish(p, status=1)
    step = int(re.search(r"stopped after step (\d+) of 100000; to go on: ddpm_train digits --out run --resume", out)[1])
    assert load_checkpoint(tmp_path/"run") and read_checkpoint(tmp_path/"run/checkpoint.safetensors")[1]["step"] == step
    assert read_log(tmp_path/"run")[-1]["step"] == step


def test_sampling_is_shared(tmp_path):
    train(replace(TINY, steps=4), tmp_path/"run", progress=False)
    finish(torchrun("-m", "ddpm_nbdev.cli", "--", "sample", "run", "--n", "5", "--out", "two.safetensors", cwd=tmp_path))
    by_itself("-m", "ddpm_nbdev.cli", "sample", "run", "--n", "5", "--batch-size", "2", "--out", "one.safetensors", cwd=tmp_path)
    one, two = (load_file(tmp_path/f"{n}.safetensors")["images"] for n in ("one", "two"))
    assert one.shape == (5, 1, 8, 8) and one.dtype == torch.uint8
    assert (one.int()-two.int()).abs().max() <= 1
