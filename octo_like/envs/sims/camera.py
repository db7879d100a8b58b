"""Off-screen pictures of a MuJoCo scene, at the price of a small policy's input. Only in a simulator's own process."""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class View:
    """Where a camera stands.

    Attributes:
      name: of a camera of the model; "": a free camera described by the rest.
      lookat: point in the middle of the picture, metres; of a camera that travels, as seen from the hand.
      distance: from it, metres.
      azimuth, elevation: degrees, MuJoCo's convention.
      travels: with the hand, keeping its direction.
    """

    name: str = ""
    lookat: tuple[float, float, float] = (0.0, 0.0, 0.0)
    distance: float = 1.0
    azimuth: float = 90.0
    elevation: float = -45.0
    travels: bool = False


class Camera:
    """Renders square pictures of any simulation of one model (or of models made from the same file).

    Shadows, reflections and multisampling are off: in software they cost ten times the rest.

    Args:
      model: `mujoco.MjModel`.
      size: pixels.
    """

    def __init__(self, model: Any, view: View, size: int):
        import mujoco  # here and not above: modules of the package can be imported without the extra

        model.vis.quality.shadowsize = 0
        model.vis.quality.offsamples = 0
        model.vis.global_.offwidth = max(model.vis.global_.offwidth, size)
        model.vis.global_.offheight = max(model.vis.global_.offheight, size)
        self._renderer = mujoco.Renderer(model, size, size)
        flags = self._renderer.scene.flags
        flags[mujoco.mjtRndFlag.mjRND_SHADOW] = flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        self._view = view
        self._camera: Any = view.name
        if not view.name:
            self._camera = mujoco.MjvCamera()
            self._camera.distance = view.distance
            self._camera.azimuth, self._camera.elevation = view.azimuth, view.elevation

    def render(self, data: Any, hand: np.ndarray) -> np.ndarray:
        """The picture (size, size, 3) uint8 of a simulation (`mujoco.MjData`) whose hand is at `hand` (3,) metres."""
        if not self._view.name:
            self._camera.lookat[:] = np.add(self._view.lookat, hand if self._view.travels else 0.0)
        self._renderer.update_scene(data, camera=self._camera)
        return self._renderer.render()

    def close(self) -> None:
        self._renderer.close()
