"""How near what a model says comes to what was meant."""

from rouge_score.rouge_scorer import RougeScorer


def rouge_l(said: list[str], meant: list[str]) -> dict[str, float]:
    """{"rougeL": F of the longest common subsequence of words, mean over the texts}.

    As the package rouge-score has it, with its stemmer: words are runs of the letters a to z and of
    digits. Texts that are meant to have none of these say nothing and are left out; where there are
    no others, so is the measure. Lin 2004 (ROUGE: A Package for Automatic Evaluation of Summaries).
    """
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    found = [
        scorer.score(truth, text)["rougeL"].fmeasure
        for text, truth in zip(said, meant, strict=True)
        if any(c.isascii() and c.isalnum() for c in truth)
    ]
    return {"rougeL": sum(found) / len(found)} if found else {}
