#!/usr/bin/env python
"""What does it cost to get a batch of images to the loss?

Compares the package's way (one uint8 tensor in memory; index, flip and scale per batch) with
reading the files of each batch from disk. Nothing but the package is needed; the images are random.
"""
import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ddpm_nbdev.data import Batches
from ddpm_nbdev.formats import read_image


def seconds(f, repeat):
    "The fastest of some calls."
    best = float("inf")
    for i in range(repeat):
        start = time.perf_counter()
        f(i)
        best = min(best, time.perf_counter()-start)
    return best


def measure(name, n, c, size, batch_size, folder):
    "One line of the table."
    images = torch.randint(0, 256, (n, c, size, size), dtype=torch.uint8)
    batches, g = Batches(images, batch_size, flip=True), torch.Generator().manual_seed(0)
    files = []
    for i in range(batch_size):
        files.append(folder/f"{name}{i}.png")
        Image.fromarray(images[i].permute(1, 2, 0).squeeze(-1).numpy()).save(files[-1])
    def from_disk(i):
        pixels = torch.from_numpy(np.stack([read_image(p, size, c) for p in files]))
        return pixels.float().mul_(2/255).sub_(1)
    memory, disk = seconds(lambda i: batches(i), 50), seconds(from_disk, 5)
    epoch = seconds(lambda i: np.random.default_rng((0, i)).permutation(n), 5)
    print(f"{name:10} {n:7,} {batch_size:6} {n*c*size*size/1e6:9.1f} {memory*1e3:12.3f} "
          f"{disk*1e3:10.2f} {disk/memory:9.0f} {epoch*1e3:11.2f}")


def main():
    argparse.ArgumentParser(description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; milliseconds per batch")
    print(f"{'images':10} {'number':>7} {'batch':>6} {'uint8, MB':>9} {'from memory':>12} "
          f"{'from PNG':>10} {'ratio':>9} {'epoch order':>11}")
    with tempfile.TemporaryDirectory() as tmp:
        measure("digits", 1437, 1, 8, 64, Path(tmp))
        measure("digits", 1437, 1, 8, 128, Path(tmp))
        measure("CIFAR-10", 50_000, 3, 32, 128, Path(tmp))
        measure("256x256", 500, 3, 256, 64, Path(tmp))


if __name__ == "__main__": main()
