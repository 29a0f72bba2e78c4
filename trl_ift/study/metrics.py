"""The study's measures as metrics of the `evaluate` library, to be used and combined with others.

    import evaluate
    from trl_ift.study.metrics import ExactNumber, PreferenceAccuracy

    PreferenceAccuracy().compute(predictions=[[3.0, -5.0]], references=[[0.0, 0.0]])   # {"preference_accuracy": 1.0, ...}
    evaluate.combine([ExactNumber(), my_metric]).compute(predictions=replies, references=answers)

They need `pip install "trl-ift[eval]"`. The functions behind them are those of `evaluate_part`.
"""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from .evaluate import StartScores, forward_kl, is_right, pair_measures


_CITATION = "https://huggingface.co/papers/2404.14723"


class _StudyMetric(evaluate.Metric):
    """A metric whose description is its docstring."""

    features: datasets.Features

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation=_CITATION,
            inputs_description="See the description.",
            features=self.features,
        )


class PreferenceAccuracy(_StudyMetric):
    """Implicit rewards of pairs: `preference_accuracy`, `reward_margin`, `chosen_drift`, `rejected_drift`.

    `predictions` are the log-probabilities (nats, sums over tokens) of the chosen and of the rejected answer under the model,
    `references` those under the model that it started from; both a list of two numbers a pair.
    """

    features = datasets.Features(
        {
            "predictions": datasets.Sequence(datasets.Value("float64")),
            "references": datasets.Sequence(datasets.Value("float64")),
        }
    )

    def _compute(
        self, predictions: Sequence[Sequence[float]], references: Sequence[Sequence[float]]
    ) -> dict[str, float]:
        for name, rows in (("predictions", predictions), ("references", references)):
            if wrong := [row for row in rows if len(row) != 2]:
                raise ValueError(
                    f"`{name}` holds a row of {len(wrong[0])} numbers; expected two, of chosen and of rejected."
                )
        start = StartScores(tuple(row[0] for row in references), tuple(row[1] for row in references), ())
        measures = pair_measures([row[0] for row in predictions], [row[1] for row in predictions], start)
        return {name: measure.value for name, measure in measures.items()}


class ForwardKL(_StudyMetric):
    """KL(start || model), nats a sample: `forward_kl`.

    `predictions` are the log-probabilities of the tokens of samples of the start under the model, `references` those under
    the start; both a list of numbers a sample.
    """

    features = datasets.Features(
        {
            "predictions": datasets.Sequence(datasets.Value("float64")),
            "references": datasets.Sequence(datasets.Value("float64")),
        }
    )

    def _compute(
        self, predictions: Sequence[Sequence[float]], references: Sequence[Sequence[float]]
    ) -> dict[str, float]:
        values = [forward_kl(before, after) for before, after in zip(references, predictions, strict=True)]
        return {"forward_kl": sum(values) / len(values)}


class ExactNumber(_StudyMetric):
    """Share of replies whose last number is that of the answer: `exact_number`.

    `predictions` are replies, `references` answers, as strings. `match="text"` compares the texts but for case and white space.
    """

    features = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})

    def _compute(self, predictions: Sequence[str], references: Sequence[str], match: str = "number") -> dict[str, Any]:
        right = [is_right(reply, answer, match) for reply, answer in zip(predictions, references, strict=True)]
        return {"exact_number": sum(right) / len(right)}
