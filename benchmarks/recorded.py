#!/usr/bin/env python
"""What does a recording of a small network's operations save on a CPU?

    python benchmarks/recorded.py                    # three minutes
    python benchmarks/recorded.py --json benchmarks/results/recorded.json

A call of a shipped network as it is, and from a recording (`Traced`), in turns; then a whole
chain of samples either way, and how many of its gray levels differ.
"""
import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch
from speed import cpu_facts
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_nbdev import ddpm as page10
from ddpm_nbdev import graphs
from ddpm_nbdev.ddpm import DDPM, draw_samples
from ddpm_nbdev.graphs import Traced, traced
from ddpm_nbdev.machines import fast_layout

CALLS = ('digits', 16), ('digits', 64), ('fashion_mnist', 16)      # which network, images

def seconds(f, times):
    "Of one call."
    f()
    start = time.perf_counter()
    for _ in range(times): f()
    return (time.perf_counter()-start)/times

def calls(name, n, rounds):
    "Milliseconds of a call, plain and recorded, round by round."
    d = DDPM.from_pretrained(name)
    net = fast_layout(d.model).eval()
    x, t = torch.randn(n, *d.shape), torch.full((n,), d.sched.T//2)
    both = {'plain': net, 'recorded': Traced(net)}
    graphs._made.clear()                              # a process makes few, else
    found = {k: [] for k in both}
    with torch.no_grad():
        with Operations() as counted: right = net(x, t)
        start = time.perf_counter()
        error = (both['recorded'](x, t) - right).abs().max().item()       # the first one records
        recording = time.perf_counter()-start
        assert both['recorded'].recorded and len(graphs._made) == 1
        for _ in range(rounds):
            for k, f in both.items(): found[k].append(1e3*seconds(lambda f=f: f(x, t), 5))
    return {'model': name, 'images': n, 'operations': counted.n, 'error': error,
            'recording': recording, 'ms': found}

class Operations(TorchDispatchMode):
    "Counts what PyTorch is told to do."
    n = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += 1
        return func(*args, **kwargs or {})

def chains(n, rounds):
    "Seconds of `draw_samples` on the digits network, plain and recorded; what differs."
    d = DDPM.from_pretrained('digits')
    fast_layout(d.model)
    found, images = {'plain': [], 'recorded': []}, {}
    for _ in range(rounds):
        for k in found:
            page10.traced = traced if k == 'recorded' else lambda model, calls: model
            graphs._made.clear()
            start = time.perf_counter()
            images[k] = draw_samples(d, n)
            found[k].append(time.perf_counter()-start)
    page10.traced = traced
    differ = (images['plain'] != images['recorded']).sum().item()
    return {'images': n, 'seconds': found, 'differ': differ, 'of': images['plain'].numel()}

def main(argv=None):
    "Measure and print."
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--rounds', type=int, default=15, help="the median counts (default 15)")
    p.add_argument('--chains', type=int, default=3, help="rounds of whole chains (default 3)")
    p.add_argument('--json', help="also write everything here")
    a = p.parse_args(argv)
    threads = torch.get_num_threads()
    print(f"{cpu_facts()[0]}, {os.cpu_count()} cores; median of {a.rounds}")
    rows, found = [], []
    for k in sorted({threads, 1}, reverse=True):
        torch.set_num_threads(k)
        for name, n in CALLS:
            rows.append({'threads': k} | calls(name, n, a.rounds))
            plain, recorded = (statistics.median(v) for v in rows[-1]['ms'].values())
            print(f"{name:14} {n:3} images, {k} threads: {plain:6.2f} ms, recorded {recorded:6.2f} "
                  f"({plain/recorded:.2f} times as fast)", flush=True)
    torch.set_num_threads(threads)
    for n in (64, 16)[:2 if a.chains else 0]:
        found.append({'threads': threads} | chains(n, a.chains))
        plain, recorded = (statistics.median(v) for v in found[-1]['seconds'].values())
        print(f"{n} digits, 1000 steps: {plain:5.2f} s, recorded {recorded:5.2f}; of "
              f"{found[-1]['of']} gray levels {found[-1]['differ']} differ", flush=True)
    if a.json:
        saved = {'cpu': cpu_facts()[0], 'cores': os.cpu_count(), 'torch': torch.__version__,
                 'calls': rows, 'chains': found}
        Path(a.json).write_text(json.dumps(saved, indent=1) + '\n')

if __name__ == '__main__': main()
