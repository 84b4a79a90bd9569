"""On a GPU: the numbers of a CPU, in float32; nobody waits for the device; what is recorded is what is computed.

Skipped where there is none. `DDPM_TEST_DEVICE=cpu` runs on a CPU what a CPU can run; benchmarks/gpu.py runs this file first.
"""
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from ddpm_nbdev.data import Batches, load_dataset
from ddpm_nbdev.ddpm import DDPM, draw_samples
from ddpm_nbdev.decoder import to_model_range
from ddpm_nbdev.graphs import Replayed
from ddpm_nbdev.machines import LowPrecision
from ddpm_nbdev.noise import indexed_noise
from ddpm_nbdev.run import train
from ddpm_nbdev.saved import read_checkpoint
from ddpm_nbdev.train import ConfigError, TrainState, preset, training_step
from ddpm_nbdev.unet import cifar10_unet

DEVICE = os.environ.get("DDPM_TEST_DEVICE", "cuda")
GPU = DEVICE.startswith("cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPU and not torch.cuda.is_available(), reason="no GPU here")]
only_gpu = pytest.mark.skipif(not GPU, reason="CUDA graphs and waiting are a GPU's")


@pytest.fixture(autouse=True)
def full_float32():
    "Products and convolutions in float32, not TF32; always the same algorithm."
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic = False, False, True
    yield
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic = before


def wake(net):
    "Layers that start at zero get something to do."
    g = torch.Generator().manual_seed(5)
    for p in net.parameters():
        if p.ndim > 1 and not p.any(): p.data.copy_(.02*torch.randn(p.shape, generator=g))
    return net


def off(a, b):
    "Distance in units of the second's length."
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    return ((a-b).norm()/b.norm()).item()


def note(**numbers):
    "For benchmarks/gpu.py: what was measured, one JSON line each."
    if path := os.environ.get("DDPM_GPU_NOTES"):
        with open(path, "a") as f: f.write(json.dumps(numbers) + "\n")


def test_the_papers_network_and_its_gradient():
    torch.manual_seed(0)
    net = wake(cifar10_unet(dropout=0.))
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([3, 900])
    out = {}
    for device in ("cpu", DEVICE):
        net.to(device).zero_grad()
        y = net(x.to(device), t.to(device))
        y.square().mean().backward()
        out[device] = [y.detach().cpu(), *(p.grad.cpu() for p in net.parameters())]
    values = off(out[DEVICE][0], out["cpu"][0])
    flat = [torch.cat([g.flatten() for g in out[d][1:]]) for d in (DEVICE, "cpu")]
    note(test="network", value_off=values, gradient_off=off(*flat))
    assert values < 1e-4 and off(*flat) < 1e-4


def test_noise_belongs_to_its_address():
    index, t, like = torch.arange(8), torch.arange(1, 9), torch.empty(8, 3, 32, 32)
    here, there = (indexed_noise(7, index.to(d), t.to(d), like.to(d)) for d in ("cpu", DEVICE))
    assert (here - there.cpu()).abs().max() < 1e-6


def test_bits_per_dim_and_samples_of_the_shipped_digits():
    digits = load_dataset("digits")
    x = to_model_range(digits.test[:64], 17)
    bits, drawn = {}, {}
    for device in ("cpu", DEVICE):
        ddpm = DDPM.from_pretrained("digits", device)
        bits[device] = ddpm.bits_per_dim(x, torch.Generator().manual_seed(0), steps=40).total
        drawn[device] = draw_samples(ddpm, 16, seed=0)
    same = (drawn["cpu"] == drawn[DEVICE]).float().mean().item()
    apart = (bits["cpu"] - bits[DEVICE]).abs().max().item()
    note(test="digits", bits_per_dim=bits[DEVICE].mean().item(), on_the_cpu=bits["cpu"].mean().item(),
         largest_difference=apart, same_pixels=same)
    assert apart < 1e-4 and same > .9


def losses(cfg, device=DEVICE, steps=5):
    "Losses and lengths of the gradient of the first updates, and the weights after them."
    data = load_dataset("digits")
    state = TrainState(cfg, data, device)
    wake(state.model)
    batches = Batches(data.train.to(device), cfg.batch_size, cfg.seed, False, data.levels)
    got = [training_step(state, batches) for _ in range(steps)]
    return torch.stack([v for pair in got for v in pair]).cpu(), [p.detach().cpu() for p in state.model.parameters()]


def test_updates_are_those_of_a_cpu():
    cfg = preset("digits", batch_size=32)
    apart = off(losses(cfg)[0], losses(cfg, "cpu")[0])
    note(test="updates", losses_off=apart)
    assert apart < 1e-3


def test_a_resumed_run_is_the_whole_run(tmp_path):
    cfg, data = preset("digits", batch_size=32, steps=12, dropout=.1, log_every=3), load_dataset("digits")
    kw = dict(device=DEVICE, data=data, progress=False)
    train(cfg, tmp_path/"a", **kw)
    train(replace(cfg, steps=6), tmp_path/"b", **kw)
    train(cfg, tmp_path/"b", resume=True, **kw)
    a, b = (read_checkpoint(tmp_path/n/"checkpoint.safetensors")[0] for n in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)


@only_gpu
@pytest.mark.parametrize("kw", [dict(), dict(precision="bfloat16"), dict(cuda_graph=True), dict(objective="vlb")],
                         ids=["float32", "bfloat16", "recorded", "bound"])
def test_nobody_waits_for_the_gpu(kw):
    data, cfg = load_dataset("digits"), preset("digits", batch_size=32, **kw)
    state = TrainState(cfg, data, DEVICE)
    batches = Batches(data.train.to(DEVICE), 32, 0, True, data.levels)
    for _ in range(2): training_step(state, batches)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3): training_step(state, batches)
    finally: torch.cuda.set_sync_debug_mode("default")


@only_gpu
@pytest.mark.parametrize("precision, compiled", [("float32", False), ("bfloat16", False), ("bfloat16", True)])
def test_a_recorded_update_is_an_update(precision, compiled):
    cfg = preset("digits", batch_size=32, dropout=.1, precision=precision, compile=compiled)
    (a, v), (b, w) = losses(cfg), losses(replace(cfg, cuda_graph=True))
    difference = max(map(off, w, v))
    note(test="recorded", precision=precision, compiled=compiled, losses_off=off(b, a), weights_off=difference)
    assert off(b, a) < (1e-5 if precision == "float32" else 1e-2) and difference < .1


@only_gpu
def test_gradients_of_a_recording_survive_their_loss():
    data, cfg = load_dataset("digits"), preset("digits", batch_size=32, cuda_graph=True)
    state, batches = TrainState(cfg, data, DEVICE), Batches(data.train.to(DEVICE), 32, 0, True, data.levels)
    training_step(state, batches)
    state.opt.zero_grad()
    before = [p.detach().clone() for p in state.model.parameters()]
    for _ in range(3): training_step(state, batches)
    assert any(not torch.equal(p, b) for p, b in zip(state.model.parameters(), before))
    with pytest.raises(ValueError, match="recorded for"): state.recorded(*(v[:1] for v in state.recorded.inputs))


@only_gpu
def test_a_recorded_network_is_the_network():
    torch.manual_seed(0)
    net = wake(cifar10_unet()).to(DEVICE).eval()
    fast = Replayed(net).eval()
    with torch.no_grad():
        for n in (2, 3, 2):
            x, t = torch.randn(n, 3, 32, 32, device=DEVICE), torch.randint(1, 1001, (n,), device=DEVICE)
            assert off(fast(x, t), net(x, t)) < 1e-5
        for p in net.parameters(): p.mul_(1.1)
        assert off(fast(x, t), net(x, t)) < 1e-5 and len(fast.recorded) == 2


@only_gpu
def test_samples_by_a_recorded_network():
    ddpm = DDPM.from_pretrained("digits", DEVICE)
    plain, fast = draw_samples(ddpm, 16), draw_samples(replace(ddpm, model=Replayed(ddpm.model)), 16)
    assert (plain == fast).float().mean() > .99


def test_bfloat16_is_near():
    torch.manual_seed(0)
    net = wake(cifar10_unet()).to(DEVICE).eval()
    x, t = torch.randn(2, 3, 32, 32, device=DEVICE), torch.tensor([3, 900], device=DEVICE)
    with torch.no_grad(): apart = off(LowPrecision(net)(x, t), net(x, t))
    note(test="bfloat16", value_off=apart)
    assert apart < 3e-2


def test_a_recording_needs_a_gpu_and_one_piece():
    with pytest.raises(ConfigError, match="only for one process with a GPU"):
        TrainState(preset("digits", cuda_graph=True), load_dataset("digits"), "cpu")
    with pytest.raises(ConfigError, match="shards=1"): preset("digits", cuda_graph=True, shards=2)


SCRIPT = """
import torch
from torch.nn.parallel import DistributedDataParallel
from ddpm_nbdev.data import Batches, load_dataset
from ddpm_nbdev.machines import join_processes
from ddpm_nbdev.train import TrainState, preset, training_step
join_processes()
device = DEVICE
data, cfg = load_dataset('digits'), preset('digits', batch_size=32)
batches = Batches(data.train.to(device), 32, 0, False, data.levels)
out = []
for wrapped in (False, True):
    state = TrainState(cfg, data, device)
    if wrapped: state.training.model = DistributedDataParallel(state.training.model, gradient_as_bucket_view=True)
    for _ in range(5): loss, norm = training_step(state, batches)
    out.append(loss.item())
one = torch.ones(3, device=device)
torch.distributed.all_reduce(one)
print('same' if abs(out[0]-out[1]) < 1e-5 and one.sum() == 3 else out, torch.distributed.get_backend_config())
"""


def test_one_process_of_torchrun(tmp_path):
    "nccl on a GPU: the group forms, DistributedDataParallel changes nothing, a sum over one process is its own."
    (tmp_path/"s.py").write_text(SCRIPT.replace("DEVICE", repr(DEVICE)))
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])}
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "s.py"]
    p = subprocess.run(run, cwd=tmp_path, env=env, text=True, capture_output=True, timeout=240)
    assert "same" in p.stdout, p.stdout + p.stderr
    if GPU: assert "nccl" in p.stdout


def test_weights_are_modules_for_the_optimizer():
    "A recorded network shows its parameters to whoever asks for the device."
    ddpm = DDPM.from_pretrained("digits", DEVICE)
    assert replace(ddpm, model=Replayed(ddpm.model)).device == ddpm.device and isinstance(Replayed(ddpm.model), nn.Module)
