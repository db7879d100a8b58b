"""Episodes of a dataset as `Demo`s: decoded and in physical units, to try a policy on."""

from collections.abc import Iterator, Mapping

from octo_like.common import normalization
from octo_like.common.demo import Demo
from octo_like.data.batches import frames
from octo_like.data.check.numbers import spread
from octo_like.data.check.pictures import function_of, pictures, present
from octo_like.data.prepared import PreparedDataset
from octo_like.data.rlds import records
from octo_like.data.rlds.index import Index
from octo_like.data.spec import DataError


def load_demos(
    prepared: PreparedDataset,
    index: Index,
    sizes: Mapping[str, tuple[int, int]],
    limit: int,
    resize: str = "stretch",
) -> Iterator[Demo]:
    """Up to `limit` episodes, spread over `index`, one in memory at a time. Relative actions are made absolute again.

    Args:
      sizes: slot -> (height, width) of the cameras that are wanted; those the dataset has not are left out.
      resize: how pictures come to these sizes, see `octo_like.common.geometry`.

    Raises:
      DataError: an episode that cannot be read.
    """
    function = function_of(prepared)
    slots = [slot for slot in sizes if prepared.spec.image_keys.get(slot) is not None]
    for number in spread(len(index), limit):
        path, offset = index.files[index.file[number]], int(index.offset[number])
        try:
            raw = function.read(path, offset, slots)
        except records.damage_errors() as error:
            raise records.damaged(path, int(index.record[number]), offset, error) from error
        if len(raw.action) == 0:
            continue
        action, images = raw.action, {}
        for slot, contents in raw.images.items():
            try:
                images[slot] = pictures(prepared, slot, contents, range(len(contents)), sizes[slot], resize)
            except frames.FrameError as error:
                raise DataError(f"{index.where(number)}, camera {slot!r}: {error}") from error
        if prepared.spec.relative_to is not None:
            action = normalization.to_absolute(action[:, 0], raw.proprio, prepared.spec.relative_to)
        yield Demo(
            where=index.where(number),
            images=images,
            present={slot: present(contents) for slot, contents in raw.images.items()},
            proprio=raw.proprio,
            action=action,
            instruction=raw.texts[0] if raw.texts else "",
            extras=raw.extras,
        )
