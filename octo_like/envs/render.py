"""Pictures of the table, drawn with PIL at twice the size and reduced: no GL, about a millisecond at 64 x 64.

A camera is an affine map from (x, y, z) in metres to (u, v) in units of the image's width and height: seen obliquely,
so that height moves things up in the image.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from octo_like.envs import dynamics
from octo_like.envs.scene import BLOCK_HEIGHT, PLATE_HEIGHT, TABLE, Block, Plate, World

Color = tuple[float, float, float]
Point = tuple[float, float, float]

BLOCK_RGB: dict[str, Color] = {
    "red": (206, 32, 34),
    "green": (38, 160, 54),
    "blue": (34, 76, 214),
    "yellow": (240, 208, 32),
    "purple": (146, 44, 172),
}
PLATE_RGB: dict[str, Color] = {"blue": (70, 122, 226), "orange": (240, 130, 30), "white": (244, 244, 240)}
# Of `language.EXTRA_BLOCK_COLORS` and `EXTRA_PLATE_COLORS`.
EXTRA_BLOCK_RGB: dict[str, Color] = {
    "orange": (238, 118, 22),
    "white": (238, 238, 232),
    "pink": (244, 128, 186),
    "cyan": (42, 196, 212),
}
EXTRA_PLATE_RGB: dict[str, Color] = {"red": (226, 84, 84), "green": (92, 190, 104), "yellow": (246, 226, 96)}
_BLOCK_RGB, _PLATE_RGB = BLOCK_RGB | EXTRA_BLOCK_RGB, PLATE_RGB | EXTRA_PLATE_RGB
TABLES: tuple[Color, ...] = (
    (176, 146, 112),
    (140, 110, 82),
    (128, 130, 134),
    (158, 152, 142),
    (98, 104, 112),
    (118, 94, 78),
)
ROBOT_RGB: dict[str, Color] = {
    "pusher": (34, 34, 38),
    "gripper": (206, 208, 212),
    "arm": (56, 58, 64),
    "arm3": (226, 222, 214),
}
SUPERSAMPLING = 2
WRIST_VIEW = 0.24  # metres seen by a wrist camera from side to side


@dataclasses.dataclass(frozen=True)
class Camera:
    """(u, v) = matrix @ (x, y, z, 1), from 0 to 1 inside the image."""

    matrix: tuple[tuple[float, float, float, float], tuple[float, float, float, float]]

    def project(self, x: float, y: float, z: float) -> tuple[float, float]:
        (a, b, c, d), (e, f, g, h) = self.matrix
        return a * x + b * y + c * z + d, e * x + f * y + g * z + h


def oblique_camera(shift: np.ndarray, scale: float, rotation: float, tilt: float) -> Camera:
    """The primary camera, a little out of its usual place (shift 0, scale 1, rotation 0 radians, tilt 1)."""
    c, s = math.cos(rotation), math.sin(rotation)
    size = 1.72 * scale
    rise, depth = -0.5 * size, 0.94 * size * tilt
    return Camera(((size * c, -size * s, 0.0, 0.5 + shift[0]), (-depth * s, -depth * c, rise, 0.535 + shift[1])))


def wrist_camera(tip: np.ndarray, yaw: float) -> Camera:
    """Looks straight down at the fingertip; up in the image is the direction of the last link."""
    c, s = math.cos(yaw) / WRIST_VIEW, math.sin(yaw) / WRIST_VIEW
    x, y = float(tip[0]), float(tip[1])
    return Camera(((s, -c, 0.0, 0.5 - s * x + c * y), (-c, -s, 0.0, 0.62 + c * x + s * y)))


@dataclasses.dataclass(frozen=True)
class Look:
    """What varies from episode to episode and means nothing."""

    camera: Camera
    table: Color
    floor: Color
    light: Color  # gain of each channel
    gradient: tuple[float, float]
    shadow: tuple[float, float]  # where a point one metre up casts its shadow
    shadow_strength: float
    robot: Color
    shades: tuple[Color, ...]  # of each block
    plate_shade: float
    marks: tuple[tuple[float, float, float, float, float], ...]  # x, y, angle, length, grey
    texture_seed: int
    texture: float
    planks: float


def sample_look(rng: np.random.Generator, embodiment: str, world: World) -> Look:
    """Draws camera, table, light, shades and clutter marks for one episode."""
    uniform = rng.uniform
    camera = oblique_camera(uniform(-0.018, 0.018, 2), uniform(0.97, 1.03), uniform(-0.06, 0.06), uniform(0.95, 1.05))
    table = np.array(TABLES[rng.integers(len(TABLES))]) * uniform(0.9, 1.1) + uniform(-6, 6, 3)
    marks = []
    for _ in range(int(rng.integers(0, 4)) if rng.random() < 0.5 else 0):
        x, y, angle = uniform(-0.23, 0.23), uniform(-0.23, 0.23), uniform(0, math.pi)
        marks.append((x, y, angle, uniform(0.015, 0.04), uniform(0.75, 1.2)))
    angle, reach = uniform(0, 2 * math.pi), uniform(0.15, 0.6)
    return Look(
        camera=camera,
        table=tuple(table),
        floor=tuple(table * uniform(0.35, 0.6)),
        light=tuple(uniform(0.88, 1.1) + uniform(-0.035, 0.035, 3)),
        gradient=(uniform(-0.1, 0.1), uniform(-0.1, 0.1)),
        shadow=(reach * math.cos(angle), reach * math.sin(angle)),
        shadow_strength=uniform(0.2, 0.45),
        robot=tuple(np.array(ROBOT_RGB[embodiment]) * uniform(0.9, 1.05) + uniform(-5, 5, 3)),
        shades=tuple(
            tuple(uniform(0.9, 1.1) * np.array(_BLOCK_RGB[b.color]) + uniform(-8, 8, 3)) for b in world.blocks
        ),
        plate_shade=uniform(0.93, 1.05),
        marks=tuple(marks),
        texture_seed=int(rng.integers(2**31)),
        texture=uniform(2, 9),
        planks=uniform(0, 10) if rng.random() < 0.4 else 0.0,
    )


@functools.lru_cache(4096)
def _lit(color: Color, shade: float, light: Color) -> tuple[int, int, int]:
    r, g, b = (min(255, max(0, int(c * shade * gain))) for c, gain in zip(color, light, strict=True))
    return r, g, b


class Canvas:
    """An image under a camera; takes metres, draws pixels."""

    def __init__(self, image: Image.Image, camera: Camera, light: Color):
        self.draw = ImageDraw.Draw(image)
        self.pixels = image.size[0]
        (a, b, c, d), (e, f, g, h) = camera.matrix
        n = self.pixels
        self._u, self._v = (a * n, b * n, c * n, d * n), (e * n, f * n, g * n, h * n)
        self.scale = math.hypot(a, b) * n  # pixels a metre, along the image's width
        self.depth = math.hypot(e, f) * n
        self.light = light

    def point(self, x: float, y: float, z: float) -> tuple[float, float]:
        (a, b, c, d), (e, f, g, h) = self._u, self._v
        return a * x + b * y + c * z + d, e * x + f * y + g * z + h

    def lit(self, color: Color, shade: float = 1.0) -> tuple[int, int, int]:
        return _lit(color, shade, self.light)

    def polygon(self, points: list[Point], color: Color, shade: float = 1.0) -> None:
        (a, b, c, d), (e, f, g, h) = self._u, self._v
        pixels = [(a * x + b * y + c * z + d, e * x + f * y + g * z + h) for x, y, z in points]
        self.draw.polygon(pixels, fill=self.lit(color, shade))

    def line(self, start: Point, end: Point, width: float, color: Color, shade: float = 1.0) -> None:
        pixels = max(2, round(width * self.scale))
        self.draw.line([self.point(*start), self.point(*end)], fill=self.lit(color, shade), width=pixels)

    def disc(self, center: Point, radius: float, color: Color, shade: float = 1.0) -> None:
        u, v = self.point(*center)
        a, b = radius * self.scale, radius * self.depth
        self.draw.ellipse((u - a, v - b, u + a, v + b), fill=self.lit(color, shade))


def _corners(block: Block) -> list[tuple[float, float]]:
    half = block.size / 2
    c, s = half * math.cos(block.yaw), half * math.sin(block.yaw)
    x, y = float(block.xy[0]), float(block.xy[1])
    return [(x + c - s, y + s + c), (x - c - s, y - s + c), (x - c + s, y - s - c), (x + c + s, y + s - c)]


def _block_shadow(canvas: Canvas, block: Block, look: Look) -> None:
    reach = block.z + BLOCK_HEIGHT
    dx, dy = look.shadow[0] * reach, look.shadow[1] * reach
    canvas.polygon([(x + dx, y + dy, 0.0) for x, y in _corners(block)], look.table, 1 - look.shadow_strength)


def _lighter(color: Color, share: float, light: float) -> Color:
    red, green, blue = color
    return share * red + light, share * green + light, share * blue + light


def _block(canvas: Canvas, block: Block, color: Color) -> None:
    corners = _corners(block)
    low, high = block.z, block.z + BLOCK_HEIGHT
    for i in range(4):
        (x0, y0), (x1, y1) = corners[i], corners[(i + 1) % 4]
        # Corners run counter-clockwise, so a side that runs to the right in the image faces the camera.
        if canvas.point(x0, y0, 0)[0] < canvas.point(x1, y1, 0)[0]:
            shade = 0.62 + 0.12 * (y1 - y0) / block.size
            canvas.polygon([(x0, y0, low), (x1, y1, low), (x1, y1, high), (x0, y0, high)], color, shade)
    canvas.polygon([(x, y, high) for x, y in corners], _lighter(color, 0.88, 30))


def _plate(canvas: Canvas, plate: Plate, shade: float) -> None:
    rgb, (x, y) = _PLATE_RGB[plate.color], plate.xy
    canvas.disc((x, y, 0.0), plate.radius + 0.003, rgb, 0.45)
    canvas.disc((x, y, PLATE_HEIGHT), plate.radius, _lighter(rgb, 0.8, 50), shade)
    canvas.disc((x, y, PLATE_HEIGHT / 2), plate.radius * 0.7, rgb, 0.8 * shade)


def background(world: World, look: Look, size: int) -> Image.Image:
    """Table, texture, marks and plates: all that does not move in an episode. `size` in pixels before the reduction."""
    image = Image.new("RGB", (size, size))
    canvas = Canvas(image, look.camera, (1.0, 1.0, 1.0))
    canvas.draw.rectangle((0, 0, size, size), fill=canvas.lit(look.floor))
    t = TABLE + 0.012
    canvas.polygon([(-t, -t, 0), (t, -t, 0), (t, -t, -0.02), (-t, -t, -0.02)], look.table, 0.6)
    canvas.polygon([(-t, -t, 0), (t, -t, 0), (t, t, 0), (-t, t, 0)], look.table)
    if look.planks:
        for i in range(1, 5):
            x = -TABLE + i * 2 * TABLE / 5
            canvas.line((x, -t, 0), (x, t, 0), 0.003, look.table, 1 - look.planks / 60)
    for x, y, angle, length, grey in look.marks:
        dx, dy = length * math.cos(angle), length * math.sin(angle)
        canvas.line((x, y, 0), (x + dx, y + dy, 0), 0.006, look.table, grey)
    for plate in world.plates:
        _plate(canvas, plate, look.plate_shade)
    rng = np.random.default_rng(look.texture_seed)
    coarse = Image.fromarray(rng.integers(0, 255, (9, 9), np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    gain = 1 + look.gradient[0] * ramp[None, :] + look.gradient[1] * ramp[:, None]
    noise = (np.asarray(coarse, np.float32) / 127.5 - 1) * look.texture
    noise += 2 * rng.standard_normal((size // 2, size // 2), np.float32).repeat(2, 0).repeat(2, 1)
    pixels = np.asarray(image).astype(np.float32)
    pixels += noise[..., None]
    pixels *= gain[..., None] * np.array(look.light, np.float32)
    return Image.fromarray(np.clip(pixels, 0, 255, out=pixels).astype(np.uint8))


def draw_primary(world: World, effector: dynamics.Effector, look: Look, base: Image.Image) -> np.ndarray:
    """The primary camera's image, (size, size, 3) uint8, on top of what `background` drew at twice that size."""
    image = base.copy()
    canvas = Canvas(image, look.camera, look.light)
    for block in world.blocks:
        _block_shadow(canvas, block, look)
    draw_shadow, draw_robot = _ROBOTS[type(effector)]
    draw_shadow(canvas, effector, look)
    if isinstance(effector, dynamics.Pusher):
        pending: list[Block | dynamics.Pusher] = [*world.blocks, effector]
        for item in sorted(pending, key=lambda item: -item.xy[1]):
            if isinstance(item, Block):
                _block(canvas, item, look.shades[world.blocks.index(item)])
            else:
                draw_robot(canvas, effector, look)
        return np.asarray(image.reduce(SUPERSAMPLING))
    for index in sorted(range(len(world.blocks)), key=lambda i: -world.blocks[i].xy[1]):
        if index != world.held:
            _block(canvas, world.blocks[index], look.shades[index])
    if world.held is not None:
        _block(canvas, world.blocks[world.held], look.shades[world.held])
    draw_robot(canvas, effector, look)
    return np.asarray(image.reduce(SUPERSAMPLING))


_PROBES: tuple[Color, Color] = ((255, 0, 255), (0, 255, 0))  # no pixel of a block that is drawn with them stays


def visible(
    world: World, effector: dynamics.Effector, look: Look, size: int
) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """What the primary camera sees of each thing, found by painting it in two ways.

    Returns:
      The image (size, size, 3) uint8; for each block, and for each plate, (size, size) bool: the pixels it has part in.
    """
    base = background(world, look, size * SUPERSAMPLING)
    image = draw_primary(world, effector, look, base)
    blocks = []
    for index in range(len(world.blocks)):
        painted = []
        for color in _PROBES:
            shades = (*look.shades[:index], color, *look.shades[index + 1 :])
            painted.append(draw_primary(world, effector, dataclasses.replace(look, shades=shades), base))
        blocks.append((painted[0] != painted[1]).any(-1))
    plates = []
    for index in range(len(world.plates)):
        fewer = dataclasses.replace(world, plates=world.plates[:index] + world.plates[index + 1 :])
        without = draw_primary(world, effector, look, background(fewer, look, size * SUPERSAMPLING))
        plates.append((without != image).any(-1))
    return image, blocks, plates


def outline(camera: Camera, thing: Block | Plate) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of a whole block or plate in the image, as fractions of it, hidden or not."""
    if isinstance(thing, Plate):
        (a, b, _, _), (e, f, _, _) = camera.matrix
        wide, deep = math.hypot(a, b) * thing.radius, math.hypot(e, f) * thing.radius
        u, v = camera.project(float(thing.xy[0]), float(thing.xy[1]), PLATE_HEIGHT / 2)
        return u - wide, v - deep, u + wide, v + deep
    points = [camera.project(x, y, z) for x, y in _corners(thing) for z in (thing.z, thing.z + BLOCK_HEIGHT)]
    columns, rows = zip(*points, strict=True)
    return min(columns), min(rows), max(columns), max(rows)


def draw_wrist(world: World, effector: dynamics.DeltaArm | dynamics.ServoArm, look: Look, size: int) -> np.ndarray:
    """The image of the camera on the last link, (size, size, 3) uint8."""
    image = Image.new("RGB", (size * SUPERSAMPLING,) * 2)
    canvas = Canvas(image, wrist_camera(effector.tip, effector.yaw), look.light)
    canvas.draw.rectangle((0, 0, *image.size), fill=canvas.lit(look.floor))
    t = TABLE + 0.012
    canvas.polygon([(-t, -t, 0), (t, -t, 0), (t, t, 0), (-t, t, 0)], look.table)
    for plate in world.plates:
        _plate(canvas, plate, look.plate_shade)
    for block in world.blocks:
        if math.dist(block.xy, effector.tip[:2]) < WRIST_VIEW:
            _block_shadow(canvas, block, look)
            _block(canvas, block, look.shades[world.blocks.index(block)])
    _fingers_of_arm(canvas, effector, look)
    return np.asarray(image.reduce(SUPERSAMPLING))


# Robots. Each has a function for its shadow (under the blocks) and one for itself.


def _no_shadow(canvas: Canvas, effector, look: Look) -> None:
    del canvas, effector, look


def _pusher(canvas: Canvas, pusher: dynamics.Pusher, look: Look) -> None:
    x, y = pusher.xy
    canvas.disc((x, y, 0.0), pusher.radius, look.robot, 0.7)
    canvas.line((x, y, 0.0), (x, y, 0.05), 2 * pusher.radius, look.robot, 0.85)
    canvas.disc((x, y, 0.05), pusher.radius, look.robot, 1.2)
    canvas.disc((x, y, 0.05), pusher.radius * 0.55, (236, 236, 236))


def _spread(opening: float) -> float:
    return 0.026 + 0.022 * opening


def _gripper_shadow(canvas: Canvas, gripper: dynamics.CartesianGripper, look: Look) -> None:
    x, y, z = gripper.tip
    reach = z + 0.03
    center = (x + look.shadow[0] * reach, y + look.shadow[1] * reach, 0.0)
    canvas.disc(center, 0.03, look.table, 1 - look.shadow_strength)


def _gripper(canvas: Canvas, gripper: dynamics.CartesianGripper, look: Look) -> None:
    x, y, z = (float(value) for value in gripper.tip)
    spread = _spread(gripper.opening)
    dx, dy = spread * math.cos(gripper.yaw), spread * math.sin(gripper.yaw)
    low, high = z - 0.018, z + 0.05
    sides = sorted(((x + dx, y + dy), (x - dx, y - dy)), key=lambda p: -p[1])
    dark = (28, 28, 32)
    for px, py in sides:
        canvas.line((px, py, low), (px, py, high), 0.016, dark)
        canvas.line((px, py, low), (px, py, low + 0.014), 0.016, look.robot)
    canvas.line((x - dx * 1.2, y - dy * 1.2, high), (x + dx * 1.2, y + dy * 1.2, high), 0.024, look.robot, 0.8)
    canvas.line((x, y, high), (x, y, high + 0.07), 0.028, look.robot)
    canvas.disc((x, y, high + 0.07), 0.019, look.robot, 1.1)


def _arm_shadow(canvas: Canvas, arm: dynamics.DeltaArm | dynamics.ServoArm, look: Look) -> None:
    dx, dy = look.shadow[0] * arm.height, look.shadow[1] * arm.height
    points = [(x + dx, y + dy, 0.0) for x, y in arm.joints()]
    for start, end in zip(points[:-1], points[1:], strict=True):
        canvas.line(start, end, 0.024, look.table, 1 - look.shadow_strength)


def _fingers_of_arm(canvas: Canvas, arm: dynamics.DeltaArm | dynamics.ServoArm, look: Look) -> None:
    tip, yaw = arm.tip, arm.yaw
    c, s = math.cos(yaw), math.sin(yaw)
    spread = _spread(arm.opening) - 0.006 * (1 - arm.opening)
    z = arm.height

    def at(along: float, across: float) -> Point:
        return (float(tip[0]) + c * along - s * across, float(tip[1]) + s * along + c * across, z)

    claw = (24, 24, 28) if isinstance(arm, dynamics.DeltaArm) else (90, 30, 60)
    canvas.line(at(-0.045, -spread), at(-0.045, spread), 0.014, claw)
    for side in (-1, 1):
        canvas.line(at(-0.045, side * spread), at(0.018, side * spread * 0.9), 0.013, claw)
    light = (250, 250, 250) if arm.opening < 0.5 else (96, 98, 100)
    canvas.disc(at(-0.05, 0.0), 0.012, light)


def _arm(canvas: Canvas, arm: dynamics.DeltaArm | dynamics.ServoArm, look: Look) -> None:
    points = arm.joints()
    end = points[-1]
    c, s = math.cos(arm.yaw), math.sin(arm.yaw)
    points[-1] = (end[0] - 0.045 * c, end[1] - 0.045 * s)  # the last link ends where the fingers begin
    if isinstance(arm, dynamics.DeltaArm):
        width, joint, joint_color = 0.028, 0.021, (176, 178, 182)
    else:
        width, joint, joint_color = 0.022, 0.017, (40, 40, 44)
    z = arm.height
    for start, stop in zip(points[:-1], points[1:], strict=True):
        canvas.line((*start, z), (*stop, z), width, look.robot)
    for x, y in points[:-1]:
        canvas.disc((x, y, z), joint, joint_color)
    _fingers_of_arm(canvas, arm, look)


_ROBOTS: dict[type, tuple[Callable[..., None], Callable[..., None]]] = {
    dynamics.Pusher: (_no_shadow, _pusher),
    dynamics.CartesianGripper: (_gripper_shadow, _gripper),
    dynamics.DeltaArm: (_arm_shadow, _arm),
    dynamics.ServoArm: (_arm_shadow, _arm),
}
