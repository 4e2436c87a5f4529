"""Sets a run up, as `pipeline.train` does, and saves it again at the step where it stands.

python -m tests.distributed.save_again --config FILE --run.resume CHECKPOINT --run.dir NEW
"""

import argparse
import sys

from pipeline import train
from pipeline.config import add_config_flags, config_from, parse_flags
from shards import storage


def main() -> int:
    parser = argparse.ArgumentParser()
    add_config_flags(parser)
    run = train.setup(config_from(parse_flags(parser, sys.argv[1:])), train.StopRequest(0))
    with run.saver:
        train.save(run)
        run.saver.finish()
    run.accelerator.end_training()
    return 0


if __name__ == "__main__":
    sys.exit(storage.command("train", main))
