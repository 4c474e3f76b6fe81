"""`HealthWatch` for PPO: says in plain language, as soon as the log shows it, what is wrong."""

from __future__ import annotations

import logging
from typing import Any

from prefopt.training.health import HealthNote
from prefopt.training.health_watch import HealthWatch
from prefopt.training.ppo_health import (
    GoldPoint,
    PPOPoint,
    diagnose_ppo,
    gold_points,
    ppo_findings_so_far,
    ppo_points,
)

logger = logging.getLogger(__name__)


class PPOHealthWatch(HealthWatch):
    """Each finding of `prefopt.training.ppo_health` once as a warning, again if it becomes a problem.

    Args:
        gold: a logged metric that the reward does not see, such as the `eval_win_rate` of
            `JudgeWinRate`; where the score rises and it falls, the reward is exploited.
        stop_on_problem: end training at the first problem.
    """

    def __init__(self, *, gold: str = "eval_win_rate", stop_on_problem: bool = False) -> None:
        super().__init__(stop_on_problem=stop_on_problem)
        self.gold = gold
        self._rollouts: list[PPOPoint] = []
        self._gold: list[GoldPoint] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin with the log of the steps before, if the run is resumed."""
        self._rollouts = list(ppo_points(state.log_history))
        self._gold = list(gold_points(state.log_history, self.gold))
        self._told, self.notes = {}, ()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Take in what was logged, and say what it shows."""
        entry = {"step": state.global_step, **(logs or {})}
        points, gold = ppo_points([entry]), gold_points([entry], self.gold)
        if not points and not gold:
            return
        self._rollouts += points
        self._gold += gold
        found = ppo_findings_so_far(self._rollouts, **self._about(args))
        problem = next((n for n in self._tell(found, state) if n.level == "problem"), None)
        if problem is not None and self.stop_on_problem:
            control.should_training_stop = True
            if state.is_world_process_zero:
                logger.error("training stops at step %d: %s", state.global_step, problem.check)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say what only the whole run shows."""
        if self._rollouts:
            self._tell(self.diagnosis(args), state)

    def diagnosis(self, args: Any) -> tuple[HealthNote, ...]:
        """What the log says about the whole run."""
        return diagnose_ppo(self._rollouts, **self._about(args))

    def _about(self, args: Any) -> dict[str, Any]:
        return {
            "kl_target": getattr(args, "kl_target", None),
            "cuts_off": getattr(args, "stop_token_ids", None) != [],
            "gold": self._gold,
        }
