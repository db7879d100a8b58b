"""Packaging of octo_like-client: the robot's side of octo_like, from the same sources, for Python 3.9 and without JAX.

The modules lie in ../octo_like; they are written beside this package's __init__.py when it is built, under names of
their own. So both distributions can be installed together: neither has a file of the other.
"""

import pathlib
import re

from setuptools import setup

HERE = pathlib.Path(__file__).resolve().parent
PACKAGE, SOURCES = HERE / "octo_like_client", HERE.parent / "octo_like"
# What the client is made of. A module of octo_like that one of these imports has to be in the list, too.
MODULES = {
    "client": "robot/client.py",
    "chunking": "robot/chunking.py",
    "executor": "robot/executor.py",
    "history": "robot/history.py",
    "images": "robot/images.py",
    "loop": "robot/loop.py",
    "messages": "robot/messages.py",
    "safety": "robot/safety.py",
    "chunks": "common/chunks.py",
    "dimensions": "common/dimensions.py",
    "errors": "common/errors.py",
    "geometry": "common/geometry.py",
    "words": "common/words.py",
}
NAMES = re.compile(r"\bocto_like\.(?:robot|common)\.(?=(?:{})\b)".format("|".join(MODULES)))


def write_modules():
    """In an unpacked source distribution the modules are there already, and what they were made from is not."""
    if not SOURCES.is_dir():
        return
    version = re.search(r'^__version__ = "(.+)"$', (SOURCES / "__init__.py").read_text(), re.MULTILINE).group(1)
    (PACKAGE / "version.py").write_text(f'__version__ = "{version}"\n')
    for name, source in MODULES.items():
        text = NAMES.sub("octo_like_client.", (SOURCES / source).read_text(encoding="utf-8"))
        (PACKAGE / (name + ".py")).write_text(text.replace("'octo_like[serve]'", "websockets"), encoding="utf-8")
    (PACKAGE / "LICENSE").write_text((HERE.parent / "LICENSE").read_text())


write_modules()
setup(
    name="octo_like-client",
    version=re.search('"(.+)"', (PACKAGE / "version.py").read_text()).group(1),
    description="The robot's side of an octo_like policy server: client, history, image resizing, action filter",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=["octo_like_client"],
    package_data={"octo_like_client": ["py.typed", "LICENSE"]},
    python_requires=">=3.9",
    install_requires=["msgpack>=1.0", "numpy>=1.21", "pillow>=9.1", "websockets>=15"],
)
