"""The model card of a run, in the form that hubs expect: YAML front matter, then Markdown.

It is written to be published, so it names no case. Its command line names folders: the card says so.
"""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import jinja2
import yaml

from audit.runs import RunFacts
from runtime.files import file_sha256

TEMPLATES = Path(__file__).with_name("templates")
TAGS = ["medical-imaging", "mri", "brain-tumor", "image-segmentation", "u-net", "2.5d", "drunet-v2"]
COHORT_WORDS = {
    "internal": "held-out test patients",
    "external": "external cohort",
    "external_unseen": "external cohort without the cases that were seen",
    "predictions": "cases scored",
}
# settings of the machine and of places, by which a network is no other, and what the card says above them
NOT_LISTED = (
    "run", "results_dir", "resume", "config", "data_dir", "hold_out_dir", "mapping", "split", "different",
    "fold", "cache_dir", "device", "workers", "compile", "checkpointing", "probe", "ranks", "rate_since",
    "data_kind", "split_sha256",
)  # fmt: skip


def make_card(run: RunFacts) -> str:
    """Return the text of a run's model card; without an audit it has no numbers."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=False,  # Markdown, whose escape is the filter "code"
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"code": as_code, "block": as_block}
    # what a file does not say is None
    config, best = (defaultdict(lambda: None, known or {}) for known in (run.config, run.best))
    path = run.folder / "best.pt"
    return environment.get_template("model_card.md.j2").render(
        front_matter=yaml.safe_dump(describe_metadata(run), sort_keys=False, allow_unicode=True, width=1000),
        run=run,
        name=run.folder.resolve().name,
        config=config,
        best=best,
        settings={name: value for name, value in run.settings.items() if name not in NOT_LISTED},
        thresholds=dict(zip(config.get("regions") or (), best.get("thresholds") or (), strict=False)),
        words=COHORT_WORDS,
        checkpoint_sha256=file_sha256(path) if path.is_file() else None,
        left_out={name: len(config.get(name) or ()) for name in ("held_out", "skipped")},
    )


def describe_metadata(run: RunFacts) -> dict[str, Any]:
    """Return the front matter: licence (a placeholder), library, tags, metrics and the audit's results."""
    name = run.folder.resolve().name
    tags = [*TAGS, *(["synthetic-data"] if run.data_kind == "phantom" else [])]
    metadata: dict[str, Any] = {"license": "other", "license_name": "to-be-chosen", "library_name": "pytorch"}
    metadata |= {"pipeline_tag": "image-segmentation", "tags": tags, "metrics": ["dice"]}
    if not run.headlines:
        return metadata
    kind = {"phantom": "synthetic phantoms", "real": "patients"}.get(run.data_kind, "kind of data unknown")
    results = []
    for headline in run.headlines:
        cases = f"{headline.n_cases} cases of {headline.n_patients} patients"
        words = f"Dice per case, {headline.region}{', with TTA' if headline.is_tta else ''}"
        dataset = {"type": headline.cohort, "name": f"{COHORT_WORDS[headline.cohort]} ({kind})"}
        metric = {"type": "dice", "value": round(headline.dice["mean"], 4)}
        metric |= {"name": f"{words}, mean over {cases}: {headline.spread}", "verified": False}
        task = {"type": "image-segmentation", "name": "brain-tumour segmentation in MRI"}
        results.append({"task": task, "dataset": dataset, "metrics": [metric]})
    return metadata | {"model-index": [{"name": name, "results": results}]}


def as_code(value: Any) -> str:
    """Return a value as a code span, in which Markdown and HTML are text; for table cells too."""
    if isinstance(value, list | tuple):
        value = " ".join(map(str, value))
    text = " ".join(str(value).split()).replace("|", "\\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    edge = " " if "`" in text[:1] + text[-1:] else ""
    return f"{fence}{edge}{text}{edge}{fence}"


def as_block(value: Any) -> str:
    """Return a value as a block of code."""
    text = str(value)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}\n{text}\n{fence}"
