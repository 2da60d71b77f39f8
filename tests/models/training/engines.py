# SPDX-License-Identifier: Apache-2.0
"""Megatron engines on the batches and weights of a parity job, for tests that look at single steps."""

from models.contract.families import detect_family, family_part
from models.contract.launcher import LauncherEnvironment
from models.contract.recipe import Recipe
from models.parity.compare import load
from models.parity.layouts import Job
from models.training.megatron_engine import MegatronEngine
from models.training.parallel import start_megatron

ALONE = LauncherEnvironment(rank=0, world_size=1, local_rank=0, is_launched=False)
TIMEOUT_S = 120.0


def make_engine(recipe: Recipe, job: Job, launcher: LauncherEnvironment = ALONE) -> MegatronEngine:
    """An engine with the job's model and weights, in groups that it starts; `stop_distributed` takes them down."""
    ranks = start_megatron(recipe, launcher, timeout_s=TIMEOUT_S)
    architecture = family_part(detect_family(job.hf_config), "config").ModelConfig.from_hf(job.hf_config)
    engine = MegatronEngine(recipe, architecture, ranks, ())
    load(engine.modules[0], job.weights)
    engine.prepare()
    return engine
