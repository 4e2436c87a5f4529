"""Scheduled sampling and minimum risk: what they put in, by hand, and that they train."""

import math
from dataclasses import replace

import pytest
import torch
from rapidfuzz.distance import Levenshtein
from torch import Tensor
from torch.nn import functional

from pipeline import exposure
from pipeline.batch import Batch
from pipeline.models import Seq2Seq, Seq2SeqConfig, build_model
from pipeline.tasks import Seq2SeqTask, references
from shards.format import BOS, EOS, PAD

CONFIG = Seq2SeqConfig(
    channels=(8, 16), embed_dim=16, latent_dim=24, hidden_dim=32, num_heads=4, dropout=0.2
)
VOCAB_SIZE = 9
CODES = [[5, 6, 7, 8], [4, 4, 5], [8, 7, 6, 5, 4, 4], []]


def new_model(config: Seq2SeqConfig = CONFIG) -> Seq2Seq:
    torch.manual_seed(0)
    model = build_model(
        config, image_channels=3, image_height=16, image_width=24, vocab_size=VOCAB_SIZE
    )
    assert isinstance(model, Seq2Seq)
    return model.double()


def new_batch(codes: list[list[int]] = CODES) -> Batch:
    torch.manual_seed(1)
    rows = [torch.tensor([BOS, *code, EOS]) for code in codes]
    return Batch(
        image_BCHW=torch.randint(0, 256, (len(codes), 3, 16, 24), dtype=torch.uint8),
        token_BT=torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD),
        weight_B=torch.ones(len(codes)),
        augment_key_B=torch.zeros(len(codes), dtype=torch.int64),
        keys=tuple(map(str, range(len(codes)))),
        step=0,
        micro=0,
        first_place=0,
        bad=(),
    )


def images_of(batch: Batch) -> Tensor:
    return batch.image_BCHW.double() / 255


def test_the_share_rises_from_nothing_between_two_parts_of_the_run() -> None:
    config = replace(CONFIG, sampling_share=0.4, sampling_start=0.2, sampling_end=0.6)
    shares = [exposure.sampling_share(config, tenth / 10) for tenth in range(11)]
    expected = [0, 0, 0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4, 0.4]
    assert shares == pytest.approx(expected)
    assert exposure.sampling_share(CONFIG, 1.0) == 0


def test_sampled_tokens_are_the_model_s_own_one_place_on() -> None:
    """With a distribution as sharp as an argmax: what is read at t is what the true tokens before
    it lead to. <bos>, <eos> and padding stay, and none of them is put in."""
    torch.manual_seed(2)
    codes = [torch.randint(EOS + 1, VOCAB_SIZE, (length,)).tolist() for length in range(4, 20)]
    model, batch = new_model(), new_batch(codes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
        model.head.weight.mul_(1e4)
        model.head.weight[: EOS + 1].mul_(3)  # special tokens are often its own
    input_BT = batch.token_BT[:, :-1]
    found_BT = exposure.sample_inputs(model, images_of(batch), input_BT, 1.0)
    assert model.training
    own_BT = model.eval()(images_of(batch), input_BT).argmax(dim=2)
    changed, special = 0, 0
    for row, (inputs, found) in enumerate(zip(input_BT.tolist(), found_BT.tolist(), strict=True)):
        for place, (true, one) in enumerate(zip(inputs, found, strict=True)):
            own = own_BT[row, place - 1].item()
            assert one == (own if true > EOS and own > EOS else true)
            changed += one != true
            special += own <= EOS < true
    assert changed > 20
    assert special > 5
    assert torch.equal(exposure.sample_inputs(model, images_of(batch), input_BT, 0.0), input_BT)


def test_samples_follow_the_share_and_the_distribution() -> None:
    model = new_model().train()
    with torch.no_grad():  # 5, 6 and 7, one to two to one
        model.head.weight.zero_()
        model.head.bias.fill_(-1e3)
        model.head.bias[5:8] = torch.tensor([1.0, 2.0, 1.0]).log()
    input_BT = torch.full((8, 1000), 8)
    input_BT[:, 0] = BOS
    image_BCHW = torch.rand(8, 3, 16, 24, dtype=torch.float64)
    found_BT = exposure.sample_inputs(model, image_BCHW, input_BT, 0.5)
    counts = torch.bincount(found_BT.flatten(), minlength=VOCAB_SIZE) / input_BT.numel()
    assert counts[5:9].tolist() == pytest.approx([0.125, 0.25, 0.125, 0.5], abs=0.02)
    torch.manual_seed(3)
    one_BT = exposure.sample_inputs(model, image_BCHW, input_BT, 0.5)
    torch.manual_seed(3)
    assert torch.equal(exposure.sample_inputs(model, image_BCHW, input_BT, 0.5), one_BT)


def test_candidates_are_the_true_code_and_other_ones() -> None:
    model, batch = new_model(), new_batch()
    codes = references(batch)
    assert codes == CODES
    found = exposure.find_candidates(model, images_of(batch), codes, 5)
    assert model.training
    assert found.token_BJT.shape[:2] == found.edits_BJ.shape == found.found_BJ.shape == (4, 6)
    assert found.found_BJ[:, :2].all()
    for code, rows, edits, valid in zip(CODES, *map(Tensor.tolist, found), strict=True):
        inner = [tuple(t for t in row if t not in (PAD, BOS, EOS)) for row in rows]
        assert rows[0][: len(code) + 2] == [BOS, *code, EOS]
        assert edits[0] == 0
        for row, tokens, distance, is_found in zip(rows, inner, edits, valid, strict=True):
            assert row[0] == BOS
            assert row.count(EOS) >= 1
            if PAD not in row[: len(tokens) + 2] and is_found:
                assert distance == Levenshtein.distance(code, row[1 : row.index(EOS)])
        assert all(distance > 0 for distance, one in zip(edits[1:], valid[1:], strict=True) if one)


def test_expected_edits_by_hand() -> None:
    candidates = exposure.Candidates(
        token_BJT=torch.tensor([[[BOS, 4, EOS, PAD], [BOS, 5, 6, EOS], [BOS, 4, EOS, PAD]]]),
        edits_BJ=torch.tensor([[0.0, 2.0, 0.0]], dtype=torch.float64),
        found_BJ=torch.tensor([[True, True, False]]),
    )
    logits_BJTV = torch.randn(1, 3, 3, VOCAB_SIZE, dtype=torch.float64, requires_grad=True)
    log_p = logits_BJTV.log_softmax(3)[0]
    right = log_p[0, 0, 4] + log_p[0, 1, EOS]
    wrong = log_p[1, 0, 5] + log_p[1, 1, 6] + log_p[1, 2, EOS]
    for alpha in (1.0, 0.1):
        share = torch.softmax(alpha * torch.stack([right, wrong]), dim=0)[1]
        (found,) = exposure.expected_edits(logits_BJTV, candidates, alpha)
        assert found.item() == pytest.approx(2 * share.item())
    found.backward()
    assert logits_BJTV.grad is not None
    assert logits_BJTV.grad[0, 2].abs().max() == 0, "what stands in teaches nothing"
    assert logits_BJTV.grad[0, 1, 1, 6] > 0, "the wrong code becomes less likely"


def loss_of(config: Seq2SeqConfig, model: Seq2Seq, batch: Batch, progress: float = 1.0) -> Tensor:
    task = Seq2SeqTask(config, torch.float64)
    return task.loss_sum(model, batch, bare=model, progress=progress)


def test_label_smoothing_is_of_the_training_loss_alone() -> None:
    model, batch = new_model().eval(), new_batch()
    smooth = replace(CONFIG, label_smoothing=0.3)
    plain, smoothed = (loss_of(config, model, batch) for config in (CONFIG, smooth))
    logits_BTV = model(images_of(batch), batch.token_BT[:, :-1])
    valid_BT = batch.token_BT[:, 1:] != PAD
    spread = -(logits_BTV.log_softmax(2).mean(2) * valid_BT).sum()
    assert smoothed.item() == pytest.approx((0.7 * plain + 0.3 * spread).item())
    tasks = [Seq2SeqTask(config, torch.float64) for config in (CONFIG, smooth)]
    with torch.inference_mode():
        sums = [task.metric_sums(model, batch) for task in tasks]
    assert sums[0] == sums[1]
    assert sums[0][2] == pytest.approx(plain.item())


def test_each_option_changes_the_loss_as_it_says() -> None:
    model, batch = new_model().eval(), new_batch()
    plain = loss_of(CONFIG, model, batch)
    sampling = replace(CONFIG, sampling_share=0.9, sampling_start=0.5, sampling_end=1.0)
    assert torch.equal(loss_of(sampling, model, batch, progress=0.5), plain)
    torch.manual_seed(5)
    sampled = loss_of(sampling, model, batch, progress=1.0)
    torch.manual_seed(5)
    input_BT = exposure.sample_inputs(model, images_of(batch), batch.token_BT[:, :-1], 0.9)
    logits_BVT = model(images_of(batch), input_BT).transpose(1, 2)
    target_BT = batch.token_BT[:, 1:]
    expected = functional.cross_entropy(logits_BVT, target_BT, ignore_index=PAD, reduction="sum")
    assert sampled.item() == pytest.approx(expected.item())
    assert sampled.item() != pytest.approx(plain.item(), rel=1e-4)

    risk = replace(CONFIG, risk_weight=2.0, risk_beam=3, risk_alpha=0.7)
    found = exposure.find_candidates(model, images_of(batch), CODES, 3)
    logits_MTV = model(images_of(batch), found.token_BJT[:, :, :-1].flatten(0, 1))
    edits_B = exposure.expected_edits(logits_MTV.unflatten(0, (4, 4)), found, 0.7)
    expected = plain + 2.0 * edits_B.sum()
    assert loss_of(risk, model, batch).item() == pytest.approx(expected.item())
    # A sample that could not be read counts for nothing, and is no trouble.
    bad = new_batch()
    bad.token_BT[1] = PAD
    bad.weight_B[1] = 0
    without = plain - loss_of(CONFIG, model, bad)
    assert without > 0
    expected = expected - without - 2.0 * edits_B[1]
    assert loss_of(risk, model, bad).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("decoder", ["lstm", "transformer"])
def test_minimum_risk_alone_finds_the_codes(decoder: str) -> None:
    """After some steps of cross-entropy, risk without it lowers the expected edits."""
    config = replace(CONFIG, decoder=decoder, dropout=0.0, latent_dropout=0.0)  # type: ignore[arg-type]
    # In double precision, in small steps: else the processor's own rounding decides what is found.
    model, batch = new_model(config), new_batch()
    task = Seq2SeqTask(config, torch.float64)
    risky = Seq2SeqTask(replace(config, risk_weight=1.0), torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def train(steps: int, weight: float) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = (risky if weight else task).loss_sum(model, batch, bare=model, progress=1.0)
            if weight:
                loss = loss - task.loss_sum(model, batch, bare=model, progress=1.0)
            loss.backward()
            optimizer.step()

    def edits() -> float:
        found = exposure.find_candidates(model, images_of(batch), CODES, 4)
        logits = model(images_of(batch), found.token_BJT[:, :, :-1].flatten(0, 1))
        return exposure.expected_edits(logits.unflatten(0, (4, 5)), found, 1.0).sum().item()

    train(60, 0.0)
    before = edits()
    train(60, 1.0)
    print(f"{decoder}: {before:.2f} -> {edits():.2f} expected edits")
    assert edits() < 0.8 * before
    assert math.isfinite(before)
