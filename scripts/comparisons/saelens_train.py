"""Train dictionaries with SAELens's own trainer; train_both.py runs this in an environment that has sae-lens.

    python scripts/comparisons/saelens_train.py jobs.json

A job states architecture and settings, the initial parameters, the stream and held-out activations. The program saves the
dictionary as SAELens publishes it in job["out"], and its codes and reconstruction of the held-out activations in
result.safetensors there.
"""

import json
import sys
import time
from pathlib import Path

import torch
from sae_lens import SAE
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file, save_file
from streams import Stored

PIECE = 4096  # activations encoded at a time


def train(job: dict) -> float:
    """Train, save what SAELens publishes, and return the seconds of training."""
    sae_class, config_class = get_sae_training_class(job["architecture"])
    sae = sae_class(config_class(device="cpu", normalize_activations="none", **job["sae"]))
    initial = load_file(job["initial"])
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name in initial:
                parameter.copy_(initial[name])
    batches = Stored(job["stream"]).batches(job["trainer"]["train_batch_size_samples"])
    trainer = SAETrainer(SAETrainerConfig(**job["trainer"]), sae, batches)
    start = time.perf_counter()
    trainer.fit()
    seconds = time.perf_counter() - start
    sae.save_inference_model(job["out"])
    return seconds


@torch.no_grad()
def use(job: dict) -> dict[str, torch.Tensor]:
    """Return codes (non-zero entries, in order of rows), reconstruction and decoder of the saved dictionary."""
    sae = SAE.load_from_disk(job["out"], device="cpu")
    counts, latents, values, x_hat = [], [], [], []
    for x in load_file(job["held_out"])["x"].split(PIECE):
        codes = sae.encode(x)
        row, latent = codes.nonzero(as_tuple=True)
        counts.append(torch.bincount(row, minlength=len(x)))
        latents.append(latent)
        values.append(codes[row, latent])
        x_hat.append(sae.decode(codes))
    found = {"counts": counts, "latent": latents, "value": values, "x_hat": x_hat}
    return {name: torch.cat(pieces) for name, pieces in found.items()} | {"W_dec": sae.W_dec.detach().contiguous()}


def main() -> None:
    jobs = json.loads(Path(sys.argv[1]).read_text())
    for job in jobs:
        torch.set_num_threads(job["threads"])
        seconds = train(job)
        save_file(use(job), f"{job['out']}/result.safetensors", metadata={"seconds": str(seconds)})


if __name__ == "__main__":
    main()
