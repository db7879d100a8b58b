"""The registry and the mixtures against the reference trajectories and lists of Open X-Embodiment."""

import json

import numpy as np
import pytest

from octo_like.data.oxe import mixes, registry
from octo_like.data.oxe import vocabulary as s
from octo_like.data.oxe.entry import Entry
from octo_like.data.spec import DataError, DatasetSpec
from octo_like.data.tf import tf
from tests.data import oxe_golden


@pytest.fixture(scope="module")
def excerpt(repository):
    return oxe_golden.unpack(repository / "tests" / "golden" / "oxe" / "cases.xz")


@pytest.fixture(scope="module")
def facts(excerpt):
    return excerpt[0]


# ---------------------------------------------------------------- parity


def nested(leaves):
    """{"observation/a/b": x} to {"observation": {"a/b": x}}: containers end at the first slash."""
    tree = {}
    for path, leaf in leaves.items():
        head, _, rest = path.partition("/")
        if rest:
            tree.setdefault(head, {})[rest] = leaf
        else:
            tree[head] = leaf
    return tree


TRACED = {}


def traced(name, compat, leaves):
    """A reading as a graph for any number of steps, as a dataset's files are read. Made once for all cases."""

    def signature(x):
        return tf.TensorSpec([None, *x.shape[1:]], tf.string if x.dtype.kind == "S" else x.dtype)

    if (name, compat) not in TRACED:
        function = registry.standardizer(name, compat)
        signatures = [tf.nest.map_structure(signature, nested(leaves))]
        graph = tf.function(lambda trajectory: function(trajectory), input_signature=signatures, autograph=False)
        TRACED[name, compat] = graph.get_concrete_function()
    return TRACED[name, compat]


def read_as(name, compat, leaves):
    """{path: array} of a raw trajectory in one reading."""
    tensors = {path: tf.constant(leaf) for path, leaf in leaves.items()}
    got = traced(name, compat, leaves)(*tf.nest.flatten(nested(tensors)))
    return {path: leaf.numpy() for path, leaf in s.leaves_of(got).items()}


def check(files, compat):
    """Every leaf of every case of every file against the registry's reading, and no leaf but these.

    Returns (files, arrays) compared.
    """
    arrays = 0
    for file, by_case in files.items():
        name = file.removeprefix("openvla/")
        for case, sides in by_case.items():
            got = read_as(name, compat, sides["in"])
            for path, want in sides["out"].items():
                where = f"{file} {case} {path}"
                assert path in got, where
                euler = oxe_golden.EULER.get(name) if path == "action" else None
                oxe_golden.compare(got[path], want, where, euler)
                arrays += 1
            oxe_golden.check_the_rest(name, f"{file} {case}", got, sides)
    return len(files), arrays


def of_project(files, openvla):
    return {name: cases for name, cases in files.items() if name.startswith("openvla/") == openvla}


def test_excerpt_reproduces(excerpt):
    assert check(of_project(excerpt[1], False), "octo") == (78, 2000)
    assert check(of_project(excerpt[1], True), "openvla") == (53, 1298)


def test_every_reference_trajectory_reproduces(shared):
    """The cases that the excerpt leaves out, and that the two together are all there are: 704 cases, 4449 arrays."""
    files = oxe_golden.read_folder(shared / "oxe")
    assert sum(map(len, files.values())) == 704
    left_out = {
        name: {case: sides for case, sides in cases.items() if case in oxe_golden.LEFT_OUT}
        for name, cases in files.items()
    }
    assert check(of_project(left_out, False), "octo") == (78, 2703 - 2000)
    assert check(of_project(left_out, True), "openvla") == (53, 1746 - 1298)


def test_a_leaf_too_many_or_too_few_is_noticed(excerpt):
    """The comparison is of both sides: an image that should go, a leaf that should stay, one from nowhere."""
    name, image = "berkeley_autolab_ur5", "observation/image_with_depth"
    sides = excerpt[1][name]["s0"]
    got = read_as(name, "octo", sides["in"])
    oxe_golden.check_the_rest(name, name, got, sides)
    with pytest.raises(AssertionError, match=f"{image}'. should be there, or should not"):
        oxe_golden.check_the_rest(name, name, got | {image: sides["in"][image]}, sides)
    name, state = "bridge_dataset", "observation/state"
    sides = excerpt[1][name]["s0"]
    got = read_as(name, "octo", sides["in"])
    with pytest.raises(AssertionError, match="mine is in no output"):
        oxe_golden.check_the_rest(name, name, got | {"observation/mine": got[state]}, sides)
    with pytest.raises(AssertionError, match=f"{state}'. should be there"):
        oxe_golden.check_the_rest(name, name, {path: leaf for path, leaf in got.items() if path != state}, sides)
    with pytest.raises(AssertionError, match=state):
        oxe_golden.check_the_rest(name, name, got | {state: got[state] + 1}, sides)


def test_removed_leaves_are_those_of_the_reference(shared):
    datasets = json.loads((shared / "oxe" / "oxe_datasets.json").read_text())["datasets"]
    for variants in (datasets, {name: record.get("openvla", {}) for name, record in datasets.items()}):
        removes = {name: set(v.get("standardize", {}).get("removes", ())) for name, v in variants.items()}
        assert {name: paths for name, paths in removes.items() if paths} == oxe_golden.REMOVED


def test_excerpt_is_what_the_reference_says(shared, excerpt):
    facts, files = excerpt
    assert oxe_golden.facts_of(shared / "oxe") == facts
    want = oxe_golden.read_folder(shared / "oxe", lambda case: case not in oxe_golden.LEFT_OUT)
    assert {name: list(cases) for name, cases in want.items()} == {name: list(cases) for name, cases in files.items()}
    for name, cases in want.items():
        for case, sides in cases.items():
            for side, leaves in sides.items():
                for path, array in leaves.items():
                    np.testing.assert_array_equal(files[name][case][side][path], array)


# ---------------------------------------------------------------- facts

WRITTEN_OUT = {  # what our reading leaves out or changes, with the reason
    "bridge_oxe": "images",  # the reference names a camera that the data does not have
    "ppgm": "images", "ppgm_static": "images", "ppgm_wrist": "images",  # registered without cameras and mask
    "berkeley_gnm_recon": "mask", "berkeley_gnm_cory_hall": "mask", "berkeley_gnm_sac_son": "mask",  # 2-D, not an arm
}  # fmt: skip


def present(slots):
    return {slot: key for slot, key in (slots or {}).items() if key is not None}


def test_entries_say_what_the_reference_says(facts):
    """Cameras, depth maps, masks and blanked instructions of every dataset, in every reading."""
    assert list(sorted(facts["datasets"])) == sorted(registry.REGISTRY)
    for name, fact in facts["datasets"].items():
        for compat in (None, "octo"):
            fields, different = registry.spec_fields(name, compat), WRITTEN_OUT.get(name)
            if different != "images":
                assert fields["image_keys"] == present(fact["image_keys"]), name
                assert fields["depth_keys"] == present(fact["depth_keys"]), name
            if compat == "octo" or different is None:
                mask = fact["action_normalization_mask"] or [1] * 6 + [0]
                assert fields["action_normalization_mask"] == tuple(map(bool, mask)), name
            assert registry.get(name, compat).blank == fact["blanked"]
        entry = registry.REGISTRY[name]
        assert entry.only_openvla == (fact["source"] == "openvla")
        assert (entry.openvla is None) == (fact["source"] == "octo")
        if "openvla" in fact:
            fields = registry.spec_fields(name, "openvla")
            assert fields["image_keys"] == present(fact["openvla"].get("image_keys", fact["image_keys"]))
            assert not registry.get(name, "openvla").blank
    assert registry.spec_fields("bridge_oxe")["image_keys"] == {"primary": "image"}


def definition(name, compat=None):
    return registry.resolve(name, compat=compat)[1]


def test_widths(facts, excerpt):
    """Action and proprioception have a known width before any file is read: the one that the mask has."""
    for name, fact in facts["datasets"].items():
        leaves = next(iter(excerpt[1][name].values()))["in"]
        for compat in ("octo", None):
            if compat is None and definition(name) == definition(name, "octo"):
                continue
            shapes = traced(name, compat, leaves).structured_outputs
            assert shapes["action"].shape[-1] == len(registry.get(name, compat).action_mask), name
            if compat == "octo":
                assert shapes["action"].shape[-1] == fact["action_dim"], name
                if fact["proprio_width"] is not None:
                    assert shapes["observation"]["proprio"].shape[-1] == fact["proprio_width"], name


def test_bgr_cameras_are_those_of_the_reference(shared):
    """Every camera that the reference says is stored as BGR, also those that no slot shows."""
    datasets = json.loads((shared / "oxe" / "oxe_datasets.json").read_text())["datasets"]
    assert sorted(datasets) == sorted(registry.REGISTRY)
    for name, record in datasets.items():
        if "unverified" in json.dumps(record["image_notes"]):  # a guess from its converter: the user is told to look
            assert record["needs_channel_flip"] and "channels" in registry.REGISTRY[name].caution, name
            assert registry.bgr_keys(name) == set()
            continue
        assert registry.bgr_keys(name) == set(record["needs_channel_flip"] or ()), name
        assert registry.bgr_keys(name, "octo") == set()
        shown = [slot for slot, key in registry.get(name).images.items() if key in registry.bgr_keys(name)]
        assert list(registry.spec_fields(name)["bgr_slots"]) == shown


def test_bgr_names_keys_and_not_slots():
    with pytest.raises(DataError, match="'hand_rgb' in place of 'wrist'"):
        Entry(images={"primary": "rgb", "wrist": "hand_rgb"}, bgr=("wrist",))
    assert Entry(images={"wrist": "wrist"}, bgr=("wrist", "shoulder")).bgr == ("wrist", "shoulder")


# ---------------------------------------------------------------- corrections

CONSTANT_STATE = (
    "roboturk", "nyu_door_opening_surprising_effectiveness", "imperialcollege_sawyer_wrist_cam", "uiuc_d3field",
    "cmu_franka_exploration_dataset_converted_externally_to_rlds",
)  # fmt: skip
PADDED_STATE = {name for name, entry in registry.REGISTRY.items() if entry.only_openvla} - {"droid", "droid_wipe"}
# Datasets of which our reading gives other numbers than the reference. docs/oxe.md says why for each.
CORRECTED = {
    "taco_play", "nyu_rot_dataset_converted_externally_to_rlds", "cmu_playing_with_food", "cmu_play_fusion",
    "maniskill_dataset_converted_externally_to_rlds", "robo_net", "gnm_dataset", "droid",
    "iamlab_cmu_pickup_insert_converted_externally_to_rlds", "stanford_mask_vit_converted_externally_to_rlds",
    *CONSTANT_STATE, *PADDED_STATE,
}  # fmt: skip


def test_only_what_is_listed_is_corrected():
    assert {name for name in registry.REGISTRY if definition(name) != definition(name, "octo")} == CORRECTED


def test_docs_list_every_correction(repository):
    text = (repository / "docs" / "oxe.md").read_text()
    swapped = {name for name, entry in registry.REGISTRY.items() if entry.bgr}
    for name in CORRECTED | swapped:
        short = name.removesuffix("_dataset_converted_externally_to_rlds").removesuffix("_converted_externally_to_rlds")
        group = next((g for g in ("ppgm", "tdroid", "libero", "berkeley_gnm") if name.startswith(g)), short)
        assert f"`{group}" in text, name


def apply(name, compat=None, **leaves):
    got = registry.standardizer(name, compat)(nested({k: tf.constant(v) for k, v in leaves.items()}))
    return {path: leaf.numpy() for path, leaf in s.leaves_of(got).items()}


def trajectory(action, steps=4, **more):
    text = np.array([b"do it"] * steps)
    return {"action": np.asarray(action, np.float32), "language_instruction": text} | more


def matrix_from_euler(x, y, z):
    """Rz Ry Rx."""
    cx, sx, cy, sy, cz, sz = np.cos(x), np.sin(x), np.cos(y), np.sin(y), np.cos(z), np.sin(z)
    rx = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    ry = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    rz = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return rz @ ry @ rx


def matrix_from_axis(axis, angle):
    """Rodrigues' formula: I + sin K + (1 - cos) K^2."""
    x, y, z = axis
    k = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * k + (1 - np.cos(angle)) * k @ k


@pytest.mark.parametrize(
    "name,first,columns",
    [
        ("iamlab_cmu_pickup_insert_converted_externally_to_rlds", "w", 8),
        ("cmu_playing_with_food", "w", 8),
        ("cmu_play_fusion", "x", 9),
    ],
)
def test_quaternions_are_read_in_their_order(name, first, columns):
    rng = np.random.default_rng(0)
    axes = rng.normal(size=(20, 3))
    axes /= np.linalg.norm(axes, axis=1, keepdims=True)
    angles = rng.uniform(-3, 3, 20)
    vector, scalar = axes * np.sin(angles / 2)[:, None], np.cos(angles / 2)[:, None]
    quaternions = np.concatenate([scalar, vector] if first == "w" else [vector, scalar], 1)
    action = np.concatenate([rng.normal(size=(20, 3)), quaternions, rng.random((20, columns - 7))], 1)
    state = {"observation/state": np.zeros((20, 20), np.float32)}
    got = apply(name, **trajectory(action, 20, **state))["action"]
    np.testing.assert_array_equal(got[:, :3], np.float32(action[:, :3]))
    np.testing.assert_array_equal(got[:, 6], np.float32(action[:, 7]))  # the gripper, not the end of the episode
    for euler, axis, angle in zip(got[:, 3:6], axes, angles, strict=True):
        np.testing.assert_allclose(matrix_from_euler(*euler), matrix_from_axis(axis, angle), atol=1e-5)
    upstream = apply(name, "octo", **trajectory(action, 20, **state))["action"]
    assert np.abs(upstream - got).max() > 0.1


def test_taco_state_ends_with_the_gripper():
    state = np.arange(60, dtype=np.float32).reshape(4, 15)
    leaves = {
        "action/rel_actions_world": np.zeros((4, 7), np.float32),
        "observation/robot_obs": state,
        "observation/natural_language_instruction": np.array([b"x"] * 4),
    }
    np.testing.assert_array_equal(apply("taco_play", **leaves)["observation/proprio"], state[:, :7])
    upstream = apply("taco_play", "octo", **leaves)["observation/proprio"]
    np.testing.assert_array_equal(upstream[:, 6], state[:, 7])


def test_grippers_are_one_when_open():
    action = np.zeros((4, 7))
    action[:, 6] = [-1, 1, 0, -1]
    maniskill = trajectory(action, **{"observation/tcp_pose": np.zeros((4, 7)), "observation/state": np.zeros((4, 18))})
    name = "maniskill_dataset_converted_externally_to_rlds"
    np.testing.assert_array_equal(apply(name, **maniskill)["action"][:, 6], [0, 1, 0.5, 0])
    np.testing.assert_array_equal(apply(name, "octo", **maniskill)["action"][:, 6], [-1, 1, 0, -1])
    action[:, 6] = [0, 1, 1, 0]  # 0 opens
    rot = trajectory(action, **{"observation/state": np.zeros((4, 7))})
    name = "nyu_rot_dataset_converted_externally_to_rlds"
    np.testing.assert_array_equal(apply(name, **rot)["action"][:, 6], [1, 0, 0, 1])


@pytest.mark.parametrize(
    "name,leaf,gripper",
    [
        ("stanford_mask_vit_converted_externally_to_rlds", "observation/end_effector_pose", [1, 0, 1, 0]),
        ("robo_net", "observation/state", [-1, 1, -1, 1]),
    ],
)
def test_yaw_is_the_third_angle(name, leaf, gripper):
    action = np.arange(20, dtype=np.float32).reshape(4, 5)
    action[:, 4] = [-1, 1, -1, 1]
    got = apply(name, **trajectory(action, **{leaf: action}))
    for path, last in (("action", gripper), ("observation/proprio", action[:, 4])):
        want = np.zeros((4, 7))
        want[:, :3], want[:, 5], want[:, 6] = action[:, :3], action[:, 3], last
        np.testing.assert_array_equal(got[path], want)


def test_navigation_is_scaled_by_the_first_step_that_moves(excerpt):
    """NumPy, step by step: positions every third step, turned by the heading, scaled by |way-point| / |way|."""
    compared = 0
    for case, sides in excerpt[1]["gnm_dataset"].items():
        raw = sides["in"]
        position, yaw, way = raw["observation/position"], raw["observation/yaw"][:, 0], raw["action"]
        got = apply("gnm_dataset", **raw)["action"]
        kept = np.arange(0, len(position), 3) if len(position) >= 2 else np.arange(0)
        moved = [t for t in range(len(position) - 1) if np.linalg.norm(position[t + 1] - position[t]) > 0]
        t = moved[0] if moved else 0
        want = []
        for a, b in zip(kept[:-1], kept[1:], strict=True):
            turn = np.array([[np.cos(yaw[a]), np.sin(yaw[a])], [-np.sin(yaw[a]), np.cos(yaw[a])]])
            scale = np.linalg.norm(way[t]) / np.linalg.norm(position[t + 1] - position[t])
            want.append(turn @ (position[b] - position[a]) * scale)
        assert len(got) == len(want) and np.isfinite(got).all(), case
        if want:
            np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)
            compared += 1
    assert compared >= 5
    still = {**raw, "observation/position": np.zeros((6, 2)), "observation/yaw": np.zeros((6, 1))}
    still |= {"observation/state": np.zeros((6, 3)), "action": np.zeros((6, 2)), "_frame_index": np.arange(6)}
    still = {k: v[:1].repeat(6, 0) if len(v) != 6 else v for k, v in still.items()}
    np.testing.assert_array_equal(apply("gnm_dataset", **still)["action"], np.zeros((1, 2)))
    assert np.isnan(apply("gnm_dataset", "octo", **still)["action"]).all()


def test_states_hold_no_columns_that_are_not_measured(excerpt):
    for name in CONSTANT_STATE:
        assert registry.spec_fields(name)["proprio_keys"] == ()
        assert registry.spec_fields(name, "octo")["proprio_keys"] == ("proprio",)
    for name in PADDED_STATE:
        leaves = next(iter(excerpt[1][name].values()))["in"]
        ours = apply(name, **leaves)["observation/proprio"]
        assert (np.ptp(ours, axis=0) > 0).all(), name
        theirs = apply(name, "octo", **leaves).get("observation/proprio")
        if theirs is not None:  # theirs is ours with columns of zeros between
            filled = [c for c in theirs.T if np.ptp(c) > 0]
            np.testing.assert_allclose(ours.T, filled, rtol=1e-6)


def test_planar_robots_have_two_actions(excerpt):
    for name in ("berkeley_gnm_recon", "berkeley_gnm_cory_hall", "berkeley_gnm_sac_son"):
        leaves = next(iter(excerpt[1][name].values()))["in"]
        np.testing.assert_array_equal(apply(name, **leaves)["action"], leaves["action"])


def test_droid_keeps_its_cameras():
    assert registry.standardizer("droid").swap is None
    assert registry.standardizer("droid", "octo").swap[2] == 0.5


def test_depth_in_metres():
    assert registry.spec_fields("maniskill_dataset_converted_externally_to_rlds")["depth_scale"] == 1 / 1024
    assert registry.spec_fields("maniskill_dataset_converted_externally_to_rlds", "octo")["depth_scale"] == 1 / 65535


# ---------------------------------------------------------------- mixtures


def test_mixtures_are_the_reference_lists(facts):
    """Names, weights and order; a name that comes twice has its first weight."""
    seen = set()
    for project, lists in facts["mixes"].items():
        for name, record in lists.items():
            full = (
                f"{project}/{name}" if project in ("octo", "openvla") else f"octo/{name.lower().removesuffix('_mix')}"
            )
            skipped = record.get("skipped_at_load", ())
            want = [(dataset, weight) for dataset, weight in record["datasets"] if dataset not in skipped]
            assert list(mixes.MIXES[full].items()) == want, full
            seen.add(full)
    assert seen == set(mixes.MIXES)


def test_mixtures_build_specs():
    for name in mixes.MIXES:
        for key, fields in mixes.mix(name).items():
            spec = DatasetSpec.from_dict(fields, key)
            assert spec.standardize == key and spec.image_keys and spec.weight == mixes.MIXES[name][key]
    assert list(mixes.mix("bridge")) == ["bridge_dataset"] and list(mixes.mix("openvla/bridge")) == ["bridge_orig"]
    assert list(mixes.mix("bridge_rt_1")) == ["bridge_orig", "fractal20220817_data"]
    assert mixes.mix("bridge_rt_1")["bridge_orig"]["name"] == "bridge_dataset"  # the folder
    assert list(mixes.mix("oxe_magic_soup", ["kuka", "bridge_dataset"])) == ["kuka", "bridge_dataset"]


def config_data(**changes):
    from octo_like.common.defaults import default_config

    data = default_config().data
    with data.ignore_type(), data.unlocked():
        data.update(changes)
    return data


def test_a_config_names_a_mixture():
    datasets = mixes.datasets_from_config(
        config_data(
            mix="oxe_magic_soup",
            mix_only=("kuka", "bridge_dataset"),
            datasets={"kuka": {"weight": 3.0, "compat": "openvla"}, "mine": {"action_key": "control"}},
        )
    )
    specs = {name: DatasetSpec.from_dict(fields, name) for name, fields in datasets.items()}
    assert list(specs) == ["kuka", "bridge_dataset", "mine"]
    assert (specs["kuka"].weight, specs["kuka"].compat, specs["bridge_dataset"].weight) == (3.0, "openvla", 1.0)
    assert specs["mine"].action_key == "control" and specs["mine"].standardize is None


def test_octo_compat_reads_as_octo():
    fields = dict(
        mix="bridge", datasets={"mine": {}, "kuka": {"standardize": "kuka", "compat": None}}, octo_compat=True
    )
    datasets = mixes.datasets_from_config(config_data(**fields))
    assert datasets["bridge_dataset"]["compat"] == "octo"
    assert "compat" not in datasets["mine"] and datasets["kuka"]["compat"] is None


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: registry.get("bridge_datset"), "no registry entry 'bridge_datset'.*did you mean 'bridge_dataset'"),
        (lambda: registry.get("gnm_dataset", "openvla"), "gnm_dataset: OpenVLA does not register.*None, 'octo'"),
        (lambda: mixes.mix("oxe_magic_sup"), "no mixture 'oxe_magic_sup'.*did you mean 'oxe_magic_soup'"),
        (lambda: mixes.mix("rtx", ["kuca"]), "no dataset 'kuca' in the mixture 'rtx'.*did you mean 'kuka'"),
        (lambda: mixes.datasets_from_config(config_data(mix_only=("kuka",))), "chooses from data.mix, which is not"),
        (lambda: DatasetSpec("x", standardize="kuka", compat="otco"), "compat 'otco'; valid: None, 'octo', 'openvla'"),
        (
            lambda: DatasetSpec("x", compat="octo"),
            "compat='octo' chooses how.*None is none of its entries",
        ),
        (lambda: DatasetSpec("x", blank_text=True), "blank_text=True chooses how the registry"),
        (lambda: DatasetSpec("x", depth_scale=0.0), "depth_scale must be positive"),
        (lambda: DatasetSpec("x", image_keys={"primary": "i"}, bgr_slots=("wrist",)), "no camera 'wrist'.*primary"),
    ],
)
def test_errors_name_what_is_valid(call, message):
    with pytest.raises(DataError, match=message):
        call()


def test_another_copy_is_named_when_leaves_are_missing():
    raw = {"action": {"open_gripper": tf.zeros([3])}, "observation": {"state": tf.zeros([3, 7])}}
    with pytest.raises(DataError, match="no leaf 'action'.*describes version 1.0.0; .*standardize='bridge_oxe'"):
        registry.standardizer("bridge_dataset")(raw)


def test_instructions_can_be_kept_or_dropped():
    assert s.blank_text() == registry.standardizer("utaustin_mutex").outputs["language_instruction"]
    kept = registry.standardizer("utaustin_mutex", blank_text=False).outputs["language_instruction"]
    assert kept == s.field("language_instruction")
    assert registry.standardizer("cmu_stretch", blank_text=True).outputs["language_instruction"] == s.blank_text()
    ways = [(c, b) for c in (None, "openvla") for b in (None, True)]
    hashes = {registry.resolve("utaustin_mutex", compat=c, blank_text=b)[1] for c, b in ways}
    assert len(hashes) == 3  # the two that are blank by default and on request are one
