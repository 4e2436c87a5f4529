"""A run as one HTML page: what it learnt and how fast, and what its model makes of a split.

The page is a single file without scripts that needs no network. What is on it comes from the run's
folder, its checkpoint and its datasets; drawing is left to `pipeline.charts`, `pipeline.diffs` and
`pipeline.web`.

    python -m pipeline.report RUN --split test --out RUN/report.html
"""

import argparse
import collections
import contextlib
import io
import json
import math
import platform
import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rapidfuzz.distance import Levenshtein
from torch import Tensor

from pipeline import __version__, charts, checkpoint, diffs, web
from pipeline.batch import Batch, SampleError
from pipeline.build import autocast_of, dtype_of, for_reading, new_decoding, open_split
from pipeline.charts import Curve
from pipeline.config import to_dict
from pipeline.export import TrainedRun, open_run
from pipeline.latents import spread
from pipeline.markup import Html, data_url, join, page, tag
from pipeline.metrics import HIGHER_IS_BETTER, psnr
from pipeline.models import Autoencoder, Seq2Seq
from pipeline.order import SampleIds
from pipeline.runlog import read_rows
from pipeline.stream import BatchDataset, BatchPlan
from pipeline.tasks import build_task, prepare_images, references
from shards import engines, storage, tokens
from shards.errors import one_line, redact
from shards.format import BOS, TOKENIZER_NAME
from shards.images import to_picture
from shards.storage import UserError

SAMPLES = 256
"""of the split that are looked at, unless --samples says otherwise"""

_SHOWN = 6  # of them, and as many of the worst
_DRAWN = 24  # from a variational autoencoder's prior
_BATCH = 32
_ATTENDED_SAMPLES, _ATTENDED_TOKENS = 2, 12
_MOST_CONFUSIONS = 20
_MATRIX_TOKENS = 12
_MOST_LINES = 30  # of what comes without bound: damaged samples, checkpoints, validations
_MOST_PIXELS = 480  # of an image's longer side
_MOST_PNG_BYTES = 60_000
_DIFFERENCE_SCALE = 4
_HEAT_COLOUR, _HEAT_ALPHA = (150, 30, 210), 210

_NOT_DRAWN = {"step", "epoch", "skipped_steps", "bad_samples", "samples"}
_KNOWN_CURVES = {
    "lr": "learning rate",
    "samples_per_s": "throughput, samples a second",
    "data_wait": "data wait, share of the time",
    "grad_norm": "gradient norm",
}


@dataclass(frozen=True)
class Sample:
    """One sample of the split, and what the model makes of it."""

    key: str
    place: tuple[int, int]
    """shard of the split, and number in it"""
    error: float
    """edits between the codes; or mean squared error in [0,1]"""
    truth: list[int] = field(default_factory=list)
    guess: list[int] = field(default_factory=list)
    confidence: float | None = None
    """of the code: the model's own probability of it"""


@dataclass(frozen=True)
class Looked:
    """Samples spread evenly over a split."""

    samples: list[Sample]
    damaged: list[str]
    """a line for each that could not be read"""
    num_in_split: int

    @property
    def shown(self) -> list[Sample]:
        """Some of them, spread evenly too."""
        return [self.samples[at] for at in spread(_SHOWN, len(self.samples))]

    @property
    def worst(self) -> list[Sample]:
        """The largest error first; of equals, what the model was least sure of."""
        ranked = sorted(self.samples, key=lambda one: (-one.error, one.confidence or 0.0))
        return ranked[:_SHOWN]


def write_report(run: Path, split: str | None, which: str, out: str, num_samples: int) -> Looked:
    """Writes the page to `out`, having looked at `num_samples` samples of the split, 0 for all.

    `split` None is `val`, or the nearest to it that there is.

    Raises:
        UserError: the run has no checkpoint, or its dataset is not there; there is no such split.
    """
    trained = open_run(run, which)
    if split is None:
        has = trained.data.splits
        split = next((name for name in ("val", "test", "train") if name in has), has[0])
    report = _Report(run, trained, split)
    precision = autocast_of(for_reading(trained.config), report.device)
    with torch.inference_mode(), precision:
        looked = report.look(num_samples)
        storage.publish_text(report.page(looked), out)
    return looked


class _Report:
    """A run that is open, with the parts of its page."""

    def __init__(self, run: Path, trained: TrainedRun, split: str) -> None:
        self.run, self.trained, self.split = run, trained, split
        # Of the whole run: that of the checkpoint that is shown knows of nothing after it.
        self.state = checkpoint.newest_state(run)
        self.config, self.data = trained.config, trained.data
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = trained.model.eval().to(self.device)
        self.dataset: BatchDataset = open_split(self.config, self.data, split)
        self.tokenizer = None
        if trained.tokenizer_json is not None:
            where = storage.join(self.data.roots[0], TOKENIZER_NAME)
            self.tokenizer = tokens.load_tokenizer(trained.tokenizer_json, where)
        self.decoding = new_decoding(self.config, self.tokenizer)
        self.history = _History.read(run)

    # What the model makes of the split.

    def look(self, num_samples: int) -> Looked:
        """`num_samples` samples, spread evenly over the split, or all (0)."""
        total = sum(self.dataset.reader.shard_samples)
        count = min(num_samples or total, total)
        positions = np.arange(count, dtype=np.int64) * total // max(count, 1)
        samples: list[Sample] = []
        damaged: list[str] = []
        parts = (positions[first : first + _BATCH] for first in range(0, count, _BATCH))
        read = map(self._look_at, parts)
        shown = engines.progress(read, count, "samples", lambda one: len(one[0]) + len(one[1]))
        for found, bad in shown:
            samples += found
            damaged += bad
        return Looked(samples, damaged, total)

    def _look_at(self, positions: NDArray[np.int64]) -> tuple[list[Sample], list[str]]:
        """The samples at these positions of the split, and a line for each that is damaged."""
        starts = np.cumsum([0, *self.dataset.reader.shard_samples])
        shard = np.searchsorted(starts, positions, side="right") - 1
        places = list(zip(shard.tolist(), (positions - starts[shard]).tolist(), strict=True))
        batch = self._read(places)
        images = prepare_images(batch, dtype_of(self.config))
        kept = [row for row, weight in enumerate(batch.weight_B.tolist()) if weight]
        if isinstance(self.model, Seq2Seq):
            length = self.model.config.max_tokens
            best = [codes[0] for codes in self.decoding.hypotheses(self.model, images, length)]
            truths = references(batch)
            samples = [
                Sample(
                    key=batch.keys[row],
                    place=places[row],
                    error=Levenshtein.distance(truths[row], best[row].tokens),
                    truth=truths[row],
                    guess=best[row].tokens,
                    confidence=math.exp(best[row].score),
                )
                for row in kept
            ]
        else:
            mse_B = (self._reconstruct(images) - images).double().square().flatten(1).mean(1)
            samples = [Sample(batch.keys[row], places[row], float(mse_B[row])) for row in kept]
        return samples, list(batch.bad)

    def _read(self, places: Sequence[tuple[int, int]]) -> Batch:
        shard, index = np.asarray(places, dtype=np.int64).reshape(-1, 2).T
        ids = SampleIds(shard, index, np.zeros_like(shard))
        return self.dataset[BatchPlan(step=0, micro=0, first_place=0, ids=ids)].to(self.device)

    def _reconstruct(self, image_BCHW: Tensor) -> Tensor:
        assert isinstance(self.model, Autoencoder)
        reconstruction_BCHW: Tensor = self.model(image_BCHW)
        return reconstruction_BCHW.to(image_BCHW.dtype)

    def _source(self, sample: Sample) -> str:
        """The name of the file that was packed, or the key where the sample does not tell."""
        try:
            member = self.dataset.reader.read(*sample.place).members["json"]
            return str(json.loads(bytes(member))["source"])
        except (SampleError, KeyError, ValueError, TypeError):
            return sample.key

    # The page.

    def page(self, looked: Looked) -> str:
        is_code = isinstance(self.model, Seq2Seq)
        sections = {
            "Summary": self._summary(looked),
            "Curves": self._curves(),
            "Samples": self._samples(looked.shown, "sample"),
            "Attention": self._attention(looked.worst) if is_code else None,
            "Worst samples": self._samples(looked.worst, "worst"),
            "Token confusion": self._confusion(looked.samples) if is_code else None,
            "Drawn images": self._drawn(),
            "Validations": self._validations(),
            "Configuration": self._configuration(),
            "Versions": self._versions(),
            "Dataset": self._dataset(looked),
            "Checkpoints": self._checkpoints(),
        }
        shown = {title: body for title, body in sections.items() if body is not None}
        name = "/".join(self.run.resolve().parts[-2:]).lstrip("/")
        links = (tag("a", title, href=f"#{_anchor(title)}") for title in shown)
        body = tag(
            "body",
            tag("header", tag("h1", name), tag("nav", join(links, " "))),
            tag("main", join(_section(title, body) for title, body in shown.items())),
            tag("footer", f"Written by pixloom {__version__}"),
        )
        return page(f"{name} - pixloom report", STYLE, body)

    def _summary(self, looked: Looked) -> Html:
        state, model = self.state, self.config.model
        size = sum(parameter.numel() for parameter in self.model.parameters())
        metric = self.config.validate.metric or build_task(model).metric
        best = "no validation yet"
        if state.best_metric is not None:
            best = f"{metric} {_number(state.best_metric)} at step {state.best_step}"
        counted = f"{len(looked.samples)} of the {looked.num_in_split} samples of {self.split}"
        facts: dict[str, object] = {
            "model": f"{model.name}, {size / 1e6:.2f} M parameters",
            "checkpoint": f"{checkpoint.name_of(self.trained.chosen)} of {self.run}",
            "best validation": best,
            "trained on": self.data.label,
            "looked at for this page": counted,
        }
        if not looked.samples:
            return _facts(facts)
        errors = np.array([one.error for one in looked.samples])
        if isinstance(self.model, Seq2Seq):
            num_tokens = sum(len(one.truth) for one in looked.samples)
            facts |= {
                "exact match of these": f"{_number(float((errors == 0).mean()))}, "
                f"{int((errors == 0).sum())} of {len(errors)}",
                "token error rate of these": _number(errors.sum() / max(num_tokens, 1)),
            }
        else:
            low, middle, high = np.quantile(errors, (0, 0.5, 1))
            facts |= {
                "mean squared error of these, in [0,1]": f"{_number(errors.mean())}, from "
                f"{_number(low)} to {_number(high)}, median {_number(middle)}",
                "PSNR of that mean": f"{_number(psnr(float(errors.mean())))} dB",
            }
        return _facts(facts)

    def _curves(self) -> Html:
        figures = list(self.history.charts())
        if not figures:
            return tag("p", "Nothing is logged yet.")
        note = "Long curves are thinned out: the line is the mean of neighbours, the band around it"
        return join(
            [
                tag("div", join(figures), class_="grid"),
                tag("p", f"{note} reaches from the lowest to the highest of them.", class_="note"),
            ]
        )

    def _samples(self, samples: Sequence[Sample], prefix: str) -> Html:
        if not samples:
            return tag("p", "None could be read.")
        batch = self._read([sample.place for sample in samples])
        if not isinstance(self.model, Seq2Seq):
            return self._reconstructions(samples, batch)
        legend = tag(
            "p", "Marked: ", tag("mark", "tokens that differ", title="differs"),
            " between prediction and truth, by a shortest edit of one to the other.",
            class_="note",
        )  # fmt: skip
        articles = (
            self._code_sample(sample, image_CHW, f"{prefix}-{number}")
            for number, (sample, image_CHW) in enumerate(
                zip(samples, batch.image_BCHW, strict=True), 1
            )
        )
        return join([legend, *articles])

    def _code_sample(self, sample: Sample, image_CHW: Tensor, anchor: str) -> Html:
        exact = sample.error == 0
        verdict = (
            "exact" if exact else f"{sample.error:.0f} edits to {len(sample.truth)} tokens of truth"
        )
        pictures = [_image_figure(image_CHW, "image")]
        truth, guess = self._text(sample.truth), self._text(sample.guess)
        if _is_web(truth):
            pictures.append(_screen(guess))
        parts = [tag("div", join(pictures), class_="pictures")]
        in_truth, in_guess = diffs.differing(sample.truth, sample.guess)
        name = "prediction, equal to the truth" if exact else "prediction"
        parts.append(self._code_figure(name, sample.guess, in_guess, "not in the truth"))
        if not exact:
            parts.append(self._code_figure("truth", sample.truth, in_truth, "not predicted"))
        return tag(
            "article",
            tag(
                "h3",
                f"{self._source(sample)}: ",
                tag("span", verdict, class_="good" if exact else "bad"),
                f", confidence {_number(sample.confidence or 0.0)}",
            ),
            tag("div", join(parts), class_="sample exact" if exact else "sample"),
            id=anchor,
        )

    def _code_figure(self, name: str, ids: Sequence[int], marked: set[int], why: str) -> Html:
        assert self.tokenizer is not None
        keeps = tokens.keeps_white_space(self.tokenizer)
        texts: list[str] = []
        places: set[int] = set()
        at = 0
        for count, text in tokens.decode_apart(self.tokenizer, ids):
            if not marked.isdisjoint(range(at, at + count)):
                places.add(len(texts))
            texts.append(text)
            at += count
        code = diffs.code_block(texts, places, why, name, keeps)
        return tag("figure", code, tag("figcaption", name), class_="code")

    def _text(self, ids: Sequence[int]) -> str:
        assert self.tokenizer is not None
        return tokens.decode(self.tokenizer, ids)

    def _reconstructions(self, samples: Sequence[Sample], batch: Batch) -> Html:
        image_BCHW = prepare_images(batch, dtype_of(self.config))
        found_BCHW = self._reconstruct(image_BCHW)
        difference_BCHW = ((found_BCHW - image_BCHW).abs() * _DIFFERENCE_SCALE).clamp(0, 1)
        figures = []
        for sample, *triple in zip(samples, image_BCHW, found_BCHW, difference_BCHW, strict=True):
            names = ("image", "reconstruction", f"difference, {_DIFFERENCE_SCALE} times as strong")
            images = (
                _image_figure(_as_bytes(one), name) for one, name in zip(triple, names, strict=True)
            )
            title = f"{self._source(sample)}: mean squared error {_number(sample.error)}"
            figures.append(
                tag("article", tag("h3", title), tag("div", join(images), class_="triple"))
            )
        return tag("div", join(figures), class_="reconstructions")

    def _drawn(self) -> Html | None:
        """What the decoder of a variational autoencoder makes of draws from the prior."""
        model = self.model
        if not isinstance(model, Autoencoder) or not model.config.variational:
            return None
        generator = torch.Generator().manual_seed(0)
        latent_BD = torch.randn(_DRAWN, *model.latent_shape, generator=generator)
        image_BCHW = model.decode(latent_BD.to(self.device, dtype_of(self.config)))
        images = (_image_figure(_as_bytes(one.float()), "") for one in image_BCHW)
        note = "Latents drawn from N(0, 1), decoded."
        return join([tag("p", note, class_="note"), tag("div", join(images), class_="drawn")])

    def _attention(self, samples: Sequence[Sample]) -> Html | None:
        """Where the model looked while it wrote; None for models that do not look."""
        assert isinstance(self.model, Seq2Seq)
        samples = [sample for sample in samples if sample.guess][:_ATTENDED_SAMPLES]
        if not self.model.attends or not samples:
            return None
        articles = []
        for sample in samples:
            batch = self._read([sample.place])
            images = prepare_images(batch, dtype_of(self.config))
            token_BT = torch.tensor([[BOS, *sample.guess]], device=self.device)
            weight_BATN, (rows, columns) = self.model.attention(images, token_BT)
            weight_TRC = weight_BATN[0].float().mean(0).reshape(-1, rows, columns)
            words = [at for at, one in enumerate(sample.guess) if self._is_word(one)]
            places = [words[at] for at in spread(_ATTENDED_TOKENS, len(words))]
            figures = (
                tag(
                    "figure",
                    tag("div", _heat(weight_TRC[place]), class_="seen"),
                    tag("figcaption", f"{place + 1}: ", tag("code", self._shown(one))),
                )
                for place, one in ((place, sample.guess[place]) for place in places)
            )
            image = _image_url(batch.image_BCHW[0])
            ratio = f"{batch.image_BCHW.shape[3]}/{batch.image_BCHW.shape[2]}"
            style = f"--image:url({image});--ratio:{ratio}"
            articles.append(
                tag(
                    "article",
                    tag("h3", self._source(sample)),
                    tag("div", join(figures), class_="heats", style=style),
                )
            )
        note = "Where the model looked when it wrote the token: the mean of its heads."
        return join([tag("p", note, class_="note"), *articles])

    def _is_word(self, token: int) -> bool:
        return any(map(str.isalnum, self._text([token])))

    def _shown(self, token: int | None) -> str:
        return "none" if token is None else diffs.visible(self._text([token]))

    def _confusion(self, samples: Sequence[Sample]) -> Html:
        found = diffs.confusions((one.truth, one.guess) for one in samples)
        if not found:
            return tag("p", f"No token differs in {len(samples)} samples.")
        true = collections.Counter(token for one in samples for token in one.truth)
        rows: list[tuple[object, ...]] = [("truth", "prediction", "times", "of all such in truth")]
        for (truth, guess), count in found.most_common(_MOST_CONFUSIONS):
            share = f"{count / true[truth]:.2%}" if truth is not None else ""
            shown = (tag("code", self._shown(one)) for one in (truth, guess))
            rows.append((*shown, count, share))
        left_out = len(found) - (len(rows) - 1)
        note = (
            "By a shortest edit of each true code to its prediction. none: the token was missing, "
            "or was one too many."
        )
        return join(
            [
                tag("p", note, class_="note"),
                _table(rows),
                tag("p", f"And {left_out} pairs more.", class_="note") if left_out else "",
                tag("h3", "Heat map of the most frequent"),
                self._matrix(found),
            ]
        )

    def _matrix(self, found: diffs.Confusions) -> Html:
        sides: tuple[collections.Counter[int | None], ...]
        sides = (collections.Counter(), collections.Counter())
        for pair, count in found.items():
            for side, token in zip(sides, pair, strict=True):
                side[token] += count
        truths, guesses = ([one for one, _ in side.most_common(_MATRIX_TOKENS)] for side in sides)
        most = max(found.values())
        head = [tag("th", "truth \\ prediction"), *(tag("th", self._shown(g)) for g in guesses)]
        rows = [tag("tr", join(head))]
        for truth in truths:
            cells = [tag("th", self._shown(truth), scope="row")]
            for guess in guesses:
                count = found.get((truth, guess), 0)
                shade = f"--heat:{round(70 * count / most)}%"
                cells.append(tag("td", count or "", style=shade, class_="heat"))
            rows.append(tag("tr", join(cells)))
        return tag("div", tag("table", join(rows)), class_="wide", tabindex=0)

    def _validations(self) -> Html:
        """The rows of the log, and what `pixloom validate` left in the run's folder."""
        parts: list[object] = []
        rows = self.history.validations[-_MOST_LINES:]
        if rows:
            names = list(dict.fromkeys(name for row in rows for name in row))
            cells = [[_number(row.get(name, "")) for name in names] for row in rows]
            left_out = len(self.history.validations) - len(rows)
            title = "While it was trained" + (f", the last {len(rows)}" if left_out else "")
            parts += [tag("h3", title), _table([names, *cells])]
        for path in sorted(self.run.glob("validate-*.json")):
            with contextlib.suppress(OSError, ValueError):
                facts = json.loads(path.read_text("utf-8"))
                if isinstance(facts, dict):  # else a stranger's
                    parts.append(tag("h3", f"Of {path.name}"))
                    parts.append(_facts({name: _number(value) for name, value in facts.items()}))
        return join(parts or [tag("p", "None yet.")])

    def _configuration(self) -> Html:
        rows: list[tuple[object, ...]] = [("key", "value")]
        for section, body in to_dict(self.config).items():
            rows += [(f"{section}.{name}", tag("code", value)) for name, value in body.items()]
        return _table(rows)

    def _versions(self) -> Html:
        device = platform.processor() or platform.machine()
        if self.device.type == "cuda":
            device = torch.cuda.get_device_name()
        trained = {f"{name}, of training": v for name, v in self.trained.meta.versions.items()}
        return _facts(
            {
                **trained,
                "pixloom, of this page": __version__,
                "torch, of this page": torch.__version__,
                "Python": platform.python_version(),
                "NumPy": np.__version__,
                "device": f"{self.device.type} ({device})",
                "system": platform.platform(terse=True),
            }
        )

    def _dataset(self, looked: Looked) -> Html:
        state = self.state
        parts: list[object] = []
        for root, manifest in zip(self.data.roots, self.data.manifests, strict=True):
            image, tokenizer = manifest.image, manifest.tokenizer
            size = f"{image.width}x{image.height}" if image.width else "of several sizes"
            rows: list[tuple[object, ...]] = [("split", "samples", "shards", "bytes")]
            for name, shards in manifest.splits.items():
                num_bytes = sum(shard.bytes for shard in shards)
                rows.append((name, manifest.num_samples(name), len(shards), num_bytes))
            facts: dict[str, object] = {
                "digest": tag("code", manifest.data_digest),
                "kind": manifest.kind,
                "images": f"{size}, {image.channels} channels, fit {image.fit}, as {image.encode}",
            }
            if tokenizer is not None:
                facts["tokens"] = (
                    f"vocabulary of {tokenizer.vocab_size}, the longest code has "
                    f"{tokenizer.longest} with <bos> and <eos>"
                )
            skips = ", ".join(f"{count} {cause}" for cause, count in manifest.skips.items())
            facts["left out when it was packed"] = skips or "nothing"
            parts += [tag("h3", root), _facts(facts), _table(rows)]
        if len(self.data.roots) > 1:
            parts.append(_facts({"digest of all": tag("code", self.data.data_digest)}))
        parts += [
            tag("h3", "Damaged samples"),
            _facts(
                {
                    "met in training": len(state.damaged),
                    f"met in {self.split}, for this page": len(looked.damaged),
                    "steps skipped, their gradient was not finite": state.skipped_steps,
                }
            ),
        ]
        lines = [*state.damaged.values(), *looked.damaged]
        if lines:
            more = [f"and {len(lines) - _MOST_LINES} more"] if len(lines) > _MOST_LINES else []
            parts.append(tag("pre", "\n".join([*lines[:_MOST_LINES], *more]), tabindex=0))
        return join(parts)

    def _checkpoints(self) -> Html:
        found = checkpoint.committed(checkpoint.directory_of(self.run))
        best = self.state.best_step
        rows: list[tuple[object, ...]] = [("checkpoint", "notes")]
        for path in found[-_MOST_LINES:]:
            notes = ["shown here"] if path == self.trained.chosen else []
            notes += ["best validation"] if checkpoint.step_of(path) == best else []
            rows.append((checkpoint.name_of(path), ", ".join(notes)))
        return _table(rows)


@dataclass(frozen=True)
class _History:
    """What a run logged: quantities by name, and the rows of its validations.

    A quantity is one array of step, value, step, value: there may be a million rows.
    """

    training: dict[str, "array[float]"]
    validation: dict[str, "array[float]"]
    validations: list[dict[str, Any]]

    @classmethod
    def read(cls, run: Path) -> "_History":
        history = cls({}, {}, [])
        for row in read_rows(run):
            curves = history.training
            if "split" in row:
                curves = history.validation
                history.validations.append(row)
            for name, value in row.items():
                if name not in _NOT_DRAWN and isinstance(value, int | float):
                    curves.setdefault(name, array("d")).extend((row["step"], value))
        return history

    def charts(self) -> Iterator[Html]:
        """A figure of each quantity, the losses in one."""
        last = max((points[-2] for points in self.training.values()), default=0.0)
        both = {"training": self.training, "validation": self.validation}
        loss = [Curve.of(name, one["loss"]) for name, one in both.items() if "loss" in one]
        if loss:
            yield _figure("loss", loss, last, "lowest")
        for name, points in self.validation.items():
            if name != "loss":
                best = "highest" if name in HIGHER_IS_BETTER else "lowest"
                yield _figure(f"validation {name}", [Curve.of(name, points)], last, best)
        known = [name for name in _KNOWN_CURVES if name in self.training]
        for name in dict.fromkeys([*known, *self.training]):
            if name != "loss":
                title = _KNOWN_CURVES.get(name, name)
                yield _figure(title, [Curve.of(name, self.training[name])], last)


def _figure(title: str, curves: Sequence[Curve], last: float, best: str = "") -> Html:
    """A chart of the steps up to `last`, with its figures in words; `best` is which value is."""
    finite = [curve.finite for curve in curves if len(curve.finite.steps)]
    words = []
    for curve in finite:
        name = f"{curve.name} " if len(curves) > 1 else ""
        low, high = float(curve.values.min()), float(curve.values.max())
        range_ = f"from {_number(low)} to {_number(high)}"
        if best:
            at = int(curve.values.argmax() if best == "highest" else curve.values.argmin())
            range_ = f"{best} {_number(curve.values[at])} at step {curve.steps[at]:.0f}"
        words.append(f"{name}last {_number(curve.values[-1])}, {range_}")
    missing = sum(len(curve.steps) for curve in curves) - sum(len(one.steps) for one in finite)
    if missing:
        words.append(f"{missing} values are not finite")
    caption = tag("figcaption", tag("b", title), ": ", "; ".join(words))
    if not finite:
        return tag("figure", caption)
    picture = charts.draw(finite, last, may_be_log=best == "lowest")
    source = data_url(picture, "image/svg+xml")
    return tag("figure", tag("img", src=source, alt=f"Curve of {title}"), caption)


def _screen(code: str) -> Html:
    """The page of a predicted web program, small; or why there is none."""
    name = "page of the prediction"
    try:
        source = web.render(code)
    except web.WebError as error:
        return tag("figure", tag("p", f"No page: {error}", class_="bad"), tag("figcaption", name))
    frame = tag("iframe", srcdoc=source, sandbox="", title=name, tabindex=-1)
    return tag("figure", tag("div", frame, class_="screen"), tag("figcaption", name))


def _is_web(code: str) -> bool:
    try:
        web.parse(code)
    except web.WebError:
        return False
    return True


def _image_figure(image_CHW: Tensor, name: str) -> Html:
    longest = max(image_CHW.shape[1:])
    image = tag(
        "img", src=_image_url(image_CHW), alt=name, class_="pixels" if longest <= 64 else None
    )
    return tag("figure", image, tag("figcaption", name))


def _as_bytes(image_CHW: Tensor) -> Tensor:
    """uint8, of an image in [0,1]."""
    return (image_CHW * 255).round().to(torch.uint8)


def _image_url(image_CHW: Tensor) -> str:
    """A uint8 image as it is, if it is not large and a screen can show its channels."""
    image = to_picture(image_CHW.permute(1, 2, 0).cpu().numpy())
    image.thumbnail((_MOST_PIXELS, _MOST_PIXELS))
    data = _encoded(image, "PNG")
    if len(data) <= _MOST_PNG_BYTES or image.mode == "RGBA":
        return data_url(data, "image/png")
    return data_url(_encoded(image, "JPEG", quality=88), "image/jpeg")


def _heat(weight_RC: Tensor) -> Html:
    """Attention over the grid, a pixel a cell, as a veil over the image."""
    share_RC = weight_RC.cpu().numpy()
    share_RC = share_RC / max(float(share_RC.max()), 1e-12)
    pixels = np.zeros((*share_RC.shape, 4), np.uint8)
    pixels[..., :3] = _HEAT_COLOUR
    pixels[..., 3] = np.round(share_RC * _HEAT_ALPHA)
    source = data_url(_encoded(Image.fromarray(pixels), "PNG"), "image/png")
    return tag("img", src=source, alt="attention")


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def _section(title: str, body: Html) -> Html:
    anchor = _anchor(title)
    heading = tag("h2", tag("a", title, href=f"#{anchor}"))
    return tag("section", heading, body, id=anchor)


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _facts(facts: Mapping[str, object]) -> Html:
    rows = (
        tag("tr", tag("th", name, scope="row"), tag("td", _clean(value)))
        for name, value in facts.items()
    )
    return tag("div", tag("table", join(rows)), class_="wide", tabindex=0)


def _table(rows: Sequence[Sequence[object]]) -> Html:
    """The first row is the heading."""
    head, *others = rows
    lines = [tag("tr", join(tag("th", cell, scope="col") for cell in head))]
    lines += [tag("tr", join(tag("td", _clean(cell)) for cell in row)) for row in others]
    return tag("div", tag("table", join(lines)), class_="wide", tabindex=0)


def _clean(cell: object) -> object:
    """Without credentials, which URLs may hold."""
    return cell if isinstance(cell, Html) else redact(str(cell))


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float | np.floating) else str(value)


STYLE = """
:root{color-scheme:light}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1180px;padding:0 1rem 3rem;color:#24292f;background:#fff;
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
header{padding:1rem 0;border-bottom:1px solid #d0d7de}
h1{font-size:1.7rem;margin:.2rem 0 .6rem;overflow-wrap:anywhere}
h2{font-size:1.3rem;margin:2.2rem 0 .8rem;padding-bottom:.2rem;border-bottom:1px solid #d0d7de}
h3{font-size:1rem;margin:1.3rem 0 .5rem;overflow-wrap:anywhere}
a{color:#0550ae}nav a{margin-right:.9rem;white-space:nowrap}
h2 a{color:inherit;text-decoration:none}h2 a:hover{text-decoration:underline}
figure{margin:0}figcaption,.note{color:#57606a;font-size:.85rem}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr));gap:1rem}
.grid img{width:100%;height:auto}
.sample{display:flex;flex-wrap:wrap;gap:1rem;align-items:flex-start}
.pictures{display:grid;gap:.7rem;width:320px;max-width:100%;
grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr))}
.exact .pictures{width:660px}
.pictures img{width:100%;height:auto;border:1px solid #d0d7de}
.code{flex:1 1 300px;min-width:0}
.screen{width:320px;max-width:100%;height:184px;overflow:hidden;border:1px solid #d0d7de}
.screen iframe{width:1200px;height:690px;border:0;transform:scale(.26667);transform-origin:0 0;
pointer-events:none}
pre{margin:0;padding:.5rem .7rem;max-height:28rem;overflow:auto;background:#f6f8fa;
font:12px/1.45 ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace;white-space:pre-wrap;
overflow-wrap:anywhere}
code{font-family:ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace;font-size:.85em;
overflow-wrap:anywhere}
mark{background:#ffd8d3;color:#82071e;text-decoration:underline;font-weight:600}
.good{color:#116329}.bad{color:#a40e26}
.wide{overflow-x:auto;margin:.3rem 0 .8rem}
table{border-collapse:collapse;font-size:.88rem}
th,td{padding:.25rem .7rem;border:1px solid #d0d7de;text-align:left;vertical-align:top}
th{background:#f6f8fa;font-weight:600}
.heat{background:color-mix(in srgb,#cf222e var(--heat),#fff);text-align:right}
.reconstructions{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr));
gap:0 1.5rem}
.drawn{display:grid;grid-template-columns:repeat(auto-fill,minmax(80px,1fr));gap:.5rem}
.triple{display:grid;grid-template-columns:repeat(3,1fr);gap:.5rem}
.triple img,.drawn img{width:100%;height:auto;border:1px solid #d0d7de}
.pixels{image-rendering:pixelated}
.heats{display:grid;grid-template-columns:repeat(auto-fill,minmax(160px,1fr));gap:.7rem}
.seen{aspect-ratio:var(--ratio);background:var(--image) 0 0/100% 100%;border:1px solid #d0d7de}
.seen img{display:block;width:100%;height:100%}
footer{margin-top:2rem;color:#57606a;font-size:.85rem}
@media print{nav{display:none}body{max-width:none}pre{max-height:none}
article,figure,tr{break-inside:avoid}*{print-color-adjust:exact}}
"""


def main(argv: Sequence[str] | None = None) -> int:
    """`pixloom report`."""
    parser = argparse.ArgumentParser(
        prog="pixloom report",
        description="Write a run as one HTML page: curves, samples beside predictions, the worst "
        "of them, what is taken for what, configuration, versions.",
    )
    add = parser.add_argument
    add("run", metavar="RUN", type=Path, help="the run's folder")
    add("--split", help="split of the dataset [val, or what there is]")
    add("--checkpoint", default="best", help="best, last, or a step's number [best]")
    add("--out", metavar="FILE", help="page to write [RUN/report.html]")
    add("--samples", type=int, default=SAMPLES, metavar="N",
        help=f"samples of the split to look at, spread evenly; 0: all [{SAMPLES}]")  # fmt: skip
    add("--json", action="store_true", help="one JSON object on stdout")

    def action() -> int:
        arguments = parser.parse_args(argv)
        out = arguments.out or str(arguments.run / "report.html")
        if not out.endswith((".html", ".htm")):
            raise UserError(f"--out {out}: the report is a page; name a file as in report.html")
        if arguments.samples < 0:
            raise UserError(f"--samples {arguments.samples}: 0 for all, or a number of them")
        run, split, which = arguments.run, arguments.split, arguments.checkpoint
        looked = write_report(run, split, which, out, arguments.samples)
        row = {"page": out, "samples": len(looked.samples), "damaged": len(looked.damaged)}
        print(json.dumps(row) if arguments.json else one_line(out))
        return 0

    return storage.command("report", action)


if __name__ == "__main__":
    sys.exit(main())
