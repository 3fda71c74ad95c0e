"""Plans one config or a sweep of its settings, and compiles each program once."""

import logging
from collections.abc import Sequence

from moi_jax.accounting.compilation import Compiled, compile_step
from moi_jax.accounting.kept import keep, kept_path, read_kept
from moi_jax.accounting.plan import Plan, make_plan
from moi_jax.accounting.sweep import Candidate, Found, candidates, sweep
from moi_jax.accounting.topology import Topology
from moi_jax.accounting.work import full_rows, open_model, work_of
from moi_jax.common.errors import UserError
from moi_jax.config import Config

log = logging.getLogger(__name__)

LEAST_GAIN = 0.01  # of the time of a step, to be worth a hint


class Planner:
    """Makes plans of a config, and of other settings for the same data, on one topology."""

    def __init__(self, config: Config, topology: Topology, step: str):
        """Opens the model and, for training, the prepared data.

        Raises:
          UserError: there is no such model.
        """
        self.config, self.topology, self.step = config, topology, step
        self.model = open_model(config)
        self.work = work_of(config) if step == "train" else full_rows(config, f"for {step}")
        self.compiles = topology.compiles and step != "generate"

    def plan(self, config: Config | None = None) -> Plan:
        """Plans a config, by default the one that was given; it compiles where there is a compiler.

        Raises:
          UserError: the config does not fit the topology.
        """
        config = config or self.config
        # Mistakes are told before a compilation that takes minutes.
        plan = make_plan(config, self.model, self.topology, self.work, self.step)
        if not self.compiles:
            return plan
        compiled = self._compiled(config)
        return make_plan(config, self.model, self.topology, self.work, self.step, compiled)

    def faster_remat(self, plan: Plan) -> tuple[Plan, Candidate] | None:
        """Compares the config's remat policy with the fastest that fits, both by arithmetic.

        Args:
          plan: of the config, compiled or not.

        Returns:
          The config's plan by arithmetic, and the faster one. None if less rematerialisation gains
          nothing: `plan` is not bound by compute, or by operations of frozen parameters.
        """
        assert plan.roofline is not None
        if plan.roofline.bound != "compute" or self.config.optimizer.frozen:
            return None
        now = make_plan(self.config, self.model, self.topology, self.work)
        found = candidates(self.config, self.model, self.topology, self.work, ("remat",))
        if not (found and found[0].estimate.fits):
            return None
        assert now.roofline is not None
        assert found[0].estimate.roofline is not None
        gain = 1 - found[0].estimate.roofline.step_s / now.roofline.step_s
        return (now, found[0]) if gain >= LEAST_GAIN else None

    def sweep(self, names: Sequence[str], limit: int) -> tuple[list[Found], int]:
        """Searches the settings of `names`.

        Returns:
          At most `limit` of them, best first; how many others were not compiled and may fit.

        Raises:
          UserError: nothing can fit.
        """
        found = candidates(self.config, self.model, self.topology, self.work, names)
        if not found:
            raise UserError(
                f"no setting can fit {self.topology.name}: parameters, moments, gradients and kept "
                f"activations are already more than its memory; take more chips"
            )
        log.info(f"{len(found)} settings may fit by arithmetic")
        return sweep(found, self.plan, self.compiles, limit)

    def _compiled(self, config: Config) -> Compiled:
        path = kept_path(config, self.model, self.topology, self.step)
        if kept := read_kept(path):
            log.info(f"compiled before; the figures are kept in {path}")
            return kept
        name = self.topology.name
        log.info(f"compiling the {self.step} step for {name}; a 7B model takes minutes")
        compiled = compile_step(config, self.model, self.topology, self.step)
        keep(path, compiled)
        return compiled
