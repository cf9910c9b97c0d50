"""What all sections of a config share."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MAX_INTEGER = 10**18  # what follows from such numbers stays within the range of a float
MAX_TENSOR_SIZE = 2**24  # 16.8 million: more than the largest width, vocabulary, sequence or batch in use
MAX_SECONDS = 1e9  # 31 years; timers of the operating system take no more than a few hundred

Size = Annotated[int, Field(ge=1, le=MAX_INTEGER)]
Count = Annotated[int, Field(ge=0, le=MAX_INTEGER)]
TensorSize = Annotated[int, Field(ge=1, le=MAX_TENSOR_SIZE)]  # a dimension of tensors in memory
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """A frozen group of keys; unknown keys and values of another type are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
