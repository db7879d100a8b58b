"""Whether a cached index still says what the files and the functions say: a few of its records are read again.

The name of an index has a hash of the files' names and sizes and of the functions' sources. Neither changes when a
dataset is built again with other numbers of the same size, or when a function reads another file than before.
"""

import numpy as np

from octo_like.data.order.order import hash_key
from octo_like.data.rlds import columns, records
from octo_like.data.rlds.cache_files import DamagedCache
from octo_like.data.rlds.index import Index
from octo_like.data.rlds.records import EpisodeFunction
from octo_like.data.rlds.statistics import row_range

RECORDS = 3
CANDIDATES = 4096  # ranking all episodes of a large dataset would take longer than reading
# Of a column's largest magnitude: the same operations round differently on other processors.
ROUNDING = 1e-5


def find_stale(index: Index, rows_path: str, function: EpisodeFunction) -> str | None:
    """What the files or the function say otherwise than a cached index, with file and episode; None: nothing.

    RECORDS keyed episodes, of different files where there are as many, are compared: the record's hash, its steps, the
    rows and the usable steps. A damaged record says nothing, as it may have been damaged since, unless all of them are.
    """
    picked = _pick(index)
    damaged = 0
    for episode in picked:
        where = index.where(episode)
        try:
            now = function.from_file(index.files[index.file[episode]], int(index.offset[episode]))
        except records.damage_errors():
            damaged += 1
            continue
        if int(now["hash"]) != index.record_hash[episode]:
            return f"{where}: the record is another one than when it was indexed"
        try:
            same = bool(function.random_ops) or _same(now, index, episode, rows_path, function)
        except DamagedCache as error:
            return str(error)
        if not same:
            functions = " and ".join(
                f"{name}={value!r}"
                for name, value in (("standardize", function.spec.standardize), ("filter", function.spec.filter))
                if value
            )
            return f"{where}: {functions or 'reading it'} gives other values than when it was indexed"
    if picked and damaged == len(picked):
        return f"{index.where(picked[0])}: none of {damaged} records can be read where they were indexed"
    return None


def _pick(index: Index) -> list[int]:
    episodes = np.flatnonzero(index.steps)
    episodes = episodes[:: -(-len(episodes) // CANDIDATES) or 1]
    episodes = episodes[np.argsort(hash_key("spot check", index.record_hash[episodes]), kind="stable")]
    _, first = np.unique(index.file[episodes], return_index=True)  # the first of each file, then the others
    return np.concatenate([episodes[np.sort(first)], np.delete(episodes, first)])[:RECORDS].tolist()


def _same(now: dict, index: Index, episode: int, rows_path: str, function: EpisodeFunction) -> bool:
    steps = int(index.steps[episode])
    usable = np.flatnonzero(now["usable"].numpy())
    if steps and not len(usable) and not index.frames[episode]:
        return True  # refused by the user's filter: what it holds is not in the index
    if len(now["action"]) != steps or int(now["raw_steps"]) != index.raw_steps[episode]:
        return False
    numbers = {key: now[key].numpy() for key in ("action", "proprio") if key in now}
    rows = columns.to_rows({**numbers, "extras": {k: v.numpy() for k, v in now["extras"].items()}}, function)
    kept = row_range(rows_path, int(index.first[episode]), steps)
    close = np.abs(rows - kept) <= ROUNDING * np.abs(kept).max(0)
    language = any(text.strip() for text in now["language"].numpy().tolist()) if "language" in now else False
    return bool(
        close.all() and np.array_equal(usable, index.usable(episode)) and language == index.has_language[episode]
    )
