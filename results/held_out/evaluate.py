"""Evaluate finished runs on prompts that they were not trained on, before and after training.

    python results/held_out/evaluate.py results/held_out/held_out.txt OUT RUN...

Run from the root of the repository, for runs without LoRA, whose folders have unet/ (the published
ones do not). Writes OUT/NAME for each run folder, which must not be there yet: metrics.csv with two
rows, iteration 0 and that of the saved weights, by the script's own evaluation (up to 32 prompts
spread over the file, two noises each), so that `plot.py table OUT` reads them; prompts.txt,
args.json and pictures as in any run.
"""

import csv
import importlib
import json
import sys
from pathlib import Path

import diffusers
from diffusers import UNet2DConditionModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from rewards import load_metrics, load_reward


def evaluate(run, file, out):
    """run, out: folders; file: one prompt per line."""
    metadata = json.loads((run / "args.json").read_text())
    script = importlib.import_module(metadata["script"])
    args = script.load_args(run)
    prompts = script.load_prompts(file)
    score = load_reward(args.reward, args.device, f"{args.model}/clip")
    measure = load_metrics(args.reward, args.device, f"{args.model}/clip")
    pipe, _ = script.load_model(args)
    schedule = script.make_schedule(pipe, args)
    with open(run / "metrics.csv", newline="") as table:
        last = [row for row in csv.DictReader(table) if row["eval_reward"]][-1]
    tuned = UNet2DConditionModel.from_pretrained(run / "unet")

    out.mkdir(parents=True)
    rows = []
    for iteration in (0, int(last["iteration"])):
        if iteration > 0:
            pipe.unet.load_state_dict(tuned.state_dict())
        row = {"iteration": iteration, "samples": int(last["samples"]) if iteration else 0}
        row |= script.evaluate(pipe, out, iteration, prompts, score, measure, schedule, args)
        rows.append(row)
    with open(out / "metrics.csv", "w", newline="") as table:
        writer = csv.DictWriter(table, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    metadata["args"]["prompts"] = file
    (out / "args.json").write_text(json.dumps(metadata, indent=2))
    (out / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    file, out, *runs = sys.argv[1:]
    for run in map(Path, runs):
        evaluate(run, file, Path(out, run.name))
        print(Path(out, run.name))
