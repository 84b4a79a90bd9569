"The quality half of Table 1: what `quality_of` and `ddpm_evaluate --quality` measure, keep, say and refuse; on one process and on two."
import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import Python
from safetensors.torch import load_file, save_file

from ddpm_nbdev import measures
from ddpm_nbdev.cli import ddpm_evaluate, ddpm_train
from ddpm_nbdev.data import load_dataset
from ddpm_nbdev.ddpm import DDPM, _sample_batches, draw_samples
from ddpm_nbdev.decoder import to_model_range, to_uint8
from ddpm_nbdev.features import Features, load_features
from ddpm_nbdev.likelihood import stride
from ddpm_nbdev.measures import _check_room, _real_features, _with_quality, quality_of

torch.set_num_threads(1)
DIGITS = load_dataset("digits")
ENV = os.environ | {"OMP_NUM_THREADS": "1"}
FEW = ["--images", "2", "--curve-images", "1", "--steps", "1", "--quality"]


def short(): return stride(DDPM.from_pretrained("digits"), [1, 50, 300, 1000])


@pytest.fixture(autouse=True)
def downloads(tmp_path, monkeypatch):
    "Nothing that a test keeps lies in the user's folder, and nothing of the user's is found."
    for name in ("DDPM_DATA", "LOCAL_RANK", "LOCAL_WORLD_SIZE"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(measures.pooch, "os_cache", lambda name: tmp_path/"cache"/name)
    return tmp_path/"cache/ddpm_nbdev/features"


@pytest.fixture(scope="module")
def finished(once):
    def make(folder):
        ddpm_train("digits", T=4, steps=4, batch_size=4, samples=0, out=str(folder/"run"), device="cpu", quiet=True)
        return folder/"run"
    return once("measures_run", make)


@pytest.fixture
def run(finished, tmp_path):
    for p in finished.iterdir():
        if p.is_file(): (tmp_path/"run").mkdir(exist_ok=True); (tmp_path/"run"/p.name).write_bytes(p.read_bytes())
    return tmp_path/"run"


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    "Call `ddpm_evaluate` as from a shell: status, stdout, stderr."
    monkeypatch.chdir(tmp_path)
    def call(*args):
        monkeypatch.setattr(sys, "argv", ["ddpm_evaluate", *map(str, args), "--device", "cpu"])
        status = 0
        try: ddpm_evaluate()
        except SystemExit as e: status = e.code
        return status, *capsys.readouterr()
    return call


def failed(result, status, says):
    assert result[0] == status and says in result[2] and result[2].count("\n") == 1 and "Traceback" not in result[2], result


def same(a, b):
    "Two rows that differ by rounding and time only."
    def flat(x, at=""):
        for k, v in x.items():
            if isinstance(v, dict): yield from flat(v, f"{at}{k}/")
            elif k != "seconds": yield at+k, v
    a, b = dict(flat(a)), dict(flat(b))
    assert a.keys() == b.keys()
    for k, v in a.items(): assert b[k] == (pytest.approx(v, rel=1e-4, abs=1e-5) if isinstance(v, float) else v), k


def test_the_command_adds_the_row_to_the_metrics(call, run, downloads):
    before = json.loads((run/"metrics.json").read_text())
    status, out, err = call(run, *FEW, "--samples", 40, "--seed", 3)
    assert (status, err) == (0, "")
    after = json.loads((run/"metrics.json").read_text())
    q = after.pop("evaluation")["quality"]
    assert after == before
    assert re.search(r"^quality: 40 samples, digits-FID by 32 features \(digits\); about \d", out, re.M)
    assert "\nnote: FID of 40 samples with 32 features is too high: take more\n" in out
    head, train, test = (line for line in out.splitlines() if line.startswith(("     ", "train", "test ")))
    assert head.endswith("digits-FID     IS") and max(map(len, out.splitlines()[:8])) <= 100
    assert train.endswith(f"{q['digits-FID']['train']:.2f}{q['digits-IS']['mean']:7.2f}") and test.endswith(f"{q['digits-FID']['test']:.2f}{q['digits-IS']['mean']:7.2f}")
    same(q, quality_of(DDPM.load(run), DIGITS, 40, seed=3))
    assert len(list(downloads.iterdir())) == 2 and not {"FID", "IS", "KID"} & q.keys()


def test_without_the_option_nothing_changes(call, run, downloads, monkeypatch):
    monkeypatch.setattr("ddpm_nbdev.cli.quality_of", None)
    status, out, _ = call(run, *FEW[:-1])
    assert status == 0 and "FID" not in out and "quality" not in json.loads((run/"metrics.json").read_text())["evaluation"] and not downloads.exists()


@pytest.mark.parametrize("args, status, says", [
    (["--quality", "--samples", "1"], 2, "samples must be at least 2, got 1"),
    (["--quality", "--samples", "-3"], 2, "samples must be at least 2, got -3"),
    (["--quality", "--features", "vgg"], 2, "unknown features 'vgg'; known: digits, fashion_mnist, inception"),
    (["--samples", "9"], 2, "samples and features belong to --quality"),
    (["--features", "digits"], 2, "samples and features belong to --quality"),
    (["--quality", "--samples", "9", "--features", "fashion_mnist"], 1, "'fashion_mnist' features are for images (1, 28, 28), got (1, 8, 8)"),
])
def test_what_is_wrong_is_said_in_one_line_before_any_work(call, run, monkeypatch, args, status, says):
    monkeypatch.setattr("ddpm_nbdev.cli.evaluate_bits_per_dim", None)
    monkeypatch.setattr(measures, "_sampled", None)
    before = (run/"metrics.json").read_bytes()
    failed(call(run, *args), status, says)
    assert (run/"metrics.json").read_bytes() == before


def test_inception_without_its_package_is_one_line_before_any_work(call, run, monkeypatch):
    monkeypatch.setattr("ddpm_nbdev.cli.evaluate_bits_per_dim", None)
    for name in [n for n in sys.modules if n.partition(".")[0] == "torch_fidelity"]: monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    failed(call(run, "--quality", "--features", "inception"), 1, "ddpm_nbdev[metrics]")


def test_other_data_sets_take_inception(monkeypatch):
    asked = []
    monkeypatch.setattr(measures, "load_features", lambda name, data_dir: asked.append((name, data_dir)) or load_features("digits"))
    for name in ("folder:a", "cifar10", "digits"): measures._features_for(None, replace(DIGITS, name=name), "cpu", None)
    assert asked == [("inception", None), ("inception", None), ("digits", None)]


def test_the_file_of_inception_is_looked_for_in_data_dir(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(measures, "load_features", lambda name, data_dir: asked.append(data_dir) or load_features("digits"))
    measures._features_for("inception", DIGITS, "cpu", tmp_path)
    (tmp_path/"weights-inception-2015-12-05-6726825d.pth").write_bytes(b"")
    measures._features_for("inception", DIGITS, "cpu", tmp_path)
    assert asked == [None, tmp_path]


def test_broken_weights_are_one_line_and_change_nothing(call, run):
    save_file({k: torch.full_like(v, 1e30) for k, v in load_file(run/"model.safetensors").items()}, run/"model.safetensors")   # finite, but not for long
    before = (run/"metrics.json").read_bytes()
    failed(call(run, *FEW, "--samples", 4), 1, "the network that made them is damaged")
    assert (run/"metrics.json").read_bytes() == before
    ddpm = short()
    ddpm.model.requires_grad_(False)
    list(ddpm.model.parameters())[-1].fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite .* the network that made them is damaged"): quality_of(ddpm, DIGITS, 4)


def test_samples_do_not_depend_on_batches_and_seed_names_them():
    ddpm, see = short(), load_features("digits")
    one, other = (measures._sampled(ddpm, see, 9, 1, b, False) for b in (4, 256))
    for a, b in zip(one, other): assert torch.allclose(a, b, atol=1e-4)
    assert torch.allclose(measures._sampled(ddpm, see, 5, 1, 2, False)[0], one[0][:5], atol=1e-4)
    assert not torch.allclose(measures._sampled(ddpm, see, 9, 2, 4, False)[0], one[0], atol=1)


def test_two_samples_are_enough_for_a_row_and_no_test_images_for_a_gap():
    q = quality_of(short(), replace(DIGITS, test=DIGITS.test[:1]), 2)
    assert q["k"] == 1 and q["digits-FID"]["test"] is None and q["digits-IS"]["sd"] is None and json.dumps(q, allow_nan=False)
    table = _with_quality(["a", "b", "c", "d"], q)
    assert table[3].split() == ["d", "-", f"{q['digits-IS']['mean']:.2f}"] and "test images" not in table[4]
    assert quality_of(short(), replace(DIGITS, test=DIGITS.test[:0]), 2)["test_images"] == 0


def test_features_of_real_images_are_kept(downloads, monkeypatch):
    see = load_features("digits")
    first = _real_features(see, DIGITS.test, 17)
    file, = downloads.iterdir()
    assert file.name.startswith("digits-") and file.suffix == ".safetensors" and torch.equal(first, see(to_model_range(DIGITS.test, 17)))
    kept, whole = load_file(file)["features"].double(), file.read_bytes()   # a copy: the file is mapped
    for bad in (whole[:50], whole[:-1], b"", whole.replace(b"features", b"futures_")):
        file.write_bytes(bad)
        assert torch.equal(_real_features(see, DIGITS.test, 17), first) and file.read_bytes() == whole
    save_file({"features": kept}, file)                           # another type; without a checksum
    assert torch.equal(_real_features(see, DIGITS.test, 17), first) and file.read_bytes() == whole
    monkeypatch.setattr(Features, "__call__", None)
    assert torch.equal(_real_features(see, DIGITS.test, 17), first)


def test_a_folder_that_cannot_be_written_to_costs_only_time(tmp_path):
    (tmp_path/"file").write_text("mine")
    see = load_features("digits")
    assert torch.equal(_real_features(see, DIGITS.test, 17, tmp_path/"file"), see(to_model_range(DIGITS.test, 17)))
    assert (tmp_path/"file").read_text() == "mine"


def test_a_folder_that_cannot_be_written_to_is_named_once(tmp_path):
    (tmp_path/"file").write_text("mine")
    said = []
    q = quality_of(short(), DIGITS, 4, cache=tmp_path/"file", say=said.append)
    kept, = [line for line in said if "cannot be kept" in line]
    assert kept.startswith("note: ") and str(tmp_path/"file") in kept and q["samples"] == 4
    said.clear()
    quality_of(short(), DIGITS, 4, cache=tmp_path/"new", say=said.append)
    assert not any("cannot be kept" in line for line in said)


@pytest.mark.parametrize("n, says", [(32, "is far too high"), (33, "is too high"), (159, "is too high"), (160, None)])
def test_the_bias_is_said_up_to_five_samples_a_feature(monkeypatch, n, says):
    monkeypatch.setattr(measures, "_estimate", lambda *args: 1.)
    monkeypatch.setattr(measures, "_sampled", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    said = []
    with pytest.raises(KeyboardInterrupt): quality_of(short(), DIGITS, n, say=said.append)
    assert said[1:] == ([f"note: FID of {n} samples with 32 features {says}: take more"] if says else [])


def test_one_slow_call_does_not_spoil_the_estimate(monkeypatch):
    now, took = [0.], iter([9., 5., .2, .3, 7.])
    monkeypatch.setattr(measures.time, "perf_counter", lambda: now[0])
    def call(b): now[0] += next(took)
    assert measures._seconds_each(call, 64) == pytest.approx(.2/8)


def test_samples_come_from_where_draw_samples_has_them(monkeypatch):
    model, see, asked = short(), load_features("digits"), []
    batches = list(_sample_batches(model, range(2, 9), 5, 3))
    assert [len(x) for x in batches] == [3, 3, 1] and (to_uint8(torch.cat(batches), 17).int() - draw_samples(model, 9, 5)[2:].int()).abs().max() <= 1
    monkeypatch.setattr(measures, "_sample_batches", lambda *args: asked.append(args[1:4]) or iter([2*torch.cat(batches)]))      # beyond [-1, 1]: a chain without clamps
    seen, _ = measures._sampled(model, see, 7, 5, 3, False)
    assert asked == [(range(7), 5, 3)] and torch.equal(seen, see((2*torch.cat(batches)).clamp(-1, 1)))


@pytest.mark.parametrize("n, steps", [(5, 12), (0, None)])
def test_one_bar_for_all_batches_changes_nothing(monkeypatch, n, steps):
    done = []
    def bar(todo, leave):
        done.append([len(todo), 0])
        for i in todo:
            done[-1][1] += 1
            yield i
    monkeypatch.setattr("ddpm_nbdev.ddpm.progress_bar", bar)
    assert torch.equal(draw_samples(short(), n, 1, 2, True), draw_samples(short(), n, 1, 2))
    assert done == ([[steps, steps]] if steps else [])


def test_memory_is_asked_for_first(monkeypatch):
    monkeypatch.setattr(measures, "_free_memory", lambda: 10**6)
    monkeypatch.setattr(measures, "_sampled", None)
    with pytest.raises(ValueError, match="take fewer --samples"): quality_of(short(), DIGITS, 50_000)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "100")
    with pytest.raises(ValueError): _check_room(2, 2, 200, 10)
    monkeypatch.setattr(measures, "_free_memory", lambda: None)            # unknown: try
    _check_room(10**9, 10**9, 2048, 1008)


def test_large_images_come_in_small_batches(monkeypatch):
    asked = []
    monkeypatch.setattr(measures, "_estimate", lambda ddpm, see, n, batch_size, real: asked.append(batch_size) or 1.)
    monkeypatch.setattr(measures, "_sampled", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    see = Features("any", load_features("digits").network)
    see.both = lambda x: (torch.zeros(len(x), 3), torch.ones(len(x), 1))
    for side in (8, 64, 512):
        data = replace(DIGITS, train=torch.zeros(4, 3, side, side, dtype=torch.uint8), test=torch.zeros(0, 3, side, side, dtype=torch.uint8))
        with pytest.raises(KeyboardInterrupt): quality_of(replace(short(), shape=data.shape), data, 9, see)
    assert asked == [256, 85, 1]


SCRIPT = """
import json, sys, torch
torch.set_num_threads(1)
from pathlib import Path
from test_measures import DIGITS, short
from ddpm_nbdev.machines import join_processes, leave_processes, rank
from ddpm_nbdev.measures import _check_room, _real_features, _with_quality, quality_of
join_processes()
said = []
q = quality_of(short(), DIGITS, 21, seed=2, cache=sys.argv[1], say=said.append)
again = quality_of(short(), DIGITS, 21, seed=2, cache=sys.argv[1])
assert bool(q) == (rank() == 0) and len(said) == 2
if q: Path(sys.argv[2]).write_text(json.dumps([q, again]))
leave_processes()
"""


def test_two_processes_give_the_row_of_one(tmp_path):
    (tmp_path/"script.py").write_text(SCRIPT)
    here = os.path.dirname(os.path.abspath(__file__))
    env = ENV | {"PYTHONPATH": os.pathsep.join([here, os.path.dirname(here)])}                 # the package beside these tests
    p = Python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", tmp_path/"script.py", tmp_path/"kept", tmp_path/"q.json", env=env, stderr=subprocess.STDOUT)
    out, _ = p.communicate(timeout=200)
    assert p.returncode == 0, out
    alone = quality_of(short(), DIGITS, 21, seed=2)
    for q in json.loads((tmp_path/"q.json").read_text()): same(q, alone)
    assert len(list((tmp_path/"kept").iterdir())) == 2
