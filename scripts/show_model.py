r"""What a model is made of, and what it looks at.

    python scripts/show_model.py runs/demo/pretrain/export --out runs/show
    python scripts/show_model.py --config configs/octo_small.py --out runs/show
    python scripts/show_model.py runs/demo/pretrain/export --out runs/show --image scene.png \
        --instruction "pick up the green block" --instruction "pick up the red block"

Prints token groups, sizes, parameters by part and FLOPs per sample, and writes rule.png, the attention rule as a table.
With instructions it also writes attention.png: how much the readout attends to every patch of a camera, one row per
instruction and their difference; the weights are those of the model's own forward pass, averaged over heads, as mean
over all layers and in the layer that differs most between the first two instructions. A camera with a keypoint stem is
one token: there it shows where the keypoints' softmax lies, in place of layers. Without --image the camera sees random
noise, which tells little.
"""

import octo_like.common.interrupts  # noqa: F401  isort: skip
import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from octo_like import Policy
from octo_like.common.config import load_config
from octo_like.common.defaults import batch_spec
from octo_like.model.octo import build_model
from octo_like.policy import describe
from octo_like.policy.attention_maps import attention_over_image
from octo_like.policy.locations import LocationError
from octo_like.policy.pretrained import PretrainedError
from octo_like.robot.images import resize_image


def draw_rule(report: describe.TokenReport, path: Path) -> None:
    """The group-by-group rule; rows are queries, the numbers are tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    labels, table = describe.rule_table(report)
    size = 1.6 + 0.38 * len(labels)
    figure, axes = plt.subplots(figsize=(size + 1.6, size), layout="constrained")
    axes.imshow(table, cmap="Blues", vmin=0, vmax=1.6)
    for i, query in enumerate(report.layouts):
        for j, key in enumerate(report.layouts):
            if table[i, j]:
                axes.text(j, i, f"{query.size}×{key.size}", ha="center", va="center", fontsize=5)
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7)
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.set_xticks(np.arange(-0.5, len(labels)), minor=True)
    axes.set_yticks(np.arange(-0.5, len(labels)), minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="minor", length=0)
    axes.set_xlabel("is attended to")
    axes.set_ylabel("attends")
    axes.set_title(f"{report.total} tokens", fontsize=9)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def draw_attention(image: np.ndarray, maps: dict[str, np.ndarray], path: Path) -> None:
    """One row per instruction: the image, the mean over layers (or keypoints), and the one that differs most between
    the first two instructions (the last one, when there is one instruction); with two, also their difference."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    several = list(maps.values())
    chosen = -1 if len(several) == 1 else int(np.argmax(np.abs(several[0] - several[1]).sum((1, 2))))
    rows = [(name, m.mean(0), m[chosen]) for name, m in maps.items()]
    if len(rows) == 2:
        (first, a, b), (second, c, d) = rows
        rows.append((f"{first}\nminus {second}", a - c, b - d))
    figure, axes = plt.subplots(len(rows), 3, figsize=(8, 2.7 * len(rows)), squeeze=False, layout="constrained")
    extent = (0, image.shape[1], image.shape[0], 0)
    number = "last" if chosen < 0 else f"number {chosen}"
    for row, (name, mean, last) in zip(axes, rows, strict=True):
        row[0].imshow(image)
        row[0].set_title(name, fontsize=8)
        for axis, values, title in (
            (row[1], mean, "mean"),
            (row[2], last, number),
        ):
            signed = values.min() < 0
            limit = float(np.abs(values).max()) or 1.0
            axis.imshow(image, alpha=0.45)
            shown = axis.imshow(
                values,
                extent=extent,
                alpha=0.65,
                interpolation="nearest",
                cmap="RdBu_r" if signed else "viridis",
                vmin=-limit if signed else 0,
                vmax=limit,
            )
            axis.set_title(title, fontsize=8)
            figure.colorbar(shown, ax=axis, shrink=0.7).ax.tick_params(labelsize=6)
        for axis in row:
            axis.set_axis_off()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def describe_model(model, spec) -> str:
    """Sizes of a model that has no parameters yet."""
    counts = describe.parameter_counts(describe.abstract_params(model, spec))
    lines = [f"  {name:<44}{size:>14,}" for name, size in [*counts.items(), ("total", sum(counts.values()))]]
    report = describe.token_report(model, spec)
    tokens = [f"  {name:<44}{size:>14}" for name, size in report.sizes().items()]
    return "\n".join([f"tokens: {report.total} for a window of {spec.window_size}", *tokens, "parameters", *lines])


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policy", nargs="?", help="a policy: folder, gs://... or hf://...; or a released checkpoint")
    parser.add_argument("--config", help="a config file instead: its model, without parameters")
    parser.add_argument("--text-model", help="sentencepiece model, for a released checkpoint")
    parser.add_argument("--modules", nargs="+", default=(), help="of the policy's own parts: they may be imported")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--instruction", action="append", default=[], help="draw attention for it; may be repeated")
    parser.add_argument("--image", type=Path, help="what the camera sees")
    parser.add_argument("--camera", default="primary")
    parser.add_argument("--readout", default="readout_action")
    flags = parser.parse_args(argv)
    if (flags.policy is None) == (flags.config is None):
        parser.error("give a policy or --config, one of them")
    flags.out.mkdir(parents=True, exist_ok=True)
    if flags.config:
        config = load_config(flags.config)
        model, spec = build_model(config.model, vocab_size=1000), batch_spec(config)
        print(describe_model(model, spec))
    else:
        policy = Policy.load_pretrained(flags.policy, text_model=flags.text_model, modules=flags.modules)
        model, spec = policy.model, policy.batch_spec
        print(policy.get_pretty_spec())
    print("GFLOP per sample (matrix products and convolutions)")
    print(f"  {'training, forward':<44}{describe.forward_flops(model, spec) / 1e9:>14.3f}")
    print(f"  {'create_tasks, once per task':<44}{describe.encoding_flops(model, spec) / 1e9:>14.3f}")
    for head in model.heads:
        print(f"  {f'sample_actions, {head}':<44}{describe.sample_flops(model, spec, head=head) / 1e9:>14.3f}")
    draw_rule(describe.token_report(model, spec), flags.out / "rule.png")
    print(f"written: {flags.out / 'rule.png'}")
    if flags.instruction:
        if flags.config:
            parser.error("--instruction needs a policy with parameters")
        size = spec.image_sizes[flags.camera] if flags.camera in spec.image_sizes else parser.error(
            f"no camera {flags.camera!r}; valid: {sorted(spec.image_sizes)}"
        )  # fmt: skip
        image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
        if flags.image:
            image = resize_image(np.asarray(Image.open(flags.image).convert("RGB")), size, resize=spec.resize)
        window = spec.window_size
        observation = {
            f"image_{flags.camera}": np.broadcast_to(image, (1, window, *image.shape)),
            "timestep_pad_mask": np.ones((1, window), bool),
        }
        maps = {
            text: attention_over_image(policy, observation, text, flags.camera, flags.readout)
            for text in flags.instruction
        }
        draw_attention(image, maps, flags.out / "attention.png")
        print(f"written: {flags.out / 'attention.png'}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (PretrainedError, LocationError, FileNotFoundError, ValueError) as error:
        sys.exit(f"show_model.py: error: {error}")
