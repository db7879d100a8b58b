"""Which numbers of processes the lanes of a run serve."""

import pytest

from octo_like.common.lanes import check_lanes, default_lanes


@pytest.mark.parametrize(
    "batch_size,lanes",
    [(1, 1), (7, 7), (64, 64), (256, 256), (512, 256), (2048, 256), (1536, 384), (384, 384), (1000, 200), (96, 96)],
)
def test_default_lanes(batch_size, lanes):
    assert default_lanes(batch_size) == lanes


def test_default_lanes_serve_pods_of_all_sizes():
    """Powers of two up to 256 hosts at 2048, and multiples of three where the batch is one."""
    assert all(default_lanes(2048) % hosts == 0 for hosts in (1, 2, 4, 8, 16, 32, 64, 128, 256))
    assert all(default_lanes(1536) % hosts == 0 for hosts in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192))


def test_processes_that_no_lanes_serve_are_told_what_would():
    assert check_lanes(None, 2048, 64) == 256 and check_lanes(12, 48, 3) == 12
    with pytest.raises(
        ValueError, match=r"24 processes do not divide 256 lanes; possible.*1, 2, 4, .*24 processes do not"
    ):
        check_lanes(None, 2048, 24)
    with pytest.raises(
        ValueError, match=r"512 processes do not divide 256 lanes.*data.num_lanes=1024, which 512 divide"
    ):
        check_lanes(None, 2048, 512)
    with pytest.raises(ValueError, match="must divide the batch size.*allows 1, 2, 4, 8, 16"):
        check_lanes(3, 16)
    with pytest.raises(ValueError, match="at most 1024"):
        check_lanes(2048, 2048)
