"""How many forwards of the transformer a distillation needs, from its configuration alone.

The unit is the forward of one sample; a backward counts as two. Where chance decides (how far a sample is rolled out,
where the critic's samples come from) the mean is counted. What the prompts and encoders cost is left out.
"""

from __future__ import annotations

from clora.config import Config
from clora.method.flow import few_step_sigmas
from clora.method.noise import first_imitated, imitated_counts, matched_steps
from clora.method.routing import Stream, draw_stream

BACKWARD = 2  # forwards


def distillation_forwards(config: Config) -> float:
    """Of all steps of `clora train` on one process, with general data where p_switch is below 1."""
    train, objective = config.train, config.objective
    coarse = min(train.coarse_steps, train.max_train_steps) if config.effects else 0
    total = float(coarse * coarse_step_forwards(config))
    for step in range(coarse, train.max_train_steps):
        stream = draw_stream(config.seed, step, objective.p_switch) if config.effects else "general"
        total += full_step_forwards(config, stream)
    return total


def coarse_step_forwards(config: Config) -> int:
    """Of a coarse step: the student's, and the teacher's where its velocity is followed."""
    train = config.train
    samples = train.gradient_accumulation_steps * (train.anchor_batch_size or train.batch_size)
    asked = (1 + (config.objective.guidance != 1.0)) if train.coarse_target == "velocity" else 0
    return samples * (1 + BACKWARD + asked)


def joint_step_forwards(config: Config) -> int:
    """Of a flow-matching step on as many samples as TA-FM has, as `teach_joint` makes it."""
    return (config.train.anchor_batch_size or config.train.batch_size) * (1 + BACKWARD)


def full_step_forwards(config: Config, stream: Stream) -> float:
    """Of a step of the full objective: `critic_updates` updates of the critic, then one of the student (Eq. 9)."""
    train, objective = config.train, config.objective
    rollout = 1 + steps_before(config)
    share = objective.critic_target_share if stream == "effect" else 0.0
    sample = share + (1 - share) * rollout
    critic = train.critic_updates * (1 + BACKWARD) + (train.critic_updates - train.critic_reuse) * sample
    guided = objective.guidance != 1.0
    scores = 2 + guided  # of critic and teacher
    student = 0.0
    if objective.dmd_bs_weight or train.critic_reuse:
        student += rollout
    if objective.dmd_bs_weight:
        student += BACKWARD + scores
    batches = train.batch_size * (critic + student)
    if stream == "effect":
        batches += train.batch_size * (1 + BACKWARD + scores) * bool(objective.dmd_ts_weight)
        batches += joint_step_forwards(config) * bool(objective.ta_fm_weight)
    if objective.imitates(stream):
        size = train.anchor_batch_size or train.batch_size if stream == "effect" else train.batch_size
        batches += size * imitation_forwards(config, stream)
    return train.gradient_accumulation_steps * batches


def imitation_forwards(config: Config, stream: Stream) -> float:
    """Of a sample of imitation: student, teacher, and the rollout to its state where it has one."""
    objective = config.objective
    on_policy = objective.on_policy_share if stream == "effect" else 1.0
    guided = objective.guidance != 1.0 and objective.imitation == "segment_mean"
    return 1 + BACKWARD + (1 + guided) + on_policy * imitated_steps_before(config)


def steps_before(config: Config) -> float:
    """How many steps a rollout takes before the one it is left at, which is drawn evenly: the mean."""
    counts, shift = config.schedule.trained_counts, config.schedule.shift
    return sum((matched_steps(config, few_step_sigmas(count, shift)) - 1) / 2 for count in counts) / len(counts)


def imitated_steps_before(config: Config) -> float:
    """The same of imitation's rollouts."""
    counts, shift = imitated_counts(config), config.schedule.shift
    firsts = [first_imitated(config, few_step_sigmas(count, shift)) for count in counts]
    return sum((first + count - 1) / 2 for first, count in zip(firsts, counts, strict=True)) / len(counts)
