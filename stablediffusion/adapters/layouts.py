"""What a LoRA file says: which layer changes, by which factors, and how strongly.

Every layout names pairs of factors, and every layout has its own way to say a layer's scale s in W + s B A: a tensor
``layer.alpha`` (then s = alpha / rank), a configuration with patterns (alpha / rank, or alpha / sqrt(rank) with
``use_rslora``), or nothing, which all loaders read as s = 1. A file can change a layer by more than a pair: by a bias
beside B, or by DoRA's lengths m of the rows, W' = m (W + s B A) / |W + s B A|. What else it holds is named, so that it
is refused and not left out.

Source: Hu et al. 2106.09685 (LoRA), Kalajdzievski 2312.03732 (rslora), Liu et al. 2402.09353 (DoRA).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from peft.utils.other import get_pattern_key
from torch import Tensor

from stablediffusion.adapters.files import PEFT_PREFIX, LoraFile

# how the two factors of a pair end, A and B; the first that fits
_FACTORS = (
    ("lora_A.weight", "lora_B.weight"),
    ("lora_A.default.weight", "lora_B.default.weight"),
    ("lora_down.weight", "lora_up.weight"),
    ("down.weight", "up.weight"),
    ("lora_A", "lora_B"),
)
_BIASES = ("lora_B.bias", "lora_B.default.bias")
_LENGTHS = ("lora_magnitude_vector", "lora_magnitude_vector.weight", "lora_magnitude_vector.default.weight")
_KOHYA_LENGTHS = "dora_scale"
_KOHYA_BIAS = "diff_b"  # beside the pair, at full strength
# what else is found in files, by a part of its name
_KINDS = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "boft_": "BOFT",
    "lora_mid": "LoRA with a core between its factors (lora_mid)",
    "lora_embedding": "embeddings",
    "dora_scale": "DoRA",
    "magnitude": "DoRA",
    "diff_b": "differences of biases (diff_b)",
    "diff": "full differences of weights (diff)",
    "norm": "norms",
    "bias": "biases",
    "lora": "factors without their partner",
}
# what a configuration of peft may ask for beyond a plain pair; each is refused unless it is off
_UNKNOWN_OPTIONS = ("use_qalora", "use_bdlora", "layer_replication", "alora_invocation_tokens", "target_parameters")


@dataclass(frozen=True)
class Change:
    """What a file does to one layer.

    Attributes:
        down: A, (rank, in, ...).
        up: B, (out, rank, ...).
        scale: s.
        bias: of B, (out,), or None.
        lengths: DoRA's m, (out,), or None.
    """

    down: Tensor
    up: Tensor
    scale: float
    bias: Tensor | None = None
    lengths: Tensor | None = None

    @property
    def rank(self) -> int:
        """Of the factors."""
        return len(self.down)


def changes_of(file: LoraFile) -> dict[str, Change]:
    """Return what a file changes, by the layers' names as they are in the file.

    Raises:
        ValueError: for adapters of another kind, options unknown here, factors that do not fit, or tensors beyond those
            of ``Change`` that are not all zero.
    """
    _check_options(file)
    rest = dict(file.tensors)
    found: dict[str, Change] = {}
    for key in file.tensors:
        pair = next(((a, b) for a, b in _FACTORS if key.endswith(a)), None)
        partner = pair and key.removesuffix(pair[0]) + pair[1]
        if pair is None or partner not in rest:
            continue
        name = key.removesuffix(pair[0])
        down, up, stem = rest.pop(key), rest.pop(partner), name.rstrip("._")
        if up.ndim < 2 or down.ndim < 2 or up.shape[1] != len(down):
            raise ValueError(
                f"the factors of a LoRA must share their rank, got {tuple(down.shape)} and {tuple(up.shape)} for "
                f"{stem} in {where_of(file)}; fetch the file again"
            )
        alpha = rest.pop(f"{stem}.alpha", None)
        lengths = next((rest.pop(name + end) for end in _LENGTHS if name + end in rest), None)
        kohya = rest.get(f"{stem}.{_KOHYA_LENGTHS}")
        if lengths is None and kohya is not None and kohya.numel() == len(up) == kohya.shape[0]:
            lengths = rest.pop(f"{stem}.{_KOHYA_LENGTHS}")
        scale = float(alpha) / len(down) if alpha is not None else _configured(file, stem, len(down))
        bias = next((rest.pop(name + end) for end in _BIASES if name + end in rest), None)
        if bias is None and f"{stem}.{_KOHYA_BIAS}" in rest and scale != 0:
            bias = rest.pop(f"{stem}.{_KOHYA_BIAS}") / scale
        found[stem] = Change(down, up, scale, bias, None if lengths is None else lengths.flatten())
    left = [key for key, value in rest.items() if not key.endswith(".alpha") and bool(value.any())]
    if left:
        raise ValueError(_left_over(file, left))
    return found


def where_of(file: LoraFile) -> str:
    """Return where a file was read, for messages."""
    return str(file.path or "the given tensors")


def some(names: Collection[str]) -> str:
    """Return one of several names and how many there are, for messages."""
    first = next(iter(sorted(names)))
    return first if len(names) == 1 else f"{first} and {len(names) - 1} more"


def layer_of(name: str, layers: Collection[str]) -> str | None:
    """Return the layer of a network that a file means: its name as peft, diffusers or a legacy file writes it.

    Args:
        name: in the file, without its component.
        layers: names of the network's modules.
    """
    name = name.removeprefix(PEFT_PREFIX)
    for written in (name, _modern(name)):
        for candidate in (written, written.removeprefix("text_model."), f"text_model.{written}"):
            if candidate in layers:
                return candidate
    return None


def settings_of(changes: Mapping[str, Change]) -> dict[str, Any]:
    """Return the configuration that gives every layer its own rank and scale.

    Args:
        changes: by the layers' names in the network.
    """
    ranks = {name: change.rank for name, change in changes.items()}
    alphas = {name: change.scale * change.rank for name, change in changes.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{name}": value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{name}": value for name, value in alphas.items() if value != alpha},
        "target_modules": sorted(changes),
        "use_dora": any(change.lengths is not None for change in changes.values()),
        "lora_bias": any(change.bias is not None for change in changes.values()),
    }


def _modern(name: str) -> str:
    """Return the layer that a name of the time of attention processors means."""
    name = name.replace(".processor", "").removesuffix(".lora").removesuffix(".lora_linear_layer")
    if name.endswith("_lora"):
        name = name.removesuffix("_lora")
        if ".self_attn." in name:
            parent, _, last = name.rpartition(".to_")
            return f"{parent}.{last}_proj"
    return f"{name}.0" if name.endswith(".to_out") else name


def _configured(file: LoraFile, stem: str, rank: int) -> float:
    """Return the scale that a file's configuration gives a layer; one where it says nothing."""
    component, _, name = stem.partition(".")
    own = {
        key.removeprefix(f"{component}."): v for key, v in (file.metadata or {}).items() if key.startswith(component)
    }
    if "r" not in own:
        own, name = file.metadata or {}, stem.removeprefix(PEFT_PREFIX)
    if "r" not in own:
        return 1.0
    pattern = own.get("alpha_pattern") or {}
    alpha = float(pattern.get(get_pattern_key(list(pattern), name), own.get("lora_alpha", 8)))
    return alpha / (rank**0.5 if own.get("use_rslora") else rank)


def _check_options(file: LoraFile) -> None:
    for key, value in (file.metadata or {}).items():
        option = key.rpartition(".")[2]
        if option == "peft_type" and str(value).rpartition(".")[2].upper() != "LORA":
            raise ValueError(
                f"an adapter must be a LoRA, got {value} in {where_of(file)}; merge it into a network, and give that "
                "network as the member"
            )
        if option in _UNKNOWN_OPTIONS and value:
            raise ValueError(
                f"a LoRA must be of plain pairs, got the option {option} in {where_of(file)}; merge it first"
            )


def _left_over(file: LoraFile, left: Iterable[str]) -> str:
    kinds: dict[str, set[str]] = {}
    for key in left:
        kind = next((kind for part, kind in _KINDS.items() if part in key), "other tensors")
        kinds.setdefault(kind, set()).add(key.rpartition(".")[0] or key)
    told = " and ".join(f"{kind} of {len(names)} layers (such as {min(names)})" for kind, names in kinds.items())
    return (
        f"a LoRA must load whole or not at all, got {told} in {where_of(file)}, which are not read here; "
        "merge it into a network, and give that network as the member"
    )
