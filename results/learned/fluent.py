"""A learned reward: how much a picture looks as if it were drawn by Fluent, one of six emoji sets.

The paper's aesthetic reward is a linear layer on the features of CLIP ViT-L/14, trained on people's
ratings. This is a linear layer on features of the small CLIP of models/emoji, trained to tell the
shaded drawings of Fluent from those of the other five sets, of which one is its flat version. The
features are the mean and the standard deviation of each channel after the first residual stage;
those of the last layer know the animal and hardly the style. Sources and licences of the drawings:
models/emoji/README.md.

    python ddpo_is.py --reward results/learned/fluent.py:fluent
    python results/learned/fluent.py    # trains fluent.safetensors again: npm, pip install resvg_py
"""

import sys
from functools import cache
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = ROOT / "results/learned/fluent.safetensors"


@cache
def load_clip():
    model, _, preprocess = open_clip.create_model_and_transforms(
        f"local-dir:{ROOT}/models/emoji/clip"
    )
    return model.visual.eval(), preprocess


@torch.no_grad()
def extract_features(images):
    """uint8 (N, 64, 64, 3) -> float32 (N, 128)"""
    visual, preprocess = load_clip()
    features = []
    for chunk in np.array_split(images, len(images) // 256 + 1):
        pixels = torch.stack([preprocess(Image.fromarray(image)) for image in chunk])
        output = visual.forward_intermediates(pixels, indices=[1], intermediates_only=True)
        stage = output["image_intermediates"][0]
        features.append(torch.cat([stage.mean((2, 3)), stage.std((2, 3))], dim=1))
    return torch.cat(features)


def fluent(images, prompts):
    """Log-odds of Fluent, as if half of all were. images uint8 (N, 64, 64, 3) -> (N,)."""
    layer = load_file(WEIGHTS)
    return (extract_features(images) @ layer["weight"] + layer["bias"]).numpy()


def compose_pictures(work, copies=16):
    """Pictures uint8 (N, 64, 64, 3), and per picture its animal and whether it is Fluent's."""
    import pretrain

    name_of = pretrain.name_icons()
    rng = np.random.default_rng(0)
    pictures, names, is_fluent = [], [], []
    for emoji_set, icon, svg in pretrain.read_icons(work):
        if icon in name_of:
            drawing = pretrain.center(pretrain.rasterise(svg), size=128, margin=0)
            for _ in range(copies):
                pictures.append(pretrain.compose(drawing, name_of[icon], rng)[0])
                names.append(name_of[icon])
                is_fluent.append(emoji_set == "fluent-emoji")
    return np.stack(pictures), np.array(names), torch.tensor(is_fluent).float()


def train(features, is_fluent, weight_decay=1e-3):
    """Logistic regression of standardised features, both classes with equal weight."""
    mean, std = features.mean(dim=0), features.std(dim=0)
    weight = torch.zeros(features.shape[1], requires_grad=True)
    bias = torch.zeros((), requires_grad=True)
    pos_weight = (1 - is_fluent).sum() / is_fluent.sum()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        logits = (features - mean) / std @ weight + bias
        loss = F.binary_cross_entropy_with_logits(logits, is_fluent, pos_weight=pos_weight)
        loss = loss + weight_decay * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    weight = (weight / std).detach()
    return {"weight": weight, "bias": bias.detach() - mean @ weight}


def main():
    work = ROOT / "runs/pretrain"
    work.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(ROOT / "models/emoji"))
    pictures, names, is_fluent = compose_pictures(work)
    features = extract_features(pictures)
    held_out = (ROOT / "results/held_out/held_out.txt").read_text().splitlines()
    is_test = torch.tensor(np.isin(names, held_out))
    layer = train(features[~is_test], is_fluent[~is_test])
    save_file(layer, WEIGHTS)

    logits = features @ layer["weight"] + layer["bias"]
    for title, chosen in (("trained on", ~is_test), ("other animals", is_test)):
        ours = logits[chosen & (is_fluent == 1)]
        others = logits[chosen & (is_fluent == 0)]
        auc = (ours[:, None] > others).float().mean()
        print(
            f"{title}: {len(ours)} of Fluent {ours.mean():.2f} +- {ours.std():.2f}, "
            f"{len(others)} others {others.mean():.2f} +- {others.std():.2f}, AUC {auc:.3f}"
        )


if __name__ == "__main__":
    main()
