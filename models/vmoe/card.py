"""The model card of the embedded model, written from what was measured."""

from models.vmoe.idx import CLASSES
from moe_spec.record import Json

_CARD = """\
# V-MoE on Fashion-MNIST

A small sparse vision transformer, so that every step of moe-edge can be tried at once and offline. It classifies
28 x 28 grey images of clothes into ten classes. {parameters:,} parameters in float32: a stem of three convolutions to
16 tokens, four pre-LayerNorm blocks of width 64, and in every second block eight experts of width 128, of which each
token uses two. Routing is that of V-MoE (https://arxiv.org/abs/2106.05974): softmax over all experts, top-2, gates not
renormalised, no token dropped.

## Files

| file | what |
|---|---|
| `config.json`, `model.safetensors` | the model, in transformers' layout (`models.vmoe.register()` first) |
| `preprocessor_config.json` | how an image becomes model input |
| `calibration.npz` | {shipped:,} images of the official training split, {each} of each class; trained on |
| `test.npz` | {shipped:,} images of the official test split, {each} of each class; never trained on |
| `recipe.json` | seed, hyper-parameters, versions, measurements, hashes of the data |

## Measured

| images | accuracy |
|---|---|
| official test split ({official:,}) | {accuracy_official:.2%} |
| `test.npz` ({shipped:,}) | {accuracy_shipped:.2%} |

Share of the routed tokens that each expert gets on the official test split:

| layer | {experts} |
|---|{rules}
{loads}

## How it was made

`python -m models.vmoe.train --data DIR -o DIR`: seed {seed}, {epochs} epochs of AdamW with warm-up and cosine, label
smoothing, mirrored and shifted images, the importance and load losses of the V-MoE paper; {minutes:.0f} minutes on one
CPU thread. One run, one seed, the last weights. Stem width, first weights, learning rate and shift were chosen by runs
of four epochs, compared on 5,000 held-out training images and not on the test split.

## Intended use

Trying out and testing moe-edge. It is no product: it knows ten classes of centred, isolated, grey pictures.

## Licence

The weights are under the licence of moe-edge (Apache-2.0). The images in `calibration.npz` and `test.npz` are from
[Fashion-MNIST](https://github.com/zalandoresearch/fashion-mnist):

> The MIT License (MIT)
>
> Copyright (c) 2017 Zalando SE, https://tech.zalando.com
>
> Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
> documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
> rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
> persons to whom the Software is furnished to do so, subject to the following conditions:
>
> The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
> Software.
>
> THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
> WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
> COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
> OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def model_card(recipe: Json) -> str:
    """README.md of the asset directory, from the content of its recipe.json."""
    loads = recipe["expert_load"]
    experts = len(next(iter(loads.values())))
    return _CARD.format(
        parameters=recipe["parameters"],
        shipped=recipe["examples"]["test.npz"],
        each=recipe["examples"]["test.npz"] // len(CLASSES),
        official=recipe["examples"]["official_test_split"],
        accuracy_shipped=recipe["accuracy"]["test.npz"],
        accuracy_official=recipe["accuracy"]["official_test_split"],
        experts=" | ".join(f"expert {expert}" for expert in range(experts)),
        rules="---|" * experts,
        loads="\n".join(
            f"| `{name}` | {' | '.join(f'{share:.1%}' for share in load)} |" for name, load in loads.items()
        ),
        seed=recipe["seed"],
        epochs=recipe["epochs"],
        minutes=recipe["training_seconds"] / 60,
    )
