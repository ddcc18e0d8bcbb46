"""Generators from disk to images: pipelines of random weights, saved by diffusers, loaded by a profile and sampled; the hub's cache; old files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ddkit.backbones import load_backbone, prompts, read_vae
from ddkit.denoisers import add_scales
from ddkit.profiles import load_profile
from ddkit.sampling import sample

ROOT = Path(__file__).resolve().parent.parent
UNET = dict(sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, attention_head_dim=8)
CLASS_BLOCKS = dict(down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"))
VAE = dict(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, latent_channels=4)


def save_tokenizer(folder: Path, letters="abcdefghijklmnopqrstuvwxyz"):
    """vocab.json and merges.txt as published folders have them; no merges, so every letter is a token. Returns the number of tokens."""
    words = [*letters, *(letter + "</w>" for letter in letters), ",</w>", "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 16, "pad_token": "<|endoftext|>", "tokenizer_class": "CLIPTokenizer"}))
    return len(words)


def save_stable_diffusion(folder: Path, prediction_type: str):
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    size = save_tokenizer(folder / "files")
    text = CLIPTextModel(CLIPTextConfig(vocab_size=size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=16,
                                        bos_token_id=size - 2, eos_token_id=size - 1, pad_token_id=size - 1))
    unet = UNet2DConditionModel(**UNET, cross_attention_dim=32, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type=prediction_type)
    pipeline = StableDiffusionPipeline(AutoencoderKL(**VAE), text, CLIPTokenizer.from_pretrained(folder / "files"), unet, scheduler, None, None, requires_safety_checker=False)
    pipeline.save_pretrained(folder / "sd")
    (folder / "sd/tokenizer/tokenizer.json").unlink()
    for file in (folder / "files").iterdir(): file.replace(folder / "sd/tokenizer" / file.name)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def profile_of(weights, **changes):
    return load_profile("imagewoof-sd", device="cpu", image_size=16, weights=str(weights), **changes)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_stable_diffusion_samples_what_the_pipeline_samples(tmp_path, prediction_type):
    """Latents of our DDIM and of diffusers' own, for the same start, prompt and guidance."""
    pipeline = save_stable_diffusion(tmp_path, prediction_type)
    profile = profile_of(tmp_path / "sd", negative_prompt="blurry")
    sd = load_backbone(profile)
    labels, start = torch.tensor([0, 7]), torch.randn(2, *sd.latent_shape, generator=torch.Generator().manual_seed(1))
    *_, last = sample(sd, labels, shape=sd.latent_shape, sampler="ddim", steps=5, cfg_scale=profile.cfg_scale, cfg_channels=profile.cfg_channels, null_label=sd.null_label, x_start=start)
    assert sd.decode(last.x).shape == (2, 3, 16, 16) and sd.decode(last.x).isfinite().all()
    # the pipeline's own habit is timesteps 1, 201 … and ᾱ of timestep 0 at the end; the kit's DDIM has 0, 200 … and 1, as the papers' code
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, steps_offset=0, set_alpha_to_one=True)
    theirs = pipeline([prompts(profile)[i] for i in labels], negative_prompt=["blurry"] * 2, num_inference_steps=5, guidance_scale=profile.cfg_scale, latents=start.clone(), output_type="latent").images
    assert torch.allclose(last.x, theirs, rtol=1e-3, atol=1e-3 * theirs.std().item()), (last.x - theirs).abs().max()


@pytest.mark.parametrize("autoencoder", ["vae", "vqvae"])
def test_latent_diffusion_samples(tmp_path, autoencoder):
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DModel, VQModel

    torch.manual_seed(0)
    UNet2DModel(**UNET, **CLASS_BLOCKS, num_class_embeds=1001).save_pretrained(tmp_path / "unet")
    (AutoencoderKL(**VAE) if autoencoder == "vae" else VQModel(**VAE, num_vq_embeddings=16)).save_pretrained(tmp_path / autoencoder)
    DDPMScheduler(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear").save_pretrained(tmp_path / "scheduler")
    ldm = load_backbone(profile_of(tmp_path, generator="latent-diffusion"))
    add_scales(ldm.denoiser)
    made = [list(sample(ldm, ldm.model_labels(torch.tensor(ids)), shape=ldm.latent_shape, sampler="ddim", steps=4, cfg_scale=2.0, cfg_channels=4, seed=0))[-1].x for ids in ([0, 3], [3, 0])]
    images = ldm.decode(made[0])
    assert images.shape == (2, 3, 16, 16) and images.isfinite().all() and not torch.allclose(made[0][0], made[1][0], atol=1e-3)


def test_old_attention_names_of_a_published_vae_are_read(tmp_path):
    """Older VAE files call the attention's layers query, key, value and proj_attn; diffusers renames them, and none may count as missing."""
    from diffusers import AutoencoderKL
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    vae = AutoencoderKL(**VAE)
    vae.save_pretrained(tmp_path / "vae")
    file = tmp_path / "vae/diffusion_pytorch_model.safetensors"
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    renamed = {}
    for name, weight in load_file(file).items():
        for new, was in old.items(): name = name.replace(new, was)
        renamed[name] = weight
    assert any(".proj_attn." in name for name in renamed)
    save_file(renamed, file, metadata={"format": "pt"})
    read = read_vae(profile_of(tmp_path))
    assert all(torch.equal(weight, read.state_dict()[name]) for name, weight in vae.state_dict().items())


def test_weights_that_are_missing_are_not_made_up(tmp_path):
    from diffusers import AutoencoderKL
    from safetensors.torch import load_file, save_file

    AutoencoderKL(**VAE).save_pretrained(tmp_path / "vae")
    file = tmp_path / "vae/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights.pop("encoder.conv_in.bias")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks weights: encoder.conv_in.bias"): read_vae(profile_of(tmp_path))
    weights["encoder.conv_in.bias"] = torch.zeros(9)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="cannot use vae of") as error: read_vae(profile_of(tmp_path))
    assert "\n" not in str(error.value)


HUB = """
import sys
from ddkit.backbones import load_backbone
from ddkit.profiles import load_profile
for names in sys.argv[1:]:
    weights, vae = names.split(",")
    profile = load_profile("imagewoof", device="cpu", image_size=16, weights=weights, vae=vae)
    try: print("latents", load_backbone(profile).latent_shape)
    except FileNotFoundError as error: print("missing:", error)
"""


def test_hub_names_are_read_from_the_cache_and_named_when_they_are_not_there(tmp_path):
    """A cache as the hub's client lays it out, in another process, offline."""
    from diffusers import AutoencoderKL, DiTTransformer2DModel

    def cached(name):
        base, commit = tmp_path / f"hub/models--{name.replace('/', '--')}", "0" * 40
        (base / "refs").mkdir(parents=True); (base / "refs/main").write_text(commit)
        return base / "snapshots" / commit

    dit = cached("somebody/DiT-tiny")
    DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, sample_size=8, num_embeds_ada_norm=1000).save_pretrained(dit / "transformer")
    AutoencoderKL(**VAE).save_pretrained(dit / "vae")
    (dit / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline", "transformer": ["diffusers", "DiTTransformer2DModel"], "vae": ["diffusers", "AutoencoderKL"]}))
    AutoencoderKL(**VAE).save_pretrained(cached("somebody/vae-tiny"))

    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    names = ["somebody/DiT-tiny,", "somebody/DiT-tiny,somebody/vae-tiny", "nobody/nothing,", "somebody/DiT-tiny,nobody/nothing"]
    done = subprocess.run([sys.executable, "-c", HUB, *names], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    told = done.stdout.strip().splitlines()
    assert told[:2] == ["latents (4, 8, 8)"] * 2 and all("hf download nobody/nothing" in line for line in told[2:]) and len(told) == 4, told


def test_the_core_does_not_import_diffusers_or_transformers():
    code = "import sys, ddkit.backbones; print(sorted({'diffusers', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout.strip() == "[]"
