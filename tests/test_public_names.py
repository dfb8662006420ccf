"""What `import fasa_flex` gives."""

from __future__ import annotations

import fasa_flex


def test_every_public_name_is_there_and_no_other_is() -> None:
    for name in fasa_flex.__all__:
        assert getattr(fasa_flex, name) is not None
        assert name in dir(fasa_flex)
    assert not hasattr(fasa_flex, "fasa")
    assert fasa_flex.__version__.split(".")[0] == "0"
    assert fasa_flex.Fasa.__name__ == "Fasa"
    assert {fasa_flex.Scorer.__name__, fasa_flex.SequenceScorer.__name__} == {"Scorer", "SequenceScorer"}
