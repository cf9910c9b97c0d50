"""What all sections of a config share."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from megastruct.paths import expanded


def _path(text: str) -> str:
    try:
        return expanded(text)
    except ValueError as error:
        raise PydanticCustomError("path", str(error).replace("{", "{{")) from None


MAX_INTEGER = 10**18  # what follows from such numbers stays within the range of a float
MAX_TENSOR_SIZE = 2**24  # 16.8 million: more than the largest width, vocabulary, sequence or batch in use
MAX_SECONDS = 1e9  # 31 years; timers of the operating system take no more than a few hundred

Size = Annotated[int, Field(ge=1, le=MAX_INTEGER)]
Count = Annotated[int, Field(ge=0, le=MAX_INTEGER)]
TensorSize = Annotated[int, Field(ge=1, le=MAX_TENSOR_SIZE)]  # a dimension of tensors in memory
# A path, or the name or pattern of data; never read here.
PathText = Annotated[str, Field(min_length=1), AfterValidator(_path)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """A frozen group of keys; unknown keys and values of another type are errors."""

    # A key that is a word of Python, such as `from`, is an alias of its field.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, serialize_by_alias=True)
