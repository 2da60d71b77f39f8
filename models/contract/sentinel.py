# SPDX-License-Identifier: Apache-2.0
"""What a machine can do beside what a run got out of it: the file that the sentinel program writes.

The same two operations before and after a run tell a slow node from slow code.
"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from models.contract.errors import RunError
from models.contract.whole_file import write_whole

When = Literal["before", "after"]
MOMENTS: tuple[When, ...] = ("before", "after")
SENTINEL_PREFIX = "sentinel-"


class Sentinel(BaseModel):
    """One measurement, of all ranks together."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    started_at: str
    """ISO 8601, UTC."""
    device_names: tuple[str, ...]
    """One a rank, in order."""
    dtype: str
    matmul_size: int = Field(ge=1)
    """Side of the square matrices."""
    matmul_tflops: tuple[Annotated[float, Field(gt=0)], ...] = Field(min_length=1)
    """Dense product, one rate a rank, all ranks at work at once; median of the rounds: what a device keeps up."""
    matmul_best_tflops: tuple[Annotated[float, Field(gt=0)], ...] = Field(min_length=1)
    """Of each rank's fastest round: the ceiling."""
    all_reduce_bytes: int = Field(ge=0)
    all_reduce_gb_per_s: float | None = Field(gt=0)
    """Bus bandwidth, 2 (n - 1) / n of the bytes over the time of the slowest rank; None for one process."""

    @property
    def slowest_tflops(self) -> float:
        """Rate of the slowest rank: a step waits for it."""
        return min(self.matmul_tflops)

    def write(self, file: Path) -> None:
        """Write the file, whole or not at all."""
        write_whole(file, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read it back.

        Raises:
            RunError: it cannot be read.
        """
        try:
            return cls.model_validate_json(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, ValidationError) as error:
            raise RunError(
                "a sentinel measurement cannot be read", where=str(file), got=str(error)[:300],
                fix="remove the file, and the run is judged without it",
            ) from None  # fmt: skip


def sentinel_file(run_dir: Path, when: When) -> Path:
    """Where a run keeps the measurement before or after it."""
    return run_dir / f"{SENTINEL_PREFIX}{when}.json"
