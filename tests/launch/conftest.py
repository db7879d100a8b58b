"""Fixtures of the launchers' tests."""

import pytest

from tests.launch.clouds import Clouds


@pytest.fixture
def clouds(tmp_path):
    return Clouds(tmp_path)
