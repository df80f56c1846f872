"""Names that SGLang and transformers import from `torchvision.transforms`."""

from torchvision.transforms import functional
from torchvision.transforms.functional import InterpolationMode

__all__ = ["InterpolationMode", "functional"]
