"""Evaluations that a bundle keeps with its variants."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from dcqfa_ros.bundle.schema import QualityRecord
from dcqfa_ros.errors import UserError


class QualityError(UserError, ValueError):
    """An evaluation file that cannot be recorded; the message names option or file and field."""


def read_quality(arguments: Sequence[str]) -> dict[str, tuple[QualityRecord, ...]]:
    """Read ``VARIANT=FILE`` arguments, each FILE the output of ``dcqfa eval --json``.

    Raises:
        QualityError: an argument has another form, or a file cannot be read, lacks a field, or its seeds have gaps.
    """
    records: dict[str, tuple[QualityRecord, ...]] = {}
    for argument in arguments:
        variant, separator, file = argument.partition("=")
        if not (variant and separator and file):
            raise QualityError(f"--quality {argument}: expected VARIANT=FILE")
        records[variant] = (*records.get(variant, ()), _record(variant, Path(file)))
    return records


def _record(variant: str, file: Path) -> QualityRecord:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        seeds, first = list(document["seeds"]), int(document["first_seed"])
        steps, name = int(document["denoising_steps"]), document["policy"]
        if document["variant"] != variant:
            raise QualityError(f"{file}: holds an evaluation of variant {document['variant']!r}, not of {variant!r}")
        if seeds != list(range(first, first + len(seeds))):
            raise QualityError(f"{file}: seeds: expected consecutive ones from first_seed {first}")
        return QualityRecord(
            metric=document["metric"],
            mean=document["mean"],
            ci95=document["ci95"],
            first_seed=first,
            seeds=len(seeds),
            steps=steps,
            command=f"dcqfa eval {name} --variant {variant} --seeds {len(seeds)} --first-seed {first} --steps {steps}",
        )
    except OSError as error:
        raise QualityError(f"{file}: cannot be read ({error.strerror})") from error
    except KeyError as error:
        raise QualityError(f"{file}: field {error} is missing; expected the output of `dcqfa eval --json`") from error
    except QualityError:
        raise
    except (TypeError, ValueError) as error:  # no JSON, or a field of another kind
        raise QualityError(f"{file}: expected the output of `dcqfa eval --json` ({error})") from error
