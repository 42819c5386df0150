"""Attention and the scores of tokens in float64, group by group: see oracles.py."""

import math
from typing import Any

import torch
from fuzz.cases import Case, members
from torch import Tensor

Numbers = dict[str, tuple[Tensor, Tensor]]  # by the name of the result: true values and units


def gradients(
    case: Case, results: dict[str, Tensor], inputs: dict[str, Any], units: bool = False
) -> dict[str, Tensor]:
    """The gradients of the leaves; with `units`, from the absolute values of the gradients."""
    outputs = {name: x for name, x in results.items() if x.requires_grad}
    if not outputs:
        return {f"grad {name}": torch.zeros_like(inputs[name]) for name in case.leaves}
    given = [case.grad(name, x) for name, x in outputs.items()]
    grads = torch.autograd.grad(
        list(outputs.values()),
        [inputs[name] for name in case.leaves],
        [x.abs() for x in given] if units else given,
        allow_unused=True,
    )
    return {
        f"grad {name}": torch.zeros_like(inputs[name]) if x is None else x
        for name, x in zip(case.leaves, grads, strict=True)
    }


class _Softmax:
    """The attention weights of one group, and the units of what is computed from them.

    Args:
        queries, keys: rows of q and of k.
    """

    def __init__(
        self, inputs: dict[str, Any], options: dict[str, Any], queries: list[int], keys: list[int]
    ) -> None:
        q, k = inputs["q"].double()[queries], inputs["k"].double()[keys]
        scale = q.shape[2] ** -0.5 if options["scale"] is None else options["scale"]
        self.q, self.k, self.scale = q.detach().abs(), k.detach().abs(), abs(scale)
        logits = torch.einsum("qhd,khd->hqk", q, k) * scale
        terms = torch.einsum("qhd,khd->hqk", self.q, self.k) * self.scale
        seen = torch.ones(len(queries), len(keys), dtype=torch.bool)
        limits, table, key_bias = (
            options["groups"].query_limits,
            inputs.get("bias"),
            inputs.get("key_bias"),
        )
        if limits is not None:
            seen = torch.arange(len(keys)) < limits[queries][:, None]
        self.rows: Tensor | None = None  # of the table, [queries, keys]
        if table is not None:
            self.rows = _rows_of(options["positions"], queries, keys)
            added = table.double()[self.rows].permute(2, 0, 1)
            logits, terms = logits + added, terms + added.detach().abs()
        if key_bias is not None:
            added = key_bias.double()[keys]
            seen = seen & (added > -math.inf)
            added = added.masked_fill(added == -math.inf, 0)
            logits, terms = logits + added, terms + added.abs()
        none = ~seen.any(-1, keepdim=True)
        logits = logits.masked_fill(~seen, -math.inf)
        largest = logits.detach().amax(-1, keepdim=True).masked_fill(none, 0)
        weights = (logits - largest).exp()
        total = weights.sum(-1, keepdim=True)
        self.weights = weights / total.masked_fill(none, 1)
        self.lse = (total.detach().log() + largest)[..., 0]
        # An error of a logit is a relative error of all weights of its row.
        self.factor = 1 + terms.amax(-1, keepdim=True) + math.log(k.shape[0])
        # A weight that is smaller than the least normal number of float32 may be zero.
        info = torch.finfo(torch.float32)
        self.sizes = (self.weights.detach() + info.tiny / info.eps) * self.factor * seen

    def add_grad_units(
        self, grad: Tensor, units: "_Rows", queries: list[int], keys: list[int], poisoned: bool
    ) -> None:
        """Add the units of the gradients, from those of the weights, [H, queries, keys]."""
        weights = self.weights.detach()
        grad = grad + (weights * grad).sum(-1, keepdim=True)
        grad = self.sizes * grad
        if self.rows is not None:
            by_row = grad.permute(1, 2, 0).flatten(0, 1)
            units.add("bias", self.rows.flatten().tolist(), by_row, poisoned)
        grad = grad * self.scale
        units.add("q", queries, torch.einsum("hqk,khd->qhd", grad, self.k), poisoned)
        units.add("k", keys, torch.einsum("hqk,qhd->khd", grad, self.q), poisoned)


def _rows_of(positions: Any, queries: list[int], keys: list[int]) -> Tensor:
    """The rows of the table, [queries, keys]."""
    difference = positions.query_codes.long()[queries][:, None] - positions.key_codes.long()[keys]
    least = -positions.wrap
    return difference.clamp(least, least + positions.rows - 1) % positions.rows


def log_sum_exp(inputs: dict[str, Any], options: dict[str, Any]) -> Tensor:
    """The log-sum-exp of every query, [H, num_queries]; -inf without keys."""
    q = inputs["q"].double()
    result = q.new_full((q.shape[1], q.shape[0]), -math.inf)
    for queries, keys in members(options["groups"]):
        if queries and keys:
            result[:, queries] = _Softmax(inputs, options, queries, keys).lse
    return result


class _Rows:
    """Rows of a result, written group by group; and units of gradients, which add up."""

    def __init__(self, inputs: dict[str, Any]) -> None:
        self.units = {
            name: torch.zeros_like(inputs[name], memory_format=torch.contiguous_format).detach()
            for name in ("q", "k", "v", "bias")
            if inputs.get(name) is not None
        }

    def add(self, name: str, rows: list[int], unit: Tensor, poisoned: bool) -> None:
        unit = torch.full_like(unit, math.nan) if poisoned else unit
        self.units[name].index_add_(0, torch.tensor(rows, dtype=torch.int64), unit)


def _in_order(parts: list[Tensor], rows: list[list[int]], empty: Tensor) -> Tensor:
    order = torch.tensor(sum(rows, []), dtype=torch.int64).argsort()
    return torch.cat([empty, *parts])[order]


def attention(case: Case, inputs: dict[str, Any], options: dict[str, Any]) -> Numbers:
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    groups = members(options["groups"])
    kind = options["return_scores"]
    outs, out_units, lses, lse_units, scores, score_units = [], [], [], [], [], []
    softmaxes: list[_Softmax | None] = []
    for g, (queries, keys) in enumerate(groups):
        free = math.nan if g in case.poisoned else 1.0
        softmax = _Softmax(inputs, options, queries, keys) if queries and keys else None
        softmaxes.append(softmax)
        if softmax is None:
            outs.append(q[queries, :, : v.shape[2]] * 0)
            out_units.append(outs[-1].detach() * free)
            lses.append(q.new_full((len(queries), q.shape[1]), -math.inf))
            lse_units.append(torch.full_like(lses[-1], free))
            scores.append(k[keys].sum((1, 2)) * 0)
            score_units.append(scores[-1].detach() * free)
            continue
        outs.append(torch.einsum("hqk,khd->qhd", softmax.weights, v[keys]))
        sizes = torch.einsum("hqk,khd->qhd", softmax.sizes, v[keys].detach().abs())
        out_units.append(sizes * free)
        lses.append(softmax.lse.T)
        lse_units.append(softmax.factor[..., 0].T * free)
        first = slice(0, 1) if kind == "cls" else slice(None)
        scores.append(softmax.weights[:, first].mean((0, 1)))
        score_units.append(softmax.sizes[:, first].mean((0, 1)) * free)
    rows = [queries for queries, _ in groups]
    empty = q[:0, :, : v.shape[2]]
    out = _in_order(outs, rows, empty)
    values = {"out": out}
    results = {"out": (out, _in_order(out_units, rows, empty))}
    if options["return_lse"]:
        empty = q.new_zeros(0, q.shape[1])
        results["lse"] = (
            _in_order(lses, rows, empty).T, _in_order(lse_units, rows, empty).T,
        )  # fmt: skip
    if kind:
        values["scores"] = torch.cat([k[:0].sum((1, 2)), *scores])
        results["scores"] = (values["scores"], torch.cat([k.new_zeros(0), *score_units]))
    grads = gradients(case, values, inputs)
    if not grads:
        return results

    # The gradients of results that do not depend on a leaf are not asked for.
    grad_out = case.grad("out", out).abs() if out.requires_grad else torch.zeros_like(out)
    scored = kind is not None and values["scores"].requires_grad
    units, entry = _Rows(inputs), 0
    for g, ((queries, keys), softmax) in enumerate(zip(groups, softmaxes, strict=True)):
        entries = slice(entry, entry + len(keys))
        entry += len(keys)
        if softmax is None:
            if g in case.poisoned:
                units.add("q", queries, q[queries].detach(), True)
                units.add("k", keys, k[keys].detach(), True)
                units.add("v", keys, v[keys].detach(), True)
            continue
        of_weights = torch.einsum("qhd,khd->hqk", grad_out[queries], v[keys].detach().abs())
        if scored:
            share = case.grad("scores", values["scores"])[entries].abs() / k.shape[1]
            if kind == "cls":
                of_weights[:, :1] += share
            else:
                of_weights += share / len(queries)
        softmax.add_grad_units(of_weights, units, queries, keys, g in case.poisoned)
        unit_v = torch.einsum("hqk,qhd->khd", softmax.sizes, grad_out[queries])
        units.add("v", keys, unit_v, g in case.poisoned)
    for name, x in grads.items():
        results[name] = (x, units.units[name.removeprefix("grad ")])
    return results


def token_scores(case: Case, inputs: dict[str, Any], options: dict[str, Any]) -> Numbers:
    groups, k = members(options["groups"]), inputs["k"]
    if case.op == "key_similarity_scores":
        return _similarity(case, k, groups)
    q, v = inputs["q"], inputs.get("v")
    all_scores, all_units, kept = [k[:0].sum((1, 2))], [k.new_zeros(0)], []
    for g, (queries, keys) in enumerate(groups):
        free = math.nan if g in case.poisoned else 1.0
        scoring = queries if case.op == "mean_attention_scores" else queries[:1]
        kept.append(None)
        if not scoring or not keys:
            all_scores.append(k[keys].sum((1, 2)) * 0)
            all_units.append(all_scores[-1].detach() * free)
            continue
        softmax = _Softmax(inputs, options, scoring, keys)
        scores = softmax.weights.mean((0, 1))
        units = softmax.sizes.mean((0, 1))
        norms = total = None
        if v is not None:
            norms = torch.linalg.vector_norm(v[keys], dim=(1, 2))
            weighted = scores * norms
            total = weighted.sum()
            total = total if total > 0 else total + 1
            kept[-1] = (softmax, scoring, scores.detach(), norms.detach(), total.detach())
            scores = weighted / total
            units = units * norms.detach() / total.detach() + scores.detach() * softmax.factor.max()
        else:
            kept[-1] = (softmax, scoring, scores.detach(), None, None)
        all_scores.append(scores)
        all_units.append(units * free)
    out = torch.cat(all_scores)
    results = {"out": (out, torch.cat(all_units))}
    grads = gradients(case, {"out": out}, inputs)
    if not grads:
        return results
    grad_out, entry = case.grad("out", out).abs(), 0
    units = _Rows(inputs)
    for g, ((queries, keys), parts) in enumerate(zip(groups, kept, strict=True)):
        grad = grad_out[entry : entry + len(keys)]
        final = out.detach()[entry : entry + len(keys)]
        entry += len(keys)
        if g in case.poisoned:
            units.add("q", queries, q[queries].detach(), True)
            units.add("k", keys, k[keys].detach(), True)
            if v is not None:
                units.add("v", keys, v[keys].detach(), True)
        if parts is None:
            continue
        softmax, scoring, cls, norms, total = parts
        if norms is not None:
            grad = (grad + (grad * final).sum()) / total
            rows = v[keys].detach()
            unit = grad * cls * softmax.factor.max() / torch.where(norms > 0, norms, 1)
            units.add("v", keys, unit[:, None, None] * rows.abs(), False)
            grad = grad * norms
        share = grad / (k.shape[1] * len(scoring))
        share = share.expand(k.shape[1], len(scoring), -1)
        softmax.add_grad_units(share, units, scoring, keys, g in case.poisoned)
    for name, x in grads.items():
        results[name] = (x, units.units[name.removeprefix("grad ")])
    return results


def _similarity(case: Case, k: Tensor, groups: list[tuple[list[int], list[int]]]) -> Numbers:
    scores, units = [], []
    for g, (_, keys) in enumerate(groups):
        mean, size = k[keys].mean(1), k[keys].abs().mean(1)
        norms = torch.linalg.vector_norm(mean, dim=1)
        norms = torch.where(norms > 0, norms, 1)
        # How much larger the terms of the mean over heads are than the mean.
        relative = torch.linalg.vector_norm(size, dim=1) / norms
        for j in range(len(keys)):
            others = range(1, len(keys), 2) if j % 2 == 0 else ()
            cosines = [float(mean[j] @ mean[i] / norms[j] / norms[i]) for i in others]
            scores.append(-max(cosines, default=-math.inf))
            unit = float(relative[j] * relative.max())
            units.append(math.nan if g in case.poisoned else unit)
    out, unit = (torch.tensor(x, dtype=torch.float64) for x in (scores, units))
    return {"out": (out, unit)}
