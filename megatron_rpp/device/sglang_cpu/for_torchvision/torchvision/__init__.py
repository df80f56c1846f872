"""An inert torchvision, because SGLang's image processors import it and text never reaches them.

The registry's build fails to load beside the CPU build of torch.
"""

from torchvision import io, transforms

__all__ = ["io", "transforms"]
__version__ = "0.0.0"  # transformers parses it; older than any that it would use
