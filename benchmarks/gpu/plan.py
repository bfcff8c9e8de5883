"""The two sessions: stages by their worth, with the seconds each should take on an H100; the tests' files.

Names only, so that the plan is read without loading torch; ``worker.py`` imports what they name.
"""

from __future__ import annotations

# stage -> (module:function, seconds)
STAGES = {
    "first_token": ("commands:first_token", 40),
    "cache": ("checks:cache", 4),
    "launch_costs": ("times:launch_costs", 12),
    "ceilings": ("times:ceilings", 8),
    "sampler": ("checks:sampler", 25),
    "ops": ("checks:ops", 65),
    "steps": ("checks:steps", 20),
    "generation": ("checks:generation", 6),
    "step_times": ("times:step", 10),
    "decode_times": ("times:decode", 12),
    "attention_times": ("times:attention", 12),
    "other_times": ("times:norms_and_products", 8),
    "tests": ("commands:tests", 70),
    "backward_times": ("times:backward", 20),
    "soak": ("commands:soak", 15),
    "sanitizers": ("commands:sanitizers", 75),
    "tune": ("commands:tune", 90),
    "drop_in": ("commands:drop_in", 45),
    "profile": ("commands:profile", 15),
}

SESSIONS = {
    "first": [
        "first_token",
        "cache",
        "launch_costs",
        "ceilings",
        "sampler",
        "ops",
        "steps",
        "generation",
        "step_times",
        "decode_times",
        "attention_times",
        "other_times",
        "tests",
    ],
    "second": [
        "backward_times",
        "soak",
        "sanitizers",
        "tune",
        "drop_in",
        "profile",
    ],
}

# The files whose tests run kernels on the device, the quickest to tell something first.
TESTS = (
    *(
        f"tests/ops/test_{name}.py"
        for name in ("decode_attention", "decode_linear", "flash_attention", "linear")
    ),
    *(f"tests/ops/test_{name}.py" for name in ("gelu_mlp", "layer_norm", "rms_norm", "linear_cross_entropy")),
    *("tests/ops/test_sample_devices.py", "tests/test_persistent_step.py", "tests/test_decode.py"),
)
