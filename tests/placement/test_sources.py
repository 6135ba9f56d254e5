"""Where patches stand among the tokens is seen in the first run, however the model joined, moved or dropped them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from acr_reg import AllPairsConsistencyLoss, HorizontalFlip, LayoutError, capture_attention
from tests.support.attention import says

GRID = (4, 6)
COUNT = GRID[0] * GRID[1]


class Arranged(nn.Module):
    """Two blocks over tokens that ``arrange(model, patches, others)`` puts together; ``others`` are a class token, two
    registers and three prompts of every image."""

    def __init__(
        self, arrange: Callable[..., Tensor], embed: Callable[[Arranged, Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.patch_embed, self.linear = nn.Conv2d(3, 32, 16, 16), nn.Linear(3 * 256, 32)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 32))
        self.registers, self.prompts = nn.Parameter(torch.randn(1, 2, 32)), nn.Parameter(torch.randn(3, 32))
        self.pos = nn.Parameter(torch.randn(1, COUNT, 32))
        self.text = nn.Embedding(10, 32)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True) for _ in range(2)
        )
        self.arrange, self.embed = arrange, embed

    def forward(self, images: Tensor) -> Tensor:
        embedded = self.patch_embed(images).flatten(2).mT if self.embed is None else self.embed(self, images)
        patches = embedded + self.pos[:, : embedded.shape[1]]
        number = len(images)
        others = (
            self.cls_token.expand(number, -1, -1),
            self.registers.repeat(number, 1, 1),
            repeat(self.prompts, "n c -> b n c", b=number),
        )
        tokens = self.arrange(self, patches, others)
        for block in self.blocks:
            tokens = block(tokens)
        return tokens


def images(height: int = 64, width: int = 96) -> Tensor:
    return torch.rand(2, 3, height, width)


def in_place(model: Arranged, patches: Tensor, others: tuple[Tensor, ...]) -> Tensor:
    tokens = patches.new_zeros(len(patches), 1 + COUNT + 2, 32)
    tokens[:, 1:-2] = patches
    tokens[:, -2:] = others[1]
    tokens[:, :1] += others[0]
    return tokens


def into_views(model: Arranged, patches: Tensor, others: tuple[Tensor, ...]) -> Tensor:
    tokens = patches.new_empty(len(patches), 1 + COUNT + 2, 32)
    tokens[:, 1:-2].copy_(patches)
    tokens[:, 1:][:, -2:].copy_(others[1])
    tokens[:, :1].copy_(others[0])
    return tokens


def into_a_view_of_a_view(model: Arranged, patches: Tensor, others: tuple[Tensor, ...]) -> Tensor:
    tokens = patches.new_zeros(COUNT + 1, len(patches), 32)
    tokens.transpose(0, 1)[:, :-1].add_(patches)
    tokens.transpose(0, 1).narrow(1, COUNT, 1).copy_(others[0])
    return tokens.transpose(0, 1)


def into_a_buffer(model: Arranged, patches: Tensor, others: tuple[Tensor, ...]) -> Tensor:
    parts = [others[0].detach(), patches.detach()]
    return torch.cat(parts, 1, out=patches.new_empty(len(patches), COUNT + 1, 32).detach())


def class_token_of_ones(model: Arranged, patches: Tensor, others: tuple[Tensor, ...]) -> Tensor:
    tokens = torch.cat([others[0], patches], 1)
    tokens[:, 0] = 1.5
    return tokens


def over_tokens(patches: Tensor, others: tuple[Tensor, ...]) -> Tensor:
    """A mixture of all patches in place of each token."""
    mixed = F.linear(patches.mT, patches.new_ones(COUNT + 1, COUNT)).mT
    return mixed + others[0]


def masked_in_place(model: Arranged, patches: Tensor, others: tuple[Tensor, ...]) -> Tensor:
    tokens = torch.cat([others[0], patches], 1)
    tokens[:, 1:][torch.rand(len(patches), patches.shape[1]) > 0.5] = model.prompts[0]
    return tokens


def all_ones(model: Arranged, patches: Tensor, others: tuple[Tensor, ...]) -> Tensor:
    tokens = torch.cat([others[0], patches], 1)
    tokens[:] = 1.0
    return tokens


def text_appended(model: Arranged, patches: Tensor, others: tuple[Tensor, ...]) -> Tensor:
    text = model.text(torch.arange(5)).expand(len(patches), -1, -1)
    return torch.cat([patches + model.pos.mean(), text], 1)


def stacked(model: Arranged, patches: Tensor, others: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([*others[0].unbind(1), *patches.unbind(1), *others[2].unbind(1)], 1)


def sequence_first(model: Arranged, patches: Tensor, others: tuple[Tensor, ...]) -> Tensor:
    tokens = torch.cat([others[0].transpose(0, 1), patches.transpose(0, 1), others[2].transpose(0, 1)], 0)
    return tokens.transpose(0, 1)


def prompts_replaced(model: Arranged, patches: Tensor, others: tuple[Tensor, ...]) -> Tensor:
    """MaPLe: the prompts of every block are its own, behind the patches."""
    tokens = torch.cat([others[0], patches, others[2]], 1)
    return torch.cat([tokens[:, :-3], others[2] * 2], 1)


def mean_in_front(model: Arranged, patches: Tensor, others: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([patches.mean(1, keepdim=True), patches], 1)


def in_the_middle(model: Arranged, patches: Tensor, others: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([patches[:, :12], others[0], patches[:, 12:]], 1)


ORDERS = {
    "class token in front": (lambda m, p, o: torch.cat([o[0], p], 1), 1, 0, (), (0,)),
    "class token last": (lambda m, p, o: torch.cat([p, o[0]], 1), 0, 1, (), (24,)),
    "registers behind": (lambda m, p, o: torch.cat([o[0], p, o[1]], 1), 1, 2, (), (0,)),
    "registers before the class token": (lambda m, p, o: torch.cat([o[1], o[0], p], 1), 3, 0, (), (2,)),
    "class token behind registers": (lambda m, p, o: torch.cat([p, o[1], o[0]], 1), 0, 3, (), (26,)),
    "prompts behind": (lambda m, p, o: torch.cat([o[0], p, o[2]], 1), 1, 3, (), (0,)),
    "prompts between": (lambda m, p, o: torch.cat([o[0], o[2], p], 1), 4, 0, (), (0,)),
    "class token in the middle": (in_the_middle, 0, 0, (12,), (12,)),
    "nothing but patches": (lambda m, p, o: p, 0, 0, (), ()),
    "written in place": (in_place, 1, 2, (), (0,)),
    "written into views": (into_views, 1, 2, (), (0,)),
    "written into a view of a view": (into_a_view_of_a_view, 0, 1, (), (24,)),
    "joined into a buffer": (into_a_buffer, 1, 0, (), (0,)),
    "a class token changed by a number": (class_token_of_ones, 1, 0, (), (0,)),
    "masked in place": (masked_in_place, 1, 0, (), (0,)),
    "all set to a number": (all_ones, 1, 0, (), (0,)),
    "scattered": (lambda m, p, o: p.new_zeros(len(p), COUNT + 1, 32).slice_scatter(p, 1, 1), 1, 0, (), (0,)),
    "picked by a mask": (
        lambda m, p, o: p.new_zeros(2, COUNT + 1, 32).masked_scatter(
            torch.arange(COUNT + 1).view(1, -1, 1).expand(2, -1, 32) > 0, p
        ),
        1,
        0,
        (),
        (0,),
    ),
    "class token added to zeros": (
        lambda m, p, o: torch.cat([m.cls_token[0, 0] + p.new_zeros(len(p), 1, 32), p, o[2]], 1),
        1,
        3,
        (),
        (0,),
    ),
    "two class tokens of one": (lambda m, p, o: torch.cat([o[0], o[0], p], 1), 2, 0, (), (0, 1)),
    "mixed and added": (lambda m, p, o: torch.cat([p, o[0]], 1) @ torch.eye(32) + over_tokens(p, o), 0, 1, (), (24,)),
    "text behind": (text_appended, 0, 5, (), None),
    "stacked": (stacked, 1, 3, (), (0,)),
    "joined with the sequence first": (sequence_first, 1, 3, (), (0,)),
    "prompts replaced": (prompts_replaced, 1, 3, (), (0,)),
    "a mean in front": (mean_in_front, 1, 0, (), (0,)),
    "padded in front": (lambda m, p, o: F.pad(p, (0, 0, 1, 0)), 1, 0, (), (0,)),
    "class token by repeat and rearrange": (
        lambda m, p, o: torch.cat(
            [rearrange(p, "b n c -> n b c"), repeat(m.cls_token, "1 n c -> n b c", b=len(p))]
        ).transpose(0, 1),
        0,
        1,
        (),
        (24,),
    ),
}


@pytest.mark.parametrize("order", ORDERS)
def test_tokens_are_found_wherever_they_stand(order: str) -> None:
    arrange, prefix, suffix, between, class_tokens = ORDERS[order]
    with capture_attention(model := Arranged(arrange)) as attention:
        for size, grid in (((64, 96), GRID), ((64, 96), GRID), ((48, 96), (3, 6))):
            if between and grid != GRID:
                break
            if order in FIXED and grid != GRID:
                break
            model(images(*size))
            maps = attention.take()
            assert maps.layers == (0, 1) and attention.skipped == ()
            for layer in maps:
                layout = layer.layout
                assert (layout.query.height, layout.query.width) == grid
                assert (layout.num_prefix_tokens, layout.num_suffix_tokens, layout.between) == (prefix, suffix, between)
                behind = grid[0] * grid[1] - COUNT
                expected = class_tokens and tuple(c if c < prefix or between else c + behind for c in class_tokens)
                assert (layout.class_tokens or None) == (expected or None)


FIXED = {  # their number of tokens is written into them
    *("written in place", "written into views", "written into a view of a view", "joined into a buffer"),
    *("scattered", "picked by a mask", "mixed and added"),
}

EMBEDDINGS = {
    "einops and linear": lambda m, x: m.linear(rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=16, q=16)),
    "unfold and linear": lambda m, x: m.linear(F.unfold(x, 16, stride=16).mT),
    "strided views and linear": lambda m, x: m.linear(
        x.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    ),
    "normalised and resized": lambda m, x: m.patch_embed(F.interpolate((x - 0.5) / 0.2, (64, 96))).flatten(2).mT,
    "overlapping windows": lambda m, x: F.conv2d(x, m.patch_embed.weight, stride=16, padding=4).flatten(2).mT,
    "a chain of convolutions": lambda m, x: (
        F.max_pool2d(F.conv2d(x, m.patch_embed.weight[..., :3, :3], None, 4, 1), 4).flatten(2).mT
    ),
    "pixel unshuffle": lambda m, x: m.linear(F.pixel_unshuffle(x, 16).flatten(2).mT),
    "a loop over patches": lambda m, x: m.linear(
        torch.stack([x[:, :, i : i + 16, j : j + 16].flatten(1) for i in range(0, 64, 16) for j in range(0, 96, 16)], 1)
    ),
}


@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_patches_are_found_however_they_are_embedded(embedding: str) -> None:
    model = Arranged(lambda m, p, o: torch.cat([p, o[0]], 1), EMBEDDINGS[embedding])
    with capture_attention(model) as attention:
        model(images())
        for layer in attention.take():
            assert (layer.layout.query.height, layer.layout.query.width) == GRID
            assert (layer.layout.num_prefix_tokens, layer.layout.num_suffix_tokens) == (0, 1)


def erased(model: Arranged, x: Tensor) -> Tensor:
    x = x.clone()
    x[:, :, 0:34, 0:34] = 0
    x[:, :, 40:60, 30:90] = torch.rand(len(x), 3, 20, 60)
    return model.patch_embed(x).flatten(2).mT


def test_pixels_that_the_model_paints_over_stay_where_they_are() -> None:
    with capture_attention(model := Arranged(ORDERS["class token last"][0], erased)) as attention:
        model(images())
        assert attention.take()[0].layout.num_suffix_tokens == 1


def test_integer_images_are_followed_once_they_are_real() -> None:
    def embed(model: Arranged, x: Tensor) -> Tensor:
        return model.patch_embed(x.movedim(-1, 1).float() / 255).flatten(2).mT

    with capture_attention(model := Arranged(ORDERS["class token last"][0], embed)) as attention:
        model(torch.randint(0, 256, (2, 64, 96, 3), dtype=torch.uint8))
        layout = attention.take()[0].layout
        assert ((layout.query.height, layout.query.width), layout.num_suffix_tokens) == (GRID, 1)


def pruned(model: Arranged, patches: Tensor, others: tuple[Tensor, ...]) -> Tensor:
    kept = patches.norm(dim=-1).topk(6).indices[..., None].expand(-1, -1, 32)
    return torch.cat([others[0], patches.gather(1, kept)], 1)


def merged(model: Arranged, patches: Tensor, others: tuple[Tensor, ...]) -> Tensor:
    """ToMe: half of the tokens go into those that resemble them."""
    source, target = patches[:, ::2], patches[:, 1::2]
    match = (source @ target.mT).argmax(-1)[..., None].expand(-1, -1, 32)
    return target.scatter_reduce(1, match, source, "mean")


def shuffled(model: Arranged, patches: Tensor, others: tuple[Tensor, ...]) -> Tensor:
    return patches[:, torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))]


def sorted_by_norm(model: Arranged, patches: Tensor, others: tuple[Tensor, ...]) -> Tensor:
    return patches.gather(1, patches.norm(dim=-1).argsort(1)[..., None].expand(-1, -1, 32))


def latents(model: Arranged, patches: Tensor, others: tuple[Tensor, ...]) -> Tensor:
    """Perceiver: as many latents as patches read them and attend to each other."""
    queries = model.pos.expand(len(patches), -1, -1)
    return queries + (queries @ patches.mT).softmax(-1) @ patches


def a_corner(model: Arranged, patches: Tensor, others: tuple[Tensor, ...]) -> Tensor:
    return patches.unflatten(1, GRID)[:, :2, :3].flatten(1, 2)


def both_images(model: Arranged, patches: Tensor, others: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([patches, patches.flip(0)], 1)


ORDER = torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))
ROWS = ORDER[None, :, None].expand(2, -1, 32)


def scattered_copy(model: Arranged, patches: Tensor, others: tuple[Tensor, ...]) -> Tensor:
    """In place, on a clone."""
    return patches.clone().scatter_(1, ROWS, patches)


def reordered_by_view(model: Arranged, patches: Tensor, others: tuple[Tensor, ...]) -> Tensor:
    tokens = torch.zeros_like(patches)
    tokens[:, :12].copy_(patches[:, 12:])
    tokens[:, 12:].copy_(patches[:, :12])
    return tokens


NOWHERE = {
    "copied by an index": lambda m, p, o: torch.zeros_like(p).index_copy(1, ORDER, p),
    "put by an index": lambda m, p, o: torch.zeros_like(p).index_put_((torch.arange(2)[:, None], ORDER[None]), p),
    "scattered": lambda m, p, o: torch.zeros_like(p).scatter(1, ROWS, p),
    "scattered into a clone": scattered_copy,
    "taken": lambda m, p, o: p.take(torch.arange(p.numel()).view(p.shape).flip(1)),
    "halves swapped in place": reordered_by_view,
    "pruned": pruned,
    "merged": merged,
    "shuffled": shuffled,
    "sorted": sorted_by_norm,
    "latents": latents,
    "a corner": a_corner,
    "tokens of two images": both_images,
    "column by column": lambda m, p, o: p.unflatten(1, GRID).transpose(1, 2).flatten(1, 2),
}


@pytest.mark.filterwarnings("ignore:The maps leave out Arranged")  # the latents read the patches
@pytest.mark.parametrize("order", NOWHERE)
def test_tokens_that_are_no_patches_of_a_grid_lie_nowhere(order: str) -> None:
    """Also where their number happens to be that of a grid."""
    if order == "merged" and torch.__version__ < (2, 6):
        pytest.skip("older torch does not show what merges tokens: they are refused as unknown")
    with capture_attention(model := Arranged(NOWHERE[order])) as attention:
        for _ in range(2):
            model(images())
            with pytest.raises(LayoutError) as error:
                _ = attention.take()[-1].layout
            assert says(error, "tokens lie on no grid of the image", "with_layout()")


def test_loss_of_an_equivariant_model_is_zero_wherever_its_class_token_stands() -> None:
    acr = AllPairsConsistencyLoss(HorizontalFlip())
    for arrange in (
        ORDERS["class token last"][0],
        ORDERS["class token in the middle"][0],
        ORDERS["registers behind"][0],
    ):
        model = Arranged(arrange)
        with torch.no_grad():
            model.patch_embed.weight += model.patch_embed.weight.flip(-1)  # sees no left and right
            model.pos.zero_()
        with capture_attention(model) as attention:
            x = images()
            pair = [(model(view), attention.take())[1] for view in (x, x.flip(-1))]
        assert acr(*pair).item() == pytest.approx(0, abs=1e-6)


def picked_by_cast_index(model: Arranged, patches: Tensor, others: tuple[Tensor, ...]) -> Tensor:
    order = torch.linspace(0, COUNT - 1, COUNT).flip(0).long()
    return torch.cat([patches.flip(1)[:, order], others[0]], 1)


def through_a_mask(model: Arranged, patches: Tensor, others: tuple[Tensor, ...]) -> Tensor:
    """ViLT: valid patches are listed, joined, and get positions of their batch."""
    valid = F.interpolate(torch.ones(2, 1, 64, 96), GRID).long().flatten(1).nonzero()
    return torch.cat(
        [patches[valid[:, 0], valid[:, 1]].view(2, -1, 32) + model.text(torch.zeros(2, COUNT).long()), others[0]], 1
    )


@pytest.mark.parametrize("arrange", [picked_by_cast_index, through_a_mask])
def test_an_index_is_an_index_wherever_it_comes_from(arrange: Callable[..., Tensor]) -> None:
    if arrange is through_a_mask and torch.__version__ < (2, 6):
        pytest.skip("older torch does not show the view that this makes: the order is asked for")
    with capture_attention(model := Arranged(arrange)) as attention:
        model(images())
        layout = attention.take()[0].layout
        assert (layout.num_prefix_tokens, layout.num_suffix_tokens, layout.class_tokens) == (0, 1, (24,))


def test_positions_do_not_make_hidden_patches_other_tokens() -> None:
    def arrange(model: Arranged, patches: Tensor, others: tuple[Tensor, ...]) -> Tensor:
        hidden = torch.from_numpy(patches.detach().numpy().copy())
        return torch.cat([hidden + model.text(torch.arange(COUNT) % 10), others[0]], 1)

    with capture_attention(model := Arranged(arrange)) as attention:
        model(images())
        with pytest.raises(LayoutError) as error:
            _ = attention.take()[0].layout
    assert says(error, "num_prefix_tokens=1", "num_suffix_tokens=1", "hides")


@pytest.mark.filterwarnings("ignore:The maps leave out Arranged")
def test_latents_that_read_hidden_patches_lie_nowhere() -> None:
    def arrange(model: Arranged, patches: Tensor, others: tuple[Tensor, ...]) -> Tensor:
        hidden = torch.from_numpy(patches.detach().numpy().copy())
        return latents(model, hidden, others)

    with capture_attention(model := Arranged(arrange)) as attention:
        model(images())
        with pytest.raises(LayoutError) as error:
            _ = attention.take()[-1].layout
    assert says(error, "tokens lie on no grid of the image")


def test_what_the_user_says_must_agree_with_what_was_seen() -> None:
    model = Arranged(ORDERS["registers behind"][0])
    with capture_attention(model, num_prefix_tokens=3, class_tokens=1) as attention:
        model(images())
        with pytest.raises(LayoutError) as error:
            _ = attention.take()[0].layout
    assert says(error, "num_prefix_tokens=3", "1 tokens stand before", "2 behind")
    with capture_attention(model, num_prefix_tokens=1, num_suffix_tokens=2) as attention:
        model(images())
        assert attention.take()[0].layout.num_suffix_tokens == 2


def test_what_the_user_says_counts_where_nothing_was_seen() -> None:
    """The parts of a model are run one by one, so nobody sees how the tokens are joined."""
    model = Arranged(ORDERS["class token last"][0])

    def run() -> None:
        x = images()
        tokens = torch.cat([model.patch_embed(x).flatten(2).mT, model.cls_token.expand(2, -1, -1)], 1)
        for block in model.blocks:
            tokens = block(tokens)

    with capture_attention(model) as attention:
        run()
        with pytest.raises(LayoutError) as error:
            _ = attention.take()[0].layout
        assert says(error, "num_prefix_tokens=1", "num_suffix_tokens=1", "before or behind")
    with capture_attention(model, num_suffix_tokens=1) as attention:
        run()
        layout = attention.take()[0].layout
        assert (layout.num_prefix_tokens, layout.num_suffix_tokens, layout.class_tokens) == (0, 1, (24,))


class Dropping(Arranged):
    """Keeps ``keep`` patches of each image, or all, and adds a class token behind; no field says how large they are."""

    keep: int | None = None

    def __init__(self) -> None:
        super().__init__(lambda m, p, o: torch.cat([m.dropped(p), o[0]], 1), EMBEDDINGS["pixel unshuffle"])
        self.patch_embed = nn.Identity()
        del self.registers, self.prompts
        self.registers, self.prompts = torch.zeros(1, 2, 32), torch.zeros(3, 32)

    def dropped(self, patches: Tensor) -> Tensor:
        return patches if self.keep is None else patches[:, torch.randperm(patches.shape[1])[: self.keep]]


def test_what_dropping_left_later_is_no_coarser_grid() -> None:
    """6 of 24 patches are as many as patches of twice the size."""
    with capture_attention(model := Dropping()) as attention:
        for keep, refused in ((None, False), (6, True), (None, False)):
            model.keep = keep
            model(images())
            assert (attention.take()[0].placed is None) is refused


def test_tokens_that_dropping_leaves_first_show_where_the_others_stand() -> None:
    model = Arranged(lambda m, p, o: torch.cat([p[:, torch.randperm(COUNT)[: m.keep]], o[0], o[1]], 1))
    with capture_attention(model) as attention:
        for keep in (7, COUNT):
            model.keep = keep
            model(images())
            maps = attention.take()
            assert (maps[0].placed is None) is (keep == 7)
    layout = maps[0].layout
    assert (layout.num_prefix_tokens, layout.num_suffix_tokens, layout.class_tokens) == (0, 3, (24,))


def test_images_that_the_model_resizes_have_the_grid_of_its_patches() -> None:
    model = Arranged(ORDERS["class token last"][0], EMBEDDINGS["normalised and resized"])
    with capture_attention(model) as attention:
        for size in ((100, 150), (128, 192), (64, 96)):
            model(images(*size))
            layout = attention.take()[0].layout
            assert ((layout.query.height, layout.query.width), layout.num_suffix_tokens) == (GRID, 1)


SPELLINGS = {
    "b h n d": ("bhnd,bhmd->bhnm", "bhnm,bhmd->bhnd", lambda t: t),
    "b n h d": ("bnhd,bmhd->bhnm", "bhnm,bmhd->bnhd", lambda t: t.transpose(1, 2)),
    "b h d n": ("bhdn,bhdm->bhnm", "bhnm,bhdm->bhdn", lambda t: t.mT),
    "any leading axes": ("...nd,...md->...nm", "...nm,...md->...nd", lambda t: t),
    "n b h d": ("nbhd,mbhd->bhnm", "bhnm,mbhd->nbhd", lambda t: t.permute(2, 0, 1, 3)),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_tokens_are_found_however_their_product_is_spelled(spelling: str) -> None:
    scores, values, turn = SPELLINGS[spelling]

    class Spelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(32, 96)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (turn(t) for t in self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4))
            weights = torch.einsum(scores, q, k).softmax(-1)
            y = torch.einsum(values, weights, v)
            back = {"b n h d": (0, 1, 2, 3), "n b h d": (1, 0, 2, 3), "b h d n": (0, 3, 1, 2)}.get(
                spelling, (0, 2, 1, 3)
            )
            return x + y.permute(back).flatten(2)

    model = Arranged(lambda m, p, o: torch.cat([p, o[0]], 1))
    model.blocks = nn.ModuleList([Spelled(), Spelled()])
    with capture_attention(model) as attention:
        model(images())
        for layer in attention.take():
            assert (layer.layout.num_prefix_tokens, layer.layout.num_suffix_tokens) == (0, 1)
            assert (layer.layout.query.height, layer.layout.query.width) == GRID
