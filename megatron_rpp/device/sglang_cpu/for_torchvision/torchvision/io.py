"""Names that SGLang imports from `torchvision.io`."""

from enum import Enum
from typing import Any


class ImageReadMode(Enum):
    UNCHANGED = 0
    GRAY = 1
    RGB = 3


def decode_image(*args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError("torchvision is not installed: this server samples text only")


decode_jpeg = decode_image
