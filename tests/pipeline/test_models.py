"""The networks and greedy decoding: shapes, independence of the batch, and that they learn."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import StochasticDepth

from pipeline.decode import greedy
from pipeline.models import AutoencoderConfig, Seq2Seq, Seq2SeqConfig, build_model
from shards.format import BOS, EOS, PAD

SEQ2SEQ = Seq2SeqConfig(
    channels=(8, 16, 24), embed_dim=16, latent_dim=24, hidden_dim=32, num_heads=4, dropout=0.1
)
BACKBONES = [
    replace(SEQ2SEQ, encoder="resnet18"),
    replace(SEQ2SEQ, encoder="resnet50"),
    replace(SEQ2SEQ, encoder="efficientnet_b0"),
]
# Every decoder with either memory.
DECODERS = [
    replace(SEQ2SEQ, decoder=decoder, memory=memory, num_layers=2)  # type: ignore[arg-type]
    for decoder in ("lstm", "gru", "transformer")
    for memory in ("spatial", "vector")
]
AUTOENCODER = AutoencoderConfig(latent_dim=16, channels=(8, 16))
VOCAB_SIZE = 11

sizes = st.tuples(st.integers(1, 5), st.integers(1, 70), st.integers(1, 70))


def name_of(config: Seq2SeqConfig) -> str:
    return f"{config.decoder}-{config.memory}"


def seq2seq(
    channels: int = 3,
    height: int = 32,
    width: int = 48,
    seed: int = 0,
    config: Seq2SeqConfig = SEQ2SEQ,
) -> Seq2Seq:
    torch.manual_seed(seed)
    model = build_model(
        config,
        image_channels=channels,
        image_height=height,
        image_width=width,
        vocab_size=VOCAB_SIZE,
    )
    assert isinstance(model, Seq2Seq)
    return model.eval()


def images(batch_size: int, channels: int = 3, height: int = 32, width: int = 48) -> Tensor:
    return torch.rand(batch_size, channels, height, width)


def decisive(model: Seq2Seq) -> Seq2Seq:
    """Larger output weights: an untrained model that ends some rows early and repeats less."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


@settings(max_examples=25, deadline=None)
@given(size=sizes)
def test_seq2seq_takes_any_size_and_channel_count(size: tuple[int, int, int]) -> None:
    model = seq2seq(*size)
    logits_BTV = model(images(2, *size), torch.randint(0, VOCAB_SIZE, (2, 5)))
    assert logits_BTV.shape == (2, 5, VOCAB_SIZE)
    assert logits_BTV.isfinite().all()


@pytest.mark.parametrize("config", BACKBONES, ids=lambda config: config.encoder)
@settings(max_examples=5, deadline=None)
@given(size=sizes, channels=st.sampled_from([1, 3]))
def test_a_backbone_takes_any_size(
    config: Seq2SeqConfig, size: tuple[int, int, int], channels: int
) -> None:
    _, height, width = size
    model = build_model(
        config,
        image_channels=channels,
        image_height=height,
        image_width=width,
        vocab_size=VOCAB_SIZE,
    )
    logits_BTV = model(images(2, channels, height, width), torch.randint(0, VOCAB_SIZE, (2, 5)))
    assert logits_BTV.shape == (2, 5, VOCAB_SIZE)
    assert logits_BTV.isfinite().all()


@settings(max_examples=25, deadline=None)
@given(size=sizes)
def test_autoencoder_returns_any_size_in_the_unit_range(size: tuple[int, int, int]) -> None:
    channels, height, width = size
    model = build_model(
        AUTOENCODER,
        image_channels=channels,
        image_height=height,
        image_width=width,
        vocab_size=None,
    )
    image_BCHW = images(2, *size)
    latent_BD = model.encode(image_BCHW)
    assert latent_BD.shape == (2, AUTOENCODER.latent_dim)
    reconstruction_BCHW = model.decode(latent_BD)
    assert reconstruction_BCHW.shape == image_BCHW.shape
    assert 0 <= reconstruction_BCHW.min() <= reconstruction_BCHW.max() <= 1
    torch.testing.assert_close(model(image_BCHW), reconstruction_BCHW)


@pytest.mark.parametrize("config", [SEQ2SEQ, AUTOENCODER])
def test_images_of_another_shape_are_refused(config: Seq2SeqConfig | AutoencoderConfig) -> None:
    model = build_model(
        config, image_channels=3, image_height=32, image_width=48, vocab_size=VOCAB_SIZE
    )
    with pytest.raises(ValueError, match=r"\(3, 48, 32\).*built for \(3, 32, 48\)"):
        model.encode(images(1, 3, 48, 32))


def test_channels_last_changes_the_layout_and_not_the_result() -> None:
    model, image_BCHW = seq2seq(), images(2)
    token_BT = torch.randint(0, VOCAB_SIZE, (2, 5))
    expected_BTV = model(image_BCHW, token_BT)
    model.to(memory_format=torch.channels_last)
    last_BCHW = image_BCHW.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model(last_BCHW, token_BT), expected_BTV, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", DECODERS, ids=name_of)
@pytest.mark.parametrize("seed", range(4))
def test_steps_equal_teacher_forcing(config: Seq2SeqConfig, seed: int) -> None:
    model, image_BCHW = decisive(seq2seq(seed=seed, config=config)), images(3)
    token_BT = torch.randint(0, VOCAB_SIZE, (3, 9))
    memory = model.encode(image_BCHW)
    state, steps = memory.start, []
    for token_B in token_BT.unbind(dim=1):
        logits_BV, state = model.step(token_B, state, memory)
        steps.append(logits_BV)
    expected_BTV = model(image_BCHW, token_BT)
    assert expected_BTV.std() > 0.5
    torch.testing.assert_close(torch.stack(steps, dim=1), expected_BTV, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("config", DECODERS, ids=name_of)
def test_memory_and_state_are_selected_by_rows(config: Seq2SeqConfig) -> None:
    """Dim 0 of every tensor is the batch, at the start and later: a beam keeps some rows."""
    model, image_BCHW = seq2seq(config=config), images(4)
    token_BT = torch.randint(0, VOCAB_SIZE, (4, 3))
    kept = torch.tensor([3, 1, 1])

    def rows(tensors: Any) -> Any:
        if isinstance(tensors, Tensor):
            assert len(tensors) == 4
            return tensors[kept]
        chosen = map(rows, tensors)
        return type(tensors)(*chosen) if hasattr(tensors, "_fields") else tuple(chosen)

    memory = model.encode(image_BCHW)
    state = memory.start
    for token_B in token_BT[:, :2].unbind(dim=1):
        rows(state)
        _, state = model.step(token_B, state, memory)
    expected_BV, _ = model.step(token_BT[:, 2], state, memory)
    found_BV, _ = model.step(token_BT[kept, 2], rows(state), rows(memory))
    torch.testing.assert_close(found_BV, expected_BV[kept])


@pytest.mark.parametrize("config", DECODERS, ids=name_of)
def test_several_codes_of_an_image_are_as_if_it_were_there_several_times(
    config: Seq2SeqConfig,
) -> None:
    model, image_BCHW = seq2seq(config=config), images(2)
    token_MT = torch.randint(0, VOCAB_SIZE, (6, 5))
    expected_MTV = model(image_BCHW.repeat_interleave(3, dim=0), token_MT)
    torch.testing.assert_close(model(image_BCHW, token_MT), expected_MTV)


@pytest.mark.parametrize("config", DECODERS, ids=name_of)
def test_bf16_on_any_cpu(config: Seq2SeqConfig) -> None:
    """Also where it has no instruction for it; token by token as in one call."""
    model, image_BCHW = seq2seq(config=config), images(2)
    token_BT = torch.randint(0, VOCAB_SIZE, (2, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits_BTV = model(image_BCHW, token_BT)
        memory = model.encode(image_BCHW)
        state, steps = memory.start, []
        for token_B in token_BT.unbind(1):
            logits_BV, state = model.step(token_B, state, memory)
            steps.append(logits_BV)
    logits_BTV.float().sum().backward()
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in model.parameters())
    torch.testing.assert_close(torch.stack(steps, dim=1), logits_BTV, rtol=0.02, atol=0.02)
    exact_BTV = model(image_BCHW, token_BT)
    assert not torch.equal(logits_BTV.float(), exact_BTV)
    torch.testing.assert_close(logits_BTV.float(), exact_BTV, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("decoder", ["lstm", "gru", "transformer"])
def test_attention_is_what_the_decoder_looks_at(decoder: Any) -> None:
    """A distribution over the grid, and the one by which values are mixed."""
    config = replace(SEQ2SEQ, decoder=decoder, num_layers=1, num_heads=2, hidden_dim=16)
    model = decisive(seq2seq(config=config))
    image_BCHW, token_BT = images(2), torch.randint(0, VOCAB_SIZE, (2, 5))
    attention_BATN, grid_shape = model.attention(image_BCHW, token_BT)
    assert grid_shape == (4, 6)
    assert attention_BATN.shape == (2, 2, 5, 24)
    torch.testing.assert_close(attention_BATN.sum(3), torch.ones(2, 2, 5))
    assert attention_BATN.std() > 0.01
    memory = model.encode(image_BCHW)
    # The same at every cell, wherever one looks: for the first token, what its attention found.
    seen_BA1U = attention_BATN[:, :, :1] @ memory.value_BANU
    same_BANU = seen_BA1U.expand_as(memory.value_BANU)
    expected_BV, _ = model.step(token_BT[:, 0], memory.start, memory)
    found_BV, _ = model.step(token_BT[:, 0], memory.start, memory._replace(value_BANU=same_BANU))
    torch.testing.assert_close(found_BV, expected_BV, rtol=1e-4, atol=1e-4)


def test_a_vector_has_no_attention_to_show() -> None:
    model = seq2seq(config=replace(SEQ2SEQ, memory="vector"))
    with pytest.raises(ValueError, match="no attention to show"):
        model.attention(images(1), torch.zeros(1, 2, dtype=torch.int64))


def test_the_default_model_s_tensors_keep_their_names_and_their_order() -> None:
    """Checkpoints hold them."""
    layers = ("position", "key", "value", "summary", "start")
    names = list(seq2seq().state_dict())
    assert names == [
        *(f"encoder.{3 * s + p}.{k}" for s in range(3)
          for p, k in ((0, "weight"), (1, "weight"), (1, "bias"))),
        *(f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")),
        "embedding.weight",
        *(f"lstm.{kind}_l0" for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")),
        *(f"{one}.{kind}" for one in ("query", "combine", "head") for kind in ("weight", "bias")),
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_greedy_is_its_own_teacher_forced_argmax(seed: int) -> None:
    model, image_BCHW = decisive(seq2seq(seed=seed)), images(4)
    for image_1CHW, tokens in zip(image_BCHW.split(1), greedy(model, image_BCHW, 12), strict=True):
        token_BT = torch.tensor([[BOS, *tokens]])
        logits_TV = model(image_1CHW, token_BT)[0]
        logits_TV[:, [PAD, BOS]] = -torch.inf  # never written
        best = logits_TV.argmax(dim=1).tolist()
        assert best[: len(tokens)] == tokens
        assert len(tokens) == 12 or best[len(tokens)] == EOS


def test_greedy_rows_do_not_depend_on_their_batch() -> None:
    model, image_BCHW = decisive(seq2seq()), images(12)
    together = greedy(model, image_BCHW, 20)
    alone = [greedy(model, image_1CHW, 20)[0] for image_1CHW in image_BCHW.split(1)]
    assert together == alone
    assert greedy(model, image_BCHW[:0], 20) == []


def test_greedy_stops_at_eos_and_at_max_tokens() -> None:
    model = seq2seq()
    with torch.no_grad():
        model.head.bias[EOS] = 100
    assert greedy(model, images(2), 7) == [[], []]
    with torch.no_grad():
        model.head.bias[EOS] = -100
    assert [len(tokens) for tokens in greedy(model, images(2), 7)] == [7, 7]


@pytest.mark.parametrize("config", DECODERS, ids=name_of)
def test_padding_changes_no_logits_before_it(config: Seq2SeqConfig) -> None:
    model, image_BCHW = seq2seq(config=config), images(2)
    token_BT = torch.randint(EOS + 1, VOCAB_SIZE, (2, 6))
    padded_BT = functional.pad(token_BT, (0, 5), value=PAD)
    torch.testing.assert_close(model(image_BCHW, padded_BT)[:, :6], model(image_BCHW, token_BT))


@pytest.mark.parametrize("config", [*DECODERS, AUTOENCODER, *BACKBONES])
def test_samples_do_not_see_their_batch(config: Seq2SeqConfig | AutoencoderConfig) -> None:
    torch.manual_seed(0)
    if isinstance(config, Seq2SeqConfig):
        config = replace(config, latent_dropout=0.0)
    model = build_model(
        config, image_channels=3, image_height=32, image_width=48, vocab_size=VOCAB_SIZE
    ).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout | StochasticDepth):
            module.p = 0.0
    image_BCHW = images(5)
    inputs = [image_BCHW]
    if isinstance(model, Seq2Seq):
        inputs.append(torch.randint(0, VOCAB_SIZE, (5, 6)))
    alone = torch.cat([model(*(rows[b : b + 1] for rows in inputs)) for b in range(5)])
    torch.testing.assert_close(model(*inputs), alone, rtol=1e-4, atol=1e-5)


def test_a_training_sample_has_all_of_the_summary_or_nothing() -> None:
    model = seq2seq()
    image_BCHW = images(64)
    whole_BL = model.encode(image_BCHW).latent_BL
    latent_BL = model.train().encode(image_BCHW).latent_BL
    without_B = (latent_BL == 0).all(1)
    assert 16 <= int(without_B.sum()) <= 48
    torch.testing.assert_close(latent_BL[~without_B], whole_BL[~without_B])


def test_dropout_follows_the_default_generator() -> None:
    model, image_BCHW = seq2seq().train(), images(2)
    token_BT = torch.randint(0, VOCAB_SIZE, (2, 6))

    def logits_from(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model(image_BCHW, token_BT)

    assert torch.equal(logits_from(1), logits_from(1))
    assert not torch.equal(logits_from(1), logits_from(2))


@pytest.mark.parametrize("config", [*DECODERS, AUTOENCODER, *BACKBONES[:2]])
def test_gradients_reach_every_parameter(config: Seq2SeqConfig | AutoencoderConfig) -> None:
    torch.manual_seed(0)
    if isinstance(config, Seq2SeqConfig):
        config = replace(config, latent_dropout=0.0)
    model = build_model(
        config, image_channels=3, image_height=32, image_width=48, vocab_size=VOCAB_SIZE
    )
    inputs = [images(4)]
    if isinstance(model, Seq2Seq):
        inputs.append(torch.randint(0, VOCAB_SIZE, (4, 6)))
    model(*inputs).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("config", DECODERS, ids=name_of)
def test_decoder_looks_at_the_image(config: Seq2SeqConfig) -> None:
    """The classic bug is a decoder that learns the codes and ignores the images."""
    model = seq2seq(config=config).train()
    image_BCHW = images(8)
    token_BT = torch.randint(EOS + 1, VOCAB_SIZE, (8, 6))
    input_BT = functional.pad(token_BT, (1, 0), value=BOS)
    target_BT = functional.pad(token_BT, (0, 1), value=EOS)

    def loss_of(image_BCHW: Tensor) -> Tensor:
        return functional.cross_entropy(model(image_BCHW, input_BT).transpose(1, 2), target_BT)

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 200)
        optimizer.zero_grad()
        loss_of(image_BCHW).backward()
        optimizer.step()

    model.eval()
    assert loss_of(image_BCHW) < 0.1
    assert loss_of(image_BCHW.roll(1, dims=0)) > 1
    assert greedy(model, image_BCHW, 10) == token_BT.tolist()


def test_autoencoder_learns_its_images() -> None:
    torch.manual_seed(0)
    model = build_model(
        AUTOENCODER, image_channels=1, image_height=20, image_width=28, vocab_size=None
    )
    row_H, column_W = torch.linspace(0, 1, 20), torch.linspace(0, 1, 28)
    image_BCHW = torch.stack(
        [(row_H[:, None] * a + column_W * (1 - a))[None] for a in (0.0, 0.3, 0.7, 1.0)]
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        functional.mse_loss(model(image_BCHW), image_BCHW).backward()
        optimizer.step()
    assert functional.mse_loss(model(image_BCHW), image_BCHW) < 0.1 * image_BCHW.var()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, r"^model\.num_heads = 3 does not divide model\.hidden_dim = 32: "),
        ({"num_heads": 3, "memory": "vector", "decoder": "transformer"}, "3 does not divide model"),
        ({"num_heads": 0}, r"^model\.num_heads = 0 "),
        ({"channels": ()}, r"^model\.channels = \(\) "),
        ({"channels": (8, 0)}, r"^model\.channels = \(8, 0\) "),
        ({"dropout": 1.0}, r"^model\.dropout = 1\.0 "),
        ({"max_tokens": 0}, r"^model\.max_tokens = 0 "),
        ({"num_layers": 0}, r"^model\.num_layers = 0 "),
        ({"label_smoothing": 1.0}, r"^model\.label_smoothing = 1\.0 "),
        ({"sampling_share": 1.1}, r"^model\.sampling_share = 1\.1 "),
        ({"sampling_start": 0.8}, r"^model\.sampling_start = 0\.8, model\.sampling_end = 0\.75"),
        ({"risk_weight": -1.0}, r"^model\.risk_weight = -1\.0 "),
        ({"risk_beam": 0}, r"^model\.risk_beam = 0 "),
        ({"risk_alpha": 0.0}, r"^model\.risk_alpha = 0\.0 "),
    ],
)
def test_bad_seq2seq_settings_name_their_key(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SEQ2SEQ, **change)


@pytest.mark.parametrize("decoder", ["lstm", "gru"])
def test_where_there_is_no_attention_its_heads_divide_nothing(decoder: Any) -> None:
    model = seq2seq(config=replace(SEQ2SEQ, decoder=decoder, memory="vector", num_heads=3))
    assert model(images(2), torch.full((2, 4), BOS)).shape == (2, 4, VOCAB_SIZE)
    assert len(greedy(model, images(2), 4)) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent_dim": 0}, r"^model\.latent_dim = 0 "),
        ({"channels": ()}, r"^model\.channels = \(\) "),
    ],
)
def test_bad_autoencoder_settings_name_their_key(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(AUTOENCODER, **change)


def test_seq2seq_without_a_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="no tokenizer"):
        build_model(SEQ2SEQ, image_channels=3, image_height=32, image_width=32, vocab_size=None)
