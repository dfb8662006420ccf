"""Tables of every chunk's measured agreement and variance, and the dominant chunks by each criterion."""

from __future__ import annotations

import torch
from torch import Tensor

from fasa_flex.calibration.provenance import Provenance
from fasa_flex.calibration.rotary import RotaryLayout
from fasa_flex.core.budget import check_count
from fasa_flex.core.config import Sharing, check_choice
from fasa_flex.core.criteria import Criterion, least_squares_weights, most_explaining


class ChunkTables:
    """Measurements of every chunk of one model, and the dominant chunks by each criterion.

    The arguments are the attributes.

    Attributes:
        agreement: float32 [layers, query heads, chunks], mean contextual agreement in [0, 1].
        variance: float32 [layers, query heads, chunks], variance over keys of the chunk's part of the scaled logits;
            None in a profile of format 1.
        covariance: float32 [layers, Hkv, chunks, chunks], covariance over keys of the chunks' parts, averaged over a
            group's query heads; None in a profile of format 1.
        mean_key: float32 [layers, Hkv, head_dim], post-RoPE; the argument None is zeros.
        layout: the chunks.
        provenance: model, samples and settings of the calibration.

    Raises:
        ValueError: tables whose shapes do not fit each other, or with values out of range.
    """

    def __init__(
        self,
        agreement: Tensor,
        layout: RotaryLayout,
        provenance: Provenance,
        *,
        variance: Tensor | None = None,
        covariance: Tensor | None = None,
        mean_key: Tensor | None = None,
    ) -> None:
        chunks, kv_heads = len(layout.chunks), provenance.kv_heads
        if agreement.dim() != 3 or agreement.shape[2] != chunks:
            raise ValueError(f"agreement must be [layers, query heads, {chunks} chunks], got {tuple(agreement.shape)}.")
        for name in ("kv_heads", "top_k", "queries"):
            check_count(f"{name} of a profile", getattr(provenance, name), least=1)
        layers, query_heads, _ = agreement.shape
        if query_heads % kv_heads:
            raise ValueError(
                f"{query_heads} query heads do not divide into {kv_heads} key/value heads; calibrate again."
            )
        shared = (layers, kv_heads)
        self.layout = layout
        self.provenance = provenance
        self.agreement = _table("agreement", agreement, agreement.shape)
        self.variance = None if variance is None else _table("variance", variance, agreement.shape)
        self.covariance = None if covariance is None else _table("covariance", covariance, (*shared, chunks, chunks))
        mean_key = torch.zeros(*shared, layout.head_dim) if mean_key is None else mean_key
        self.mean_key = _table("mean_key", mean_key, (*shared, layout.head_dim))
        if not ((self.agreement >= 0) & (self.agreement <= 1)).all():
            raise ValueError("agreement must lie in [0, 1]; calibrate again.")
        for name, variances in (("variance", self.variance), ("covariance", self._own_covariance)):
            if variances is not None and (variances < 0).any():
                raise ValueError(f"{name} holds a negative variance; calibrate again.")

    @property
    def criteria(self) -> tuple[Criterion, ...]:
        """The criteria that these tables serve."""
        found: list[Criterion] = ["agreement"]
        found += [] if self.variance is None else ["variance"]
        found += [] if self.covariance is None else ["explained_variance", "weighted_variance"]
        return tuple(found)

    def dominant(self, n_tip: int, per: Sharing = "kv_head", criterion: Criterion | None = None) -> Tensor:
        """The ``n_tip`` dominant chunks of each head (the paper's I_dom, there by agreement); ties to the lower chunk.

        Args:
            n_tip: dominant chunks of a head.
            per: ``"kv_head"`` averages the table over the query heads of each GQA group; ``"query_head"`` does not.
            criterion: one of `criteria`; None is variance, or agreement if the variance was not measured.

        Returns:
            int64 [layers, Hkv or Hq, n_tip], chunk numbers, ascending.

        Raises:
            ValueError: ``n_tip`` out of range, or a criterion that this profile does not serve.
        """
        check_choice("per", per, Sharing)
        criterion = self.criterion(criterion)
        layers, _, chunks = self.agreement.shape
        if not 1 <= n_tip <= chunks:
            raise ValueError(f"n_tip must lie in 1..{chunks}, the chunks of a head, got {n_tip}.")
        if criterion in ("explained_variance", "weighted_variance"):
            if per != "kv_head":
                raise ValueError(
                    f"criterion {criterion!r} is measured for key/value heads; use per='kv_head' or 'variance'."
                )
            assert self.covariance is not None
            return most_explaining(self.covariance, n_tip)
        table = self._counts() if criterion == "agreement" or self.variance is None else self.variance.double()
        if per == "kv_head":
            table = table.view(layers, self.provenance.kv_heads, -1, chunks).mean(2)
        best = torch.argsort(table, dim=-1, descending=True, stable=True)[..., :n_tip]
        return best.sort(dim=-1).values

    def dominant_dims(self, n_tip: int, per: Sharing = "kv_head", criterion: Criterion | None = None) -> Tensor:
        """`dominant` as dimension pairs: int64 [layers, Hkv or Hq, n_tip, 2]."""
        return self.layout.chunks[self.dominant(n_tip, per, criterion)]

    def weights(self, n_tip: int, criterion: Criterion | None = None) -> Tensor | None:
        """Factors for the query's dominant chunks when keys are scored.

        Returns:
            float32 [layers, Hkv, n_tip] for ``"weighted_variance"``, in the order of `dominant`; otherwise None: 1.

        Raises:
            ValueError: as `dominant`.
        """
        chosen = self.dominant(n_tip, criterion=criterion)
        if criterion != "weighted_variance":
            return None
        assert self.covariance is not None
        return least_squares_weights(self.covariance, chosen)

    def criterion(self, name: Criterion | None = None) -> Criterion:
        """``name``, checked; None is variance, or agreement if the variance was not measured.

        Raises:
            ValueError: an unknown criterion, or one that this profile does not serve.
        """
        if name is None:
            return "agreement" if self.variance is None else "variance"
        check_choice("criterion", name, Criterion)
        if name not in self.criteria:
            raise ValueError(
                f"the profile of {self.provenance.model_id} serves {', '.join(self.criteria)} and was made before "
                f"criterion {name!r} was measured; calibrate again."
            )
        return name

    @property
    def _own_covariance(self) -> Tensor | None:
        return None if self.covariance is None else self.covariance.diagonal(dim1=-2, dim2=-1)

    def _counts(self) -> Tensor:
        """Agreement as float64 counts of common keys, so that equal counts tie exactly; not rounded if none fit."""
        counts = self.agreement.double() * self.provenance.queries * self.provenance.top_k
        whole = counts.round()
        rounding = max(0.1, float(counts.max()) * torch.finfo(torch.float32).eps)  # from 0.5 on, counts are not known
        return whole if (counts - whole).abs().max() < min(rounding, 0.5) else counts

    def tables(self) -> dict[str, Tensor]:
        """The measured tables by name, as arguments of `ChunkTables`; a mean key of zeros is left out."""
        mean_key = self.mean_key if self.mean_key.any() else None
        tables = {
            "agreement": self.agreement,
            "variance": self.variance,
            "covariance": self.covariance,
            "mean_key": mean_key,
        }
        return {name: table for name, table in tables.items() if table is not None}


def _table(name: str, table: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A checked copy of a table: float32, on CPU, contiguous."""
    table = table.detach().to("cpu", torch.float32, copy=True).contiguous()
    if table.shape != shape:
        raise ValueError(f"{name} must be {list(shape)} in this profile, got {list(table.shape)}; calibrate again.")
    if not table.isfinite().all():
        raise ValueError(f"{name} holds numbers that are not finite; calibrate again.")
    return table
