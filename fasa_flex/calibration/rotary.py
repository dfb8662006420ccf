"""Frequency chunks: the pairs of dimensions of a head, RoPE's planes among them, detected by probing a model.

A dot product is the sum over the pairs of any pairing. RoPE's planes are the pairs of rotated dimensions whose part
depends on the distance of two tokens alone. Where nothing rotates this holds for every pair: a pair is then a chunk of
frequency 0. So one pairing serves rotated heads, unrotated dimensions beside rotated ones, and layers without RoPE.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fasa_flex.calibration.json_fields import field
from fasa_flex.calibration.rotation_fit import Plane, fit_rotation, is_still
from fasa_flex.core.budget import check_count
from fasa_flex.errors import NotSupportedError
from fasa_flex.hf.arrival import Arrival
from fasa_flex.hf.layer_kinds import WINDOW, other_kinds
from fasa_flex.hf.model_structure import attention_shape, check_supported
from fasa_flex.hf.probe import farthest_position, probe, why_dense
from fasa_flex.hf.wrappers import unwrapped

_BEFORE = 3
"""Tokens in front, in a second probe: behind them a convolution of up to four queries (Zaya's) sees equal ones."""


class RotaryLayout:
    """The frequency chunks of a head: first RoPE's 2-D planes, then pairs of unrotated dimensions.

    Attributes:
        chunks: int64 [head_dim // 2, 2], the two dimensions of each chunk.
        n_rotated: number of chunks that rotate; the others have frequency 0. 0 in a model without positions.
        frequencies: float64 [n_rotated], radians a position; None if the layout was not detected from a model.
        unrotated_layers: layers of the probed model without RoPE, where every chunk has frequency 0.
        unserved_layers: layers of the probed model whose attention FASA cannot serve; no profile measures them.

    Raises:
        ValueError: chunks that do not pair every dimension once, or other sizes out of range.
    """

    def __init__(
        self,
        chunks: Tensor,
        n_rotated: int,
        frequencies: Tensor | None = None,
        unrotated_layers: tuple[int, ...] = (),
        unserved_layers: tuple[int, ...] = (),
    ) -> None:
        if (
            chunks.dim() != 2
            or chunks.shape[1] != 2
            or chunks.flatten().sort().values.tolist() != list(range(chunks.numel()))
        ):
            raise ValueError(
                f"chunks must pair every dimension of a head exactly once, got {chunks.tolist()}; "
                "pass [head_dim // 2, 2]."
            )
        if not 0 <= n_rotated <= len(chunks):
            raise ValueError(f"n_rotated must lie in 0..{len(chunks)}, got {n_rotated}.")
        if frequencies is not None and (
            frequencies.shape != (n_rotated,) or not (frequencies.isfinite() & (frequencies != 0)).all()
        ):
            raise ValueError(
                f"frequencies must be {n_rotated} numbers, one for each chunk that turns, got {frequencies.tolist()}; "
                "pass radians a position."
            )
        self.chunks = chunks.long().cpu()
        self.n_rotated = n_rotated
        self.frequencies = frequencies
        self.unrotated_layers, self.unserved_layers = unrotated_layers, unserved_layers

    @classmethod
    def half_split(cls, head_dim: int, rotary_dim: int | None = None) -> RotaryLayout:
        """Planes (i, i + rotary_dim / 2), as of ``rotate_half`` in Llama, Mistral and Qwen."""
        rotary_dim = _check_dims(head_dim, rotary_dim)
        first = torch.arange(rotary_dim // 2)
        return cls._with_rest(torch.stack([first, first + rotary_dim // 2], dim=1), head_dim)

    @classmethod
    def interleaved(cls, head_dim: int, rotary_dim: int | None = None) -> RotaryLayout:
        """Planes (2i, 2i + 1), as in GPT-J, GLM and Cohere."""
        rotary_dim = _check_dims(head_dim, rotary_dim)
        return cls._with_rest(torch.arange(rotary_dim).view(-1, 2), head_dim)

    @classmethod
    def detect(cls, model: PreTrainedModel) -> RotaryLayout:
        """Detect the planes from the model's queries, for any model class.

        A model whose queries do not depend on the position has no planes: its chunks are pairs of neighbours.

        The probe feeds identical embeddings at several positions and replaces attention by zeros. So the hidden states
        of every layer do not depend on the position, and the query at position p is R_p times the query at position 0.
        Least squares gives R_p: its off-diagonal entries give the planes, its angles the frequencies. Models in half
        precision, whose rounding would hide the slow planes, are probed in float32.

        Raises:
            NotImplementedError: queries depend on the position and do not rotate in planes, or FASA can serve no layer
                (`fasa_flex.hf.probe.why_dense`).
        """
        model = unwrapped(model)
        check_supported(model)
        for before in (0, _BEFORE):
            fits, unrotated = _rotations(model, before)
            rotated = [layer for layer, turns in fits.items() if turns]
            if rotated or len(unrotated) == len(fits):
                break
        else:
            if all(other_kinds(model.config).get(layer) == WINDOW for layer in fits):  # RecurrentGemma before 5.24
                raise _serves_none(model, min(fits), f"a {WINDOW}")
            raise NotSupportedError(
                f"the queries of {type(model).__name__} depend on the position and do not rotate with it (no RoPE, "
                "absolute positions perhaps), so it has no frequency chunks; use a model with RoPE or no positions."
            )
        # a plane with zero weights in one layer shows in other layers
        turns = {plane: turn for layer in reversed(rotated) for plane, turn in fits[layer].items()}
        planes = sorted(turns)
        if len({dim for plane in planes for dim in plane}) < 2 * len(planes):
            raise NotSupportedError(
                f"the layers of {type(model).__name__} rotate different planes; FASA needs one layout for all."
            )
        layers, _, _, head_dim = attention_shape(model)
        layout = cls._with_rest(torch.tensor(planes, dtype=torch.long).view(-1, 2), head_dim)
        layout.frequencies = torch.tensor([turns[plane] for plane in planes], dtype=torch.float64)
        layout.unrotated_layers = tuple(unrotated)
        layout.unserved_layers = tuple(sorted({*range(layers)} - {*rotated, *unrotated}))
        return layout

    @classmethod
    def _with_rest(cls, planes: Tensor, head_dim: int) -> RotaryLayout:
        """``planes`` and pairs of the other dimensions; planes too slow to detect are paired by the same distance."""
        rest = set(range(head_dim)) - set(planes.flatten().tolist())
        low, high = planes[0].tolist() if len(planes) else (0, 0)
        slow = [[dim, dim + high - low] for dim in range(low, high) if {dim, dim + high - low} <= rest]
        still = sorted(rest - {dim for pair in slow for dim in pair})
        others = torch.tensor([*slow, *zip(still[::2], still[1::2], strict=True)], dtype=torch.long).view(-1, 2)
        return cls(torch.cat([planes, others]), len(planes))

    @property
    def head_dim(self) -> int:
        """Number of dimensions of a head."""
        return self.chunks.numel()

    def to_dict(self) -> dict[str, Any]:
        """The layout as JSON-ready values."""
        fields = {
            "chunks": self.chunks.tolist(),
            "n_rotated": self.n_rotated,
            "frequencies": None if self.frequencies is None else self.frequencies.tolist(),
            "unrotated_layers": list(self.unrotated_layers),
        }
        apart = (
            self.unserved_layers != self.unrotated_layers
        )  # before layers without RoPE were served, the two were one
        return {**fields, "unserved_layers": list(self.unserved_layers)} if apart else fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> RotaryLayout:
        """The inverse of `to_dict`.

        Raises:
            ValueError: a field that is missing or of another type.
        """
        chunks, frequencies = field(fields, "chunks", list), field(fields, "frequencies", list, type(None))
        check_count("n_rotated", field(fields, "n_rotated", int), 0)
        unrotated = tuple(field(fields, "unrotated_layers", list))
        unserved = tuple(field({"unserved_layers": list(unrotated), **fields}, "unserved_layers", list))
        try:
            pairs = torch.tensor(chunks)
            angles = None if frequencies is None else torch.tensor(frequencies, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError("chunks and frequencies must be lists of numbers") from error
        return cls(pairs, fields["n_rotated"], angles, unrotated, unserved)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RotaryLayout) and self.n_rotated == other.n_rotated and self.chunks.equal(other.chunks)

    def __hash__(self) -> int:
        return hash((self.n_rotated, *self.chunks.flatten().tolist()))

    def __repr__(self) -> str:
        first, last = self.chunks[0].tolist(), self.chunks[self.n_rotated - 1].tolist()
        kind = "planes" if self.n_rotated else "pairs"
        return f"RotaryLayout(head_dim={self.head_dim}, n_rotated={self.n_rotated}, {kind} {first} ... {last})"


def _check_dims(head_dim: int, rotary_dim: int | None) -> int:
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim must be even and at least 2, got {head_dim}.")
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise ValueError(f"rotary_dim must be even and lie in 2..{head_dim}, got {rotary_dim}.")
    return rotary_dim


def _rotations(model: PreTrainedModel, before: int) -> tuple[dict[int, dict[Plane, float]], list[int]]:
    """The planes and frequencies of every layer that FASA can serve, and the layers whose queries stand still.

    Raises:
        NotImplementedError: FASA can serve no layer.
    """
    positions, arrivals = _probe(model, before)
    reasons = why_dense(model, arrivals)
    if not set(arrivals) - set(reasons):
        raise _serves_none(model, *next(iter(reasons.items())))
    queries = {layer: _rows(arrived) for layer, arrived in arrivals.items() if layer not in reasons}
    fits = {layer: fit_rotation(query, positions) for layer, query in queries.items()}
    return fits, [layer for layer, query in queries.items() if not fits[layer] and is_still(query)]


def _serves_none(model: PreTrainedModel, layer: int, reason: str) -> NotSupportedError:
    """Make the error for a model none of whose layers FASA can serve."""
    return NotSupportedError(f"{type(model).__name__} has no layer that FASA can serve: layer {layer} has {reason}.")


def _probe(model: PreTrainedModel, before: int) -> tuple[Tensor, dict[int, Arrival]]:
    """Positions [P] = 0, 1, 2, 4, ..., and each layer's attention inputs for identical embeddings there.

    ``before`` more tokens at position 0 come first, and their queries are left out.

    A model in half precision, whose rounding hides the slow planes, is probed in float32: first with random queries,
    since RoPE does not depend on weights, then with copies of the weights if the queries do not span all dimensions.
    """
    _, query_heads, _, head_dim = attention_shape(model)
    last = farthest_position(model)
    positions = [0] * before + [0, *(2**power for power in range(last.bit_length()) if 2**power <= last)]
    samples = math.ceil(4 * head_dim / query_heads) + 4
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(samples, model.config.get_text_config().hidden_size, generator=generator)
    if model.dtype in (torch.float32, torch.float64):
        arrivals = probe(model, hidden, positions, weights=True)
    else:
        arrivals = probe(model, hidden, positions, dtype=torch.float32)
        if not all(_tells_apart(arrived) for arrived in arrivals.values()):
            arrivals = probe(model, hidden, positions, weights=True, dtype=torch.float32)
    seen = {layer: replace(arrived, query=arrived.query[:, :, before:]) for layer, arrived in arrivals.items()}
    return torch.tensor(positions[before:], dtype=torch.float64), seen


def _rows(arrived: Arrival) -> Tensor:
    """A layer's queries: float64 [rows, P, D]."""
    return arrived.query.flatten(0, 1).double()


def _tells_apart(arrived: Arrival) -> bool:
    """Whether a layer's queries at one position span all dimensions."""
    start = _rows(arrived)[:, 0]
    return int(torch.linalg.matrix_rank(start)) == start.shape[1]
