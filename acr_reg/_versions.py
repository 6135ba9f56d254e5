"""Refuses a Python or a torch that is too old for this package.

acr_reg/__init__.py calls this before it imports anything else, so that an old environment gets this message instead
of an error about unknown syntax or functions. Both files are therefore written for Python 3.7;
tests/project/test_versions.py checks that.
"""

import re
import sys
from typing import Optional, Tuple

OLDEST_PYTHON = (3, 10)
OLDEST_TORCH = (2, 1)  # the first with scaled_dot_product_attention's `scale`


def require_supported_versions(python: Optional[Tuple[int, ...]] = None, torch_version: Optional[str] = None) -> None:
    """Returns if this Python and this torch are new enough; else raises ImportError, which names the first that is not.

    Both are read from the running process unless given: python as (3, 11), torch_version as "2.1.0+cu118". Local
    builds and pre-releases count as the release they are named after ("2.1.0a0+git1f2e3d4" is 2.1); a version that
    does not begin with two numbers cannot be compared and is let through.
    """
    python = tuple(sys.version_info[:2]) if python is None else python[:2]
    if python < OLDEST_PYTHON:
        raise ImportError(
            "acr_reg needs Python {} or newer, and this is Python {} ({}). Install it in an environment made by "
            "`python3.11 -m venv`.".format(_dotted(OLDEST_PYTHON), _dotted(python), sys.executable)
        )
    if torch_version is None:
        import torch  # only here: an old interpreter may lack torch, and needs the message about Python

        torch_version = str(torch.__version__)
    numbers = re.match(r"(\d+)\.(\d+)", torch_version)
    if numbers and (int(numbers.group(1)), int(numbers.group(2))) < OLDEST_TORCH:
        raise ImportError(
            "acr_reg needs torch {0} or newer, and this is torch {1}. Run `pip install 'torch>={0}'`, in a "
            "new environment if need be.".format(_dotted(OLDEST_TORCH), torch_version)
        )


def _dotted(numbers: Tuple[int, ...]) -> str:
    return ".".join(str(number) for number in numbers)
