"""The same tokens twice: three other tokens in front of the patches, and wherever a model may have them."""

import torch
from torch import nn

from acr_reg import Lattice, TokenLayout

FIELDS = {
    "behind": lambda n: {"num_suffix_tokens": 3},
    "around": lambda n: {"num_prefix_tokens": 1, "num_suffix_tokens": 2},
    "between": lambda n: {"between": (n // 3, n // 3 + 1, n + 1)},  # the last one in front of the last patch
    "everywhere": lambda n: {"num_prefix_tokens": 1, "num_suffix_tokens": 1, "between": (2 + n // 2,)},
}


def layouts(kind, grid, key_grid=None, classes=()):
    """The layout with the others in front, and that of ``kind``; ``classes`` are numbers of the three others."""
    query, key = (grid if isinstance(grid, Lattice) else Lattice(*grid) for grid in (grid, key_grid or grid))
    moved = TokenLayout(query, key, **FIELDS[kind](len(query)))
    others = [i for i, number in enumerate(numbers(moved, len(query) + 3)) if number < 3]
    moved = TokenLayout(query, key, class_tokens=[others[c] for c in classes], **FIELDS[kind](len(query)))
    return TokenLayout(query, key, 3, tuple(classes)), moved


def numbers(layout, count):
    """For each place of a sequence of ``count`` tokens, the number of its token where the others come first."""
    others, patches = iter(range(3)), iter(range(3, count))
    found = []
    for place in range(count):
        before, behind = place < layout.num_prefix_tokens, place >= count - layout.num_suffix_tokens
        found.append(next(others) if before or behind or place in layout.between else next(patches))
    return found


def reordered(tensor, layout, *dims):
    """The tensor with the tokens along ``dims`` brought from the front to their places in the layout."""
    for dim in dims:
        tensor = tensor.index_select(dim, torch.tensor(numbers(layout, tensor.shape[dim])))
    return tensor


class OrderedVit(nn.Module):
    """A class token, two registers and 4 x 6 patches of 8 px in the order of ``kind`` (None: as listed), in float64.
    The stem sees no left and right, so that the model is equivariant to the flip."""

    def __init__(self, kind, block, depth=2):
        super().__init__()
        torch.manual_seed(0)
        self.patch_embed, self.head = nn.Conv2d(3, 32, 8, 8), nn.Linear(32, 3)
        self.patch_embed.weight.data += self.patch_embed.weight.data.flip(-1)
        self.cls_token, self.reg_token = (nn.Parameter(torch.randn(1, count, 32)) for count in (1, 2))
        self.blocks = nn.Sequential(*(block() for _ in range(depth)))
        self.layout = layouts(kind or "behind", (4, 6), classes=(0,))[kind is not None]
        self.double().eval()

    def forward(self, images):
        patches = self.patch_embed(images).flatten(2).mT
        tokens = torch.cat([self.cls_token, self.reg_token], 1).expand(len(images), -1, -1)
        tokens = reordered(torch.cat([tokens, patches], 1), self.layout, 1)
        return self.head(self.blocks(tokens)[:, self.layout.class_tokens[0]])

    @property
    def hints(self):
        return {
            "num_prefix_tokens": self.layout.num_prefix_tokens,
            "num_suffix_tokens": self.layout.num_suffix_tokens,
            "class_tokens": list(self.layout.class_tokens),
        }
