"""The networks beyond what their notebook shows: passes at the published sizes, training, names, and what an import costs."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from ddkit.data import load_digits_data
from ddkit.networks import NETWORKS, NORMS, create_network, network_names

torch.set_num_threads(1)  # networks of a digit's size gain nothing from more
GLAD = ("alexnet", "vgg11", "resnet18glad", "vit")


def test_the_papers_networks_come_first():
    assert network_names()[:5] == ["convnet6", "resnetap10", "resnet18", "resnet50", "resnet101"]  # the order of tables
    assert list(NORMS) == ["instance", "batch"]


def test_makers_are_functions_of_the_module():
    "Found by name, so that the key of a result can be read from their code."
    import ddkit.networks as module
    for name in NETWORKS: assert getattr(module, NETWORKS[name].__name__) is NETWORKS[name], name
    for name in NORMS: assert getattr(module, NORMS[name].__name__) is NORMS[name], name


def test_transformers_is_imported_only_for_the_networks_that_come_from_it():
    program = (
        "import sys; from ddkit.networks import create_network\n"
        "create_network('resnet18', 10, 16, 1, 1/8); assert 'transformers' not in sys.modules\n"
        "create_network('vitb16', 10, 16, 1, 1/8); assert 'transformers' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("name", network_names())
def test_published_networks_pass_an_image_of_their_size(name):
    size = 128 if name in GLAD else 224
    network = create_network(name, 10, size).eval()
    with torch.inference_mode():
        features, logits = network.features(torch.randn(1, 3, size, size)), network(torch.randn(1, 3, size, size))
    assert features.ndim == 2 and logits.shape == (1, 10) and logits.isfinite().all()


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "vitb16")) for name in network_names()])
def test_networks_learn_a_few_digits(name):
    digits = load_digits_data().train
    images, labels = digits.images[:40], digits.labels[:40]
    torch.manual_seed(0)
    network = create_network(name, 10, 16, 1, 1 / 8).train()
    optimizer, losses = torch.optim.AdamW(network.parameters(), lr=2e-3), []
    for _ in range(30):
        loss = F.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.98 * sum(losses[:5])  # a narrow ResNet-101 with the papers' norm learns slowly


def test_features_of_a_channels_last_batch_are_those_of_a_contiguous_one():
    images = torch.randn(2, 3, 64, 64)
    for name in network_names():
        network = create_network(name, 10, 64, 3, 1 / 8).eval().double()
        with torch.inference_mode():
            plain = network.features(images.double())
            last = network.to(memory_format=torch.channels_last).features(images.double().to(memory_format=torch.channels_last))
        torch.testing.assert_close(last, plain, rtol=1e-5, atol=1e-7)
