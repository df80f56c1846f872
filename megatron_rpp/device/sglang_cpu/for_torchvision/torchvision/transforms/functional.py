"""Names that SGLang imports from `torchvision.transforms.functional`."""

from enum import Enum
from typing import Any


class InterpolationMode(Enum):
    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


def pil_to_tensor(*args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError("torchvision is not installed: this server samples text only")


to_tensor = pil_to_tensor
