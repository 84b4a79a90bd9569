"""Measuring: interleaved rounds, the machine's ceiling, shares of a step, memory, processes.

Each group of rows is a list of dicts; `ROWS` names the function that measures it.
"""
import json
import math
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rivals import (DIFFUSERS, DTYPES, LAYOUTS, LUCIDRAINS, MAKERS, NETWORKS, OURS, TINY,
                    all_batches, diffusers_training, ours_training)
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from ddpm_nbdev.data import Dataset
from ddpm_nbdev.plot import save_images
from ddpm_nbdev.train import example_noise

TARGETS = {  # (group, precision): (times faster than diffusers in float32, utilization)
    ('training', 'float32'): (1.7, .80), ('training', 'bfloat16'): (2.8, .70),
    ('sampling', 'float32'): (1.15, .85), ('sampling', 'bfloat16'): (1.9, None)}
MEMORY_TARGET = .8

class Settings:
    "What all measurements share."
    def __init__(self, **kw): self.__dict__ = kw
    def but(self, **kw): return Settings(**self.__dict__ | kw)

# ---- rounds

def seconds_of(run, calls, s):
    "Seconds of one call, over some of them."
    s.sync()
    start = time.perf_counter()
    for _ in range(calls): run()
    s.sync()
    return (time.perf_counter()-start)/calls

def calls_in_window(run, s):
    "How many calls take a fifth of a second."
    for _ in range(2): last = seconds_of(run, 1, s)    # the first also builds what is built once
    return 1 if s.tiny else max(1, math.ceil(.2/last))

def interleaved(tasks, s):
    """name -> seconds of one call, in each of `s.repeats` rounds.

    Tasks are name -> (call, rounds it takes part in).
    """
    calls, times = {}, {name: [] for name in tasks}
    for name, (run, rounds) in tasks.items():          # one round: hopelessly slow, no warm-up
        calls[name] = 1 if rounds == 1 else calls_in_window(run, s)
    for i in range(s.repeats):
        for name, (run, rounds) in tasks.items():
            if i < rounds: times[name].append(seconds_of(run, calls[name], s))
    return times

# ---- counting and the ceiling

def count_operations(make, train):
    "Multiplications and additions for one image, by torch's counter, without computing anything."
    with torch.device('meta'):
        net, x, t = make(), torch.empty(1, 3, 32, 32), torch.ones(1, dtype=torch.int64)
    counter = FlopCounterMode(display=False)
    with counter, torch.set_grad_enabled(train):
        out = net(x, t)
        if train: getattr(out, 'sample', out).sum().backward()
    return counter.get_total_flops()

def convolution(ch, side, fmt, precision, train, s):
    "A call of one 3x3 convolution."
    x, w, b = torch.randn(s.batch, ch, side, side), torch.randn(ch, ch, 3, 3), torch.zeros(ch)
    x, w = (v.to(s.device, DTYPES[precision]).contiguous(memory_format=fmt).requires_grad_(train)
            for v in (x, w))
    b = b.to(s.device, DTYPES[precision]).requires_grad_(train)
    g = torch.randn_like(x)
    def run():
        with torch.set_grad_enabled(train): y = F.conv2d(x, w, b, padding=1)
        if train: torch.autograd.grad(y, (x, w, b), g)
    return run

def ceiling_tasks(s, precision, train):
    "name -> (call, operations in a call): a convolution in the two sizes and layouts that matter."
    tasks, c = {}, s.net['ch']
    for ch, side in ((c, 32), (2*c, 16)):
        for layout, fmt in LAYOUTS.items():
            operations = (3 if train else 1)*2*9*ch*ch*side*side*s.batch
            name = f"{ch} channels, {side}x{side}, {layout}"
            tasks[name] = convolution(ch, side, fmt, precision, train, s), operations
    return tasks

# ---- training and sampling

def network_plan(s, low, train):
    "The rows in their order: (who, precision, note, options, settings)."
    plan = [(OURS, 'float32', layout, dict(layout=layout), s) for layout in LAYOUTS]
    for layout in list(LAYOUTS)[:2 if s.bfloat16 else 1]:
        plan.append((OURS, 'bfloat16', layout, dict(layout=layout, precision='bfloat16'), low))
    if train and s.compile:
        plan += [(OURS, p, 'compiled', dict(precision=p, compiled=True), s) for p in DTYPES]
    plan += [(DIFFUSERS, 'float32', '', {}, s)]
    if train:
        plan += [(DIFFUSERS, 'float32', 'our optimizer, average and layout', dict(tuned=True), s)]
    if s.bfloat16: plan += [(DIFFUSERS, 'bfloat16', '', dict(precision='bfloat16'), s)]
    return [*plan, (LUCIDRAINS, 'float32', 'a smaller, different network', {}, s)]

def network_tasks(s, low, group, say):
    "Rows without times yet, and the call of each under the row's 'key'."
    rows, tasks, operations, train = [], {}, {}, group == 'training'
    for who, precision, note, kw, settings in network_plan(s, low, train):
        key = group, who, precision, note
        row = dict(group=group, what=who, precision=precision, note=note)
        if why := s.missing.get(who):
            rows.append(row | dict(skipped=why))
            continue
        say(f"building {who}, {precision}{note and ', '}{note}")
        if who not in operations:
            operations[who] = count_operations(lambda: NETWORKS[who](s), train)
        if settings is not s: row['note'] = f"{note}, imitated: no bfloat16 in this processor"
        tasks[key] = MAKERS[group][who](settings, **kw), 1 if settings is not s else s.repeats
        rows.append(row | dict(key=key, batch=settings.batch, gflop=operations[who]/1e9))
    return rows, tasks

def network_rows(s, group, say):
    "Rows of training or sampling: a step's time, the ratio to diffusers, the ceiling's share."
    train = group == 'training'
    low = s if s.bfloat16 else s.but(batch=1)          # imitated bfloat16 is too slow for more
    rows, tasks = network_tasks(s, low, group, say)
    ceilings = {}
    for precision in DTYPES:
        settings = s if precision == 'float32' else low
        for name, (run, n) in ceiling_tasks(settings, precision, train).items():
            ceilings[precision, name] = n
            tasks['ceiling', precision, name] = run, 1 if settings is not s else s.repeats
    say(f"timing {len(tasks)} tasks for {group}, {s.repeats} rounds")
    times = interleaved(tasks, s)
    speeds = {p: {name: n/statistics.median(times['ceiling', p, name])/1e9
                  for (q, name), n in ceilings.items() if q == p} for p in DTYPES}
    best = {p: max((v, name) for name, v in speeds[p].items()) for p in DTYPES}
    for row in rows:
        if 'key' in row: add_times(row, times[row.pop('key')], 1 if train else s.steps, best)
    add_ratios(rows, group)
    return rows + [dict(group=group, what='ceiling: 3x3 convolution', precision=p, note=name,
                        gflops=gflops, utilization=1., all=speeds[p])
                   for p, (gflops, name) in best.items()]

def add_times(row, times, calls, best):
    "Seconds of an image, and of one step for it, and what share of the ceiling that is."
    row['times'] = [x/row['batch']/calls for x in times]
    row['seconds'] = statistics.median(row['times'])
    row['gflops'] = row['gflop']/row['seconds']
    row['utilization'] = row['gflops']/best[row['precision']][0]

def add_ratios(rows, group):
    "How many times as fast as diffusers in float32, and the targets."
    base = next((r['seconds'] for r in rows if r['what'] == DIFFUSERS and 'seconds' in r), None)
    for row in rows:
        if 'seconds' in row and base and row['what'] != LUCIDRAINS:
            row['ratio'] = base/row['seconds']
        if row['what'] == OURS and row['note'].startswith(('channels last', 'compiled')):
            row['target'] = TARGETS[group, row['precision']]

# ---- the data path, and the shares of a step

def data_rows(s, say):
    "What images and noise cost, beside a training step."
    say("timing the data path")
    batches, place = all_batches(s), torch.arange(s.batch)
    like = torch.zeros(s.batch, 3, 32, 32, device=s.device)
    tasks = {'training step': ours_training(s), 'images: index, flip, scale': lambda: batches(0),
             't and noise': lambda: example_noise(0, place, 1000, like)}
    times = interleaved({k: (f, s.repeats) for k, f in tasks.items()}, s)
    whole = statistics.median(times.pop('training step'))
    rows = []
    for k, v in times.items():
        m = statistics.median(v)
        rows.append(dict(group='data', what=k, batch=s.batch, times=v, seconds=m, share=m/whole))
    return rows

KINDS = {  # words in the names of torch's operators -> what they do; the first that fits counts
    'convolution': ('conv',), 'matrix product': ('mm', 'matmul', 'linear', 'attention'),
    'normalization': ('group_norm', 'GroupNorm'),
    'optimizer and average': ('adam', 'Adam', 'optimizer', 'Optimizer', 'lerp', '_foreach'),
    'clipping': ('vector_norm',), 'activation': ('silu', 'sigmoid'),
    'random numbers, dropout': ('bernoulli', 'dropout', 'rand', 'normal_', 'bitwise', 'rshift'),
    'copies': ('copy', 'cat', 'clone', 'pad', 'upsample', 'fill_', 'zero'),
    'sums and products': ('aten::add', 'aten::mul', 'aten::div', 'aten::sum', 'aten::where')}

def profiled(step, s):
    "What torch's profiler saw of one call: operators and, on a GPU, their kernels."
    cuda = s.device.type == 'cuda'
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA]*cuda) as prof:
        step()
        s.sync()
    return prof.key_averages()

def seconds_by_kind(step, s):
    "Seconds of one step by what they were spent on, as torch's profiler sees it."
    cuda = s.device.type == 'cuda'
    parts = dict.fromkeys([*KINDS, 'other'], 0.)
    for e in profiled(step, s):
        if cuda and e.device_type != torch.autograd.DeviceType.CPU:
            continue                                   # a kernel's time is also its operator's
        kind = next((k for k, words in KINDS.items() if any(w in e.key for w in words)), 'other')
        parts[kind] += (e.self_device_time_total if cuda else e.self_cpu_time_total)/1e6
    return parts

def share_rows(s, say):
    """Where the time of a training step goes.

    The part that is neither convolution nor matrix product, and what it is made of.
    """
    variants = [(OURS, layout, ours_training, dict(layout=layout)) for layout in LAYOUTS]
    rows = []
    for who, note, make, kw in [*variants, (DIFFUSERS, '', diffusers_training, {})]:
        if why := s.missing.get(who):
            rows.append(dict(group='share', what=who, note=note, skipped=why))
            continue
        say(f"profiling {who}{note and ', '}{note}")
        step = make(s, **kw)
        step()
        parts = seconds_by_kind(step, s)
        whole = sum(parts.values())
        parts = {k: v/whole for k, v in parts.items()}
        rows.append(dict(group='share', what=who, note=note, batch=s.batch, seconds=whole,
                         parts=parts, share=1-parts['convolution']-parts['matrix product']))
    return rows

# ---- memory

MEMORY = {
    (OURS, 'float32, channels last'): {},
    (OURS, 'float32, channels first'): dict(layout='channels first'),
    (OURS, 'bfloat16'): dict(precision='bfloat16'),
    (DIFFUSERS, 'float32'): {},
    (LUCIDRAINS, 'float32, a smaller, different network'): {}}

def peak_memory(key, settings, answer):
    """In a process of its own: bytes that building everything and taking two steps needs at most.

    Beyond what any training needs.
    """
    make, kw = MAKERS['training'][key[0]], MEMORY[key]
    images = torch.zeros(settings['batch'], 3, 32, 32, dtype=torch.uint8)
    s = Settings(**settings, data=Dataset('blank', images, images[:1], flip=True))
    if s.device.type == 'cuda':
        step = make(s, **kw)
        for _ in range(2): step()
        answer.send(torch.cuda.max_memory_allocated())
    else:
        import resource
        unit = 1 if sys.platform == 'darwin' else 1024
        def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*unit
        make(s.but(net=TINY), **kw)()        # libraries that are loaded late
        before = peak()
        step = make(s, **kw)
        for _ in range(2): step()            # Adam's memory is there from the second step on
        answer.send(peak()-before)
    answer.close()

def in_own_process(context, *args):
    "What `peak_memory` answers, or None if its process failed."
    ours, theirs = context.Pipe()
    p = context.Process(target=peak_memory, args=(*args, theirs))
    p.start()
    theirs.close()
    try: return ours.recv()
    except EOFError: return None
    finally: p.join()

def memory_context(s):
    "Imports once, then a fresh process for each."
    context = multiprocessing.get_context('forkserver')
    preload = ['ddpm_nbdev.train', 'torch.profiler', 'torch.utils.flop_counter']
    if not s.missing.get(DIFFUSERS) and not s.tiny:
        preload += ['diffusers.models.unets.unet_2d', 'diffusers.schedulers.scheduling_ddpm',
                    'diffusers.training_utils']
    context.set_forkserver_preload(preload)
    return context

def memory_rows(s, say):
    "Peak memory of training: network, gradients, optimizer, average and activations."
    if sys.platform == 'win32':
        return [dict(group='memory', what=OURS, note='', skipped='not measured on Windows')]
    rows, context = [], memory_context(s)
    small = dict(batch=s.memory_batch, net=s.net, device=s.device)
    for (who, note) in MEMORY:
        row = dict(group='memory', what=who, note=note, batch=s.memory_batch)
        rows.append(row)
        if why := s.missing.get(who): row['skipped'] = why
        elif note.startswith('bfloat16') and not s.bfloat16:
            row['skipped'] = 'no bfloat16 in this processor'
        elif s.tiny and who != OURS: row['skipped'] = 'not with --tiny'
        else:
            say(f"memory of {who}, {note}")
            peak = in_own_process(context, (who, note), small)
            if peak is None: row['skipped'] = 'the process that measured it failed'
            else: row['bytes'] = peak
    base = next((r['bytes'] for r in rows if r['what'] == DIFFUSERS and 'bytes' in r), None)
    for r in rows:
        if base and 'bytes' in r and r['what'] != LUCIDRAINS: r['ratio'] = r['bytes']/base
        if (r['what'], r['note']) == (OURS, 'float32, channels last'): r['target'] = MEMORY_TARGET
    return rows

# ---- processes

def train_command(s, steps, tmp):
    "`ddpm_train cifar10` as a module with its options; with --tiny, some pictures in `tmp`."
    options = (f"--steps {steps} --batch-size {s.batch} --log-every 1 --quiet "
               f"--device {s.device.type} "
               "--T 2 --samples 1 --sample-every 0")   # little to do after training
    if s.tiny:
        for i in range(20):
            x = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)
            save_images(x, tmp/f"{i}.png", levels=256)
    where = ['--data-dir', str(s.dir)] if s.dir else []
    data = f"folder:{tmp}" if s.tiny else 'cifar10'
    return ['ddpm_nbdev.cli', 'train', data, *options.split(), *where]

def step_times(command, out, steps):
    "Seconds of each step but the first, which warms up; or why there are none."
    p = subprocess.run([*command, '--out', str(out)], text=True, capture_output=True)
    log = (out/'log.jsonl').read_text().splitlines() if (out/'log.jsonl').exists() else []
    seconds = [json.loads(line)['seconds'] for line in log]
    if p.returncode or len(seconds) != steps:
        return dict(skipped=f"it failed: {(p.stderr.strip().splitlines() or ['?'])[-1]}")
    times = [b-a for a, b in zip(seconds, seconds[1:])]
    return dict(times=times, seconds=statistics.median(times))

def process_rows(s, say):
    """Steps a second of the command line: one process, then two that share the batch.

    gloo on CPUs, nccl on GPUs.
    """
    row = dict(group='processes', what='ddpm_train cifar10', note='')
    if not s.dir and not s.tiny: return [row | dict(skipped='needs --data')]
    if s.device.type == 'cuda' and torch.cuda.device_count() < 2:
        return [row | dict(skipped='needs two GPUs')]
    if s.tiny: row['what'] = 'ddpm_train folder'
    steps, rows = s.repeats+2, []
    torchrun = 'torch.distributed.run --standalone --nproc-per-node 2 -m'
    with tempfile.TemporaryDirectory() as tmp:
        command = train_command(s, steps, Path(tmp))
        for n, launcher in ((1, ''), (2, torchrun)):
            note = f"{n} process{'es'*(n > 1)}"
            say(f"{note} of the command line, {steps} steps")
            measured = dict(skipped='not with --tiny')
            if not s.tiny or n == 1:
                run = [sys.executable, '-m', *launcher.split(), *command]
                measured = step_times(run, Path(tmp)/str(n), steps)
            rows.append(row | dict(note=note, batch=s.batch) | measured)
    if all('seconds' in r for r in rows): rows[1]['ratio'] = rows[0]['seconds']/rows[1]['seconds']
    return rows

ROWS = {  # group -> its rows
    'training': lambda s, say: network_rows(s, 'training', say),
    'sampling': lambda s, say: network_rows(s, 'sampling', say),
    'data': data_rows, 'share': share_rows, 'memory': memory_rows, 'processes': process_rows}
