"""Print the preset that fits this machine's GPUs: bf16-flash, bf16, float32, or none (no GPU)."""

import importlib

import torch


def preset() -> str:
    if not torch.cuda.is_available():
        return "none"
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        return "float32"
    try:
        importlib.import_module("flash_attn")
    except ImportError:  # absent, or built for another torch
        return "bf16"
    return "bf16-flash"


if __name__ == "__main__":
    print(preset())
