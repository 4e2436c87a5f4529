"""The networks and greedy decoding: shapes, independence of the batch, and that they learn."""

from dataclasses import replace

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
AUTOENCODER = AutoencoderConfig(latent_dim=16, channels=(8, 16))
VOCAB_SIZE = 11

sizes = st.tuples(st.integers(1, 5), st.integers(1, 70), st.integers(1, 70))


def seq2seq(channels: int = 3, height: int = 32, width: int = 48, seed: int = 0) -> Seq2Seq:
    torch.manual_seed(seed)
    model = build_model(
        SEQ2SEQ,
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


@pytest.mark.parametrize("seed", range(4))
def test_steps_equal_teacher_forcing(seed: int) -> None:
    model, image_BCHW = decisive(seq2seq(seed=seed)), images(3)
    token_BT = torch.randint(0, VOCAB_SIZE, (3, 9))
    memory = model.encode(image_BCHW)
    state, steps = memory.start, []
    for token_B in token_BT.unbind(dim=1):
        logits_BV, state = model.step(token_B, state, memory)
        steps.append(logits_BV)
    expected_BTV = model(image_BCHW, token_BT)
    torch.testing.assert_close(torch.stack(steps, dim=1), expected_BTV, rtol=1e-4, atol=1e-4)


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


def test_padding_changes_no_logits_before_it() -> None:
    model, image_BCHW = seq2seq(), images(2)
    token_BT = torch.randint(EOS + 1, VOCAB_SIZE, (2, 6))
    padded_BT = functional.pad(token_BT, (0, 5), value=PAD)
    torch.testing.assert_close(model(image_BCHW, padded_BT)[:, :6], model(image_BCHW, token_BT))


@pytest.mark.parametrize("config", [SEQ2SEQ, AUTOENCODER, *BACKBONES])
def test_samples_do_not_see_their_batch(config: Seq2SeqConfig | AutoencoderConfig) -> None:
    torch.manual_seed(0)
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


def test_dropout_follows_the_default_generator() -> None:
    model, image_BCHW = seq2seq().train(), images(2)
    token_BT = torch.randint(0, VOCAB_SIZE, (2, 6))

    def logits_from(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model(image_BCHW, token_BT)

    assert torch.equal(logits_from(1), logits_from(1))
    assert not torch.equal(logits_from(1), logits_from(2))


@pytest.mark.parametrize("config", [SEQ2SEQ, AUTOENCODER, *BACKBONES[:2]])
def test_gradients_reach_every_parameter(config: Seq2SeqConfig | AutoencoderConfig) -> None:
    torch.manual_seed(0)
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


def test_decoder_looks_at_the_image() -> None:
    """The classic bug is a decoder that learns the codes and ignores the images."""
    model = seq2seq().train()
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
        ({"num_heads": 0}, r"^model\.num_heads = 0 "),
        ({"channels": ()}, r"^model\.channels = \(\) "),
        ({"channels": (8, 0)}, r"^model\.channels = \(8, 0\) "),
        ({"dropout": 1.0}, r"^model\.dropout = 1\.0 "),
        ({"max_tokens": 0}, r"^model\.max_tokens = 0 "),
    ],
)
def test_bad_seq2seq_settings_name_their_key(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SEQ2SEQ, **change)


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
