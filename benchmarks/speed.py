#!/usr/bin/env python
"""How fast do the CIFAR-10 network's training and sampling run, beside others and beside what
the machine can do?

    python benchmarks/speed.py --data DIR           # CIFAR-10: its archive, or cifar-10-batches-bin
    python benchmarks/speed.py --only training sampling --batch 8 --repeats 5
    python benchmarks/speed.py --data DIR --json speed.json --markdown > table.md

Rounds are interleaved: every round times each row once, so that what else the machine does strikes
all rows alike, and the ratios between rows are the numbers to believe. benchmarks/README.md says
what each row does.
"""
import argparse
import contextlib
import json
import os
import platform
import sys
from pathlib import Path

import torch
from rivals import FULL, TINY, find_missing, rival_versions
from table import print_table
from timing import ROWS, Settings

from ddpm_nbdev.data import Dataset, load_dataset

# ---- the machine

def cpu_facts():
    "Model and flags of the processor, as far as the system says."
    try: lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError: return platform.processor() or platform.machine(), set()
    facts = {k.strip(): v.strip() for k, _, v in (line.partition(':') for line in reversed(lines))}
    flags = facts.get('flags', facts.get('Features', ''))
    return facts.get('model name', platform.machine()), set(flags.split())

def bfloat16_in_hardware(device):
    "Does the device calculate in bfloat16, or would it only be imitated?"
    if device.type == 'cuda': return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(cpu_facts()[1] & {'avx512_bf16', 'amx_bf16', 'avx_ne_convert', 'bf16'})

def machine(device):
    "What the numbers depend on."
    facts = {'cpu': cpu_facts()[0], 'cores': os.cpu_count(),
             'cpu_capability': torch.backends.cpu.get_cpu_capability(),
             'threads': torch.get_num_threads(), 'torch': torch.__version__,
             'python': platform.python_version(),
             'bfloat16_in_hardware': bfloat16_in_hardware(device), 'device': str(device),
             'load_average': None}
    with contextlib.suppress(AttributeError, RuntimeError):
        facts['mkldnn_bfloat16'] = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    with contextlib.suppress(AttributeError, OSError):
        facts['load_average'] = round(os.getloadavg()[0], 1)
    if device.type == 'cuda':
        tf32 = {'convolutions': torch.backends.cudnn.allow_tf32,
                'products': torch.backends.cuda.matmul.allow_tf32}
        facts |= {'gpu': torch.cuda.get_device_name(device), 'cuda': torch.version.cuda,
                  'tf32_in_float32': tf32}
    return facts

# ---- what is asked

def parser():
    "The command line."
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', help="folder of CIFAR-10, or its archive (default: random images, "
                   "which cost the same time)")
    p.add_argument('--batch', type=int,
                   help="images per step (default: 8 on a CPU, the paper's 128 on a GPU)")
    p.add_argument('--repeats', type=int, default=5, help="rounds; the median counts (default 5)")
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    p.add_argument('--only', nargs='+', choices=list(ROWS), default=list(ROWS), metavar='GROUP',
                   help=f"some of: {', '.join(ROWS)}")
    p.add_argument('--json', help="also write everything here")
    p.add_argument('--markdown', action='store_true', help="print the tables as Markdown")
    p.add_argument('--compile', action='store_true',
                   help="also time torch.compile (minutes to start; on by default on a GPU)")
    p.add_argument('--no-rivals', action='store_true', help="this package alone")
    p.add_argument('--memory-batch', type=int,
                   help="images per step when memory is measured (default 32)")
    p.add_argument('--tiny', action='store_true',
                   help="a narrow network and one round: does it all run?")
    return p

def images(folder):
    "CIFAR-10, or random images of its size."
    if folder: return load_dataset('cifar10', data_dir=folder)
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (2048, 3, 32, 32), dtype=torch.uint8, generator=g)
    return Dataset('random images', x, x[:1], flip=True)

def settings(a, device):
    "What was asked for, with the defaults of the device."
    gpu = device.type == 'cuda'
    return Settings(
        data=images(a.data), dir=a.data, device=device, tiny=a.tiny, net=TINY if a.tiny else FULL,
        batch=a.batch or (2 if a.tiny else 128 if gpu else 8), repeats=1 if a.tiny else a.repeats,
        steps=10 if gpu else 2, memory_batch=a.memory_batch or (2 if a.tiny else 32),
        compile=a.compile or gpu and not a.tiny, missing=find_missing(not a.no_rivals),
        bfloat16=bfloat16_in_hardware(device), sync=torch.cuda.synchronize if gpu else lambda: None)

def heading(s, facts, versions):
    "Where, with what, and on which images: three lines."
    where = f"{facts['gpu']}, " if 'gpu' in facts else ''
    others = ''.join(f", {k} {v}" for k, v in versions.items())
    narrow = ', NARROW NETWORK (--tiny): the numbers mean nothing' if s.tiny else ''
    return [
        f"{where}{facts['cpu']} ({facts['cpu_capability']}, {facts['cores']} cores), "
        f"{facts['threads']} threads, torch {facts['torch']}{others}, "
        f"load {facts['load_average']} at the start",
        'bfloat16 arithmetic in hardware' if s.bfloat16
        else 'NO bfloat16 arithmetic in this device: it is imitated, and slow',
        f"{'CIFAR-10' if s.dir else 'RANDOM IMAGES (no --data)'}, batch {s.batch}, "
        f"medians of {s.repeats} interleaved rounds{narrow}"]

def main(argv=None):
    "Measure, print, and write after each group."
    a = parser().parse_args(argv)
    device = torch.device(a.device)
    def say(what): print(f"# {what}", file=sys.stderr, flush=True)
    s = settings(a, device)
    torch.manual_seed(0)
    facts, versions, rows = machine(device), rival_versions(s.missing), []
    for line in heading(s, facts, versions): print(f"- {line}" if a.markdown else line)
    print(flush=True)
    for group in ROWS:
        if group not in a.only: continue
        new = ROWS[group](s, say)
        print_table(group, new, a.markdown)
        rows += new
        if a.json:
            saved = {'machine': facts | {'rivals': versions}, 'images': s.data.name,
                     'batch': s.batch, 'repeats': s.repeats, 'rows': rows}
            Path(a.json).write_text(json.dumps(saved, indent=1) + '\n')

if __name__ == '__main__': main()
