"Training: interrupted runs end with the bits of uninterrupted ones, and nothing good is ever lost."
import json
import math
import os
import signal
import threading
import time
import traceback
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.utils._python_dispatch
from conftest import Python
from PIL import Image
from safetensors.torch import load_file, save_file

from ddpm_nbdev import machines
from ddpm_nbdev import train as T
from ddpm_nbdev.data import load_dataset
from ddpm_nbdev.ddpm import DDPM, draw_samples
from ddpm_nbdev.files import WeightsError, read_log, write_whole
from ddpm_nbdev.run import Interrupted, _save_samples, only_writer, train
from ddpm_nbdev.saved import read_checkpoint
from ddpm_nbdev.train import (EMA, PRESETS, ConfigError, TrainConfig, TrainingDiverged, _build_model, _small_unet_args, build_ddpm,
                              learning_rate, load_checkpoint, preset)
from ddpm_nbdev.unet import cifar10_unet, digits_unet, image256_large_unet, image256_unet

torch.set_num_threads(1)
MODEL = dict(ch=8, ch_mult=[1, 2], num_res_blocks=1, attn_resolutions=[4], groups=4)
TINY = TrainConfig('digits', T=10, model_args=MODEL, dropout=.2, flip=True, steps=24, batch_size=8, lr=2e-3, warmup=5, ema_decay=.9,
                   ema_warmup=True, log_every=4, checkpoint_every=6, sample_every=0, sample_n=2)


@pytest.fixture(scope="module")
def data():
    return load_dataset("digits")


@pytest.fixture(scope="module")
def whole(data, once):
    "A run that was never interrupted: its state and its log without times."
    def make(out):
        train(TINY, out, data=data)
        return tensors(out), log(out)
    return once("whole", make)


def tensors(out):
    return read_checkpoint(out/"checkpoint.safetensors")[0]


def log(out):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_log(out)]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- resume

def test_state_has_every_part(whole):
    names = whole[0].keys()
    for part in ("model.", "ema.", "adam.0.exp_avg", "adam.0.exp_avg_sq"):
        assert any(n.startswith(part) for n in names), part
    assert whole[0]["adam.0.step"] == TINY.steps


@pytest.mark.parametrize("first", [6, 7, 13])
def test_resume_is_bit_identical(first, whole, data, tmp_path):
    train(replace(TINY, steps=first), tmp_path, data=data)
    torch.manual_seed(123)   # whatever happens to the global generator in between
    torch.rand(5)
    train(TINY, tmp_path, resume=True, data=data)
    assert same(tensors(tmp_path), whole[0])
    assert [r["step"] for r in read_log(tmp_path)] == sorted({*range(4, 25, 4), 6, 12, 18, first})


def test_resuming_a_finished_run_changes_nothing(whole, data, tmp_path):
    train(TINY, tmp_path, data=data)
    before = (tmp_path/"log.jsonl").read_text()
    train(TINY, tmp_path, resume=True, data=data)
    assert same(tensors(tmp_path), whole[0])
    assert (tmp_path/"log.jsonl").read_text() == before


def test_randomness_matters(whole, data, tmp_path, monkeypatch):
    "The test above would notice if dropout, or the noise, were not the same after a pause."
    real = T.subseed
    for purpose in (1, 4):
        train(replace(TINY, steps=6), tmp_path/str(purpose), data=data)
        monkeypatch.setattr(T, "subseed", lambda seed, *p: real(seed, *p) + (p[0] == purpose))
        train(TINY, tmp_path/str(purpose), resume=True, data=data)
        monkeypatch.undo()
        assert not same(tensors(tmp_path/str(purpose)), whole[0])


def test_samples_and_caller_do_not_disturb(whole, data, tmp_path):
    torch.manual_seed(7)
    state = torch.get_rng_state()
    train(replace(TINY, sample_every=5), tmp_path, data=data)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(tensors(tmp_path), whole[0])
    assert sorted(p.name for p in (tmp_path/"samples").iterdir()) == ["000005.png", "000010.png", "000015.png", "000020.png"]


def test_seed_matters(whole, data, tmp_path):
    train(replace(TINY, seed=1, steps=6), tmp_path, data=data)
    train(replace(TINY, steps=6), tmp_path/"b", data=data)
    a, b = tensors(tmp_path), tensors(tmp_path/"b")
    assert not torch.equal(a["model.conv_in.weight"], b["model.conv_in.weight"])


def start(out, *args, steps=24, sleep=0., hangup="SIG_DFL"):
    "Train in a process of its own, slowly enough to be hit."
    code = f"""
import sys, time
from dataclasses import replace
sys.path.insert(0, {str(os.path.dirname(__file__))!r})
import signal, torch; torch.set_num_threads(1)
if hasattr(signal, "SIGHUP"): signal.signal(signal.SIGHUP, signal.{hangup})     # pytest may run under nohup
from test_train import TINY, train
from ddpm_nbdev import train as T
update = T.EMA.update
def slow(self, model):
    update(self, model); time.sleep({sleep}); print(self.n, flush=True)
T.EMA.update = slow
try: train(replace(TINY, steps={steps}), {str(out)!r}, progress=False{''.join(', '+a for a in args)})
except KeyboardInterrupt as e: print(e); sys.exit(130)
"""
    return Python("-c", code)


def wait_for_step(process, n):
    for line in process.stdout:
        if line.strip() == str(n): return
    raise AssertionError(process.stderr.read())


def test_kill_9(tmp_path, data):
    "Killed three times, at moments that do not ask for anybody's leave; the log has each step once."
    torch.manual_seed(0)
    steps = 60
    reference = train(replace(TINY, steps=steps), tmp_path/"reference", data=data)
    out, rng = tmp_path/"killed", torch.Generator().manual_seed(int(time.time()))
    for i, wait in enumerate((10, 9, 9)):     # steps of this process before the blow
        p = start(out, *(["resume=True"] if i else []), steps=steps, sleep=.03)
        first = read_checkpoint(out/"checkpoint.safetensors")[1]["step"] if i else 0
        wait_for_step(p, first+wait)
        time.sleep(.03*torch.rand(1, generator=rng).item())
        p.send_signal(signal.SIGKILL)
        p.wait()
        tensors(out)                          # whole, always
    train(replace(TINY, steps=steps), out, resume=True, data=data)
    assert same(tensors(out), tensors(tmp_path/"reference"))
    assert log(out) == log(tmp_path/"reference")
    assert same(load_file(out/"model.safetensors"), dict(reference.model.state_dict()))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, pytest.param(getattr(signal, "SIGHUP", None), marks=pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has none"))])
def test_signal_saves_and_says_how_to_go_on(signum, tmp_path, whole, data):
    out = tmp_path/"run"
    p = start(out, sleep=.1)
    wait_for_step(p, 9)
    p.send_signal(signum)
    rest, err = p.communicate()
    assert p.returncode == 130, err
    saved = read_checkpoint(out/"checkpoint.safetensors")[1]["step"]
    assert 9 <= saved < 24                                             # wherever it was: a busy machine lets a few more pass
    assert f"stopped after step {saved} of 24; to go on: ddpm_train digits --out {out} --resume" in rest
    train(TINY, out, resume=True, data=data)
    assert same(tensors(out), whole[0])


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has none")
def test_nohup_is_heeded(tmp_path):
    p = start(tmp_path/"run", sleep=.02, hangup="SIG_IGN")
    wait_for_step(p, 9)
    p.send_signal(signal.SIGHUP)
    _, err = p.communicate()
    assert p.returncode == 0, err
    assert read_checkpoint(tmp_path/"run/checkpoint.safetensors")[1]["step"] == 24


def test_second_interrupt_stops_at_once(tmp_path, data, monkeypatch):
    update = T.EMA.update
    def twice(self, model):
        update(self, model)
        if self.n == 8:
            for _ in range(2): signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(EMA, "update", twice)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as e: train(TINY, tmp_path, data=data)
    assert not isinstance(e.value, Interrupted)
    assert read_checkpoint(tmp_path/"checkpoint.safetensors")[1]["step"] == 6
    assert signal.getsignal(signal.SIGINT) is handler


# ---- what must not be lost

@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_stops_names_the_step_and_keeps_the_checkpoint(where, tmp_path, data, monkeypatch):
    real, calls = DDPM.loss, []
    def loss(self, x0, **kw):
        calls.append(1)
        out = real(self, x0, **kw)
        if len(calls) != 11: return out
        return out*math.nan if where == "loss" else out + (out-out.detach()).abs().sqrt()   # slope 1/0 at 0
    monkeypatch.setattr(DDPM, "loss", loss)
    with pytest.raises(TrainingDiverged, match="diverged at step 11 .*checkpoint of step 6 is kept"): train(TINY, tmp_path, data=data)
    kept, header = read_checkpoint(tmp_path/"checkpoint.safetensors")
    assert header["step"] == 6
    assert all(v.isfinite().all() for v in kept.values() if v.is_floating_point())
    assert [r["step"] for r in read_log(tmp_path)] == [4, 6, 8]
    assert all(math.isfinite(r["loss"]) for r in read_log(tmp_path))
    assert not list(tmp_path.glob("*.tmp"))


def test_nan_before_the_first_checkpoint(tmp_path, data, monkeypatch):
    monkeypatch.setattr(DDPM, "loss", lambda self, x0, **kw: self.model(x0, torch.ones(len(x0)).long()).sum((1, 2, 3))*math.inf)
    with pytest.raises(TrainingDiverged, match="diverged at step 1 .*there is no checkpoint yet"): train(TINY, tmp_path, data=data)
    assert not (tmp_path/"checkpoint.safetensors").exists()


def test_weights_that_are_not_finite_are_never_saved(tmp_path, data, monkeypatch):
    "Even if loss and gradient look well."
    update = T.EMA.update
    def poison(self, model):
        update(self, model)
        if self.n == 12: next(iter(self.model.parameters())).data.view(-1)[0] = math.nan
    monkeypatch.setattr(EMA, "update", poison)
    with pytest.raises(TrainingDiverged, match="step 12 .ema.* is not finite.*checkpoint of step 6"): train(TINY, tmp_path, data=data)
    assert read_checkpoint(tmp_path/"checkpoint.safetensors")[1]["step"] == 6


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_failing_write_keeps_the_old_checkpoint(call, tmp_path, data, monkeypatch):
    train(replace(TINY, steps=6), tmp_path, data=data)
    before = (tmp_path/"checkpoint.safetensors").read_bytes()
    real = getattr(os, call)
    def full(*args):
        if call == "replace" and "checkpoint" not in str(args[0]): return real(*args)
        if call == "fsync" and os.fstat(args[0]).st_size < 10_000: return real(*args)
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left"): train(TINY, tmp_path, resume=True, data=data)
    assert (tmp_path/"checkpoint.safetensors").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))


def test_write_whole_on_interrupt(tmp_path, monkeypatch):
    write_whole(tmp_path/"f", b"old")
    def interrupt(fd): raise KeyboardInterrupt
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt): write_whole(tmp_path/"f", b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["f"] and (tmp_path/"f").read_bytes() == b"old"


def test_a_folder_with_a_run_is_left_alone(tmp_path, data):
    train(replace(TINY, steps=6), tmp_path, data=data)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="already holds a run.*--resume.*--overwrite"): train(TINY, tmp_path, data=data)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    with pytest.raises(ConfigError, match="exclude each other"): train(TINY, tmp_path, resume=True, overwrite=True, data=data)


def test_overwrite_keeps_the_old_run_until_the_first_checkpoint(tmp_path, data, monkeypatch):
    train(replace(TINY, steps=12, sample_every=6), tmp_path, data=data)
    (tmp_path/"notes.txt").write_text("mine")
    (tmp_path/"samples/mine.png").write_bytes(b"mine")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    update = T.EMA.update
    def stop(self, model):
        update(self, model)
        if self.n == 5: raise RuntimeError("power cut")
    monkeypatch.setattr(EMA, "update", stop)
    with pytest.raises(RuntimeError): train(replace(TINY, seed=5), tmp_path, overwrite=True, data=data)
    after = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    after.pop("log.jsonl.new")
    assert after == before and (tmp_path/"samples/000006.png").exists()
    monkeypatch.undo()
    train(replace(TINY, seed=5), tmp_path, overwrite=True, data=data)
    assert [r["step"] for r in read_log(tmp_path)] == [4, 6, 8, 12, 16, 18, 20, 24]
    assert read_checkpoint(tmp_path/"checkpoint.safetensors")[1]["config"]["seed"] == 5
    assert (tmp_path/"notes.txt").read_text() == "mine" and [p.name for p in (tmp_path/"samples").iterdir()] == ["mine.png"]
    assert not (tmp_path/"log.jsonl.new").exists()


def test_resume_refuses_what_would_be_another_run(tmp_path, data):
    train(replace(TINY, steps=6), tmp_path, data=data)
    for change, said in ((dict(lr=1e-3), "lr was 0.002, is now 0.001"), (dict(model_args=MODEL | dict(ch=16)), "model_args was"), (dict(T=11), "T was 10, is now 11")):
        with pytest.raises(ValueError, match=said): train(replace(TINY, **change), tmp_path, resume=True, data=data)
    with pytest.raises(ValueError, match="already at step 6, beyond the 3 asked for"): train(replace(TINY, steps=3), tmp_path, resume=True, data=data)
    other = replace(data, train=data.train.flip(0))
    with pytest.raises(ValueError, match="training images are not those it began with"): train(TINY, tmp_path, resume=True, data=other)
    with pytest.raises(ValueError, match="nothing to resume"): train(TINY, tmp_path/"new", resume=True, data=data)
    assert not (tmp_path/"new").exists()


@pytest.mark.parametrize("damage, said", [(lambda b: b[:len(b)//2], "not a complete safetensors file"), (lambda b: b"\x80\x02" + b, "pickle"), (lambda b: b"", "safetensors")])
def test_damaged_checkpoint(damage, said, tmp_path, data):
    train(replace(TINY, steps=6), tmp_path, data=data)
    file = tmp_path/"checkpoint.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    damaged = file.read_bytes()
    with pytest.raises(WeightsError, match=said): train(TINY, tmp_path, resume=True, data=data)
    assert file.read_bytes() == damaged


def test_one_writer(tmp_path, data):
    "A second run is refused while the first one writes, says who that is, and touches nothing; then it may."
    out = tmp_path/"run"
    p = start(out, sleep=.1)
    wait_for_step(p, 7)
    before = (out/"checkpoint.safetensors").read_bytes()
    for how in (dict(resume=True), dict(overwrite=True), {}):
        with pytest.raises(ValueError, match=f"another run writes there .process {p.pid} on .*choose another --out"):
            train(replace(TINY, seed=5), out, data=data, **how)
    assert (out/"checkpoint.safetensors").read_bytes() == before and not (out/"log.jsonl.new").exists()
    p.send_signal(signal.SIGKILL)                                    # a dead one holds nothing
    p.wait()
    train(replace(TINY, seed=5), out, overwrite=True, data=data)
    assert not {".ddpm_lock", ".ddpm_writer"} & {f.name for f in out.iterdir()}


def test_many_runs_at_once_leave_one_whole_run(tmp_path):
    "Six start at the same time: one trains, five are refused in words, and the log is that of one run."
    code = f"""
import sys, time
sys.path.insert(0, {str(os.path.dirname(__file__))!r})
import torch; torch.set_num_threads(1)
from test_train import TINY, train
print('ready', flush=True); sys.stdin.readline()
try: train(TINY, {str(tmp_path/"run")!r}, progress=False)
except ValueError as e: print(e); sys.exit(1)
"""
    ps = [Python("-c", code) for _ in range(6)]
    for p in ps: assert p.stdout.readline() == "ready\n"
    for p in ps: p.stdin.write("\n"), p.stdin.flush()
    said = [p.communicate() for p in ps]
    assert sorted(p.returncode for p in ps) == [0, 1, 1, 1, 1, 1], said
    for p, (out, err) in zip(ps, said):
        assert p.returncode == 0 or "another run writes there" in out or "already holds a run" in out, (out, err)
    assert [r["step"] for r in read_log(tmp_path/"run")] == [4, 6, 8, 12, 16, 18, 20, 24]


def test_a_folder_that_stays_empty_is_gone_again(tmp_path):
    with pytest.raises(RuntimeError):
        with only_writer(tmp_path/"a"/"b"):
            assert (tmp_path/"a"/"b"/".ddpm_writer").exists()
            with only_writer(tmp_path/"a"/"b"): pass                 # it is ours already
            raise RuntimeError
    assert not list(tmp_path.iterdir())
    with only_writer(tmp_path/"a"/"b"): (tmp_path/"a"/"b"/"x").write_text("")
    assert [p.name for p in (tmp_path/"a"/"b").iterdir()] == ["x"]


def test_threads_and_forks_are_others(tmp_path):
    "A second thread is refused like a second process, and a forked child does not give the lock away."
    said = []
    def second():
        try:
            with only_writer(tmp_path): said.append("in")
        except ValueError as e: said.append(str(e))
    with only_writer(tmp_path):
        thread = threading.Thread(target=second)
        thread.start(); thread.join()
        pid = os.fork()
        if not pid:
            try:
                with only_writer(tmp_path): os._exit(1)
            except ValueError: os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0 and (tmp_path/".ddpm_lock").exists()
    assert "another run writes there" in said[0] and not list(tmp_path.iterdir())


def test_what_dead_writers_left_is_cleared(tmp_path, data):
    (tmp_path/"samples").mkdir()
    rubbish = [tmp_path/"checkpoint.safetensors.0123456789ab.tmp", tmp_path/"samples/000005.png.0123456789ab.tmp"]
    alive = tmp_path/"metrics.json.0123456789ab.tmp"
    for p in [*rubbish, tmp_path/"mine.tmp", alive]: p.write_text("half")
    for p in [*rubbish, tmp_path/"mine.tmp"]: os.utime(p, (time.time()-3600,)*2)
    train(replace(TINY, steps=6), tmp_path, data=data)
    assert not any(p.exists() for p in rubbish) and (tmp_path/"mine.tmp").exists() and alive.exists()


def test_stale_weights_are_not_used(tmp_path, data, monkeypatch):
    "A finished run goes on and is interrupted: its model.safetensors is that of the shorter run."
    train(replace(TINY, steps=12), tmp_path, data=data)
    assert all(torch.equal(a, b) for a, b in zip(DDPM.load(tmp_path).model.parameters(), load_checkpoint(tmp_path).model.parameters()))
    update = T.EMA.update
    def stop(self, model):
        update(self, model)
        if self.n == 20: raise RuntimeError("power cut")
    monkeypatch.setattr(EMA, "update", stop)
    with pytest.raises(RuntimeError): train(TINY, tmp_path, resume=True, data=data)
    now, average = DDPM.load(tmp_path).model.state_dict(), load_checkpoint(tmp_path).model.state_dict()
    stale = load_file(tmp_path/"model.safetensors")
    assert read_checkpoint(tmp_path/"checkpoint.safetensors")[1]["step"] == 18
    assert same(now, average) and not same(now, stale)
    save_file(stale, tmp_path/"model.safetensors")                       # one that does not say its step, and later
    assert same(DDPM.load(tmp_path).model.state_dict(), stale)
    os.utime(tmp_path/"model.safetensors", (1, 1))                       # or earlier: of an older version
    assert same(DDPM.load(tmp_path).model.state_dict(), average)


def test_a_resume_reads_the_checkpoint_once(tmp_path, data, monkeypatch):
    from ddpm_nbdev import saved
    train(replace(TINY, steps=6), tmp_path, data=data)
    read, real = [], saved.read_weights
    monkeypatch.setattr(saved, "read_weights", lambda path, *a: read.append(path) or real(path, *a))
    train(TINY, tmp_path, resume=True, data=data)
    assert len(read) == 1


def test_a_run_tells_each_line_of_its_log(tmp_path, data):
    "And a run that goes on those of its own."
    told = []
    train(replace(TINY, steps=10), tmp_path, data=data, watch=told.append)
    assert told == read_log(tmp_path) and [row["step"] for row in told] == [4, 6, 8, 10]
    train(TINY, tmp_path, data=data, resume=True, watch=told.append)
    assert told == read_log(tmp_path) and told[-1]["step"] == 24


def test_torn_last_log_line(tmp_path, data, whole):
    train(replace(TINY, steps=12), tmp_path, data=data)
    with open(tmp_path/"log.jsonl", "a") as f: f.write('{"step": 14, "lo')
    train(TINY, tmp_path, resume=True, data=data)
    assert [json.loads(x)["step"] for x in (tmp_path/"log.jsonl").read_text().splitlines()] == [4, 6, 8, 12, 16, 18, 20, 24]


# ---- the pieces

def test_loop_is_algorithm_1(data, tmp_path):
    "Against a plain loop written out here, with torch's own pieces; no dropout, no flips."
    cfg = replace(TINY, dropout=0., flip=None, steps=7, ema_warmup=False)
    ours = train(cfg, tmp_path, data=data)
    with torch.random.fork_rng():
        torch.manual_seed(T.subseed(0, 0))
        ddpm = build_ddpm(cfg, data)
    params, avg = list(ddpm.model.parameters()), [p.detach().clone() for p in ddpm.model.parameters()]
    opt = torch.optim.Adam(params, lr=1., foreach=False)
    sched = torch.optim.lr_scheduler.LambdaLR(opt, lambda k: cfg.lr*min(1, k/cfg.warmup))
    order = np.random.default_rng((0, 0)).permutation(1437)
    for k in range(7):
        x0 = data.train[order[8*k:8*k+8]].double().div(8).sub(1).float()
        t, eps = T.example_noise(0, torch.arange(8*k, 8*k+8), 10, x0)
        abar = torch.tensor([1-b for b in torch.linspace(1e-4, .02, 10, dtype=torch.float64)], dtype=torch.float64).cumprod(0)[t-1].view(-1, 1, 1, 1)
        loss = ((ddpm.model(abar.sqrt().float()*x0 + (1-abar).sqrt().float()*eps, t)-eps)**2).mean()
        opt.zero_grad()
        loss.backward()
        norm = sum(p.grad.double().pow(2).sum() for p in params).sqrt()
        if norm > 1:
            for p in params: p.grad.div_(norm.float())
        opt.step()
        sched.step()
        avg = [.9*a + .1*p.detach() for a, p in zip(avg, params)]
    for a, b in zip(avg, ours.model.parameters()): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert abs(read_log(tmp_path)[-1]["loss"]) > 0


# ---- parts of a batch, precision, what a step may not do

def one_gradient(cfg, data):
    "Loss and gradient of the first step, and the gradient's length."
    state = T.TrainState(cfg, data, "cpu")
    with torch.no_grad():
        g = torch.Generator().manual_seed(0)
        for p in state.model.parameters(): p += .1*torch.randn(p.shape, generator=g)   # away from the zeros at the start
    batches = T.Batches(data.train, cfg.batch_size, cfg.seed, True, data.levels)
    loss, norm = T._CLIPS[cfg.clip](state, batches)
    return loss, norm, [p.grad.clone() for p in state.model.parameters()]


@pytest.mark.parametrize("shards", [2, 4, 8])
def test_accumulation_is_the_big_batch(shards, data):
    cfg = replace(TINY, dropout=0., grad_clip=1e6)
    (loss, norm, grads), (loss1, norm1, grads1) = one_gradient(cfg, data), one_gradient(replace(cfg, shards=shards), data)
    torch.testing.assert_close(loss1, loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(norm1, norm, rtol=1e-5, atol=0)
    for a, b in zip(grads1, grads): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5*float(norm))


def test_clip_shard_clips_each_and_then_averages(data):
    "As the official code does; the parts are computed one by one here."
    cfg = replace(TINY, dropout=0., shards=4, clip="shard", grad_clip=.5)
    loss, norm, grads = one_gradient(cfg, data)
    losses, norms, total = [], [], 0
    state = T.TrainState(cfg, data, "cpu")
    with torch.no_grad():
        g = torch.Generator().manual_seed(0)
        for p in state.model.parameters(): p += .1*torch.randn(p.shape, generator=g)
    for shard in range(4):
        x0, place = T.Batches(data.train, 8, 0, True, 17)(0, shard, 4)
        t, eps = T.example_noise(0, place, 10, x0)
        part = state.ddpm.loss(x0, t, eps).mean()
        g = torch.cat([v.flatten() for v in torch.autograd.grad(part, list(state.model.parameters()))])
        losses.append(part.item()), norms.append(g.norm().item())
        total = total + g*min(1, .5/g.norm().item())/4
    assert min(norms) > .5                                                           # or nothing would be tested
    torch.testing.assert_close(torch.cat([v.flatten() for v in grads]), total, rtol=1e-4, atol=1e-6)
    assert abs(loss - np.mean(losses)) < 1e-5 and abs(norm - np.mean(norms)) < 1e-4
    whole = one_gradient(replace(cfg, clip="batch"), data)[2]
    assert not torch.allclose(torch.cat([v.flatten() for v in whole]), total, rtol=.01)


@pytest.mark.parametrize("clip", ["batch", "shard"])
def test_shards_resume_to_the_bit(clip, data, tmp_path):
    cfg = replace(TINY, shards=2, clip=clip, steps=9)
    train(cfg, tmp_path/"a", data=data)
    train(replace(cfg, steps=5), tmp_path/"b", data=data)
    train(cfg, tmp_path/"b", resume=True, data=data)
    assert same(tensors(tmp_path/"a"), tensors(tmp_path/"b"))


def test_bfloat16_is_near_float32_and_keeps_float32_weights(data, tmp_path):
    a, b = (train(replace(TINY, precision=p), tmp_path/p, data=data) for p in T.PRECISIONS)
    assert all(p.dtype == torch.float32 for p in b.model.parameters())
    change = torch.cat([(p-q).flatten() for p, q in zip(a.model.parameters(), b.model.parameters())])
    assert 0 < change.norm() < .1*torch.cat([p.flatten() for p in a.model.parameters()]).norm()
    assert log(tmp_path/"bfloat16")[-1]["loss"] == pytest.approx(log(tmp_path/"float32")[-1]["loss"], rel=.05)


def test_low_precision_copy_samples_alike(data, tmp_path):
    ddpm = train(TINY, tmp_path, data=data)
    low = replace(ddpm, model=machines.LowPrecision(ddpm.model))
    assert all(p.dtype == torch.bfloat16 for p in low.model.parameters()) and all(p.dtype == torch.float32 for p in ddpm.model.parameters())
    a, b = draw_samples(ddpm, 8).float(), draw_samples(low, 8).float()
    assert (a-b).abs().mean() < 1 and a.std() > 1                                    # of 16 gray levels


def test_compile_is_asked_for_and_changes_nothing(data, tmp_path, monkeypatch):
    real, asked = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda m: asked.append(m) or real(m, backend="aot_eager"))
    a, b = (train(replace(TINY, compile=c, steps=6, dropout=0.), tmp_path/str(c), data=data) for c in (False, True))   # its masks are others
    assert len(asked) == 1
    for p, q in zip(a.model.parameters(), b.model.parameters()): torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


def test_a_step_does_not_wait_for_the_device(data):
    "No number is fetched from the device in a step (on a CPU `check_steps` and `to_model_range` look at some)."
    fetched = []
    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default):
                names = [f.name for f in traceback.extract_stack()]
                if not {"check_steps", "to_model_range"} & set(names): fetched.append(names[-8:])
            return func(*args, **(kwargs or {}))
    for clip in ("batch", "shard"):
        state = T.TrainState(replace(TINY, shards=2, clip=clip), data, "cpu")
        batches = T.Batches(data.train, 8, 0, True, 17)
        with Watch(): T.training_step(state, batches)
        assert not fetched
        with Watch(): state.averaged().loss(torch.zeros(1, 1, 8, 8)).mean().item()
        assert len(fetched) == 1                                                     # it would have been seen
        fetched.clear()


def test_what_many_processes_need_works_for_one():
    assert (machines.rank(), machines.size()) == (0, 1) and machines.my_share(5) == range(5)
    assert machines.any_process(True) and not machines.any_process(False)
    x = torch.arange(3)
    assert machines.gather_rows(x) is x and machines.sum_over_processes(x) is x


def test_resume_clears_what_a_dead_overwrite_left(data, tmp_path):
    "Or a restart under torchrun would take it for the sign of a run that had just begun."
    train(replace(TINY, steps=6), tmp_path, data=data)
    (tmp_path/"log.jsonl.new").write_text("")
    train(replace(TINY, steps=8), tmp_path, resume=True, data=data)
    assert not (tmp_path/"log.jsonl.new").exists() and read_log(tmp_path)[-1]["step"] == 8


def test_shares_are_complete_and_the_first_is_never_the_only_empty_one(monkeypatch):
    for n in (0, 1, 2, 5, 8, 13):
        for size in (1, 2, 3, 8):
            parts = []
            for rank in range(size):
                monkeypatch.setattr(machines, "rank", lambda: rank)
                monkeypatch.setattr(machines, "size", lambda: size)
                parts.append(machines.my_share(n))
            assert [i for p in parts for i in p] == list(range(n))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1 and (n == 0 or len(parts[0]) > 0)


# ---- which checkpoints stay

@pytest.mark.parametrize("keep_last, keep_every, steps", [(1, 0, []), (3, 0, [12, 18, 24]), (1, 12, [12, 24]), (2, 12, [12, 18, 24])])
def test_checkpoints_that_stay(keep_last, keep_every, steps, whole, data, tmp_path):
    train(replace(TINY, keep_last=keep_last, keep_every=keep_every), tmp_path, data=data)
    kept = sorted(tmp_path.glob("checkpoints/*"))
    assert [int(p.stem) for p in kept] == steps
    assert [read_checkpoint(p)[1]["step"] for p in kept] == steps
    assert same(tensors(tmp_path), whole[0])
    if kept:
        assert load_checkpoint(kept[0]).sched.T == 10
        (tmp_path/"checkpoints/mine.safetensors").write_bytes(b"")
        train(replace(TINY, steps=6), tmp_path, overwrite=True, data=data)
        assert [p.name for p in (tmp_path/"checkpoints").iterdir()] == ["mine.safetensors"]


def test_old_checkpoints_are_refused_in_words(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path/"checkpoint.safetensors", {"format": json.dumps("ddpm_nbdev training 1")})
    with pytest.raises(WeightsError, match="a checkpoint of an earlier development version.*model.safetensors can still be used"): load_checkpoint(tmp_path)


def test_first_update_has_rate_zero(data, tmp_path):
    train(replace(TINY, steps=1), tmp_path, data=data)
    with torch.random.fork_rng():
        torch.manual_seed(T.subseed(0, 0))
        fresh = build_ddpm(TINY, data).model
    trained = load_checkpoint(tmp_path, ema=False).model
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), trained.parameters()))
    assert any(v.any() for k, v in tensors(tmp_path).items() if k.endswith(".exp_avg"))   # but the moments have begun
    assert learning_rate(0, TINY) == 0


@pytest.mark.parametrize("n, share", [(5000, .607), (10_000, .368), (50_000, .0067)])
def test_ema_share_of_initial_weights(n, share):
    "The paper's .9999, checked against the product and against the class at work."
    assert round(math.prod([.9999]*n), 4 if n == 50_000 else 3) == share
    model = torch.nn.Linear(1, 1, bias=False).double()
    ema = EMA(model, .9999)
    torch.nn.init.ones_(ema.model.weight)
    torch.nn.init.zeros_(model.weight)
    for _ in range(5000): ema.update(model)
    assert abs(ema.model.weight.item() - .9999**5000) < 1e-9
    assert abs(ema.share_left(n) - .9999**n) < 1e-9


def test_ema_warmup_and_no_decay():
    model = torch.nn.Linear(1, 1)
    ema = EMA(model, .5, warmup=True)
    assert [ema.decay_at(n) for n in (0, 1, 8, 1000)] == [.1, 2/11, .5, .5]
    assert EMA(model, 0.).share_left(3) == 0
    assert not any(p.requires_grad for p in ema.model.parameters()) and model.weight.requires_grad


def test_checkpoint_loads_average_or_raw(tmp_path, data):
    ddpm = train(TINY, tmp_path, data=data)
    (tmp_path/"model.safetensors").unlink()
    avg, raw = load_checkpoint(tmp_path), load_checkpoint(tmp_path, ema=False)
    same_as = lambda d: all(torch.equal(a, b) for a, b in zip(d.model.parameters(), ddpm.model.parameters()))
    assert same_as(avg) and not same_as(raw)
    assert avg.levels == 17 and avg.shape == (1, 8, 8) and avg.sched.T == 10
    assert torch.equal(draw_samples(avg, 5, seed=3), draw_samples(ddpm, 5, seed=3))


def test_a_variance_that_is_measured_cannot_be_trained():
    for objective in ("simple", "vlb"):
        with pytest.raises(ConfigError, match="^variance='optimal' is measured after training[^\n]*$"):
            replace(TINY, variance="optimal", objective=objective)


def test_a_measured_mse_is_saved_with_the_model(tmp_path, data):
    "To the last bit, with the numbers that a careless writer would round; and nothing of it where nothing was measured."
    ddpm = train(TINY, tmp_path/"run", data=data)
    config = json.loads((tmp_path/"run"/"config.json").read_text())
    assert "mse" not in config and ddpm.mse is None and ddpm.settings["mse"] is None
    assert load_checkpoint(tmp_path/"run").mse is None and DDPM.load(tmp_path/"run").mse is None
    mse = torch.rand(11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mse[1:5] = torch.tensor([0., 5e-324, 1/3, 1e-300], dtype=torch.float64)
    measured = replace(ddpm, variance="optimal", mse=mse)
    assert measured.mse is not mse and measured.mse[0].isnan() and measured.mse.device.type == "cpu"
    assert measured.to("cpu").mse.dtype == torch.float64
    measured.save(tmp_path/"model")
    entry = json.loads((tmp_path/"model"/"config.json").read_text())["mse"]
    assert entry["format"] == 1 and entry["values"] == [None, *mse[1:].tolist()]
    back = DDPM.load(tmp_path/"model")
    assert back.variance == "optimal" and torch.equal(back.mse[1:], mse[1:]) and back.mse[0].isnan() and back.mse.dtype == torch.float64
    as_before = replace(back, variance="beta")                               # the table may stay where it is not used
    assert torch.equal(draw_samples(as_before, 3), draw_samples(ddpm, 3)) and not torch.equal(draw_samples(back, 3), draw_samples(ddpm, 3))


@pytest.mark.parametrize("mse, says", [(None, "format 1"), ({"format": 2, "values": []}, "format 1"), ({"format": 1}, "values"), ({"format": 1, "values": 5}, "a list"),
    ({"format": 1, "values": []}, "null"), ({"format": 1, "values": [0] + [.1]*10}, "null"), ({"format": 1, "values": [None] + [.1]*9}, r"\(11,\), got \(10,\)"),
    ({"format": 1, "values": [None] + [.1]*9 + [-.1]}, "got -0.1 at t = 10"), ({"format": 1, "values": [None] + [.1]*9 + ["x"]}, "got 'x'"),
    ({"format": 1, "values": [None, True] + [.1]*9}, "got True"), ({"format": 1, "values": [None, None] + [.1]*9}, "got None"),
    ({"format": 1, "values": [None, 10**400] + [.1]*9}, "OverflowError"), ("gone", "needs mse")])
def test_a_damaged_mse_is_one_line(mse, says, tmp_path, data):
    replace(build_ddpm(TINY, data), variance="optimal", mse=torch.ones(11)).save(tmp_path)
    config = json.loads((tmp_path/"config.json").read_text())
    if mse == "gone": del config["mse"]
    else: config["mse"] = mse
    (tmp_path/"config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=f"not a usable configuration.*{says}") as e: DDPM.load(tmp_path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("change, says", [(dict(variance="optimal"), "needs mse, .*see measure_mse"), (dict(variance="optimal", mse=torch.ones(10)), r"\(11,\), got \(10,\)"),
    (dict(variance="optimal", mse=torch.ones(1, 11)), "got"), (dict(mse=torch.full((11,), math.nan)), "got nan at t = 1"), (dict(mse=-torch.ones(11)), "got -1.0 at t = 1"),
    (dict(mse=torch.tensor([0.]*10 + [math.inf])), "got inf at t = 10")])
def test_a_ddpm_refuses_what_is_no_mse(change, says, data):
    with pytest.raises(ValueError, match=says): replace(build_ddpm(TINY, data), **change)


def test_a_table_of_another_schedule_is_dropped(data):
    "With another T the measurement means nothing; a variance that does not need it goes on without."
    from ddpm_nbdev.schedule import linear_schedule
    ddpm = replace(build_ddpm(TINY, data), mse=torch.ones(11))
    assert len(ddpm.mse) == 11 and replace(ddpm, sched=linear_schedule(7)).mse is None


@pytest.mark.parametrize("field, value", [("T", 0), ("T", 2.5), ("T", True), ("T", "10"), ("steps", 0), ("batch_size", -1), ("lr", 0.), ("lr", -1.), ("lr", math.inf), ("lr", math.nan), ("warmup", -1),
    ("grad_clip", 0.), ("ema_decay", 1.), ("dropout", 1.), ("seed", -1), ("seed", 2**32), ("mean", "epsilon"), ("variance", "fixed"), ("objective", "mse"),
    ("model", "Transformer"), ("clip", "norm"), ("precision", "float16"), ("shards", 0), ("shards", 3), ("keep_last", 0), ("keep_every", 4), ("steps", 1e3), ("steps", math.inf), ("batch_size", 8.), ("T", math.nan), ("flip", "no"), ("schedule", "cosine"), ("schedule_args", {"beta_T": 1.5}), ("schedule_args", {"beta": .1}), ("log_every", 0), ("sample_every", -1)])
def test_config_names_what_is_wrong(field, value):
    with pytest.raises(ConfigError, match=field.replace("_args", "")): replace(TINY, **{field: value})


def test_presets_are_consistent():
    for name, cfg in PRESETS.items(): assert json.loads(json.dumps(asdict(cfg))) == asdict(cfg), name
    assert asdict(replace(PRESETS["cifar10"], dataset="x", flip=None, model_args={}, dropout=0.)) == asdict(TrainConfig("x"))
    assert preset("folder:a/b", steps=3).dataset == "folder:a/b"
    assert preset("lsun:x") == replace(PRESETS["lsun256"], dataset="lsun:x")
    assert preset("folder:a", "celebahq256").size == 256
    with pytest.raises(ConfigError, match="unknown preset 'celeba'; known: digits"): preset("folder:a", "celeba")


@pytest.mark.parametrize("name, unet", [("digits", digits_unet), ("cifar10", cifar10_unet), ("lsun256", image256_unet), ("celebahq256", image256_unet),
                                        ("lsun256_large", image256_large_unet)])
def test_presets_are_the_networks_of_that_name(name, unet):
    with torch.device("meta"):
        config = unet().config
        assert _build_model(PRESETS[name], (config["in_channels"], *[config["resolution"]]*2)).config == config


@pytest.mark.parametrize("name, size, count", [("cifar10", 32, 35_746_307), ("celebahq256", 256, 113_673_219), ("lsun256", 256, 113_673_219), ("lsun256_large", 256, 255_677_955)])
def test_presets_are_the_papers_networks(name, size, count):
    with torch.device("meta"): model = _build_model(PRESETS[name], (3, size, size))
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("x, said", [(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "got torch.uint8"), (torch.zeros(2, 1, 8, 8, dtype=torch.bool), "got torch.bool"), (torch.zeros(0, 1, 8, 8), r"\(0, 1, 8, 8\)|no image"),
    (torch.zeros(0, 1, 8, 8, dtype=torch.uint8), r"\(0, 1, 8, 8\)|no image"), (torch.zeros(2, 1, 0, 8), r"no pixel in images \(2, 1, 0, 8\)")])
def test_what_is_no_image_has_neither_loss_nor_bits(x, said):
    ddpm = DDPM.from_pretrained("digits")
    for call in (ddpm.loss, ddpm.bits_per_dim):
        with pytest.raises(ValueError, match=said): call(x)


@pytest.mark.parametrize("c", [1, 2, 4, 5])
def test_any_number_of_channels_trains_and_is_drawn(c, tmp_path):
    "Those that are neither gray nor red, green and blue stand side by side."
    images = torch.randint(256, (4, c, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ddpm = train(replace(PRESETS["folder"], T=4, steps=1, batch_size=2, sample_n=4, size=None), tmp_path, data=T.Dataset("x", images, images))
    assert ddpm.shape == (c, 8, 8)
    _save_samples(images[:1], tmp_path/"one.png", 256)
    shown = np.asarray(Image.open(tmp_path/"one.png"))[::4, ::4]
    np.testing.assert_array_equal(shown, np.repeat(np.concatenate(list(images[0].numpy()), -1)[..., None], 3, -1))


@pytest.mark.parametrize("name", ["cifar10", "celebahq256", "lsun256", "lsun256_large"])
def test_presets_train_at_reduced_width(name, tmp_path):
    "One step of the whole recipe, with the levels of the full network but few channels and small images."
    cfg = PRESETS[name]
    levels = len(cfg.model_args["ch_mult"])
    cfg = replace(cfg, model_args=cfg.model_args | dict(ch=8, groups=4, attn_resolutions=[4]), steps=2, batch_size=2, warmup=1, size=None)
    images = torch.randint(256, (4, 3, 32 if levels == 4 else 64, 32 if levels == 4 else 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ddpm = train(cfg, tmp_path, data=T.Dataset("x", images, images))
    assert len(ddpm.model.down) == levels and ddpm.variance == ("beta" if name == "cifar10" else "beta_tilde")
    assert [r["lr"] for r in read_log(tmp_path)] == [cfg.lr] and ddpm.sched.T == 1000


def test_256_presets_follow_the_official_settings():
    for name in ("celebahq256", "lsun256", "lsun256_large"):
        cfg = PRESETS[name]
        assert (cfg.batch_size, cfg.lr, cfg.dropout, cfg.warmup, cfg.grad_clip, cfg.ema_decay, cfg.ema_warmup) == (64, 2e-5, 0., 5000, 1., .9999, False)
    assert [PRESETS[n].flip for n in ("celebahq256", "lsun256", "lsun256_large")] == [True, None, False]
    assert [PRESETS[n].steps for n in ("celebahq256", "lsun256", "lsun256_large")] == [500_000, 1_200_000, 1_150_000]


@pytest.mark.parametrize("size", range(4, 70))
def test_small_unet_fits_any_size(size):
    cfg = TrainConfig("x")
    with torch.device("meta"):
        model = _build_model(cfg, (1, size, size))
        assert model(torch.zeros(1, 1, size, size), torch.ones(1).long()).shape == (1, 1, size, size)
    assert size == 4 or size % 2 or model.factor >= 2
    assert all(r <= 16 for r in _small_unet_args(size)["attn_resolutions"])


@pytest.mark.parametrize("mean, variance, objective", [("x0", "beta_tilde", "simple"), ("mu", "beta", "vlb"), ("eps", "learned", "vlb")])
def test_other_choices_train_and_resume(mean, variance, objective, data, tmp_path):
    cfg = replace(TINY, mean=mean, variance=variance, objective=objective, steps=8)
    train(cfg, tmp_path/"a", data=data)
    train(replace(cfg, steps=5), tmp_path/"b", data=data)
    train(cfg, tmp_path/"b", resume=True, data=data)
    assert same(tensors(tmp_path/"a"), tensors(tmp_path/"b"))


def test_unwritable_out(tmp_path, data):
    (tmp_path/"file").write_text("")
    with pytest.raises(OSError): train(TINY, tmp_path/"file"/"run", data=data)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_on_a_gpu(tmp_path, data):
    train(replace(TINY, steps=10), tmp_path, device="cuda", data=data)
    ddpm = train(TINY, tmp_path, device="cuda", resume=True, data=data)
    assert ddpm.device.type == "cuda" and draw_samples(ddpm, 3).shape == (3, 1, 8, 8)
