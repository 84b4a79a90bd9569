#!/usr/bin/env python
"""Which of PyTorch's kernels are quick on this CPU? Forward and backward, in milliseconds: attention
as one call and as two products, the group norm with channels last and first, a 3x3 convolution.
What `ddpm_nbdev.unet` and `ddpm_nbdev.machines.fast_layout` choose rests on these.

    python benchmarks/kernels.py             # half a minute
    python benchmarks/kernels.py --batch 1
"""
import argparse
import statistics
import time

import torch
import torch.nn.functional as F

LAYOUTS = {'channels last': torch.channels_last, 'channels first': torch.contiguous_format}

def both_ways(f, *inputs):
    "A call of f with its backward pass."
    inputs = [v.requires_grad_() for v in inputs]
    grad = torch.randn_like(f(*inputs))
    return lambda: torch.autograd.grad(f(*inputs), inputs, grad)

def products(q, k, v): return (q @ k.mT * q.shape[-1]**-.5).softmax(-1) @ v

def attention(dtype, n, pixels, c):
    "name -> call, of attention over so many pixels."
    def rows(): return [torch.randn(n, 1, pixels, c).to(dtype) for _ in range(3)]
    return {'one call': both_ways(F.scaled_dot_product_attention, *rows()),
            'two products': both_ways(products, *rows())}

def maps(dtype, n, c, side):
    "layout -> features, of the same values."
    x = torch.randn(n, c, side, side).to(dtype)
    return {name: x.to(memory_format=fmt, copy=True) for name, fmt in LAYOUTS.items()}

def norm(dtype, n, c, side, groups=32):
    "name -> call, of the group norm."
    def f(x): return F.group_norm(x, groups, eps=1e-6)
    return {name: both_ways(f, x) for name, x in maps(dtype, n, c, side).items()}

def convolution(dtype, n, c, side):
    "name -> call, of a 3x3 convolution."
    w = torch.randn(c, c, 3, 3).to(dtype)
    return {name: both_ways(lambda x, w: F.conv2d(x, w, padding=1), x,
                            w.to(memory_format=LAYOUTS[name], copy=True))
            for name, x in maps(dtype, n, c, side).items()}

SIZES = {attention: [(256, 256), (64, 128)], norm: [(128, 32), (256, 16), (256, 8)],
         convolution: [(128, 32), (256, 16), (256, 8)]}

def milliseconds(calls, rounds):
    "The median of so many interleaved rounds, for each call."
    times = {name: [] for name in calls}
    for i in range(rounds+2):                                   # two to warm up
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if i > 1: times[name].append(1e3*(time.perf_counter()-start))
    return {name: statistics.median(v) for name, v in times.items()}

def main():
    "Measure and print."
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--batch', type=int, default=8, help="images (default 8)")
    p.add_argument('--rounds', type=int, default=15, help="interleaved; the median counts")
    a = p.parse_args()
    torch.manual_seed(0)
    print(f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}, batch {a.batch}, forward and backward, ms")
    for what, sizes in SIZES.items():
        for size in sizes:
            for dtype in (torch.float32, torch.bfloat16):
                found = milliseconds(what(dtype, a.batch, *size), a.rounds)
                name = f"{what.__name__} {'x'.join(map(str, size))}, {str(dtype)[6:]}"
                print(f"{name:32}" + ''.join(f"{k:>16}{v:8.2f}" for k, v in found.items()),
                      flush=True)

if __name__ == '__main__': main()
