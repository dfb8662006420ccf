"""The functions that the YAML files of this folder name; lm-eval (since 0.4.10) finds them by file."""

from fasa_flex.lm_eval.documents import (
    needle,
    needle_multikey,
    needle_results,
    needle_single,
    ppl,
    recall,
    recall_results,
)
from fasa_flex.lm_eval.long_documents import (
    copy,
    copy_results,
    count_facts,
    count_results,
    long_recall,
    multiquery,
    multivalue,
    position_results,
    ppl_position,
    share_results,
    variables,
)

__all__ = [
    "copy",
    "copy_results",
    "count_facts",
    "count_results",
    "long_recall",
    "multiquery",
    "multivalue",
    "needle",
    "needle_multikey",
    "needle_results",
    "needle_single",
    "position_results",
    "ppl",
    "ppl_position",
    "recall",
    "recall_results",
    "share_results",
    "variables",
]
