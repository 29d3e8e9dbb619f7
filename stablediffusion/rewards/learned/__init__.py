"""Learned rewards of images: CLIPScore, PickScore, HPSv2, LAION's aesthetic score, ImageReward.

| name | weights | what it gives |
|---|---|---|
| ``clipscore`` | ``openai/clip-vit-large-patch14`` | 100 times the cosine of image and prompt |
| ``pickscore`` | ``yuvalkirstain/PickScore_v1`` | preference, logits |
| ``aesthetic`` | ``shunk031/aesthetics-predictor-v2-sac-logos-ava1-l14-linearMSE`` | beauty, about 1 to 10 |
| ``hpsv2`` | a folder of one's own | preference, cosine |
| ``imagereward`` | a folder of one's own | preference, standard deviations of people's ratings |

Weights are safetensors in a folder or on the hub; a pickle is never read and no code of a repository is run. Two
rewards were published as pickles only, and need a folder that is made once, as they are named there:

    from safetensors.torch import save_file
    save_file(torch.load("HPS_v2.1_compressed.pt", weights_only=True)["state_dict"], "hpsv2/model.safetensors")
    save_file(torch.load("ImageReward.pt", weights_only=True), "imagereward/ImageReward.safetensors")

of ``xswu/HPSv2`` and ``THUDM/ImageReward``. HPSv2 may also be a ``CLIPModel`` of transformers: version 2 is
``CLIPModel.from_pretrained("adams-story/HPSv2-hf").save_pretrained(FOLDER)``. Tokenizers and image settings that a
folder lacks are those of CLIP and of ``google-bert/bert-base-uncased``, fetched from the hub.

All are differentiable. Their modules hold the formulas and sources. An evaluation on Stable Diffusion 1.5 as in the
paper on Diffusion Blend takes ``imagereward`` (a folder), ``pickscore``, ``clipscore`` and ``aesthetic`` (the ids
above); VILA, its aesthetic score, exists for TensorFlow alone, and ``aesthetic`` is another score in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from sdeblend.reward import Reward
from stablediffusion.rewards.learned.base import Scorer
from stablediffusion.rewards.learned.blip import FILE, load_blip
from stablediffusion.rewards.learned.clip import load_aesthetic, load_similarity
from stablediffusion.rewards.learned.files import WEIGHTS, Model, fetch

BATCH = 16


@dataclass(frozen=True)
class Learned:
    """A learned reward, loaded when called.

    Attributes:
        name: of the reward.
        load: reads its weights.
        model: hub id of the weights, None where there are none in safetensors.
        unit: of the values.
        needs: what a folder must hold, where there is no hub id.
        files: patterns of the files of weights.
    """

    name: str
    load: Callable[[Model], Scorer]
    model: str | None
    unit: str
    needs: str = ""
    files: tuple[str, ...] = WEIGHTS

    def __call__(
        self,
        model: str | None = None,
        *,
        revision: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch: int = BATCH,
    ) -> Reward:
        """Load the reward.

        Args:
            model: folder or hub id of its weights; its own default if left out.
            revision: branch, tag or commit on the hub.
            device: where to compute.
            dtype: of the weights; the head and all cosines are float32.
            batch: images at a time.

        Raises:
            ValueError: no weights, or those of another model.
        """
        if not dtype.is_floating_point:
            raise ValueError(f"reward {self.name!r} needs a dtype of floating point, got {dtype}; give torch.float32")
        found = model or self.model
        if found is None:
            raise ValueError(
                f"reward {self.name!r} needs a model, published as a pickle, which is never read: give a folder with "
                f"{self.needs} (see stablediffusion.rewards.learned)"
            )
        folder = fetch(self.name, found, revision, weights=self.files)
        scorer = self.load(Model(self.name, folder, torch.device(device), dtype, batch))
        return Reward(self.name, scorer, True, self.unit)


LEARNED: Mapping[str, Learned] = {
    reward.name: reward
    for reward in (
        Learned("clipscore", load_similarity, "openai/clip-vit-large-patch14", "100 cos(image, prompt)"),
        Learned("pickscore", load_similarity, "yuvalkirstain/PickScore_v1", "logits of preference"),
        Learned(
            "aesthetic", load_aesthetic, "shunk031/aesthetics-predictor-v2-sac-logos-ava1-l14-linearMSE",
            "aesthetic rating, about 1 to 10",
        ),
        Learned(
            "hpsv2", load_similarity, None, "cos(image, prompt)",
            "model.safetensors, made once from HPS_v2.1_compressed.pt",
        ),
        Learned(
            "imagereward", load_blip, None, "standard deviations of people's ratings",
            "ImageReward.safetensors, made once from ImageReward.pt", (FILE,),
        ),
    )
}  # fmt: skip
