"""What operations make, beneath autograd."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class TensorWatch(TorchDispatchMode):
    """``largest``: elements of the largest tensor that any operation made, or made a view of. ``written``: of all that
    operations wrote, views left out: the work, but for products of matrices."""

    def __init__(self):
        super().__init__()
        self.largest = self.written = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                held = tensor.untyped_storage().nbytes() // max(1, tensor.element_size())
                self.largest = max(self.largest, held)
                self.written += 0 if func.is_view else tensor.numel()
        return result
