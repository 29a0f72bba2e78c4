"""The study's measures as metrics of the `evaluate` library, to be used and combined with others.

    import evaluate
    from trl_ift.study.metrics import ExactNumber, PreferenceAccuracy

    PreferenceAccuracy().compute(predictions=[[3.0, -5.0]], references=[[0.0, 0.0]])   # {"preference_accuracy": 1.0, ...}
    evaluate.combine([ExactNumber(), my_metric]).compute(predictions=replies, references=answers)

They need `pip install "trl-ift[eval]"`. The functions behind them are those of `evaluate_part`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import datasets
import evaluate

from .evaluate import StartScores, forward_kl, is_right, pair_measures
from .measures import mean_of


_CITATION = "https://huggingface.co/papers/2404.14723"
_LISTS = datasets.Sequence(datasets.Value("float64"))


class _StudyMetric(evaluate.Metric):
    """A metric whose description is its docstring; subclasses give `_values`."""

    features: datasets.Features
    _values: Callable[..., dict[str, Any]]

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, Any] | None:
        """See [`~evaluate.EvaluationModule.compute`]. Raises `ValueError` where there is nothing to compute from."""
        if predictions is None and references is None and self.writer is None:
            self._refuse()
        return super().compute(predictions=predictions, references=references, **kwargs)

    def _compute(self, predictions: Sequence[Any], references: Sequence[Any], **kwargs: Any) -> dict[str, Any]:
        if len(predictions) == 0:
            self._refuse()
        return self._values(predictions, references, **kwargs)

    def _refuse(self) -> NoReturn:
        raise ValueError(
            f"{type(self).__name__}: there are no predictions. Give some to `compute`, or to `add_batch` before."
        )

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

    features = datasets.Features({"predictions": _LISTS, "references": _LISTS})

    def _values(
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

    features = datasets.Features({"predictions": _LISTS, "references": _LISTS})

    def _values(
        self, predictions: Sequence[Sequence[float]], references: Sequence[Sequence[float]]
    ) -> dict[str, float]:
        for index, (before, after) in enumerate(zip(references, predictions, strict=True)):
            if len(before) != len(after):
                raise ValueError(
                    f"Sample {index} has {len(after)} log-probabilities in `predictions` and {len(before)} in `references`; "
                    "expected one for each of its tokens in both."
                )
        values = [forward_kl(before, after) for before, after in zip(references, predictions, strict=True)]
        return {"forward_kl": sum(values) / len(values)}


class ExactNumber(_StudyMetric):
    """Share of replies whose last number is that of the answer: `exact_number`.

    `predictions` are replies, `references` answers, as strings. `match="text"` compares the texts but for case and white space.
    """

    features = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})

    def _values(self, predictions: Sequence[str], references: Sequence[str], match: str = "number") -> dict[str, Any]:
        right = [is_right(reply, answer, match) for reply, answer in zip(predictions, references, strict=True)]
        return {"exact_number": sum(right) / len(right)}


class AnswerLength(_StudyMetric):
    """Length of answers: `answer_length`, tokens, and `cut_answers`, the share of them that reached the limit.

    `predictions` are numbers of tokens, `references` whether the answer was cut at the limit.
    """

    features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("bool")})

    def _values(self, predictions: Sequence[int], references: Sequence[bool]) -> dict[str, float]:
        if wrong := [number for number in predictions if number < 0]:
            raise ValueError(f"`predictions` holds {wrong[0]}; expected numbers of tokens.")
        return {
            "answer_length": mean_of(predictions, "", "", "tokens").value,
            "cut_answers": mean_of(map(float, references), "", "", "share").value,
        }


class TextNLL(_StudyMetric):
    """Negative log-likelihood of texts, nats a token: `neutral_nll`. Longer texts count for more, by their tokens.

    `predictions` are the NLLs (nats, sums over the tokens that the model predicts), `references` the numbers of these tokens.
    """

    features = datasets.Features({"predictions": datasets.Value("float64"), "references": datasets.Value("int64")})

    def _values(self, predictions: Sequence[float], references: Sequence[int]) -> dict[str, float]:
        if wrong := [number for number in references if number < 1]:
            raise ValueError(f"`references` holds {wrong[0]}; expected numbers of tokens, at least 1.")
        items = [nll / tokens for nll, tokens in zip(predictions, references, strict=True)]
        return {"neutral_nll": mean_of(items, "", "", "nats/token", weights=references).value}
