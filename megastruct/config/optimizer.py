"""The section `optimizer` of a config: what all optimizers have, and the keys of the chosen one."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field, model_validator

from megastruct.config.section import Section
from megastruct.optimizers import ADAMW, OPTIMIZERS, Role


class OptimizerConfig(Section):
    """The optimizer, and the keys that it has of its own.

    These are its `Optimizer.keys`, such as `beta1`. One that is null or left out has its default. Weight decay is on
    matrices only, not on norms and biases.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Any] = Field(init=False)

    kind: str = Field(
        ADAMW,
        description="optimizer of all parameters",
        json_schema_extra=lambda schema: schema.update(enum=[*OPTIMIZERS]),
    )
    learning_rate: Annotated[float, Field(gt=0)] = Field(
        description="peak learning rate, reached at the end of the warm-up. The paper's: 6e-4 for size s down to 2e-4 "
        "for xl"
    )
    factor_learning_rate_scale: Annotated[float, Field(gt=0)] = Field(
        1.0, description="learning rate of the factors of structured linears, as a multiple of learning_rate"
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        0.1, description="decoupled weight decay of matrices; norms and biases have none"
    )
    vocabulary_weight_decay: Annotated[float, Field(ge=0)] | None = Field(
        None, description="weight decay of embedding and output head. Left out: weight_decay"
    )
    gradient_clipping: Annotated[float, Field(ge=0)] = Field(
        1.0, description="largest norm of the gradient over all parameters; a larger one is scaled down to it. 0: off"
    )

    @model_validator(mode="before")
    @classmethod
    def _with_defaults(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        chosen = OPTIMIZERS.get(str(values.get("kind", ADAMW)))
        given = {key: value for key, value in values.items() if value is not None or key in cls.model_fields}
        return (chosen.settings({}) if chosen else {}) | given

    def decay_of(self, role: Role) -> float:
        """The weight decay of parameters with this role, if they decay at all."""
        own = self.vocabulary_weight_decay if role == "vocabulary" else None
        return self.weight_decay if own is None else own

    @property
    def settings(self) -> dict[str, Any]:
        """The values of the optimizer's own keys, as its record takes them."""
        return dict(self.__pydantic_extra__)
