"""The model card of a run, in the form that hubs expect: YAML front matter, then Markdown.

It is written to be published, so it names no case. Its command line names folders: the card says so.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml

from audit.kinds import KIND_WORDS, kind_of
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
    "data_kind", "split_sha256", "preset",
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
    # best.pt knows by what it was trained; --resume may have changed config.json since
    of_best = (run.best or {}).get("config", {})
    known = defaultdict(lambda: None, (run.config or {}) | of_best)  # what a file does not say is None
    settings = run.settings | of_best
    path = run.folder / "best.pt"
    return environment.get_template("model_card.md.j2").render(
        front_matter=yaml.safe_dump(describe_metadata(run), sort_keys=False, allow_unicode=True, width=1000),
        run=run,
        name=run.folder.resolve().name,
        config=known,
        kept=describe_kept(run, known),
        weights_sha256=(run.best or {}).get("weights_sha256"),
        settings={name: value for name, value in settings.items() if name not in NOT_LISTED},
        words=COHORT_WORDS,
        checkpoint_sha256=file_sha256(path) if path.is_file() else None,
    )


def describe_kept(run: RunFacts, config: Mapping[str, Any]) -> str:
    """Return in words what validation chose of the weights kept, and their Dice on it; "" without weights."""
    best = run.best or {}
    if best.get("validation_dice") is None:
        return ""
    cases = next((row["cases"] for row in run.counts if row["part"] == "validation"), None)
    values = zip(config["regions"] or (), best.get("thresholds") or (), strict=False)
    thresholds = ", ".join(f"{region} {value:.2f}" for region, value in values)
    words = f"Validation chose the epoch ({best.get('epoch')})."
    if config["keep"] == "last":
        words = f"The last epoch ({best.get('epoch')}) was kept."
    if thresholds and cases == 1:
        words += f" One validation case chooses no threshold ({thresholds})."
    elif thresholds:
        words += f" The threshold ({thresholds}) was chosen on validation."
    if "postprocessing" in best:
        words += " Post-processing was chosen on validation."
    else:
        words += " Post-processing has not been chosen, as training is not finished."
    of_cases = "its cases" if cases is None else f"{cases} case{'' if cases == 1 else 's'}"
    return (
        f"{words} Dice there was {best['validation_dice']:.3f}, mean over regions and {of_cases}, at "
        "probability 0.5 without TTA; as it served these choices, it is no result."
    )


def describe_metadata(run: RunFacts) -> dict[str, Any]:
    """Return the front matter: licence (a placeholder), library, tags, metrics and the audit's results."""
    name = run.folder.resolve().name
    tags = [*TAGS, *(["synthetic-data"] if run.data_kind == "phantom" else [])]
    metadata: dict[str, Any] = {"license": "other", "license_name": "to-be-chosen", "library_name": "pytorch"}
    metadata |= {"pipeline_tag": "image-segmentation", "tags": tags, "metrics": ["dice"]}
    if not run.headlines:
        return metadata
    results = []
    for headline in run.headlines:
        cases = f"{headline.n_cases} cases of {headline.n_patients} patients"
        words = f"Dice per case, {headline.region}{', with TTA' if headline.is_tta else ''}"
        dataset = {"type": headline.cohort, "name": describe_cohort(run, headline.cohort)}
        metric = {"type": "dice", "value": round(headline.dice["mean"], 4)}
        metric |= {"name": f"{words}, mean over {cases}: {headline.spread}", "verified": False}
        task = {"type": "image-segmentation", "name": "brain-tumour segmentation in MRI"}
        results.append({"task": task, "dataset": dataset, "metrics": [metric]})
    return metadata | {"model-index": [{"name": name, "results": results}]}


def describe_cohort(run: RunFacts, cohort: str) -> str:
    """Return in words what the cases of a test cohort are, and whether training has seen some."""
    facts = [KIND_WORDS.get(kind_of(run.summary, cohort), "kind of data unknown")]
    if cohort == "internal" and run.sources:
        facts.append("of " + ", ".join(dict.fromkeys(line.cohort for line in run.sources)) + " together")
    seen = (run.summary.get("seen_in_training") or {}).get(cohort) or {}
    if seen.get("seen"):
        facts.append(f"{seen['seen']} of {seen['cases']} seen in training or validation")
    return f"{COHORT_WORDS[cohort]} ({'; '.join(facts)})"


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
