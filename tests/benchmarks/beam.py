"""Beam search over many screens at once, against the same search one screen at a time.

    OMP_NUM_THREADS=1 python tests/benchmarks/beam.py --source ../shared/data/pix2code-web/train
    OMP_NUM_THREADS=1 python tests/benchmarks/beam.py --run RUN --json        a trained model

Screens are packed to 160x96; without --source they are those of `pixloom synth`. Without --run the
weights are random, and every code is `--max-tokens` long. Both sides run in turn in one process
and must find the same. `--json` prints one JSON object on stdout's last line: the seconds of both,
their ratio, what greedy decoding and the grammar's mask take, the machine and the versions.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # this checkout, not an installed pixloom

from pipeline.decode import Hypothesis, beam_search, greedy
from pipeline.grammar import Grammar, TokenGrammar
from pipeline.models import Seq2Seq, Seq2SeqConfig, build_model
from pipeline.predict import Trained
from pipeline.tasks import as_floats
from shards import images, synth, tokens
from shards.format import EOS, ImagePolicy

WIDTH, HEIGHT = 160, 96
POLICY = ImagePolicy(WIDTH, HEIGHT, 3, "stretch", "png", 90, (255, 255, 255))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; what the figures are worth is the caller's business."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, help="folder of screens with .gui files [made up]")
    parser.add_argument("--run", type=Path, help="run or export of a seq2seq model [random]")
    parser.add_argument("--screens", type=int, default=250)
    parser.add_argument("--beam", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=64, help="[64; with --run, the model's]")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        source = arguments.source or made_up(Path(temporary) / "raw", arguments.screens)
        result = measure(source, arguments)
    if arguments.json:
        print(json.dumps(result))
    else:
        print("\n".join(f"{name:22} {value}" for name, value in result.items()))
    return 0


def made_up(folder: Path, samples: int) -> Path:
    """The built-in screens."""
    synth.main([str(folder), "--samples", str(samples), "--seed", "0"])
    return folder


def measure(source: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every way to decode, medians over the rounds, in turn."""
    files = sorted(source.glob("*.png"))[: arguments.screens]
    if arguments.run:
        trained = Trained.open(arguments.run)
        model, tokenizer, pixels_of = trained.model, trained.tokenizer, trained.pixels
        assert isinstance(model, Seq2Seq)
        max_tokens = model.config.max_tokens
    else:
        codes = [path.read_text() for path in sorted(source.glob("*.gui"))]
        counts = Counter(word for code in codes for word in tokens.words(code))
        tokenizer = tokens.load_tokenizer(tokens.train_word_tokenizer(counts, 1), "it")
        model, max_tokens = random_model(tokenizer.get_vocab_size()), arguments.max_tokens
        pixels_of = packed_pixels
    assert tokenizer is not None
    pixels = [pixels_of(path.read_bytes()) for path in files]
    image_BCHW = as_floats(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), torch.float32)
    mask = TokenGrammar(Grammar.open("web"), tokenizer, max_tokens).mask
    beam: dict[str, Any] = {"beam_size": arguments.beam}

    def one_by_one() -> list[list[Hypothesis]]:
        some = image_BCHW.split(1)
        return [beam_search(model, image_1CHW, max_tokens, **beam)[0] for image_1CHW in some]

    ways: dict[str, Callable[[], Any]] = {
        "batched": lambda: beam_search(model, image_BCHW, max_tokens, **beam),
        "one_by_one": one_by_one,
        "masked": lambda: beam_search(model, image_BCHW, max_tokens, **beam, mask=mask),
        "greedy": lambda: greedy(model, image_BCHW, max_tokens),
        "encode": lambda: model.encode(image_BCHW),
    }
    # CPU time, which other work on the machine hardly changes, is the wall's with one thread.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    taken: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, Any] = {}
    with torch.inference_mode():
        beam_search(model, image_BCHW[:2], max_tokens, **beam)  # the first call is slower
        for _ in range(arguments.rounds):
            for name, decode in ways.items():
                start_s = clock()
                found[name] = decode()
                taken[name].append(clock() - start_s)
                print(f"{name}: {taken[name][-1]:.3f} s", file=sys.stderr)
    differing = compare(found["batched"], found["one_by_one"])
    seconds = {name: statistics.median(times) for name, times in taken.items()}
    lengths = [len(hypotheses[0].tokens) for hypotheses in found["batched"]]
    return {
        "screens": len(files),
        "beam": arguments.beam,
        "model": str(arguments.run) if arguments.run else "random weights",
        "mean_tokens": statistics.mean(lengths),
        **{f"{name}_s": round(value, 3) for name, value in seconds.items()},
        "speedup": round(seconds["one_by_one"] / seconds["batched"], 2),
        "beam_over_greedy": round(seconds["batched"] / seconds["greedy"], 2),
        "masked_over_unmasked": round(seconds["masked"] / seconds["batched"], 3),
        "ties_decided_by_rounding": differing,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }


def packed_pixels(data: bytes) -> Any:
    """As packing scales an image file."""
    return images.decode(images.fit_and_encode(data, POLICY).data, 3)


def random_model(vocab_size: int) -> Seq2Seq:
    """The default model, of larger weights than training starts with: its codes differ."""
    torch.manual_seed(0)
    model = build_model(
        Seq2SeqConfig(),
        image_channels=3,
        image_height=HEIGHT,
        image_width=WIDTH,
        vocab_size=vocab_size,
    ).eval()
    assert isinstance(model, Seq2Seq)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
        model.head.bias[EOS] = -1e9
    return model.to(memory_format=torch.channels_last)


def compare(together: list[list[Hypothesis]], alone: list[list[Hypothesis]]) -> int:
    """How many screens have other codes, all of them equally likely. Raises AssertionError."""
    differing = 0
    for some, other in zip(together, alone, strict=True):
        scores = torch.tensor([[one.score for one in found] for found in (some, other)])
        torch.testing.assert_close(scores[0], scores[1], rtol=1e-4, atol=1e-3)
        differing += [one.tokens for one in some] != [one.tokens for one in other]
    assert differing <= len(together) // 50, f"{differing} of {len(together)} differ"
    return differing


if __name__ == "__main__":
    sys.exit(main())
