"""The autoencoder's options: any image, every loss, the variational one; and SSIM."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from pipeline.batch import Batch
from pipeline.metrics import merge
from pipeline.models import Autoencoder, AutoencoderConfig, build_model
from pipeline.ssim import ssim
from pipeline.tasks import AutoencoderTask, kl_divergence

SMALL = AutoencoderConfig(latent_dim=6, channels=(4, 8))
CHANGES: list[dict[str, object]] = [
    {},
    {"latent": "map", "loss": "l1", "range": "symmetric"},
    {"loss": "bce", "blocks": 1},
    {"loss": "ssim", "linear": True, "channels": (4,)},
    {"variational": True, "loss": "bce", "linear": True},
    {"variational": True, "latent": "map", "loss": "ssim", "blocks": 2, "kl_warmup": 0.5},
]


def built(config: AutoencoderConfig, *shape: int, seed: int = 0) -> Autoencoder:
    torch.manual_seed(seed)
    channels, height, width = shape
    model = build_model(
        config, image_channels=channels, image_height=height, image_width=width, vocab_size=None
    )
    assert isinstance(model, Autoencoder)
    return model


def batch_of(image_BCHW: Tensor, weights: Sequence[float] | None = None) -> Batch:
    size = len(image_BCHW)
    return Batch(
        image_BCHW=image_BCHW,
        token_BT=torch.empty(size, 0, dtype=torch.int64),
        weight_B=torch.tensor(weights or [1.0] * size),
        augment_key_B=torch.arange(size),
        keys=tuple(map(str, range(size))),
        step=0,
        micro=0,
        first_place=0,
        bad=(),
    )


def pictures(count: int, *shape: int, seed: int = 0) -> Tensor:
    """Smooth uint8 images with some noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, shape[0], 3, 3, generator=generator)
    smooth = functional.interpolate(coarse, shape[1:], mode="bilinear")
    noisy = smooth + 0.05 * torch.randn(count, *shape, generator=generator)
    return (noisy.clamp(0, 1) * 255).round().to(torch.uint8)


@pytest.mark.parametrize("change", CHANGES, ids=str)
@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 37, 53), (4, 20, 9), (5, 8, 33)], ids=str)
def test_one_step_on_any_image_lowers_the_loss(
    shape: tuple[int, ...], change: dict[str, object]
) -> None:
    config = replace(SMALL, **change)
    model, task = built(config, *shape), AutoencoderTask(config)
    batch = batch_of(pictures(3, *shape))

    def loss() -> Tensor:
        torch.manual_seed(1)
        return task.loss_sum(model, batch, progress=0.1) / task.weight(batch)

    before = loss()
    before.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    torch.optim.SGD(model.parameters(), lr=1e-2).step()
    assert loss() < before
    image_BCHW = batch.images()
    found_BCHW = model.eval()(image_BCHW)
    assert found_BCHW.shape == (3, *shape)
    assert 0 <= found_BCHW.min() <= found_BCHW.max() <= 1
    latent_BD = model.encode(image_BCHW)
    assert latent_BD.shape == (3, *model.latent_shape)
    assert torch.equal(model.decode(latent_BD), found_BCHW)


@pytest.mark.parametrize("latent", ["vector", "map"])
def test_large_images_come_back_at_their_size(latent: str) -> None:
    config = replace(SMALL, latent=latent, channels=(4, 4, 8, 8, 8), blocks=1, variational=True)
    model, task = built(config, 3, 512, 512), AutoencoderTask(config)
    batch = batch_of(pictures(1, 3, 512, 512))
    task.loss_sum(model, batch).backward()
    torch.optim.SGD(model.parameters(), lr=1e-9).step()
    assert model.eval()(batch.images()).shape == (1, 3, 512, 512)
    expected = (1, 6) if latent == "vector" else (1, 6, 16, 16)
    assert model.encode(batch.images()).shape == expected


def test_the_default_is_the_network_of_older_checkpoints() -> None:
    """Parameter names, initial values and arithmetic, bit for bit."""
    channels = (4, 8)
    model = built(SMALL, 3, 20, 28)
    torch.manual_seed(0)
    encoder: list[nn.Module] = []
    for before, after in pairwise((3, *channels)):
        encoder += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.SiLU()]
    old = nn.ModuleDict({"encoder": nn.Sequential(*encoder)})
    old["to_latent"] = nn.Linear(8 * 5 * 7, 6)
    old["from_latent"] = nn.Linear(6, 8 * 5 * 7)
    decoder: list[nn.Module] = []
    for before, after in pairwise((*reversed(channels), 3)):
        decoder += [nn.SiLU(), nn.ConvTranspose2d(before, after, 4, stride=2, padding=1)]
    old["decoder"] = nn.Sequential(*decoder)
    expected, found = old.state_dict(), model.state_dict()
    assert list(expected) == list(found)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    image_BCHW = pictures(2, 3, 20, 28) / 255
    latent_BD = old["to_latent"](old["encoder"](2 * image_BCHW - 1).flatten(1))
    grid_BFHW = old["from_latent"](latent_BD).unflatten(1, (8, 5, 7))
    assert torch.equal(model(image_BCHW), torch.sigmoid(old["decoder"](grid_BFHW)))


@pytest.mark.parametrize("loss", ["mse", "l1", "bce", "ssim"])
@pytest.mark.parametrize("variational", [False, True])
def test_sums_do_not_depend_on_how_samples_are_batched(loss: str, variational: bool) -> None:
    """And a sample of weight 0 counts for nothing, in the loss and in the metrics."""
    kl_weight = 0.3 if variational else 1.0
    config = replace(SMALL, loss=loss, variational=variational, kl_weight=kl_weight)
    model = built(config, 3, 12, 17).double().eval()
    task = AutoencoderTask(config, torch.float64)
    images = pictures(5, 3, 12, 17)
    whole = batch_of(images, [1, 1, 0, 1, 1])
    parts = [batch_of(images[:1]), batch_of(images[1:3], [1, 0]), batch_of(images[3:])]
    assert task.weight(whole) == sum(map(task.weight, parts)) == 4 * 3 * 12 * 17
    with torch.inference_mode():
        sums = [task.loss_sum(model, part) for part in parts]
        torch.testing.assert_close(task.loss_sum(model, whole), sum(sums), rtol=1e-12, atol=0)
        metrics = task.metrics(task.metric_sums(model, whole))
        merged = task.metrics(merge([task.metric_sums(model, part) for part in parts]))
        image_BCHW = whole.image_BCHW.double() / 255
        scores_B = task.scores(model(image_BCHW, for_loss=True), image_BCHW)
    assert metrics == pytest.approx(merged, rel=1e-12)
    assert metrics["loss"] == pytest.approx(float(sum(sums)) / task.weight(whole), rel=1e-12)
    assert ("kl" in metrics) == variational
    if variational:
        parts_of_elbo = metrics["reconstruction_error"] + 0.3 * metrics["kl"]
        assert metrics["negative_elbo"] == pytest.approx(parts_of_elbo, rel=1e-12)
        assert metrics["negative_elbo"] == pytest.approx(metrics["loss"] * 3 * 12 * 17, rel=1e-12)
    valid = [float(score) for score in scores_B[whole.weight_B > 0]]
    assert sum(valid) / 4 == pytest.approx(metrics["loss"], rel=1e-12)


def test_metrics_are_what_their_names_say() -> None:
    config = SMALL
    model, task = built(config, 1, 8, 8).eval(), AutoencoderTask(config)
    batch = batch_of(pictures(4, 1, 8, 8))
    with torch.inference_mode():
        metrics = task.metrics(task.metric_sums(model, batch))
        error_B = (model(batch.images()) - batch.images()).square().flatten(1).mean(1)
    assert metrics["mse"] == pytest.approx(float(error_B.mean()), rel=1e-5)
    assert metrics["psnr_of_mean_mse"] == pytest.approx(
        10 * math.log10(1 / float(error_B.mean())), rel=1e-5
    )
    assert metrics["mean_psnr"] == pytest.approx(
        float(np.mean([10 * math.log10(1 / error) for error in error_B.tolist()])), rel=1e-5
    )


@pytest.mark.parametrize("latent", ["vector", "map"])
def test_kl_is_that_of_torch_distributions(latent: str) -> None:
    model = built(replace(SMALL, latent=latent, variational=True), 3, 16, 16)
    image_BCHW = pictures(3, 3, 16, 16) / 255
    output = model(image_BCHW, for_loss=True)
    assert output.log_variance_BD is not None
    posterior = torch.distributions.Normal(output.mean_BD, (output.log_variance_BD / 2).exp())
    prior = torch.distributions.Normal(0.0, 1.0)
    expected_B = torch.distributions.kl_divergence(posterior, prior).flatten(1).sum(1)
    torch.testing.assert_close(kl_divergence(output), expected_B)


def test_training_draws_a_latent_and_evaluation_takes_the_mean() -> None:
    model = built(replace(SMALL, variational=True), 3, 16, 16)
    image_BCHW = pictures(2, 3, 16, 16) / 255
    mean_BD, log_variance_BD = model.posterior(image_BCHW)
    assert log_variance_BD is not None
    drawn_BCHW = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn_BCHW.append(model(image_BCHW))
    torch.manual_seed(1)
    latent_BD = mean_BD + torch.randn(2, 6) * (log_variance_BD / 2).exp()
    torch.testing.assert_close(drawn_BCHW[0], model.decode(latent_BD))
    assert torch.equal(drawn_BCHW[0], drawn_BCHW[1])
    assert not torch.equal(drawn_BCHW[0], drawn_BCHW[2])
    assert torch.equal(model.eval()(image_BCHW), model.decode(mean_BD))


def test_beta_grows_over_its_share_of_the_run() -> None:
    task = AutoencoderTask(replace(SMALL, variational=True, kl_weight=4.0, kl_warmup=0.5))
    assert [task.beta(share) for share in (0.0, 0.125, 0.25, 0.5, 1.0)] == [0, 1, 2, 4, 4]
    assert AutoencoderTask(replace(SMALL, variational=True, kl_weight=4.0)).beta(0.0) == 4


def test_cross_entropy_can_be_learnt_from_when_the_sigmoid_is_flat() -> None:
    config = replace(SMALL, loss="bce")
    model, task = built(config, 1, 8, 8), AutoencoderTask(config)
    with torch.no_grad():
        last = model.decoder[-1]
        assert isinstance(last, nn.ConvTranspose2d)
        assert last.bias is not None
        last.bias.fill_(60)
    batch = batch_of(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
    loss = task.loss_sum(model, batch)
    assert float(loss.detach()) == pytest.approx(60 * 64, rel=0.05)
    loss.backward()
    assert last.bias.grad is not None
    assert float(last.bias.grad) == pytest.approx(64, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": -1}, r"^model\.blocks = -1 "),
        ({"linear": True, "latent": "map"}, r"^model\.linear = true .* model\.latent = \"vector\""),
        ({"loss": "bce", "range": "symmetric"}, r"^model\.loss = \"bce\" .* model\.range"),
        ({"kl_weight": math.inf}, r"^model\.kl_weight = inf "),
        ({"kl_warmup": 1.5}, r"^model\.kl_warmup = 1\.5 "),
        ({"kl_weight": 0.5}, r"^model\.kl_weight = 0\.5 .* model\.variational = true"),
        ({"kl_warmup": 0.5}, r"^model\.kl_warmup = 0\.5 .* model\.variational = true"),
    ],
)
def test_settings_that_do_not_fit_name_their_key(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


def ssim_by_hand(first_HW: NDArray[np.float64], second_HW: NDArray[np.float64]) -> float:
    """The paper's equations 13 to 16, place by place."""
    height, width = first_HW.shape

    def gaussian(size: int) -> NDArray[np.float64]:
        places = min(11, size if size % 2 else size - 1)
        weight = np.exp(-0.5 * ((np.arange(places) - places // 2) / 1.5) ** 2)
        return weight / weight.sum()

    window = np.outer(gaussian(height), gaussian(width))
    rows, columns = window.shape
    values = []
    for top in range(height - rows + 1):
        for left in range(width - columns + 1):
            one = first_HW[top : top + rows, left : left + columns]
            two = second_HW[top : top + rows, left : left + columns]
            mean1, mean2 = (window * one).sum(), (window * two).sum()
            variance1 = (window * (one - mean1) ** 2).sum()
            variance2 = (window * (two - mean2) ** 2).sum()
            covariance = (window * (one - mean1) * (two - mean2)).sum()
            upper = (2 * mean1 * mean2 + 0.01**2) * (2 * covariance + 0.03**2)
            lower = (mean1**2 + mean2**2 + 0.01**2) * (variance1 + variance2 + 0.03**2)
            values.append(upper / lower)
    return float(np.mean(values))


@pytest.mark.parametrize("shape", [(1, 16, 19), (3, 11, 12), (2, 7, 30), (1, 1, 6), (4, 10, 2)])
def test_ssim_is_the_paper_s(shape: tuple[int, ...]) -> None:
    first, second = (pictures(3, *shape, seed=seed).double() / 255 for seed in (0, 1))
    second = (first + second) / 2
    found_B = ssim(first, second)
    for b in range(3):
        expected = np.mean([ssim_by_hand(first[b, c].numpy(), second[b, c].numpy())
                            for c in range(shape[0])])  # fmt: skip
        assert float(found_B[b]) == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(ssim(first, first), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(
        ssim(first.float(), second.float()), found_B.float(), rtol=0, atol=1e-5
    )


def test_ssim_keeps_its_digits_under_autocast() -> None:
    first, second = (pictures(2, 3, 16, 16, seed=seed) / 255 for seed in (0, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = ssim(first, second)
    assert torch.equal(under, ssim(first, second))


def test_ssim_is_scikit_image_s() -> None:
    """Of version 0.26: structural_similarity(first, second, data_range=1.0, sigma=1.5,
    gaussian_weights=True, use_sample_covariance=False)."""
    row_HW, column_HW = np.mgrid[0:24, 0:31]
    first = (np.sin(row_HW * 0.3) + np.cos(column_HW * 0.2) + 2) / 4
    second = (np.sin(row_HW * 0.3 + 0.4) + np.cos(column_HW * 0.25) + 2) / 4
    found = ssim(*(torch.from_numpy(image)[None, None] for image in (first, second)))
    assert float(found) == pytest.approx(0.730389128414637, rel=1e-12)
