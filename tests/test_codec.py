"The codec of section 4.3. First its entropy coder: what random programs, force and damage do to it."
import math
import random

import numpy as np
import pytest
import torch

from ddpm_nbdev.ans import Bins, CodecError, Stack, pop_bins, pop_table, push_bins, push_table
from ddpm_nbdev.integers import TOTAL, increasing, normal_cdf

LOW, HIGH = 1 << 64, 1 << 96


def state(stack): return stack.head, list(stack.words)


def random_stack(r, n=12):
    "Any stack: heads of every length, and those at the ends of what a head may be."
    head = r.choice([LOW, HIGH-1, LOW + r.getrandbits(20), HIGH-1 - r.getrandbits(20), r.randrange(LOW, 1 << r.randint(65, 96))])
    return Stack([r.choice([0, TOTAL-1, r.getrandbits(32)]) for _ in range(n)], head)


def random_bins(r, rng, n):
    "Places of all widths, near and far, with and without an escape."
    ratio = 2.**rng.uniform(-4, 10, n) if r.random() < .7 else r.choice([2**-8, 2**-4, .5, 1., 1024., 4096.])
    return Bins(rng.integers(-64 << r.randint(1, 30), 64 << r.randint(1, 30), n), ratio, escape=r.random() < .5)


def random_table(r, rng, n):
    levels = r.choice([1, 2, 17, 256])
    inner = np.sort(rng.integers(0, TOTAL+1, (n, levels-1)), 1)
    return increasing(inner if r.random() < .5 else inner*rng.integers(0, 2, (n, 1)), levels)


@pytest.mark.parametrize("seed", range(40))
def test_programs_of_pushes_and_pops_are_undone(seed):
    "Whole arrays, drawn (popped) or given (pushed), in any order: undone in reverse, the stack is as it was."
    r, rng = random.Random(seed), np.random.default_rng(seed)
    stack = Stack([r.getrandbits(32) for _ in range(3000)], random_stack(r).head)
    before, undo = state(stack), []
    for _ in range(12):
        n = r.choice([0, 1, 5, 64])
        model = random_bins(r, rng, n) if r.random() < .6 else random_table(r, rng, n)
        push, pop = (push_bins, pop_bins) if isinstance(model, Bins) else (push_table, pop_table)
        if r.random() < .5: undo.append((push, model, pop(stack, model)))
        else:
            if push is push_bins:
                values = model.low + rng.integers(0, 1 << 62, n) % model.count
                if model.escape: values += rng.integers(-2, 3, n)*r.choice([0, 1, 100, 10**6, 10**8])
            else: values = rng.integers(0, model.shape[1]-1, n)
            push(stack, model, values)
            undo.append((pop, model, values))
        assert LOW <= stack.head < HIGH and all(0 <= w < TOTAL for w in stack.words)
    for back, model, values in reversed(undo):
        if back in (pop_bins, pop_table): assert (back(stack, model) == values).all()
        else: back(stack, model, values)
    assert state(stack) == before


@pytest.mark.parametrize("seed", range(4))
def test_single_steps_at_the_limits(seed):
    "25,000 steps from heads at both ends of their range, with intervals of one part and of all but one."
    r = random.Random(seed)
    for _ in range(25_000):
        stack = random_stack(r, 2)
        before = state(stack)
        start = r.choice([0, 1, TOTAL-1, r.getrandbits(32)])
        freq = r.choice([1, TOTAL-start, r.randint(1, TOTAL-start)])
        bits = stack.bits
        stack.push(start, freq)
        assert LOW <= stack.head < HIGH and start <= stack.peek() < start+freq
        assert abs(stack.bits-bits - math.log2(TOTAL/freq)) < 1e-9
        stack.drop(start, freq)
        assert state(stack) == before
        point = stack.peek()
        start = r.choice([0, point, r.randint(0, point)])
        freq = r.choice([point-start+1, TOTAL-start, r.randint(point-start+1, TOTAL-start)])
        stack.drop(start, freq)
        assert LOW <= stack.head < HIGH
        stack.push(start, freq)
        assert state(stack) == before


@pytest.mark.parametrize("escape", [True, False])
@pytest.mark.parametrize("ratio", [2**-8, .3, 1., 700.])
def test_every_point_is_popped_to_what_is_pushed_there(ratio, escape):
    "By force: points at both ends of all intervals, the escape's too, with every word below it."
    bins = Bins(np.array([12345]), ratio, escape)
    n = bins.low + np.arange(0, bins.count[0], max(1, bins.count[0]//50))
    edges = np.concatenate([bins.edges(n), bins.edges(n+1), [TOTAL-2, TOTAL-1]])
    for point in {int(p) for e in edges for p in (e-1, e, e+1) if 0 <= p < TOTAL}:
        for word in (0, 1, 2, TOTAL-2, TOTAL-1, 123456789):
            stack = Stack([5, word], (77 << 64) + (word << 32) + point)
            before = state(stack)
            value = pop_bins(stack, bins)
            far = bins.outside(value)[0]
            assert (far >= 0) == (escape and point == TOTAL-1)
            if far < 0: assert bins.edges(value)[0] <= point < bins.edges(value+1)[0]
            push_bins(stack, bins, value)
            assert state(stack) == before


def test_an_escape_costs_two_words_and_reaches_32_bits():
    bins = Bins(np.array([0]), 2.)
    low, high = int(bins.low[0]), int(bins.low[0]+bins.count[0])
    for value in (low-1, high, low-(1 << 31), high+(1 << 31)-1):
        stack = Stack.seeded(5)
        bits = stack.bits
        push_bins(stack, bins, np.array([value]))
        assert stack.bits-bits == pytest.approx(64, abs=1e-9)
        assert pop_bins(stack, bins).tolist() == [value] and stack.is_seed(5)
    for value in (low-(1 << 31)-1, high+(1 << 31), 1 << 55, -1 << 55):
        with pytest.raises(CodecError, match="too far"): push_bins(stack, bins, np.array([value]))
        assert stack.is_seed(5)
    with pytest.raises(CodecError, match="too far"): push_bins(stack, Bins(np.array([0]), 2., escape=False), np.array([high]))
    assert stack.is_seed(5)


def test_bins_do_not_depend_on_company():
    "The same intervals alone, in part or in reverse: reader and writer may cut their batches differently."
    rng = np.random.default_rng(0)
    center, ratio = rng.integers(-10**6, 10**6, 1001), 2.**rng.uniform(-1, 8, 1001)
    n = np.rint(center/64 + ratio*rng.standard_normal(1001)).astype(np.int64)
    whole = Bins(center, ratio).edges(n)
    for part in (slice(0, 1), slice(3, 500), slice(None, None, -1), slice(1, None, 7)):
        assert (Bins(center[part], ratio[part]).edges(n[part]) == whole[part]).all()


def test_known_words():
    "A file of today is read by the version of tomorrow: seed, intervals and bytes as they were when this was written."
    stack = Stack.seeded(3)
    assert stack.words == [3992888076, 412432357, 2806767227] and stack.head == 22662113234675709661
    stack = Stack.seeded(40, key=9)
    bins = Bins(np.arange(-3, 4)*1000, 2.**np.arange(-1, 6))
    drawn = pop_bins(stack, Bins(np.arange(7)*100, 3., escape=False))
    push_bins(stack, bins, np.array([-50, -31, -15, 0, 14, 45, 4000]))
    push_table(stack, increasing(normal_cdf(np.arange(-3, 4)[None] << 15), 8), np.array([2]))
    assert drawn.tolist() == [0, 5, 5, 10, 3, 8, 15] and stack.to_bytes().hex() == "5a78d53feb61e71df1030200f61c4a93631c00000eb11e78"


@pytest.fixture(scope="module")
def written():
    "Draws and symbols as a codec mixes them; the bytes, and how to read them."
    rng = np.random.default_rng(1)
    stack, p, q = Stack.seeded(200, key=3), [], []
    for _ in range(40):
        q.append(Bins(rng.integers(-999, 999, 16), 2., escape=False))
        drawn = pop_bins(stack, q[-1])
        p.append(Bins(rng.integers(-999, 999, 16), 8.))
        push_bins(stack, p[-1], np.rint(p[-1].center/64 + 8*rng.standard_normal(16)).astype(np.int64))
        q[-1] = q[-1], drawn
    return stack.to_bytes(), stack.least, p, q


def read(data, below, p, q, key=3):
    "True if the file was sound: draws as they were, and the seed at the end."
    stack, same = Stack.from_bytes(data, below, key), True
    for model, (noise, drawn) in zip(reversed(p), reversed(q)):
        pop_bins(stack, model)
        push_bins(stack, noise, drawn)   # a real decoder computes the noise's bins from what it popped
    return stack.is_seed(200, key)


def test_a_sound_file_ends_at_its_seed(written):
    data, below, p, q = written
    assert read(data, below, p, q) and below < 200
    assert len(data) == 12 + 4*(len(Stack.from_bytes(data, below, 3).words) - below)


@pytest.mark.parametrize("seed", range(3))
def test_damage_is_seen(written, seed):
    "One bit flipped, words lost or added, another seed: an error or a stack that is not the seed, never silence."
    data, below, p, q = written
    r = random.Random(seed)
    for _ in range(150):
        bad, kind = bytearray(data), r.randrange(4)
        if kind == 0: bad[r.randrange(len(bad))] ^= 1 << r.randrange(8)
        elif kind == 1: del bad[r.randrange(1, len(bad)):]
        elif kind == 2: bad += r.randbytes(r.choice([1, 3, 4, 8]))
        else: bad[:] = r.randbytes(len(bad))
        try: assert not read(bytes(bad), below, p, q)
        except CodecError as e: assert "the file is damaged" in str(e)
    assert not read(data, below-1, p, q) and not read(data, below, p, q, key=4)


def test_a_stack_that_runs_dry_says_so():
    for stack in (Stack(), Stack.seeded(1), Stack.from_bytes(Stack.seeded(1).to_bytes(), 1)):
        for pop, model in ((pop_bins, Bins(np.zeros(100, np.int64), 5.)), (pop_table, increasing(np.full((100, 1), TOTAL//2), 2))):
            with pytest.raises(CodecError, match="it ends before its images do"): pop(stack, model)


@pytest.mark.parametrize("data", [b"", bytes(11), bytes(12), bytes(13), b"\xff"*14, bytes(8) + b"\0\0\0\0" + bytes(8)])
def test_bytes_that_are_no_stack(data):
    with pytest.raises(CodecError, match="the file is damaged"): Stack.from_bytes(data, 0)


# ---- the codec itself (page 16), where its page does not look

@pytest.fixture(scope="module")
def toy():
    from ddpm_nbdev.ddpm import DDPM
    from ddpm_nbdev.schedule import linear_schedule
    from ddpm_nbdev.toy import GaussianMixture, exact_denoiser
    sched = linear_schedule(40, .0025, .4)
    return DDPM(exact_denoiser(GaussianMixture([1.], [[.2, -.1]], [[.3, .2]]), sched), sched, (2,))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("write", ["compress", "send"])
def test_a_broken_network_writes_nothing(toy, write, value):
    "The clamp turns some infinities into edges; what it lets through must be refused, never coded."
    from dataclasses import replace
    from ddpm_nbdev import progressive
    broken = replace(toy, model=lambda x, t: x*0 + value, mean="mu")
    with pytest.raises(ValueError, match="not finite|far from all images"):
        getattr(progressive, write)(broken, torch.zeros(3, 2, dtype=torch.uint8), 4)


@pytest.mark.parametrize("steps", [[40], [7, 40], list(range(1, 41)), 1, 5])
@pytest.mark.parametrize("n, lanes", [(1, 1), (7, 3), (5, 99)])
def test_round_trip_of_any_steps_and_lanes(toy, steps, n, lanes):
    from ddpm_nbdev.progressive import compress, decompress, receive, send
    x = torch.randint(256, (n, 2), generator=torch.Generator().manual_seed(n), dtype=torch.uint8)
    assert torch.equal(decompress(toy, compress(toy, x, steps, lanes)), x)
    assert torch.equal(receive(toy, send(toy, x, steps))[1], x)


def test_the_stack_grows_by_the_bound(toy):
    "Over three seeds, where sigma^2 = beta is too wide: draws from a stack that is not random would cost a third of a bit more."
    from ddpm_nbdev.decoder import to_model_range, to_uint8
    from ddpm_nbdev.likelihood import stride
    from ddpm_nbdev.progressive import compress
    from ddpm_nbdev.toy import GaussianMixture
    cloud = GaussianMixture([1.], [[.2, -.1]], [[.3, .2]])
    x = to_uint8(cloud.sample(200, torch.Generator().manual_seed(2)).clamp(-1, 1))
    steps, grown = [2, 6, 12, 20, 30, 40], []
    for seed in range(3):
        told = []
        compress(toy, x, steps, seed=seed, watch=lambda n, bits: told.append(bits))
        grown.append(torch.tensor(told).double().diff(prepend=torch.zeros(1).double())/2)
    grown = torch.stack(grown)
    bound = torch.stack([stride(toy, steps).bits_per_dim(to_model_range(x), torch.Generator().manual_seed(s)).total for s in range(3)])
    error = ((grown.mean(0)-bound.mean(0)).std()/200**.5).item()           # paired: the same points
    assert abs(grown.mean()-bound.mean()) < 4*error < .3


@pytest.fixture(scope="module")
def digits():
    from ddpm_nbdev.calibration import Calibrated
    from ddpm_nbdev.data import load_dataset
    return Calibrated.from_pretrained("digits"), load_dataset("digits").test[:3]


def test_steps_as_a_tensor_are_the_steps(digits):
    from ddpm_nbdev.container import unpack
    from ddpm_nbdev.progressive import compress, decompress
    ddpm, x = digits
    file = compress(ddpm, x, torch.tensor([25, 349, 645, 1000]))
    assert unpack(file)[0].steps == (25, 349, 645, 1000) and torch.equal(decompress(ddpm, file), x)


def test_a_strided_model_with_tables_is_a_model(digits):
    "It codes; and measured in another precision it reads the same rows of its tables."
    from ddpm_nbdev.likelihood import evaluate_bits_per_dim, stride
    from ddpm_nbdev.progressive import compress, decompress
    ddpm, x = digits
    short = stride(ddpm, ddpm.calibration.best_steps(ddpm.sched, 6)[0])
    assert torch.equal(decompress(short, compress(short, x)), x)
    bits = [evaluate_bits_per_dim(short, x, torch.Generator().manual_seed(0), autocast=low).total for low in (None, torch.bfloat16)]
    assert abs(bits[0]-bits[1]) < .02


@pytest.mark.parametrize("kw, said", [(dict(steps=[4.5, 1000]), "whole numbers"), (dict(steps="20"), "whole numbers"), (dict(steps=True), "must rise"),
    (dict(steps=None), "must rise"), (dict(steps=0), "can be kept"), (dict(steps=1), "no chain of 1"), (dict(seed=-1), "seed must be"),
    (dict(seed=2**70), "seed must be"), (dict(seed=1.5), "seed must be"), (dict(lanes=2.), "lanes must be"), (dict(lanes=0), "lanes must be")])
def test_wrong_numbers_are_named_before_any_work(digits, kw, said):
    from ddpm_nbdev.progressive import compress
    with pytest.raises(ValueError, match=said): compress(*digits, **kw)


@pytest.mark.parametrize("name, value, said", [("weights", 2**31-1, "wrong weights"), ("cost", -1., "negative cost"), ("share", 0., "no shares")])
def test_tables_that_cannot_be_are_refused(digits, tmp_path, name, value, said):
    from dataclasses import replace
    from ddpm_nbdev.calibration import Calibrated, save_calibration
    from ddpm_nbdev.files import WeightsError
    ddpm, _ = digits
    ddpm.save(tmp_path)
    wrong = getattr(ddpm.calibration, name).clone()
    wrong[..., 0] = value
    save_calibration(replace(ddpm.calibration, **{name: wrong if name != "share" else wrong*0}), tmp_path)
    with pytest.raises(WeightsError, match=said): Calibrated.load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.complex64, torch.uint16, torch.bool])
@pytest.mark.parametrize("name", ["steps", "mse", "weights"])
def test_tables_of_another_type_are_refused(digits, tmp_path, name, dtype):
    from safetensors.torch import load_file, save_file
    from ddpm_nbdev.calibration import Calibrated, save_calibration
    from ddpm_nbdev.files import WeightsError
    ddpm, _ = digits
    ddpm.save(tmp_path)
    save_calibration(ddpm.calibration, tmp_path)
    file = tmp_path/"calibration.safetensors"
    tensors = load_file(file)
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, file, {"format": "ddpm_nbdev calibration 1"})
    with pytest.raises(WeightsError): Calibrated.load(tmp_path)


def test_a_sliver_of_a_huge_file_is_no_work(digits):
    from ddpm_nbdev.container import Header, pack
    from ddpm_nbdev.progressive import fingerprints, receive
    ddpm, _ = digits
    file = pack(Header("progressive", *fingerprints(ddpm), (4, 1000), (1, 8, 8), 17, 2**16), bytes(2**17))
    with pytest.raises(CodecError, match="previews of .* images need .* to begin with"): receive(ddpm, file[:60])


def test_more_steps_than_there_are_is_all_of_them(digits, toy):
    from ddpm_nbdev.container import unpack
    from ddpm_nbdev.progressive import compress
    ddpm, x = digits
    assert unpack(compress(ddpm, x[:1], 1000))[0].steps == tuple(ddpm.calibration.steps.tolist())
    assert unpack(compress(toy, torch.zeros(1, 2, dtype=torch.uint8), 1000))[0].steps == tuple(range(1, 41))
