"""Tiny models with random weights in the layouts of the learned rewards, and ImageReward written out from its paper."""

from __future__ import annotations

import json
import math

import torch
import transformers
from safetensors.torch import save_file
from torch.nn import functional as F

from stablediffusion.rewards.learned.base import head
from stablediffusion.testing.text import clip_tokenizer

SIDE, PATCH, WIDTH, BERT, WORDS = 32, 8, 128, 64, 40
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randomised(network, seed=0, size=0.1):
    """Give a network weights that depend on the seed alone, large enough to matter."""
    g = seeded(seed)
    for parameter in network.parameters():
        noise = torch.randn(parameter.shape, generator=g)
        parameter.data.copy_(parameter.data + size * noise if parameter.ndim < 2 else 2 * size * noise)
    return network.eval()


def clip_config(projection=16):
    tokenizer = clip_tokenizer()
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id, "projection_dim": projection}  # fmt: skip
    vision = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 3,
              "image_size": SIDE, "patch_size": PATCH, "projection_dim": projection}  # fmt: skip
    return transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection)


def processor():
    return transformers.CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )


def clip_folder(folder, **saving):
    """Save a CLIPModel with its tokenizer and settings, and return the model."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = randomised(transformers.CLIPModel(clip_config()))
    model.logit_scale.data.fill_(4.0)
    model.save_pretrained(folder, **saving)
    clip_tokenizer().save_pretrained(folder)
    processor().save_pretrained(folder)
    return model


def aesthetic_folder(folder):
    """Save an image encoder with a head in one file, and return both."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = clip_config().vision_config
        model, top = randomised(transformers.CLIPVisionModelWithProjection(config)), randomised(head(16), 1, 0.2)
    table = config.to_dict() | {"model_type": "aesthetics_predictor", "auto_map": {"AutoModel": "v2.Predictor"}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(table))
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(state | {f"layers.{k}": v for k, v in top.state_dict().items()}, folder / "model.safetensors")
    processor().save_pretrained(folder)
    return model, top


def openclip_folder(folder):
    """Save a CLIPModel with the heads of ViT-H/14 under OpenCLIP's names, without settings, and return it."""
    config = clip_config()
    for part in (config.text_config, config.vision_config):
        part.num_attention_heads, part.hidden_act = 16, "gelu"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = randomised(transformers.CLIPModel(config))
    own, state = model.state_dict(), {}
    state["visual.class_embedding"] = own["vision_model.embeddings.class_embedding"]
    state["visual.positional_embedding"] = own["vision_model.embeddings.position_embedding.weight"]
    state["visual.conv1.weight"] = own["vision_model.embeddings.patch_embedding.weight"]
    state["visual.proj"], state["text_projection"] = own["visual_projection.weight"].T, own["text_projection.weight"].T
    state["token_embedding.weight"] = own["text_model.embeddings.token_embedding.weight"]
    state["positional_embedding"] = own["text_model.embeddings.position_embedding.weight"]
    state["logit_scale"] = own["logit_scale"]
    norms = {"visual.ln_pre": "vision_model.pre_layrnorm", "visual.ln_post": "vision_model.post_layernorm",
             "ln_final": "text_model.final_layer_norm"}  # fmt: skip
    for i in range(2):
        for theirs, ours in (("visual.transformer", "vision_model"), ("transformer", "text_model")):
            block, layer = f"{theirs}.resblocks.{i}", f"{ours}.encoder.layers.{i}"
            norms |= {f"{block}.ln_1": f"{layer}.layer_norm1", f"{block}.ln_2": f"{layer}.layer_norm2"}
            norms |= {f"{block}.mlp.c_fc": f"{layer}.mlp.fc1", f"{block}.mlp.c_proj": f"{layer}.mlp.fc2"}
            norms |= {f"{block}.attn.out_proj": f"{layer}.self_attn.out_proj"}
            for kind in ("weight", "bias"):
                parts = [own[f"{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
                state[f"{block}.attn.in_proj_{kind}"] = torch.cat(parts)
    state |= {f"{a}.{kind}": own[f"{b}.{kind}"] for a, b in norms.items() for kind in ("weight", "bias")}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")
    clip_tokenizer().save_pretrained(folder)
    processor().save_pretrained(folder)
    return model


def blip_state(depth=2):
    """Return random tensors under the names of the original ImageReward checkpoint, as its code makes them."""
    shapes = {"cls_token": (1, 1, WIDTH), "pos_embed": (1, (SIDE // PATCH) ** 2 + 1, WIDTH),
              "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH), "patch_embed.proj.bias": (WIDTH,)}  # fmt: skip
    shapes |= _norm("norm", WIDTH)
    for i in range(depth):
        at = f"blocks.{i}."
        shapes |= _norm(f"{at}norm1", WIDTH) | _linear(f"{at}attn.qkv", WIDTH, 3 * WIDTH)
        shapes |= _linear(f"{at}attn.proj", WIDTH, WIDTH) | _norm(f"{at}norm2", WIDTH)
        shapes |= _linear(f"{at}mlp.fc1", WIDTH, 96) | _linear(f"{at}mlp.fc2", 96, WIDTH)
    every = {f"blip.visual_encoder.{k}": v for k, v in shapes.items()}
    text = {"embeddings.word_embeddings.weight": (WORDS, BERT), "embeddings.position_embeddings.weight": (48, BERT)}
    text |= _norm("embeddings.LayerNorm", BERT)
    for i in range(depth):
        at = f"encoder.layer.{i}."
        for kind, width in (("attention", BERT), ("crossattention", WIDTH)):
            text |= _linear(f"{at}{kind}.self.query", BERT, BERT)
            text |= _linear(f"{at}{kind}.self.key", width, BERT) | _linear(f"{at}{kind}.self.value", width, BERT)
            text |= _linear(f"{at}{kind}.output.dense", BERT, BERT) | _norm(f"{at}{kind}.output.LayerNorm", BERT)
        text |= _linear(f"{at}intermediate.dense", BERT, 80) | _linear(f"{at}output.dense", 80, BERT)
        text |= _norm(f"{at}output.LayerNorm", BERT)
    every |= {f"blip.text_encoder.{k}": v for k, v in text.items()}
    every |= _linear("blip.vision_proj", WIDTH, 8) | _linear("blip.text_proj", BERT, 8)
    widths = (BERT, 1024, 128, 64, 16, 1)
    for place, wide, narrow in zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False):
        every |= _linear(f"mlp.layers.{place}", wide, narrow)
    g = seeded(3)
    state = {k: 2 * torch.randn(v, generator=g) / math.sqrt(v[-1] if len(v) > 1 else 10) for k, v in every.items()}
    state |= {k: 1 + v / 2 for k, v in state.items() if k.lower().endswith(("norm.weight", "1.weight", "2.weight"))
              and v.ndim == 1}  # fmt: skip
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(48)[None]
    return state


def _linear(name, wide, narrow):
    return {f"{name}.weight": (narrow, wide), f"{name}.bias": (narrow,)}


def _norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def blip_folder(folder):
    """Save such a checkpoint with a tokenizer of letters, and return its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    state = blip_state()
    save_file(state, folder / "ImageReward.safetensors")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = transformers.BertTokenizer(vocab={w: i for i, w in enumerate(words)})
    tokenizer.save_pretrained(folder)
    return state


def image_reward_by_hand(state, pixels, ids, mask):
    """Return ImageReward of prepared images (B, 3, SIDE, SIDE) and tokens (B, L), from the formulas alone."""
    see = {k.removeprefix("blip.visual_encoder."): v for k, v in state.items()}
    x = F.conv2d(pixels, see["patch_embed.proj.weight"], see["patch_embed.proj.bias"], stride=PATCH)
    x = torch.cat([see["cls_token"].expand(len(x), -1, -1), x.flatten(2).mT], 1) + see["pos_embed"]
    for i in range(2):
        at = f"blocks.{i}."
        y = _normed(see, f"{at}norm1", x, 1e-6)
        q, k, v = _linear_of(see, f"{at}attn.qkv", y).chunk(3, -1)
        x = x + _linear_of(see, f"{at}attn.proj", _attended(q, k, v))
        y = _linear_of(see, f"{at}mlp.fc1", _normed(see, f"{at}norm2", x, 1e-6))
        x = x + _linear_of(see, f"{at}mlp.fc2", F.gelu(y))
    patches = _normed(see, "norm", x, 1e-6)
    read = {k.removeprefix("blip.text_encoder."): v for k, v in state.items()}
    h = read["embeddings.word_embeddings.weight"][ids]
    h = _normed(read, "embeddings.LayerNorm", h + read["embeddings.position_embeddings.weight"][: ids.shape[1]], 1e-12)
    for i in range(2):
        for kind, source, keep in (("attention", None, mask), ("crossattention", patches, None)):
            at = f"encoder.layer.{i}.{kind}."
            q = _linear_of(read, f"{at}self.query", h)
            k, v = (_linear_of(read, f"{at}self.{part}", h if source is None else source) for part in ("key", "value"))
            h = _normed(read, f"{at}output.LayerNorm",
                        h + _linear_of(read, f"{at}output.dense", _attended(q, k, v, keep)), 1e-12)  # fmt: skip
        at = f"encoder.layer.{i}."
        y = _linear_of(read, f"{at}output.dense", F.gelu(_linear_of(read, f"{at}intermediate.dense", h)))
        h = _normed(read, f"{at}output.LayerNorm", h + y, 1e-12)
    out = h[:, 0]
    for place in (0, 2, 4, 6, 7):
        out = _linear_of(state, f"mlp.layers.{place}", out)
    return (out[:, 0] - 0.16717362830052426) / 1.0333394966054072


def _linear_of(state, name, x):
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def _normed(state, name, x, eps):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def _attended(q, k, v, mask=None):
    """Attention in heads of 64 numbers."""
    q, k, v = (t.unflatten(-1, (-1, 64)).transpose(1, 2) for t in (q, k, v))
    weights = q @ k.mT / 8
    if mask is not None:
        weights = weights.masked_fill(mask[:, None, None] == 0, -torch.inf)
    return (weights.softmax(-1) @ v).transpose(1, 2).flatten(2)
