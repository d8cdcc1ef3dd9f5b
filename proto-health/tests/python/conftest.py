"""A node for each test: its states are what is tested."""

import pytest

from process import Node


@pytest.fixture
def node():
    """In the state STARTING."""
    node = Node().start()
    yield node
    node.stop()
