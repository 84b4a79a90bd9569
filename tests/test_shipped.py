"The trained networks that ship with the package: complete, small, and what their pages say."
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ddpm_nbdev
from ddpm_nbdev.calibration import Calibrated
from ddpm_nbdev.ddpm import DDPM
from ddpm_nbdev.files import read_log
from ddpm_nbdev.train import PRESETS, _build_model

WEIGHTS = Path(ddpm_nbdev.__file__).parent/"weights"


@pytest.mark.parametrize("name", ["digits", "fashion_mnist", "cifar10_small"])
def test_a_shipped_network_is_the_presets(name):
    ddpm = DDPM.from_pretrained(name)
    cfg = PRESETS[name]
    with torch.device("meta"): want = _build_model(cfg, ddpm.shape)
    assert ddpm.model.config == want.config
    assert (ddpm.sched.T, ddpm.mean, ddpm.variance, ddpm.objective) == (1000, cfg.mean, cfg.variance, cfg.objective)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in ddpm.model.parameters())
    assert (WEIGHTS/name/"README.md").read_text().count("ddpm_train") >= 1


def test_every_shipped_network_is_tested_here():
    assert sorted(p.name for p in WEIGHTS.iterdir() if p.is_dir()) == ["cifar10_small", "digits", "fashion_mnist"]


@pytest.mark.parametrize("name, most, loss", [("fashion_mnist", 5e6, .05), ("cifar10_small", 6e6, .04)])
def test_it_is_small_and_trained(name, most, loss):
    folder, cfg = WEIGHTS/name, PRESETS[name]
    assert (folder/"model.safetensors").stat().st_size < most
    assert {v.dtype for v in load_file(folder/"model.safetensors").values()} <= {torch.float16, torch.bfloat16, torch.float32}
    rows = read_log(folder)
    assert rows[-1]["step"] == cfg.steps and rows[-1]["loss"] < loss < rows[0]["loss"]
    ddpm = DDPM.from_pretrained(name)
    x0 = torch.rand(16, *ddpm.shape, generator=torch.Generator().manual_seed(0))*2 - 1
    for t, bound in ((1000, .01), (900, .02)):           # almost nothing but noise: it must be recognized (untrained: 1)
        loss = ddpm.loss(x0, torch.full((16,), t), generator=torch.Generator().manual_seed(t)).mean()
        assert loss < bound, (t, loss)
    assert Calibrated.from_pretrained(name).calibration.steps[-1] == 1000 and ddpm.mse.shape == (1001,)
