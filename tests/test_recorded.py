"Samples from a recording of the network (nbs/09c_graphs.ipynb): the same images, and nothing of the user's is touched."
import os
import subprocess
import sys
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from ddpm_nbdev import ddpm as page10
from ddpm_nbdev import graphs
from ddpm_nbdev.ddpm import DDPM, draw_samples
from ddpm_nbdev.graphs import Traced
from ddpm_nbdev.likelihood import even_steps, stride
from ddpm_nbdev.machines import LowPrecision
from ddpm_nbdev.unet import UNet

STEPS = 260     # enough to be recorded


@pytest.fixture(autouse=True)
def few_recordings(monkeypatch): monkeypatch.setattr(graphs, "_made", [])   # however many other tests made


@pytest.fixture(scope="module")
def digits(): return stride(DDPM.from_pretrained("digits"), even_steps(1000, STEPS))


def plainly(ddpm, n, **kw):
    with patch.object(page10, "traced", lambda model, calls: model): return draw_samples(ddpm, n, **kw)


@pytest.mark.parametrize("how", ["float32", "bfloat16"])
def test_images_are_those_of_the_network(digits, how):
    ddpm = digits if how == "float32" else replace(digits, model=LowPrecision(digits.model))
    images = draw_samples(ddpm, 5, batch_size=3)
    assert len(graphs._made) == 2                                                # one for 3, one for 2
    off = (images.int() - plainly(ddpm, 5).int()).abs()
    if how == "float32": assert off.max() <= 1 and (off > 0).float().mean() < .002
    else: assert off.float().mean() < .3                   # of 17 levels: it rounds elsewhere, and the chain carries that on


class Mine(DDPM):
    def __init__(self, model, sched): super().__init__(model, sched, (1, 8, 8), levels=17)

    @torch.no_grad()
    def chain(self, *args, **kw):
        self.model.config                                                       # what only the network itself has
        return super().chain(*args, **kw)


class Branching(UNet):
    def forward(self, xt, t): return -xt if t[0] > STEPS//2 else super().forward(xt, t)


def test_what_is_the_users_is_called_as_it_is(digits):
    own = Mine(DDPM.from_pretrained("digits").model, digits.sched)
    own.guidance = 2.
    assert torch.equal(draw_samples(own, 2), plainly(own, 2)) and own.guidance == 2.
    branching = Branching(**{k: v for k, v in own.model.config.items() if k != "out_channels"}).eval()
    for model in (branching, LowPrecision(branching)):
        ddpm = replace(digits, model=model)
        assert torch.equal(draw_samples(ddpm, 2), plainly(ddpm, 2))
    assert not graphs._made


def test_modes_of_parts_stay(digits):
    model = digits.model.model
    model.train()
    model.mid.eval()
    draw_samples(digits, 1)
    assert model.training and model.down.training and not model.mid.training and len(graphs._made) == 1
    model.eval()


def test_what_cannot_be_recorded_is_drawn_all_the_same(digits):
    wide = replace(digits, model=LowPrecision(digits.model, torch.float64), sched=digits.sched)
    images = plainly(wide, 1)
    assert torch.equal(draw_samples(wide, 1), images)
    with patch("torch.jit.trace", side_effect=RuntimeError("not this one")): assert torch.equal(draw_samples(digits, 1), plainly(digits, 1))
    before = len(graphs._made)
    with torch.autocast("cpu", torch.bfloat16): assert (draw_samples(digits, 1).float() - plainly(digits, 1).float()).abs().mean() == 0
    assert len(graphs._made) == before


def test_a_process_makes_few_recordings():
    x, t = torch.zeros(20, 1, 8, 8), torch.ones(20, dtype=torch.int64)
    net = Traced(DDPM.from_pretrained("digits").model.eval())
    with torch.no_grad(), patch.object(graphs, "_MOST", 3):
        for n in range(1, 7): assert torch.allclose(net(x[:n], t[:n]), net.model(x[:n], t[:n]), atol=1e-5)
    assert len(graphs._made) == 3


def test_without_torchscript(tmp_path):
    "PYTORCH_JIT=0 is PyTorch's own switch."
    code = ("from ddpm_nbdev.ddpm import DDPM, draw_samples; from ddpm_nbdev.likelihood import even_steps, stride; "
            f"print(draw_samples(stride(DDPM.from_pretrained('digits'), even_steps(1000, {STEPS})), 1).shape)")
    run = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, cwd=tmp_path, env={**os.environ, "PYTORCH_JIT": "0"})
    assert (run.returncode, run.stdout) == (0, "torch.Size([1, 1, 8, 8])\n"), run.stderr


@torch.no_grad()
def test_a_recording_has_the_weights_of_its_time():
    "Whatever is done to them later: neither in part nor whole do they reach it."
    model = DDPM.from_pretrained("digits").model.eval()
    quick, x, t = Traced(model), torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((3,), 400)
    before = quick(x, t)
    for p in model.parameters(): p.mul_(1.5)
    assert not torch.allclose(model(x, t), before, atol=.1)
    assert torch.equal(quick(x, t), before)
    quick.load_state_dict(quick.state_dict() | {k: torch.zeros_like(v) for k, v in quick.state_dict().items()})
    assert torch.equal(quick(x, t), before) and len(graphs._made) == 1
