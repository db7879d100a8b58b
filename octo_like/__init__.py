"""octo_like: pretrain, adapt and run Octo-style generalist robot policies in JAX.

The rooms: `common` (what a batch is), `model` (what is learned), `data` (how demonstrations become batches; the
only room that imports TensorFlow), `training` (how it is trained), `robot` (how it acts), `envs` (the built-in
tabletop world).
"""

__version__ = "0.1.0"
