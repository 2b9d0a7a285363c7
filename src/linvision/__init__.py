"""Linear-time vision backbones: ViL, Vim and L2ViT, with DeiT-III as the quadratic yardstick.

``linvision.create_model(name)`` makes a model by its registered or published name; after ``import linvision`` every
model is also known to ``timm.create_model``. On Linux the first kernel on a CPU tells the C library to keep freed
memory, which makes all of PyTorch's CPU work faster; LINVISION_KEEP_MEMORY=0 leaves it alone.
"""

from linvision.models import create_model, list_models, push_to_hub

__version__ = "0.1.0"
__all__ = ["__version__", "create_model", "list_models", "push_to_hub"]
