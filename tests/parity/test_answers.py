"""ROUGE-L against package rouge-score, which has the words and the F1 of ROUGE's own script."""

import random

import numpy as np
import pytest
from rouge_score import rouge_scorer

from bmft.tasks import answers

TEXTS = ("There is a place in the city centre , Alimentum .", "naïve Café's 3.5-star", "", "a A a")


def test_rouge_l_is_that_of_rouge_score():
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    rng = random.Random(0)
    texts = [" ".join(rng.choices("a b c d e-f , 12 g's".split(), k=k % 20)) for k in range(60)]
    texts += TEXTS
    generated = rng.sample(texts, len(texts))
    references = [rng.sample(texts, 1 + i % 3) for i in range(len(texts))]
    expected = [
        scorer.score_multi(own, text)["rougeL"].fmeasure
        for text, own in zip(generated, references, strict=True)
    ]
    assert 20 < 100 * np.mean(expected) < 80
    assert answers.rouge_l(generated, references) == pytest.approx(100 * np.mean(expected))
