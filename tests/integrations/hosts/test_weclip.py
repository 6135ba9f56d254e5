"""WeCLIP, WeCLIP+ and ExCEL: their own training functions with the added lines, and small networks like theirs."""

import pytest

from tests.support.hosts import checkout, in_fresh_process
from tests.support.weclip import HOSTS, own_and_second_view, train_host

# ---------------------------------------------------------------- the hosts themselves


@pytest.fixture(params=HOSTS)
def host_and_folder(request):
    host = HOSTS[request.param]
    return request.param, checkout(host.repository, host.commit)


def test_host_trains(host_and_folder, tmp_path):
    steps = in_fresh_process(train_host, *host_and_folder, tmp_path)
    host = HOSTS[host_and_folder[0]]
    print(host_and_folder[0], steps[0].terms)
    tokens = (host.size // 16) ** 2
    assert all(shape == (host.batch, 8, tokens, tokens) for step in steps for shape in step.tokens)


def test_the_second_view_of_the_images_is_the_hosts_own_forward(host_and_folder, tmp_path):
    maps, cams, gradients = in_fresh_process(own_and_second_view, *host_and_folder, tmp_path)
    assert maps < 1e-6
    assert cams < 1e-5
    assert all(name.split(".")[0].endswith(("decoder", "decoder_fts_fuse")) for name in gradients), "CLIP is frozen"
    assert len([name for name in gradients if name.endswith("attn.in_proj_weight")]) == 3
