"""Named mixtures of registry datasets, as Octo and OpenVLA train on them.

Weights are relative, and both projects multiply each by the dataset's number of transitions before they normalise them.
A dataset that a mixture names twice has the first weight.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from octo_like.common.words import suggest
from octo_like.data.errors import DataError
from octo_like.data.oxe import registry

Mix = dict[str, float]

SUFFIX = "_dataset_converted_externally_to_rlds"


def _mix(*parts: str | Mix) -> Mix:
    """A mixture of "name weight" lines ("~" stands for SUFFIX) and other mixtures; the first weight of a name wins."""
    result: Mix = {}
    for part in parts:
        if isinstance(part, str):
            words = part.replace("~", SUFFIX).split()
            part = dict(zip(words[::2], map(float, words[1::2]), strict=True))
        result |= {name: weight for name, weight in part.items() if name not in result}
    return result


def _without(mixture: Mix, *names: str) -> Mix:
    return {name: weight for name, weight in mixture.items() if name not in names}


def _until(mixture: Mix, last: str) -> Mix:
    """The datasets up to `last`. The order of a mixture gives the dataset ids."""
    names = list(mixture)
    return {name: mixture[name] for name in names[: names.index(last) + 1]}


def _renamed(mixture: Mix, old: str, new: str) -> Mix:
    return {new if name == old else name: weight for name, weight in mixture.items()}


_RTX = _mix("""
    fractal20220817_data 0.54087122203  kuka 0.8341046294  bridge_dataset 1  taco_play 2  jaco_play 2
    berkeley_cable_routing 3  roboturk 1  nyu_door_opening_surprising_effectiveness 5  viola 2  berkeley_autolab_ur5 1
    toto 1
""")
_FRANKA = _mix("""
    taco_play 1  berkeley_cable_routing 1  viola 1  toto 1  stanford_hydra~ 1  austin_buds~ 3  nyu_franka_play~ 3
    maniskill~ 0.1  furniture_bench~ 0.1  cmu_franka_exploration~ 5  austin_sailor~ 1  austin_sirius~ 1
    berkeley_rpt_converted_externally_to_rlds 1  kaist_nonprehensile_converted_externally_to_rlds 3
    stanford_robocook_converted_externally_to_rlds 1  iamlab_cmu_pickup_insert_converted_externally_to_rlds 1
    utaustin_mutex 1  cmu_play_fusion 1
""")
_MAGIC_SOUP = _mix("""
    fractal20220817_data 0.54087122203  kuka 0.8341046294  bridge_dataset 1  taco_play 2  jaco_play 1
    berkeley_cable_routing 1  roboturk 2  nyu_door_opening_surprising_effectiveness 1  viola 2  berkeley_autolab_ur5 2
    toto 1  language_table 0.1  stanford_hydra~ 2  austin_buds~ 1  nyu_franka_play~ 3  furniture_bench~ 0.1
    ucsd_kitchen~ 2  austin_sailor~ 1  austin_sirius~ 1  bc_z 0.2
    dlr_edan_shared_control_converted_externally_to_rlds 1  iamlab_cmu_pickup_insert_converted_externally_to_rlds 1
    utaustin_mutex 1  berkeley_fanuc_manipulation 2  cmu_stretch 1
""")
_FLEX_ACT_SOUP = _mix(
    _until(_MAGIC_SOUP, "bc_z"),
    "berkeley_mvp_converted_externally_to_rlds 1",
    _MAGIC_SOUP,
    "gnm_dataset 1  aloha_static_dataset 3  aloha_mobile_dataset 2  dobbe 1  roboset 0.5  rh20t 0.5",
)
_FULL = _mix(
    dict.fromkeys(_RTX, 1.0),
    """
    language_table 1  columbia_cairlab_pusht_real 1  stanford_kuka_multimodal~ 1  nyu_rot~ 1  stanford_hydra~ 1
    austin_buds~ 1  nyu_franka_play~ 1  maniskill~ 1  furniture_bench~ 1  cmu_franka_exploration~ 1  ucsd_kitchen~ 1
    ucsd_pick_and_place~ 1  austin_sailor~ 1  austin_sirius~ 1  bc_z 1
    utokyo_pr2_opening_fridge_converted_externally_to_rlds 1
    utokyo_pr2_tabletop_manipulation_converted_externally_to_rlds 1
    utokyo_xarm_pick_and_place_converted_externally_to_rlds 1  utokyo_xarm_bimanual_converted_externally_to_rlds 1
    robo_net 1  berkeley_mvp_converted_externally_to_rlds 1  berkeley_rpt_converted_externally_to_rlds 1
    kaist_nonprehensile_converted_externally_to_rlds 1  stanford_mask_vit_converted_externally_to_rlds 1
    tokyo_u_lsmo_converted_externally_to_rlds 1  dlr_sara_pour_converted_externally_to_rlds 1
    dlr_sara_grid_clamp_converted_externally_to_rlds 1  dlr_edan_shared_control_converted_externally_to_rlds 1
    asu_table_top_converted_externally_to_rlds 1  stanford_robocook_converted_externally_to_rlds 1
    imperialcollege_sawyer_wrist_cam 1  iamlab_cmu_pickup_insert_converted_externally_to_rlds 1  uiuc_d3field 1
    utaustin_mutex 1  berkeley_fanuc_manipulation 1  cmu_playing_with_food 1  cmu_play_fusion 1  cmu_stretch 1
    gnm_dataset 1
    """,
)

# OpenVLA reads Bridge without its first step and leaves out a dataset that has a wrist camera only.
_NO_PRIMARY = "nyu_door_opening_surprising_effectiveness"
_VLA_RTX = _renamed(_without(_RTX, _NO_PRIMARY), "bridge_dataset", "bridge_orig")
_VLA_SOUP = _renamed(_without(_MAGIC_SOUP, _NO_PRIMARY, "bc_z"), "bridge_dataset", "bridge_orig")

MIXES: dict[str, Mix] = {
    "octo/bridge": {"bridge_dataset": 1.0},
    "octo/rtx": _RTX,
    "octo/rtx_franka": _mix(_RTX, _FRANKA),
    "octo/oxe_magic_soup": _MAGIC_SOUP,
    "octo/oxe_flex_act_soup": _FLEX_ACT_SOUP,
    "octo/oxe_franka": _FRANKA,  # Octo has these two without a name
    "octo/oxe_full": _FULL,
    "openvla/bridge": {"bridge_orig": 1.0},
    "openvla/bridge_rt_1": {"bridge_orig": 1.0, "fractal20220817_data": 1.0},
    "openvla/rtx": _VLA_RTX,
    # OpenVLA trains on arms whose actions are poses: it skips berkeley_rpt with a warning, we leave it out.
    "openvla/rtx_franka": _without(_mix(_VLA_RTX, _FRANKA), "berkeley_rpt_converted_externally_to_rlds"),
    "openvla/oxe_magic_soup": _VLA_SOUP,
    "openvla/oxe_magic_soup_plus": _mix(_VLA_SOUP, "bc_z 0.2  fmb_dataset 1  dobbe 0.2  droid 0.06"),
    "openvla/oxe_magic_soup_plus_minus": _mix(
        _without(_VLA_SOUP | {"fractal20220817_data": 1.0}, "language_table"), "bc_z 0.2  fmb_dataset 1  dobbe 0.2"
    ),
    **{
        f"openvla/{name}": {name: 1.0}
        for name in registry.REGISTRY
        if name.startswith(("tdroid_", "libero_")) or name == "droid_wipe"
    },
}


def resolve(name: str) -> str:
    """Full name of a mixture: a name without "octo/" or "openvla/" is Octo's if Octo has it.

    Raises:
      DataError: no such mixture, with the valid names.
    """
    for full in (name, f"octo/{name}", f"openvla/{name}"):
        if full in MIXES:
            return full
    short = [full.split("/", 1)[1] for full in MIXES]
    raise DataError(f"no mixture {name!r}; {suggest(name, dict.fromkeys([*short, *MIXES]))}")


def mix(name: str, only: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """A mixture as the `datasets` entry of a config: {dataset: {fields of its DatasetSpec}}.

    The fields are name, weight and standardize: the registry fills in the rest.

    Args:
      name: see `resolve`.
      only: these datasets of it; none named: all.

    Raises:
      DataError: no such mixture, or it does not hold a dataset of `only`, with the valid names.
    """
    weights = MIXES[resolve(name)]
    for dataset in only:
        if dataset not in weights:
            raise DataError(f"no dataset {dataset!r} in the mixture {name!r}; {suggest(dataset, weights)}")
    return {
        dataset: {"name": registry.get(dataset).folder or dataset, "weight": weight, "standardize": dataset}
        for dataset, weight in weights.items()
        if not only or dataset in only
    }


def datasets_from_config(data: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{dataset: {fields of its DatasetSpec}} of a config's `data`.

    The datasets of `data.mix` (of these, `data.mix_only`), with what `data.datasets` says of them, and the other
    datasets that it names. `data.octo_compat` makes Octo's the reading of registry datasets that name no other.

    Raises:
      DataError: an unknown mixture, or one without a dataset of `mix_only`.
    """
    if data["mix_only"] and data["mix"] is None:
        raise DataError(f"data.mix_only={tuple(data['mix_only'])} chooses from data.mix, which is not set")
    datasets = {} if data["mix"] is None else mix(data["mix"], data["mix_only"])
    for name, fields in data["datasets"].items():
        datasets[name] = {**datasets.get(name, {}), **dict(fields)}
    if data["octo_compat"]:
        datasets = {
            name: {"compat": "octo", **fields} if registry.is_entry_name(fields.get("standardize")) else fields
            for name, fields in datasets.items()
        }
    return datasets
