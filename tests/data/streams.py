"""Streams for tests, with the settings as keywords and of specs that are prepared on the way."""

from octo_like.common.lanes import Processes
from octo_like.common.vocabularies import NO_TARGETS
from octo_like.data.batches import stream
from octo_like.data.prepare import prepare_datasets
from octo_like.data.prepared import PreparedDataset
from octo_like.data.settings import IndexOptions, Settings
from octo_like.data.spec import specs_from_config


def _prepared(specs, settings, processes, data_dir=None, cache_dir=None):
    if specs and all(isinstance(value, PreparedDataset) for value in specs.values()):
        return specs
    options = IndexOptions(max_bad_fraction=settings.host.max_bad_fraction)
    return prepare_datasets(specs_from_config(specs), data_dir, cache_dir, options=options, hosts=processes)


def _parts(specs, process_index, process_count, options):
    """(datasets, settings, processes) of what tests pass."""
    places = {name: options.pop(name) for name in ("data_dir", "cache_dir") if name in options}
    settings, processes = Settings.of(**options), Processes(process_index, process_count)
    return _prepared(specs, settings, processes, **places), settings, processes


def make_train_stream(specs, spec, tokenizer, *, process_index=0, process_count=1, **options):
    """`stream.make_train_stream`; options are its arguments and the fields of `Settings`."""
    start, targets = options.pop("start", 0), options.pop("targets", NO_TARGETS)
    datasets, settings, processes = _parts(specs, process_index, process_count, options)
    made = stream.make_train_stream(datasets, spec, tokenizer, settings, targets=targets, processes=processes)
    made.seek(start)
    return made


def make_val_iterators(specs, spec, tokenizer, *, process_index=0, process_count=1, **options):
    """The same for `stream.make_val_iterators`."""
    own = dict(max_batches=options.pop("max_batches", None), targets=options.pop("targets", NO_TARGETS))
    datasets, settings, processes = _parts(specs, process_index, process_count, options)
    return stream.make_val_iterators(datasets, spec, tokenizer, settings, processes=processes, **own)
