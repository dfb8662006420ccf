"""The functions that the YAML files beside this one name: every lm-eval since 0.4.10 finds them by file."""

from fasa_flex.lm_eval.documents import needle, needle_results, ppl, recall, recall_results

__all__ = ["needle", "needle_results", "ppl", "recall", "recall_results"]
