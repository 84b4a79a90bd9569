"The commands: what they write and print, and that whatever goes wrong is one line and loses nothing."
import importlib
import json
import os
import pickle
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from conftest import Python
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ddpm_nbdev import cli, measures, models, quality, start, watch
from ddpm_nbdev import run as cli_run
from ddpm_nbdev import train as train_module
from ddpm_nbdev.cli import ddpm_evaluate, ddpm_sample, ddpm_train
from ddpm_nbdev.commands import _make_parser, _one_line
from ddpm_nbdev.data import load_dataset
from ddpm_nbdev.ddpm import DDPM, draw_samples
from ddpm_nbdev.decoder import to_model_range
from ddpm_nbdev.features import digit_classifier
from ddpm_nbdev.files import read_log
from ddpm_nbdev.interpolate_cli import ddpm_interpolate
from ddpm_nbdev.likelihood import measure_mse
from ddpm_nbdev.restart import _restarted
from ddpm_nbdev.saved import read_checkpoint
from ddpm_nbdev.schedule import linear_schedule
from ddpm_nbdev.toy import MLP
from ddpm_nbdev.train import TrainConfig, load_checkpoint

torch.set_num_threads(1)
QUICK = ["--T", "4", "--steps", "4", "--batch-size", "4"]
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def classifier(once):
    return once("classifier", lambda folder: digit_classifier(load_dataset("digits"), epochs=1))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch, classifier):
    "An empty current folder, a classifier that is already trained, and a quick look at the bits."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quality, "digit_classifier", lambda data: classifier)
    monkeypatch.setattr(quality, "_EVALUATION_PIXELS", 20_000)
    return tmp_path


@pytest.fixture(scope="module")
def finished(once, classifier):
    "A finished tiny run."
    def make(folder):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(quality, "digit_classifier", lambda data: classifier)
            patch.setattr(quality, "_EVALUATION_PIXELS", 20_000)
            ddpm_train("digits", T=4, steps=4, batch_size=4, out=str(folder/"run"), quiet=True)
        return folder/"run"
    return once("finished", make)


@pytest.fixture
def run(finished, tmp_path):
    "A copy of the finished run that a test may damage."
    return shutil.copytree(finished, tmp_path/"run")


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path/"pictures"
    folder.mkdir()
    g = torch.Generator().manual_seed(0)
    for i in range(12): Image.fromarray(torch.randint(0, 256, (9, 10, 3), generator=g, dtype=torch.uint8).numpy()).save(folder/f"{i}.png")
    return folder


def failed(result, status, *said):
    "One line on stderr that says what is wrong, no traceback."
    code, _, err = result
    assert code == status, err
    assert len(err.strip().splitlines()) == 1 and "Traceback" not in err, err
    for s in said: assert s in err, err


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---- what works

def test_train_writes_and_says_everything(call, here):
    status, out, err = call(ddpm_train, "digits", *QUICK)
    assert (status, err) == (0, "")
    run = here/"runs/digits"
    assert sorted(p.name for p in run.iterdir()) == ["checkpoint.safetensors", "config.json", "curve.png", "log.jsonl", "metrics.json", "model.safetensors", "samples.png"]
    for part in ("train", "test"):
        total, err, L_T, L_mid, L_0 = map(float, re.search(rf"{part} +([\d.]+) \+- ([\d.]+) bits/dim = L_T ([\de.+-]+) \+ L_mid ([\de.+-]+) \+ L_0 ([\de.+-]+)", out).groups())
        assert abs(total-(L_T+L_mid+L_0)) < .02 and err > 0
    assert re.search(r"a classifier of real digits is sure \(above .9\) of \d+% of the samples", out)
    assert re.search(r"\d+ s training \+ \d+ s sampling", out)
    assert "wrote samples.png model.safetensors config.json metrics.json log.jsonl curve.png in runs/digits" in out
    assert "to sample again: ddpm_sample runs/digits" in out
    metrics = json.loads((run/"metrics.json").read_text())
    assert {"bits_per_dim", "classifier", "seconds_training", "seconds_measuring", "parameters", "config"} <= metrics.keys()
    assert metrics["classifier"]["samples"]["images"] == 64 and metrics["config"]["T"] == 4
    assert set(metrics["bits_per_dim"]["test"]) == {"total", "L_T", "L_mid", "L_0", "standard_error", "images", "steps_per_image"}
    config = json.loads((run/"config.json").read_text())
    assert config["levels"] == 17 and config["shape"] == [1, 8, 8]
    assert Image.open(run/"samples.png").format == "PNG"
    averaged, saved = load_checkpoint(run).model.state_dict(), load_file(run/"model.safetensors")
    assert all(torch.equal(averaged[k], saved[k]) for k in saved)       # the average, not the last weights
    assert read_log(run)[-1]["step"] == 4


def test_the_printed_command_samples_again(call, here):
    _, out, _ = call(ddpm_train, "digits", *QUICK, "--out", here/"my run")
    words = shlex.split(re.search(r"to sample again: ddpm_sample (.*)", out).group(1))
    status, out, _ = call(ddpm_sample, *words)
    assert status == 0 and (here/"my run_samples.png").exists()
    assert (here/"my run_samples.png").read_bytes() == (here/"my run/samples.png").read_bytes()   # same seed, same images


def test_folder(call, here, pictures):
    status, out, err = call(ddpm_train, f"folder:{pictures}", *QUICK, "--flip")
    assert (status, err) == (0, "")
    assert "11 training and 1 test images, 3x8x8, 256 levels" in out and "classifier" not in out
    assert re.search(r"^images: 8x8.*, in color .*; a tenth, by name, is for testing$", out, re.M)
    assert json.loads((here/"runs/pictures/metrics.json").read_text())["config"]["flip"] is True
    assert call(ddpm_sample, "runs/pictures", "--n", 2)[0] == 0
    assert Image.open(here/"pictures_samples.png").size == (2*8*4+4, 8*4)


def test_a_run_goes_on_with_the_channels_it_has(call, here):
    "Gray pictures stored as color had three channels; a run that began with them, and did not ask for them, still finds its images."
    (here/"p").mkdir()
    for i in range(8): Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8, 1), dtype=np.uint8).repeat(3, -1)).save(here/f"p/{i}.png")
    assert call(ddpm_train, "folder:p", *QUICK, "--channels", 3, "--out", "r")[0] == 0
    tensors, path = read_checkpoint(here/"r/checkpoint.safetensors")[0], here/"r/checkpoint.safetensors"
    with safe_open(path, "pt") as f: header = f.metadata()
    config = json.dumps(json.loads(header["config"]) | {"channels": None})
    save_file(tensors, path, metadata=header | {"config": config})
    status, out, err = call(ddpm_train, "folder:p", "--resume", "--steps", 5, "--out", "r", "--samples", 0)
    assert (status, err) == (0, "") and "3x8x8" in out


def test_quiet(call):
    assert call(ddpm_train, "digits", *QUICK, "--quiet") == (0, "", "")
    assert call(ddpm_sample, "runs/digits", "--n", 1, "--quiet") == (0, "", "")


def test_resume_takes_the_settings_of_the_run(call, here):
    assert call(ddpm_train, "digits", *QUICK, "--seed", 9)[0] == 0
    status, out, _ = call(ddpm_train, "digits", "--resume", "--steps", 6)
    assert status == 0 and "6 steps" in out
    tensors, header = read_checkpoint(here/"runs/digits/checkpoint.safetensors")
    assert (header["step"], header["config"]["seed"], header["config"]["T"]) == (6, 9, 4)
    assert call(ddpm_train, "digits", "--T", 4, "--steps", 6, "--batch-size", 4, "--seed", 9, "--out", "whole")[0] == 0
    whole = read_checkpoint(here/"whole/checkpoint.safetensors")[0]
    assert all(torch.equal(tensors[k], whole[k]) for k in whole)


def test_a_run_is_not_its_path(call, here, pictures, monkeypatch):
    "Another spelling, another working directory, moved pictures, a moved run: the same run; other pictures: another."
    def go(*args): return call(ddpm_train, *args, "--samples", 0, "--quiet")
    def stored(run): return read_checkpoint(run/"checkpoint.safetensors")[1]["config"]["dataset"]
    assert go("folder:pictures", *QUICK, "--out", "run") == (0, "", "") and stored(here/"run") == f"folder:{pictures.resolve()}"
    (here/"elsewhere").mkdir()
    (here/"linked").symlink_to(pictures)
    for i, spelled in enumerate(("./pictures", "pictures/", str(pictures), "elsewhere/../pictures", "linked")):
        assert go(f"folder:{spelled}", "--out", "run", "--resume", "--steps", 5+i) == (0, "", ""), spelled
    monkeypatch.chdir(here/"elsewhere")
    assert go("folder:../pictures", "--out", "../run", "--resume", "--steps", 10)[0] == 0
    assert call(ddpm_evaluate, here/"run", "--images", 1, "--curve-images", 1, "--quiet")[0] == 0            # which knows where they are
    (here/"run").rename(here/"renamed")
    pictures.rename(here/"moved")
    assert go("folder:../moved", "--out", "../renamed", "--resume", "--steps", 11) == (0, "", "") and stored(here/"renamed").endswith("/moved")
    assert [r["step"] for r in read_log(here/"renamed")] == [4, 5, 6, 7, 8, 9, 10, 11]
    before = contents(here/"renamed")
    failed(go("folder:../pictures", "--out", "../renamed", "--resume"), 1, f"no such folder: {pictures.resolve()}")
    Image.new("RGB", (9, 10)).save(here/"moved/3.png")
    failed(go("folder:../moved", "--out", "../renamed", "--resume", "--steps", 12), 1, "the training images are not those it began with")
    assert contents(here/"renamed") == before


def test_a_name_that_says_whether_to_flip_is_asked_once(call, here, monkeypatch):
    "LSUN's bedrooms are not mirrored: in a renamed folder, the same run."
    from ddpm_nbdev.data import DATASETS
    digits = load_dataset("digits")
    monkeypatch.setitem(DATASETS, "lsun", lambda path, *a: replace(digits, flip="bedroom" not in path))
    size = ["--preset", "digits", "--samples", 0, "--quiet"]
    for name in "bedroom", "church": assert call(ddpm_train, f"lsun:{name}", *QUICK, *size) == (0, "", "")
    assert [json.loads((here/f"runs/{n}/metrics.json").read_text())["config"]["flip"] for n in ("bedroom", "church")] == [False, True]
    assert call(ddpm_train, "lsun:other", "--out", "runs/bedroom", "--resume", "--steps", 6, "--samples", 0)[0] == 0
    assert json.loads((here/"runs/bedroom/metrics.json").read_text())["config"]["flip"] is False


def test_the_printed_command_goes_on(call, here, pictures, monkeypatch):
    "It has all that it needs, and does what the first one would have done."
    step = cli_run.training_step
    def stopped(state, batches):
        if state.step == 2: signal.raise_signal(signal.SIGINT)
        return step(state, batches)
    args = ["folder:pictures", *QUICK, "--samples", 0, "--data-dir", "my data", "--device", "cpu", "--seed", 3]
    with monkeypatch.context() as m:
        m.setattr(cli_run, "training_step", stopped)
        status, _, err = call(ddpm_train, *args, "--out", "my run")
    assert status == 130
    words = shlex.split(re.search(r"to go on: ddpm_train (.*)", err).group(1))
    assert words == ["folder:pictures", "--out", "my run", "--resume", "--data-dir", "my data", "--samples", "0", "--device", "cpu"]
    assert call(ddpm_train, *words)[0] == 0 and not (here/"my run/samples.png").exists()
    assert call(ddpm_train, *args, "--out", "whole")[0] == 0
    a, b = (read_checkpoint(here/n/"checkpoint.safetensors")[0] for n in ("my run", "whole"))
    assert all(torch.equal(a[k], b[k]) for k in b)


def first_weights(call, here, *args, out="new"):
    "The weights before the first step that counts: the first update has the rate 0."
    assert call(ddpm_train, *args, "--steps", 1, "--warmup", 9, "--batch-size", 4, "--samples", 0, "--quiet", "--out", out) == (0, "", "")
    tensors, header = read_checkpoint(here/out/"checkpoint.safetensors")
    parts = [{k.removeprefix(p): v for k, v in tensors.items() if k.startswith(p)} for p in ("model.", "ema.")]
    return *parts, header["config"]


@pytest.mark.parametrize("what", ["", "checkpoint.safetensors", "digits"])
def test_a_run_begins_with_the_weights_of_another(what, call, here, run):
    init = what if what == "digits" else run/what
    model, ema, config = first_weights(call, here, "digits", "--init", init, "--lr", 1e-4)
    want = DDPM.load(run) if init != "digits" else DDPM.from_pretrained("digits")
    for part in model, ema: assert part.keys() == want.model.state_dict().keys() and all(torch.equal(v, want.model.state_dict()[k]) for k, v in part.items())
    assert config["T"] == want.sched.T and config["lr"] == 1e-4
    assert [r["step"] for r in read_log(here/"new")] == [1]                                     # a log of its own
    assert call(ddpm_train, "digits", "--resume", "--out", "new", "--steps", 2, "--samples", 0)[0] == 0


def test_a_run_begins_with_a_diffusers_folder(call, here, pictures):
    from ddpm_nbdev.pretrained import OfficialUNet, save_diffusers
    from ddpm_nbdev.schedule import linear_schedule
    torch.manual_seed(0)
    net = OfficialUNet(ch=8, ch_mult=[1, 2], num_res_blocks=1, attn_resolutions=[], resolution=8, groups=4).eval()
    save_diffusers(DDPM(net, linear_schedule(3, .1, .2), (3, 8, 8)), here/"theirs")
    model, ema, config = first_weights(call, here, "folder:pictures", "--init", "theirs", "--dropout", .2)
    assert all(torch.equal(model[k], v) and torch.equal(ema[k], v) for k, v in net.state_dict().items())
    assert (config["model"], config["T"], config["schedule_args"], config["model_args"]["dropout"]) == ("OfficialUNet", 3, {"beta_1": .1, "beta_T": .2}, .2)


def test_a_network_of_another_shape_is_no_beginning(call, here, run, pictures):
    failed(call(ddpm_train, "folder:pictures", "--init", "digits", "--size", 4), 1, "digits is for images of 1x8x8, and those of folder:", "/pictures are 1x4x4")
    (here/"a.json").write_text('{"model_args": {"ch": 8, "ch_mult": [1, 2], "attn_resolutions": [], "groups": 4}}')
    failed(call(ddpm_train, "digits", *QUICK, "--init", run, "--config", "a.json"), 1, "weights of another architecture")
    failed(call(ddpm_train, "digits", "--init", "nowhere/at/all"), 1, "nowhere/at/all")
    failed(call(ddpm_train, "digits", "--init", run, "--out", run, "--resume"), 2, "--init and --resume exclude each other")
    failed(call(ddpm_train, "digits", "--init", run, "--out", run), 1, "already holds a run")
    assert not (here/"runs").exists()
    assert call(ddpm_train, "digits", "--init", run, "--out", run, "--overwrite", *QUICK[2:], "--samples", 0)[0] == 0      # what is read is read first


def test_an_evaluation_outlives_a_resume_of_the_same_weights(call, run):
    "And one of a shorter run is dropped with a word."
    assert call(ddpm_evaluate, run, "--images", 2, "--curve-images", 1)[0] == 0
    before = json.loads((run/"metrics.json").read_text())["evaluation"]
    status, out, _ = call(ddpm_train, "digits", "--out", run, "--resume")
    assert status == 0 and "this run is finished" in out and "what ddpm_evaluate measured" not in out and json.loads((run/"metrics.json").read_text())["evaluation"] == before
    status, out, _ = call(ddpm_train, "digits", "--out", run, "--resume", "--steps", 5)
    assert status == 0 and "this run is finished" not in out and f"again: ddpm_evaluate {run}" in out and "evaluation" not in json.loads((run/"metrics.json").read_text())
    (run/"metrics.json").write_text("cut sho")                             # a damaged file of numbers stops no training
    assert call(ddpm_train, "digits", "--out", run, "--resume")[0] == 0 and json.loads((run/"metrics.json").read_text())["bits_per_dim"]


def test_stopped_while_measuring(call, here, monkeypatch):
    "Nothing is lost, and how to go on is said."
    def stopped(*args): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(cli, "report", stopped)
        status, _, err = call(ddpm_train, "digits", *QUICK)
    assert status == 130 and "the trained network is saved" in err and "ddpm_train digits --out runs/digits --resume" in err
    assert not (here/"runs/digits/metrics.json").exists()
    assert call(ddpm_train, "digits", "--resume", "--quiet") == (0, "", "") and (here/"runs/digits/metrics.json").exists()


@pytest.mark.parametrize("signum", [signal.SIGTERM, pytest.param(getattr(signal, "SIGHUP", None), marks=pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has none"))])
@pytest.mark.parametrize("where", ["_plan_training", "report", "_save_curve"])
def test_terminated_before_or_after_training(where, signum, call, here, monkeypatch):
    "As by Ctrl-C: one line, status 130, no lock left behind, and who heard the signal before hears it again."
    monkeypatch.setattr(signal, "getsignal", lambda s, real=signal.getsignal: signal.SIG_DFL if s == getattr(signal, "SIGHUP", None) else real(s))   # pytest may run under nohup
    before, called = signal.getsignal(signal.SIGTERM), []
    def terminated(*args):
        called.append((here/"runs/digits/.ddpm_lock").exists())
        signal.raise_signal(signum)
    with monkeypatch.context() as m:
        m.setattr(cli, where, terminated)
        status, _, err = call(ddpm_train, "digits", *QUICK)
    assert status == 130 and called == [True] and signal.getsignal(signal.SIGTERM) is before and not list(here.glob("runs/*/.ddpm_*"))
    if where == "report": assert "the trained network is saved; to sample and measure it: ddpm_train digits --out runs/digits --resume" in err
    assert len(err.strip().splitlines()) == 1 and (here/"runs").exists() == (where != "_plan_training")


def test_overwrite(call, run):
    before = contents(run)
    assert call(ddpm_train, "digits", *QUICK, "--seed", 3, "--out", run, "--overwrite")[0] == 0
    after = contents(run)
    assert after.keys() == before.keys() and after["model.safetensors"] != before["model.safetensors"]


def test_short_T_is_pointed_out(call):
    assert "does not end in pure noise" in call(ddpm_train, "digits", *QUICK)[1]


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the switch is of x86 processors")
def test_imitated_bfloat16_is_pointed_out(here):
    "A processor without bfloat16 takes a multiple of the time: asked to be one, this one says so."
    command = [sys.executable, "-m", "ddpm_nbdev.cli", "train", "digits", "--steps", "1", "--T", "4", "--samples", "0", "--device", "cpu"]
    env = ENV | {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    found = [subprocess.run([*command, "--precision", p, "--out", p], env=env, text=True, capture_output=True) for p in ("bfloat16", "float32")]
    assert [("imitates it" in r.stdout, r.returncode, r.stderr) for r in found] == [(True, 0, ""), (False, 0, "")]


@pytest.mark.parametrize("command, args, status, said", [
    (ddpm_sample, ["digits", "--n", 10**25, "--each"], 1, "GB are free there: --n"), (ddpm_sample, ["digits", "--n", 10**400, "-o", "x.safetensors"], 1, "GB are free there: --n"),
    (ddpm_sample, ["digits", "--steps-used", 10**400], 1, "steps"), (ddpm_interpolate, ["digits", 1, 2, "--n", 10**400], 2, "lower --n or --scale")])
def test_huge_numbers_are_refused(command, args, status, said, call, here):
    failed(call(command, *args), status, said)
    assert not contents(here)


def test_a_model_of_points_draws_no_picture(call, here):
    DDPM(MLP(), linear_schedule(4), (2,)).save(here/"points")
    for out in ("x.png", "x.safetensors"): failed(call(ddpm_sample, "points", "-o", out), 1, "points draws no gray or color images, but tensors of shape (2,)")


def test_an_evaluation_that_is_replaced_is_pointed_out(call, here):
    quick = "digits", "--images", 2, "--curve-images", 1, "--steps", 1, "-o", "found.json"
    assert "replaced" not in call(ddpm_evaluate, *quick)[1] and "note: the evaluation that was there is replaced" in call(ddpm_evaluate, *quick)[1]


def test_an_average_that_is_still_noise_is_pointed_out(call, here):
    "Before and after training; and --raw draws with the weights themselves."
    status, out, _ = call(ddpm_train, "digits", *QUICK, "--ema-decay", .9, "--no-ema-warmup", "--lr", .05, "--warmup", 0, "--samples", 0)
    assert status == 0 and "after 4 steps 66% of the average will still be" in out and "note: 66% of the average is still" in out
    args = shlex.split(re.search(r"(ddpm_sample runs/digits --raw) draws", out).group(1))[1:]
    assert call(ddpm_sample, *args, "--n", 4, "--out", "raw.safetensors")[0] == 0
    drawn = draw_samples(load_checkpoint(here/"runs/digits", ema=False), 4)
    assert torch.equal(load_file(here/"raw.safetensors")["images"], drawn)
    assert not torch.equal(draw_samples(load_checkpoint(here/"runs/digits"), 4), drawn)
    status, out, _ = call(ddpm_train, "digits", *QUICK, "--samples", 0, "--out", "short")
    assert status == 0 and "of the average" not in out
    failed(call(ddpm_sample, "digits", "--raw"), 1, "digits: no checkpoint.safetensors there")
    (here/"runs/digits/checkpoint.safetensors").unlink()
    failed(call(ddpm_sample, "runs/digits", "--raw"), 1, "no checkpoint.safetensors there")


def test_sample_options(call, here, finished):
    status, out, err = call(ddpm_sample, finished, "--n", 10, "--seed", 5, "--steps-shown", 3, "--out", "a.png")
    assert (status, err) == (0, "") and "wrote a.png" in out and "a_chain.png, t = 4 2 0" in out
    assert re.search(r"10 samples of .*, 4 steps, in [\d.]+ s", out)
    assert Image.open("a_chain.png").size == ((8+1)*3*4-4, (8+1)*8*4-4)   # three moments of eight images, each pixel 4x4
    call(ddpm_sample, finished, "--n", 10, "--seed", 5, "--out", "b.png")
    call(ddpm_sample, finished, "--n", 10, "--seed", 6, "--out", "c.png")
    a, b, c = (open(f"{x}.png", "rb").read() for x in "abc")
    assert a == b != c


def test_fewer_steps(call, here, finished):
    "All of them with the model's own variance are the model; fewer are another chain."
    def draw(name, *args): return call(ddpm_sample, finished, "--n", 9, "--out", name, *args)
    assert draw("a.png")[0] == draw("b.png", "--variance", "beta")[0] == draw("c.png", "--steps-used", 4, "--variance", "beta")[0] == 0
    assert (here/"a.png").read_bytes() == (here/"b.png").read_bytes() == (here/"c.png").read_bytes()
    status, out, err = draw("d.png", "--steps-used", 2, "--steps-shown", 3)
    assert (status, err) == (0, "") and "9 samples" in out and "2 of 4 steps, in" in out and "d_chain.png, t = 4 2 0" in out
    assert draw("e.png", "--steps-used", 2, "--variance", "beta_tilde")[0] == 0
    assert (here/"e.png").read_bytes() == (here/"d.png").read_bytes() != (here/"a.png").read_bytes()
    failed(draw("f.png", "--steps-used", 5), 1, "from 1 to 4 steps can be kept, got 5")
    failed(draw("f.png", "--steps-used", 2, "--steps-shown", 4), 1, "has 3 moments")
    failed(draw("f.png", "--variance", "optimal"), 1, "nobody has measured yet")
    assert not (here/"f.png").exists()


def test_chain_ends_in_the_samples(finished):
    ddpm, seen = DDPM.load(finished), []
    x = draw_samples(ddpm, 5, watch=lambda t, x: seen.append((t, x)))
    assert [t for t, _ in seen] == [4, 3, 2, 1, 0]
    assert torch.equal(((seen[-1][1].clamp(-1, 1)+1)*8).round().to(torch.uint8), x)
    assert torch.equal(draw_samples(ddpm, 5), x)


def test_sample_never_overwrites(call, here, finished):
    for _ in range(3): assert call(ddpm_sample, finished, "--n", 1)[0] == 0
    assert sorted(p.name for p in here.glob("*.png")) == ["run_samples.png", "run_samples_2.png", "run_samples_3.png"]
    (here/"mine.png").write_bytes(b"mine")
    failed(call(ddpm_sample, finished, "--n", 1, "--out", "mine.png"), 1, "mine.png exists", "--overwrite")
    assert (here/"mine.png").read_bytes() == b"mine"
    (here/"new_chain.png").write_bytes(b"mine")
    failed(call(ddpm_sample, finished, "--n", 1, "--steps-shown", 2, "--out", "new.png"), 1, "new_chain.png exists")
    assert not (here/"new.png").exists()
    assert call(ddpm_sample, finished, "--n", 1, "--out", "mine.png", "--overwrite")[0] == 0
    assert (here/"mine.png").read_bytes() != b"mine"


def test_sample_from_an_unfinished_run(call, run):
    for name in ("model.safetensors", "config.json", "metrics.json", "samples.png"): (run/name).unlink()
    assert call(ddpm_sample, run, "--n", 1)[0] == 0


def test_from_python(finished, here):
    assert ddpm_sample(str(finished), n=1, quiet=True).name == "run_samples.png"
    with pytest.raises(ValueError, match="unknown dataset"): ddpm_train("mnist")      # no SystemExit


def test_shipped_digits(call, here):
    start = time.perf_counter()
    status, out, err = call(ddpm_sample, "digits", "--n", 4)
    assert (status, err) == (0, "") and (here/"digits_samples.png").exists()
    assert time.perf_counter()-start < 60


# ---- what fails

@pytest.mark.parametrize("args, said", [
    (["--T", 0], "T must be a whole number, at least 1, got 0"), (["--steps", 0], "steps must be"), (["--steps", "many"], "invalid int value: 'many'"),
    (["--batch-size", 0], "batch_size must be"), (["--lr", -1], "lr must be a positive number, got -1.0"), (["--lr", "nan"], "lr must be"), (["--lr", 0], "lr must be"),
    (["--seed", -1], "seed must be"), (["--resume", "--overwrite"], "exclude each other"), (["--what"], "unrecognized arguments: --what"), (["--batch", 3], "unrecognized arguments"),
    (["more"], "unrecognized arguments: more")])
def test_train_wrong_usage(args, said, call, here):
    failed(call(ddpm_train, "digits", *args), 2, said, "ddpm_train --help")
    assert not list(here.iterdir())


@pytest.mark.parametrize("args, said", [(["--n", 0], "n must be at least 1"), (["--seed", -1], "seed must be"), (["--steps-shown", 1], "steps-shown must be"),
                                        (["--steps-shown", -2], "steps-shown must be"), (["--out", "x.jpg"], ".png"), (["--n", "x"], "invalid int"),
                                        (["--steps-used", 0], "steps-used must be"), (["--variance", "learned"], "unknown variance 'learned'; known: beta, beta_tilde, optimal")])
def test_sample_wrong_usage(args, said, call, here, finished):
    failed(call(ddpm_sample, finished, *args), 2, said)
    assert not list(here.iterdir())


@pytest.mark.parametrize("args, said", [(["--preset", "celeba"], "unknown preset 'celeba'; known: digits"), (["--precision", "float16"], "unknown precision"),
    (["--clip", "norm"], "unknown clip"), (["--shards", 3], "cannot be cut into 3 equal shards"), (["--flip", "--no-flip"], "not allowed with argument"),
    (["--samples", -1], "samples must be at least 0"), (["--keep-every", 7], "multiple of checkpoint_every"), (["--keep-last", 0], "keep_last must be")])
def test_train_wrong_usage_of_the_newer_options(args, said, call, here):
    failed(call(ddpm_train, "digits", *args), 2, said)
    assert not list(here.iterdir())


def test_missing_argument(call):
    failed(call(ddpm_train), 2, "DATASET")
    failed(call(ddpm_sample), 2, "WHAT")


def test_unknown_dataset(call, here):
    failed(call(ddpm_train, "mnist"), 1, "unknown dataset 'mnist'; known: digits, folder:PATH, cifar10, fashion_mnist, lsun:PATH")
    assert not list(here.iterdir())


def test_bad_folders(call, here, pictures):
    failed(call(ddpm_train, "folder:nowhere"), 1, "no such folder: ", "/nowhere")
    failed(call(ddpm_train, "folder:"), 1, "needs a path")
    (here/"empty").mkdir()
    failed(call(ddpm_train, "folder:empty"), 1, "no pictures in ", "/empty")
    (pictures/"3.png").write_bytes((pictures/"3.png").read_bytes()[:100])
    (pictures/"bad.jpg").write_text("no image")
    failed(call(ddpm_train, "folder:pictures", *QUICK), 1, "3.png", "bad.jpg", "2 of 13 images cannot be read")
    failed(call(ddpm_train, "folder:pictures", "--size", 2), 1, "size must be at least 4")
    assert not (here/"runs").exists()


def test_batch_larger_than_data(call, here):
    failed(call(ddpm_train, "digits", "--batch-size", 1438), 1, "batch size 1438 does not fit 1437 training images")
    assert not (here/"runs").exists()


def test_size_of_digits(call, here):
    failed(call(ddpm_train, "digits", "--size", 16), 1, "digits are 8x8")


def test_unwritable_output(call, here, finished):
    (here/"file").write_text("mine")
    failed(call(ddpm_train, "digits", *QUICK, "--out", "file/run"), 1, "file")
    failed(call(ddpm_train, "digits", *QUICK, "--out", "file"), 1, "file")
    failed(call(ddpm_sample, finished, "--n", 1, "--out", "file/a.png"), 1, "file")
    assert contents(here) == {"file": b"mine"}


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(call, here):
    (here/"locked").mkdir(mode=0o500)
    failed(call(ddpm_train, "digits", *QUICK, "--out", "locked/run"), 1, "Permission denied")


def test_folder_that_holds_a_run(call, run):
    before = contents(run)
    failed(call(ddpm_train, "digits", *QUICK, "--out", run), 1, "already holds a run", "--resume", "--overwrite")
    failed(call(ddpm_train, "digits", "--lr", .5, "--out", run, "--resume"), 1, "lr was 0.004, is now 0.5")
    failed(call(ddpm_train, "folder:x", "--out", run, "--resume"), 1, "holds a run on digits, not folder:x")
    failed(call(ddpm_train, "digits", "--out", run, "--resume", "--steps", 2), 1, "already at step 4")
    assert contents(run) == before


def test_nothing_to_resume(call, here):
    failed(call(ddpm_train, "digits", "--resume"), 1, "nothing to resume")
    assert not (here/"runs").exists()


def test_diverging_run_keeps_its_checkpoint(call, here, monkeypatch):
    assert call(ddpm_train, "digits", *QUICK)[0] == 0
    before = contents(here/"runs/digits")
    real = DDPM.loss
    monkeypatch.setattr(DDPM, "loss", lambda *a, **k: real(*a, **k)*float("nan"))
    failed(call(ddpm_train, "digits", "--resume", "--steps", 8), 1, "diverged at step 5", "checkpoint of step 4 is kept")
    assert contents(here/"runs/digits") == before


@pytest.mark.parametrize("file", ["model.safetensors", "checkpoint.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "pickle", "empty", "other architecture", "json"])
def test_unusable_weights(file, damage, call, run, here):
    target = run/file
    if file == "checkpoint.safetensors": (run/"model.safetensors").unlink()
    if damage == "truncated": target.write_bytes(target.read_bytes()[:-1000])
    if damage == "pickle": torch.save({"x": torch.zeros(3)}, target)
    if damage == "empty": target.write_bytes(b"")
    if damage == "json": target.write_text("{}")
    if damage == "other architecture": save_file({"weight": torch.zeros(3)}, target)
    said = {"pickle": "pickle", "other architecture": "another architecture" if file[0] == "m" else "not a checkpoint"}.get(damage, "not a complete safetensors file")
    before = contents(run)
    failed(call(ddpm_sample, run, "--n", 1), 1, file, said)
    if file == "checkpoint.safetensors": failed(call(ddpm_train, "digits", "--out", run, "--resume"), 1, file, said)
    assert contents(run) == before and not list(here.glob("*.png"))


@pytest.mark.parametrize("file", ["model.safetensors", "checkpoint.safetensors"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(file, bad, call, run, here):
    "They would draw a black picture and give NaN for bits/dim."
    if file == "checkpoint.safetensors": (run/"model.safetensors").unlink()
    with open(run/file, "rb") as f: head = json.loads(f.read(int.from_bytes(f.read(8), "little"))).get("__metadata__")
    weights = load_file(run/file)
    weights[next(k for k in weights if k.endswith("conv_in.weight") and not k.startswith("model."))].view(-1)[3] = bad
    save_file(weights, run/file, head)
    before = contents(run)
    failed(call(ddpm_sample, run, "--n", 1), 1, file, "conv_in.weight has values that are not finite")
    failed(call(ddpm_evaluate, run, "--images", 2, "--curve-images", 1), 1, file, "not finite")
    assert contents(run) == before and not list(here.glob("*.png"))


def test_a_network_that_gives_nan_is_an_error(call, run, here, monkeypatch):
    "Finite weights can overflow."
    class Nan(torch.nn.Module):
        def forward(self, xt, t): return xt*float("nan")
    real = models.find_model
    monkeypatch.setattr(cli, "find_model", lambda *a: replace(real(*a), model=Nan()))
    before = contents(run)
    failed(call(ddpm_sample, run, "--n", 1), 1, "not finite")
    failed(call(ddpm_evaluate, run, "--images", 2, "--curve-images", 1), 1, "not finite")
    assert contents(run) == before and not list(here.glob("*.png"))


def test_a_second_run_into_one_folder_is_refused(call, here):
    "And the first one goes on as if nothing had happened, until it is stopped."
    p = Python("-m", "ddpm_nbdev.cli", "train", "digits", *QUICK, "--steps", "100000", "--log-every", "1", "--out", "run", cwd=here, env=ENV)
    while not (here/"run/log.jsonl.new").exists() or not (here/"run/log.jsonl.new").read_text():
        assert p.poll() is None, p.communicate()
        time.sleep(.02)
    failed(call(ddpm_train, "digits", *QUICK, "--out", "run"), 1, f"run: another run writes there (process {p.pid} on ", "choose another --out")
    failed(call(ddpm_train, "digits", "--out", "run", "--overwrite"), 1, "another run writes there")
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=120)
    steps = [r["step"] for r in read_log(here/"run")]
    assert p.returncode == 130 and f"stopped after step {len(steps)} of 100000" in err, err
    assert steps == list(range(1, len(steps)+1))


def test_a_network_that_overflows_is_an_error(call, run, here):
    "Its weights are finite; the clamp would hide what it gives."
    weights = load_file(run/"model.safetensors")
    for k in ("conv_out.weight", "conv_out.bias"): weights[k].fill_(3.4e38)
    save_file(weights, run/"model.safetensors", {"step": "4"})
    failed(call(ddpm_sample, run, "--n", 1), 1, "not finite")
    failed(call(ddpm_evaluate, run, "--images", 2, "--curve-images", 1), 1, "not finite")


@pytest.mark.parametrize("change, said", [({"step": None}, "lacks step"), ({"ddpm": "{"}, "damaged header"), ({"ddpm": "[" * 100_000}, "damaged header"), ({"ddpm": "5"}, "not a usable configuration")])
def test_damaged_headers_are_one_line(change, said, call, run):
    (run/"model.safetensors").unlink()
    with open(run/"checkpoint.safetensors", "rb") as f: head = json.loads(f.read(int.from_bytes(f.read(8), "little")))["__metadata__"]
    head = {k: v for k, v in (head | change).items() if v is not None}
    save_file(load_file(run/"checkpoint.safetensors"), run/"checkpoint.safetensors", head)
    failed(call(ddpm_sample, run, "--n", 1), 1, "checkpoint.safetensors", said)


def test_an_evaluation_does_not_undo_a_training(call, here, run, monkeypatch):
    "The run went on while it was evaluated: its numbers stay, and the evaluation goes to a file of its own."
    real = cli.evaluate_bits_per_dim
    def slow(*args, **kw):
        if not (here/"later").exists():
            (here/"later").write_text("")
            ddpm_train("digits", steps=6, out=str(run), resume=True, quiet=True)
        return real(*args, **kw)
    monkeypatch.setattr(cli, "evaluate_bits_per_dim", slow)
    status, out, _ = call(ddpm_evaluate, run, "--images", 2, "--curve-images", 1)
    metrics = json.loads((run/"metrics.json").read_text())
    assert status == 0 and "went on meanwhile" in out and metrics["config"]["steps"] == 6 and "evaluation" not in metrics
    assert evaluated(here/"run_metrics.json")["test"]["n"] == 2


def test_settings_from_python(here):
    "None is as good as not given; what is not known is named."
    metrics = ddpm_train("digits", T=4, steps=1, batch_size=4, seed=None, precision=None, samples=0, quiet=True)
    assert metrics["config"]["seed"] == 0 and metrics["config"]["precision"] == "float32"
    for wrong, said in ((dict(foo=1), "unknown setting 'foo'; known: dataset, size"), (dict(size="8"), "size must be"), (dict(samples=2.5), "samples must be"),
                        (dict(compile="no"), "compile must be True or False"), (dict(mean=[]), "unknown mean"), (dict(model_args={"foo": 1}), "does not fit")):
        with pytest.raises(ValueError, match=said): ddpm_train("digits", out="x", quiet=True, **wrong)
    with pytest.raises(TypeError): ddpm_train("digits", None, 4, 1)
    assert not (here/"x").exists()


def test_old_style_pickle_is_not_run(call, run):
    class Bomb:
        def __reduce__(self): return (open, (str(run/"bomb went off"), "w"))
    (run/"model.safetensors").write_bytes(pickle.dumps(Bomb()))
    failed(call(ddpm_sample, run, "--n", 1), 1, "pickle")
    assert not (run/"bomb went off").exists()


def test_weights_of_another_architecture(call, run):
    config = json.loads((run/"config.json").read_text())
    config["model"]["args"]["ch"] = 32
    (run/"config.json").write_text(json.dumps(config))
    failed(call(ddpm_sample, run, "--n", 1), 1, "another architecture")
    config["model"]["name"] = "os.system"
    (run/"config.json").write_text(json.dumps(config))
    failed(call(ddpm_sample, run, "--n", 1), 1, "unknown model 'os.system'")
    (run/"config.json").write_text("{")
    failed(call(ddpm_sample, run, "--n", 1), 1, "config.json")


def test_nothing_to_sample_from(call, here):
    failed(call(ddpm_sample, "nothing"), 1, "no trained model 'nothing' ships with the package", "digits")
    (here/"a/b").mkdir(parents=True)
    failed(call(ddpm_sample, "a/b"), 1, "so no trained model")


def test_too_many_moments(call, finished):
    failed(call(ddpm_sample, finished, "--steps-shown", 6), 1, "has 5 moments")


def test_device_that_is_not_there(call, here):
    failed(call(ddpm_train, "digits", *QUICK, "--device", "warp"), 1, "device 'warp' cannot be used")
    if not torch.cuda.is_available(): failed(call(ddpm_train, "digits", *QUICK, "--device", "cuda"), 1, "device 'cuda' cannot be used")
    assert not (here/"runs").exists()


def test_out_of_memory_is_one_line(call, monkeypatch, finished):
    def full(*a, **k): raise MemoryError
    monkeypatch.setattr(cli, "draw_samples", full)
    failed(call(ddpm_sample, finished), 1, "out of memory")


def test_bugs_are_not_hidden(call, monkeypatch, finished):
    "One line is for what a user can mend; an error of ours keeps its traceback."
    def bug(*a, **k): raise ZeroDivisionError
    monkeypatch.setattr(cli, "draw_samples", bug)
    with pytest.raises(ZeroDivisionError): call(ddpm_sample, finished)


def test_one_line():
    assert _one_line(OSError(28, "No space left on device", "a.png")) == "a.png: No space left on device"
    assert _one_line(ValueError("a\n  b")) == "a b"
    assert _one_line(KeyError()) == "KeyError"


def test_options_have_dashes_and_help():
    for command in (ddpm_train, ddpm_sample, ddpm_evaluate):
        kw = dict(settings=TrainConfig, offered=cli._OFFERED) if command is ddpm_train else {}
        for action in _make_parser(command.__wrapped__, **kw)._actions:
            assert action.help and not any("_" in s for s in action.option_strings)


def test_options_of_training_are_the_settings(call):
    "Each offered field is an option with the field's own comment, and nothing else is typed a second time."
    from fastcore.docments import docments
    status, said, _ = call(ddpm_train, "--help")
    said, comments = " ".join(said.split()), docments(TrainConfig)
    scalars = [f.name for f in fields(TrainConfig) if f.name not in ("dataset", "init", "model", "model_args", "schedule_args")]
    assert status == 0 and cli._OFFERED.split() == scalars and len(scalars) == 29
    for name in cli._OFFERED.split():
        assert f"--{name.replace('_', '-')}" in said and " ".join(comments[name].split()) in said, name


def test_resume_is_judged_by_the_settings_of_the_run(call, here):
    assert call(ddpm_train, "digits", *QUICK, "--checkpoint-every", 2, "--samples", 0)[0] == 0
    assert call(ddpm_train, "digits", "--resume", "--steps", 6, "--keep-every", 2, "--samples", 0)[0] == 0     # the preset has 250
    assert (here/"runs/digits/checkpoints/0000006.safetensors").exists()
    failed(call(ddpm_train, "digits", "--resume", "--preset", "folder"), 2, "--preset and --resume exclude each other")


def test_evaluate_asks_for_the_dataset_where_nobody_knows_it(call, here, run, monkeypatch):
    monkeypatch.setattr(models, "load_diffusers", lambda name, device: DDPM.from_pretrained("digits"))
    failed(call(ddpm_evaluate, "google/ddpm-cifar10-32"), 1, "name it with --dataset")
    status, _, err = call(ddpm_evaluate, run/"checkpoint.safetensors", "--images", 2, "--curve-images", 1, "--out", "a.json")
    assert (status, err) == (0, "") and evaluated(here/"a.json")["test"]["n"] == 2          # a checkpoint knows


def test_what_a_restart_does(here, finished, monkeypatch):
    "The first start asks the folder's rules; a restart goes on with this run, or begins it again, and never with another's."
    run = shutil.copytree(finished, here/"run")
    assert _restarted(run, False, True) == (False, True) and not (run/".torchrun").exists()       # no torchrun, no mark
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    with pytest.raises(ValueError, match="already holds a run"): _restarted(run, False, False)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(ValueError, match="already holds a run"): _restarted(run, False, False)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    (run/"log.jsonl.new").write_text("")                                                             # a dead --overwrite
    assert _restarted(run, True, False) == (True, False)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert _restarted(run, True, False) == (True, False)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert _restarted(run, False, True) == (False, True)
    (run/"log.jsonl.new").write_text("")                                                             # as RunFolder does
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert _restarted(run, False, True) == (False, True)                                          # no checkpoint of its own yet
    (run/"log.jsonl.new").unlink()
    assert _restarted(run, False, True) == (True, False)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    with pytest.raises(ValueError, match="already holds a run"): _restarted(run, False, False)    # a new start, without a name
    for name in ("job7", "job7"):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
        assert _restarted(run, True, False) == (True, False)                                      # a queue starts the same name again


# ---- larger data, other devices, other formats

@pytest.fixture
def archive(here):
    "CIFAR-10 in the layout of the official archive, with made-up contents."
    folder = here/"data/cifar-10-batches-bin"
    folder.mkdir(parents=True)
    g = torch.Generator().manual_seed(0)
    block = torch.randint(0, 256, (100, 3073), dtype=torch.uint8, generator=g)
    block[:, 0] %= 10
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]: (folder/name).write_bytes(block.numpy().tobytes()*100)
    return here/"data"


def test_cifar10_from_a_local_archive(call, here, archive, monkeypatch):
    "The whole recipe on the official layout; the network has its four levels, but few channels."
    small = train_module.PRESETS["cifar10"].model_args | dict(ch=8, groups=4)
    monkeypatch.setitem(train_module.PRESETS, "cifar10", replace(train_module.PRESETS["cifar10"], model_args=small))
    monkeypatch.setattr(quality, "_quick_bits", lambda ddpm, x: dict(total=1., L_T=0., L_mid=1., L_0=0., standard_error=None, images=len(x)))
    status, out, err = call(ddpm_train, "cifar10", "--steps", 3, "--batch-size", 8, "--T", 4, "--samples", 3, "--data-dir", archive)
    assert (status, err) == (0, "") and "cifar10: 50000 training and 10000 test images, 3x32x32, 256 levels; 3 steps on cpu" in out
    config = json.loads((here/"runs/cifar10/metrics.json").read_text())["config"]
    assert config["flip"] and config["dropout"] == .1 and config["warmup"] == 5000
    assert "samples.png" in contents(here/"runs/cifar10")
    monkeypatch.setenv("DDPM_DATA", str(archive))
    assert call(ddpm_train, "cifar10", "--resume", "--steps", 4, "--samples", 0)[0] == 0


def test_cifar10_without_data_names_the_file(call, here):
    (here/"empty").mkdir()
    failed(call(ddpm_train, "cifar10", "--data-dir", "empty"), 1, "cifar-10-binary.tar.gz", "empty")
    assert not (here/"runs").exists()


def test_options_reach_the_settings(call, here):
    args = ["--shards", 2, "--clip", "shard", "--precision", "bfloat16", "--flip", "--keep-last", 2, "--log-every", 1, "--checkpoint-every", 2, "--keep-every", 2, "--sample-every", 2, "--samples", 0]
    assert call(ddpm_train, "digits", *QUICK, *args)[0] == 0
    config = json.loads((here/"runs/digits/metrics.json").read_text())["config"]
    want = dict(shards=2, clip="shard", precision="bfloat16", flip=True, keep_last=2, log_every=1, checkpoint_every=2, keep_every=2, sample_every=2)
    assert {k: config[k] for k in want} == want
    files = contents(here/"runs/digits")
    assert {"checkpoints/0000002.safetensors", "checkpoints/0000004.safetensors", "samples/000002.png", "curve.png"} <= files.keys() and "samples.png" not in files
    status, out, _ = call(ddpm_sample, "runs/digits/checkpoints/0000002.safetensors", "--n", 2)
    assert status == 0 and (here/"0000002.safetensors_samples.png").exists()


def test_every_scalar_setting_is_an_option(call, here):
    args = ["--objective", "vlb", "--variance", "learned", "--mean", "x0", "--schedule", "quadratic", "--dropout", .1, "--warmup", 3, "--grad-clip", 2,
            "--ema-decay", .5, "--no-ema-warmup", "--channels", 1, "--sample-n", 3, "--samples", 0, "--quiet"]
    assert call(ddpm_train, "digits", *QUICK, *args) == (0, "", "")
    config = json.loads((here/"runs/digits/metrics.json").read_text())["config"]
    want = dict(objective="vlb", variance="learned", mean="x0", schedule="quadratic", dropout=.1, warmup=3, grad_clip=2., ema_decay=.5, ema_warmup=False, channels=1, sample_n=3)
    assert {k: config[k] for k in want} == want
    failed(call(ddpm_train, "digits", "--variance", "learned"), 2, "variance='learned' needs objective='vlb'")


@pytest.mark.parametrize("source", ["metrics.json", "checkpoint.safetensors", "", "plain.json", "plain.toml"])
def test_settings_from_a_file(source, call, here):
    "Of a run, its checkpoint, its numbers, or written by hand; options go before the file, the file before the preset."
    if source.endswith("toml") and sys.version_info < (3, 11): pytest.skip("this Python reads no TOML")
    assert call(ddpm_train, "digits", *QUICK, "--lr", .003, "--samples", 0, "--out", "old", "--quiet")[0] == 0
    (here/"old/plain.json").write_text('{"T": 4, "steps": 4, "batch_size": 4, "lr": 0.003}')
    (here/"old/plain.toml").write_text("T = 4\nsteps = 4\nbatch_size = 4\nlr = 0.003\n")
    status, _, err = call(ddpm_train, "digits", "--config", here/"old"/source, "--seed", 5, "--samples", 0, "--out", "new", "--quiet")
    assert (status, err) == (0, "")
    old, new = (json.loads((here/n/"metrics.json").read_text())["config"] for n in ("old", "new"))
    assert new == old | {"seed": 5} and new["lr"] == .003
    assert call(ddpm_train, "digits", "--resume", "--out", "new", "--quiet", "--samples", 0)[0] == 0


@pytest.mark.parametrize("text, status, said", [("{", 1, "a.json: not JSON"), ("[1]", 1, "not a configuration but a list"), ('{"config": 3}', 2, "a.json: its config must be a table, got int"),
    ('{"colour": 3}', 2, "unknown setting 'colour'"), ('{"steps": 0}', 2, "steps must be"), ('{"lr": "x"}', 2, "lr must be")])
def test_a_bad_file_of_settings_is_one_line(text, status, said, call, here):
    (here/"a.json").write_text(text)
    failed(call(ddpm_train, "digits", "--config", "a.json"), status, said)
    failed(call(ddpm_train, "digits", "--config", "none.json"), 1, "none.json: no such file")
    failed(call(ddpm_train, "digits", "--config", "a.json", "--resume"), 2, "--config and --resume exclude each other")
    (here/"a.toml").write_text("x = = 2")
    failed(call(ddpm_train, "digits", "--config", "a.toml"), 1, "a.toml")
    assert sorted(p.name for p in here.iterdir()) == ["a.json", "a.toml"]


def test_every_command_says_its_version(call):
    from ddpm_nbdev import __version__
    commands = [getattr(importlib.import_module(f"ddpm_nbdev.{home}"), name) for name, home in start._HOMES.items()]
    assert len(commands) == 8
    for command in commands: assert call(command, "--version") == (0, f"{command.__name__} {__version__}\n", "")


@pytest.mark.parametrize("name", start._HOMES)
def test_what_is_said_without_torch_is_what_the_command_says(name, call, monkeypatch):
    "Help, version and wrong usage come out of the text of the command's module: the same words as those of the command itself, and torch is not read."
    command, code = getattr(importlib.import_module(f"ddpm_nbdev.{start._HOMES[name]}"), name), f"import sys; from ddpm_nbdev.start import {name}\ntry: {name}()\nfinally: print('torch' in sys.modules)"
    monkeypatch.setenv("COLUMNS", "100")
    for words in (["--help"], ["--version"], ["digits", "--no-such-option", "3"], []):
        p = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
        status, out, err = call(command, *words)
        assert (p.returncode, p.stdout, p.stderr) == (status, out+"False\n", err), words
        assert status == (0 if words[:1] in (["--help"], ["--version"]) else 1 if (name, words) == ("ddpm_runs", []) else 2)
    assert not [m for m in sys.modules if "outlined" in m]


def test_a_list_option_may_be_said_again(call, here, finished):
    from ddpm_nbdev.options import _parser_of
    parser = _parser_of("ddpm_interpolate", "interpolate_cli")
    assert parser.parse_args(["digits", "1", "2", "--t", "5", "6", "--t", "7"]).t == [5, 6, 7]


def test_a_command_in_a_notebook_reads_no_command_line_of_jupyter(monkeypatch):
    "A cell with `ddpm_sample()` used to take the name of Jupyter's connection file for a model."
    for program in ("/usr/lib/python3/site-packages/ipykernel_launcher.py", "/usr/bin/ipython", "colab_kernel_launcher.py"):
        monkeypatch.setattr(sys, "argv", [program, "-f", "/run/user/kernel-1.json"])
        with pytest.raises(ValueError, match=r"without arguments reads the command line, and in a notebook there is none: give them as in ddpm_sample\(what=...\)"): ddpm_sample()
        with pytest.raises(ValueError, match=r"ddpm_train\(dataset=...\)"): ddpm_train()


def test_skip_bad_trains_without_them(call, here, pictures):
    "The run is the one of the folder without the broken files, and goes on without being told again; other pictures are refused."
    args = [f"folder:{pictures}", *QUICK, "--samples", 0]
    (pictures/"broken.png").write_text("no image")
    failed(call(ddpm_train, *args), 1, "1 of 13 images cannot be read", "broken.png (in an unknown format)", "let --skip-bad train without them")
    assert not (here/"runs").exists()
    status, out, err = call(ddpm_train, *args, "--skip-bad", "--out", "a")
    assert status == 0 and "; 1 that cannot be read, left out; " in out and "note: left out, since they cannot be read: " in err and "broken.png" in err
    assert call(ddpm_evaluate, "a", "--images", 2, "--curve-images", 1, "--steps", 2)[0] == 0
    assert call(ddpm_train, f"folder:{pictures}", "--out", "a", "--resume", "--steps", 6, "--samples", 0)[0] == 0
    (pictures/"broken.png").unlink()
    assert call(ddpm_train, *args, "--out", "b", "--steps", 6)[0] == 0
    one, two = (load_file(f"{n}/model.safetensors") for n in "ab")
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    next(p for p in pictures.iterdir() if p.name == "3.png").write_text("broken, too")
    status, _, err = call(ddpm_train, f"folder:{pictures}", "--out", "a", "--resume", "--steps", 8, "--samples", 0)
    assert status in (0, 1) and (status == 0 or "the training images are not those it began with" in err)      # 0: it was held out
    failed(call(ddpm_train, "digits", *QUICK, "--skip-bad"), 1, "only pictures of a folder can be skipped")


@pytest.mark.parametrize("args, status, said", [
    (["digits", "--cuda-graph"], 2, "--cuda-graph: only for one process with a GPU"),
    (["folder:pictures", "--preset", "cifar10", "--batch-size", "4"], 2, "the network of these settings halves images 3 times, and their side is 12: --size 16 would fit"),
    (["folder:pictures", "--preset", "cifar10"], 1, "batch size 128 does not fit 18 training images"), (["digits", "--batch-size", "2000"], 1, "batch size 2000"),
    (["digits", "--out", "there"], 1, "there is a file, not a folder: choose another --out"), (["digits", "--out", "there/run"], 1, "there is a file, not a folder: choose another --out")])
def test_what_is_refused_is_not_announced(args, status, said, call, here):
    "One line, no line before it that says what is going to happen, and no folder afterwards."
    (here/"pictures").mkdir()
    for i in range(20): Image.fromarray(np.full((12, 12, 3), i, np.uint8)).save(here/f"pictures/{i}.png")
    (here/"there").write_text("a file")
    if "cifar10" in args and "--batch-size" not in args: args = [*args, "--size", "8"]
    code, out, err = call(ddpm_train, *args)
    assert (code, out) == (status, "") and len(err.splitlines()) == 1 and said in err, err
    assert sorted(p.name for p in here.iterdir()) == ["pictures", "there"]


@pytest.mark.parametrize("error, said", [(RuntimeError("InvalidCxxCompiler: No working C++ compiler found"), "--compile makes code with a compiler, and none is found that works"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8000000000000 bytes. Error code 12 (Cannot allocate memory)"), "out of memory: "),
    (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 7 bytes."), "out of memory: "), (MemoryError(), "out of memory: "), (KeyboardInterrupt(), "interrupted")])
def test_a_failed_start_leaves_no_folder(error, said, call, here, run, monkeypatch):
    "What fails in the first update: one line, and neither an empty log nor the folder is left; a run that was to be replaced is as it was."
    def fails(*a): raise error
    monkeypatch.setattr(cli_run, "training_step", fails)
    before = contents(run)
    status, _, err = call(ddpm_train, "digits", *QUICK, "--out", "new/run")
    assert status == (130 if said == "interrupted" else 1) and len(err.strip().splitlines()) == 1 and said in err, err
    assert not (here/"new").exists()
    assert call(ddpm_train, "digits", *QUICK, "--out", run, "--overwrite")[0] in (1, 130) and contents(run) == before
    assert call(ddpm_train, "digits", "--steps", 9, "--out", run, "--resume")[0] in (1, 130) and contents(run) == before


def test_torchrun_needs_to_know_of_a_failed_start(here, monkeypatch):
    "Its next start replaces the run, as was asked for, since the empty log is there."
    from ddpm_nbdev.runs import _without_trace
    for env, left in (("1", True), (None, False)):
        if env: monkeypatch.setenv("TORCHELASTIC_RUN_ID", env)
        else: monkeypatch.delenv("TORCHELASTIC_RUN_ID")
        (here/"log.jsonl.new").write_text("")
        with pytest.raises(ZeroDivisionError), _without_trace(here): 1/0
        assert (here/"log.jsonl.new").exists() == left
    (here/"log.jsonl.new").write_text("{}")
    with pytest.raises(ZeroDivisionError), _without_trace(here): 1/0
    assert (here/"log.jsonl.new").exists()                                    # somebody's work


def test_files_are_as_readable_as_the_user_lets_files_be(call, here):
    before = os.umask(0o022)
    try:
        assert call(ddpm_train, "digits", *QUICK, "--samples", 2, "--sample-every", 2, "--keep-every", 2, "--checkpoint-every", 2)[0] == 0
        assert call(ddpm_sample, "runs/digits", "--n", 1, "--out", "x.safetensors")[0] == 0
    finally: os.umask(before)
    files = [p for p in here.rglob("*") if p.is_file()]
    assert len(files) > 8 and {oct(p.stat().st_mode & 0o777) for p in files} == {"0o644"}


def test_a_file_of_a_run_names_it(call, here, run):
    assert call(ddpm_sample, run, "--n", 2, "--out", "a.png")[0] == 0
    assert call(ddpm_sample, run/"model.safetensors", "--n", 2, "--out", "b.png")[0] == 0
    assert (here/"a.png").read_bytes() == (here/"b.png").read_bytes()
    failed(call(ddpm_sample, run/"metrics.json"), 1, f"a model is named by its folder: {run}")


def test_evaluate_says_what_its_numbers_mean(call, here, run):
    out = call(ddpm_evaluate, run, "--images", 2, "--curve-images", 1, "--steps", 2)[1]
    assert f"(fewer bits/dim are better; as they are, such images take {np.log2(17):.2f})\nhalf of the bits are received after " in out
    assert re.search(r"after \d of 4 reverse steps, (late, as it should be|early: train it longer) \(1 image at every step\)\n", out)


def test_no_flip(call, here):
    assert call(ddpm_train, "digits", *QUICK, "--no-flip", "--samples", 0, "--quiet")[0] == 0
    assert json.loads((here/"runs/digits/metrics.json").read_text())["config"]["flip"] is False


def test_a_slow_device_draws_fewer_samples(call, here, monkeypatch):
    said = []
    ddpm = DDPM.from_pretrained("digits")
    assert cli._how_many(ddpm, None, "--n", said.append, patience=1e9) == 64 and not said
    n = cli._how_many(ddpm, None, "--n", said.append, patience=1.)
    assert 1 <= n < 64 and f"drawing {n} (--n 64 draws them all)" in said[0]
    assert cli._how_many(ddpm, 7, "--n", said.append, patience=0.) == 7 and len(said) == 1


def on_the_board(run):
    "What TensorBoard shows of a run: scalars, pictures, both as step -> value; a step that is there twice is an error."
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed")
    events = accumulator.EventAccumulator(str(run/"tensorboard"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    tags = events.Tags()
    found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags["scalars"]} | {tag: [(e.step, (e.width, e.height)) for e in events.Images(tag)] for tag in tags["images"]}
    for tag, points in found.items(): assert len({step for step, _ in points}) == len(points), tag
    return {tag: dict(points) for tag, points in found.items()}


def same_as_the_log(run):
    "The scalars of training are the numbers of log.jsonl, and nothing else."
    rows, found = read_log(run), on_the_board(run)
    for k in ("loss", "grad_norm", "lr"): assert found[k] == pytest.approx({row["step"]: row[k] for row in rows}, rel=1e-6), k
    pace = {row["step"]: (row["seconds"]-last["seconds"])/(row["step"]-last["step"]) for last, row in zip([{"step": 0, "seconds": 0.}, *rows], rows)}
    assert found["seconds_a_step"] == pytest.approx(pace, rel=1e-3, abs=1e-6)
    return found


@pytest.mark.parametrize("from_the_start", [True, False])
def test_tensorboard(from_the_start, call, here, monkeypatch):
    "Of a run that is stopped after a checkpoint and an update or two, goes on, is measured twice, and is replaced: each point once, that of the log."
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    args = ["digits", *QUICK, "--steps", 20, "--log-every", 2, "--checkpoint-every", 6, "--sample-every", 6, "--sample-n", 2, "--samples", 2, "--out", "run"]
    real = cli_run.training_step
    def dies(state, batches):
        if state.step == 10: raise RuntimeError("the machine is gone")
        return real(state, batches)
    with monkeypatch.context() as m:
        m.setattr(cli_run, "training_step", dies)
        with pytest.raises(RuntimeError): call(ddpm_train, *args, *["--tensorboard"]*from_the_start)
    run = here/"run"
    assert read_log(run)[-1]["step"] == 10 and (run/"tensorboard").exists() == from_the_start
    status, out, err = call(ddpm_train, "digits", "--resume", "--log-every", 3, "--samples", 2, "--out", "run", "--tensorboard")
    assert (status, err) == (0, "") and "to look at it: tensorboard --logdir run" in out
    found = same_as_the_log(run)
    bits = json.loads((run/"metrics.json").read_text())["bits_per_dim"]
    for part in bits: assert found[f"bits_per_dim/{part}"] == pytest.approx({20: bits[part]["total"]})
    assert list(found["samples"]) == [6, 12, 18, 20] and found["samples"][20] == Image.open(run/"samples.png").size
    assert call(ddpm_train, "digits", "--resume", "--samples", 2, "--out", "run", "--tensorboard")[0] == 0      # measured once more
    assert same_as_the_log(run).keys() == found.keys()
    before = contents(run)
    with monkeypatch.context() as m:                                        # replaced, but it dies before its first checkpoint
        m.setattr(cli_run, "training_step", lambda state, batches: (_ for _ in ()).throw(RuntimeError("gone")) if state.step == 5 else real(state, batches))
        with pytest.raises(RuntimeError): call(ddpm_train, *args, "--overwrite", "--tensorboard")
    assert {k: v for k, v in contents(run).items() if k != "log.jsonl.new"} == before
    assert call(ddpm_train, *args, "--seed", 1, "--steps", 8, "--overwrite", "--tensorboard")[0] == 0
    assert max(same_as_the_log(run)["loss"]) == 8 and len(list((run/"tensorboard").iterdir())) == 1


@pytest.mark.parametrize("moment", ["the first checkpoint", "a checkpoint with pictures"])
def test_tensorboard_has_no_hole_after_a_kill(moment, call, here, monkeypatch):
    "What a run that died had not copied is copied when it goes on."
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    args = ["digits", *QUICK, "--steps", 8, "--log-every", 2, "--checkpoint-every", 4, "--sample-every", 4, "--sample-n", 2, "--samples", 2, "--out", "run", "--tensorboard"]
    def gone(*args): raise RuntimeError("the machine is gone")
    with monkeypatch.context() as m:
        if moment == "the first checkpoint": m.setattr(cli_run, "_end_earlier_run", gone)
        else: m.setattr(cli_run.RunFolder, "draw", gone)
        with pytest.raises(RuntimeError): call(ddpm_train, *args)
    assert call(ddpm_train, "digits", "--resume", "--samples", 2, "--out", "run", "--tensorboard")[0] == 0
    found = same_as_the_log(here/"run")
    assert list(found["loss"]) == [2, 4, 6, 8] and list(found["samples"]) == [4, 8]


def test_a_run_knows_what_it_began_with(call, here):
    "On the screen, in its numbers; settings taken from it do not pretend to."
    assert call(ddpm_train, "digits", *QUICK, "--samples", 0, "--out", "a")[0] == 0
    status, out, err = call(ddpm_train, "digits", *QUICK, "--samples", 0, "--out", "b", "--init", "a")
    assert (status, err) == (0, "") and "it begins with the weights of a\n" in out and "does not end in pure noise" in out
    assert json.loads((here/"b/metrics.json").read_text())["config"]["init"] == "a"
    assert call(ddpm_train, "digits", "--samples", 0, "--out", "c", "--config", "b/metrics.json")[0] == 0
    assert json.loads((here/"c/metrics.json").read_text())["config"]["init"] is None


def test_settings_that_cannot_be_read_as_toml(call, here):
    (here/"deep.toml").write_text("a = " + "["*100_000)
    failed(call(ddpm_train, "digits", "--config", "deep.toml"), 1, "deep.toml: not TOML (nested too deeply)")
    with open(here/"large.toml", "wb") as f: f.truncate(2**31)
    failed(call(ddpm_train, "digits", "--config", "large.toml"), 1, "too many for a configuration")


def test_tensorboard_changes_no_weight(call, here):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    for out, more in (("with", ["--tensorboard"]), ("without", [])): assert call(ddpm_train, "digits", *QUICK, "--samples", 0, "--out", out, *more)[0] == 0
    assert (here/"with/model.safetensors").read_bytes() == (here/"without/model.safetensors").read_bytes() and not (here/"without/tensorboard").exists()
    same_as_the_log(here/"with")


def test_tensorboard_that_is_not_installed_is_one_line(call, here, monkeypatch):
    "Before anything else: no folder, no data, nothing trained."
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setattr(cli, "_plan_training", None)
    failed(call(ddpm_train, "digits", *QUICK, "--tensorboard"), 1, "pip install 'ddpm_nbdev[tensorboard]'")
    assert not list(here.iterdir())


def test_the_way_on_names_tensorboard(call, here, monkeypatch):
    def stopped(*args): raise KeyboardInterrupt
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    monkeypatch.setattr(cli, "report", stopped)
    assert "ddpm_train digits --out runs/digits --resume --tensorboard\n" in call(ddpm_train, "digits", *QUICK, "--tensorboard")[2]


def test_one_patience_for_samples_and_measurements(call, here, monkeypatch):
    "On a machine that takes a second for a step: what is left out is said, with the command that takes it, and the rest is what is written."
    def trained(seconds, *args):
        monkeypatch.setattr(cli, "_seconds_a_call", lambda ddpm: seconds)
        status, out, err = call(ddpm_train, "digits", *QUICK, "--overwrite", *args)
        metrics = json.loads((here/"runs/digits/metrics.json").read_text())
        assert (status, err) == (0, "")
        return out, metrics["classifier"]["samples"]["images"], [metrics["bits_per_dim"][part]["images"] for part in ("train", "test")], metrics
    reports = []
    monkeypatch.setattr(cli, "report", lambda *args: reports.append(args) or quality.report(*args))
    out, drawn, measured, whole = trained(1e-9)
    assert (drawn, measured) == (64, [34, 34]) and "would take" not in out and "will take" not in out
    [(ddpm, data, samples)] = reports
    assert len(data.train) == 1437 and len(data.test) == 360 and torch.equal(samples, draw_samples(ddpm, 64))
    direct = quality.report(ddpm, load_dataset("digits"), samples)
    assert {k: whole[k] for k in direct} == direct                              # nothing cut: to the last bit
    out, drawn, measured, _ = trained(1.)                                       # 64*4 + 34*8 seconds
    assert (drawn, measured) == (24, [7, 7])
    assert "64 samples would take about 4 minutes on this device; drawing 24 (--samples 64 draws them all)" in out
    assert "measuring on 34 images of each part would take about 5 minutes; taking 7 (ddpm_evaluate runs/digits --images 34 --steps 8 takes them all)" in out
    assert "that will take about 3 minutes" in out and "(7 images)" in out
    out, drawn, measured, _ = trained(1., "--samples", 3)                       # asked for: 12 seconds
    assert (drawn, measured) == (3, [21, 21]) and "samples would" not in out
    out, drawn, measured, _ = trained(.31)                                      # 79 + 84 seconds: they fit
    assert (drawn, measured) == (64, [34, 34]) and "that will take about 3 minutes" in out
    assert "will take" not in call(ddpm_train, "digits", *QUICK, "--overwrite", "--quiet")[1]


def test_evaluate_says_the_time_and_cuts_nothing(call, run, monkeypatch):
    monkeypatch.setattr(measures, "_seconds_a_call", lambda ddpm: .5)
    status, out, _ = call(ddpm_evaluate, run, "--images", 6, "--steps", 2, "--curve-images", 1)
    said = re.search(r"^bits/dim of 6 training and 6 test images will take about (\d+) s$", out, re.M)
    assert status == 0 and int(said[1]) == (6*3 + 6*3 + 4 + 16*4 + 6*3)/2       # the rows, the curve, the error of x_0-hat, the better variance
    assert out.index(said[0]) < out.index("RMSE") and evaluated(run/"metrics.json")["test"]["n"] == 6
    monkeypatch.setattr(measures, "_seconds_a_call", lambda ddpm: .1)
    assert "will take" not in call(ddpm_evaluate, run, "--images", 6, "--steps", 2)[1]


def test_a_step_is_timed_on_a_machine_whose_speed_is_known(monkeypatch):
    "A network that takes 2 seconds for 8 images is asked twice, and not three times more."
    now, ddpm, asked = [0.], DDPM.from_pretrained("digits"), []
    def slow(net, args):
        asked.append(len(args[0]))
        now[0] += len(args[0])/4
    monkeypatch.setattr(watch, "_clock", lambda: now[0])
    hook = ddpm.model.register_forward_pre_hook(slow)
    assert watch._seconds_a_call(ddpm) == pytest.approx(.25) and asked == [8, 8] and not ddpm.model.training
    said = []
    assert cli._how_many(ddpm, None, "--n", said.append) == 1 and "64 samples would take about 4 hours" in said[0]
    hook.remove()


def test_samples_as_a_tensor(call, here, finished):
    assert call(ddpm_sample, finished, "--n", 5, "--batch-size", 2, "--out", "x.safetensors")[0] == 0
    assert call(ddpm_sample, finished, "--n", 3, "--out", "y.safetensors")[0] == 0
    x, y = (load_file(here/f"{n}.safetensors")["images"] for n in "xy")
    assert x.shape == (5, 1, 8, 8) and x.dtype == torch.uint8 and (x[:3].int()-y.int()).abs().max() <= 1
    failed(call(ddpm_sample, finished, "--out", "x.safetensors"), 1, "x.safetensors exists")


def test_bfloat16(call, here, run, monkeypatch):
    "A trained network in twenty long steps, so that there is something to round."
    from ddpm_nbdev.schedule import linear_schedule
    short = replace(DDPM.from_pretrained("digits"), sched=linear_schedule(20, 5e-3, .5))
    with monkeypatch.context() as m:
        m.setattr(cli, "find_model", lambda what, device: short)
        assert call(ddpm_sample, "digits", "--n", 4, "--precision", "bfloat16", "--out", "low.safetensors")[0] == 0
        assert call(ddpm_sample, "digits", "--n", 4, "--out", "full.safetensors")[0] == 0
    low, full = (load_file(here/f"{n}.safetensors")["images"].float() for n in ("low", "full"))
    assert 0 < (low-full).abs().mean() < 1                        # of 16 gray levels
    failed(call(ddpm_sample, run, "--precision", "int8"), 2, "unknown precision 'int8'; known: float32, bfloat16")
    failed(call(ddpm_evaluate, run, "--precision", "int8"), 2, "unknown precision")
    assert call(ddpm_evaluate, run, "--images", 4, "--curve-images", 1, "--precision", "bfloat16", "--out", "low.json")[0] == 0
    assert call(ddpm_evaluate, run, "--images", 4, "--curve-images", 1, "--out", "full.json")[0] == 0
    low, full = (evaluated(here/f"{n}.json")["test"]["total"] for n in ("low", "full"))
    assert low != full and low == pytest.approx(full, rel=.02)


def test_a_diffusers_folder(call, here):
    from ddpm_nbdev.pretrained import OfficialUNet, save_diffusers
    from ddpm_nbdev.schedule import linear_schedule
    torch.manual_seed(0)
    model = OfficialUNet(ch=8, ch_mult=[1, 2], num_res_blocks=1, attn_resolutions=[], resolution=8, groups=4).eval()
    save_diffusers(DDPM(model, linear_schedule(3), (3, 8, 8)), here/"theirs")
    assert call(ddpm_sample, "theirs", "--n", 2)[0] == 0 and (here/"theirs_samples.png").exists()
    failed(call(ddpm_sample, "runs/none"), 1, "runs/none")


def test_a_name_on_the_hub(call, here, monkeypatch):
    asked = []
    monkeypatch.setattr(models, "load_diffusers", lambda name, device: asked.append(name) or DDPM.from_pretrained("digits"))
    assert call(ddpm_sample, "google/ddpm-cifar10-32", "--n", 1)[0] == 0
    assert asked == ["google/ddpm-cifar10-32"] and (here/"ddpm-cifar10-32_samples.png").exists()


# ---- as processes

def shell(*args, **kw):
    return subprocess.run([sys.executable, "-m", "ddpm_nbdev.cli", *map(str, args)], capture_output=True, text=True, env=ENV, **kw)


def forked(*args):
    "The same without the seconds of importing."
    p = Python("-m", "ddpm_nbdev.cli", *args, env=ENV)
    out, err = p.communicate()
    return subprocess.CompletedProcess(args, p.returncode, out, err)


def test_module_as_command(here):
    for start in shell, forked:
        res = start("train", "mnist")
        assert (res.returncode, res.stderr) == (1, "ddpm_train: unknown dataset 'mnist'; known: digits, folder:PATH, cifar10, fashion_mnist, lsun:PATH\n")
    res = forked("ddpm_train", "digits", "--T", "0")
    assert res.returncode == 2 and len(res.stderr.splitlines()) == 1
    for args, status in (([], 2), (["fly"], 2), (["train", "--help"], 0)):
        res = forked(*args)
        assert res.returncode == status and "usage:" in res.stdout+res.stderr


def test_ctrl_c_and_on(here):
    p = Python("-m", "ddpm_nbdev.cli", "train", "digits", "--T", "4", "--batch-size", "4", "--steps", "100000", "--out", "run", env=ENV)
    while not (here/"run/log.jsonl.new").exists() or not (here/"run/log.jsonl.new").read_text(): time.sleep(.02)
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=60)
    assert p.returncode == 130 and "Traceback" not in err
    step = read_checkpoint(here/"run/checkpoint.safetensors")[1]["step"]
    again = re.search(rf"stopped after step {step} of 100000; to go on: ddpm_train (digits --out run --resume)", err).group(1)
    p = forked("train", *again.split(), "--steps", step, "--samples", 0)     # as printed, and no further
    assert p.returncode == 0, p.stderr
    assert (here/"run/metrics.json").exists()


def said_of_training(out):
    "The lines about training in what a command printed: (step, steps, loss, seconds a step, what follows)."
    return re.findall(r"^step (\d+) of (\d+): loss ([\d.]+), ([\d.e-]+) s a step, (.*)$", out, re.M)


def test_lines_where_there_is_no_terminal(here):
    "Behind a pipe: the first line of the log and the last, with their numbers, no carriage return; also of a run that goes on; --quiet: none."
    p = forked("train", "digits", *QUICK, "--steps", "12", "--log-every", "3", "--samples", "0", "--out", "run")
    rows = {row["step"]: row for row in read_log(here/"run")}
    said = said_of_training(p.stdout)
    assert p.returncode == 0 and "\r" not in p.stdout and p.stderr == ""
    assert [int(s) for s, *_ in said] == ([3, 12] if rows[12]["seconds"] - rows[3]["seconds"] < 10 else [int(s) for s, *_ in said])
    before = 0, 0.
    for step, steps, loss, pace, rest in said:
        row = rows[int(step)]
        assert steps == "12" and loss == f"{row['loss']:.4f}"
        assert float(pace) == pytest.approx((row["seconds"]-before[1])/(row["step"]-before[0]), rel=.01)
        assert re.fullmatch(r"\d+ s in all" if step == steps else r"\d+ s left", rest)
        before = row["step"], row["seconds"]
    p = forked("train", "digits", "--resume", "--steps", "15", "--samples", "0", "--out", "run")
    row = read_log(here/"run")[-1]
    [(step, steps, loss, pace, _)] = said_of_training(p.stdout)
    assert (step, steps, loss) == ("15", "15", f"{row['loss']:.4f}") and float(pace) == pytest.approx((row["seconds"]-before[1])/3, rel=.01)
    p = forked("train", "digits", *QUICK, "--samples", "0", "--out", "other", "--quiet")
    assert (p.returncode, p.stdout, p.stderr) == (0, "", "")


class Watch:
    "A clock that is ten hours later at each look."
    now = 0.
    def __call__(self):
        self.now += 36_000
        return self.now


def test_lines_of_sampling_and_measuring(call, here, run, monkeypatch):
    "By a clock on which all takes long: each step, each batch of images, how many there are, what is left; at a terminal and with --quiet none."
    monkeypatch.setattr(watch, "_clock", Watch())
    def go(*args):
        status, out, err = call(*args)
        assert status == 0
        return re.findall(r"^(.+?): (\d+) of (\d+)(.*), (.+) (left|in all)$", out, re.M)
    assert go(ddpm_sample, run, "--n", 3, "--batch-size", 2) == [("drawing 3 images", str(i), "8", " steps", f"{10*(8-i)} hours" if i < 8 else "80 hours", "left" if i < 8 else "in all")
                                                               for i in range(1, 9)]
    trained = go(ddpm_train, "digits", *QUICK, "--samples", 2)
    assert [line[:4] for line in trained if "drawing" in line[0]] == [("drawing 2 samples", str(i), "4", " steps") for i in range(1, 5)]
    assert [line[:4] for line in trained if line[0] == "measuring"] == [("measuring", str(i), "2", " calls of the network") for i in (1, 2)]
    found = go(ddpm_evaluate, run, "--images", 600, "--steps", 2, "--curve-images", 1, "--quality", "--samples", 4)
    of = {label: (unit, int(total)) for label, _, total, unit, *_ in found}
    assert of["bits/dim, training images"] == (" images", 600) and of["bits/dim, test images"] == (" images", 360) and of["every step"] == (" images", 1)
    assert of["error of x_0-hat"] == (" steps", 4) and "quality" in of and of["optimal variance"] == (" images", 360)
    assert [d for label, d, *_ in found if label == "bits/dim, training images"] == ["170", "340", "510", "600"]      # 512 pairs at a time, 3 of an image
    assert not go(ddpm_sample, run, "--n", 3, "--out", "quiet.png", "--quiet")
    monkeypatch.setattr(watch, "_can_show_progress", lambda: True)
    assert not go(ddpm_sample, run, "--n", 3, "--out", "bar.png")
    monkeypatch.setattr(watch, "rank", lambda: 1)
    assert watch._shown(False, print, "it") is False and watch._log_lines(False, print, 4, run, False)({"step": 4}) is None


def test_lines_change_no_image(call, here, run, monkeypatch):
    assert call(ddpm_sample, run, "--n", 3, "--out", "a.png")[0] == 0
    monkeypatch.setattr(watch, "_clock", Watch())
    assert call(ddpm_sample, run, "--n", 3, "--out", "b.png")[0] == 0
    assert (here/"a.png").read_bytes() == (here/"b.png").read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
@pytest.mark.parametrize("where", ["full", "closed", "broken"])
def test_training_outlives_its_output(where, here):
    "A full disk behind stdout, none at all, a reader who has gone: the run is whole, and its status is that of a run."
    args = [sys.executable, "-m", "ddpm_nbdev.cli", "train", "digits", *QUICK, "--samples", "0", "--out", "run"]
    behind = {"full": "exec >/dev/full", "closed": "exec >&-", "broken": ":"}[where]
    r, w = os.pipe()
    os.close(r)                                                            # who writes there gets EPIPE
    p = subprocess.run(["sh", "-c", f'{behind}; exec "$@"', "sh", *args], env=ENV, stdout=w, stderr=subprocess.PIPE, text=True)
    os.close(w)
    assert (p.returncode, p.stderr) == (0, "") and (here/"run/metrics.json").exists()


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs /proc")
@pytest.mark.parametrize("command", [["-m", "ddpm_nbdev.cli", "train", "digits"], ["-m", "ddpm_nbdev.codec_cli"], ["-c", "import sys; sys.argv.append('digits'); from ddpm_nbdev.start import ddpm_sample; ddpm_sample()"]])
def test_ctrl_c_while_torch_is_read(command, here):
    p = subprocess.Popen([sys.executable, *command], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while p.poll() is None and "torch" not in open(f"/proc/{p.pid}/maps").read(): time.sleep(.002)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=60)
    assert (p.returncode, out) == (130, "") and len(err.strip().splitlines()) == 1 and "interrupted before anything began" in err, err


def evaluated(path): return json.loads(path.read_text())["evaluation"]


def test_evaluate_adds_to_the_metrics_of_a_run(call, run):
    before = json.loads((run/"metrics.json").read_text())
    status, out, err = call(ddpm_evaluate, run, "--images", 6, "--exact")
    assert (status, err) == (0, "")
    after = json.loads((run/"metrics.json").read_text())
    found = after.pop("evaluation")
    assert after == before
    assert re.search(r"^test +\d+\.\d{3} \+- \d+\.\d{3}", out, re.M) and str(run/"metrics.json") in out
    direct = DDPM.load(run).bits_per_dim(to_model_range(load_dataset("digits").test[:6], 17), torch.Generator().manual_seed(0))
    assert found["test"]["total"] == pytest.approx(direct.total.mean().item(), rel=1e-5)
    assert found["test"]["L_mid"] == pytest.approx(direct.L_mid.mean().item(), rel=1e-5)
    assert found["curve"]["rate"][-1] + found["test"]["L_0"] == pytest.approx(found["test"]["total"], rel=1e-5)
    assert len(found["curve"]["rate"]) == 4 and found["steps_per_image"] == 4


def test_evaluate_says_of_each_number_what_it_was_made_of(call, run):
    "Images and steps: of the rows, of the curve, which takes no more images than were asked for, and of the distances, which take all."
    status, out, _ = call(ddpm_evaluate, run, "--images", 8, "--steps", 2, "--quality", "--samples", 4)
    found = evaluated(run/"metrics.json")
    assert status == 0 and "(8 images at every step)" in out
    assert [(found[part]["n"], found[part]["steps_per_image"]) for part in ("train", "test")] == 2*[(8, 3)] and found["steps_per_image"] == 3
    assert (found["curve"]["images"], found["curve"]["steps_per_image"]) == (8, 4)
    assert (found["optimal"]["test"]["n"], found["optimal"]["test"]["steps_per_image"]) == (8, 3)
    assert re.search(r"4 samples: digits-FID [\d.]+ from all 1437 training images \(the 360 test images: ", out)
    call(ddpm_evaluate, run, "--images", 8, "--curve-images", 2)
    assert evaluated(run/"metrics.json")["curve"]["images"] == 2
    call(ddpm_evaluate, run, "--images", 8, "--exact")
    found = evaluated(run/"metrics.json")
    assert [found["steps_per_image"], found["test"]["steps_per_image"], found["curve"]["steps_per_image"], found["curve"]["images"]] == [4, 4, 4, 8]


def test_evaluate_keeps_the_measured_error(call, run, here):
    "Once, in config.json, where nothing else changes; anew when that is asked for; not for weights that have no config."
    args = ["--images", 6, "--curve-images", 1]
    config, others = json.loads((run/"config.json").read_text()), {k: v for k, v in contents(run).items() if k not in ("config.json", "metrics.json")}
    failed(call(ddpm_sample, run, "--variance", "optimal"), 1, "nobody has measured yet")
    status, out, _ = call(ddpm_evaluate, run, *args)
    after = json.loads((run/"config.json").read_text())
    mse = after.pop("mse")["values"]
    assert status == 0 and f"kept in {run}/config.json" in out and after == config and list(after) == list(config)
    assert {k: v for k, v in contents(run).items() if k not in ("config.json", "metrics.json")} == others
    assert mse[0] is None and len(mse) == 5 and torch.allclose(DDPM.load(run).mse[1:], measure_mse(DDPM.load(run), load_dataset("digits").train[:16])[1:], rtol=1e-4)
    found = evaluated(run/"metrics.json")
    optimal = replace(DDPM.load(run), variance="optimal").bits_per_dim(to_model_range(load_dataset("digits").test[:6], 17), torch.Generator().manual_seed(0))
    assert found["optimal"]["test"]["total"] == pytest.approx(optimal.total.mean().item(), rel=1e-5) and "short_chain" not in found
    before = contents(run)["config.json"]
    assert "training images" not in call(ddpm_evaluate, run, *args)[1]
    assert "on 16 training images, kept" in call(ddpm_evaluate, run, *args, "--measure")[1] and contents(run)["config.json"] == before
    assert call(ddpm_sample, run, "--variance", "optimal", "--n", 2)[0] == 0
    (run/"model.safetensors").unlink()
    assert "on 16 training images, not kept\n" in call(ddpm_evaluate, run, *args)[1] and contents(run)["config.json"] == before
    ddpm_train("digits", steps=5, out=str(run), resume=True, quiet=True)
    assert "mse" not in json.loads((run/"config.json").read_text())                # of other weights


def test_evaluate_shipped_model_writes_beside_what_is_there(call, here):
    (here/"digits_metrics.json").write_text("mine")
    status, out, err = call(ddpm_evaluate, "digits", "--images", 2, "--steps", 1, "--curve-images", 1)
    assert (status, err) == (0, "") and (here/"digits_metrics.json").read_text() == "mine"
    found = evaluated(here/"digits_metrics_2.json")
    assert found["test"]["n"] == 2 and len(found["short_chain"]["steps"]) == 20 and found["short_chain"]["steps"][-1] == 1000
    optimal, short = (found[k]["test"]["total"] for k in ("optimal", "short_chain"))
    assert f"optimal variance: test {optimal:.3f}, the best 20 steps with it: test {short:.3f}" in out


@pytest.mark.parametrize("args, status, says", [
    (["nothing"], 1, "nothing"),
    (["digits", "--images", "0"], 2, "images must be at least 1"),
    (["digits", "--steps", "0"], 2, "steps must be at least 1"),
    (["digits", "--dataset", "mnist"], 1, "unknown dataset"),
])
def test_evaluate_says_what_is_wrong_in_one_line(call, here, args, status, says):
    found, out, err = call(ddpm_evaluate, *args)
    assert found == status and says in err and err.count("\n") == 1 and "Traceback" not in err
    assert not list(here.glob("*.json"))


def test_evaluate_refuses_images_that_do_not_fit(call, run, pictures):
    status, _, err = call(ddpm_evaluate, run, "--dataset", f"folder:{pictures}")
    assert status == 1 and "the model is for (1, 8, 8) with 17 levels" in err
    (run/"checkpoint.safetensors").unlink()
    status, _, err = call(ddpm_evaluate, run)
    assert status == 1 and "--dataset" in err


@pytest.mark.parametrize("content", ["[1, 2]", "mine"])
def test_evaluate_leaves_other_files_alone(call, here, content):
    (here/"a.json").write_text(content)
    status, _, err = call(ddpm_evaluate, "digits", "--images", 1, "--steps", 1, "--curve-images", 1, "--out", "a.json")
    assert status == 1 and "a.json is not a file of metrics" in err and (here/"a.json").read_text() == content


ONE = "--images", 1, "--steps", 1, "--curve-images", 1


def test_evaluate_looks_past_a_folder_without_a_model(call, here):
    "As ddpm_decompress leaves one: the model that ships is meant, and nothing is put into the folder."
    (here/"digits").mkdir()
    (here/"digits"/"00000.png").write_bytes(b"mine")
    status, _, err = call(ddpm_evaluate, "digits", *ONE)
    assert (status, err) == (0, "") and evaluated(here/"digits_metrics.json")["test"]["n"] == 1 and os.listdir("digits") == ["00000.png"]


@pytest.mark.parametrize("out", ["file/a.json", "file/new/a.json", f"{'a'*250}.json"])
def test_evaluate_looks_first_whether_it_can_write(call, here, run, monkeypatch, out):
    (here/"file").write_text("mine")
    for name in ("evaluate_bits_per_dim", "quality_of"): monkeypatch.setattr(cli, name, None)
    before = sorted(os.listdir(here))
    status, _, err = call(ddpm_evaluate, run, "--quality", "--out", out)
    assert status == 1 and err.startswith(f"ddpm_evaluate: {out}: cannot be written (") and err.count("\n") == 1 and ".tmp" not in err
    assert sorted(os.listdir(here)) == before


def test_evaluate_shows_its_table_before_it_writes(call, run, monkeypatch):
    def full(source, target): raise OSError(28, "No space left on device", str(source))
    monkeypatch.setattr("ddpm_nbdev.files.os.replace", full)
    status, out, err = call(ddpm_evaluate, run, *ONE)
    assert status == 1 and re.search(r"^test +\d+\.\d{3}", out, re.M) and "half of the bits" in out
    assert err == f"ddpm_evaluate: {run/'metrics.json'}: cannot be written (No space left on device)\n"


def test_evaluate_that_is_refused_leaves_no_folder(call, here, run):
    failed(call(ddpm_evaluate, run, "--quality", "--features", "fashion_mnist", "--out", "new/a.json"), 1, "features are for images")
    assert not (here/"new").exists()


def test_evaluate_makes_the_folder_of_its_file(call, here):
    status, _, err = call(ddpm_evaluate, "digits", "--images", 1, "--steps", 1, "--curve-images", 1, "--out", "new/a.json")
    assert (status, err) == (0, "") and evaluated(here/"new"/"a.json")["train"]["n"] == 1
