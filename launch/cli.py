"""`pixloom VERB ...`: the same as `python -m PACKAGE.MODULE ...`, for people who type it by hand.

Launchers (`accelerate launch -m`, `torchrun -m`) start the modules themselves.
"""

import difflib
import importlib
import sys
from collections.abc import Sequence

VERBS = {
    "synth": ("shards.synth", "write the demo dataset: screenshots and their code"),
    "pack": ("shards.pack", "pack a folder into shards, or go on with a broken pack"),
    "index": ("shards.index", "make a dataset of another tool's WebDataset shards, in place"),
    "verify": ("shards.verify", "check a packed dataset: counts, sizes, hashes"),
    "show": ("shards.show", "draw a contact sheet and statistics of a packed dataset"),
    "train": ("pipeline.train", "train, or resume, a run (one process; see below for more)"),
    "validate": ("pipeline.validate", "all metrics of a checkpoint on a split"),
    "predict": ("pipeline.predict", "code or reconstructions of images, by a run or an export"),
    "latents": ("pipeline.latents", "latents of a split, and pictures of the latent space"),
    "order": ("pipeline.order", "the sample keys of one step"),
    "report": ("pipeline.report", "a run as one HTML page: curves, samples, what is mistaken"),
    "checkpoint": ("pipeline.checkpoint", "list, verify or export the checkpoints of a run"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Hands the rest of the command line to the verb's own `main`; returns its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return 0 if words else 2
    verb, *rest = words
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(VERBS)}"
        print(f"pixloom: error: no verb {verb!r}; {hint}", file=sys.stderr)
        return 2
    status: int = importlib.import_module(VERBS[verb][0]).main(rest)
    return status


def _usage() -> str:
    lines = [f"  {verb:12}{what}" for verb, (_, what) in VERBS.items()]
    return "\n".join(
        [
            "usage: pixloom VERB [-h] ...",
            "",
            "Shard once, train anywhere, resume exactly.",
            "",
            *lines,
            "",
            "Several processes: accelerate launch -m pipeline.train ... or",
            "torchrun --nproc-per-node N -m pipeline.train ...",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
