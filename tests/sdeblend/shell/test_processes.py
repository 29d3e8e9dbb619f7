"""One process shares with nobody; what several do is in ``tests/sdeblend/finetune/test_distributed.py``."""

from __future__ import annotations

import pytest
import torch

from sdeblend.shell.processes import Processes, processes


def test_one_process_has_everything() -> None:
    alone = processes() if not torch.cuda.is_available() else Processes()
    assert (alone.index, alone.count, alone.main, alone.device.type) == (0, 1, True, "cpu")
    tensor = torch.arange(3)
    alone.add([tensor])
    alone.wait()
    assert alone.gather(tensor) is tensor and tensor.tolist() == [0, 1, 2]
    assert alone.rows(7) == slice(0, 7)


def test_a_batch_is_shared_out_evenly() -> None:
    assert [Processes(i, 3).rows(6) for i in range(3)] == [slice(0, 2), slice(2, 4), slice(4, 6)]
    assert [Processes(i, 3).main for i in range(3)] == [True, False, False]
    with pytest.raises(ValueError, match="3 processes need a batch they divide, got 7; change groups"):
        Processes(0, 3).rows(7)
