"""Every method on generators in published layouts, over a folder of colour images; and preparations as cells of their own."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddkit.backbones import DiT, load_dit_checkpoint
from ddkit.data import load_data
from ddkit.folders import class_lists
from ddkit.methods import distill, get_method, method_names, prepare
from ddkit.profiles import load_profile
from ddkit.store import Store
from ddkit.work import distill_cell

sys.path.insert(0, str(Path(__file__).parent))
from test_backbones import VAE, save_stable_diffusion

SMOKE = load_profile("smoke")
# each method once, as small as it goes
SMALL = {"d3hr": {"groups": 5}, "cao2": {"iterations": 2, "candidates": 2}, "s3": {"groups": 2}, "ims3": {"groups": 2}, "ims3-released": {"groups": 2}}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """ImageNette's ten folders, five training and two validation JPEGs each."""
    root, draw = tmp_path_factory.mktemp("imagenet"), np.random.default_rng(0)
    for split, count in (("train", 5), ("val", 2)):
        for c in class_lists()["imagewoof"]:
            (root / split / c.wnid).mkdir(parents=True)
            for i in range(count): Image.fromarray(draw.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(root / split / c.wnid / f"{c.wnid}_{i}.JPEG")
    return root


def tiny(profile, root, **changes):
    "A profile of the papers at the size of a stamp."
    options = {"mgd3.stop": 5, "manifoldgd.stop": 5, "dap.stop": 5, "dap.real": 4, "manifoldgd.neighbours": 4, "manifoldgd.tangent_dim": 2,
               "manifoldgd.cloud_size": 8, "manifoldgd.start_level": 0, "difffit.epochs": 1, "difffit.batch_size": 25}
    return load_profile(profile, root=str(root), image_size=16, eval_size=16, device="cpu", steps=10, network_width=0.125, full_epochs=1,
                        evaluations=1, batch_size=7, **options, **changes)


@pytest.fixture(scope="module")
def dit_profile(images, tmp_path_factory):
    """An original checkpoint with γ in its first block under `ema`, as fine-tuning leaves it, and a VAE folder."""
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("dit")
    torch.manual_seed(0)
    model = DiT(input_size=8, hidden_size=64, depth=2, num_heads=1, mlp_size=128, gamma_blocks=1)
    for parameter in model.parameters(): torch.nn.init.normal_(parameter, std=0.05)
    torch.save({"ema": model.state_dict(), "model": {}}, folder / "0012000.pt")
    AutoencoderKL(**VAE).save_pretrained(folder / "vae")
    assert (load_dit_checkpoint(folder / "0012000.pt").blocks[0].gamma1 == model.blocks[0].gamma1).all()
    return tiny("imagewoof", images, weights=str(folder / "0012000.pt"), vae=str(folder / "vae"))


@pytest.fixture(scope="module")
def stable_diffusion_profile(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd")
    save_stable_diffusion(folder, "epsilon")
    return tiny("imagewoof-sd", images, weights=str(folder / "sd"))


@pytest.fixture(scope="module")
def inputs(request):
    """What all methods on one generator share."""
    known = {}
    def of(profile):
        if profile not in known: known[profile] = {"data": load_data(profile), "prepared": {}}
        return known[profile]
    return of


@pytest.mark.parametrize("generator", ["dit_profile", "stable_diffusion_profile"])
@pytest.mark.parametrize("method", method_names())
def test_every_method_works_with_generators_of_the_papers(method, generator, inputs, request, tmp_path):
    profile = request.getfixturevalue(generator)
    given = inputs(profile)
    for name in get_method(method).preparations:
        if name not in given["prepared"]: given["prepared"][name] = prepare(name, profile, data=given["data"])
    made = distill(method, profile, ipc=2, out=tmp_path / "set", **given, **SMALL.get(method, {}))
    assert made.images.shape == (20, 3, 16, 16) and made.images.isfinite().all()
    assert sorted(p.name for p in (tmp_path / "set").iterdir() if p.is_dir()) == sorted(c.wnid for c in class_lists()["imagewoof"])


def test_fine_tuned_weights_are_one_cell_for_all_sizes_and_seeds(tmp_path):
    store = Store(tmp_path / "runs")
    sets = [distill_cell(SMOKE, "minimax", ipc, seed) for ipc, seed in ((1, 0), (2, 0), (1, 1))] + [distill_cell(SMOKE, "minimax + igd", 1, 0)]
    tuned = {up.key for cell in sets for up in cell.inputs if up.kind == "finetune" and up.method == "minimax"}
    assert len(tuned) == 1
    for cell in sets[:3]: store.compute(cell)
    assert [p.name for p in (tmp_path / "runs/finetune").iterdir()] == list(tuned)
    assert (tmp_path / "runs/finetune" / tuned.pop() / "weights.safetensors").is_file()


def test_keys_of_fine_tuned_weights_depend_on_what_decides_them():
    def keys(profile, method, **options):
        cell = distill_cell(profile, method, 1, 0, **options)
        return cell.key, [up.key for up in cell.inputs if up.kind == "finetune"]
    longer = SMOKE.replace(**{"difffit.epochs": 2})
    assert keys(SMOKE, "minimax") != keys(longer, "minimax") and keys(SMOKE, "mgd3") == keys(longer, "mgd3")
    assert keys(SMOKE, "minimax", negative=0.1)[1] != keys(SMOKE, "minimax")[1]
    assert keys(SMOKE, "ims3", groups=2)[1] == keys(SMOKE, "ims3")[1] == keys(SMOKE, "im")[1] and keys(SMOKE, "ims3", groups=2)[0] != keys(SMOKE, "ims3")[0]
    assert keys(SMOKE, "dap + mgd3") == keys(SMOKE, "mgd3 + dap") and distill_cell(SMOKE, "im + s3", 1) == distill_cell(SMOKE, "ims3", 1)
    with pytest.raises(ValueError, match="unknown option of method 'ims3': 'group'; did you mean 'groups'"): distill_cell(SMOKE, "ims3", 1, group=2)


def test_one_missing_thing_is_one_line_and_nothing_is_written(dit_profile, images, tmp_path):
    for changes, message in ((dict(weights=str(tmp_path / "none.pt")), "none.pt"), (dict(vae=str(tmp_path / "none")), "none"), (dict(image_size=32), "8×8"), ({"dap.layer": 7}, "no layer 7; this denoiser has 2 blocks")):
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error: distill("dap", dit_profile.replace(**changes), ipc=1, out=tmp_path / "set")
        assert "\n" not in str(error.value) and not (tmp_path / "set").exists()


@pytest.mark.parametrize("method", ["s3", "cao2", "igd", "d3hr", "minimax + s3"])
def test_methods_prepare_what_they_need_by_themselves(method):
    """From Python, without a store: nothing was prepared before."""
    made = distill(method, SMOKE, ipc=2, **SMALL.get(method, {}))
    assert len(made) == 20


def test_sums_that_cannot_be_are_refused_before_anything_is_computed():
    for name, message in (("d4m + d3hr", "cannot both decide 'start'"), ("s3 + cao2", "cannot both decide 'candidates'"), ("minimax + random", "'random' makes its images itself"), ("im + minimax", "two different weights")):
        with pytest.raises(ValueError, match=message): distill_cell(SMOKE, name, 1)
