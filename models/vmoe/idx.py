"""Fashion-MNIST as its authors publish it: four gzipped idx files, https://github.com/zalandoresearch/fashion-mnist."""

import dataclasses
import gzip
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_spec.errors import UserError

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
FILES = tuple(f"{split}-{kind}-ubyte.gz" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
HINT = f"give --data a directory with the four files of Fashion-MNIST: {', '.join(FILES)}"
_UNSIGNED_BYTES = b"\x00\x00\x08"


@dataclasses.dataclass(frozen=True)
class Split:
    """Labelled images: (N, 28, 28) uint8 and (N,) uint8 classes."""

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.images)


def load_split(directory: Path, name: str) -> Split:
    """The official split ``name``: ``train`` or ``t10k`` (test).

    Raises:
        UserError: a file is missing or no idx file, or images and labels do not belong together.
    """
    image_path, label_path = directory / f"{name}-images-idx3-ubyte.gz", directory / f"{name}-labels-idx1-ubyte.gz"
    images, labels = read_idx(image_path), read_idx(label_path)
    if images.ndim != 3 or images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
        raise UserError(
            f"{image_path} holds images {list(images.shape)} and {label_path.name} labels {list(labels.shape)}, "
            "expected [N, 28, 28] and [N]",
            hint=HINT,
        )
    if labels.size == 0 or labels.max() >= len(CLASSES):
        found = "no example" if labels.size == 0 else f"class {labels.max()}"
        raise UserError(f"{label_path} holds {found}, expected classes 0 to {len(CLASSES) - 1}", hint=HINT)
    return Split(images, labels)


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """The array of a gzipped idx file of unsigned bytes: magic number, big-endian sizes, bytes.

    Raises:
        UserError: the file is missing, no gzip, no idx of bytes, or not as long as its header says.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist, expected a gzipped idx file", hint=HINT)
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is no complete gzip file: {error}", hint=HINT) from error
    if len(content) < 4 or content[:3] != _UNSIGNED_BYTES:
        raise UserError(
            f"{path} begins with {content[:4].hex() or 'nothing'}, expected an idx file of bytes", hint=HINT
        )
    header = 4 + 4 * content[3]
    if len(content) < header:
        raise UserError(f"{path} is cut in its header", hint=HINT)
    sizes: npt.NDArray[Any] = np.frombuffer(content[4:header], ">u4")
    data = np.frombuffer(content[header:], np.uint8)
    if data.size != int(sizes.prod(dtype=np.int64)):
        raise UserError(f"{path} holds {data.size} bytes, its header says {sizes.tolist()}", hint=HINT)
    return data.reshape(sizes.astype(np.int64))
