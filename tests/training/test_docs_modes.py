"""What docs/finetune.md says that each mode trains is what it trains."""

import ast
import re

import jax
import numpy as np
import pytest

from octo_like.common.config import freeze, load_config
from octo_like.common.schema import flatten
from octo_like.policy import surgery
from octo_like.training import adaptation
from octo_like.training.program import network_from_config

# Words of the page, and the parameters that they name.
PARTS = {
    "blocks": r"^octo_transformer/BlockTransformer_0/",
    "tokenizers": r"^octo_transformer/(observation|task)_tokenizers_",
    "projections": r"^octo_transformer/(obs|task)_\w+_projection/",
    "positions": r"^octo_transformer/(obs|task)_\w+_pos_embedding",
    "readouts": r"^octo_transformer/readout_",
    "heads": r"^heads_",
    "auxiliaries": r"^auxiliaries_",
}


@pytest.fixture(scope="module")
def page(repository):
    return (repository / "docs" / "finetune.md").read_text()


@pytest.fixture(scope="module")
def model(repository):
    """(config, network, stand-ins of its parameters) with all kinds of parts."""
    config = load_config(str(repository / "configs" / "tabletop_octo.py"))
    network = network_from_config(config)
    shapes = jax.eval_shape(network.init_params, jax.random.key(0))
    return config, network, jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), shapes)


def test_modes(page, model):
    paths = [path for path, _ in flatten(model[2])]
    assert all(any(re.search(pattern, path) for path in paths) for pattern in PARTS.values())
    for mode in surgery.MODES:
        (said,) = re.findall(rf"^\| `{mode}` \| ([^|]*) \|", page, re.M)
        if said.startswith("as `head_only`"):
            said = re.findall(r"^\| `head_only` \| ([^|]*) \|", page, re.M)[0]
        frozen = surgery.frozen_by_mode(mode, (), dict.fromkeys(paths, True))
        trained = {
            part for part, pattern in PARTS.items() if any(re.search(pattern, p) for p in paths if p not in frozen)
        }
        kept = {part for part, pattern in PARTS.items() if any(re.search(pattern, p) for p in paths if p in frozen)}
        assert not trained & kept
        listed = said.split(";")[0].split("blocks:")[-1]
        named = set(PARTS) if said == "everything" else {part for part in PARTS if part in listed}
        assert named == trained, mode


def test_what_trains_the_factors_alone(page, model):
    (written,) = re.findall(r'--config\.optimizer\.freeze="(\(\S+?\))"` together with `lora` trains the factors', page)
    config, network, params = model
    tree = adaptation_tree(config, mode="lora", patterns=ast.literal_eval(written))
    pretrained = adaptation.Pretrained(config.model.to_dict(), params, network.spec, network.tokenizer)
    weights, targets = adaptation._weights(tree, params, config.model.to_dict(), pretrained, 0, ())
    assert weights.frozen == {path for path, _ in flatten(params)}  # the factors come on top, beside the targets
    assert targets and all("BlockTransformer_0" in path for path in targets)


def adaptation_tree(config, *, mode, patterns):
    from octo_like.common.defaults import adaptation_config

    made = adaptation_config()
    made.mode, made.optimizer.freeze, made.model = mode, tuple(patterns), config.model.to_dict()
    return freeze(made)
