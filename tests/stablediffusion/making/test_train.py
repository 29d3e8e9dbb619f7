"""Training the small model: it resumes bit for bit, and a run of a few steps leaves a pipeline that loads.

Where there is no GPU, a pretended device stands for one (``Pretend``): its tensors are computed on the CPU, and an
operation that meets one of them together with a tensor left on the CPU is refused, as a GPU would.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from stablediffusion.making.loop import Budget, Loop, Rate, seeded
from stablediffusion.making.networks import autoencoder, text_encoder, unet
from stablediffusion.making.train import SECONDS, STEPS, available, main, schedule, train
from stablediffusion.making.train_unet import train_unet
from stablediffusion.making.train_vae import whiten
from stablediffusion.scenes.captions import sample_scenes
from stablediffusion.scenes.drawing import draw
from stablediffusion.small.files import SMALL
from tests.support.strategies import generator

# the pretended device's name; torch itself computes nothing there
THERE = torch.device("meta")
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class Moved(torch.Tensor):
    """A tensor on the pretended device; ``here`` holds its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, here):
        return torch.Tensor._make_wrapper_subclass(
            cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype, device=THERE
        )

    def __init__(self, here):
        self.here = here

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _compute(function, args, kwargs or {})


class Pretend(TorchDispatchMode):
    """Computes for the pretended device, and refuses it tensors of the CPU other than scalars."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _compute(function, args, kwargs or {})


def _compute(function, args, kwargs):
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    moved = {id(x.here): x for x in tensors if isinstance(x, Moved)}
    left = [tuple(x.shape) for x in tensors if not isinstance(x, Moved) and x.dim()]
    if moved and left and function not in _COPIES:
        raise RuntimeError(f"{function} must find all tensors on one device, got some of shapes {left} on the CPU")
    device = kwargs.get("device")
    there = bool(moved) if device is None else torch.device(device) == THERE
    if function is torch.ops.aten.copy_.default:
        there = isinstance(args[0], Moved)
    args, kwargs = tree_map(lambda x: x.here if isinstance(x, Moved) else x, (args, kwargs))
    out = function(*args, **(kwargs if device is None else kwargs | {"device": torch.device("cpu")}))

    def move(x):
        # what an operation in place returns is its argument
        return moved[id(x)] if id(x) in moved else Moved(x) if isinstance(x, torch.Tensor) else x

    return tree_map(move, out) if there else out


@pytest.fixture
def pretended(monkeypatch):
    """Let the fused optimiser take the pretended device."""
    for module in ("torch.optim.optimizer", "torch.optim.adam", "torch.optim.adamw"):
        # torch.optim hides its modules
        monkeypatch.setattr(
            sys.modules[module], "_get_fused_kernels_supported_devices", lambda: ["cpu", "meta"], raising=False
        )


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


def test_a_run_cut_off_and_resumed_equals_one_that_was_not(tmp_path, pretended):
    def run(state, cut=None, device="cpu"):
        with seeded(0):
            network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).to(device)
        trainer = Loop(state, {"net": network}, Rate({"net": 1e-2}, warm_up=4), seed=1, save_every=0.0)

        def loss(g):
            x = torch.randn(16, 4, generator=g).to(device)
            return (network(x)[:, 0] - x.sum(1).sin()).square().mean()

        trainer.run(loss if cut is None else cut_after(cut, loss), Budget(steps=20), every=5)
        return trainer

    whole = run(tmp_path / "whole")
    # the second part on another device
    with pytest.raises(CutOff):
        run(tmp_path / "parts", cut=7)
    with pytest.raises(CutOff), Pretend():
        run(tmp_path / "parts", cut=6, device=THERE)
    parts = run(tmp_path / "parts")
    assert whole.step == parts.step == 20
    first, second = load_file(tmp_path / "whole"), load_file(tmp_path / "parts")
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    with seeded(0):
        begin = nn.Linear(4, 8).weight
    assert not torch.equal(first["weights.net.0.weight"], begin)


def test_the_denoiser_s_stage_resumes_bit_for_bit(tmp_path, monkeypatch, pretended):
    with seeded(0):
        vae = autoencoder().eval().requires_grad_(False)

    def stage(folder, device="cpu"):
        with seeded(1):
            text = text_encoder()
        with sdpa_kernel(SDPBackend.MATH):
            train_unet(tmp_path / folder, Budget(steps=3), vae, text, batch=2, device=device)

    monkeypatch.setattr("stablediffusion.making.train_unet.Loop", lambda *a, **k: Loop(*a, **k, save_every=0.0))
    stage("whole")
    from stablediffusion.making import train_unet as module

    monkeypatch.setattr(module, "unet_loss", cut_loss := _CutLoss(module.unet_loss))
    with pytest.raises(CutOff):
        stage("parts")
    cut_loss.left = 3
    # on another device, to which it moves what it is given
    with Pretend():
        stage("parts", THERE)
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


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Return the folder of a run of one step a stage on the CPU; one kernel of attention, so that devices agree."""
    folder = tmp_path_factory.mktemp("here")
    with sdpa_kernel(SDPBackend.MATH):
        train(folder, schedule(steps=1), batch=2, checked=2)
    return folder


def test_a_few_steps_of_every_stage_leave_a_pipeline_that_loads(here):
    pipe = StableDiffusionPipeline.from_pretrained(here / "export" / "model", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a red circle", num_inference_steps=2, output_type="pt", generator=generator(0)).images
    assert image.shape == (1, 3, 32, 32) and image.isfinite().all()
    assert (here / "export" / "scorer.safetensors").exists()
    written, bundled = (json.loads((folder / "training.json").read_text()) for folder in (here / "export", SMALL))
    assert written.keys() == bundled.keys() == {"note", "log"}
    assert "accuracies" in written["note"] and "earlier" in bundled["note"]
    assert written["log"][-1]["stage"] == "unet" and "all" in written["log"][-1]


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.slow
@pytest.mark.parametrize("device", [THERE, pytest.param(torch.device("cuda"), marks=GPU)], ids=str)
def test_a_run_on_another_device_has_the_same_data_and_leaves_the_same_files(
    here, tmp_path, monkeypatch, pretended, device
):
    seen, save = set(), Loop.save

    def watched(loop):
        for name, p in loop.parameters.items():
            seen.update(x.device.type for x in (p, loop.averages[name], *loop.optimizer.state[p].values()))
        save(loop)

    monkeypatch.setattr(Loop, "save", watched)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with sdpa_kernel(SDPBackend.MATH), Pretend() if device == THERE else nullcontext():
        train(tmp_path, schedule(steps=1), batch=2, checked=2, device=device)
    assert seen == {device.type}
    files = sorted(path.relative_to(here) for path in here.rglob("*.safetensors"))
    assert len(files) == 8
    for file in files:
        first, second = load_file(here / file), load_file(tmp_path / file)
        assert first.keys() == second.keys(), file
        if device == THERE:
            assert all(torch.equal(first[k], second[k]) for k in first), file
        elif "generator" in first:
            assert torch.equal(first["generator"], second["generator"])
            # a tenth of the gradients; one step is too short to tell by the weights
            ours, theirs = (torch.cat([s[k].flatten() for k in s if k.endswith(".exp_avg")]) for s in (first, second))
            assert (ours - theirs).norm() < 1e-2 * ours.norm(), file


def test_the_pretended_device_refuses_what_was_left_on_the_cpu():
    with Pretend():
        network = nn.Linear(4, 2).to(THERE)
        x = torch.randn(3, 4, generator=generator(0))
        assert network(x.to(THERE)).device == THERE
        for wrong in (lambda: network(x), lambda: network.weight + x[:2], lambda: network.weight[torch.tensor([0])]):
            with pytest.raises(RuntimeError, match="one device"):
                wrong()


@pytest.mark.parametrize("device", ["meta", "nonsense", *([] if torch.cuda.is_available() else ["cuda", "cuda:1"])])
def test_a_device_that_is_not_there_is_refused_in_a_sentence(tmp_path, capsys, device):
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--device", device])
    assert f"torch can use here, got {device!r}; try cpu" in capsys.readouterr().err
    assert available("cpu") == torch.device("cpu")


@pytest.fixture
def budgets(tmp_path, monkeypatch):
    """Return what ``main`` would train by."""

    def of(*options):
        found = []
        monkeypatch.setattr("stablediffusion.making.train.train", lambda folder, given, device: found.append(given))
        main(["--out", str(tmp_path), *options])
        return found[0]

    return of


def test_by_default_every_stage_takes_the_bundled_model_s_steps(budgets):
    log = json.loads((SMALL / "training.json").read_text())["log"]
    taken = {entry["stage"]: entry["step"] for entry in log}
    given = budgets()
    assert given.keys() == taken.keys()
    for stage, budget in given.items():
        assert budget.seconds is None and budget.steps == pytest.approx(taken[stage], rel=0.01), stage


def test_steps_are_of_each_stage_and_minutes_of_all(budgets):
    assert budgets("--steps", "7") == dict.fromkeys(STEPS, Budget(steps=7))
    given = budgets("--minutes", "2")
    assert sum(budget.seconds for budget in given.values()) == pytest.approx(120)
    assert given["unet"].seconds / given["text"].seconds == pytest.approx(SECONDS["unet"] / SECONDS["text"])


@pytest.mark.parametrize("options", [("--steps", "0"), ("--steps", "-1"), ("--minutes", "0"), ("--minutes", "nan")])
def test_a_length_that_is_not_positive_is_refused(budgets, capsys, options):
    with pytest.raises(SystemExit):
        budgets(*options)
    assert "a stage must last a positive number of steps" in capsys.readouterr().err


@pytest.mark.parametrize("lengths", [{}, {"steps": 1, "seconds": 1.0}])
def test_a_budget_is_of_steps_or_of_seconds(lengths):
    with pytest.raises(ValueError, match="give one of the two"):
        Budget(**lengths)


def test_a_folder_in_use_is_refused_unless_resumed(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--steps", "1"])
    assert "--resume" in capsys.readouterr().err


def test_the_networks_fit_the_package():
    sizes = {build: sum(p.numel() for p in build().parameters()) for build in (unet, autoencoder, text_encoder)}
    assert 2 * sum(sizes.values()) < 10_000_000, sizes
