"""How the queries of a layer move with the position: in which planes they rotate and how fast, or not at all."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Plane = tuple[int, int]
"""Two dimensions of a head, ascending."""

_TOLERANCE = 1e-6
"""Least entry of a rotation that counts; with rope_theta 1e9 the slowest of 64 planes turns 1.4e-6 by position 1024."""

_STANDS_OUT = 8.0
"""Standard errors of the fit by which an entry of a rotation must exceed 0."""

_RESIDUAL = 1e-3
"""Largest deviation of queries from a rotation, or from standing still, relative to the size of a dimension."""


def is_still(query: Tensor) -> bool:
    """Whether queries [rows, P, D] are equal at all positions, within rounding."""
    scale = query.square().mean((0, 1)).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    return bool(((query - query[:, :1]) / scale).abs().max() < _RESIDUAL)


def fit_rotation(query: Tensor, positions: Tensor) -> dict[Plane, float]:
    """One layer's planes and their frequencies, from queries float64 [rows, P, D] at ``positions`` [P], the first 0.

    The weights of a norm may scale dimensions very differently, or to zero, before the rotation. So queries are
    normalised by dimension, and an entry of the rotation counts only if it exceeds the error of the fit.
    """
    scale = query.square().mean((0, 1)).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    query = query / scale
    start, ends = query[:, 0], query[:, 1:].transpose(0, 1)
    inverse = torch.linalg.pinv(start)
    rotations = (inverse @ ends).mT
    left = start @ rotations.mT - ends
    if left.abs().max() > _RESIDUAL:
        return {}
    error = left.square().mean((0, 1)).sqrt()[:, None] * inverse.norm(dim=1)
    off = (rotations - torch.diag_embed(rotations.diagonal(dim1=-2, dim2=-1))).abs().amax(0)
    off = torch.where(off > torch.clamp(_STANDS_OUT * error, min=_TOLERANCE), off, 0.0)
    strength, partner = torch.maximum(off, off.T).max(-1)
    planes = [
        (dim, int(partner[dim]))
        for dim in range(len(partner))
        if strength[dim] > 0 and dim < int(partner[dim]) and int(partner[partner[dim]]) == dim
    ]
    if not planes:
        return {}
    first, second = torch.tensor(planes).T
    size = start.norm(dim=0)
    seen = torch.where(size[first] >= size[second], first, second)  # the larger dimension shows the rotation of both
    other = first + second - seen
    sine = rotations[:, other, seen] * scale[other] / scale[seen]
    frequencies = _frequencies(torch.atan2(sine, rotations[:, seen, seen]), positions[1:])
    return dict(zip(planes, frequencies.tolist(), strict=True))


def _frequencies(angles: Tensor, positions: Tensor) -> Tensor:
    """Frequency of each plane in radians a position: the angle at position 1, refined at each later position.

    Args:
        angles: float64 [P, planes], in -pi..pi.
        positions: float64 [P].
    """
    frequency = angles[0] / positions[0]
    for angle, position in zip(angles[1:], positions[1:], strict=True):
        turns = ((frequency * position - angle) / (2 * math.pi)).round()
        frequency = (angle + 2 * math.pi * turns) / position
    return frequency.abs()
