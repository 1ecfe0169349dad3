"""The benches that run as they are: `python -m bench` prints their names, `python -m bench.NAME [--json]` runs one.

Those that need a folder to train in, or that of a finished run (`--run`), are called by hand: `lab.ablation`,
`lab.baselines`, `lab.dynamics`, `lab.extend`, `lab.recipes`, `lab.scaling`, `lab.sharded`, `lab.table1`,
`lab.teacher_steps`, `lab.train_settings`.
"""

from __future__ import annotations

BENCHES = (
    "kernels.adaln",
    "kernels.block",
    "kernels.dmd_score",
    "kernels.forward",
    "kernels.lora_linear",
    "kernels.lora_qkv",
    "kernels.renoise",
    "kernels.sm90",
    "lab.deployment",
    "lab.eight_bits",
    "lab.groups",
    "lab.quantized_base",
    "lab.tables",
    "lab.tiny_base",
    "lab.verdicts",
    "serving.deployment",
    "serving.load",
    "serving.mixed_effects",
    "serving.overload",
    "serving.sampler",
    "serving.tensorrt",
    "training.joint",
    "training.tiny_step",
    "training.train_cycle",
)

if __name__ == "__main__":
    print("\n".join(BENCHES))
