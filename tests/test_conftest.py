"""The guards that every test stands behind do guard."""

from __future__ import annotations

import os
import socket

import pytest
import torch


def test_no_test_reaches_another_host() -> None:
    for address in (("192.0.2.1", 80), ("sdeblend.invalid", 80)):
        with pytest.raises(RuntimeError, match=f"must not use the network, .* {address[0]}"):
            socket.create_connection(address, timeout=1)
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_this_host_is_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=5).close()


def test_one_thread() -> None:
    assert torch.get_num_threads() == 1
