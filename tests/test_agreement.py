"""Bits per byte, agreement and expert use against formulas written out."""

import json
import math

import pytest
import torch
from torch import nn

from mobilemoe.cli import main
from mobilemoe.eval.agreement import WINDOW, expert_utilisation, text_agreement, token_routes
from mobilemoe.runtime import CheckpointModel


TEXT = "def walk(steps):\n    return steps + 1\n" * 3


@pytest.fixture(scope="module")
def base(base_checkpoint) -> CheckpointModel:
    return CheckpointModel(base_checkpoint)


@pytest.fixture(scope="module")
def int4(text_checkpoint) -> CheckpointModel:
    return CheckpointModel(text_checkpoint)


def test_a_model_agrees_with_itself(base):
    result = text_agreement(base, base, TEXT)
    assert result.kl == 0 and result.top1 == 1
    assert result.bits_per_byte == result.reference_bits_per_byte


def test_agreement_is_the_formula(base, int4):
    tokens = base.encode(TEXT)
    result = text_agreement(int4, base, TEXT)
    ours, reference = (model.all_logits(tokens)[:-1] for model in (int4, base))
    nats = nn.functional.cross_entropy(ours, torch.tensor(tokens[1:]), reduction="sum").item()
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / len(TEXT.encode()))
    divergence = nn.functional.kl_div(
        ours.log_softmax(-1), reference.log_softmax(-1), reduction="batchmean", log_target=True
    )
    assert result.kl == pytest.approx(divergence.item(), rel=1e-4)
    assert result.kl > 1e-3
    assert result.top1 == pytest.approx((ours.argmax(-1) == reference.argmax(-1)).float().mean().item())
    assert result.top1 < 1


def test_a_long_text_is_read_in_windows_and_every_token_once(base):
    # The tiny model reads 256 tokens at once.
    assert base.max_seq_len < WINDOW
    text = TEXT * 20
    tokens = base.encode(text)
    assert len(tokens) > 600
    result = text_agreement(base, None, text, max_tokens=600)
    assert result.num_tokens == 600
    nats = 0.0
    for start in (1, 256, 511):
        window = tokens[start : min(start + 255, 601)]
        logits = base.all_logits([tokens[0], *window])[:-1]
        nats += nn.functional.cross_entropy(logits, torch.tensor(window), reduction="sum").item()
    num_bytes = len(base.decode(tokens[1:601]).encode())
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / num_bytes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpoint", ["base_checkpoint", "text_checkpoint"])
def test_token_routes_select_by_score_and_bias_and_weigh_by_score(request, checkpoint, dtype):
    # In BF16 a packed model computes a whole layer at once, unless something watches its router.
    model = CheckpointModel(request.getfixturevalue(checkpoint), dtype=dtype)
    tokens = model.encode(TEXT)
    experts, weights = token_routes(model, tokens)
    assert not any(module._forward_hooks for module in model.model.modules())
    config = model.model.config
    assert experts.shape == weights.shape == (config.num_hidden_layers, len(tokens), config.num_experts_per_tok)
    with torch.inference_mode():
        outputs = model.model(torch.tensor([tokens]), output_router_logits=True, use_cache=False)
    for layer, logits in enumerate(outputs.router_logits):
        scores = logits.sigmoid()
        biased = scores + model.model.model.layers[layer].feed_forward.expert_bias
        selected = torch.zeros_like(scores, dtype=torch.bool).scatter(1, experts[layer], True)
        assert (biased[selected].view(len(tokens), -1).amin(1) >= biased.masked_fill(selected, -9).amax(1)).all()
        expected = scores.gather(1, experts[layer])
        expected = expected / expected.sum(dim=1, keepdim=True) * config.routed_scaling_factor
        torch.testing.assert_close(weights[layer], expected)


def test_expert_utilisation_counts_what_the_routers_select(base):
    result = expert_utilisation(base, TEXT)
    selected = base.model(torch.tensor([base.encode(TEXT)]), output_router_logits=True).router_logits
    for layer, router_logits in enumerate(selected):
        feed_forward = base.model.model.layers[layer].feed_forward
        scores = router_logits.sigmoid() + feed_forward.expert_bias
        counts = scores.topk(4, dim=-1).indices.flatten().bincount(minlength=8)
        load = counts / counts.sum()
        assert result.load[layer] == pytest.approx(load.tolist())
        assert result.used[layer] == pytest.approx((counts > 0).float().mean().item())
        used = load[load > 0]
        assert result.effective[layer] == pytest.approx((-(used * used.log()).sum()).exp().item() / 8, rel=1e-5)


def test_check_from_the_command_line(base_checkpoint, text_checkpoint, tmp_path, capsys):
    (tmp_path / "code.py").write_text(TEXT)
    arguments = ["eval", "check", "--model", str(text_checkpoint), "--json", str(tmp_path / "check.json")]
    main([*arguments, "--reference", str(base_checkpoint), "--text", f"code={tmp_path / 'code.py'}"])
    result = json.loads((tmp_path / "check.json").read_text())
    assert result["command"].startswith("mobilemoe eval check --model ") and "--reference" in result["command"]
    assert 0 <= result["domains"]["code"]["top1"] < 1 and result["domains"]["code"]["kl"] > 0
    assert len(result["domains"]["code"]["experts"]["load"]) == 2
    printed = capsys.readouterr().out
    assert printed.startswith("code {") and "effective" in printed
    # The same, printed.
    main([*arguments[:-1], "-", "--text", f"code={tmp_path / 'code.py'}"])
    assert json.loads(capsys.readouterr().out)["domains"]["code"]["bits_per_byte"] > 0
    with pytest.raises(SystemExit, match="--max-tokens -1 leaves nothing to predict"):
        main([*arguments, "--text", f"code={tmp_path / 'code.py'}", "--max-tokens", "-1"])
    with pytest.raises(SystemExit, match="Give DOMAIN=FILE"):
        main([*arguments, "--text", str(tmp_path / "code.py")])
    (tmp_path / "empty").write_text("")
    with pytest.raises(SystemExit, match="The text is empty"):
        main([*arguments, "--text", f"nothing={tmp_path / 'empty'}"])
