"""Rematerialisation: which tensors of a layer are kept for the backward pass, by name.

The names and the ladder are MaxText's, so that its published settings can be used here.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from moi_jax.config.model import Remat, RematAction, RematTensor

_QKV: tuple[RematTensor, ...] = ("query_proj", "key_proj", "value_proj")
_MLP: tuple[RematTensor, ...] = ("mlp_gate", "mlp_up")
# The tensors that a policy keeps. decoder.py and the attention backends name them.
SAVED: dict[Remat, tuple[RematTensor, ...]] = {
    "full": (),
    "save_qkv_proj": _QKV,
    "save_dot_except_mlp": (*_QKV, "out_proj"),
    "save_dot_with_context_except_mlp": (*_QKV, "context", "out_proj"),
    "minimal": (*_QKV, "out_proj", *_MLP),
    "minimal_with_context": (*_QKV, "context", "out_proj", *_MLP),
}


@dataclasses.dataclass(frozen=True)
class RematPolicy:
    """What becomes of each named tensor; everything else is recomputed.

    Attributes:
      saved: the tensors that stay on the device.
      offloaded: those that wait in the pinned memory of the host.
    """

    saved: frozenset[RematTensor] = frozenset()
    offloaded: frozenset[RematTensor] = frozenset()

    def apply(self, layer: Any) -> Any:
        """Returns the NNX function `layer` with this policy."""
        policies = jax.checkpoint_policies
        if self.offloaded:
            policy = policies.save_and_offload_only_these_names(
                names_which_can_be_saved=sorted(self.saved),
                names_which_can_be_offloaded=sorted(self.offloaded),
                offload_src="device",
                offload_dst="pinned_host",
            )
        else:
            policy = policies.save_only_these_names(*sorted(self.saved))
        # XLA cannot merge the recomputation with the forward pass inside a scan, so CSE is
        # harmless.
        return nnx.remat(layer, policy=policy, prevent_cse=False)


def remat_policy(name: Remat, tensors: Mapping[RematTensor, RematAction]) -> RematPolicy | None:
    """Returns the policy of a name with the exceptions in `tensors`; None keeps everything."""
    if name == "none":
        return None
    actions = dict.fromkeys(SAVED[name], "save") | dict(tensors)

    def with_action(action: RematAction) -> frozenset[RematTensor]:
        return frozenset(tensor for tensor, chosen in actions.items() if chosen == action)

    return RematPolicy(with_action("save"), with_action("offload"))
