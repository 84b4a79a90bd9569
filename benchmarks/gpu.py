#!/usr/bin/env python
"""What ten minutes on a GPU show: is it right, how fast is it, and what does the paper's network
draw after so long? Each stage is a process of its own and writes its result when it has one, so
that a run that is cut short leaves what it had.

    python benchmarks/gpu.py --data DIR --minutes 10 --out OUT
    python benchmarks/gpu.py --data DIR --minutes 3 --out OUT2 --stages judge --run RUN
    python benchmarks/gpu.py --tiny --device cpu --out OUT      # does it all run? a minute on a CPU

DIR holds CIFAR-10 (its archive, or cifar-10-batches-bin); nothing is downloaded. Stages:

right  the tests marked gpu; meanwhile, what the later stages will ask torch.compile for
fast   steps a second, milliseconds a sampling step, memory, beside diffusers and the chip's limit
real   the preset `cifar10` for the time that is left, then weights and samples
judge  of a run that `real` made: bits/dim, the table of errors, earlier weights, interpolations
"""
import argparse
import contextlib
import gc
import json
import lzma
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rivals import (DIFFUSERS, FULL, OURS, TINY, diffusers_sampling, diffusers_training,
                    find_missing, for_sampling, ours_net, ours_sampling, ours_training,
                    rival_versions)
from safetensors.torch import save_file
from speed import images, machine
from timing import Settings, ceiling_tasks, count_operations, profiled

from ddpm_nbdev.data import epoch_order, load_dataset
from ddpm_nbdev.ddpm import draw_samples
from ddpm_nbdev.decoder import to_model_range, to_uint8
from ddpm_nbdev.files import read_log, write_whole
from ddpm_nbdev.interpolate import interpolate
from ddpm_nbdev.likelihood import evaluate_bits_per_dim, measure_mse
from ddpm_nbdev.noise import subseed
from ddpm_nbdev.run import train
from ddpm_nbdev.schedule import linear_schedule
from ddpm_nbdev.train import load_checkpoint, preset

ROOT = Path(__file__).parents[1]
STAGES = 'right', 'fast', 'real', 'judge'
BORROWED = dict(right=150, fast=120)       # seconds after which nothing new begins

def say(what): print(f"# {time.strftime('%T')} {what}", file=sys.stderr, flush=True)

def write(path, what):
    "A JSON file, whole or not at all."
    write_whole(Path(path), (json.dumps(what, indent=1) + '\n').encode())

def start(command, **kw):
    "A process with a group of its own."
    return subprocess.Popen(command, text=True, start_new_session=True, **kw)

def stop(process):
    "End a process and whatever it started."
    with contextlib.suppress(ProcessLookupError): os.killpg(process.pid, signal.SIGKILL)
    process.wait()

class Clock:
    "Seconds since the command began, over all its processes."
    def __init__(self, began, minutes): self.began, self.whole = began, 60*minutes
    def left(self): return self.whole - (time.time()-self.began)
    def at(self, seconds): return time.time() + min(seconds, self.left()-20)

@contextlib.contextmanager
def reported(results, name):
    "What goes wrong inside is a line of the result, not the end of the stage."
    start = time.perf_counter()
    try: yield
    except Exception as e:                                  # whatever a GPU may answer
        say(f"{name}: {type(e).__name__}: {e}")
        why = f"{type(e).__name__}: {' '.join(str(e).split())[:600]}"
        results.setdefault('failed', {})[name] = why
    finally:
        results.setdefault('seconds', {})[name] = round(time.perf_counter()-start, 2)
        gc.collect()
        if torch.cuda.is_available():
            with contextlib.suppress(Exception): torch.cuda.empty_cache()

def settings(a):
    "What rivals.py and timing.py want to know."
    device = torch.device(a.device)
    gpu = device.type == 'cuda'
    return Settings(data=images(a.data), dir=a.data, device=device, tiny=a.tiny,
                    net=TINY if a.tiny else FULL, batch=2 if a.tiny else 128,
                    repeats=1 if a.tiny else 5, steps=2 if a.tiny else 20, compile=False,
                    missing=find_missing(), bfloat16=True,
                    sync=torch.cuda.synchronize if gpu else lambda: None)

def tf32(on):
    "Products and convolutions of float32 in TF32?"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on

# ---- right

WARM = {  # what takes torch.compile a minute: each in a process of its own, for its cache
    'training': lambda s: ours_training(s, precision='bfloat16', compiled=True),
    'sampling': lambda s: ours_sampling(s.but(batch=2*s.batch, steps=1), 'bfloat16', compiled=True),
    'diffusers training': lambda s: diffusers_training(s, 'bfloat16', True, compiled=True),
    'diffusers sampling': lambda s: diffusers_sampling(s.but(batch=2*s.batch, steps=1), 'bfloat16',
                                                       compiled=True)}

def warm(a):
    "Compile one of WARM and forget it: the compiler's cache on the disk does not."
    run = WARM[a.warm](settings(a))
    for _ in range(2): run()

def right(a, clock):
    "The tests marked gpu, while the compiler works beside them."
    result, until = {'machine': machine(torch.device(a.device))}, clock.at(BORROWED['right'])
    warmers = {}
    for n in list(WARM)[:0 if a.tiny else None]:
        said = open(a.out/f"warm {n}.log", 'w+')
        again = [sys.executable, __file__, *a.again, '--warm', n]
        warmers[n] = start(again, stdout=said, stderr=said), said
    notes = a.out/'notes.jsonl'
    notes.unlink(missing_ok=True)
    env = os.environ | {'DDPM_GPU_NOTES': str(notes), 'DDPM_TEST_DEVICE': a.device,
                        'OMP_NUM_THREADS': '1' if a.tiny else '4'}
    tests = [sys.executable, '-m', 'pytest', '-q', '-rA', '--noconftest', '-p', 'no:cacheprovider',
             'tests/test_gpu.py', *(['-k', 'noise or needs'] if a.tiny else [])]
    began = time.perf_counter()
    with tempfile.TemporaryFile('w+') as said:
        p = start(tests, cwd=ROOT, env=env, stdout=said, stderr=subprocess.STDOUT)
        try: p.wait(timeout=max(5, until-time.time()))
        except subprocess.TimeoutExpired: stop(p)
        said.seek(0)
        out = said.read()
    noted = notes.read_text().splitlines() if notes.exists() else []
    result |= {'tests': [line for line in out.splitlines()
                         if line.startswith(('PASSED', 'FAILED', 'ERROR', 'SKIPPED'))],
               'end': out[-6000:], 'status': p.returncode,
               'notes': list(map(json.loads, noted)),
               'seconds_tests': round(time.perf_counter()-began, 1), 'compiled_beside': {}}
    notes.unlink(missing_ok=True)
    write(a.out/'right.json', result)
    for n, (w, said) in warmers.items():
        try: w.wait(timeout=max(.1, until-time.time()))
        except subprocess.TimeoutExpired: stop(w)
        said.seek(0)
        end = 'done' if w.returncode == 0 else f"status {w.returncode}: {said.read()[-800:]}"
        result['compiled_beside'][n] = end, round(time.perf_counter()-began, 1)
        said.close()
        Path(said.name).unlink()
        write(a.out/'right.json', result)
    say(f"tests: {out.strip().splitlines()[-1] if out.strip() else 'nothing'}")
    return p.returncode

# ---- fast

T, B = dict(precision='float32'), dict(precision='bfloat16')
COMPILED, RECORDED = B | dict(compiled=True), B | dict(recorded=True)
BOTH = COMPILED | RECORDED
PLAN = [  # (group, who, what is said of it, TF32?, options), the most wanted rows first
    ('training', OURS, 'bfloat16, compiled, recorded', True, BOTH),
    ('training', OURS, 'bfloat16, compiled', True, COMPILED),           # if that one failed
    ('training', OURS, 'bfloat16, recorded', True, RECORDED),
    ('sampling', OURS, 'bfloat16, compiled, recorded', True, BOTH),
    ('sampling', OURS, 'bfloat16, compiled', True, COMPILED),
    ('sampling', OURS, 'bfloat16, recorded', True, RECORDED),
    ('training', DIFFUSERS, 'bfloat16, our optimizer, average and layout, compiled', True,
     COMPILED | dict(tuned=True)),
    ('sampling', DIFFUSERS, 'bfloat16, channels last, compiled', True, COMPILED),
    ('training', OURS, 'bfloat16', True, B),
    ('training', DIFFUSERS, 'bfloat16', True, B),
    ('training', DIFFUSERS, 'bfloat16, our optimizer, average and layout', True,
     B | dict(tuned=True)),
    ('sampling', OURS, 'bfloat16', True, B),
    ('sampling', DIFFUSERS, 'bfloat16', True, B),
    ('limits',),
    ('training', OURS, 'TF32', True, T), ('training', OURS, 'float32', False, T),
    ('training', OURS, 'bfloat16, channels first', True, B | dict(layout='channels first')),
    ('training', DIFFUSERS, 'float32', False, T),
    ('sampling', OURS, 'TF32', True, T), ('sampling', DIFFUSERS, 'TF32', True, T)]
PROFILED = 'bfloat16, compiled, recorded', 'bfloat16'      # notes of the rows that are looked into
MAKERS = {('training', OURS): ours_training, ('training', DIFFUSERS): diffusers_training,
          ('sampling', OURS): ours_sampling, ('sampling', DIFFUSERS): diffusers_sampling}

def rounds_of(run, s, seconds=.2):
    "Seconds of a call: three to warm up, then rounds of as many as fit."
    for _ in range(1 if s.tiny else 3): run()
    s.sync()
    start = time.perf_counter()
    run()
    s.sync()
    n = 1 if s.tiny else max(1, round(seconds/(time.perf_counter()-start)))
    times = []
    for _ in range(s.repeats):
        start = time.perf_counter()
        for _ in range(n): run()
        s.sync()
        times.append((time.perf_counter()-start)/n)
    return times

def measured(group, who, note, t, kw, s):
    "A row: seconds of a training step, or of one step of a batch's chain; memory."
    tf32(t)
    gpu = s.device.type == 'cuda'
    if gpu: torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    run = MAKERS[group, who](s, **kw)
    times = [v/(1 if group == 'training' else s.steps) for v in rounds_of(run, s)]
    row = dict(group=group, what=who, note=note, options=kw, batch=s.batch, times=times,
               seconds=statistics.median(times), ready_after=round(time.perf_counter()-start, 1))
    if gpu: row['bytes'] = torch.cuda.max_memory_allocated()
    if who == OURS and note in PROFILED: row['kernels'] = kernels(run, s)
    say(f"{group}, {who}, {note}: {1e3*row['seconds']:.2f} ms")
    return row

def limits(s):
    "What the chip does at best: operations a second, bytes a second."
    found = {}
    for train in (True, False):
        for name, (run, operations) in ceiling_tasks(s, 'bfloat16', train).items():
            what = f"{'training' if train else 'forward'}, {name}"
            found[what] = operations/min(rounds_of(run, s, .05))
    n = 256 if s.tiny else 8192
    a, b = (torch.randn(n, n, device=s.device, dtype=torch.bfloat16) for _ in range(2))
    found[f"matrix product {n}"] = 2*n**3/min(rounds_of(lambda: a @ b, s, .05))
    x = torch.empty(2**20 if s.tiny else 2**30, device=s.device, dtype=torch.uint8)
    y = torch.empty_like(x)
    found['bytes copied'] = 2*len(x)/min(rounds_of(lambda: y.copy_(x), s, .05))
    return found

def kernels(run, s):
    "Where one call's time goes: the longest kernels, milliseconds and how many."
    gpu = s.device.type == 'cuda'
    rows = [(e.key[:110], (e.self_device_time_total if gpu else e.self_cpu_time_total)/1e3, e.count)
            for e in profiled(run, s) if not gpu or e.device_type != torch.autograd.DeviceType.CPU]
    rows.sort(key=lambda r: -r[1])
    return dict(total_ms=sum(r[1] for r in rows), launches=sum(r[2] for r in rows),
                longest=rows[:45])

def fast(a, clock):
    "Rows until the time is over, the most wanted ones first; what is fastest is written down."
    s, until = settings(a), clock.at(BORROWED['fast'])
    big = s.but(batch=2*s.batch)
    versions, torch.backends.cudnn.benchmark = rival_versions(s.missing), True
    result = {'machine': machine(s.device) | versions, 'rows': [], 'missing': s.missing}
    def store(): write(a.out/'fast.json', result)
    for group, *row in PLAN:
        name = ', '.join([group, *row[:2]])
        if row and row[0] in s.missing: continue
        if row and a.tiny and {'compiled', 'recorded'} & row[3].keys(): continue
        whole = f"{name}, recorded"                         # the same and more, if it ran
        if row and row[3] == COMPILED and whole in result.get('seconds', {}) \
           and whole not in result.get('failed', {}): continue
        if time.time() > until:
            result.setdefault('no_time_for', []).append(name)
            continue
        with reported(result, name):
            if group == 'limits': result['limits'] = limits(s)
            else: result['rows'].append(measured(group, *row, s if group == 'training' else big))
        store()
    result['gflop'] = {k: count_operations(lambda: ours_net(s), k == 'training')/1e9
                       for k in ('training', 'sampling')}
    store()

def best(fast_result, group):
    "The fastest of our own rows of a group, or the plainest where none was measured."
    rows = [r for r in fast_result.get('rows', []) if r['group'] == group and r['what'] == OURS]
    return min(rows, key=lambda r: r['seconds'])['options'] if rows else B

# ---- real

def planes(weights):
    "bfloat16 tensors as two strings of bytes: sign and most of the exponent; the rest."
    flat = torch.cat([weights[k].flatten() for k in sorted(weights)]).contiguous()
    pairs = flat.view(torch.uint8).reshape(-1, 2)                       # little endian
    return pairs[:, 1].contiguous().numpy().tobytes(), pairs[:, 0].contiguous().numpy().tobytes()

def squeeze(part): return lzma.compress(part, preset=1)

def pack(model, parts=4):
    "The weights rounded to bfloat16, then packed without loss, in as many files: bytes each."
    weights = {k: v.detach().to('cpu', torch.bfloat16) for k, v in model.state_dict().items()}
    high, low = planes(weights)
    n = -(-len(high)//16)
    chunks = [high[i:i+n] for i in range(0, len(high), n)]
    with ThreadPoolExecutor(os.cpu_count()) as pool: small = list(pool.map(squeeze, chunks))
    head = json.dumps({'shapes': {k: list(weights[k].shape) for k in sorted(weights)},
                       'chunks': [len(c) for c in small]}).encode()
    whole = len(head).to_bytes(8, 'little') + head + b''.join(small) + low
    n = -(-len(whole)//parts)
    return [whole[i*n:(i+1)*n] for i in range(parts)]

def unpack(parts):
    "name -> bfloat16 tensor, of what `pack` made."
    whole = b''.join(parts)
    n = int.from_bytes(whole[:8], 'little')
    head, at, high = json.loads(whole[8:8+n]), 8+n, b''
    for k in head['chunks']:
        high += lzma.decompress(whole[at:at+k])
        at += k
    both = (torch.frombuffer(bytearray(v), dtype=torch.uint8) for v in (whole[at:], high))
    pairs = torch.stack(list(both), 1)
    flat, weights, at = pairs.contiguous().view(torch.bfloat16).flatten(), {}, 0
    for k, shape in head['shapes'].items():
        n = torch.Size(shape).numel()
        weights[k] = flat[at:at+n].reshape(shape).clone()
        at += n
    return weights

def real_settings(a, options):
    "The preset, its warm-up and average cut to a shorter run; what ends it is the clock."
    if a.tiny:
        return preset('cifar10', steps=4, batch_size=2, model_args=TINY, log_every=1, warmup=2,
                      ema_warmup=True, ema_decay=.9, checkpoint_every=2, keep_every=2,
                      sample_every=0)
    return preset('cifar10', warmup=1000, ema_decay=.9995, ema_warmup=True, checkpoint_every=5000,
                  keep_every=5000, log_every=50, sample_every=0,
                  precision=options.get('precision', 'bfloat16'),
                  compile=options.get('compiled', False), cuda_graph=options.get('recorded', False))

def train_for(seconds, cfg, run, a, data):
    "Train until the time is over, then stop as Ctrl-C does: saved, and able to go on."
    def too_early(signum, frame): raise KeyboardInterrupt      # before `train` listens, or after
    signal.signal(signal.SIGTERM, too_early)
    alarm = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM))
    alarm.daemon = True
    alarm.start()
    try: return train(cfg, run, a.device, data=data, progress=False, overwrite=True)
    except KeyboardInterrupt as e:
        say(e or "stopped")
        return load_checkpoint(run, device=a.device)
    finally: alarm.cancel()

AFTERWARDS = 55                     # seconds for weights, the compiler once more, 256 samples

def real(a, clock):
    "Train until little time is left, then weights and samples."
    file = a.out/'fast.json'
    fast_result = json.loads(file.read_text()) if file.exists() else {}
    result = {'machine': machine(torch.device(a.device)), 'data': a.note}
    data = load_dataset('cifar10', data_dir=a.data) if a.data else images(None)
    options = best(fast_result, 'training')
    tf32(True)
    torch.backends.cudnn.benchmark = True                # of all rows and of the run
    run, began = Path(a.run or a.out/'run'), time.time()
    ddpm, failures = None, []
    for options in ([options] if a.tiny else [options, COMPILED, B]):   # plainer if it fails
        cfg = real_settings(a, options)
        if failed := result.pop('failed', None): failures.append(failed)
        if a.steps: cfg = replace(cfg, steps=a.steps)
        result |= {'config': dict(cfg.__dict__), 'training_options': options,
                   'failed_before': failures}
        time_left = max(5, clock.left() - AFTERWARDS)
        say(f"training for {time_left:.0f} s, {options}")
        with reported(result, 'training'): ddpm = train_for(time_left, cfg, run, a, data)
        if ddpm: break
    if not ddpm:
        write(a.out/'real.json', result)
        return 1
    result |= {'seconds_training': time.time()-began, 'log': read_log(run)}
    if torch.cuda.is_available(): result['bytes'] = torch.cuda.max_memory_allocated()
    write(a.out/'real.json', result)
    with reported(result, 'weights'):
        for i, part in enumerate(pack(ddpm.model)): (a.out/f"weights.{i}").write_bytes(part)
        result['bytes_packed'] = [(a.out/f"weights.{i}").stat().st_size for i in range(4)]
    write(a.out/'real.json', result)
    pictures, n = {}, 4 if a.tiny else 256
    quick = best(fast_result, 'sampling')
    with reported(result, 'samples'):
        drawing = for_sampling(ddpm, **quick)
        drawing.model.eval()
        if a.tiny: drawing = replace(drawing, sched=short(drawing))
        with torch.no_grad():                            # what happens once is not timed
            drawing.p(torch.zeros(n, *ddpm.shape, device=ddpm.device),
                      torch.ones(n, dtype=torch.int64, device=ddpm.device))
        drew = time.perf_counter()
        pictures['samples'] = draw_samples(drawing, n, seed=0)
        result |= {'seconds_samples': time.perf_counter()-drew, 'samples': n,
                   'sampling_options': quick}
        save_file(pictures, a.out/'pictures.safetensors')
        write(a.out/'real.json', result)
    with reported(result, 'nearest'):
        both = torch.cat([data.train, data.train.flip(-1)])              # training flips
        flat = both.flatten(1).to(a.device).float()
        near = torch.stack([(flat-v.to(a.device).flatten().float()).square().mean(1).min(0)[1]
                            for v in pictures['samples']]).cpu()
        apart = (both[near].float()-pictures['samples'].float()).square().flatten(1).mean(1).sqrt()
        pictures |= {'nearest': both[near], 'nearest_rmse': apart}
        save_file(pictures, a.out/'pictures.safetensors')
    write(a.out/'real.json', result)

def short(ddpm):
    "A schedule of four steps, for --tiny."
    return linear_schedule(4, .05, .9).to(ddpm.device)

# ---- judge

class Case(Settings):
    "A run to be judged: `ddpm`, the faster `low`, `data`, and what was found so far."
    def store(self):
        "What there is by now; entry 0 of a table of t is no number."
        whole = {k: v.nan_to_num(0) if v.is_floating_point() else v
                 for k, v in self.pictures.items()}
        save_file(whole, self.out/'judged.safetensors')
        write(self.out/'judge.json', self.result)

def loaded(c, path, **kw):
    "The DDPM of a run or checkpoint, and the same as one draws from it."
    ddpm = load_checkpoint(path, device=c.device, **kw)
    if c.tiny: ddpm = replace(ddpm, sched=short(ddpm))
    return ddpm, for_sampling(ddpm, 'bfloat16', recorded=c.device.type == 'cuda')

def bits(c, model, n, name):
    "Every term of the bound for n test images."
    began, g = time.perf_counter(), torch.Generator().manual_seed(subseed(0, 3))
    places = epoch_order(len(c.data.test), 0, 0)[:n]
    r = evaluate_bits_per_dim(model, c.data.test[places], g, index=places, batch_size=c.T)
    names = 'n', 'total', 'total_error', 'L_T', 'L_mid', 'L_0'
    c.result[name] = {k: getattr(r, k) for k in names} | {'seconds': time.perf_counter()-began}
    return r

def all_bits(c):
    r = bits(c, c.low, c.n, 'test')
    c.pictures |= {f"test_{k}": getattr(r, k).cpu() for k in ('terms', 'errors', 'mse')}

def bits_in_float32(c):
    tf32(False)
    for name, model in (('bfloat16', c.low), ('float32', c.ddpm)):
        bits(c, model, min(16, c.n), f"test_few_{name}")
    tf32(True)

def table_of_errors(c):
    places = epoch_order(len(c.data.train), 0, 1)[:c.n]
    c.pictures['mse'] = measure_mse(c.low, c.data.train[places], batch_size=c.n)

def whole_chain(c):
    "x_t and the guess of x_0 at twelve moments."
    moments = {c.T, 1, *(round(c.T*f) for f in (.9, .8, .7, .6, .5, .4, .3, .2, .1, .05))}
    g, seen = torch.Generator(c.device).manual_seed(1), []
    for t, *pair in c.low.chain(4 if c.tiny else 16, g):
        if t in moments: seen.append((t, *(to_uint8(v.clamp(-1, 1)).cpu() for v in pair)))
    ts, xs, x0s = zip(*seen)
    c.pictures |= {'chain_t': torch.tensor(ts), 'chain_x': torch.stack(xs),
                   'chain_x0': torch.stack(x0s)}

def interpolations(c):
    ends = to_model_range(c.data.test[torch.arange(8) % len(c.data.test)]).to(c.device)
    for t in (c.T//2, 3*c.T//4):
        out = interpolate(c.low, ends[:4], ends[4:], t, [i/8 for i in range(9)],
                          torch.Generator().manual_seed(0))
        c.pictures[f"interpolation_{t}"] = to_uint8(out.flatten(0, 1)).reshape(out.shape).cpu()
    c.pictures['interpolated'] = to_uint8(ends).cpu()

def shared_latents(c):
    "Samples that part from one chain at four moments."
    g = torch.Generator(c.device).manual_seed(2)
    path = {c.T: torch.randn(1, *c.ddpm.shape, generator=g, device=c.device)}
    for t, xt, _ in c.low.chain(xT=path[c.T], generator=g): path[t-1] = xt
    for t in (c.T, 3*c.T//4, c.T//2, c.T//4):
        out = path[t].expand(2 if c.tiny else 8, *c.ddpm.shape).contiguous()
        for _, out, _ in c.low.chain(xT=out, generator=g, start=t): pass
        c.pictures[f"shared_{t}"] = to_uint8(out.clamp(-1, 1)).cpu()

def samples_of(c, path):
    "Of an earlier checkpoint; of the first one with the weights themselves, too."
    step, n = int(path.stem), 4 if c.tiny else 64
    c.pictures[f"samples_{step}"] = draw_samples(loaded(c, path)[1], n, seed=0)
    if 'raw' in c.result: return
    c.pictures[f"raw_{step}"] = draw_samples(loaded(c, path, ema=False)[1], n, seed=0)
    c.result['raw'] = step

PARTS = {'bits': all_bits, 'bits in float32': bits_in_float32, 'table of errors': table_of_errors,
         'chain': whole_chain, 'interpolations': interpolations, 'shared latents': shared_latents}

def judge(a, clock):
    "Numbers and pictures of a run that `real` made, the most wanted ones first."
    run, device = Path(a.run or a.out/'run'), torch.device(a.device)
    data = load_dataset('cifar10', data_dir=a.data) if a.data else images(None)
    c = Case(out=a.out, tiny=a.tiny, device=device, data=data, pictures={},
             result={'machine': machine(device)}, n=min(2 if a.tiny else 500, len(data.test)))
    tf32(True)
    c.ddpm, c.low = loaded(c, run)
    c.low.model.eval()
    c.T = c.ddpm.sched.T
    earlier = {f"samples of {p.stem}": partial(samples_of, path=p)
               for p in sorted((run/'checkpoints').glob('*.safetensors'))}
    for name, part in (PARTS | earlier).items():
        if clock.left() < 15: break
        with reported(c.result, name): part(c)
        c.store()

# ---- the command

DO = dict(right=right, fast=fast, real=real, judge=judge)

def parser():
    "The command line."
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', help="folder of CIFAR-10, or its archive (default: random images)")
    p.add_argument('--minutes', type=float, default=10., help="time for all stages together")
    p.add_argument('--out', type=Path, required=True, help="folder of the results")
    p.add_argument('--stages', nargs='+', choices=STAGES, default=list(STAGES[:3]))
    p.add_argument('--run', help="folder of the training run (default: OUT/run)")
    p.add_argument('--steps', type=int, help="updates of `real` (default: what the time allows)")
    p.add_argument('--note', default='', help="what to say of the data")
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    p.add_argument('--tiny', action='store_true',
                   help="a narrow network, few steps: does it all run?")
    p.add_argument('--began', type=float, help=argparse.SUPPRESS)
    p.add_argument('--alone', choices=STAGES, help=argparse.SUPPRESS)
    p.add_argument('--warm', choices=list(WARM), help=argparse.SUPPRESS)
    return p

def main(argv=None):
    "Each stage in a process of its own."
    argv = sys.argv[1:] if argv is None else argv
    a = parser().parse_args(argv)
    a.began = a.began or time.time()
    a.again = [*argv, *([] if '--began' in argv else ['--began', str(a.began)])]
    clock = Clock(a.began, a.minutes)
    a.out.mkdir(parents=True, exist_ok=True)
    if a.warm: return warm(a)
    if a.alone: return DO[a.alone](a, clock) or 0
    status = {}
    for stage in a.stages:
        limit = clock.left() - 3
        say(f"{stage}: {clock.left():.0f} s left")
        if limit < 5: break
        p = start([sys.executable, __file__, *a.again, '--alone', stage])
        try: status[stage] = p.wait(timeout=limit)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as e:
            status[stage] = 'stopped'
            if isinstance(e, KeyboardInterrupt): break
        finally: stop(p)                                 # and what it left behind
    status |= {stage: 'not begun' for stage in a.stages if stage not in status}
    say(f"done: {status}")
    return int(any(status.values()))

if __name__ == '__main__': sys.exit(main())
