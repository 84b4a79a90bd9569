"Distances between sets of pictures: what is refused, torch-fidelity's own functions on the same features, and Inception as it is fed there."
import io
import re
import sys
import types
import urllib.error
from hashlib import sha256
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from ddpm_nbdev import features as features_module
from ddpm_nbdev.data import load_dataset
from ddpm_nbdev.decoder import to_model_range
from ddpm_nbdev.features import load_features
from ddpm_nbdev.quality import fid, inception_score, kid, nearest, precision_recall

torch.set_num_threads(1)


def normal(n, d, seed=0): return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def digits(n=2): return to_model_range(load_dataset("digits").test[:n], 17)


@pytest.mark.parametrize("x, said", [
    (None, "tensor of images .*got NoneType"),
    (np.zeros((2, 1, 8, 8), dtype="f4"), "tensor of images .*got ndarray"),
    ([[0.]], "tensor of images .*got list"),
    (3*digits(), r"images in \[-1, 1\], these go from -3 to 3"),
    (digits() - 1, r"images in \[-1, 1\], these go from -2 to 0"),
    (8*(digits() + 1), "look like gray levels 0 to 16"),
])
def test_features_refuse(x, said):
    see = load_features("digits")
    for call in (see, see.both, see.probs):
        with pytest.raises(ValueError, match=said) as e: call(x)
        assert "\n" not in str(e.value)


def test_features_clamp_what_is_a_little_outside():
    assert torch.equal(load_features("digits")(1.4*digits(9)), load_features("digits")((1.4*digits(9)).clamp(-1, 1)))


@pytest.mark.parametrize("name", [["digits"], {}, None, 3])
def test_a_name_that_is_none(name):
    with pytest.raises(ValueError, match="unknown features .*; known: digits, fashion_mnist, inception"): load_features(name)


def spoilt(value):
    x = normal(6, 3)
    x[1, 2] = value
    return x


@pytest.mark.parametrize("f", [fid, kid, precision_recall])
@pytest.mark.parametrize("a,b,said", [
    (normal(6, 3), normal(6, 4), "different width, 3 and 4"),
    (normal(1, 3), normal(6, 3), "rows, got 1"),
    (normal(6, 3), normal(0, 3), "rows, got 0"),
    (spoilt(torch.nan), normal(6, 3), "not finite"),
    (normal(6, 3), spoilt(torch.inf).numpy(), "not finite"),
    (normal(6, 3)[0], normal(6, 3), r"got shape \(3,\)"),
    (normal(6, 3), normal(6, 12).view(6, 3, 2, 2), r"got shape \(6, 3, 2, 2\)"),
    (None, normal(6, 3), "must be .*numbers.*got NoneType"),
    (normal(6, 3), "text", "must be .*numbers.*got str"),
    (object(), normal(6, 3), "must be .*numbers.*got object"),
    (np.array([[None, 1]]*6), normal(6, 3), "must be .*numbers.*got ndarray"),
    (normal(6, 3), [[1., 2.], [3.]], "must be .*numbers.*one length.*got list"),
    (normal(6, 3), [[10**400, 1, 2]]*6, "must be .*numbers.*got list"),
    (normal(6, 3)*1j, normal(6, 3), "real numbers.*complex128"),
    (normal(6, 3).to_sparse(), normal(6, 3), "dense"),
    (normal(6, 0), normal(6, 0), "at least one column"),
    (normal(6, 3), normal(6, 3)*1e200, "too large.*at most 1e\\+45"),
])
def test_distances_refuse(f, a, b, said):
    with pytest.raises(ValueError, match=said) as e: f(a, b)
    assert "\n" not in str(e.value) and ("width" in said or re.match("(a|b|real|fake) |k=3 needs at least 4 rows, got . in (real|fake)", str(e.value)))


def test_what_is_large_but_not_too_large_has_numbers():
    a, b = normal(30, 3)*1e44, normal(40, 3, 1)*1e44
    assert all(np.isfinite(v) for v in (fid(a, b), kid(a, b), *precision_recall(a, b), nearest(a, b, 40)[0].max().item()))


@pytest.mark.parametrize("call,said", [
    (lambda: precision_recall(normal(3, 2), normal(9, 2)), "at least 4 rows, got 3"),
    (lambda: precision_recall(normal(9, 2), normal(9, 2), k=9), "at least 10 rows, got 9"),
    (lambda: precision_recall(normal(9, 2), normal(9, 2), k=0), "k must be at least 1"),
    (lambda: nearest(normal(9, 2), normal(3, 2), k=4), "k=4 needs at least 4 rows, got 3 in pool"),
    (lambda: nearest(normal(9, 2), normal(3, 2), k=10**30), f"k={10**30} needs at least .* rows, got 3 in pool"),
    (lambda: precision_recall(normal(9, 2), normal(5, 2), k=5), "k=5 needs at least 6 rows, got 5 in fake"),
    (lambda: precision_recall(normal(9, 2), normal(9, 2), k=10**30), f"k={10**30} needs at least .* rows, got 9 in real"),
    *[(lambda f=f, v=v: f(normal(9, 2), normal(9, 2), k=v), f"k must be a whole number, at least 1, got {v!r}")
      for f in (nearest, precision_recall) for v in (2.5, None, True, "3", np.nan)],
    *[(lambda v=v: inception_score(torch.full((4, 2), .5), v), f"splits must be a whole number, at least 1, got {v}") for v in (2.5, None, True)],
    *[(lambda x=x: inception_score(x), "^probs must be .*numbers") for x in (None, "text", object(), [[1.], [.5, .5]], torch.ones(4, 1)*1j)],
    (lambda: inception_score(torch.ones(4, 0)), "probs must have at least one column"),
    (lambda: inception_score(torch.tensor([[.5, .50012]])), "sums 1.00012 to 1.00012"),
    *[(lambda x=x: nearest(x, normal(9, 2)), "^queries must be .*numbers") for x in (None, "text", object(), [[1.], [.5, .5]], normal(9, 2)*1j)],
    (lambda: nearest(normal(9, 2), None), "^pool must be .*numbers"),
    (lambda: nearest(normal(9, 2, 0)[:, :0], normal(9, 2)[:, :0]), "queries must have at least one column"),
    (lambda: nearest(normal(9, 2), normal(9, 2)*1e200), "pool has values that are too large"),
    (lambda: nearest(normal(9, 2), normal(9, 3)), "of one shape"),
    (lambda: nearest(normal(9, 2)[0], normal(9, 2)), "of one shape"),
    (lambda: nearest(normal(9, 2), normal(9, 2), k=0), "k must be at least 1"),
    (lambda: nearest(spoilt(torch.nan), normal(9, 3)), "not finite"),
    (lambda: inception_score(torch.full((4, 2), .4)), "must sum to one"),
    (lambda: inception_score(torch.tensor([[1.2, -.2]])), "must not be negative"),
    (lambda: inception_score(torch.full((4, 2), torch.nan)), "not finite"),
    (lambda: inception_score(torch.full((4, 2), .5), 5), "splits must be 1 to the number of rows, 4"),
    (lambda: inception_score(torch.full((4, 2), .5), 0), "splits must be 1"),
    (lambda: inception_score(torch.full((4,), .25)), "got shape"),
])
def test_others_refuse(call, said):
    with pytest.raises(ValueError, match=said) as e: call()
    assert "\n" not in str(e.value)


@pytest.fixture(scope="module")
def fidelity():
    "torch-fidelity, with its settings; where torchvision is not there (or of another torch) its data sets are left out, which nothing here uses."
    if find_spec("torch_fidelity") is None: pytest.skip("torch-fidelity is not installed: pip install '.[metrics]'")
    class Empty(types.ModuleType):
        def __getattr__(self, name):
            if name.startswith("__"): raise AttributeError(name)
            return type(name, (), {})
    with pytest.MonkeyPatch.context() as patch:
        try: import torch_fidelity
        except (ImportError, RuntimeError):
            for name in [m for m in sys.modules if m.partition(".")[0] in ("torch_fidelity", "torchvision")]: patch.delitem(sys.modules, name)
            for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional"):
                patch.setitem(sys.modules, name, Empty(name))
                parent, _, child = name.rpartition(".")
                if parent: setattr(sys.modules[parent], child, sys.modules[name])
            import torch_fidelity
        from torch_fidelity import feature_extractor_inceptionv3, metric_fid, metric_isc, metric_kid, metric_prc
        yield types.SimpleNamespace(fid=metric_fid, isc=metric_isc, kid=metric_kid, prc=metric_prc, inception=feature_extractor_inceptionv3)
        for name in [m for m in sys.modules if m.partition(".")[0] == "torch_fidelity"]: patch.delitem(sys.modules, name)


@pytest.fixture(scope="module")
def sets():
    "Features of training and test digits, and the judge's probabilities."
    digits, features = load_dataset("digits"), load_features("digits")
    return [features.both(to_model_range(x, digits.levels)) for x in (digits.train, digits.test)]


def test_fid_is_torch_fidelitys(fidelity, sets):
    for a, b in ((sets[0][0], sets[1][0]), (normal(90, 5), 2*normal(70, 5, 1) + 1)):
        stats = [fidelity.fid.fid_features_to_statistics(x) for x in (a, b)]
        theirs = fidelity.fid.fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
        assert fid(a, b) == pytest.approx(theirs, rel=1e-6)


def test_kid_is_torch_fidelitys(fidelity, sets):
    a, b = sets[0][0][:300], sets[1][0][:300]
    theirs = fidelity.kid.kid_features_to_metric(a, b, kid_subsets=1, kid_subset_size=300, verbose=False)   # all rows, in another order
    assert kid(a, b) == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("splits", [1, 3, 10])
def test_inception_score_is_torch_fidelitys(fidelity, sets, splits):
    probs = sets[1][1]
    theirs = fidelity.isc.isc_features_to_metric(probs.log(), splits, shuffle=False)
    assert inception_score(probs, splits) == pytest.approx((theirs["inception_score_mean"], theirs["inception_score_std"]), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_are_torch_fidelitys(fidelity, sets, k):
    fake, real = sets[1][0] + .3, sets[0][0][:400]
    theirs = fidelity.prc.prc_features_to_metric(fake, real, prc_neighborhood=k, prc_batch_size=100, save_cpu_ram=True, verbose=False)
    assert precision_recall(real, fake, k) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)


@pytest.fixture(scope="module")
def drawn_at_random(fidelity, tmp_path_factory):
    "Inception with weights drawn at random, their file, and what they are called."
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "load_state_dict", lambda self, weights: None)
        nothing = io.BytesIO()
        torch.save({}, nothing)
        nothing.seek(0)
        net = fidelity.inception.FeatureExtractorInceptionV3("", ["2048", "logits_unbiased"], nothing)
    folder = tmp_path_factory.mktemp("inception")
    torch.save(net.state_dict(), folder/"new")
    name = f"weights-{sha256((folder/'new').read_bytes()).hexdigest()[:8]}.pth"
    (folder/"new").rename(folder/name)
    return net, folder, name


def test_inception_is_fed_as_torch_fidelity_feeds_it(drawn_at_random, monkeypatch):
    "Whole levels give the same; gray is color with three equal channels; what is not rounded lies between."
    net, folder, name = drawn_at_random
    monkeypatch.setattr(features_module, "_INCEPTION", ("https://nowhere/", name))
    features = load_features("inception", folder)
    x = torch.randint(0, 256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    seen, logits = (v.double() for v in net(x))
    mine, probs = features.both(to_model_range(x, 256))
    assert mine.shape == (3, 2048) and mine.dtype == torch.float64
    torch.testing.assert_close(mine, seen, rtol=1e-4, atol=1e-5*float(seen.abs().max()))
    torch.testing.assert_close(probs, logits.softmax(1), rtol=1e-4, atol=0)
    gray = to_model_range(x[:, :1], 256)
    torch.testing.assert_close(features(gray), features(gray.repeat(1, 3, 1, 1)))
    assert (features((to_model_range(x, 256) + .003).clamp(-1, 1)) - mine).abs().max() > 0
    with pytest.raises(ValueError, match="with 1 or 3 channels, got"): features(torch.zeros(1, 4, 8, 8))


def refusal(*args):
    with pytest.raises(ValueError) as e: load_features("inception", *args)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_inception_without_the_extra(monkeypatch):
    for name in [m for m in sys.modules if m.startswith("torch_fidelity.")]: monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    assert "pip install 'ddpm_nbdev[metrics]'" in refusal()


def test_inception_without_network(drawn_at_random, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path/"hub"))
    monkeypatch.delenv("DDPM_DATA", raising=False)
    def down(*args, **kw): raise urllib.error.URLError("Name or service not known")
    monkeypatch.setattr(torch.hub, "download_url_to_file", down)
    said = refusal()
    assert features_module._INCEPTION[1] in said and str(tmp_path/"hub") in said and "not known" in said and "DDPM_DATA" in said
    assert "put it there" in refusal(tmp_path)


def test_inception_of_the_wrong_bytes(drawn_at_random, tmp_path):
    (tmp_path/features_module._INCEPTION[1]).write_bytes(b"not the weights")
    assert "damaged" in refusal(tmp_path)


def test_inception_downloads_where_nothing_is(drawn_at_random, monkeypatch, tmp_path):
    net, folder, name = drawn_at_random
    monkeypatch.setattr(features_module, "_INCEPTION", ("https://nowhere/", name))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.delenv("DDPM_DATA", raising=False)
    def download(url, path, hash_prefix):
        assert url == f"https://nowhere/{name}" and name.endswith(f"{hash_prefix}.pth")
        path.write_bytes((folder/name).read_bytes())
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    assert load_features("inception").name == "inception"
    monkeypatch.delattr(torch.hub, "download_url_to_file")
    assert load_features("inception").name == "inception"            # it is there now


def test_numbers_of_lists_and_kinds():
    "Arrays, float32 and whole numbers are as good as float64 tensors."
    a, b = normal(40, 3), normal(50, 3, 1) + 1
    for kind in (lambda x: x.numpy(), lambda x: x.float(), lambda x: x.requires_grad_()):
        assert fid(kind(a.clone()), kind(b.clone())) == pytest.approx(fid(a, b), rel=1e-4)
    levels = torch.arange(16, dtype=torch.uint8).view(4, 1, 2, 2)
    distance, place = nearest(levels, levels.numpy(), 2)
    assert distance[:, 0].tolist() == [0]*4 and place[:, 0].tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(distance[:, 1], 8)
