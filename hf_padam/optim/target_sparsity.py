"""Steer lambda_p during training so that a model arrives at a given share of zeros.

For p < 2 a weight that no gradient holds moves at constant speed in ``q = x^(2 - p)``, with ``x`` its size (``|w|``,
or what the importance makes of it): a step takes ``(2 - p) * lr * lambda_p`` off it, whatever the weight, until it is
zero. So the weights that die within the next H steps are those with ``q < (2 - p) * H * lr * lambda_p``. Read
backwards: the quantile of the sizes at the share of zeros planned for H steps ahead says which ``lambda_p`` will get
there. Where gradients hold weights back, that quantile comes to lie at larger weights, and the decay grows until
enough of them die. No other constant is needed: the learning rate, its schedule, p and the size of the weights all
cancel out.

What is set is not lambda_p but the size at which ``lr * lambda_p * x^(p - 2) = 1``. At ``p = -inf``, what is below it
dies at once: the plan is gradual pruning, and what is below the quantile is zeroed as it is chosen, since a weight
that passes through it in a later step may be as good as any.

The plan is the cubic ramp of gradual pruning (Zhu & Gupta, arXiv 1710.01878): fast while there are many superfluous
weights, slow towards the end. What is missing at its end is made up for by zeroing the smallest weights, exactly so
many. After it zeros stay zero, nothing more dies, and the survivors recover. Between two steps the optimizer is left
in that state, too: a copy or a restored one that nothing steers makes no more zeros.
"""

from __future__ import annotations

import itertools
import logging
import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..sparsity import TensorCount, count_zeros
from .hyperparameters import UnfitWeightsError, is_number, named
from .importance import REFERENCE, SCALE, Measured, fisher_scale, measure
from .padam import PAdam, unwrap
from .patterns import PATTERN, check_blocks, missing_in_blocks, sparing, zero_in_blocks_
from .quantiles import Histogram, histogram, histograms, quantile, tally, zero_below_, zero_smallest_
from .target_options import STATE, check_steerable, check_target, ramp
from .update import YOUNG_STEPS

logger = logging.getLogger(__name__)

HOLD = 2.0**-100
"""``lr * lambda_p`` as it is shown while nothing is to die."""

_HORIZON = 0.1
"""Steps that the decay looks ahead, as a share of the ramp: shorter is closer to the plan, longer is gentler."""

_UPDATES, _PRUNINGS = 200, 50
"""How many times during the ramp the decay is computed anew, at most; or, at ``p = -inf``, weights are pruned."""

_SAMPLE, _POOL_SAMPLE = 2**22, 2**18
"""Elements that quantiles are estimated from, at least: of all steered tensors, and of those that arrive together."""

_LAST, _DEVIATIONS = 0.002, 5
"""Share of zeros that the decay leaves to the end of the ramp, which meets the target exactly: so much may die between
two quantiles; and how many standard deviations of a quantile, where a small sample makes that more."""

EARLIER_STATE = "target_decay"
"""What versions before 0.2 kept in the place of "target_reference"."""

_ATTRIBUTE = "_target_sparsity"
"""Of an optimizer that is steered: what steers it."""


class TargetSparsity:
    """Attached to a PAdam, sets `lambda_p` before each step so that zeros arrive at a target share.

    It registers itself with the optimizer's step hooks; nothing else has to be called:

        optimizer = PAdam(get_param_groups(model, target_sparsity=0.7), lr=1e-3)
        TargetSparsity(optimizer, total_steps=len(loader) * epochs)

    The groups whose `lambda_p` is positive are steered; their `lambda_p` becomes a result. Frozen weights, which have
    no gradients (``zero_grad(set_to_none=True)``), are neither changed nor counted while they are frozen: with what
    thaws after the ramp the target is met anew, at once.
    All state is in keys of these groups, so it is saved and restored with the optimizer's state, and a resumed run
    goes on exactly.

    The target is in the groups' key `target_sparsity`, and may be each group's own: `get_param_groups` also takes a
    mapping from modules to shares, and an N:M pattern, under which weights are chosen by block and zeroed step by step
    rather than by the decay.

    Args:
        optimizer: A `PAdam`.
        target: Share of exact zeros, in (0, 1), among the weights of the steered groups; None for the groups' own:
            those with one are steered, and those of one share and `target_pool` together.
        total_steps: Optimizer steps that the whole training takes.
        start: Share of the steps at which the ramp begins: 0.2 by default; 0.05, if `end` is not given either and the
            (largest) target is 0.4 or less.
        end: Share of the steps at which it has arrived, and the survivors' recovery begins: 0.75 by default, or 0.2.
            The same as `start`: all zeros are made at once, by the size that weights then have.
        per_group: Every group arrives at the target by itself, rather than all of them together; groups with a
            `target_pool` say so themselves where `target` is None.

    Raises:
        ValueError: If an argument is out of range, or nothing can be steered.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        target: float | None = None,
        total_steps: int = 0,
        *,
        start: float | None = None,
        end: float | None = None,
        per_group: bool = False,
    ) -> None:
        """Check the arguments and attach; see the class."""
        if not is_number(total_steps) or not 1 <= total_steps < math.inf:
            raise ValueError(f"total_steps={total_steps!r} is not allowed: it must be a number of steps, at least 1")
        self._given, self.per_group = target, per_group
        self._said = False  # that a target is not met
        self._decays: list[float] = []  # lambda_p in the latest step, of each steered group
        ramp(1.0, start, end)
        self.optimizer = unwrap(optimizer)
        if not isinstance(self.optimizer, PAdam):
            raise ValueError(
                f"target_sparsity cannot steer {type(self.optimizer).__name__}: it steers PAdam "
                '(optim="padam" or "padam_8bit"), and not as DeepSpeed wraps it'
            )
        steered = self._groups()
        if not steered:
            raise ValueError(
                "target_sparsity has nothing to steer: no parameter group of the optimizer has a positive lambda_p"
                + (" and a target_sparsity" if target is None else "")
            )
        for group in steered:
            check_target(self._target(group))
            if target is None:
                group["target_sparsity"] = float(group["target_sparsity"])
            check_steerable(group)
            if self._blocks(group):
                check_blocks(group)
        if target is not None:
            self._given = float(target)
        total_steps, (start, end) = int(total_steps), ramp(max(map(self._target, steered)), start, end)
        self.at_once = start == end
        self.first = min(math.floor(start * total_steps), total_steps - 1)
        self.last = max(self.first + 1, round(end * total_steps))  # the ramp arrives after this many steps
        if any(group["importance"] == "fisher" for group in steered):  # nothing is known of weights before
            if self.first < YOUNG_STEPS:
                logger.info("Target sparsity: zeros are made from step %d on, not %d.", YOUNG_STEPS, self.first)
            self.first = min(max(self.first, YOUNG_STEPS), total_steps - 1)
            self.last = max(self.first + 1, self.last)
        often = _PRUNINGS if _prunes(steered) else _UPDATES
        self.interval = math.ceil((self.last - self.first) / often)
        for pool in self._pools():
            if pool[0]["target_step"] == 0:
                self._initial(pool)  # so that a target out of reach is refused now; weights may yet be loaded
        earlier = steering_of(self.optimizer)
        if earlier is not None:
            earlier.detach()
        setattr(self.optimizer, _ATTRIBUTE, self)
        self._handles = [
            self.optimizer.register_step_pre_hook(self._before),
            self.optimizer.register_step_post_hook(self._after),
        ]

    def detach(self) -> None:
        """Leave the optimizer alone from now on.

        Its groups hold: zeros stay zero and nothing else decays, whatever their `lambda_p`, once the target is met;
        before, a step is refused. To decay on, delete their keys "reference", "target_step" and "target_sparsity".
        """
        for handle in self._handles:
            handle.remove()
        if steering_of(self.optimizer) is self:
            delattr(self.optimizer, _ATTRIBUTE)

    def finish(self) -> None:
        """Meet the target now, where training ended before the ramp did because skipped steps do not count."""
        for pool in self._pools():
            if not self._met(pool):
                self._zero_the_rest(pool)

    @property
    def target(self) -> float:
        """The share of zeros asked for, over all steered weights; over their groups, while all of these are frozen."""
        if self._given is not None:
            return self._given
        pools = self._pools()
        if not pools:
            return _mean([self._target(group) for group in self._steered()], [1] * len(self._steered()))
        return _mean([self._target(pool[0]) for pool in pools], [_zeros(pool)[1] for pool in pools])

    @property
    def met(self) -> bool:
        """Whether the ramp is over, and the target with it met: nothing dies any more."""
        return self._met(self._groups() or self._steered())

    def _met(self, groups: list[dict[str, Any]]) -> bool:
        return all(
            group["target_met"] == self._target(group) and _trainable(group) <= set(group["target_counted"])
            for group in groups
        )

    def _target(self, group: dict[str, Any]) -> float:
        return group["target_sparsity"] if self._given is None else self._given

    def _blocks(self, group: dict[str, Any]) -> bool:
        """Whether weights are chosen by block."""
        return self._given is None and group.get(PATTERN) is not None

    def planned(self, step: int, initial: float = 0.0, target: float | None = None) -> float:
        """Return the share of zeros planned after `step` steps, for weights that began with the share `initial`."""
        target = self.target if target is None else target
        return initial + (target - initial) * (1 - self._left(step))

    def _left(self, step: int) -> float:
        """Return the share of what is to die that is planned to be alive after `step` steps."""
        return (1 - min(1.0, max(0.0, (step - self.first) / (self.last - self.first)))) ** 3

    def state(self) -> dict[str, float]:
        """Return what training logs show.

        Returns:
            `lambda_p`, that of the latest step (the mean over groups; left out at ``p = -inf``, which has none);
            `planned_sparsity` and `sparsity`, the share of zeros planned by now and the actual one; once the target is
            met, `target_zeroed` and `target_threshold`, which are what `zeroed` returns. Nothing while all steered
            weights are frozen.
        """
        groups, pools = self._groups(), self._pools()
        if not groups:
            return {}
        counts = iter(_counts([group for pool in pools for group in pool]))
        sizes, zeros, planned = [], 0, []
        for pool in pools:
            own = list(itertools.islice(counts, len(_params(pool))))
            sizes.append(sum(count.elements for count in own))
            zeros += sum(count.zeros for count in own)
            arrives = self._target(pool[0])  # which may be another than that of an earlier ramp
            if self._blocks(pool[0]):
                arrives = pool[0]["target_arrives"] or arrives
            planned.append(self.planned(pool[0]["target_step"], max(0.0, pool[0]["target_initial"]), arrives))
        values: dict[str, float] = {}
        if all(math.isfinite(group["p_norm"]) for group in groups):
            decays = self._decays or [float(group["lambda_p"]) for group in groups]
            values["lambda_p"] = sum(decays) / len(decays)
        values |= {"planned_sparsity": _mean(planned, sizes), "sparsity": zeros / sum(sizes)}
        if self.met:
            values["target_zeroed"], values["target_threshold"] = self.zeroed()
        return values

    def zeroed(self) -> tuple[int, float]:
        """Return how many weights were zeroed at the end of the ramp, and the largest of their sizes."""
        pools = [pool[0] for pool in self._pools()]
        return sum(g["target_zeroed"] for g in pools), max((g["target_threshold"] for g in pools), default=0.0)

    def _groups(self) -> list[dict[str, Any]]:
        """Return the steered groups that are not frozen as a whole."""
        return [group for group in self._steered() if _trainable(group)]

    def _steered(self) -> list[dict[str, Any]]:
        """Return the steered groups. Those that were loaded without what is kept in them, or added, are given it."""
        steered = [g for g in self.optimizer.param_groups if g["lambda_p"] > 0 or "target_step" in g]
        if self._given is None:
            steered = [group for group in steered if group.get("target_sparsity") is not None]
        for group in steered:  # earlier versions did not say over which parameters the target was met
            group.setdefault("target_counted", tuple(_trainable(group)) if group.get("target_met") else ())
        earlier = [group for group in steered if group.pop(EARLIER_STATE, None) is not None]
        if not all(self._met([group]) for group in earlier):
            logger.warning(
                "The optimizer's state is of hf_padam before 0.2, whose steering cannot be continued exactly: from "
                "here this version steers. target_sparsity=%s is met at the same step, but the weights are not "
                "those that the earlier version would have ended with. For these, finish the run with that version.",
                self._target(earlier[0]),
            )
        known: dict[str, Any] = next((group for group in steered if "target_step" in group), {})
        for group in steered:
            for name, value in STATE.items():
                group.setdefault(
                    name, value if name in ("target_initial", "target_arrives") else known.get(name, value)
                )
        return steered

    def _pools(self) -> list[list[dict[str, Any]]]:
        pools: dict[Any, list[dict[str, Any]]] = {}
        for number, group in enumerate(self._groups()):
            own: Any = number if self.per_group else ""
            if self._given is None:
                own = group.get("target_pool", own), group["target_sparsity"]
            pools.setdefault(own, []).append(group)
        return list(pools.values())

    @torch.no_grad()
    def _before(self, *_: Any) -> None:
        if not self._steered():
            raise RuntimeError(
                "target_sparsity has nothing to steer any more: no parameter group of the optimizer has a target, so "
                "a state was loaded of a run without one. Start a new run with its weights as the model, or set the "
                'groups\' "target_sparsity" after loading'
            )
        pools, due = self._pools(), []
        for pool in pools:
            step = pool[0]["target_step"]
            if pool[0]["target_initial"] < 0:
                initial, arrives = self._initial(pool)
                for group in pool:
                    group |= {"target_initial": initial, "target_arrives": arrives}
            if self.first <= step < self.last:
                now = (step - self.first) % self.interval == 0 and not self.at_once
                if now and any(float(group["lr"]) > HOLD for group in pool):
                    due.append(pool)
            else:
                for group in pool:
                    group["target_reference"] = 0.0
        if due:
            self._aim(due)
        for pool in pools:
            for group in pool:
                group[REFERENCE] = group["target_reference"] if float(group["lr"]) > HOLD else 0.0
                group["lambda_p"] = _lambda_p(group, group[REFERENCE])

    @torch.no_grad()
    def _after(self, *_: Any) -> None:
        self._decays = [float(group["lambda_p"]) for group in self._groups()]
        for group in self._steered():  # a frozen one is not left behind
            group["target_step"] += 1
            group |= {REFERENCE: 0.0, "lambda_p": _lambda_p(group, 0.0)}
        for pool in self._pools():
            if pool[0]["target_step"] >= self.last and not self._met(pool):
                self._zero_the_rest(pool)

    def _initial(self, pool: list[dict[str, Any]]) -> tuple[float, float]:
        """Return the shares of zeros that the weights begin with and that the ramp arrives at."""
        (zeros, elements), target = _zeros(pool), self._target(pool[0])
        initial = zeros / elements
        if self._blocks(pool[0]):  # of which some may begin with more zeros than they must have
            return initial, (zeros + missing_in_blocks(measure(self.optimizer, pool), pool)) / elements
        if zeros > _due(target, elements):  # which may be one more than the share, as a model has that met it before
            raise UnfitWeightsError(
                f"target_sparsity={target!r} is less than the share of zeros that the weights begin with, "
                f"{initial:.4f}, and zeros do not come back: ask for more"
            )
        return initial, target

    def _aim(self, pools: list[list[dict[str, Any]]]) -> None:
        """Choose the decay under which the share planned for the horizon would be dead by then; with one transfer.

        Of weights that have had no gradient under "fisher", none dies before the end of the ramp: the share is one of
        the others.
        """
        measured, tallies = [], []
        number = len(_params(self._groups()))
        for pool in pools:
            if self._blocks(pool[0]):
                measured.append(sparing(self._measured(pool, spare_young=True), pool))
                tallies.append(tally(measured[-1]))
            else:
                sample = max(_POOL_SAMPLE // len(_params(pool)), _SAMPLE // number)
                mu = self._scale(pool, sample)
                measured.append(self._measured(pool, mu, spare_young=_prunes(pool)))
                tallies.append(tally(measured[-1], sample, mu))
        for pool, tensors, found in zip(pools, measured, histograms(tallies), strict=True):
            self._aim_at(pool, tensors, found)

    def _aim_at(self, pool: list[dict[str, Any]], measured: list[Measured], found: Histogram) -> None:
        step, target = pool[0]["target_step"], self._target(pool[0])
        horizon, at_once = self.interval, self._blocks(pool[0]) or _prunes(pool)
        if not at_once:
            horizon = max(horizon, min(math.ceil(_HORIZON * (self.last - self.first)), self.last - step))
        if self._blocks(pool[0]):  # of which only what is still to die is counted
            ahead = 1 - self._left(step + horizon) / self._left(step)
        else:
            last = max(_LAST, _DEVIATIONS * found.deviation)
            ahead = min(self.planned(step + horizon, pool[0]["target_initial"], target), target - last)
            if found.zeros >= ahead * float(found.counts.sum()):
                for group in pool:
                    group["target_reference"] = 0.0
                return
        size = quantile(found.counts, ahead)
        if at_once:
            zero_below_(measured, size)
            return
        for group in pool:
            exponent = 2 - group["p_norm"]
            # With p next to 2 all weights shrink alike and none dies soon: at this size they are halved, no more.
            slowly = 1.0 if math.isinf(exponent) else max(1.0, exponent * horizon) ** (-1 / exponent)
            group["target_reference"] = size * slowly
            if group["importance"] == "fisher":
                group[SCALE] = found.extra

    def _scale(self, pool: list[dict[str, Any]], sample: int | None = None) -> Tensor | None:
        """Return mu of those groups whose sizes it is the unit of; None if there are none."""
        fisher = [group for group in pool if group["importance"] == "fisher"]
        return fisher_scale(measure(self.optimizer, fisher), sample) if fisher else None

    def _measured(
        self, pool: list[dict[str, Any]], mu: Tensor | None = None, *, spare_young: bool = False
    ) -> list[Measured]:
        """Measure a pool's weights; if they are not all of one importance, in units that compare."""
        if mu is None and len({group["importance"] for group in pool}) > 1:
            mu = self._scale(pool)
        known = min(YOUNG_STEPS, self.first)  # short trainings have to do with less
        return measure(self.optimizer, pool, 1.0 if mu is None else mu, known=known, spare_young=spare_young)

    @torch.no_grad()
    def _zero_the_rest(self, pool: list[dict[str, Any]]) -> None:
        """Zero the smallest weights until the target is met: what the decay did not get to."""
        (before, elements), target = _zeros(pool), self._target(pool[0])
        mu = self._scale(pool)
        measured = self._measured(pool, mu)
        if self._blocks(pool[0]):
            threshold = zero_in_blocks_(self._measured(pool, mu, spare_young=True), pool)
        else:
            unknown = histogram(measured).infinite  # without a gradient so far: of these the same share is to go
            missing = max(0, _due(target, elements) - before)
            known = min(missing - min(missing, round(target * unknown)), elements - before - int(unknown))
            old = self._measured(pool, mu, spare_young=True)
            threshold = zero_smallest_(old, min(known, elements - before - int(histogram(old).infinite)))
            young = known - (_zeros(pool)[0] - before)  # if too few others are left
            threshold = max(threshold, zero_smallest_(measured, young))
            zero_smallest_(measured, missing - (_zeros(pool)[0] - before), infinite=True)
        counts = _counts(pool)
        zeros = sum(count.zeros for count in counts)
        zeroed = pool[0]["target_zeroed"] + zeros - before
        due = _due(target, elements)
        met = zeros >= due or self._blocks(pool[0])
        if not met and not self._said:
            self._said = True
            logger.warning("target_sparsity=%s is not met: %d weights are zero, not %d.", target, zeros, due)
        for group in pool:
            group |= {"target_zeroed": zeroed, "target_threshold": threshold}
            group["target_met"] = target if met else 0.0
            group["target_counted"] = tuple(sorted(_trainable(group).union(group["target_counted"])))
        logger.info(
            "Target sparsity: %d weights of sizes up to %.3g were zeroed at step %d.",
            zeros - before,
            threshold,
            self.last,
        )
        tensors = [(name, param) for group in pool for name, param in named(group) if param.requires_grad]
        dead = [name for (name, _), count in zip(tensors, counts, strict=True) if count.zeros == count.elements]
        if dead:
            logger.warning(
                "Target sparsity: all weights of %d of %d tensors have become zero, %s for one: of little importance "
                'to the loss so far. target_scope="layer" gives each tensor its share.',
                len(dead),
                len(tensors),
                dead[0],
            )


def _lambda_p(group: dict[str, Any], reference: float) -> float:
    """Return the lambda_p that a reference size stands for in a steered group; positive, as the group decays."""
    lr = float(group["lr"])
    if lr <= HOLD:
        return 1.0
    decay = math.log(HOLD)
    if reference > 0 and math.isfinite(group["p_norm"]):
        decay = max(decay, (2 - group["p_norm"]) * math.log(reference))
    return math.exp(min(decay - math.log(lr), math.log(sys.float_info.max)))


def steering_of(optimizer: Any) -> TargetSparsity | None:
    """Return what steers an optimizer, or the one that accelerate has wrapped."""
    return getattr(unwrap(optimizer), _ATTRIBUTE, None)


def _prunes(groups: list[dict[str, Any]]) -> bool:
    """Whether what is to die does so at once."""
    return all(group["p_norm"] == -math.inf for group in groups)


def _params(pool: list[dict[str, Any]]) -> list[Tensor]:
    return [param for group in pool for param in group["params"] if param.requires_grad]


def _trainable(group: dict[str, Any]) -> set[int]:
    return {i for i, param in enumerate(group["params"]) if param.requires_grad}


def _counts(pool: list[dict[str, Any]]) -> list[TensorCount]:
    """Count the zeros and the elements of each parameter, over all shards."""
    return count_zeros({str(i): param for i, param in enumerate(_params(pool))})


def _zeros(pool: list[dict[str, Any]]) -> tuple[int, int]:
    """Count the zeros and the elements of all parameters, over all shards."""
    counts = _counts(pool)
    return sum(count.zeros for count in counts), sum(count.elements for count in counts)


def _due(target: float, elements: int) -> int:
    """Return how many zeros meet a target."""
    return math.ceil(round(target * elements, 6))  # 0.55 * 100 is above 55


def _mean(values: Sequence[float], weights: Sequence[int]) -> float:
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)
