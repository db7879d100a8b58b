"""dlimp's names over the code that reads training data. `from octo_like.data import dlimp as dl` runs a dlimp script.

`DLataset` reads RLDS splits with the reader of the training stream; `transforms`, which is also `utils` and
`augmentations`, has dlimp's functions on frames and trajectories. `functions`, which dlimp has not, cuts windows,
chunks and goals as the stream does. docs/data.md lists all names, and where they differ from dlimp's.
"""

import octo_like.data.dlimp.transforms as transforms
from octo_like.data.dlimp.dataset import TrajectoryDataset
from octo_like.data.dlimp.transforms import parallel_vmap, vmap

__all__ = ["DLataset", "TrajectoryDataset", "augmentations", "parallel_vmap", "transforms", "utils", "vmap"]

DLataset = TrajectoryDataset
utils = augmentations = transforms
