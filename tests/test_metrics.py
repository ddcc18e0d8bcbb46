"""Metrics against independent implementations, FID's network against torch-fidelity's, likelihoods in closed form: what is too bulky for the notebook."""

import importlib
import importlib.util
import math
import sys
import types

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist, pdist
from sklearn.metrics.pairwise import cosine_similarity, rbf_kernel
from sklearn.neighbors import NearestNeighbors

from ddkit import inception, metrics
from ddkit.backbones import linear_alphas_cumprod
from ddkit.inception import FIDInception, inception_features, load_inception
from ddkit.metrics import measure
from ddkit.probes import negative_log_likelihood

# --- every metric, beside another implementation ----------------------------------------------------------------------


def features(n, m, d, offset=0.0, dtype=torch.float32):
    """Two overlapping clouds of five classes: real, synthetic, and their labels."""
    draw = torch.Generator().manual_seed(n + m + d)
    centres = 2 * torch.randn(5, d, generator=draw)
    real_labels, labels = torch.arange(n) % 5, torch.arange(m) % 5
    real = centres[real_labels] + torch.randn(n, d, generator=draw)
    synthetic = 1.1 * centres[labels] + 0.9 * torch.randn(m, d, generator=draw)
    return (real + offset).to(dtype), (synthetic + offset).to(dtype), real_labels, labels


def by_others(x, y, c, d, k=5):
    """The same numbers from scipy and scikit-learn."""
    gamma = 1 / np.sort(pdist(np.vstack([x, y]), "sqeuclidean"))[(len(x) + len(y)) * (len(x) + len(y) - 1) // 2 // 2 - (0 if (len(x) + len(y)) * (len(x) + len(y) - 1) // 2 % 2 else 1)]
    between = lambda kernel: (kernel.sum() - np.trace(kernel)) / (len(kernel) * (len(kernel) - 1))
    mmd_squared = between(rbf_kernel(x, x, gamma)) + between(rbf_kernel(y, y, gamma)) - 2 * rbf_kernel(x, y, gamma).mean()
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    similar = cosine_similarity(y)
    np.fill_diagonal(similar, -1)
    radius = lambda z: NearestNeighbors(n_neighbors=k).fit(z).kneighbors()[0][:, -1]
    real_balls, synthetic_balls = cdist(x, y) < radius(x)[:, None], cdist(y, x) < radius(y)[:, None]
    judge = {"l2_distance": np.linalg.norm(x.mean(0) - y.mean(0)), "mmd": math.sqrt(max(0, mmd_squared)), "mmd_squared": mmd_squared,
             "frechet_distance": ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * sqrtm(a @ b).real),
             "representativeness": cosine_similarity(y, x).max(1).min(), "diversity": 1 - similar.max(),
             "precision": real_balls.any(0).mean(), "recall": synthetic_balls.any(0).mean(), "density": real_balls.sum(0).mean() / k, "coverage": real_balls.any(1).mean()}
    nearest = np.concatenate([NearestNeighbors(n_neighbors=1).fit(y[d == i]).kneighbors()[0][:, 0] for i in range(5)])
    tsne = {"tsne_diversity": nearest.mean(), "tsne_representativeness": -NearestNeighbors(n_neighbors=50).fit(x).kneighbors(y)[0].mean()}
    denoiser = {"kernel_distance": np.mean([cdist(y[[j]], x[c == i]).mean() for j, i in enumerate(d)])}
    return {"judge": judge, "inception": {"fid": judge["frechet_distance"]}, "tsne": tsne, "denoiser": denoiser}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # scipy's, about singular covariances
@pytest.mark.parametrize("n, m, d, offset", [(300, 50, 16, 0.0), (400, 100, 64, 0.0), (200, 200, 8, 100.0)])
def test_every_metric_agrees_with_another_implementation(n, m, d, offset):
    real, synthetic, real_labels, labels = features(n, m, d, offset)
    expected = by_others(real.double().numpy(), synthetic.double().numpy(), real_labels.numpy(), labels.numpy())
    assert {name for values in expected.values() for name in values} == set(metrics.metric_names())
    for kind, values in expected.items():
        measured = measure(real, synthetic, real_labels=real_labels, synthetic_labels=labels, features=kind)
        assert measured == pytest.approx(values, rel=1e-4, abs=1e-6), kind


def test_rows_order_and_precision_of_the_features_do_not_matter(monkeypatch):
    real, synthetic, real_labels, labels = features(300, 60, 16)
    given = dict(real_labels=real_labels, synthetic_labels=labels)
    whole = {kind: measure(real, synthetic, features=kind, **given) for kind in metrics.FEATURES}
    monkeypatch.setattr("ddkit.points.BLOCK", 1000)
    order, other = torch.randperm(300, generator=torch.Generator().manual_seed(0)), torch.randperm(60, generator=torch.Generator().manual_seed(1))
    for kind, values in whole.items():
        shuffled = measure(real[order].double(), synthetic[other].double(), real_labels=real_labels[order], synthetic_labels=labels[other], features=kind)
        assert shuffled == pytest.approx(values, rel=1e-5, abs=1e-8), kind  # the kernel distance is taken in float32: some eps of 1.2e-7


def test_an_image_on_the_rim_of_a_ball_is_outside_whatever_the_rounding(monkeypatch):
    """A coreset's images are other real images' k-th neighbours: exact ties, in any block size."""
    real = features(400, 10, 64)[0] + 3
    coreset = real[::9]
    distances = torch.cdist(real.double(), real.double(), compute_mode="donot_use_mm_for_euclid_dist")
    radii = distances.kthvalue(6, dim=1).values
    exact = ((distances[:, ::9] < radii[:, None]).any(1)).double().mean()
    assert (distances[:, ::9] == radii[:, None]).any()
    for numbers in (2**24, 3000, 700):
        monkeypatch.setattr("ddkit.points.BLOCK", numbers)
        assert metrics.coverage(real, coreset) == float(exact)


def test_radii_are_computed_once_for_all_that_need_them(monkeypatch):
    real, synthetic, *_ = features(150, 40, 8)
    counted, true = [], torch.Tensor.kthvalue
    monkeypatch.setattr(torch.Tensor, "kthvalue", lambda self, *a, **k: counted.append(len(self)) or true(self, *a, **k))
    first = [f(real + 0.5, synthetic) for f in (metrics.precision, metrics.recall, metrics.density, metrics.coverage)]
    assert counted == [150, 40]
    assert metrics.density(real.clone() + 0.5, synthetic) == first[2] and counted == [150, 40]  # known by contents
    assert metrics.coverage(real + 0.25, synthetic) != first[3] and counted == [150, 40, 150]


def test_large_sets_are_represented_by_a_seeded_draw_that_the_four_share(monkeypatch):
    real, synthetic, *_ = features(500, 90, 8)
    counted, true = [], torch.Tensor.kthvalue
    monkeypatch.setattr(torch.Tensor, "kthvalue", lambda self, *a, **k: counted.append(tuple(self.shape)) or true(self, *a, **k))
    four = [metrics.precision, metrics.recall, metrics.density, metrics.coverage]
    drawn = [f(real, synthetic, max_points=200) for f in four]
    assert counted == [(200, 200), (90, 90)]  # no distances but those of the draw
    rows = real[torch.randperm(500, generator=torch.Generator().manual_seed(0))[:200]]
    by = by_others(rows.double().numpy(), synthetic.double().numpy(), np.arange(200) % 5, np.arange(90) % 5)["judge"]
    assert drawn == pytest.approx([by[f.__name__] for f in four])
    assert [f(real, synthetic, max_points=500) for f in four] == [f(real, synthetic) for f in four]
    counted.clear()
    metrics.recall(real, synthetic, max_points=50)
    assert counted == [(50, 50)]  # the synthetic set's


# --- FID's network ----------------------------------------------------------------------------------------------------

# features are about 5 at most and come from 94 convolutions in float32, each of which may be off by a few units in the last place
ROUNDING = 94 * 4 * 5 * torch.finfo(torch.float32).eps  # 2.2e-4


def random_state():
    """Weights of a sensible size, drawn name by name, in the layout of the published file."""
    draw, state = torch.Generator().manual_seed(0), {}
    for name, value in sorted(FIDInception().state_dict().items()):
        if name.endswith("num_batches_tracked"): continue
        noise = torch.randn(value.shape, generator=draw)
        if value.ndim == 4: state[name] = noise * math.sqrt(2 / value[0].numel())
        elif name.endswith("running_var"): state[name] = 1 + 0.3 * noise.clamp(-2, 2)
        else: state[name] = 0.1 * noise + name.endswith("bn.weight")
    return state | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(random_state(), file)
    return file


def pictures(height, width, count=2, seed=0):
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_features_are_those_of_torch_fidelity_on_record(weights):
    """Recorded from torch-fidelity 0.4.0's FeatureExtractorInceptionV3 with the same weights and images."""
    recorded = {(16, 16): ([3.95894, 0.2936, 0.02415, 0.03732], 0.95496), (320, 224): ([5.35815, 0.40712, 0.06591, 0.07685], 1.5165)}
    for size, (values, mean) in recorded.items():
        found = inception_features(pictures(*size), weights)
        assert found.shape == (2, 2048) and found[0, :400:100].tolist() == pytest.approx(values, abs=ROUNDING)
        assert float(found.mean()) == pytest.approx(mean, abs=ROUNDING)


def torch_fidelity_module(file):
    """torch-fidelity's module, loaded without running the package's `__init__`, which imports torchvision."""
    spec = importlib.util.find_spec("torch_fidelity")
    if spec is None: pytest.skip("torch-fidelity is not installed")
    package = types.ModuleType("torch_fidelity")
    package.__path__ = list(spec.submodule_search_locations)
    before = {name for name in sys.modules if name.split(".")[0] == "torch_fidelity"}
    sys.modules["torch_fidelity"] = package
    try: return importlib.import_module("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(file))
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "torch_fidelity" and name not in before]: del sys.modules[name]


@pytest.mark.parametrize("size", [(16, 16), (256, 256), (299, 299), (320, 224), (512, 512)])
def test_features_are_those_of_torch_fidelity(tmp_path, size):
    state = random_state()
    torch.save(state | {name: torch.tensor(0) for name in FIDInception().state_dict() if name not in state}, tmp_path / "w.pth")
    theirs, images = torch_fidelity_module(tmp_path / "w.pth"), pictures(*size)
    assert torch.allclose(inception_features(images, tmp_path / "w.pth"), theirs(images)[0], atol=ROUNDING, rtol=0)


def test_resize_is_tensorflows(weights):
    """Pixel by pixel, as the definition has it."""
    image = pictures(7, 400, 1)[0, 0].double().numpy()
    found = inception.tensorflow_resize(torch.tensor(image)[None, None])[0, 0]
    for row, column in [(0, 0), (298, 298), (150, 3), (37, 200), (298, 0)]:
        y, x = row * 7 / 299, column * 400 / 299
        i, j = int(y), int(x)
        low, high = [image[i, j] * (1 - x + j) + image[i, min(j + 1, 399)] * (x - j) for i in (i, min(i + 1, 6))]
        assert float(found[row, column]) == pytest.approx(low * (1 - y + i) + high * (y - i), abs=1e-3)


def test_fid_from_images_to_number(weights):
    network = load_inception(weights)
    real, synthetic = inception_features(pictures(32, 32, 24), network, batch_size=10), inception_features(pictures(32, 32, 12, seed=1) // 2, network)
    a, b = (one.double() - one.double().mean(0) for one in (real, synthetic))
    root = torch.linalg.svdvals(a @ b.T).sum() / math.sqrt((len(a) - 1) * (len(b) - 1))  # trace of the covariances' root, from their factors
    expected = (real.double().mean(0) - synthetic.double().mean(0)).square().sum() + a.square().sum() / 23 + b.square().sum() / 11 - 2 * root
    assert measure(real, synthetic, features="inception") == {"fid": pytest.approx(float(expected), rel=1e-4)}


def test_automatic_weights_are_those_of_torchs_cache_and_never_downloaded(tmp_path, monkeypatch, weights):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    place = tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    with pytest.raises(FileNotFoundError) as caught: inception_features(pictures(8, 8), "auto")
    assert str(place) in str(caught.value) and inception.INCEPTION_ADDRESS in str(caught.value) and "\n" not in str(caught.value)
    assert not place.exists()
    place.parent.mkdir()
    place.symlink_to(weights)
    assert torch.equal(inception_features(pictures(8, 8), "auto"), inception_features(pictures(8, 8), weights))


# --- likelihood -------------------------------------------------------------------------------------------------------


class Gaussian:
    """The perfect denoiser of N(0.3, 0.7²), without learned variance."""
    latent_shape, device, m, s = (2, 4, 4), torch.device("cpu"), 0.3, 0.7
    alphas_cumprod = linear_alphas_cumprod(1000)

    def model_labels(self, labels): return labels

    def __call__(self, x, t, labels):
        a = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        x0 = self.m + a.sqrt() * self.s**2 / (a * self.s**2 + 1 - a) * (x - a.sqrt() * self.m)
        return ((x - a.sqrt() * x0) / (1 - a).sqrt()).to(x.dtype)


def bound_with_fixed_variance(model):
    """Mean of the bound over the model's own data, bits per dimension: every term in closed form."""
    a = model.alphas_cumprod.numpy()
    previous = np.append(1.0, a[:-1])
    beta, spread = 1 - a / previous, model.s**2 * (1 - a) / (a * model.s**2 + 1 - a)
    variance = beta * (1 - previous) / (1 - a)
    steps = (beta * np.sqrt(previous) / (1 - a)) ** 2 * spread / (2 * np.append(1, variance[1:]))
    steps[0] = 0.5 * (math.log(2 * math.pi * variance[1]) + spread[0] / variance[1])
    prior = 0.5 * (a[-1] * (model.s**2 + model.m**2) - a[-1] - math.log(1 - a[-1]))
    return (steps.sum() + prior) / math.log(2), steps / math.log(2)


@pytest.mark.parametrize("steps, dtype", [(None, torch.float32), (None, torch.float64), (100, torch.float32)])
def test_bound_with_fixed_variance_is_the_closed_form(steps, dtype):
    model = Gaussian()
    data = model.m + model.s * torch.randn(64, *model.latent_shape, generator=torch.Generator().manual_seed(3), dtype=dtype)
    found, (expected, _) = negative_log_likelihood(model, data, torch.arange(64) % 4, steps=steps), bound_with_fixed_variance(model)
    assert found.n == 64 and found.steps == (steps or 1000) and found.std > 0
    assert abs(found.mean - expected) < 4 * found.std / 8
    entropy = 0.5 * math.log2(2 * math.pi * math.e * model.s**2)
    assert found.mean > entropy  # a bound


def test_likelihood_belongs_to_the_image_and_names_what_is_wrong():
    model = Gaussian()
    data, labels = torch.randn(6, *model.latent_shape, generator=torch.Generator().manual_seed(4)), torch.tensor([0, 1, 0, 1, 0, 1])
    together = negative_log_likelihood(model, data, labels, steps=30).per_image
    close = dict(rtol=1e-4)  # terms in float32, differences of nearly equal means among them; another seed changes some percent
    assert torch.allclose(negative_log_likelihood(model, data, labels, steps=30, batch_size=4).per_image, together, **close)
    assert torch.allclose(negative_log_likelihood(model, data[:3], labels[:3], steps=30).per_image, together[:3], **close)  # whoever else is there
    assert not torch.allclose(negative_log_likelihood(model, data, labels, steps=30, seed=1).per_image, together, rtol=1e-2)
    for wrong, message in [(dict(latents=data[:, :1]), "latents should be N×2×4×4"), (dict(labels=labels[1:]), "5 labels for 6 latents"), (dict(steps=1), "choose 2 … 1000"),
                           (dict(variance="lerned"), "did you mean 'learned'"), (dict(latents=data * torch.nan), "NaN or infinite values")]:
        with pytest.raises(ValueError, match=message): negative_log_likelihood(model, **{"latents": data, "labels": labels, "steps": 5} | wrong)
