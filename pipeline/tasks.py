"""What a model is trained for: the loss of a batch as a sum, its weight, its metric sums.

Losses are sums, and the weight of a step is counted over all ranks before they are divided: so
neither the number of processes nor the lengths of the sequences on one of them changes the
gradient. Conversion and augmentation of images happen here, on the device.

Legend of shape suffixes: B batch, C channels, H height, W width, T tokens, V vocabulary.
"""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline import exposure
from pipeline.batch import Batch
from pipeline.decode import Decoding
from pipeline.grammar import TokenGrammar
from pipeline.metrics import CODE_COLUMNS, code_metrics, code_sums, psnr
from pipeline.models import Autoencoder, AutoencoderConfig, ModelConfig, Seq2Seq, Seq2SeqConfig
from pipeline.models.autoencoder import Output
from pipeline.ssim import ssim
from shards.format import BOS, EOS, PAD


class Task(Protocol):
    """One thing to train for. `dtype` is that of the images given to the model."""

    metric: str
    """the metric that says which checkpoint is best, unless validate.metric names another"""
    columns: tuple[str, ...]
    """names of what `metric_sums` gives"""
    decodes: bool
    """whether `loss_sum` reads the model out, in a number of passes that the batch decides"""

    def weight(self, batch: Batch) -> int:
        """What the loss sum of a batch on the CPU is divided by: valid tokens, or values."""

    def loss_sum(
        self,
        model: nn.Module,
        batch: Batch,
        *,
        bare: nn.Module | None = None,
        progress: float = 1.0,
        shift_px: int = 0,
    ) -> Tensor:
        """Scalar sum of the training loss over the batch's valid samples, on the batch's device.

        Args:
            model: as training calls it; its forward pass runs once.
            bare: the same one without what wraps it, for what needs no gradient; default: `model`.
            progress: the share of the run's steps that is done, in [0, 1].
        """

    def metric_sums(self, model: nn.Module, batch: Batch) -> list[float]:
        """`columns` summed over the batch. `model` is the bare one, in eval mode."""

    def metrics(self, sums: Sequence[float]) -> dict[str, float]:
        """Metrics of the summed columns."""


def build_task(
    config: ModelConfig, dtype: torch.dtype = torch.float32, decoding: Decoding | None = None
) -> Task:
    """The task of a model's configuration; codes are decoded greedily unless `decoding` says."""
    if isinstance(config, AutoencoderConfig):
        return AutoencoderTask(config, dtype)
    return Seq2SeqTask(config, dtype, decoding or Decoding())


def prepare_images(batch: Batch, dtype: torch.dtype, shift_px: int = 0) -> Tensor:
    """uint8 images to floats in [0, 1], channels last in memory; shifted when asked.

    A shift is drawn evenly from [-shift_px, shift_px] along both axes, from the sample's own key,
    whose two last digits in base 2 * shift_px + 1, less shift_px, are the pixels to move it down
    (the last) and to the right; what moves in repeats the border.
    """
    image_BCHW = batch.image_BCHW
    if shift_px:
        spread = 2 * shift_px + 1
        down_B = batch.augment_key_B % spread - shift_px
        right_B = batch.augment_key_B // spread % spread - shift_px
        _, _, height, width = image_BCHW.shape
        rows = torch.arange(height, device=down_B.device)
        columns = torch.arange(width, device=down_B.device)
        rows_BH = (rows - down_B[:, None]).clamp(0, height - 1)
        columns_BW = (columns - right_B[:, None]).clamp(0, width - 1)
        sample_B11 = torch.arange(len(image_BCHW), device=down_B.device)[:, None, None]
        image_BHWC = image_BCHW.permute(0, 2, 3, 1)
        image_BHWC = image_BHWC[sample_B11, rows_BH[:, :, None], columns_BW[:, None, :]]
        image_BCHW = image_BHWC.permute(0, 3, 1, 2)
    return as_floats(image_BCHW, dtype)


def as_floats(image_BCHW: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 images to floats in [0, 1], channels last in memory."""
    return image_BCHW.to(dtype=dtype, memory_format=torch.channels_last) / 255


class Seq2SeqTask:
    """Image to code: token-wise cross-entropy, padding left out. Training adds what `config` asks
    for: label smoothing, scheduled sampling, minimum risk."""

    metric = "exact_match"
    columns: tuple[str, ...] = ("samples", "tokens", "loss_sum", "correct_tokens", *CODE_COLUMNS)

    def __init__(
        self,
        config: Seq2SeqConfig,
        dtype: torch.dtype = torch.float32,
        decoding: Decoding = Decoding(),  # noqa: B008  frozen
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.decodes = config.risk_weight > 0
        self.decoding = decoding
        if decoding.grammar is not None:
            self.columns = (*self.columns, *_grammar_sums([], [], decoding.grammar))

    def weight(self, batch: Batch) -> int:
        return int((batch.token_BT[:, 1:] != PAD).sum())

    def loss_sum(
        self,
        model: nn.Module,
        batch: Batch,
        *,
        bare: nn.Module | None = None,
        progress: float = 1.0,
        shift_px: int = 0,
    ) -> Tensor:
        config, bare = self.config, bare or model
        image_BCHW = prepare_images(batch, self.dtype, shift_px)
        input_BT, target_BT = batch.token_BT[:, :-1], batch.token_BT[:, 1:]
        share = exposure.sampling_share(config, progress)
        if share:
            input_BT = exposure.sample_inputs(bare, image_BCHW, input_BT, share)
        if not config.risk_weight:
            logits_BTV = model(image_BCHW, input_BT)
            return self._cross_entropy(logits_BTV, target_BT, config.label_smoothing)
        codes = references(batch)
        found = exposure.find_candidates(bare, image_BCHW, codes, config.risk_beam)
        # One forward pass for both losses: a row for cross-entropy, then the candidates.
        token_BJT = found.token_BJT[:, :, :-1]
        padding = token_BJT.shape[2] - input_BT.shape[1]
        padded_BT = functional.pad(input_BT, (0, padding), value=PAD)
        token_MT = torch.cat([padded_BT[:, None], token_BJT], dim=1).flatten(0, 1)
        logits_MTV = _at_least_float32(model(image_BCHW, token_MT))
        logits_BJTV = logits_MTV.view(len(codes), -1, *logits_MTV.shape[1:])
        logits_BTV = logits_BJTV[:, 0, : input_BT.shape[1]]
        edits_B = exposure.expected_edits(logits_BJTV[:, 1:], found, config.risk_alpha)
        risk = (edits_B * batch.weight_B).sum()
        cross_entropy = self._cross_entropy(logits_BTV, target_BT, config.label_smoothing)
        return cross_entropy + config.risk_weight * risk

    def metric_sums(self, model: nn.Module, batch: Batch) -> list[float]:
        assert isinstance(model, Seq2Seq)
        image_BCHW = prepare_images(batch, self.dtype)
        target_BT = batch.token_BT[:, 1:]
        logits_BTV = model(image_BCHW, batch.token_BT[:, :-1])
        predicted = self.decoding.codes(model, image_BCHW, self.config.max_tokens)
        reference, grammar = references(batch), self.decoding.grammar
        return [
            float(batch.weight_B.sum()),
            float((target_BT != PAD).sum()),
            float(self._cross_entropy(logits_BTV, target_BT)),
            float(((logits_BTV.argmax(-1) == target_BT) & (target_BT != PAD)).sum()),
            *code_sums(predicted, reference),
            *(_grammar_sums(predicted, reference, grammar).values() if grammar else ()),
        ]

    def metrics(self, sums: Sequence[float]) -> dict[str, float]:
        samples, tokens, loss_sum, correct, *rest = sums
        code, counts = rest[: len(CODE_COLUMNS)], rest[len(CODE_COLUMNS) :]
        names = self.columns[len(self.columns) - len(counts) :]
        return {
            "loss": loss_sum / max(tokens, 1),
            "token_accuracy": correct / max(tokens, 1),
            **code_metrics(samples, code),
            **{name: count / samples for name, count in zip(names, counts, strict=True)},
        }

    @staticmethod
    def _cross_entropy(logits_BTV: Tensor, target_BT: Tensor, smoothing: float = 0.0) -> Tensor:
        return functional.cross_entropy(
            _at_least_float32(logits_BTV.flatten(0, 1)),
            target_BT.flatten(),
            ignore_index=PAD,
            reduction="sum",
            label_smoothing=smoothing,
        )


class AutoencoderTask:
    """Image to itself: the error of the reconstruction, and of a VAE the KL divergence beside it.

    Both are summed: the error over an image's channels and pixels, the KL over the latent's
    numbers, in nats. A batch's loss is the sum of `error + beta * KL` over its valid samples, and
    its weight their number of values, so a logged loss is a mean over values. With the
    cross-entropy and a beta of 1, that is the negative ELBO divided by channels x height x width;
    with the squared error, that of a Gaussian of variance beta / 2 about each value, up to a factor
    and a constant. `1 - SSIM` is an image's mean, and counts times its values.

    Outside of training the latent's mean is decoded, so the ELBO of the metrics lacks the noise of
    a draw.
    """

    metric = "mse"
    decodes = False
    columns: tuple[str, ...] = (
        "samples", "values", "error_sum", "kl_sum", "squared_error", "psnr_sum", "ssim_sum",
    )  # fmt: skip

    def __init__(self, config: AutoencoderConfig, dtype: torch.dtype = torch.float32) -> None:
        self.config = config
        self.dtype = dtype

    def weight(self, batch: Batch) -> int:
        return int(batch.weight_B.sum()) * batch.image_BCHW[0].numel()

    def loss_sum(
        self,
        model: nn.Module,
        batch: Batch,
        *,
        bare: nn.Module | None = None,
        progress: float = 1.0,
        shift_px: int = 0,
    ) -> Tensor:
        image_BCHW = prepare_images(batch, self.dtype, shift_px)
        output: Output = model(image_BCHW, for_loss=True)
        loss_B = self._errors(output, image_BCHW)
        if output.log_variance_BD is not None:
            loss_B = loss_B + self.beta(progress) * kl_divergence(output)
        return (loss_B * batch.weight_B).sum()

    def beta(self, progress: float) -> float:
        """What the KL weighs when this share of the run's steps is done."""
        warmup = self.config.kl_warmup
        return self.config.kl_weight * (min(1.0, progress / warmup) if warmup else 1.0)

    def metric_sums(self, model: nn.Module, batch: Batch) -> list[float]:
        assert isinstance(model, Autoencoder)
        image_BCHW = prepare_images(batch, self.dtype)
        output = model(image_BCHW, for_loss=True)
        found_BCHW = output.reconstruction_BCHW.to(self.dtype)
        squared_B = (found_BCHW - image_BCHW).double().square().flatten(1).sum(1)
        values = image_BCHW[0].numel()
        rows = zip(
            batch.weight_B.tolist(),
            self._errors(output, image_BCHW).tolist(),
            kl_divergence(output).tolist(),
            squared_B.tolist(),
            [psnr(squared / values) for squared in squared_B.tolist()],
            ssim(found_BCHW.double(), image_BCHW.double()).tolist(),
            strict=True,
        )
        valid = [row for row in rows if row[0]]
        sums = [math.fsum(row[column] for row in valid) for column in range(1, 6)]
        return [float(len(valid)), float(self.weight(batch)), *sums]

    def metrics(self, sums: Sequence[float]) -> dict[str, float]:
        samples, values, error, kl, squared, psnr_sum, ssim_sum = sums
        mse = squared / values
        loss = error + self.config.kl_weight * kl
        found = {
            "loss": loss / values,
            "mse": mse,
            "psnr_of_mean_mse": psnr(mse),
            "mean_psnr": psnr_sum / samples,
            "ssim": ssim_sum / samples,
        }
        if self.config.variational:
            # Of an image, as its ELBO has them: nats, where the error is a cross-entropy.
            found["reconstruction_error"] = error / samples
            found["kl"] = kl / samples
            found["negative_elbo"] = loss / samples
        return found

    def scores(self, output: Output, image_BCHW: Tensor) -> Tensor:
        """Each sample's own loss a value, at the full beta: how unlike the training images it is.

        Over a split, its mean is the metric `loss`.
        """
        loss_B = self._errors(output, image_BCHW)
        loss_B = loss_B + self.config.kl_weight * kl_divergence(output)
        return loss_B / image_BCHW[0].numel()

    def _errors(self, output: Output, image_BCHW: Tensor) -> Tensor:
        """`error_B`: of each sample, summed over its values."""
        # In the images' precision: under autocast the output may have fewer digits.
        found_BCHW = output.reconstruction_BCHW.to(image_BCHW.dtype)
        match self.config.loss:
            case "mse":
                error_BCHW = (found_BCHW - image_BCHW).square()
            case "l1":
                error_BCHW = (found_BCHW - image_BCHW).abs()
            case "bce":
                # Of logits: of probabilities that round to 0 or 1 nothing could be learnt.
                error_BCHW = functional.binary_cross_entropy_with_logits(
                    output.raw_BCHW.to(image_BCHW.dtype), image_BCHW, reduction="none"
                )
            case "ssim":
                return (1 - ssim(found_BCHW, image_BCHW)) * image_BCHW[0].numel()
        return error_BCHW.flatten(1).sum(1)


def kl_divergence(output: Output) -> Tensor:
    """`kl_B`: KL(N(mean, variance) || N(0, 1)) summed over the latent, in nats; 0 without one."""
    mean_BD, log_variance_BD = output.mean_BD, output.log_variance_BD
    if log_variance_BD is None:
        return mean_BD.new_zeros(len(mean_BD))
    kl_BD = (mean_BD.square() + log_variance_BD.exp() - 1 - log_variance_BD) / 2
    return kl_BD.flatten(1).sum(1)


def _grammar_sums(
    predicted: Sequence[Sequence[int]], reference: Sequence[Sequence[int]], grammar: TokenGrammar
) -> dict[str, float]:
    """How many codes the grammar accepts; and how many have their reference's skeleton, if it
    says what that is."""
    sums = {"validity": float(sum(map(grammar.accepts, predicted)))}
    if grammar.grammar.classes:
        pairs = zip(predicted, reference, strict=True)
        same = sum(grammar.skeleton(one) == grammar.skeleton(other) for one, other in pairs)
        sums["skeleton_match"] = float(same)
    return sums


def _at_least_float32(logits: Tensor) -> Tensor:
    """In half precision a sum over a batch's tokens loses digits."""
    return logits if logits.dtype == torch.float64 else logits.float()


def references(batch: Batch) -> list[list[int]]:
    """The codes of a batch as token ids, without <bos>, <eos> and padding."""
    return [[t for t in row if t not in (PAD, BOS, EOS)] for row in batch.token_BT.tolist()]
