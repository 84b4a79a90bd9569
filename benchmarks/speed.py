#!/usr/bin/env python
"""How fast do the CIFAR-10 network's training and sampling run, beside others and beside what the machine can do?

    python benchmarks/speed.py --data DIR               # DIR holds CIFAR-10: its archive, or cifar-10-batches-bin
    python benchmarks/speed.py --only training sampling --batch 8 --repeats 5
    python benchmarks/speed.py --data DIR --json speed.json --markdown > table.md

Rounds are interleaved: every round times each row once, so that what else the machine does strikes all rows alike, and
the ratios between rows are the numbers to believe. benchmarks/README.md says what each row does.
"""
import argparse
import contextlib
import importlib
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from ddpm_nbdev.data import Batches, Dataset, load_dataset
from ddpm_nbdev.plot import save_images
from ddpm_nbdev.reverse import p_sample_progressive
from ddpm_nbdev.train import LowPrecision, TrainState, example_noise, preset, training_step
from ddpm_nbdev.unet import UNet

GROUPS = 'training', 'sampling', 'data', 'share', 'memory', 'processes'
LAYOUTS = {'channels last': torch.channels_last, 'channels first': torch.contiguous_format}
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16}
FULL = dict(ch=128, ch_mult=[1, 2, 2, 2], num_res_blocks=2, attn_resolutions=[16], groups=32)
TINY = dict(ch=16, ch_mult=[1, 2], num_res_blocks=1, attn_resolutions=[16], groups=8)
OURS, DIFFUSERS, LUCIDRAINS = 'ddpm_nbdev', 'diffusers', 'denoising-diffusion-pytorch'
TARGETS = {  # (group, precision): (times faster than diffusers in float32, utilization)
    ('training', 'float32'): (1.7, .80), ('training', 'bfloat16'): (2.8, .70),
    ('sampling', 'float32'): (1.15, .85), ('sampling', 'bfloat16'): (1.9, None)}
MEMORY_TARGET = .8

# ---- the machine

def cpu_facts():
    "Model and flags of the processor, as far as the system says."
    try: lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError: return platform.processor() or platform.machine(), set()
    facts = {k.strip(): v.strip() for k, _, v in (line.partition(':') for line in reversed(lines))}
    return facts.get('model name', platform.machine()), set(facts.get('flags', facts.get('Features', '')).split())

def bfloat16_in_hardware(device):
    "Does the device calculate in bfloat16, or would it only be imitated?"
    if device.type == 'cuda': return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(cpu_facts()[1] & {'avx512_bf16', 'amx_bf16', 'avx_ne_convert', 'bf16'})

def machine(device):
    "What the numbers depend on."
    facts = {'cpu': cpu_facts()[0], 'cores': os.cpu_count(), 'cpu_capability': torch.backends.cpu.get_cpu_capability(),
             'threads': torch.get_num_threads(), 'torch': torch.__version__, 'python': platform.python_version(),
             'bfloat16_in_hardware': bfloat16_in_hardware(device), 'device': str(device), 'load_average': None}
    with contextlib.suppress(AttributeError, RuntimeError): facts['mkldnn_bfloat16'] = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    with contextlib.suppress(AttributeError, OSError): facts['load_average'] = round(os.getloadavg()[0], 1)
    if device.type == 'cuda':
        facts |= {'gpu': torch.cuda.get_device_name(device), 'cuda': torch.version.cuda,
                  'tf32_in_float32': {'convolutions': torch.backends.cudnn.allow_tf32, 'products': torch.backends.cuda.matmul.allow_tf32}}
    return facts

# ---- the competitors

def import_diffusers():
    "diffusers, or ImportError."
    import diffusers
    return diffusers

def import_lucidrains():
    "denoising_diffusion_pytorch, or ImportError; stand-ins take the place of what only its own training loop needs, where it is not installed."
    for name in ('torchvision', 'accelerate', 'pytorch_fid', 'pytorch_fid.fid_score', 'pytorch_fid.inception'):
        try: importlib.import_module(name)
        except Exception: sys.modules[name] = MagicMock()                # a torchvision made for another torch raises RuntimeError
    import denoising_diffusion_pytorch
    importlib.import_module('ema_pytorch')
    return denoising_diffusion_pytorch

def wake(net):
    "Give the layers that start at zero something to do, as after some training; a zero gradient may cost another time."
    for p in net.parameters():
        if p.ndim > 1 and not p.any(): nn.init.normal_(p, std=.02)

def ours_state(s, precision='float32', layout='channels last', compiled=False):
    "The package's own training state and batches for the settings `s`."
    cfg = preset('cifar10', batch_size=s.batch, model_args=s.net, precision=precision, compile=compiled)
    state = TrainState(cfg, s.data, s.device)
    wake(state.model)
    for net in (state.model, state.ema.model): net.to(memory_format=LAYOUTS[layout])
    return state, Batches(s.data.train.to(s.device), s.batch, flip=True, levels=s.data.levels)

def ours_training(s, **kw):
    "One call, one training step."
    state, batches = ours_state(s, **kw)
    return lambda: training_step(state, batches)

def diffusers_net(s):
    "UNet2DModel with the same configuration, that of google/ddpm-cifar10-32."
    n = s.net
    attn = [(32 >> i) in n['attn_resolutions'] for i in range(len(n['ch_mult']))]
    return import_diffusers().UNet2DModel(sample_size=32, in_channels=3, out_channels=3, layers_per_block=n['num_res_blocks'],
        block_out_channels=[n['ch']*m for m in n['ch_mult']], down_block_types=['AttnDownBlock2D' if a else 'DownBlock2D' for a in attn],
        up_block_types=['AttnUpBlock2D' if a else 'UpBlock2D' for a in reversed(attn)], attention_head_dim=None, downsample_padding=0,
        flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6, norm_num_groups=n['groups'], dropout=.1)

def diffusers_training(s, precision='float32', tuned=False):
    "One call, one step as in examples/unconditional_image_generation; `tuned`: with this package's optimizer, average and layout."
    lib = import_diffusers()
    from diffusers.training_utils import EMAModel
    net, sched = diffusers_net(s).to(s.device).train(), lib.DDPMScheduler(1000)
    if tuned: net = net.to(memory_format=torch.channels_last)
    ema = EMAModel(net.parameters(), decay=.9999, use_ema_warmup=True, inv_gamma=1., power=.75, foreach=tuned)
    opt = torch.optim.AdamW(net.parameters(), lr=1e-4, betas=(.95, .999), weight_decay=1e-6, eps=1e-8, fused=tuned or None)
    batches, g, step = Batches(s.data.train.to(s.device), s.batch, flip=True, levels=s.data.levels), torch.Generator(s.device).manual_seed(0), [0]
    cast = torch.autocast(s.device.type, torch.bfloat16) if precision == 'bfloat16' else contextlib.nullcontext()
    def run():
        x, _ = batches(step[0])
        step[0] += 1
        noise = torch.randn(x.shape, generator=g, device=x.device)
        t = torch.randint(0, 1000, (len(x),), generator=g, device=x.device)
        with cast: out = net(sched.add_noise(x, noise, t), t).sample
        loss = F.mse_loss(out.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.)
        opt.step()
        opt.zero_grad()
        ema.step(net.parameters())
    return run

def lucidrains_net(s):
    "Unet(dim=128, dim_mults=(1,2,2,2)), its defaults elsewhere."
    return import_lucidrains().Unet(dim=s.net['ch'], dim_mults=tuple(s.net['ch_mult']), flash_attn=False)

def lucidrains_training(s):
    "One call, one step as in its Trainer."
    from ema_pytorch import EMA
    ddpm = import_lucidrains().GaussianDiffusion(lucidrains_net(s), image_size=32, timesteps=1000).to(s.device)
    opt, ema = torch.optim.Adam(ddpm.parameters(), lr=1e-4, betas=(.9, .99)), EMA(ddpm, beta=.995, update_every=10)
    batches, step = Batches(s.data.train.to(s.device), s.batch, flip=True, levels=s.data.levels), [0]
    def run():
        x, _ = batches(step[0])
        step[0] += 1
        ddpm((x+1)/2).backward()
        torch.nn.utils.clip_grad_norm_(ddpm.parameters(), 1.)
        opt.step()
        opt.zero_grad()
        ema.update()
    return run

def ours_sampling(s, precision='float32', layout='channels last'):
    "One call, `s.steps` steps of Algorithm 2."
    ddpm = ours_state(s, layout=layout)[0].averaged()
    wake(ddpm.model)
    if precision == 'bfloat16': ddpm = replace(ddpm, model=LowPrecision(ddpm.model))
    g = torch.Generator(s.device).manual_seed(0)
    def run():
        x = torch.randn(s.batch, 3, 32, 32, generator=g, device=s.device)
        for _ in p_sample_progressive(ddpm.sched, ddpm.model, x, g, start=s.steps): pass
    return run

def diffusers_sampling(s, precision='float32'):
    "One call, `s.steps` steps of DDPMPipeline."
    lib = import_diffusers()
    pipe = lib.DDPMPipeline(unet=diffusers_net(s).eval(), scheduler=lib.DDPMScheduler(1000)).to(s.device, DTYPES[precision])
    pipe.set_progress_bar_config(disable=True)
    g = torch.Generator(s.device).manual_seed(0)
    return lambda: pipe(batch_size=s.batch, generator=g, num_inference_steps=s.steps, output_type='pt')

def lucidrains_sampling(s):
    "One call, `s.steps` steps of its p_sample."
    ddpm = import_lucidrains().GaussianDiffusion(lucidrains_net(s), image_size=32, timesteps=1000).to(s.device).eval()
    def run():
        x = torch.randn(s.batch, 3, 32, 32, device=s.device)
        for t in reversed(range(s.steps)): x, _ = ddpm.p_sample(x, t)
    return run

# ---- counting and the ceiling

def count_operations(make, train):
    "Multiplications and additions for one image, by torch's counter, without computing anything."
    with torch.device('meta'): net, x, t = make(), torch.empty(1, 3, 32, 32), torch.ones(1, dtype=torch.int64)
    counter = FlopCounterMode(display=False)
    with counter, torch.set_grad_enabled(train):
        out = net(x, t)
        if train: getattr(out, 'sample', out).sum().backward()
    return counter.get_total_flops()

def ceiling_tasks(s, precision, train):
    "name -> (call, operations in a call): one 3x3 convolution, in the two sizes and the two layouts that matter."
    tasks, c = {}, s.net['ch']
    for ch, side in ((c, 32), (2*c, 16)):
        for layout, fmt in LAYOUTS.items():
            x, w, b = torch.randn(s.batch, ch, side, side), torch.randn(ch, ch, 3, 3), torch.zeros(ch)
            x, w = (v.to(s.device, DTYPES[precision]).contiguous(memory_format=fmt).requires_grad_(train) for v in (x, w))
            b = b.to(s.device, DTYPES[precision]).requires_grad_(train)
            g = torch.randn_like(x)
            def run(x=x, w=w, b=b, g=g):
                with torch.set_grad_enabled(train): y = F.conv2d(x, w, b, padding=1)
                if train: torch.autograd.grad(y, (x, w, b), g)
            tasks[f"{ch} channels, {side}x{side}, {layout}"] = run, (3 if train else 1)*2*9*ch*ch*side*side*s.batch
    return tasks

# ---- timing

def interleaved(tasks, s):
    "name -> seconds of one call, in each of `s.repeats` rounds; tasks are name -> (call, rounds it takes part in)."
    calls, times = {}, {name: [] for name in tasks}
    for name, (run, rounds) in tasks.items():
        if rounds == 1:                                                  # hopelessly slow: no warm-up either
            calls[name] = 1
            continue
        for _ in range(2):                                               # the first call also builds what is built once
            s.sync()
            start = time.perf_counter()
            run()
            s.sync()
            calls[name] = 1 if s.tiny else max(1, math.ceil(.2/(time.perf_counter()-start)))    # a window of a fifth of a second
    for i in range(s.repeats):
        for name, (run, rounds) in tasks.items():
            if i >= rounds: continue
            s.sync()
            start = time.perf_counter()
            for _ in range(calls[name]): run()
            s.sync()
            times[name].append((time.perf_counter()-start)/calls[name])
    return times

def network_rows(s, group, say):
    "Rows of training or sampling: a step's time, the ratio to diffusers in float32, and the ceiling's share."
    train = group == 'training'
    makers = (ours_training, diffusers_training, lucidrains_training), (ours_sampling, diffusers_sampling, lucidrains_sampling)
    ours, theirs, small = makers[0 if train else 1]
    nets = {OURS: lambda: UNet(**s.net), DIFFUSERS: lambda: diffusers_net(s), LUCIDRAINS: lambda: lucidrains_net(s)}
    low = s if s.bfloat16 else s.but(batch=1)                            # imitated bfloat16 is too slow for more
    plan = [(OURS, 'float32', layout, ours, dict(layout=layout), s) for layout in LAYOUTS]
    for layout in list(LAYOUTS)[:2 if s.bfloat16 else 1]: plan.append((OURS, 'bfloat16', layout, ours, dict(layout=layout, precision='bfloat16'), low))
    if train and s.compile: plan += [(OURS, p, 'compiled', ours, dict(precision=p, compiled=True), s) for p in DTYPES]
    plan += [(DIFFUSERS, 'float32', '', theirs, {}, s)]
    if train: plan += [(DIFFUSERS, 'float32', 'our optimizer, average and layout', theirs, dict(tuned=True), s)]
    if s.bfloat16: plan += [(DIFFUSERS, 'bfloat16', '', theirs, dict(precision='bfloat16'), s)]
    plan += [(LUCIDRAINS, 'float32', 'a smaller, different network', small, {}, s)]

    rows, tasks, operations = [], {}, {}
    for who, precision, note, make, kw, settings in plan:
        key = group, who, precision, note
        if why := s.missing.get(who):
            rows.append(dict(group=group, what=who, precision=precision, note=note, skipped=why))
            continue
        say(f"building {who}, {precision}{note and ', '}{note}")
        if who not in operations: operations[who] = count_operations(nets[who], train)
        slow = settings is low and low is not s
        if slow: note = f"{note}, imitated: no bfloat16 in this processor"
        tasks[key] = make(settings, **kw), 1 if slow else s.repeats
        rows.append(dict(group=group, what=who, precision=precision, note=note, key=key, batch=settings.batch, gflop=operations[who]/1e9))
    ceilings = {}
    for precision in DTYPES:
        settings = s if precision == 'float32' else low
        for name, (run, n) in ceiling_tasks(settings, precision, train).items():
            ceilings[precision, name] = n
            tasks['ceiling', precision, name] = run, 1 if settings is not s else s.repeats
    say(f"timing {len(tasks)} tasks for {group}, {s.repeats} rounds")
    times = interleaved(tasks, s)

    speeds = {p: {name: n/statistics.median(times['ceiling', p, name])/1e9 for (q, name), n in ceilings.items() if q == p} for p in DTYPES}
    best = {p: max((v, name) for name, v in speeds[p].items()) for p in DTYPES}
    calls = 1 if train else s.steps
    for row in rows:
        if 'key' not in row: continue
        row['times'] = [x/row['batch']/calls for x in times[row.pop('key')]]
        row['seconds'] = statistics.median(row['times'])                 # of an image, and of one step for it
        row['gflops'] = row['gflop']/row['seconds']
        row['utilization'] = row['gflops']/best[row['precision']][0]
    base = next((r['seconds'] for r in rows if r['what'] == DIFFUSERS and 'seconds' in r), None)
    for row in rows:
        if 'seconds' in row and base and row['what'] != LUCIDRAINS: row['ratio'] = base/row['seconds']
        if row['what'] == OURS and row['note'].startswith(('channels last', 'compiled')): row['target'] = TARGETS[group, row['precision']]
    for precision, (gflops, name) in best.items():
        rows.append(dict(group=group, what='ceiling: 3x3 convolution', precision=precision, note=name, gflops=gflops,
                         utilization=1., all=speeds[precision]))
    return rows

# ---- the other questions

def data_rows(s, say):
    "What images and noise cost, beside a training step."
    say("timing the data path")
    step = ours_training(s)
    place, like = torch.arange(s.batch), torch.zeros(s.batch, 3, 32, 32, device=s.device)
    batches = Batches(s.data.train.to(s.device), s.batch, flip=True, levels=s.data.levels)
    tasks = {'training step': step, 'images: index, flip, scale': lambda: batches(0), 't and noise': lambda: example_noise(0, place, 1000, like)}
    times = interleaved({k: (f, s.repeats) for k, f in tasks.items()}, s)
    whole = statistics.median(times.pop('training step'))
    medians = {k: statistics.median(v) for k, v in times.items()}
    return [dict(group='data', what=k, batch=s.batch, times=times[k], seconds=m, share=m/whole) for k, m in medians.items()]

KINDS = {  # words in the names of torch's operators -> what they do; the first that fits counts
    'convolution': ('conv',), 'matrix product': ('mm', 'matmul', 'linear', 'attention'), 'normalization': ('group_norm', 'GroupNorm'),
    'optimizer and average': ('adam', 'Adam', 'optimizer', 'Optimizer', 'lerp', '_foreach'), 'clipping': ('vector_norm',),
    'activation': ('silu', 'sigmoid'), 'random numbers, dropout': ('bernoulli', 'dropout', 'rand', 'normal_', 'bitwise', 'rshift'),
    'copies': ('copy', 'cat', 'clone', 'pad', 'upsample', 'fill_', 'zero'),
    'sums and products': ('aten::add', 'aten::mul', 'aten::div', 'aten::sum', 'aten::where')}

def share_rows(s, say):
    "Where the time of a training step goes: the part that is neither convolution nor matrix product, and what it is made of."
    variants = {(OURS, layout): (ours_training, dict(layout=layout)) for layout in LAYOUTS} | {(DIFFUSERS, ''): (diffusers_training, {})}
    rows = []
    for (who, note), (make, kw) in variants.items():
        if why := s.missing.get(who):
            rows.append(dict(group='share', what=who, note=note, skipped=why))
            continue
        say(f"profiling {who}{note and ', '}{note}")
        step = make(s, **kw)
        step()
        cuda = s.device.type == 'cuda'
        with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA]*cuda) as prof:
            step()
            s.sync()
        parts = dict.fromkeys([*KINDS, 'other'], 0.)
        for e in prof.key_averages():
            spent = e.self_device_time_total if cuda else e.self_cpu_time_total
            if cuda and e.device_type != torch.autograd.DeviceType.CPU: continue      # a kernel's time is also its operator's
            parts[next((kind for kind, words in KINDS.items() if any(w in e.key for w in words)), 'other')] += spent/1e6
        whole = sum(parts.values())
        parts = {k: v/whole for k, v in parts.items()}
        rows.append(dict(group='share', what=who, note=note, batch=s.batch, seconds=whole, parts=parts,
                         share=1-parts['convolution']-parts['matrix product']))
    return rows

MEMORY = {(OURS, 'float32, channels last'): (ours_training, {}), (OURS, 'float32, channels first'): (ours_training, dict(layout='channels first')),
          (OURS, 'bfloat16, channels last'): (ours_training, dict(precision='bfloat16')), (DIFFUSERS, 'float32'): (diffusers_training, {}),
          (LUCIDRAINS, 'float32, a smaller, different network'): (lucidrains_training, {})}

def peak_memory(key, settings, answer):
    "In a process of its own: bytes that building everything and taking two steps needs at most, beyond what any training needs."
    make, kw = MEMORY[key]
    images = torch.zeros(settings['batch'], 3, 32, 32, dtype=torch.uint8)
    s = Settings(**settings, data=Dataset('blank', images, images[:1], flip=True))
    if s.device.type == 'cuda':
        step = make(s, **kw)
        for _ in range(2): step()
        answer.send(torch.cuda.max_memory_allocated())
    else:
        import resource
        def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*(1 if sys.platform == 'darwin' else 1024)
        make(s.but(net=TINY), **kw)()                                    # libraries that are loaded late
        before = peak()
        step = make(s, **kw)
        for _ in range(2): step()                                        # Adam's memory is there from the second step on
        answer.send(peak()-before)
    answer.close()

def memory_rows(s, say):
    "Peak memory of training: network, gradients, optimizer, average and activations."
    if sys.platform == 'win32': return [dict(group='memory', what=OURS, note='', skipped='not measured on Windows')]
    context = multiprocessing.get_context('forkserver')                  # imports once, then a fresh process for each
    preload = ['ddpm_nbdev.train', 'torch.profiler', 'torch.utils.flop_counter']
    if not s.missing.get(DIFFUSERS) and not s.tiny:
        preload += ['diffusers.models.unets.unet_2d', 'diffusers.schedulers.scheduling_ddpm', 'diffusers.training_utils']
    context.set_forkserver_preload(preload)
    rows, small = [], dict(batch=s.memory_batch, net=s.net, device=s.device)
    for (who, note) in MEMORY:
        row = dict(group='memory', what=who, note=note, batch=s.memory_batch)
        if why := s.missing.get(who): rows.append(row | dict(skipped=why))
        elif note.startswith('bfloat16') and not s.bfloat16: rows.append(row | dict(skipped='no bfloat16 in this processor'))
        elif s.tiny and who != OURS: rows.append(row | dict(skipped='not with --tiny'))
        else:
            say(f"memory of {who}, {note}")
            ours, theirs = context.Pipe()
            p = context.Process(target=peak_memory, args=((who, note), small, theirs))
            p.start()
            theirs.close()
            try: row['bytes'] = ours.recv()
            except EOFError: row['skipped'] = 'the process that measured it failed'
            p.join()
            rows.append(row)
    base = next((r['bytes'] for r in rows if r['what'] == DIFFUSERS and 'bytes' in r), None)
    for r in rows:
        if base and 'bytes' in r and r['what'] != LUCIDRAINS: r['ratio'] = r['bytes']/base
        if r['what'] == OURS and r['note'] == 'float32, channels last': r['target'] = MEMORY_TARGET
    return rows

def process_rows(s, say):
    "Steps a second of the command line: one process, then two that share the batch (gloo on CPUs, nccl on GPUs)."
    if not s.dir and not s.tiny: return [dict(group='processes', what='ddpm_train cifar10', note='', skipped='needs --data')]
    if s.device.type == 'cuda' and torch.cuda.device_count() < 2:
        return [dict(group='processes', what='ddpm_train cifar10', note='', skipped='needs two GPUs')]
    steps, dataset = s.repeats+2, 'folder' if s.tiny else 'cifar10'
    options = f"--steps {steps} --batch-size {s.batch} --log-every 1 --quiet --device {s.device.type}".split()
    options += '--T 2 --samples 1 --sample-every 0'.split()              # little to do after training
    if s.dir: options += ['--data-dir', str(s.dir)]
    rows, torchrun = [], ['torch.distributed.run', '--standalone', '--nproc-per-node']
    with tempfile.TemporaryDirectory() as tmp:
        if s.tiny:
            for i in range(20): save_images(torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8), Path(tmp)/f"{i}.png", levels=256)
        name = f"folder:{tmp}" if s.tiny else dataset
        for n, launcher in ((1, []), (2, [*torchrun, '2', '-m'])):
            say(f"{n} process{'es'*(n > 1)} of the command line, {steps} steps")
            out, row = Path(tmp)/str(n), dict(group='processes', what=f"ddpm_train {dataset}", note=f"{n} process{'es'*(n > 1)}", batch=s.batch)
            if s.tiny and n > 1:
                rows.append(row | dict(skipped='not with --tiny'))
                continue
            command = [sys.executable, '-m', *launcher, 'ddpm_nbdev.cli', 'train', name, *options, '--out', str(out)]
            p = subprocess.run(command, text=True, capture_output=True)
            log = (out/'log.jsonl').read_text().splitlines() if (out/'log.jsonl').exists() else []
            seconds = [json.loads(line)['seconds'] for line in log]
            if p.returncode or len(seconds) != steps: row['skipped'] = f"it failed: {(p.stderr.strip().splitlines() or ['?'])[-1]}"
            else:
                row['times'] = [b-a for a, b in zip(seconds, seconds[1:])]                # without the first step, which warms up
                row['seconds'] = statistics.median(row['times'])
            rows.append(row)
    if all('seconds' in r for r in rows): rows[1]['ratio'] = rows[0]['seconds']/rows[1]['seconds']
    return rows

# ---- what is asked, and printing

class Settings:
    "What all measurements share."
    def __init__(self, **kw): self.__dict__ = kw
    def but(self, **kw): return Settings(**self.__dict__ | kw)

def percent(x): return '' if x is None else f"{100*x:.0f}%"

HEADS = {
    'training': ('training step', 'precision', '', 'ms/image', 'times diffusers', 'target', 'GFLOP/image', 'GFLOP/s', 'utilization', 'target'),
    'sampling': ('sampling step', 'precision', '', 'ms/image a step', 'times diffusers', 'target', 'GFLOP/image', 'GFLOP/s', 'utilization', 'target'),
    'data': ('data path', '', 'ms/batch', 'share of a training step'),
    'share': ('neither convolution nor matrix product', '', 'share', 'of what'),
    'memory': ('peak memory of training', '', 'MB', 'of diffusers', 'target'),
    'processes': ('command line', '', 'steps/s', 'times one process')}

def cells(r):
    "A row of the printed table."
    num = lambda key, fmt='{:.1f}', by=1: fmt.format(r[key]*by) if r.get(key) is not None else ''
    if 'skipped' in r:
        return [r['what'], *([r['precision']] if 'precision' in r else []), ', '.join(filter(None, (r['note'], f"skipped: {r['skipped']}")))]
    if r['group'] in ('training', 'sampling'):
        note = r['note'] + ' '*bool(r['note']) + (f"(batch {r['batch']}, {len(r['times'])}x)" if 'times' in r else '')
        ratio, use = r.get('target') or (None, None)
        return [r['what'], r['precision'], note, num('seconds', by=1e3), num('ratio', '{:.2f}'), f"{ratio:.2f}" if ratio else '',
                num('gflop'), num('gflops', '{:.0f}' if r['gflops'] > 20 else '{:.1f}'), percent(r['utilization']), percent(use)]
    if r['group'] == 'data': return [r['what'], f"batch {r['batch']}", num('seconds', '{:.2f}', 1e3), f"{100*r['share']:.2f}%"]
    if r['group'] == 'share':
        parts = sorted(((k, v) for k, v in r['parts'].items() if k not in ('convolution', 'matrix product')), key=lambda kv: -kv[1])
        return [r['what'], f"{r['note']}{r['note'] and ', '}batch {r['batch']}", percent(r['share']), ', '.join(f"{k} {100*v:.1f}%" for k, v in parts)]
    if r['group'] == 'memory':
        return [r['what'], f"{r['note']}, batch {r['batch']}", num('bytes', '{:,.0f}', 1e-6), num('ratio', '{:.2f}'), num('target', '{:.2f}')]
    return [r['what'], f"{r['note']}, batch {r['batch']}", f"{1/r['seconds']:.3f}", num('ratio', '{:.2f}')]

def print_table(group, rows, markdown):
    "One group of rows, as text or as Markdown."
    head = HEADS[group]
    body = [(c + ['']*len(head))[:len(head)] for c in map(cells, rows)]
    if markdown:
        for line in (head, ['---']*len(head), *body): print('| ' + ' | '.join(line) + ' |')
    else:
        width = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
        for line in (head, *body):
            padded = [v.ljust(w) if i < 3 or len(head) < 6 else v.rjust(w) for i, (v, w) in enumerate(zip(line, width))]
            print('  '.join(padded).rstrip())
    print(flush=True)

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', help="folder of CIFAR-10, or its archive (default: random images, which cost the same time)")
    p.add_argument('--batch', type=int, help="images per step (default: 8 on a CPU, the paper's 128 on a GPU)")
    p.add_argument('--repeats', type=int, default=5, help="rounds; the median counts (default 5)")
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    p.add_argument('--only', nargs='+', choices=GROUPS, default=GROUPS, metavar='GROUP', help=f"some of: {', '.join(GROUPS)}")
    p.add_argument('--json', help="also write everything here")
    p.add_argument('--markdown', action='store_true', help="print the tables as Markdown")
    p.add_argument('--compile', action='store_true', help="also time torch.compile (minutes to start; on by default on a GPU)")
    p.add_argument('--no-rivals', action='store_true', help="this package alone")
    p.add_argument('--memory-batch', type=int, help="images per step when memory is measured (default 32)")
    p.add_argument('--tiny', action='store_true', help="a narrow network and one round: does it all run?")
    a = p.parse_args(argv)
    device = torch.device(a.device)
    say = lambda what: print(f"# {what}", file=sys.stderr, flush=True)
    if a.data: data = load_dataset('cifar10', data_dir=a.data)
    else:
        images = torch.randint(0, 256, (2048, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        data = Dataset('random images', images, images[:1], flip=True)
    missing = {}
    for who, load in ((DIFFUSERS, import_diffusers), (LUCIDRAINS, import_lucidrains)):
        if a.no_rivals: missing[who] = 'not asked for'
        else:
            try: load()
            except Exception as e: missing[who] = f"cannot be imported ({' '.join(str(e).split())})"
    gpu = device.type == 'cuda'
    s = Settings(data=data, dir=a.data, device=device, batch=a.batch or (2 if a.tiny else 128 if gpu else 8), repeats=1 if a.tiny else a.repeats,
                 steps=10 if gpu else 2, net=TINY if a.tiny else FULL, tiny=a.tiny, missing=missing, bfloat16=bfloat16_in_hardware(device),
                 compile=a.compile or gpu and not a.tiny, memory_batch=a.memory_batch or (2 if a.tiny else 32),
                 sync=torch.cuda.synchronize if gpu else lambda: None)
    torch.manual_seed(0)
    facts = machine(device)
    versions = {m: importlib.metadata.version(m) for m in (DIFFUSERS, LUCIDRAINS) if m not in missing}
    where = f"{facts['gpu']}, " if gpu else ''
    head = [f"{where}{facts['cpu']} ({facts['cpu_capability']}, {facts['cores']} cores), {facts['threads']} threads, torch {facts['torch']}"
            + ''.join(f", {k} {v}" for k, v in versions.items()) + f", load {facts['load_average']} at the start",
            'bfloat16 arithmetic in hardware' if s.bfloat16 else 'NO bfloat16 arithmetic in this device: it is imitated, and slow',
            f"{'CIFAR-10' if a.data else 'RANDOM IMAGES (no --data)'}, batch {s.batch}, medians of {s.repeats} interleaved rounds"
            + (', NARROW NETWORK (--tiny): the numbers mean nothing' if a.tiny else '')]
    for line in head: print(f"- {line}" if a.markdown else line)
    print(flush=True)
    rows = []
    for group in GROUPS:
        if group not in a.only: continue
        make = {'data': data_rows, 'share': share_rows, 'memory': memory_rows, 'processes': process_rows}.get(group)
        new = make(s, say) if make else network_rows(s, group, say)
        print_table(group, new, a.markdown)
        rows += new
        if a.json:
            saved = {'machine': facts | {'rivals': versions}, 'images': data.name, 'batch': s.batch, 'repeats': s.repeats, 'rows': rows}
            Path(a.json).write_text(json.dumps(saved, indent=1) + '\n')

if __name__ == '__main__': main()
