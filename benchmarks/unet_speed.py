"""Images per second through the U-Nets: forward (sampling) and forward + backward (training).

    python benchmarks/unet_speed.py                       # digits, on the GPU if there is one
    python benchmarks/unet_speed.py --net cifar10 --batch-size 8
"""
import argparse
import time

import torch

from ddpm_nbdev.unet import cifar10_unet, digits_unet, image256_unet

NETS = {'digits': digits_unet, 'cifar10': cifar10_unet, 'image256': image256_unet}

def best_seconds(f, seconds, sync):
    """Shortest time of one call, over windows of several calls.

    It is what the machine can do when nothing disturbs it.
    """
    f()
    sync()
    start = time.perf_counter()
    f()
    sync()
    calls = max(1, round(.25/(time.perf_counter()-start)))
    best, end = float('inf'), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(calls): f()
        sync()
        best = min(best, (time.perf_counter()-start)/calls)
    return best

def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--net', choices=NETS, default='digits')
    p.add_argument('--batch-size', type=int, default=64)
    p.add_argument('--seconds', type=float, default=5., help='time for each number')
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    a = p.parse_args()
    cuda = a.device.startswith('cuda')
    sync = torch.cuda.synchronize if cuda else (lambda: None)
    where = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    net = NETS[a.net]()
    size, channels, n = net.config['resolution'], net.config['in_channels'], a.batch_size
    parameters = sum(map(torch.numel, net.parameters()))
    print(f"{a.net}, batch {n}, {channels}x{size}x{size}, {parameters:,} parameters, {where}")
    for layout in (torch.contiguous_format, torch.channels_last):
        net = net.to(a.device, memory_format=layout)
        x = torch.randn(n, channels, size, size, device=a.device).contiguous(memory_format=layout)
        t = torch.randint(1, 1001, (n,), device=a.device)
        def train():
            net.zero_grad()
            (net(x, t)-x).pow(2).mean().backward()
        def sample():
            with torch.inference_mode(): net(x, t)
        for what, f, mode in (('forward', sample, False), ('forward + backward', train, True)):
            net.train(mode)
            s = best_seconds(f, a.seconds, sync)
            print(f"{str(layout).split('.')[1]:18s} {what:18s} {n/s:10.1f} images/s "
                  f"{1000*s:9.1f} ms a batch", flush=True)

if __name__ == '__main__': main()
