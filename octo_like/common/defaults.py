"""Every knob of a run with its default. Files in configs/ start from here and change what differs."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from octo_like.common.schema import TEXT_LENGTH, BatchSpec

AUGMENTATION_PRIMARY = dict(
    crop_scale=(0.8, 1.0), crop_ratio=(0.9, 1.1), brightness=0.1, contrast=(0.9, 1.1), saturation=(0.9, 1.1), hue=0.05
)
# The kernels that low-rank adapters stand beside unless told otherwise: every projection of the transformer's blocks.
LORA_TARGETS = (r"BlockTransformer_0/.*/(query|key|value|out|Dense_\d+)/kernel",)
AUGMENTATION_WRIST = dict(brightness=0.1, contrast=(0.9, 1.1), saturation=(0.9, 1.1), hue=0.05)


def default_config() -> ConfigDict:
    """A complete config without datasets and model."""
    config = ConfigDict()
    config.seed = 0
    config.num_steps = 300_000
    config.batch_size = 256  # global
    config.accumulate = 1  # micro-batches per step

    # What a batch looks like; see octo_like/common/schema.py.
    config.window_size = 2
    config.image_sizes = dict(primary=(256, 256))
    config.resize = "stretch"  # or "letterbox", "crop": of pictures with another aspect ratio (common/geometry.py)
    config.depth_sizes = dict()  # cameras whose depth is used, e.g. dict(primary=(128, 128))
    config.goal_images = ()  # cameras that also give a goal image
    config.proprio_dim = None  # widest proprioception of the mixture; None: not used
    config.extra_observations = dict()  # other sensors and their shapes, e.g. dict(force=(6,)); DatasetSpec.extra_keys

    config.text = dict(
        model="builtin",  # or the path of a sentencepiece model, e.g. T5's spiece.model; None: no language
        max_length=16,
        t5_weights=None,  # directory with Hugging Face safetensors of a T5 encoder
    )
    config.data = dict(
        kind="rlds",  # or "memory": episodes as arrays, without TensorFlow; or "synthetic": random batches
        episodes="",  # memory: episodes that are made, e.g. "tabletop_arm=300+20 tabletop_pusher=300"
        generator="octo_like.envs.demonstrations:generate",  # memory: the function that makes them
        workers=2,  # memory: processes that make them
        data_dir=None,
        cache_dir=None,  # where indices and statistics are kept; None: beside the data
        index_workers=None,  # files that a process reads at the same time to make an index; None: up to 8, by cores
        index_processes=None,  # processes of each host that read them; None: by bytes and cores
        mix=None,  # a mixture of octo_like/data/oxe/mixes.py, e.g. "oxe_magic_soup"
        mix_only=(),  # these datasets of it; (): all
        datasets=dict(),  # name -> fields of octo_like.data.spec.DatasetSpec, over those of the mixture
        num_demos=None,  # episodes used of each dataset, those held out by val_fraction among them; None: all
        num_demos_of="all",  # or "training", as in earlier versions: those held out come on top
        num_lanes=None,  # None: by the batch size, for up to 384 hosts; as many hosts as divide it continue a run
        episodes_mixed=None,  # of each dataset at a time; None: as many as host_memory_gb holds
        max_visits=16,  # times that a pass may read an episode, in order to mix more of them in little memory
        balance_weights=False,  # multiply the datasets' weights by their numbers of frames
        decode="parity",  # or "fast"
        keep_goal_prob=0.5,
        max_goal_distance=None,
        drop_task_prob=0.0,  # samples that are not told what to do
        paraphrases=None,  # JSON file {"instruction": ["paraphrase", ...]}
        paraphrase_prob=0.5,  # of the instructions that have paraphrases
        drop_subtask_prob=0.3,  # samples with a sub-task that are not told it
        subtask_alone_prob=0.2,  # of those that are, the ones that are told nothing else
        last_subtask_prob=0.0,  # samples not told their sub-task that hear what was done a little before
        last_subtask_steps=8,  # a little before: 1 to this many steps
        image_dropout_prob=0.0,  # of each camera of a sample
        image_dropout_keep=None,  # the camera that is never dropped; None: one of them, drawn
        octo_compat=False,  # Octo's action mask and its reading of registry datasets, mistakes included
        max_bad_fraction=0.01,  # share of a dataset's records that may be damaged
        host_threads=2,
        host_memory_gb=4.0,  # of a process, for episodes and batches; decides episodes_mixed at the first start
        prefetch=2,
    )
    # Samples that are told an instruction and a sub-task: the share whose sub-task is what the model itself would say,
    # from step `after` on (docs/language.md).
    config.own_subtasks = dict(prob=0.0, after=0, part="text")
    # Camera -> fields of octo_like.training.augment.Augmentation, or kind="module:Class" and its fields.
    config.augmentation = dict()
    config.optimizer = dict(
        name="adamw",  # or "lion", "muon", "adafactor", "sgd", or "module:function" of your own (docs/training.md)
        arguments=dict(),  # what else its function takes, e.g. dict(b1=0.95)
        schedule="rsqrt",  # or "constant", "cosine"
        peak=3e-4,
        warmup_steps=2000,
        timescale=10_000,  # rsqrt
        decay_steps=None,  # cosine; None: num_steps
        end=0.0,  # cosine
        weight_decay=0.1,
        clip_norm=1.0,
        b2=0.999,  # adamw
        freeze=(),  # regexes of parameter paths
    )
    config.ema_decay = 0.999
    config.mesh = dict(
        data=-1,  # devices over which the batch alone is spread; -1: what is left
        fsdp=1,  # devices over which parameters and optimizer state are spread as well
        min_size=2**18,  # parameters with fewer entries are on every device
        overrides=(),  # ((regex of a path, mesh axis or None of each dimension), ...), before the inference
    )
    config.init_from = None  # an export, or another run's workdir: its parameters are what this run begins with
    config.checkpoint = dict(
        every=5000,
        keep_last=2,
        keep_every=None,  # steps divisible by it are kept for ever
        keep_best=0,  # this many of those that were evaluated, by best_metric
        best_metric="val/*/*/loss",  # pattern; the mean of the metrics it matches
        best_mode="min",  # or "max"
        export="ema",  # or "raw": which parameters the export holds
    )
    config.eval = dict(
        every=5000,  # steps; 0: only at the end; None: never
        batch_size=None,  # None: the training batch size
        batches=16,  # per dataset
        rollouts=0,  # closed-loop episodes per dataset that names an environment
        exec_horizon=None,  # actions executed per prediction; None: the whole chunk
        plan_every=None,  # chunks after which the policy says anew what it does next; None: it does not say it
    )
    # Stops after so many evaluations in a row without a better checkpoint.best_metric; None: trains to the end.
    config.early_stopping = dict(patience=None)
    config.log_every = 50
    config.max_bad_steps = 10  # non-finite steps in a row after which the run stops; None: never
    # When nothing has moved for so long: dump all stacks, and exit. 0 minutes: that part is not watched.
    config.watchdog = dict(
        minutes=30.0,  # without a finished step; four times as long for the first one, evaluation and export
        startup_minutes=30.0,  # finding the devices, building the model
        data_minutes=1440.0,  # finding and indexing the data; hosts also wait for the slowest one
        restore_minutes=120.0,  # making or loading the parameters, restoring a checkpoint
        agreement_minutes=15.0,  # comparing config, code, data and workdir of all hosts
        exit=True,
    )
    config.profile_steps = None  # "100:110": trace these steps with XProf
    config.wandb = dict(project=None, name=None)
    return config


def adaptation_config() -> ConfigDict:
    """A complete config of finetune.py without datasets: the defaults of pretraining, and what adaptation adds.

    Where a value is None and the comment says how, it is derived when the run starts; config.json holds what came out.
    """
    config = default_config()
    config.pretrained = None  # an exported policy, a released Octo checkpoint, or a run's checkpoints/[STEP]
    # Modules of the pretrained policy's own parts, which are imported only when they are named (docs/extending.md).
    config.modules = ()
    config.model = None  # without `pretrained`: the model to train from scratch
    config.mode = "full"  # what is trained: a key of octo_like.policy.surgery.MODES
    config.conditioning = "language"  # what tells the robot what to do: "language", "goal_image" or "both"
    # Parts of the pretrained model by name; see octo_like.policy.surgery.operate.
    groups = ("task_tokenizers", "observation_tokenizers", "readouts", "heads", "auxiliaries")
    config.surgery = {group: dict() for group in groups}
    config.surgery.max_window = None  # longest window; None: the pretrained model's
    config.reinitialize = ()  # regexes of parameter paths that are not loaded although they would fit
    config.lora = dict(rank=8, alpha=16.0, targets=LORA_TARGETS)  # mode "lora"
    config.window_size = 1
    config.image_sizes = dict()  # empty: the pretrained model's, of the cameras that the datasets have
    config.resize = None  # None: the pretrained model's, else "stretch"
    config.batch_size = 64
    # Small data: see docs/finetune.md for the formulas.
    config.num_steps = None  # None: passes * transitions / batch_size, within min_steps and max_steps
    config.recipe = dict(passes=100.0, min_steps=500, max_steps=50_000)
    config.ema_decay = None  # None: an average over about a tenth of the run, 1 - 10 / num_steps
    config.optimizer.update(schedule="cosine", peak=3e-4, weight_decay=0.01)
    config.optimizer.warmup_steps = None  # None: a twentieth of the run
    config.checkpoint.update(every=500, keep_best=1)
    config.eval.update(every=500, batches=4)
    return config


def batch_spec(config: Any, model: Mapping[str, Any] | None = None, tokenizer: Any = None) -> BatchSpec:
    """The batch spec of a run.

    Args:
      model: the model's config, when it is not `config.model`.
      tokenizer: the text tokenizer, when it is not the one `config.text` names (anything with `max_length`).
    """
    model = config.model if model is None else model
    heads, auxiliaries = model["heads"], model.get("auxiliaries") or {}
    names = {tuple(part["names"]) for part in auxiliaries.values() if part.get("kind") == "points"}
    if len(names) > 1:
        raise ValueError(f"model.auxiliaries: all must have the same points, got {sorted(names)}")
    targets = {part.get("max_length", TEXT_LENGTH) for part in auxiliaries.values() if part.get("kind") == "text"}
    if len(targets) > 1:
        raise ValueError(f"model.auxiliaries: all texts must have the same max_length, got {sorted(targets)}")
    subtask = any(part.get("key") == "subtask" for part in (model.get("task_tokenizers") or {}).values())
    length = None if config.text.model is None else config.text.max_length
    return BatchSpec(
        window_size=config.window_size,
        action_horizon=max(head["action_horizon"] for head in heads.values()),
        action_dim=max(head["action_dim"] for head in heads.values()),
        image_sizes={slot: tuple(size) for slot, size in config.image_sizes.items()},
        resize=config.get("resize") or "stretch",
        depth_sizes={slot: tuple(size) for slot, size in config.get("depth_sizes", {}).items()},
        goal_images=tuple(config.goal_images),
        proprio_dim=config.proprio_dim,
        language_length=length if tokenizer is None else tokenizer.max_length,
        heads=tuple(heads),
        points=next(iter(names), ()),
        text_target=next(iter(targets), None),
        subtask=subtask,
        action_tokens={
            name: int(head["vocabulary"]["max_tokens"]) for name, head in heads.items() if head.get("kind") == "fast"
        },
        extra_observations={
            key: (shape,) if isinstance(shape, int) else tuple(shape)
            for key, shape in config.get("extra_observations", {}).items()
        },
    )
