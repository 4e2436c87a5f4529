"""Trains as `pipeline.train` does, and is asked to stop when a step is done, as by SIGTERM.

python -m tests.distributed.stop_at STEP --config FILE ...
"""

import sys

from pipeline import train

if __name__ == "__main__":
    at = int(sys.argv[1])
    train_step = train.train_step

    def stopping_step(run: train.Run, *words: object) -> bool:
        if run.state.step == at - 1:
            run.stop.ask()
        return train_step(run, *words)  # type: ignore[arg-type]

    train.train_step = stopping_step
    status = train.main(sys.argv[2:])
    sys.exit(0 if status == train.EXIT_REQUEUE else status)
