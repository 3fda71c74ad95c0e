"""The section `data`: the domains with their sources, and how they are mixed."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from moi_jax.config.section import Count, Location, Name, Positive, Section
from moi_jax.config.strategies import STRATEGIES, Strategy

CONTROL_TOKEN = re.compile(r"<\|[a-z0-9_]+\|>")


class HeldOut(Section):
    """Share of each source kept for evaluation: max(fraction, min rows), at most 10 %."""

    fraction: float = Field(0.02, ge=0, le=0.1)
    min: Count = 16


class Source(Section):
    """Rows of one domain: files, a TFDS builder or a Hugging Face dataset (exactly one)."""

    path: str | None = None  # a glob or a directory below data.root
    tfds: str | None = None  # a TFDS builder: name or name/config
    hf: str | None = None  # a dataset of the Hugging Face hub by its id, or a local directory
    manual_dir: Path | None = None  # tfds only: local copies of its files, below data.root
    subset: str | None = None  # hf only
    split: str = "train"  # tfds and hf
    format: str = "auto"
    weight: float = Field(1.0, gt=0)  # share of the domain's draws, relative to its other sources
    max_rows: Positive | None = None
    held_out: HeldOut | None = None  # null: data.held_out
    license: str | None = None  # shown in the model card

    @model_validator(mode="after")
    def check(self) -> "Source":
        if sum(kind is not None for kind in (self.path, self.tfds, self.hf)) != 1:
            raise ValueError("a source has exactly one of path, tfds, hf")
        if self.manual_dir is not None and self.tfds is None:
            raise ValueError("manual_dir goes with tfds sources only")
        if self.subset is not None and self.hf is None:
            raise ValueError("subset goes with hf sources only; for tfds write name/config")
        return self


class Domain(Section):
    """A task: its name, its system prompt (null: the default prompt) and its sources of rows."""

    name: Name
    prompt: str | None = None
    weight: float = Field(1.0, ge=0)  # under sampling: weights
    sources: tuple[Source, ...] = Field(min_length=1)


class Decontaminate(Section):
    """What happens to training rows that share 13 words in a row with a benchmark question."""

    path: Path | None = None  # a directory of benchmark files; null: no search
    on_hit: Literal["drop", "report"] = "drop"


Sampling = Literal["balanced", "proportional", "weights", "temperature"]


class Stage(Section):
    """A part of a curriculum: the mixture from global row `begins` on."""

    begins: Count
    sampling: Sampling | None = None  # null: data.sampling
    temperature: float | None = Field(None, gt=0)  # null: data.temperature
    # By domain; a domain that is left out keeps its own.
    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)


class Data(Section):
    """The mixture. A switch that is left unset takes its value from `strategy`."""

    root: Path = Path(".")
    cache_dir: Location = Path("~/.cache/moi_jax")
    strategy: Strategy = "moi"
    default_domain: str = "chat"
    default_system_prompt: str | None = None  # null: the model preset's
    sequence_length: Positive = 4096
    max_instruction_tokens: Positive | None = None  # null: sequence_length
    too_long: Literal["truncate_turns", "drop", "error"] = "truncate_turns"
    row_system: Literal["append", "replace", "keep", "drop_row"] = "append"
    # Which thinking of the answers is trained on: all, none, or that of the last exchange.
    thinking: Literal["keep", "drop", "last"] = "keep"
    # What becomes of a conversation whose earlier turns the chat template shows differently later:
    # a sample for each trained turn, a sample for the last one, or a bad row.
    rewritten_history: Literal["split", "last", "refuse"] = "split"
    on_bad_row: Literal["drop", "error"] = "drop"
    # How calls of tools are written: by the chat template, if it can; or as ReAct text.
    tools: Literal["template", "react"] = "template"
    max_repeats: Positive = 4
    max_unplaceable: float = Field(0.05, ge=0, le=1)  # share of instructions that fit no group
    held_out: HeldOut = HeldOut()
    decontaminate: Decontaminate = Decontaminate()
    workers: Positive | None = None  # processes that prepare; null: one per core
    system_prompts: Literal["per_domain", "default", "none"] | None = None
    sampling: Sampling | None = None
    order: Literal["default_first", "config", "shuffled"] | None = None
    mask: Literal["chunk", "row", "instruction"] | None = None
    packing: Literal["best_fit", "sequential", "none"] | None = None
    chunk_size: Positive | None = None
    repeat_in_row: Literal["forbid", "allow"] = "forbid"  # the same instruction twice in a row
    epoch_end: Literal["longest", "shortest"] | None = None
    temperature: float = Field(1.0, gt=0)  # under sampling: temperature
    unit: Literal["instructions", "loss_tokens"] = "instructions"  # what the weights share out
    stages: tuple[Stage, ...] = ()
    domains: tuple[Domain, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def fill_from_strategy(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        # An unknown strategy is reported by its own field.
        preset = STRATEGIES.get(str(values.get("strategy")), STRATEGIES["moi"])
        filled = {k: values[k] if values.get(k) is not None else v for k, v in preset.items()}
        filled["epoch_end"] = values.get("epoch_end") or "longest"
        if values.get("chunk_size") is None:
            domains = values.get("domains")
            count = len(domains) if isinstance(domains, list | tuple) else 1
            filled["chunk_size"] = max(count, 1) if filled["sampling"] == "balanced" else 1
        return {**values, **filled}

    @model_validator(mode="after")
    def check(self) -> "Data":
        names = [domain.name for domain in self.domains]
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two domains are named {doubled[0]}; give each its own name")
        prompts = {domain.name: domain.prompt for domain in self.domains}
        for name, prompt in {"the default": self.default_system_prompt, **prompts}.items():
            if control := CONTROL_TOKEN.search(prompt or ""):
                raise ValueError(
                    f"the system prompt of {name} holds the control token {control.group()}; a "
                    f"prompt is plain text, which the chat template wraps"
                )
        if "mean" in names:
            raise ValueError("a domain cannot be named 'mean': eval/mean/loss has that name")
        if self.sampling == "balanced" and self.chunk_size != max(len(names), 1):
            raise ValueError(
                f"chunk_size {self.chunk_size} is refused with sampling: balanced, because a chunk "
                f"then holds one instruction of each domain; leave it unset"
            )
        if self.order == "default_first" and names and self.default_domain not in names:
            raise ValueError(
                f"default_domain {self.default_domain!r} is not among the domains "
                f"({', '.join(names)}), which order: default_first needs; name one of them"
            )
        limit = self.max_instruction_tokens
        if limit is not None and limit > self.sequence_length:
            raise ValueError(
                f"max_instruction_tokens {limit} is over sequence_length {self.sequence_length}"
            )
        begins = [stage.begins for stage in self.stages]
        if begins and (begins[0] != 0 or begins != sorted(set(begins))):
            raise ValueError(
                f"stages begin at rows {', '.join(map(str, begins))}; the first must begin at 0, "
                f"and each later one after the one before it"
            )
        for stage in self.stages:
            if unknown := sorted(stage.weights.keys() - set(names)):
                raise ValueError(
                    f"stages give a weight to {unknown[0]!r}, which is not among the domains "
                    f"({', '.join(names)})"
                )
        self._check_sampling()
        return self

    def _check_sampling(self) -> None:
        """Refuses settings that the sampling of no stage reads, and mixtures without any weight."""
        mixtures = [self.of_stage(stage) for stage in range(len(self.stages))] or [self]
        samplings = {mixture.sampling for mixture in mixtures}
        weighted_sources = any(s.weight != 1.0 for d in self.domains for s in d.sources)
        dead = {
            "temperature": self.temperature != 1.0 and "temperature" not in samplings,
            "the weight of a domain": any(d.weight != 1.0 for d in self.domains)
            and "weights" not in samplings,
            "unit: loss_tokens": self.unit == "loss_tokens"
            and not samplings & {"weights", "temperature"},
            "epoch_end: shortest": self.epoch_end == "shortest" and samplings == {"proportional"},
            "the weight of a source": weighted_sources and samplings == {"proportional"},
        }
        for what, refused in dead.items():
            if refused:
                raise ValueError(
                    f"{what} is refused with sampling: {', '.join(sorted(map(str, samplings)))}, "
                    f"which does not read it; leave it unset"
                )
        for mixture in mixtures:
            if mixture.sampling == "weights" and not sum(d.weight for d in mixture.domains):
                raise ValueError("sampling: weights needs a domain with a weight over 0")

    def of_stage(self, stage: int) -> "Data":
        """This section with the sampling of one stage; itself if there are no stages."""
        if not self.stages:
            return self
        chosen = self.stages[stage]
        sampling = chosen.sampling or self.sampling
        chunk_size = self.chunk_size if self.sampling != "balanced" else 1
        return self.model_copy(
            update={
                "sampling": sampling,
                "temperature": chosen.temperature or self.temperature,
                "chunk_size": len(self.domains) if sampling == "balanced" else chunk_size,
                "domains": tuple(
                    domain.model_copy(
                        update={"weight": chosen.weights.get(domain.name, domain.weight)}
                    )
                    for domain in self.domains
                ),
            }
        )
