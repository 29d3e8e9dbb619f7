"""Training the small model: it resumes bit for bit, and a run of a few steps leaves a pipeline that loads."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch import nn

from stablediffusion.small.drawing import draw
from stablediffusion.small.loop import Budget, Loop, Rate, seeded
from stablediffusion.small.networks import autoencoder, text_encoder, unet
from stablediffusion.small.scenes import sample_scenes
from stablediffusion.small.train import main, train
from stablediffusion.small.train_unet import train_unet
from stablediffusion.small.train_vae import whiten
from tests.strategies import generator

STAGES = ("vae", "text", "scorer", "unet")


class CutOff(Exception):
    """Stands for a killed process."""


def cut_after(steps, loss):
    """Return the loss, which ends the run at its ``steps + 1``-th call."""
    calls = iter(range(steps))

    def cut(g):
        if next(calls, None) is None:
            raise CutOff
        return loss(g)

    return cut


def test_a_run_cut_off_and_resumed_equals_one_that_was_not(tmp_path):
    def loop(state):
        with seeded(0):
            network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        return Loop(state, {"net": network}, Rate({"net": 1e-2}, warm_up=4), seed=1, save_every=0.0), network

    def run(state, cut=None):
        trainer, network = loop(state)

        def loss(g):
            x = torch.randn(16, 4, generator=g)
            return (network(x)[:, 0] - x.sum(1).sin()).square().mean()

        trainer.run(loss if cut is None else cut_after(cut, loss), Budget(steps=20), every=5)
        return trainer

    whole = run(tmp_path / "whole")
    for cut in (7, 6):
        with pytest.raises(CutOff):
            run(tmp_path / "parts", cut)
    parts = run(tmp_path / "parts")
    assert whole.step == parts.step == 20
    first, second = load_file(tmp_path / "whole"), load_file(tmp_path / "parts")
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    with seeded(0):
        begin = nn.Linear(4, 8).weight
    assert not torch.equal(first["weights.net.0.weight"], begin)


def test_the_denoiser_s_stage_resumes_bit_for_bit(tmp_path, monkeypatch):
    with seeded(0):
        vae = autoencoder().eval().requires_grad_(False)

    def text():
        with seeded(1):
            return text_encoder()

    monkeypatch.setattr("stablediffusion.small.train_unet.Loop", lambda *a, **k: Loop(*a, **k, save_every=0.0))
    train_unet(tmp_path / "whole", Budget(steps=3), vae, text(), batch=2)
    from stablediffusion.small import train_unet as module

    monkeypatch.setattr(module, "unet_loss", cut_loss := _CutLoss(module.unet_loss))
    with pytest.raises(CutOff):
        train_unet(tmp_path / "parts", Budget(steps=3), vae, text(), batch=2)
    cut_loss.left = 3
    train_unet(tmp_path / "parts", Budget(steps=3), vae, text(), batch=2)
    first, second = (load_file(tmp_path / name / "unet.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(first[k], second[k]) for k in first)


class _CutLoss:
    def __init__(self, loss):
        self.loss, self.left = loss, 1

    def __call__(self, *args):
        if self.left == 0:
            raise CutOff
        self.left -= 1
        return self.loss(*args)


def test_a_finished_stage_is_not_run_again(tmp_path):
    network = nn.Linear(2, 1)
    for expected in (3, 0):
        calls = []

        def loss(g, calls=calls):
            calls.append(0)
            return network(torch.randn(4, 2, generator=g)).square().mean()

        Loop(tmp_path / "state", {"net": network}, Rate({"net": 1e-2})).run(loss, Budget(steps=3))
        assert len(calls) == expected


def test_averages_are_taken_and_restored_around_a_check(tmp_path):
    with seeded(0):
        network = nn.Linear(2, 1)
    loop = Loop(tmp_path / "state", {"net": network}, Rate({"net": 1e-1}, warm_up=1))
    seen = []

    def check():
        seen.append(network.weight.detach().clone())
        return {"value": 1.0}

    loop.run(lambda g: network(torch.randn(4, 2, generator=g)).square().mean(), Budget(steps=4), check)
    assert torch.equal(seen[0], loop.averages["net.weight"])
    assert not torch.equal(seen[0], network.weight)
    assert loop.log[-1] == {"step": 4, "seconds": 0, "value": 1.0}


def test_whitened_latents_have_unit_covariance_and_the_same_pictures():
    with seeded(0):
        vae = autoencoder().eval()
    images = draw(sample_scenes(64, generator(0)), generator(1))
    with torch.no_grad():
        before = vae.decode(vae.encode(images).latent_dist.mode()).sample
        whiten(vae, images)
        latents = vae.encode(images).latent_dist.mode()
        after = vae.decode(latents).sample
    assert torch.allclose(torch.cov(latents.transpose(0, 1).flatten(1)), torch.eye(4), atol=1e-2)
    assert torch.allclose(before, after, atol=1e-3)


def test_a_few_steps_of_every_stage_leave_a_pipeline_that_loads(tmp_path):
    train(tmp_path, {stage: Budget(steps=1) for stage in STAGES}, batch=2, checked=2)
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "export" / "model", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a red circle", num_inference_steps=2, output_type="pt", generator=generator(0)).images
    assert image.shape == (1, 3, 32, 32) and image.isfinite().all()
    assert (tmp_path / "export" / "scorer.safetensors").exists()
    assert '"stage": "unet"' in (tmp_path / "export" / "training.json").read_text()


def test_a_folder_in_use_is_refused_unless_resumed(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--steps", "1"])
    assert "--resume" in capsys.readouterr().err


def test_the_networks_fit_the_package():
    sizes = {build: sum(p.numel() for p in build().parameters()) for build in (unet, autoencoder, text_encoder)}
    assert 2 * sum(sizes.values()) < 10_000_000, sizes
