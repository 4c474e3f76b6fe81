"""Posteriors of answer qualities: a grid for one compared pair, expectation propagation for more.

Each compared pair is one factor of a prompt's posterior, a tabulated function of one gap. A prompt
with one such factor is exact on the grid. With more, every factor is replaced by a normal one that
matches its moments (Minka 2001; Rasmussen and Williams 2006, sec. 3.6), for many prompts at once.
This module knows tables of factors, not judges.
"""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from prefopt.labelling.judge_likelihood import GAP, STEP
from prefopt.labelling.observations import Encoded

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_CHUNK = 2_000_000  # grid values held at once by expectation propagation


def posterior_rows(log_density: Floats) -> tuple[Floats, Floats]:
    """Normalised weights on the grid and the log normaliser of each row."""
    top = log_density.max(axis=-1, keepdims=True)
    weight = np.exp(log_density - top)
    total = weight.sum(axis=-1, keepdims=True)
    return weight / total, (top + np.log(total * STEP))[..., 0]


def sum_rows(values: Floats, group: Ints, n_groups: int) -> Floats:
    """Sum rows of `values` with the same group."""
    n = len(group)
    chooser = csr_matrix((np.ones(n), (group, np.arange(n))), shape=(n_groups, n))
    return np.asarray(chooser @ values)


class Batch(msgspec.Struct, frozen=True, eq=False):
    """Prompts worked on together, padded to the same numbers of answers and compared pairs."""

    prompts: Ints  # (n,) their names
    names: tuple[Ints, ...]  # (n,) each prompt's answers
    k: int
    low: Ints  # (n, m) answer numbers 0 .. k - 1
    high: Ints  # (n, m)
    sign: Floats  # (n, m)
    state: Ints  # (n, m) row of the pair table
    real: NDArray[np.bool_]  # (n, m) False for padding
    pair: Ints  # (n, m) row of the encoded pairs
    tau: Floats  # (n, m) site precisions, kept between calls as a warm start
    nu: Floats  # (n, m)


class Propagated(msgspec.Struct, frozen=True, eq=False):
    """The joint normal posterior, its evidence, and each factor's own posterior of its gap."""

    mean: Floats  # (n, k)
    cov: Floats  # (n, k, k)
    log_z: float
    mass: Floats  # (pair states, gaps) summed posteriors of the gaps
    tilted: Floats  # (n, m, gaps)


def batches_of(
    encoded: Encoded, prompts: Ints, k: int | None, names: Ints | None = None
) -> list[Batch]:
    """Cut the compared pairs of `prompts` into batches of like size."""
    if not len(prompts):
        return []
    inside = np.flatnonzero(np.isin(encoded.prompt, prompts))
    starts = np.searchsorted(encoded.prompt[inside], prompts)
    ends = np.searchsorted(encoded.prompt[inside], prompts, side="right")
    sizes = ends - starts
    order = np.argsort(sizes, kind="stable")
    batches, at = [], 0
    while at < len(order):
        m = max(int(sizes[order[at]]), 1)
        # Prompts up to a third larger share a batch: little padding, few batches.
        limit = max(m + 1, (4 * m) // 3)
        stop = at
        while (
            stop < len(order)
            and sizes[order[stop]] <= limit
            and (stop - at + 1) * limit * len(GAP) <= _CHUNK + limit * len(GAP)
        ):
            stop += 1
        rows = order[at:stop]
        batches.append(_batch(encoded, inside, starts[rows], sizes[rows], prompts[rows], k, names))
        at = stop
    return batches


def _batch(
    encoded: Encoded,
    inside: Ints,
    starts: Ints,
    sizes: Ints,
    prompts: Ints,
    k: int | None,
    names: Ints | None,
) -> Batch:
    m = max(int(sizes.max()), 1)
    real = np.arange(m)[None, :] < sizes[:, None]
    if len(inside):
        pair = inside[np.where(real, starts[:, None] + np.arange(m), 0)]
    else:
        pair = np.zeros(real.shape, dtype=np.int64)
    low, high = np.zeros(pair.shape, dtype=np.int64), np.ones(pair.shape, dtype=np.int64)
    answers = []
    for n, size in enumerate(sizes):
        own = pair[n, :size]
        if names is None:
            mine = np.unique(np.concatenate([encoded.low[own], encoded.high[own]]))
        else:
            mine = names
        low[n, :size] = np.searchsorted(mine, encoded.low[own])
        high[n, :size] = np.searchsorted(mine, encoded.high[own])
        answers.append(mine)
    return Batch(
        prompts=prompts,
        names=tuple(answers),
        k=k or max(2, *(len(mine) for mine in answers)),
        low=low,
        high=high,
        sign=np.where(real, encoded.sign[pair], 1.0) if len(inside) else np.ones(pair.shape),
        state=np.where(real, encoded.state[pair], 0) if len(inside) else pair,
        real=real,
        pair=pair,
        tau=np.zeros(pair.shape),
        nu=np.zeros(pair.shape),
    )


def propagate(batch: Batch, table: Floats, k: int) -> Propagated:
    """Parallel expectation propagation with damping. Every factor is log-concave, so it settles.

    A factor depends on one gap only, so its moments come from the grid. `batch.tau` and `batch.nu`
    are left at the solution as the next start.
    """
    tau, nu = batch.tau, batch.nu
    n = len(tau)
    at = np.arange(n)[:, None]
    factor = np.where(batch.real[..., None], table[batch.state] if len(table) else 0.0, 0.0)
    for sweep in range(60):
        mean, cov, gap_mean, gap_var = _moments(batch, k)
        cavity_precision = np.maximum(1.0 / gap_var - tau, 1e-6)
        cavity_var = 1.0 / cavity_precision
        cavity_mean = cavity_var * (gap_mean / gap_var - nu)
        spread = (GAP - cavity_mean[..., None]) ** 2
        log_density = factor - 0.5 * spread * cavity_precision[..., None]
        tilted, log_sum = posterior_rows(log_density)
        tilted_mean = tilted @ GAP
        tilted_var = np.maximum(tilted @ GAP**2 - tilted_mean**2, 1e-8)
        new_tau = np.where(batch.real, np.maximum(1.0 / tilted_var - cavity_precision, 0.0), 0.0)
        new_nu = np.where(
            batch.real, tilted_mean / tilted_var - cavity_mean * cavity_precision, 0.0
        )
        change = float(np.maximum(np.abs(new_tau - tau), np.abs(new_nu - nu)).max())
        if change < 1e-4:
            break
        rate = 0.8 if sweep < 20 else 0.4
        tau += rate * (new_tau - tau)
        nu += rate * (new_nu - nu)
    # log Z of expectation propagation; each site is scaled to match its tilted normaliser.
    log_tilted = log_sum - 0.5 * np.log(2 * np.pi * cavity_var)
    var = 1.0 / (cavity_precision + tau)
    centre = var * (cavity_mean * cavity_precision + nu)
    log_scale = (
        log_tilted
        - 0.5 * np.log(var / cavity_var)
        - 0.5 * centre**2 / var
        + 0.5 * cavity_mean**2 * cavity_precision
    )
    _, log_det = np.linalg.slogdet(cov)
    pull = np.zeros((n, k))
    signed = nu * batch.sign
    np.add.at(pull, (at, batch.low), signed)
    np.add.at(pull, (at, batch.high), -signed)
    log_z = float(log_scale[batch.real].sum() + 0.5 * log_det.sum() + 0.5 * (pull * mean).sum())
    mass = sum_rows(tilted[batch.real], batch.state[batch.real], len(table))
    return Propagated(mean=mean, cov=cov, log_z=log_z, mass=mass, tilted=tilted)


def _moments(batch: Batch, k: int) -> tuple[Floats, Floats, Floats, Floats]:
    """Posterior of the qualities given the sites, and the mean and variance of each compared gap."""
    n, _ = batch.tau.shape
    at = np.arange(n)[:, None]
    precision = np.broadcast_to(np.eye(k), (n, k, k)).copy()
    np.add.at(precision, (at, batch.low, batch.low), batch.tau)
    np.add.at(precision, (at, batch.high, batch.high), batch.tau)
    np.add.at(precision, (at, batch.low, batch.high), -batch.tau)
    np.add.at(precision, (at, batch.high, batch.low), -batch.tau)
    cov: Floats = np.asarray(np.linalg.inv(precision), dtype=np.float64)
    pull = np.zeros((n, k))
    np.add.at(pull, (at, batch.low), batch.nu * batch.sign)
    np.add.at(pull, (at, batch.high), -batch.nu * batch.sign)
    mean: Floats = np.einsum("nij,nj->ni", cov, pull)
    gap_mean: Floats = (mean[at, batch.low] - mean[at, batch.high]) * batch.sign
    gap_var: Floats = (
        cov[at, batch.low, batch.low]
        + cov[at, batch.high, batch.high]
        - 2 * cov[at, batch.low, batch.high]
    )
    return mean, cov, gap_mean, gap_var
