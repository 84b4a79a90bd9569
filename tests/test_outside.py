"Files from outside: what may stand in them is checked before anything is built or allocated, and damage is one line."
import gzip
import io
import json
import math
import os
import shutil
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import failed
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ddpm_nbdev import cli
from ddpm_nbdev import saved as saved_module
from ddpm_nbdev.cli import ddpm_evaluate, ddpm_sample, ddpm_train
from ddpm_nbdev.data import load_dataset
from ddpm_nbdev.ddpm import DDPM
from ddpm_nbdev.files import WeightsError, read_log, read_metrics, write_json
from ddpm_nbdev.formats import read_fashion_mnist
from ddpm_nbdev.pretrained import load_diffusers, save_diffusers
from ddpm_nbdev.restart import _settings_of_run
from ddpm_nbdev.run import train
from ddpm_nbdev.saved import checkpoint_header
from ddpm_nbdev.schedule import linear_schedule
from ddpm_nbdev.train import ConfigError, TrainConfig, TrainState, build_ddpm
from ddpm_nbdev.unet import UNet

NET = dict(in_channels=1, ch=8, ch_mult=[1, 2], num_res_blocks=1, attn_resolutions=[4], resolution=8, groups=4)
ROW = dict(step=4, loss=.5, grad_norm=1., lr=1e-3, seconds=2.)


def peak():
    "The most memory that this process has had, in bytes; 0 on Windows, which has no such number."
    try: import resource
    except ImportError: return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*(1 if sys.platform == "darwin" else 1024)


def model(): return DDPM(UNet(**NET), linear_schedule(10), (1, 8, 8))


@pytest.fixture
def saved(tmp_path):
    "A folder with a small model."
    model().save(tmp_path)
    return tmp_path


def change(path, *keys, value):
    "Another value at a place in a JSON file."
    obj = whole = json.loads(path.read_text())
    for k in keys[:-1]: obj = obj[k]
    obj[keys[-1]] = value
    path.write_text(json.dumps(whole))


def refused(read, *words):
    "One line, a WeightsError, in no time and no memory."
    start, before = time.monotonic(), peak()
    with pytest.raises(WeightsError) as e: read()
    assert time.monotonic()-start < 20 and peak()-before < 5e8
    assert "\n" not in str(e.value) and len(str(e.value)) < 500 and all(w in str(e.value) for w in words), str(e.value)


# ---- descriptions

ARGS = "model", "args"
WRONG = [((*ARGS, "ch"), 10**6, "model.args.ch is 1000000, but must be a whole number from 1 to 65536"), ((*ARGS, "ch"), True, "model.args.ch is True"),
    ((*ARGS, "ch_mult"), [1]*10**4, "a list of 1 to 12"), ((*ARGS, "ch_mult"), [1, 10**5], "each a whole number from 1 to 256"),
    ((*ARGS, "num_res_blocks"), 10**9, "from 1 to 32"), ((*ARGS, "dropout"), 1e308, "model.args.dropout is 1e+308, but must be a number from 0 to 1"),
    ((*ARGS, "resolution"), 2**60, "model.args.resolution"), ((*ARGS, "learned_variance"), 1, "true or false"), ((*ARGS, "out_channels"), "3", "or null"),
    ((*ARGS, "attn_resolutions"), [[]], "attn_resolutions is [[]]"), (("model", "args"), [], "model.args is [], but must be an object"),
    (("schedule", "args", "T"), 10**9, "schedule.args.T is 1000000000, but must be a whole number from 1 to 1000000"),
    (("schedule", "args", "beta_T"), "x", "schedule.args.beta_T is 'x'"), (("schedule",), None, "schedule is None, but must be an object"),
    (("shape",), [1, 2**15, 2**15], "at most 67108864 elements"), (("shape",), [1, 8.5, 8], "shape"), (("shape",), [], "a list of 1 to 3"),
    (("mean",), ["eps"], "mean is ['eps'], but must be one of eps, x0, mu"), (("levels",), 2**40, "levels"), (("format",), 9, "format is 9"),
    (("variance",), "x"*10**6, "must be one of beta"), (("model", "name"), {}, "model.name is {}, but must be text"),
    ((*ARGS, "ch"), 65536, "another architecture")]               # allowed by itself: compared with the weights, never allocated


@pytest.mark.parametrize("keys, value, says", WRONG, ids=[f"{k[-1]}={str(v)[:20]}" for k, v, _ in WRONG])
def test_a_description_is_refused_by_key_and_value(keys, value, says, saved):
    change(saved/"config.json", *keys, value=value)
    refused(lambda: DDPM.load(saved), str(saved), says)


@pytest.mark.parametrize("file, keys, value, says", [("config.json", ["block_out_channels"], [10**6, 10**6], "block_out_channels is [1000000, 1000000]"),
    ("config.json", ["block_out_channels"], [65536, 65536], "another architecture"), ("config.json", ["layers_per_block"], 10**9, "from 1 to 32"),
    ("config.json", ["sample_size"], 2**60, "sample_size"), ("scheduler_config.json", ["num_train_timesteps"], 10**9, "num_train_timesteps is 1000000000"),
    ("scheduler_config.json", ["beta_end"], [1], "beta_end is [1]")])
def test_so_is_one_of_diffusers(file, keys, value, says, tmp_path):
    save_diffusers(model(), tmp_path)
    change(tmp_path/file, *keys, value=value)
    refused(lambda: load_diffusers(tmp_path), file.partition(".")[0] if "another" not in says else "", says)


@pytest.mark.parametrize("change, says", [(dict(step=-1), "step is -1"), (dict(step="4"), "step is '4'"), (dict(step=2.5), "step is 2.5"), (dict(seconds=None), "seconds"),
    (dict(data=[1]), "data is [1]"), (dict(config={}), "it lacks config.dataset"), (dict(config={"dataset": 5}), "config.dataset is 5"), (dict(ddpm=[]), "ddpm is []")])
def test_a_checkpoints_header(change, says, tmp_path):
    header = dict(format="ddpm_nbdev training 2", step=4, seconds=1., data=[7, 0], config={"dataset": "digits"}, ddpm={}) | change
    save_file({"a": torch.zeros(1)}, tmp_path/"c.safetensors", {k: json.dumps(v) for k, v in header.items()})
    refused(lambda: checkpoint_header(tmp_path/"c.safetensors"), "c.safetensors", says)


@pytest.mark.parametrize("line, says", [("[]", "it is []"), ("{}", "it lacks step"), (json.dumps(ROW | {"loss": None}), "loss is None"),
    (json.dumps(ROW | {"lr": math.inf}), "Infinity is not JSON"), (json.dumps(ROW).replace("0.5", "1e999"), "1e999"), ("["*10**5, "nested too deeply"), ("\0", "not JSON")])
def test_a_line_of_a_log(line, says, tmp_path):
    "A last line without an end is what a crash leaves; anything else would cost the lines after it when the run goes on."
    (tmp_path/"log.jsonl").write_text(f"{json.dumps(ROW)}\n{line}\n{json.dumps(ROW)}\n")
    refused(lambda: read_log(tmp_path), "log.jsonl, line 2: ", says)
    (tmp_path/"log.jsonl").write_bytes(json.dumps(ROW).encode() + b'\n{"step": 5, "lo\xff')
    assert read_log(tmp_path) == [ROW]


@pytest.mark.parametrize("text", ['{"config": []}', '{"evaluation": 1e999}', "[" * 200 + "]" * 200, '{"a": ' * 60 + "1" + "}" * 60, "\0"])
def test_metrics_of_others_are_none(text, tmp_path):
    (tmp_path/"metrics.json").write_text(text)
    assert read_metrics(tmp_path/"metrics.json") is None


def test_json_never_holds_nan(tmp_path):
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"m.json: evaluation.test.1 is {bad}, which is not JSON"): write_json(tmp_path/"m.json", {"evaluation": {"test": [1, bad]}})
    assert not list(tmp_path.iterdir())


# ---- checkpoints

TINY = TrainConfig("digits", T=10, model_args=dict(ch=8, ch_mult=[1, 2], num_res_blocks=1, attn_resolutions=[4], groups=4), steps=3, batch_size=4, warmup=1,
                   log_every=1, checkpoint_every=3, sample_every=0)


@pytest.fixture(scope="module")
def data(): return load_dataset("digits")


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    train(TINY, out := tmp_path_factory.mktemp("run"), data=data)
    return out


def rewritten(run, path, header=lambda h: h, tensors=lambda t: t):
    "A checkpoint with another header or other tensors."
    with safe_open(run/"checkpoint.safetensors", "pt") as f: head = {k: json.loads(v) for k, v in f.metadata().items()}
    save_file(tensors(load_file(run/"checkpoint.safetensors")), path, {k: json.dumps(v) for k, v in header(head).items()})
    return path


@pytest.mark.parametrize("name, make, says", [("exp_avg", lambda v: v.flatten()[:1], "must be torch.float32"), ("exp_avg_sq", lambda v: v.double(), "is torch.float64"),
    ("exp_avg_sq", lambda v: -1-v, "negative"), ("step", lambda v: v+.5, "is 3.5, but must be a whole number"), ("step", lambda v: v.int(), "torch.int32"), ("exp_avg", None, "is missing"),
    ("step", lambda v: v*math.nan, "not finite"), ("step", lambda v: -v, "is -3.0")])
def test_what_adam_remembers_must_fit(name, make, says, trained, data, tmp_path):
    "The fused kernel would read and write beyond the end of a short one."
    key = f"adam.7.{name}"
    def damage(t): return {k: make(v) if k == key else v for k, v in t.items() if k != key or make}
    path = rewritten(trained, tmp_path/"c.safetensors", tensors=damage)
    state = TrainState(TINY, data, "cpu")
    refused(lambda: state.load(path), "c.safetensors", key, says)


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="no list of what is mapped")
def test_a_loaded_checkpoint_is_not_mapped(trained, data, tmp_path):
    "Windows could not replace it, and the space of a file that was replaced would stay taken."
    path = rewritten(trained, tmp_path/"only_here.safetensors")
    state = TrainState(TINY, data, "cpu")
    state.load(path)
    maps = open("/proc/self/maps").read()
    assert "only_here" not in maps and state.opt.state_dict()["state"][0]["step"] == 3


def test_settings_that_are_damaged_are_the_files_fault(trained, tmp_path):
    rewritten(trained, tmp_path/"checkpoint.safetensors", lambda h: h | {"config": h["config"] | {"lr": -1}})
    refused(lambda: _settings_of_run(tmp_path, "digits"), "checkpoint.safetensors", "lr must be a positive number, got -1")
    rewritten(trained, tmp_path/"checkpoint.safetensors", lambda h: h | {"config": h["config"] | {"T": 10**9}})
    refused(lambda: _settings_of_run(tmp_path, "digits"), "T must be a whole number of steps, at least 1 and at most 1000000")


def test_a_network_that_no_memory_holds(data, monkeypatch):
    monkeypatch.setattr(saved_module, "_free_memory", lambda: 10**10)
    start, before = time.monotonic(), peak()
    with pytest.raises(ConfigError, match="a network of .* GB, and .* GB of memory are free: choose fewer channels"):
        build_ddpm(replace(TINY, model_args=TINY.model_args | dict(ch=40_000)), data)
    assert time.monotonic()-start < 20 and peak()-before < 5e8


# ---- the machine's fault

def test_a_full_disk_says_file_step_and_way_back(data, trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path/"run")
    before, real = (tmp_path/"run/checkpoint.safetensors").read_bytes(), os.fsync
    def full(fd):
        if os.fstat(fd).st_size > 10_000: raise OSError(28, "No space left on device")
        return real(fd)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as e: train(replace(TINY, steps=9), tmp_path/"run", resume=True, data=data)
    assert "checkpoint.safetensors" in e.value.filename and e.value.errno == 28
    assert e.value.strerror == ("No space left on device, at step 6; the checkpoint of step 3 is kept; to go on when that is mended: "
                                f"ddpm_train digits --out {tmp_path/'run'} --resume")
    assert (tmp_path/"run/checkpoint.safetensors").read_bytes() == before and not list((tmp_path/"run").glob("*.tmp"))


@pytest.mark.parametrize("error, said", [("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes.", "out of memory: a smaller batch"),
    ("[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes.", "out of memory"),
    ("InvalidCxxCompiler: No working C++ compiler found in torch._inductor.config.cpp.cxx: (None, 'g++')\n\nSet TORCHDYNAMO_VERBOSE=1", "without --compile"),
    ("Failed to find C compiler. Please specify via CC environment variable", "without --compile"), ("Could not determine home directory.", "set HOME")])
def test_what_the_machine_lacks_is_one_line(error, said, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    def broken(*a, **kw): raise RuntimeError(error)
    monkeypatch.setattr(cli, "find_model", broken)
    failed(call(ddpm_sample, "digits", "--n", 1), 1, "ddpm_sample: ", said)


@pytest.mark.parametrize("value", ["abc", "0", "-2", "1.5", ""])
def test_a_number_of_processes_that_is_none(value, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", value)
    failed(call(ddpm_train, "digits", "--steps", 1), 1, f"WORLD_SIZE={value!r}, but it must be a whole number")


def test_a_console_that_lacks_a_letter(tmp_path, monkeypatch):
    "As a Windows console does: the file is written, the name is shown in another way."
    monkeypatch.chdir(tmp_path)
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="cp1252"))
    monkeypatch.setattr(sys, "argv", ["ddpm_sample", "digits", "--n", "1", "--steps-used", "1", "--out", "日.png"])
    ddpm_sample()
    sys.stdout.flush()
    assert (tmp_path/"日.png").exists() and b"wrote \\u65e5.png" in raw.getvalue()


# ---- a file of a model in place of its folder

def test_a_models_file_names_the_model_or_its_folder(call, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "run")
    quick = "--images", 2, "--curve-images", 1, "--quiet", "--out", "m.json"
    for name in ("model.safetensors", "checkpoint.safetensors"):
        assert call(ddpm_sample, f"run/{name}", "--n", 1, "--quiet", "--overwrite", "--out", "x.png") == (0, "", "")
        assert call(ddpm_evaluate, f"run/{name}", *quick) == (0, "", "")
    for name in ("config.json", "log.jsonl"):
        failed(call(ddpm_sample, f"run/{name}", "--n", 1), 1, f"run/{name}: a model is named by its folder: run")
        failed(call(ddpm_evaluate, f"run/{name}", *quick), 1, f"run/{name}: a model is named by its folder: run")
    save_diffusers(model(), tmp_path/"theirs")
    for name in ("config.json", "scheduler_config.json", "diffusion_pytorch_model.safetensors"):
        failed(call(ddpm_sample, f"theirs/{name}", "--n", 1), 1, f"theirs/{name}", "named by its folder")


# ---- damage at random

MUTATIONS = 60                  # of each kind; more of them is a longer search
NASTY = ["null", "true", "0", "-1", "1", "3", "2.5", "-0.0", "1e308", "1e999", "NaN", "-Infinity", str(10**30), "1" + "0"*5000, '""', '"x"', '"\\ud800"', "[]", "{}", "[[]]",
         '{"a": 1}', "["*10_000 + "]"*10_000, '{"a":'*10_000 + "1" + "}"*10_000, "[" + "0,"*100_000 + "0]", '"' + "x"*10**6 + '"', str(2**31), str(2**63), "65536", "1000000"]


def places(obj, path=()):
    "Every place in a JSON value."
    if path: yield path
    for k, v in obj.items() if isinstance(obj, dict) else enumerate(obj[:5]) if isinstance(obj, list) else (): yield from places(v, (*path, k))


def mutated_json(text, rng):
    "Another value somewhere, or one thing less, or bytes that were damaged."
    kind = rng.integers(8)
    if kind == 0: return mutated_bytes(text.encode(), rng)
    obj = json.loads(text)
    found = list(places(obj))
    where = found[rng.integers(len(found))]
    inner = obj
    for k in where[:-1]: inner = inner[k]
    if kind == 1: del inner[where[-1]]
    else: inner[where[-1]] = "MARK"
    return json.dumps(obj).replace('"MARK"', NASTY[rng.integers(len(NASTY))]).encode()


def mutated_bytes(data, rng):
    "Cut off, or a few bytes flipped, most of them where the file begins."
    if rng.integers(4) == 0: return data[:rng.integers(len(data))]
    data = bytearray(data)
    for _ in range(rng.integers(1, 4)): data[rng.integers(len(data) if rng.integers(3) == 0 else min(len(data), 100))] ^= 1 << rng.integers(8)
    return bytes(data)


def mutated_header(data, rng):
    "A safetensors file with something else in its header, whose length is right; or with damaged bytes."
    if rng.integers(3) == 0: return mutated_bytes(data, rng)
    n = int.from_bytes(data[:8], "little")
    obj = json.loads(data[8:8+n])
    said = obj.get("__metadata__", {})
    if "config" in said and rng.integers(3):                 # a checkpoint's: JSON inside of JSON
        k = sorted(said)[rng.integers(len(said))]
        said[k] = mutated_json(json.dumps({k: json.loads(said[k])}), rng).decode(errors="replace")[len(json.dumps(k))+3:-1]
        head = json.dumps(obj).encode()
    else: head = mutated_json(json.dumps(obj), rng)
    return len(head).to_bytes(8, "little") + head + data[8+n:]


def outcome(read, errors=(ValueError, OSError)):
    "What happens when a file is read, in words: 'read', 'refused in one line', or what must not be."
    start, before = time.monotonic(), peak()
    try:
        read()
        word = "read"
    except errors as e: word = "refused in one line" if "\n" not in str(e) and len(str(e)) < 2000 else f"refused at length: {str(e)[:3000]}"
    except BaseException as e: word = f"{type(e).__name__}: {str(e)[:300]}"
    if time.monotonic()-start > 20: return f"{word}, slow"
    return word if peak()-before < 2e9 else f"{word}, much memory"


def fuzz(file, mutate, *reads):
    "Damage a file again and again: a reader takes it, or says in one line of one kind why not."
    whole, before, refusals = file.read_bytes(), peak(), 0
    for seed in range(MUTATIONS):
        data = mutate(whole, np.random.default_rng([seed, 20260714]))
        file.write_bytes(data)
        for read, errors in reads:
            said = outcome(read, errors)
            assert said in ("read", "refused in one line"), (seed, said, data[:300])
            refusals += said != "read"
    assert peak()-before < 2e9 and (refusals or errors == ())
    file.write_bytes(whole)


def json_bytes(mutate): return lambda data, rng: mutate(data.decode(), rng)


def test_damaged_configurations(saved):
    fuzz(saved/"config.json", json_bytes(mutated_json), (lambda: DDPM.load(saved), WeightsError))


def test_damaged_weights(saved):
    fuzz(saved/"model.safetensors", mutated_header, (lambda: DDPM.load(saved), WeightsError))


def test_damaged_checkpoints(trained, data, tmp_path):
    shutil.copy(trained/"checkpoint.safetensors", tmp_path)
    file = tmp_path/"checkpoint.safetensors"
    fuzz(file, mutated_header, (lambda: checkpoint_header(file), WeightsError), (lambda: DDPM.load(file), WeightsError), (lambda: _settings_of_run(tmp_path, "digits"), ValueError),
         (lambda: TrainState(TINY, data, "cpu").load(file), WeightsError))


def test_damaged_logs(trained, tmp_path):
    shutil.copy(trained/"log.jsonl", tmp_path)
    def mutate(data, rng):
        lines = data.split(b"\n")
        i = rng.integers(len(lines)-1)
        return b"\n".join([*lines[:i], mutated_json(lines[i].decode(), rng), *lines[i+1:]])
    fuzz(tmp_path/"log.jsonl", mutate, (lambda: read_log(tmp_path), WeightsError))


def test_damaged_metrics(tmp_path):
    file = tmp_path/"metrics.json"
    write_json(file, {"config": {"steps": 4, "model_args": {"ch_mult": [1, 2]}}, "evaluation": {"test": {"total": 2.5}}, "parameters": 7})
    def add(): write_json(tmp_path/"new.json", (read_metrics(file) or {}) | {"more": 1})       # what was read can be written
    fuzz(file, json_bytes(mutated_json), (add, ()))


@pytest.mark.parametrize("name", ["config.json", "scheduler_config.json", "diffusion_pytorch_model.safetensors"])
def test_damaged_folders_of_diffusers(name, tmp_path):
    save_diffusers(model(), tmp_path)
    fuzz(tmp_path/name, json_bytes(mutated_json) if name.endswith("json") else mutated_header, (lambda: load_diffusers(tmp_path), WeightsError))


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_damaged_idx_files(suffix, tmp_path):
    for name, axes, fill in (("train-images-idx3", (6, 28, 28), 7), ("train-labels-idx1", (6,), 3), ("t10k-images-idx3", (3, 28, 28), 7), ("t10k-labels-idx1", (3,), 3)):
        raw = bytes((0, 0, 8, len(axes))) + np.array(axes, ">u4").tobytes() + bytes([fill])*math.prod(axes)
        (tmp_path/f"{name}-ubyte{suffix}").write_bytes(gzip.compress(raw) if suffix else raw)
    assert read_fashion_mnist(tmp_path)[0].shape == (6, 1, 28, 28)
    fuzz(tmp_path/f"train-images-idx3-ubyte{suffix}", mutated_bytes, (lambda: read_fashion_mnist(tmp_path), ValueError))


def test_a_gzip_that_would_fill_the_memory(tmp_path):
    "Megabytes that unpack to gigabytes: reading stops where no file that is known is so long."
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"): (tmp_path/f"{name}-ubyte.gz").write_bytes(gzip.compress(b""))
    (tmp_path/"train-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(2**24))*160)
    before = peak()
    with pytest.raises(ValueError, match="no IDX file"): read_fashion_mnist(tmp_path)
    assert peak()-before < 1e9
