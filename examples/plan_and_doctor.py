"""Reading `safealloc plan` and `safealloc doctor` from Python: what a pool will hold for a model, and what can run here.

The configuration is written here, so that nothing is downloaded: a model's own `config.json` goes in its place. Runs on any
device.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from safealloc.commands import doctor
from safealloc.commands.plan import command as plan
from safealloc.commands.plan.deployment import Deployment

CONFIG = {  # of a small Llama
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "config.json")
        config.write_text(json.dumps(CONFIG))
        planned = plan.run(config, Deployment(sizes=(1, 2, 4, 8, 16)), as_nvfp4=True)  # it is not quantized
    print(f"{planned.model}: {len(planned.buffers)} buffers, {planned.nbytes} bytes on each rank")
    for site in planned.sites:
        print(f"  {site.name}: k={site.k}, n={site.n}, in {len(site.layers)} layers")

    found = doctor.run(lambda step, *share: None)  # told which step it is at
    for device in found.devices:
        print(f"{device.device}, {device.name}:")
        for kind, backends in (("quantizer", device.quantizers), ("GEMM", device.gemms)):
            for backend in backends:
                where = " and ".join(backend.usable) or f"cannot run: {next(iter(backend.refused.values()))}"
                print(f"  {kind} {backend.name}: {where}")


if __name__ == "__main__":
    main()
