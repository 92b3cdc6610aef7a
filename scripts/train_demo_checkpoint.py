"""Make the built-in demo checkpoint, a small FLUX of coloured shapes, from nothing: about an hour on two idle cores.

    python scripts/train_demo_checkpoint.py                         train, save, evaluate
    python scripts/train_demo_checkpoint.py --evaluate --output F   only evaluate the checkpoint in folder F

It draws its own training pictures, trains the autoencoder, then the transformer together with both text encoders.
A stopped run goes on where it was when it is started again with the same flags.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from demo_checkpoint import autoencoder, checkpoint, evaluation, text, transformer

_REPOSITORY = Path(__file__).resolve().parents[1]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--output",
        type=Path,
        default=_REPOSITORY / "python_backend" / "triton_diffusion" / "demo_checkpoint",
        help="folder of the finished checkpoint (default: %(default)s)",
    )
    add(
        "--work-dir",
        type=Path,
        default=_REPOSITORY / "outputs" / "demo_training",
        help="folder of the training's state, for going on after a stop (default: %(default)s)",
    )
    add("--seed", type=int, default=0, help="fixes weights, pictures, captions and noise (default: %(default)s)")
    add("--autoencoder-steps", type=int, default=1750, help="(default: %(default)s)")
    add("--transformer-steps", type=int, default=4800, help="(default: %(default)s)")
    add("--pictures", type=int, default=10_000, help="pictures the transformer learns from (default: %(default)s)")
    add("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    add("--evaluate", action="store_true", help="train nothing: evaluate the checkpoint in --output")
    add("--snapshot", action="store_true", help="train nothing: save what the state in --work-dir has learnt so far")
    add("--prompts", type=int, default=200, help="held-out prompts to evaluate with (default: %(default)s)")
    add("--evaluation-steps", type=int, default=20, help="denoising steps of the evaluation (default: %(default)s)")
    add(
        "--contact-sheet",
        type=Path,
        default=_REPOSITORY / "outputs" / "demo_contact_sheet.png",
        help="where the evaluation shows its first 40 pictures (default: %(default)s)",
    )
    return parser.parse_args(arguments)


def train(options: argparse.Namespace) -> None:
    """Train what is not trained yet, and save the checkpoint."""
    options.work_dir.mkdir(parents=True, exist_ok=True)
    vae_settings = autoencoder.AutoencoderSettings(steps=options.autoencoder_steps, seed=options.seed)
    settings = transformer.TransformerSettings(
        steps=options.transformer_steps, seed=options.seed, pictures=options.pictures
    )
    tokenizers = text.train_tokenizers(options.seed)
    vae = autoencoder.train_autoencoder(vae_settings, options.work_dir)
    model = transformer.train_transformer(vae, tokenizers, settings, options.work_dir, snapshot=options.snapshot)
    size_bytes = checkpoint.save_checkpoint(options.output, vae=vae, model=model, tokenizers=tokenizers)
    print(f"saved {options.output}: {size_bytes / 1e6:.1f} MB of weights")


def evaluate(options: argparse.Namespace) -> None:
    """Draw the held-out prompts, and print how many pictures show what they say."""
    pipeline = checkpoint.load_pipeline(options.output)
    results = evaluation.draw_and_judge(
        pipeline, num_prompts=options.prompts, num_inference_steps=options.evaluation_steps
    )
    print(evaluation.summary(results))
    options.contact_sheet.parent.mkdir(parents=True, exist_ok=True)
    evaluation.contact_sheet(results[:40]).save(options.contact_sheet, optimize=True)
    print(f"wrote {options.contact_sheet}")


def main() -> None:
    """Train and evaluate, as the command line says."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    if not options.evaluate:
        train(options)
    evaluate(options)


if __name__ == "__main__":
    main()
