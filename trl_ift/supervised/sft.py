"""TRL's supervised fine-tuning, as a stage of the library's commands."""

from dataclasses import dataclass

from trl import SFTConfig, SFTTrainer

from ..extension import RedactedConfig, SaveWithoutArguments


@dataclass
class PlainSFTConfig(RedactedConfig, SFTConfig):
    """[`~trl.SFTConfig`], of which trackers log no tokens."""


class PlainSFTTrainer(SaveWithoutArguments, SFTTrainer):
    """[`~trl.SFTTrainer`], which writes no pickles."""
