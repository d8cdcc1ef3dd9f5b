"""Nodes that end with the test that started them."""

import pytest

from process import Node


@pytest.fixture
def start(tmp_path):
    """Starts a node of this name that owns these slots."""
    nodes = []

    def start(name, slots):
        nodes.append(Node(tmp_path / name, name, slots))
        return nodes[-1]

    yield start
    for node in nodes:
        node.stop()
