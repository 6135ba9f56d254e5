"""The commands of ``python -m acr_reg``, one file each."""
