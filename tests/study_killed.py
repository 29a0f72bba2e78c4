"""Run a study in a process that kills itself: `python study_killed.py SETTINGS.json CELLS`.

After `CELLS` trained cells it is killed (SIGKILL) in the training of the next one, behind its first checkpoint; with -1 it is
not killed.
"""

import json
import os
import signal
import sys
from pathlib import Path

from transformers import Trainer

from trl_ift.study import run as module
from trl_ift.study.plan import Study


def main() -> None:
    settings, cells = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2])
    trained = []
    train_cell, step = module.train_cell, Trainer.training_step

    def counted(study, cell, *args):
        print("training", cell.id, flush=True)
        trained.append(cell)
        return train_cell(study, cell, *args)

    def killed(self, *args, **kwargs):
        if len(trained) == cells + 1 and self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *args, **kwargs)

    module.train_cell = counted
    if cells >= 0:
        Trainer.training_step = killed
    module.run_study(Study(settings))


if __name__ == "__main__":
    main()
