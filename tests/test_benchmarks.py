"benchmarks/speed.py and codec.py run and print what they promise; how long anything takes is never tested."
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ddpm_nbdev.train import load_checkpoint

ROOT = Path(__file__).parents[1]
SPEED = ROOT/"benchmarks/speed.py"
ROWS = {"training": ("ddpm_nbdev", "float32", "channels first"), "sampling": ("ddpm_nbdev", "bfloat16", ""), "data": ("t and noise", None, ""),
        "share": ("ddpm_nbdev", None, "channels last"), "memory": ("ddpm_nbdev", None, "float32, channels last"),
        "processes": ("ddpm_train folder", None, "1 process")}              # one of each group: what, precision, note


@pytest.fixture
def part(monkeypatch):
    "part(name): one of speed.py's modules, which import each other by their bare names."
    monkeypatch.syspath_prepend(SPEED.parent)
    return importlib.import_module


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    "What the command printed as Markdown, and what it wrote as JSON."
    path = tmp_path_factory.mktemp("speed")/"speed.json"
    run = subprocess.run([sys.executable, SPEED, "--tiny", "--markdown", "--device", "cpu", "--json", path], text=True, capture_output=True)
    assert run.returncode == 0, run.stderr
    return run.stdout, json.loads(path.read_text())


@pytest.mark.parametrize("group", ROWS)
def test_every_group_has_its_rows(result, group):
    text, saved = result
    what, precision, note = ROWS[group]
    rows = [r for r in saved["rows"] if r["group"] == group]
    row = next(r for r in rows if r["what"] == what and r.get("precision") == precision and r.get("note", "").startswith(note))
    assert row.get("seconds") or row.get("bytes"), row
    assert {"training": "| training step |", "sampling": "| sampling step |", "data": "| data path |", "memory": "| peak memory of training |",
            "share": "| neither convolution nor matrix product |", "processes": "| command line |"}[group] in text


def test_numbers_hang_together(result):
    saved = result[1]
    for r in saved["rows"]:
        if r["group"] in ("training", "sampling") and "times" in r:
            ceiling = next(c for c in saved["rows"] if c["group"] == r["group"] and c["what"].startswith("ceiling") and c["precision"] == r["precision"])
            assert r["utilization"] == pytest.approx(r["gflop"]/r["seconds"]/ceiling["gflops"])
        if r["group"] == "share": assert sum(r["parts"].values()) == pytest.approx(1)
    assert {"cpu", "cpu_capability", "threads", "torch", "bfloat16_in_hardware"} <= saved["machine"].keys()


def test_rivals_are_measured_or_named(result):
    text, saved = result
    for name in ("diffusers", "denoising-diffusion-pytorch"):
        rows = [r for r in saved["rows"] if r["what"] == name]
        assert {r["group"] for r in rows} == {"training", "sampling", "memory"} | ({"share"} if name == "diffusers" else set())
        assert all("skipped" in r or "seconds" in r or "bytes" in r for r in rows)
        assert any("skipped" in r for r in rows if r["group"] == "training") == bool(re.search(rf"{name} \| float32 \| [^|]*skipped: cannot be imported", text))


def test_same_operations_as_diffusers(result):
    gflop = {r["what"]: r["gflop"] for r in result[1]["rows"] if r["group"] == "training" and "gflop" in r}
    if "diffusers" not in gflop: pytest.skip("diffusers is not installed")
    assert gflop["ddpm_nbdev"] == pytest.approx(gflop["diffusers"], rel=1e-3)


@pytest.mark.parametrize("n, run", [(0, "avx2"), (1, "bf16")])
def test_the_readme_is_what_the_saved_rows_print(part, capsys, n, run):
    "The tables of benchmarks/README.md, line by line, from the numbers of that run."
    saved = json.loads((ROOT/f"benchmarks/results/cpu_{run}.json").read_text())
    rows = saved["rows"]
    for group in ROWS: part("table").print_table(group, [r for r in rows if r["group"] == group], markdown=True)
    printed = [line for line in capsys.readouterr().out.splitlines() if line]
    text = (ROOT/"benchmarks/README.md").read_text().split("## Result")[1].split("\n## ")[0].split("\n### ")[n+1]
    assert printed == [line for line in text.splitlines() if line.startswith("|")] and len(printed) > 30
    versions = "".join(f", {k} {v}" for k, v in saved["machine"].get("rivals", {}).items())
    assert f"{saved['machine']['cpu_capability']}, 2 cores), 2 threads, torch {saved['machine']['torch']}{versions}, load" in text
    assert f"batch {saved['batch']}, medians of {saved['repeats']} interleaved rounds" in text


def test_kernels(part, capsys, monkeypatch):
    "kernels.py times the same value and gradient in each way, and prints a line for each size and precision."
    kernels = part("kernels")
    monkeypatch.setattr(kernels, "SIZES", {kernels.attention: [(4, 8)], kernels.norm: [(32, 2)], kernels.convolution: [(4, 4)]})
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--batch", "2", "--rounds", "1"])
    kernels.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 and all(re.search(r"\d\.\d\d .*\d\.\d\d", line) for line in lines[1:])
    qkv = [torch.randn(2, 1, 4, 8) for _ in range(3)]
    assert torch.allclose(kernels.products(*qkv), torch.nn.functional.scaled_dot_product_attention(*qkv), atol=1e-6)


def test_rounds_are_interleaved(part):
    "Each round calls every task once; one that is too slow takes part in the first only."
    timing, calls = part("timing"), []
    s = timing.Settings(repeats=3, tiny=True, sync=lambda: None)
    times = timing.interleaved({"a": (lambda: calls.append("a"), 3), "b": (lambda: calls.append("b"), 3), "slow": (lambda: calls.append("slow"), 1)}, s)
    assert calls == ["a", "a", "b", "b"] + ["a", "b", "slow", "a", "b", "a", "b"]     # two calls to warm up
    assert {k: len(v) for k, v in times.items()} == {"a": 3, "b": 3, "slow": 1}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "What codec.py printed for four digits, and what it wrote."
    path = tmp_path_factory.mktemp("codec")/"codec.json"
    command = [sys.executable, ROOT/"benchmarks/codec.py", "--images", "4", "--steps", "3", "--seeds", "2", "--markdown", "--json", path]
    run = subprocess.run(command, text=True, capture_output=True)
    assert run.returncode == 0, run.stderr
    return run.stdout, json.loads(path.read_text())


def test_every_format_is_measured_or_named(files):
    text, saved = files
    for part, names in (("lossless", ("PNG", "WebP", "JPEG XL", "xz", "bz2", "ours, lossless", "ours, progressive")), ("lossy", ("JPEG", "WebP", "JPEG XL"))):
        for name in names:
            rows = [r for r in saved[part] if r["what"] == name]
            assert all(r.get("bytes") for r in rows) if "skipped" not in rows[0] else name in ("WebP", "JPEG XL"), rows
            assert f"| {name} |" in text
            if part == "lossless" and "skipped" not in rows[0]: assert [r.get("files") for r in rows] == [None, 4]      # one file, and one for each
    for r in saved["lossless"]:
        if "bytes" in r: assert r["bits_per_dim"] == pytest.approx(8*r["bytes"]/(64*saved["images"]))


def test_our_files_bits_add_up(files):
    "Net bits, start-up, header and the head of the stack are the file, but for its last word."
    rows = {r["what"]: r for r in files[1]["lossless"] if r["what"].startswith("ours") and "files" not in r}
    r, dims = rows["ours, lossless"], 64*files[1]["images"]
    rest = 8*(r["bytes"]-r["header"]) - r["start_up_bits"] - r["net"]*dims
    assert 0 <= rest <= 128
    assert abs(r["net"]-r["bound"]) < 5*r["bound_of_one_draw"] + .3
    curve = rows["ours, progressive"]["curve"]
    assert curve[0][0] == rows["ours, progressive"]["header"] and curve[-1][0] < rows["ours, progressive"]["bytes"] and curve[-1][1] < curve[0][1]/10


def test_arrangements_hold_every_image(part):
    "Each arrangement has all gray levels that the images have, each as often (a grid is filled up with black)."
    codec, x = part("codec"), np.random.default_rng(0).integers(0, 17, (23, 8, 8)).astype(np.uint8)
    for name, a in codec.arrangements(x, 17).items():
        want = x if name.startswith("0..16") else np.array([round(k*255/16) for k in range(17)])[x]
        assert (np.bincount(a.ravel(), minlength=256)[1:] == np.bincount(want.ravel(), minlength=256)[1:]).all(), name
    grid = codec.sheet(x, 20)
    assert grid.shape == (16, 160) and (grid[8:, 8:16] == x[21]).all() and (grid[:8, -8:] == x[19]).all()


@pytest.mark.parametrize("name", sorted(p.stem.removeprefix("codec_") for p in (ROOT/"benchmarks/results").glob("codec_*.json")))
def test_the_readme_shows_the_saved_files(part, capsys, name):
    "The tables of benchmarks/README.md about files, line by line."
    saved = json.loads((ROOT/f"benchmarks/results/codec_{name}.json").read_text())
    part("codec").print_tables(saved, markdown=True)
    tables = capsys.readouterr().out.strip()
    assert tables in (ROOT/"benchmarks/README.md").read_text()
    assert saved["images"] == {"digits": 360, "fashion_mnist": 200}[name] and not any("skipped" in r for r in saved["lossless"]+saved["lossy"])


def test_a_gpus_ten_minutes_run_on_a_cpu(tmp_path, part):
    "All four stages, tiny; the packed weights are those of the run, without loss; what fails is said and stops nothing."
    gpu = part("gpu")
    run = subprocess.run([sys.executable, ROOT/"benchmarks/gpu.py", "--tiny", "--device", "cpu", "--minutes", "9", "--out", tmp_path,
                          "--stages", "right", "fast", "real", "judge"], text=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    right, fast, real, judge = (json.loads((tmp_path/f"{n}.json").read_text()) for n in ("right", "fast", "real", "judge"))
    assert right["status"] == 0 and any(t.startswith("PASSED") for t in right["tests"])
    assert {r["group"] for r in fast["rows"]} == {"training", "sampling"} and all(r["seconds"] > 0 for r in fast["rows"])
    assert fast["limits"]["bytes copied"] > 0 and not any(d.get("failed") for d in (fast, real, judge)), (fast.get("failed"), judge.get("failed"))
    assert [r["step"] for r in real["log"]] == [1, 2, 3, 4]
    weights = gpu.unpack([(tmp_path/f"weights.{i}").read_bytes() for i in range(4)])
    kept = load_checkpoint(tmp_path/"run").model.state_dict()
    assert weights.keys() == kept.keys() and all(torch.equal(weights[k], kept[k].bfloat16()) for k in kept)
    pictures, judged = load_file(tmp_path/"pictures.safetensors"), load_file(tmp_path/"judged.safetensors")
    assert pictures["samples"].shape == (4, 3, 32, 32) and judged["test_terms"].shape == (5,)
    assert judge["test"]["total"] == pytest.approx(judge["test"]["L_T"] + judged["test_terms"][1:].sum().item(), rel=1e-4)


def test_a_run_ends_when_its_time_is_over(tmp_path):
    run = subprocess.run([sys.executable, ROOT/"benchmarks/gpu.py", "--tiny", "--device", "cpu", "--minutes", ".8", "--out", tmp_path,
                          "--steps", "1000000", "--stages", "real"], text=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0 and "to go on" in run.stderr, run.stderr
    real = json.loads((tmp_path/"real.json").read_text())
    assert 1 < real["log"][-1]["step"] < 1000000 and len(real["bytes_packed"]) == 4


def test_the_stored_gpu_run_fits_its_pictures():
    stored, pictures = json.loads((ROOT/"benchmarks/results/gpu_h200.json").read_text()), load_file(ROOT/"benchmarks/results/gpu_h200.safetensors")
    assert len(stored["right"]["tests"]) == 17 and all(t.startswith("PASSED") for t in stored["right"]["tests"])
    total = stored["judge"]["test"]["L_T"] + pictures["test_terms"][1:].double().sum().item()
    assert total == pytest.approx(stored["judge"]["test"]["total"], rel=1e-5)


def test_busy_tries_each_count_beside_each_number_of_programs(tmp_path):
    path = tmp_path/"busy.json"
    run = subprocess.run([sys.executable, ROOT/"benchmarks/busy.py", "--rounds", "1", "--seconds", "0", "--json", path], text=True, capture_output=True)
    assert run.returncode == 0, run.stderr
    rows = json.loads(path.read_text())["rows"]
    assert {r["busy"] for r in rows} == {0, 1, os.cpu_count()} and {r["count"] for r in rows} == {None, 100_000, 10_000, 1_000, 0}
    assert all(len(r["ms"]) == 1 and r["ms"][0] > 0 for r in rows)
    assert run.stdout.count("\n") == 2+len({r["busy"] for r in rows})


def test_recorded_measures_calls_and_chains(tmp_path):
    path = tmp_path/"recorded.json"
    run = subprocess.run([sys.executable, ROOT/"benchmarks/recorded.py", "--rounds", "1", "--chains", "0", "--json", path], text=True, capture_output=True,
                         env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    rows = json.loads(path.read_text())["calls"]
    assert [(r["threads"], r["model"], r["images"]) for r in rows] == [(1, "digits", 16), (1, "digits", 64), (1, "fashion_mnist", 16)]
    assert all(r["error"] < 1e-5 and set(r["ms"]) == {"plain", "recorded"} for r in rows) and run.stdout.count("\n") == 4
    stored = json.loads((ROOT/"benchmarks/results/recorded.json").read_text())
    assert {c["differ"] for c in stored["chains"]} == {0} and {r["threads"] for r in stored["calls"]} == {1, 2}
