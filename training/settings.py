"""The settings of a training run: their defaults, those of the demo, and the presets."""

from dataclasses import dataclass
from typing import Any, Literal

import tyro

import model_drunet_v2 as model
from cohort.selection import TrainingSource
from runtime import command, machine
from runtime.command import Count, CountOrZero, Decay, NotNegative, PlainName, Positive, Seed, Share


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run; the defaults are those of the published method."""

    # the run
    run: PlainName | None = None
    """name of the run folder; default: the data folder's name and the time"""
    results_dir: str = "results"
    """folder that holds the runs"""
    resume: str | None = None
    """run folder to go on with, under its own settings; only --epochs, --max-minutes, --early-stop,
    --workers, --device, --cache-dir, --compile, --checkpointing, --probe, for a finished run the learning
    rates, and for a run of folds --fold may be given with it"""
    config: str | None = None
    """config.json of another run, whose settings are the defaults of this one"""
    init: str | None = None
    """checkpoint whose weights the run starts from; its network and regions are the defaults"""
    preset: Literal["published", "strong"] = "published"
    """defaults of the settings: the published method, or what was measured to be better (Claims in README)"""
    seed: Seed = 0
    """seed of weights, split, draws and augmentation"""

    # the cases
    source: tyro.conf.OmitArgPrefixes[TrainingSource] = TrainingSource()

    # the network
    context: command.Neighbours = 1
    """neighbouring slices on each side of the one segmented"""
    size: command.Side = 256
    """height and width of the network's input"""
    widths: model.Widths = model.WIDTHS
    """filters per level, the last is the bottleneck"""
    use_se: bool = True
    """squeeze-and-excitation in every residual block"""
    se_form: model.SqueezeForm = "head"
    """over what it averages: the head alone, or the whole slab, as first published, by which a network is
    worse on scans with other backgrounds"""
    use_attention: bool = True
    """attention gates on the skips"""
    dilated: bool = True
    """dilation in the encoder"""
    residual: bool = True
    """residual connections in the blocks"""
    compress: bool = False
    """draw what is brighter than most tissue together first, so that a tumour brighter than those of training
    is not taken for scalp"""

    # how long
    epochs: Count = 100
    """epochs at most"""
    max_minutes: Positive | None = None
    """wall-clock limit; the run still ends with validation and plots"""
    slabs_per_epoch: Count | None = None
    """slabs drawn per epoch; default: as many as there are training slices"""
    early_stop: Count = 15
    """epochs without any rise of validation Dice before the run ends; not with --keep last"""
    keep: Literal["best", "last"] = "best"
    """the epoch whose weights are best.pt: that of the highest validation Dice, or the last; few validation
    cases choose badly"""

    # the step
    batch_size: command.BatchSize = 16
    """slabs per step, on each rank under torchrun"""
    accumulate: Count = 1
    """steps whose gradients are added up before the weights move"""
    learning_rate: Positive = 1e-4
    """AdamW learning rate after warm-up; --resume may set it again for a finished run with more --epochs"""
    min_learning_rate: NotNegative = 1e-5
    """the learning rate never drops below this; set again, the run goes on from --learning-rate"""
    rate_since: tyro.conf.Suppress[tyro.conf.Fixed[int]] = 0
    """epochs that were finished when the learning rate was last set again"""
    warmup_steps: CountOrZero = 200
    """optimiser steps of linear warm-up, at most one epoch"""
    patience: CountOrZero = 5
    """epochs in a row without a rise of validation Dice above 0.001; the next divides the rate by 10"""
    drop_by: Positive = 0.75
    """share of the epochs or minutes after which the rate is --min-learning-rate; above 1 never"""
    schedule: Literal["plateau", "cosine"] = "plateau"
    """cosine: the rate falls to --min-learning-rate along a cosine of that share, from step to step, whatever
    validation says"""
    weight_decay: NotNegative = 1e-2
    """AdamW weight decay"""
    clip_norm: Positive = 5.0
    """largest gradient norm"""
    ema: Decay = 0.0
    """decay of the averaged weights that are validated and kept; 0 is off"""

    # the loss and the draws
    focal_weight: NotNegative = 1.0
    """weight of the focal loss"""
    dice_weight: NotNegative = 1.0
    """weight of the Dice loss"""
    tumour_share: Share = 0.5
    """share of draws that show a region trained on"""
    empty_share: Share = 0.02
    """share of draws that show no brain"""
    phantom_share: Decay = 0.0
    """share of draws that are of synthetic heads, as two scanners see them, beside those of the cases: for
    scans of scanners that training has not seen"""
    modality_dropout: Decay = 0.0
    """probability that a modality of a slab is left out, never all; the network then works without some"""

    # the machine
    device: machine.DeviceName = "auto"
    """where to compute"""
    amp: bool = True
    """mixed precision: bfloat16, or float16 with loss scaling, where the device has it"""
    workers: command.Processes = 2
    """loader processes; 0 loads in the training process"""
    compile: bool = False
    """compile the network with torch.compile; where that fails, go on without"""
    checkpointing: bool = False
    """compute activations again in the backward pass: less memory, slower"""
    sync_batchnorm: bool = False
    """batch statistics over the slabs of all ranks, under torchrun"""
    probe: bool = True
    """log before the first epoch what memory a step of full size needs"""
    deterministic: bool = False
    """the same bits each time on one kind of machine, with any number of workers: torch's deterministic
    algorithms, and on a CPU no choice of the fastest number of threads; a step there takes 10 % longer"""


# What the demo sets where the command line says nothing else.
DEMO = TrainConfig(
    size=128,
    widths=(16, 32, 64, 128, 256),
    max_minutes=6.0,
    slabs_per_epoch=1024,
    learning_rate=2e-3,
    min_learning_rate=2e-4,
    warmup_steps=50,
    ema=0.98,
)
# What --preset sets where the command line says nothing else; benchmarks/README.md has the measurements.
PRESETS: dict[str, dict[str, Any]] = {
    "published": {},
    "strong": {
        "use_se": False,
        "use_attention": False,
        "compress": True,
        "schedule": "cosine",
        "drop_by": 1.0,
        "learning_rate": 2e-3,
        "min_learning_rate": 2e-5,
        "ema": 0.995,
        "keep": "last",
    },
}
