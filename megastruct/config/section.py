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


Size = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
PathText = Annotated[str, AfterValidator(_path)]  # a path, or the name or pattern of data; never read here
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """A frozen group of keys; unknown keys and values of another type are errors."""

    # A key that is a word of Python, such as `from`, is an alias of its field.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, serialize_by_alias=True)
