"""What does the bound cost beside the network that it evaluates? (image, t) pairs per second.

    python benchmarks/likelihood_speed.py          # the digits U-Net, on the GPU if there is one
    python benchmarks/likelihood_speed.py --cifar  # the CIFAR-10 U-Net

Compares `evaluate_bits_per_dim` with the network's own forward pass on batches of the same size,
and with one pair at a time. "Our own part" is the same evaluation of a network that returns zeros
at once; it should stay below 5 % of the network's time, and is the number to watch: the difference
of two long times is blurred by whatever else the machine does. The tasks take turns, and the best
of all rounds counts: what the machine can do when left alone.
"""
import argparse
import os
import time
from functools import partial

import torch
from torch import nn

from ddpm_nbdev.ddpm import DDPM
from ddpm_nbdev.likelihood import evaluate_bits_per_dim
from ddpm_nbdev.machines import Autocast
from ddpm_nbdev.schedule import linear_schedule
from ddpm_nbdev.unet import cifar10_unet, digits_unet


class Zeros(nn.Module):
    "A network that costs nothing."
    def __init__(self):
        super().__init__()
        self.device = nn.Parameter(torch.zeros(1))

    def forward(self, xt, t): return torch.zeros_like(xt)


def best_times(tasks, rounds, sync):
    "Shortest time of each task."
    best = dict.fromkeys(tasks, float('inf'))
    for _ in range(rounds+1):                          # the first round is a warm-up like any other
        for name, f in tasks.items():
            sync()
            start = time.perf_counter()
            f()
            sync()
            best[name] = min(best[name], time.perf_counter()-start)
    return best


def parser():
    "The command line."
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--cifar', action='store_true', help='the CIFAR-10 U-Net instead of the digits')
    p.add_argument('--batch-size', type=int, help='(image, t) pairs per network call; '
                   '512 for digits, 16 for CIFAR-10 on a CPU')
    p.add_argument('--batches', type=int, default=2, help='network calls per measurement')
    p.add_argument('--autocast', action='store_true', help='bfloat16 inside the network')
    p.add_argument('--rounds', type=int, default=5, help='how often everything is measured')
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    return p


def make_tasks(net, levels, batch, batches, cast, device):
    "name -> (what to time, pairs, pairs per call, whose time is 100 %)."
    shape = net.config['in_channels'], net.config['resolution'], net.config['resolution']
    x0 = torch.randint(0, levels, (batches, *shape), dtype=torch.uint8)
    def method(model, T): return DDPM(model, linear_schedule(T), shape, levels=levels).to(device)
    ddpm, idle = method(net.eval(), batch), method(Zeros(), batch)   # an image's t fill a batch
    few = method(net, 8)                                             # eight pairs, one by one
    inner = Autocast(net, cast).eval() if cast else net
    xt, t = torch.randn(batch, *shape, device=device), torch.arange(1, batch+1, device=device)

    @torch.no_grad()
    def forward(size, calls):
        for _ in range(calls): inner(xt[:size], t[:size])

    evaluate, pairs = partial(evaluate_bits_per_dim, autocast=cast), batches*batch
    whole = lambda: evaluate(ddpm, x0, batch_size=batch)
    own_part = lambda: evaluate_bits_per_dim(idle, x0, batch_size=batch)
    return {
        'network': (lambda: forward(batch, batches), pairs, batch, None),
        'evaluate_bits_per_dim': (whole, pairs, batch, 'network'),
        'our own part of it': (own_part, pairs, batch, 'network'),
        'network, a pair at a time': (lambda: forward(1, 8), 8, 1, None),
        'evaluation, a pair at a time':
            (lambda: evaluate(few, x0[:1], batch_size=1), 8, 1, 'network, a pair at a time')}


def main():
    a = parser().parse_args()
    cuda = a.device.startswith('cuda')
    batch = a.batch_size or (16 if a.cifar and not cuda else 512)
    net, levels = (cifar10_unet(), 256) if a.cifar else (digits_unet(), 17)
    cast = torch.bfloat16 if a.autocast else None
    tasks = make_tasks(net, levels, batch, a.batches, cast, a.device)
    where = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    parameters = sum(map(torch.numel, net.parameters()))
    print(f"{'CIFAR-10' if a.cifar else 'digits'} U-Net, {parameters:,} parameters, "
          f"{'bfloat16' if cast else 'float32'}, {where}, torch {torch.__version__}, "
          f"load {os.getloadavg()[0]:.1f}")
    sync = torch.cuda.synchronize if cuda else lambda: None
    best = best_times({k: v[0] for k, v in tasks.items()}, a.rounds, sync)
    each = {k: best[k]/v[1] for k, v in tasks.items()}
    print(f"{'':30} {'batch':>6} {'pairs/s':>10} {'ms a batch':>11} {'of the network':>15}")
    for k, (_, _, size, base) in tasks.items():
        share = f"{100*each[k]/each[base]:13.1f} %" if base else ''
        print(f"{k:30} {size:6} {1/each[k]:10.1f} {1000*size*each[k]:11.2f} {share:>15}")
    gain = each['evaluation, a pair at a time']/each['evaluate_bits_per_dim']
    print(f"batches of {batch} instead of a pair at a time: {gain:.1f} times as fast; "
          f"load {os.getloadavg()[0]:.1f}")


if __name__ == '__main__': main()
