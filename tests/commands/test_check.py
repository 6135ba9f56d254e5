"""The command `python -m acr_reg check`, by its main function in this process (importing torch takes seconds)."""

from __future__ import annotations

import argparse
import inspect
import re
from pathlib import Path

import pytest

from acr_reg import check
from acr_reg.__main__ import main
from acr_reg.commands.check import add_arguments
from acr_reg.commands.models import numbers

TINY = ["timm:vit_tiny_patch16_224", "--set", "img_size=64", "--set", "depth=2", "--size", "64"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    try:
        code: object = main(["check", *arguments])
    except SystemExit as exit_by_argparse:
        code = exit_by_argparse.code
    output = capsys.readouterr()
    assert isinstance(code, int)
    return code, output.out, output.err


def test_a_model_that_is_served_prints_its_table(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *TINY)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "VisionTransformer: 2 layers of token-to-token attention captured, view HorizontalFlip()"
    assert [line.split()[:2] for line in lines[2:4]] == [["0", "blocks.0.attn"], ["1", "blocks.1.attn"]]
    assert lines[-1] == "ok"


def test_options_reach_the_check(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(
        capsys, *TINY, "--view", "rot90", "--layers", "1", "--method", "forward_features", "--batch", "1"
    )
    assert code == 0
    assert "1 layers" in out.splitlines()[0] and "Rotate90(1)" in out and "blocks.0.attn" not in out
    code, out, _ = run(capsys, *TINY, "--prefix-tokens", "5")
    assert code == 1 and re.search(r"problem: layer 0 .*num_prefix_tokens=5 .* 1 tokens stand before", out)


AROUND = """
import torch
class Vit(torch.nn.Module):
    def __init__(self, before, behind):
        super().__init__()
        self.patch = torch.nn.Conv2d(3, 32, 8, 8)
        self.before, self.behind = (torch.nn.Parameter(torch.randn(1, count, 32)) for count in (before, behind))
        self.block = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    def forward(self, images):
        before, behind = (tokens.expand(len(images), -1, -1) for tokens in (self.before, self.behind))
        return self.block(torch.cat([before, self.patch(images).flatten(2).mT, behind], 1)).mean(1)
"""


@pytest.mark.parametrize(
    ("given", "prefix", "suffix", "shown"),
    [("1", "1", "4", "0"), ("2", "1", "4", "0,17"), ("[-1]", "0", "5", "20"), ("[20,0]", "1", "4", "20,0")],
)
def test_tokens_behind_the_patches(
    given: str,
    prefix: str,
    suffix: str,
    shown: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "models_around.py").write_text(AROUND)
    monkeypatch.chdir(tmp_path)
    model = ["models_around:Vit", "--set", f"before={prefix}", "--set", f"behind={suffix}", "--size", "32"]
    options = ["--prefix-tokens", prefix, "--suffix-tokens", suffix, "--class-tokens", given]
    code, out, _ = run(capsys, *model, *options)
    assert code == 0
    heading, row = (re.split(r"\s{2,}", line.strip()) for line in out.splitlines()[1:3])
    found = dict(zip(heading, row, strict=True))
    assert (found["prefix"], found["suffix"], found["class"]) == (prefix, suffix, shown)
    code, out, _ = run(capsys, *model, "--suffix-tokens", "3")
    assert code == 1 and "num_suffix_tokens=3" in out and f"{suffix} behind" in out


@pytest.mark.parametrize("given", ["last", "[", "[]", ",", "[0;1]", "1.5"])
def test_class_tokens_that_are_neither_a_count_nor_positions(capsys: pytest.CaptureFixture[str], given: str) -> None:
    code, _, err = run(capsys, *TINY, "--class-tokens", given)
    assert code == 2 and "--class-tokens" in err and given in err and "[0,-1]" in err


def test_a_model_without_attention_is_a_problem_and_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "torchvision:resnet18", "--size", "32")
    assert (code, err) == (1, "")
    assert re.search(
        r"problem: .* token-to-token attention .*ResNet|problem: .*ResNet .* token-to-token attention", out
    )
    assert out.splitlines()[-1] == "problems: 1"


def test_a_model_of_the_users_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_models.py").write_text(
        "import torch\n"
        "class Vit(torch.nn.Module):\n"
        "    def __init__(self, patch):\n"
        "        super().__init__()\n"
        "        self.patch = torch.nn.Conv2d(3, 32, patch, patch)\n"
        "        self.block = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)\n"
        "    def forward(self, images):\n"
        "        return self.block(self.patch(images).flatten(2).mT).mean(1)\n"
        "def number():\n"
        "    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "my_models:Vit", "--set", "patch=8", "--size", "32", "48")
    assert code == 0 and "4 x 6" in out
    code, _, err = run(capsys, "my_models:number")
    assert code == 2 and re.search(r"my_models:number .*\bint\b.*torch\.nn\.Module", err)


def test_every_hint_of_a_capture_is_an_option() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = {action.dest for action in parser._actions}
    names = {"num_prefix_tokens": "prefix_tokens", "num_suffix_tokens": "suffix_tokens", "forward": "method"}
    assert {names.get(name, name) for name in inspect.signature(check).parameters} - {"images"} <= options


def test_hints_of_several_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, *TINY, "--patch-size", "16,16", "--class-tokens", "0,")[0] == 0
    assert numbers("2") == 2 and numbers("2,") == numbers("[2]") == (2,) and numbers("0,3") == (0, 3)
    code, out, _ = run(capsys, *TINY, "--patch-size", "16,8")
    assert code == 1 and "16 x 8" in out
    assert run(capsys, "--patch-size", "16", *TINY)[0] == 0  # the option does not take the model for a number
    code, _, err = run(capsys, *TINY, "--class-tokens", "two")
    assert code == 2 and "--class-tokens" in err and "'two'" in err


FROZEN = """
import torch
class Frozen(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.patch = torch.nn.Conv2d(3, 32, 8, 8)
        self.block = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    def forward(self, images):
        with torch.no_grad():
            return self.block(self.patch(images).flatten(2).mT).mean(1)
"""


def test_a_model_under_no_grad_is_seen_by_no_grad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "frozen_models.py").write_text(FROZEN)
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "frozen_models:Frozen", "--size", "32")
    assert code == 1 and "no_grad=True" in out
    code, out, err = run(capsys, "frozen_models:Frozen", "--size", "32", "--no-grad")
    assert (code, err) == (0, "") and "4 x 4" in out and "warning: " in out


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        ([*TINY, "--layers", "9"], ["VisionTransformer ", "no layers [9]", "[0, 1]"]),
        ([*TINY, "--layers", "0", "-3"], ["no layers [-3]"]),
        ([*TINY, "--modules", "zz"], ["'zz' is not a module", "named_modules()"]),
        ([*TINY, "--size", "60"], ["images (2, 3, 60, 60)", "AssertionError: Input height (60)"]),
        ([*TINY, "--method", "train"], ["VisionTransformer ", "mode"]),
        ([*TINY, "--method", "eval"], ["VisionTransformer ", "TypeError: "]),
        (["vit"], ["'vit'", "SOURCE:NAME"]),
        (["timm"], ["'timm' names a library", "timm:vit"]),
        (["torchvision:"], ["'torchvision:' names a library"]),
        (["timm:vit_smal_patch16_224"], ["no model 'vit_smal_patch16_224'", "vit_small_patch16_224"]),
        (["timm:deit3_small"], ["deit3_small_patch16_224"]),
        (["timm:hf-hub:a/b/c/d"], ["timm:hf-hub:a/b/c/d could not be built"]),
        (["torchvision:vit_b16"], ["torchvision has no model", "vit_b_16"]),
        (["timm:xyzzy"], ["no model 'xyzzy'", "list_models()"]),
        (["tim:vit_small_patch16_224"], ["no module tim ", "Did you mean timm?"]),
        (["torch.nn:Linearr"], ["torch.nn has no function or class 'Linearr'", "Linear"]),
        (["os:path"], ["os has no function or class 'path'"]),
        (["runs/best.pth"], ["'runs/best.pth' is a file of weights", "my_code.models:build"]),
        (["net/vit.py"], ["net.vit:FUNCTION"]),
        (["./net/vit.py:build"], ["'./net/vit.py' is a path", "net.vit:build"]),
        (["timm:vit_tiny_patch16_224", "--set", "colour=3"], ["could not be built", "{'colour': 3}", "TypeError: "]),
        (["no_such_module:x"], ["no module no_such_module ", "'no_such_module:x'", "folder"]),
        ([*TINY, "--set", "depth"], ["--set depth ", "NAME=VALUE"]),
        ([*TINY, "--method", "forward_nothing"], ["VisionTransformer ", "no method forward_nothing", "--method out"]),
        ([*TINY[:1], "--size", "1", "2", "3"], ["--size 1 2 3 ", "one or two"]),
        ([*TINY[:1], "--size", "100000"], ["--size 100000 ", "1 to 4096"]),
        ([*TINY[:1], "--batch", "0"], ["--batch 0 ", "at least 1"]),
        ([*TINY[:5]], ["images (2, 3, 224, 224)", "another size, pass --size"]),
        ([*TINY, "--view", "half"], ["view of 32 x 32 px", "--set dynamic_img_size=True"]),
    ],
)
def test_what_the_user_can_put_right_is_one_message(
    arguments: list[str], facts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("python -m acr_reg check: error: ") and all(fact in err for fact in facts)
    assert "Traceback" not in err
