#!/usr/bin/env python
"""What does a call of a small network take while other programs want the same cores?

    python benchmarks/busy.py                        # a minute or two
    python benchmarks/busy.py --rounds 5 --json benchmarks/results/busy.json

Threads that have done their part of an operation wait for the others in a loop, for a while, and
only then sleep. If one of the others is not running, because another program has its core, the
loop takes a core from somebody. GOMP_SPINCOUNT says how often such a loop goes round (GNU's
OpenMP, which PyTorch brings along on Linux). Every count is tried in a process of its own, in
turns, with none, one, or as many busy programs as there are cores.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from speed import cpu_facts

CALLS = """
import sys, time, torch
from ddpm_nbdev.ddpm import DDPM
model = DDPM.from_pretrained('digits').model.eval().to(memory_format=torch.channels_last)
x, t = torch.randn(64, 1, 8, 8), torch.full((64,), 500)
times, end = [], time.monotonic() + float(sys.argv[1])
with torch.inference_mode():
    for _ in range(3): model(x, t)
    while time.monotonic() < end or len(times) < 5:
        start = time.perf_counter()
        model(x, t)
        times.append(time.perf_counter() - start)
print(1e3*sum(times)/len(times))
"""
COUNTS = None, 100_000, 10_000, 1_000, 0                   # None: as it is without being told

def call(count, seconds):
    "Mean milliseconds of a call of the digits network on 64 images, in a new process."
    kept = {k: v for k, v in os.environ.items() if k not in ('GOMP_SPINCOUNT', 'OMP_WAIT_POLICY')}
    env = kept | ({} if count is None else {'GOMP_SPINCOUNT': str(count)})
    done = subprocess.run([sys.executable, '-c', CALLS, str(seconds)], env=env, check=True,
                          capture_output=True, text=True)
    return float(done.stdout)

def busy_program():
    "A process that never waits."
    return subprocess.Popen([sys.executable, '-c', 'while True: pass'])

def measure(others, rounds, seconds):
    "For each count its milliseconds, round by round, beside so many busy programs."
    found = {count: [] for count in COUNTS}
    programs = [busy_program() for _ in range(others)]
    try:
        for _ in range(rounds):
            for count in COUNTS: found[count].append(call(count, seconds))
    finally:
        for p in programs: p.kill()
    return found

def main(argv=None):
    "Measure and print."
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--rounds', type=int, default=3, help="the median counts (default 3)")
    p.add_argument('--seconds', type=float, default=2, help="of each process (default 2)")
    p.add_argument('--json', help="also write everything here")
    a = p.parse_args(argv)
    cores = os.cpu_count()
    rows = []
    print(f"{cpu_facts()[0]}, {cores} cores; milliseconds a call, median of {a.rounds}")
    print(f"{'busy programs':<15}" + ''.join(f"{'default' if c is None else c:>10}" for c in COUNTS))
    for others in sorted({0, 1, cores}):
        found = measure(others, a.rounds, a.seconds)
        print(f"{others:<15}" + ''.join(f"{statistics.median(v):10.1f}" for v in found.values()),
              flush=True)
        rows += [{'busy': others, 'count': c, 'ms': [round(v, 2) for v in ms]}
                 for c, ms in found.items()]
    if a.json:
        saved = {'cpu': cpu_facts()[0], 'cores': cores, 'load_average': round(os.getloadavg()[0], 1),
                 'rows': rows}
        Path(a.json).write_text(json.dumps(saved, indent=1) + '\n')

if __name__ == '__main__': main()
