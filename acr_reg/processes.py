"""What the processes that work together share."""

from acr_reg._torch_private import store_of_process_group

__all__ = ["store_of_process_group"]
