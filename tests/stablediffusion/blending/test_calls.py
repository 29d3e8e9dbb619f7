"""A denoiser's call and output are read by what they are, whatever a family names and nests."""

from __future__ import annotations

import functools

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from stablediffusion.blending.calls import Call, Output


def named(self, hidden_states, timestep, encoder_hidden_states=None, **kwargs):
    """Stand for a transformer's forward."""


def wrapper(self, *args, **kwargs):
    """Stand for a module that hands everything on."""


def listed(self, x, t, cap_feats, **kwargs):
    """Stand for a transformer of lists."""


def rows(count, *shape):
    return torch.arange(count).reshape(-1, *[1] * len(shape)).expand(count, *shape).float()


def test_arguments_of_rows_are_taken_and_others_left():
    """Sizes and lengths have an entry a row; positions go by the sequence, unless they have a batch in front."""
    call = Call.read(
        named,
        (rows(2, 4, 3),),
        {
            "timestep": torch.tensor([7.0, 7.0]),
            "encoder_hidden_states": rows(2, 5),
            "img_ids": rows(2, 3),  # two tokens
            "latent_image_ids": rows(2, 2, 3),
            "image_rotary_emb": (rows(2, 3), rows(2, 3)),
            "img_shapes": [[(1, 2, 2)], [(1, 4, 1)]],
            "txt_seq_lens": [5, 3],
            "skip_layers": [0, 1],
            "added_cond_kwargs": {"time_ids": rows(2, 6), "image_embeds": [rows(2, 1, 4)]},
            "residuals": (rows(2, 1), rows(2, 2)),
            "guidance": None,
            "return_dict": False,
        },
    )
    assert call.rows == 2 and call.time == 7
    part = call.on(torch.zeros(1, 4, 3), torch.tensor([1])).named
    assert len(part["timestep"]) == len(part["encoder_hidden_states"]) == len(part["latent_image_ids"]) == 1
    assert float(part["encoder_hidden_states"][0, 0]) == 1
    assert len(part["img_ids"]) == 2 and [len(v) for v in part["image_rotary_emb"]] == [2, 2]
    assert part["img_shapes"] == [[(1, 4, 1)]] and part["txt_seq_lens"] == [3] and part["skip_layers"] == [0, 1]
    assert float(part["added_cond_kwargs"]["time_ids"][0, 0]) == 1
    assert part["added_cond_kwargs"]["image_embeds"][0].shape == (1, 1, 4)
    assert [v.shape for v in part["residuals"]] == [(1, 1), (1, 2)]
    both = Call.joined([call, call]).named
    assert both["txt_seq_lens"] == [5, 3, 5, 3] and both["encoder_hidden_states"].shape == (4, 5)
    assert both["img_ids"].shape == (2, 3) and both["return_dict"] is False
    own = call.on(torch.zeros(2, 4, 3)).named["img_shapes"]
    own.pop()
    assert len(call.named["img_shapes"]) == 2  # networks pop from their lists
    expected = ["timestep", "encoder_hidden_states", "latent_image_ids", *["added_cond_kwargs"] * 2, *["residuals"] * 2]
    assert [name for name, _ in call.batched()] == expected


def test_a_state_may_be_a_list_with_a_tensor_a_row():
    texts = [torch.zeros(3, 2), torch.ones(5, 2)]
    call = Call.read(listed, ([torch.zeros(2, 1), torch.ones(2, 1)], torch.tensor([0.5, 0.5]), texts), {})
    assert call.listed and call.sample.shape == (2, 2, 1) and call.time == 0.5
    part = call.on(torch.zeros(1, 2, 1), torch.tensor([1]))
    assert isinstance(part.named["x"], list)
    assert len(part.named["cap_feats"]) == 1 and part.named["cap_feats"][0] is texts[1]
    assert len(Call.joined([call, call]).named["cap_feats"]) == 4
    padded = dict(call.batched())["cap_feats"]
    assert padded.shape == (2, 5, 2) and not padded[0, 3:].any()
    with pytest.raises(ValueError, match="images of one size"):
        Call.read(listed, ([torch.zeros(2), torch.zeros(3)], torch.tensor(0.5), texts), {})


def test_a_wrapper_without_names_is_read_by_position():
    call = Call.read(wrapper, (rows(2, 3), torch.tensor(4.0), rows(2, 5)), {"return_dict": False})
    assert call.time == 4 and call.rows == 2
    part = call.on(torch.zeros(1, 3), torch.tensor([1]))
    assert part.positional[0].shape == (1, 3) and float(part.positional[2][0, 0]) == 1
    assert part.of(lambda x, t, text, return_dict: (x.shape, text.shape)) == ((1, 3), (1, 5))
    assert Call.read(wrapper, (), {"sample": rows(2, 3), "timestep": 9}).time == 9
    for args, kwargs, message in (
        ((), {"text": rows(2, 3)}, "must be its first argument"),
        (({"a": 1},), {}, "a tensor or a list"),
    ):
        with pytest.raises(ValueError, match=message):
            Call.read(wrapper, args, kwargs)
    with pytest.raises(ValueError, match="needs its time"):
        _ = Call.read(named, (rows(1, 2),), {}).time


@pytest.mark.parametrize(
    "given",
    [
        torch.ones(2, 3),
        (torch.ones(2, 3),),
        (torch.ones(2, 3), None),
        ([torch.ones(3), torch.ones(3)],),
        Transformer2DModelOutput(sample=torch.ones(2, 3)),
    ],
    ids=["tensor", "tuple", "tuple with nothing", "list", "object"],
)
def test_outputs_are_given_back_as_they_came(given):
    output = Output.read(given)
    assert output.sample.shape == (2, 3) and output.dtype == torch.float32
    again = output.like(output.sample * 2)
    assert type(again) is type(given)
    assert torch.equal(Output.read(again).sample, output.sample * 2)
    half = Output.read((torch.ones(2, 3, dtype=torch.bfloat16),))
    assert half.sample.dtype == torch.float32 and half.dtype == torch.bfloat16


def test_two_outputs_are_one_sentence():
    sound = functools.partial(torch.ones, 2)
    for given in ((sound(3), sound(4)), (sound(3), object()), ({"a": 1},), ([sound(1), sound(2)],)):
        with pytest.raises(ValueError, match="cannot carry one") as error:
            Output.read(given)
        assert "\n" not in str(error.value)
