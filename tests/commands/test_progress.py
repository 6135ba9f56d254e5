"""Commands of one long step, without a loop whose rounds could be counted, say that they run."""

import time

import pytest
from PIL import Image

import acr_reg
from acr_reg.__main__ import main
from acr_reg.commands import show
from acr_reg.integrations.jobs import progress


@pytest.mark.parametrize(
    ("command", "owner", "step", "said"),
    [
        ("check timm:vit_tiny_patch16_224 --set depth=1", acr_reg, "check", "checking VisionTransformer: 0 s so far\n"),
        ("show timm:vit_tiny_patch16_224 photo.png", show, "show_attention", "running VisionTransformer: 0 s so far\n"),
    ],
)
def test_a_long_step_is_not_silent(tmp_path, monkeypatch, capsys, command, owner, step, said):
    def slow(*args, **options):
        end = time.monotonic() + 20
        while said not in capsys.readouterr().err:
            assert time.monotonic() < end
            time.sleep(0.01)
        raise ValueError("that is all")

    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("photo.png")
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.02)
    monkeypatch.setattr(owner, step, slow)
    assert main(command.split()) == 2
    assert "that is all" in capsys.readouterr().err
