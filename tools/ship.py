#!/usr/bin/env python
"""Make a small folder of a run, such as those in ddpm_nbdev/weights.

    python tools/ship.py runs/cifar10_small shipped/cifar10_small --pixels 600000 --first 1
    ddpm_sample shipped/cifar10_small
"""
import copy
import shutil
from dataclasses import replace
from pathlib import Path

from ddpm_nbdev.calibration import calibrate, save_calibration
from ddpm_nbdev.commands import command
from ddpm_nbdev.data import epoch_order
from ddpm_nbdev.ddpm import DDPM
from ddpm_nbdev.likelihood import measure_mse
from ddpm_nbdev.models import _data_of
from ddpm_nbdev.progressive import fingerprints


@command(words={"run": "RUN", "out": "FOLDER"})
def ship(
    run:str,  # folder of a run, or of a model (then with --dataset)
    out:str,  # a new or empty folder
    dataset:str=None,  # what it was trained on, where the run does not say it
    data_dir:str=None,  # where its images are (default: DDPM_DATA, or the cache)
    images:int=128,  # training images on which the squared error at each t is measured
    pixels:int=300_000,  # how many the tables should see at least
    first:int=None,  # smallest t of the tables (default: T/250; photographs need 1)
    exact:bool=False,  # leave the weights in float32
):
    """The averaged weights of a run rounded to float16, with what the fitting variance (page 14), short chains and files (14a, 16) need,
    measured on training images with the weights as rounded."""
    ddpm, out = DDPM.load(run), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())): raise FileExistsError(f"{out} is there and not empty: name another folder")
    train = _data_of(run, dataset, ddpm, data_dir).train
    stored = copy.deepcopy(ddpm.model)
    if not exact: stored.half()
    ddpm = replace(ddpm, model=copy.deepcopy(stored).float())
    some, others = epoch_order(len(train), 0, 0)[:images], epoch_order(len(train), 0, 1)
    ddpm = replace(ddpm, mse=measure_mse(ddpm, train[some], index=some))
    tables = calibrate(ddpm, train[others], pixels=pixels, first=first).calibration
    replace(ddpm, model=stored).save(out)
    save_calibration(tables, out, weights=fingerprints(ddpm)[0].hex())
    if (log := Path(run)/"log.jsonl").exists(): shutil.copyfile(log, out/log.name)
    size = sum(f.stat().st_size for f in out.iterdir())
    print(f"{out}: {size/1e6:.1f} MB; its README is yours to write")


if __name__ == "__main__": ship()
