"""What two hosts measure together is what one measures alone: losses, errors in physical units, plots, rollouts."""

import json

import numpy as np
import pytest
from PIL import Image

from octo_like.training.metrics import METRICS_FILE
from tests.multiprocess.launch import Launch

EPISODES, STEPS = 2, 1


def measured(workdir) -> dict[str, float]:
    """The metrics of the only evaluation; one line of the file, since one process writes it."""
    rows = [json.loads(line) for line in (workdir / METRICS_FILE).read_text().splitlines()]
    rows = [row for row in rows if any(key.startswith("val/") for key in row)]
    assert len(rows) == 1 and rows[0]["step"] == STEPS
    return {key: value for key, value in rows[0].items() if key.startswith(("val/", "rollout/"))}


@pytest.mark.multiprocess
def test_two_processes_measure_what_one_does(tmp_path):
    flags = [
        *(f"--config.num_steps={STEPS}", "--config.checkpoint.every=0", "--config.batch_size=8"),
        *("--config.eval.every=0", f"--config.eval.rollouts={EPISODES}", "--config.eval.batches=2"),
    ]
    several = dict(words="tabletop", cache=tmp_path / "cache")
    alone = Launch(tmp_path / "alone", *flags, processes=1, devices=2, **several)
    alone.wait(0)
    both = Launch(tmp_path / "both", *flags, processes=2, devices=1, **several)
    both.wait(0)
    one, two = measured(tmp_path / "alone"), measured(tmp_path / "both")
    assert one.keys() == two.keys()
    dims = ("dq1_rad", "dq2_rad", "gripper_open_fraction")
    wanted = {f"val/tabletop_arm/{measure}/{dim}" for measure in ("mae", "first_mae", "mean_mae") for dim in dims}
    wanted |= {"val/tabletop_arm/mae_in_std", "val/tabletop_arm/gripper_accuracy", "val/tabletop_arm/action/loss"}
    wanted |= {"rollout/tabletop_arm/success", "rollout/tabletop_arm/steps"}
    assert wanted <= one.keys()
    for key, value in one.items():
        # The same parameters up to rounding, which a fraction of commands or of episodes may show.
        tolerance = 0.05 if key.endswith("accuracy") else 0.0 if "success" in key else 1e-3 * abs(value) + 1e-5
        assert two[key] == pytest.approx(value, abs=max(tolerance, 1e-9)), key
    shown = []
    for name in ("alone", "both"):
        with Image.open(tmp_path / name / "media" / "predictions" / "tabletop_arm" / f"{STEPS}.png") as image:
            shown.append(np.asarray(image.convert("RGB"), int))
    assert shown[0].shape == shown[1].shape and np.abs(shown[0] - shown[1]).mean() < 2
    assert (tmp_path / "both" / "media" / "rollouts" / "tabletop_arm" / "0" / f"{STEPS}.gif").is_file()
    assert "wrote" not in both.log(1) and (tmp_path / "both" / "export").is_dir()
