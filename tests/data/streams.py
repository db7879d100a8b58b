"""Streams for tests, with the settings as keywords."""

from octo_like.common.lanes import Processes
from octo_like.data.batches import stream
from octo_like.data.settings import Settings

PLACES = ("data_dir", "cache_dir")


def make_train_stream(specs, spec, tokenizer, *, process_index=0, process_count=1, **options):
    """`stream.make_train_stream`; options are its arguments and the fields of `Settings`."""
    arguments = {name: options.pop(name) for name in ("start", *PLACES) if name in options}
    arguments["processes"] = Processes(process_index, process_count)
    return stream.make_train_stream(specs, spec, tokenizer, Settings.of(**options), **arguments)


def make_val_iterators(specs, spec, tokenizer, *, process_index=0, process_count=1, **options):
    """The same for `stream.make_val_iterators`."""
    arguments = {name: options.pop(name) for name in ("max_batches", *PLACES) if name in options}
    arguments["processes"] = Processes(process_index, process_count)
    return stream.make_val_iterators(specs, spec, tokenizer, Settings.of(**options), **arguments)
