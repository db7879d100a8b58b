"""Streams for tests, with the settings as keywords."""

from octo_like.common.lanes import Processes
from octo_like.data.batches import stream
from octo_like.data.settings import Settings


def make_train_stream(specs, spec, tokenizer, *, process_index=0, process_count=1, **options):
    """`stream.make_train_stream`; options are its arguments and the fields of `Settings`."""
    arguments = {name: options.pop(name) for name in ("start", "data_dir", "cache_dir") if name in options}
    processes = Processes(process_index, process_count)
    return stream.make_train_stream(specs, spec, tokenizer, Settings.of(**options), processes=processes, **arguments)


def make_val_iterators(specs, spec, tokenizer, *, process_index=0, process_count=1, max_batches=None, **options):
    """The same for `stream.make_val_iterators`."""
    arguments = dict(processes=Processes(process_index, process_count), max_batches=max_batches)
    return stream.make_val_iterators(specs, spec, tokenizer, Settings.of(**options), **arguments)
